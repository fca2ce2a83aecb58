"""Cases for operator tests: an ATen call, run as a graph on a test device and compared with PyTorch in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from executorch_webgpu.backend.graph import Graph
from executorch_webgpu.ops.base import check_node
from executorch_webgpu.runtime.gpu.device import Device
from tests.harness import GraphBuilder, run

SHORT = {
    torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.int64: "i64", torch.int32: "i32",
    torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "bool", torch.float64: "f64",
}  # fmt: skip
DROPPED = ("layout", "device", "pin_memory", "memory_format", "non_blocking", "copy", "dim_order")
RELATIVE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Allowed error relative to float64, by the result's dtype: of the f32 functions, or the rounding of the storage."""


@dataclass(frozen=True)
class Case:
    """One call. `op` is e.g. `aten.add.Tensor`; `reference` replaces PyTorch on float64 arguments where that is wrong.

    `rtol` and `atol` override the tolerance of floating results; integers and booleans are compared exactly.
    """

    op: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    reference: Callable[..., Any] | None = None
    rtol: float | None = None
    atol: float = 1e-37

    @property
    def target(self) -> Any:
        namespace, name, overload = self.op.split(".")
        return getattr(getattr(getattr(torch.ops, namespace), name), overload)


def _double(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.double()
    return value


def _tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def expected(case: Case) -> list[torch.Tensor]:
    """The results: shapes and dtypes of the eager call, floating ones with float64 values."""
    eager = _tuple(case.target(*case.args, **case.kwargs))
    kwargs = {
        k: torch.float64 if isinstance(v, torch.dtype) and v.is_floating_point else v for k, v in case.kwargs.items()
    }
    args = [torch.float64 if isinstance(v, torch.dtype) and v.is_floating_point else _double(v) for v in case.args]
    exact = _tuple((case.reference or case.target)(*args, **kwargs))
    return [x.double().to(e.dtype) if e.is_floating_point() else e for e, x in zip(eager, exact, strict=True)]


def _argument(builder: GraphBuilder, value: Any, inputs: list[Any]) -> Any:
    if isinstance(value, torch.Tensor):
        inputs.append(value)
        return builder.input(SHORT[value.dtype], value.shape)
    if isinstance(value, torch.dtype):
        return SHORT[value]
    if isinstance(value, list | tuple):
        return tuple(_argument(builder, item, inputs) for item in value)
    return value


def add(builder: GraphBuilder, case: Case, results: Sequence[torch.Tensor], inputs: list[Any]) -> list[Any]:
    """Append the case's node, its arguments by schema name with defaults; returns the Refs of its results."""
    named: dict[str, Any] = {}
    for position, argument in enumerate(case.target._schema.arguments):
        if argument.name in DROPPED:
            continue
        if position < len(case.args):
            value = case.args[position]
        else:
            value = case.kwargs.get(argument.name, argument.default_value)
        named[argument.name] = _argument(builder, value, inputs)
    made = builder.node(case.op, named, *((SHORT[r.dtype], r.shape) for r in results))
    return list(_tuple(made))


def compare(case: Case, got: np.ndarray[Any, Any], want: torch.Tensor, exact: torch.Tensor | None = None) -> None:
    """Assert that one result is right: shape, dtype, NaN, infinities and values."""
    label = f"{case.op}{[tuple(a.shape) if isinstance(a, torch.Tensor) else a for a in case.args]} {want.dtype}"
    assert tuple(got.shape) == tuple(want.shape), label
    if not want.dtype.is_floating_point:
        np.testing.assert_array_equal(got, want.numpy(), err_msg=label)
        return
    assert got.dtype == (np.float16 if want.dtype is torch.float16 else np.float32), label
    rtol = RELATIVE[want.dtype] if case.rtol is None else case.rtol
    atol = case.atol if want.dtype is not torch.float16 else max(case.atol, 6e-8)
    np.testing.assert_allclose(got.astype(np.float64), want.double().numpy(), rtol=rtol, atol=atol, err_msg=label)


def check(cases: Sequence[Case], on: Device) -> None:
    """Run the cases as nodes of one graph, all accepted by `supports`, and compare every result."""
    builder, inputs, outputs = GraphBuilder(), [], []  # type: ignore[var-annotated]
    wanted = [expected(case) for case in cases]
    for case, results in zip(cases, wanted, strict=True):
        outputs += add(builder, case, results, inputs)
    graph = builder.graph(*outputs)
    for node in graph.nodes:
        reason = check_node(graph, node)
        assert reason is None, f"{node.op}: {reason}"
    got = run(builder, graph, on, *inputs)
    position = 0
    for case, results in zip(cases, wanted, strict=True):
        for result in results:
            compare(case, got[position], result)
            position += 1


def refusal(case: Case, results: Sequence[torch.Tensor] | None = None) -> str | None:
    """What `supports` says to a case."""
    builder = GraphBuilder()
    add(builder, case, expected(case) if results is None else results, [])
    graph: Graph = builder.graph()
    return check_node(graph, graph.nodes[0])


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    """Normally distributed numbers."""
    generator = torch.Generator().manual_seed(seed + 1000 * len(shape) + sum(shape))
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def integers(
    *shape: int, low: int = -9, high: int = 10, dtype: torch.dtype = torch.int64, seed: int = 0
) -> torch.Tensor:
    """Integers from `low` to `high` (exclusive)."""
    generator = torch.Generator().manual_seed(seed + 1000 * len(shape) + sum(shape))
    return torch.randint(low, high, shape, generator=generator).to(dtype)


SPECIAL = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1.0, -1.0, 0.5, 2.0, -2.0, 1e4, -1e4])
