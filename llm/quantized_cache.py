"""KV caches of packed integers on the host: what `executorch_webgpu::group_query_attention` writes and reads eagerly.

`ops/packed_cache.py` has the layout.
"""

from __future__ import annotations

import torch
from torch import Tensor

MOST = {torch.int8: 127, torch.uint8: 7}
"""Dtype of a cache -> largest code. int8: a code a byte, the least is -127; uint8: two of 4 bits, the least is -8."""


def hadamard(x: Tensor) -> Tensor:
    """x [..., D] H / sqrt(D) with H[i, j] = (-1)^popcount(i & j); D is a power of two. Its own inverse."""
    size, span = x.shape[-1], 1
    while span < size:
        pairs = x.unflatten(-1, (size // (2 * span), 2, span))
        a, b = pairs.unbind(-2)
        x = torch.stack((a + b, a - b), -2).flatten(-3)
        span *= 2
    return x * size**-0.5


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Vectors x [..., D] as codes of a cache of `dtype`, int8 [..., D] or uint8 [..., D / 2], and scales f32 [..., 1].

    A vector with an infinity or a NaN has a NaN for its scale, and codes 0.
    """
    y = hadamard(x) if dtype == torch.uint8 else x
    scales = _scales(y, dtype).float()
    usable = (scales != 0) & scales.isfinite()
    codes = (y / torch.where(usable, scales, 1.0)).round().clamp(-MOST[dtype] - 1, MOST[dtype])
    codes = torch.where(usable, codes, 0.0).to(torch.int8)
    scales = torch.where(scales.isfinite(), scales, torch.nan)
    if dtype == torch.uint8:
        low, high = (codes[..., i::2].to(torch.int32) & 15 for i in (0, 1))
        return (low | high << 4).to(torch.uint8), scales
    return codes, scales


def _scales(y: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales [..., 1] of vectors y [..., D], with which all of y is within the codes, up to rounding."""
    if dtype == torch.int8:
        return y.abs().amax(-1, keepdim=True) / MOST[dtype]
    above, below = (x.amax(-1, keepdim=True).clamp(min=0) for x in (y, -y))
    far, near = torch.maximum(above, below), torch.minimum(above, below)
    size = torch.maximum(far / (MOST[dtype] + 1), near / MOST[dtype])
    return torch.where(above > below, -size, size)


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """What `quantize` was given, up to rounding, in float32."""
    if codes.dtype == torch.int8:
        return codes * scales
    wide = codes.to(torch.int32)
    both = torch.stack((wide & 15, wide >> 4), -1).flatten(-2)
    return hadamard(((both ^ 8) - 8) * scales)
