"""The loop over the dispatches of a recording as machine code, where llvmlite is installed (the extra `jit`).

Each call of a C function from Python costs about 0.4 us, most of it for arguments, and a dispatch takes three. The
compiled loop reads the arguments from an array: a dispatch costs 0.1 us instead of 1.3 (docs/KERNELS.md).
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

log = logging.getLogger(__name__)

JIT_VARIABLE = "EXECUTORCH_WEBGPU_JIT"
"""Environment variable: set to 0, nothing is compiled."""
WORDS = 7
"""u64 words of a dispatch: pipeline (0: that before), bind group, grid x, y, z, indirect buffer (0: none), byte offset
in it."""


@dataclass(frozen=True)
class CompiledLoop:
    """Machine code of `void loop(encoder, first, count)`: C handle, address of `count` dispatches, their number."""

    address: int
    engine: Any
    """Owns the code."""


def compile_loop(set_pipeline: int, set_group: int, dispatch: int, indirectly: int) -> CompiledLoop | None:
    """Compile the loop, in about 0.1 s with the import of llvmlite, which takes 60 MB of memory.

    Args: addresses of the C functions of a compute pass encoder, with WebGPU's arguments (webgpu.h).
    Returns:
        None where llvmlite is missing or does not work, the environment says no (JIT_VARIABLE), or the process may not
        make memory executable.
    """
    if os.environ.get(JIT_VARIABLE, "") == "0" or struct.calcsize("P") != 8:
        return None
    try:  # here, not above: the import takes as long as that of the rest of the runtime
        from llvmlite import binding

        _require_executable_memory()
        binding.initialize_native_target()
        binding.initialize_native_asmprinter()
        module = binding.parse_assembly(str(_module(set_pipeline, set_group, dispatch, indirectly)))
        machine = binding.Target.from_default_triple().create_target_machine(opt=2)
        engine = binding.create_mcjit_compiler(module, machine)
        engine.finalize_object()
        return CompiledLoop(engine.get_function_address("loop"), engine)
    except ImportError:
        return None
    except Exception as error:  # whatever is wrong with it, decoding must go on without it
        log.warning(
            "llvmlite is installed but does not work here (%s: %s): dispatches are encoded from Python; %s=0 ends this "
            "message", type(error).__name__, error, JIT_VARIABLE,
        )  # fmt: skip
        return None


def _require_executable_memory() -> None:
    """OSError where the system forbids new executable memory: llvmlite does not look, and its code would crash."""
    if not hasattr(mmap, "PROT_EXEC"):
        return  # Windows
    with mmap.mmap(-1, mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as page:
        content = ctypes.c_char.from_buffer(page)
        size = ctypes.c_size_t(mmap.PAGESIZE)
        allowed = mmap.PROT_READ | mmap.PROT_EXEC
        refused = ctypes.CDLL(None).mprotect(ctypes.c_void_p(ctypes.addressof(content)), size, allowed)
        del content  # the page cannot be given back before
    if refused:
        raise OSError("the system forbids executable memory")


def _module(set_pipeline: int, set_group: int, dispatch: int, indirectly: int) -> Any:
    """The loop in LLVM's intermediate representation. Handles and addresses are 64-bit integers throughout."""
    from llvmlite import ir

    word, half, nothing = ir.IntType(64), ir.IntType(32), ir.VoidType()
    module = ir.Module()
    function = ir.Function(module, ir.FunctionType(nothing, [word, word, word]), "loop")
    encoder, first, count = function.args
    start, body, end = (function.append_basic_block(name) for name in ("start", "body", "end"))
    builder = ir.IRBuilder(start)

    def call(address: int, arguments: Sequence[Any]) -> None:
        kind = ir.FunctionType(nothing, [argument.type for argument in arguments])
        builder.call(builder.inttoptr(word(address), kind.as_pointer()), arguments)

    builder.cbranch(builder.icmp_unsigned("==", count, word(0)), end, body)
    builder.position_at_end(body)
    number = builder.phi(word)
    number.add_incoming(word(0), start)
    record = builder.add(first, builder.mul(number, word(8 * WORDS)))
    places = [builder.add(record, word(8 * index)) for index in range(WORDS)]
    words = [builder.load(builder.inttoptr(place, word.as_pointer())) for place in places]
    pipeline, group, *grid, buffer, offset = words
    with builder.if_then(builder.icmp_unsigned("!=", pipeline, word(0))):
        call(set_pipeline, [encoder, pipeline])
    call(set_group, [encoder, half(0), group, word(0), word(0)])
    with builder.if_else(builder.icmp_unsigned("==", buffer, word(0))) as (direct, indirect):
        with direct:
            call(dispatch, [encoder, *(builder.trunc(size, half) for size in grid)])
        with indirect:
            call(indirectly, [encoder, buffer, offset])
    following = builder.add(number, word(1))
    number.add_incoming(following, builder.block)
    builder.cbranch(builder.icmp_unsigned("<", following, count), body, end)
    builder.position_at_end(end)
    builder.ret_void()
    return module
