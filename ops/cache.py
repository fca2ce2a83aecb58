"""Writes into KV caches: `llama.update_cache`, `llama.update_cache_with_indices` and, for ragged batches,
`webgpu.update_cache`.

All return the new cache. Where it takes over the buffer of the old one only the new rows are written.
"""

from __future__ import annotations

from collections.abc import Iterator

from .. import wgsl
from ..backend.graph import Dim, Graph, Node, Ref, Sym
from .base import Dispatch, Lowering, register
from .copies import Axis, Moving, Rows, Side, copy_all, detached, indexed_copy, side, strided_copy
from .lengths import PART, batch_fits, lengths_reason, require_totals

UPDATE = "webgpu.update_cache"

_INT_MAX = 2**31 - 1


def _ref(node: Node, name: str) -> Ref:
    found = node.args[name]
    assert isinstance(found, Ref), f"{node.name}: {name} is {found!r}"
    return found


def _position(node: Node) -> Dim:
    found = node.args["start_pos"]
    assert isinstance(found, int | Sym), f"{node.name}: start_pos is {found!r}"
    return found


def _supports(graph: Graph, node: Node) -> str | None:
    value, cache = graph.value(node.args["value"]), graph.value(node.args["cache"])
    if len(node.outputs) != 1:
        return "a cache write has one result here, the new cache"
    if len(value.shape) != 4 or len(cache.shape) != 4:
        return f"value {value.shape} and cache {cache.shape} must have the axes [batch, position, head, head size]"
    if value.dtype != cache.dtype:
        return f"value is {value.dtype}, but cache {cache.name} is {cache.dtype}; cast the value to the cache's dtype"
    for axis in (0, 2, 3):
        if value.shape[axis] != cache.shape[axis]:
            return f"value {value.shape} and cache {cache.name} {cache.shape} differ at axis {axis}"
    if not isinstance(node.args["start_pos"], int | Sym):
        return "start_pos must be an integer"
    return None


def supports_update(graph: Graph, node: Node) -> str | None:
    reason = _supports(graph, node)
    position = node.args["start_pos"]
    if reason is None and isinstance(position, int) and position < 0:
        return f"start_pos is {position}; it must not be negative"
    return reason


