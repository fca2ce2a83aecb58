"""Texts for many sequences at once: `BatchGenerator` drives a decoder whose batch rows have lengths of their own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..decoding.arguments import check_callback, check_sampling, given_list
from ..decoding.resident import DEPTH, UNCHOSEN, Batch, Interrupted
from ..decoding.sampling import GREEDY, Sampling
from ..decoding.token_ids import token_id
from ..errors import InputError
from ..methods.method import Method
from ..methods.program import Program
from .loop import BatchLoop, Choice, Piece
from .rows import Request, Row
from .sequences import BatchSequences

__all__ = ["BatchGenerator", "Event", "Request"]

Event = tuple[Request, int]
"""A request and its next token."""


class BatchGenerator(BatchSequences):
    """B token sequences that grow together, each with a life of its own: rows join and leave at any time.

    Texts: `join` puts a request into a free row, or lets it wait for one; `step` runs all rows a bit further, `events`
    until none is left, `run` does both. Sequences: `append_tokens`, `generate_next`, `rewind_to`, `fork`, `reset`,
    `save_row`, `load_row` work on single rows, some on several at once, as the methods of `Generator` do on its
    sequence (see there for what rewinding means). Rows of requests cannot be changed until these are done, or
    cancelled.

    What a row computes does not depend on the others: greedy choice gives what the row's tokens would give alone, and
    so does drawing with the same seed, whichever row it is. Rounding may differ, because kernels are chosen by the size
    of a call. Prompts run in pieces of `chunk` tokens, in one call with the next tokens of other rows; the last token
    of a prompt runs as a decode step. While no prompt runs, steps follow one another on the GPU (see `loop.py`);
    a row that ends in between goes on until the host has seen it, at most two submits, and what ran past it is dropped.

    Args:
        source: a method (see `decoder.find_ragged`), whose state belongs to this object from now on; or a program,
            whose only such method is loaded, and freed by `close`.
        constants: the program, or the values of its constant methods by name; known where `source` is a program.
        steps_per_submit: as for `Generator`; 0: the host reads the logits of each step and chooses.
        chunk: most tokens of a prompt in one call; None: CHUNK, or as many as the program takes.
    Attributes:
        convention: sizes of the batch.
        fallback: why the host chooses each token; None where the GPU does.
    Raises:
        UnsupportedError: it is no decoder for such batches, and names its inputs.
        InputError: an argument is out of range; the method was closed.
        MissingDataError, DeviceError: as `Program.load_method`.
    """

    def __init__(
        self,
        source: Method | Program,
        constants: Program | Mapping[str, Any] | None = None,
        *,
        steps_per_submit: int | None = None,
        chunk: int | None = None,
    ) -> None:
        super().__init__(source, constants, steps_per_submit=steps_per_submit, chunk=chunk)
        self._waiting: deque[Request] = deque()
        self._found: list[Event] = []
        """Events that `step` has not returned yet."""
        self._flights: deque[list[tuple[Row, Request]]] = deque()
        """Whose tokens the submits under way compute."""
        self._ahead: deque[int] = deque()
        """Steps of each of them."""
        self._pace = Batch(steps_per_submit)

    # -- what there is

    @property
    def requests(self) -> tuple[Request, ...]:
        """Requests that run or wait."""
        return (*(row.request for row in self._rows if row.request is not None), *self._waiting)

    # -- texts

    def join(
        self,
        prompt_ids: Request | Sequence[int] = (),
        max_new_tokens: int | None = None,
        stop_ids: Collection[int] | None = None,
        sampling: Sampling = GREEDY,
        *,
        row: int | None = None,
    ) -> Request:
        """Ask for a text. It begins with the next `step` that finds a free row: one without ids and requests. The row
        is free again when the text is done.

        Args:
            prompt_ids: a request that was not used yet (then nothing else but `row`), or its arguments.
            row: continue this row's sequence, which stays afterwards; the prompt may be empty then.
        Raises:
            InputError: no prompt, an id out of range, more than fit; the row is none or has a request; the request was
                used before. Nothing was changed.
        """
        self._require_method()
        if isinstance(prompt_ids, Request):
            request = prompt_ids
            if max_new_tokens is not None or stop_ids is not None or check_sampling(sampling) != GREEDY:
                raise InputError(f"{request} has its settings already: give them where it is made")
        else:
            request = Request(prompt_ids, max_new_tokens, stop_ids, sampling)
        if request.joined:
            raise InputError(f"{request} was used before: make a new one")
        new = [token_id(place, value, self.vocabulary, row) for place, value in enumerate(request.prompt_ids)]
        found = None if row is None else self._own(row)
        if not new and (found is None or not found.tokens):
            raise InputError("there is nothing to continue: the prompt has no tokens")
        self._check_room(found, len(new), f"a prompt of {len(new):,} tokens")
        request.joined, request.prompt_ids = True, tuple(new)
        if found is None:
            self._waiting.append(request)
        else:
            self._enter(found, request, keep=True)
        return request

    def cancel(self, request: Request) -> None:
        """End a request; what it has so far stays with it. Nothing happens if it is done.

        Raises:
            InputError: it is no request, or neither done nor one of this batch.
        """
        self._require_open()
        if not isinstance(request, Request):
            raise InputError(f"expected a request, as join returns it, got {request!r}")
        found = next((row for row in self._rows if row.request is request), None)
        if request in self._waiting:
            self._waiting.remove(request)
            request.stop_reason = "stopped"
        elif found is not None:
            self._leave(found, "stopped")
        elif not request.done:
            raise InputError(f"{request} is not one of this batch's: cancel it where it joined")

    def step(self) -> list[Event]:
        """Run all requests a bit further.

        Returns:
            The new tokens, in each request's order; none if all of this went into prompts. A stop id is left out.
        Raises:
            DeviceError: the GPU failed.
        """
        self._ready()
        self._admit()
        if any(row.request is not None for row in self._rows):
            if self._loop is not None:
                self._advance(self._loop)
            else:
                self._advance_here()
        found, self._found = self._found, []
        return found

    def events(self) -> Iterator[Event]:
        """Steps until no request is left; requests may join and be cancelled meanwhile.

        Raises:
            InputError: requests wait, and every row holds a sequence of the caller's.
            DeviceError: the GPU failed.
        """
        while self.requests or self._found:
            self._require_row()
            yield from self.step()

    def run(
        self,
        requests: Iterable[Request | Sequence[int]],
        on_token: Callable[[Request, int], bool | None] | None = None,
    ) -> list[Request]:
        """Run requests, or prompts with their defaults, to their ends; others that joined before run on with them.

        Args:
            on_token: called with each new token; True ends its request with the reason `stopped`.
        Returns:
            The requests, in their order.
        Raises:
            InputError: as `join`; every row holds a sequence of the caller's. None was run then.
        """
        check_callback("on_token", on_token)
        each = given_list("requests", requests, "requests or prompts in a list")
        given = [one if isinstance(one, Request) else Request(one) for one in each]
        joined: list[Request] = []
        try:
            joined += [self.join(one) for one in given]
            self._require_row()
        except InputError:
            for one in self._waiting.copy():
                if one in given:
                    self._waiting.remove(one)
                    one.joined = False
            raise
        told: dict[Request, int] = {}
        try:
            while not all(one.done for one in joined) or self._found:
                self._require_row()
                for request, token in self.step():
                    told[request] = told.get(request, 0) + 1
                    if on_token is None or told[request] > len(request.tokens) or not on_token(request, token):
                        continue
                    self.cancel(request)
                    del request.tokens[told[request] :]  # they came with this one
                    request.stop_reason = "stopped"
        except BaseException:
            for request in joined:  # so that their rows are free for the next call
                self.cancel(request)
            raise
        return joined

    def _require_row(self) -> None:
        """InputError where requests would wait for ever."""
        if self._waiting and not self._found and all(row.request is None and row.tokens for row in self._rows):
            raise InputError(
                f"{len(self._waiting)} requests wait for a row, and all {self.rows} hold sequences: reset one, or let "
                "a request continue it (join with row=)"
            )

    # -- how requests get on

    def _admit(self) -> None:
        """Give free rows to requests that wait."""
        for row in self._rows:
            while self._waiting and row.request is None and not row.tokens:
                self._enter(row, self._waiting.popleft(), keep=False)

    def _enter(self, row: Row, request: Request, keep: bool) -> None:
        row.tokens += request.prompt_ids
        row.stopped = row.marked = False
        row.request, row.keep, request.row = request, keep, row.number
        if request.max_new_tokens == 0:
            self._leave(row, "max_new_tokens")
        elif len(row.tokens) == self.capacity:
            self._leave(row, "capacity")

    def _leave(self, row: Row, reason: str) -> None:
        """End a row's request. What the GPU computes for it from now on is dropped."""
        request = row.request
        if request is None:
            raise AssertionError("the row has no request")
        request.stop_reason, request.row, row.request = reason, None, None
        row.marked = False
        if self._loop is not None:
            self._loop.stop(row.number)
        if not row.keep:
            row.clear()

    def _advance(self, loop: BatchLoop) -> None:
        """One call with pieces of prompts, or the tokens of one submit of decode steps."""
        if any(row.request is not None and len(row.tokens) - row.run > 1 for row in self._rows):
            self._settle()
            pieces, decoding = self._pieces()
            if len(decoding) == len(pieces):
                return  # the rows with prompts are gone
            if not decoding:
                loop.prefill(pieces, self._size(pieces))
            else:
                with loop.device.lock:  # another thread's run comes before or after, not between
                    self._start(loop, pieces, self._size(pieces), self._choices(decoding))
                    self._submit(loop, decoding, 1)
            self._ran(pieces, decoding)
            self._settle()
            return
        active = self._active()
        goes_on = loop.goes_on(frozenset(row.number for row in active))
        if not goes_on:
            self._settle()
            active = self._active()
            if not active:
                return
        try:
            with loop.device.lock:
                if not goes_on:
                    self._start(loop, self._pieces()[0], 1, self._choices(active))
                    self._pace.begin()
                while loop.flying < DEPTH:
                    steps = min(self._pace.steps, max(self._left(row) for row in active) - sum(self._ahead))
                    if steps <= 0:
                        break
                    self._submit(loop, active, steps)
        except Interrupted:  # somebody used the buffers meanwhile; the next call starts anew
            self._settle()
        else:
            self._collect(loop)

    def _active(self) -> list[Row]:
        return [row for row in self._rows if row.request is not None]

    def _left(self, row: Row) -> int:
        """How many more tokens a row's request can get."""
        room = self.capacity - len(row.tokens)
        if row.request is None or row.request.max_new_tokens is None:
            return room
        return min(room, row.request.max_new_tokens - len(row.request.tokens))

    def _pieces(self) -> tuple[dict[int, Piece], list[Row]]:
        """What each request's row runs next, and the rows that get a token from it."""
        pieces: dict[int, Piece] = {}
        decoding = []
        for row in self._active():
            left = len(row.tokens) - row.run - 1
            count = min(left, self.chunk) if left else 1
            pieces[row.number] = Piece(row.tokens[row.run : row.run + count], row.run)
            if not left:
                decoding.append(row)
        return pieces, decoding

    def _choices(self, rows: Sequence[Row]) -> dict[int, Choice]:
        """How each request's row chooses."""
        return {row.number: row.choice(row.request.sampling) for row in rows if row.request is not None}

    def _submit(self, loop: BatchLoop, rows: Sequence[Row], steps: int) -> None:
        loop.submit(steps)
        self._flights.append([(row, row.request) for row in rows if row.request is not None])
        self._ahead.append(steps)

    def _collect(self, loop: BatchLoop) -> None:
        """Take over the tokens of the oldest submit, if there is one."""
        if not self._flights:
            return
        rows, steps = self._flights.popleft(), self._ahead.popleft()
        tokens = loop.collect()
        self._pace.done(steps)
        for row, request in rows:
            if row.request is request:
                self._accept(row, request, tokens[:, row.number].tolist())

    def _settle(self) -> None:
        """Take over everything that is under way."""
        while self._flights and self._loop is not None:
            self._collect(self._loop)

    def _accept(self, row: Row, request: Request, tokens: Sequence[int]) -> None:
        """New tokens of a request, up to its end."""
        stops = self.stop_ids if request.stop_ids is None else request.stop_ids
        for token in tokens:
            if token < 0:
                request.error = UNCHOSEN[token]
                self._leave(row, "error")
                return
            row.run = len(row.tokens)
            row.tokens.append(token)
            if token in stops:
                row.stopped = True
                self._leave(row, "stop_token")
                return
            request.tokens.append(token)
            self._found.append((request, token))
            if len(request.tokens) == request.max_new_tokens:
                self._leave(row, "max_new_tokens")
                return
            if len(row.tokens) == self.capacity:
                self._leave(row, "capacity")
                return

    def _advance_here(self) -> None:
        """One call; the host chooses."""
        pieces, decoding = self._pieces()
        logits = self._call(pieces, self._size(pieces))
        self._ran(pieces, decoding)
        for row in decoding:
            if row.request is not None:
                token = self._drawn(logits[row.number], row, row.request.sampling)
                self._accept(row, row.request, [token])

    # -- end

    def close(self) -> None:
        """Free what this holds on the GPU, and the method if it was loaded here; requests end as `stopped`."""
        for request in () if self.closed else self.requests:
            request.stop_reason, request.row = "stopped", None
        self._waiting.clear()
        self._flights.clear()
        self._ahead.clear()
        super().close()
