"""Packs quantised weights, and bfloat16, into the words of `ops/packed.py`. numpy only."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..ops.packed import Format

Array = np.ndarray[Any, Any]
_CHUNK = 1 << 24
"""Codes packed at a time, so that a large table needs little memory besides itself and its packed form."""


class QuantizationError(ValueError):
    """Quantised weights that mean nothing: wrong shapes, groups that do not divide, scales that are not finite."""


def pack(
    codes: Array, scales: Array, zeros: Array | None, bits: int, scale_type: str, name: str
) -> tuple[Array, Format]:
    """Words and format of a matrix.

    Args:
        codes: [N, K], integers in 0 .. 2^bits - 1.
        scales: [N, groups] floats: exact in `scale_type`.
        zeros: [N, groups], what is subtracted from codes; None: 2^(bits - 1) everywhere, which is also recognised.
        scale_type: `f16` or `f32`.
        name: of the weight, for messages.
    Returns:
        ([N, words] uint32, format): see `ops/packed.py`.
    Raises:
        QuantizationError: shapes do not fit, codes are out of range, scales or zeros are not finite or not exact.
    """
    if codes.ndim != 2 or scales.ndim != 2 or scales.shape[0] != codes.shape[0]:
        raise QuantizationError(f"{name}: weights {list(codes.shape)} and scales {list(scales.shape)} do not fit")
    rows, columns = codes.shape
    groups = scales.shape[1]
    if columns == 0 or groups == 0 or columns % groups:
        raise QuantizationError(f"{name}: {groups} groups a row do not divide {columns} columns")
    if zeros is not None and zeros.shape != scales.shape:
        raise QuantizationError(f"{name}: zero points {list(zeros.shape)} and scales {list(scales.shape)} differ")
    if codes.size and (int(codes.min()) < 0 or int(codes.max()) >> bits):
        raise QuantizationError(f"{name}: values from {codes.min()} to {codes.max()} do not fit {bits} bits")
    kind = np.dtype("<f2" if scale_type == "f16" else "<f4")
    stored_zeros = None
    if zeros is not None and np.any(zeros != 1 << (bits - 1)):
        stored_zeros = _exact(zeros, kind, f"{name}: zero points")
    form = Format(columns, bits, columns // groups, scale_type, stored_zeros is not None)
    words = np.zeros((rows, form.words), np.uint32)
    step = max(_CHUNK // columns, 1)
    for first in range(0, rows, step):
        words[first : first + step, : 4 * form.cells] = _words(codes[first : first + step], form)
    _place(words, 4 * form.cells, _exact(scales, kind, f"{name}: scales"))
    if stored_zeros is not None:
        _place(words, 4 * form.cells + form.scale_words, stored_zeros)
    return words, form


def pack_bf16(bits: Array) -> tuple[Array, Format]:
    """Words and format of a matrix of bfloat16.

    Args:
        bits: [N, K] uint16.
    Returns:
        ([N, words] uint32, format): see `ops/packed.py`. The same memory where K is a multiple of eight.
    """
    form = Format.bf16(bits.shape[1])
    if form.k % form.per_cell:
        bits = np.pad(bits, ((0, 0), (0, 2 * form.words - form.k)))
    return np.ascontiguousarray(bits).view("<u4"), form


def _exact(values: Array, kind: np.dtype[Any], what: str) -> Array:
    if not np.all(np.isfinite(values)):
        raise QuantizationError(f"{what} are not finite")
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(values, kind)
    if not np.array_equal(stored.astype(np.float64), np.asarray(values, np.float64)):
        raise QuantizationError(f"{what} are not exact in {kind}")
    return stored


def _words(codes: Array, form: Format) -> Array:
    """[rows, 4 * cells] words of codes [rows, K]."""
    rows = codes.shape[0]
    filled = np.full((rows, form.cells * form.per_cell), form.middle, np.uint32)
    filled[:, : form.k] = codes
    per_word = 32 // form.bits
    column = np.arange(per_word)
    shifts = (8 * (column % 4) + form.bits * (column // 4)).astype(np.uint32)
    split = filled.reshape(rows, -1, per_word)
    found = np.zeros(split.shape[:2], np.uint32)
    for i in range(per_word):
        found |= split[:, :, i] << shifts[i]
    return found


def _place(words: Array, at: int, values: Array) -> None:
    """Write rows of floats into words from `at` on."""
    if values.dtype.itemsize == 4:
        words[:, at : at + values.shape[1]] = values.view("<u4")
        return
    even = np.zeros((values.shape[0], -(-values.shape[1] // 2) * 2), values.dtype)
    even[:, : values.shape[1]] = values
    words[:, at : at + even.shape[1] // 2] = even.view("<u4")


def unpack_bits(packed: Array, bits: int, low_first: bool) -> Array:
    """uint8 [N, K] codes from bytes [N, K * bits / 8] that hold several, the first column in the low or high bits."""
    per = 8 // bits
    raw = packed.view(np.uint8)
    order = range(per) if low_first else reversed(range(per))
    parts = [(raw >> np.uint8(bits * i)) & np.uint8((1 << bits) - 1) for i in order]
    return np.stack(parts, axis=-1).reshape(raw.shape[0], -1)
