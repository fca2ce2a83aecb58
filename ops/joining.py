"""Operators that put one tensor into another: cat, stack, slice_scatter, select_scatter, copy and padding."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from ..backend.graph import FLOATS, Arg, Dim, Graph, Node, Ref, Sym
from .base import Dispatch, Lowering, register
from .copies import (
    WORKGROUP,
    box,
    copy_all,
    detached,
    offsets_of,
    side,
    strided_copy,
    table,
)
from .layout import integer, number, part, ref
from .strides import MAX_RANK, axis_of, broadcast_strides, contiguous
from .views import argument, result, without_ones

FLOAT_MAX = 3.4028234663852886e38


def tensors(node: Node) -> tuple[Ref, ...]:
    """The tensor list argument of cat and stack."""
    given = node.args["tensors"]
    assert isinstance(given, tuple)
    found = tuple(item for item in given if isinstance(item, Ref))
    assert len(found) == len(given), f"{node.name}: tensors holds something else: {given!r}"
    return found


def supports_join(graph: Graph, node: Node) -> str | None:
    if not tensors(node):
        return "no tensors"
    return f"more than {MAX_RANK} axes" if len(result(graph, node).shape) > MAX_RANK else None


def single(graph: Graph, node: Node) -> str | None:
    """View rule: one tensor, whose elements are the result's."""
    given = tensors(node)
    own, made = graph.value(given[0]), result(graph, node)
    same = own.dtype == made.dtype and without_ones(own.shape) == without_ones(made.shape)
    return "tensors" if len(given) == 1 and same else None


