"""Packed weights: integers of 2, 4 or 8 bits with the scales of their groups, or bfloat16, in words of 32 bits.

A matrix [N, K] is a constant of dtype `u32` and shape [N, words]; what the words mean is a `Format`, which nodes carry
as a tuple of literals. The value of column k is scale * (u - zero), where u is an unsigned integer of `bits` bits and
scale and zero are those of group k // group. A row is, in this order:

    codes   ceil(K / (128 / bits)) cells of 16 bytes: 64, 32 or 16 columns each. Column c of a word (of 32 / bits
            columns) stands at bit 8 * (c % 4) + bits * (c // 4): one mask takes four neighbours as the bytes of a
            word. Columns past K have the code 2^(bits - 1).
    scales  one of each group, as 16-bit floats (two in a word, the even one low) or 32-bit floats; filled up to a word
    zeros   of each group, in the type of the scales; left out where all of them are 2^(bits - 1)

filled up to 16 bytes. So lanes that go along K ask for neighbouring 16 bytes, and the scales of neighbouring cells are
neighbours too; any run of rows is a run of words, so that a matrix can be cut into parts by rows; and a tile of a
matrix product takes four columns, which lie in one word, with one load.

A row of bfloat16 (16 bits, scale `none`) is its K numbers in their order, the even column of a word low, and zeros up
to 16 bytes: the upper halves of as many 32-bit floats, which a shift or a mask makes of them. Where K is a multiple of
eight the words are the bytes of the tensor itself.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..backend.graph import Arg, Value

BITS = (2, 4, 8)
SCALES = ("f16", "f32")
BF16 = 16
"""Bits of a format of floats."""
UNSCALED = "none"
"""Its type of scales."""


@dataclass(frozen=True, slots=True)
class Format:
    """What the words of a row mean.

    Attributes:
        k: columns of the matrix.
        bits: of a code: 2, 4 or 8; 16: the columns are bfloat16.
        group: columns that share a scale; divides k. k for bfloat16.
        scale: type of scales and zeros: f16 or f32; none for bfloat16.
        zeros: whether there are zeros.
    """

    k: int
    bits: int
    group: int
    scale: str
    zeros: bool

    def __post_init__(self) -> None:
        if self.bits == BF16:
            if self.k < 1 or (self.group, self.scale, self.zeros) != (self.k, UNSCALED, False):
                raise ValueError(f"{self.k} columns of bfloat16 in groups or with scales or zeros")
            return
        if self.bits not in BITS:
            raise ValueError(f"{self.bits} bits; packed weights have 2, 4 or 8, or 16")
        if self.scale not in SCALES:
            raise ValueError(f"scales of type {self.scale}; packed weights have f16 or f32")
        if self.k < 1 or self.group < 1 or self.k % self.group:
            raise ValueError(f"groups of {self.group} do not divide {self.k} columns")

    @staticmethod
    def bf16(k: int) -> Format:
        """Rows of k columns of bfloat16."""
        return Format(k, BF16, k, UNSCALED, False)

    @property
    def floats(self) -> bool:
        """Whether the columns are bfloat16: no codes, no scales."""
        return self.bits == BF16

    @property
    def middle(self) -> int:
        """The zero of a group where none is stored."""
        return 1 << (self.bits - 1)

    @property
    def per_cell(self) -> int:
        """Columns in 16 bytes."""
        return 128 // self.bits

    @property
    def cells(self) -> int:
        """Of the codes of a row."""
        return -(-self.k // self.per_cell)

    @property
    def groups(self) -> int:
        return self.k // self.group

    @property
    def scale_words(self) -> int:
        """Of the scales of a row, and of its zeros."""
        if self.floats:
            return 0
        return -(-self.groups // 2) if self.scale == "f16" else self.groups

    @property
    def words(self) -> int:
        """Of a row, a multiple of four."""
        return -(-(4 * self.cells + self.scale_words * (2 if self.zeros else 1)) // 4) * 4

    def literal(self) -> tuple[Arg, ...]:
        """For a node's arguments."""
        return (self.k, self.bits, self.group, self.scale, self.zeros)

    @property
    def part(self) -> str:
        """The part of kernels that read any packed weights, by fours."""
        return "packed_weights_bf16" if self.floats else "packed_weights"

    def consts(self) -> dict[str, int | float | bool]:
        """The constants that shaders which read packed weights share."""
        if self.floats:
            return {}
        return {
            "BITS": self.bits, "GROUP": self.group, "CELLS": self.cells, "SCALE_WORDS": self.scale_words,
            "SCALE_F16": self.scale == "f16", "ZEROS": self.zeros,
        }  # fmt: skip


def format_of(arg: Arg) -> Format:
    """The format in a node's argument; ValueError where it is none."""
    if not isinstance(arg, tuple) or len(arg) != 5:
        raise ValueError(f"{arg!r} is no format of packed weights")
    k, bits, group, scale, zeros = arg
    whole = all(isinstance(item, int) and not isinstance(item, bool) for item in (k, bits, group))
    if not whole or not isinstance(scale, str) or not isinstance(zeros, bool):
        raise ValueError(f"{arg!r} is no format of packed weights")
    return Format(int(str(k)), int(str(bits)), int(str(group)), scale, zeros)


def rows_of(value: Value, form: Format) -> int:
    """N of a packed matrix; ValueError where the value is none of that format."""
    if value.dtype != "u32" or len(value.shape) != 2 or value.shape[1] != form.words:
        raise ValueError(
            f"{value.name} {value.dtype}{list(value.shape)} is no matrix packed in rows of {form.words} words"
        )
    if not isinstance(value.shape[0], int):
        raise ValueError(f"{value.name} has a dynamic number of rows")
    return value.shape[0]
