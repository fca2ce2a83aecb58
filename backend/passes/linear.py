"""Weights used as stored: matrix products with a transposed constant, and gated activations."""

from __future__ import annotations

from dataclasses import replace

from ..graph import Arg, Graph, Node, Ref
from .match import MUL, operands, permutation, uncast, uncast_narrow
from .rewrite import Links, map_nodes


def fuse_linear(graph: Graph) -> Graph:
    """mm(x, permute(w)) and addmm(bias, x, permute(w)) as `webgpu.linear`, so that no step transposes a weight."""
    links = Links(graph)

    def change(node: Node) -> list[Node] | None:
        if node.op == "aten.mm.default":
            x, right, bias = node.args["self"], node.args["mat2"], None
        elif node.op == "aten.addmm.default" and node.args.get("beta", 1) == 1 and node.args.get("alpha", 1) == 1:
            x, right, bias = node.args["mat1"], node.args["mat2"], node.args["self"]
            if not isinstance(bias, Ref) or links.value(bias).shape != links.value(right).shape[1:]:
                return None
        else:
            return None
        source = links.made_by(right)
        if source is None or permutation(links, source) != (1, 0):
            return None
        args: dict[str, Arg] = {"input": x, "weight": source.args["self"], "bias": bias, "transposed": True}
        return [replace(node, op="webgpu.linear", args=args)]

    return map_nodes(graph, change)


def fuse_swiglu(graph: Graph) -> Graph:
    """silu(gate) * up as `webgpu.swiglu`; silu whole or as gate * sigmoid(gate)."""
    links = Links(graph)

    def change(node: Node) -> list[Node] | None:
        if node.op not in MUL:
            return None
        for left, up in operands(node):
            gate = _silu_of(links, left)
            if gate is None or not isinstance(up, Ref) or links.value(gate).shape != links.value(up).shape:
                continue
            if gate != up:  # silu(x) = x * sigmoid(x) is itself a product
                return [replace(node, op="webgpu.swiglu", args={"gate": gate, "up": up})]
        return None

    return map_nodes(graph, change)


def _silu_of(links: Links, arg: Arg) -> Arg:
    node = links.made_by(uncast_narrow(links, arg), "aten.silu.default", *MUL)
    if node is None:
        return None
    if node.op == "aten.silu.default":
        return uncast(links, node.args["self"])
    for x, gate in operands(node):
        sigmoid = links.made_by(gate, "aten.sigmoid.default")
        if sigmoid is not None and uncast(links, sigmoid.args["self"]) == uncast(links, x):
            return uncast(links, x)
    return None
