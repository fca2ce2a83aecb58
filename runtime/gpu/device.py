"""The GPU device: adapter choice, limits, pipelines shared by everything on the device, and counters."""

from __future__ import annotations

import collections
import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import wgpu

from ...ops.base import Limits
from ..errors import DeviceError
from . import native
from .kernel import Kernel, KernelKey

ADAPTER_VARIABLE = "EXECUTORCH_WEBGPU_ADAPTER"
"""Environment variable: a part of an adapter's name; the first adapter whose summary holds it is used."""

CHECKED_VARIABLE = "EXECUTORCH_WEBGPU_CHECKED"
"""Environment variable: set to 1, every kernel is compiled with the driver layer's bounds checks."""

OPTIONAL_FEATURES = ("shader-f16", "subgroup", "timestamp-query")

_LIMITS = {
    "max_invocations": "max-compute-invocations-per-workgroup",
    "max_workgroup_memory": "max-compute-workgroup-storage-size",
    "max_workgroups": "max-compute-workgroups-per-dimension",
    "max_storage_buffers": "max-storage-buffers-per-shader-stage",
    "max_binding": "max-storage-buffer-binding-size",
    "max_buffer": "max-buffer-size",
    "uniform_alignment": "min-uniform-buffer-offset-alignment",
    "storage_alignment": "min-storage-buffer-offset-alignment",
}

INSTALL_HINT = (
    "Install your GPU vendor's Vulkan driver, or a software one "
    "(Debian and Ubuntu: `apt-get install mesa-vulkan-drivers libvulkan1`)."
)


@dataclass
class Counters:
    """What has been created and moved on a device since the start. Compare two copies to see what a step did."""

    buffers: int = 0
    pipelines: int = 0
    bind_groups: int = 0
    submits: int = 0
    dispatches: int = 0
    writes: int = 0
    bytes_written: int = 0
    reads: int = 0
    bytes_read: int = 0

    def copy(self) -> Counters:
        return Counters(**self.__dict__)

    def since(self, before: Counters) -> Counters:
        """This minus `before`, field by field."""
        return Counters(**{k: v - getattr(before, k) for k, v in self.__dict__.items()})


class MemoryUse:
    """Bytes of GPU buffers alive on a device, by purpose, and the highest total so far.

    A buffer that nobody holds any more is freed by wgpu. Python may notice that in any thread and at any moment, so
    all that happens then is an entry in a queue, which the next look at the numbers works off.
    """

    def __init__(self) -> None:
        self.peak = 0
        self._by_purpose: dict[str, int] = {}
        self._alive: weakref.WeakKeyDictionary[Any, weakref.finalize[..., Any]] = weakref.WeakKeyDictionary()
        self._gone: collections.deque[tuple[str, int]] = collections.deque()
        self._lock = threading.RLock()

    @property
    def by_purpose(self) -> dict[str, int]:
        """A copy."""
        with self._lock:
            while self._gone:
                purpose, size = self._gone.popleft()
                self._by_purpose[purpose] -= size
            return dict(self._by_purpose)

    @property
    def total(self) -> int:
        return sum(self.by_purpose.values())

    def add(self, buffer: Any, purpose: str) -> None:
        """Count a new buffer, until it is removed or nobody holds it any more."""
        with self._lock:
            self._by_purpose[purpose] = self._by_purpose.get(purpose, 0) + buffer.size
            self._alive[buffer] = weakref.finalize(buffer, self._gone.append, (purpose, buffer.size))
            self._alive[buffer].atexit = False
            self.peak = max(self.peak, self.total)

    def remove(self, buffer: Any) -> None:
        """A buffer that was counted is freed now."""
        with self._lock:
            self._alive.pop(buffer)()


def adapters() -> list[Any]:
    """All adapters that wgpu finds, OpenGL ones left out (they lack compute limits that the kernels need)."""
    native.prepare_instance()
    return [a for a in wgpu.gpu.enumerate_adapters_sync() if a.info["backend_type"] != "OpenGL"]


def choose_adapter(name: str | None = None) -> Any:
    """The adapter whose summary contains `name` (or the environment's choice), else the system's high-performance one.

    Raises:
        DeviceError: there is none; says what was found and what to install.
    """
    wanted = name if name is not None else os.environ.get(ADAPTER_VARIABLE, "")
    found = adapters()
    if not found:
        raise DeviceError(f"no WebGPU adapter: neither a GPU nor a software Vulkan driver was found. {INSTALL_HINT}")
    if wanted:
        for adapter in found:
            if wanted.lower() in adapter.summary.lower():
                return adapter
        raise DeviceError(f"no adapter's name contains {wanted!r}; found: {[a.summary for a in found]}")
    order = {"DiscreteGPU": 0, "IntegratedGPU": 1, "VirtualGPU": 2, "CPU": 3}
    return min(found, key=lambda a: order.get(a.info["adapter_type"], 4))


