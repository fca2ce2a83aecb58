"""Run `.pte` programs on a GPU: `Runtime.get().load_program(path).load_method("forward").execute(inputs)`.

Needs wgpu, numpy and flatbuffers; neither torch nor executorch.
"""

from .buffers import State
from .device import Device
from .errors import DeviceError, InputError, MissingDataError, ProgramFormatError, UnsupportedError, WebGPUDelegateError
from .method import Method, MethodMeta, TensorInfo
from .program import Program, Runtime

__all__ = [
    "Device",
    "DeviceError",
    "InputError",
    "Method",
    "MethodMeta",
    "MissingDataError",
    "Program",
    "ProgramFormatError",
    "Runtime",
    "State",
    "TensorInfo",
    "UnsupportedError",
    "WebGPUDelegateError",
]
