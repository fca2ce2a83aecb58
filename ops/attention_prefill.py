"""Attention of many query rows: see wgsl/attention_prefill.wgsl."""

from __future__ import annotations

from collections.abc import Mapping

from ..backend.graph import Arg, Ref
from .attention_common import TILE, Problem, bindings_of, consts_of, dispatch_of, loads_of, types_of
from .base import Dispatch, Limits, Lowering, Param

PREFILL_COLUMNS = 128
"""Value columns of one prefill workgroup; wider heads take several."""


def prefill_memory(rows: int) -> int:
    """Bytes of workgroup memory of attention_prefill.wgsl at `rows` query rows a workgroup."""
    return 16 * 9 * (rows + TILE) + 16 * (TILE + 8) * (rows // 4)


def choose_prefill_rows(rows: int, limits: Limits) -> int:
    """Query rows of a prefill workgroup: 64 where there are as many and the device has the memory for it, else 32."""
    roomy = prefill_memory(64) <= limits.max_workgroup_memory and limits.max_invocations >= 128
    return 64 if roomy and rows > 32 else 32


def prefill(ctx: Lowering, args: Mapping[str, Arg], problem: Problem, out: Ref, every: Mapping[str, Param]) -> Dispatch:
    rows = choose_prefill_rows(problem.rows, ctx.limits)
    tiles, passes = -(-problem.rows // rows), -(-problem.dv // PREFILL_COLUMNS)
    total = problem.batch * problem.heads * tiles * passes
    bindings = {**bindings_of(ctx, args, "query", "key", "value", "mask", "sink"), "out": out.value}
    consts = {**consts_of(ctx, args, problem), "QROWS": rows, "PASSES": passes}
    types = types_of(ctx, args, problem, out)
    own = {"total": total, "tiles": tiles}
    parts = ("rules", "scores", *loads_of(args))
    return dispatch_of(ctx, "attention_prefill", bindings, every, own, total, consts, types, parts)
