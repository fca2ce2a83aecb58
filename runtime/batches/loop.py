"""Batches that stay on the GPU: calls of a decoder whose rows have lengths of their own, and the choices after them.

A call gives some rows new tokens and leaves the others idle. `prefill` only runs them; `start` and `submit` choose a
token for each row that has new ones, many steps a submit, as `Resident` does for one sequence: the token becomes the
row's next input, its `past` grows, and the host reads the tokens of a submit while the next one runs.

Single steps (one token a row) change few numbers, so only words that differ from what the GPU holds are written: going
back to a shorter length costs a row 4 bytes of `past` and 4 of the token to run. Longer calls write all their inputs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...backend.graph import evaluate, free_symbols
from ..decoding.chooser import Chooser, Lengths, Logits, Placed, Target
from ..decoding.decoder import Ragged
from ..decoding.resident import DEPTH, Batch, Interrupted, Whole
from ..decoding.sampling import GREEDY, Sampling
from ..errors import DeviceError, UnsupportedError
from ..gpu import native
from ..gpu.buffers import ReadBack
from ..gpu.host import to_host
from ..gpu.plan import Plan
from ..gpu.workspace import locked
from ..methods.replay import Replay

Array = np.ndarray[Any, Any]
_GARBAGE, _VALID = -1, -2
"""What the host knows of a word that it did not write: nothing; that it is a token or a length in range."""


@dataclass(frozen=True)
class Piece:
    """New tokens of a row in one call, and how many are in its caches."""

    ids: Sequence[int]
    past: int


@dataclass(frozen=True)
class Choice:
    """How a row's tokens are chosen.

    Attributes:
        seed: used where `sampling.seed` is None.
        history: ids so far, where the GPU has not seen them yet and the penalty asks for them.
    """

    sampling: Sampling
    seed: int
    history: Sequence[int] | None = None


@dataclass
class _Step:
    """A captured call of `size` tokens a row, and the choice bound to its buffers."""

    size: int
    replay: Replay
    plan: Plan | None = None
    placed: Placed | None = None
    records: dict[int, native.Recording] = field(default_factory=dict)


@dataclass
class _Words:
    """What the buffers of single steps hold, as far as the host knows: a word for each row."""

    tokens: list[int]
    past: list[int]
    q_len: list[int]


class BatchLoop:
    """See the module's docstring. Rows that a call does not name are idle in it.

    Args:
        whole: the delegate; see `resident.find_whole`.
        steps: steps that are submitted together at most; None: `Batch.MOST`.
    Raises:
        UnsupportedError: kernels read lengths from the host, or sizes inside the program follow from them.
        InputError, DeviceError: a step cannot be captured.
    """

    def __init__(self, whole: Whole, convention: Ragged, steps: int | None) -> None:
        self.delegate = whole.delegate
        self.device = whole.delegate.device
        self.whole = whole
        self.convention = convention
        self.active: frozenset[int] = frozenset()
        """Rows that get a token with each further step."""
        self.pass_options: Callable[[], dict[str, Any]] = dict
        """Gives further options of the next submit's compute pass: timestamps, for measurements."""
        self._chooser: Chooser | None = None
        self._ring = 1 << (DEPTH * (steps or Batch.MOST) - 1).bit_length()
        self._steps: dict[int, _Step] = {}
        self._current: _Step | None = None
        self._choices = [Choice(GREEDY, 0)] * convention.rows
        self._words: _Words | None = None
        self._slots = [ReadBack(self.device) for _ in range(DEPTH)]
        self._free = list(range(DEPTH))
        self._flying: deque[tuple[int, int, int]] = deque()
        self._done = 0
        try:
            self._prepare(1)
        except BaseException:
            self.close()
            raise

    # -- captured steps

    def _inputs(self, pieces: Mapping[int, Piece], size: int) -> list[tuple[str, Any]]:
        """The delegate's inputs."""
        rows = [pieces.get(row) for row in range(self.convention.rows)]
        ids = [() if piece is None else piece.ids for piece in rows]
        past = [0 if piece is None else piece.past for piece in rows]
        return self.whole.order([to_host(array) for array in self.convention.inputs(ids, past, size)])

    @locked
    def _prepare(self, size: int) -> _Step:
        """The step of `size` tokens a row, bound to the buffers of now."""
        step = self._steps.get(size)
        if step is None:
            every = {row: Piece([0] * size, 0) for row in range(self.convention.rows)}
            step = self._steps[size] = _Step(size, Replay(self.delegate, self._inputs(every, size)))
        plan = step.replay.plan()
        if plan is step.plan:
            return step
        if plan.elements:
            raise UnsupportedError(f"sizes follow from {self.delegate.labels.named(plan.elements[0])}, which changes")
        for dim in plan.live:
            if any(symbol.op == "scalar" for symbol in free_symbols(dim)):
                raise UnsupportedError(f"kernels read {dim} from the host, which does not know it ahead")
        if step.placed is not None and self._chooser is not None:
            self._chooser.remove(step.placed)
        step.plan, step.placed = plan, None
        step.records.clear()
        step.placed = self._place(plan, size)
        return step

    def _place(self, plan: Plan, size: int) -> Placed:
        convention = self.convention
        stride = convention.vocabulary * (size if convention.every else 1)
        # A row that chooses has one new token: its logits come first, even where those of every token are given.
        logits = Logits.of(self.device, self.delegate.graph, self.whole.logits, plan.buffers, stride)
        tokens, past, q_len = self._buffers(plan)
        targets = [Target(tokens)] if size == 1 else []
        lengths = Lengths(past, q_len, convention.capacity)
        if self._chooser is None:
            vocabulary, rows = convention.vocabulary, convention.rows
            self._chooser = Chooser(
                self.device, vocabulary, rows, logits, self._ring, targets, lengths=lengths, label="batch choice"
            )
            self._chooser.start(0)
            return self._chooser.first
        return self._chooser.place(logits, targets, lengths=lengths)

    def _buffers(self, plan: Plan) -> tuple[Any, Any, Any]:
        """GPU buffers of tokens, past and q_len."""
        whole, given = self.whole, self.delegate.graph.inputs
        if whole.lengths is None:
            raise AssertionError("find_whole made sure of this")
        return tuple(plan.buffers[given[place]] for place in (whole.tokens, whole.positions, whole.lengths))

    def _write(self, step: _Step, pieces: Mapping[int, Piece]) -> Plan:
        """Check a call's numbers, then write them.

        Raises:
            InputError: a length is out of range; nothing was written.
        """
        plan = step.plan
        if plan is None:
            raise AssertionError("the step was prepared")
        inputs = self._inputs(pieces, step.size)
        env = self.delegate.bind(inputs)
        kept = self._words if self.delegate.workspace.holder is self and self._current is step else None
        self._words, self._current = None, step
        if step.size > 1:
            self.delegate.write(plan, inputs, env)
        else:
            self.delegate.check(plan, inputs, env)
            self.delegate.live.write(lambda dim: evaluate(dim, env.__getitem__))
            self._words = self._update(plan, pieces, kept)
        self.delegate.workspace.holder = self
        return plan

    def _update(self, plan: Plan, pieces: Mapping[int, Piece], kept: _Words | None) -> _Words:
        """Bring the words of a single step up to date; idle rows may keep what they have if it is in range."""
        rows = range(self.convention.rows)
        unknown = [_GARBAGE] * len(rows)
        old = kept or _Words(unknown, unknown, unknown)

        def wanted(had: Sequence[int], value: Callable[[Piece], int]) -> list[int]:
            idle = [0 if word == _GARBAGE else word for word in had]
            return [value(pieces[row]) if row in pieces else idle[row] for row in rows]

        made = _Words(
            wanted(old.tokens, lambda piece: piece.ids[0]),
            wanted(old.past, lambda piece: piece.past),
            [int(row in pieces) for row in rows],
        )
        before = (old.tokens, old.past, old.q_len)
        after = (made.tokens, made.past, made.q_len)
        for buffer, had, want in zip(self._buffers(plan), before, after, strict=True):
            for first, last in _runs([row for row in rows if had[row] != want[row]]):
                self.device.write(buffer, np.array(want[first : last + 1], np.int32), 4 * first)
        return made

    # -- calls

    @locked
    def prefill(self, pieces: Mapping[int, Piece], size: int) -> None:
        """Run rows' new tokens, at most `size` each; no token is chosen, nothing is waited for.

        Raises:
            InputError: a length is out of range, or something was closed; nothing was submitted.
        """
        self.active = frozenset()
        step = self._prepare(size)
        plan = self._write(step, pieces)
        self._encode(plan.records, 1)
        native.submit(self.device.gpu.queue, self._encoder.finish())
        self.device.counters.submits += 1
        self.device.counters.dispatches += len(plan.records)

    @locked
    def start(self, pieces: Mapping[int, Piece], size: int, choices: Mapping[int, Choice]) -> None:
        """Begin steps: each runs the rows' tokens and chooses one for each row with a choice, which has one new token.

        With `size` 1 any number of steps may follow, with more exactly one. All submits before were collected.

        Raises:
            InputError: a length is out of range, or something was closed; nothing was written.
        """
        if self._flying:
            raise DeviceError("submits are under way: collect them first")
        self.active = frozenset()
        step = self._prepare(size)
        chooser = self._chooser
        assert chooser is not None
        self._write(step, pieces)
        self._choices = [choices.get(row, old) for row, old in enumerate(self._choices)]
        chooser.configure(
            [choice.sampling for choice in self._choices],
            [choice.seed for choice in self._choices],
            [0] * len(self._choices),  # a row draws as it would alone
        )
        for row, choice in choices.items():
            if choice.history is not None:
                chooser.seen(choice.history, row)
        self.active = frozenset(choices)

    def goes_on(self, rows: frozenset[int]) -> bool:
        """Whether `submit` continues what runs, and it runs these rows."""
        step = self._current
        words = self._words
        if not rows or self.active != rows or step is None or words is None or step.plan is None:
            return False
        if rows != {row for row, count in enumerate(words.q_len) if count}:
            return False
        current = not step.plan.dropped and step.plan.generation == self.delegate.planner.generation
        return current and self.delegate.workspace.holder is self and not self.delegate.closed

    @locked
    def submit(self, steps: int) -> None:
        """Encode and submit `steps` steps, at least 1. Their tokens wait to be collected; at most DEPTH submits fly.

        Raises:
            Interrupted: another call or run came between and used the same buffers.
        """
        step, chooser = self._current, self._chooser
        if not self._free:
            raise DeviceError(f"{DEPTH} submits are under way: collect one first")
        if step is None or step.plan is None or chooser is None or self.delegate.workspace.holder is not self:
            raise Interrupted("the buffers of this run were used by another call: start it again")
        if step.replay.plan() is not step.plan:
            raise Interrupted("the buffers of this run were made anew by another call: start it again")
        if not 1 <= steps <= self._ring // DEPTH or (step.size > 1 and steps > 1):
            raise DeviceError(f"{steps} steps in one submit")
        records = self._records(step)
        self._encode(records, steps)
        slot = self._free.pop()
        target = self._slots[slot].reserve(4 * steps * self.convention.rows)
        self._copy_ring(chooser, target, steps)
        submission = native.submit(self.device.gpu.queue, self._encoder.finish())
        self._slots[slot].begin(4 * steps * self.convention.rows)
        self._flying.append((slot, submission, steps))
        self._done += steps
        if self._words is not None:
            words = self._words
            for row, count in enumerate(words.q_len):
                if count:
                    words.tokens[row] = _VALID
                    words.past[row] = min(words.past[row] + steps, self.convention.capacity)
        self.device.counters.submits += 1
        self.device.counters.dispatches += steps * len(records)

    def _records(self, step: _Step) -> native.Recording:
        """The records of a step and the choice after it."""
        if self._chooser is None or step.plan is None or step.placed is None:
            raise AssertionError("the step was prepared")
        wanted = [c.sampling if row in self.active else GREEDY for row, c in enumerate(self._choices)]
        launches = self._chooser.launches(wanted, step.placed)
        if id(launches) not in step.records:
            step.records[id(launches)] = native.Recording([*step.plan.launches, *launches])
        return step.records[id(launches)]

    def _encode(self, records: native.Recording, steps: int) -> None:
        self._encoder = self.device.gpu.create_command_encoder(label="batch")
        compute = self._encoder.begin_compute_pass(label="batch", **self.pass_options())
        for _ in range(steps):
            records.encode(compute)
        compute.end()

    def _copy_ring(self, chooser: Chooser, target: Any, steps: int) -> None:
        """Copy the tokens of the next `steps` choices out of the ring, which may end in between."""
        row = 4 * self.convention.rows
        first = self._done % self._ring
        before = min(steps, self._ring - first)
        self._encoder.copy_buffer_to_buffer(chooser.tokens, row * first, target, 0, row * before)
        if before < steps:
            self._encoder.copy_buffer_to_buffer(chooser.tokens, 0, target, row * before, row * (steps - before))

    @locked
    def stop(self, row: int) -> None:
        """Leave a row idle from the next submit on; what is under way still computes tokens for it."""
        if row not in self.active:
            return
        self.active -= {row}
        words, step = self._words, self._current
        if words is None or step is None or step.plan is None or self.delegate.workspace.holder is not self:
            return
        if step.plan.dropped or step.plan.generation != self.delegate.planner.generation:
            return
        words.q_len[row] = 0
        self.device.write(self._buffers(step.plan)[2], np.zeros(1, np.int32), 4 * row)

    @locked
    def collect(self) -> Array:
        """Wait for the oldest submit.

        Returns:
            i32 [steps, rows]: the tokens (negative: see `chooser.NAN_LOGITS`, `NO_LOGITS`, `IDLE_ROW`).
        """
        slot, submission, steps = self._flying.popleft()
        try:
            data = self._slots[slot].finish(submission, 4 * steps * self.convention.rows)
        finally:
            self._free.append(slot)
        found = np.frombuffer(data, np.int32).reshape(steps, self.convention.rows)
        if self._words is not None and not self._flying:
            for row, token in enumerate(found[-1].tolist()):
                if self._words.q_len[row]:
                    self._words.tokens[row] = max(token, 0)
        return found

    @property
    def flying(self) -> int:
        """Submits whose tokens were not collected."""
        return len(self._flying)

    def drop(self) -> None:
        """Wait for what is still running and forget its tokens."""
        while self._flying:
            self.collect()

    @locked
    def close(self) -> None:
        """Free the GPU memory of the loop."""
        self.drop()
        for slot in self._slots:
            slot.close()
        if self._chooser is not None:
            self._chooser.close()
            self._chooser = None
        self._steps.clear()
        self._current = self._words = None
        self.active = frozenset()


def _runs(rows: Sequence[int]) -> list[tuple[int, int]]:
    """(first, last) of each stretch of neighbouring rows, which rise."""
    found: list[tuple[int, int]] = []
    for row in rows:
        if found and found[-1][1] == row - 1:
            found[-1] = (found[-1][0], row)
        else:
            found.append((row, row))
    return found
