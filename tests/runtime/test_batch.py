"""Requests in a batch: they join, leave and wait; each text is what its prompt gives alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from executorch_webgpu.runtime import BatchGenerator, InputError, Request, Sampling
from executorch_webgpu.runtime.batches.loop import BatchLoop
from executorch_webgpu.runtime.decoding.sampling import GREEDY
from tests.harness import device
from tests.runtime.sessions import golden, load
from tests.tiny_decoder import BATCH, CAPACITY, VOCAB

PROMPTS: list[tuple[int, ...]] = [
    tuple((37 * number + 11 * place + 3) % 256 for place in range(length))
    for number, length in enumerate((3, 1, 11, 5, 2, 14, 7, 4, 1, 9, 6, 3, 13, 2, 8, 10))
]
"""16 unequal prompts."""
DRAWN = Sampling(temperature=1.1, top_k=60, top_p=0.97, seed=11)
MIXED = [GREEDY, DRAWN, Sampling(repetition_penalty=1.4), Sampling(temperature=1.3, min_p=0.03, seed=2**40)]
WAYS = [("ragged", 0), ("ragged", None), ("ragged", 8), ("ragged_all", 0), ("ragged_all", 1)]


@pytest.fixture(params=WAYS, ids=["host", "ahead", "ahead-8", "all-host", "all-ahead-1"])
def batch(request: pytest.FixtureRequest) -> Iterator[BatchGenerator]:
    kind, steps = request.param
    with BatchGenerator(load(kind), steps_per_submit=steps, chunk=4) as made:
        yield made


@pytest.fixture
def ahead() -> Iterator[BatchGenerator]:
    with BatchGenerator(load("ragged"), chunk=4, steps_per_submit=2) as made:
        yield made


def solo(tokens: Sequence[int], count: int, sampling: Sampling = GREEDY) -> list[int]:
    """What follows `tokens` where they are alone, in a program for one sequence."""
    return list(golden("llama", tuple(tokens), count, sampling))


def ask(prompt: Sequence[int], count: int | None = 8, sampling: Sampling = GREEDY) -> Request:
    return Request(prompt, count, (), sampling)


# -- equal to solo runs


@pytest.mark.parametrize("count", [3, 16])
def test_C15_texts_equal_their_solo_runs_in_any_order(batch: BatchGenerator, count: int) -> None:
    """3 prompts in 4 rows, and 16, most of which wait for a row; greedy, drawn and penalised ones in one batch."""
    order = np.random.default_rng(count).permutation(count).tolist()
    wanted = {n: solo(PROMPTS[n], 8, MIXED[n % len(MIXED)]) for n in order}
    for numbers in (order, order[::-1]):
        found = batch.run([ask(PROMPTS[n], 8, MIXED[n % len(MIXED)]) for n in numbers])
        assert [request.tokens for request in found] == [wanted[n] for n in numbers]
        assert {request.stop_reason for request in found} == {"max_new_tokens"}
        assert [batch.length(row) for row in range(BATCH)] == [0] * BATCH


def test_D2_texts_end_exactly_at_the_capacity(batch: BatchGenerator) -> None:
    found = batch.run([ask(prompt, None) for prompt in PROMPTS[:6]])
    for prompt, request in zip(PROMPTS, found, strict=False):
        assert request.tokens == solo(prompt, CAPACITY - len(prompt))
        assert request.stop_reason == "capacity"
    full, almost = batch.run([ask(range(CAPACITY)), ask(range(CAPACITY - 1))])
    assert (full.tokens, full.stop_reason) == ([], "capacity")
    assert (almost.tokens, almost.stop_reason) == (solo(range(CAPACITY - 1), 1), "capacity")


def test_rows_are_reused_by_longer_and_shorter_texts(ahead: BatchGenerator) -> None:
    on = ahead.method.device
    ahead.run([ask(PROMPTS[5], None)] + [ask(prompt) for prompt in PROMPTS[:4]])  # all plans are made
    before = on.counters.copy()
    for prompt, count in [(PROMPTS[5], 10), (PROMPTS[1], 3), (PROMPTS[2], 13), (PROMPTS[4], 1)]:
        wanted = ahead.run([ask(prompt, count)] * 1)
        assert wanted[0].tokens == solo(prompt, count)
    assert (on.counters.since(before).pipelines) == 0


def test_stop_ids_end_a_text(batch: BatchGenerator) -> None:
    wanted = [solo(prompt, 12) for prompt in PROMPTS[:4]]
    stops = [tokens[4] for tokens in wanted]
    found = batch.run([Request(prompt, 12, (stop,)) for prompt, stop in zip(PROMPTS, stops, strict=False)])
    for request, tokens, stop in zip(found, wanted, stops, strict=True):
        assert request.tokens == tokens[: tokens.index(stop)]
        assert request.stop_reason == "stop_token"


def test_no_tokens_at_all(batch: BatchGenerator) -> None:
    nothing, one = batch.run([ask(PROMPTS[0], 0), ask(PROMPTS[1], 1)])
    assert (nothing.tokens, nothing.stop_reason) == ([], "max_new_tokens")
    assert one.tokens == solo(PROMPTS[1], 1)


# -- joining and leaving


def test_joining_in_the_middle(batch: BatchGenerator) -> None:
    """Each step another request joins; running ones go on as if alone."""
    waiting = [ask(prompt, 5 + number, MIXED[number % 4]) for number, prompt in enumerate(PROMPTS[:10])]
    asked = list(waiting)
    told: dict[Request, list[int]] = {request: [] for request in asked}
    while waiting or batch.requests:
        if waiting:
            batch.join(waiting.pop(0))
        for request, token in batch.step():
            told[request].append(token)
    for number, request in enumerate(asked):
        assert request.tokens == solo(PROMPTS[number], 5 + number, MIXED[number % 4])
        assert told[request] == request.tokens


def test_leaving_in_the_middle(batch: BatchGenerator) -> None:
    """Requests are cancelled after some tokens, also while they wait; the others do not notice."""
    asked = [batch.join(ask(prompt, 9)) for prompt in PROMPTS[:7]]
    gone = {asked[1]: 3, asked[4]: 1}
    batch.cancel(asked[6])
    assert (asked[6].tokens, asked[6].stop_reason) == ([], "stopped")
    for request, _ in batch.events():
        if gone.get(request) == len(request.tokens) or (request in gone and len(request.tokens) > gone[request]):
            batch.cancel(request)
    for number, request in enumerate(asked[:6]):
        assert request.tokens == solo(PROMPTS[number], 9)[: len(request.tokens)]
        assert len(request.tokens) == 9 or request in gone
    batch.cancel(asked[0])
    assert asked[0].stop_reason == "max_new_tokens"


def test_callers_stop_texts(batch: BatchGenerator) -> None:
    found = batch.run([ask(prompt) for prompt in PROMPTS[:5]], lambda request, _: len(request.prompt_ids) == 11)
    for number, request in enumerate(found):
        assert request.tokens == solo(PROMPTS[number], 1 if number == 2 else 8)
        assert request.stop_reason == ("stopped" if number == 2 else "max_new_tokens")


def test_prompts_do_not_starve_running_rows(ahead: BatchGenerator) -> None:
    """A long prompt runs in pieces; each such call gives the other row its next token."""
    short = ahead.join(ask(PROMPTS[1], 20))
    while len(short.tokens) < 2:
        ahead.step()
    ahead.step()
    had = len(short.tokens)
    long = ahead.join(ask(PROMPTS[5], 2))
    pieces = -(-(len(PROMPTS[5]) - 1) // ahead.chunk)
    for number in range(pieces):
        before = len(short.tokens)
        ahead.step()
        assert len(short.tokens) > before, number
        assert not long.tokens
    assert len(short.tokens) >= had + pieces
    list(ahead.events())
    assert short.tokens == solo(PROMPTS[1], 20)
    assert long.tokens == solo(PROMPTS[5], 2)


def test_a_steps_cost(ahead: BatchGenerator) -> None:
    """Rows that run on: a submit of two steps reads their tokens, and makes and writes nothing; a row that leaves
    costs one write of 4 bytes."""
    on = ahead.method.device
    wanted = solo(PROMPTS[1], 18)
    asked = [ahead.join(ask(PROMPTS[1], 18)) for _ in range(3)]
    asked.append(ahead.join(ask(PROMPTS[1], 9)))
    while not asked[0].tokens:
        ahead.step()
    before = on.counters.copy()
    while not asked[3].done:
        made = on.counters.since(before)
        assert (made.buffers, made.bind_groups, made.pipelines, made.bytes_written) == (0, 0, 0, 0)
        ahead.step()
    list(ahead.events())
    made = on.counters.since(before)
    assert (made.buffers, made.bind_groups, made.pipelines, made.bytes_written) == (0, 0, 0, 16)
    assert made.bytes_read == made.reads * 2 * 4 * BATCH
    assert [request.tokens for request in asked] == [wanted] * 3 + [wanted[:9]]


def test_continuing_a_row(batch: BatchGenerator) -> None:
    """A request on a row of the caller's: the sequence stays, may be rewound and forked, and another one goes on."""
    batch.append_tokens(2, PROMPTS[0])
    first = batch.join((), 4, (), row=2)
    other = batch.join(ask(PROMPTS[3], 9))
    while not first.done:
        batch.step()
    assert batch.tokens(2) == (*PROMPTS[0], *solo(PROMPTS[0], 4))
    batch.rewind_to(2, 5)
    batch.fork(2, 3)
    again = [batch.join((7, 8), 5, (), row=2), batch.join((9,), 5, (), DRAWN, row=3)]
    list(batch.events())
    kept = (*PROMPTS[0], *first.tokens)[:5]
    assert again[0].tokens == solo((*kept, 7, 8), 5)
    assert again[1].tokens == solo((*kept, 9), 5, DRAWN)
    assert other.tokens == solo(PROMPTS[3], 9)
    assert batch.length(2) == 12


