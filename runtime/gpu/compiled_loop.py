"""The loop over the dispatches of a recording as machine code, where llvmlite is installed (the extra `jit`).

Each call of a C function from Python costs about 0.4 us, most of it for arguments, and a dispatch takes three. The
compiled loop reads the arguments from an array: a dispatch costs 0.1 us instead of 1.3 (docs/KERNELS.md).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

log = logging.getLogger(__name__)

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
    """Compile the loop, in about 10 ms; None where llvmlite is missing or cannot compile for this machine.

    Args: addresses of the C functions of a compute pass encoder, with WebGPU's arguments (webgpu.h).
    """
    try:  # here, not above: it takes as long as the rest of the runtime
        from llvmlite import binding
    except ImportError:
        return None
    try:
        binding.initialize_native_target()
        binding.initialize_native_asmprinter()
        module = binding.parse_assembly(str(_module(set_pipeline, set_group, dispatch, indirectly)))
        machine = binding.Target.from_default_triple().create_target_machine(opt=2)
        engine = binding.create_mcjit_compiler(module, machine)
        engine.finalize_object()
        return CompiledLoop(engine.get_function_address("loop"), engine)
    except (RuntimeError, OSError) as error:
        log.warning("llvmlite cannot compile here (%s): dispatches are encoded from Python", error)
        return None


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
