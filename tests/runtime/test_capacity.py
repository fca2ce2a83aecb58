"""How many tokens a sequence may have, where the program names more than its caches hold."""

from __future__ import annotations

import numpy as np
import pytest

from executorch_webgpu.runtime import BatchGenerator, Generator, InputError, Runtime
from executorch_webgpu.runtime.decoding import decoder
from executorch_webgpu.runtime.decoding.decoder import find_convention, find_ragged
from executorch_webgpu.runtime.decoding.resident import Resident, find_whole
from tests import tiny_decoder
from tests.harness import device
from tests.runtime.sessions import PROMPT, golden, load
from tests.tiny_decoder import CAPACITY
from tests.tiny_states import EXACT, LONG, RING

MANY = 2 * CAPACITY
DISAGREE = r"24 tokens \(get_max_context_len is 48, but the program takes positions up to 23 only\); shorten"


@pytest.mark.parametrize("kind", ["llama", "static", "hugging_face", "i32", "both", "exact"])
@pytest.mark.parametrize("steps", [None, 0], ids=["ahead", "host"])
def test_no_more_tokens_than_rows(kind: str, steps: int | None) -> None:
    """The end is known from the beginning: appending too much runs nothing, and a text ends as at any capacity."""
    with Generator(load(kind), {"get_max_context_len": MANY}, steps_per_submit=steps) as generator:
        assert (generator.capacity, generator.room) == (CAPACITY, CAPACITY)
        assert generator.rewindable
        before = device("full").counters.copy()
        with pytest.raises(
            InputError, match="appending 25 tokens after 0 would exceed the program's capacity of " + DISAGREE
        ):
            generator.append_tokens([1] * (CAPACITY + 1))
        with pytest.raises(
            InputError, match=r"25 tokens exceed the program's capacity of 24 \(get_max_context_len is 48"
        ):
            generator.become([1] * (CAPACITY + 1))
        assert device("full").counters.since(before).submits == 0
        result = generator.generate(PROMPT, stop_ids=())
        assert result.stop_reason == "capacity"
        assert result.tokens == golden("llama", tuple(PROMPT), CAPACITY - len(PROMPT))
        assert generator.finished
        with pytest.raises(InputError, match="generating a token after 24 would exceed the program's capacity of 24"):
            generator.generate_next()
        generator.rewind_to(len(PROMPT))
        assert generator.generate((), 4, ()).tokens == result.tokens[:4]
        generator.reset()
        generator.append_tokens([1] * CAPACITY)
        assert generator.room == 0


def test_what_a_program_names_is_kept_where_it_fits() -> None:
    method = load("llama").load_method()
    for named in (1, CAPACITY - 1, CAPACITY):
        found = find_convention(method, {"get_max_context_len": named})
        assert (found.capacity, found.note) == (named, "")
    found = find_convention(method, {"get_max_seq_len": CAPACITY + 1})
    assert found.capacity == CAPACITY
    assert found.note == " (get_max_seq_len is 25, but the program takes positions up to 23 only)"
    method.close()


def test_it_is_found_without_work_on_the_gpu() -> None:
    method = load("llama").load_method()
    before = device("full").counters.copy()
    find_convention(method, {"get_max_context_len": MANY})
    done = device("full").counters.since(before)
    assert (done.buffers, done.bind_groups, done.writes, done.submits) == (0, 0, 0, 0)
    method.close()


# -- methods that take exactly so many tokens


@pytest.mark.parametrize("named", [None, CAPACITY - 1, CAPACITY, CAPACITY + 1, MANY])
def test_prompt_methods_of_a_fixed_size(named: int | None) -> None:
    """Their calls begin at the rows less their size at most; what counts are the tokens after the call."""
    method = load("exact").load_method("prefill")
    constants = {} if named is None else {"get_max_context_len": named}
    found = find_convention(method, constants, prompts=True)
    assert found.capacity == min(CAPACITY, named or CAPACITY)
    assert bool(found.note) == (named is not None and named > CAPACITY)
    method.execute([np.ones((1, EXACT), np.int64), np.array([CAPACITY - EXACT])])
    with pytest.raises(InputError):
        method.execute([np.ones((1, EXACT), np.int64), np.array([CAPACITY - EXACT + 1])])
    method.close()


