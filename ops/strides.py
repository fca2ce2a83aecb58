"""Index arithmetic on sizes and strides (in elements), shared by kernels that address tensors by strides."""

from __future__ import annotations

import math
from collections.abc import Sequence

MAX_RANK = 8
"""Dimensions that a strided kernel can address."""

Sizes = tuple[int, ...]


def contiguous(shape: Sequence[int]) -> Sizes:
    """The strides of a row-major tensor."""
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    return tuple(strides)


def broadcast_strides(shape: Sequence[int], target: Sequence[int]) -> Sizes:
    """The strides with which a row-major tensor of `shape` is read as one of `target` (0 where it is repeated)."""
    lead = len(target) - len(shape)
    own = contiguous(shape)
    return (0,) * lead + tuple(0 if size == 1 else stride for size, stride in zip(shape, own, strict=True))


def merge(shape: Sequence[int], *operands: Sequence[int]) -> tuple[Sizes, list[Sizes]]:
    """Drop dimensions of size 1 and merge neighbours that every operand walks through evenly.

    Returns the merged sizes (outermost first) and, for each operand, its strides.
    """
    sizes: list[int] = []
    strides: list[list[int]] = [[] for _ in operands]
    for axis, size in enumerate(shape):
        if size == 1:
            continue
        if sizes and all(mine[-1] == theirs[axis] * size for mine, theirs in zip(strides, operands, strict=True)):
            sizes[-1] *= size
            for mine, theirs in zip(strides, operands, strict=True):
                mine[-1] = theirs[axis]
            continue
        sizes.append(size)
        for mine, theirs in zip(strides, operands, strict=True):
            mine.append(theirs[axis])
    return tuple(sizes), [tuple(mine) for mine in strides]


def pad(values: Sequence[int], fill: int = 0) -> Sizes:
    """`values` as the eight numbers of an `array<vec4<u32>, 2>` params field."""
    return tuple(values) + (fill,) * (MAX_RANK - len(values))


def axis_of(dim: int, rank: int) -> int:
    """A dimension counted from the front; a scalar counts as one dimension."""
    return dim % max(rank, 1)


def around(shape: Sequence[int], dim: int) -> tuple[int, int, int]:
    """(elements before, size of, elements after) dimension `dim`: the tensor seen as [outer, size, inner]."""
    if not shape:
        return 1, 1, 1
    axis = axis_of(dim, len(shape))
    return math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])
