"""`webgpu.rope`: rotary position embedding from a table of cosines and sines.

Arguments:
    input: [B, S, H, D] with `layout` "bshd", [B, H, S, D] with "bhsd".
    cos, sin: [R, W], with any axes of size 1 between or before (such as [1, R, 1, W]); position s takes row start + s.
    start: the table row of the first position, live; 0 (or left out) for a table that is already sliced.
    lengths: None, or i32[B, 4] of `webgpu.lengths`: (past, new, 0, 0) of each batch row. Position s of a row takes
        table row past + s, start is ignored, and positions s >= new are padding, whose result is zero.
    rot: how many elements of D turn, the rest is copied; D where left out.
    interleaved: pairs (2i, 2i + 1), with W = rot / 2; else pairs (i, i + rot / 2), with W = rot / 2 or rot.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from ..backend.graph import Arg, Dim, Graph, Node, Sym, make_dim
from .base import Dispatch, Lowering, register
from .lengths import batch_fits, lengths_consts, lengths_reason, require_totals

FLOATS = ("f32", "f16", "bf16")
LAYOUTS = {"bshd": (1, 2), "bhsd": (2, 1)}
"""Layout -> (axis of positions, axis of heads)."""


def _dim(arg: Arg) -> Dim:
    if isinstance(arg, bool) or not isinstance(arg, int | Sym):
        raise TypeError(f"expected a size, got {arg!r}")
    return arg


def _table_reason(graph: Graph, node: Node, name: str, rot: int) -> str | None:
    table = graph.value(node.args[name])
    shape = table.shape
    if table.dtype not in FLOATS:
        return f"{name} has dtype {table.dtype}; float32, float16 and bfloat16 are supported"
    if len(shape) < 2:
        return f"{name} {list(shape)} is no table of rows"
    if sum(1 for size in shape[:-1] if size != 1) > 1:
        return f"{name} {list(shape)} differs between batch rows or heads; one row per position is supported"
    widths = (rot // 2,) if node.args["interleaved"] else (rot // 2, rot)
    if shape[-1] not in widths:
        return f"{name} has {shape[-1]} columns, expected {' or '.join(map(str, widths))} for {rot} rotary elements"
    return None


def supports(graph: Graph, node: Node) -> str | None:
    """Four axes, a known layout, an even number of rotary elements and tables of one row per position."""
    args = node.args
    x, out = graph.value(args["input"]), graph.values[node.outputs[0]]
    if len(x.shape) != 4 or args["layout"] not in LAYOUTS:
        return f"input {list(x.shape)} with layout {args['layout']!r}; rank 4 and {sorted(LAYOUTS)} are supported"
    if not isinstance(args["interleaved"], bool):
        return "interleaved is not a literal bool"
    for value in (x, out):
        if value.dtype not in FLOATS:
            return f"{value.name} has dtype {value.dtype}; float32, float16 and bfloat16 are supported"
    size, rot = x.shape[-1], args.get("rot") or x.shape[-1]
    if not isinstance(size, int) or isinstance(rot, bool) or not isinstance(rot, int):
        return "the head size and the number of rotary elements must be known at export"
    if rot % 2 or not 0 < rot <= size:
        return f"{rot} rotary elements of {size}; an even number up to the head size is supported"
    start = args.get("start", 0)
    if isinstance(start, bool) or not isinstance(start, int | Sym):
        return "start is not an integer"
    for name in ("cos", "sin"):
        reason = _table_reason(graph, node, name, rot)
        if reason is not None:
            return reason
    reason = lengths_reason(graph, args.get("lengths"), x.shape[0])
    if reason is not None:
        return reason
    if graph.value(args["cos"]).shape != graph.value(args["sin"]).shape:
        return "cos and sin differ in shape"
    return None


def require_rows(ctx: Lowering, node: Node, start: Dim, positions: int, rows: int) -> None:
    """Host checks that the positions of a step have a row in the rotary table of `rows` rows."""
    lengths = node.args.get("lengths")
    if lengths is not None:
        require_totals(ctx, lengths, rows, f"the rotary table ({rows} rows)")
        return
    of = f"of the rotary table ({rows} rows)"
    ctx.require(start, 0, max(rows - 1, 0), f"{node.name}: first row {of}")
    ctx.require(make_dim("add", start, positions), 1, rows, f"{node.name}: end of the rows read {of}")


def lower(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
    """See the module's docstring."""
    args = node.args
    x, cos, sin, out = args["input"], args["cos"], args["sin"], ctx.out(node)
    shape = ctx.shape(x)
    position_axis, head_axis = LAYOUTS[str(args["layout"])]
    positions, heads, size = shape[position_axis], shape[head_axis], shape[-1]
    lengths = args.get("lengths")
    if ctx.numel(x) == 0 or not batch_fits(ctx, lengths, shape[0]):
        return
    rot = args.get("rot") or size
    if not isinstance(rot, int):
        raise TypeError(f"expected a number of elements, got {rot!r}")
    table = ctx.shape(cos)
    rows = prod(table[:-1])
    start = _dim(args.get("start", 0)) if lengths is None else 0
    require_rows(ctx, node, start, positions, rows)
    count = prod(shape[:-1]) * (size - rot // 2)
    bindings = {"x": ctx.id(x), "cosines": ctx.id(cos), "sines": ctx.id(sin), "out": out.value}
    if lengths is not None:
        bindings["lengths"] = ctx.id(lengths)
    yield Dispatch(
        "rope",
        bindings,
        {
            "count": count,
            "size": size,
            "rot": rot,
            "width": table[-1],
            "rows": max(rows, 1),
            "positions": positions,
            "repeat": heads if args["layout"] == "bshd" else 1,
            "start": ctx.live(start),
            "vectors": max(positions * heads, 1),
        },
        ctx.grid_1d(count, 64),
        consts={"INTERLEAVED": args["interleaved"] is True, **lengths_consts(lengths is not None, shape[0])},
        types={"X": ctx.wgsl_type(x), "Cos": ctx.wgsl_type(cos), "Sin": ctx.wgsl_type(sin), "Out": ctx.wgsl_type(out)},
    )


register("webgpu.rope", supports=supports, lower=lower)
