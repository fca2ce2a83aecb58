"""Run `.pte` programs on a GPU: `Runtime.get().load_program(path).load_method("forward").execute(inputs)`.

Needs wgpu, numpy and flatbuffers; neither torch nor executorch.
"""

from .batches.generator import BatchGenerator, Request
from .decoding.drafters import DraftModel, NGram
from .decoding.generator import GenerationResult, Generator
from .decoding.sampling import Sampling
from .decoding.snapshot import Snapshot
from .decoding.speculative import Speculation
from .decoding.tokenizer import Tokenizer
from .errors import DeviceError, InputError, MissingDataError, ProgramFormatError, UnsupportedError, WebGPUDelegateError
from .gpu.buffers import State
from .gpu.device import Device
from .methods.method import Method, MethodMeta, TensorInfo
from .methods.program import Program, Runtime

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
