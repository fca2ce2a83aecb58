"""Decoding that stays on the GPU: steps follow one another without the host, which reads the tokens afterwards.

Each step of a submit is the captured step of the decoder (`replay.py`) and then the choice of a token (`chooser.py`),
whose last kernel writes the token into the step's input and moves positions and live scalars on. While one submit
runs, the host encodes the next. Tokens that were computed past the end of a text are never used: the caches keep rows
by position, so that going back is only counting.
"""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from ...backend.graph import Dim, Ref, Sym
from ..errors import DeviceError, InputError, UnsupportedError
from ..gpu import native
from ..gpu.buffers import ReadBack
from ..gpu.host import to_host
from ..gpu.plan import Plan
from ..gpu.workspace import locked
from ..methods.delegate import Delegate
from ..methods.method import Method
from ..methods.replay import Replay
from .chooser import NAN_LOGITS, NO_LOGITS, Advance, Chooser, Logits, Target
from .decoder import Convention, Ragged, calls
from .sampling import Sampling

DEPTH = 2
"""Submits in flight: one that the GPU runs, and one that waits behind it."""


class Interrupted(DeviceError):
    """Another run used the step's buffers meanwhile: collect what is under way, then start again."""


UNCHOSEN = {
    NAN_LOGITS: "logits are NaN: no token can be chosen. The weights or the computation overflowed; try the program in "
    "float32",
    NO_LOGITS: "all logits are minus infinity: no token can be chosen",
}
"""What to tell the user where the GPU chose no token."""


@dataclass(frozen=True)
class Whole:
    """A method that is one delegate: which of the delegate's inputs are tokens and positions, which output logits.

    For rows with lengths of their own the positions are `past`, and `lengths` is the input `q_len`.
    """

    delegate: Delegate
    tokens: int
    positions: int
    logits: int
    lengths: int | None = None

    def lent(self) -> Whole:
        """For what the delegate keeps as its companion: that holds it weakly, so both go with the last other holder."""
        return replace(self, delegate=cast(Delegate, weakref.proxy(self.delegate)))

    def order(self, given: Sequence[Any]) -> list[Any]:
        """The method's inputs in the delegate's order."""
        places = {self.tokens: 0, self.positions: 1, self.lengths: 2}
        return [given[places[number]] for number in range(len(given))]


def find_whole(method: Method, convention: Convention | Ragged) -> Whole:
    """How to decode a method on the GPU alone.

    Raises:
        UnsupportedError: it cannot be; says why.
    """
    outside = method.outside()
    if outside:
        raise UnsupportedError(f"{', '.join(sorted(set(outside)))} run outside the delegate")
    found = calls(method)
    if len(found) != 1:
        raise UnsupportedError(f"the method is {len(found)} delegates, not one")
    if isinstance(convention, Convention) and not convention.rewindable:
        raise UnsupportedError("the method's state cannot go back, so no step may run ahead")
    delegate, given, results = found[0]
    ragged = isinstance(convention, Ragged) or convention.ragged is not None
    if sorted(place for place in given if place is not None) != list(range(3 if ragged else 2)):
        raise UnsupportedError("the delegate does not take the tokens and their positions as they are given")
    output = method.plan.outputs[0]
    if output not in results or not isinstance(delegate.graph.outputs[results.index(output)], Ref):
        raise UnsupportedError("the logits do not come from the delegate")
    lengths = given.index(2) if ragged else None
    return Whole(delegate, given.index(0), given.index(1), results.index(output), lengths)


def growth(dim: Dim, positions: int) -> int | None:
    """By how much an expression grows when every element of input `positions` grows by one; None if unevenly."""
    if not isinstance(dim, Sym) or dim.op == "input_dim":
        return 0
    if dim.op == "scalar":
        return 1 if dim.args[0] == positions else None
    each = [growth(arg, positions) for arg in dim.args]
    if None in each:
        return None
    deltas = [delta for delta in each if delta is not None]
    if not any(deltas):
        return 0
    if dim.op in ("add", "sub"):
        return deltas[0] + (deltas[1] if dim.op == "add" else -deltas[1])
    if dim.op == "mul":
        for factor, delta in ((dim.args[0], deltas[1]), (dim.args[1], deltas[0])):
            if isinstance(factor, int):
                return factor * delta
    return None


