"""Random quantised weights with their float64 values, for the tests of packed weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from executorch_webgpu.backend.packing import pack
from executorch_webgpu.ops.packed import Format

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Quantized:
    """Codes uint8 [N, K], scales float64 [N, groups], zeros float64 [N, groups] (what is subtracted from codes)."""

    codes: Array
    scales: Array
    zeros: Array
    bits: int
    scale_type: str

    @property
    def values(self) -> Array:
        """float64 [N, K]."""
        group = self.codes.shape[1] // self.scales.shape[1]
        return (self.codes - self.zeros.repeat(group, 1)) * self.scales.repeat(group, 1)

    def packed(self) -> tuple[Array, Format]:
        return pack(self.codes, self.scales, self.zeros, self.bits, self.scale_type, "weight")


def quantized(
    n: int, k: int, bits: int = 4, group: int = 32, scale_type: str = "f32", zeros: bool = False, seed: int = 0
) -> Quantized:
    """Weights of about unit size, every code in use."""
    rng = np.random.default_rng(seed + 31 * n + 7 * k + bits)
    groups = k // group
    kind = np.float16 if scale_type == "f16" else np.float32
    scales = (rng.uniform(0.5, 2.0, (n, groups)) / (1 << (bits - 1))).astype(kind).astype(np.float64)
    middle = 1 << (bits - 1)
    found = np.full((n, groups), float(middle))
    if zeros:
        found += rng.integers(-middle, middle, (n, groups))
    return Quantized(rng.integers(0, 1 << bits, (n, k)).astype(np.uint8), scales, found, bits, scale_type)
