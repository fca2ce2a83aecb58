"""Rewinding rows whose KV caches are int8 or int4: every flow of checklist group F equals a fresh run of what it
leaves."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

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


@pytest.fixture(params=["int8", "int4"])
def kind(request: pytest.FixtureRequest) -> str:
    return f"ragged_{request.param}"


@pytest.fixture
def batch(kind: str, steps: int | None) -> Iterator[BatchGenerator]:
    with BatchGenerator(load(kind), steps_per_submit=steps) as made:
        yield made


@cache
def fresh(kind: str, steps: int | None, tokens: tuple[int, ...], count: int) -> list[int]:
    """What follows `tokens` in caches of their own."""
    with BatchGenerator(load(kind), steps_per_submit=steps) as made:
        made.append_tokens(0, tokens)
        return grow(made, count)[0]


def test_F11_caches_are_packed_and_scaled(batch: BatchGenerator, kind: str) -> None:
    """The flows below are about packed integers: 16 of 8 or 4 bits, and 4 bytes of a scale for each token and head."""
    sizes = {name: buffer.size for name, buffer in batch.method.state.buffers().items()}
    codes, scales = (sorted(size for name, size in sizes.items() if end in name) for end in ("cache", "scales"))
    assert len(codes) == len(scales) == 2
    wanted = 4 if kind == "ragged_int8" else 2
    assert [code // scale for code, scale in zip(codes, scales, strict=True)] == [wanted, wanted]


def test_F11_F1_F3_F5_back_to_several_lengths(batch: BatchGenerator, kind: str, steps: int | None) -> None:
    batch.append_tokens(0, PROMPT)
    first = grow(batch, 12)[0]
    assert first == fresh(kind, steps, PROMPT, 12)
    text = (*PROMPT, *first)
    for length in (15, 12, len(PROMPT) + 1, 3, 0):
        batch.rewind_to(0, length)
        if length == 0:
            batch.append_tokens(0, PROMPT)
        assert grow(batch, 5)[0] == fresh(kind, steps, text[:length] or PROMPT, 5)
        batch.rewind_to(0, length)


def test_F11_F2_two_rows_to_0(batch: BatchGenerator, kind: str, steps: int | None) -> None:
    expected = [fresh(kind, steps, PROMPTS[row], 8) for row in (0, 2)]
    for _ in range(3):
        batch.append_tokens([PROMPTS[0], None, PROMPTS[2], None])
        assert grow(batch, 8) == expected
        batch.rewind_to([0, None, 0, None])
    assert [batch.length(row) for row in range(BATCH)] == [0] * BATCH


def test_F11_F4_half_of_what_was_generated(batch: BatchGenerator, kind: str, steps: int | None) -> None:
    batch.append_tokens([None, PROMPT, PROMPTS[0], None])
    first = grow(batch, 10)
    assert first == [fresh(kind, steps, prompt, 10) for prompt in (PROMPT, PROMPTS[0])]
    batch.rewind_to([None, len(PROMPT) + 5, len(PROMPTS[0]) + 5, None])
    assert grow(batch, 5) == [row[5:] for row in first]


def test_F11_F8_the_last_prompt_token_again(batch: BatchGenerator, kind: str, steps: int | None) -> None:
    batch.append_tokens(0, PROMPT)
    first = grow(batch, 5)[0]
    batch.rewind_to(0, len(PROMPT) - 1)
    batch.append_tokens(0, PROMPT[-1:])
    assert grow(batch, 5)[0] == first == fresh(kind, steps, PROMPT, 5)


def test_F11_F9_deep(batch: BatchGenerator, kind: str, steps: int | None) -> None:
    """To the last row of the caches, then far back."""
    batch.append_tokens(0, PROMPT)
    first = grow(batch, CAPACITY - len(PROMPT))[0]
    assert batch.finished(0)
    for length in (CAPACITY - 3, len(PROMPT)):
        batch.rewind_to(0, length)
        assert grow(batch, CAPACITY - length)[0] == first[length - len(PROMPT) :]
    assert first == fresh(kind, steps, PROMPT, CAPACITY - len(PROMPT))


def test_F11_F9_after_50_tokens(steps: int | None) -> None:
    with BatchGenerator(load("ragged_int8_long"), steps_per_submit=steps) as batch:
        batch.append_tokens(0, PROMPT)
        first = grow(batch, 50)[0]
        for back in (3, 50):
            batch.rewind_to(0, len(PROMPT) + 50 - back)
            assert grow(batch, back)[0] == first[-back:]


def test_F11_F6_F7_F12_other_tokens_after_a_rewind(batch: BatchGenerator, kind: str, steps: int | None) -> None:
    batch.append_tokens(0, PROMPT)
    first = grow(batch, 6)[0]
    batch.rewind_to(0, 7)
    batch.append_tokens(0, (250, 3, 77))
    grow(batch, 4)
    batch.rewind_to(0, 7)
    assert grow(batch, 4)[0] == first[2:6]
    batch.rewind_to(0, 3)
    batch.append_tokens(0, (12, 13))
    assert grow(batch, 6)[0] == fresh(kind, steps, (*PROMPT[:3], 12, 13), 6)
    batch.rewind_to(0, 2)
    batch.append_tokens(0, PROMPT[2:])
    assert grow(batch, 6)[0] == first


def test_F11_F14_F18_rubbish_behind_each_rows_length(batch: BatchGenerator, kind: str, steps: int | None) -> None:
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
    assert grow(batch, 6) == [fresh(kind, steps, tokens, 6) for tokens in kept]
    batch.method.reset()


def test_F11_J5_forks(batch: BatchGenerator, kind: str, steps: int | None) -> None:
    batch.append_tokens(1, PROMPT)
    first = grow(batch, 4)[0]
    batch.fork(1, 3)
    batch.append_tokens(3, (9, 10))
    together = batch.generate_next([1, 3])
    assert together == [fresh(kind, steps, text, 1)[0] for text in ((*PROMPT, *first), (*PROMPT, *first, 9, 10))]
