"""Rows of a batch as sequences: against solo runs, rewinding, forks, what a step writes, bad input."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from executorch_webgpu.runtime import (
    BatchGenerator,
    DeviceError,
    Sampling,
)
from executorch_webgpu.runtime.batches.loop import BatchLoop
from executorch_webgpu.runtime.decoding.decoder import find_ragged
from executorch_webgpu.runtime.decoding.sampling import GREEDY
from tests import tiny_decoder
from tests.harness import DEVICES, device
from tests.runtime.batches import DRAWN, PROMPTS, grow, solo
from tests.runtime.sessions import load
from tests.tiny_decoder import BATCH, CAPACITY, LONGEST, VOCAB

WAYS: list[int | None] = [None, 0]


@pytest.fixture(params=["ragged", "ragged_all"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=WAYS, ids=["ahead", "host"])
def steps(request: pytest.FixtureRequest) -> int | None:
    found: int | None = request.param
    return found


@pytest.fixture
def batch(kind: str, steps: int | None) -> Iterator[BatchGenerator]:
    with BatchGenerator(load(kind), steps_per_submit=steps) as made:
        yield made


@pytest.fixture
def ahead() -> Iterator[BatchGenerator]:
    with BatchGenerator(load("ragged"), chunk=4) as made:
        assert made.fallback is None
        yield made


# -- equal to solo runs


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_C15_unequal_prompts_equal_their_solo_runs(batch: BatchGenerator, sampling: Sampling) -> None:
    """Also C1 to C3 and C17: lengths 3, 1, 11 and 5, at once and in another order, then per-row decode."""
    for order in ([0, 1, 2, 3], [2, 0, 3, 1]):
        batch.reset()
        batch.append_tokens([PROMPTS[number] for number in order])
        found = grow(batch, 10, sampling)
        assert found == [solo(PROMPTS[number], 10, sampling) for number in order]
        for row, number in enumerate(order):
            assert batch.tokens(row) == (*PROMPTS[number], *found[row])
            assert batch.length(row) == len(PROMPTS[number]) + 10


@pytest.mark.parametrize("on", DEVICES)
def test_C15_on_each_device(on: str) -> None:
    with BatchGenerator(load(f"ragged on {on}")) as batch:
        batch.append_tokens(PROMPTS)
        assert grow(batch, 6) == [solo(prompt, 6) for prompt in PROMPTS]


def test_C7_empty_rows_stay_untouched(batch: BatchGenerator) -> None:
    """Rows of length 0 and idle rows cost nothing and their caches keep every bit."""
    buffers = batch.method.state.buffers()
    on = batch.method.device
    sentinel = np.full(next(iter(buffers.values())).size // 4, -77.0, np.float32)
    for buffer in buffers.values():
        on.write(buffer, sentinel)
    batch.append_tokens(2, PROMPTS[2])
    assert [batch.generate_next(2) for _ in range(4)] == solo(PROMPTS[2], 4)
    for buffer in buffers.values():
        rows = np.frombuffer(on.gpu.queue.read_buffer(buffer), np.float32).reshape(BATCH, CAPACITY, -1)
        assert (rows[[0, 1, 3]] == -77).all()
        used = len(PROMPTS[2]) + 3
        assert (rows[2, :used] != -77).any(-1).all()
        assert (rows[2, used:] == -77).all()


def test_C11_padding_ids_do_not_matter(kind: str) -> None:
    method = load(kind).load_method()
    ragged = find_ragged(method, load(kind).constants)
    ids = [[1, 2, 3, 4, 5], [], [6], [7, 8, 9]]
    plain = ragged.inputs(ids, [0] * BATCH, LONGEST)
    noisy = [plain[0].copy(), *plain[1:]]
    for row, given in enumerate(ids):
        noisy[0][row, len(given) :] = np.random.default_rng(row).integers(0, VOCAB, LONGEST - len(given))
    assert (noisy[0] != plain[0]).any()
    outputs = []
    for inputs in (plain, noisy):
        found = method.execute(inputs)[0]
        outputs.append([ragged.last_logits(found, row, len(given)) for row, given in enumerate(ids) if given])
        method.reset()
    assert all(np.array_equal(a, b) for a, b in zip(*outputs, strict=True))
    method.close()


def test_C12_appending_to_some_rows(batch: BatchGenerator) -> None:
    """Rows of different lengths get different numbers of tokens in one call; others get none."""
    batch.append_tokens([PROMPTS[0], PROMPTS[1], PROMPTS[2], None])
    batch.append_tokens([None, (5, 6), (7,), PROMPTS[3]])
    whole = [PROMPTS[0], (*PROMPTS[1], 5, 6), (*PROMPTS[2], 7), PROMPTS[3]]
    assert [batch.tokens(row) for row in range(BATCH)] == whole
    assert grow(batch, 5) == [solo(tokens, 5) for tokens in whole]


@pytest.mark.parametrize("chunk", [1, 2, 3, 8])
def test_C3_prompts_in_pieces(kind: str, chunk: int) -> None:
    with BatchGenerator(load(kind), chunk=chunk) as batch:
        before = batch.method.device.counters.copy()
        batch.append_tokens(PROMPTS)
        calls = -(-max(len(prompt) - 1 for prompt in PROMPTS) // chunk)  # all but the last token of each, together
        assert batch.method.device.counters.since(before).submits == calls
        assert grow(batch, 4) == [solo(prompt, 4) for prompt in PROMPTS]


def test_rows_have_their_own_settings(batch: BatchGenerator) -> None:
    """Greedy, drawn and penalised rows in one batch draw as they would alone; a seed means the same in every row."""
    each = [
        Sampling(temperature=0.9, top_k=40, top_p=0.9, repetition_penalty=1.3, seed=3),
        Sampling(repetition_penalty=1.5),
        Sampling(temperature=1.2, min_p=0.02, seed=8),
        GREEDY,
    ]
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        batch.reset()
        batch.append_tokens([PROMPTS[1]] * BATCH)
        found = [batch.generate_next(range(BATCH), [each[number] for number in order]) for _ in range(8)]
        assert [list(row) for row in zip(*found, strict=True)] == [solo(PROMPTS[1], 8, each[n]) for n in order]


def test_a_step_that_cannot_begin_forgets_no_history(ahead: BatchGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The repetition penalty counts the prompt also where the device had no memory for the first try."""
    penalty = Sampling(repetition_penalty=1.8)
    prompt = (*PROMPTS[0], *solo(PROMPTS[0], 3))
    ahead.append_tokens(0, prompt)

    def fail(*_: object) -> None:
        raise DeviceError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(BatchLoop, "_prepare", fail)
        with pytest.raises(DeviceError, match="out of memory"):
            ahead.generate_next(0, penalty)
    assert [ahead.generate_next(0, penalty) for _ in range(5)] == solo(prompt, 5, penalty) != solo(prompt, 5)


