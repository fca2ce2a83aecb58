"""Choosing tokens on the GPU: a step's logits become the next step's input without a word from the host.

The choice is that of `sampling.choose`: penalty, temperature, top-k, top-p, min-p, and the same random number. How:

1. `choose_argmax`: every score as a key of 32 bits that orders like it; the largest of each chunk of 1,024 tokens.
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

from .. import wgsl
from ..ops.base import Dispatch, Param
from .device import Device
from .errors import DeviceError, InputError
from .kernel import Kernel, KernelKey
from .plan import Launch
from .sampling import Sampling

CHUNK = 1024
"""Tokens that a workgroup looks at; CHUNK of the kernels."""
MAX_ADVANCES = 32
"""Words that move on with a choice; the length of `advances` in the kernels."""
NAN_LOGITS, NO_LOGITS = -1, -2
"""What stands in the ring instead of a token: a logit is NaN; all logits are minus infinity."""

_SETTING_WORDS, _COUNTER_WORDS = 8, 4
_SLOT_WORDS, _MAX_SLOTS = 8, 6
_HISTOGRAM = 2048 * 3
"""Words of a histogram: 2,048 bins of count and mass (two words)."""
_NOT_NOW = 0xFFFFFFFF
_SHIFTS = (21, 10, 0)
_SMALLEST, _LARGEST = 1e-30, 1e30
"""Temperatures and penalties beyond are no different in float32."""


@dataclass(frozen=True)
class Logits:
    """Where a step leaves its logits.

    Attributes:
        buffer: GPU buffer with STORAGE usage.
        offset: bytes before the first of row 0's last logits, a multiple of the element's size.
        stride: elements from row to row.
        type: WGSL element type, `f32` or `f16`.
    """

    buffer: Any
    offset: int
    stride: int
    type: str = "f32"


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


class Chooser:
    """Chooses one token for each row of a batch; see the module's docstring.

    Everything is made here, nothing afterwards: `configure`, `start` and `seen` write small numbers, `launches` looks
    up. Writes are ordered with submits; call them between, not while a pass is being encoded.

    Args:
        device: where the logits are.
        vocabulary: number of tokens V.
        rows: sequences of the batch.
        logits: what is chosen from.
        capacity: choices that the ring holds; tokens of further ones are still passed on, but not kept.
        targets: at most 2 places for the next step's input.
        advances: at most 32 words, in at most 2 buffers, that grow with each choice (once, however many rows).
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
        label: str = "choice",
    ) -> None:
        self.device = device
        self.vocabulary = vocabulary
        self.rows = rows
        self.capacity = capacity
        self.label = label
        self._logits = logits
        self._chunks = -(-vocabulary // CHUNK)
        self._words = -(-vocabulary // 32)
        self._check(logits, targets, advances)
        outer, outputs = _outputs(targets, advances)
        self._owned: list[Any] = []
        self._settings = b""
        self._argmax, self._sums = 0, 2 * self._chunks
        self._cut = self._sums + 3 * self._chunks
        self._slots = self._cut + 2
        self._histograms = self._slots + _MAX_SLOTS * _SLOT_WORDS
        self._stride = self._histograms + 5 * _HISTOGRAM
        try:
            self.state = self._buffer(rows * (_SETTING_WORDS + _COUNTER_WORDS + self._words), "state")
            self.tokens = self._buffer(rows * capacity, "tokens")
            keys = self._buffer(rows * vocabulary, "keys")
            work = self._buffer(rows * self._stride, "work")
            spare = self._buffer(4 * max(device.limits.storage_alignment, 256) // 4, "spare")
            self._bound: dict[str, tuple[Any, int, int]] = {
                name: (buffer, 0, buffer.size)
                for name, buffer in (("state", self.state), ("ring", self.tokens), ("keys", keys), ("work", work))
            }
            self._bound["logits"] = self._window(logits)
            step = max(device.limits.storage_alignment, 256)
            for i in range(4):  # ranges that a kernel may write must not overlap
                found = i < len(outer)
                self._bound[f"outer{i}"] = (outer[i], 0, outer[i].size) if found else (spare, i * step, 16)
            self._lists = self._prepare(outputs)
            self.configure(Sampling())
        except BaseException:
            self.close()
            raise

    # -- numbers that change between submits

    def configure(self, sampling: Sampling | Sequence[Sampling], seed: int | Sequence[int] = 0) -> None:
        """Set how tokens are chosen, for all rows or for each.

        Args:
            seed: in [0, 2**64); used where `sampling.seed` is None.
        Raises:
            InputError: not one for each row.
        """
        each = self._for_rows(sampling, "sampling settings")
        seeds = [seed] * self.rows if isinstance(seed, int) else list(seed)
        if len(seeds) != self.rows:
            raise InputError(f"{len(seeds)} seeds for {self.rows} rows")
        data = b"".join(_settings(one, key) for one, key in zip(each, seeds, strict=True))
        if data != self._settings:
            self.device.write(self.state, data)
            self._settings = data

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

    def launches(self, sampling: Sampling | Sequence[Sampling]) -> list[Launch]:
        """The dispatches of one choice, to follow a step's in the same pass, for settings like these.

        Only which steps are used counts here, not their numbers: those are what `configure` wrote.
        """
        each = self._for_rows(sampling, "sampling settings")
        if all(one.greedy for one in each):
            return self._lists["greedy"]
        mixed = any(one.greedy for one in each)  # a greedy row among others keeps one token
        k = mixed or any(0 < one.top_k < self.vocabulary for one in each)
        p = any(one.top_p < 1 for one in each if not one.greedy)
        return self._lists["both" if k and p else "top-k" if k else "top-p" if p else "plain"]

    def close(self) -> None:
        """Free the buffers; the chooser cannot be used afterwards."""
        for buffer in self._owned:
            self.device.release(buffer, "other")
        self._owned.clear()

    # -- construction

    def _check(self, logits: Logits, targets: Sequence[Target], advances: Sequence[Advance]) -> None:
        def require(good: bool, message: str) -> None:
            if not good:
                raise InputError(f"{self.label}: {message}")

        limits = self.device.limits
        require(0 < self.vocabulary < 2**24, f"a vocabulary of {self.vocabulary:,}, expected 1 to {2**24 - 1:,}")
        require(0 < self.rows <= limits.max_workgroups, f"{self.rows:,} rows, expected 1 to {limits.max_workgroups:,}")
        require(self.capacity > 0, f"a ring of {self.capacity} choices, expected at least 1")
        require(logits.type in ("f32", "f16"), f"logits are {logits.type}, expected f32 or f16")
        require(len(targets) <= 2, f"{len(targets)} targets, expected at most 2")
        require(len(advances) <= MAX_ADVANCES, f"{len(advances)} advances, expected at most {MAX_ADVANCES}")
        distinct = len({id(advance.buffer) for advance in advances})
        require(distinct <= 2, f"advances are in {distinct} buffers, expected at most 2")
        item = 4 if logits.type == "f32" else 2
        require(logits.offset >= 0 and logits.offset % item == 0, f"logits at byte {logits.offset}")
        require(self.rows == 1 or logits.stride >= self.vocabulary, f"a stride of {logits.stride} between rows")
        end = logits.offset + item * ((self.rows - 1) * logits.stride + self.vocabulary)
        require(end <= logits.buffer.size, f"logits end at byte {end:,} of {logits.buffer.size:,}")
        for what, word, count, buffer in [
            *(("target", t.word, self.rows, t.buffer) for t in targets),
            *(("advance", a.word, 1, a.buffer) for a in advances),
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

    def _window(self, logits: Logits) -> tuple[Any, int, int]:
        """The part of the logits' buffer that is bound: it may be larger than a binding can be."""
        item = 4 if logits.type == "f32" else 2
        start = logits.offset // self.device.limits.storage_alignment * self.device.limits.storage_alignment
        end = logits.offset + item * ((self.rows - 1) * logits.stride + self.vocabulary)
        size = -(-(end - start) // 4) * 4
        if size > self.device.limits.max_binding:
            raise DeviceError(f"{self.label}: logits of {size:,} bytes are more than this device can bind")
        self._first = (logits.offset - start) // item
        return logits.buffer, start, size

    def _prepare(self, outputs: Mapping[str, Param]) -> dict[str, list[Launch]]:
        """The dispatches of every kind of choice."""
        sizes: dict[str, Param] = {
            "vocabulary": self.vocabulary,
            "chunks": self._chunks,
            "work_stride": self._stride,
        }
        results: dict[str, Param] = {"cut": self._cut, "sums": self._sums}
        ends: dict[str, Param] = {"rows": self.rows, "capacity": self.capacity, **outputs}

        def first(store: bool, histograms: int) -> Dispatch:
            return _dispatch(
                "choose_argmax",
                {
                    **sizes,
                    "rows": self.rows,
                    "offset": self._first,
                    "stride": self._logits.stride,
                    "store": int(store),
                    "clear": histograms * _HISTOGRAM,
                    "histograms": self._histograms,
                },
                (self._chunks, self.rows, 1),
                {"Logit": self._logits.type},
            )

        rest = {"greedy": [first(False, 0), _dispatch("choose_greedy", {**sizes, **ends}, (self.rows, 1, 1))]}
        draw = _dispatch("choose_draw", {**sizes, **results, **ends}, (self.rows, 1, 1))
        for kind, levels in _levels(self._histograms).items():
            end = {"kind": {"plain": 0, "top-k": 1}.get(kind, 2), **results}
            steps = [first(True, len(levels) - 1)]
            for stage, level in enumerate(levels):
                last = stage == len(levels) - 1
                fields = {**sizes, "slots": self._slots, "stage": stage, **level, **(end if last else {})}
                steps.append(_dispatch("choose_sums" if last else "choose_level", fields, (self._chunks, self.rows, 1)))
            rest[kind] = [*steps, draw]
        return self._bind(rest)

    def _bind(self, lists: Mapping[str, Sequence[Dispatch]]) -> dict[str, list[Launch]]:
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
            bound = {**self._bound, "params": (params, offset, kernel.interface.params_size)}
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
        return {name: [made[id(dispatch)] for dispatch in dispatches] for name, dispatches in lists.items()}


_PARTS = {
    "choose_argmax": ("choose_keys",),
    "choose_greedy": ("choose_keys", "choose_outputs"),
    "choose_level": ("philox", "choose_keys", "choose_weights", "choose_search"),
    "choose_sums": ("philox", "choose_keys", "choose_weights", "choose_search"),
    "choose_draw": ("philox", "choose_keys", "choose_weights", "choose_outputs"),
}
"""Kernel -> files without an entry point that are appended to it."""


def _dispatch(
    kernel: str, params: Mapping[str, Param], grid: tuple[int, int, int], types: Mapping[str, str] | None = None
) -> Dispatch:
    body = "\n".join(wgsl.source(part) for part in _PARTS[kernel])
    return Dispatch(kernel, {}, params, grid, types=types or {}, body=body)


def _levels(histograms: int) -> dict[str, list[dict[str, Param]]]:
    """Kind of choice -> what the search does in each of its dispatches; the last is that of `choose_sums`."""
    where = [histograms + i * _HISTOGRAM for i in range(5)]

    def step(
        k: tuple[int, int] | None, p: tuple[int, int] | None, out: tuple[int, int] | None, after_k: bool = False
    ) -> dict[str, Param]:
        """`k`, `p`: (histogram, level) to find a digit from; `out`: (histogram, level) to count for."""
        fields: dict[str, Param] = {
            "k_histogram": where[k[0]] if k else _NOT_NOW,
            "k_shift": _SHIFTS[k[1]] if k else 0,
            "p_histogram": where[p[0]] if p else _NOT_NOW,
            "p_shift": _SHIFTS[p[1]] if p else 0,
            "p_first": int(p is not None and p[1] == 0 and not after_k),
            "p_after_k": int(after_k),
        }
        if out is not None:
            level = out[1]
            fields |= {
                "out_histogram": where[out[0]],
                "out_shift": _SHIFTS[level],
                "out_digits": (2047, 2047, 1023)[level],
                "out_mask": (0, 0xFFE00000, 0xFFFFFC00)[level],
                "out_p": int(p is not None),
            }
        return fields

    begin = step(None, None, (0, 0))
    top_k = [begin, step((0, 0), None, (1, 1)), step((1, 1), None, (2, 2))]
    return {
        "plain": [step(None, None, None)],
        "top-k": [*top_k, step((2, 2), None, None)],
        "top-p": [
            begin,
            step(None, (0, 0), (1, 1)),
            step(None, (1, 1), (2, 2)),
            step(None, (2, 2), None),
        ],
        "both": [
            *top_k,
            step((2, 2), (0, 0), (3, 1), after_k=True),
            step(None, (3, 1), (4, 2)),
            step(None, (4, 2), None),
        ],
    }


def _outputs(targets: Sequence[Target], advances: Sequence[Advance]) -> tuple[list[Any], dict[str, Param]]:
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
    return buffers, {
        "target_count": len(targets),
        "advance_count": len(deltas),
        "targets": tuple(places),
        "advances": tuple(value for (buffer, word), delta in deltas.items() for value in (buffer, word, delta, 0)),
    }


def _settings(sampling: Sampling, seed: int) -> bytes:
    """A row's settings: 1 / temperature, top-k, top-p in units of 2**-32 (0: off), min-p, penalty, seed."""
    key = seed if sampling.seed is None else sampling.seed
    if not 0 <= key < 2**64:
        raise InputError(f"seed is {key}, expected an integer in [0, 2**64)")
    inverse = 1.0 if sampling.greedy else 1.0 / min(max(sampling.temperature, _SMALLEST), _LARGEST)
    kept = 1 if sampling.greedy else min(sampling.top_k, 0xFFFFFFFF)
    portion = 0 if sampling.greedy or sampling.top_p >= 1 else max(int(sampling.top_p * 2**32), 1)
    least = 0.0 if sampling.greedy else sampling.min_p
    penalty = min(max(sampling.repetition_penalty, _SMALLEST), _LARGEST)
    return struct.pack("<fIIffQI", inverse, kept, portion, least, penalty, key, 0)
