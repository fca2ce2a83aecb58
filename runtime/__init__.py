"""Run `.pte` programs on a GPU: `Runtime.get().load_program(path).load_method("forward").execute(inputs)`.

Needs wgpu, numpy and flatbuffers; neither torch nor executorch.
"""

from .buffers import State
from .device import Device
from .errors import DeviceError, InputError, MissingDataError, ProgramFormatError, UnsupportedError, WebGPUDelegateError
from .generate import GenerationResult, Generator
from .method import Method, MethodMeta, TensorInfo
from .program import Program, Runtime
from .sampling import Sampling
from .tokenizer import Tokenizer

__all__ = [
    "Device",
    "DeviceError",
    "GenerationResult",
    "Generator",
    "InputError",
    "Method",
    "MethodMeta",
    "MissingDataError",
    "Program",
    "ProgramFormatError",
    "Runtime",
    "Sampling",
    "State",
    "TensorInfo",
    "Tokenizer",
    "UnsupportedError",
    "WebGPUDelegateError",
]
