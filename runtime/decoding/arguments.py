"""Arguments that callers give to generators, checked before anything happens."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from os import PathLike
from typing import Any

from ..errors import InputError
from ..methods.method import Method
from ..methods.program import Program
from .sampling import Sampling
from .token_ids import is_integer


def check_count(name: str, value: Any, least: int = 0) -> int | None:
    """An integer of at least `least`, or None.

    Raises:
        InputError: it is neither.
    """
    if value is None:
        return None
    if not is_integer(value) or value < least:
        raise InputError(f"{name} is {value!r}, expected an integer of at least {least}, or None")
    return int(value)


def check_sampling(value: Any) -> Sampling:
    """Settings of `Sampling`. Raises InputError for anything else."""
    if not isinstance(value, Sampling):
        raise InputError(f"sampling is {value!r}, expected Sampling(temperature=..., top_k=..., ...)")
    return value


def check_stop_ids(value: Any) -> frozenset[int] | None:
    """Ids, or None. Raises InputError for anything else, also for a single id or a text."""
    if value is None:
        return None
    if isinstance(value, str | bytes) or not isinstance(value, Collection) or not all(map(is_integer, value)):
        raise InputError(f"stop_ids is {value!r}, expected integers in a list, tuple or set, or None")
    return frozenset(int(token) for token in value)


def given_ids(name: str, value: Any) -> list[Any]:
    """Token ids in a list, from a list, a numpy array, a torch tensor or anything else to iterate over; ids themselves
    are not looked at.

    Raises:
        InputError: it is none of these.
    """
    return given_list(name, value, "token ids in a list; a tokenizer makes them from text")


def given_list(name: str, value: Any, expected: str) -> list[Any]:
    """As `given_ids`, of anything; `expected` says what, for the message."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise InputError(f"{name} is {value!r}, expected {expected}")
    return list(value)


def check_source(value: Any) -> None:
    """InputError for anything but a loaded program, or a method that was not closed."""
    if isinstance(value, Method):
        if value.closed:
            raise InputError(f"method {value.name} was closed: load it again")
        return
    if not isinstance(value, Program):
        shown = "its bytes" if isinstance(value, bytes) else repr(str(value) if isinstance(value, PathLike) else value)
        raise InputError(f"expected a program or a method, got {shown}: load it with Runtime.get().load_program(...)")


def given_constants(value: Any, source: Program | Method) -> dict[str, Any]:
    """Values of constant methods by name: of a program, a dict, or None (of `source`, where that is a program).

    Raises:
        InputError: it is none of these.
    """
    if value is None:
        value = source if isinstance(source, Program) else {}
    if isinstance(value, Program):
        return value.constants
    if not isinstance(value, Mapping):
        raise InputError(f"constants is {value!r}, expected a program, or a dict of values by name")
    return dict(value)


def check_callback(name: str, value: Any) -> None:
    """InputError for what cannot be called and is not None."""
    if value is not None and not callable(value):
        raise InputError(f"{name} is {value!r}, expected a function, or None")


def check_positive(name: str, value: Any) -> int:
    """InputError unless it is a positive integer."""
    if not is_integer(value) or value < 1:
        raise InputError(f"{name} is {value!r}, expected an integer of at least 1")
    return int(value)
