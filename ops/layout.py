"""Operators that move whole axes: permute, slice, select, split, expand, repeat, flip, roll. One strided copy each.

A result that provably has the elements of `self` in the same order is a view and moves nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from math import prod

from ..backend.graph import Arg, Dim, Graph, Node, Ref, Sym
from .base import Dispatch, Lowering, register
from .copies import Axis, Moving, Side, box, offsets_of, side, strided_copy
from .strides import MAX_RANK, axis_of, broadcast_strides, contiguous
from .views import argument, same_elements, without_ones


def ref(node: Node, name: str = "self") -> Ref:
    """A tensor argument."""
    found = node.args[name]
    assert isinstance(found, Ref), f"{node.name}: {name} is {found!r}"
    return found


def number(arg: Arg) -> int:
    """An argument that the schema says is a plain integer."""
    assert isinstance(arg, int), f"{arg!r} is no integer"
    return arg


def numbers(arg: Arg) -> tuple[int, ...]:
    """An argument that the schema says is one integer or a list of them."""
    return tuple(number(item) for item in arg) if isinstance(arg, tuple) else (number(arg),)


def integer(arg: Arg) -> Dim:
    """An argument that the schema says is a SymInt."""
    assert isinstance(arg, int | Sym), f"{arg!r} is no integer"
    return arg


def supports(graph: Graph, node: Node) -> str | None:
    """What all of these ask: one dtype, and not more axes than the copy kernel takes."""
    own = argument(graph, node)
    for index in node.outputs:
        made = graph.values[index]
        if made.dtype != own.dtype:
            return f"the result is {made.dtype}, but self is {own.dtype}"
        if max(len(made.shape), len(own.shape)) > MAX_RANK:
            return f"more than {MAX_RANK} axes"
    return None


# -- order of axes


def permutation(graph: Graph, node: Node) -> tuple[int, ...]:
    """The axis of `self` that each axis of the result is."""
    rank = len(argument(graph, node).shape)
    name = node.op.split(".")[1]
    if name.startswith("permute"):
        return tuple(axis % rank for axis in numbers(node.args["dims"]))
    axes = list(range(rank))
    if name.startswith("transpose"):
        a, b = axis_of(number(node.args["dim0"]), rank), axis_of(number(node.args["dim1"]), rank)
        if rank:
            axes[a], axes[b] = axes[b], axes[a]
        return tuple(axes)
    return tuple(reversed(axes))  # t, of at most two axes


def keeps_order(graph: Graph, node: Node) -> str | None:
    """View rule: only axes of size 1 change places."""
    shape = argument(graph, node).shape
    moved = [axis for axis in permutation(graph, node) if shape[axis] != 1]
    return "self" if moved == sorted(moved) else None


def lower_permute(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
    own, out = ref(node), ctx.out(node)
    shape = ctx.shape(own)
    steps = contiguous(shape)
    order = permutation(ctx.graph, node)
    target = [shape[axis] for axis in order]
    axes = box(target, [steps[axis] for axis in order], contiguous(target))
    yield from strided_copy(ctx, side(ctx, own), side(ctx, out), axes)


PERMUTES = (
    "aten.permute.default",
    "aten.permute_copy.default",
    "aten.transpose.int",
    "aten.transpose_copy.int",
    "aten.t.default",
    "aten.t_copy.default",
)
register(*PERMUTES, supports=supports, lower=lower_permute, view=keeps_order)


# -- parts of an axis


def part(
    ctx: Lowering, own: Ref, axis: int, start: Dim, step: int, length: int, what: str
) -> tuple[int, Moving | None]:
    """Where `length` elements of an axis, `step` apart, begin: (fixed offset, live offset) in elements of the tensor.

    A live start gets its host check. A negative start counts from the end, as in PyTorch.
    """
    shape = ctx.shape(own) or (1,)
    stride, size = contiguous(shape)[axis], shape[axis]
    high = size - (length - 1) * step - 1 if length else size
    if isinstance(start, Sym):
        if length:
            ctx.require(start, -size, high, f"{what} along axis {axis} (size {size}) of {ctx.value(own).name}")
        return 0, Moving(start, stride, size, max(high, 0))
    begin = start + size if start < 0 else start
    return max(0, min(begin, high)) * stride, None


def pick(
    ctx: Lowering, own: Side, out: Side, shape: tuple[int, ...], axis: int, length: int, step: int
) -> Iterator[Dispatch]:
    """Copy `length` elements, `step` apart, of one axis of a row-major tensor of `shape` to a row-major result; where
    they are neighbours in memory, the result may be a window on the tensor instead."""
    together = prod(shape[:axis]) == 1 and (step == 1 or length == 1)
    if together and length and own.moving is None and ctx.window(out.value, own.value, own.offset):
        return
    target = (*shape[:axis], length, *shape[axis + 1 :])
    steps = list(contiguous(shape))
    steps[axis] *= step
    yield from strided_copy(ctx, own, out, box(target, steps, contiguous(target)))


def supports_slice(graph: Graph, node: Node) -> str | None:
    step = node.args.get("step", 1)
    if not isinstance(step, int) or step < 1:
        return f"the step of a slice must be a positive literal, got {step}"
    if isinstance(node.args.get("start"), Ref):
        return "a start given as a tensor is not supported"
    return supports(graph, node)


def lower_slice(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
    """out = self[..., start : end : step, ...]; the length is the result's, a symbolic start stays live."""
    own, out = ref(node), ctx.out(node)
    shape = ctx.shape(own)
    axis = axis_of(number(node.args["dim"]), len(shape))
    step = number(node.args.get("step", 1))
    length = ctx.shape(out)[axis]
    start = node.args.get("start")
    begin = 0 if start is None else integer(start)
    offset, moving = part(ctx, own, axis, begin, step, length, f"start of a slice of {length}")
    yield from pick(ctx, side(ctx, own, offset, moving), side(ctx, out), shape, axis, length, step)


