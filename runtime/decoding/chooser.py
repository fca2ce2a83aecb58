"""Choosing tokens on the GPU: a step's logits become the next step's input without a word from the host.

The choice is that of `sampling.choose`: penalty, temperature, top-k, top-p, min-p, and the same random number. How:

1. `choose_argmax`: every score, rounded to the dtype of the program's logits, as a key of 32 bits that orders like it;
   the largest of each chunk of 1,024 tokens.
2. `choose_level`, for top-k and top-p: the key of the last token kept, by radix selection, three levels each.
3. `choose_sums`: the mass of the kept tokens of each chunk.
4. `choose_draw`: random number, chunk, token; or `choose_greedy` after 1: the largest of all. This one writes the
   token wherever it is needed and moves positions on.

That makes 2 dispatches for a greedy choice, 3 with temperature and min-p, 6 with top-k or top-p, 8 with both. Weights
are summed as integers, so that a choice depends on its inputs alone, not on the order in which workgroups run. It can
differ from the host's only where the random number is within rounding of float32 of the border between two tokens.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import wgpu

from ...backend.graph import Graph, Ref
from ...ops.base import Dispatch, Param
from ..errors import DeviceError, InputError
from ..gpu.device import Device
from ..gpu.kernel import Kernel, KernelKey
from ..gpu.plan import Launch
from .choice_kernels import HISTOGRAM, ROUNDING, choice_dispatch, pack_settings, search_levels
from .sampling import Sampling

CHUNK = 1024
"""Tokens that a workgroup looks at; CHUNK of the kernels."""
MAX_ADVANCES = 32
"""Words that move on with a choice; the length of `advances` in the kernels."""
NAN_LOGITS, NO_LOGITS, IDLE_ROW = -1, -2, -3
"""What stands in the ring instead of a token: a logit is NaN; all logits are minus infinity; the row was idle."""

_SETTING_WORDS, _COUNTER_WORDS = 8, 4
_SLOT_WORDS, _MAX_SLOTS = 8, 6


@dataclass(frozen=True)
class Logits:
    """Where a step leaves its logits.

    Attributes:
        buffer: GPU buffer with STORAGE usage.
        offset: bytes before the first of row 0's last logits, a multiple of the element's size.
        stride: elements from row to row.
        type: WGSL element type, `f32` or `f16`.
        dtype: of the program's logits, `f32`, `f16` or `bf16`: what is kept as f32 is rounded to it, as it is for the
            host, so that both choose from the same numbers (rounding makes ties, and then the lowest id counts).
    """

    buffer: Any
    offset: int
    stride: int
    type: str = "f32"
    dtype: str = "f32"

    @classmethod
    def of(cls, device: Device, graph: Graph, output: int, buffers: Mapping[int, Any], stride: int) -> Logits:
        """Those that are output number `output` of a graph, a tensor, whose values stand in `buffers` of a plan."""
        value = graph.outputs[output]
        if not isinstance(value, Ref):
            raise AssertionError(f"output {output} is a number: find_whole takes no such program")
        kind = device.limits.wgsl_type(graph.storage_dtype(value.value))
        return cls(buffers[value.value], 0, stride, kind, graph.values[value.value].dtype)


@dataclass(frozen=True)
class Target:
    """Words of a GPU buffer that get the token of each row, as i32: `word` that of row 0, the others behind it."""

    buffer: Any
    word: int = 0


@dataclass(frozen=True)
class Advance:
    """An i32 word of a GPU buffer that grows by `delta` with each choice."""

    buffer: Any
    word: int
    delta: int = 1


@dataclass(frozen=True)
class Lengths:
    """Rows with lengths of their own: i32 words, one for each row, at the start of two GPU buffers.

    After a choice a row's `past` grows by its `q_len`, up to `capacity`, and the token stands at the new `past` of its
    sequence. A row of which `q_len` is not positive is idle: IDLE_ROW stands in the ring, nothing else is written.
    """

    past: Any
    q_len: Any
    capacity: int


@dataclass(frozen=True)
class Placed:
    """The dispatches of every kind of choice, bound to a step's buffers, and the buffer of their params."""

    lists: Mapping[str, Sequence[Launch]]
    params: Any


