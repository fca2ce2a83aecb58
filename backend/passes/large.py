"""Constants too large for a device's bindings, in parts: tables that are looked up in, and weights of linear layers.

The only pass that runs when a program is loaded, because only then the device's limits are known. A constant [N, K] is
cut along N. A lookup becomes `webgpu.embedding_parts`, which gathers from each part by itself; a linear layer becomes a
layer for each part whose results are joined (a bias is added after that); a node of `_FUSED` with such a weight becomes
first the operators that it stands for. Both uses of tied weights share the parts. Rows of packed weights are runs of
words and are cut in the same way.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ...ops import embedding_packed, embedding_parts, linear_packed, project, project_cache
from ..graph import ITEM_SIZE, Arg, Graph, Node, Ref, Value
from .cleanup import remove_unused
from .rewrite import Editor

Size = Callable[[Value], int]
"""Bytes that a stored value takes on the device."""

_LINEAR = ("aten.linear.default", "webgpu.linear", linear_packed.NAME)
_FUSED = {project.NAME: project.expanded, project_cache.NAME: project_cache.expanded}
"""Operators that stand for others, of which they have `weights`."""
_EMBEDDING = ("aten.embedding.default", embedding_packed.NAME)
_ROWS = 4
"""Parts begin at multiples of this many rows where a part has so many: slices of results are then moved by fours."""
_PART = re.compile(r"(.*)\[(\d+):(\d+)\]", re.S)


def split_large(graph: Graph, limit: int, size: Size) -> Graph:
    """The graph with every constant of more than `limit` bytes in parts, if all that uses it can take it so.

    A constant that something else uses as well stays whole: what loads the graph refuses it by name. The data keys of
    parts are `part_key`s.
    """
    cuts = {index: cut for index, cut in _cuts(graph, limit, size) if _splittable(graph, index)}
    if not cuts:
        return graph
    editor = _Splitter(graph, cuts)
    for node in graph.nodes:
        editor.add(node)
    return remove_unused(editor.finish())


def part_key(key: str, begin: int, end: int) -> str:
    """The data key of bytes `begin` to `end` of the data named `key`."""
    return f"{key}[{begin}:{end}]"


def with_parts(source: Callable[[str], Any]) -> Callable[[str], Any]:
    """A data source that also knows parts of what the given one has."""

    def found(key: str) -> Any:
        part = _PART.fullmatch(key)
        if part is None:
            return source(key)
        return memoryview(source(part[1])).cast("B")[int(part[2]) : int(part[3])]

    return found


@dataclass(frozen=True, slots=True)
class _Cut:
    """(first row, row after the last) of each part."""

    rows: tuple[tuple[int, int], ...]


def _cuts(graph: Graph, limit: int, size: Size) -> Iterator[tuple[int, _Cut]]:
    """Constants above the limit, and where to cut them into as few parts of about one size as fit."""
    for index, value in enumerate(graph.values):
        if value.kind != "constant" or value.alias is not None or value.data is None or size(value) <= limit:
            continue
        if len(value.shape) != 2 or not all(isinstance(dim, int) for dim in value.shape):
            continue
        count = value.shape[0]
        assert isinstance(count, int)
        most = _rows_within(value, count, limit, size)
        if most == 0:
            continue
        rows = -(-count // -(-count // most))
        rounded = -(-rows // _ROWS) * _ROWS
        rows = rounded if rounded <= most else rows
        yield index, _Cut(tuple((begin, min(begin + rows, count)) for begin in range(0, count, rows)))


def _rows_within(value: Value, count: int, limit: int, size: Size) -> int:
    """The most rows of a matrix whose storage is within the limit; 0 if not even one is."""
    low, high = 0, count
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (
            (middle, high) if size(replace(value, shape=(middle, value.shape[1]))) <= limit else (low, middle - 1)
        )
    return low


def _splittable(graph: Graph, index: int) -> bool:
    """Whether every use of a constant is one that takes it in parts."""
    if any(value.alias == index for value in graph.values) or Ref(index) in graph.outputs:
        return False
    if any(index in mutation for mutation in graph.mutations):
        return False
    return all(index not in node.inputs() or _takes_parts(graph, node, index) for node in graph.nodes)


def _takes_parts(graph: Graph, node: Node, index: int) -> bool:
    others = list(node.inputs())
    if node.op in _EMBEDDING:
        return node.args["weight"] == Ref(index) and others.count(index) == 1
    if node.op in _LINEAR:
        whole = node.args.get("transposed", True) is True
        return whole and node.args["weight"] == Ref(index) and others.count(index) == 1
    if node.op in _FUSED:
        return others.count(index) == project.parts(node).weights.count(Ref(index))
    return False


class _Splitter(Editor):
    """Writes the new nodes."""

    def __init__(self, graph: Graph, cuts: Mapping[int, _Cut]) -> None:
        super().__init__(graph)
        self._cuts = cuts
        self._parts: dict[int, tuple[Ref, ...]] = {}

    def add(self, node: Node) -> None:
        """A node, or what takes its place."""
        used = [index for index in node.inputs() if index in self._cuts]
        if not used:
            self.nodes.append(node)
        elif node.op in _FUSED:
            whole = replace(self.graph, values=tuple(self.values))
            values, nodes = _FUSED[node.op](whole, node, len(self.values))
            self.values.extend(values)
            for inner in nodes:
                self.add(inner)
        elif node.op in _EMBEDDING:
            names = [name for name in ("indices", "format") if name in node.args]
            args: dict[str, Arg] = {"weights": self._parts_of(used[0]), **{name: node.args[name] for name in names}}
            self.nodes.append(Node(embedding_parts.NAME, args, node.outputs, node.name))
        else:
            self._linear(node, used[0])

    def _parts_of(self, index: int) -> tuple[Ref, ...]:
        """The parts of a constant, made on first use."""
        if index not in self._parts:
            whole = self.graph.values[index]
            width = whole.shape[1]
            assert isinstance(width, int)
            assert whole.data is not None
            row = width * ITEM_SIZE[whole.dtype]
            self._parts[index] = tuple(
                self.add_value(
                    replace(
                        whole,
                        shape=(end - begin, width),
                        name=f"{whole.name}[{begin}:{end}]",
                        data=part_key(whole.data, begin * row, end * row),
                    )
                )
                for begin, end in self._cuts[index].rows
            )
        return self._parts[index]

    def _linear(self, node: Node, index: int) -> None:
        """A layer for each part, then the results side by side, then the bias."""
        bias = node.args.get("bias")
        result = self.values[node.outputs[0]]
        sums: list[Ref] = []
        for part in self._parts_of(index):
            shape = (*result.shape[:-1], self.values[part.value].shape[0])
            sums.append(self.add_value(Value("temp", result.dtype, shape, f"{node.name}.{len(sums)}")))
            args = {**node.args, "weight": part, "bias": None}
            self.nodes.append(Node(node.op, args, (sums[-1].value,), node.name))
        joined = Ref(node.outputs[0])
        if bias is not None:
            joined = self.add_value(Value("temp", result.dtype, result.shape, f"{node.name}.joined"))
        join: dict[str, Arg] = {"tensors": tuple(sums), "dim": len(result.shape) - 1}
        self.nodes.append(Node("aten.cat.default", join, (joined.value,), node.name))
        if bias is not None:
            add: dict[str, Arg] = {"self": joined, "other": bias, "alpha": 1}
            self.nodes.append(Node("aten.add.Tensor", add, node.outputs, node.name))