SLICES = ("aten.slice.Tensor", "aten.slice_copy.Tensor", "aten.narrow.default", "aten.narrow_copy.default")
register(*SLICES, supports=supports_slice, lower=lower_slice, view=same_elements)


def supports_select(graph: Graph, node: Node) -> str | None:
    if not isinstance(node.args["index"], int | Sym):
        return "an index given as a tensor is not supported"
    return supports(graph, node)


def lower_select(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
    """out = self[..., index, ...]; a negative index counts from the end."""
    own, out = ref(node), ctx.out(node)
    shape = ctx.shape(own)
    axis = axis_of(number(node.args["dim"]), len(shape))
    offset, moving = part(ctx, own, axis, integer(node.args["index"]), 1, 1, "index of a select")
    yield from pick(ctx, side(ctx, own, offset, moving), side(ctx, out), shape, axis, 1, 1)


register("aten.select.int", "aten.select_copy.int", supports=supports_select, lower=lower_select, view=same_elements)


def lower_split(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
    """Consecutive parts of an axis, one dispatch each; their lengths come from the results' shapes."""
    own = ref(node)
    shape = ctx.shape(own)
    axis = axis_of(number(node.args["dim"]), len(shape))
    single = node.op.startswith("aten.unbind")
    pieces = [ctx.out(node, i) for i in range(len(node.outputs))]
    lengths = [1 if single else ctx.shape(piece)[axis] for piece in pieces]
    stride = contiguous(shape)[axis]
    for piece, begin, length in zip(pieces, offsets_of(lengths), lengths, strict=True):
        yield from pick(ctx, side(ctx, own, begin * stride), side(ctx, piece), shape, axis, length, 1)


SPLITS = (
    "aten.split.Tensor",
    "aten.split.sizes",
    "aten.split_copy.Tensor",
    "aten.split_with_sizes.default",
    "aten.split_with_sizes_copy.default",
    "aten.unbind.int",
    "aten.unbind_copy.int",
    "aten.chunk.default",
)
register(*SPLITS, supports=supports, lower=lower_split, view=same_elements)


def supports_strided(graph: Graph, node: Node) -> str | None:
    given = (node.args["size"], node.args["stride"], node.args.get("storage_offset") or 0)
    if not all(isinstance(n, int) for item in given for n in (item if isinstance(item, tuple) else (item,))):
        return "as_strided with symbolic sizes, strides or offset is not supported"
    sizes, steps, start = numbers(given[0]), numbers(given[1]), number(given[2])
    total = 1
    for dim in argument(graph, node).shape:
        if not isinstance(dim, int):
            return "as_strided of a tensor with a dynamic size is not supported"
        total *= dim
    last = start + sum((size - 1) * step for size, step in zip(sizes, steps, strict=True))
    if 0 not in sizes and (start < 0 or min(steps, default=0) < 0 or last >= total):
        return f"as_strided reads element {last} of a tensor with {total}"
    return supports(graph, node)


def lower_strided(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
    sizes, steps = numbers(node.args["size"]), numbers(node.args["stride"])
    start = number(node.args.get("storage_offset") or 0)
    axes = box(sizes, steps, contiguous(sizes))
    yield from strided_copy(ctx, side(ctx, ref(node), start), side(ctx, ctx.out(node)), axes)


register("aten.as_strided.default", "aten.as_strided_copy.default", supports=supports_strided, lower=lower_strided)


# -- repetition


def lower_expand(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
    own, out = ref(node), ctx.out(node)
    target = ctx.shape(out)
    axes = box(target, broadcast_strides(ctx.shape(own), target), contiguous(target))
    yield from strided_copy(ctx, side(ctx, own), side(ctx, out), axes)


register("aten.expand.default", "aten.expand_copy.default", supports=supports, lower=lower_expand, view=same_elements)


def supports_repeat(graph: Graph, node: Node) -> str | None:
    repeats = node.args["repeats"]
    items = repeats if isinstance(repeats, tuple) else (repeats,)
    if not all(isinstance(item, int | Sym) for item in items):
        return "repeats given as a tensor are not supported"
    axes = len(without_ones(argument(graph, node).shape)) + sum(item != 1 for item in items)
    return f"repeats over more than {MAX_RANK} axes" if axes > MAX_RANK else supports(graph, node)


def lower_repeat(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
    """The tensor side by side with itself: each axis becomes (repetition, own axis), the repetition with stride 0."""
    own, out = ref(node), ctx.out(node)
    given = node.args["repeats"]
    repeats = [ctx.int(integer(item)) for item in (given if isinstance(given, tuple) else (given,))]
    shape = ctx.shape(own)
    shape = (1,) * (len(repeats) - len(shape)) + shape
    sizes: list[int] = []
    steps: list[int] = []
    for count, size, step in zip(repeats, shape, contiguous(shape), strict=True):
        sizes += [count, size]
        steps += [0, step]
    yield from strided_copy(ctx, side(ctx, own), side(ctx, out), box(sizes, steps, contiguous(sizes)))


register("aten.repeat.default", supports=supports_repeat, lower=lower_repeat, view=same_elements)


def lower_interleave(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
    """Every element of an axis several times: the axis becomes (own axis, repetition). Without `dim` self is flat."""
    own, out = ref(node), ctx.out(node)
    repeats = ctx.int(integer(node.args["repeats"]))
    flat = node.args.get("dim") is None
    shape = (ctx.numel(own),) if flat else ctx.shape(own)
    axis = 0 if flat else axis_of(number(node.args["dim"]), len(shape))
    steps = contiguous(shape)
    sizes = [*shape[: axis + 1], repeats, *shape[axis + 1 :]]
    steps = (*steps[: axis + 1], 0, *steps[axis + 1 :])
    yield from strided_copy(ctx, side(ctx, own), side(ctx, out), box(sizes, steps, contiguous(sizes)))


register("aten.repeat_interleave.self_int", supports=supports_repeat, lower=lower_interleave, view=same_elements)


# -- rearranging an axis


def lower_flip(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
    own, out = ref(node), ctx.out(node)
    shape = ctx.shape(own)
    steps = list(contiguous(shape))
    start = 0
    for axis in {axis_of(axis, len(shape)) for axis in numbers(node.args["dims"])} if shape else ():
        start += (shape[axis] - 1) * steps[axis]
        steps[axis] = -steps[axis]
    yield from strided_copy(ctx, side(ctx, own, start), side(ctx, out), box(shape, steps, contiguous(shape)))


register("aten.flip.default", supports=supports, lower=lower_flip)


def supports_roll(graph: Graph, node: Node) -> str | None:
    shifts, dims = node.args["shifts"], node.args.get("dims", ())
    if not all(isinstance(n, int) for item in (shifts, dims) for n in (item if isinstance(item, tuple) else (item,))):
        return "roll by a symbolic shift is not supported"
    if len(numbers(dims)) > 3:
        return "roll along more than three axes is not supported"
    return supports(graph, node)


def lower_roll(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
    """Each rolled axis falls into two parts that change places: one dispatch for every combination of parts."""
    own, out = ref(node), ctx.out(node)
    shape = ctx.shape(own)
    dims = numbers(node.args.get("dims", ()))
    if not dims:
        shape, dims = (ctx.numel(own),), (0,)  # rolls the flattened tensor
    if 0 in shape:
        return
    shift = dict.fromkeys(range(len(shape)), 0)
    for axis, by in zip(dims, numbers(node.args["shifts"]), strict=True):
        if shape:
            shift[axis_of(axis, len(shape))] += by
    steps = contiguous(shape)
    parts = []
    for axis, size in enumerate(shape):
        cut = shift[axis] % size
        parts.append([(0, cut, size - cut), (size - cut, 0, cut)] if cut else [(0, 0, size)])
    for combination in product(*parts):
        source = sum(begin * step for (begin, _, _), step in zip(combination, steps, strict=True))
        target = sum(begin * step for (_, begin, _), step in zip(combination, steps, strict=True))
        axes = [Axis(size, (step, step)) for (_, _, size), step in zip(combination, steps, strict=True)]
        yield from strided_copy(ctx, side(ctx, own, source), side(ctx, out, target), axes)


register("aten.roll.default", supports=supports_roll, lower=lower_roll)
