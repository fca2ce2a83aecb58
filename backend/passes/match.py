"""Small matchers that the fusion passes share. Each returns what it found, or None."""

from __future__ import annotations

from collections.abc import Iterator

from ..graph import FLOATS, Arg, Node, Ref
from .rewrite import Links

CAST = ("aten._to_copy.default", "dim_order_ops._to_dim_order_copy.default", "aten.to.dtype")
COPY = ("aten.clone.default", "aten.alias_copy.default", "aten.alias.default", "dim_order_ops._clone_dim_order.default")
VIEW = ("aten.view_copy.default", "aten.view.default", "aten.reshape.default", "aten._unsafe_view.default")
UNSQUEEZE = ("aten.unsqueeze_copy.default", "aten.unsqueeze.default")
SQUEEZE = ("aten.squeeze_copy.dims", "aten.squeeze_copy.dim", "aten.squeeze.dim", "aten.squeeze.dims")
SLICE = ("aten.slice_copy.Tensor", "aten.slice.Tensor")
PERMUTE = ("aten.permute_copy.default", "aten.permute.default")
TRANSPOSE = ("aten.transpose_copy.int", "aten.transpose.int", "aten.t_copy.default", "aten.t.default")
EXPAND = ("aten.expand_copy.default", "aten.expand.default")
MUL = ("aten.mul.Tensor",)
ADD = ("aten.add.Tensor", "aten.add.Scalar")
SUB = ("aten.sub.Tensor",)
NORMS = ("webgpu.rms_norm", "aten.rms_norm.default", "aten._fused_rms_norm.default")


def operands(node: Node | None) -> Iterator[tuple[Arg, Arg]]:
    """The two operands of a commutative binary node, in both orders."""
    if node is not None and node.args.get("alpha", 1) == 1:
        yield node.args["self"], node.args["other"]
        yield node.args["other"], node.args["self"]


def uncast(links: Links, arg: Arg) -> Arg:
    """A float value before casts to a wider type and copies: the same numbers in the type they were stored in."""
    while True:
        node = links.made_by(arg, *CAST, *COPY)
        if node is None:
            return arg
        source = node.args["self"]
        widens = (
            links.value(source).dtype in ("f16", "bf16", links.value(arg).dtype) and links.value(arg).dtype in FLOATS
        )
        if not widens:
            return arg
        arg = source


def uncast_narrow(links: Links, arg: Arg) -> Arg:
    """A value before a cast between float types, narrowing ones included (fused, the narrow step is left out)."""
    node = links.made_by(arg, *CAST)
    if node is None or not {links.value(node.args["self"]).dtype, links.value(arg).dtype} <= {"f32", "f16", "bf16"}:
        return arg
    return node.args["self"]


def permutation(links: Links, node: Node) -> tuple[int, ...] | None:
    """The order of axes that a permute or transpose gives its result; None for another node."""
    source = node.args.get("self")
    if not isinstance(source, Ref):
        return None
    rank = len(links.value(source).shape)
    if rank == 0:
        return None
    if node.op in PERMUTE:
        dims = node.args["dims"]
        return tuple(int(str(d)) % rank for d in dims) if isinstance(dims, tuple) else None
    if node.op in TRANSPOSE:
        order = list(range(rank))
        a, b = (int(str(node.args.get(name, default))) % rank for name, default in (("dim0", 0), ("dim1", -1)))
        order[a], order[b] = order[b], order[a]
        return tuple(order)
    return None


def swaps_middle(links: Links, node: Node | None) -> bool:
    """Whether a node exchanges axes 1 and 2 of a rank-4 tensor: [B,S,H,D] <-> [B,H,S,D]."""
    return node is not None and permutation(links, node) == (0, 2, 1, 3)


def sliced(links: Links, arg: Arg, axis: int) -> tuple[Arg, object, object] | None:
    """(source, start, end) of a slice with step 1 along `axis` (negative axes count from the end)."""
    node = links.made_by(arg, *SLICE)
    if node is None or node.args.get("step", 1) != 1:
        return None
    source = node.args["self"]
    rank = len(links.value(source).shape)
    if int(str(node.args["dim"])) % rank != axis % rank:
        return None
    start, end, size = node.args["start"], node.args["end"], links.value(source).shape[axis]
    start = 0 if start is None else start
    if isinstance(size, int):
        if isinstance(start, int) and start < 0:
            start += size
        end = size if end is None or (isinstance(end, int) and end > size) else end
        if isinstance(end, int) and end < 0:
            end += size
    return source, start, end
