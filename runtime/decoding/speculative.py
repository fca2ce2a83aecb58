"""Speculative decoding: cheap guesses of the next tokens, which the program verifies in one call.

A drafter proposes K tokens. The program runs the last token and the K behind it together, which costs hardly more than
one token where reading the weights is what takes the time. From the logits of each place the token is chosen that would
have been chosen there anyway; as long as it is the drafted one, the next place's logits are right as well. So a call
gives all drafted tokens that agree and one more, and what was run past them is rewound, which costs nothing.

Greedy or drawn, the tokens are those of decoding without drafts: random numbers depend on the seed and the place alone
(`sampling.py`), so no scheme of acceptance and rejection is needed. As everywhere, a call with several tokens rounds
differently than several calls with one, which can decide between two tokens of practically equal logits.

Where choosing needs neither random numbers nor penalties, it happens on the GPU and only K + 1 tokens are read back.
Otherwise logits f32[K + 1, V] are read, and the host chooses.

Where drafts do not pay, they become rare (`pace.py`). That is found by measuring, so which tokens are run together
differs between runs; a drafter's `adaptive=False` makes the same calls in every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..errors import InputError, UnsupportedError, WebGPUDelegateError
from ..gpu import native
from ..gpu.host import to_host
from ..gpu.plan import Plan
from ..gpu.workspace import locked
from ..methods.delegate import Delegate
from ..methods.replay import Replay
from .arguments import check_positive, given_list
from .chooser import Chooser, Logits
from .decoder import Convention
from .pace import Pace, Reach
from .resident import UNCHOSEN, Whole, find_whole
from .sampling import GREEDY, Sampling, choose
from .token_ids import is_integer

if TYPE_CHECKING:
    from .parts import Part
    from .session import Session


@dataclass(frozen=True)
class Speculation:
    """What drafts were worth.

    Attributes:
        drafted: tokens that were proposed and run.
        accepted: those of them that were chosen.
        calls: calls that verified a draft.
    """

    drafted: int = 0
    accepted: int = 0
    calls: int = 0

    @property
    def tokens_per_call(self) -> float:
        """Accepted tokens and the one after them; 0 without a call."""
        return (self.accepted + self.calls) / self.calls if self.calls else 0.0


class Proposals(Protocol):
    """A drafter at work on one sequence."""

    def draft(self, tokens: Sequence[int], count: int) -> Sequence[int]:
        """At most `count` ids that may follow `tokens`; none where nothing speaks for any."""


class Drafter(Protocol):
    """Proposes tokens: `NGram` and `DraftModel` of `drafters.py`, or what has the same methods.

    An attribute `adaptive` that is false makes it be asked as often where drafts take more time than they save.
    """

    @property
    def most(self) -> int:
        """The most tokens that are proposed at a time."""

    def begin(self, target: Session, sampling: Sampling, seed: int) -> Proposals:
        """Start to work for a sequence, before anything runs. Raises InputError or UnsupportedError where it cannot."""


def find_part(session: Session) -> Part:
    """The method that can verify drafts.

    Raises:
        UnsupportedError: there is none; says how to export one.
    """
    if not session.rewindable:
        raise UnsupportedError("drafts cannot be verified: the program's state cannot go back behind wrong ones")
    parts = [session._step, session._first]
    wide = [part for part in parts if part.convention.chunk > 1 and part.least == 1]
    if not wide:
        raise UnsupportedError(
            f"drafts cannot be verified: method {session.method.name} takes one token a call; export the program with "
            "a dynamic number of tokens, or with a second method that has one"
        )
    found = next((part for part in wide if part.every), None)
    if found is None:
        raise UnsupportedError(
            f"drafts cannot be verified: method {wide[0].method.name} gives the logits of the last token only, "
            f"{list(wide[0].method.metadata.output_tensor_meta(0).sizes)}; export it with those of every token "
            "[1, S, V] (ExecuTorch's Llama export: debug.generate_full_logits=True; Hugging Face exports have them)"
        )
    return found


class Speculator:
    """Drafts and verifies for one run of a sequence.

    Args:
        session: the sequence.
        alone: whether steps can run on the GPU alone, so that it is worth while to go on without drafts for a while.
    Raises:
        UnsupportedError: the program cannot verify drafts; see `find_part`.
        InputError: the drafter does not fit.
    """

    def __init__(self, session: Session, drafter: Drafter, sampling: Sampling, alone: bool) -> None:
        if isinstance(drafter, type) or not hasattr(drafter, "begin"):
            raise InputError(f"speculate is {drafter!r}, expected a drafter: NGram(), DraftModel(generator)")
        self.session = session
        self.part = find_part(session)
        self.sampling = sampling
        adaptive = getattr(drafter, "adaptive", True)
        if session._pace is None or session._pace[0] != (drafter, alone):
            session._pace = (drafter, alone), Pace(alone, adaptive)
        self.pace = session._pace[1]
        most = check_positive("most of the drafter", getattr(drafter, "most", None))
        self._reach = Reach(min(most, self.part.convention.chunk - 1), adaptive)
        self._proposals = drafter.begin(session, sampling, session._seed)
        self._drafted = self._accepted = self._calls = 0
        self._verifier: Verifier | None = None
        if alone and sampling.greedy and sampling.repetition_penalty == 1:
            self._verifier = Verifier.of_part(self.part)

    @property
    def statistics(self) -> Speculation:
        return Speculation(self._drafted, self._accepted, self._calls)

    def draft(self, most: int) -> Sequence[int]:
        """At most `most` proposed ids; none where nothing speaks for any. InputError for ids that are none."""
        count = min(most, self._reach.tokens)
        if count < 1:
            return []
        limit = self.part.convention.vocabulary
        given = given_list(
            "the drafter's proposal", self._proposals.draft(self.session._tokens, count), "ids in a list"
        )
        found: list[int] = []
        for token in given[:count]:
            if not is_integer(token) or not 0 <= token < limit:
                raise InputError(f"the drafter proposes {token!r}, expected ids in [0, {limit:,})")
            found.append(int(token))
        return found

    def verify(self, draft: Sequence[int]) -> list[int]:
        """Run the last token and `draft`; the ids that follow it: those drafted that agree, and one more."""
        session = self.session
        tokens, position = session._tokens, len(session._tokens) - 1
        ids = [tokens[-1], *draft]
        if self._verifier is not None:
            chosen = self._verifier.choose(ids, position)
            agreeing = next((i for i, (a, b) in enumerate(zip(chosen, draft, strict=False)) if a != b), len(draft))
            chosen = chosen[: agreeing + 1]
            for token in chosen:
                if token < 0:
                    raise WebGPUDelegateError(UNCHOSEN[token])
        else:
            chosen = self._choose(ids, position)
        accepted = len(chosen) - 1
        self._drafted += len(draft)
        self._accepted += accepted
        self._calls += 1
        if accepted:
            self.pace.right()
        self._reach.judge(len(draft), accepted)
        return chosen

    def _choose(self, ids: Sequence[int], position: int) -> list[int]:
        """As many ids as agree with those after them, and one more, chosen on the host."""
        part, session = self.part, self.session
        rows = np.asarray(part.method.execute(part.convention.inputs(ids, position))[0])
        history, chosen = list(session._tokens), []
        for place, row in enumerate(rows.reshape(len(ids), -1)):
            token = choose(row, self.sampling, session._seed, len(history), history)
            chosen.append(token)
            history.append(token)
            if place + 1 == len(ids) or ids[place + 1] != token:
                break
        return chosen


class Verifier:
    """Runs several tokens and chooses the most likely one after each, on the GPU.

    Args:
        whole, convention: see `resident.find_whole`.
    """

    @classmethod
    def of_part(cls, part: Part) -> Verifier:
        """For a method of a sequence. Raises UnsupportedError where it is not one delegate."""
        return cls(find_whole(part.method, part.convention), part.convention)

    def __init__(self, whole: Whole, convention: Convention) -> None:
        self.delegate: Delegate = whole.delegate
        self.device = whole.delegate.device
        self.whole = whole
        self.convention = convention
        self._replays: dict[int, Replay] = {}
        self._records: dict[int, tuple[Plan, Chooser, native.Recording]] = {}

    @locked
    def choose(self, ids: Sequence[int], position: int) -> list[int]:
        """The most likely id after each of `ids`, which stand at `position` and after; negative where there is none
        (see `resident.UNCHOSEN`).

        Raises:
            InputError: the position is out of range, something was closed; nothing was submitted.
            DeviceError: the device failed.
        """
        count = len(ids)
        inputs = self._inputs(ids, position)
        replay = self._replays.get(count)
        if replay is None:
            replay = self._replays[count] = Replay(self.delegate, inputs)
        plan, env = replay.prepare(inputs)
        chooser, records = self._bound(count, plan)
        self.delegate.write(plan, inputs, env)
        chooser.start(position + 1)
        gpu, size = self.device.gpu, -(-count * 4 // 8) * 8
        encoder = gpu.create_command_encoder(label="verify")
        compute = encoder.begin_compute_pass(label="verify")
        records.encode(compute)
        compute.end()
        target = self.delegate.read_back.reserve(size)
        encoder.copy_buffer_to_buffer(chooser.tokens, 0, target, 0, 4 * count)
        submission = native.submit(gpu.queue, encoder.finish())
        self.device.counters.submits += 1
        self.device.counters.dispatches += len(records)
        data = self.delegate.read_back.read(submission, size)
        chosen: list[int] = np.frombuffer(data, np.int32, count).tolist()
        return chosen

    def _inputs(self, ids: Sequence[int], position: int) -> list[tuple[str, Any]]:
        return self.whole.order([to_host(array) for array in self.convention.inputs(ids, position)])

    def _bound(self, count: int, plan: Plan) -> tuple[Chooser, native.Recording]:
        """The chooser for a plan's logits, and the records of the step and the choice."""
        known = self._records.get(count)
        if known is not None and known[0] is plan and self.delegate.workspace.keeps(known[1]):
            return known[1], known[2]
        vocabulary = self.convention.vocabulary
        logits = Logits.of(self.device, self.delegate.graph, self.whole.logits, plan.buffers, vocabulary)
        chooser = self.delegate.workspace.keep(
            ("verify", count), logits, lambda: Chooser(self.device, vocabulary, count, logits, 1, label="verify")
        )
        records = native.Recording([*plan.launches, *chooser.launches(GREEDY)])
        self._records[count] = (plan, chooser, records)
        return chooser, records
