"""What the tests of batch rows share."""

from __future__ import annotations

from executorch_webgpu.runtime import BatchGenerator, Sampling
from executorch_webgpu.runtime.decoding.sampling import GREEDY
from tests.runtime.sessions import golden

PROMPTS: list[tuple[int, ...]] = [(1, 2, 3), (40,), (9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 11), (100, 200, 33, 44, 55)]
"""One for each row of the tiny programs."""
DRAWN = Sampling(temperature=1.1, top_k=60, top_p=0.97, seed=11)


def solo(tokens: tuple[int, ...], count: int, sampling: Sampling = GREEDY) -> list[int]:
    """What follows `tokens` where they are alone, in a program for one sequence."""
    return list(golden("llama", tokens, count, sampling))


def grow(batch: BatchGenerator, count: int, sampling: Sampling = GREEDY) -> list[list[int]]:
    """`count` more tokens of all rows that have any, in calls of all of them; by row."""
    found = [batch.generate_next(sampling=sampling) for _ in range(count)]
    return [list(row) for row in zip(*found, strict=True)]
