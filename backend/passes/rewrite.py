"""Tools that passes share: who makes a value, who reads it, and how nodes are replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from ..graph import Arg, Graph, Node, Ref, Value

END = 1 << 60
"""The position of a graph output among the readers of a value."""


class Links:
    """Producers and readers of a graph's values."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.producer: dict[int, Node] = {}
        self.position: dict[int, int] = {}
        self.readers: dict[int, list[int]] = {}
        for number, node in enumerate(graph.nodes):
            self.producer.update(dict.fromkeys(node.outputs, node))
            self.position.update(dict.fromkeys(node.outputs, number))
            for value in node.inputs():
                self.readers.setdefault(value, []).append(number)
        for output in graph.outputs:
            if isinstance(output, Ref):
                self.readers.setdefault(output.value, []).append(END)
        for _, source in graph.mutations:
            self.readers.setdefault(source, []).append(END)

    def made_by(self, arg: Arg, *ops: str) -> Node | None:
        """The node that makes a value argument, if it is one of `ops` (any, without `ops`)."""
        node = self.producer.get(arg.value) if isinstance(arg, Ref) else None
        return node if node is not None and (not ops or node.op in ops) else None

    def value(self, arg: Arg) -> Value:
        return self.graph.value(arg)

    def only_reader(self, value: int) -> Node | None:
        """The single node that reads a value, if there is exactly one reader and it is no graph output."""
        found = self.readers.get(value, [])
        return self.graph.nodes[found[0]] if len(found) == 1 and found[0] != END else None


class Editor:
    """Collects new values and nodes while a pass walks over a graph."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.values = list(graph.values)
        self.nodes: list[Node] = []

    def add_value(self, value: Value) -> Ref:
        self.values.append(value)
        return Ref(len(self.values) - 1)

    def temp(self, like: Arg, name: str, **changes: object) -> Ref:
        """A new temporary with the dtype and shape of `like`, changed as told."""
        source = self.graph.value(like)
        return self.add_value(replace(Value("temp", source.dtype, source.shape, name), **changes))  # type: ignore[arg-type]

    def finish(self, **fields: object) -> Graph:
        return replace(self.graph, values=tuple(self.values), nodes=tuple(self.nodes), **fields)  # type: ignore[arg-type]


def map_nodes(graph: Graph, change: Callable[[Node], Iterable[Node] | None], editor: Editor | None = None) -> Graph:
    """Replace each node by what `change` returns (None: keep it)."""
    editor = editor or Editor(graph)
    for node in graph.nodes:
        new = change(node)
        editor.nodes.extend([node] if new is None else new)
    return editor.finish()


def substitute(arg: Arg, mapping: Mapping[int, int]) -> Arg:
    """An argument with values renamed."""
    if isinstance(arg, Ref):
        return Ref(mapping.get(arg.value, arg.value))
    if isinstance(arg, tuple):
        return tuple(substitute(item, mapping) for item in arg)
    return arg


def rename(node: Node, mapping: Mapping[int, int]) -> Node:
    """A node with the values it reads renamed."""
    if not any(value in mapping for value in node.inputs()):
        return node
    return replace(node, args={name: substitute(arg, mapping) for name, arg in node.args.items()})
