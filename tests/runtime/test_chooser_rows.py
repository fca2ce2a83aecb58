"""Choosing for rows with lengths of their own, and for rows of which each wants something else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from executorch_webgpu.runtime import InputError, Sampling
from executorch_webgpu.runtime.decoding.chooser import IDLE_ROW, Advance, Chooser, Lengths, Logits, Target
from executorch_webgpu.runtime.decoding.sampling import GREEDY, choose
from executorch_webgpu.runtime.gpu.device import Device
from tests.harness import DEVICES, device
from tests.runtime.test_chooser import Rig, random_logits, rig

CAPACITY = 40
EACH = [
    GREEDY,
    Sampling(temperature=0.9, top_k=40, top_p=0.9, repetition_penalty=1.2),
    Sampling(temperature=1.3),
    Sampling(repetition_penalty=1.5),
    Sampling(temperature=1.2, min_p=0.02, seed=8),
    Sampling(temperature=0.7, top_p=0.6),
    Sampling(temperature=1.5, top_k=3),
]


@dataclass
class Places:
    """A chooser's rig, with the words of its rows between sentinels."""

    rig: Rig
    past: Any
    q_len: Any
    target: Any

    def words(self) -> tuple[list[int], list[int], list[int]]:
        past, q_len, target = (self.rig.read(buffer).tolist() for buffer in (self.past, self.q_len, self.target))
        return past, q_len, target