def test_rows_of_the_caller_between_steps(batch: BatchGenerator) -> None:
    """The caller's rows are grown by hand while a request runs."""
    batch.append_tokens(0, PROMPTS[0])
    asked = batch.join(ask(PROMPTS[2], 9))
    found = []
    while batch.requests:
        batch.step()
        if len(found) < 6:
            found.append(batch.generate_next(0))
    assert asked.row is None
    assert asked.tokens == solo(PROMPTS[2], 9)
    assert found == solo(PROMPTS[0], len(found))


@pytest.mark.parametrize("kind", ["ragged", "ragged_all"])
def test_E6_two_batches_take_turns(kind: str) -> None:
    """Two states of one program: a step in turn, submits of both under way; one is closed, the other goes on."""
    one = BatchGenerator(load(kind), steps_per_submit=2)
    twin = one.method.on_state()
    other = BatchGenerator(twin, load(kind), steps_per_submit=3)
    first = [one.join(ask(prompt, 9)) for prompt in PROMPTS[:5]]
    second = [other.join(ask(prompt, 12)) for prompt in PROMPTS[5:10]]
    for _ in range(30):
        one.step()
        other.step()
    while one.requests:
        one.step()
    one.close()
    list(other.events())
    assert [request.tokens for request in first] == [solo(prompt, 9) for prompt in PROMPTS[:5]]
    for prompt, request in zip(PROMPTS[5:10], second, strict=True):
        assert request.tokens == solo(prompt, min(12, CAPACITY - len(prompt)))
    other.close()
    twin.close()


