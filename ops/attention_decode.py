"""Attention of few query rows over many keys, or of short prompts: wgsl/attention_stream.wgsl (devices with subgroups),
wgsl/attention_decode.wgsl (any device and head size), and wgsl/attention_merge.wgsl, which follows both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from ..backend.graph import Arg, Ref
from .attention_common import (
    TILE,
    Problem,
    bindings_of,
    consts_of,
    dispatch_of,
    loads_of,
    number,
    power_of_two_up_to,
    types_of,
    vec4s,
)
from .base import Dispatch, Grid, Limits, Lowering, Param
from .packed_cache import bits_of

DECODE_ROWS = 8
"""Query rows (sequence positions) up to which the decode route is taken."""
MAX_SPLITS = 64
"""Splits of the keys at most: the lanes of the merge, each of which takes one."""
TARGET_WORKGROUPS = 2048
"""Workgroups of the decode kernel beyond which keys are not split further."""
MAX_SCRATCH = 32 << 20
"""Bytes of partial results beyond which the keys are split less, or the prefill route is taken."""
STREAM_LANES = 256
"""Lanes of a workgroup of the stream kernel."""
SHORT_PROMPT = 3 << 16
"""Tiles of four rows times rows of the cache up to which more than DECODE_ROWS rows take the stream kernel as well: it
has many workgroups that wait for few loads, the flash kernel few, which walk over keys and head size in steps."""
FEW_ROWS = 64
"""Query rows times heads of a group up to which they take it whatever the cache holds: there the flash kernel has a few
tiles a KV head, which is slower while the cache is short, and no faster when it is full (docs/KERNELS.md)."""
KEYS_OF_A_SPLIT = 128
"""Keys below which a split of such a prompt is not worth its partial result."""
STREAM_WORKGROUPS = 256
"""Workgroups of the stream kernel that splitting the keys aims at: what a large GPU runs at once (docs/KERNELS.md)."""
_STREAM_PARTS = {"lanes": 1, "splits": 1, "tiles": 1, "over": 0, "prefetch": 0}
"""What a variant of the stream route may ask for, and the least number of each."""
_ROWS_PARTS = {1: "rows_1", 2: "rows_2", 4: "rows_4"}
_OWN_PARTS = {(2, 2): "own_1_of_2", (4, 2): "own_2_of_4", (4, 4): "own_1_of_4"}
"""Rows that a lane of the stream kernel holds, and lanes that divide them among them -> the part; else own_rows."""
_CELLS = {
    "f16": ("vec4<u32>", ("cells_f16",)),
    "f32": ("vec4<f32>", ("cells_f32",)),
    "i8": ("vec2<u32>", ("scales", "cells_i8")),
    "i8_zeros": ("vec2<u32>", ("scales_zeros", "cells_i8_zeros")),
    "i4": ("u32", ("scales", "cells_i4")),
}
"""How the caches hold numbers -> what the stream kernel loads at once, and the parts that do so."""
STREAM_BUFFERS = 10
"""Storage buffers of the stream kernel where caches have scales."""
DECODE_COLUMNS = 64
"""vec4 value columns of one decode workgroup; wider heads take several."""
SPLIT_WORD, MERGE_WORD, SIZES_WORDS = 0, 4, 8
"""The argument `sizes`: where the grids of the stream kernel and of its merge begin (x, y, z each), and its length."""


@dataclass(frozen=True)
class DecodeChoice:
    """How the decode route divides its work: rows a workgroup, tiles of rows, passes over value columns, key splits."""

    rows: int
    row_tiles: int
    passes: int
    splits: int
    scratch_bytes: int


def decode_memory(rows: int, d: int) -> int:
    """Bytes of workgroup memory of attention_decode.wgsl at `rows` rows a workgroup."""
    return rows * (16 * vec4s(d) + 1024 + 256 + 4)


def choose_decode(problem: Problem, limits: Limits) -> DecodeChoice | None:
    """The division of the decode route, or None where its queries or partial results would not fit."""
    count = problem.group * problem.rows
    rows = min(8, 1 << (count - 1).bit_length())
    while rows and decode_memory(rows, problem.d) > limits.max_workgroup_memory:
        rows //= 2
    if not rows:
        return None
    row_tiles = -(-count // rows)
    passes = -(-vec4s(problem.dv) // DECODE_COLUMNS)
    per_split = problem.results * (4 * vec4s(problem.dv) + 2) * 4
    groups = problem.batch * problem.kv_heads * row_tiles * passes
    room = min(MAX_SCRATCH, limits.max_binding) // per_split
    if not room:
        return None
    splits = max(1, min(MAX_SPLITS, -(-problem.capacity // TILE), TARGET_WORKGROUPS // groups, room))
    return DecodeChoice(rows, row_tiles, passes, splits, splits * per_split)


def decode(
    ctx: Lowering, args: Mapping[str, Arg], problem: Problem, out: Ref, every: Mapping[str, Param], choice: DecodeChoice
) -> Iterator[Dispatch]:
    """The route of any device."""
    partial, ml = _scratch(ctx, problem, choice.splits)
    width = min(vec4s(problem.dv), DECODE_COLUMNS)
    types = types_of(ctx, args, problem, out)
    total = problem.batch * problem.kv_heads * choice.row_tiles * choice.passes * choice.splits
    own: dict[str, Param] = {"total": total, "row_tiles": choice.row_tiles}
    consts = {**consts_of(ctx, args, problem), "ROWS": choice.rows, "PASSES": choice.passes, "COLUMNS": width}
    consts |= {"SUBS": power_of_two_up_to(min(8, 64 // width)), "SPLITS": choice.splits, "SPLIT_TILE": TILE}
    bindings = {**bindings_of(ctx, args, "query", "key", "value", "mask"), "partial": partial, "ml": ml}
    kinds = {k: v for k, v in types.items() if k not in ("Out", "Sink")}
    parts = ("rules", "splits", "scores", *loads_of(args))
    yield dispatch_of(ctx, "attention_decode", bindings, every, own, ctx.fold_grid(total), consts, kinds, parts)
    yield _merge(ctx, args, problem, out, every, Partials(partial, ml, choice.splits, TILE, alone=False))


@dataclass(frozen=True)
class Partials:
    """Partial results for the merge: value indices, most splits, keys that a split is a multiple of, and whether the
    kernel wrote the result itself where only one split had keys."""

    partial: int
    ml: int
    splits: int
    split_tile: int
    alone: bool


def _scratch(ctx: Lowering, problem: Problem, splits: int) -> tuple[int, int]:
    partial = ctx.scratch("f32", problem.results * splits * vec4s(problem.dv) * 4)
    return partial, ctx.scratch("f32", problem.results * splits * 2)


def _merge(
    ctx: Lowering, args: Mapping[str, Arg], problem: Problem, out: Ref, every: Mapping[str, Param], from_: Partials
) -> Dispatch:
    width = min(vec4s(problem.dv), DECODE_COLUMNS)
    types = types_of(ctx, args, problem, out)
    own: dict[str, Param] = {"total": problem.results}
    grid = (problem.heads, problem.rows, problem.batch)
    folded = max(grid) > ctx.limits.max_workgroups
    consts: dict[str, int | float | bool] = {
        "DV": problem.dv,
        "COLUMNS": width,
        "SUBS": power_of_two_up_to(min(16, ctx.limits.max_invocations // width, from_.splits)),
        "ALONE": from_.alone,
        "FOLDED": folded,
        "SPLITS": from_.splits,
        "SPLIT_TILE": from_.split_tile,
    }
    bindings = {**bindings_of(ctx, args, "sink"), "partial": from_.partial, "ml": from_.ml, "out": out.value}
    kinds = {k: types[k] for k in ("Out", "Sink")}
    grid = ctx.fold_grid(problem.results) if folded else grid
    return dispatch_of(ctx, "attention_merge", bindings, every, own, grid, consts, kinds, ("rules", "splits"))


def _join(
    ctx: Lowering, args: Mapping[str, Arg], problem: Problem, out: Ref, every: Mapping[str, Param], from_: Partials
) -> Dispatch:
    types = types_of(ctx, args, problem, out)
    consts = {"DV": problem.dv, "SPLITS": from_.splits, "SPLIT_TILE": from_.split_tile}
    bindings = {**bindings_of(ctx, args, "sink"), "partial": from_.partial, "ml": from_.ml, "out": out.value}
    kinds = {"Out": f"vec4<{types['Out']}>", "Sink": types["Sink"]}
    grid = (problem.heads * join_blocks(problem), problem.rows, problem.batch)
    parts = ("rules", "splits")
    return dispatch_of(ctx, "attention_join", bindings, every, {}, grid, consts, kinds, parts)


# -- devices with subgroups


@dataclass(frozen=True)
class StreamChoice:
    """How attention_stream.wgsl divides its work.

    Attributes:
        lanes: of a workgroup.
        shares: lanes that share a cache row, 8 columns each.
        rows: query rows (heads of the group times positions) that a lane holds: 1, 2 or 4.
        over: lanes that divide these rows among them when scores are summed (see `lanes_over`), at most; 0: as many as
            gain.
        tiles: tiles of so many rows in a workgroup.
        row_tiles: workgroups over the rows of a KV head.
        splits: of the keys, at most.
        prefetch: ask for the next round's keys before this round's scores.
        joins: attention_join.wgsl follows, which needs subgroups of 32, not attention_merge.wgsl.
    """

    lanes: int
    shares: int
    rows: int
    over: int
    tiles: int
    row_tiles: int
    splits: int
    prefetch: bool
    joins: bool

    @property
    def step(self) -> int:
        """Keys of one round."""
        return self.lanes // self.shares // self.tiles * 4

    @property
    def split_tile(self) -> int:
        """Keys that a split is a multiple of."""
        return max(TILE, min(self.step, 64))


def suits_stream(problem: Problem) -> bool:
    """Whether more than DECODE_ROWS rows take the stream kernel, where the device has subgroups."""
    count = problem.group * problem.rows
    tiles = problem.batch * problem.kv_heads * -(-count // 4)
    return count <= FEW_ROWS or tiles * problem.capacity <= SHORT_PROMPT


def stream_variant(variant: str) -> dict[str, int]:
    """What a variant of `choose_stream` asks for. Raises ValueError for another text."""
    asked: dict[str, int] = {}
    for part in () if variant == "auto" else variant.split(";"):
        name, _, number = part.partition("=")
        value = int(number) if number.isdecimal() else -1
        good = value >= _STREAM_PARTS.get(name, value + 1)
        if not good or (name in ("lanes", "tiles") and value.bit_count() != 1):
            raise ValueError(
                f"variant is {variant!r}; of the stream route it is 'auto' or like 'lanes=64;splits=32;tiles=1', with "
                "powers of two for lanes and tiles"
            )
        asked[name] = value
    return asked


def choose_stream(problem: Problem, limits: Limits, cell: int, variant: str = "auto") -> StreamChoice | None:
    """The division for devices with subgroups, or None where the kernel does not apply.

    Args:
        cell: what `cell_columns` gives; 0: the kernel cannot read the caches.
        variant: "auto", or for measurements `lanes=64;splits=32;tiles=1;over=1;prefetch=0`, each part optional.
    """
    if not cell or problem.d % cell or problem.dv % cell:
        return None
    shares = max(4, 1 << (-(-max(problem.d, problem.dv) // 8) - 1).bit_length())
    if shares > limits.subgroup_size:
        return None
    asked = stream_variant(variant)
    count = problem.group * problem.rows
    rows = min(4, 1 << (count - 1).bit_length())
    tiles = asked.get("tiles", 1)  # more never gained: tiles that read the same keys run side by side
    row_tiles = -(-count // (rows * tiles))
    per_split = problem.results * (problem.dv + 2) * 4
    groups = problem.batch * problem.kv_heads * row_tiles
    room = min(MAX_SCRATCH, limits.max_binding) // per_split
    if not room:
        return None
    lanes = asked.get("lanes", STREAM_LANES if problem.rows == 1 else STREAM_LANES // 2)  # ranges of rows cost time
    wanted = asked.get("splits", max(1, STREAM_WORKGROUPS * STREAM_LANES // lanes // groups))
    if problem.rows > DECODE_ROWS:
        wanted = asked.get("splits", min(wanted, max(1, problem.capacity // KEYS_OF_A_SPLIT)))
    splits = max(1, min(MAX_SPLITS, -(-problem.capacity // TILE), wanted, room))
    # No more than one round of keys: the wait for them counts, so half as many lanes ask early for those of two rounds.
    few = problem.rows == 1 and rows > 1 and problem.capacity <= splits * (STREAM_LANES // shares // tiles * 4)
    prefetch = bool(asked.get("prefetch", few))
    if prefetch and "lanes" not in asked:
        lanes = min(lanes, STREAM_LANES // 2)
    while lanes > shares * tiles and not _stream_fits(lanes, shares, rows, tiles, limits):
        lanes //= 2
    if lanes < shares * tiles or not _stream_fits(lanes, shares, rows, tiles, limits):
        return None
    if problem.kv_heads * row_tiles > limits.max_workgroups or problem.batch > limits.max_workgroups:
        return None
    return StreamChoice(
        lanes,
        shares,
        rows,
        asked.get("over", 0),
        tiles,
        row_tiles,
        splits,
        prefetch,
        limits.subgroup_size >= 32 and problem.heads * join_blocks(problem) <= limits.max_workgroups,
    )


def lanes_over(choice: StreamChoice, plain: bool) -> int:
    """Lanes that divide the rows of a tile among them, so that each ends with the scores of fewer rows: 1, 2 or 4.

    Rows that see different keys, masks and caps cost much for each score that a lane has, so as many as there are.
    Elsewhere two gain, four cost more exchanges of weights than they save exponentials; and where keys are asked for
    ahead, the kernel waits, and any exchange more is too many (docs/KERNELS.md).

    Args:
        plain: one query row sees all keys of its split, and only the scale is applied to scores.
    """
    return min(choice.over or (4 if not plain else 1 if choice.prefetch else 2), choice.rows, choice.shares // 4)


def stream_memory(lanes: int, shares: int, rows: int, tiles: int, subgroup: int) -> int:
    """Bytes of workgroup memory of attention_stream.wgsl."""
    blocks = lanes // max(min(subgroup, lanes), shares * tiles)
    return blocks * tiles * rows * (2 * shares * 16 + 8)


def _stream_fits(lanes: int, shares: int, rows: int, tiles: int, limits: Limits) -> bool:
    needed = stream_memory(lanes, shares, rows, tiles, limits.subgroup_size)
    return lanes <= limits.max_invocations and needed <= limits.max_workgroup_memory


def stream(
    ctx: Lowering, args: Mapping[str, Arg], problem: Problem, out: Ref, every: Mapping[str, Param], choice: StreamChoice
) -> Iterator[Dispatch]:
    """The route of devices with subgroups."""
    types = types_of(ctx, args, problem, out)
    packed = f"i{bits_of(args)}{'_zeros' if args.get('zeros') else ''}"
    cell, cells = _CELLS[packed if bits_of(args) else ctx.wgsl_type(args["key"])]
    kinds = {name: types[name] for name in ("Mask", "Sink")}
    kinds |= {"Q": f"vec4<{types['Q']}>", "Out": f"vec4<{types['Out']}>", "Cell": cell}
    tile = choice.split_tile
    common = consts_of(ctx, args, problem)
    consts = {
        **{name: common[name] for name in ("D", "DV", "MASK")},
        "PREFETCH": choice.prefetch,
        "SPLITS": choice.splits,
        "SPLIT_TILE": tile,
        "GROUP": problem.group,
        "ROW_TILES": choice.row_tiles,
        "HEAD_TILES": problem.kv_heads * choice.row_tiles,
        "L": choice.shares,
        "LANES": choice.lanes,
        "ROWS": choice.rows,
        "TILES": choice.tiles,
        "SUBGROUP": ctx.limits.subgroup_size,
    }
    merges = choice.splits > 1
    partial, ml = _scratch(ctx, problem, choice.splits if merges else 1)
    bindings = {**bindings_of(ctx, args, "query", "key", "value", "mask", "sink"), "partial": partial, "ml": ml}
    bindings["out"] = out.value
    plain = args.get("attn_mask") is None and problem.rows == 1 and not number(args["softcap"])
    ragged = args.get("lengths") is not None
    own = _OWN_PARTS.get((choice.rows, lanes_over(choice, plain)), "own_rows")
    kind = ("stream_plain" if plain else "stream_judged", "stream_ragged" if ragged else "stream_whole")
    parts = ("rules", "splits", "scores", _ROWS_PARTS[choice.rows], own, *cells, *kind)
    sizes = args.get("sizes") if live_stream(ctx, args, problem) == choice else None
    grid, _ = grids(problem, choice)
    yield _sized(
        ctx, dispatch_of(ctx, "attention_stream", bindings, every, {}, grid, consts, kinds, parts), sizes, SPLIT_WORD
    )
    if merges:
        partials = Partials(partial, ml, choice.splits, tile, alone=True)
        merges_by = _join if choice.joins else _merge
        merge = merges_by(ctx, args, problem, out, every, partials)
        yield _sized(ctx, merge, sizes, MERGE_WORD)


def grids(problem: Problem, choice: StreamChoice) -> tuple[Grid, Grid]:
    """The grids of the stream kernel, where every split has keys, and of its merge, where it is not folded."""
    split = (choice.splits, problem.kv_heads * choice.row_tiles, problem.batch)
    return split, (problem.heads * (join_blocks(problem) if choice.joins else 1), problem.rows, problem.batch)


def join_blocks(problem: Problem) -> int:
    """Workgroups of attention_join.wgsl for a row: 16 vec4 columns each."""
    return -(-problem.dv // 64)


def live_stream(ctx: Lowering, args: Mapping[str, Arg], problem: Problem) -> StreamChoice | None:
    """The division of an attention whose grids follow the live length, in a tensor `sizes` that an operator before it
    writes; None where its grids are fixed.

    The operator that writes `sizes` and the attention that reads it both ask here. Fixed are the grids of other routes,
    of a device on which indirect dispatches are no gain or whose limits leave no room for the ninth storage buffer of
    the kernel that writes, and of an attention without splits.

    Args:
        args: `key` and `value`, the caches as attention reads them; `route` if it is not chosen by sizes.
    """
    limits = ctx.limits
    if not limits.cheap_indirect or limits.max_storage_buffers <= 8 or args.get("route", "auto") != "auto":
        return None
    if problem.rows > DECODE_ROWS or problem.results * problem.dv == 0:
        return None
    choice = choose_stream(problem, limits, cell_columns(ctx, args))
    if choice is None or choice.splits == 1 or max(grids(problem, choice)[1]) > limits.max_workgroups:
        return None
    return choice


def _sized(ctx: Lowering, dispatch: Dispatch, sizes: Arg, word: int) -> Dispatch:
    """The dispatch with its grid in `sizes` from `word` on, if given."""
    return dispatch if sizes is None else replace(dispatch, indirect=ctx.id(sizes), indirect_word=word)


def cell_columns(ctx: Lowering, args: Mapping[str, Arg]) -> int:
    """Columns of what attention_stream.wgsl loads at once: 16 bytes of a cache of floats, eight packed integers.

    0: the caches are stored in different types, or the device has too few bindings for their scales.
    """
    if bits_of(args):
        return 8 if ctx.limits.max_storage_buffers >= STREAM_BUFFERS else 0
    kinds = {ctx.wgsl_type(args["key"]), ctx.wgsl_type(args["value"])}
    return {frozenset({"f16"}): 8, frozenset({"f32"}): 4}.get(frozenset(kinds), 0)
