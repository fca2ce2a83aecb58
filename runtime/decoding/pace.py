"""How often and how much to draft: speculative decoding that stops where it does not pay.

Drafting interrupts steps that otherwise run on the GPU one after the other, so drafts that are seldom right, and even
asking for drafts where there are none, cost time. A round is a run of drafts and the tokens decoded without any after
it. With b the seconds of a token in steps that nothing interrupts, a round that took t seconds for n tokens saved b *
n - t. While the last rounds saved time on the whole, drafts follow each other as closely as without measuring;
otherwise so many tokens are decoded in between that what a round loses is TOLERATED of their time. Since now and then
a round is still tried, drafts come back where the text begins to repeat.

b is the slope between the least times that the fewest and the most tokens without drafts took, so that what an
interruption costs is not taken for a part of it; the first round waits long so that there are two.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Generator

WITHOUT = 8
"""Tokens that are decoded together where nothing was drafted, before the drafter is asked again."""
SHORTEST_WAIT, LONGEST_WAIT = 4, 32
"""Tokens that are decoded without a draft after drafts that were wrong: twice as many each time."""
MOST_WAIT = 512
"""Tokens that are decoded without a draft at most, however much drafts lost."""
TOLERATED = 0.05
"""Part of the time that drafts may lose, once it is known what they cost."""
RECENT = 6
"""Rounds that are judged together."""
FORGET = 1.05
"""What a least time may grow by when it is measured again: steps take longer as the text grows."""

FIRST = 7
"""Tokens of a first draft: with the one before them as many as kernels take that read weights once."""


class Reach:
    """Says how many tokens to draft at a time: twice as many after drafts that were right, half as many after others.

    Args:
        most: tokens of a draft.
        adaptive: False: always `most`.
    Attributes:
        tokens: to draft next.
    """

    def __init__(self, most: int, adaptive: bool) -> None:
        self._most = most
        self._least = min(most, FIRST) if adaptive else most
        self.tokens = self._least

    def judge(self, drafted: int, accepted: int) -> None:
        """Of `drafted` tokens the first `accepted` were right."""
        if accepted < drafted:
            self.tokens = max(self.tokens // 2, self._least)
        elif drafted == self.tokens:
            self.tokens = min(2 * self.tokens + 1, self._most)


class Pace:
    """Says how many tokens to decode without a draft, from what drafts and steps have taken.

    A round: `begin`, `right` for each draft with a right token, `drafted` once they end, then `undrafted` after tokens
    without drafts until `waiting` is 0. The first round of a sequence waits 32 tokens, the second as long as if nothing
    were measured: from these two the seconds of a token are known.

    Args:
        alone: whether steps run on the GPU alone, so that asking for drafts interrupts them.
        adaptive: False judges by right and wrong drafts only: the same calls in every run.
        clock: seconds.
    """

    def __init__(self, alone: bool, adaptive: bool, clock: Callable[[], float] = time.perf_counter) -> None:
        self._least = WITHOUT if alone else 1
        self._adaptive = adaptive
        self._clock = clock
        self._away = 0.0
        self._began = self._parted = 0.0
        self._drafted = self._undrafted = 0
        self._seconds: dict[int, float] = {}
        self._once: set[int] = set()
        """Numbers of tokens whose time was measured once."""
        self._rounds: deque[tuple[int, float]] = deque(maxlen=RECENT)
        self._wait = 0
        self.waiting = 0
        """Tokens to decode before the drafter is asked again."""

    def resume(self) -> None:
        """Another run of the same sequence begins: the time between runs does not count, and since its text may be
        another, the drafter is asked soon."""
        self.waiting = min(self.waiting, LONGEST_WAIT)
        self._began = self._parted = self._now()
        self._drafted = self._undrafted = 0

    def watch(self, steps: Generator[int, None, str]) -> Generator[int, None, str]:
        """The same tokens; the time that the caller spends between them is not counted."""
        self.resume()
        try:
            while True:
                try:
                    token = next(steps)
                except StopIteration as end:
                    reason: str = end.value
                    return reason
                left = self._clock()
                yield token
                self._away += self._clock() - left
        finally:
            steps.close()

    def begin(self) -> None:
        """A round begins: the drafter is asked."""
        self._began = self._now()

    def right(self) -> None:
        """A drafted token was right."""
        self._wait = 0

    def drafted(self, tokens: int, wrong: bool) -> None:
        """Drafts have given `tokens` tokens and ended: `wrong`, or for want of one. Sets `waiting`."""
        self._parted = self._now()
        self._drafted, self._undrafted = tokens, 0
        wanted = self._least
        if wrong:
            self._wait = min(max(2 * self._wait, SHORTEST_WAIT), LONGEST_WAIT)
            wanted = self._wait if self._least > 1 else 1
        if self._adaptive:
            wanted = max(wanted, self._affordable())
        self.waiting = wanted

    def undrafted(self, tokens: int) -> None:
        """`tokens` tokens were decoded without drafts; the last one that was waited for ends the round."""
        if not self.waiting:
            return
        self._undrafted += tokens
        self.waiting = max(self.waiting - tokens, 0)
        if not self.waiting:
            now, count = self._now(), self._undrafted
            if count in self._seconds:
                self._once.discard(count)
            else:
                self._once.add(count)
            self._seconds[count] = min(FORGET * self._seconds.get(count, math.inf), now - self._parted)
            self._rounds.append((self._drafted + count, now - self._began))

    def _affordable(self) -> int:
        """Tokens without a draft beside which what drafts lose is small; 0 where they lose nothing."""
        if not self._seconds:
            return 4 * self._least
        fewest, most = min(self._seconds), max(self._seconds)
        each = average = self._seconds[most] / most
        if most > fewest:
            if most in self._once and average > 0.9 * self._seconds[fewest] / fewest:
                return most  # something held it up, as compiling kernels does the first time: measure it again
            slope = (self._seconds[most] - self._seconds[fewest]) / (most - fewest)
            each = min(max(slope, average / 2), average)
        elif self._least > 1:
            return 0
        lost = sorted(seconds - each * tokens for tokens, seconds in self._rounds)
        kept = lost[: max(len(lost) - 1, 1)]  # without the worst, in which the machine may have paused
        wanted = sum(kept) / len(kept) / (TOLERATED * max(each, 1e-9))
        return min(1 << math.ceil(math.log2(wanted)), MOST_WAIT) if wanted > 1 else 0

    def _now(self) -> float:
        return self._clock() - self._away
