"""Results that are a run of elements of another tensor, and need not be copied: the last row of a prompt's hidden
states, the parts of a product that a single token is split into.

Whether a slice is one depends on sizes, so it is decided for each plan, where views are decided once for a graph.
"""

from __future__ import annotations

from collections.abc import Mapping

from ...backend.graph import Graph, Ref
from ...ops.base import viewed
from .device import Device
from .host import STORAGE


class Windows:
    """Which results of a graph may be windows on the buffer of another value on a device."""

    def __init__(self, graph: Graph, device: Device) -> None:
        self.graph = graph
        self.device = device
        self._given = {graph.root(o.value) for o in graph.outputs if isinstance(o, Ref)}
        self._given |= {graph.root(source) for _, source in graph.mutations}
        self._written: dict[int, int] = {}
        """Root -> the last node that writes something there."""
        for number, node in enumerate(graph.nodes):
            if viewed(graph, node) is None:
                self._written.update((graph.root(output), number) for output in node.outputs)

    def offset(self, number: int, result: int, source: int, first: int) -> int | None:
        """Where in the buffer of `source` a result of node `number` begins, whose elements are those of `source` from
        `first` on; None where it must have its own buffer.

        Both must be temporaries stored in one type, the result none that leaves the graph; nothing may be written to
        either after the node; and the device must be able to bind a buffer from there on.
        """
        graph = self.graph
        root = graph.root(source)
        if graph.root(result) != result or result in self._given:
            return None
        if any(graph.values[i].kind != "temp" for i in (root, result)):
            return None
        if max(self._written.get(root, -1), self._written.get(result, -1)) > number:
            return None
        kinds = [graph.storage_dtype(index) for index in (source, result)]
        if kinds[0] != kinds[1]:
            return None
        limits = self.device.limits
        begin = first * STORAGE[limits.wgsl_type(kinds[0])].itemsize
        return None if begin % max(limits.storage_alignment, limits.uniform_alignment) else begin


def followed(windows: Mapping[int, tuple[int, int]], index: int) -> tuple[int, int]:
    """The root in whose buffer a root's elements are, and from which byte on; `windows` has both for each window."""
    begin = 0
    while index in windows:
        index, more = windows[index]
        begin += more
    return index, begin
