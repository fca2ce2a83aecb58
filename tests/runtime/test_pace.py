"""How often drafts are tried, on a clock that only the test moves."""

from __future__ import annotations

from collections.abc import Callable, Generator

import pytest

from executorch_webgpu.runtime.decoding.pace import (
    LONGEST_WAIT,
    MOST_WAIT,
    SHORTEST_WAIT,
    TOLERATED,
    WITHOUT,
    Pace,
    Reach,
)

STEP = 1.0
SWITCH = 9.0
"""What it takes to stop steps that run on the GPU alone, and to begin them again."""


class Text:
    """Decodes a text whose drafts give `worth(place)` tokens in `cost` seconds each time."""

    def __init__(
        self, worth: Callable[[int], int], cost: float = 3.0, alone: bool = True, adaptive: bool = True
    ) -> None:
        self.worth, self.cost = worth, cost
        self.seconds = 0.0
        self.pace = Pace(alone, adaptive, lambda: self.seconds)
        self.length = self.rounds = 0
        self.waits: list[int] = []

    def decode(self, tokens: int) -> float:
        """Seconds a token."""
        began, first = self.seconds, self.length
        while self.length - first < tokens:
            self.pace.begin()
            self.rounds += 1
            given = 0
            while (found := self.worth(self.length)) > 1:
                self.pace.right()
                self.seconds += self.cost
                self.length += found
                given += found
                if self.length - first >= tokens:
                    return (self.seconds - began) / (self.length - first)
            self.seconds += self.cost  # the wrong draft that ends them gives a token too
            self.length += 1
            self.pace.drafted(given + 1, wrong=True)
            self.waits.append(self.pace.waiting)
            self.seconds += SWITCH
            while self.pace.waiting:
                count = min(self.pace.waiting, 32)
                self.seconds += count * STEP
                self.length += count
                self.pace.undrafted(count)
        return (self.seconds - began) / (self.length - first)


def repeating() -> Callable[[int], int]:
    """Every tenth draft is wrong."""
    calls = iter(range(1 << 20))
    return lambda place: 1 if next(calls) % 10 == 9 else 8


def test_drafts_that_are_never_right_cost_little() -> None:
    text = Text(lambda place: 1)
    text.decode(500)
    assert STEP < text.decode(5000) < (1 + 2 * TOLERATED) * STEP
    eager = Text(lambda place: 1, adaptive=False)
    eager.decode(500)
    assert eager.decode(5000) > 1.25 * STEP


def test_drafts_that_are_right_follow_each_other() -> None:
    text = Text(repeating())
    assert text.decode(5000) < 0.8 * STEP
    assert set(text.waits[1:]) == {SHORTEST_WAIT}


def test_drafts_come_back_where_the_text_begins_to_repeat() -> None:
    text = Text(lambda place: 8 if place > 4000 else 1)
    text.decode(4000)
    assert text.waits[-1] > LONGEST_WAIT
    assert text.decode(4 * MOST_WAIT) < 0.6 * STEP


def test_a_pause_of_the_machine_does_not_end_drafts() -> None:
    text = Text(repeating())
    text.decode(1000)
    text.pace.begin()
    text.pace.drafted(1, wrong=True)
    text.seconds += 10_000 * STEP
    text.pace.undrafted(text.pace.waiting)
    text.decode(2000)
    assert max(text.waits) <= MOST_WAIT
    assert text.waits[-1] == SHORTEST_WAIT


def test_without_measuring_waits_depend_on_right_and_wrong_alone() -> None:
    text = Text(lambda place: 1, cost=1000.0, adaptive=False)
    text.decode(200)
    assert text.waits[:5] == [SHORTEST_WAIT, 8, 16, 32, LONGEST_WAIT]
    text.pace.begin()
    text.pace.drafted(0, wrong=False)
    assert text.pace.waiting == WITHOUT
    host = Text(lambda place: 1, cost=1000.0, alone=False, adaptive=False)
    host.decode(50)
    assert set(host.waits) == {1}


