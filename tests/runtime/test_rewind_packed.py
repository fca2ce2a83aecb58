"""Rewinding rows whose KV caches are int8: every flow of checklist group F equals a fresh run of what it leaves."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from executorch_webgpu.runtime import BatchGenerator
from tests.runtime.batches import PROMPTS, grow
from tests.runtime.sessions import load
from tests.tiny_decoder import BATCH, CAPACITY

WAYS: list[int | None] = [None, 0]
PROMPT = PROMPTS[3]


@pytest.fixture(params=WAYS, ids=["ahead", "host"])
def steps(request: pytest.FixtureRequest) -> int | None:
    found: int | None = request.param
    return found


@pytest.fixture
def batch(steps: int | None) -> Iterator[BatchGenerator]:
    with BatchGenerator(load("ragged_int8"), steps_per_submit=steps) as made:
        yield made


def fresh(steps: int | None, tokens: tuple[int, ...], count: int) -> list[int]:
    """What follows `tokens` in caches of their own."""
    with BatchGenerator(load("ragged_int8"), steps_per_submit=steps) as made:
        made.append_tokens(0, tokens)
        return grow(made, count)[0]


def test_F11_caches_are_packed_and_scaled(batch: BatchGenerator) -> None:
    """The flows below are about int8: a quarter of the bytes of float32, and a scale for each token and head."""
    sizes = {name: buffer.size for name, buffer in batch.method.state.buffers().items()}
    codes, scales = (sorted(size for name, size in sizes.items() if end in name) for end in ("cache", "scales"))
    assert len(codes) == len(scales) == 2
    assert [code // scale for code, scale in zip(codes, scales, strict=True)] == [4, 4]  # 16 elements, 4 bytes


def test_F11_F1_F3_F5_back_to_several_lengths(batch: BatchGenerator, steps: int | None) -> None:
    batch.append_tokens(0, PROMPT)
    first = grow(batch, 12)[0]
    assert first == fresh(steps, PROMPT, 12)
    text = (*PROMPT, *first)
    for length in (15, 12, len(PROMPT) + 1, 3, 0):
        batch.rewind_to(0, length)
        if length == 0:
            batch.append_tokens(0, PROMPT)
        assert grow(batch, 5)[0] == fresh(steps, text[:length] or PROMPT, 5)
        batch.rewind_to(0, length)


def test_F11_F6_F7_F12_other_tokens_after_a_rewind(batch: BatchGenerator, steps: int | None) -> None:
    batch.append_tokens(0, PROMPT)
    first = grow(batch, 6)[0]
    batch.rewind_to(0, 7)
    batch.append_tokens(0, (250, 3, 77))
    grow(batch, 4)
    batch.rewind_to(0, 7)
    assert grow(batch, 4)[0] == first[2:6]
    batch.rewind_to(0, 3)
    batch.append_tokens(0, (12, 13))
    assert grow(batch, 6)[0] == fresh(steps, (*PROMPT[:3], 12, 13), 6)
    batch.rewind_to(0, 2)
    batch.append_tokens(0, PROMPT[2:])
    assert grow(batch, 6)[0] == first


def test_F11_F14_F18_rubbish_behind_each_rows_length(batch: BatchGenerator, steps: int | None) -> None:
    """Codes and scales of dropped rows are never read: they are made extreme and NaN."""
    batch.append_tokens(PROMPTS)
    first = grow(batch, 8)
    lengths = [6, 2, 12, 5]
    batch.rewind_to(lengths)
    on = batch.method.device
    for name, buffer in batch.method.state.buffers().items():
        rows = np.frombuffer(on.gpu.queue.read_buffer(buffer), np.uint32).reshape(BATCH, CAPACITY, -1).copy()
        for row, length in enumerate(lengths):
            rows[row, length - 1 :] = 0x7FC00000 if "scales" in name else 0x807F807F
        on.write(buffer, rows)
    kept = [(*prompt, *new)[:n] for prompt, new, n in zip(PROMPTS, first, lengths, strict=True)]
    assert grow(batch, 6) == [fresh(steps, tokens, 6) for tokens in kept]
    batch.method.reset()


def test_F11_J5_forks(batch: BatchGenerator, steps: int | None) -> None:
    batch.append_tokens(1, PROMPT)
    first = grow(batch, 4)[0]
    batch.fork(1, 3)
    batch.append_tokens(3, (9, 10))
    together = batch.generate_next([1, 3])
    assert together == [fresh(steps, text, 1)[0] for text in ((*PROMPT, *first), (*PROMPT, *first, 9, 10))]
