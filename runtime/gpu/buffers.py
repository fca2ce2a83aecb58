"""GPU buffers: constants shared by a program's methods, pooled temporaries, mutable state, live scalars and
read-back."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import numpy as np
import wgpu

from ...backend.graph import Dim, Value
from ...wgsl import LIVE_SLOTS
from ..errors import DeviceError, InputError, MissingDataError
from . import native
from .device import Device
from .host import STORAGE
from .upload import Progress, Upload, check_size, static_numel, stored_bytes

DataSource = Callable[[str], Any]
"""Key -> bytes-like of the named data; raises MissingDataError."""

_WINDOW_BYTES = LIVE_SLOTS * 4


def storage_size(device: Device, dtype: str, count: int) -> int:
    """Bytes that `count` elements of a host dtype take on the device, a multiple of 16."""
    return max(-(-count * STORAGE[device.limits.wgsl_type(dtype)].itemsize // 16) * 16, 16)


def fill(device: Device, buffer: Any, value: Value, data: Any) -> None:
    """Upload the raw host bytes of a stored tensor, converted to how the device keeps it.

    Raises:
        MissingDataError: the bytes are not as many as dtype and shape say.
    """
    with Upload(device) as upload:
        upload.tensor(buffer, value, data)


class Weights:
    """The constants of a program on one device: uploaded once per content, shared by all its methods.

    Attributes:
        progress: called while constants are uploaded; None: nobody wants to know.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self.progress: Progress | None = None
        self._buffers: dict[tuple[str, str], Any] = {}

    def check(self, value: Value, source: DataSource) -> None:
        """Look whether a constant can be loaded; nothing is uploaded.

        Raises:
            MissingDataError: its data are nowhere, or not as many bytes as dtype and shape say.
        """
        check_size(value, source(_key(value)[0]))

    def load(self, values: Iterable[Value], source: DataSource) -> None:
        """Upload those constants that are not there yet: all of them, or none where one fails.

        Raises:
            MissingDataError, DeviceError: one cannot be loaded; what this call had uploaded is freed.
        """
        wanted = {_key(value): value for value in values}
        missing = {key: value for key, value in wanted.items() if key not in self._buffers}
        known = self.known()
        try:
            with Upload(self.device, sum(map(stored_bytes, missing.values())), self.progress) as upload:
                for key, value in missing.items():
                    size = storage_size(self.device, value.dtype, static_numel(value))
                    self._buffers[key] = self.device.buffer(size, "weights", f"weight {value.name}")
                    self.fill(upload, self._buffers[key], value, source)
        except BaseException:
            self.keep(known)
            raise

    def fill(self, upload: Upload, buffer: Any, value: Value, source: DataSource) -> None:
        """Give a new buffer the content of a constant."""
        upload.tensor(buffer, value, source(_key(value)[0]))

    def get(self, value: Value, source: DataSource) -> Any:
        """The buffer of a constant, uploaded on first use. Raises MissingDataError or DeviceError."""
        key = _key(value)
        if key not in self._buffers:
            self.load([value], source)
        return self._buffers[key]

    def known(self) -> frozenset[tuple[str, str]]:
        """What is loaded, for `keep`."""
        return frozenset(self._buffers)

    def keep(self, known: Collection[tuple[str, str]]) -> None:
        """Free all but what was loaded when `known` was asked for."""
        for key in [key for key in self._buffers if key not in known]:
            self.device.release(self._buffers.pop(key), "weights")

    def close(self) -> None:
        """Free everything."""
        self.keep(())


def _key(value: Value) -> tuple[str, str]:
    """What a constant is shared by: its content and dtype."""
    if value.data is None:
        raise MissingDataError(f"constant {value.name} has no data in the program")
    return value.data, value.dtype


