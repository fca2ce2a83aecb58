"""Text generation with a decoder program: `Generator` for token ids, `generate` for text."""

from __future__ import annotations

import secrets
import time
from collections import abc
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import numpy as np

from .decoder import Convention, find_convention
from .delegate import KernelTime
from .errors import InputError, UnsupportedError, WebGPUDelegateError
from .method import Method
from .program import Program, Runtime, Source
from .resident import DEPTH, UNCHOSEN, Batch, Resident, find_whole
from .sampling import GREEDY, Sampling, choose
from .tokenizer import TextCodec, TextStream, Tokenizer

Array = np.ndarray[Any, Any]


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
    """

    tokens: tuple[int, ...]
    stop_reason: str
    prompt_tokens: int
    prefill_seconds: float
    decode_seconds: float
    decode_steps: int
    text: str | None = None
    steps_per_submit: int = 1

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens per second; 0 without any."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Decode steps per second; 0 without any."""
        return self.decode_steps / self.decode_seconds if self.decode_seconds and self.decode_steps else 0.0


class Generator:
    """A token sequence that grows: it drives a decoder method and keeps track of positions.

    A token that `generate_next` chooses belongs to the sequence at once, but is run through the program only when
    its logits are needed: the last one of a text never is.

    Where one delegate holds the whole model, `stream` and `generate` keep the loop on the GPU (see `resident.py`); else
    they run one step at a time, and `fallback` says why.

    Args:
        method: a decoder; see `find_convention`. Its state belongs to this generator from now on.
        constants: the program, or the values of its constant methods by name.
        steps_per_submit: decode steps that are submitted together; a submit runs while the host encodes the next, so
            a stop token is noticed up to two submits late, and what ran past it is dropped. None: as many as take a
            few hundredths of a second. 0: one step at a time, its logits are read and the host chooses.
    Raises:
        UnsupportedError: the method is no decoder; names its inputs.
        InputError: steps_per_submit is negative.
    """

    def __init__(
        self,
        method: Method,
        constants: Program | Mapping[str, Any] | None = None,
        *,
        steps_per_submit: int | None = None,
    ) -> None:
        if steps_per_submit is not None and steps_per_submit < 0:
            raise InputError(f"steps_per_submit is {steps_per_submit}, expected at least 0, or None")
        self.method = method
        self.constants = dict((constants.constants if isinstance(constants, Program) else constants) or {})
        self.convention: Convention = find_convention(method, self.constants)
        self._tokens: list[int] = []
        self._run = 0
        """The first so many tokens are in the program's state."""
        self._logits: Array | None = None
        """Of token `_run - 1`; None if not known."""
        self._seed = secrets.randbits(64)
        self.steps_per_submit = steps_per_submit
        self.largest_submit = 1
        """Most steps that the last `generate` submitted together."""
        self._changes = 0
        """Grows with every change of the sequence from outside a running stream."""
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

    # -- the sequence

    @property
    def tokens(self) -> tuple[int, ...]:
        """All ids so far."""
        return tuple(self._tokens)

    @property
    def length(self) -> int:
        """Number of ids so far."""
        return len(self._tokens)

    @property
    def capacity(self) -> int | None:
        """The most ids the sequence can have; None if the program names no limit."""
        return self.convention.capacity

    @property
    def room(self) -> int | None:
        """How many more ids fit; None if the program names no limit."""
        return None if self.capacity is None else self.capacity - self.length

    @property
    def logits(self) -> Array | None:
        """Logits [V] of the last id, from which the next is chosen; None if there is none, or it was not run yet."""
        return self._logits if self._run == len(self._tokens) else None

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end a text as the program says (constant methods `get_eos_ids`, `get_eos_id`); may be empty."""
        found: set[int] = set()
        for name in ("get_eos_ids", "get_eos_id"):
            value = self.constants.get(name, ())
            found.update(int(item) for item in (value if isinstance(value, list | tuple) else (value,)))
        return frozenset(found)

    def append_tokens(self, ids: Sequence[int]) -> None:
        """Add ids and run them, in as few calls as the program's sizes allow.

        Raises:
            InputError: no ids, one out of range, or more than fit; nothing was run, the sequence is as it was.
            DeviceError: the GPU failed; the sequence is as it was.
        """
        new = [_token(i, value, self.convention.vocabulary) for i, value in enumerate(ids)]
        if not new:
            raise InputError("no tokens to append")
        self._check_room(len(new), f"appending {len(new):,} tokens")
        self._changes += 1
        self._advance(self._tokens + new)

    def generate_next(self, sampling: Sampling = GREEDY) -> int:
        """Choose the next id, add it to the sequence and return it.

        Raises:
            InputError: the sequence is empty, or there is no room for another id.
            WebGPUDelegateError: the logits are NaN; the GPU failed. The sequence is as it was.
        """
        if not self._tokens:
            raise InputError("there is nothing to continue: append the tokens of a prompt first")
        self._check_room(1, "generating a token")
        if self._run < len(self._tokens) or self._logits is None:
            self._advance(self._tokens)
        if self._logits is None:
            raise AssertionError("running a token gave no logits")
        self._changes += 1
        token = choose(self._logits, sampling, self._seed, len(self._tokens), self._tokens)
        self._tokens.append(token)
        return token

    def rewind_to(self, length: int) -> None:
        """Drop all ids but the first `length`. Costs nothing: what comes next is written over them.

        Raises:
            InputError: `length` is negative or more than there are.
            UnsupportedError: the program's state cannot go back (convolutions, linear attention, ring buffers).
        """
        if not 0 <= length <= self.length:
            raise InputError(f"cannot rewind to {length}: the sequence has {self.length} tokens")
        if length == self.length:
            return
        self._changes += 1
        if length == 0:
            self.reset()
            return
        if length < self._run:
            if not self.convention.rewindable:
                raise UnsupportedError(
                    f"method {self.method.name} keeps state that is not a cache with a row for each position; "
                    "it can only be reset"
                )
            self._run, self._logits = length, None
        del self._tokens[length:]

    def reset(self) -> None:
        """Start a new, empty sequence."""
        self._changes += 1
        self.method.reset()
        self._tokens.clear()
        self._run, self._logits = 0, None

    def _check_room(self, count: int, what: str) -> None:
        if self.capacity is not None and self.length + count > self.capacity:
            raise InputError(
                f"{what} after {self.length:,} would exceed the program's capacity of {self.capacity:,} tokens; "
                "shorten the prompt, reset the generator, or export the model with a longer context"
            )

    def _advance(self, tokens: list[int]) -> None:
        """Run those of `tokens` that are not in the state yet, then make them the sequence, or leave all as it is."""
        # After a rewind the logits of the last token are unknown: if nothing follows it, it is run once more.
        first = done = min(self._run, len(tokens) - 1)
        logits = self._logits
        if done == 0:
            self.method.reset()
        try:
            while done < len(tokens):
                part = tokens[done : done + self.convention.chunk]
                outputs = self.method.execute(self.convention.inputs(part, done))
                logits = self.convention.last_logits(outputs[0])
                done += len(part)
        except BaseException as error:
            # Rows of a cache that were written too far do no harm. Other state is rebuilt from the first token.
            untouched = done == first and isinstance(error, InputError)
            if not (untouched or self.convention.rewindable):
                self._run, self._logits = 0, None
            raise
        self._tokens, self._run, self._logits = tokens, done, logits

    def profile_step(self) -> list[KernelTime]:
        """GPU time of every dispatch of one decode step: the last id is run once more at its place.

        Raises:
            InputError: the sequence is empty.
            UnsupportedError: the program's state does not allow to run a token twice.
            DeviceError: the device has no timestamps.
        """
        if not self._tokens:
            raise InputError("there is no step to profile: append the tokens of a prompt first")
        if not self.convention.rewindable:
            raise UnsupportedError(f"method {self.method.name} keeps state in which a token cannot be run twice")
        if self._run < len(self._tokens) or self._logits is None:
            self._advance(self._tokens)
        outputs, times = self.method.profile(self.convention.inputs(self._tokens[-1:], len(self._tokens) - 1))
        self._logits = self.convention.last_logits(outputs[0])
        return times

    # -- whole texts

    def stream(
        self,
        prompt_ids: Sequence[int] = (),
        max_new_tokens: int | None = None,
        stop_ids: Collection[int] | None = None,
        sampling: Sampling = GREEDY,
    ) -> Iterator[int]:
        """Append a prompt, at once, and return an iterator that chooses new ids.

        Args:
            prompt_ids: may be empty to go on with the sequence as it is.
            max_new_tokens: None: until a stop id or the capacity.
            stop_ids: end the stream and are not yielded (but join `tokens`); None: those that the program names.
        Raises:
            InputError: at the call as `append_tokens`; or there is neither a maximum nor a capacity.
        """
        return self._start(prompt_ids, max_new_tokens, stop_ids, sampling)

    def generate(
        self,
        prompt_ids: Sequence[int] = (),
        max_new_tokens: int | None = None,
        stop_ids: Collection[int] | None = None,
        sampling: Sampling = GREEDY,
        on_token: Callable[[int], bool | None] | None = None,
    ) -> GenerationResult:
        """`stream`, collected and timed.

        Args:
            on_token: called with each new id; True ends the generation with the reason `stopped`.
        Raises:
            InputError, DeviceError: as `stream`.
        """
        began = time.perf_counter()
        steps = self._start(prompt_ids, max_new_tokens, stop_ids, sampling)
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
        steps_run = max(self.length - base - 1, 0)
        return GenerationResult(
            tuple(found), reason, len(prompt_ids), first - began, ended - first, steps_run,
            steps_per_submit=self.largest_submit,
        )  # fmt: skip

    def _start(
        self,
        prompt_ids: Sequence[int],
        max_new_tokens: int | None,
        stop_ids: Collection[int] | None,
        sampling: Sampling,
    ) -> abc.Generator[int, None, str]:
        if max_new_tokens is not None and max_new_tokens < 0:
            raise InputError(f"max_new_tokens is {max_new_tokens}, expected at least 0")
        if max_new_tokens is None and self.capacity is None:
            raise InputError("the program does not say how many tokens it takes: give max_new_tokens")
        if len(prompt_ids):
            self.append_tokens(prompt_ids)
        elif not self._tokens:
            raise InputError("there is nothing to continue: the prompt has no tokens")
        return self._steps(max_new_tokens, self.stop_ids if stop_ids is None else frozenset(stop_ids), sampling)

    def _steps(self, limit: int | None, stops: Collection[int], sampling: Sampling) -> abc.Generator[int, None, str]:
        """New ids; returns why they ended."""
        count = 0
        while count != limit:
            if self.room == 0:
                return "capacity"
            known = self._run == len(self._tokens) and self._logits is not None
            ahead = None if known else self._ahead()  # known logits want no step, only a choice
            if ahead is not None:
                found, reason = yield from self._run_ahead(
                    ahead, None if limit is None else limit - count, stops, sampling
                )
                count += found
                if reason:
                    return reason
                continue
            token = self.generate_next(sampling)
            if token in stops:
                return "stop_token"
            yield token
            count += 1
        return "max_new_tokens"

    def _run_ahead(
        self, ahead: Resident, limit: int | None, stops: Collection[int], sampling: Sampling
    ) -> abc.Generator[int, None, tuple[int, str]]:
        """New ids from the GPU; returns how many, and why they ended ("" if the sequence was changed from outside)."""
        room = self.room
        budget = min(x for x in (limit, room) if x is not None)
        ended = "max_new_tokens" if budget == limit else "capacity"
        ahead.start(self._tokens[-1], len(self._tokens) - 1, sampling, self._seed, self._tokens)
        changes, sent, count = self._changes, 0, 0
        batch = Batch(self.steps_per_submit)
        try:
            while count < budget:
                while sent < budget and ahead.flying < DEPTH:
                    steps = min(batch.steps, budget - sent)
                    ahead.submit(steps)
                    sent += steps
                    self.largest_submit = max(self.largest_submit, steps)
                tokens = ahead.collect()
                batch.done(len(tokens))
                for token in tokens:
                    if token < 0:
                        raise WebGPUDelegateError(UNCHOSEN[token])
                    self._tokens.append(token)
                    self._run, self._logits = len(self._tokens) - 1, None
                    if token in stops:
                        return count, "stop_token"
                    count += 1
                    yield token
                    if self._changes != changes:
                        return count, ""
        finally:
            ahead.drop()
        return count, ended


def _token(place: int, value: Any, vocabulary: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 0 <= value < vocabulary:
        raise InputError(f"token {place} is {value!r}, expected an id in [0, {vocabulary:,})")
    return int(value)


def generate_text(
    generator: Generator,
    tokenizer: TextCodec,
    prompt: str,
    *,
    max_new_tokens: int | None = None,
    stop: Sequence[str] = (),
    stop_ids: Collection[int] | None = None,
    sampling: Sampling = GREEDY,
    on_text: Callable[[str], object] | None = None,
) -> GenerationResult:
    """Continue a text.

    Args:
        generator: its sequence is continued; the prompt is appended to it.
        stop: strings that end the text; they are left out.
        stop_ids: None: those that the program names and those that a `Tokenizer` found next to its file.
        on_text: called with each new piece of text, in whole characters; the pieces together are the result's text.
    Raises:
        InputError: the prompt does not fit, or an option is wrong; nothing was run.
        DeviceError: the GPU failed.
    """
    if stop_ids is None:
        stop_ids = generator.stop_ids | getattr(tokenizer, "stop_ids", frozenset())
    prompt_ids = tokenizer.encode(prompt)
    stream = TextStream(tokenizer, [*generator.tokens, *prompt_ids], stop)
    pieces: list[str] = []

    def emit(piece: str) -> None:
        if piece:
            pieces.append(piece)
            if on_text is not None:
                on_text(piece)

    def on_token(token: int) -> bool:
        emit(stream.push(token))
        return stream.stopped is not None

    result = generator.generate(prompt_ids, max_new_tokens, stop_ids, sampling, on_token)
    emit(stream.finish())
    reason = result.stop_reason if stream.stopped is None else "stop_string"
    return replace(result, stop_reason=reason, text="".join(pieces))


def generate(
    pte: Source,
    prompt: str,
    tokenizer: TextCodec | str | PathLike[str],
    *,
    data: Source | Sequence[Source] | None = None,
    method: str = "forward",
    runtime: Runtime | None = None,
    max_new_tokens: int | None = None,
    stop: Sequence[str] = (),
    stop_ids: Collection[int] | None = None,
    sampling: Sampling = GREEDY,
    on_text: Callable[[str], object] | None = None,
) -> GenerationResult:
    """Load a program, continue a text, free the program.

    Args:
        pte, data: the `.pte`, and the `.ptd` file or files with its weights.
        tokenizer: a `tokenizer.json`, or an object with `encode(text) -> ids` and `decode(ids) -> text`.
        runtime: where it runs; None: the process-wide one.
        max_new_tokens, stop, stop_ids, sampling, on_text: as for `generate_text`.
    Returns:
        The result; its `text` is what was generated, without the prompt.
    Raises:
        WebGPUDelegateError: one of its subclasses says what is wrong with the program, the tokenizer, the prompt or
            the device.
        OSError: a file cannot be read.
    """
    codec = Tokenizer(tokenizer) if isinstance(tokenizer, str | PathLike) else tokenizer
    with (runtime or Runtime.get()).load_program(pte, data) as program:
        generator = Generator(program.load_method(method), program)
        return generate_text(
            generator,
            codec,
            prompt,
            max_new_tokens=max_new_tokens,
            stop=stop,
            stop_ids=stop_ids,
            sampling=sampling,
            on_text=on_text,
        )
