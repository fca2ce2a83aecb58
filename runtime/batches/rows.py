"""What a batch keeps of each row: its sequence, its request, and its part of the caches."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from ...backend.graph import Value
from ..decoding.arguments import check_count, check_sampling, check_stop_ids, given_ids
from ..decoding.sampling import GREEDY, Sampling
from ..decoding.snapshot import Content, Used
from ..gpu.buffers import State
from ..gpu.device import Device
from ..gpu.host import STORAGE
from ..gpu.workspace import locked
from .loop import Choice


class Request:
    """A text to generate in a batch.

    Args:
        prompt_ids: ids to begin with.
        max_new_tokens: None: until a stop id or the capacity.
        stop_ids: end the text and are not among `tokens`; None: those that the program names.
        sampling: how tokens are chosen.
    Attributes:
        prompt_ids: as given.
        tokens: the new ids so far.
        row: where it runs; None while it waits, and afterwards.
        stop_reason: `stop_token`, `max_new_tokens`, `capacity` (the row takes no more tokens), `stopped` (cancelled) or
            `error`; None until it is done.
        error: what went wrong, where that is the reason; None else.
    Raises:
        InputError: an argument is of a wrong type, or max_new_tokens negative.
    """

    def __init__(
        self,
        prompt_ids: Sequence[int],
        max_new_tokens: int | None = None,
        stop_ids: Collection[int] | None = None,
        sampling: Sampling = GREEDY,
    ) -> None:
        self.prompt_ids = tuple(given_ids("prompt_ids", prompt_ids))
        self.max_new_tokens = check_count("max_new_tokens", max_new_tokens)
        self.stop_ids = check_stop_ids(stop_ids)
        self.sampling = check_sampling(sampling)
        self.tokens: list[int] = []
        self.row: int | None = None
        self.stop_reason: str | None = None
        self.error: str | None = None
        self.joined = False

    @property
    def done(self) -> bool:
        """Whether no more tokens will come."""
        return self.stop_reason is not None

    def __repr__(self) -> str:
        where = self.stop_reason or ("waiting" if self.row is None else f"in row {self.row}")
        return f"Request({len(self.prompt_ids)} + {len(self.tokens)} tokens, {where})"


@dataclass
class Row:
    """A row of the batch.

    Attributes:
        tokens: its sequence.
        run: the first so many tokens are in the caches; less than all, so that running the rest gives logits.
        seed: of its random numbers where the sampling names none.
        stopped: the last token was chosen and is a stop id.
        marked: the GPU knows which tokens occurred.
        request: whose row it is; None: the caller's, or nobody's.
        keep: the sequence stays when the request is done.
    """

    number: int
    tokens: list[int] = field(default_factory=list)
    run: int = 0
    seed: int = field(default_factory=lambda: secrets.randbits(64))
    stopped: bool = False
    marked: bool = False
    request: Request | None = None
    keep: bool = False

    @property
    def pending(self) -> list[int]:
        """Tokens that are not in the caches; the last of them gives the logits of the next."""
        return self.tokens[self.run :]

    def rewind(self, length: int) -> None:
        """Keep the first `length` tokens."""
        del self.tokens[length:]
        self.run = min(self.run, max(length - 1, 0))
        self.stopped = self.marked = False

    def clear(self) -> None:
        """Begin a new sequence, with another seed."""
        self.rewind(0)
        self.seed = secrets.randbits(64)

    def choice(self, sampling: Sampling) -> Choice:
        """How its next token is chosen; with its history where the GPU needs it."""
        unseen = sampling.repetition_penalty != 1 and not self.marked
        return Choice(sampling, self.seed, self.tokens if unseen else None)

    @property
    def content(self) -> Content:
        """The sequence, as session files have it."""
        return Content(tuple(self.tokens), self.run, None, self.seed, self.stopped)

    def take(self, content: Content) -> None:
        """Become such a sequence, whose caches are the row's already."""
        self.tokens, self.seed, self.stopped, self.marked = list(content.tokens), content.seed, content.stopped, False
        self.run = min(content.run, max(len(self.tokens) - 1, 0))


class RowCopies:
    """Copies the used part of one row's caches to another row on the GPU. Within a state it goes through a buffer that
    is made once, since a buffer may not be copied to itself."""

    def __init__(self, device: Device, state: State, capacity: int) -> None:
        self.device = device
        self.state = state
        self.capacity = capacity
        self._between: Any = None

    @locked
    def copy(self, source: int, target: int, length: int, to: State) -> bool:
        """Copy the first `length` positions of a row to a row of `to`, a state of the same program. False where rows do
        not begin at multiples of 4 bytes: nothing was copied then."""
        values = self.state.values()
        ends = tuple(Used(length, self.capacity, row) for row in (source, target))
        if any(ends[0].block(value) * self._item(value) % 4 for value in values.values()):
            return False
        ours, theirs = self.state.buffers(), to.buffers()
        encoder = self.device.gpu.create_command_encoder(label="fork")
        for name, value in values.items():
            place = 0
            first, second = (list(end.parts(self.device)(value, ours[name].size)) for end in ends)
            for (start, size), (goal, _) in zip(first, second, strict=True):
                if to is self.state:
                    encoder.copy_buffer_to_buffer(ours[name], start, self._room(), place, size)
                    place += size
                else:
                    encoder.copy_buffer_to_buffer(ours[name], start, theirs[name], goal, size)
            for goal, size in reversed(second) if to is self.state else ():
                place -= size
                encoder.copy_buffer_to_buffer(self._room(), place, theirs[name], goal, size)
        self.device.gpu.queue.submit([encoder.finish()])
        self.device.counters.submits += 1
        return True

    def _item(self, value: Value) -> int:
        return STORAGE[self.device.limits.wgsl_type(value.dtype)].itemsize

    def _room(self) -> Any:
        """The buffer between, as large as the largest row."""
        if self._between is None:
            values = self.state.values().values()
            most = max(prod(int(str(size)) for size in value.shape[1:]) * self._item(value) for value in values)
            self._between = self.device.buffer(most, "other", "fork")
        return self._between

    def close(self) -> None:
        """Free the buffer between."""
        if self._between is not None:
            self.device.release(self._between, "other")
            self._between = None
