"""What wgpu-native offers beyond WebGPU, and what its own C functions do faster than wgpu-py's methods.

The only module that touches wgpu-py's internals. Where something is missing (another wgpu backend or version), the
functions say so and their callers do without.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from wgpu.backends.wgpu_native import _api, _helpers
from wgpu.backends.wgpu_native.extras import set_instance_extras

from .compiled_loop import WORDS, compile_loop

lib, ffi = _api.lib, _api.ffi


def prepare_instance() -> bool:
    """Create wgpu's instance without its own checks of indirect dispatches, each of which costs a dispatch.

    Returns whether indirect dispatches are cheap now: false where the program made its instance before. Their sizes
    are written by this package's kernels and are within limits by construction.
    """
    global _prepared
    if _prepared is None:
        _prepared = _helpers._the_instance is None
        if _prepared:
            set_instance_extras(flags=("Empty",))
    return _prepared


_prepared: bool | None = None


def unchecked_module(gpu: Any, label: str, code: str) -> Any:
    """A shader module without bounds checks and loop bounds. For kernels that say in their head why they need none.

    Raises as `create_shader_module` does.
    """
    source = _api.new_struct_p("WGPUShaderSourceWGSL *", code=_api.to_c_string_view(code))
    source[0].chain.next = ffi.NULL
    source[0].chain.sType = lib.WGPUSType_ShaderSourceWGSL
    descriptor = _api.new_struct_p(
        "WGPUShaderModuleDescriptor *",
        nextInChain=ffi.cast("WGPUChainedStruct *", source),
        label=_api.to_c_string_view(label),
    )
    handle = _api.libf.wgpuDeviceCreateShaderModuleTrusted(gpu._internal, descriptor, 0)
    if handle == ffi.NULL:
        raise RuntimeError("Shader module creation failed")
    return _api.GPUShaderModule(label, handle, gpu)


_FIXED_SUBGROUPS = {0x10DE, 0x106B, 0x10005, 0x1AE0}
"""Vendors whose compute kernels all run with one subgroup size: NVIDIA, Apple, Mesa's CPU driver, SwiftShader."""
_LEAST_SUBGROUP = {0x1002: 32, 0x8086: 8}
"""Vendors that choose among several sizes for each kernel, and the smallest: AMD (wave32, wave64), Intel (SIMD8)."""


def least_subgroup(adapter: Any, probed: int) -> int:
    """The smallest subgroup that any kernel on this adapter may run with, given the size that one kernel had.

    wgpu-native reports the range 4 to 128 for every adapter, which says nothing.
    """
    vendor = int(adapter.info.get("vendor_id", 0) or 0)
    if vendor in _FIXED_SUBGROUPS:
        return probed
    return min(probed, _LEAST_SUBGROUP.get(vendor, 4))


_ENCODER = (
    lib.wgpuComputePassEncoderSetPipeline,
    lib.wgpuComputePassEncoderSetBindGroup,
    lib.wgpuComputePassEncoderDispatchWorkgroups,
    lib.wgpuComputePassEncoderDispatchWorkgroupsIndirect,
)
COMPILE_AFTER = 50_000
"""Dispatches that are encoded from Python before the loop is compiled: both cost about as much time."""
_compiling = threading.Lock()
_tried: list[Any] = []
"""What `compiled_loop` gives, once it was asked for."""


def compiled_loop() -> Any:
    """The compiled loop as a C function and its owner, or None. Compiled at the first call in a process."""
    with _compiling:
        if not _tried:
            loop = compile_loop(*(_address(function) for function in _ENCODER))
            kind = "void (*)(void *, void *, uint64_t)"
            _tried.append(None if loop is None else (ffi.cast(kind, loop.address), loop))
        return _tried[0]


def _address(handle: Any) -> int:
    return int(ffi.cast("uintptr_t", handle))


def encoded_by() -> str:
    """What encodes recordings in the long run: "llvmlite" (see compiled_loop.py) or "python"."""
    return "python" if compiled_loop() is None else "llvmlite"


