"""What `.pte` and `.ptd` files share: opening without copying, a bounds-checked FlatBuffer cursor, segments.

Both formats are a FlatBuffer with a small header spliced in after its identifier, followed by data segments. Only the
FlatBuffer is parsed; segments are handed out as read-only memoryviews into the mapped file.
"""

from __future__ import annotations

import contextlib
import io
import mmap
import os
import struct
from typing import Any, BinaryIO, NamedTuple, TypeVar

from ..errors import InputError, MissingDataError, ProgramFormatError

Source = str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO
"""What a file can be opened from: a path, its bytes, or a binary file object (read from its beginning)."""

_KNOWN_IDENTIFIERS = {
    b"ET12": "an ExecuTorch program, .pte",
    b"FT01": "an ExecuTorch data file, .ptd",
    b"BP08": "an ExecuTorch bundled program, .bpte: extract its .pte first",
}

_U16 = struct.Struct("<H")
_I32 = struct.Struct("<i")
_U32 = struct.Struct("<I")
_SCALARS = {code: struct.Struct("<" + code) for code in "?bBhHiIqQd"}


# ---- opening ----


def _as_bytes_view(data: bytes | bytearray | memoryview) -> memoryview:
    try:
        return memoryview(data).toreadonly().cast("B")
    except TypeError as error:
        raise InputError(f"the buffer must be contiguous bytes ({error})") from error


def _map_fd(fd: int) -> mmap.mmap | None:
    # mmap refuses empty files; the caller reports those as truncated.
    return mmap.mmap(fd, 0, access=mmap.ACCESS_READ) if os.fstat(fd).st_size else None


def _open_file_object(file: Any) -> tuple[memoryview, mmap.mmap | None]:
    file = getattr(file, "file", file)  # tempfile wraps the real file object
    if isinstance(file, io.TextIOBase) or not hasattr(file, "read"):
        raise InputError(f"expected a path, bytes or a binary file object, got {type(file).__name__}")
    if isinstance(file, io.BytesIO):
        return file.getbuffer().toreadonly(), None
    # Only a plain file may be mapped: gzip objects also have a fileno(), of the compressed file.
    if isinstance(getattr(file, "raw", file), io.FileIO):
        if file.writable():
            file.flush()
        mapped = _map_fd(file.fileno())
        return (memoryview(mapped) if mapped else memoryview(b"")), mapped
    if file.seekable():
        file.seek(0)
    return _as_bytes_view(file.read()), None


