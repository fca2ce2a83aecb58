"""Batches that refuse bad input as a whole, and conventions that name each other."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from executorch_webgpu.runtime import (
    BatchGenerator,
    Generator,
    InputError,
    UnsupportedError,
    WebGPUDelegateError,
)
from executorch_webgpu.runtime.decoding.decoder import find_ragged
from executorch_webgpu.runtime.decoding.sampling import GREEDY
from tests.runtime.batches import DRAWN, PROMPTS, grow, solo
from tests.runtime.sessions import load
from tests.tiny_decoder import BATCH, CAPACITY, STOP, VOCAB


@pytest.fixture(params=["ragged", "ragged_all"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[None, 0], ids=["ahead", "host"])
def batch(kind: str, request: pytest.FixtureRequest) -> Iterator[BatchGenerator]:
    with BatchGenerator(load(kind), steps_per_submit=request.param) as made:
        yield made


# -- bad input


def test_D1_bad_rows_among_good_ones_change_nothing(batch: BatchGenerator) -> None:
    batch.append_tokens(PROMPTS)
    batch.generate_next()
    tokens = [batch.tokens(row) for row in range(BATCH)]
    on = batch.method.device
    before = on.counters.copy()
    full = range(CAPACITY)
    for call, message in [
        (lambda: batch.append_tokens([(1,), (2,), full, (3,)]), "row 2: appending 24 tokens after 12 would exceed"),
        (lambda: batch.append_tokens([(1,), (), (2,), (3,)]), "row 1: no tokens to append"),
        (lambda: batch.append_tokens([None] * BATCH), "no tokens to append"),
        (lambda: batch.append_tokens([(1,), (2,), (3,), (VOCAB,)]), r"row 3: token 0 is 260, expected an id in \[0, 2"),
        (lambda: batch.append_tokens([(1,), (2,), (3,), (4, -1)]), "row 3: token 1 is -1"),
        (lambda: batch.append_tokens([(1,), (2,), (3,), (True,)]), "row 3: token 0 is True"),
        (lambda: batch.append_tokens([(1,), (2,)]), "2 entries for 4 rows"),
        (lambda: batch.append_tokens(4, (1,)), r"there is no row 4: expected an integer in \[0, 4\)"),
        (lambda: batch.append_tokens(-1, (1,)), "there is no row -1"),
        (lambda: batch.append_tokens(0, ()), "row 0: no tokens to append"),
        (lambda: batch.rewind_to([0, 1, 13, 0]), "row 2: cannot rewind to 13: the row has 12 tokens"),
        (lambda: batch.rewind_to([0, 1, -1, 0]), "row 2: cannot rewind to -1"),
        (lambda: batch.rewind_to([0, 1, 2]), "3 entries for 4 rows"),
        (lambda: batch.rewind_to(1, 99), "row 1: cannot rewind to 99"),
        (lambda: batch.fork(0, 0), "cannot be forked to itself"),
        (lambda: batch.fork(0, 7), "there is no row 7"),
        (lambda: batch.generate_next([0, 0]), "a row occurs twice"),
        (lambda: batch.generate_next([0, 5]), "there is no row 5"),
        (lambda: batch.generate_next([0, 1], [GREEDY]), "1 sampling settings for 2 rows"),
        (lambda: batch.tokens(9), "there is no row 9"),
    ]:
        with pytest.raises(InputError, match=message):
            call()
    assert on.counters.since(before).__dict__ == dict.fromkeys(before.__dict__, 0)
    assert [batch.tokens(row) for row in range(BATCH)] == tokens
    assert grow(batch, 3) == [solo(prompt, 4)[1:] for prompt in PROMPTS]


def test_D2_up_to_the_capacity_exactly(batch: BatchGenerator) -> None:
    tokens = tuple(range(CAPACITY - 1))
    batch.append_tokens([tokens, (1, 2), None, None])
    assert batch.generate_next(0) == solo(tokens, 1)[0]
    assert batch.finished(0)
    with pytest.raises(InputError, match="row 0: generating a token after 24 would exceed"):
        batch.generate_next([1, 0])
    assert batch.length(1) == 2
    with pytest.raises(InputError, match="row 0: appending 1 tokens after 24"):
        batch.append_tokens([(1,), (1,), None, None])
    assert batch.generate_next(1) == solo((1, 2), 1)[0]
    with pytest.raises(InputError, match="row 2: there is nothing to continue"):
        batch.generate_next([1, 2])


@pytest.mark.parametrize("past", [-1, CAPACITY, CAPACITY + 1, 2**31 - 1])
def test_D1_lengths_are_checked_before_anything_is_submitted(kind: str, past: int) -> None:
    method = load(kind).load_method()
    ragged = find_ragged(method, load(kind).constants)
    before = method.device.counters.copy()
    with pytest.raises(InputError):
        method.execute(ragged.inputs([(1,), (2,), (3,), (4,)], [0, 0, past, 0], 1))
    assert method.device.counters.since(before).submits == 0
    method.close()


def test_bad_logits_of_a_row_leave_all_rows_as_they_were(batch: BatchGenerator) -> None:
    batch.append_tokens(PROMPTS)
    batch.generate_next()
    on = batch.method.device
    for buffer in batch.method.state.buffers().values():
        size = buffer.size // BATCH
        on.write(buffer, np.full(4, np.nan, np.float32), size)  # the first position of row 1
    tokens = [batch.tokens(row) for row in range(BATCH)]
    with pytest.raises(WebGPUDelegateError, match="row 1: logits are NaN"):
        batch.generate_next()
    assert [batch.tokens(row) for row in range(BATCH)] == tokens
    assert batch.generate_next([0, 2, 3]) == [solo(PROMPTS[row], 2)[1] for row in (0, 2, 3)]
    batch.method.reset()


def test_closed_batches_say_so(kind: str) -> None:
    program = load(kind)
    batch = BatchGenerator(program)
    batch.append_tokens(0, PROMPTS[0])
    batch.close()
    batch.close()
    for call in (
        lambda: batch.append_tokens(0, (1,)), batch.generate_next, lambda: batch.rewind_to(0, 0), batch.reset,
        lambda: batch.fork(0, 1), lambda: batch.join((1,)), batch.step, lambda: batch.logits(0),
    ):  # fmt: skip
        with pytest.raises(InputError, match="this batch was closed"):
            call()
    method = program.load_method()
    other = BatchGenerator(method, program)
    method.close()
    with pytest.raises(InputError, match="was closed"):
        other.append_tokens(0, (1,))
    other.close()


def test_states_used_by_another_are_noticed() -> None:
    program = load("ragged")
    method = program.load_method()
    one = BatchGenerator(method, program)
    one.append_tokens(0, PROMPTS[0])
    other = BatchGenerator(method, program)
    other.append_tokens(0, PROMPTS[2])
    with pytest.raises(InputError, match="another generator has used this one's state"):
        one.generate_next(0)
    assert other.generate_next(0) == solo(PROMPTS[2], 1)[0]
    one.reset()
    one.close()
    other.close()
    method.close()


# -- conventions


def test_conventions_name_each_other() -> None:
    ragged = load("ragged").load_method()
    with pytest.raises(
        UnsupportedError, match="batches of 4 rows with lengths of their own; BatchGenerator runs those"
    ):
        Generator(ragged, load("ragged"))
    llama = load("llama").load_method()
    with pytest.raises(UnsupportedError, match="it has 2 inputs, not 3"):
        BatchGenerator(llama, load("llama"))
    with pytest.raises(UnsupportedError, match="none of the program's methods take three inputs"):
        BatchGenerator(load("llama"))
    found = find_ragged(ragged, load("ragged").constants)
    assert (found.rows, found.chunk, found.vocabulary, found.capacity, found.every) == (4, 8, VOCAB, CAPACITY, False)
    assert find_ragged(ragged, {}) == found, "the capacity is found without constant methods"
    for method in (ragged, llama):
        method.close()


@pytest.mark.parametrize("steps", [None, 0, 3])
def test_one_row_is_driven_by_either(steps: int | None) -> None:
    program = load("ragged_one")
    for prompt in PROMPTS:
        with Generator(program, steps_per_submit=steps) as generator:
            assert (generator.fallback is None) == (steps != 0)
            for sampling in (GREEDY, DRAWN):
                assert list(generator.generate(prompt, 9, (), sampling).tokens) == solo(prompt, 9, sampling)
                generator.rewind_to(2 if len(prompt) > 2 else 0)
                generator.reset()
        with BatchGenerator(program, steps_per_submit=steps) as batch:
            batch.append_tokens(0, prompt)
            assert [batch.generate_next(0) for _ in range(5)] == solo(prompt, 5)


def test_stop_ids_are_those_of_the_program(batch: BatchGenerator) -> None:
    assert batch.stop_ids == {STOP}
    with pytest.raises(InputError, match="steps_per_submit is -1"):
        BatchGenerator(load("ragged"), steps_per_submit=-1)
    with pytest.raises(InputError, match="chunk is 0"):
        BatchGenerator(load("ragged"), chunk=0)