@pytest.mark.parametrize("others", ["row", "request"])
def test_K3_another_thread_comes_before_or_after_a_step(others: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between writing a step's inputs and its submit, another batch of the program tries to run one of its own."""
    program, found = load("ragged"), []
    with BatchGenerator(program) as one, BatchGenerator(program) as other:
        one.append_tokens(0, [5, 6, 7])
        other.append_tokens(1, [9, 8])
        submit, threads = BatchLoop.submit, []

        def interrupted(loop: BatchLoop, steps: int) -> None:
            if loop is one._loop and not any(thread.is_alive() for thread in threads):
                threads.append(threading.Thread(target=lambda: found.append(other.generate_next(1))))
                threads[-1].start()
                threads[-1].join(0.2)  # it waits for this thread's submit
            submit(loop, steps)

        monkeypatch.setattr(BatchLoop, "submit", interrupted)
        if others == "row":
            got = [one.generate_next(0) for _ in range(3)]
        else:
            request = one.join((), 3, (), row=0)
            one.join(range(CAPACITY - 9), 1, ())  # its prompt runs in calls with the other's first tokens
            while not request.done:
                one.step()
            got = request.tokens
        for thread in threads:
            thread.join()
        monkeypatch.undo()
        assert got == solo([5, 6, 7], 3)
        assert found == solo([9, 8], len(threads))
        assert threads


def test_E7_memory_stays_flat() -> None:
    on, program = device("full"), load("ragged")

    def once() -> None:
        with BatchGenerator(program, chunk=4) as batch:
            batch.run([ask(prompt, 3) for prompt in PROMPTS[:5]])

    once()
    before = on.memory.total
    for _ in range(20):
        once()
    assert on.memory.total == before


# -- bad input


def test_bad_requests_change_nothing(batch: BatchGenerator) -> None:
    running = batch.join(ask(PROMPTS[2], 9))
    batch.step()
    held = batch.tokens(0)
    used = ask(PROMPTS[0])
    batch.cancel(batch.join(used))
    for call, message in [
        (lambda: batch.join(()), "the prompt has no tokens"),
        (lambda: batch.join((), row=1), "the prompt has no tokens"),
        (lambda: batch.join(range(CAPACITY + 1)), "a prompt of 25 tokens after 0 would exceed"),
        (lambda: batch.join((1, VOCAB)), "token 1 is 260"),
        (lambda: batch.join((1,), -1), "max_new_tokens is -1"),
        (lambda: batch.join((1,), row=9), "there is no row 9"),
        (lambda: batch.join((1,), row=0), "row 0 runs a request"),
        (lambda: batch.join(used), "was used before"),
        (lambda: batch.append_tokens(0, (1,)), "row 0 runs a request: wait until it is done, or cancel it"),
        (lambda: batch.rewind_to([None, 0, 0, 0][::-1]), "row 0 runs a request"),
        (lambda: batch.fork(1, 0), "row 0 runs a request"),
        (lambda: batch.generate_next(0), "row 0 runs a request"),
        (lambda: batch.reset(0), "row 0 runs a request"),
        (lambda: batch.run([(1, 2), (1, -2)]), "token 1 is -2"),
    ]:
        with pytest.raises(InputError, match=message):
            call()
    assert batch.tokens(0) == held
    assert batch.requests == (running,)
    list(batch.events())
    assert running.tokens == solo(PROMPTS[2], 9)


@pytest.mark.parametrize("steps", [0, 1])
def test_bad_logits_end_their_request_alone(steps: int) -> None:
    with BatchGenerator(load("ragged"), steps_per_submit=steps) as batch:
        asked = [batch.join(ask(prompt, 10)) for prompt in PROMPTS[:4]]
        while not all(request.tokens for request in asked):
            batch.step()
        assert not any(request.done for request in asked)
        for buffer in batch.method.state.buffers().values():
            batch.method.device.write(buffer, np.full(4, np.nan, np.float32), buffer.size // BATCH)
        list(batch.events())
        assert asked[1].stop_reason == "error"
        assert "logits are NaN" in (asked[1].error or "")
        assert asked[1].tokens == solo(PROMPTS[1], 10)[: len(asked[1].tokens)]
        assert [asked[n].tokens for n in (0, 2, 3)] == [solo(PROMPTS[n], 10) for n in (0, 2, 3)]
        batch.method.reset()
        assert batch.run([ask(PROMPTS[1])])[0].tokens == solo(PROMPTS[1], 8)


def test_closing_ends_requests() -> None:
    batch = BatchGenerator(load("ragged"))
    asked = [batch.join(ask(prompt, 9)) for prompt in PROMPTS[:6]]
    batch.step()
    batch.close()
    assert {request.stop_reason for request in asked} == {"stopped"}
    with pytest.raises(InputError, match="closed"):
        batch.step()
