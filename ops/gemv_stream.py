"""Products of few rows with weights [N, K] on devices with subgroups: gemv_stream.wgsl and gemv_stream_siblings.wgsl.

What matrix products and `webgpu.project` have in common: the choice of the sizes of a workgroup, and the dispatch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from .. import wgsl
from .base import Dispatch, Limits, Lowering

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
"""Parts of the shaders."""


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


@dataclass(frozen=True, slots=True)
class Choice:
    """How work is cut: invocations of a workgroup, lanes that share weight rows, weight rows of a lane, unrolling."""

    workgroup: int
    lanes: int
    columns: int
    unroll: int


def fits(limits: Limits, p: Projection) -> bool:
    """Whether the kernels take a product: few rows, a device with subgroups, weights of one type in whole cells."""
    kinds = {weight.type for weight in p.weights}
    return (
        limits.subgroup_size >= LEAST_SUBGROUP
        and 0 < p.m <= MAX_ROWS
        and len(kinds) == 1
        and p.k > 0
        and p.k % WIDTH[p.weights[0].type] == 0
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
    cells = p.k // WIDTH[p.weights[0].type]
    total = sum(p.sizes)
    largest = _power(min(WORKGROUP, limits.max_invocations))
    lanes = min(32, largest, _power(cells))
    columns = 4 if p.m >= MANY_ROWS and total * lanes >= GPU_LOADS else 2
    while lanes < largest and 2 * lanes * LEAST_CELLS <= cells and total * lanes < GPU_LOADS:
        lanes *= 2
    return Choice(largest, lanes, columns, UNROLL)


@cache
def _body(columns: int, kind: str) -> str:
    return "\n".join(wgsl.source(name) for name in ("gemv_stream_sums", _COLUMNS[columns], _CELLS[kind]))


def stream(ctx: Lowering, p: Projection) -> Iterator[Dispatch]:
    """One dispatch; `fits` holds."""
    choice = choose(ctx.limits, p)
    kind = p.weights[0].type
    meet = min(choice.lanes, 32, _power(ctx.limits.subgroup_size))
    per_group = choice.workgroup // choice.lanes * choice.columns // (2 if p.gated else 1)
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
    params = {
        "m": p.m, "cells": p.k // WIDTH[kind], "k": float(p.k), "eps": 0.0 if p.eps is None else p.eps,
    }  # fmt: skip
    body = _body(choice.columns, kind)
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
