"""Generation of token ids: `Generator` drives a decoder program, on the GPU alone where that is possible."""

from __future__ import annotations

import time
from collections import abc
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InputError, UnsupportedError, WebGPUDelegateError
from ..gpu.buffers import State
from ..methods.method import Method
from ..methods.program import Program
from .arguments import check_callback, check_count, check_sampling, check_stop_ids, given_ids
from .parts import Part
from .resident import DEPTH, UNCHOSEN, Batch, Interrupted, Resident, find_whole
from .sampling import GREEDY, Sampling
from .session import Session
from .speculative import Drafter, Speculation, Speculator


@dataclass(frozen=True)
class GenerationResult:
    """What was generated, and how fast.

    Attributes:
        tokens: the new ids; a stop token is left out.
        stop_reason: `stop_token`, `stop_string`, `max_new_tokens`, `capacity` (the program takes no more tokens), or
            `stopped` (by the caller).
        prompt_tokens: ids that the prefill ran.
        prefill_seconds: from the start until the first new token was chosen.
        decode_seconds: the rest; each step runs one token and chooses the next.
        decode_steps: number of those steps, one less than the tokens chosen.
        text: the new text, up to a stop string; None where only ids were generated.
        steps_per_submit: the most steps that ran in one submit; 1 where the host chose each token.
        speculation: how many tokens were drafted and accepted; None without a drafter.
    """

    tokens: tuple[int, ...]
    stop_reason: str
    prompt_tokens: int
    prefill_seconds: float
    decode_seconds: float
    decode_steps: int
    text: str | None = None
    steps_per_submit: int = 1
    speculation: Speculation | None = None

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens per second; 0 without any."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Decode steps per second; 0 without any."""
        return self.decode_steps / self.decode_seconds if self.decode_seconds and self.decode_steps else 0.0


