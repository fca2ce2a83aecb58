"""The commands' options: what they may be, and how a command ends that cannot do what it was asked to."""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Callable
from typing import ParamSpec

from executorch_webgpu.runtime.errors import WebGPUDelegateError

_Arguments = ParamSpec("_Arguments")


def say(message: str) -> None:
    """A word to the person at the terminal, beside the lines."""
    print(message, file=sys.stderr, flush=True)


def command(main: Callable[_Arguments, int]) -> Callable[_Arguments, int]:
    """A command that ends with a sentence and the status 1 where a file, a program, a size or the device is wrong."""

    @functools.wraps(main)
    def guarded(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except (WebGPUDelegateError, OSError) as error:
            say(f"Error: {error}")
            return 1

    return guarded


def _integer(text: str, least: int, most: int | None = None) -> int:
    limits = f"of at least {least}" if most is None else f"from {least} to {most:,}"
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least or (most is not None and value > most):
        raise argparse.ArgumentTypeError(f"{text!r} is no integer {limits}")
    return value


def count(text: str) -> int:
    """An integer of at least 1."""
    return _integer(text, 1)


def count32(text: str) -> int:
    """An integer of at least 1 that fits an unsigned word."""
    return _integer(text, 1, 2**32 - 1)


def natural(text: str) -> int:
    """An integer of at least 0."""
    return _integer(text, 0)


def passes(text: str) -> int:
    """A number of timed passes: each takes two timestamps, and a query set holds at most 4,096."""
    return _integer(text, 1, 2048)


def counts(text: str) -> list[int]:
    """`1,2,3`: integers of at least 1."""
    return [count(part) for part in text.split(",")]


def naturals(text: str) -> list[int]:
    """`0,2,3`: integers of at least 0."""
    return [natural(part) for part in text.split(",")]


def amount(text: str) -> float:
    """A finite number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of at least 0")
    return value


def names(text: str) -> list[str]:
    """`a,b` as strings."""
    return [part.strip() for part in text.split(",")]


def add_common(parser: argparse.ArgumentParser) -> None:
    """Options that every benchmark takes."""
    parser.add_argument("--out", help="append the lines to this file")
    parser.add_argument("--adapter", help="a part of the adapter's name; default: the best one")
    parser.add_argument("--samples", type=passes, default=20, help="timed passes, at most 2,048")
    parser.add_argument("--warm-up", type=amount, default=0.3, help="seconds of the same work before timing")
    parser.add_argument(
        "--pass-ms", type=amount, default=4.0, help="milliseconds that a timed pass should last at least"
    )
    parser.add_argument(
        "--rotate-bytes", type=natural, default=256 << 20,
        help="distinct bytes that a pass walks over, so that no cache holds them",
    )  # fmt: skip
    parser.add_argument("--baseline-bytes", type=count, default=512 << 20, help="bytes of a buffer of the copy kernel")
    parser.add_argument(
        "--matrix-size", type=count, default=4096, help="M = N = K of the matrix product of the baseline"
    )
