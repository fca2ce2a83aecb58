"""The benchmarks' own kernels: `.wgsl` files next to this module, compiled without the package's lowering."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from executorch_webgpu.runtime.errors import DeviceError
from executorch_webgpu.runtime.gpu import native
from executorch_webgpu.runtime.gpu.device import Device
from executorch_webgpu.runtime.gpu.random_weights import RandomFill

__all__ = ["WORKGROUP", "LocalKernel", "RandomFill", "fold_grid"]

WORKGROUP = 256
"""Invocations of a workgroup of the kernels that walk over buffers."""
_UNCHECKED = re.compile(r"^// Unchecked: \S", re.M)


class LocalKernel:
    """A compute pipeline from `<name>.wgsl` of this folder.

    Args:
        overrides: WGSL `override` -> value.
    A file whose head says "Unchecked:" is compiled without bounds checks, as the package does with its own kernels,
    unless the device is one that checks everything.
    """

    def __init__(self, device: Device, name: str, overrides: Mapping[str, int | float] | None = None) -> None:
        self.device = device
        self.name = name
        code = Path(__file__).with_name(f"{name}.wgsl").read_text(encoding="utf-8")
        if _UNCHECKED.search(code) and not device.checked:
            module = native.unchecked_module(device.gpu, name, code)
        else:
            module = device.gpu.create_shader_module(label=name, code=code)
        self.pipeline = device.gpu.create_compute_pipeline(
            label=name,
            layout="auto",
            compute={"module": module, "entry_point": "main", "constants": dict(overrides or {})},
        )

    def bind(self, *buffers: Any) -> Any:
        """A bind group of group 0 with whole buffers at bindings 0, 1, ...

        Raises:
            DeviceError: a buffer is larger than the device binds.
        """
        largest, most = max(buffer.size for buffer in buffers), self.device.limits.max_binding
        if largest > most:
            raise DeviceError(
                f"{self.name} needs a buffer of {largest:,} bytes, but this device binds at most {most:,}"
            )
        entries = [
            {"binding": i, "resource": {"buffer": buffer, "offset": 0, "size": buffer.size}}
            for i, buffer in enumerate(buffers)
        ]
        return self.device.gpu.create_bind_group(
            label=self.name, layout=self.pipeline.get_bind_group_layout(0), entries=entries
        )

    def encode(self, compute: Any, group: Any, grid: Sequence[int]) -> None:
        """One dispatch into a compute pass."""
        compute.set_pipeline(self.pipeline)
        compute.set_bind_group(0, group)
        compute.dispatch_workgroups(*grid)


def fold_grid(device: Device, groups: int) -> tuple[int, int, int]:
    """`groups` workgroups as an (x, y, 1) grid within the device's limit; x * y >= groups."""
    rows = max(-(-groups // device.limits.max_workgroups), 1)
    return (-(-groups // rows), rows, 1)
