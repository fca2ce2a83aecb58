"""Tensors made from nothing: constants, ranges, identity matrices; and triangles. Kernels: `fill`, `triangle`."""

from __future__ import annotations

from collections.abc import Iterator

from ..backend.graph import FLOATS, Arg, Graph, Node, Sym
from .base import Dispatch, Live, Lowering, register
from .elementwise import bits, finish, refuse_literal
from .reduce import source_of

WORKGROUP = 64

FULL = (
    "aten.full.default",
    "aten.full_like.default",
    "aten.new_full.default",
    "aten.fill.Scalar",
    "aten.scalar_tensor.default",
)
ZEROS = ("aten.zeros.default", "aten.zeros_like.default", "aten.new_zeros.default")
ONES = ("aten.ones.default", "aten.ones_like.default", "aten.new_ones.default")
EMPTY = ("aten.empty.memory_format", "aten.empty_like.default", "aten.new_empty.default")
RANGES = ("aten.arange.default", "aten.arange.start", "aten.arange.start_step")
EYES = ("aten.eye.default", "aten.eye.m")


def _numbers(node: Node) -> tuple[Arg, Arg]:
    """(start, step) of the progression that fills the result."""
    if node.op in RANGES:
        return node.args.get("start", 0), node.args.get("step", 1)
    if node.op in FULL:
        return next(node.args[name] for name in ("fill_value", "value", "s") if name in node.args), 0
    return (1 if node.op in ONES else 0), 0


def _kind(graph: Graph, node: Node) -> str:
    return "f32" if graph.values[node.outputs[0]].dtype in FLOATS else "i32"


def _supports(graph: Graph, node: Node) -> str | None:
    start, step = _numbers(node)
    kind = _kind(graph, node)
    if isinstance(step, Sym):
        return "the step of a range must be a literal"
    for number in (start, step):
        truth = graph.values[node.outputs[0]].dtype == "bool" and isinstance(number, int | float)
        reason = None if truth else refuse_literal(number, kind)
        if reason is not None:
            return reason
    return None


def _lower(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
    out = ctx.out(node)
    count = ctx.numel(out)
    if count == 0:
        return
    start, step = _numbers(node)
    kind, dtype = _kind(ctx.graph, node), ctx.dtype(out)
    first: int | Live = 0
    if isinstance(start, Sym):
        first = ctx.live(start)
    elif isinstance(start, int | float):
        first = bits(start != 0 if dtype == "bool" else start, kind)
    if node.op in EYES:
        value = "select(R(0), R(1), i / params.columns == i % params.columns)"
    else:
        value = "start() + R(i) * step()" if node.op in RANGES else "start()"
    yield Dispatch(
        "fill",
        {"out": out.value},
        {
            "count": count,
            "start": first,
            "step": bits(step, kind) if isinstance(step, int | float) else 0,
            "columns": ctx.shape(out)[-1] if node.op in EYES else 1,
        },
        ctx.grid_1d(count, WORKGROUP),
        overrides={"WG": WORKGROUP, "LIVE": int(isinstance(start, Sym))},
        types={"Out": ctx.wgsl_type(out), "R": kind},
        body=f"fn value(i: u32) -> R {{ return {value}; }}\n{finish(kind, dtype)}",
    )


def _triangle_supports(graph: Graph, node: Node) -> str | None:
    if len(graph.value(node.args["self"]).shape) < 2:
        return "a triangle of fewer than two dimensions"
    return refuse_literal(node.args["diagonal"], "i32")


def _triangle(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
    source, out, diagonal = source_of(node), ctx.out(node), node.args["diagonal"]
    shape = ctx.shape(source)
    count = ctx.numel(source)
    if count == 0:
        return
    number: int | Live = 0
    if isinstance(diagonal, Sym):
        number = ctx.live(diagonal)
    elif isinstance(diagonal, int):
        number = bits(diagonal, "i32")
    yield Dispatch(
        "triangle",
        {"x": source.value, "out": out.value},
        {"count": count, "rows": shape[-2], "columns": shape[-1], "diagonal": number},
        ctx.grid_1d(count, WORKGROUP),
        overrides={"WG": WORKGROUP, "LIVE": int(isinstance(diagonal, Sym)), "LOWER": int("tril" in node.op)},
        types={"X": ctx.wgsl_type(source), "Out": ctx.wgsl_type(out)},
    )


register(*FULL, *ZEROS, *ONES, *EMPTY, *RANGES, *EYES, supports=_supports, lower=_lower)
register("aten.tril.default", "aten.triu.default", supports=_triangle_supports, lower=_triangle)
