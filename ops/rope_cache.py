"""`webgpu.rope_cache`: what stands between the projections of a decoder layer and its attention, in one dispatch.

Query is rotated, key is rotated and written to its cache, value is written to its cache, and the grids of the attention
that reads the caches are sized for the live length.

Arguments:
    query, key: [B, S, H, D] and [B, S, Hkv, D] with `layout` "bshd", [B, H, S, D] and [B, Hkv, S, D] with "bhsd".
    value: [B, S, Hv, Dv] in either case.
    key_cache, value_cache: [B, C, Hkv, D], of any float dtype, and [B, C, Hv, Dv], of the dtype of value.
    cos, sin, start, rot, interleaved: as of `webgpu.rope`.
    start_pos: cache row of the first position, live. Rows start_pos .. start_pos + S - 1 are written.
    lengths: None, or i32[B, 4] of `webgpu.lengths`: (past, new, 0, 0) of each batch row. Position s of a row takes
        table row and cache row past + s; start and start_pos are ignored. Positions s >= new are padding: their rotated
        query is zero and they are not written. The grids in `sizes` are those of the batch row with most splits.
    kv_limit, window: those of the attention that follows (`webgpu.attention`), at the same start_pos.

Results: the rotated query, in its shape; the new caches, which may take over the buffers of the old ones; and `sizes`,
i32[8], for the argument of that name of `webgpu.attention`: words 0 to 2 are the grid of attention_stream.wgsl, words 4
to 6 that of attention_merge.wgsl. It is written only where `attention_decode.live_stream` says that attention reads it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

from .. import wgsl
from ..backend.graph import Arg, Dim, Graph, Node, Ref, Sym
from .attention_common import LIMITS_OF_KEYS, Problem, as_bhsd, limit_of, number
from .attention_decode import SIZES_WORDS, grids, live_stream
from .base import Const, Dispatch, Lowering, Param, register
from .cache import supports_update
from .copies import Side, copy_all, detached, side
from .lengths import PART, batch_fits, lengths_consts, lengths_parts, lengths_reason, require_totals
from .rope import FLOATS, LAYOUTS, require_rows
from .rope import supports as supports_rope

NAME = "webgpu.rope_cache"
WORKGROUP = 64
_TABLE = ("cos", "sin", "start", "rot", "interleaved", "layout")
_READ = {"query": "query", "key": "key", "value": "value", "cosines": "cos", "sines": "sin"}
"""Shader variable -> argument."""
POSITIONS = "rope_cache_positions"
"""The part of a shader that finds rows of tables and caches."""
_PAIRS = {1: "rope_cache_pairs_1", 4: "rope_cache_pairs_4"}
"""Elements of a unit -> part of the shader."""


def _ref(node: Node, name: str) -> Ref:
    found = node.args[name]
    if not isinstance(found, Ref):
        raise TypeError(f"{node.name}: {name} is {found!r}")
    return found


def _dim(arg: Arg) -> Dim:
    if isinstance(arg, bool) or not isinstance(arg, int | Sym):
        raise TypeError(f"expected an integer or a symbol, got {arg!r}")
    return arg


def _bshd(shape: tuple[Dim, ...], layout: Arg) -> tuple[Dim, ...]:
    position, head = LAYOUTS[str(layout)]
    return shape[0], shape[position], shape[head], shape[3]


def supports(graph: Graph, node: Node) -> str | None:
    """What `webgpu.rope` supports of query and of key, what `llama.update_cache` supports, and sizes that agree."""
    if len(node.outputs) != 4:
        return f"{NAME} has four results, not {len(node.outputs)}"
    rotated, keys, values, sizes = (graph.values[i] for i in node.outputs)
    table = {name: node.args[name] for name in _TABLE if name in node.args}
    for name, output in (("query", node.outputs[0]), ("key", node.outputs[1])):
        reason = supports_rope(graph, Node("webgpu.rope", {"input": node.args[name], **table}, (output,), node.name))
        if reason is not None:
            return f"{name}: {reason}"
    write = {"value": node.args["value"], "cache": node.args["value_cache"], "start_pos": node.args["start_pos"]}
    reason = supports_update(graph, Node("llama.update_cache.default", write, node.outputs[2:3], node.name))
    if reason is not None:
        return reason
    query, key, value, key_cache, value_cache = (
        graph.value(node.args[name]) for name in ("query", "key", "value", "key_cache", "value_cache")
    )
    for cache in (key_cache, value_cache):
        if cache.dtype not in FLOATS:
            return f"cache {cache.name} has dtype {cache.dtype}; float32, float16 and bfloat16 are supported"
    q_shape, k_shape = _bshd(query.shape, node.args["layout"]), _bshd(key.shape, node.args["layout"])
    if q_shape[:2] != k_shape[:2] or q_shape[:2] != value.shape[:2] or q_shape[3] != k_shape[3]:
        return f"query {query.shape}, key {key.shape} and value {value.shape} differ in batch, positions or head size"
    if len(key_cache.shape) != 4 or (key_cache.shape[0], *key_cache.shape[2:]) != (k_shape[0], *k_shape[2:]):
        return f"key {key.shape} and its cache {key_cache.name} {key_cache.shape} differ in batch, heads or head size"
    if key_cache.shape[1] != value_cache.shape[1]:
        return f"cache {key_cache.name} has {key_cache.shape[1]} rows, {value_cache.name} {value_cache.shape[1]}"
    for old, new in ((query, rotated), (key_cache, keys), (value_cache, values)):
        if old.shape != new.shape:
            return f"the result for {old.name} is {new.shape}, not {old.shape}"
    for cache, new in ((key_cache, keys), (value_cache, values)):
        if cache.dtype != new.dtype:
            return f"cache {cache.name} is {cache.dtype}, the new one {new.dtype}"
    if sizes.dtype != "i32" or sizes.shape != (SIZES_WORDS,):
        return f"sizes is {sizes.dtype}{list(sizes.shape)}; it must be i32[{SIZES_WORDS}]"
    reason = lengths_reason(graph, node.args.get("lengths"), q_shape[0])
    if reason is not None:
        return reason
    if node.args["kv_limit"] not in LIMITS_OF_KEYS:
        return f"kv_limit is {node.args['kv_limit']!r}; it must be one of {LIMITS_OF_KEYS}"
    window = node.args["window"]
    if isinstance(window, bool) or not isinstance(window, int) or not 0 <= window < 2**31:
        return f"window is {window!r}; it must be an integer that is not negative"
    return None


def lower(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
    """See the module's docstring. One dispatch, after copies of what cannot be written in place."""
    args = node.args
    rotated, keys, values, sizes = (ctx.out(node, i) for i in range(4))
    batch, heads, rows, size = as_bhsd(ctx.shape(args["query"]), str(args["layout"]))
    kv_heads = ctx.shape(keys)[2]
    _, capacity, v_heads, v_size = ctx.shape(values)
    rot = args.get("rot") or size
    if not isinstance(rot, int):
        raise TypeError(f"expected a number of elements, got {rot!r}")
    table = ctx.shape(args["cos"])
    table_rows = prod(table[:-1])
    require_room(ctx, node, rows, capacity, table_rows)
    yield from copy_all(ctx, _ref(node, "key_cache"), keys)
    yield from copy_all(ctx, _ref(node, "value_cache"), values)
    lengths = args.get("lengths")
    if batch * rows == 0 or table_rows == 0 or not batch_fits(ctx, lengths, batch):
        return
    read: dict[str, Side] = {}
    for variable, name in _READ.items():
        read[variable], before = _apart(ctx, _ref(node, name), (keys, values))
        yield from before

    unit = 4 if size % 4 == 0 and rot % 8 == 0 else 1
    v_unit = 4 if v_heads * v_size % 4 == 0 else 1
    items = size // unit - rot // 2 // unit
    counts = (
        batch * rows * heads * items,
        batch * rows * kv_heads * items,
        batch * rows * v_heads * v_size // v_unit,
    )
    q_groups, k_groups, v_groups = (sum(-(-c // WORKGROUP) for c in counts[: i + 1]) for i in range(3))
    known: dict[str, Param] = {
        **positions(ctx, args, rows, capacity, table_rows),
        "heads": heads,
        "kv_heads": kv_heads,
        **dict(zip(("q_count", "k_count", "v_count"), counts, strict=True)),
        "v_row": v_heads * v_size // v_unit,
        "q_groups": q_groups,
        "k_groups": k_groups,
    }
    bindings = {
        **{variable: found.value for variable, found in read.items()},
        "query_out": rotated.value,
        "key_cache": keys.value,
        "value_cache": values.value,
    }
    if lengths is not None:
        bindings["lengths"] = ctx.id(lengths)
    kernel, parts, groups = "rope_cache", [PART, POSITIONS, "rope_cache_moves", _PAIRS[unit]], v_groups
    divided: dict[str, Const] = {}
    problem = Problem(batch, heads, kv_heads, rows, capacity, size, v_size)
    found = live_grids(ctx, args, keys, values, problem, v_heads)
    if found is not None:
        kernel, groups = "rope_cache_sizes", v_groups + 1
        parts += found.parts
        bindings["sizes"] = sizes.value
        divided = found.consts
        known |= {"v_groups": v_groups, **found.params}
    kinds = {
        **{letter: ctx.stored_as(read[v].value, read[v].dtype) for letter, v in _LETTERS.items()},
        "QOut": ctx.wgsl_type(rotated),
        "KCache": ctx.wgsl_type(keys),
        "VCache": ctx.wgsl_type(values),
    }
    wide = {name: (v_unit if name in ("V", "VCache") else unit) == 4 for name in kinds}
    yield Dispatch(
        kernel,
        bindings,
        known,
        ctx.fold_grid(groups),
        consts={
            "D": size,
            "ROT": rot,
            "WIDTH": table[-1],
            "UNIT": unit,
            "INTERLEAVED": args["interleaved"] is True,
            "HEADS_FIRST": args["layout"] == "bhsd",
            **lengths_consts(lengths is not None, batch),
            **divided,
        },
        types={
            "Wide": "vec4<f32>" if unit == 4 else "f32",
            **{name: f"vec4<{kind}>" if wide[name] else kind for name, kind in kinds.items()},
        },
        body="".join(wgsl.source(part) for part in parts),
    )


_LETTERS = {"Q": "query", "K": "key", "V": "value", "Cos": "cosines", "Sin": "sines"}
"""Element type in the shader -> shader variable."""


def require_room(ctx: Lowering, node: Node, rows: int, capacity: int, table_rows: int) -> None:
    """The host checks of `webgpu.rope` and `llama.update_cache`."""
    position = _dim(node.args["start_pos"])
    require_rows(ctx, node, _dim(node.args.get("start", 0)), rows, table_rows)
    if node.args.get("lengths") is not None:
        require_totals(ctx, node.args["lengths"], capacity, f"the rows of the caches ({capacity})")
        return
    for name in ("key_cache", "value_cache"):
        cache = ctx.value(node.args[name]).name
        what = f"writing {rows} rows into cache {cache} of capacity {capacity} at start_pos {position}"
        ctx.require(position, 0, capacity - rows, what)


def _apart(ctx: Lowering, source: Ref, written: tuple[Ref, ...]) -> tuple[Side, list[Dispatch]]:
    """`source` outside of the buffers that the kernel writes; see `copies.detached`."""
    for target in written:
        if ctx.shares_storage(source, target):
            return detached(ctx, source, target)
    return side(ctx, source), []


def positions(ctx: Lowering, args: Mapping[str, Arg], rows: int, capacity: int, table_rows: int) -> dict[str, Param]:
    """What rope_cache_positions.wgsl and ragged_rows.wgsl need."""
    plain = args.get("lengths") is None
    return {
        "start_pos": ctx.live(_dim(args["start_pos"]) if plain else 0),
        "start": ctx.live(_dim(args.get("start", 0)) if plain else 0),
        "last": capacity - rows,
        "rows": rows,
        "capacity": capacity,
        "table_rows": table_rows,
    }


@dataclass(frozen=True)
class LiveGrids:
    """What rope_cache_grids.wgsl needs: parts of the shader in front of it and itself, constants, params."""

    parts: tuple[str, ...]
    consts: dict[str, Const]
    params: dict[str, Param]


def live_grids(
    ctx: Lowering, args: Mapping[str, Arg], keys: Ref, values: Ref, problem: Problem, v_heads: int
) -> LiveGrids | None:
    """How the grids of the attention that follows are sized; None where they are fixed (`live_stream`).

    Args:
        keys, values: the new caches.
        problem: that attention. v_heads: heads of value; others than those of key are no attention's.
    """
    heads, kv_heads = problem.heads, problem.kv_heads
    if v_heads != kv_heads or kv_heads == 0 or heads == 0 or heads % kv_heads:
        return None
    choice = live_stream(ctx, {"key": keys, "value": values}, problem)
    if choice is None:
        return None
    split, merge = grids(problem, choice)
    return LiveGrids(
        grid_parts(args),
        {
            "START": ctx.live(_dim(args["start_pos"]) if args.get("lengths") is None else 0),
            "SPLITS": choice.splits,
            "SPLIT_TILE": choice.split_tile,
        },
        {
            "batch": problem.batch,
            "limit": limit_of(args),
            "window": int(number(args["window"])),
            "split_grid": (*split, 0),
            "merge_grid": (*merge, 0),
        },
    )


def grid_parts(args: Mapping[str, Arg]) -> tuple[str, ...]:
    """The parts of a shader that size grids, but for ragged_rows.wgsl."""
    before = (part for part in lengths_parts(args.get("lengths") is not None) if part != PART)
    return (*before, "attention_rules", "attention_splits", "rope_cache_grids")


register(NAME, supports=supports, lower=lower, inplace={1: "key_cache", 2: "value_cache"})
