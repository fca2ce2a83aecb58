"""Cases of data movement as data: an operator, its inputs, PyTorch's result. Equality is bit by bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from executorch_webgpu.backend.graph import Graph, Ref
from executorch_webgpu.ops.base import check_node, viewed
from executorch_webgpu.runtime.gpu.host import to_host, to_user
from executorch_webgpu.runtime.methods.delegate import Delegate
from tests.harness import GraphBuilder, device

NAMES = {
    torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.int64: "i64", torch.int32: "i32",
    torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "bool",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One node.

    Attributes:
        name: test id.
        op: operator with overload.
        inputs: argument name -> tensor, or list of tensors (None allowed inside).
        literals: the other arguments.
        reference: PyTorch's result(s) from the inputs (lists as lists).
        view: whether the operator must be recognised as a view.
        kinds: argument name -> `constant` or `mutable`, for arguments that are no graph inputs.
    """

    name: str
    op: str
    inputs: Mapping[str, Any]
    literals: Mapping[str, Any]
    reference: Callable[..., Any]
    view: bool = False
    kinds: Mapping[str, str] = field(default_factory=dict)

    def expected(self) -> list[torch.Tensor]:
        made = self.reference(**self.inputs)
        return list(made) if isinstance(made, tuple | list) else [made]


def ramp(shape: Sequence[int], dtype: torch.dtype = torch.float32, start: int = 0) -> torch.Tensor:
    """A tensor whose elements all differ where the dtype can tell them apart; floats hold NaN, infinities and -0.0."""
    count = int(np.prod(shape, dtype=np.int64))
    values = torch.arange(start + 1, start + count + 1)
    if dtype == torch.bool:
        return (values % 3 == 0).reshape(tuple(shape))
    made = values.to(dtype)
    if dtype.is_floating_point and count > 4:
        made[torch.tensor([1, 2, 3, count - 1])] = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0], dtype=dtype)
    return made.reshape(tuple(shape))


def build(case: Case) -> tuple[GraphBuilder, Graph, list[torch.Tensor]]:
    """A graph of the case's node alone, and the tensors to run it with."""
    b = GraphBuilder()
    feeds: list[torch.Tensor] = []

    def give(name: str, tensor: torch.Tensor | None) -> Ref | None:
        if tensor is None:
            return None
        kind = case.kinds.get(name, "input")
        if kind == "input":
            feeds.append(tensor)
            return b.input(NAMES[tensor.dtype], tuple(tensor.shape))
        return b.stored(kind, NAMES[tensor.dtype], to_host(tensor)[1], name)

    args: dict[str, Any] = {
        name: tuple(give(name, t) for t in value) if isinstance(value, list) else give(name, value)
        for name, value in case.inputs.items()
    }
    outs = [(NAMES[t.dtype], tuple(t.shape)) for t in case.expected()]
    made = b.node(case.op, {**args, **case.literals}, *outs)
    results = made if isinstance(made, tuple) else (made,)
    return b, b.graph(*results), feeds


def poison(delegate: Delegate) -> None:
    """Fill every pooled buffer with NaN bit patterns, so that what a kernel forgets to write shows."""
    for buffer in delegate.pool._buffers:
        delegate.device.gpu.queue.write_buffer(buffer, 0, b"\xff" * buffer.size)


def same(got: Any, wanted: torch.Tensor) -> None:
    """Bit equality, all NaNs being one."""
    if wanted.dtype == torch.bfloat16:
        wanted = wanted.float()
    array = wanted.numpy()
    assert got.shape == array.shape
    assert got.dtype == array.dtype
    np.testing.assert_array_equal(got, array)
    if array.dtype.kind == "f":
        np.testing.assert_array_equal(np.signbit(got) & ~np.isnan(got), np.signbit(array) & ~np.isnan(array))


def execute(delegate: Delegate, *inputs: Any) -> list[Any]:
    """One step; the results as numpy arrays (bfloat16 as float32)."""
    made = delegate.execute([to_host(x) for x in inputs])
    return [to_user(dtype, np.asarray(array), False) for dtype, array in made]


def run_twice(b: GraphBuilder, graph: Graph, on: str, *inputs: Any) -> list[Any]:
    """Run, poison every temporary, run again; both runs must agree. Returns numpy arrays."""
    delegate = b.load(graph, device(on))
    try:
        first = execute(delegate, *inputs)
        poison(delegate)
        again = execute(delegate, *inputs)
    finally:
        delegate.close()
    for a, c in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, c)
    return again


def check(case: Case, on: str) -> None:
    """The node is supported, is a view exactly if it should be, and gives what PyTorch gives."""
    b, graph, feeds = build(case)
    node = graph.nodes[0]
    assert check_node(graph, node) is None
    assert (viewed(graph, node) is not None) == case.view
    for got, wanted in zip(run_twice(b, graph, on, *feeds), case.expected(), strict=True):
        same(got, wanted)


def in_place(case: Case, target: str = "self") -> tuple[GraphBuilder, Graph, list[torch.Tensor]]:
    """The case with its written argument as a mutable buffer that the result takes over."""
    b, graph, feeds = build(replace(case, kinds={target: "mutable"}))
    ref, out = graph.nodes[0].args[target], graph.nodes[0].outputs[0]
    assert isinstance(ref, Ref)
    b.values[out] = replace(b.values[out], alias=ref.value)
    return b, b.graph(*graph.outputs, mutations=((ref.value, out),)), feeds


def reason(case: Case) -> str:
    """Why the node is refused."""
    _, graph, _ = build(case)
    found = check_node(graph, graph.nodes[0])
    assert found is not None, "the node is accepted"
    return found
