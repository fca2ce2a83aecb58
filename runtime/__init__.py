"""Run `.pte` programs on a GPU: `Runtime.get().load_program(path).load_method("forward").execute(inputs)`.

Needs wgpu, numpy and flatbuffers; neither torch nor executorch.
"""

from .batch import BatchGenerator, Request
from .buffers import State
from .device import Device
from .errors import DeviceError, InputError, MissingDataError, ProgramFormatError, UnsupportedError, WebGPUDelegateError
from .generator import GenerationResult, Generator
from .method import Method, MethodMeta, TensorInfo
from .program import Program, Runtime
from .sampling import Sampling
from .snapshot import Snapshot
from .speculative import DraftModel, NGram, Speculation
from .tokenizer import Tokenizer

__all__ = [
    "BatchGenerator",
    "Device",
    "DeviceError",
    "DraftModel",
    "GenerationResult",
    "Generator",
    "InputError",
    "Method",
    "MethodMeta",
    "MissingDataError",
    "NGram",
    "Program",
    "ProgramFormatError",
    "Request",
    "Runtime",
    "Sampling",
    "Snapshot",
    "Speculation",
    "State",
    "TensorInfo",
    "Tokenizer",
    "UnsupportedError",
    "WebGPUDelegateError",
]