class State:
    """Mutable buffers (KV caches and the like) by name; what a call leaves for the next one.

    Two methods of a program that are given the same State share the buffers whose names are equal.

    Attributes:
        program: whose weights write the buffers, as `files.identity` names programs; None: the first whose method is
            loaded on it.
        user: whose tokens the buffers hold; None: nobody's. Whoever finds another one here must not count on them.
        closed: whether the buffers were freed.
    """

    def __init__(self, device: Device, program: str | None = None) -> None:
        self.device = device
        self.program = program
        self.user: object = None
        self.closed = False
        self._buffers: dict[str, tuple[Any, Value, DataSource]] = {}

    def require_open(self) -> None:
        """InputError if the state was closed."""
        if self.closed:
            raise InputError("this state was closed: make a new one")

    @staticmethod
    def check(value: Any, device: Device, program: str) -> State:
        """A state that methods of a program on a device can use. Raises InputError for anything else."""
        if not isinstance(value, State):
            raise InputError(f"state is {value!r}, expected that of a method, or what new_state of a program gives")
        value.require_open()
        if value.device is not device:
            raise InputError("the state is on another device than the program: make one with its new_state")
        value.require_program(program)
        return value

    def require_program(self, program: str | None) -> None:
        """InputError if the buffers are another program's: they hold what other weights made of the tokens."""
        if None not in (self.program, program) and self.program != program:
            raise InputError(
                f"the state belongs to another program ({str(self.program)[:12]}; this one is {str(program)[:12]}), "
                "and holds what other weights made: make one with this program's new_state, and export methods that "
                "share a state into one program"
            )

    def keep(self, known: Collection[str]) -> None:
        """Free all buffers but those of these names."""
        with self.device.lock:
            for name in [name for name in self._buffers if name not in known]:
                self.device.release(self._buffers.pop(name)[0], "state")

    def get(self, value: Value, source: DataSource) -> Any:
        """The buffer of a mutable value; made and given its initial content on first use.

        Raises:
            InputError: the state was closed.
            DeviceError: there is one of that name with another type; the device is out of memory.
        """
        buffer, new = self._made(value, source)
        if new and value.data is not None:  # a new buffer is zero already
            fill(self.device, buffer, value, source(value.data))
        return buffer

    def _made(self, value: Value, source: DataSource) -> tuple[Any, bool]:
        """The buffer of a value, and whether it was made now."""
        self.require_open()
        found = self._buffers.get(value.name)
        if found is not None:
            if (found[1].dtype, found[1].shape) != (value.dtype, value.shape):
                raise DeviceError(
                    f"state {value.name} is {found[1].dtype}{list(found[1].shape)}, "
                    f"but this method has {value.dtype}{list(value.shape)}: it needs a state of its own"
                )
            return found[0], False
        size = storage_size(self.device, value.dtype, static_numel(value))
        buffer = self.device.buffer(size, "state", f"state {value.name}")
        self._buffers[value.name] = (buffer, value, source)
        return buffer, True

    def reset(self) -> None:
        """Give every buffer its initial content again. Raises InputError if the state was closed."""
        self.require_open()
        with self.device.lock:
            encoder = self.device.gpu.create_command_encoder(label="reset")
            for buffer, value, _ in self._buffers.values():
                if value.data is None:
                    encoder.clear_buffer(buffer)
            self.device.gpu.queue.submit([encoder.finish()])
            for buffer, value, source in self._buffers.values():
                if value.data is not None:
                    fill(self.device, buffer, value, source(value.data))

    def copy_from(self, other: State, parts: Callable[[Value, int], Iterable[tuple[int, int]]]) -> None:
        """Copy another state's buffers on the GPU; those that are missing here are made, without initial content.

        Args:
            parts: value, bytes of its buffer -> what to copy: (first byte, bytes), multiples of 4.
        Raises:
            InputError: one of the states was closed; they are of two programs.
            DeviceError: the device is out of memory; a buffer has another type here.
        """
        self.require_open()
        other.require_open()
        self.require_program(other.program)
        with self.device.lock:
            pairs = [(*entry[:2], self._made(*entry[1:])[0]) for entry in other._buffers.values()]
            encoder = self.device.gpu.create_command_encoder(label="copy of a state")
            for source, value, target in pairs:
                for start, size in parts(value, source.size):
                    encoder.copy_buffer_to_buffer(source, start, target, start, size)
            self.device.gpu.queue.submit([encoder.finish()])

    def buffers(self) -> dict[str, Any]:
        """Name -> GPU buffer."""
        return {name: entry[0] for name, entry in self._buffers.items()}

    def values(self) -> dict[str, Value]:
        """Name -> type of the buffer."""
        return {name: entry[1] for name, entry in self._buffers.items()}

    def close(self) -> None:
        """Free the buffers; the state cannot be used afterwards."""
        with self.device.lock:
            for buffer, _, _ in self._buffers.values():
                self.device.release(buffer, "state")
            self._buffers.clear()
            self.closed = True


