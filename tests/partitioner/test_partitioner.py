"""Partitioning and execution through real `.pte` files: several partitions, methods, external weights, refusals,
state outside."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from executorch.exir import EdgeCompileConfig, to_edge, to_edge_transform_and_lower
from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  (registers llama::*)
from torch.export import Dim, export

from executorch_webgpu.partitioner import WebGPUPartitioner, separate_outputs
from executorch_webgpu.runtime import MissingDataError, Program, Runtime
from tests.harness import device

CONFIG = EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True)


def lower(programs: Any, partitioner: Any = None) -> Any:
    partitioner = partitioner or WebGPUPartitioner()
    return to_edge_transform_and_lower(programs, partitioner=[partitioner], compile_config=CONFIG).to_executorch()


def load(executorch_program: Any, **more: Any) -> Program:
    return Runtime(device("full")).load_program(bytes(executorch_program.buffer), **more)


class Split(torch.nn.Module):
    """An operator without a kernel between two parts that have one."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.erfinv(torch.tanh(self.linear(x)) * 0.5) + x[:, :1]


def test_two_partitions_with_an_operator_outside_run_together(caplog: pytest.LogCaptureFixture) -> None:
    module, x = Split(), torch.randn(3, 6)
    partitioner = WebGPUPartitioner()
    with caplog.at_level(logging.INFO):
        program = load(lower(export(module, (x,), dynamic_shapes=({0: Dim("rows", min=1, max=9)},)), partitioner))
    assert partitioner.refused == {"aten.erfinv.default": "no WebGPU kernel for this operator"}
    assert sum("aten.erfinv" in r.getMessage() for r in caplog.records) <= 2  # once for each look at the program
    method = program.load_method("forward")
    assert len(method.delegates) == 2
    assert method.outside() == ["aten::erfinv.out"]
    for rows in (3, 1, 9):
        x = torch.randn(rows, 6)
        torch.testing.assert_close(method.execute([x])[0], module(x), atol=1e-5, rtol=1e-4)