def test_steps_on_the_host_are_not_slowed_by_costly_drafts() -> None:
    text = Text(lambda place: 1, cost=20.0, alone=False)
    text.decode(1000)
    assert text.decode(5000) < (1 + 2 * TOLERATED) * STEP


@pytest.mark.parametrize("slow", [0.0, 100.0])
def test_what_the_caller_does_between_tokens_is_not_counted(slow: float) -> None:
    text = Text(lambda place: 1)

    def steps() -> Generator[int, None, str]:
        for _ in range(300):
            text.pace.begin()
            text.seconds += 3.0
            text.pace.drafted(0, wrong=False)
            while text.pace.waiting:
                text.seconds += STEP
                yield 0
                text.pace.undrafted(1)
            text.waits.append(text.pace.waiting)
        return "done"

    spent, ended = 0, []

    def watched() -> Generator[int, None, None]:
        ended.append((yield from text.pace.watch(steps())))

    for _ in watched():
        text.seconds += slow
        spent += 1
    assert ended == ["done"]
    assert spent / 300 == pytest.approx(64, rel=0.1)  # 3 seconds are a twentieth of 60 steps


def test_closing_the_tokens_closes_what_makes_them() -> None:
    closed = []

    def steps() -> Generator[int, None, str]:
        try:
            while True:
                yield 0
        finally:
            closed.append(True)

    watched = Pace(alone=True, adaptive=True).watch(steps())
    next(watched)
    watched.close()
    assert closed


@pytest.mark.parametrize(
    ("most", "adaptive", "expected"),
    [
        (31, True, [7, 15, 31, 31, 15, 7, 7, 7, 15]),
        (20, True, [7, 15, 20, 20, 10, 7, 7, 7, 15]),
        (4, True, [4] * 9),
        (31, False, [31] * 9),
        (0, True, [0] * 9),
    ],
)
def test_drafts_grow_where_they_are_right(most: int, adaptive: bool, expected: list[int]) -> None:
    reach, seen = Reach(most, adaptive), []
    for right in (True, True, True, False, False, False, None, True, True):
        seen.append(reach.tokens)
        if right is None:
            reach.judge(2, 2)  # fewer were proposed: nothing speaks for more
        else:
            reach.judge(reach.tokens, reach.tokens if right else 0)
    assert seen == expected


@pytest.mark.parametrize("held_up", [2.0, 20.0, 60.0, 200.0, 10_000.0])
def test_a_first_run_that_was_held_up_is_measured_again(held_up: float) -> None:
    """Kernels are compiled in it. Nothing is ever drafted, so asking costs only what it interrupts."""
    seconds, tokens = 0.0, 0
    pace = Pace(alone=True, adaptive=True, clock=lambda: seconds)
    for number in range(40):
        began, first = seconds, tokens
        pace.begin()
        pace.drafted(0, wrong=False)
        seconds += SWITCH + pace.waiting * STEP + (0.0 if number else held_up)
        tokens += pace.waiting
        pace.undrafted(pace.waiting)
    assert (seconds - began) / (tokens - first) < (1 + 2 * TOLERATED) * STEP


def test_what_was_learnt_is_kept_between_runs_and_the_time_between_them_not_counted() -> None:
    text = Text(lambda place: 1)
    text.decode(2000)
    waiting, rounds = text.waits[-1], text.rounds
    text.pace.begin()
    text.pace.drafted(0, wrong=False)
    text.pace.undrafted(10)
    text.seconds += 100_000 * STEP
    text.pace.resume()
    assert text.pace.waiting == LONGEST_WAIT < waiting - 10
    text.seconds += SWITCH + text.pace.waiting * STEP
    text.pace.undrafted(text.pace.waiting)
    assert text.decode(3000) < (1 + 2 * TOLERATED) * STEP
    assert text.rounds - rounds <= 3000 // waiting + 1