@contextmanager
def places(on: Device, rows: int, past: list[int], q_len: list[int], ring: int = 4) -> Iterator[Places]:
    buffers = [on.buffer(4 * (rows + 9), "other", "test words") for _ in range(3)]
    for buffer, words in zip(buffers, (past, q_len, [77] * rows), strict=True):
        filled = np.full(buffer.size // 4, 99, np.int32)
        filled[:rows] = words
        on.write(buffer, filled)
    lengths = Lengths(buffers[0], buffers[1], CAPACITY)
    given = {"capacity": ring, "targets": [Target(buffers[2])], "lengths": lengths}
    with rig(on, random_logits(1100, rows), **given) as made:
        made.chooser.start(0)
        yield Places(made, *buffers)
    for buffer in buffers:
        on.release(buffer, "other")


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("rows", [1, 7, 70])
def test_rows_move_on_by_their_own_lengths(on: str, rows: int) -> None:
    """Past grows by q_len up to the capacity; idle rows keep every word; positions and streams are a row's own."""
    rng = np.random.default_rng(rows)
    past = rng.integers(0, CAPACITY - 8, rows).tolist()
    q_len = [1 + (row % 3 == 2) if row % 5 != 4 else 0 for row in range(rows)]
    if rows > 1:
        past[1], past[-1], q_len[-1] = CAPACITY - 2, CAPACITY, 1
    steps, streams = 4, rng.integers(0, 2**32, rows).tolist()
    settings = [EACH[row % len(EACH)] for row in range(rows)]
    with places(device(on), rows, past, q_len) as p:
        p.rig.chooser.configure(settings, list(range(rows)), streams)
        p.rig.submit(steps, settings)
        ring, (after, same, target) = p.rig.ring(steps), p.words()
    for row in range(rows):
        if not q_len[row]:
            assert (ring[:, row] == IDLE_ROW).all()
            assert (after[row], target[row]) == (past[row], 77)
            continue
        assert after[row] == min(past[row] + steps * q_len[row], CAPACITY)
        assert target[row] == ring[-1, row]
        for step in range(steps):
            position = min(past[row] + step * q_len[row], CAPACITY) + q_len[row]
            history = ring[:step, row].tolist()
            expected = choose(p.rig.logits[row], settings[row], row, position, history, streams[row])
            assert ring[step, row] == expected, (row, step)
    assert same[:rows] == q_len
    for words in (after, same, target):
        assert set(words[rows:]) == {99}


@pytest.mark.parametrize("on", DEVICES)
def test_idle_rows_remember_nothing(on: str) -> None:
    """What an idle row's logits would give is not among its seen tokens later."""
    with places(device(on), 2, [3, 3], [0, 1]) as p:
        settings = [Sampling(repetition_penalty=50.0)] * 2
        p.rig.chooser.configure(settings)
        p.rig.submit(3, settings)
        assert p.rig.ring(3)[:, 0].tolist() == [IDLE_ROW] * 3
        p.rig.device.write(p.q_len, np.ones(2, np.int32))
        p.rig.submit(1, settings)
        history = p.rig.ring(4)[:3, 1].tolist()
        expected = [choose(p.rig.logits[row], settings[0], 0, 0, seen) for row, seen in ((0, []), (1, history))]
        assert p.rig.ring(4)[3].tolist() == expected


@pytest.mark.parametrize("on", DEVICES)
def test_bad_lengths_stay_in_range(on: str) -> None:
    """Lengths that only the GPU knows: `past` ends in 0..capacity, the words beside it are as they were."""
    past = [-5, 2**31 - 9, CAPACITY + 7, 12]
    with places(device(on), 4, past, [1, 2**31 - 1, 1, -2]) as p:
        p.rig.submit(2, GREEDY)
        after, _, target = p.words()
    assert after[0] == 2
    assert after[1:3] == [CAPACITY] * 2
    assert (after[3], target[3]) == (12, 77)
    assert set(after[4:]) == {99}


@pytest.mark.parametrize("on", DEVICES)
def test_the_ring_goes_round(on: str) -> None:
    with places(device(on), 3, [0, 0, 0], [1, 1, 1]) as p:
        settings = Sampling(temperature=1.0, seed=5)
        p.rig.chooser.configure(settings, streams=[0, 0, 0])
        p.rig.submit(7, settings)
        ring = p.rig.ring(4)
        for row in range(3):
            drawn = [choose(p.rig.logits[row], settings, 0, 1 + step) for step in range(7)]
            assert ring[:, row].tolist() == [*drawn[4:], drawn[3]]


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("other", EACH[1:])
def test_greedy_rows_stay_greedy_among_others(on: str, other: Sampling) -> None:
    """Also with ties over chunks, an infinite logit, and a bare difference: the lowest id of the largest."""
    logits = random_logits(2100, 5)
    logits[0, [7, 1500, 2099]] = 9.0
    logits[1, :] = -3.0
    logits[2, [2000, 2001]] = np.inf
    logits[3, 1024] = np.nextafter(np.float32(9), np.float32(10))
    logits[3, 3] = 9.0
    with rig(device(on), logits) as r:
        each = [*[GREEDY] * 4, other]
        r.chooser.configure(each, 3)
        r.chooser.start(10)
        r.submit(3, each)
        found = r.ring(3)
    assert found[:, :4].tolist() == [[7, 0, 2000, 1024]] * 3
    history: list[int] = []
    for step in range(3):
        assert found[step, 4] == choose(logits[4], other, 3, 10 + step, history, 4)
        history.append(int(found[step, 4]))


def test_a_choice_is_placed_behind_several_steps() -> None:
    """One ring and one set of counters for logits in two buffers; what was placed is given back."""
    where = device("full")
    logits = random_logits(300, 2)
    with rig(where, logits, capacity=8) as r:
        before = where.memory.total
        other = where.buffer(4 * 2 * 700, "other", "more logits")
        second = random_logits(301, 2)[:, :300]
        padded = np.full((2, 700), np.nan, np.float32)
        padded[:, :300] = second
        where.write(other, padded)
        placed = r.chooser.place(Logits(other, 0, 700))
        r.chooser.start(0)
        for lists in (r.chooser.launches(GREEDY), r.chooser.launches(GREEDY, placed)) * 2:
            encoder = where.gpu.create_command_encoder()
            compute = encoder.begin_compute_pass()
            for launch in lists:
                compute.set_pipeline(launch.pipeline)
                compute.set_bind_group(0, launch.bind_group)
                compute.dispatch_workgroups(*launch.grid)
            compute.end()
            where.gpu.queue.submit([encoder.finish()])
        assert r.ring(4).tolist() == [logits.argmax(1).tolist(), second.argmax(1).tolist()] * 2
        r.chooser.remove(placed)
        where.release(other, "other")
        assert where.memory.total == before


def test_bad_places_are_named() -> None:
    where = device("default-limits")
    before = where.memory.total
    buffers = [where.buffer(96, "other", "test words") for _ in range(5)]
    logits = Logits(buffers[0], 0, 8)
    short = where.buffer(16, "other", "short")
    for lengths, rows, message in [
        (Lengths(buffers[1], buffers[1], 4), 2, "two buffers and a positive capacity"),
        (Lengths(buffers[1], buffers[2], 0), 2, "two buffers and a positive capacity"),
        (Lengths(short, buffers[2], 4), 5, "lengths: word 0 of a buffer of 16 bytes"),
    ]:
        with pytest.raises(InputError, match=message):
            Chooser(where, 3, rows, Logits(buffers[0], 0, 3), 4, lengths=lengths)
    targets = [Target(buffers[3]), Target(buffers[4])]
    with pytest.raises(InputError, match="5 buffers to write"):
        Chooser(where, 8, 2, logits, 4, targets, [Advance(short, 0)], Lengths(buffers[1], buffers[2], 4))
    chooser = Chooser(where, 8, 2, logits, 4)
    with pytest.raises(InputError, match="1 streams for 2 rows"):
        chooser.configure(GREEDY, streams=[0])
    chooser.close()
    for buffer in [*buffers, short]:
        where.release(buffer, "other")
    assert where.memory.total == before