class Cached(torch.nn.Module):
    """A cache whose new value is read by an operator without a kernel."""

    def __init__(self, outside: bool) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(1, 8, 1, 4))
        self.outside = outside

    def forward(self, value: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        start = position[0].item()
        torch.ops.llama.update_cache(value, self.cache, start)
        return torch.erfinv(self.cache) if self.outside else torch.cos(self.cache)


@pytest.mark.parametrize("outside", [False, True])
def test_a_cache_is_inside_as_a_whole_or_outside_as_a_whole(outside: bool) -> None:
    inputs = (torch.randn(1, 2, 1, 4), torch.tensor([0]))
    partitioner = WebGPUPartitioner()
    program = load(lower(export(Cached(outside), inputs), partitioner))
    method = program.load_method("forward")
    expected = torch.zeros(1, 8, 1, 4)
    for position in (0, 2, 1):
        value = torch.rand(1, 2, 1, 4) * 0.5
        expected[:, position : position + 2] = value
        reference = torch.erfinv(expected) if outside else torch.cos(expected)
        torch.testing.assert_close(
            method.execute([value, torch.tensor([position])])[0], reference, atol=1e-5, rtol=1e-4
        )
    if outside:
        assert "must stay outside as a whole" in partitioner.refused["auto_functionalized_v2"]
    else:
        assert method.outside() == []
        assert list(method.state.buffers()) == ["cache"]


class Returned(torch.nn.Module):
    """A cache that is an output too."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(1, 8, 1, 4))

    def forward(self, value: torch.Tensor, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        start = position[0].item()
        torch.ops.llama.update_cache(value, self.cache, start)
        return torch.cos(self.cache), self.cache


@pytest.mark.parametrize("separated", [False, True])
def test_a_cache_that_is_an_output_too_is_delegated_once_it_has_a_clone(separated: bool) -> None:
    """On `to_backend`; the program is right either way."""
    exported = export(Returned(), (torch.randn(1, 2, 1, 4), torch.tensor([0])))
    partitioner = WebGPUPartitioner()
    edge = to_edge(separate_outputs(exported) if separated else exported, compile_config=CONFIG)
    method = load(edge.to_backend(partitioner).to_executorch()).load_method("forward")
    expected = torch.zeros(1, 8, 1, 4)
    for position in (0, 3, 2):
        value = torch.randn(1, 2, 1, 4)
        expected[:, position : position + 2] = value
        cosines, cache = method.execute([value, torch.tensor([position])])
        torch.testing.assert_close(cache, expected, atol=0, rtol=0)
        torch.testing.assert_close(cosines, torch.cos(expected), atol=1e-5, rtol=1e-4)
    if separated:
        assert len(method.delegates) == 1
        assert (method.outside(), partitioner.refused) == ([], {})
    else:
        assert "separate_outputs" in partitioner.refused["auto_functionalized_v2"]


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(8, 32)
        self.down = torch.nn.Linear(32, 8)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        return self.down(torch.nn.functional.silu(self.up(x))) * self.calls


def test_methods_share_weights_and_may_share_state() -> None:
    module = Net()
    one, many = torch.randn(1, 8), torch.randn(5, 8)
    executorch_program = lower({"decode": export(module, (one,)), "prefill": export(module, (many,))})
    on = device("full")
    before = on.memory.by_purpose.get("weights", 0)
    program = load(executorch_program)
    assert program.method_names == {"decode", "prefill"}
    decode = program.load_method("decode")
    used = on.memory.by_purpose["weights"] - before
    assert used >= 4 * (8 * 32 * 2 + 40)
    shared = program.load_method("prefill", state=decode.state)
    alone = program.load_method("prefill")
    assert on.memory.by_purpose["weights"] - before == used
    assert decode.delegates[0].graph.model_id == shared.delegates[0].graph.model_id != ""
    with torch.no_grad():
        plain = lambda x: module.down(torch.nn.functional.silu(module.up(x)))  # noqa: E731
        torch.testing.assert_close(decode.execute([one])[0], plain(one), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(shared.execute([many])[0], 2 * plain(many), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(alone.execute([many])[0], plain(many), atol=1e-5, rtol=1e-4)
        decode.reset()
        torch.testing.assert_close(shared.execute([many])[0], plain(many), atol=1e-5, rtol=1e-4)
    program.close()
    assert on.memory.by_purpose["weights"] == before


def test_external_weights_in_a_ptd(tmp_path: Path) -> None:
    module, x = Net(), torch.randn(1, 8)
    executorch_program = lower(export(module, (x,)), WebGPUPartitioner(external_weights="weights"))
    executorch_program.write_tensor_data_to_file(str(tmp_path))
    pte = tmp_path / "net.pte"
    pte.write_bytes(bytes(executorch_program.buffer))
    runtime = Runtime(device("full"))
    used = runtime.device.memory.total
    with pytest.raises(MissingDataError, match="ptd"):
        runtime.load_program(pte).load_method("forward")
    assert runtime.device.memory.total == used
    method = runtime.load_program(pte, data_path=tmp_path / "weights.ptd").load_method("forward")
    with torch.no_grad():
        expected = module.down(torch.nn.functional.silu(module.up(x)))
    torch.testing.assert_close(method.execute([x])[0], expected, atol=1e-5, rtol=1e-4)


def test_both_routes_and_numpy_or_torch_results() -> None:
    module, x = Net(), torch.randn(2, 8)
    edge = to_edge(export(module, (x,)), compile_config=CONFIG).to_backend(WebGPUPartitioner())
    method = load(edge.to_executorch()).load_method("forward")
    assert method.outside() == []
    assert "webgpu.linear" in {n.op for n in method.delegates[0].graph.nodes}
    with torch.no_grad():
        expected = module.down(torch.nn.functional.silu(module.up(x)))
    first = method.execute([x.numpy()])[0]
    assert isinstance(first, np.ndarray)
    np.testing.assert_allclose(first, expected.numpy(), atol=1e-5, rtol=1e-4)
    second = method.execute([x])[0]
    assert isinstance(second, torch.Tensor)
    torch.testing.assert_close(second, 2 * expected, atol=1e-5, rtol=1e-4)


def test_equal_exports_give_equal_files() -> None:
    module, x = Net(), torch.randn(1, 8)
    assert bytes(lower(export(module, (x,))).buffer) == bytes(lower(export(module, (x,))).buffer)


def test_unknown_pass_is_refused() -> None:
    with pytest.raises(ValueError, match="no pass named"):
        WebGPUPartitioner(disable_passes=["nonsense"])


class Shapes(torch.nn.Module):
    """Sizes computed from sizes, integer outputs, an unused input, a constant output."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(40.0).reshape(10, 4))

    def forward(self, x: torch.Tensor, unused: torch.Tensor, y: torch.Tensor) -> tuple[Any, ...]:
        joined = torch.cat([x, y], dim=0)
        return (
            joined.reshape(-1),
            joined.shape[0] * 2,
            self.table[: x.shape[0] + 1] + 1.0,
            torch.arange(joined.shape[0]),
        )


def test_symbolic_sizes() -> None:
    rows, more = Dim("rows", min=1, max=9), Dim("more", min=1, max=20)
    inputs = (torch.randn(3, 4), torch.randn(2), torch.randn(5, 4))
    exported = export(Shapes(), inputs, dynamic_shapes=({0: rows}, None, {0: more}))
    method = load(lower(exported)).load_method("forward")
    assert method.outside() == []
    for first, second in ((3, 5), (1, 1), (9, 20), (2, 1)):
        given = (torch.randn(first, 4), torch.randn(2), torch.randn(second, 4))
        for got, expected in zip(method.execute(given), Shapes()(*given), strict=True):
            if isinstance(expected, int):
                assert got == expected
            else:
                torch.testing.assert_close(got, expected, atol=0, rtol=0)
