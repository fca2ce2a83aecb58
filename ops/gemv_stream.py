"""Products of few rows with weights [N, K] on devices with subgroups: gemv_stream.wgsl and gemv_stream_siblings.wgsl.

Weights are 32-bit or 16-bit floats (float16, or bfloat16 in words), or packed in 4 or 8 bits (`packed.py`).
More than `MAX_ROWS` rows go by in passes of one dispatch, up to `MAX_PASSES` with packed weights and
`MAX_FLOAT_PASSES` with others. With packed weights x may be integers of 8 bits (`activations.py`), or be quantised to
these on the way.

What matrix products and `webgpu.project` have in common: the choice of the sizes of a workgroup, and the dispatch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

from .. import wgsl
from .base import Const, Dispatch, Limits, Lowering, Param
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

WIDTH = {"f16": 8, "bf16": 8, "f32": 4}
"""Elements in 16 bytes."""
_CELLS = {kind: f"gemv_stream_{kind}" for kind in WIDTH}
_COLUMNS = {2: "gemv_stream_columns_2", 4: "gemv_stream_columns_4"}
_PACKED_COLUMNS = {2: "gemv_stream_packed_2", 4: "gemv_stream_packed_4"}
BITS = {4: "gemv_stream_bits_4", 8: "gemv_stream_bits_8"}
_DIGITS = ("gemv_stream_packed_digits",)
_COPIED = ("gemv_stream_packed_bytes", "gemv_stream_packed_codes")
_QUANTIZED = ("gemv_stream_packed_bytes", "gemv_stream_packed_quantize", "quantize_range", "quotient")
SIBLINGS = "gemv_stream_weights"
"""Parts of the shaders; `SIBLINGS` of those with up to three weights."""
CODES = "u32"
"""The dtype in the graph of activations that are integers of 8 bits (`activations.py`)."""

PACKED_SUBGROUP = 8
"""Smallest subgroup for packed weights: so many lanes find the range of the columns of a cell."""
PACKED_WORKGROUP = 512
"""Invocations of a workgroup, which share one x in workgroup memory; twice as many where that x is large and one
workgroup fills a multiprocessor anyhow, half as many where a large matrix and few registers let several share one."""
LEAST_PACKED = 32
"""Invocations of a workgroup at least, where memory for sums is short or there are few rows of weights."""
LARGE_X = 16384
STAGED_BYTES = 36864
"""Of workgroup memory for x beside packed weights: workgroups share a multiprocessor up to about 48 KiB together."""
STAGED_SPARE = 6144
"""Of workgroup memory that sums take."""
PACKED_LOADS = 1 << 18
"""As `GPU_LOADS`, for packed weights, whose cells are more work each."""
PACKED_WORKGROUPS = 96
"""Workgroups that keep a large GPU busy."""
PACKED_LANES = 1 << 17
"""Invocations that keep it busy with one row of x, half as many with several: where there are more, a workgroup takes
several sets of weight rows for one x."""
MOST_SETS = 8
FEW_ROWS = 2
"""Rows of x up to which registers are plenty."""
QUANTIZED_ROWS, QUANTIZED_COLUMNS = 2, 1 << 16
"""Rows of x that every workgroup quantises for itself at most, and rows of weights below which it does: above, a
dispatch for all workgroups is faster."""
PASS_ROWS = {1: MAX_ROWS, 2: MAX_ROWS, 3: 5}
"""Rows of x that a workgroup takes beside packed weights, by digits: with more, too little of x fits its memory."""
MAX_PASSES = {1: 40, 2: 40, 3: 16}
"""Rows of x up to which passes over packed weights are faster than tiles (`gemm.py`), by digits."""
MAX_FLOAT_PASSES = 2 * MAX_ROWS
"""The same for weights of floats."""


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
        dtype: of what is multiplied, x or the normed x, in the graph, which may store it wider: packed weights cut
            what has 16 bits there into fewer digits. `CODES`: x is rows of integers (`activations.py`); k still
            counts columns.
        span: x, or its norm, is quantised to 8 bits row by row: low and high of codes, least scale, and what is taken
            off codes to make them signed bytes; or None.
        symmetric: whether zero is in the middle of what is quantised so.
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
    dtype: str = "f32"
    span: tuple[float, float, float, float] | None = None
    symmetric: bool = False

    @property
    def digits(self) -> int:
        """Of 8 bits that an element of x has beside packed weights; gemv_stream_packed.wgsl says how exact that is."""
        return 1 if self.coded or self.span else 2 if self.dtype in ("f16", "bf16") else 3

    @property
    def coded(self) -> bool:
        """Whether x is integers already."""
        return self.dtype == CODES

    @property
    def format(self) -> Format | None:
        """Of the first weight."""
        return self.formats[0] if self.formats else None


@dataclass(frozen=True, slots=True)
class Choice:
    """How work is cut: invocations of a workgroup, lanes that share weight rows, weight rows of a lane, unrolling; of
    packed weights, sets of weight rows that a lane takes one after the other, and cells of x in workgroup memory at a
    time, a multiple of lanes * unroll."""

    workgroup: int
    lanes: int
    columns: int
    unroll: int
    sets: int = 1
    chunk: int = 0


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


def fits_passes(limits: Limits, p: Projection) -> bool:
    """Whether `stream` takes a product with more rows than `fits` allows."""
    most = MAX_FLOAT_PASSES if p.format is None else MAX_PASSES[p.digits]
    return p.m <= most and fits(limits, replace(p, m=min(p.m, MAX_ROWS)))


def passes_of(p: Projection) -> int:
    """Passes of as many rows of x as a workgroup takes."""
    return -(-p.m // (MAX_ROWS if p.format is None else PASS_ROWS[p.digits]))


def fits_quantizing(limits: Limits, p: Projection) -> bool:
    """Whether `stream` quantises the x of a product itself: few rows, all of which fit workgroup memory at once."""
    form = p.format
    if (
        p.span is None
        or form is None
        or p.m > QUANTIZED_ROWS
        or sum(p.sizes) >= QUANTIZED_COLUMNS
        or not fits(limits, p)
    ):
        return False
    return choose(limits, p).chunk >= form.cells


def _fits_packed(limits: Limits, p: Projection, form: Format) -> bool:
    """As `fits`; every cell of codes belongs to one group, rows of x are read by fours."""
    return (
        limits.subgroup_size >= PACKED_SUBGROUP
        and 0 < p.m <= MAX_ROWS
        and form.bits in BITS
        and p.k % 4 == 0
        and (form.group % form.per_cell == 0 or form.groups == 1)
        and min(p.sizes) > 0
    )


def _power(value: int) -> int:
    """The largest power of two that is at most `value`."""
    return 1 << (max(value, 1).bit_length() - 1)


def rows_of(m: int) -> int:
    """Rows that a kernel variant for floats computes: the smallest of 1, 2, 4, 8 that is at least m."""
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


def _staged(p: Projection, form: Format) -> int:
    """Bytes of workgroup memory that a cell of all rows of x takes: digits, the unit, the sum where it is needed."""
    return p.m * (p.digits * form.per_cell + (8 if form.zeros else 4))


def packed_memory(p: Projection, form: Format, choice: Choice, meet: int) -> int:
    """Bytes of workgroup memory of a kernel with packed weights, in which `meet` lanes meet by shuffles."""
    sums = 4 * p.m * choice.workgroup // meet * (choice.sets * choice.columns + 1)
    ranges = 16 * p.m * (choice.workgroup // PACKED_SUBGROUP) if p.span else 0
    return choice.chunk * _staged(p, form) + sums + ranges + 4 * p.m + (0 if form.zeros else 4)


def _choose_packed(limits: Limits, p: Projection, form: Format) -> Choice:
    total, cell = sum(p.sizes), _staged(p, form)
    few, short = p.m <= FEW_ROWS, p.digits <= 2
    largest = _power(min(PACKED_WORKGROUP, limits.max_invocations))
    most = max(min(STAGED_BYTES, limits.max_workgroup_memory - STAGED_SPARE) // cell, 1)  # cells of x at a time
    longest = min(largest, _power(most), _power(form.cells))
    lanes = min(32, longest)
    while 2 * lanes <= longest and total * lanes < (PACKED_LOADS if few else PACKED_LOADS // 2):
        lanes *= 2
    alone = few and min(most, form.cells) * cell > LARGE_X  # one workgroup fills a multiprocessor
    size = _power(min(2 * PACKED_WORKGROUP, limits.max_invocations)) if alone else largest
    columns = 4 if total * lanes >= (GPU_LOADS if p.m == 1 else 4 * size * PACKED_WORKGROUPS) else 2
    if columns == 4:
        size = max(largest // 2, lanes) if short and lanes <= 32 and p.m <= MANY_ROWS else largest
    while not few and size > max(lanes, LEAST_PACKED) and total * lanes < size * columns * PACKED_WORKGROUPS:
        size //= 2
    if not few and columns == 2:  # chunks that all invocations cut at once
        most = min(most, max(size // (form.per_cell // 4), lanes))
    twice = not few or (columns == 4 and not short)
    unroll = 2 if twice and 2 * lanes <= most and form.cells > lanes else 1
    step = lanes * unroll
    chunks = -(-form.cells // (most // step * step))
    chunk = -(-form.cells // (chunks * step)) * step
    choice = Choice(size, lanes, columns, unroll, 1, chunk)
    meet = _meet(limits, choice)
    while (
        choice.workgroup > max(lanes, LEAST_PACKED)
        and packed_memory(p, form, choice, meet) > limits.max_workgroup_memory
    ):
        choice = replace(choice, workgroup=choice.workgroup // 2)
    once = max(p.sizes) * lanes // (columns // 2 if p.gated else columns)  # invocations with one set
    while chunks == 1 and choice.sets < MOST_SETS:
        more = replace(choice, sets=2 * choice.sets)
        busy = max(PACKED_LANES if p.m == 1 else PACKED_LANES // 2, PACKED_WORKGROUPS * choice.workgroup)
        if once < more.sets * busy or packed_memory(p, form, more, meet) > limits.max_workgroup_memory:
            break
        choice = more
    return choice


def _reach(limits: Limits, choice: Choice) -> int:
    """Lanes that find a range by shuffles."""
    return min(choice.workgroup, 32, _power(limits.subgroup_size))


def _meet(limits: Limits, choice: Choice) -> int:
    """Of the lanes that share weight rows, those that meet by shuffles."""
    return min(choice.lanes, 32, _power(limits.subgroup_size))


@cache
def _body(columns: int, kind: str) -> str:
    return "\n".join(wgsl.source(name) for name in ("gemv_stream_sums", _COLUMNS[columns], _CELLS[kind]))


@cache
def _packed_body(columns: int, bits: int, parts: tuple[str, ...]) -> str:
    names = ("gemv_stream_packed", *parts, _PACKED_COLUMNS[columns], BITS[bits])
    return "\n".join(wgsl.source(name) for name in names)


@dataclass(frozen=True, slots=True)
class Pieces:
    """What a product gives to the dispatch of any kernel that runs `stream` of the shaders; results are the kernel's.

    Attributes:
        columns: of a result that a workgroup makes.
    """

    columns: int
    bindings: dict[str, int]
    params: dict[str, Param]
    consts: dict[str, Const]
    types: dict[str, str]
    body: str


def pieces(ctx: Lowering, p: Projection, choice: Choice) -> Pieces:
    """The parts that the kernels have in common; `fits` holds."""
    form = p.format
    kind = p.weights[0].type
    consts: dict[str, Const] = {
        "WG": choice.workgroup, "LANES": choice.lanes, "MEET": _meet(ctx.limits, choice),
        "COLS": choice.columns, "UNROLL": choice.unroll, "ROWS": rows_of(p.m) if form is None else p.m,
        "NORM": p.eps is not None, "NORM_WEIGHT": p.norm is not None, "GATED": p.gated,
    }  # fmt: skip
    types = {"X": f"vec4<{p.x.type}>", "Norm": f"vec4<{'f32' if p.norm is None else p.norm.type}>"}
    bindings = {"x": p.x.id, **{f"w{i}": weight.id for i, weight in enumerate(p.weights)}}
    if p.norm is not None:
        bindings["norm"] = p.norm.id
    row = p.k // WIDTH[kind] if form is None else form.words // 4
    params: dict[str, Param] = {"m": p.m, "cells": row, "k": float(p.k), "eps": 0.0 if p.eps is None else p.eps}
    params["span"] = p.span or (0.0, 0.0, 0.0, 0.0)
    if form is None:
        body = _body(choice.columns, kind)
    else:
        body = _packed_body(choice.columns, form.bits, _COPIED if p.coded else _QUANTIZED if p.span else _DIGITS)
        if p.span:
            consts |= {
                "NORM": False, "NORMED": p.eps is not None, "REACH": _reach(ctx.limits, choice),
                "SYMMETRIC": p.symmetric,
            }  # fmt: skip
        consts |= {
            "SETS": choice.sets, "CHUNK": choice.chunk, "DIGITS": p.digits,
            "GROUP_CELLS": max(form.group // form.per_cell, 1) if form.groups > 1 else form.cells,
            "SCALE_WORDS": form.scale_words, "SCALE_F16": form.scale == "f16", "ZEROS": form.zeros,
        }  # fmt: skip
    columns = choice.workgroup // choice.lanes * choice.columns * choice.sets // (2 if p.gated else 1)
    return Pieces(columns, bindings, params, consts, types, body)


def stream(ctx: Lowering, p: Projection) -> Iterator[Dispatch]:
    """One dispatch; `fits` or `fits_passes` holds."""
    passes = passes_of(p)
    one = replace(p, m=-(-p.m // passes))
    made = pieces(ctx, one, choose(ctx.limits, one))
    bindings, types, params = made.bindings, made.types, {**made.params, "m": p.m}
    consts = {**made.consts, "PASSES": passes}
    groups = [-(-n // made.columns) for n in p.sizes]
    if len(p.weights) == 1 or p.gated:
        for name, tensor in (("bias", p.bias), ("residual", p.residual), ("out", p.outs[0])):
            types[name.capitalize()] = "f32" if tensor is None else tensor.type
            if tensor is not None:
                bindings[name] = tensor.id
        consts |= {"BIAS": p.bias is not None, "RESIDUAL": p.residual is not None}
        yield Dispatch(
            "gemv_stream",
            bindings,
            {**params, "n": p.sizes[0], "groups": groups[0]},
            ctx.fold_grid(groups[0] * passes),
            consts=consts,
            types=types,
            body=made.body,
        )
        return
    ends = [sum(groups[: i + 1]) for i in range(len(groups))]
    for i in range(3):
        bindings[f"y{i}"] = p.outs[i].id if i < len(p.outs) else ctx.scratch("f32", 1)
        types[f"Y{i}"] = p.outs[i].type if i < len(p.outs) else "f32"
    yield Dispatch(
        "gemv_stream_siblings",
        bindings,
        {**params, "n": four(p.sizes), "ends": four(ends + ends[-1:])},
        ctx.fold_grid(ends[-1] * passes),
        consts=consts,
        types=types,
        body=wgsl.source(SIBLINGS) + made.body,
    )


def four(values: list[int] | tuple[int, ...]) -> tuple[int, int, int, int]:
    """Numbers as a vector of four, filled up with zeros."""
    found = [*values, 0, 0, 0, 0]
    return found[0], found[1], found[2], found[3]