def test_rows_without_a_seed_differ(ahead: BatchGenerator) -> None:
    ahead.append_tokens([PROMPTS[1]] * BATCH)
    found = grow(ahead, 8, Sampling(temperature=2.0))
    assert len({tuple(row) for row in found}) == BATCH


# -- rewinding


def test_F2_rewinding_two_rows_to_0(batch: BatchGenerator) -> None:
    for _ in range(3):
        batch.append_tokens([PROMPTS[0], None, None, PROMPTS[3]])
        assert grow(batch, 9) == [solo(PROMPTS[0], 9), solo(PROMPTS[3], 9)]
        batch.rewind_to([0, None, None, 0])
        assert [batch.length(row) for row in range(BATCH)] == [0] * BATCH


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_F18_rows_are_rewound_to_lengths_of_their_own(batch: BatchGenerator, sampling: Sampling) -> None:
    """Lengths 0, 5, 9 and none: each goes on as its own solo run does; also F4, F6 and F15."""
    batch.append_tokens(PROMPTS)
    first = grow(batch, 9, sampling)
    batch.rewind_to([0, 5, 9, None])
    kept = [PROMPTS[0], (*PROMPTS[1], *first[1])[:5], PROMPTS[2][:9], (*PROMPTS[3], *first[3])]
    assert [batch.tokens(row) for row in range(1, BATCH)] == kept[1:]
    batch.append_tokens(0, PROMPTS[0])
    assert grow(batch, 6, sampling) == [solo(tokens, 6, sampling) for tokens in kept]


def test_F12_the_last_kept_token_is_run_again(batch: BatchGenerator) -> None:
    batch.append_tokens(PROMPTS)
    first = grow(batch, 6)
    for length in (4, 3, 1):
        batch.rewind_to(0, length)
        kept = (*PROMPTS[0], *first[0])[:length]
        plain, expected = batch.logits(0), tiny_decoder.last_logits(kept).numpy()
        np.testing.assert_allclose(plain, expected, atol=1e-4, rtol=1e-3)
        batch.rewind_to(0, length - 1)
        batch.append_tokens(0, kept[-1:])
        np.testing.assert_allclose(batch.logits(0), plain, atol=1e-5, rtol=1e-5)
        assert [batch.generate_next(0) for _ in range(3)] == solo(kept, 3)


