"""Decoder methods as `bench` runs them: a prompt at once, then steps, for one sequence or a batch of equal ones."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..runtime.batches.loop import BatchLoop, Choice, Piece
from ..runtime.decoding.decoder import Convention, Ragged, calls, find_convention, find_ragged
from ..runtime.decoding.resident import DEPTH, UNCHOSEN, Batch, Resident, find_whole
from ..runtime.decoding.sampling import GREEDY
from ..runtime.errors import InputError, UnsupportedError, WebGPUDelegateError
from ..runtime.gpu.host import to_host
from ..runtime.methods.delegate import KernelTime
from ..runtime.methods.method import Method
from .costs import Cost, KernelCost, by_kernel, node_cost

Array = np.ndarray[Any, Any]

TOKEN = 1
"""What prompts are made of; which token it is costs nothing."""


@dataclass(frozen=True)
class Profile:
    """A step with a timestamp around each dispatch."""

    times: list[KernelTime]
    kernels: list[KernelCost]


class Decoder:
    """A decoder method for `batch` sequences of equal length.

    Attributes:
        batch, vocabulary, capacity: sequences, logits of each, most tokens of each.
        chunk: most tokens of a sequence in one call.
        by_position: whether all state is caches with a row for each position. A step at position D then costs the same
            whatever stands in the D rows before it: they need not be computed first.
        fallback: why steps run one by one, with tokens chosen by the host; None where the GPU decodes by itself.
        steps_per_submit: most steps that the last `decode` submitted together.
    """

    def __init__(
        self,
        method: Method,
        batch: int,
        vocabulary: int,
        capacity: int,
        chunk: int,
        by_position: bool,
        fallback: str | None = None,
    ) -> None:
        self.method = method
        self.batch, self.vocabulary, self.capacity, self.chunk = batch, vocabulary, capacity, chunk
        self.by_position = by_position
        self.fallback = fallback
        self.steps_per_submit = 1

    def inputs(self, tokens: Array, position: int) -> list[Array]:
        """The method's arguments for tokens [batch, S] of which the first ones stand at `position`."""
        raise NotImplementedError(f"{type(self).__name__} is abstract here: each kind of decoder has its own")

    def run(self, tokens: Array, position: int) -> Array:
        """Run tokens [batch, S] and return the next ones [batch, 1], the likeliest."""
        logits = np.asarray(self.method.execute(self.inputs(tokens, position))[0])
        last = logits if logits.ndim == 2 else logits[:, -1]
        found: Array = last.argmax(-1).astype(np.int64).reshape(self.batch, 1)
        return found

    def prefill(self, count: int) -> Array:
        """Run `count` tokens from the beginning in as few calls as the program allows; the next tokens."""
        if not self.by_position:
            self.method.reset()
        following = np.full((self.batch, 1), TOKEN)
        for begin in range(0, count, self.chunk):
            size = min(self.chunk, count - begin)
            following = self.run(np.full((self.batch, size), TOKEN), begin)
        return following

    def approach(self, depth: int) -> None:
        """Make the state one with `depth` tokens: nothing to do for caches by position, else they are run."""
        if not self.by_position:
            self.prefill(depth) if depth else self.method.reset()

    def decode(self, depth: int, steps: int) -> int:
        """Run `steps` steps from position `depth` on, each with the token that the one before chose; tokens read."""
        token = np.full((self.batch, 1), TOKEN)
        for step in range(steps):
            token = self.run(token, depth + step)
        return steps * self.batch

    def profile(self, rows: int, position: int) -> Profile:
        """Time each dispatch of a call of `rows` tokens at a position. Raises DeviceError without timestamps."""
        arrays = self.inputs(np.full((self.batch, rows), TOKEN), position)
        if self.by_position:
            self.method.profile(arrays)  # waits for a GPU that has gone to sleep, and compiles
        else:
            self.approach(position)
        _, times = self.method.profile(arrays)
        return Profile(times, by_kernel(times, self._costs(arrays, position + rows)))

    def _costs(self, arrays: Sequence[Array], keys: int) -> list[tuple[Cost, int]] | None:
        """The cost of each node, with the number of its dispatches, where the method is one delegate."""
        found = calls(self.method)
        if len(found) != 1 or None in found[0][1]:
            return None
        delegate, given, _ = found[0]
        env = delegate.bind([to_host(arrays[place]) for place in given if place is not None])
        free = env.__getitem__
        lowered = delegate.planner.lowered(free)
        limits = delegate.device.limits
        return [
            (node_cost(delegate.graph, node, limits, free, keys), len(made.dispatches))
            for node, made in zip(delegate.graph.nodes, lowered, strict=True)
        ]


