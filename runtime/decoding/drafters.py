"""Drafters: where guesses of the next tokens come from. What verifies them is in `speculative.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..errors import InputError, UnsupportedError
from .arguments import check_positive
from .generator import Generator
from .sampling import GREEDY, Sampling
from .session import Session
from .speculative import Proposals


@dataclass(frozen=True)
class NGram:
    """Proposes what followed the last time that the text's last few tokens occurred ("prompt lookup decoding").

    For texts that repeat: code, quotations, summaries, rewriting.

    Attributes:
        most: tokens proposed at a time, where drafts are right; they begin with 7.
        longest, shortest: lengths of the n-grams that are looked up, the longest first.
        adaptive: whether to draft less where drafts were measured to take more time than they save, and more tokens
            at a time where they are right; False: always `most`.
    Raises:
        InputError: not 1 <= shortest <= longest, or `most` is not positive; one of them is no integer.
    """

    most: int = 31
    longest: int = 4
    shortest: int = 2
    adaptive: bool = True

    def __post_init__(self) -> None:
        for name in ("most", "longest", "shortest"):
            object.__setattr__(self, name, check_positive(name, getattr(self, name)))
        if not self.shortest <= self.longest:
            raise InputError(f"n-grams of {self.shortest} to {self.longest} tokens, expected 1 <= shortest <= longest")

    def begin(self, target: Session, sampling: Sampling, seed: int) -> Proposals:
        return _Lookup(self)


class _Lookup:
    """Where every n-gram ended last, kept up to date as the text grows."""

    def __init__(self, settings: NGram) -> None:
        self.settings = settings
        self._text: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}
        """N-gram -> number of tokens up to its end, where at least one token follows."""

    def draft(self, tokens: Sequence[int], count: int) -> list[int]:
        self._learn(tokens)
        for size in range(min(self.settings.longest, len(tokens) - 1), self.settings.shortest - 1, -1):
            start = self._ends.get(tuple(tokens[-size:]))
            if start is not None:
                found: list[int] = []
                for place in range(start, start + count):  # past the text's end the proposal itself goes on
                    found.append(tokens[place] if place < len(tokens) else found[place - len(tokens)])
                return found
        return []

    def _learn(self, tokens: Sequence[int]) -> None:
        known = len(self._text)
        if known > len(tokens) or self._text != list(tokens[:known]):
            self._text, self._ends, known = [], {}, 0
        for end in range(max(known, 1), len(tokens)):
            for size in range(self.settings.shortest, min(self.settings.longest, end) + 1):
                self._ends[tuple(tokens[end - size : end])] = end
        self._text.extend(tokens[known:])


class DraftModel:
    """Proposes what a smaller program would generate, with the same sampling settings and random numbers.

    Args:
        generator: of a program with the same vocabulary; its sequence is replaced.
        most: tokens proposed at a time.
        adaptive: whether to draft less where drafts were measured to take more time than they save.
    Raises:
        InputError: `most` is no positive integer; `generator` is none, or was closed.
        UnsupportedError: its state cannot go back.
    """

    def __init__(self, generator: Generator, most: int = 4, adaptive: bool = True) -> None:
        if not hasattr(generator, "rewindable"):
            raise InputError(f"a draft model of {generator!r}, expected a Generator")
        if generator.closed:
            raise InputError("the draft model was closed: make a new one")
        if not generator.rewindable:
            raise UnsupportedError("a draft model must be able to go back; this one's state is no cache by position")
        self.generator = generator
        self.adaptive = adaptive
        self._most = check_positive("most", most)
        self._sampling = GREEDY

    @property
    def most(self) -> int:
        return self._most

    def begin(self, target: Session, sampling: Sampling, seed: int) -> Proposals:
        if self.generator.closed:
            raise InputError("the draft model was closed: make a new one")
        self.generator.state.require_open()
        sizes = self.generator.convention.vocabulary, target.convention.vocabulary
        if sizes[0] != sizes[1]:
            raise InputError(f"the draft model has {sizes[0]:,} tokens, the model {sizes[1]:,}: they must be the same")
        if self.generator.state is target.state:
            raise InputError("the draft model must have a state of its own")
        self._sampling = sampling if sampling.seed is not None else replace(sampling, seed=seed)
        return self

    def draft(self, tokens: Sequence[int], count: int) -> Sequence[int]:
        room = self.generator.capacity
        if room is not None:
            count = min(count, room - len(tokens))
        if count < 1:
            return []
        self.generator.become(tokens)
        return self.generator.generate((), count, (), self._sampling).tokens