def open_source(source: Source) -> tuple[memoryview, mmap.mmap | None, str]:
    """Returns a read-only byte view of `source`, the memory map behind it if there is one, and a label for messages."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _as_bytes_view(source), None, "<bytes>"
    if isinstance(source, (str, os.PathLike)):
        with open(source, "rb") as file:
            view, mapped = _open_file_object(file)
        return view, mapped, str(os.fspath(source))
    view, mapped = _open_file_object(source)
    return view, mapped, str(getattr(source, "name", "<file>"))


def check_identifier(view: memoryview, expected: bytes, extension: str, label: str) -> None:
    """Raises `ProgramFormatError` unless the file starts like a FlatBuffer with the `expected` identifier."""
    if len(view) < 8:
        raise ProgramFormatError(f"{label}: truncated: the file has {len(view)} bytes, too few for a {extension} file")
    found = bytes(view[4:8])
    if found == expected:
        return
    hint = _KNOWN_IDENTIFIERS.get(found)
    found_is = f" (this looks like {hint})" if hint else ""
    raise ProgramFormatError(
        f"{label}: wrong file identifier {found!r}, expected {expected!r}; is this a {extension}?{found_is}"
    )


# ---- the FlatBuffer cursor ----


class FlatBuffer:
    """A FlatBuffer in the first `end` bytes of `view`; every read is checked against `end`."""

    __slots__ = ("_budget", "end", "label", "view", "vtables")

    def __init__(self, view: memoryview, end: int, label: str) -> None:
        self.view = view
        self.end = end
        self.label = label
        self.vtables: dict[int, tuple[int, ...]] = {}
        # A hostile file can reach one table by many paths and so cost far more than its size. Honest files hardly
        # share anything, so what has been read may not exceed a small multiple of the file.
        self._budget = 4 * end + 65536

    def error(self, message: str) -> ProgramFormatError:
        """Makes the error to raise for this file."""
        return ProgramFormatError(f"{self.label}: {message}; the file is damaged, copy or export it again")

    def spend(self, cost: int) -> None:
        """Counts `cost` bytes of work against the limit that keeps hostile files from costing more than they weigh."""
        self._budget -= cost
        if self._budget < 0:
            raise self.error(f"corrupt: its tables refer to each other more often than its {self.end} bytes allow")

    def read(self, code: struct.Struct, pos: int) -> Any:
        """Reads one scalar at byte `pos`."""
        # unpack_from takes negative positions as counted from the end, so test both sides.
        if 0 <= pos <= self.end - code.size:
            return code.unpack_from(self.view, pos)[0]
        raise self.error(f"corrupt: a reference leads to byte {pos}, outside the {self.end} bytes of metadata")

    def root(self) -> Table:
        """The root table."""
        return Table(self, int(self.read(_U32, 0)))

    def vtable(self, pos: int) -> tuple[int, ...]:
        """The field offsets of the vtable at `pos` (many tables share one, so they are kept)."""
        fields = self.vtables.get(pos)
        if fields is None:
            size = self.read(_U16, pos)
            # The table size in the second word is not used: the Python builder shares vtables that differ in it only.
            if size < 4 or size % 2 or pos + size > self.end:
                raise self.error(f"corrupt: the field list at byte {pos} has the impossible size {size}")
            fields = struct.unpack_from(f"<{size // 2 - 2}H", self.view, pos + 4)
            self.vtables[pos] = fields
        return fields

    def vector(self, pos: int, item_size: int) -> tuple[int, int]:
        """Follows the reference at `pos` to a vector; returns the position of its items and their count."""
        start = pos + self.read(_U32, pos)
        count = self.read(_U32, start)
        if start + 4 + count * item_size > self.end:
            raise self.error(f"corrupt: the list of {count} items at byte {start} does not fit in {self.end} bytes")
        return start + 4, count


class Table:
    """One FlatBuffer table: typed access to its fields by slot number. Absent fields read as their default."""

    __slots__ = ("_fields", "_flat", "_pos")

    def __init__(self, flat: FlatBuffer, pos: int) -> None:
        vtable = pos - flat.read(_I32, pos)
        self._flat = flat
        self._pos = pos
        self._fields = flat.vtables.get(vtable) or flat.vtable(vtable)

    def _field(self, slot: int) -> int:
        """The position of field `slot`, or 0 if it is absent."""
        fields = self._fields
        offset = fields[slot] if slot < len(fields) else 0
        return self._pos + offset if offset else 0

    def integer(self, slot: int, code: str = "i") -> int:
        """An integer field of the given struct code; 0 if absent."""
        pos = self._field(slot)
        return int(self._flat.read(_SCALARS[code], pos)) if pos else 0

    def boolean(self, slot: int) -> bool:
        """A boolean field; False if absent."""
        return self.integer(slot, "B") != 0

    def double(self, slot: int) -> float:
        """A double field; 0.0 if absent."""
        pos = self._field(slot)
        return float(self._flat.read(_SCALARS["d"], pos)) if pos else 0.0

    def table(self, slot: int) -> Table | None:
        """A sub-table; None if absent."""
        flat, pos = self._flat, self._field(slot)
        if not pos:
            return None
        flat.spend(8)
        return Table(flat, pos + flat.read(_U32, pos))

    def tables(self, slot: int) -> list[Table]:
        """A list of tables; empty if absent."""
        flat, pos = self._flat, self._field(slot)
        if not pos:
            return []
        start, count = flat.vector(pos, 4)
        flat.spend(12 * count)
        offsets = struct.unpack_from(f"<{count}I", flat.view, start)
        return [Table(flat, start + 4 * i + offset) for i, offset in enumerate(offsets)]

    def numbers(self, slot: int, code: str) -> tuple[Any, ...]:
        """A list of scalars of the given struct code; empty if absent."""
        flat, pos = self._flat, self._field(slot)
        if not pos:
            return ()
        size = _SCALARS[code].size
        start, count = flat.vector(pos, size)
        flat.spend(size * count)
        return struct.unpack_from(f"<{count}{code}", flat.view, start)

    def view(self, slot: int) -> memoryview:
        """A list of bytes, not copied; empty if absent."""
        flat, pos = self._flat, self._field(slot)
        if not pos:
            return flat.view[:0]
        start, count = flat.vector(pos, 1)
        return flat.view[start : start + count]

    def string(self, slot: int) -> str | None:
        """A string; None if absent."""
        flat, pos = self._flat, self._field(slot)
        if not pos:
            return None
        start, count = flat.vector(pos, 1)
        flat.spend(count)
        try:
            return str(flat.view[start : start + count], "utf-8")
        except UnicodeDecodeError as error:
            raise flat.error(f"corrupt: the text at byte {start} is not UTF-8 ({error})") from error

    def error(self, message: str) -> ProgramFormatError:
        """Makes the error to raise for this file."""
        return self._flat.error(message)


# ---- segments ----


class Segment(NamedTuple):  # a tuple: a big model has hundreds, and opening makes them all
    """A stretch of the file: absolute byte offset and size."""

    offset: int
    size: int


_Self = TypeVar("_Self", bound="SegmentedFile")


class SegmentedFile:
    """An open file made of metadata and data segments. Base of `Program` and `DataFile`; also a context manager."""

    _kind = "file"

    def __init__(self, source: Source) -> None:
        self._view, self._map, self.label = open_source(source)
        self._closed = False
        self.segments: tuple[Segment, ...] = ()
        self._segment_of: dict[str, int] = {}

    @property
    def nbytes(self) -> int:
        """The size of the whole file in bytes."""
        return len(self._view)

    def _check_metadata_end(self, end: int) -> None:
        if not 8 <= end <= self.nbytes:
            raise ProgramFormatError(
                f"{self.label}: truncated: the metadata ends at byte {end} but the file has {self.nbytes} bytes; "
                "copy or download it again"
            )

    def _load_segments(self, tables: list[Table], base: int, data_size: int) -> None:
        """Places the segments, which the header says take `data_size` bytes from byte `base`, and checks their ends."""
        segments = []
        size = self.nbytes
        for i, table in enumerate(tables):
            segment = Segment(base + table.integer(0, "Q"), table.integer(1, "Q"))
            end = segment.offset + segment.size
            if end > size:
                raise ProgramFormatError(
                    f"{self.label}: truncated: segment {i} ends at byte {end} but the file has {size} bytes; "
                    "copy or download it again"
                )
            segments.append(segment)
        if base + data_size > size:
            raise ProgramFormatError(
                f"{self.label}: truncated: the segments end at byte {base + data_size} "
                f"but the file has {size} bytes; copy or download it again"
            )
        self.segments = tuple(segments)

    def _check_segment(self, index: int, user: str) -> int:
        if index >= len(self.segments):
            raise ProgramFormatError(
                f"{self.label}: {user} refers to segment {index} but the file has {len(self.segments)} segments"
            )
        return index

    def segment(self, index: int) -> memoryview:
        """The bytes of one segment, not copied."""
        self._check_open()
        if not 0 <= index < len(self.segments):
            raise InputError(f"{self.label}: no segment {index}, the {self._kind} has {len(self.segments)}")
        segment = self.segments[index]
        return self._view[segment.offset : segment.offset + segment.size]

    def keys(self) -> tuple[str, ...]:
        """The keys of the named data in this file, in file order."""
        return tuple(self._segment_of)

    def __contains__(self, key: object) -> bool:
        return key in self._segment_of

    def named_data(self, key: str) -> memoryview:
        """The bytes stored under `key`, not copied; `MissingDataError` if this file has no such key."""
        index = self._segment_of.get(key)
        if index is None:
            have = ", ".join(repr(k) for k in self.keys()[:3]) or "none"
            raise MissingDataError(
                f"{self.label}: no data named {key!r} in this {self._kind}; it has {len(self._segment_of)} keys: {have}"
                f"{', ...' if len(self._segment_of) > 3 else ''}. Weights exported outside the program are in a "
                ".ptd file: pass the one written by the same export"
            )
        return self.segment(index)

    def _check_open(self) -> None:
        if self._closed:
            raise InputError(f"{self.label}: the {self._kind} is closed")

    @property
    def closed(self) -> bool:
        """True once `close` was called."""
        return self._closed

    def close(self) -> None:
        """Gives the file back; may be called twice. Views handed out stay valid and keep the map until they go."""
        self._closed = True
        mapped, self._map = self._map, None
        self._view = memoryview(b"")
        if mapped is not None:
            # BufferError: a view is still in use, and the last one to go frees the map.
            with contextlib.suppress(BufferError):
                mapped.close()

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
