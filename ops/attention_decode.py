"""Attention of few query rows over many keys: see wgsl/attention_decode.wgsl and wgsl/attention_merge.wgsl."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..backend.graph import Arg, Ref
from .attention_common import TILE, Problem, bindings_of, consts_of, dispatch_of, power_of_two_up_to, types_of, vec4s
from .base import Dispatch, Limits, Lowering, Param

DECODE_ROWS = 8
"""Query rows (sequence positions) up to which the decode route is taken."""
MAX_SPLITS = 64
"""Splits of the keys at most: the lanes of the merge, each of which takes one."""
TARGET_WORKGROUPS = 2048
"""Workgroups of the decode kernel beyond which keys are not split further."""
MAX_SCRATCH = 32 << 20
"""Bytes of partial results beyond which the keys are split less, or the prefill route is taken."""
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
    columns = vec4s(problem.dv)
    partial = ctx.scratch("f32", problem.results * choice.splits * columns * 4)
    ml = ctx.scratch("f32", problem.results * choice.splits * 2)
    width = min(columns, DECODE_COLUMNS)
    common, types = consts_of(ctx, args, problem), types_of(ctx, args, problem, out)
    total = problem.batch * problem.kv_heads * choice.row_tiles * choice.passes * choice.splits
    own: dict[str, Param] = {"total": total, "splits": choice.splits, "row_tiles": choice.row_tiles}
    consts = {**common, "ROWS": choice.rows, "PASSES": choice.passes, "COLUMNS": width}
    consts["SUBS"] = power_of_two_up_to(min(8, 64 // width))
    bindings = {**bindings_of(ctx, args, "query", "key", "value", "mask"), "partial": partial, "ml": ml}
    kinds = {k: v for k, v in types.items() if k not in ("Out", "Sink")}
    parts = ("rules", "splits", "scores")
    yield dispatch_of(ctx, "attention_decode", bindings, every, own, total, consts, kinds, parts)

    own = {"total": problem.results, "splits": choice.splits}
    consts = {"DV": problem.dv, "COLUMNS": width, "SUBS": power_of_two_up_to(64 // width)}
    bindings = {**bindings_of(ctx, args, "sink"), "partial": partial, "ml": ml, "out": out.value}
    kinds = {k: types[k] for k in ("Out", "Sink")}
    yield dispatch_of(ctx, "attention_merge", bindings, every, own, problem.results, consts, kinds, ("rules", "splits"))
