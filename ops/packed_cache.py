"""KV caches of packed integers: what the host's tensors hold, what the GPU's words hold, and which sizes there may be.

    int8 [B, C, Hkv, D]: code = round(x / scale), scale = max |x| / 127.
    uint8 [B, C, Hkv, D / 2], 4 bits a code: y = x H / sqrt(D) instead of x, with the Hadamard matrix
        H[i, j] = (-1)^popcount(i & j), so that outliers are spread over the head. Byte i holds the codes of elements 2i
        (low half) and 2i + 1 (high half), in two's complement. D is a power of two, 8 to 256. All 16 codes are used:
        the side of zero on which y reaches further has codes to -8, the other to 7,
            |scale| = max(far / 8, near / 7), far and near = the larger and the smaller of max(y, 0), max(-y, 0),
        and the scale is negative where far is max(y, 0).
    scales float32 [B, C, Hkv, 1]: one for each token and head. A vector of zeros has scale 0. What a code stands for
        differs from what was quantised by at most half a scale, which is why no extreme is clipped.

Rounding is to nearest, ties to even. On the GPU a cache is u32 [B, C, Hkv, D * bits / 32]: the same bytes, four codes
of 8 bits or eight of 4 bits a word, the first in the lowest bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any

from ..backend.graph import Arg, Graph, Value

CODES = {"i8": 8, "u8": 4}
"""Dtype of a cache -> bits of its codes."""
SCALES = {"key_cache": "key_scales", "value_cache": "value_scales"}
"""Cache -> its scales."""
INT4_SIZES = (8, 16, 32, 64, 128, 256)
MAX_SIZE = 1024
"""Largest head size whose vectors the GPU quantises: a workgroup holds one."""
MAX_ELEMENTS = 2**32
"""Elements of a cache that 32 bits number."""


def bits_of(args: Mapping[str, Arg]) -> int:
    """Bits of a code of the caches that an attention reads, by its arguments; 0: they hold floats."""
    bits = args.get("bits", 0)
    if isinstance(bits, bool) or not isinstance(bits, int):
        raise TypeError(f"bits is {bits!r}")
    return bits


def scales_part(args: Mapping[str, Arg]) -> str:
    """The shader part, without its prefix, that reads the scales of an attention's packed caches."""
    return "scales_zeros" if args.get("zeros") else "scales"


def elements(shape: tuple[Any, ...], bits: int) -> tuple[Any, ...]:
    """The shape of a cache in elements from that in words (`bits` 0: there are no words)."""
    return (*shape[:-1], shape[-1] * (32 // bits)) if bits else shape


def words(shape: tuple[Any, ...], dtype: str) -> tuple[Any, ...]:
    """The shape of the GPU's words from that of the host's tensor: bytes, four to a word."""
    if dtype not in CODES:
        raise ValueError(f"{dtype} is no dtype of a packed cache")
    return (*shape[:-1], shape[-1] // 4)


def as_floats(values: Mapping[str, Value | None]) -> dict[str, Value | None]:
    """The arguments of an operator with caches of floats in the place of packed ones, for rules about their sizes."""
    found = dict(values)
    for name in SCALES:
        cache = found.get(name)
        if cache is not None and cache.dtype in CODES and cache.shape:
            last = cache.shape[-1]
            size = last * 8 // CODES[cache.dtype] if isinstance(last, int) else last
            found[name] = replace(cache, dtype="f32", shape=(*cache.shape[:-1], size))
    return found


def reason(values: Mapping[str, Value | None]) -> str | None:
    """Why caches and scales do not fit each other, or None. Sizes that are no int are known only to a call."""
    for name, scales_name in SCALES.items():
        cache, scales = values[name], values.get(scales_name)
        if cache is None:
            return f"{name} is missing"
        if cache.dtype not in CODES:
            if scales is not None:
                return f"{scales_name} is given, but {name} is {cache.dtype}; caches with scales are int8 or uint8"
            continue
        if scales is None:
            return f"{name} is {cache.dtype}; {scales_name} is missing"
        wanted = (*cache.shape[:-1], 1)
        if scales.dtype != "f32" or len(scales.shape) != len(wanted) or _differ(scales.shape, wanted):
            return f"{scales_name} is {scales.dtype}{list(scales.shape)}; it must be f32{list(wanted)} for {name}"
        size = as_floats(values)[name]
        count = None if size is None else size.shape[-1]
        if cache.dtype == "u8" and isinstance(count, int) and count not in INT4_SIZES:
            return (
                f"{name} holds 4-bit codes of heads of {count} elements; the Hadamard transform needs a power of two "
                f"from {INT4_SIZES[0]} to {INT4_SIZES[-1]}"
            )
    return None


def _differ(shape: tuple[Any, ...], wanted: tuple[Any, ...]) -> bool:
    return any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in zip(shape, wanted, strict=True))


def storage_reason(cache: Value) -> str | None:
    """Why the GPU does not hold a packed cache that `reason` accepts, or None."""
    size = cache.shape[-1]
    if not all(isinstance(axis, int) for axis in cache.shape) or not isinstance(size, int):
        return f"cache {cache.name} {list(cache.shape)} has sizes that are not known at export"
    if size % 4:
        return f"cache {cache.name} has {size} bytes a head; they must fill words of 4"
    count = size * 8 // CODES[cache.dtype]
    if count > MAX_SIZE:
        return f"cache {cache.name} has heads of {count} elements; at most {MAX_SIZE} are supported"
    if prod(int(str(axis)) for axis in cache.shape) * 8 // CODES[cache.dtype] >= MAX_ELEMENTS:
        return f"cache {cache.name} {list(cache.shape)} has more elements than 32 bits number"
    return None


def packed_reason(graph: Graph, args: Mapping[str, Arg]) -> str | None:
    """Why the packed caches of a `webgpu.attention` do not fit their scales, or None; None without packed caches."""
    if args.get("bits", 0) not in (0, 8, 4):
        return f"bits is {args['bits']!r}; it must be 0, 8 or 4"
    if not bits_of(args):
        return None
    zeros = args.get("zeros", False)
    if not isinstance(zeros, bool) or (zeros and bits_of(args) != 8):
        return f"zeros is {zeros!r} for {args['bits']} bits; only codes of 8 bits have zero points"
    if args["kv_layout"] != "bshd":
        return f"kv_layout is {args['kv_layout']!r}; packed caches are 'bshd'"
    for name in ("key", "value"):
        cache, given = graph.value(args[name]), args.get(f"{name}_scales")
        if cache.dtype != "u32" or len(cache.shape) != 4:
            return f"{name} is {cache.dtype}{list(cache.shape)}; packed caches are u32 of four axes"
        if given is None:
            return f"{name}_scales is missing"
        scales, wanted = graph.value(given), (*cache.shape[:3], 2 if zeros else 1)
        if scales.dtype != "f32" or scales.shape != wanted:
            return f"{name}_scales is {scales.dtype}{list(scales.shape)}; it must be f32{list(wanted)}"
    return None