class Generator(Session):
    """A token sequence that grows: it drives a decoder program and keeps track of positions.

    A token that `generate_next` chooses belongs to the sequence at once, but is run through the program only when
    its logits are needed: the last one of a text never is.

    `rewind_to(L)` keeps the first L ids and forgets the others, on the host alone: cache rows from L on stay as they
    are, unread, until later ids are written over them. Then `append_tokens` puts its ids at position L, and
    `generate_next` chooses id L, for which id L - 1 is run once more, at its own place, unless its logits are still
    known: a rewound sequence goes on exactly as one that was never longer. The random stream is rewound with it,
    because the number that draws an id depends on the seed and the id's position alone. `finished` is cleared, as it is
    by appending. Length 0 keeps the state's buffers, `reset` clears them. Where state is no cache with a row for each
    position there are limits: a ring buffer of R rows for a sliding window of W tokens goes back to lengths of at
    least F + W, where F is the first position that it still holds (the longest length so far minus R; without a limit
    while that is not positive), if its layout is one that `rings.py` recognises; recurrent state goes back only to 0,
    or to a `snapshot` with `restore`. Going too far is an error that changes nothing.

    Where one delegate holds the whole model, `stream` and `generate` keep the loop on the GPU (see `resident.py`); else
    they run one step at a time, and `fallback` says why.

    Several generators over one program share weights, temporaries and compiled kernels; each has its own state. They
    may take turns at any time, also in the middle of streams and in different threads (one thread each).

    Args:
        source: a program, of which the generator loads what it needs and frees it when it is closed; or a decoder
            method (see `find_convention`), whose state belongs to this generator from now on.
        constants: the program, or the values of its constant methods by name; known where `source` is a program.
        steps_per_submit: decode steps that are submitted together; a submit runs while the host encodes the next, so
            a stop token is noticed up to two submits late, and what ran past it is dropped. None: as many as take a
            few hundredths of a second. 0: one step at a time, its logits are read and the host chooses.
        state: use these buffers instead (`Program.new_state`, `Method.new_state` of the same program, which may be
            another object of the same file); the caller closes them.
        prefill: method for prompts, by name (or loaded, where `source` is a method); it may take exactly so many
            tokens a call, and shares its state with the other. None: found from the types of the methods' inputs.
        decode: name of the method for single tokens.
    Raises:
        UnsupportedError: a method is no decoder, and names its inputs; two methods do not keep the same state.
        InputError: steps_per_submit is no integer of at least 0; it is not clear which methods to use; the state, or
            a method, is another program's; something was closed.
        MissingDataError, DeviceError: as `Program.load_method`.
    """

    def __init__(
        self,
        source: Method | Program,
        constants: Program | Mapping[str, Any] | None = None,
        *,
        steps_per_submit: int | None = None,
        state: State | None = None,
        prefill: str | Method | None = None,
        decode: str | None = None,
    ) -> None:
        self.steps_per_submit = check_count("steps_per_submit", steps_per_submit)
        super().__init__(source, constants, state=state, prefill=prefill, decode=decode)

    def _begin(self, step: Part, first: Part, opened: list[Method]) -> None:
        super()._begin(step, first, opened)
        self.largest_submit = 1
        """Most steps that the last `generate` submitted together."""
        self.fallback: str | None = self._find_fallback()

    def _find_fallback(self) -> str | None:
        """Why decoding runs one step at a time; None if it need not."""
        if self.steps_per_submit == 0:
            return "steps_per_submit is 0"
        try:
            find_whole(self.method, self.convention)
        except UnsupportedError as error:
            return str(error)
        return None

    def _ahead(self) -> Resident | None:
        """The loop on the GPU; None where it cannot be."""
        if self.fallback is not None or self.capacity is None:
            return None
        try:
            return Resident.of(find_whole(self.method, self.convention), self.convention, self.capacity)
        except UnsupportedError as error:
            self.fallback = str(error)
            return None

    # -- whole texts

    def stream(
        self,
        prompt_ids: Sequence[int] = (),
        max_new_tokens: int | None = None,
        stop_ids: Collection[int] | None = None,
        sampling: Sampling = GREEDY,
        speculate: Drafter | None = None,
    ) -> Iterator[int]:
        """Append a prompt, at once, and return an iterator that chooses new ids.

        Args:
            prompt_ids: may be empty to go on with the sequence as it is.
            max_new_tokens: None: until a stop id or the capacity.
            stop_ids: end the stream and are not yielded (but join `tokens`); None: those that the program names.
            speculate: drafts tokens that are verified together, with the same result (see `speculative.py`).
        Raises:
            InputError: at the call as `append_tokens`; or there is neither a maximum nor a capacity.
            UnsupportedError: the program cannot verify drafts; says how to export it.
        """
        return self._start(prompt_ids, max_new_tokens, stop_ids, sampling, speculate)[0]

    def generate(
        self,
        prompt_ids: Sequence[int] = (),
        max_new_tokens: int | None = None,
        stop_ids: Collection[int] | None = None,
        sampling: Sampling = GREEDY,
        on_token: Callable[[int], bool | None] | None = None,
        speculate: Drafter | None = None,
    ) -> GenerationResult:
        """`stream`, collected and timed.

        Args:
            on_token: called with each new id; True ends the generation with the reason `stopped`.
        Raises:
            InputError, UnsupportedError, DeviceError: as `stream`.
        """
        began = time.perf_counter()
        check_callback("on_token", on_token)
        prompt_ids = given_ids("prompt_ids", prompt_ids)
        steps, speculator = self._start(prompt_ids, max_new_tokens, stop_ids, sampling, speculate)
        base, first, reason = self.length, 0.0, ""
        self.largest_submit = 1
        found: list[int] = []
        while not reason:
            try:
                token = next(steps)
            except StopIteration as end:
                reason = end.value
                break
            finally:
                first = first or time.perf_counter()
            found.append(token)
            if on_token is not None and on_token(token):
                reason = "stopped"
        ended = time.perf_counter()
        steps.close()
        steps_run = max(self.length - base - 1, 0)
        return GenerationResult(
            tuple(found), reason, len(prompt_ids), first - began, ended - first, steps_run,
            steps_per_submit=self.largest_submit,
            speculation=None if speculator is None else speculator.statistics,
        )  # fmt: skip

    def _start(
        self,
        prompt_ids: Sequence[int],
        max_new_tokens: int | None,
        stop_ids: Collection[int] | None,
        sampling: Sampling,
        speculate: Drafter | None,
    ) -> tuple[abc.Generator[int, None, str], Speculator | None]:
        max_new_tokens = check_count("max_new_tokens", max_new_tokens)
        prompt_ids, stop_ids = given_ids("prompt_ids", prompt_ids), check_stop_ids(stop_ids)
        check_sampling(sampling)
        if max_new_tokens is None and self.capacity is None:
            raise InputError("the program does not say how many tokens it takes: give max_new_tokens")
        self._ready()
        speculator = None
        if speculate is not None:
            speculator = Speculator(self, speculate, sampling, self.fallback is None)
        if len(prompt_ids):
            self.append_tokens(prompt_ids)
        elif not self._tokens:
            raise InputError("there is nothing to continue: the prompt has no tokens")
        stops = self.stop_ids if stop_ids is None else stop_ids
        steps = self._steps(max_new_tokens, stops, sampling, speculator)
        return (steps if speculator is None else speculator.pace.watch(steps)), speculator

    def _steps(
        self, limit: int | None, stops: Collection[int], sampling: Sampling, speculator: Speculator | None
    ) -> abc.Generator[int, None, str]:
        """New ids; returns why they ended."""
        count = 0
        pace = None if speculator is None else speculator.pace
        batch = Batch(self.steps_per_submit)
        while count != limit:
            self._ready()
            if not self._tokens:
                raise InputError("there is nothing to continue: the sequence was reset meanwhile")
            self._own_state()
            if self.room == 0:
                return "capacity"
            known = self._run == len(self._tokens) and self._logits is not None
            left = None if limit is None else limit - count
            ahead = None if known else self._ahead()  # known logits want no step, only a choice
            if speculator is not None and not known and not speculator.pace.waiting:
                found, reason = yield from self._run_drafted(speculator, left, stops)
                count += found
                if reason:
                    return reason
                continue
            if ahead is not None:
                if pace is not None:
                    left = pace.waiting if left is None else min(pace.waiting, left)
                found, reason = yield from self._run_ahead(ahead, batch, left, stops, sampling)
                count += found
                if reason and (reason != "max_new_tokens" or speculator is None):
                    return reason
            else:
                token = self.generate_next(sampling, stops)
                if token in stops:
                    return "stop_token"
                yield token
                found = 1
                count += 1
            if pace is not None:
                pace.undrafted(found)
        return "max_new_tokens"

    def _run_drafted(
        self, speculator: Speculator, limit: int | None, stops: Collection[int]
    ) -> abc.Generator[int, None, tuple[int, str]]:
        """New ids from drafts, as long as there are good ones; returns how many, and why they ended ("" if they need
        not)."""
        count = 0
        speculator.pace.begin()
        while count != limit:
            self._ready()
            most = min(x - 1 for x in (self.room, None if limit is None else limit - count) if x is not None)
            if self._run < len(self._tokens) - 1:
                self._advance(self._tokens[:-1])
            draft = speculator.draft(most)
            if not draft:
                speculator.pace.drafted(count, wrong=False)
                return count, "capacity" if self.room == 0 else ""
            chosen = speculator.verify(draft)
            for token in chosen:
                self._append(token, stops)
                if self._stopped:
                    return count, "stop_token"
                count += 1
                changes = self._changes
                yield token
                if self._changes != changes:
                    return count, ""
            if len(chosen) == 1:
                speculator.pace.drafted(count, wrong=True)
                return count, ""
        return count, "max_new_tokens"

    def _append(self, token: int, stops: Collection[int]) -> None:
        """Add an id that was chosen after all before it were run."""
        self._changes += 1  # so that another stream of this sequence notices
        self._tokens.append(token)
        self._run, self._logits = len(self._tokens) - 1, None
        self._stopped = token in stops

    def _run_ahead(
        self, ahead: Resident, batch: Batch, limit: int | None, stops: Collection[int], sampling: Sampling
    ) -> abc.Generator[int, None, tuple[int, str]]:
        """New ids from the GPU; returns how many, and why they ended ("" if the sequence was changed from outside)."""
        room = self.room
        budget = min(x for x in (limit, room) if x is not None)
        ended = "max_new_tokens" if budget == limit else "capacity"
        sent, count, mine = 0, 0, object()
        batch.begin()
        running = False
        try:
            while count < budget:
                while sent < budget and ahead.flying < DEPTH:
                    steps = min(batch.steps, budget - sent)
                    with ahead.device.lock:  # so that another thread's run comes before or after, not between
                        self._ready()  # another generator may have used the state meanwhile
                        try:
                            if not running:
                                ahead.start(self._tokens[-1], len(self._tokens) - 1, sampling, self._seed, self._tokens)
                                running, ahead.owner = True, mine
                            ahead.submit(steps)
                        except Interrupted:
                            if ahead.flying:
                                break  # their tokens are right: they were submitted before the interruption
                            running = False
                            continue
                    sent += steps
                    self.largest_submit = max(self.largest_submit, steps)
                tokens = ahead.collect()
                batch.done(len(tokens))
                for token in tokens:
                    if token < 0:
                        raise WebGPUDelegateError(UNCHOSEN[token])
                    self._append(token, stops)
                    if self._stopped:
                        return count, "stop_token"
                    count += 1
                    changes = self._changes
                    yield token
                    if self._changes != changes or ahead.owner is not mine:
                        return count, ""
        finally:
            if ahead.owner is mine:
                ahead.drop()
        return count, ended
