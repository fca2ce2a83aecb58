"""Helpers that run hand-made graphs on every test device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from executorch_webgpu.backend.graph import Arg, Graph, Node, Ref, Value
from executorch_webgpu.runtime.gpu.buffers import State, Weights
from executorch_webgpu.runtime.gpu.device import Device
from executorch_webgpu.runtime.gpu.host import to_host, to_user
from executorch_webgpu.runtime.methods.delegate import Delegate

DEVICES = ("full", "default-limits")
"""Test devices: all that the adapter offers; WebGPU's default limits without optional features."""


@cache
def device(name: str) -> Device:
    """A test device, made once per process. No adapter is an error, never a skip."""
    if name == "full":
        return Device.create()
    return Device.create(default_limits=True, features=())


class GraphBuilder:
    """Builds a graph node by node for operator tests.

    b = GraphBuilder(); x = b.input("f32", (2, 3)); y = b.node("aten.neg.default", {"self": x}, ("f32", (2, 3)));
    b.graph(y)
    """

    def __init__(self) -> None:
        self.values: list[Value] = []
        self.nodes: list[Node] = []
        self.inputs: list[int] = []
        self.data: dict[str, bytes] = {}

    def _add(self, value: Value) -> Ref:
        self.values.append(value)
        return Ref(len(self.values) - 1)

    def input(self, dtype: str, shape: Sequence[Any]) -> Ref:
        ref = self._add(Value("input", dtype, tuple(shape), f"input{len(self.inputs)}"))
        self.inputs.append(ref.value)
        return ref

    def stored(self, kind: str, dtype: str, array: np.ndarray[Any, Any], name: str) -> Ref:
        """A `constant` or `mutable` value with content."""
        self.data[name] = np.ascontiguousarray(array).tobytes()
        return self._add(Value(kind, dtype, array.shape, name, data=name))

    def node(
        self, op: str, args: Mapping[str, Arg], *outs: tuple[str, Sequence[Any]], alias: Sequence[Ref | None] = ()
    ) -> Any:
        """Append a node; returns the Ref of its output (a tuple of them for several)."""
        alias = [*alias, *[None] * (len(outs) - len(alias))]
        refs = tuple(
            self._add(Value("temp", dtype, tuple(shape), op, alias=None if a is None else a.value))
            for (dtype, shape), a in zip(outs, alias, strict=True)
        )
        self.nodes.append(Node(op, dict(args), tuple(r.value for r in refs), f"{op}_{len(self.nodes)}"))
        return refs[0] if len(refs) == 1 else refs

    def graph(self, *outputs: Any, **fields: Any) -> Graph:
        return Graph(tuple(self.values), tuple(self.nodes), tuple(self.inputs), tuple(outputs), **fields)

    def load(self, graph: Graph, on: Device) -> Delegate:
        return Delegate(graph, on, self.data.__getitem__, Weights(on), State(on))


def run(builder: GraphBuilder, graph: Graph, on: Device, *inputs: Any) -> list[Any]:
    """Execute once and return numpy arrays (bfloat16 as float32)."""
    delegate = builder.load(graph, on)
    try:
        return [
            to_user(d, a, False) if not isinstance(a, int) else a
            for d, a in delegate.execute([to_host(x) for x in inputs])
        ]
    finally:
        delegate.close()
