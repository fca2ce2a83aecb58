"""Activations as integers of 8 bits in the layout of `ops/activations.py`, written and read in numpy, for tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from executorch_webgpu.ops.activations import words

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Coded:
    """Codes int [rows, K] and zeros int [rows], both within -128 .. 127, scales float32 [rows]."""

    codes: Array
    zeros: Array
    scales: Array

    @property
    def values(self) -> Array:
        """float64 [rows, K]."""
        return (self.codes - self.zeros[:, None]) * self.scales[:, None].astype(np.float64)

    def packed(self) -> Array:
        """u32 [rows, words]."""
        rows, k = self.codes.shape
        count = -(-k // 32)
        differences = np.zeros((rows, 32 * count), np.int64)
        differences[:, :k] = self.codes - self.zeros[:, None]
        by_block = differences.reshape(rows, count, 32)
        wide = (by_block.min(-1) < -128) | (by_block.max(-1) > 127)
        zeros = np.where(wide, self.zeros[:, None], 0).astype(np.int32)
        stored = (by_block + zeros[..., None]).astype(np.int8).reshape(rows, -1)
        found = np.full((rows, words(k)), 0xAAAAAAAA, np.uint32)
        found[:, : 8 * count] = stored.view(np.uint32)
        found[:, 8 * count : 9 * count] = zeros.view(np.uint32)
        found[:, -4] = self.scales.astype(np.float32).view(np.uint32)
        return found


def coded(rows: int, k: int, seed: int = 0) -> Coded:
    """Random rows: small numbers around the zero point, numbers that need nine bits, and both."""
    rng = np.random.default_rng(seed + 17 * rows + k)
    zeros = rng.integers(-128, 128, rows)
    zeros[: min(rows, 3)] = (-128, 127, 3)[: min(rows, 3)]
    narrow = zeros[:, None] + rng.integers(-20, 21, (rows, k))
    codes = np.where(rng.random((rows, k)) < 0.01, rng.integers(-128, 128, (rows, k)), narrow).clip(-128, 127)
    codes[rows // 2] = rng.integers(-128, 128, k)
    return Coded(codes, zeros, rng.uniform(0.01, 0.1, rows).astype(np.float32))


def read(found: Array, k: int) -> tuple[Array, Array]:
    """(differences of code and zero int [rows, K], scales float32 [rows]) of packed rows."""
    count = -(-k // 32)
    stored = np.ascontiguousarray(found[:, : 8 * count]).view(np.int8).astype(np.int64).reshape(len(found), count, 32)
    zeros = np.ascontiguousarray(found[:, 8 * count : 9 * count]).view(np.int32)
    differences = (stored - zeros[..., None]).reshape(len(found), -1)
    assert not differences[:, k:].any(), "what is past the last column stands for 0"
    return differences[:, :k], np.ascontiguousarray(found[:, -4]).view(np.float32)