def lower_update(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
    """new = cache with new[:, start_pos : start_pos + S] = value; value [B, S, H, D], cache [B, C, H, D], one dtype."""
    value, cache, out = _ref(node, "value"), _ref(node, "cache"), ctx.out(node)
    position = _position(node)
    batch, length, heads, size = ctx.shape(value)
    capacity = ctx.shape(cache)[1]
    row = heads * size
    ctx.require(
        position,
        0,
        capacity - length,
        f"writing {length} rows into cache {ctx.value(cache).name} of capacity {capacity} at start_pos {position}",
    )
    yield from copy_all(ctx, cache, out)
    source, before = detached(ctx, value, out)
    yield from before
    target = side(ctx, out, moving=Moving(position, row, 0, capacity - length))
    if capacity < length:
        return  # refused by the check above at every step; a kernel could not even hold the bound
    yield from strided_copy(
        ctx, source, target, [Axis(batch, (length * row, capacity * row)), Axis(length, (row, row)), Axis(row, (1, 1))]
    )


def supports_update_with_indices(graph: Graph, node: Node) -> str | None:
    reason = _supports(graph, node)
    if reason is not None:
        return reason
    value, indices = graph.value(node.args["value"]), graph.value(node.args["indices"])
    if indices.dtype not in ("i64", "i32"):
        return f"indices must be integers, got {indices.dtype}"
    if indices.shape != value.shape[:2]:
        return f"indices {indices.shape} must have the batch and length of value {value.shape}"
    return None


def lower_update_with_indices(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
    """new = cache with new[b, indices[b, s]] = value[b, s] in increasing s.

    Indices [B, S] outside 0..C-1 write nothing. `start_pos` decides nothing; it must only not be negative.
    """
    value, cache, indices, out = _ref(node, "value"), _ref(node, "cache"), _ref(node, "indices"), ctx.out(node)
    batch, length, heads, size = ctx.shape(value)
    capacity = ctx.shape(cache)[1]
    row = heads * size
    name = ctx.value(cache).name
    ctx.require(_position(node), 0, _INT_MAX, f"start_pos of the write into cache {name}")
    ctx.require_elements(indices, 0, capacity - 1, f"rows written into cache {name} of capacity {capacity}")
    yield from copy_all(ctx, cache, out)
    source, before = detached(ctx, value, out)
    rows, more = detached(ctx, indices, out)
    yield from (*before, *more)
    if length > 1 and batch * row > 0:
        # Invocations run in any order, so of several writes to one row only the last may happen at all.
        winners = Side(ctx.scratch("i32", batch * length), "i32")
        yield Dispatch(
            "last_write",
            {"idx": rows.value, "out": winners.value},
            {"count": batch * length, "length": length},
            ctx.grid_1d(batch * length, 64),
        )
        rows = winners
    axes = [Axis(batch, (length * row, capacity * row, length)), Axis(length, (row, 0, 1)), Axis(row, (1, 1, 0))]
    yield from indexed_copy(ctx, source, side(ctx, out), Rows(rows.value, row, capacity, 0), axes, scatter=True)


def supports_update_ragged(graph: Graph, node: Node) -> str | None:
    """`webgpu.update_cache`: value [B, S, H, D], cache [B, C, H, D] of one float dtype, `lengths` of
    `webgpu.lengths`."""
    reason = _supports(graph, Node(node.op, {**node.args, "start_pos": 0}, node.outputs, node.name))
    if reason is not None:
        return reason
    cache, out = graph.value(node.args["cache"]), graph.values[node.outputs[0]]
    if cache.dtype not in ("f32", "f16", "bf16"):
        return f"cache {cache.name} has dtype {cache.dtype}; float32, float16 and bfloat16 are supported"
    if (out.dtype, out.shape) != (cache.dtype, cache.shape):
        return f"the new cache is {out.dtype}{list(out.shape)}, {cache.name} {cache.dtype}{list(cache.shape)}"
    if node.args.get("lengths") is None:
        return "lengths is missing"
    return lengths_reason(graph, node.args["lengths"], cache.shape[0])


def lower_update_ragged(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
    """new = cache with new[b, past + s] = value[b, s] for s < new, where (past, new) = lengths[b]."""
    value, cache, out, lengths = _ref(node, "value"), _ref(node, "cache"), ctx.out(node), _ref(node, "lengths")
    batch, length, heads, size = ctx.shape(value)
    capacity, row = ctx.shape(cache)[1], heads * size
    require_totals(ctx, lengths, capacity, f"the rows of cache {ctx.value(cache).name} ({capacity})")
    yield from copy_all(ctx, cache, out)
    if batch * length * row == 0 or not batch_fits(ctx, lengths, batch):
        return
    source, before = detached(ctx, value, out)
    yield from before
    unit = 1 if row % 4 else 4
    count = batch * length * row // unit
    kinds = {"X": ctx.stored_as(source.value, source.dtype), "Cache": ctx.wgsl_type(out)}
    yield Dispatch(
        "update_cache",
        {"value": source.value, "cache": out.value, "lengths": lengths.value},
        {"count": count, "rows": length, "row": row // unit, "capacity": capacity},
        ctx.grid_1d(count, 64),
        consts={"LENGTHS": batch},
        types=kinds if unit == 1 else {name: f"vec4<{kind}>" for name, kind in kinds.items()},
        body=wgsl.source(PART),
    )


register(UPDATE, supports=supports_update_ragged, lower=lower_update_ragged, inplace={0: "cache"})
register("llama.update_cache.default", supports=supports_update, lower=lower_update, inplace={0: "cache"})
register(
    "llama.update_cache_with_indices.default",
    supports=supports_update_with_indices,
    lower=lower_update_with_indices,
    inplace={0: "cache"},
)
