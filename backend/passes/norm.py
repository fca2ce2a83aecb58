"""RMSNorm, spelled out by exporters as a dozen nodes, as `webgpu.rms_norm`."""

from __future__ import annotations

from dataclasses import replace

from ..graph import Arg, Graph, Node, Ref
from .match import ADD, MUL, operands, uncast, uncast_narrow
from .rewrite import Links, map_nodes


def fuse_rms_norm(graph: Graph) -> Graph:
    """weight * (x * rsqrt(mean(x^2) + eps)), with or without the weight, casts between the steps included.

    What is fused computes in float32 throughout and rounds once, where the spelled-out form of a float16 model rounds
    twice.
    """
    links = Links(graph)

    def change(node: Node) -> list[Node] | None:
        if node.op not in MUL:
            return None
        for scaled, weight in operands(node):
            found = _normalised(links, uncast_narrow(links, scaled))
            if found is not None and _is_weight(links, weight, found[0]):
                return [_fused(links, node, found, uncast(links, weight))]
        found = _normalised(links, Ref(node.outputs[0]))
        return None if found is None else [_fused(links, node, found, None)]

    return map_nodes(graph, change)


def _fused(links: Links, node: Node, found: tuple[Arg, float], weight: Arg) -> Node:
    x, eps = found
    return replace(node, op="webgpu.rms_norm", args={"input": uncast(links, x), "weight": weight, "eps": eps})


def _is_weight(links: Links, arg: Arg, x: Arg) -> bool:
    return (
        isinstance(arg, Ref)
        and links.value(arg).shape == links.value(x).shape[-1:]
        and links.value(arg).dtype in ("f32", "f16", "bf16")
    )


def _normalised(links: Links, arg: Arg) -> tuple[Arg, float] | None:
    """(x, eps) if `arg` is x * rsqrt(mean(x^2, last axis) + eps)."""
    for x, factor in operands(links.made_by(arg, *MUL)):
        root = links.made_by(factor, "aten.rsqrt.default")
        for mean, eps in operands(links.made_by(root.args["self"], *ADD) if root is not None else None):
            if isinstance(eps, bool) or not isinstance(eps, float | int):
                continue
            node = links.made_by(mean, "aten.mean.dim")
            if node is None or node.args.get("keepdim") is not True or not _last_axis(links, node):
                continue
            if _squared(links, node.args["self"]) == x:
                return x, float(eps)
    return None


def _last_axis(links: Links, mean: Node) -> bool:
    rank = len(links.value(mean.args["self"]).shape)
    return mean.args["dim"] in ((-1,), (rank - 1,))


def _squared(links: Links, arg: Arg) -> Arg:
    """x if `arg` is x * x or x ** 2."""
    node = links.made_by(arg, *MUL, "aten.pow.Tensor_Scalar")
    if node is None:
        return None
    if node.op in MUL:
        return node.args["self"] if node.args["self"] == node.args["other"] else None
    return node.args["self"] if node.args["exponent"] == 2 else None
