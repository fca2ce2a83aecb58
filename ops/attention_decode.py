"""Attention of few query rows over many keys: wgsl/attention_stream.wgsl (devices with subgroups),
wgsl/attention_decode.wgsl (any device and head size), and wgsl/attention_merge.wgsl, which follows both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..backend.graph import Arg, Ref
from .attention_common import (
    TILE,
    Problem,
    bindings_of,
    consts_of,
    dispatch_of,
    number,
    power_of_two_up_to,
    types_of,
    vec4s,
)
from .base import Dispatch, Limits, Lowering, Param

DECODE_ROWS = 8
"""Query rows (sequence positions) up to which the decode route is taken."""
MAX_SPLITS = 64
"""Splits of the keys at most: the lanes of the merge, each of which takes one."""
TARGET_WORKGROUPS = 2048
"""Workgroups of the decode kernel beyond which keys are not split further."""
MAX_SCRATCH = 32 << 20
"""Bytes of partial results beyond which the keys are split less, or the prefill route is taken."""
STREAM_LANES = 128
"""Lanes of a workgroup of the stream kernel: its workgroup memory then fits WebGPU's default limit."""
STREAM_TILES = 4
"""Tiles of rows of one workgroup of the stream kernel at most."""
STREAM_WORKGROUPS = 512
"""Workgroups of the stream kernel that splitting the keys aims at."""
DECODE_COLUMNS = 64
"""vec4 value columns of one decode workgroup; wider heads take several."""


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
    own: dict[str, Param] = {
        "total": total, "splits": choice.splits, "split_tile": TILE, "row_tiles": choice.row_tiles
    }  # fmt: skip
    consts = {**consts_of(ctx, args, problem), "ROWS": choice.rows, "PASSES": choice.passes, "COLUMNS": width}
    consts["SUBS"] = power_of_two_up_to(min(8, 64 // width))
    bindings = {**bindings_of(ctx, args, "query", "key", "value", "mask"), "partial": partial, "ml": ml}
    kinds = {k: v for k, v in types.items() if k not in ("Out", "Sink")}
    parts = ("rules", "splits", "scores")
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
    own: dict[str, Param] = {"total": problem.results, "splits": from_.splits, "split_tile": from_.split_tile}
    grid = (problem.heads, problem.rows, problem.batch)
    folded = max(grid) > ctx.limits.max_workgroups
    consts: dict[str, int | float | bool] = {
        "DV": problem.dv,
        "COLUMNS": width,
        "SUBS": power_of_two_up_to(min(16, ctx.limits.max_invocations // width, from_.splits)),
        "ALONE": from_.alone,
        "FOLDED": folded,
    }
    bindings = {**bindings_of(ctx, args, "sink"), "partial": from_.partial, "ml": from_.ml, "out": out.value}
    kinds = {k: types[k] for k in ("Out", "Sink")}
    grid = ctx.fold_grid(problem.results) if folded else grid
    return dispatch_of(ctx, "attention_merge", bindings, every, own, grid, consts, kinds, ("rules", "splits"))


# -- devices with subgroups


@dataclass(frozen=True)
class StreamChoice:
    """How attention_stream.wgsl divides its work.

    Attributes:
        lanes: of a workgroup.
        shares: lanes that share a cache row, 8 columns each.
        rows: query rows (heads of the group times positions) that a lane holds: 1, 2 or 4.
        tiles: tiles of so many rows in a workgroup.
        row_tiles: workgroups over the rows of a KV head.
        splits: of the keys, at most.
        prefetch: ask for the next round's keys before this round's scores.
    """

    lanes: int
    shares: int
    rows: int
    tiles: int
    row_tiles: int
    splits: int
    prefetch: bool

    @property
    def step(self) -> int:
        """Keys of one round."""
        return self.lanes // self.shares // self.tiles * 4


def choose_stream(problem: Problem, limits: Limits, cell: int, variant: str = "auto") -> StreamChoice | None:
    """The division for devices with subgroups, or None where the kernel does not apply.

    Args:
        cell: columns of 16 bytes of the caches (8 for f16, 4 for f32); 0: they are stored otherwise.
        variant: "auto", or for measurements `lanes=64;splits=32;tiles=1`, each part optional.
    """
    if not cell or problem.d % cell or problem.dv % cell:
        return None
    shares = max(4, 1 << (-(-max(problem.d, problem.dv) // 8) - 1).bit_length())
    if shares > limits.subgroup_size:
        return None
    asked = {} if variant == "auto" else {k: int(v) for k, v in (part.split("=") for part in variant.split(";"))}
    count = problem.group * problem.rows
    rows = min(4, 1 << (count - 1).bit_length())
    lanes = asked.get("lanes", min(STREAM_LANES, limits.max_invocations))
    tiles = asked.get("tiles", min(STREAM_TILES, 1 << (-(-count // rows) - 1).bit_length(), lanes // shares))
    row_tiles = -(-count // (rows * tiles))
    per_split = problem.results * (problem.dv + 2) * 4
    groups = problem.batch * problem.kv_heads * row_tiles
    room = min(MAX_SCRATCH, limits.max_binding) // per_split
    if not room:
        return None
    wanted = asked.get("splits", max(1, STREAM_WORKGROUPS // groups))
    splits = max(1, min(MAX_SPLITS, -(-problem.capacity // TILE), wanted, room))
    if problem.kv_heads * row_tiles > limits.max_workgroups or problem.batch > limits.max_workgroups:
        return None
    return StreamChoice(lanes, shares, rows, tiles, row_tiles, splits, bool(asked.get("prefetch", 0)))


def stream(
    ctx: Lowering, args: Mapping[str, Arg], problem: Problem, out: Ref, every: Mapping[str, Param], choice: StreamChoice
) -> Iterator[Dispatch]:
    """The route of devices with subgroups."""
    types = types_of(ctx, args, problem, out)
    half = ctx.wgsl_type(args["key"]) == "f16"
    kinds = {name: types[name] for name in ("Mask", "Sink")}
    kinds |= {"Q": f"vec4<{types['Q']}>", "Out": f"vec4<{types['Out']}>", "Cell": "vec4<u32>" if half else "vec4<f32>"}
    tile = max(TILE, min(choice.step, 64))
    own: dict[str, Param] = {"splits": choice.splits, "split_tile": tile}
    common = consts_of(ctx, args, problem)
    consts = {
        **{name: common[name] for name in ("D", "DV", "MASK")},
        "PLAIN": args.get("attn_mask") is None and problem.rows == 1 and not number(args["softcap"]),
        "PREFETCH": choice.prefetch,
        "GROUP": problem.group,
        "ROW_TILES": choice.row_tiles,
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
    parts = ("rules", "splits", "scores_only", f"rows_{choice.rows}", "cells_f16" if half else "cells_f32")
    grid = (choice.splits, problem.kv_heads * choice.row_tiles, problem.batch)
    yield dispatch_of(ctx, "attention_stream", bindings, every, own, grid, consts, kinds, parts)
    if merges:
        yield _merge(ctx, args, problem, out, every, Partials(partial, ml, choice.splits, tile, alone=True))


def cell_columns(ctx: Lowering, args: Mapping[str, Arg]) -> int:
    """Columns of 16 bytes of both caches, 0 if they are stored in different types."""
    kinds = {ctx.wgsl_type(args["key"]), ctx.wgsl_type(args["value"])}
    return {frozenset({"f16"}): 8, frozenset({"f32"}): 4}.get(frozenset(kinds), 0)