def lower_join(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
    """cat along `dim`, or stack (which adds an axis of size 1 to every tensor): one dispatch a tensor, with a cast."""
    out = ctx.out(node)
    target = ctx.shape(out)
    axis = axis_of(number(node.args["dim"]), len(target))
    given = tensors(node)
    if node.op == "aten.stack.default":
        lengths = [1] * len(given)
    else:
        given = tuple(
            t for t in given if len(ctx.shape(t)) == len(target)
        )  # cat skips tensors of shape (0,), whatever the rank
        lengths = [ctx.shape(t)[axis] for t in given]
    steps = contiguous(target)
    for tensor, begin, length in zip(given, offsets_of(lengths), lengths, strict=True):
        shape = (*target[:axis], length, *target[axis + 1 :])
        yield from strided_copy(
            ctx, side(ctx, tensor), side(ctx, out, begin * steps[axis]), box(shape, contiguous(shape), steps)
        )


register(
    "aten.cat.default",
    "aten.concat.default",
    "aten.stack.default",
    supports=supports_join,
    lower=lower_join,
    view=single,
)


# -- writing into a part


def _same_types(graph: Graph, node: Node) -> str | None:
    own, made = argument(graph, node), result(graph, node)
    if own.dtype != made.dtype:
        return f"the result is {made.dtype}, but self is {own.dtype}"
    return f"more than {MAX_RANK} axes" if len(own.shape) > MAX_RANK else None


def supports_slice_scatter(graph: Graph, node: Node) -> str | None:
    step, start = node.args.get("step", 1), node.args.get("start")
    if not isinstance(step, int) or step < 1:
        return f"the step of a slice must be a positive literal, got {step}"
    if not (start is None or isinstance(start, int | Sym)):
        return "a start given as a tensor is not supported"
    return _same_types(graph, node)


def supports_select_scatter(graph: Graph, node: Node) -> str | None:
    if not isinstance(node.args["index"], int | Sym):
        return "an index given as a tensor is not supported"
    return _same_types(graph, node)


def _write_part(ctx: Lowering, node: Node, start: Dim, step: int, length: int, what: str) -> Iterator[Dispatch]:
    """The old value, unless the result takes over its buffer, then `src` over `length` elements of the axis `dim`."""
    own, source, out = ref(node), ref(node, "src"), ctx.out(node)
    shape = ctx.shape(own)
    axis = axis_of(number(node.args["dim"]), len(shape))
    offset, moving = part(ctx, own, axis, start, step, length, what)
    begin, before = detached(ctx, source, out)
    yield from before
    yield from copy_all(ctx, own, out)
    box_shape = (*shape[:axis], length, *shape[axis + 1 :])
    steps = list(contiguous(shape))
    steps[axis] *= step
    yield from strided_copy(ctx, begin, side(ctx, out, offset, moving), box(box_shape, contiguous(box_shape), steps))


def lower_slice_scatter(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
    start = node.args.get("start")
    source = ctx.shape(ref(node, "src"))
    length = source[axis_of(number(node.args["dim"]), len(source))]
    step = number(node.args.get("step", 1))
    yield from _write_part(
        ctx, node, 0 if start is None else integer(start), step, length, f"start of a slice of {length} written"
    )


def lower_select_scatter(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
    yield from _write_part(ctx, node, integer(node.args["index"]), 1, 1, "index written")


_IN_SELF = {0: "self"}
register("aten.slice_scatter.default", supports=supports_slice_scatter, lower=lower_slice_scatter, inplace=_IN_SELF)
register("aten.select_scatter.default", supports=supports_select_scatter, lower=lower_select_scatter, inplace=_IN_SELF)


def supports_copy(graph: Graph, node: Node) -> str | None:
    source, made = graph.value(node.args["src"]), result(graph, node)
    if len(source.shape) > len(made.shape):
        return f"src {source.shape} has more axes than self {made.shape}"
    return _same_types(graph, node)


def lower_copy(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
    """self with all its elements replaced by `src`, broadcast and cast."""
    source, out = ref(node, "src"), ctx.out(node)
    target = ctx.shape(out)
    begin, before = detached(ctx, source, out)
    yield from before
    axes = box(target, broadcast_strides(ctx.shape(source), target), contiguous(target))
    yield from strided_copy(ctx, begin, side(ctx, out), axes)


register("aten.copy.default", supports=supports_copy, lower=lower_copy, inplace=_IN_SELF)


# -- padding


def pads(node: Node) -> tuple[Dim, ...]:
    """The argument `pad`: (before, after) of the last axis, then of the one before it, and so on."""
    given = node.args["pad"]
    assert isinstance(given, tuple)
    found = tuple(item for item in given if isinstance(item, int | Sym))
    assert len(found) == len(given), f"{node.name}: pad is {given!r}"
    return found


def supports_pad(graph: Graph, node: Node) -> str | None:
    return unfit(node.args["value"], argument(graph, node).dtype) or _same_types(graph, node)


def unfit(value: Arg, dtype: str) -> str | None:
    """The reason why a literal cannot be stored in a tensor of `dtype` on the GPU, or None."""
    if not isinstance(value, int | float):
        return f"the value written must be a literal, got {value}"
    if dtype in FLOATS:
        return None if not abs(value) > FLOAT_MAX or math.isinf(value) else f"{value} does not fit float32"
    if dtype == "bool" or -(2**31) <= value < 2**31:
        return None
    return f"{value} does not fit the GPU's 32-bit integers"


def fill_dispatch(
    ctx: Lowering,
    own: int,
    out: int,
    dtype: str,
    shapes: tuple[Sequence[int], Sequence[int]],
    before: Sequence[int],
    value: float,
) -> Iterator[Dispatch]:
    """`out` filled with `value` except where x, shifted by `before`, covers it; `shapes` are (of x, of out)."""
    own_shape, target = shapes
    count = math.prod(target)
    if count == 0:
        return
    kind = ctx.stored_as(out, dtype)
    floating = kind in ("f32", "f16")
    number_ = "params.fill_float" if floating else "params.fill_int"
    yield Dispatch(
        "pad",
        {"x": own, "out": out},
        {
            "count": count,
            "fill_float": float(value) if floating else 0.0,
            "fill_int": 0 if floating else int(bool(value)) if dtype == "bool" else int(value),
            "sizes": table(target),
            "x_sizes": table(own_shape),
            "x_strides": table(contiguous(own_shape)),
            "before": table(before),
        },
        ctx.grid_1d(count, WORKGROUP),
        consts={"RANK": len(target)},
        types={"X": ctx.stored_as(own, dtype), "Out": kind},
        body=f"fn fill_value() -> Out {{ return Out({number_}); }}\n",
    )


def lower_pad(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
    own, out = ref(node), ctx.out(node)
    shape, target = ctx.shape(own), ctx.shape(out)
    before = [0] * len(shape)
    for i, dim in enumerate(pads(node)[::2]):
        before[len(shape) - 1 - i] = ctx.int(dim)
    value = node.args["value"]
    assert isinstance(value, int | float)
    yield from fill_dispatch(ctx, own.value, out.value, ctx.dtype(out), (shape, target), before, value)


register("aten.constant_pad_nd.default", supports=supports_pad, lower=lower_pad)
