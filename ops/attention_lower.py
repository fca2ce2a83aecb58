"""The kernels of attention: which one runs, and its numbers. `attention.py` has the operators.

Routes:
    stream: few query rows, or a short prompt, on devices with subgroups. The keys are split among workgroups, each
        serving four rows of one KV head, then merged.
    decode: few query rows, any device. As stream, in workgroup memory.
    flash: many query rows, in register tiles. One workgroup a tile of rows of one KV head walks over the keys it needs.
    prefill: as flash with little workgroup memory, for any head size. One workgroup a tile of rows of one head.
    naive: the oracle of the tests, on request only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..backend.graph import Arg, Ref
from .attention_common import (
    LIMITS_OF_KEYS,
    Problem,
    as_bhsd,
    bindings_of,
    consts_of,
    dispatch_of,
    loads_of,
    require_sizes,
    shared_params,
    tensor_shape,
    types_of,
)
from .attention_decode import DECODE_ROWS, cell_columns, choose_decode, choose_stream, decode, stream, suits_stream
from .attention_flash import choose_flash, flash
from .attention_prefill import prefill
from .base import Dispatch, Lowering, Param
from .lengths import batch_fits
from .packed_cache import bits_of

__all__ = ["LIMITS_OF_KEYS", "ROUTES", "attend"]

ROUTES = ("auto", "stream", "decode", "flash", "prefill", "naive")


def attend(ctx: Lowering, args: Mapping[str, Arg], out: Ref) -> Iterator[Dispatch]:
    """Dispatches of one attention. `args` are those of `webgpu.attention`; see `attention.py`."""
    q_shape = as_bhsd(ctx.shape(args["query"]), str(args["q_layout"]))
    k_shape = as_bhsd(tensor_shape(ctx, args, "key"), str(args["kv_layout"]))
    v_shape = as_bhsd(tensor_shape(ctx, args, "value"), str(args["kv_layout"]))
    problem = Problem(q_shape[0], q_shape[1], k_shape[1], q_shape[2], k_shape[2], q_shape[3], v_shape[3])
    require_sizes(ctx, args, problem, k_shape, v_shape)
    if problem.results * problem.dv == 0 or not batch_fits(ctx, args.get("lengths"), problem.batch):
        return
    common = shared_params(ctx, args, problem, out)
    route = str(args.get("route", "auto"))
    few = problem.rows <= DECODE_ROWS
    if route == "stream" or (route == "auto" and (few or (suits_stream(problem) and not bits_of(args)))):
        variant = str(args.get("variant", "auto")) if route == "stream" else "auto"
        streamed = choose_stream(problem, ctx.limits, cell_columns(ctx, args), variant)
        if streamed is not None:
            yield from stream(ctx, args, problem, out, common, streamed)
            return
    choice = None
    if route == "decode" or (route == "auto" and problem.rows <= DECODE_ROWS):
        choice = choose_decode(problem, ctx.limits)
    tiled = None
    if route == "flash" or (route == "auto" and not few):
        tiled = choose_flash(problem, ctx.limits, str(args.get("variant", "auto")) if route == "flash" else "auto")
    if route == "naive":
        yield naive(ctx, args, problem, out, common)
    elif choice is not None:
        yield from decode(ctx, args, problem, out, common, choice)
    elif tiled is not None:
        yield from flash(ctx, args, problem, out, common, tiled)
    else:
        yield prefill(ctx, args, problem, out, common)


def naive(ctx: Lowering, args: Mapping[str, Arg], problem: Problem, out: Ref, every: Mapping[str, Param]) -> Dispatch:
    total = problem.results * problem.dv
    bindings = {**bindings_of(ctx, args, "query", "key", "value", "mask", "sink"), "out": out.value}
    consts, types = consts_of(ctx, args, problem), types_of(ctx, args, problem, out)
    own = {"total": total}
    parts = ("rules", "scores", *loads_of(args))
    return dispatch_of(ctx, "attention_naive", bindings, every, own, -(-total // 64), consts, types, parts)
