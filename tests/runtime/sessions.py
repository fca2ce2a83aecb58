"""What the tests of sessions, rewinding and speculation share: programs by kind, and plain runs to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from executorch_webgpu.runtime import Generator, Program, Runtime, Sampling
from executorch_webgpu.runtime.decoding.sampling import GREEDY
from tests import tiny_decoder, tiny_states
from tests.harness import device

PROMPT = [1, 2, 3]
DRAWN = Sampling(temperature=1.1, top_k=60, top_p=0.97, seed=11)


@cache
def load(kind: str) -> Program:
    """A program of `tiny_decoder` or `tiny_states`, loaded once; `KIND on DEVICE` names another device."""
    kind, _, on = kind.partition(" on ")
    pte = tiny_decoder.build(kind).pte if kind in tiny_decoder.CONSTANTS else tiny_states.build(kind)
    return Runtime(device(on or "full")).load_program(pte)


@cache
def golden(kind: str, prompt: tuple[int, ...], count: int, sampling: Sampling = GREEDY) -> tuple[int, ...]:
    """The tokens of a fresh generator that chooses each on the host."""
    with Generator(load(kind), steps_per_submit=0) as generator:
        return generator.generate(prompt, count, (), sampling).tokens


def more(generator: Generator, count: int, sampling: Sampling = GREEDY) -> tuple[int, ...]:
    """Further tokens, without stopping."""
    return generator.generate((), count, (), sampling).tokens


def after(kind: str, tokens: Sequence[int], count: int, sampling: Sampling = GREEDY) -> tuple[int, ...]:
    """What follows `tokens` in a fresh run."""
    return golden(kind, tuple(tokens), count, sampling)