class Loop(Protocol):
    """Decoding on the GPU: `Resident` and `BatchLoop`, once they were started."""

    @property
    def flying(self) -> int: ...

    def submit(self, steps: int) -> None: ...

    def collect(self) -> Any: ...

    def drop(self) -> None: ...


class _Ahead(Decoder):
    """Decodes on the GPU where it has a loop; `_start` begins it at a position."""

    _loop: Loop | None = None
    _together: int = 1
    """Steps to submit together, as the runs before found them."""

    def _start(self, depth: int) -> None:
        raise NotImplementedError(f"{type(self).__name__} is abstract here: each kind of decoder has its own")

    def decode(self, depth: int, steps: int) -> int:
        loop, sent, read = self._loop, 0, 0
        if loop is None:
            return super().decode(depth, steps)
        sizes = Batch(None)
        sizes.steps, self.steps_per_submit = self._together, 1
        self._start(depth)
        try:
            while read < steps:
                while sent < steps and loop.flying < DEPTH:
                    together = min(sizes.steps, steps - sent)
                    loop.submit(together)
                    sent += together
                    self.steps_per_submit = max(self.steps_per_submit, together)
                tokens = np.asarray(loop.collect())
                sizes.done(len(tokens))
                read += len(tokens)
                if tokens.min() < 0:
                    raise WebGPUDelegateError(UNCHOSEN[int(tokens.min())])
        finally:
            loop.drop()
        self._together = sizes.steps
        return read * self.batch


class SingleDecoder(_Ahead):
    """One sequence, by the calling convention that `Generator` finds."""

    def __init__(self, method: Method, convention: Convention) -> None:
        if convention.capacity is None:
            raise UnsupportedError(f"method {method.name} does not say how many tokens a sequence may have")
        super().__init__(
            method, 1, convention.vocabulary, convention.capacity, convention.chunk, convention.rewindable, None
        )
        self.convention = convention
        try:
            self._loop = Resident.of(find_whole(method, convention), convention, self.capacity)
        except UnsupportedError as error:
            self.fallback = str(error)

    def inputs(self, tokens: Array, position: int) -> list[Array]:
        return self.convention.inputs([int(token) for token in tokens[0]], position)

    def _start(self, depth: int) -> None:
        assert isinstance(self._loop, Resident)
        self._loop.start(TOKEN, depth, GREEDY, 0, ())


class BatchDecoder(_Ahead):
    """A batch of sequences, by the calling convention that `BatchGenerator` finds."""

    def __init__(self, method: Method, convention: Ragged) -> None:
        super().__init__(
            method, convention.rows, convention.vocabulary, convention.capacity, convention.chunk, True, None
        )
        self.convention = convention
        try:
            whole = find_whole(method, convention)
            self._loop = whole.delegate.companion = BatchLoop(whole, convention, None)
        except UnsupportedError as error:
            self.fallback = str(error)

    def inputs(self, tokens: Array, position: int) -> list[Array]:
        return self.convention.inputs(tokens.tolist(), [position] * self.batch, tokens.shape[1])

    def _start(self, depth: int) -> None:
        assert isinstance(self._loop, BatchLoop)
        pieces = {row: Piece([TOKEN], depth) for row in range(self.batch)}
        self._loop.start(pieces, 1, {row: Choice(GREEDY, 0) for row in pieces})


def find_decoder(method: Method, constants: Mapping[str, Any], batch: int | None) -> Decoder:
    """The decoder that a method is.

    Args:
        batch: sequences wanted; None: as many as the program takes.
    Raises:
        UnsupportedError: it is none; says what its inputs are.
        InputError: it takes another number of sequences.
    """
    found: Decoder
    several = len(method.metadata.inputs) == 3 and _rows(method) != 1
    if several:
        found = BatchDecoder(method, find_ragged(method, constants))
    else:
        found = SingleDecoder(method, find_convention(method, constants))
    if batch is not None and batch != found.batch:
        raise InputError(
            f"method {method.name} takes {found.batch} sequence{'s' if found.batch > 1 else ''} a call, not {batch}: "
            "the batch is chosen when a program is exported"
        )
    return found


def _rows(method: Method) -> int:
    """The size of the first input's first axis; 1 where it has none."""
    tokens = method.metadata.inputs[0]
    return tokens.sizes[0] if tokens is not None and tokens.sizes else 1


def seconds(call: Any, *arguments: Any) -> float:
    """Wall time of a call."""
    began = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - began
