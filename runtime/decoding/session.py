"""A token sequence on a state of its own: appending, choosing, rewinding, forks, snapshots and files."""

from __future__ import annotations

import copy
import secrets
import weakref
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from os import PathLike
from typing import Any, Self

import numpy as np

from ..errors import InputError, UnsupportedError
from ..gpu.buffers import State
from ..methods.delegate import KernelTime
from ..methods.method import Method
from ..methods.program import Program
from . import snapshot as snapshots
from .arguments import check_sampling, check_source, check_stop_ids, given_constants, given_ids
from .decoder import Convention
from .pace import Pace
from .parts import Part, check_shared, open_methods
from .rings import Rings, find_rings
from .sampling import GREEDY, Sampling, choose
from .snapshot import Content, Snapshot, Used
from .token_ids import is_integer, stop_ids, token_id

Array = np.ndarray[Any, Any]


class Session:
    """See `Generator`, which adds whole texts. Not for several threads at once; several sessions are."""

    def __init__(
        self,
        source: Method | Program,
        constants: Program | Mapping[str, Any] | None = None,
        *,
        state: State | None = None,
        prefill: str | Method | None = None,
        decode: str | None = None,
    ) -> None:
        check_source(source)
        self.constants = given_constants(constants, source)
        stop_ids(self.constants)  # refused here, not after the first token
        opened: list[Method] = []
        try:
            decoder, prompts = open_methods(source, state, prefill, decode, opened)
            step = Part.of(decoder, self.constants)
            first = step
            if prompts is not decoder:
                known = {} if step.convention.capacity is None else {"get_max_context_len": step.convention.capacity}
                first = Part.of(prompts, known | self.constants, prompts=True)
            check_shared(step, first)
        except BaseException:
            for method in reversed(opened):
                method.close()
            raise
        self._begin(step, first, opened)

    def _begin(self, step: Part, first: Part, opened: list[Method]) -> None:
        """Start with an empty sequence; `opened` are the methods to close with it."""
        self._step, self._first = step, first
        self._note = step.convention.note or first.convention.note
        self._tokens: list[int] = []
        self._run = 0
        """The first so many tokens are in the program's state."""
        self._logits: Array | None = None
        """Of token `_run - 1`; None if not known."""
        self._rings = None if self.rewindable else self._find_rings()
        self._floor = 0
        """First position that ring buffers hold."""
        self._seed = secrets.randbits(64)
        self._stopped = False
        self._pace: tuple[object, Pace] | None = None
        """The last drafter, and what its drafts were worth."""
        self._changes = 0
        """Grows with every change of the sequence, so that a stream notices those that are not its own."""
        self._key = object()
        """Says in `State.user` that the state holds this sequence."""
        self._finalizer = weakref.finalize(self, _close, opened)
        self._finalizer.atexit = False
        self.closed = False

    # -- what it runs

    @property
    def method(self) -> Method:
        """The method that runs single tokens."""
        return self._step.method

    @property
    def prefill(self) -> Method:
        """The method that runs prompts; often the same."""
        return self._first.method

    @property
    def convention(self) -> Convention:
        """How `method` is called."""
        return self._step.convention

    @property
    def state(self) -> State:
        """The mutable buffers."""
        return self.method.state

    @property
    def rewindable(self) -> bool:
        """Whether all state is caches with a row for each position, so that going back is only counting."""
        return self._step.convention.rewindable and self._first.convention.rewindable

    @cached_property
    def model_id(self) -> str:
        """As `snapshot.model_id`."""
        return snapshots.model_id(dict.fromkeys((self.method, self.prefill)))

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
        """The most ids the sequence can have: as many as the program names, or fewer where its caches have fewer rows;
        None if there is no limit."""
        known = [c for c in (self._step.convention.capacity, self._first.convention.capacity) if c is not None]
        return min(known, default=None)

    @property
    def room(self) -> int | None:
        """How many more ids fit; None if the program names no limit."""
        return None if self.capacity is None else self.capacity - self.length

    @property
    def finished(self) -> bool:
        """Whether the last id was chosen and is a stop id, or no more fit. Rewinding and appending clear it; it forbids
        nothing."""
        return self._stopped or self.room == 0

    @property
    def logits(self) -> Array | None:
        """Logits [V] of the last id, from which the next is chosen; None if there is none, or it was not run yet."""
        return self._logits if self._run == len(self._tokens) else None

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end a text as the program says (constant methods `get_eos_ids`, `get_eos_id`); may be empty."""
        return stop_ids(self.constants)

    def append_tokens(self, ids: Sequence[int]) -> None:
        """Add ids and run them, in as few calls as the program's sizes allow.

        Raises:
            InputError: no ids, one out of range, or more than fit; nothing was run, the sequence is as it was.
            DeviceError: the GPU failed; the sequence is as it was.
        """
        self._ready()
        given = given_ids("ids", ids)
        new = [token_id(i, value, self.convention.vocabulary) for i, value in enumerate(given)]
        if not new:
            raise InputError("no tokens to append")
        self._check_room(len(new), f"appending {len(new):,} tokens")
        self._changes += 1
        self._advance(self._tokens + new)
        self._stopped = False

    def become(self, tokens: Sequence[int]) -> None:
        """Make `tokens` the sequence, keeping the rows of what it begins with already; the last one is not run yet.

        Raises:
            InputError: there are none, one is out of range, or they do not fit.
            UnsupportedError: as `rewind_to`.
        """
        self._ready()
        given = given_ids("tokens", tokens)
        wanted = [token_id(i, value, self.convention.vocabulary) for i, value in enumerate(given)]
        if not wanted:
            raise InputError("a sequence without tokens: reset the generator instead")
        if self.capacity is not None and len(wanted) > self.capacity:
            raise InputError(f"{len(wanted):,} tokens exceed the program's capacity of {self.capacity:,}{self._note}")
        pairs = zip(self._tokens, wanted, strict=False)
        common = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(self._tokens), len(wanted)))
        self.rewind_to(common)
        self._changes += 1
        if self._run < len(wanted) - 1:
            self._advance(wanted[:-1])
        self._tokens, self._stopped = wanted, False

    def generate_next(self, sampling: Sampling = GREEDY, stop_ids: Collection[int] | None = None) -> int:
        """Choose the next id, add it to the sequence and return it.

        Args:
            stop_ids: set `finished` when chosen; None: those that the program names.
        Raises:
            InputError: the sequence is empty, or there is no room for another id.
            WebGPUDelegateError: the logits are NaN; the GPU failed. The sequence is as it was.
        """
        self._ready()
        check_sampling(sampling)
        stops = check_stop_ids(stop_ids)
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
        self._stopped = token in (self.stop_ids if stops is None else stops)
        return token

    def rewind_to(self, length: int) -> None:
        """Drop all ids but the first `length`. Nothing is copied or written; see the class for what it means.

        Raises:
            InputError: `length` is negative or more than there are.
            UnsupportedError: the program's state cannot go back so far (recurrent state: only to a snapshot; ring
                buffers: not past what they still hold). The sequence is as it was.
        """
        self._ready()
        if not is_integer(length) or not 0 <= length <= self.length:
            raise InputError(f"cannot rewind to {length!r}: the sequence has {self.length} tokens")
        if length == self.length:
            return
        if length < self._run and length and not self.rewindable:
            self._check_rings(length)
        self._changes += 1
        if length < self._run:
            if length == 0 and not self.rewindable:
                self._reset_state()
            self._run, self._logits = length, None
        del self._tokens[length:]
        self._stopped = False

    def _find_rings(self) -> Rings | None:
        found = [find_rings(part.method, self.capacity) for part in dict.fromkeys((self._step, self._first))]
        return found[0] if all(rings == found[0] for rings in found) else None

    def _check_rings(self, length: int) -> None:
        """UnsupportedError if state that is no cache by position cannot go back."""
        rings = self._rings
        if rings is None:
            raise UnsupportedError(
                f"method {self.method.name} keeps state that is not a cache with a row for each position; "
                "it can only be reset, or restored from a snapshot"
            )
        oldest = rings.oldest(self._floor)
        if length - 1 < oldest:  # the last token that remains may have to be run again, for its logits
            raise UnsupportedError(
                f"cannot rewind to {length}: ring buffers with {rings.rows} rows for a window of {rings.window} tokens "
                f"no longer hold what tokens before position {oldest} see; the least length is {oldest + 1}. Reset "
                "the sequence, or restore a snapshot"
            )

    def reset(self) -> None:
        """Start a new, empty sequence."""
        self._require_open()
        self._changes += 1
        self._reset_state()
        self._tokens.clear()
        self._run, self._logits, self._stopped = 0, None, False

    def _reset_state(self) -> None:
        for method in dict.fromkeys((self.method, self.prefill)):
            method.forget_stored()
        self.state.reset()
        self.state.user = self._key
        self._floor = 0

    def _require_open(self) -> None:
        if self.closed:
            raise InputError("this generator was closed: make a new one")
        self.state.require_open()

    def _ready(self) -> None:
        """InputError where the sequence cannot go on."""
        self._require_open()
        if self._run and self.state.user is not self._key:
            raise InputError("another generator has used this one's state since: reset this one, or give each its own")

    def _own_state(self) -> None:
        """Take over a state that holds nothing of this sequence, so that whose it was notices."""
        if self._run == 0 and self.state.user is not self._key:
            self._reset_state()

    def _check_room(self, count: int, what: str) -> None:
        if self.capacity is not None and self.length + count > self.capacity:
            raise InputError(
                f"{what} after {self.length:,} would exceed the program's capacity of {self.capacity:,} tokens"
                f"{self._note}; shorten the prompt, reset the generator, or export the model with a longer context"
            )

    def _call(self, count: int) -> tuple[Part, int]:
        """Which method runs the next of `count` tokens, and how many of them."""
        part = self._first if count >= max(self._first.least, 2) else self._step
        return part, min(count, part.convention.chunk)

    def _advance(self, tokens: list[int]) -> None:
        """Run those of `tokens` that are not in the state yet, then make them the sequence, or leave all as it is."""
        # After a rewind the logits of the last token are unknown: if nothing follows it, it is run once more.
        first = done = min(self._run, len(tokens) - 1)
        logits = self._logits
        if done == 0 and not (self.rewindable and self.state.user is self._key):
            self._reset_state()
        try:
            while done < len(tokens):
                part, count = self._call(len(tokens) - done)
                outputs = part.method.execute(part.convention.inputs(tokens[done : done + count], done), part.every)
                logits = part.convention.last_logits(outputs[0])
                done += count
        except BaseException as error:
            # Rows of a cache that were written too far do no harm. Other state is rebuilt from the first token.
            untouched = done == first and isinstance(error, InputError)
            if not (untouched or self.rewindable):
                self._run, self._logits = 0, None
            raise
        self._tokens, self._run, self._logits = tokens, done, logits
        if self._rings is not None:
            self._floor = self._rings.floor(self._floor, done)

    def profile_step(self) -> list[KernelTime]:
        """GPU time of every dispatch of one decode step: the last id is run once more at its place.

        Raises:
            InputError: the sequence is empty.
            UnsupportedError: the program's state does not allow to run a token twice.
            DeviceError: the device has no timestamps.
        """
        self._ready()
        if not self._tokens:
            raise InputError("there is no step to profile: append the tokens of a prompt first")
        if not self.rewindable:
            raise UnsupportedError(f"method {self.method.name} keeps state in which a token cannot be run twice")
        if self._run < len(self._tokens) or self._logits is None:
            self._advance(self._tokens)
        outputs, times = self.method.profile(self.convention.inputs(self._tokens[-1:], len(self._tokens) - 1))
        self._logits = self.convention.last_logits(outputs[0])
        return times

    # -- copies

    def _used(self) -> Used:
        return Used(self._run if self.rewindable else None, self.capacity or 0)

    def _content(self) -> Content:
        return Content(tuple(self._tokens), self._run, self._logits, self._seed, self._stopped, self._floor)

    def _take(self, content: Content) -> None:
        self._changes += 1
        self._tokens, self._run, self._logits = list(content.tokens), content.run, content.logits
        self._seed, self._stopped, self._floor = content.seed, content.stopped, content.floor
        self.state.user = self._key

    def fork(self) -> Self:
        """A second sequence that goes on from here by itself, with the same random stream. Weights, temporaries and
        compiled kernels are shared; of the state, the rows in use are copied on the GPU.

        Raises:
            InputError: the generator was closed.
            DeviceError: the device is out of memory; this sequence is as it was.
        """
        self._ready()
        opened: list[Method] = []
        try:
            step = self.method.on_state()
            opened.append(step)
            first = step
            if self.prefill is not self.method:
                first = self.prefill.on_state(step.state)
                opened.append(first)
            step.state.copy_from(self.state, self._used().parts(self.method.device))
            for new, old in ((step, self.method), (first, self.prefill)):
                new.copy_stored(old.stored())
        except BaseException:
            for method in reversed(opened):
                method.close()
            raise
        twin = copy.copy(self)
        parts = [Part(m, p.convention, p.least, p.every) for m, p in ((step, self._step), (first, self._first))]
        twin._begin(parts[0], parts[0] if first is step else parts[1], opened)
        twin._take(self._content())
        return twin

    def snapshot(self) -> Snapshot:
        """A copy of the sequence and its state on the GPU, to come back to with `restore`; the only way back where
        state is recurrent.

        Raises:
            InputError: the generator was closed.
            DeviceError: the device is out of memory.
        """
        self._ready()
        state = State(self.method.device, self.method.identity)
        try:
            state.copy_from(self.state, self._used().parts(self.method.device))
        except BaseException:
            state.close()
            raise
        made = Snapshot(self._content(), state, self.model_id, [self.method.stored(), self.prefill.stored()])
        weakref.finalize(made, state.close).atexit = False
        return made

    def restore(self, snapshot: Snapshot) -> None:
        """Go back (or forward) to a snapshot of this sequence, or of another one of the same program.

        Raises:
            InputError: it is of another program, or was closed; the sequence is as it was.
        """
        self._require_open()
        if not isinstance(snapshot, Snapshot):
            raise InputError(f"expected a snapshot, got {snapshot!r}")
        known = (snapshot.model, snapshot.state.program, snapshot.state.device)
        if known != (self.model_id, self.method.identity, self.method.device):
            raise InputError("the snapshot belongs to another program or device")
        used = Used(snapshot.content.run if self.rewindable else None, self.capacity or 0)
        self.state.copy_from(snapshot.state, used.parts(self.method.device))
        for method, kept in zip((self.method, self.prefill), snapshot.outside, strict=True):
            method.copy_stored(kept)
        self._take(snapshot.content)

    # -- files

    def save(self, path: str | PathLike[str]) -> None:
        """Write the session to a file (see `snapshot.py`); `load` of any generator of the same program goes on there.

        Raises:
            InputError: the generator was closed; `path` is no file's name.
            UnsupportedError: safetensors is not installed; the program keeps tensors outside of its delegates.
            OSError: the file cannot be written.
        """
        self._ready()
        self._require_inside()
        snapshots.check_target(path)
        state = snapshots.download(self.state, self._used())
        methods = " and ".join(dict.fromkeys((self.prefill.name, self.method.name)))
        snapshots.save(path, self._content(), state, self.model_id, self.capacity or 0, methods)

    def load(self, path: str | PathLike[str]) -> None:
        """Replace the sequence by one from a file.

        Raises:
            InputError: it is no session, truncated, damaged, of another model or longer than this program takes; the
                sequence is as it was.
            UnsupportedError: as `save`.
            OSError: the file cannot be read.
        """
        self._require_open()
        self._require_inside()
        expected = snapshots.Expected(
            self.model_id, 2**31 if self.capacity is None else self.capacity, self.convention.vocabulary,
            self.state.values(), self.rewindable,
        )  # fmt: skip
        content, arrays, used = snapshots.load(path, expected, self.method.device)
        try:
            snapshots.upload(self.state, used, arrays)
        except BaseException:  # the device failed half-way: nothing is known about the state
            self._take(Content((), 0, None, self._seed, False))
            self.state.user = None
            raise
        self._take(content)

    def _require_inside(self) -> None:
        if self.method.outside() or self.prefill.outside():
            raise UnsupportedError(
                f"method {self.method.name} runs operators outside of its delegates, and may keep tensors there: such "
                "sessions cannot be written to files"
            )

    # -- the end

    def close(self) -> None:
        """Free what this generator made: its state, unless it was given a method or a state to use."""
        self._changes += 1
        self.closed = True
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _close(methods: list[Method]) -> None:
    for method in reversed(methods):
        method.close()
