"""Host tensors: conversion between numpy arrays or torch tensors and what a device stores. Torch is never imported
here."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from ..errors import InputError

NUMPY: dict[str, np.dtype[Any]] = {
    "f32": np.dtype("<f4"),
    "f16": np.dtype("<f2"),
    "bf16": np.dtype("<u2"),
    "f64": np.dtype("<f8"),
    "i64": np.dtype("<i8"),
    "i32": np.dtype("<i4"),
    "u32": np.dtype("<u4"),
    "i16": np.dtype("<i2"),
    "i8": np.dtype("i1"),
    "u8": np.dtype("u1"),
    "bool": np.dtype("?"),
}
"""numpy's type for each host dtype; bfloat16, which numpy lacks, travels as its 16 bits."""

_HOST = {dtype: name for name, dtype in NUMPY.items() if name != "bf16"}
"""The host dtype of a numpy type."""

_NAMES = {
    "float32": "f32", "float16": "f16", "bfloat16": "bf16", "float64": "f64", "int64": "i64", "int32": "i32",
    "uint32": "u32", "int16": "i16", "int8": "i8", "uint8": "u8", "bool": "bool",
}  # fmt: skip
STORAGE: dict[str, np.dtype[Any]] = {
    "f32": np.dtype("<f4"),
    "f16": np.dtype("<f2"),
    "i32": np.dtype("<i4"),
    "u32": np.dtype("<u4"),
}
"""numpy's type for each WGSL storage type."""


def is_torch(value: object) -> bool:
    """Whether `value` is a torch tensor, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def to_host(value: Any) -> tuple[str, np.ndarray[Any, Any]]:
    """A numpy array, torch tensor or Python number as (host dtype, contiguous array).

    Python ints become i64, floats f32, bools bool; bfloat16 tensors become their 16 bits. Raises InputError for
    anything else.
    """
    if type(value) is np.ndarray and value.flags.c_contiguous and value.dtype in _HOST:
        return _HOST[value.dtype], value
    if is_torch(value):
        torch = sys.modules["torch"]
        name = _NAMES.get(str(value.dtype).removeprefix("torch."))
        if name is None:
            raise InputError(f"torch dtype {value.dtype} is not supported")
        value = value.detach().cpu().contiguous()
        return name, (value.view(torch.uint16) if name == "bf16" else value).numpy()
    if isinstance(value, bool):
        return "bool", np.asarray(value)
    if isinstance(value, float):
        return "f32", np.asarray(value, dtype=np.float32)
    try:
        array = np.asarray(value, dtype=np.int64 if isinstance(value, int) else None)
    except (ValueError, TypeError, OverflowError) as error:  # rows of several lengths, an integer of more than 64 bits
        raise InputError(f"an input of type {type(value).__name__} is no array: {error}") from error
    name = _NAMES.get(array.dtype.name)
    if name is None:
        raise InputError(f"an input of type {type(value).__name__} and dtype {array.dtype} is not supported")
    return name, np.require(array, requirements="C")


def bf16_to_f32(bits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """bfloat16 bits (uint16) as float32 values."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def f32_to_bf16(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """float32 values as bfloat16 bits (uint16), rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def to_storage(dtype: str, array: np.ndarray[Any, Any], wgsl_type: str, where: str) -> np.ndarray[Any, Any]:
    """The bytes to upload for a host array of `dtype` stored as `wgsl_type` (one-dimensional, padded to 4 bytes).

    Raises:
        InputError: a 64-bit integer outside 32 bits (WGSL has no wider integer).
    """
    target = STORAGE[wgsl_type]
    if dtype == "bf16":
        array = bf16_to_f32(array)
    elif dtype == "i64" and array.size:
        low, high = int(array.min()), int(array.max())
        if low < -(2**31) or high >= 2**31:
            raise InputError(f"{where}: values from {low} to {high} do not fit the GPU's 32-bit integers")
    flat = np.ascontiguousarray(array.reshape(-1).astype(target, copy=False))
    if flat.nbytes % 4:
        flat = np.concatenate([flat, np.zeros(1, target)])
    return flat


def from_storage(dtype: str, data: Any, wgsl_type: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Downloaded bytes as an own host array of `dtype` and `shape` (bfloat16 as its 16 bits)."""
    count = int(np.prod(shape, dtype=np.int64))
    stored = np.frombuffer(data, STORAGE[wgsl_type], count)
    array = f32_to_bf16(stored) if dtype == "bf16" else stored.astype(NUMPY[dtype])
    return array.reshape(shape)


def to_user(dtype: str, array: np.ndarray[Any, Any], torch_wanted: bool) -> Any:
    """A host array for the caller: a torch tensor if wanted, else numpy (bfloat16 then as float32, which holds it
    exactly)."""
    if torch_wanted:
        torch = sys.modules["torch"]
        tensor = torch.from_numpy(array)
        return tensor.view(torch.bfloat16) if dtype == "bf16" else tensor
    return bf16_to_f32(array) if dtype == "bf16" else array