class Resident:
    """Runs a decoder for one sequence, many steps a submit.

    Args:
        whole, convention: see `find_whole`.
        capacity: most tokens of a sequence.
    Raises:
        UnsupportedError: live scalars do not grow evenly with the position, or sizes inside the program follow from it;
            says which.
        InputError, DeviceError: the step cannot be captured.
    """

    @classmethod
    def of(cls, whole: Whole, convention: Convention, capacity: int) -> Resident:
        """The one that was made before for the same delegate, or a new one."""
        with whole.delegate.device.lock:
            found = whole.delegate.companion
            known = (whole, convention, capacity)
            if isinstance(found, cls) and (found.whole, found.convention, found.capacity) == known:
                return found
            if found is not None:
                found.close()
            whole.delegate.companion = None
            made = cls(whole.lent(), convention, capacity)
            whole.delegate.companion = made
            return made

    def __init__(self, whole: Whole, convention: Convention, capacity: int) -> None:
        self.delegate = whole.delegate
        self.device = whole.delegate.device
        self.whole = whole
        self.convention = convention
        self.capacity = capacity
        self._replay = Replay(self.delegate, self._inputs(0, 0))
        self._bound: Plan | None = None
        self._chooser: Chooser | None = None
        self._records: dict[int, native.Recording] = {}
        self._sampling: tuple[Sampling, int] = (Sampling(), 0)
        self._slots = [ReadBack(self.device) for _ in range(DEPTH)]
        self._free = list(range(DEPTH))
        self._flying: deque[tuple[int, int, int]] = deque()
        self._position = 0
        self._done = 0
        self._passed = -1
        """The last position that a step of the bound plan may have, as far as it was tried."""
        self.pass_options: Callable[[], dict[str, Any]] = dict
        """Gives further options of the next submit's compute pass: timestamps, for measurements."""
        self.owner: object = None
        """Whose run it is; whoever starts one says so."""
        self._prepare()

    def _inputs(self, token: int, position: int) -> list[tuple[str, Any]]:
        """The delegate's inputs for one token."""
        return self.whole.order([to_host(array) for array in self.convention.inputs([token], position)])

    # -- what a plan is bound to

    @locked
    def _prepare(self) -> Plan:
        """The step's plan; a chooser bound to its buffers."""
        plan = self._replay.plan()
        if plan is self._bound and self.delegate.workspace.keeps(self._chooser):
            return plan
        if plan.elements:
            raise UnsupportedError(f"sizes follow from {self.delegate.labels.named(plan.elements[0])}, which changes")
        graph = self.delegate.graph
        vocabulary = self.convention.vocabulary
        token_buffer = plan.buffers[graph.inputs[self.whole.tokens]]
        position_buffer = plan.buffers[graph.inputs[self.whole.positions]]
        logits = Logits.of(self.device, graph, self.whole.logits, plan.buffers, vocabulary)
        advances = [Advance(position_buffer, 0, 1), *self._advances(plan)]
        self._chooser = self.delegate.workspace.keep(
            "steps",
            (logits, token_buffer, *advances, self.capacity),
            lambda: Chooser(self.device, vocabulary, 1, logits, self.capacity, [Target(token_buffer)], advances),
        )
        self._records.clear()
        self._passed = -1
        self._bound = plan
        return plan

    def _advances(self, plan: Plan) -> list[Advance]:
        """How live scalars grow from one position to the next.

        Raises:
            UnsupportedError: one does not grow by the same number at every position.
        """
        found = []
        for dim, word in self.delegate.live.places():
            delta = growth(dim, self.whole.positions) if dim in plan.live else 0
            if delta is None:
                raise UnsupportedError(f"the live scalar {dim} does not grow evenly with the position")
            if delta:
                found.append(Advance(self.delegate.live.buffer, word, delta))
        return found

    # -- a run

    @locked
    def start(self, token: int, position: int, sampling: Sampling, seed: int, history: Sequence[int]) -> None:
        """Begin: `token` stands at `position` and is what the first step runs.

        Args:
            seed: used where `sampling.seed` is None.
            history: ids so far, for the repetition penalty.
        Raises:
            InputError: the position is out of range; nothing was written.
        """
        self.drop()
        plan = self._prepare()
        inputs = self._inputs(token, position)
        env = self.delegate.bind(inputs)
        self.delegate.write(plan, inputs, env)
        chooser = self._chooser
        assert chooser is not None
        chooser.configure(sampling, seed)
        chooser.start(position + 1)
        if sampling.repetition_penalty != 1:
            chooser.seen(history)
        self._sampling = (sampling, seed)
        self._position, self._done = position, 0
        self.delegate.workspace.holder = self

    @locked
    def submit(self, steps: int) -> None:
        """Encode and submit `steps` steps, at least 1. Their tokens wait to be collected; at most DEPTH submits fly.

        Raises:
            InputError: a position would be out of range, or the delegate was closed; nothing was submitted.
            Interrupted: another call or run came between and used the same buffers.
        """
        if not self._free:
            raise DeviceError(f"{DEPTH} submits are under way: collect one first")
        plan = self._replay.plan()
        workspace = self.delegate.workspace
        chooser = self._chooser
        if plan is not self._bound or chooser is None or not workspace.keeps(chooser) or workspace.holder is not self:
            raise Interrupted("the buffers of this run were used by another call: start it again")
        self._require(plan, self._position + steps - 1)
        records = self._step_records(plan)
        gpu = self.device.gpu
        encoder = gpu.create_command_encoder(label="steps")
        compute = encoder.begin_compute_pass(label="steps", **self.pass_options())
        for _ in range(steps):
            records.encode(compute)
        compute.end()
        slot = self._free.pop()
        target = self._slots[slot].reserve(4 * max(steps, Batch.MOST))  # once, however the pace changes
        encoder.copy_buffer_to_buffer(chooser.tokens, 4 * self._done, target, 0, 4 * steps)
        submission = native.submit(gpu.queue, encoder.finish())
        self._slots[slot].begin(4 * steps)
        self._flying.append((slot, submission, steps))
        self._done += steps
        self._position += steps
        self.delegate.live.forget()  # kernels have moved it on
        self.device.counters.submits += 1
        self.device.counters.dispatches += steps * len(records)

    def _require(self, plan: Plan, last: int) -> None:
        """InputError unless steps up to position `last` can run; the first one's position was checked by `start`, and
        positions between are between. Usually all up to the capacity can, which is found out once for a plan."""
        if last <= self._passed:
            return
        for position in (max(last, self.capacity - 1), last):
            inputs = self._inputs(0, position)
            try:
                self.delegate.check(plan, inputs, self.delegate.bind(inputs))
            except InputError:
                if position == last:
                    raise
            else:
                self._passed = position
                return

    def _step_records(self, plan: Plan) -> native.Recording:
        """The records of a step and the choice after it."""
        if self._chooser is None:
            raise AssertionError("nothing was prepared")
        launches = self._chooser.launches(self._sampling[0])
        if id(launches) not in self._records:
            self._records[id(launches)] = native.Recording([*plan.launches, *launches])
        return self._records[id(launches)]

    @locked
    def collect(self) -> list[int]:
        """Wait for the oldest submit; the tokens that it chose (negative: see `chooser.NAN_LOGITS`, `NO_LOGITS`)."""
        slot, submission, steps = self._flying.popleft()
        try:
            data = self._slots[slot].finish(submission, 4 * steps)
        finally:
            self._free.append(slot)
        tokens: list[int] = np.frombuffer(data, np.int32).tolist()
        return tokens

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
        """Free the GPU memory of the run (what it shares with others stays)."""
        self.drop()
        for slot in self._slots:
            slot.close()
        self._records.clear()
        self._chooser = None
        self._bound = None


class Batch:
    """How many steps to submit together: a fixed number, or as many as take about TARGET seconds."""

    TARGET, MOST = 0.02, 32

    def __init__(self, fixed: int | None) -> None:
        self.fixed = fixed
        self.steps = fixed or 1
        self._last = time.perf_counter()

    def begin(self) -> None:
        """Steps begin now, at the pace of those before."""
        self._last = time.perf_counter()

    def done(self, steps: int) -> None:
        """`steps` steps were collected: measure, and take more or fewer together from now on."""
        now = time.perf_counter()
        each, self._last = (now - self._last) / max(steps, 1), now
        if self.fixed is None:
            wanted = int(self.TARGET / max(each, 1e-9))
            self.steps = max(1, min(self.MOST, 2 * self.steps, wanted))
