"""The methods that drive a sequence: one for single tokens and, in some programs, another one for prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import InputError, UnsupportedError
from ..gpu.buffers import State
from ..methods.method import Method
from ..methods.program import Program
from .decoder import Convention, find_convention


@dataclass(frozen=True)
class Part:
    """A method of the decoder and how it is called.

    Attributes:
        least: fewest tokens one call takes; more than 1 for a method that takes exactly so many.
        every: whether the logits of every token come back, not only those of the last.
    """

    method: Method
    convention: Convention
    least: int
    every: bool

    @classmethod
    def of(cls, method: Method, constants: Mapping[str, Any], prompts: bool = False) -> Part:
        """`prompts`: another method takes what is too short for this one."""
        convention = find_convention(method, constants, prompts)
        tokens, logits = method.metadata.inputs[0], method.metadata.outputs[0]
        if tokens is None or logits is None:
            raise AssertionError("find_convention made sure of this")
        least = 1 if tokens.dynamic else tokens.sizes[1]
        return cls(method, convention, least, len(logits.sizes) == 3)


def open_methods(
    source: Method | Program,
    state: State | None,
    prefill: str | Method | None,
    decode: str | None,
    opened: list[Method],
) -> tuple[Method, Method]:
    """The methods for single tokens and for prompts, on one state; those made here join `opened`."""
    if isinstance(source, Program):
        for role, name in (("prefill", prefill), ("decode", decode)):
            if not isinstance(name, str | Method | None):
                raise InputError(f"{role} is {name!r}, expected the name of a method, or None")
        if isinstance(prefill, Method):
            raise InputError("prefill is a method: give its name, as the program loads it, or two methods")
        first_name, step_name = find_methods(source, prefill, decode)
        step = source.load_method(step_name, state)
        opened.append(step)
        if first_name == step_name:
            return step, step
        opened.append(source.load_method(first_name, step.state))
        return step, opened[-1]
    if decode is not None or isinstance(prefill, str):
        raise InputError("methods are named where a program is given; here they are loaded already")
    if prefill is not None:
        if not isinstance(prefill, Method):
            raise InputError(f"prefill is {prefill!r}, expected a method, or None")
        if prefill.closed:
            raise InputError(f"method {prefill.name} was closed: load it again")
        if prefill.device is not source.device:
            raise InputError(f"methods {prefill.name} and {source.name} are on two devices")
    step = source
    if state is not None and state is not source.state:
        step = source.on_state(state)
        opened.append(step)
    first = step if prefill is None or prefill is source else prefill
    if first.state is not step.state:
        check_state(step, first)  # before the other method's buffers are made in this state
        if first.identity != step.identity:
            raise InputError(
                f"methods {first.name} and {step.name} are of two programs ({first.identity[:12]} and "
                f"{step.identity[:12]}): what one's weights leave in the state means nothing to the other; export both "
                "methods into one program"
            )
        first = first.on_state(step.state)
        opened.append(first)
    return step, first


def find_methods(program: Program, prefill: str | None = None, decode: str | None = None) -> tuple[str, str]:
    """Names of the methods for prompts and for single tokens, from the types of their inputs.

    `forward`, or the only decoder, does both. Else there is one that takes exactly one token a call, and one that
    takes more.

    Raises:
        InputError: several methods would do, or there is none of a given name; says which there are.
    """
    for role, given in (("prefill", prefill), ("decode", decode)):
        if given is not None and given not in program.method_names:
            methods = ", ".join(sorted(program.method_names - set(program.constants)))
            raise InputError(f"{role} is {given!r}; the program has {methods}")
    sizes: dict[str, int] = {}
    for name in sorted(program.method_names - set(program.constants)):
        try:
            meta = program.metadata(name)
        except UnsupportedError:
            continue
        tokens = meta.inputs[0] if len(meta.inputs) == 2 else None
        if tokens is not None and tokens.dtype in ("i64", "i32") and len(tokens.sizes) == 2:
            sizes[name] = tokens.sizes[1]
    if prefill is None and decode is None:
        if "forward" in sizes or not sizes:
            return "forward", "forward"
        if len(sizes) == 1:
            return next(iter(sizes)), next(iter(sizes))
    single = [name for name, size in sizes.items() if size == 1]
    several = [name for name, size in sizes.items() if size > 1]
    step = decode or (single[0] if len(single) == 1 else None)
    first = prefill or (several[0] if len(several) == 1 else step if decode else None)
    if step is None or first is None:
        raise InputError(
            f"the program has the decoders {', '.join(sizes) or 'none'}: say which one runs prompts (prefill=) and "
            "which one single tokens (decode=)"
        )
    return first, step


def check_state(step: Method, first: Method) -> None:
    """UnsupportedError unless both methods keep the same state."""
    names = [
        {
            value.name
            for delegate in method.delegates
            for value in delegate.graph.values
            if value.kind == "mutable" and value.alias is None
        }
        for method in (step, first)
    ]
    if names[0] != names[1]:
        raise UnsupportedError(
            f"methods {step.name} and {first.name} do not keep the same state, so that one cannot go on "
            f"where the other stopped: only one of them has {sorted(names[0] ^ names[1])}"
        )


def check_shared(step: Part, first: Part) -> None:
    """UnsupportedError unless both methods agree about state and tokens."""
    check_state(step.method, first.method)
    if step.convention.vocabulary != first.convention.vocabulary:
        raise UnsupportedError(
            f"methods {step.method.name} and {first.method.name} have {step.convention.vocabulary:,} and "
            f"{first.convention.vocabulary:,} logits"
        )
    if step.least != 1:
        raise UnsupportedError(f"method {step.method.name} does not take single tokens")
