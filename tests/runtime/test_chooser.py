"""Choosing tokens on the GPU, against the host's `sampling`.

The host sums in float64, the GPU in units of 2**-40 of weights in float32. A token of the GPU is right if it is the
host's, or if the random number is within `NEAR` of its interval of the host's cumulative distribution; how many need
this is limited as well.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from executorch_webgpu.runtime import InputError, Sampling
from executorch_webgpu.runtime.decoding.chooser import Advance, Chooser, Logits, Target
from executorch_webgpu.runtime.decoding.sampling import GREEDY, choose, philox, probabilities, uniform
from executorch_webgpu.runtime.gpu.device import Device
from tests.harness import DEVICES, device

Array = np.ndarray[Any, Any]
NEAR = 1e-5
SIZES = (1, 2, 63, 64, 65, 255, 256, 257, 1000, 4099)
LARGE = (50257, 128256)
OPTIONS = [
    Sampling(temperature=t, top_k=k, top_p=p, min_p=m, repetition_penalty=r)
    for t, k, p, m, r in itertools.product(
        (0.6, 1.4), (0, 1, 7, 50, 5000), (1.0, 0.9, 0.3, 1e-6), (0.0, 0.05, 0.4), (1.0, 1.3)
    )
]


class Rig:
    """A chooser with a test's logits [rows, V], surrounded by NaN: rows V + 5 apart, the first after 67 elements."""

    def __init__(self, on: Device, logits: Array, capacity: int = 64, f16: bool = False, **places: Any) -> None:
        self.device = on
        self.rows, vocabulary = logits.shape
        self.type = np.float16 if f16 and on.limits.f16 else np.float32
        self.stride = vocabulary + 5
        self.source = on.buffer((68 + self.rows * self.stride) * 4, "other", "test logits")
        self.set(logits)
        item = self.type().itemsize
        where = Logits(self.source, 67 * item, self.stride, {2: "f16", 4: "f32"}[item])
        self.chooser = Chooser(on, vocabulary, self.rows, where, capacity, **places)

    def set(self, logits: Array) -> None:
        self.logits = logits.astype(self.type)
        data = np.full(self.source.size // self.type().itemsize, np.nan, self.type)
        for row in range(self.rows):
            start = 67 + row * self.stride
            data[start : start + logits.shape[1]] = self.logits[row]
        self.device.write(self.source, data)

    def submit(self, count: int, sampling: Sampling | Sequence[Sampling]) -> None:
        """`count` choices in one pass."""
        encoder = self.device.gpu.create_command_encoder()
        compute = encoder.begin_compute_pass()
        for launch in self.chooser.launches(sampling) * count:
            compute.set_pipeline(launch.pipeline)
            compute.set_bind_group(0, launch.bind_group)
            compute.dispatch_workgroups(*launch.grid)
        compute.end()
        self.device.gpu.queue.submit([encoder.finish()])

    def read(self, buffer: Any, dtype: Any = np.int32) -> Array:
        return np.frombuffer(self.device.gpu.queue.read_buffer(buffer), dtype)

    def ring(self, count: int) -> Array:
        """i32 [count, rows]."""
        return self.read(self.chooser.tokens)[: count * self.rows].reshape(count, self.rows)

    def choose(
        self, count: int, sampling: Sampling, seed: int = 0, position: int = 0, seen: Sequence[int] = ()
    ) -> Array:
        """Tokens [count, rows] of one submit."""
        self.chooser.configure(sampling, seed)
        self.chooser.start(position)
        for row in range(self.rows):
            self.chooser.seen(seen, row)
        self.submit(count, sampling)
        return self.ring(count)


@contextmanager
def rig(on: Device, logits: Array, **arguments: Any) -> Iterator[Rig]:
    made = Rig(on, logits, **arguments)
    try:
        yield made
    finally:
        made.chooser.close()
        on.release(made.source, "other")


def random_logits(vocabulary: int, rows: int = 1, ties: bool = False) -> Array:
    """Normally distributed; with `ties`, multiples of a quarter."""
    values = np.random.default_rng(vocabulary + ties).normal(size=(rows, vocabulary)).astype(np.float32) * 2
    return np.round(values * 4) / 4 if ties else values


def ambiguity(logits: Array, sampling: Sampling, history: Sequence[int]) -> float:
    """How far cumulative probabilities may move because rounding decides whether the last tokens are kept."""
    full = probabilities(
        logits, Sampling(sampling.temperature, repetition_penalty=sampling.repetition_penalty), history
    )
    order = np.argsort(-full, kind="stable")
    ranked = full[order]
    moved = 0.0
    if sampling.top_k and sampling.top_k < len(ranked):
        last, behind = ranked[sampling.top_k - 1 : sampling.top_k + 1]
        if 0 < last - behind < 1e-6 * last:
            moved += last / ranked[: sampling.top_k].sum()
        ranked = ranked[: sampling.top_k] / ranked[: sampling.top_k].sum()
    if sampling.top_p < 1:
        total = np.cumsum(ranked)
        near = np.flatnonzero(np.abs(total - sampling.top_p) < 1e-6)
        if near.size:
            moved += 2 * ranked[near].sum() / sampling.top_p
        ranked = ranked[: int(np.searchsorted(total, sampling.top_p)) + 1]
    if sampling.min_p > 0:
        relative = ranked / ranked[0]
        moved += ranked[np.abs(relative - sampling.min_p) < 1e-5 * sampling.min_p].sum() / ranked.sum()
    return float(moved)


def near_misses(got: Array, logits: Array, sampling: Sampling, seed: int, position: int, seen: Sequence[int]) -> int:
    """Check a row's tokens; returns how many differ from the host's by rounding."""
    misses = 0
    for step, token in enumerate(got.tolist()):
        history = [*seen, *got[:step].tolist()]
        if token == choose(logits, sampling, seed, position + step, history):
            continue
        assert not sampling.greedy
        misses += 1
        total = np.cumsum(probabilities(logits, sampling, history))
        mark = uniform(seed, position + step) * total[-1]
        allowed = NEAR + ambiguity(logits, sampling, history)
        before = total[token - 1] if token else 0.0
        assert before - allowed <= mark <= total[token] + allowed, (sampling, step, token)
    return misses


# -- greedy


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("vocabulary", [*SIZES, *LARGE])
def test_J2_greedy_takes_the_lowest_of_the_largest(on: str, vocabulary: int) -> None:
    rng = np.random.default_rng(vocabulary)
    with rig(device(on), random_logits(vocabulary)) as r:
        for _ in range(4):
            logits = rng.normal(size=(1, vocabulary)).astype(np.float32)
            logits[0, rng.integers(0, vocabulary, 5)] = 9.0
            r.set(logits)
            assert r.choose(2, GREEDY).tolist() == [[int(np.argmax(logits[0]))]] * 2
        r.set(np.full((1, vocabulary), -3.0))
        assert r.choose(1, GREEDY).tolist() == [[0]]
        last = np.full((1, vocabulary), -np.inf, np.float32)
        last[0, -1] = -1e38
        r.set(last)
        assert r.choose(1, GREEDY).tolist() == [[vocabulary - 1]]


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("values", [[-0.0, 0.0, -1.0], [-1.0, 0.0, -0.0], [1.0, np.inf, np.inf], [-2.0, -1.5, -np.inf]])
def test_greedy_orders_like_floats(on: str, values: list[float]) -> None:
    logits = np.array([values], np.float32)
    with rig(device(on), logits, f16=True) as r:
        for sampling in (GREEDY, Sampling(temperature=1, top_k=1)):
            assert r.choose(1, sampling).tolist() == [[choose(logits[0], sampling)]]


# -- drawn


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("vocabulary", SIZES)
def test_J3_equals_the_host(on: str, vocabulary: int, ties: bool) -> None:
    """Every combination of options at one size, every eleventh at the others; each with its own seed and position."""
    logits = random_logits(vocabulary, ties=ties)
    chosen = OPTIONS if vocabulary == 257 else OPTIONS[vocabulary % 11 :: 11]
    rng = np.random.default_rng(5)
    misses, count = 0, 12
    with rig(device(on), logits, f16=ties) as r:
        for sampling in chosen:
            seed, position = int(rng.integers(2**63)), int(rng.integers(2**33))
            seen = rng.integers(0, vocabulary + 2, 9).tolist()
            got = r.choose(count, sampling, seed, position, seen)
            misses += near_misses(got[:, 0], r.logits[0], sampling, seed, position, seen)
    assert misses <= 0.003 * count * len(chosen)


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("vocabulary", LARGE)
def test_equals_the_host_for_large_vocabularies(on: str, vocabulary: int) -> None:
    options = [
        Sampling(temperature=1.0),
        Sampling(temperature=0.8, top_k=40),
        Sampling(temperature=1.2, top_k=20000, min_p=0.001),
        Sampling(temperature=0.7, top_p=0.95, repetition_penalty=1.2),
        Sampling(temperature=1.1, top_k=3000, top_p=0.9),
    ]
    logits = random_logits(vocabulary)
    misses = 0
    with rig(device(on), logits) as r:
        for seed, sampling in enumerate(options):
            got = r.choose(8, sampling, seed, 100, [3, 4, vocabulary - 1])
            misses += near_misses(got[:, 0], logits[0], sampling, seed, 100, [3, 4, vocabulary - 1])
    assert misses <= 2


@pytest.mark.parametrize("on", DEVICES)
def test_equal_logits_keep_the_lowest_ids(on: str) -> None:
    """Thousands of ties, over chunks: what is kept is known exactly."""
    vocabulary = 5000
    with rig(device(on), np.full((1, vocabulary), 1.5, np.float32), capacity=400) as r:
        for sampling, kept in [
            (Sampling(temperature=1), 5000),
            (Sampling(temperature=1, top_k=1500), 1500),
            (Sampling(temperature=1, top_p=0.3), 1500),
            (Sampling(temperature=1, top_k=3000, top_p=0.5), 1500),
            (Sampling(temperature=1, top_k=1025, min_p=1.0), 1025),
        ]:
            got = r.choose(400, sampling, seed=9)[:, 0]
            assert got.tolist() == [math.floor(uniform(9, i) * kept) for i in range(400)]


@pytest.mark.parametrize("on", DEVICES)
def test_ties_that_are_not_kept_stand_between_kept_tokens(on: str) -> None:
    logits = np.tile(np.array([0, 0, 1, 0], np.float32), (1, 16))
    with rig(device(on), logits) as r:
        for top_k in range(17, 65, 4):
            sampling = Sampling(temperature=1, top_k=top_k)
            assert r.choose(20, sampling, 3)[:, 0].tolist() == [choose(logits[0], sampling, 3, i) for i in range(20)]


@pytest.mark.parametrize("on", DEVICES)
def test_more_chunks_than_invocations(on: str) -> None:
    """The last step takes three chunks an invocation: the first has the last tie kept, the third all heavier tokens."""
    logits = np.zeros((1, 530_000), np.float32)
    logits[0, 2048:3048] = 0.125
    with rig(device(on), logits) as r:
        for sampling in (Sampling(temperature=1, top_k=1300), Sampling(temperature=1, top_p=0.002)):
            assert r.choose(6, sampling, 3)[:, 0].tolist() == [choose(logits[0], sampling, 3, i) for i in range(6)]
        assert r.choose(1, GREEDY).tolist() == [[2048]]


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize(
    ("values", "temperature"),
    [
        ([1e30, 0.0, -1e30, -np.inf], 1e-6),
        ([np.inf, 1.0, np.inf, -np.inf], 1.0),
        ([3e38, -3e38, 3e38, 0.0], 1.0),
        ([-np.inf, 0.0, -np.inf, 0.0], 1.0),
        ([1.0, 2.0, 3.0, 4.0], 1e6),
        ([1.0, 1.0000001, 0.0, -5.0], 1e-30),
    ],
)
def test_extreme_values(on: str, values: list[float], temperature: float) -> None:
    logits = np.array([values], np.float32)
    with rig(device(on), logits) as r:
        for top_k, top_p in [(0, 1.0), (3, 1.0), (0, 0.99), (3, 0.99)]:
            sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
            got = r.choose(40, sampling, 21)[:, 0]
            assert got.tolist() == [choose(logits[0], sampling, 21, i) for i in range(40)]


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=1.2), Sampling(temperature=1.5, top_k=20, top_p=0.97, min_p=0.01)]
)
def test_draws_follow_the_distribution(on: str, sampling: Sampling) -> None:
    """20,000 draws of one submit: 20 rows, 1,000 positions."""
    rows, steps = 20, 1000
    logits = np.random.default_rng(0).normal(size=24).astype(np.float32) * 1.5
    with rig(device(on), np.tile(logits, (rows, 1)), capacity=steps) as r:
        got = r.choose(steps, sampling, seed=11)
    expected = probabilities(logits, sampling) * rows * steps
    seen = np.bincount(got.reshape(-1), minlength=24)
    assert seen[expected == 0].sum() == 0
    common = expected >= 5
    bins = np.append(expected[common], expected[~common].sum())
    counts = np.append(seen[common], seen[~common].sum())
    counts, bins = (counts[:-1], bins[:-1]) if bins[-1] < 5 else (counts, bins)
    statistic, freedom = ((counts - bins) ** 2 / bins).sum(), len(bins) - 1
    # Wilson and Hilferty: the cube root of a chi-square variable is nearly normal.
    spread = 2 / (9 * freedom)
    z = ((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)
    assert 0.5 * math.erfc(z / math.sqrt(2)) > 1e-3
    assert len(np.unique(got[:, 0] * 24 + got[:, 1])) > 50, "rows draw apart"


# -- random numbers


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("seed", [0, 1, 0x0123456789ABCDEF, 2**64 - 1])
def test_random_words_are_those_of_philox(on: str, seed: int) -> None:
    rows = 3
    with rig(device(on), random_logits(7, rows)) as r:
        for position in (0, 1, 0xD2511F53, 2**32 - 1, 2**40 + 5, 2**63):
            r.choose(1, Sampling(temperature=1), seed, position)
            counters = r.read(r.chooser.state, np.uint32)[rows * 8 : rows * 12].reshape(rows, 4)
            for row in range(rows):
                counter = (position & 0xFFFFFFFF, position >> 32, row, 0)
                assert counters[row, 3] == philox(counter, (seed & 0xFFFFFFFF, seed >> 32))[0]
            assert (counters[:, 0] + (counters[:, 1].astype(np.uint64) << np.uint64(32)) == position + 1).all()


# -- repetition penalty


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("penalty", [1.7, 0.5])
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_the_gpu_remembers_what_it_chose(on: str, temperature: float, penalty: float) -> None:
    """50 choices of one submit, each with all before it in the bitmap."""
    sampling = Sampling(temperature=temperature, top_k=30, top_p=0.9, repetition_penalty=penalty)
    logits = random_logits(331)
    with rig(device(on), logits) as r:
        got = r.choose(50, sampling, 4, 10, [0, 5, 330, 331, 10**6])[:, 0]
        assert near_misses(got, logits[0], sampling, 4, 10, [0, 5, 330]) <= 1
        assert len(set(got.tolist())) > 5 or penalty < 1
        assert r.choose(50, sampling, 4, 10, [0, 5, 330])[:, 0].tolist() == got.tolist(), "`seen` forgets them"


# -- rows, outputs and runs


@pytest.mark.parametrize("on", DEVICES)
def test_rows_have_their_own_settings(on: str) -> None:
    logits = random_logits(1100, 3)
    each = [
        Sampling(temperature=0.9, top_k=40, top_p=0.9, repetition_penalty=1.2),
        Sampling(repetition_penalty=1.5),
        Sampling(temperature=1.2, min_p=0.02, seed=8),
    ]
    seen = [[1, 2, 3], list(range(0, 1100, 2)), []]
    with rig(device(on), logits) as r:
        r.chooser.configure(each, [5, 6, 7])
        r.chooser.start([10, 2**32 - 3, 30])
        for row in range(3):
            r.chooser.seen(seen[row], row)
        r.submit(20, each)
        got = r.ring(20)
    for row, (seed, position) in enumerate([(5, 10), (6, 2**32 - 3), (8, 30)]):
        for step in range(20):
            history = [*seen[row], *got[:step, row].tolist()]
            assert got[step, row] == choose(logits[row], each[row], seed, position + step, history, row)


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("sampling", [Sampling(repetition_penalty=2), Sampling(temperature=1, repetition_penalty=2)])
@pytest.mark.parametrize("rows", [1, 3])
def test_outputs_of_successive_choices(on: str, sampling: Sampling, rows: int) -> None:
    """Targets get each token, words move on once a choice, the ring keeps what fits; nothing is made meanwhile."""
    where = device(on)
    a, b, c = buffers = [where.buffer(64, "other", "test words") for _ in range(3)]
    for number, buffer in enumerate(buffers):
        where.write(buffer, np.arange(16, dtype=np.int32) + 100 * number)
    targets = [Target(a), Target(b, 4)]  # `b` takes both
    advances = [Advance(c, 3), Advance(b, 15, -2), Advance(c, 0, 7), Advance(c, 3, 2)]
    logits = random_logits(1030, rows)
    with rig(where, logits, capacity=5, targets=targets, advances=advances) as r:
        before = where.counters.copy()
        r.chooser.configure(sampling, 3)
        r.chooser.start(40)
        r.submit(4, sampling)
        first = r.ring(4).tolist()
        r.submit(3, sampling)
        got = r.ring(5)
        made = where.counters.since(before)
        assert (made.buffers, made.bind_groups, made.pipelines) == (0, 0, 0)
        assert got[:4].tolist() == first
        steps: list[list[int]] = []
        for step in range(7):
            history = list(zip(*steps, strict=True)) or [()] * rows
            steps.append([choose(logits[i], sampling, 3, 40 + step, history[i], i) for i in range(rows)])
        assert got.tolist() == steps[:5]
        words = np.stack([np.arange(16) + 100 * number for number in range(3)])
        words[0, :rows] = steps[-1]
        words[1, 4 : 4 + rows] = steps[-1]
        words[2, 3] += 7 * 3
        words[2, 0] += 7 * 7
        words[1, 15] -= 7 * 2
        assert [r.read(buffer).tolist() for buffer in buffers] == words.tolist()
    for buffer in buffers:
        where.release(buffer, "other")


@pytest.mark.parametrize("on", DEVICES)
def test_configure_changes_numbers_only(on: str) -> None:
    """Settings change between submits of one run, as if it had been one submit."""
    where = device(on)
    logits = random_logits(700)
    parts = [Sampling(temperature=0.5), GREEDY, Sampling(temperature=2, top_k=9), Sampling(temperature=1, top_p=0.5)]
    with rig(where, logits) as r:
        r.chooser.start(0)
        before = where.counters.copy()
        for sampling in parts:
            r.chooser.configure(sampling, 2)
            r.chooser.configure(sampling, 2)
            r.submit(3, sampling)
        made = where.counters.since(before)
        assert (made.buffers, made.bind_groups, made.pipelines) == (0, 0, 0)
        assert (made.writes, made.bytes_written) == (4, 128)
        want = [choose(logits[0], parts[i // 3], 2, i) for i in range(12)]
        assert r.ring(12)[:, 0].tolist() == want


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1), Sampling(temperature=1, top_k=5, top_p=0.9)])
@pytest.mark.parametrize("vocabulary", [1, 3, 1025, 4099])
def test_bad_logits_give_a_code(on: str, sampling: Sampling, vocabulary: int) -> None:
    """-1 for NaN, -2 for minus infinity; other rows go on, the target gets a token that can be looked up."""
    where = device(on)
    target = where.buffer(16, "other", "test target")
    logits = random_logits(vocabulary, 3)
    logits[0] = -np.inf
    logits[2, -1] = np.nan
    with rig(where, logits, targets=[Target(target)]) as r:
        where.write(target, np.full(4, 77, np.int32))
        got = r.choose(2, sampling, 1)
        good = [choose(logits[1], sampling, 1, step, (), 1) for step in range(2)]
        assert got.tolist() == [[-2, good[0], -1], [-2, good[1], -1]]
        assert r.read(target).tolist() == [0, good[1], 0, 77]
        marks = r.read(r.chooser.state, np.uint32)[36:].reshape(-1)[: 3 * -(-vocabulary // 32)].reshape(3, -1)
        assert marks[[0, 2]].sum() == 0
        assert marks[1].any()
        r.set(random_logits(vocabulary, 3))
        assert r.choose(1, sampling, 1).tolist() == [
            [choose(r.logits[row], sampling, 1, 0, (), row) for row in range(3)]
        ]
    where.release(target, "other")


def test_what_a_choice_costs() -> None:
    """Dispatches of one choice, and that memory is given back."""
    where = device("default-limits")
    before = where.memory.total
    with rig(where, random_logits(50)) as r:
        options = [(0, 0, 1), (1, 50, 1), (1, 49, 1), (1, 0, 0.9), (1, 49, 0.9)]
        found = [len(r.chooser.launches(Sampling(temperature=t, top_k=k, top_p=p, min_p=0.1))) for t, k, p in options]
        assert found == [2, 3, 6, 6, 8]
    assert where.memory.total == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocabulary": 0}, "vocabulary of 0"),
        ({"rows": 0}, "0 rows"),
        ({"capacity": 0}, "ring of 0"),
        ({"offset": 2}, "logits at byte 2"),
        ({"stride": 7}, "stride of 7"),
        ({"offset": 32, "stride": 12}, "end at byte 112 of 96"),
        ({"type": "i32"}, "logits are i32"),
        ({"targets": [0, 0, 0]}, "3 targets"),
        ({"targets": [0, 23]}, "word 23"),
        ({"advances": [0] * 33}, "33 advances"),
        ({"advances": [24]}, "word 24"),
        ({"apart": 3}, "in 3 buffers"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    where = device("default-limits")
    before = where.memory.total
    buffers = [where.buffer(96, "other", "test words") for _ in range(3)]
    logits = Logits(buffers[0], change.get("offset", 0), change.get("stride", 8), change.get("type", "f32"))
    targets = [Target(buffers[1], word) for word in change.get("targets", ())]
    advances = [Advance(buffers[2], word) for word in change.get("advances", ())]
    advances += [Advance(buffer, 0) for buffer in buffers[: change.get("apart", 0)]]
    sizes = change.get("vocabulary", 8), change.get("rows", 2), logits, change.get("capacity", 4)
    with pytest.raises(InputError, match=message):
        Chooser(where, *sizes, targets, advances)
    for buffer in buffers:
        where.release(buffer, "other")
    assert where.memory.total == before


def test_bad_settings_are_named() -> None:
    with rig(device("default-limits"), random_logits(5, 2)) as r:
        for call, message in [
            (lambda: r.chooser.configure([GREEDY] * 3), "3 sampling settings for 2 rows"),
            (lambda: r.chooser.launches([GREEDY]), "1 sampling settings for 2 rows"),
            (lambda: r.chooser.configure(GREEDY, [1]), "1 seeds for 2 rows"),
            (lambda: r.chooser.configure(GREEDY, 2**64), "seed is 18446744073709551616"),
            (lambda: r.chooser.start([1, 2, 3]), "3 positions for 2 rows"),
            (lambda: r.chooser.start(-1), "position -1"),
            (lambda: r.chooser.seen([1], 2), "row 2 of 2"),
        ]:
            with pytest.raises(InputError, match=message):
                call()