def test_F13_G3_G6_rewinding_writes_lengths_only(ahead: BatchGenerator) -> None:
    """Also G3 and G6: nothing at once; then 4 bytes of `past` and 4 of the token a row, however far back it goes."""
    on = ahead.method.device
    ahead.append_tokens(PROMPTS)
    grow(ahead, 8)
    for lengths in ([None, None, 2, None], [1, None, 17, 5], [None, 2, None, None]):
        lengths = [None if kept is None else min(kept, ahead.length(row)) for row, kept in enumerate(lengths)]
        back = sum(kept is not None and kept < ahead.length(row) for row, kept in enumerate(lengths))
        before = on.counters.copy()
        ahead.rewind_to(lengths)
        assert on.counters.since(before).__dict__ == dict.fromkeys(before.__dict__, 0)
        ahead.generate_next()
        made = on.counters.since(before)
        assert back
        assert made.bytes_written <= 8 * back
        assert (made.buffers, made.bind_groups, made.pipelines, made.submits) == (0, 0, 0, 1)
        grow(ahead, 1)


def test_F14_unused_cache_rows_are_not_read(batch: BatchGenerator) -> None:
    batch.append_tokens(PROMPTS)
    first = grow(batch, 8)
    lengths = [6, 2, 12, 5]
    batch.rewind_to(lengths)
    buffers, on = batch.method.state.buffers(), batch.method.device
    for buffer in buffers.values():
        rows = np.frombuffer(on.gpu.queue.read_buffer(buffer), np.float32).reshape(BATCH, CAPACITY, -1).copy()
        for row, length in enumerate(lengths):
            rows[row, length - 1 :] = np.nan
        on.write(buffer, rows)
    kept = [(*prompt, *new)[:n] for prompt, new, n in zip(PROMPTS, first, lengths, strict=True)]
    assert grow(batch, 6) == [solo(tokens, 6) for tokens in kept]
    batch.method.reset()


def test_F21_the_finished_flag(batch: BatchGenerator) -> None:
    batch.append_tokens(PROMPTS)
    token = solo(PROMPTS[0], 1)[0]
    batch.generate_next(stop_ids=[token])
    assert [batch.finished(row) for row in range(BATCH)] == [solo(prompt, 1)[0] == token for prompt in PROMPTS]
    batch.rewind_to(0, 3)
    assert not batch.finished(0)
    batch.generate_next(0, stop_ids=[token])
    batch.append_tokens(0, [5])
    assert not batch.finished(0)
    batch.append_tokens(0, range(CAPACITY - batch.length(0)))
    assert batch.finished(0)
    batch.rewind_to(0, CAPACITY - 1)
    assert not batch.finished(0)


# -- forks


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_J5_forks_go_on_as_independent_runs(batch: BatchGenerator, sampling: Sampling) -> None:
    batch.append_tokens(1, PROMPTS[2])
    first = [batch.generate_next(1, sampling) for _ in range(3)]
    batch.fork(1, 3)
    assert batch.tokens(3) == batch.tokens(1) == (*PROMPTS[2], *first)
    batch.append_tokens([None, (5, 6), None, (7,)])
    found = grow(batch, 5, sampling)
    assert found == [solo((*PROMPTS[2], *first, *more), 5, sampling) for more in ((5, 6), (7,))]


def test_J5_only_used_rows_are_copied(ahead: BatchGenerator) -> None:
    on = ahead.method.device
    buffers = ahead.method.state.buffers()
    ahead.append_tokens(1, PROMPTS[3])
    for buffer in buffers.values():
        rows = np.frombuffer(on.gpu.queue.read_buffer(buffer), np.float32).reshape(BATCH, CAPACITY, -1).copy()
        rows[[0, 2, 3]] = 55
        on.write(buffer, rows)
    ahead.fork(1, 2)
    used = len(PROMPTS[3]) - 1  # the last token was not run yet
    for buffer in buffers.values():
        rows = np.frombuffer(on.gpu.queue.read_buffer(buffer), np.float32).reshape(BATCH, CAPACITY, -1)
        assert np.array_equal(rows[2, :used], rows[1, :used])
        assert (rows[2, used:] == 55).all()
        assert (rows[[0, 3]] == 55).all()
    made = on.counters.copy()
    ahead.fork(1, 3)
    assert on.counters.since(made).buffers == 0, "the buffer between is kept"
    assert grow(ahead, 4) == [solo(PROMPTS[3], 4)] * 3