def test_a_capacity_below_the_size_of_a_call_and_a_size_that_is_not_taken() -> None:
    method = load("exact").load_method("prefill")
    assert find_convention(method, {"get_max_context_len": EXACT - 1}, prompts=True).capacity == EXACT - 1
    draft = find_convention(method, {}, prompts=True)
    assert decoder._checked_capacity(method, draft, 1, MANY) == MANY, "single tokens are refused at any position"
    assert decoder._checked_capacity(method, draft, 1, None) is None
    method.close()


# -- rings


@pytest.mark.parametrize(("named", "expected"), [(RING - 1, RING - 1), (RING + 5, RING + 5), (LONG, LONG), (200, LONG)])
def test_rings_are_smaller_than_the_context(named: int, expected: int) -> None:
    """What ends a sequence is the table of position embeddings, not the 16 rows of the ring."""
    with Generator(load("ring"), {"get_max_context_len": named}) as generator:
        assert generator.capacity == expected
        assert bool(generator.convention.note) == (named > LONG)
        result = generator.generate(PROMPT, stop_ids=())
        assert result.stop_reason == "capacity"
        assert result.tokens == golden("ring", tuple(PROMPT), LONG - len(PROMPT))[: expected - len(PROMPT)]
        assert not generator.rewindable


# -- batches


@pytest.mark.parametrize("kind", ["ragged", "ragged_int8"])
def test_rows_of_batches_are_no_longer_than_their_caches(kind: str) -> None:
    with BatchGenerator(load(kind), {"get_max_context_len": MANY}) as batch:
        assert batch.capacity == CAPACITY
        before = device("full").counters.copy()
        wanted = (
            r"row 1: appending 25 .* capacity of 24 tokens \(get_max_context_len is 48, but the caches have 24 rows\)"
        )
        with pytest.raises(InputError, match=wanted):
            batch.append_tokens(1, [1] * (CAPACITY + 1))
        assert device("full").counters.since(before).submits == 0
        batch.append_tokens(1, PROMPT)
        found = [batch.generate_next(1) for _ in range(CAPACITY - len(PROMPT))]
        assert batch.finished(1)
        if kind == "ragged":
            assert tuple(found) == golden("llama", tuple(PROMPT), CAPACITY - len(PROMPT))
        for named in (10, CAPACITY):
            kept = find_ragged(batch.method, {"get_max_context_len": named})
            assert (kept.capacity, kept.note) == (named, "")


def test_a_batch_of_one_row_as_a_sequence() -> None:
    with Generator(load("ragged_one"), {"get_max_context_len": MANY}) as generator:
        assert generator.capacity == CAPACITY
        with pytest.raises(InputError, match=r"24 tokens \(get_max_context_len is 48, but the caches have 24 rows\)"):
            generator.append_tokens([1] * (CAPACITY + 1))


@pytest.mark.parametrize("order", [(CAPACITY, CAPACITY - 4), (CAPACITY - 4, CAPACITY)], ids=["smaller", "larger"])
def test_a_loop_of_another_capacity_is_made_in_the_middle_of_a_run(order: tuple[int, int]) -> None:
    """As by another thread, before it writes anything: what chooses tokens goes to it, and the run begins again."""
    program = Runtime(device("full")).load_program(tiny_decoder.build("llama").pte)
    with program:
        one, two = (
            Generator(program.load_method(), {"get_max_context_len": capacity}, steps_per_submit=1)
            for capacity in order
        )
        assert (one.capacity, two.capacity) == order
        expected = golden("llama", tuple(PROMPT), 12)
        stream = one.stream(PROMPT, 12, ())
        found = [next(stream) for _ in range(4)]
        assert two.capacity is not None
        Resident.of(find_whole(two.method, two.convention), two.convention, two.capacity)
        found += [next(stream) for _ in range(4)]
        assert two.generate(PROMPT, 12, ()).tokens == expected
        assert (*found, *stream) == expected
