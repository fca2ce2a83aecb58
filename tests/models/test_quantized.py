"""Quantised layers as torchao and ExecuTorch export them: one delegate of packed weights, results against float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from executorch.exir import EdgeCompileConfig, to_edge, to_edge_transform_and_lower
from executorch.extension.llm.export.int4 import ExportableInt4Tensor
from torchao.quantization import IntxWeightOnlyConfig, PerAxis, PerGroup, quantize_
from torchao.quantization.quant_api import Int8DynamicActivationIntxWeightConfig
from torchao.quantization.quant_primitives import MappingType

from executorch_webgpu.backend.packing import QuantizationError
from executorch_webgpu.ops.packed import format_of
from executorch_webgpu.partitioner import WebGPUPartitioner
from executorch_webgpu.runtime import Runtime
from tests.harness import device

VOCABULARY = 40
ASYMMETRIC = MappingType.ASYMMETRIC


def weight_only(bits: int, group: int, mapping: MappingType = MappingType.SYMMETRIC) -> Any:
    """A torchao configuration; group 0: a scale a row."""
    dtype = {2: torch.int2, 4: torch.int4, 8: torch.int8}[bits]
    return IntxWeightOnlyConfig(dtype, PerGroup(group) if group else PerAxis(0), mapping)


class Net(torch.nn.Module):
    """A lookup and a chain of layers whose sizes are no multiples of tiles."""

    def __init__(self, sizes: tuple[int, ...] = (96, 70, 96, 33), bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(VOCABULARY, sizes[0])
        self.layers = torch.nn.ModuleList(torch.nn.Linear(k, n, bias=bias) for k, n in pairwise(sizes))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens)
        for layer in self.layers:
            x = torch.nn.functional.silu(layer(x)) if layer is not self.layers[-1] else layer(x)
        return x


def exact(net: Net, tokens: torch.Tensor) -> torch.Tensor:
    """The chain in float64, from weights dequantised in float64."""

    def values(weight: Any) -> torch.Tensor:
        if not hasattr(weight, "qdata"):
            return weight.detach().double()
        if isinstance(weight, ExportableInt4Tensor):
            return weight.dequantize(torch.float32).double()  # exact: four bits less four bits, times a scale
        part = weight.block_size[1]
        scale, zero = (t.double().reshape(weight.qdata.shape[0], -1).repeat_interleave(part, 1)
                       for t in (weight.scale, weight.zero_point))  # fmt: skip
        return (weight.qdata.double() - zero) * scale

    x = values(net.table.weight)[tokens]
    for layer in net.layers:
        x = x @ values(layer.weight).T + (0 if layer.bias is None else layer.bias.detach().double())
        x = torch.nn.functional.silu(x) if layer is not net.layers[-1] else x
    return x


def lowered(
    net: torch.nn.Module,
    route: str,
    rows: int = 12,
    partitioner: WebGPUPartitioner | None = None,
    data: Path | None = None,
) -> bytes:
    """The `.pte` of a net over a dynamic number of tokens; external data go to the folder `data`."""
    count = torch.export.Dim("count", min=1, max=rows)
    program = torch.export.export(net, (torch.zeros(1, rows, dtype=torch.int64),), dynamic_shapes=({1: count},))
    program = program.run_decompositions({})
    config = EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True)
    part = partitioner or WebGPUPartitioner()
    if route == "A":
        edge = to_edge(program, compile_config=config).to_backend(part)
    else:
        edge = to_edge_transform_and_lower(program, partitioner=[part], compile_config=config)
    made = edge.to_executorch()
    if data is not None:
        made.write_tensor_data_to_file(str(data))
    return bytes(made.buffer)


def check(net: Net, route: str, on: str, expected: Callable[[torch.Tensor], torch.Tensor] | None = None) -> list[Any]:
    """Runs 1, 2, 9 and 12 rows; returns the formats of the packed weights."""
    with torch.no_grad():
        pte = lowered(net, route)
        method = Runtime(device(on)).load_program(pte).load_method("forward")
        assert len(method.delegates) == 1
        assert method.outside() == []
        for rows in (1, 2, 9, 12):
            tokens = torch.randint(0, VOCABULARY, (1, rows), generator=torch.Generator().manual_seed(rows))
            [got] = method.execute([tokens])
            want = (expected or (lambda t: exact(net, t)))(tokens)
            error = (torch.as_tensor(got).double() - want).abs()
            assert bool((error <= 1e-4 + 1e-3 * want.abs()).all()), (rows, float(error.max()))
    graph = method.delegates[0].graph
    assert not [n.op for n in graph.nodes if "affine" in n.op or "quantized_decomposed" in n.op or "int4" in n.op]
    given = [node.args.get("format") for node in graph.nodes] + [
        form for node in graph.nodes for form in (node.args.get("formats") or ())
    ]
    return [format_of(form) for form in given if form is not None]


@pytest.mark.parametrize(("route", "on"), [("B", "full"), ("A", "default-limits")])
def test_weights_of_many_formats(route: str, on: str) -> None:
    net = Net((96, 70, 160, 66, 33)).eval()
    quantize_(net, weight_only(8, 0), lambda m, _: isinstance(m, torch.nn.Embedding))
    for layer, (bits, group, mapping) in zip(
        net.layers,
        [(4, 32, ASYMMETRIC), (4, 14, MappingType.SYMMETRIC), (8, 80, ASYMMETRIC), (8, 0, MappingType.SYMMETRIC)],
        strict=True,
    ):
        quantize_(layer, weight_only(bits, group, mapping))
    forms = check(net, route, on)
    found = {(f.k, f.bits, f.group, f.zeros) for f in forms}
    assert found == {
        (96, 8, 96, False), (96, 4, 32, True), (70, 4, 14, False), (160, 8, 80, True), (66, 8, 66, False)
    }  # fmt: skip


def test_lookup_in_four_bits() -> None:
    net = Net((64, 8)).eval()
    quantize_(net, weight_only(4, 32, ASYMMETRIC), lambda m, _: isinstance(m, torch.nn.Embedding))
    [form] = check(net, "B", "full")
    assert (form.bits, form.group, form.zeros) == (4, 32, True)


@pytest.mark.parametrize(("bits", "stored"), [(2, 4), (4, 4), (8, 8)])
def test_a_table_that_is_a_layer_too_is_stored_once(bits: int, stored: int) -> None:
    net = Net((24, VOCABULARY), bias=False).eval()
    quantize_(net, weight_only(bits, 6), lambda m, _: isinstance(m, torch.nn.Embedding))
    net.layers[0].weight = net.table.weight
    assert {form.bits for form in check(net, "B", "full")} == {stored}
    with Runtime(device("full")).load_program(lowered(net, "B")) as program:
        graph = program.load_method("forward").delegates[0].graph
        assert len([value for value in graph.values if value.kind == "constant"]) == 1


def test_four_bit_tensors() -> None:
    """`dequantize_int4_tensor` in front of layers and of a lookup; the table and the last layer share their weight."""
    net = Net((64, 64, VOCABULARY), bias=False).eval()
    for layer in (*net.layers, net.table):
        quantize_(layer, weight_only(4, 32), lambda m, _: isinstance(m, torch.nn.Linear | torch.nn.Embedding))
        converted = ExportableInt4Tensor.from_intx_unpacked_to_int8_tensor(layer.weight)
        layer.weight = torch.nn.Parameter(converted, requires_grad=False)
    net.layers[-1].weight = net.table.weight
    forms = check(net, "B", "full")
    assert {(f.bits, f.group, f.zeros) for f in forms} == {(4, 32, False)}


@pytest.mark.parametrize("bits", [4, 8])
def test_activations_quantised_row_by_row(bits: int) -> None:
    """The reference rounds activations as the model does. A row whose value lies at a tie may differ by one quantum of
    it, so the tolerance adds what one such quantum makes; nearly all values need none of it."""
    net = Net((96, 64), bias=True).eval()
    config = Int8DynamicActivationIntxWeightConfig(
        {4: torch.int4, 8: torch.int8}[bits], PerGroup(32) if bits == 4 else PerAxis(0)
    )
    quantize_(net.layers[0], config)
    eager = copy.deepcopy(net)
    seen: list[float] = []
    with torch.no_grad():
        method = Runtime(device("full")).load_program(lowered(net, "B")).load_method("forward")
        assert (len(method.delegates), method.outside()) == (1, [])
        [layer] = [node for node in method.delegates[0].graph.nodes if node.op == "webgpu.project"]
        assert layer.args["quantize"][:2] == (-128, 127)
        for rows in (1, 12):
            tokens = torch.arange(rows)[None]
            [got] = method.execute([tokens])
            want = eager(tokens).double()
            x = net.table.weight[tokens]
            quantum = (x.amax(-1).clamp(min=0) - x.amin(-1).clamp(max=0))[..., None] / 255
            largest = net.layers[0].weight.dequantize().abs().amax(-1)
            error = (torch.as_tensor(got).double() - want).abs()
            assert bool((error <= 1e-4 + 1e-3 * want.abs() + quantum * largest).all())
            seen += (error <= 1e-4 + 1e-3 * want.abs()).double().flatten().tolist()
    assert np.mean(seen) > 0.9


def test_nan_scales_are_named() -> None:
    net = Net((64, 8)).eval()
    quantize_(net.layers[0], weight_only(4, 32))
    net.layers[0].weight.scale[3, 1] = float("nan")
    with pytest.raises(QuantizationError, match=r"layers\.0\.weight.*scales are not finite"):
        lowered(net, "B")


def test_without_the_pass_results_are_the_same() -> None:
    net = Net((64, 40), bias=True).eval()
    quantize_(net, weight_only(4, 32, ASYMMETRIC), lambda m, _: isinstance(m, torch.nn.Linear | torch.nn.Embedding))
    tokens = torch.arange(7)[None]
    with torch.no_grad():
        pte = lowered(net, "B", partitioner=WebGPUPartitioner(disable_passes=["fuse_quantized"]))
        method = Runtime(device("full")).load_program(pte).load_method("forward")
        [got] = method.execute([tokens])
        want = exact(net, tokens)
    assert (len(method.delegates), method.outside()) == (1, [])
    assert "torchao.dequantize_affine.default" in [node.op for node in method.delegates[0].graph.nodes]
    assert bool(((torch.as_tensor(got).double() - want).abs() <= 1e-4 + 1e-3 * want.abs()).all())
