"""A compiled shader variant: pipeline, bind group layout and reflected interface."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import wgpu

from ... import wgsl
from ...ops.base import Dispatch, Live
from ..errors import DeviceError
from . import native


@dataclass(frozen=True)
class KernelKey:
    """Everything that makes a variant; derived from a dispatch, never written by hand."""

    kernel: str
    overrides: tuple[tuple[str, int | float | bool], ...]
    consts: tuple[tuple[str, int | float | bool], ...]
    types: tuple[tuple[str, str], ...]
    body: str

    @classmethod
    def of(cls, dispatch: Dispatch) -> KernelKey:
        """The variant of a dispatch; a live scalar that has no slot yet counts as slot 0."""
        consts = {name: 0 if isinstance(value, Live) else value for name, value in dispatch.consts.items()}
        return cls(
            dispatch.kernel,
            tuple(sorted(dispatch.overrides.items())),
            tuple(sorted(consts.items())),
            tuple(sorted(dispatch.types.items())),
            dispatch.body,
        )

    def source(self, dialect: str = "naga") -> str:
        """The variant's shader text."""
        return wgsl.compose(self.kernel, dict(self.consts), dict(self.types), self.body, dialect)

    @property
    def label(self) -> str:
        parts = [f"{k}={v}" for group in (self.types, self.consts, self.overrides) for k, v in group]
        return f"{self.kernel}({', '.join(parts)})"


class Kernel:
    """A compute pipeline with an explicit bind group layout, so that variables a variant does not use may stay bound.

    `checked` keeps the compiler's bounds checks also in kernels that state that they need none.

    Raises:
        DeviceError: the shader or the pipeline was refused; the message holds the compiler's words.
    """

    def __init__(self, gpu: Any, key: KernelKey, checked: bool = False) -> None:
        self.key = key
        self.interface = wgsl.reflect(key.kernel, key.body)
        entries = [
            {
                "binding": b.index,
                "visibility": wgpu.ShaderStage.COMPUTE,
                "buffer": {
                    "type": "uniform" if b.space == "uniform" else "storage" if b.writes else "read-only-storage"
                },
            }
            for b in self.interface.bindings.values()
        ]
        unknown = set(dict(key.overrides)) - set(self.interface.overrides)
        if unknown:
            raise ValueError(f"{key.kernel}.wgsl has no override named {sorted(unknown)}")
        try:
            if self.interface.unchecked and not checked:
                module = native.unchecked_module(gpu, key.label, key.source())
            else:
                module = gpu.create_shader_module(label=key.label, code=key.source())
            self.layout = gpu.create_bind_group_layout(label=key.label, entries=entries)
            layout = gpu.create_pipeline_layout(label=key.label, bind_group_layouts=[self.layout])
            self.pipeline = gpu.create_compute_pipeline(
                label=key.label,
                layout=layout,
                compute={"module": module, "entry_point": "main", "constants": dict(key.overrides)},
            )
        except Exception as error:
            raise DeviceError(f"kernel {key.label} was refused: {error}") from error