class Recording:
    """Dispatches as C handles, to be encoded any number of times."""

    _from_python = 0
    """Dispatches that were encoded from Python in this process, of all recordings."""

    def __init__(self, launches: Sequence[Any]) -> None:
        """`launches`: `plan.Launch`es; they are kept, since their objects own the handles."""
        self._launches = launches
        self._records: list[tuple[Any, ...]] = []
        """Pipeline (None: that before), bind group, grid (below 2^32 as devices have it), indirect buffer or None, byte
        offset in it."""
        self._encoded = False
        last = None
        for launch in launches:
            pipeline = None if launch.pipeline is last else launch.pipeline._internal
            last = launch.pipeline
            group = launch.bind_group._internal
            indirect = None if launch.indirect is None else launch.indirect._internal
            self._records.append((pipeline, group, *launch.grid, indirect, launch.indirect_offset))

    def __len__(self) -> int:
        return len(self._records)

    @functools.cached_property
    def _words(self) -> Any:
        """The records for the compiled loop: u64[dispatches, WORDS]."""
        words = [
            (0 if pipeline is None else _address(pipeline), _address(group), x, y, z,
             0 if indirect is None else _address(indirect), offset)
            for pipeline, group, x, y, z, indirect, offset in self._records
        ]  # fmt: skip
        return ffi.from_buffer(np.array(words, np.uint64).reshape(-1, WORDS))

    def _loop(self) -> Any:
        """The compiled loop, where it pays: not for the first time, which packing the words would make longer."""
        if not self._encoded or (not _tried and Recording._from_python < COMPILE_AFTER):
            return None
        return compiled_loop()

    def encode(self, compute: Any) -> None:
        """Encode the dispatches into a compute pass: what wgpu-py's methods do, at 5 % of their time where the loop is
        compiled, else at two thirds. Errors surface when the pass ends."""
        encoder = compute._internal
        loop = self._loop()
        if loop is not None:
            call, _ = loop
            call(encoder, self._words, len(self._records))
            return
        self._encoded = True
        Recording._from_python += len(self._records)
        set_pipeline, set_group, dispatch, indirectly = _ENCODER
        null = ffi.NULL
        for pipeline, group, x, y, z, indirect, offset in self._records:
            if pipeline is not None:
                set_pipeline(encoder, pipeline)
            set_group(encoder, 0, group, 0, null)
            if indirect is None:
                dispatch(encoder, x, y, z)
            else:
                indirectly(encoder, indirect, offset)


def submit(queue: Any, commands: Any = None) -> int:
    """Submit one command buffer, or (None) only the writes that wait; returns the number that `wait` takes."""
    handles = ffi.NULL if commands is None else ffi.new("WGPUCommandBuffer[]", [commands._internal])
    return int(_api.libf.wgpuQueueSubmitForIndex(queue._internal, 0 if commands is None else 1, handles))


def wait(gpu: Any, submission: int | None = None) -> None:
    """Return when a submission is done, or all of them; callbacks of mappings that are ready run meanwhile."""
    index = ffi.NULL if submission is None else ffi.new("WGPUSubmissionIndex *", submission)
    _api.libf.wgpuDevicePoll(gpu._internal, 1, index)


class _Mapping:
    """What became of a mapping that was asked for; `status` is None until it is known."""

    def __init__(self) -> None:
        self.status: int | None = None
        self.message = ""


_asked: dict[int, Any] = {}
"""Handles of mappings that were asked for, by address: native code has them until it calls back, whoever is gone."""


@ffi.callback("void(WGPUMapAsyncStatus, WGPUStringView, void *, void *)")  # type: ignore[untyped-decorator]
def _mapped(status: int, message: Any, mapping: Any, _second: Any) -> None:
    found: _Mapping = ffi.from_handle(mapping)
    found.message = _api.from_c_string_view(message) or ""
    found.status = status
    del _asked[int(ffi.cast("uintptr_t", mapping))]


class Download:
    """Reads a buffer with MAP_READ usage back. wgpu-py's own way waits for everything that was submitted, and submits
    once more; this one waits for the submission that wrote the buffer."""

    def __init__(self, gpu: Any, buffer: Any) -> None:
        self.gpu = gpu
        self.buffer = buffer
        self._mapping = _Mapping()
        self._size = 0

    def begin(self, size: int) -> None:
        """Ask for the first `size` bytes (a multiple of 4), after the submit that writes them."""
        self._mapping, self._size = _Mapping(), size
        handle = ffi.new_handle(self._mapping)
        _asked[int(ffi.cast("uintptr_t", handle))] = handle
        info = _api.new_struct(
            "WGPUBufferMapCallbackInfo",
            mode=lib.WGPUCallbackMode_AllowProcessEvents,
            callback=_mapped,
            userdata1=handle,
        )
        _api.libf.wgpuBufferMapAsync(self.buffer._internal, lib.WGPUMapMode_Read, 0, size, info)

    def finish(self, submission: int) -> bytes:
        """Wait for the bytes. Raises RuntimeError if the device failed."""
        wait(self.gpu, submission)
        while self._mapping.status is None:
            wait(self.gpu)
        if self._mapping.status != lib.WGPUMapAsyncStatus_Success:
            raise RuntimeError(f"reading back failed: {self._mapping.message} (status {self._mapping.status})")
        try:
            start = _api.libf.wgpuBufferGetMappedRange(self.buffer._internal, 0, self._size)
            return bytes(ffi.buffer(start, self._size))
        finally:
            _api.libf.wgpuBufferUnmap(self.buffer._internal)


def timestamp_period(gpu: Any) -> float:
    """Nanoseconds of one unit of a timestamp: wgpu-native resolves queries to the device's own units."""
    return float(lib.wgpuQueueGetTimestampPeriod(gpu.queue._internal))