class Device:
    """A WebGPU device with its pipeline cache. One per process is enough: `Device.default()`.

    Attributes:
        gpu: the wgpu device.
        limits: what kernels are chosen by.
        counters, memory: what happened on the device so far.
        lock: held by a thread from the first write of a step until its submit, so that threads may share the device.
    """

    _default: Device | None = None
    _lock = threading.Lock()

    def __init__(
        self, adapter: Any, features: Sequence[str], limits: Mapping[str, int], checked: bool | None = None
    ) -> None:
        self.adapter = adapter
        self.checked = os.environ.get(CHECKED_VARIABLE, "") not in ("", "0") if checked is None else checked
        try:
            self.gpu = adapter.request_device_sync(
                label="executorch-webgpu", required_features=list(features), required_limits=dict(limits)
            )
        except Exception as error:
            raise DeviceError(f"adapter {adapter.summary!r} gave no device: {error}") from error
        granted = self.gpu.limits
        self.features = frozenset(features)
        self.limits = Limits(
            **{name: int(granted[key]) for name, key in _LIMITS.items()},
            f16="shader-f16" in self.features,
            cheap_indirect=native.prepare_instance(),
        )
        self.counters = Counters()
        self.memory = MemoryUse()
        self.lock = threading.RLock()
        self._kernels: dict[KernelKey, Kernel] = {}
        self._null: Any = None
        if "subgroup" in self.features:
            self.limits = replace(self.limits, subgroup_size=self._subgroup_size())

    @classmethod
    def create(
        cls,
        adapter: str | None = None,
        *,
        default_limits: bool = False,
        features: Sequence[str] | None = None,
        checked: bool | None = None,
    ) -> Device:
        """A new device.

        Args:
            adapter: a part of the adapter's name; None for the best one.
            default_limits: ask for WebGPU's default limits instead of all that the adapter offers.
            features: optional features to ask for; by default those of `OPTIONAL_FEATURES` that the adapter has.
            checked: compile every kernel with bounds checks; None: as the environment says (see CHECKED_VARIABLE),
                else only kernels that do not prove their indices.
        Raises:
            DeviceError: no such adapter, or it lacks a feature asked for by name.
        """
        chosen = choose_adapter(adapter)
        available = set(chosen.features)
        if features is None:
            features = [name for name in OPTIONAL_FEATURES if name in available]
        missing = [name for name in features if name not in available]
        if missing:
            raise DeviceError(f"adapter {chosen.summary!r} lacks {missing}")
        defaults = Limits()
        limits = {
            key: getattr(defaults, n) if default_limits else int(chosen.limits[key]) for n, key in _LIMITS.items()
        }
        return cls(chosen, features, limits, checked)

    @classmethod
    def default(cls) -> Device:
        """The process-wide device, made on first use."""
        with cls._lock:
            if cls._default is None:
                cls._default = cls.create()
            return cls._default

    @property
    def name(self) -> str:
        return str(self.adapter.summary)

    def buffer(self, size: int, purpose: str, label: str, usage: int | None = None, *, uniform: bool = False) -> Any:
        """A GPU buffer of at least `size` bytes (rounded up to 16), counted under `purpose`.

        Args:
            usage: None: a tensor's.
            uniform: besides, it may be bound as a uniform buffer.
        Raises:
            DeviceError: larger than the device allows, or the device is out of memory.
        """
        size = max(-(-size // 16) * 16, 16)
        if size > self.limits.max_buffer:
            raise DeviceError(
                f"{label}: {size:,} bytes, but this device's buffers hold at most {self.limits.max_buffer:,} "
                f"({self.name}); use a smaller model, context or batch, or another device"
            )
        if usage is None:
            usage = wgpu.BufferUsage.STORAGE | wgpu.BufferUsage.COPY_SRC | wgpu.BufferUsage.COPY_DST
            usage |= wgpu.BufferUsage.INDIRECT
            if uniform:
                usage |= wgpu.BufferUsage.UNIFORM
        try:
            made = self.gpu.create_buffer(label=label, size=size, usage=usage)
        except Exception as error:
            raise DeviceError(
                f"{label}: no GPU buffer of {size:,} bytes ({self.memory.total:,} in use): {error}"
            ) from error
        self.counters.buffers += 1
        self.memory.add(made, purpose)
        return made

    def release(self, buffer: Any, purpose: str) -> None:
        """Free a buffer made by `buffer` under the same purpose."""
        self.memory.remove(buffer)
        buffer.destroy()

    def write(self, buffer: Any, data: Any, offset: int = 0) -> None:
        """Queue a write of host bytes; sizes are multiples of 4."""
        self.gpu.queue.write_buffer(buffer, offset, data)
        self.counters.writes += 1
        self.counters.bytes_written += memoryview(data).nbytes

    def _subgroup_size(self) -> int:
        """The smallest subgroup that kernels may count on; 0 where lanes are not numbered through them in order."""
        kernel = Kernel(self.gpu, KernelKey("subgroup_probe", (), (), (), ""))
        usage = wgpu.BufferUsage.STORAGE | wgpu.BufferUsage.COPY_SRC
        buffer = self.gpu.create_buffer(label="subgroup probe", size=1024, usage=usage)
        resource = {"buffer": buffer, "offset": 0, "size": 1024}
        group = self.gpu.create_bind_group(layout=kernel.layout, entries=[{"binding": 0, "resource": resource}])
        encoder = self.gpu.create_command_encoder(label="subgroup probe")
        compute = encoder.begin_compute_pass()
        compute.set_pipeline(kernel.pipeline)
        compute.set_bind_group(0, group)
        compute.dispatch_workgroups(1)
        compute.end()
        self.gpu.queue.submit([encoder.finish()])
        found = np.frombuffer(self.gpu.queue.read_buffer(buffer), np.uint32).reshape(-1, 2)
        buffer.destroy()
        size = int(found[0, 0])
        ordered = size > 0 and bool(np.array_equal(found[:, 1], np.arange(len(found)) % size))
        return native.least_subgroup(self.adapter, size) if ordered else 0

    @property
    def null_buffer(self) -> Any:
        """A small zero buffer for shader variables that a variant does not use."""
        if self._null is None:
            self._null = self.buffer(256, "other", "null", uniform=True)
        return self._null

    def kernel(self, key: KernelKey) -> Kernel:
        """The compiled kernel of a variant; compiled once per device however many programs use it."""
        found = self._kernels.get(key)
        if found is None:
            found = Kernel(self.gpu, key, self.checked)
            self._kernels[key] = found
            self.counters.pipelines += 1
        return found
