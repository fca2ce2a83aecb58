"""Reads and writes at places that a tensor holds: embedding, index, gather, take; index_put, index_copy, scatter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import gcd, prod

from ..backend.graph import Arg, Dim, Graph, Node, Ref
from .base import Dispatch, Lowering, register
from .copies import (
    WORKGROUP,
    Rows,
    Side,
    box,
    copy_all,
    detached,
    indexed_copy,
    merge,
    side,
    table,
)
from .joining import fill_dispatch, unfit
from .layout import number, ref
from .strides import MAX_RANK, axis_of, broadcast_strides, contiguous
from .views import argument

Indices = Sequence[Ref | None]


def index_list(node: Node) -> tuple[Ref | None, ...]:
    """The argument `indices`, with the Nones that PyTorch allows at the end dropped."""
    given = node.args["indices"]
    assert isinstance(given, tuple)
    found = [item for item in given if item is None or isinstance(item, Ref)]
    assert len(found) == len(given), f"{node.name}: indices is {given!r}"
    while found and found[-1] is None:
        found.pop()
    return tuple(found)


def _check_index(graph: Graph, index: Arg) -> str | None:
    value = graph.value(index)
    if value.dtype in ("bool", "u8"):
        return (
            f"index {value.name} is a {value.dtype} mask, which makes the result's size depend on data; use torch.where"
        )
    if value.dtype not in ("i64", "i32", "i16", "i8"):
        return f"index {value.name} is {value.dtype}; it must be an integer tensor"
    return f"more than {MAX_RANK} axes" if len(value.shape) > MAX_RANK else None


def _check_indices(graph: Graph, node: Node, indices: Indices) -> str | None:
    own = argument(graph, node)
    used = [index for index in indices if index is not None]
    if not used:
        return "no index tensor"
    for index in used:
        reason = _check_index(graph, index)
        if reason is not None:
            return reason
    if len(indices) > len(own.shape):
        return f"{len(indices)} indices for a tensor of {len(own.shape)} axes"
    longest = max(len(graph.value(index).shape) for index in used)
    if len(own.shape) - len(used) + longest > MAX_RANK:
        return f"more than {MAX_RANK} axes"
    return None


def _broadcast(shapes: Sequence[Sequence[int]]) -> tuple[int, ...]:
    rank = max(len(shape) for shape in shapes)
    padded = [(1,) * (rank - len(shape)) + tuple(shape) for shape in shapes]
    return tuple(next((size for size in sizes if size != 1), 1) for sizes in zip(*padded, strict=True))


def _require_broadcast(ctx: Lowering, ref: Ref, target: Sequence[int]) -> None:
    """Refuse a step in which dynamic sizes turn out not to broadcast (the export could not compare them)."""
    for size, wanted in zip(reversed(ctx.shape(ref)), reversed(target), strict=False):
        if size not in (1, wanted):
            ctx.require(size, wanted, wanted, f"size of {ctx.value(ref).name}, which is broadcast to {list(target)}")


def _require_within(ctx: Lowering, ref: Ref, limits: Sequence[int], axis: int | None = None) -> None:
    """Refuse a step in which a dynamic size of a tensor turns out larger than its limit, except on `axis`."""
    for a, (size, limit) in enumerate(zip(ctx.shape(ref), limits, strict=True)):
        if a != axis and size > limit:
            ctx.require(size, 0, limit, f"size of {ctx.value(ref).name} at axis {a}")


@dataclass(frozen=True, slots=True)
class Place:
    """Where an indexed tensor is read or written.

    Attributes:
        shape: sizes of the part that the indices name, in PyTorch's order of axes.
        own: stride of each of its axes in the indexed tensor (0 for axes of the indices).
        index: stride of each of its axes in the rows.
        rows: the rows; their buffer is filled by `before`.
        before: dispatches to make first.
    """

    shape: tuple[int, ...]
    own: tuple[int, ...]
    index: tuple[int, ...]
    rows: Rows
    before: tuple[Dispatch, ...]


def locate(ctx: Lowering, indexed: Ref, indices: Indices, written: Ref | None, wrap: bool, what: str) -> Place:
    """Resolve `indexed[indices]`.

    Args:
        written: the value that the dispatch writes, if an index might share its buffer.
        wrap: whether negative indices count from the end (else they are out of range).
        what: for the host's message about an index out of range.
    """
    shape = ctx.shape(indexed)
    steps = contiguous(shape)
    used = [axis for axis, index in enumerate(indices) if index is not None]
    given = [index for index in indices if index is not None]
    for axis, index in zip(used, given, strict=True):
        size = shape[axis]
        what_axis = f"{what} (axis {axis} of size {size} of {ctx.value(indexed).name})"
        ctx.require_elements(index, -size if wrap else 0, size - 1, what_axis)
    picked = _broadcast([ctx.shape(index) for index in given])
    for index in given:
        _require_broadcast(ctx, index, picked)
    adjacent = used == list(range(used[0], used[0] + len(used)))
    kept = [axis for axis in range(len(shape)) if axis not in used]
    front = [axis for axis in kept if axis < used[0]] if adjacent else []
    back = [axis for axis in kept if axis not in front]
    before: list[Dispatch] = []
    if len(used) == 1:
        source, size = given[0], shape[used[0]]
        if written is None:
            buffer = source.value
        else:
            copied, before = detached(ctx, source, written)
            buffer = copied.value
        rows = Rows(buffer, steps[used[0]], size, size if wrap else 0)
    else:
        unit = 0
        for axis in used:
            unit = gcd(unit, steps[axis])
        buffer = ctx.scratch("i32", prod(picked))
        before = list(_combine(ctx, given, [shape[a] for a in used], [steps[a] // unit for a in used], picked, buffer))
        span = sum((shape[a] - 1) * (steps[a] // unit) for a in used) + 1
        rows = Rows(buffer, unit, 0 if 0 in (shape[a] for a in used) else span, 0)
    here, none = contiguous(picked), (0,) * len(picked)
    return Place(
        (*(shape[a] for a in front), *picked, *(shape[a] for a in back)),
        (*(steps[a] for a in front), *none, *(steps[a] for a in back)),
        (*(0 for _ in front), *here, *(0 for _ in back)),
        rows,
        tuple(before),
    )


def _combine(
    ctx: Lowering,
    given: Sequence[Ref],
    limits: Sequence[int],
    scales: Sequence[int],
    picked: tuple[int, ...],
    target: int,
) -> Iterator[Dispatch]:
    """Add several index tensors up to one of offsets (see index_offsets.wgsl)."""
    count = prod(picked)
    if count == 0:
        return
    for k, (index, limit, scale) in enumerate(zip(given, limits, scales, strict=True)):
        axes = merge(box(picked, broadcast_strides(ctx.shape(index), picked)))
        yield Dispatch(
            "index_offsets",
            {"idx": index.value, "out": target},
            {
                "count": count,
                "first": int(k == 0),
                "limit": limit,
                "scale": scale,
                "sizes": table(axis.size for axis in axes),
                "idx_strides": table(axis.strides[0] for axis in axes),
            },
            ctx.grid_1d(count, WORKGROUP),
            consts={"RANK": len(axes)},
        )


def _read(ctx: Lowering, source: Ref, out: Ref, place: Place) -> Iterator[Dispatch]:
    if place.rows.limit == 0 and prod(place.shape) > 0:
        ctx.require(0, 1, 1, f"indices into an axis of size 0 of {ctx.value(source).name}")
    yield from place.before
    axes = box(place.shape, place.own, contiguous(place.shape), place.index)
    yield from indexed_copy(ctx, side(ctx, source), side(ctx, out), place.rows, axes, scatter=False)


def _write(ctx: Lowering, values: Ref, own: Ref, out: Ref, place: Place) -> Iterator[Dispatch]:
    """The old value, unless `out` takes over its buffer, then the values (broadcast) at the place."""
    _require_broadcast(ctx, values, place.shape)
    source, before = detached(ctx, values, out)
    yield from (*before, *place.before)
    yield from copy_all(ctx, own, out)
    axes = box(place.shape, broadcast_strides(ctx.shape(values), place.shape), place.own, place.index)
    yield from indexed_copy(ctx, source, side(ctx, out), place.rows, axes, scatter=True)


# -- reads


def supports_index(graph: Graph, node: Node) -> str | None:
    return _check_indices(graph, node, index_list(node))


def lower_index(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
    """out = self[indices]; negative indices count from the end."""
    own, out = ref(node), ctx.out(node)
    yield from _read(ctx, own, out, locate(ctx, own, index_list(node), None, True, "index"))


register("aten.index.Tensor", supports=supports_index, lower=lower_index)


def supports_index_select(graph: Graph, node: Node) -> str | None:
    return "self has no axes" if not argument(graph, node).shape else _check_indices(graph, node, [ref(node, "index")])


def lower_index_select(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
    own, out = ref(node), ctx.out(node)
    axis = axis_of(number(node.args["dim"]), len(ctx.shape(own)))
    yield from _read(ctx, own, out, locate(ctx, own, [*[None] * axis, ref(node, "index")], None, False, "index"))


register("aten.index_select.default", supports=supports_index_select, lower=lower_index_select)


def supports_embedding(graph: Graph, node: Node) -> str | None:
    weight, indices = graph.value(node.args["weight"]), node.args["indices"]
    if len(weight.shape) != 2:
        return f"weight must have two axes, got {weight.shape}"
    reason = _check_index(graph, indices)
    if reason is None and len(graph.value(indices).shape) + 1 > MAX_RANK:
        return f"more than {MAX_RANK} axes"
    return reason


def lower_embedding(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
    """out[..., :] = weight[indices[...], :]; weight [V, D]. `padding_idx` only matters to gradients."""
    weight, out = ref(node, "weight"), ctx.out(node)
    yield from _read(ctx, weight, out, locate(ctx, weight, [ref(node, "indices")], None, False, "token id"))


register("aten.embedding.default", supports=supports_embedding, lower=lower_embedding)


def supports_gather(graph: Graph, node: Node) -> str | None:
    reason = _check_index(graph, node.args["index"])
    if reason is not None:
        return reason
    ranks = len(argument(graph, node).shape), len(graph.value(node.args["index"]).shape)
    return f"self has {ranks[0]} axes, index {ranks[1]}" if ranks[0] != ranks[1] else None


def lower_gather(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
    """out[c] = self[c with index[c] on axis `dim`]."""
    own, index, out = ref(node), ref(node, "index"), ctx.out(node)
    place = _along(ctx, own, index, node.args["dim"], None)
    yield from _read(ctx, own, out, place)


def _along(ctx: Lowering, indexed: Ref, index: Ref, dim: Arg, written: Ref | None) -> Place:
    """Resolve the indices of gather and scatter, which name a place on one axis for every element."""
    shape, picked = ctx.shape(indexed), ctx.shape(index)
    axis = axis_of(number(dim), len(shape))
    _require_within(ctx, index, shape, axis)
    steps = contiguous(shape)
    size, step = (shape[axis], steps[axis]) if shape else (1, 1)
    ctx.require_elements(index, 0, size - 1, f"index (axis {axis} of size {size} of {ctx.value(indexed).name})")
    buffer, before = index.value, list[Dispatch]()
    if written is not None:
        copied, before = detached(ctx, index, written)
        buffer = copied.value
    own = tuple(0 if a == axis else n for a, n in enumerate(steps))
    return Place(picked, own, contiguous(picked), Rows(buffer, step, size, 0), tuple(before))


register("aten.gather.default", supports=supports_gather, lower=lower_gather)


def supports_take(graph: Graph, node: Node) -> str | None:
    return _check_index(graph, node.args["index"])


def lower_take(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
    """out[c] = flattened self[index[c]]; negative indices count from the end."""
    own, index, out = ref(node), ref(node, "index"), ctx.out(node)
    total, picked = ctx.numel(own), ctx.shape(index)
    ctx.require_elements(index, -total, total - 1, f"index (flattened {ctx.value(own).name} of {total} elements)")
    place = Place(picked, (0,) * len(picked), contiguous(picked), Rows(index.value, 1, total, total), ())
    yield from _read(ctx, own, out, place)


register("aten.take.default", supports=supports_take, lower=lower_take)


# -- writes


def _broadcasts(values: Sequence[Dim], target_rank: int) -> str | None:
    if len(values) > target_rank:
        return f"values {tuple(values)} have more axes than the {target_rank} of the place they are written to"
    return None


def supports_index_put(graph: Graph, node: Node) -> str | None:
    if node.args.get("accumulate"):
        return "accumulate=True is not supported: WGSL has no float atomics to add duplicates with"
    own, values = argument(graph, node), graph.value(node.args["values"])
    if values.dtype != own.dtype:
        return f"values are {values.dtype}, but self is {own.dtype}"
    indices = index_list(node)
    reason = _check_indices(graph, node, indices)
    if reason is not None:
        return reason
    used = [index for index in indices if index is not None]
    rank = len(own.shape) - len(used) + max(len(graph.value(index).shape) for index in used)
    return _broadcasts(values.shape, rank)


def lower_index_put(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
    """out = self with out[indices] = values (broadcast).

    Which of several writes to one place wins is open, as in PyTorch.
    """
    own, out = ref(node), ctx.out(node)
    place = locate(ctx, own, index_list(node), out, True, "index written")
    yield from _write(ctx, ref(node, "values"), own, out, place)


_IN_SELF = {0: "self"}
register("aten.index_put.default", supports=supports_index_put, lower=lower_index_put, inplace=_IN_SELF)


def supports_index_copy(graph: Graph, node: Node) -> str | None:
    own, source = argument(graph, node), graph.value(node.args["source"])
    if source.dtype != own.dtype:
        return f"source is {source.dtype}, but self is {own.dtype}"
    if not own.shape or len(source.shape) != len(own.shape) or len(graph.value(node.args["index"]).shape) != 1:
        return f"needs an index of one axis and a source of as many axes as self, got {source.shape} for {own.shape}"
    return _check_indices(graph, node, [ref(node, "index")])


def lower_index_copy(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
    own, out = ref(node), ctx.out(node)
    axis = axis_of(number(node.args["dim"]), len(ctx.shape(own)))
    place = locate(ctx, own, [*[None] * axis, ref(node, "index")], out, False, "index written")
    yield from _write(ctx, ref(node, "source"), own, out, place)


register("aten.index_copy.default", supports=supports_index_copy, lower=lower_index_copy, inplace=_IN_SELF)


def supports_scatter(graph: Graph, node: Node) -> str | None:
    reason = supports_gather(graph, node)
    if reason is not None:
        return reason
    own = argument(graph, node)
    if "src" not in node.args:
        return unfit(node.args["value"], own.dtype)
    source = graph.value(node.args["src"])
    if source.dtype != own.dtype or len(source.shape) != len(own.shape):
        return f"src {source.dtype}{source.shape} must have the dtype and number of axes of self {own.dtype}{own.shape}"
    return None


def lower_scatter(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
    """out = self with out[c with index[c] on axis `dim`] = src[c] (or the literal `value`) for every c of index."""
    own, index, out = ref(node), ref(node, "index"), ctx.out(node)
    place = _along(ctx, own, index, node.args["dim"], out)
    dtype = ctx.dtype(own)
    if "src" in node.args:
        values = ref(node, "src")
        _require_within(ctx, index, ctx.shape(values))
        source, before = detached(ctx, values, out)
        steps = contiguous(ctx.shape(values))
    else:
        value = node.args["value"]
        assert isinstance(value, int | float)
        source, steps = Side(ctx.scratch(dtype, 1), dtype), (0,) * len(place.shape)
        before = list(fill_dispatch(ctx, index.value, source.value, dtype, ((0,), (1,)), (0,), value))
    yield from (*before, *place.before)
    yield from copy_all(ctx, own, out)
    yield from indexed_copy(
        ctx, source, side(ctx, out), place.rows, box(place.shape, steps, place.own, place.index), True
    )


register("aten.scatter.src", "aten.scatter.value", supports=supports_scatter, lower=lower_scatter, inplace=_IN_SELF)
