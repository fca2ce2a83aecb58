"""Bounds of integer tensors that follow from sizes and live scalars: how an index computed on the GPU is checked on
the host."""

from __future__ import annotations

from ..backend.graph import INTEGERS, Arg, Dim, Graph, Node, Ref, Sym, make_dim

Bounds = tuple[Dim, Dim]
"""(lowest, highest) element, as expressions over the graph's inputs."""

_SAME = (
    "view", "reshape", "unsqueeze", "squeeze", "alias", "clone", "_to_copy", "to", "expand", "permute", "transpose",
    "slice", "select", "contiguous",
    "lift_fresh", "detach", "_to_dim_order_copy", "_clone_dim_order", "repeat", "flip",
)  # fmt: skip
"""Operators whose elements are elements of their first argument."""


def integer_bounds(graph: Graph, arg: Arg) -> Bounds | None:
    """Bounds of the elements of an integer value made from aranges, fills and sums; None where nothing is known.

    They are exact for what exporters make of a position (`arange(S) + position`), and never too narrow.
    """
    if not isinstance(arg, Ref):
        return (arg, arg) if isinstance(arg, int | Sym) and not isinstance(arg, bool) else None
    if graph.values[arg.value].dtype not in INTEGERS:
        return None
    node = next((n for n in graph.nodes if arg.value in n.outputs), None)
    return None if node is None else _of_node(graph, node)


def _of_node(graph: Graph, node: Node) -> Bounds | None:
    name = node.op.split(".")[1].removesuffix("_copy") if not node.op.endswith("_to_copy.default") else "_to_copy"
    args = node.args
    if name in _SAME:
        return integer_bounds(graph, args.get("self"))
    if name == "arange":
        return _arange(graph, node)
    if name in ("scalar_tensor", "full"):
        return integer_bounds(graph, args.get("s", args.get("fill_value")))
    if name in ("add", "sub") and args.get("alpha", 1) == 1:
        left, right = integer_bounds(graph, args["self"]), integer_bounds(graph, args["other"])
        if left is None or right is None:
            return None
        low, high = (right[0], right[1]) if name == "add" else (right[1], right[0])
        return make_dim(name, left[0], low), make_dim(name, left[1], high)
    return None


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
    return start, make_dim("add", start, last)