class Pool:
    """Buffers for inputs and temporaries, shared by all plans of a method.

    A plan asks for a list of sizes; the i-th largest size always gets the i-th buffer, so that a small plan fits into
    what a
    large one needed. When a buffer must grow, `generation` changes and plans made before bind again.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self.generation = 0
        self._buffers: list[Any] = []

    def take(self, sizes: list[int]) -> list[Any]:
        """A buffer for each size, in the order of `sizes`."""
        order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
        result: list[Any] = [None] * len(sizes)
        for rank, index in enumerate(order):
            result[index] = self._fit(rank, sizes[index])
        return result

    def _fit(self, rank: int, size: int) -> Any:
        if rank == len(self._buffers):
            self._buffers.append(self.device.buffer(size, "activations", f"pool {rank}", uniform=True))
        elif self._buffers[rank].size < size:
            grown = self.device.buffer(size, "activations", f"pool {rank}", uniform=True)
            self.device.release(self._buffers[rank], "activations")
            self._buffers[rank] = grown
            self.generation += 1
        return self._buffers[rank]

    def close(self) -> None:
        for buffer in self._buffers:
            self.device.release(buffer, "activations")
        self._buffers.clear()
        self.generation += 1


class LiveTable:
    """Live scalars: expressions whose values kernels read from a uniform buffer, so that a step changes no plan.

    The buffer is a row of windows of `LIVE_SLOTS` i32 each; a dispatch sees one window, in which all its scalars stand.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self.generation = 0
        self.buffer: Any = None
        self._windows: list[dict[Dim, int]] = []
        self._last = b""

    def place(self, wanted: list[Dim]) -> tuple[int, list[int]]:
        """(byte offset of a window, slot of each expression in it)."""
        distinct = list(dict.fromkeys(wanted))
        if not any(self._fits(window, distinct) for window in self._windows):
            self._windows.append({})
        index = next(i for i, window in enumerate(self._windows) if self._fits(window, distinct))
        window = self._windows[index]
        for dim in distinct:
            if dim not in window:
                window[dim] = len(window)
                self._last = b""
        return index * _WINDOW_BYTES, [window[dim] for dim in wanted]

    @staticmethod
    def _fits(window: dict[Dim, int], wanted: list[Dim]) -> bool:
        return len(window) + sum(dim not in window for dim in wanted) <= LIVE_SLOTS

    def ready(self) -> Any:
        """The buffer, large enough for all windows placed so far."""
        size = max(len(self._windows), 1) * _WINDOW_BYTES
        if self.buffer is None or self.buffer.size < size:
            if self.buffer is not None:
                self.device.release(self.buffer, "other")
            usage = (
                wgpu.BufferUsage.UNIFORM
                | wgpu.BufferUsage.STORAGE
                | wgpu.BufferUsage.COPY_DST
                | wgpu.BufferUsage.COPY_SRC
            )
            self.buffer = self.device.buffer(size, "other", "live scalars", usage)
            self.generation += 1
            self._last = b""
        return self.buffer

    def places(self) -> Iterator[tuple[Dim, int]]:
        """Every expression with the word of the buffer that holds its value."""
        for row, window in enumerate(self._windows):
            for dim, slot in window.items():
                yield dim, row * LIVE_SLOTS + slot

    def forget(self) -> None:
        """The buffer's content is no longer what `write` left there: write it in any case the next time."""
        self._last = b""

    def write(self, value_of: Callable[[Dim], int]) -> None:
        """Upload the current values if any of them changed (windows are dense, so this is a few dozen bytes)."""
        if not self._windows:
            return
        table = np.zeros((len(self._windows), LIVE_SLOTS), np.int32)
        for row, window in enumerate(self._windows):
            for dim, slot in window.items():
                table[row, slot] = value_of(dim)
        used = (len(self._windows) - 1) * LIVE_SLOTS + len(self._windows[-1])
        data = table.reshape(-1)[:used].tobytes()
        if data != self._last:
            self.device.write(self.ready(), data)
            self._last = data

    def close(self) -> None:
        if self.buffer is not None:
            self.device.release(self.buffer, "other")
            self.buffer = None


class ReadBack:
    """A mappable buffer that outputs are copied to; grows and is kept."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._buffer: Any = None
        self._download: native.Download | None = None

    def reserve(self, size: int) -> Any:
        """The buffer, of at least `size` bytes, to be the target of a copy."""
        if self._buffer is None or self._buffer.size < size:
            self.close()
            usage = wgpu.BufferUsage.COPY_DST | wgpu.BufferUsage.MAP_READ
            self._buffer = self.device.buffer(size, "read-back", "read-back", usage)
            self._download = native.Download(self.device.gpu, self._buffer)
        return self._buffer

    def begin(self, size: int) -> None:
        """Ask for the first `size` bytes, after the submit that copies them."""
        if self._download is None:
            raise AssertionError("nothing was reserved")
        self._download.begin(size)

    def finish(self, submission: int, size: int) -> bytes:
        """Wait for that submission and return the bytes asked for."""
        if self._download is None:
            raise AssertionError("nothing was reserved")
        data = self._download.finish(submission)
        self.device.counters.reads += 1
        self.device.counters.bytes_read += size
        return data

    def read(self, submission: int, size: int) -> bytes:
        """Wait for a submission and return the first `size` bytes."""
        self.begin(size)
        return self.finish(submission, size)

    def close(self) -> None:
        if self._buffer is not None:
            self.device.release(self._buffer, "read-back")
            self._buffer = self._download = None
