"""Products of few rows with weights [N, K] on devices with subgroups: gemv_stream.wgsl and gemv_stream_siblings.wgsl.

Weights are 32-bit or 16-bit floats, or packed in 4 or 8 bits (`packed.py`).

What matrix products and `webgpu.project` have in common: the choice of the sizes of a workgroup, and the dispatch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from .. import wgsl
from .base import Dispatch, Limits, Lowering
from .packed import Format

MAX_ROWS = 8
"""Rows of x whose sums a lane keeps."""
LEAST_SUBGROUP = 4
WORKGROUP = 256
"""Invocations of a workgroup."""
UNROLL = 2
"""Cells of each weight row that a lane asks for before it uses them."""
LEAST_CELLS = 2
"""Cells of a weight row that a lane has at least, where a row has so many."""
GPU_LOADS = 1 << 19
"""Weight rows times lanes that share each, which keep a large GPU busy (132 multiprocessors of 2,048 threads with two
rows each): rows are shared by more lanes until there are as many."""
MANY_ROWS = 4
"""From so many rows of x on, loads of x outweigh those of weights, and four weight rows of a lane share them, where
there are enough."""

WIDTH = {"f16": 8, "f32": 4}
"""Elements in 16 bytes."""
_CELLS = {"f16": "gemv_stream_f16", "f32": "gemv_stream_f32"}
_COLUMNS = {2: "gemv_stream_columns_2", 4: "gemv_stream_columns_4"}
_PACKED_COLUMNS = {2: "gemv_stream_packed_2", 4: "gemv_stream_packed_4"}
_BITS = {4: "gemv_stream_bits_4", 8: "gemv_stream_bits_8"}
"""Parts of the shaders."""

PACKED_SUBGROUP = 8
"""Smallest subgroup for packed weights: so many lanes find the range of the columns of a cell."""
PACKED_WORKGROUP = 512
"""Invocations of a workgroup, which share one x in workgroup memory; twice as many where that x is large."""
LARGE_X = 16384
STAGED_BYTES = {1: 28672, 2: 28672, 4: 20480, 8: 40960}
"""Of workgroup memory for x beside packed weights, by rows of x: workgroups share a multiprocessor up to about 48 KiB
together."""
STAGED_SPARE = 6144
"""Of workgroup memory that sums take."""
_STAGED_CELL = {4: 112, 8: 80}
"""Bytes of a cell of x there, by bits of a code."""
PACKED_LOADS = 1 << 18
"""As `GPU_LOADS`, for packed weights, whose cells are more work each."""
PACKED_WORKGROUPS = 256
"""Workgroups that keep a large GPU busy: with more, one takes several sets of weight rows for one x."""
MOST_SETS = 4


@dataclass(frozen=True, slots=True)
class Tensor:
    """A value index (or scratch index) and the WGSL type of its elements."""

    id: int
    type: str


@dataclass(frozen=True, slots=True)
class Projection:
    """x [m, k] times weights [n, k], in numbers.

    Attributes:
        x, weights, outs: one result a weight; one in all where `gated`.
        sizes: n of each weight.
        eps: of the RMSNorm over rows of x that goes before; None: no norm.
        norm: its weight [k], or None.
        gated: silu(x w0^T) * (x w1^T) of exactly two weights of one size.
        bias: [n], of a single weight, or None.
        residual: [m, n], of a single weight or gated, or None.
        formats: of each weight that is packed (`packed.py`), else None; (): no weight is packed.
    """

    x: Tensor
    m: int
    k: int
    weights: tuple[Tensor, ...]
    sizes: tuple[int, ...]
    outs: tuple[Tensor, ...]
    eps: float | None = None
    norm: Tensor | None = None
    gated: bool = False
    bias: Tensor | None = None
    residual: Tensor | None = None
    formats: tuple[Format | None, ...] = ()

    @property
    def format(self) -> Format | None:
        """Of the first weight."""
        return self.formats[0] if self.formats else None


@dataclass(frozen=True, slots=True)
class Choice:
    """How work is cut: invocations of a workgroup, lanes that share weight rows, weight rows of a lane, unrolling; of
    packed weights, sets of weight rows that a lane takes one after the other."""

    workgroup: int
    lanes: int
    columns: int
    unroll: int
    sets: int = 1


def fits(limits: Limits, p: Projection) -> bool:
    """Whether the kernels take a product: few rows, a device with subgroups, weights of one type in whole cells."""
    if len(set(p.formats)) > 1:
        return False
    if p.format is not None:
        return _fits_packed(limits, p, p.format)
    kinds = {weight.type for weight in p.weights}
    return (
        limits.subgroup_size >= LEAST_SUBGROUP
        and 0 < p.m <= MAX_ROWS
        and len(kinds) == 1
        and p.k > 0
        and p.k % WIDTH[p.weights[0].type] == 0
        and min(p.sizes) > 0
    )


def _fits_packed(limits: Limits, p: Projection, form: Format) -> bool:
    """As `fits`; every cell of codes belongs to one group, rows of x are read by fours."""
    return (
        limits.subgroup_size >= PACKED_SUBGROUP
        and 0 < p.m <= MAX_ROWS
        and form.bits in _BITS
        and p.k % 4 == 0
        and (form.group % form.per_cell == 0 or form.groups == 1)
        and min(p.sizes) > 0
    )


def _power(value: int) -> int:
    """The largest power of two that is at most `value`."""
    return 1 << (max(value, 1).bit_length() - 1)


def rows_of(m: int) -> int:
    """Rows that a kernel variant computes: the smallest of 1, 2, 4, 8 that is at least m."""
    return 1 << (m - 1).bit_length()


def choose(limits: Limits, p: Projection) -> Choice:
    """Sizes for a product, from its sizes and the device's limits alone."""
    if p.format is not None:
        return _choose_packed(limits, p, p.format)
    cells = p.k // WIDTH[p.weights[0].type]
    total = sum(p.sizes)
    largest = _power(min(WORKGROUP, limits.max_invocations))
    lanes = min(32, largest, _power(cells))
    columns = 4 if p.m >= MANY_ROWS and total * lanes >= GPU_LOADS else 2
    while lanes < largest and 2 * lanes * LEAST_CELLS <= cells and total * lanes < GPU_LOADS:
        lanes *= 2
    return Choice(largest, lanes, columns, UNROLL)


