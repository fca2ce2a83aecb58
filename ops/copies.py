"""Copies between boxes of elements: what the layout, indexing and cache operators lower to. Registers no operator."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

from ..backend.graph import FLOATS, Dim, Ref
from . import strides
from .base import Dispatch, Lowering, Param

WORKGROUP = 64
_NARROW = {"i16": 16, "i8": 8}


@dataclass(frozen=True, slots=True)
class Moving:
    """A live offset: `scale` elements times the value of `dim`, to which `wrap` is added where it is negative.

    `high` is the largest value allowed: a source beyond it is clamped, a destination beyond it is not written.
    """

    dim: Dim
    scale: int
    wrap: int
    high: int


@dataclass(frozen=True, slots=True)
class Side:
    """One side of a copy: a value (or scratch) index, its host dtype, and where in it the copy starts, in elements."""

    value: int
    dtype: str
    offset: int = 0
    moving: Moving | None = None


@dataclass(frozen=True, slots=True)
class Axis:
    """An axis of the box that is copied: its size and its stride, in elements, in each of the tensors involved."""

    size: int
    strides: tuple[int, ...]


def box(shape: Sequence[int], *strides: Sequence[int]) -> list[Axis]:
    """The axes of a box from its sizes and the strides in each tensor."""
    return [Axis(size, tuple(steps)) for size, *steps in zip(shape, *strides, strict=True)]


def merge(axes: Iterable[Axis]) -> list[Axis]:
    """The same box with axes of size 1 dropped and neighbours joined where every tensor walks through both evenly."""
    given = [axis for axis in axes if axis.size != 1]
    sizes, steps = strides.merge([a.size for a in given], *zip(*(a.strides for a in given), strict=True))
    if len(sizes) > strides.MAX_RANK:
        raise ValueError(f"a copy over {len(sizes)} axes reached the kernels, which take {strides.MAX_RANK}")
    return box(sizes, *steps)


def table(numbers: Iterable[int]) -> tuple[int, ...]:
    """Per-axis numbers as a params array."""
    return strides.pad(tuple(numbers))


def conversion(source: str, target: str) -> tuple[str, bool]:
    """The body of `convert(X) -> Out` from one host dtype to another, as PyTorch casts, and whether it takes vec4."""
    if target == "bool" and source != "bool":
        # Bits, not a comparison: compilers may assume that there is no NaN, and NaN is true.
        test = "(bitcast<u32>(f32(v)) & 0x7fffffffu) != 0u" if source in FLOATS else "v != 0"
        return f"fn convert(v: X) -> Out {{ return select(0u, 1u, {test}); }}\n", False
    if target in ("i16", "i8", "u8") and source not in (target, "bool"):
        if target == "u8":
            return "fn convert(v: X) -> Out { return i32(v) & 255; }\n", False
        shift = 32 - _NARROW[target]
        return f"fn convert(v: X) -> Out {{ return (i32(v) << {shift}u) >> {shift}u; }}\n", False
    return "fn convert(v: X) -> Out { return Out(v); }\n", True


def _by_four(axes: Sequence[Axis], unit: tuple[int, ...], *others: int) -> bool:
    """Whether the box falls into runs of four: the last axis has strides `unit`, all else is divisible by 4."""
    if not axes or axes[-1].strides != unit or axes[-1].size % 4 or any(n % 4 for n in others):
        return False
    return all(step % 4 == 0 for axis in axes[:-1] for step in axis.strides)


def _quarter(axes: Sequence[Axis]) -> list[Axis]:
    *outer, last = axes
    return [*(Axis(a.size, tuple(s // 4 for s in a.strides)) for a in outer), Axis(last.size // 4, last.strides)]


def strided_copy(ctx: Lowering, source: Side, target: Side, axes: Iterable[Axis]) -> Iterator[Dispatch]:
    """Copy a box; the strides of `axes` are (in the source, in the target). No dispatch for an empty box."""
    axes = merge(axes)
    count = prod(axis.size for axis in axes)
    if count == 0:
        return
    body, wide = conversion(source.dtype, target.dtype)
    scales = [side.moving.scale if side.moving else 0 for side in (source, target)]
    unit = 4 if wide and _by_four(axes, (1, 1), source.offset, target.offset, *scales) else 1
    if unit == 4:
        axes = _quarter(axes)
    params: dict[str, Param] = {
        "count": count // unit,
        "sizes": table(axis.size for axis in axes),
        "x_strides": table(axis.strides[0] for axis in axes),
        "out_strides": table(axis.strides[1] for axis in axes),
    }
    for name, side in (("x", source), ("out", target)):
        moving = side.moving
        params[f"{name}_offset"] = side.offset // unit
        params[f"{name}_slot"] = ctx.live(moving.dim) if moving else 0
        params[f"{name}_scale"] = moving.scale // unit if moving else 0
        params[f"{name}_wrap"] = moving.wrap if moving else 0
        params[f"{name}_max"] = moving.high if moving else 0
    yield Dispatch(
        "strided_copy",
        {"x": source.value, "out": target.value},
        params,
        ctx.grid_1d(count // unit, WORKGROUP),
        consts={"RANK": len(axes)},
        types=_types(ctx, source, target, unit),
        body=body,
    )


def _types(ctx: Lowering, source: Side, target: Side, unit: int) -> dict[str, str]:
    kinds = {"X": ctx.stored_as(source.value, source.dtype), "Out": ctx.stored_as(target.value, target.dtype)}
    return {name: f"vec4<{kind}>" for name, kind in kinds.items()} if unit == 4 else kinds


@dataclass(frozen=True, slots=True)
class Rows:
    """The data-dependent coordinate of an indexed copy.

    Attributes:
        index: value (or scratch) index of the i32 rows.
        stride: elements from one row to the next, in the source of a gather or the target of a scatter.
        limit: rows there are; others are clamped (gather) or skipped (scatter).
        wrap: added to a negative row (0: a negative row is out of range).
    """

    index: int
    stride: int
    limit: int
    wrap: int


def indexed_copy(
    ctx: Lowering, source: Side, target: Side, rows: Rows, axes: Iterable[Axis], scatter: bool
) -> Iterator[Dispatch]:
    """Copy a box whose place in one tensor depends on an index; the strides of `axes` are (source, target, index)."""
    axes = merge(axes)
    count = prod(axis.size for axis in axes)
    if count == 0 or rows.limit == 0:
        return
    body, wide = conversion(source.dtype, target.dtype)
    unit = 1
    if wide and all(axis.strides[2] == 0 for axis in axes[-1:]):
        moved = [Axis(axis.size, axis.strides[:2]) for axis in axes]
        unit = 4 if _by_four(moved, (1, 1), rows.stride, source.offset, target.offset) else 1
    sides = [Axis(axis.size, axis.strides[:2]) for axis in axes]
    if unit == 4:
        sides = _quarter(sides)
    yield Dispatch(
        "indexed_copy",
        {"x": source.value, "idx": rows.index, "out": target.value},
        {
            "count": count // unit,
            "x_offset": source.offset // unit,
            "out_offset": target.offset // unit,
            "row_stride": rows.stride // unit,
            "limit": rows.limit,
            "wrap": rows.wrap,
            "sizes": table(axis.size for axis in sides),
            "x_strides": table(axis.strides[0] for axis in sides),
            "out_strides": table(axis.strides[1] for axis in sides),
            "idx_strides": table(axis.strides[2] for axis in axes),
        },
        ctx.grid_1d(count // unit, WORKGROUP),
        consts={"RANK": len(axes), "SCATTER": scatter},
        types=_types(ctx, source, target, unit),
        body=body,
    )


def side(ctx: Lowering, ref: Ref, offset: int = 0, moving: Moving | None = None) -> Side:
    """A side of a copy for a value of the graph."""
    return Side(ref.value, ctx.dtype(ref), offset, moving)


def copy_all(ctx: Lowering, source: Ref, target: Ref) -> Iterator[Dispatch]:
    """Copy a whole tensor to another of as many elements, with a cast; nothing where both are one buffer."""
    if not ctx.shares_storage(source, target):
        yield from strided_copy(ctx, side(ctx, source), side(ctx, target), [Axis(ctx.numel(target), (1, 1))])


def detached(ctx: Lowering, source: Ref, written: Ref) -> tuple[Side, list[Dispatch]]:
    """`source` to be read by a dispatch that writes `written`, and the dispatches needed before.

    WebGPU forbids a dispatch to read and write one buffer, so a source in the written buffer is copied to scratch.
    """
    own = side(ctx, source)
    if not ctx.shares_storage(source, written):
        return own, []
    count = ctx.numel(source)
    scratch = Side(ctx.scratch(own.dtype, count), own.dtype)
    return scratch, list(strided_copy(ctx, own, scratch, [Axis(count, (1, 1))]))


def offsets_of(lengths: Sequence[int]) -> list[int]:
    """Where each of several consecutive pieces starts."""
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    return [a for a, _ in pairwise(starts)]
