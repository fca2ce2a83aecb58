"""Reductions over any dimensions, positions of extrema, cumulative sums. Kernels: `reduce`, `arg_reduce`, `scan`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..backend.graph import FLOATS, Arg, Graph, Node, Ref, Value
from .base import Dispatch, Lowering, register
from .elementwise import finish
from .strides import MAX_RANK, Sizes, around, axis_of, contiguous, merge, pad

THREADS = 256
NAN_TEST = {
    "f32": "fn is_nan(v: T) -> bool { return (bitcast<u32>(v) & 0x7fffffffu) > 0x7f800000u; }",
    "i32": "fn is_nan(v: T) -> bool { return false; }",
}
"""The function `is_nan` for kernels that order elements of type T."""


def lanes(length: int, inner: int) -> tuple[int, int]:
    """(LY, ALONG): how many of a workgroup's 256 invocations share a line of `length` elements, and their layout.

    In the last dimension (inner = 1) they walk along the line; elsewhere neighbours take neighbouring lines, so that
    both read memory in order.
    """
    if inner == 1:
        return min(max(1 << max(length - 1, 0).bit_length() >> 2, 1), THREADS), 1
    wide = min(1 << (inner - 1).bit_length(), 32)
    return max(min(THREADS // wide, 1 << max(length - 1, 0).bit_length()), 1), 0


@dataclass(frozen=True)
class Reduction:
    """WGSL expressions of a reduction in the running values u and v, an element v and a total v.

    Attributes:
        start: value of an empty reduction; an f32 or an i32 expression.
        combine: of u and v.
        element: of v, an element as it is stored.
        total: of v, the combined value.
        kind: type of the running value: `out`, `in` (as the result's or the argument's dtype) or an explicit WGSL type.
        empty: whether the reduction of nothing has a value.
    """

    start: dict[str, str]
    combine: dict[str, str]
    element: str = "S(v)"
    total: str = "v"
    kind: str = "out"
    empty: bool = True


def _same(text: str) -> dict[str, str]:
    return {"f32": text, "i32": text}


ADD = _same("u + v")
ZERO, ONE = _same("S(0)"), _same("S(1)")
SUM = Reduction(ZERO, ADD)
MEAN = Reduction(ZERO, ADD, total="v / params.divisor", kind="f32")
PROD = Reduction(ONE, _same("u * v"))
LOWEST = {"f32": "-params.inf", "i32": "-2147483647 - 1"}
HIGHEST = {"f32": "params.inf", "i32": "2147483647"}
AMAX = Reduction(LOWEST, {"f32": "maximum(u, v)", "i32": "max(u, v)"}, kind="in", empty=False)
AMIN = Reduction(HIGHEST, {"f32": "minimum(u, v)", "i32": "min(u, v)"}, kind="in", empty=False)
ANY = Reduction(ZERO, _same("u | v"), element="S(!(v == X(0)))", kind="i32")
ALL = Reduction(ONE, _same("u & v"), element="S(!(v == X(0)))", kind="i32")
SPREAD = Reduction(ZERO, ADD, "square(f32(v) - center[o])", "v / params.divisor", "f32")
DEVIATION = Reduction(ZERO, ADD, "square(f32(v) - center[o])", "sqrt(v / params.divisor)", "f32")
NORM_1 = Reduction(ZERO, ADD, "abs(f32(v))", kind="f32")
NORM_2 = Reduction(ZERO, ADD, "square(f32(v))", "sqrt(v)", "f32")
NORM_MAX = Reduction(ZERO, {"f32": "maximum(u, v)"}, "abs(f32(v))", kind="f32")
NORMS = {1: NORM_1, 2: NORM_2, math.inf: NORM_MAX, None: NORM_2}


def _kind(source: Value, out: Value, rule: Reduction) -> str:
    if rule.kind in ("f32", "i32"):
        return rule.kind
    return "f32" if (source if rule.kind == "in" else out).dtype in FLOATS else "i32"


def axes_of(arg: Arg, rank: int) -> tuple[int, ...]:
    """The dimensions that an int or a list names, counted from the front, in order; None and an empty list name all."""
    if arg is None or arg == ():
        return tuple(range(rank))
    dims = arg if isinstance(arg, tuple) else (arg,)
    return tuple(sorted({axis_of(dim, rank) for dim in dims if isinstance(dim, int)})) if rank else ()


def _split(shape: Sizes, axes: tuple[int, ...]) -> tuple[Sizes, Sizes, Sizes, Sizes]:
    """Sizes and strides of the dimensions that stay and of those that are reduced, both merged."""
    strides = contiguous(shape)
    kept = [axis for axis in range(len(shape)) if axis not in axes]
    kept_sizes, (kept_strides,) = merge([shape[a] for a in kept], [strides[a] for a in kept])
    sizes, (inner,) = merge([shape[a] for a in axes], [strides[a] for a in axes])
    return kept_sizes, kept_strides, sizes, inner


def _reduce(
    ctx: Lowering,
    rule: Reduction,
    source: Ref,
    axes: tuple[int, ...],
    target: tuple[int, str],
    center: int | None,
    divisor: float,
) -> Iterator[Dispatch]:
    """One dispatch of `reduce` into value `target` (index, dtype)."""
    shape = ctx.shape(source)
    kept, kept_strides, reduced, strides = _split(shape, axes)
    outputs = math.prod(shape[axis] for axis in range(len(shape)) if axis not in axes)
    length = math.prod(shape[axis] for axis in axes)
    if outputs == 0:
        return
    index, dtype = target
    # an empty tensor has sizes 0, by which no index may be divided: nothing is read then
    kept, reduced = (kept, reduced) if length else ((), ())
    across = kept_strides[-1] if kept and kept_strides[-1] == 1 else 0
    count, along = lanes(length, kept[-1] if across else 1)
    kind = _kind(ctx.value(source), Value("temp", dtype, (), ""), rule)
    bindings = {"x": source.value, "out": index} | ({} if center is None else {"center": center})
    body = [
        f"fn identity() -> S {{ return {rule.start[kind]}; }}",
        f"fn combine(u: S, v: S) -> S {{ return {rule.combine[kind]}; }}",
        "fn square(v: f32) -> f32 { return v * v; }",
        f"fn map(v: X, o: u32) -> S {{ return {rule.element}; }}",
        f"fn post(v: S) -> R {{ return {rule.total}; }}",
        finish(kind, dtype),
    ]
    yield Dispatch(
        "reduce",
        bindings,
        {
            "outputs": outputs,
            "length": length,
            "inf": math.inf,
            "divisor": divisor,
            "kept": pad(kept, 1),
            "kept_strides": pad(kept_strides if kept else ()),
            "reduced": pad(reduced, 1),
            "reduced_strides": pad(strides if reduced else ()),
        },
        ctx.fold_grid(-(-outputs // (THREADS // count))),
        overrides={"LY": count, "ALONG": along, "KEPT_RANK": len(kept), "REDUCED_RANK": max(len(reduced), 1)},
        types={"X": ctx.wgsl_type(source), "Out": ctx.stored_as(index, dtype), "S": kind, "R": kind},
        body="\n".join(body),
    )


def source_of(node: Node) -> Ref:
    """The tensor argument `self`."""
    arg = node.args["self"]
    if not isinstance(arg, Ref):
        raise TypeError(f"{node.op}: self is no tensor")
    return arg


def check_rank(graph: Graph, node: Node) -> str | None:
    """The reason to refuse a tensor with too many dimensions."""
    rank = len(graph.value(node.args["self"]).shape)
    return f"{rank} dimensions; at most {MAX_RANK} are supported" if rank > MAX_RANK else None


def _register(rule: Reduction | Callable[[Node], Reduction | None], *names: str) -> None:
    def chosen(node: Node) -> Reduction | None:
        return rule if isinstance(rule, Reduction) else rule(node)

    def supports(graph: Graph, node: Node) -> str | None:
        how = chosen(node)
        if how is None:
            return f"{node.op}: only the norms 1, 2 and infinity are supported"
        value = graph.value(node.args["self"])
        if not how.empty and any(value.shape[axis] == 0 for axis in axes_of(node.args.get("dim"), len(value.shape))):
            return "the extremum of no elements"
        if (how.kind == "out" and value.dtype in FLOATS) > (graph.values[node.outputs[0]].dtype in FLOATS):
            return "floating elements, integer result"
        return check_rank(graph, node)

    def lower(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
        how, source, out = chosen(node), source_of(node), ctx.out(node)
        assert how is not None  # supports has refused the rest
        shape = ctx.shape(source)
        axes = axes_of(node.args.get("dim"), len(shape))
        length = math.prod(shape[axis] for axis in axes)
        require_elements(ctx, node, how, source, axes)
        yield from _reduce(ctx, how, source, axes, (out.value, ctx.dtype(out)), None, float(length))

    register(*names, supports=supports, lower=lower)


def require_elements(ctx: Lowering, node: Node, rule: Reduction, source: Ref, axes: tuple[int, ...]) -> None:
    """Let a dynamic size of 0 fail on the host where the reduction of nothing has no value."""
    if not rule.empty:
        for axis in axes:
            ctx.require(ctx.value(source).shape[axis], 1, 2**31 - 1, f"{node.name}: size of reduced dimension {axis}")


def _norm(node: Node) -> Reduction | None:
    order = node.args.get("ord", node.args.get("p"))
    return NORMS.get(order) if order is None or isinstance(order, int | float) else None


# -- variances: a pass for the means, a pass for the squared differences


def _correction(node: Node) -> float:
    if "unbiased" in node.args:
        return 1.0 if node.args["unbiased"] else 0.0
    given = node.args["correction"]
    return float(given) if isinstance(given, int | float) else 1.0


def _lower_spread(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
    source, out = source_of(node), ctx.out(node)
    shape = ctx.shape(source)
    axes = axes_of(node.args.get("dim"), len(shape))
    length = math.prod(shape[axis] for axis in axes)
    mean = ctx.scratch("f32", math.prod(shape[axis] for axis in range(len(shape)) if axis not in axes))
    yield from _reduce(ctx, MEAN, source, axes, (mean, "f32"), None, float(length))
    rule = DEVIATION if node.op.startswith("aten.std") else SPREAD
    yield from _reduce(ctx, rule, source, axes, (out.value, ctx.dtype(out)), mean, max(length - _correction(node), 0.0))
    if len(node.outputs) == 2:
        second = ctx.out(node, 1)
        yield from _reduce(ctx, MEAN, source, axes, (second.value, ctx.dtype(second)), None, float(length))


# -- positions


def _arg_supports(graph: Graph, node: Node) -> str | None:
    value = graph.value(node.args["self"])
    rank, dim = len(value.shape), node.args.get("dim")
    if any(value.shape[axis] == 0 for axis in axes_of(dim, rank)):
        return "the extremum of no elements"
    return None


def _arg_lower(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
    source = source_of(node)
    shape, dim = ctx.shape(source), node.args.get("dim")
    for axis in axes_of(dim, len(shape)):
        ctx.require(ctx.value(source).shape[axis], 1, 2**31 - 1, f"{node.name}: size of reduced dimension {axis}")
    outer, length, inner = around(shape, dim) if isinstance(dim, int) else (1, math.prod(shape), 1)
    if outer * inner == 0 or length == 0:
        return
    dtype = ctx.dtype(source)
    if len(node.outputs) == 2:
        values, index = node.outputs
    else:
        values, index = ctx.scratch(dtype, outer * inner), node.outputs[0]
    kind = "f32" if dtype in FLOATS else "i32"
    largest = "max" in node.op
    worst = (LOWEST if largest else HIGHEST)[kind]
    count, along = lanes(length, inner)
    yield Dispatch(
        "arg_reduce",
        {"x": source.value, "out": values, "index": index},
        {"outputs": outer * inner, "length": length, "inner": inner, "inf": math.inf},
        ctx.fold_grid(-(-outer * inner // (THREADS // count))),
        overrides={"LY": count, "ALONG": along, "LARGEST": int(largest)},
        types={"X": ctx.wgsl_type(source), "Out": ctx.stored_as(values, dtype), "T": kind},
        body=f"fn worst() -> T {{ return {worst}; }}\n{NAN_TEST[kind]}",
    )


# -- cumulative sums


def _scan_supports(graph: Graph, node: Node) -> str | None:
    if graph.value(node.args["self"]).dtype in FLOATS and graph.values[node.outputs[0]].dtype not in FLOATS:
        return "floating elements, integer result"
    return None


def _scan_lower(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
    source, out, dim = source_of(node), ctx.out(node), node.args["dim"]
    outer, length, inner = around(ctx.shape(source), dim if isinstance(dim, int) else 0)
    if outer * length * inner == 0:
        return
    dtype = ctx.dtype(out)
    kind = "f32" if dtype in FLOATS else "i32"
    yield Dispatch(
        "scan",
        {"x": source.value, "out": out.value},
        {"lines": outer * inner, "length": length, "inner": inner},
        ctx.fold_grid(outer * inner),
        types={"X": ctx.wgsl_type(source), "Out": ctx.wgsl_type(out), "S": kind, "R": kind},
        body=finish(kind, dtype),
    )


_register(SUM, "aten.sum.default", "aten.sum.dim_IntList")
_register(MEAN, "aten.mean.default", "aten.mean.dim")
_register(PROD, "aten.prod.default", "aten.prod.dim_int")
_register(AMAX, "aten.amax.default", "aten.max.default")
_register(AMIN, "aten.amin.default", "aten.min.default")
_register(ANY, "aten.any.default", "aten.any.dim", "aten.any.dims")
_register(ALL, "aten.all.default", "aten.all.dim", "aten.all.dims")
_register(_norm, "aten.linalg_vector_norm.default", "aten.norm.Scalar", "aten.norm.ScalarOpt_dim")
register(
    *(f"aten.{name}.{way}" for name in ("var", "std", "var_mean") for way in ("default", "dim", "correction")),
    supports=check_rank,
    lower=_lower_spread,
)
register(
    "aten.argmax.default",
    "aten.argmin.default",
    "aten.max.dim",
    "aten.min.dim",
    supports=_arg_supports,
    lower=_arg_lower,
)
register("aten.cumsum.default", supports=_scan_supports, lower=_scan_lower)
