"""Reader of ExecuTorch `.ptd` data files: named data (usually weights) kept outside the program. No torch needed."""

from __future__ import annotations

import enum
import math
import struct
from dataclasses import dataclass

import numpy as np

from ..errors import InputError, ProgramFormatError
from .flatfile import FlatBuffer, SegmentedFile, Source, Table, check_identifier

_IDENTIFIER = b"FT01"
_HEADER_MAGIC = b"FH01"
_HEADER = struct.Struct("<4sIQQQQ")  # magic, length, flatbuffer offset and size, segment base, segment data size
_HEADER_OFFSET = 8
_NEWEST_VERSION = 0


class ScalarType(enum.IntEnum):
    """Element types, numbered as in ExecuTorch and in `torch::ScalarType`."""

    BYTE = 0
    CHAR = 1
    SHORT = 2
    INT = 3
    LONG = 4
    HALF = 5
    FLOAT = 6
    DOUBLE = 7
    COMPLEX32 = 8
    COMPLEX64 = 9
    COMPLEX128 = 10
    BOOL = 11
    QINT8 = 12
    QUINT8 = 13
    QINT32 = 14
    BFLOAT16 = 15
    QUINT4X2 = 16
    QUINT2X4 = 17
    BITS16 = 22
    FLOAT8E5M2 = 23
    FLOAT8E4M3FN = 24
    FLOAT8E5M2FNUZ = 25
    FLOAT8E4M3FNUZ = 26
    UINT16 = 27
    UINT32 = 28
    UINT64 = 29

    @property
    def itemsize(self) -> int:
        """Bytes of one element (one byte for the packed sub-byte types, as in ExecuTorch)."""
        return _ITEMSIZES.get(self.name, 1)

    @property
    def numpy_dtype(self) -> np.dtype[np.generic] | None:
        """The NumPy dtype with the same bits and meaning; None where NumPy has none (bfloat16, float8...)."""
        name = _NUMPY_NAMES.get(self.name)
        return np.dtype(name).newbyteorder("<") if name else None


_NUMPY_NAMES = {
    "BYTE": "uint8", "CHAR": "int8", "SHORT": "int16", "INT": "int32", "LONG": "int64", "HALF": "float16",
    "FLOAT": "float32", "DOUBLE": "float64", "COMPLEX64": "complex64", "COMPLEX128": "complex128", "BOOL": "bool",
    "UINT16": "uint16", "UINT32": "uint32", "UINT64": "uint64",
}  # fmt: skip
_ITEMSIZES = {name: np.dtype(dtype).itemsize for name, dtype in _NUMPY_NAMES.items()}
_ITEMSIZES.update(COMPLEX32=4, QINT32=4, BFLOAT16=2, BITS16=2)


@dataclass(frozen=True)
class TensorLayout:
    """How the bytes of a named tensor are to be read. `dim_order` lists the dimensions from outer to inner."""

    scalar_type: ScalarType
    sizes: tuple[int, ...]
    dim_order: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The bytes that a tensor of this layout takes."""
        return math.prod(self.sizes) * self.scalar_type.itemsize


def read_layout(table: Table, slots: tuple[int, int, int], what: str) -> TensorLayout:
    """Reads and checks scalar type, sizes and dim order from the given slots of `table`."""
    number = table.integer(slots[0], "b")
    try:
        scalar_type = ScalarType(number)
    except ValueError:
        raise table.error(f"{what} has the unknown scalar type {number}") from None
    sizes = table.numbers(slots[1], "i")
    dim_order = table.numbers(slots[2], "B")
    if sizes and min(sizes) < 0:
        raise table.error(f"{what} has the negative size {min(sizes)} in {list(sizes)}")
    straight = tuple(range(len(sizes)))
    if dim_order != straight and tuple(sorted(dim_order)) != straight:
        raise table.error(f"{what} of rank {len(sizes)} has the impossible dim order {list(dim_order)}")
    return TensorLayout(scalar_type, sizes, dim_order)


class DataFile(SegmentedFile):
    """An open `.ptd` file. Opening maps it; data are read-only memoryviews into the map."""

    _kind = "data file"

    def __init__(self, source: Source) -> None:
        """Opens a path, the bytes of a file, or a binary file object (read from its beginning)."""
        super().__init__(source)
        view, label = self._view, self.label
        check_identifier(view, _IDENTIFIER, ".ptd", label)
        if self.nbytes < _HEADER_OFFSET + _HEADER.size:
            raise ProgramFormatError(f"{label}: truncated inside the header: the file has {self.nbytes} bytes")
        magic, length, flat_offset, flat_size, base, size = _HEADER.unpack_from(view, _HEADER_OFFSET)
        if magic != _HEADER_MAGIC or length < _HEADER.size:
            raise ProgramFormatError(
                f"{label}: wrong header {magic!r} of {length} bytes, expected {_HEADER_MAGIC!r} of {_HEADER.size}"
            )
        self._check_metadata_end(flat_offset + flat_size)
        root = FlatBuffer(view, flat_offset + flat_size, label).root()
        self.version = root.integer(0, "I")
        if self.version > _NEWEST_VERSION:
            raise ProgramFormatError(
                f"{label}: schema version {self.version} is newer than this reader knows ({_NEWEST_VERSION}); "
                "update executorch-webgpu"
            )
        self._load_segments(root.tables(1), base, size)
        self._layouts: dict[str, TensorLayout] = {}
        for entry in root.tables(2):
            self._load_entry(entry)

    def _load_entry(self, entry: Table) -> None:
        key = entry.string(0) or ""
        index = self._check_segment(entry.integer(1, "I"), f"named data {key!r}")
        self._segment_of[key] = index
        table = entry.table(2)
        if table is None:
            return
        layout = read_layout(table, (0, 1, 2), f"tensor {key!r}")
        if layout.nbytes > self.segments[index].size:
            raise ProgramFormatError(
                f"{self.label}: tensor {key!r} of sizes {list(layout.sizes)} needs {layout.nbytes} bytes "
                f"but its segment {index} has {self.segments[index].size}"
            )
        self._layouts[key] = layout

    def layout(self, key: str) -> TensorLayout | None:
        """The tensor layout stored with `key`, or None when the data are opaque bytes."""
        if key not in self:
            self.named_data(key)  # raises the error that says so
        return self._layouts.get(key)

    def array(self, key: str) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
        """The tensor stored under `key` as a read-only NumPy array over the map; `InputError` where NumPy cannot."""
        layout = self.layout(key)
        dtype = layout.scalar_type.numpy_dtype if layout else None
        if layout is None or dtype is None:
            kind = layout.scalar_type.name if layout else "opaque bytes"
            raise InputError(f"{self.label}: {key!r} is {kind}, which NumPy has no dtype for; use named_data()")
        flat = np.frombuffer(self.named_data(key), dtype, math.prod(layout.sizes))
        # Memory is in dim_order; undo that permutation to index by dimension number.
        stored = flat.reshape([layout.sizes[d] for d in layout.dim_order])
        return stored.transpose(np.argsort(layout.dim_order)) if layout.sizes else stored
