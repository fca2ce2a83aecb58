"""The rows of a batch as sequences: appending, choosing, rewinding and forks, for one row or several at once."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from os import PathLike
from typing import Any, Self, overload

import numpy as np

from ..decoding import snapshot as snapshots
from ..decoding.arguments import (
    check_count,
    check_sampling,
    check_source,
    check_stop_ids,
    given_constants,
    given_ids,
    given_list,
)
from ..decoding.chooser import NAN_LOGITS, NO_LOGITS
from ..decoding.decoder import find_ragged
from ..decoding.resident import UNCHOSEN, find_whole
from ..decoding.sampling import GREEDY, Sampling, choose
from ..decoding.snapshot import Expected, Used
from ..decoding.token_ids import is_integer, stop_ids, token_id
from ..errors import InputError, UnsupportedError, WebGPUDelegateError
from ..methods.method import Method
from ..methods.program import Program
from .loop import BatchLoop, Choice, Piece
from .rows import Row, RowCopies

Array = np.ndarray[Any, Any]
CHUNK = 128
"""Tokens of a prompt that run in one call, so that rows which are further on do not wait long."""


class BatchSequences:
    """See `BatchGenerator`, which adds whole texts."""

    def __init__(
        self,
        source: Method | Program,
        constants: Program | Mapping[str, Any] | None = None,
        *,
        steps_per_submit: int | None = None,
        chunk: int | None = None,
    ) -> None:
        check_source(source)
        steps_per_submit = check_count("steps_per_submit", steps_per_submit)
        chunk = check_count("chunk", chunk, 1)
        self.constants = given_constants(constants, source)
        self._stop_ids = stop_ids(self.constants)
        self._owned = isinstance(source, Program)
        self.method = _load(source, self.constants) if isinstance(source, Program) else source
        self.closed = False
        self._loop: BatchLoop | None = None
        self.fallback: str | None = "steps_per_submit is 0" if steps_per_submit == 0 else None
        try:
            self.convention = find_ragged(self.method, self.constants)
            if self.fallback is None:
                self._make_loop(steps_per_submit)
        except BaseException:
            if self._owned:
                self.method.close()
            raise
        self.chunk = min(chunk or CHUNK, self.convention.chunk)
        self.steps_per_submit = steps_per_submit
        self._rows = [Row(number) for number in range(self.convention.rows)]
        self._copies = RowCopies(self.method.device, self.method.state, self.capacity)
        self._key = object()
        """Says in `State.user` that the state holds these sequences."""
        self._finalizer = weakref.finalize(self, _free, self._loop, self._copies, self.method if self._owned else None)
        self._finalizer.atexit = False

    def _make_loop(self, steps: int | None) -> None:
        try:
            whole = find_whole(self.method, self.convention)
            if whole.delegate.companion is not None:
                whole.delegate.companion.close()
                whole.delegate.companion = None
            self._loop = whole.delegate.companion = BatchLoop(whole.lent(), self.convention, steps)
        except UnsupportedError as error:
            self.fallback = str(error)

    # -- what there is

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.convention.rows

    @property
    def capacity(self) -> int:
        """The most ids a row can have."""
        return self.convention.capacity

    @property
    def vocabulary(self) -> int:
        """Number of logits."""
        return self.convention.vocabulary

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end a text as the program says (constant methods `get_eos_ids`, `get_eos_id`); may be empty."""
        return self._stop_ids

    @cached_property
    def model_id(self) -> str:
        """As `snapshot.model_id`."""
        return snapshots.model_id((self.method,))

    def tokens(self, row: int) -> tuple[int, ...]:
        """All ids of a row so far. Raises InputError for a row that is none."""
        return tuple(self._row(row).tokens)

    def length(self, row: int) -> int:
        """Number of a row's ids so far, as `tokens`."""
        return len(self._row(row).tokens)

    def finished(self, row: int) -> bool:
        """Whether a row's last id was chosen and is a stop id, or no more fit; rewinding and appending clear it."""
        found = self._row(row)
        return found.stopped or len(found.tokens) == self.capacity

    # -- sequences

    @overload
    def append_tokens(self, row: int, ids: Sequence[int]) -> None: ...
    @overload
    def append_tokens(self, row: Sequence[Sequence[int] | None]) -> None: ...
    def append_tokens(self, row: int | Sequence[Sequence[int] | None], ids: Sequence[int] | None = None) -> None:
        """Add ids to a row, or to each row (None: not to this one), and run all but the last of each, which runs when
        the next id is chosen. Rows run together, in as few calls as `chunk` allows.

        Raises:
            InputError: no ids, one out of range, more than fit; no such row, or a request's; nothing was run, all rows
                are as they were.
            DeviceError: the GPU failed; all rows are as they were.
        """
        given = self._given(row, ids, "ids")
        added: dict[int, list[int]] = {}
        for number, ids in given.items():
            found, new = self._own(number), given_ids(f"row {number}", ids)
            added[number] = [token_id(place, value, self.vocabulary, number) for place, value in enumerate(new)]
            if not len(new):
                raise InputError(f"row {number}: no tokens to append")
            self._check_room(found, len(new), f"appending {len(new):,} tokens")
        if not added:
            raise InputError("no tokens to append")
        self._ready()
        before = {number: (len(self._rows[number].tokens), self._rows[number].stopped) for number in added}
        marked = {number: self._rows[number].marked for number in added}
        runs = {number: self._rows[number].run for number in added}
        try:
            for number, new in added.items():
                self._rows[number].tokens += new
                self._rows[number].stopped = self._rows[number].marked = False
            self._fill([self._rows[number] for number in added])
        except BaseException:
            for number, (length, stopped) in before.items():
                found = self._rows[number]
                del found.tokens[length:]
                found.stopped, found.marked, found.run = stopped, marked[number], runs[number]
            raise

    @overload
    def generate_next(self, row: int, sampling: Sampling = GREEDY, stop_ids: Collection[int] | None = None) -> int: ...
    @overload
    def generate_next(
        self,
        row: Sequence[int] | None = None,
        sampling: Sampling | Sequence[Sampling] = GREEDY,
        stop_ids: Collection[int] | None = None,
    ) -> list[int]: ...
    def generate_next(
        self,
        row: int | Sequence[int] | None = None,
        sampling: Sampling | Sequence[Sampling] = GREEDY,
        stop_ids: Collection[int] | None = None,
    ) -> int | list[int]:
        """Choose the next id of a row, or of several in one call, add it to the row and return it.

        Args:
            row: None: all rows that have ids and are no request's.
            sampling: for all of them, or one for each.
            stop_ids: set `finished` when chosen; None: those that the program names.
        Raises:
            InputError: no such row, an empty one, a full one, or a request's.
            WebGPUDelegateError: a row's logits are NaN; the GPU failed. All rows are as they were.
        """
        self._require_open()
        given = check_stop_ids(stop_ids)
        stops = self.stop_ids if given is None else given
        if row is None:
            numbers = [found.number for found in self._rows if found.tokens and found.request is None]
        else:
            numbers = [row] if is_integer(row) else given_list("row", row, "the number of a row, or several in a list")  # type: ignore[list-item]
        found = [self._own(number) for number in numbers]
        if len(set(numbers)) != len(numbers):
            raise InputError(f"a row occurs twice in {numbers}")
        settings = sampling if isinstance(sampling, list | tuple) else [sampling] * len(numbers)
        each = [check_sampling(one) for one in settings]
        if len(each) != len(numbers):
            raise InputError(f"{len(each)} sampling settings for {len(numbers)} rows")
        for one in found:
            if not one.tokens:
                raise InputError(f"row {one.number}: there is nothing to continue: append the tokens of a prompt first")
            self._check_room(one, 1, "generating a token")
        if not found:
            return []
        self._ready()
        self._fill(found)
        chosen = self._choose(found, each)
        for one, token in zip(found, chosen, strict=True):
            if token < 0:
                for other in found:
                    other.marked = False
                raise WebGPUDelegateError(f"row {one.number}: {UNCHOSEN[token]}")
        for one, token in zip(found, chosen, strict=True):
            one.run = len(one.tokens)
            one.tokens.append(token)
            one.stopped = token in stops
        return chosen[0] if row is not None and is_integer(row) else chosen

    @overload
    def rewind_to(self, row: int, length: int) -> None: ...
    @overload
    def rewind_to(self, row: Sequence[int | None]) -> None: ...
    def rewind_to(self, row: int | Sequence[int | None], length: int | None = None) -> None:
        """Drop all ids of a row but the first `length`, or of each row (None: not of this one). Nothing is copied or
        written; see `Generator`.

        Raises:
            InputError: a length is negative or more than there are; no such row, or a request's; all rows are as they
                were.
        """
        lengths = self._given(row, length, "length")
        for number, kept in lengths.items():
            found = self._own(number)
            if not is_integer(kept) or not 0 <= kept <= len(found.tokens):
                raise InputError(f"row {number}: cannot rewind to {kept}: the row has {len(found.tokens)} tokens")
        for number, kept in lengths.items():
            if kept < len(self._rows[number].tokens):
                self._rows[number].rewind(kept)

    def reset(self, row: int | None = None) -> None:
        """Begin a new, empty sequence in a row, or in all rows that are no request's. Nothing is written.

        Raises:
            InputError: no such row, or a request's.
        """
        self._require_open()
        found = [self._own(row)] if row is not None else [one for one in self._rows if one.request is None]
        for one in found:
            one.clear()

    def fork(self, row: int, to_row: int, to: BatchSequences | None = None) -> None:
        """Make another row a copy of a row: its ids, what was run of them, and its random stream. Only the cache rows
        that are in use are copied, on the GPU.

        Args:
            to: whose row `to_row` is: of the same program on the same device; None: this batch's.
        Raises:
            InputError: no such row, or a request's; both are one row; `to` is of another program or device, or its rows
                are shorter; nothing was changed.
            DeviceError: the device is out of memory.
        """
        other = self if to is None else to
        if not isinstance(other, BatchSequences):
            raise InputError(f"to is {to!r}, expected a BatchGenerator, or None")
        source, target = self._own(row), other._own(to_row)
        if source is target:
            raise InputError(f"row {row} cannot be forked to itself")
        if other is not self:
            names = [(batch.method.device, batch.method.identity, batch.model_id) for batch in (self, other)]
            if names[0] != names[1]:
                raise InputError("the other batch runs another program, or on another device")
            other._check_room(None, len(source.tokens), f"a fork of {len(source.tokens):,} tokens")
        self._ready()
        other._ready()
        copied = source.run == 0 or self._copies.copy(source.number, target.number, source.run, other.method.state)
        target.take(source.content if copied else replace(source.content, run=0))

    def save_row(self, row: int, path: str | PathLike[str]) -> None:
        """Write a row to a session file (see `snapshot.py`): its ids, its random stream, and the cache rows in use.
        `load_row` of any batch of the same program goes on there, in any row.

        Raises:
            InputError: no such row, or a request's; the batch was closed; `path` is no file's name.
            UnsupportedError: safetensors is not installed.
            OSError: the file cannot be written.
        """
        found = self._own(row)
        self._ready()
        snapshots.check_target(path)
        state = snapshots.download(self.method.state, Used(found.run, self.capacity, found.number))
        snapshots.save(path, found.content, state, self.model_id, self.capacity, self.method.name)

    def load_row(self, row: int, path: str | PathLike[str]) -> None:
        """Replace a row's sequence by one from a file of `save_row`; other rows may run on.

        Raises:
            InputError: no such row, or a request's; the file is no session, truncated, damaged, of another program, or
                longer than a row may be. All rows are as they were.
            UnsupportedError, OSError: as `save_row`; the file cannot be read.
        """
        found = self._own(row)
        self._ready()
        expected = Expected(
            self.model_id, self.capacity, self.vocabulary, self.method.state.values(), True, found.number
        )
        content, arrays, used = snapshots.load(path, expected, self.method.device)
        try:
            snapshots.upload(self.method.state, used, arrays)
        except BaseException:  # the device failed half-way: nothing is known about the row's caches
            found.clear()
            raise
        found.take(content)

    def logits(self, row: int) -> Array:
        """Logits [V] of a row's last id, from which the next is chosen; the id is run for them.

        Raises:
            InputError: no such row, an empty one, or a request's.
        """
        found = self._own(row)
        if not found.tokens:
            raise InputError(f"row {row} has no tokens")
        self._ready()
        self._fill([found])
        return self._call({row: Piece(found.pending, found.run)}, 1)[row].copy()

    # -- calls

    def _fill(self, rows: Sequence[Row]) -> None:
        """Run all tokens of rows but the last of each."""
        self._settle()
        while True:
            pieces = {
                row.number: Piece(row.tokens[row.run : min(row.run + self.chunk, len(row.tokens) - 1)], row.run)
                for row in rows
                if len(row.tokens) - row.run > 1
            }
            if not pieces:
                return
            if self._loop is not None:
                self._loop.prefill(pieces, self._size(pieces))
            else:
                self._call(pieces, self._size(pieces))
            self._ran(pieces, ())

    def _choose(self, rows: Sequence[Row], each: Sequence[Sampling]) -> list[int]:
        """Run the last token of rows and choose the next; negative where that cannot be."""
        pieces = {row.number: Piece(row.pending, row.run) for row in rows}
        if self._loop is None:
            logits = self._call(pieces, 1)
            return [self._drawn(logits[row.number], row, one) for row, one in zip(rows, each, strict=True)]
        choices = {row.number: row.choice(one) for row, one in zip(rows, each, strict=True)}
        with self._loop.device.lock:  # another thread's run on the same buffers comes before or after, not between
            self._start(self._loop, pieces, 1, choices)
            self._loop.submit(1)
        found = self._loop.collect()[0].tolist()
        return [found[row.number] for row in rows]

    def _drawn(self, logits: Array, row: Row, sampling: Sampling) -> int:
        """The host's choice, or the GPU's codes for where there is none."""
        if np.isnan(logits).any():
            return NAN_LOGITS
        if logits.max() == -np.inf:
            return NO_LOGITS
        return choose(logits, sampling, row.seed, len(row.tokens), row.tokens)

    def _call(self, pieces: Mapping[int, Piece], size: int) -> dict[int, Array]:
        """Run pieces; each row's logits of its last token."""
        rows = [pieces.get(number, Piece((), 0)) for number in range(self.rows)]
        inputs = self.convention.inputs([piece.ids for piece in rows], [piece.past for piece in rows], size)
        output = self.method.execute(inputs)[0]
        return {number: self.convention.last_logits(output, number, len(piece.ids)) for number, piece in pieces.items()}

    def _ran(self, pieces: Mapping[int, Piece], decoding: Sequence[Row]) -> None:
        """Count pieces of prompts as run."""
        for number, piece in pieces.items():
            if self._rows[number] not in decoding:
                self._rows[number].run += len(piece.ids)
                self._rows[number].marked = False

    def _size(self, pieces: Mapping[int, Piece]) -> int:
        """Tokens a row of a call with these pieces: one of a few sizes, so that few plans are made."""
        wanted, size = max(len(piece.ids) for piece in pieces.values()), 1
        while size < wanted:
            size *= 4
        return min(size, self.chunk)

    def _start(self, loop: BatchLoop, pieces: Mapping[int, Piece], size: int, choices: Mapping[int, Choice]) -> None:
        """Begin steps. Where this fails, the GPU has taken no row's history."""
        loop.start(pieces, size, choices)
        for number, choice in choices.items():
            self._rows[number].marked |= choice.history is not None

    def _settle(self) -> None:
        """Take over everything that is under way. Nothing is, between calls on single rows."""

    # -- checks

    def _require_open(self) -> None:
        if self.closed:
            raise InputError("this batch was closed: make a new one")

    def _require_method(self) -> None:
        self._require_open()
        if self.method.closed:
            raise InputError(f"method {self.method.name} was closed: load it again")

    def _ready(self) -> None:
        """InputError where the sequences cannot go on."""
        self._require_method()
        state = self.method.state
        state.require_open()
        if state.user is not self._key:
            if any(row.run for row in self._rows):
                raise InputError(
                    "another generator has used this one's state since: reset all rows, or give each its own"
                )
            state.user = self._key

    def _row(self, number: int) -> Row:
        if not is_integer(number) or not 0 <= number < self.rows:
            raise InputError(f"there is no row {number!r}: expected an integer in [0, {self.rows})")
        return self._rows[number]

    def _own(self, number: Any) -> Row:
        """A row that the caller may change."""
        self._require_open()
        row = self._row(number)
        if row.request is not None:
            raise InputError(f"row {number} runs a request: wait until it is done, or cancel it")
        return row

    def _given(self, row: Any, value: Any, what: str) -> dict[int, Any]:
        """Row -> value, for one row or a list for all."""
        if is_integer(row):
            if value is None:
                raise InputError(f"row {row}: no {what} given")
            return {row: value}
        each = given_list("row", row, "the number of a row, or a list with an entry for each")
        if value is not None or len(each) != self.rows:
            raise InputError(
                f"{len(each)} entries for {self.rows} rows; give one for each row, None to leave it as it is"
            )
        return {number: one for number, one in enumerate(each) if one is not None}

    def _check_room(self, row: Row | None, count: int, what: str) -> None:
        length = 0 if row is None else len(row.tokens)
        if length + count > self.capacity:
            where = "" if row is None else f"row {row.number}: "
            raise InputError(
                f"{where}{what} after {length:,} would exceed the program's capacity of {self.capacity:,} tokens"
                f"{self.convention.note}; shorten the prompt, reset the row, or export the model with a longer context"
            )

    # -- end

    def close(self) -> None:
        """Free what this holds on the GPU, and the method if it was loaded here."""
        self.closed = True
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _load(program: Program, constants: Mapping[str, Any]) -> Method:
    """The program's method for batches."""
    names = [name for name in sorted(program.method_names - set(constants)) if len(program.metadata(name).inputs) == 3]
    if len(names) != 1:
        raise UnsupportedError(
            f"{', '.join(names) or 'none'} of the program's methods take three inputs, expected one that takes "
            "(tokens, past, q_len): load it and pass it instead"
        )
    return program.load_method(names[0])


def _free(loop: BatchLoop | None, copies: RowCopies, method: Method | None) -> None:
    if loop is not None:
        with contextlib.suppress(ReferenceError):  # the delegate went before
            if loop.delegate.companion is loop:
                loop.delegate.companion = None
            loop.close()
    copies.close()
    if method is not None:
        method.close()
