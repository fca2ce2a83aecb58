"""What crosses the border of a partition: expressions of sizes, and symbols that the other side keeps."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
from executorch.exir import to_edge
from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  (registers llama::*)
from torch.export import Dim, export

from executorch_webgpu.backend.graph import Sym, evaluate
from executorch_webgpu.backend.symbols import Symbols, Unresolved
from executorch_webgpu.partitioner import WebGPUPartitioner
from executorch_webgpu.runtime import Method
from tests.partitioner.test_partitioner import CONFIG, load, lower

PAST = {0: Dim("past", min=3, max=20)}


def loaded(route: str, module: torch.nn.Module, inputs: tuple[Any, ...], shapes: Any) -> tuple[Method, dict[str, str]]:
    """A module lowered by one of the two routes, and what the partitioner refused."""
    partitioner = WebGPUPartitioner()
    program = export(module.eval(), inputs, dynamic_shapes=shapes)
    if route == "transform_and_lower":
        found = lower(program, partitioner)
    else:
        found = to_edge(program, compile_config=CONFIG).to_backend(partitioner).to_executorch()
    return load(found).load_method("forward"), partitioner.refused


ROUTES = pytest.mark.parametrize("route", ["transform_and_lower", "to_backend"])


class WritesBehind(torch.nn.Module):
    """Writes a cache at `past - 1`, which is also an operand of a part that has no kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(1, 24, 2, 4))
        self.register_buffer("wide", torch.arange(24, dtype=torch.float64))

    def forward(self, key: torch.Tensor, past: torch.Tensor) -> torch.Tensor:
        start = past.shape[0] - 1
        shift = self.wide.narrow(0, 0, start).sum()
        torch.ops.llama.update_cache(key + shift.float(), self.cache, start)
        return self.cache * 1.0


@ROUTES
def test_a_position_computed_from_a_size_outside_is_solved_for_the_size(route: str) -> None:
    method, refused = loaded(route, WritesBehind(), (torch.randn(1, 3, 2, 4), torch.zeros(5)), (None, PAST))
    assert "auto_functionalized_v2" not in refused
    assert not any("update_cache" in name for name in method.outside())
    expected = torch.zeros(1, 24, 2, 4)
    for past in (5, 4, 20):
        key = torch.randn(1, 3, 2, 4)
        expected[:, past - 1 : past + 2] = key + sum(range(past - 1))
        torch.testing.assert_close(method.execute([key, torch.zeros(past)])[0], expected, atol=1e-4, rtol=1e-5)


class Repeats(torch.nn.Module):
    """A result of 3 * 2 * (past // 2) elements, of which the delegate would know 2 * (past // 2) only."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("wide", torch.arange(24, dtype=torch.float64))

    def forward(self, x: torch.Tensor, past: torch.Tensor) -> torch.Tensor:
        even = past.shape[0] // 2 * 2
        shift = self.wide.narrow(0, 0, even).sum()
        return (x + shift.float()).repeat(even) * 2


@ROUTES
def test_what_needs_a_symbol_that_stays_on_the_other_side_is_refused_and_not_an_error(route: str) -> None:
    module = Repeats()
    method, refused = loaded(route, module, (torch.randn(3), torch.zeros(5)), (None, PAST))
    assert "is given by no input" in refused["aten.repeat.default"]
    assert "aten.mul.Tensor" not in refused  # its input now comes from outside, with its size
    assert "aten::repeat.out" in method.outside()
    assert len(method.delegates) == 2
    for past in (5, 4, 20):
        x = torch.randn(3)
        torch.testing.assert_close(method.execute([x, torch.zeros(past)])[0], module(x, torch.zeros(past)))


def test_expressions_are_solved_where_linear_and_known_as_a_whole_elsewhere() -> None:
    s, t, u = sympy.symbols("s t u", integer=True, positive=True)
    symbols = Symbols()
    first, second, third = (Sym("scalar", (i, 0)) for i in range(3))
    values = {first: 11, second: 25, third: 4}
    symbols.define(2 * s + 3 * t - 1, first)  # waits for one of its two symbols
    with pytest.raises(Unresolved, match=r"symbol [st] is given by no input"):
        symbols.dim(s + t)
    symbols.define(t * t, second)  # not linear: known as it is
    assert symbols.dim(t * t + 1) == Sym("add", (second, 1))
    symbols.define(9 - t, third)  # t = 5, so s = (11 + 1 - 15) / 2
    symbols.define(u * s, second)
    assert evaluate(symbols.dim(t), values.__getitem__) == 5
    values[first] = 18
    assert evaluate(symbols.dim(s), values.__getitem__) == 2
    with pytest.raises(Unresolved, match="symbol u"):
        symbols.dim(u)