class Chooser:
    """Chooses one token for each row of a batch; see the module's docstring.

    Everything is made here and by `place`, nothing afterwards: `configure`, `start` and `seen` write small numbers,
    `launches` looks up. Writes are ordered with submits; call them between, not while a pass is being encoded.

    Args:
        device: where the logits are.
        vocabulary: number of tokens V.
        rows: sequences of the batch.
        logits: what is chosen from.
        capacity: choices that the ring holds; tokens of further ones are still passed on, but not kept. With `lengths`
            they are written over the oldest.
        targets: at most 2 places for the next step's input.
        advances: at most 32 words, in at most 2 buffers, that grow with each choice (once, however many rows).
        lengths: where rows have lengths of their own; positions are those then, not what `start` says.
        label: for messages and profiles.
    Attributes:
        tokens: GPU buffer i32 [capacity, rows]: what was chosen since `start`; NAN_LOGITS or NO_LOGITS where nothing
            could be (the targets get 0 then).
        state: GPU buffer of u32 words: settings [rows, 8]; counters [rows, 4]: position (low, high word), choices
            since `start`, random word of the last draw; bitmaps of seen tokens [rows, ceil(V / 32)].
    Raises:
        InputError: an argument is out of range.
        DeviceError: a kernel or a buffer does not fit the device.
    """

    def __init__(
        self,
        device: Device,
        vocabulary: int,
        rows: int,
        logits: Logits,
        capacity: int,
        targets: Sequence[Target] = (),
        advances: Sequence[Advance] = (),
        lengths: Lengths | None = None,
        label: str = "choice",
    ) -> None:
        self.device = device
        self.vocabulary = vocabulary
        self.rows = rows
        self.capacity = capacity
        self.label = label
        self._chunks = -(-vocabulary // CHUNK)
        self._words = -(-vocabulary // 32)
        self._check(logits, targets, advances, lengths)
        self._owned: list[Any] = []
        self._settings: list[bytes] = []
        self._argmax, self._sums = 0, 2 * self._chunks
        self._cut = self._sums + 3 * self._chunks
        self._slots = self._cut + 2
        self._histograms = self._slots + _MAX_SLOTS * _SLOT_WORDS
        self._stride = self._histograms + 5 * HISTOGRAM
        try:
            self.state = self._buffer(rows * (_SETTING_WORDS + _COUNTER_WORDS + self._words), "state")
            self.tokens = self._buffer(rows * capacity, "tokens")
            keys = self._buffer(rows * vocabulary, "keys")
            work = self._buffer(rows * self._stride, "work")
            self._step = max(device.limits.storage_alignment, 256)
            self._spare = self._buffer(self._step, "spare")
            self._bound: dict[str, tuple[Any, int, int]] = {
                name: (buffer, 0, buffer.size)
                for name, buffer in (("state", self.state), ("ring", self.tokens), ("keys", keys), ("work", work))
            }
            self.first = self.place(logits, targets, advances, lengths)
            self.configure(Sampling())
        except BaseException:
            self.close()
            raise

    def place(
        self,
        logits: Logits,
        targets: Sequence[Target] = (),
        advances: Sequence[Advance] = (),
        lengths: Lengths | None = None,
    ) -> Placed:
        """Bind the choice to another step as well, with the same settings, counters and ring; for `launches`.

        Raises:
            InputError: an argument is out of range.
            DeviceError: a kernel or a buffer does not fit the device.
        """
        self._check(logits, targets, advances, lengths)
        outer, outputs = _outputs(targets, advances, lengths)
        bound = dict(self._bound)
        bound["logits"], first = self._window(logits)
        for i in range(4):  # ranges that a kernel may write must not overlap
            found = i < len(outer)
            size = min(outer[i].size, self.device.limits.max_binding) if found else 16
            bound[f"outer{i}"] = (outer[i], 0, size) if found else (self._spare, i * self._step, size)
        return self._bind(self._dispatches(logits, first, outputs), bound)

    def remove(self, placed: Placed) -> None:
        """Free what `place` made."""
        self._owned.remove(placed.params)
        self.device.release(placed.params, "other")

    # -- numbers that change between submits

    def configure(
        self,
        sampling: Sampling | Sequence[Sampling],
        seed: int | Sequence[int] = 0,
        streams: Sequence[int] | None = None,
    ) -> None:
        """Set how tokens are chosen, for all rows or for each. Only what changes is written.

        Args:
            seed: in [0, 2**64); used where `sampling.seed` is None.
            streams: row number that each row's random numbers are those of (see `sampling.uniform`); None: its own.
        Raises:
            InputError: not one for each row.
        """
        each = self._for_rows(sampling, "sampling settings")
        seeds = [seed] * self.rows if isinstance(seed, int) else list(seed)
        if len(seeds) != self.rows:
            raise InputError(f"{len(seeds)} seeds for {self.rows} rows")
        numbers = range(self.rows) if streams is None else streams
        if len(numbers) != self.rows:
            raise InputError(f"{len(numbers)} streams for {self.rows} rows")
        made = [pack_settings(*one) for one in zip(each, seeds, numbers, strict=True)]
        changed = [row for row, data in enumerate(made) if row >= len(self._settings) or data != self._settings[row]]
        if changed:
            first, last = changed[0], changed[-1]
            self.device.write(self.state, b"".join(made[first : last + 1]), first * _SETTING_WORDS * 4)
            self._settings = made

    def start(self, position: int | Sequence[int]) -> None:
        """Begin a run: the ring is empty, the next token will stand at `position` of its row's sequence."""
        positions = [position] * self.rows if isinstance(position, int) else list(position)
        if len(positions) != self.rows:
            raise InputError(f"{len(positions)} positions for {self.rows} rows")
        if min(positions) < 0:
            raise InputError(f"position {min(positions)} is negative")
        data = b"".join(struct.pack("<QII", value, 0, 0) for value in positions)
        self.device.write(self.state, data, self.rows * _SETTING_WORDS * 4)

    def seen(self, ids: Iterable[int], row: int = 0) -> None:
        """Set the tokens that occurred in a row, for the repetition penalty; ids outside the vocabulary are ignored.

        Chosen tokens are added on the GPU. Not needed where the penalty is 1.
        """
        if not 0 <= row < self.rows:
            raise InputError(f"row {row} of {self.rows}")
        given = np.fromiter(ids, np.int64)
        given = given[(given >= 0) & (given < self.vocabulary)]
        marks = np.zeros(self._words * 32, np.uint8)
        marks[given] = 1
        data = np.packbits(marks, bitorder="little").tobytes()
        place = self.rows * (_SETTING_WORDS + _COUNTER_WORDS) + row * self._words
        self.device.write(self.state, data, place * 4)

    def launches(self, sampling: Sampling | Sequence[Sampling], placed: Placed | None = None) -> Sequence[Launch]:
        """The dispatches of one choice, to follow a step's in the same pass, for settings like these.

        Only which steps are used counts here, not their numbers: those are what `configure` wrote. Every row takes
        the steps that some row needs; what a row does not need leaves it as it is.

        Args:
            placed: what `place` gave for the step; None: the step that the chooser was made for.
        """
        each = self._for_rows(sampling, "sampling settings")
        random = [one for one in each if not one.greedy]
        k = any(0 < one.top_k < self.vocabulary for one in random)
        p = any(one.top_p < 1 for one in random)
        kind = "greedy" if not random else "both" if k and p else "top-k" if k else "top-p" if p else "plain"
        return (placed or self.first).lists[kind]

    def close(self) -> None:
        """Free the buffers; the chooser cannot be used afterwards."""
        for buffer in self._owned:
            self.device.release(buffer, "other")
        self._owned.clear()

    # -- construction

    def _check(
        self, logits: Logits, targets: Sequence[Target], advances: Sequence[Advance], lengths: Lengths | None
    ) -> None:
        def require(good: bool, message: str) -> None:
            if not good:
                raise InputError(f"{self.label}: {message}")

        limits = self.device.limits
        require(0 < self.vocabulary < 2**24, f"a vocabulary of {self.vocabulary:,}, expected 1 to {2**24 - 1:,}")
        require(0 < self.rows <= limits.max_workgroups, f"{self.rows:,} rows, expected 1 to {limits.max_workgroups:,}")
        require(self.capacity > 0, f"a ring of {self.capacity} choices, expected at least 1")
        require(logits.type in ("f32", "f16"), f"logits are {logits.type}, expected f32 or f16")
        require(logits.dtype in ROUNDING, f"logits are {logits.dtype}, expected one of {', '.join(ROUNDING)}")
        require(len(targets) <= 2, f"{len(targets)} targets, expected at most 2")
        require(len(advances) <= MAX_ADVANCES, f"{len(advances)} advances, expected at most {MAX_ADVANCES}")
        distinct = len({id(advance.buffer) for advance in advances})
        require(distinct <= 2, f"advances are in {distinct} buffers, expected at most 2")
        if lengths is not None:
            apart = lengths.past is not lengths.q_len and lengths.capacity > 0
            require(apart, "lengths need two buffers and a positive capacity")
            outer, _ = _outputs(targets, advances, lengths)
            require(len(outer) <= 4, f"{len(outer)} buffers to write, expected at most 4")
        item = 4 if logits.type == "f32" else 2
        require(logits.offset >= 0 and logits.offset % item == 0, f"logits at byte {logits.offset}")
        require(self.rows == 1 or logits.stride >= self.vocabulary, f"a stride of {logits.stride} between rows")
        end = logits.offset + item * ((self.rows - 1) * logits.stride + self.vocabulary)
        require(end <= logits.buffer.size, f"logits end at byte {end:,} of {logits.buffer.size:,}")
        for what, word, count, buffer in [
            *(("target", t.word, self.rows, t.buffer) for t in targets),
            *(("advance", a.word, 1, a.buffer) for a in advances),
            *(("lengths", 0, self.rows, buffer) for buffer in ([lengths.past, lengths.q_len] if lengths else ())),
        ]:
            inside = word >= 0 and 4 * (word + count) <= buffer.size
            require(inside, f"{what}: word {word} of a buffer of {buffer.size:,} bytes")

    def _for_rows(self, sampling: Sampling | Sequence[Sampling], what: str) -> list[Sampling]:
        each = [sampling] * self.rows if isinstance(sampling, Sampling) else list(sampling)
        if len(each) != self.rows:
            raise InputError(f"{len(each)} {what} for {self.rows} rows")
        return each

    def _buffer(self, words: int, name: str) -> Any:
        if words * 4 > self.device.limits.max_binding:
            raise DeviceError(
                f"{self.label}: {name} needs {words * 4:,} bytes, but this device binds at most "
                f"{self.device.limits.max_binding:,} ({self.device.name}); use fewer rows or another device"
            )
        buffer = self.device.buffer(words * 4, "other", f"{self.label} {name}")
        self._owned.append(buffer)
        return buffer

    def _window(self, logits: Logits) -> tuple[tuple[Any, int, int], int]:
        """The part of the logits' buffer that is bound, which may be larger than a binding can be, and the element in
        it where row 0 begins."""
        item = 4 if logits.type == "f32" else 2
        start = logits.offset // self.device.limits.storage_alignment * self.device.limits.storage_alignment
        end = logits.offset + item * ((self.rows - 1) * logits.stride + self.vocabulary)
        size = -(-(end - start) // 4) * 4
        if size > self.device.limits.max_binding:
            raise DeviceError(f"{self.label}: logits of {size:,} bytes are more than this device can bind")
        return (logits.buffer, start, size), (logits.offset - start) // item

    def _dispatches(self, logits: Logits, begin: int, outputs: Mapping[str, Param]) -> dict[str, list[Dispatch]]:
        """The dispatches of every kind of choice."""
        sizes: dict[str, Param] = {
            "vocabulary": self.vocabulary,
            "chunks": self._chunks,
            "work_stride": self._stride,
        }
        results: dict[str, Param] = {"cut": self._cut, "sums": self._sums}
        ends: dict[str, Param] = {"rows": self.rows, "capacity": self.capacity, **outputs}

        def first(store: bool, histograms: int) -> Dispatch:
            return choice_dispatch(
                "choose_argmax",
                {
                    **sizes,
                    "rows": self.rows,
                    "offset": begin,
                    "stride": logits.stride,
                    "store": int(store),
                    "clear": histograms * HISTOGRAM,
                    "histograms": self._histograms,
                },
                (self._chunks, self.rows, 1),
                {"Logit": logits.type},
                (ROUNDING[logits.dtype],),
            )

        rest = {"greedy": [first(False, 0), choice_dispatch("choose_greedy", {**sizes, **ends}, (self.rows, 1, 1))]}
        draw = choice_dispatch("choose_draw", {**sizes, **results, **ends}, (self.rows, 1, 1))
        for kind, levels in search_levels(self._histograms).items():
            end = {"kind": {"plain": 0, "top-k": 1}.get(kind, 2), **results}
            steps = [first(True, len(levels) - 1)]
            for stage, level in enumerate(levels):
                last = stage == len(levels) - 1
                fields = {**sizes, "slots": self._slots, "stage": stage, **level, **(end if last else {})}
                steps.append(
                    choice_dispatch("choose_sums" if last else "choose_level", fields, (self._chunks, self.rows, 1))
                )
            rest[kind] = [*steps, draw]
        return rest

    def _bind(self, lists: Mapping[str, Sequence[Dispatch]], buffers: Mapping[str, tuple[Any, int, int]]) -> Placed:
        """Pipelines, one buffer of params, and a bind group for each distinct dispatch."""
        distinct = {id(dispatch): dispatch for dispatches in lists.values() for dispatch in dispatches}
        align = max(self.device.limits.uniform_alignment, 16)
        blob = bytearray()
        placed: list[tuple[int, Dispatch, Kernel, int]] = []
        for key, dispatch in distinct.items():
            kernel = self.device.kernel(KernelKey.of(dispatch))
            data = kernel.interface.pack(dispatch.params, f"{self.label} ({dispatch.kernel})")
            placed.append((key, dispatch, kernel, len(blob)))
            blob += data + bytes(-len(data) % align)
        usage = wgpu.BufferUsage.UNIFORM | wgpu.BufferUsage.COPY_DST
        params = self.device.buffer(len(blob), "other", f"{self.label} params", usage)
        self._owned.append(params)
        self.device.write(params, bytes(blob))
        made: dict[int, Launch] = {}
        for key, dispatch, kernel, offset in placed:
            bound = {**buffers, "params": (params, offset, kernel.interface.params_size)}
            entries = []
            for binding in kernel.interface.bindings.values():
                buffer, start, size = bound[binding.name]
                resource = {"buffer": buffer, "offset": start, "size": size}
                entries.append({"binding": binding.index, "resource": resource})
            try:
                group = self.device.gpu.create_bind_group(
                    label=f"{self.label} {dispatch.kernel}", layout=kernel.layout, entries=entries
                )
            except Exception as error:
                raise DeviceError(f"{self.label}: binding {dispatch.kernel} failed: {error}") from error
            self.device.counters.bind_groups += 1
            made[key] = Launch(kernel.pipeline, group, dispatch.grid, None, self.label, dispatch.kernel)
        found = {name: [made[id(dispatch)] for dispatch in dispatches] for name, dispatches in lists.items()}
        return Placed(found, params)


def _outputs(
    targets: Sequence[Target], advances: Sequence[Advance], lengths: Lengths | None
) -> tuple[list[Any], dict[str, Param]]:
    """The distinct buffers of others, and the params that say what to write there."""
    buffers: list[Any] = []

    def number(buffer: Any) -> int:
        for index, known in enumerate(buffers):
            if known is buffer:
                return index
        buffers.append(buffer)
        return len(buffers) - 1

    places = [value for target in targets for value in (number(target.buffer), target.word)]
    deltas: dict[tuple[int, int], int] = {}
    for advance in advances:  # one invocation a word
        place = (number(advance.buffer), advance.word)
        deltas[place] = deltas.get(place, 0) + advance.delta
    words = (0, 0, 0, 0) if lengths is None else (number(lengths.past), number(lengths.q_len), lengths.capacity, 1)
    return buffers, {
        "lengths": words,
        "target_count": len(targets),
        "advance_count": len(deltas),
        "targets": tuple(places),
        "advances": tuple(value for (buffer, word), delta in deltas.items() for value in (buffer, word, delta, 0)),
    }
