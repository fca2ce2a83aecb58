"""Products of many rows of quantised activations with packed weights: see wgsl/gemm_codes.wgsl."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

from .. import wgsl
from .activations import BLOCK, blocks, words
from .base import Const, Dispatch, Limits, Lowering, Param
from .gemm import MAX_SCRATCH, merge
from .gemv_stream import Projection, Tensor
from .packed import Format

TX, TY = 8, 16
"""Lanes of a workgroup along columns and rows. Four workgroups share a large GPU's multiprocessor, so that while one
waits at its barriers others multiply (docs/KERNELS.md)."""
ROWS, COLUMNS = 4, 8
"""Of a lane."""
GPU_WORKGROUPS = 528
"""Workgroups that keep a large GPU busy, four for each of 132 multiprocessors: K is split among more of them below."""
LEAST_SPLIT = 8
"""Blocks of a split at least."""
LONGEST = 1024
"""Blocks that are added up as integers: at most 2^15 columns of products below 2^15 in magnitude."""


def takes(limits: Limits, p: Projection) -> bool:
    """Whether the kernel has a form for a projection of quantised activations: one format of weights, in groups of
    whole blocks or one group a row."""
    form = p.format
    return (
        p.coded
        and form is not None
        and len(set(p.formats)) == 1
        and p.eps is None
        and not (p.gated and p.bias is not None)
        and (form.groups == 1 or form.group % BLOCK == 0)
        and limits.max_invocations >= TX * TY
    )


def splits_of(limits: Limits, p: Projection, n: int) -> int:
    """Ranges of K at most of a product with n columns, from its sizes and the device's limits alone."""
    if p.gated or n % 4:
        return 1
    tiles = -(-n // (COLUMNS * TX)) * -(-p.m // (ROWS * TY))
    room = min(MAX_SCRATCH, limits.max_binding) // (4 * p.m * n)
    return max(min(-(-GPU_WORKGROUPS // tiles), blocks(p.k) // LEAST_SPLIT, room), 1)


@cache
def _body(bits: int) -> str:
    return wgsl.source({4: "gemm_codes_bits_4", 8: "gemm_codes_bits_8"}[bits]) + wgsl.source("gemm_codes_sums")


def gemm_codes(ctx: Lowering, p: Projection) -> Iterator[Dispatch]:
    """The products of a projection; `takes` holds. Nothing where a result has no elements.

    Gate and up are one dispatch; other siblings are one each, and what adds up their splits follows.
    """
    groups = [p.weights] if p.gated else [(weight,) for weight in p.weights]
    merges: list[Dispatch] = []
    for weights, n, out in zip(groups, p.sizes, p.outs, strict=False):
        if p.m * n == 0:
            continue
        alone = len(groups) == 1
        added = (p.bias, p.residual) if alone else (None, None)
        first, *rest = _product(ctx, p, weights, n, out, added)
        yield first
        merges += rest
    yield from merges


def _flush(form: Format) -> int:
    """Blocks after which integers are scaled: with zeros each, since what is taken off is a float."""
    return 1 if form.zeros else min(blocks(form.group), LONGEST)


def _product(
    ctx: Lowering, p: Projection, weights: tuple[Tensor, ...], n: int, result: Tensor,
    added: tuple[Tensor | None, Tensor | None],
) -> Iterator[Dispatch]:  # fmt: skip
    """One dispatch, or two where K is split."""
    form = p.format
    assert form is not None
    count = blocks(p.k)
    span = -(-count // splits_of(ctx.limits, p, n))
    splits = -(-count // span)
    out = result if splits == 1 else Tensor(ctx.scratch("f32", splits * p.m * n), "f32")
    row_tiles = -(-p.m // (ROWS * TY))
    col_tiles = -(-n // (COLUMNS * TX // (2 if p.gated else 1)))
    total = row_tiles * col_tiles * splits
    bindings = {"x": p.x.id, "w0": weights[0].id, "out": out.id}
    if p.gated:
        bindings["w1"] = weights[1].id
    types = {"Out": out.type}
    consts: dict[str, Const] = {
        "TX": TX, "TY": TY, "GATED": p.gated, "SPLIT": splits > 1,
        "FLUSH": _flush(form), "GROUP_BLOCKS": blocks(form.group), "CELLS": form.cells,
        "SCALE_WORDS": form.scale_words, "SCALE_F16": form.scale == "f16", "ZEROS": form.zeros,
    }  # fmt: skip
    for name, tensor in zip(("bias", "residual"), added, strict=True):
        types[name.capitalize()] = "f32" if tensor is None else tensor.type
        consts[name.upper()] = tensor is not None and splits == 1
        if tensor is not None and splits == 1:
            bindings[name] = tensor.id
    params: dict[str, Param] = {
        "m": p.m, "n": n, "blocks": count, "x_row": words(p.k) // 4, "w_row": form.words // 4,
        "row_tiles": row_tiles, "col_tiles": col_tiles, "span": span, "total": total,
    }  # fmt: skip
    yield Dispatch(
        "gemm_codes", bindings, params, ctx.fold_grid(total), consts=consts, types=types, body=_body(form.bits)
    )
    if splits > 1:
        yield merge(ctx, out, result, p.m, n, splits, *added)
