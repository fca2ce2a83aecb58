"""Data files of random weights: what a program lacks, written as an ExecuTorch `.ptd` file.

The layout is that of ExecuTorch's `extension/flat_tensor`: a flatbuffer in which a header ("FH01", its length, how far
it moved the flatbuffer, the flatbuffer's size, offset and size of the segments) is inserted behind the identifier,
then a segment for each tensor.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from pathlib import Path

import flatbuffers
import numpy as np

from executorch_webgpu.backend.serialize import deserialize
from executorch_webgpu.runtime.files.pte import Program as ProgramFile
from executorch_webgpu.runtime.gpu.upload import stored_bytes

ALIGNMENT = 4096
PIECE = 32 << 20
_HEADER = struct.Struct("<4sIQQQQ")
_PADDED = 48
"""Bytes that the header takes: a multiple of a flatbuffer's alignment, 16."""


def missing(program: Path) -> dict[str, int]:
    """Bytes of each constant of a program's delegates whose data are not in the program file, by key."""
    file, found = ProgramFile(program), dict[str, int]()
    for plan in file.plans:
        for delegate in plan.delegates:
            for value in deserialize(delegate.processed).values:
                if value.kind == "constant" and value.alias is None and value.data and value.data not in file:
                    found[value.data] = stored_bytes(value)
    return found


def finite(random: np.random.Generator, size: int) -> bytes:
    """`size` random bytes that are finite numbers below 2 as float16, bfloat16 and float32."""
    words = random.integers(0, 1 << 16, -(-size // 2), np.uint16) & np.uint16(0xBFFF)
    return words.tobytes()[:size]


def write(path: Path, sizes: Mapping[str, int]) -> int:
    """Write a `.ptd` file with random content for each key; returns the file's bytes."""
    places, end = [], 0
    for size in sizes.values():
        places.append((end, size))
        end = -(-(end + size) // ALIGNMENT) * ALIGNMENT
    metadata = _metadata(list(sizes), places)
    base = -(-(_PADDED + len(metadata)) // ALIGNMENT) * ALIGNMENT
    header = _HEADER.pack(b"FH01", _HEADER.size, _PADDED, len(metadata), base, end).ljust(_PADDED, b"\0")
    root = struct.pack("<I", struct.unpack_from("<I", metadata)[0] + _PADDED)
    random = np.random.default_rng(0)
    with path.open("wb") as out:
        out.write(root + metadata[4:8] + header + metadata[8:])
        for begin, size in places:
            out.seek(base + begin)
            for at in range(0, size, PIECE):
                out.write(finite(random, min(PIECE, size - at)))
        out.truncate(base + end)
        out.flush()
        os.fsync(out.fileno())
    return base + end


def _metadata(keys: list[str], places: list[tuple[int, int]]) -> bytes:
    """The flatbuffer `FlatTensor`: version, segments (offset, size), named data (key, number of the segment)."""
    builder = flatbuffers.Builder(1024)
    segments = []
    for begin, size in places:
        builder.StartObject(2)
        builder.PrependUint64Slot(0, begin, 0)
        builder.PrependUint64Slot(1, size, 0)
        segments.append(builder.EndObject())
    named = []
    for number, text in enumerate([builder.CreateString(key) for key in keys]):
        builder.StartObject(3)
        builder.PrependUOffsetTRelativeSlot(0, text, 0)
        builder.PrependUint32Slot(1, number, 0)
        named.append(builder.EndObject())
    vectors = []
    for tables in (segments, named):
        builder.StartVector(4, len(tables), 4)
        for table in reversed(tables):
            builder.PrependUOffsetTRelative(table)
        vectors.append(builder.EndVector())
    builder.StartObject(3)
    for slot, vector in enumerate(vectors, 1):
        builder.PrependUOffsetTRelativeSlot(slot, vector, 0)
    builder.Finish(builder.EndObject(), b"FT01")
    return bytes(builder.Output())
