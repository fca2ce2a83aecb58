"""Arguments that callers give to generators, checked before anything happens."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from os import PathLike
from typing import Any

from .errors import InputError
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
    """InputError for a file where a loaded program or method is expected."""
    if isinstance(value, str | bytes | PathLike):
        shown = "its bytes" if isinstance(value, bytes) else repr(str(value))
        raise InputError(f"expected a program or a method, got {shown}: load it with Runtime.get().load_program(...)")