def _choose_packed(limits: Limits, p: Projection, form: Format) -> Choice:
    total, rows = sum(p.sizes), rows_of(p.m)
    few = rows < MANY_ROWS  # more rows take more registers, and memory for x: smaller workgroups share it
    cell = _STAGED_CELL[form.bits] * rows
    most = _power(min(STAGED_BYTES[rows], limits.max_workgroup_memory - STAGED_SPARE) // cell)  # cells of x at a time
    largest = _power(min(PACKED_WORKGROUP if few else WORKGROUP, limits.max_invocations))
    cells = _power(form.cells)
    lanes = min(32, most, cells)
    while 2 * lanes <= min(largest, most, cells) and total * lanes < (PACKED_LOADS if few else PACKED_LOADS // 2):
        lanes *= 2
    unroll = 2 if 2 * lanes <= most and form.cells > lanes else 1
    if few and lanes * unroll * cell > LARGE_X:
        largest = _power(min(2 * PACKED_WORKGROUP, limits.max_invocations))
    columns = 4 if total * lanes >= GPU_LOADS else 2
    sets = 1
    per_workgroup = largest // lanes * columns // (2 if p.gated else 1)
    if few and form.cells <= lanes * unroll:
        while sets < MOST_SETS and max(p.sizes) >= 2 * sets * per_workgroup * PACKED_WORKGROUPS:
            sets *= 2
    return Choice(largest, lanes, columns, unroll, sets)


@cache
def _body(columns: int, kind: str) -> str:
    return "\n".join(wgsl.source(name) for name in ("gemv_stream_sums", _COLUMNS[columns], _CELLS[kind]))


@cache
def _packed_body(columns: int, bits: int) -> str:
    names = ("gemv_stream_packed", _PACKED_COLUMNS[columns], _BITS[bits])
    return "\n".join(wgsl.source(name) for name in names)


def stream(ctx: Lowering, p: Projection) -> Iterator[Dispatch]:
    """One dispatch; `fits` holds."""
    choice = choose(ctx.limits, p)
    form = p.format
    kind = p.weights[0].type
    meet = min(choice.lanes, 32, _power(ctx.limits.subgroup_size))
    per_group = choice.workgroup // choice.lanes * choice.columns * choice.sets // (2 if p.gated else 1)
    groups = [-(-n // per_group) for n in p.sizes]
    single = len(p.weights) == 1 or p.gated
    consts: dict[str, int | float | bool] = {
        "WG": choice.workgroup, "LANES": choice.lanes, "MEET": meet, "COLS": choice.columns, "UNROLL": choice.unroll,
        "ROWS": rows_of(p.m), "NORM": p.eps is not None, "NORM_WEIGHT": p.norm is not None, "GATED": p.gated,
    }  # fmt: skip
    types = {"X": f"vec4<{p.x.type}>", "Norm": f"vec4<{'f32' if p.norm is None else p.norm.type}>"}
    bindings = {"x": p.x.id, **{f"w{i}": weight.id for i, weight in enumerate(p.weights)}}
    if p.norm is not None:
        bindings["norm"] = p.norm.id
    row = p.k // WIDTH[kind] if form is None else form.words // 4
    params = {"m": p.m, "cells": row, "k": float(p.k), "eps": 0.0 if p.eps is None else p.eps}
    if form is None:
        body = _body(choice.columns, kind)
    else:
        body = _packed_body(choice.columns, form.bits)
        consts |= {
            "SETS": choice.sets, "GROUP_CELLS": max(form.group // form.per_cell, 1) if form.groups > 1 else form.cells,
            "SCALE_WORDS": form.scale_words, "SCALE_F16": form.scale == "f16", "ZEROS": form.zeros,
        }  # fmt: skip
    if single:
        for name, tensor in (("bias", p.bias), ("residual", p.residual), ("out", p.outs[0])):
            types[name.capitalize()] = "f32" if tensor is None else tensor.type
            if tensor is not None:
                bindings[name] = tensor.id
        consts |= {"BIAS": p.bias is not None, "RESIDUAL": p.residual is not None}
        yield Dispatch(
            "gemv_stream",
            bindings,
            {**params, "n": p.sizes[0], "groups": groups[0]},
            ctx.fold_grid(groups[0]),
            consts=consts,
            types=types,
            body=body,
        )
        return
    ends = [sum(groups[: i + 1]) for i in range(len(groups))]
    for i in range(3):
        bindings[f"y{i}"] = p.outs[i].id if i < len(p.outs) else ctx.scratch("f32", 1)
        types[f"Y{i}"] = p.outs[i].type if i < len(p.outs) else "f32"
    yield Dispatch(
        "gemv_stream_siblings",
        bindings,
        {**params, "n": _four(p.sizes), "ends": _four(ends + ends[-1:])},
        ctx.fold_grid(ends[-1]),
        consts=consts,
        types=types,
        body=body,
    )


def _four(values: list[int] | tuple[int, ...]) -> tuple[int, int, int, int]:
    found = [*values, 0, 0, 0, 0]
    return found[0], found[1], found[2], found[3]
