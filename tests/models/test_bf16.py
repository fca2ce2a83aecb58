"""Modules in bfloat16 through both lowering routes: weights in two bytes an element, tied ones once, by option."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from executorch_webgpu.ops.packed import format_of
from executorch_webgpu.partitioner import WebGPUPartitioner
from executorch_webgpu.runtime import Runtime
from tests.harness import device
from tests.models.test_quantized import VOCABULARY, Net, exact, lowered


class Tied(Net):
    """The last layer shares the table; sizes as given."""

    def __init__(self, sizes: tuple[int, ...], bias: bool = True) -> None:
        super().__init__((*sizes, VOCABULARY), bias)
        self.layers[-1].weight = self.table.weight


def stored(pte: bytes, on: str) -> tuple[Any, int]:
    """(method, bytes of its weights on the GPU)."""
    place = device(on)
    before = place.memory.by_purpose.get("weights", 0)
    method = Runtime(place).load_program(pte).load_method("forward")
    assert (len(method.delegates), method.outside()) == (1, [])
    return method, place.memory.by_purpose["weights"] - before


def check(method: Any, net: Net) -> None:
    """1, 2, 9 and 12 rows against float64: nothing is rounded to bfloat16 but the result."""
    for rows in (1, 2, 9, 12):
        tokens = torch.randint(0, VOCABULARY, (1, rows), generator=torch.Generator().manual_seed(rows))
        [got] = method.execute([tokens])
        with torch.no_grad():
            want = exact(net, tokens)
        error = (torch.as_tensor(got).double() - want).abs()
        assert bool((error <= 1e-4 + 4e-3 * want.abs()).all()), (rows, float(error.max()))


@pytest.mark.parametrize(("route", "on"), [("A", "full"), ("B", "default-limits")])
def test_matrices_take_two_bytes_an_element(route: str, on: str) -> None:
    net = Tied((96, 64, 96)).eval().to(torch.bfloat16)
    method, size = stored(lowered(net, route), on)
    matrices = {p.data_ptr(): p.numel() for p in net.parameters() if p.dim() == 2}
    biases = [p.numel() for p in net.parameters() if p.dim() == 1]
    assert size == sum(2 * n for n in matrices.values()) + sum(4 * n for n in biases)
    graph = method.delegates[0].graph
    words = [value.shape for value in graph.values if value.kind == "constant" and value.dtype == "u32"]
    assert sorted(words) == sorted((n, k // 2) for n, k in ((64, 96), (96, 64), (VOCABULARY, 96)))
    assert not [v for v in graph.values if v.kind == "constant" and v.dtype == "bf16" and len(v.shape) == 2]
    assert {format_of(n.args["format"]).bits for n in graph.nodes if "format" in n.args} == {16}
    check(method, net)
    method.close()


@pytest.mark.parametrize(("route", "on"), [("B", "full"), ("A", "default-limits")])
def test_odd_columns(route: str, on: str) -> None:
    """Rows are filled up to 16 bytes."""
    net = Tied((31, 45, 31), bias=False).eval().to(torch.bfloat16)
    method, size = stored(lowered(net, route), on)
    assert size == 2 * (45 * 32 + 31 * 48 + VOCABULARY * 32)
    check(method, net)
    method.close()


def test_converted_by_option() -> None:
    """Four bytes an element; and the same numbers but for the order of sums."""
    net = Tied((64, 64)).eval().to(torch.bfloat16)
    method, size = stored(lowered(net, "B", partitioner=WebGPUPartitioner(bf16="f32")), "full")
    assert size == 4 * sum({p.data_ptr(): p.numel() for p in net.parameters()}.values())
    assert not [v for v in method.delegates[0].graph.values if v.dtype == "u32"]
    check(method, net)
    method.close()
    with pytest.raises(ValueError, match="bf16 is 'f16'; it must be 'stored' or 'f32'"):
        WebGPUPartitioner(bf16="f16")  # type: ignore[arg-type]


def test_what_others_read_is_converted() -> None:
    """One layer's weight is also summed up: it is kept once, as 32-bit floats; the other layers' stay as they are."""

    class Read(Net):
        def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return super().forward(tokens), self.layers[0].weight.sum(0)

    net = Read((48, 40, 24), bias=False).eval().to(torch.bfloat16)
    method, size = stored(lowered(net, "B"), "full")
    assert size == 2 * (VOCABULARY * 48 + 24 * 40) + 4 * 40 * 48
    tokens = torch.arange(5)[None]
    _, sums = method.execute([tokens])
    weight = net.layers[0].weight.detach().double()
    assert bool(((torch.as_tensor(sums).double() - weight.sum(0)).abs() <= 8e-3 * weight.abs().sum(0)).all())
    method.close()


def test_numbers_that_are_not_finite_stay_so() -> None:
    net = Net((16, 8), bias=False).eval().to(torch.bfloat16)
    with torch.no_grad():
        net.layers[0].weight[3, 5] = float("inf")
        net.layers[0].weight[4, 2] = float("nan")
    method, _ = stored(lowered(net, "B"), "full")
    [got] = method.execute([torch.arange(3)[None]])
    values = np.asarray(torch.as_tensor(got).float())[0]
    assert np.isinf(values[:, 3]).all()
    assert np.isnan(values[:, 4]).all()
    assert np.isfinite(np.delete(values, [3, 4], 1)).all()
    method.close()
