"""Uploads of stored tensors: converted piece by piece, with bounded host memory however large they are.

Large tensors go through a ring of `SLOTS` mappable buffers: while the GPU copies from some, the host fills another.
Small ones are queued as writes, which wgpu keeps in memory of its own until a submit, so that a submit follows every
few MiB. Pages of a mapped file are asked for ahead and given back when they have been read: they do not add up in the
process.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Any

import numpy as np
import wgpu

from ...backend.graph import ITEM_SIZE, Value, product
from ..errors import DeviceError, MissingDataError
from . import native
from .device import Device
from .host import NUMPY, STORAGE, to_storage

Progress = Callable[[int, int], object]
"""Called with (bytes of stored tensors uploaded so far, bytes in all)."""

PIECE = 8 << 20
"""Bytes of a piece, as host or as device has them, whichever are more; the size of a slot."""
SLOTS = 3
"""Pieces on their way to the GPU."""
SMALL = 1 << 20
"""Tensors up to so many bytes are queued as writes."""
WINDOW = 8 << 20
"""Bytes of queued writes after which they are submitted."""
_STAGING = wgpu.BufferUsage.MAP_WRITE | wgpu.BufferUsage.COPY_SRC


def static_numel(value: Value) -> int:
    """Element count of a constant or mutable value (their sizes are ints)."""
    count = product(value.shape)
    if not isinstance(count, int):
        raise DeviceError(f"{value.name}: a stored tensor with a dynamic size {value.shape}")
    return count


def stored_bytes(value: Value) -> int:
    """Bytes of a stored tensor in its file."""
    return static_numel(value) * ITEM_SIZE[value.dtype]


def check_size(value: Value, data: Any) -> memoryview:
    """The bytes of a stored tensor as a flat view, nothing copied.

    Raises:
        MissingDataError: they are not as many as dtype and shape say.
    """
    expected, given = stored_bytes(value), memoryview(data)
    if given.nbytes != expected:
        raise MissingDataError(
            f"{value.name}: {expected:,} bytes expected for {value.dtype}{list(value.shape)}, "
            f"the data has {given.nbytes:,}; are program and data from the same export?"
        )
    return given.cast("B") if given.nbytes else memoryview(b"")


class Upload:
    """A run of uploads to one device. Call `finish` at the end, or use it as a context manager.

    Args:
        total: bytes of all tensors to come, for `progress`.
        progress: called after each piece.
    """

    def __init__(self, device: Device, total: int = 0, progress: Progress | None = None) -> None:
        self.device = device
        self.total = total
        self.done = 0
        self._progress = progress
        self._gathered = 0
        self._ring: list[Any] = []
        self._next = 0

    def tensor(self, buffer: Any, value: Value, data: Any) -> None:
        """Upload the raw host bytes of a stored tensor, converted to how the device keeps it.

        Raises:
            MissingDataError: the bytes are not as many as dtype and shape say.
            InputError: a number does not fit the device's type.
        """
        raw = check_size(value, data)
        kind, item = self.device.limits.wgsl_type(value.dtype), ITEM_SIZE[value.dtype]
        step = PIECE // max(item, STORAGE[kind].itemsize)
        count = static_numel(value)
        for start in range(0, count, step):
            end = min(start + step, count)
            _advise(raw, item * end, item * min(end + step, count), "MADV_WILLNEED")
            host = np.frombuffer(raw, NUMPY[value.dtype], end - start, item * start)
            part = to_storage(value.dtype, host, kind, value.name)
            self._write(buffer, part, start * STORAGE[kind].itemsize)
            _advise(raw, item * start, item * end, "MADV_DONTNEED")
            self.done += item * (end - start)
            if self._progress is not None:
                self._progress(self.done, self.total)

    def _write(self, buffer: Any, part: np.ndarray[Any, Any], offset: int) -> None:
        if part.nbytes <= SMALL:
            self.device.write(buffer, part, offset)
            self._gathered += part.nbytes
            if self._gathered >= WINDOW:
                self._flush()
            return
        slot = self._slot()
        slot.write_mapped(part, 0)
        slot.unmap()
        encoder = self.device.gpu.create_command_encoder(label="upload")
        encoder.copy_buffer_to_buffer(slot, 0, buffer, offset, part.nbytes)
        native.submit(self.device.gpu.queue, encoder.finish())
        self.device.counters.writes += 1
        self.device.counters.bytes_written += part.nbytes

    def _slot(self) -> Any:
        """A mapped buffer of the ring: a new one, or that whose copy was submitted first, when it is done."""
        if len(self._ring) < SLOTS:
            self._ring.append(self.device.buffer(PIECE, "upload", "staging", _STAGING))
            self._next = len(self._ring) - 1
        else:
            self._next = (self._next + 1) % SLOTS
        slot = self._ring[self._next]
        slot.map_sync(wgpu.MapMode.WRITE)
        return slot

    def _flush(self) -> None:
        """Submit the queued writes and wait: wgpu's copies of them are freed."""
        native.wait(self.device.gpu, native.submit(self.device.gpu.queue))
        self._gathered = 0

    def finish(self) -> None:
        """Submit what is left. Nothing of the uploads takes host memory any more when it is done."""
        if self._gathered >= SMALL or self._ring:
            self._flush()
        for slot in self._ring:
            self.device.release(slot, "upload")
        self._ring.clear()

    def __enter__(self) -> Upload:
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()


def _advise(view: memoryview, begin: int, end: int, advice: str) -> None:
    """Tell the operating system about bytes of a mapped file; nothing for other memory, or where it takes no advice."""
    mapped, option = view.obj, getattr(mmap, advice, None)
    if begin >= end or option is None or not isinstance(mapped, mmap.mmap):
        return
    base = np.frombuffer(mapped, np.uint8).ctypes.data
    offset = np.frombuffer(view, np.uint8).ctypes.data - base
    first = (offset + begin) // mmap.PAGESIZE * mmap.PAGESIZE  # a page that two pieces share is read again
    mapped.madvise(option, first, offset + end - first)
