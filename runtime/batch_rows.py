"""What a batch keeps of each row: its sequence, its request, and its part of the caches."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..backend.graph import Value
from .buffers import State
from .device import Device
from .errors import InputError
from .host import STORAGE
from .sampling import GREEDY, Sampling


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
        InputError: max_new_tokens is negative.
    """

    def __init__(
        self,
        prompt_ids: Sequence[int],
        max_new_tokens: int | None = None,
        stop_ids: Collection[int] | None = None,
        sampling: Sampling = GREEDY,
    ) -> None:
        if max_new_tokens is not None and max_new_tokens < 0:
            raise InputError(f"max_new_tokens is {max_new_tokens}, expected at least 0")
        self.prompt_ids = tuple(prompt_ids)
        self.max_new_tokens = max_new_tokens
        self.stop_ids = None if stop_ids is None else frozenset(stop_ids)
        self.sampling = sampling
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


class RowCopies:
    """Copies the used part of one row's caches to another row, on the GPU, through a buffer that is made once.

    A buffer may not be copied to itself, hence the detour.
    """

    def __init__(self, device: Device, state: State, rows: int, capacity: int) -> None:
        self.device = device
        self.state = state
        self.rows = rows
        self.capacity = capacity
        self._between: Any = None

    def copy(self, source: int, target: int, length: int) -> bool:
        """Copy the first `length` positions of a row. False where rows do not begin at multiples of 4 bytes: nothing
        was copied then."""
        buffers, values = self.state.buffers(), self.state.values()
        if not all(self._aligned(value) for value in values.values()):
            return False
        encoder = self.device.gpu.create_command_encoder(label="fork")
        between = self._room(max((self._block(value)[1] for value in values.values()), default=0))
        for name, value in values.items():
            for way in (0, 1):
                place = 0
                for start, size in self._pieces(value, (source, target)[way], length):
                    if way == 0:
                        encoder.copy_buffer_to_buffer(buffers[name], start, between, place, size)
                    else:
                        encoder.copy_buffer_to_buffer(between, place, buffers[name], start, size)
                    place += size
        self.device.gpu.queue.submit([encoder.finish()])
        self.device.counters.submits += 1
        return True

    def _room(self, size: int) -> Any:
        if self._between is None:
            self._between = self.device.buffer(size, "other", "fork")
        return self._between

    def _block(self, value: Value) -> tuple[int, int]:
        """(pieces of a row, bytes of a row): the positions stand together in each piece."""
        shape = [int(size) for size in value.shape]  # type: ignore[arg-type]
        item = STORAGE[self.device.limits.wgsl_type(value.dtype)].itemsize
        pieces = 1 if shape[1] >= self.capacity else shape[1]
        return pieces, int(np.prod(shape[1:], dtype=np.int64)) * item

    def _aligned(self, value: Value) -> bool:
        pieces, size = self._block(value)
        return size // pieces % 4 == 0

    def _pieces(self, value: Value, row: int, length: int) -> Iterator[tuple[int, int]]:
        """(first byte, bytes) of each used piece of a row, multiples of 4."""
        pieces, size = self._block(value)
        each = size // pieces
        positions, other = (int(size) for size in value.shape[1:3][:: 1 if pieces == 1 else -1])  # type: ignore[arg-type]
        if pieces == 1 and other >= self.capacity:  # which axis is that of positions cannot be told: all of them
            length = positions
        used = -(-each // positions * length // 4) * 4
        for number in range(pieces):
            if used:
                yield row * size + number * each, min(used, each)

    def close(self) -> None:
        """Free the buffer between."""
        if self._between is not None:
            self.device.release(self._between, "other")
            self._between = None
