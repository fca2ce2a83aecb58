"""Bounds of integer tensors that follow from sizes, live scalars and inputs of one element: how an index computed on
the GPU is checked on the host."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..backend.graph import INTEGERS, Arg, Dim, Graph, Node, Ref, Sym, make_dim


@dataclass(frozen=True, slots=True)
class Bounds:
    """Lowest and highest element, as expressions over the graph's inputs.

    Attributes:
        base: the value index of an input of one element, which is to be added to both; None: there is none.
        step: from each element to the next, along the one axis of more than one; None: unknown.
    """

    low: Dim
    high: Dim
    base: int | None = None
    step: int | None = None


_SAME = (
    "view", "reshape", "unsqueeze", "squeeze", "alias", "clone", "_to_copy", "to", "expand", "permute", "transpose",
    "contiguous", "lift_fresh", "detach", "_to_dim_order_copy", "_clone_dim_order", "repeat", "flip",
)  # fmt: skip
"""Operators whose elements are those of their first argument, and all of them."""
_CUTS = ("slice", "select")
"""Operators whose elements are some of those of their first argument."""


def integer_bounds(graph: Graph, arg: Arg) -> Bounds | None:
    """Bounds of the elements of an integer value made from aranges, fills, inputs of one element and sums; None where
    nothing is known.

    They are exact for what exporters make of a position (`arange(S) + position`, or a cut of it), never too narrow, and
    where a cut may have left the ends away, there are none: a call that is right must not be refused.
    """
    if not isinstance(arg, Ref):
        return Bounds(arg, arg, step=0) if isinstance(arg, int | Sym) and not isinstance(arg, bool) else None
    if graph.values[arg.value].dtype not in INTEGERS:
        return None
    root = graph.root(arg.value)
    if graph.values[root].kind == "input" and all(size == 1 for size in graph.values[root].shape):
        return Bounds(0, 0, root, step=0)
    node = next((n for n in graph.nodes if arg.value in n.outputs), None)
    return None if node is None else _of_node(graph, node)


def _of_node(graph: Graph, node: Node) -> Bounds | None:
    name = node.op.split(".")[1].removesuffix("_copy") if not node.op.endswith("_to_copy.default") else "_to_copy"
    args = node.args
    if name in _SAME:
        found = integer_bounds(graph, args.get("self"))
        kept = name != "flip" and _sizes(graph, args.get("self")) == _sizes(graph, Ref(node.outputs[0]))
        return found if found is None or found.step == 0 or kept else replace(found, step=None)
    if name in _CUTS:
        return _cut(graph, node, name)
    if name == "arange":
        return _arange(graph, node)
    if name in ("scalar_tensor", "full"):
        return integer_bounds(graph, args.get("s", args.get("fill_value")))
    if name in ("add", "sub") and args.get("alpha", 1) == 1:
        left, right = integer_bounds(graph, args["self"]), integer_bounds(graph, args["other"])
        return None if left is None or right is None else _sum(name, left, right)
    return None


def _sum(name: str, left: Bounds, right: Bounds) -> Bounds | None:
    """Of `left + right` (name `add`) or `left - right` (`sub`); None where more than one input were to be followed."""
    if right.base is not None and (left.base is not None or name == "sub"):
        return None
    low, high = (right.low, right.high) if name == "add" else (right.high, right.low)
    base = right.base if left.base is None else left.base
    step = left.step if right.step == 0 else right.step if left.step == 0 and name == "add" else None
    return Bounds(make_dim(name, left.low, low), make_dim(name, left.high, high), base, step)


def _sizes(graph: Graph, arg: Arg) -> list[Dim]:
    """The sizes of a value that are not 1: where there is one at most, they say in which order its elements are."""
    return [size for size in graph.values[arg.value].shape if size != 1] if isinstance(arg, Ref) else []


def _cut(graph: Graph, node: Node, name: str) -> Bounds | None:
    """Of what a slice or a select leaves over."""
    args, source = node.args, node.args["self"]
    found = integer_bounds(graph, source)
    if found is None or found.step == 0 or not isinstance(source, Ref):
        return found
    before, after = graph.values[source.value].shape, graph.values[node.outputs[0]].shape
    if before == after:  # all is left
        return found
    dim = args.get("dim", 0)
    start, stride = (args.get("index"), 1) if name == "select" else (args.get("start"), args.get("step", 1))
    start = 0 if start is None else start
    if found.step is None or len(_sizes(graph, source)) > 1 or not isinstance(dim, int) or not isinstance(stride, int):
        return None
    if isinstance(start, bool) or not isinstance(start, int | Sym) or before[dim] == 1:
        return None
    if isinstance(start, int) and start < 0:
        start = make_dim("add", before[dim], start)
    count = 1 if name == "select" else after[dim]
    low = make_dim("add", found.low, make_dim("mul", start, found.step))
    step = found.step * stride
    return Bounds(low, make_dim("add", low, make_dim("mul", make_dim("sub", count, 1), step)), found.base, step)


def _arange(graph: Graph, node: Node) -> Bounds | None:
    start, step = node.args.get("start", 0), node.args.get("step", 1)
    count = graph.values[node.outputs[0]].shape[0]
    if (
        isinstance(start, bool)
        or not isinstance(start, int | Sym)
        or isinstance(step, bool)
        or not isinstance(step, int)
        or step < 1
    ):
        return None
    last = make_dim("mul", make_dim("sub", count, 1), step)
    return Bounds(start, make_dim("add", start, last), step=step)
