"""Token ids as callers and programs give them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import InputError


def is_integer(value: object) -> bool:
    """Whether it is an integer of Python or numpy, and no bool."""
    if type(value) is int:  # asked for every token: five times as fast
        return True
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def token_id(place: int, value: Any, vocabulary: int, row: int | None = None) -> int:
    """A token id of a sequence, at `place` of what was given (for a batch `row`).

    Raises:
        InputError: it is no integer in [0, vocabulary).
    """
    if not is_integer(value) or not 0 <= value < vocabulary:
        where = "" if row is None else f"row {row}: "
        raise InputError(f"{where}token {place} is {value!r}, expected an id in [0, {vocabulary:,})")
    return int(value)


def stop_ids(constants: Mapping[str, Any]) -> frozenset[int]:
    """Ids that end a text as the program says (constant methods `get_eos_ids`, `get_eos_id`); may be empty.

    Raises:
        InputError: one is no integer.
    """
    found: set[int] = set()
    for name in ("get_eos_ids", "get_eos_id"):
        value = constants.get(name, ())
        for item in value if isinstance(value, list | tuple) else (value,):
            if not _whole(item):
                raise InputError(f"{name} is {value!r}, expected integers")
            found.add(int(item))
    return frozenset(found)


def constant_size(constants: Mapping[str, Any], names: Sequence[str]) -> int | None:
    """The first of these constant methods that there is; None without one.

    Raises:
        InputError: it is no positive integer.
    """
    for name in names:
        if name in constants:
            if not _whole(constants[name]) or constants[name] < 1:
                raise InputError(f"{name} is {constants[name]!r}, expected a positive integer")
            return int(constants[name])
    return None


def _whole(value: object) -> bool:
    """Whether it is an integer, or a float without a fraction, as which some programs keep them."""
    return is_integer(value) or (isinstance(value, float | np.floating) and float(value).is_integer())