def test_G8_beams_share_a_length(batch: BatchGenerator) -> None:
    """A row forked into all others: each beam goes on from the same length, then apart."""
    batch.append_tokens(0, PROMPTS[0])
    for row in range(1, BATCH):
        batch.fork(0, row)
    assert [batch.length(row) for row in range(BATCH)] == [3] * BATCH
    batch.append_tokens([(row + 50,) for row in range(BATCH)])
    assert grow(batch, 5) == [solo((*PROMPTS[0], row + 50), 5) for row in range(BATCH)]


# -- what a step costs


def test_G3_a_step_writes_nothing_and_reads_tokens(ahead: BatchGenerator) -> None:
    """Also E8: rows that go on need no word from the host; the tokens are all that comes back."""
    on = ahead.method.device
    expected = [solo(prompt, 8) for prompt in PROMPTS]
    ahead.append_tokens(PROMPTS)
    grow(ahead, 2)
    before = on.counters.copy()
    found = grow(ahead, 6)
    made = on.counters.since(before)
    assert found == [tokens[2:] for tokens in expected]
    assert (made.buffers, made.bind_groups, made.pipelines, made.writes, made.submits) == (0, 0, 0, 0, 6)
    assert (made.reads, made.bytes_read) == (6, 6 * 4 * BATCH)


def test_G1_lengths_grow_by_one_a_step(ahead: BatchGenerator) -> None:
    """After each step the GPU's `past` is what the host would have written."""
    ahead.append_tokens(PROMPTS)
    loop = ahead._loop
    assert loop is not None
    for _ in range(5):
        ahead.generate_next([0, 2])
        step = loop._current
        assert step is not None
        assert step.plan is not None
        assert loop._words is not None
        on_gpu = [
            np.frombuffer(ahead.method.device.gpu.queue.read_buffer(buffer, 0, 4 * BATCH), np.int32).tolist()
            for buffer in loop._buffers(step.plan)
        ]
        assert on_gpu == [loop._words.tokens, loop._words.past, loop._words.q_len]
        assert [on_gpu[1][row] for row in (0, 2)] == [ahead.length(row) - 1 for row in (0, 2)]
        assert on_gpu[2] == [1, 0, 1, 0]


def test_G5_ahead_by_default_and_by_choice_not(kind: str) -> None:
    with BatchGenerator(load(kind)) as batch:
        assert batch.fallback is None
    with BatchGenerator(load(kind), steps_per_submit=0) as batch:
        assert batch.fallback == "steps_per_submit is 0"
        batch.append_tokens(0, PROMPTS[0])
        assert batch.generate_next(0) == solo(PROMPTS[0], 1)[0]


def test_E9_prompts_between_steps(batch: BatchGenerator) -> None:
    batch.append_tokens(0, PROMPTS[0])
    found = [batch.generate_next(0)]
    batch.append_tokens(3, PROMPTS[2])
    found += [batch.generate_next(0), batch.generate_next([0])[0]]
    batch.append_tokens(1, PROMPTS[3])
    found += [batch.generate_next([3, 0])[1] for _ in range(2)]
    assert found == solo(PROMPTS[0], 5)
    assert batch.tokens(3)[11:] == tuple(solo(PROMPTS[2], 2))


def test_E6_two_batches_take_turns(kind: str, steps: int | None) -> None:
    """Two states of one program, a token in turn; the first is closed, the second goes on."""
    one = BatchGenerator(load(kind), steps_per_submit=steps)
    twin = one.method.on_state()
    other = BatchGenerator(twin, load(kind), steps_per_submit=steps)
    one.append_tokens(PROMPTS)
    other.append_tokens(PROMPTS[::-1])
    found: tuple[list[list[int]], list[list[int]]] = ([], [])
    for _ in range(5):
        found[0].append(one.generate_next())
        found[1].append(other.generate_next())
    one.close()
    found[1].append(other.generate_next())
    assert [list(row) for row in zip(*found[0], strict=True)] == [solo(prompt, 5) for prompt in PROMPTS]
    assert [list(row) for row in zip(*found[1], strict=True)] == [solo(prompt, 6) for prompt in PROMPTS[::-1]]
    other.close()
    twin.close()


def test_E7_made_and_closed_over_and_over() -> None:
    on = device("full")
    program = load("ragged")

    def once() -> None:
        with BatchGenerator(program, chunk=4) as batch:
            batch.append_tokens(PROMPTS)
            grow(batch, 3)
            batch.fork(0, 1)

    once()
    before = on.memory.total
    for _ in range(20):
        once()
    assert on.memory.total == before
