"""Which values share a buffer: views, in-place writes of mutable values, and the final copies where writing in place
is unsafe."""

from __future__ import annotations

from dataclasses import replace

from ...ops.base import find, viewed
from ..graph import Graph, Node, Ref
from .rewrite import Editor, Links


def assign_storage(graph: Graph) -> Graph:
    """Set `Value.alias` and append the copies that remain.

    A result takes over the buffer of an argument in place if the operator can do so and nothing reads the old content
    afterwards: no
    later node, no output, not another argument of the same node. A mutation whose source does not end up in its
    target's
    buffer becomes a copy after everything else.
    """
    storage = _Storage(graph)
    for number, node in enumerate(graph.nodes):
        storage.visit(number, node)
    values = tuple(replace(value, alias=storage.alias.get(i, value.alias)) for i, value in enumerate(graph.values))
    return _copy_back(replace(graph, values=values))


class _Storage:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.links = Links(graph)
        self.alias: dict[int, int] = {}
        self.sharing: dict[int, list[int]] = {}

    def root(self, value: int) -> int:
        while value in self.alias:
            value = self.alias[value]
        return value

    def share(self, value: int, owner: int) -> None:
        self.alias[value] = owner
        self.sharing.setdefault(self.root(owner), []).append(value)

    def visit(self, number: int, node: Node) -> None:
        source = viewed(self.graph, node)
        if source is not None and self._alike(source, node.outputs[0]):
            self.share(node.outputs[0], source)
            return
        op = find(node.op)
        for output, name in (op.inplace if op is not None else {}).items():
            base = node.args.get(name)
            if isinstance(base, Ref) and self._safe(number, node, name, base.value):
                self.share(node.outputs[output], base.value)

    def _alike(self, source: int, result: int) -> bool:
        """Whether a view's result may be kept as its source is: float16 and float32 differ outside of temporaries."""
        dtypes = {self.graph.values[source].dtype, self.graph.values[result].dtype}
        return dtypes != {"f16", "f32"} or self.graph.values[self.root(source)].kind == "temp"

    def _safe(self, number: int, node: Node, name: str, base: int) -> bool:
        root = self.root(base)
        if self.graph.values[root].kind == "constant":
            return False
        others = [v for n, arg in node.args.items() if n != name for v in Node("", {"": arg}, ()).inputs()]
        if any(self.root(v) == root for v in others):
            return False
        same = [root, *self.sharing.get(root, [])]
        return not any(reader > number for value in same for reader in self.links.readers.get(value, []))


def _copy_back(graph: Graph) -> Graph:
    """Append copies for mutations that did not happen in place.

    A copy must not disturb what is still to be read: sources and outputs that live in another mutable value's buffer
    are saved
    to temporaries first.
    """
    pending = [(target, source) for target, source in graph.mutations if graph.root(source) != graph.root(target)]
    if not pending:
        return graph
    editor = Editor(graph)
    editor.nodes = list(graph.nodes)
    overwritten = {graph.root(target) for target, _ in pending}

    def saved(value: int) -> int:
        if graph.root(value) not in overwritten:
            return value
        copy = editor.temp(Ref(value), f"{graph.values[value].name}.saved")
        editor.nodes.append(_copy(value, value, copy.value))
        return copy.value

    sources = [(target, saved(source)) for target, source in pending]
    outputs = tuple(Ref(saved(o.value)) if isinstance(o, Ref) else o for o in graph.outputs)
    final = dict(graph.mutations)
    for target, source in sources:
        new = editor.temp(Ref(target), f"{graph.values[target].name}.new", alias=target)
        editor.nodes.append(_copy(target, source, new.value))
        final[target] = new.value
    return editor.finish(outputs=outputs, mutations=tuple(final.items()))


def _copy(target: int, source: int, output: int) -> Node:
    return Node("aten.copy.default", {"self": Ref(target), "src": Ref(source)}, (output,), "copy")
