"""Random weights, made on the GPU: a program can then be timed where its weights are not."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import wgpu

from ...backend.graph import Value
from ...ops.base import Dispatch
from ..errors import MissingDataError
from .buffers import DataSource, Weights
from .device import Device
from .kernel import KernelKey
from .upload import Upload

Range = tuple[float, float]

WORKGROUP = 256
"""Invocations of a workgroup of random_fill.wgsl."""
KINDS = {"f32": 0, "f16": 1, "u32": 2, "i32": 3}
"""What the kernel writes for a WGSL storage type: floats, two halves a word, words, integers."""
_DEVIATION = 0.02
_SPREAD = _DEVIATION * 3**0.5
"""Half the width of a uniform distribution with that standard deviation."""
_PACKED_SCALE = 0.004
"""Of packed weights in 4 bits, for a deviation like that of others."""
_INTEGERS = {"i8": (-128.0, 128.0), "u8": (0.0, 256.0)}


class RandomFill:
    """Fills GPU buffers with pseudo-random values."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.kernel = device.kernel(KernelKey.of(Dispatch("random_fill", {})))

    def __call__(self, buffer: Any, storage: str, low: float, high: float, seed: int) -> None:
        """Queue the filling of a whole buffer.

        Args:
            storage: WGSL element type. `u32` gives words whose halves are 16-bit floats from 1/32 to 1/16 of either
                sign, whatever the range: packed weights, in which scales stand beside codes.
            low, high: values are uniform in [low, high), rounded to the type (integers: down).
            seed: equal seeds give equal values.
        """
        device, words = self.device, buffer.size // 4
        groups = -(-words // WORKGROUP)
        rows = -(-groups // device.limits.max_workgroups)
        mixed = zlib.crc32(seed.to_bytes(8, "little", signed=True))
        numbers = {"words": words, "seed": mixed, "kind": KINDS[storage], "low": float(low), "high": float(high)}
        usage = wgpu.BufferUsage.UNIFORM | wgpu.BufferUsage.COPY_DST
        params = device.buffer(self.kernel.interface.params_size, "other", "random fill", usage)
        device.write(params, self.kernel.interface.pack(numbers, "random fill"))
        bound = {"out": buffer, "params": params}
        entries = [
            {"binding": b.index, "resource": {"buffer": bound[b.name], "offset": 0, "size": bound[b.name].size}}
            for b in self.kernel.interface.bindings.values()
        ]
        group = device.gpu.create_bind_group(label="random fill", layout=self.kernel.layout, entries=entries)
        encoder = device.gpu.create_command_encoder(label="random fill")
        compute = encoder.begin_compute_pass(label="random fill")
        compute.set_pipeline(self.kernel.pipeline)
        compute.set_bind_group(0, group)
        compute.dispatch_workgroups(-(-groups // rows), rows, 1)
        compute.end()
        device.gpu.queue.submit([encoder.finish()])
        device.release(params, "other")


def likely_range(value: Value) -> Range:
    """What a weight of this type may look like.

    Vectors of floats are near 1, as norms are; other floats have a mean of 0 and a standard deviation of 0.02; bytes
    take any value; other integers, which may be positions or sizes, and booleans are 0.
    """
    if value.dtype in ("f32", "f16", "bf16"):
        return (1 - _SPREAD, 1 + _SPREAD) if len(value.shape) == 1 else (-_SPREAD, _SPREAD)
    if value.dtype == "u32":
        return (0.5 * _PACKED_SCALE, 1.5 * _PACKED_SCALE)
    return _INTEGERS.get(value.dtype, (0.0, 0.0))


class RandomWeights(Weights):
    """Constants whose data are missing get random values; others are uploaded as usual.

    Args:
        between: the range of a constant's values, which are uniform.
    """

    def __init__(self, device: Device, between: Callable[[Value], Range] = likely_range) -> None:
        super().__init__(device)
        self.between = between
        self.made = 0
        """Constants filled so far."""
        self._random = RandomFill(device)

    def check(self, value: Value, source: DataSource) -> None:
        """As that of the base class, but data may be missing."""
        if _found(value, source):
            super().check(value, source)

    def fill(self, upload: Upload, buffer: Any, value: Value, source: DataSource) -> None:
        """Random values unless there are data."""
        if _found(value, source):
            super().fill(upload, buffer, value, source)
            return
        kind = self.device.limits.wgsl_type(value.dtype)
        if value.dtype == "u32":  # packed weights: whatever is in the place of scales must be a small number
            kind = "f16"
        if value.dtype != "bool":  # a new buffer is zero already
            self._random(buffer, kind, *self.between(value), self.made)
        self.made += 1


def _found(value: Value, source: DataSource) -> bool:
    try:
        source(value.data or "")
    except MissingDataError:
        return False
    return True
