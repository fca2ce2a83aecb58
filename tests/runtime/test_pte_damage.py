"""Damaged, foreign and hostile `.pte` and `.ptd` files: every one is refused, and only with errors of this package."""

import random
import struct

import pytest

from executorch_webgpu.runtime.errors import InputError, MissingDataError, ProgramFormatError, WebGPUDelegateError
from executorch_webgpu.runtime.files import pte
from executorch_webgpu.runtime.files.flatfile import FlatBuffer
from tests.runtime.programs import BUILDERS

_HEADER_END = 40


def test_foreign_files(programs, ptd_path, tmp_path):
    with pytest.raises(ProgramFormatError, match=r"wrong file identifier b'FT01', expected b'ET12'.*data file, \.ptd"):
        pte.Program(ptd_path)
    with pytest.raises(ProgramFormatError, match=r"wrong file identifier b'ET12', expected b'FT01'.*program, \.pte"):
        pte.DataFile(programs["bare"])
    with pytest.raises(ProgramFormatError, match=r"is this a \.pte\?$"):
        pte.Program(b"PK\3\4" * 10)
    empty = tmp_path / "empty.pte"
    empty.touch()
    with pytest.raises(ProgramFormatError, match=r"empty\.pte: truncated: the file has 0 bytes"):
        pte.Program(empty)


def test_truncation_names_the_segment(programs):
    content = programs["delegate"].read_bytes()
    last = len(pte.Program(content).segments) - 1
    with pytest.raises(
        ProgramFormatError, match=rf"truncated: segment {last} ends at byte {len(content)} but the file"
    ):
        pte.Program(content[:-1])


def test_segments_need_the_header(programs):
    content = bytearray(programs["delegate"].read_bytes())
    content[8:12] = b"none"
    with pytest.raises(ProgramFormatError, match="segments but no b'eh00' header"):
        pte.Program(content)


def _use_everything(reader, content):
    """Reads all there is; True if nothing complained. Only errors of this package may come out."""
    try:
        with reader(content) as file:
            _ = list(map(file.named_data, file.keys()))
            for plan in file.plans if reader is pte.Program else ():
                for value in plan.values:
                    if isinstance(value, pte.TensorMeta) and not value.is_external:
                        file.tensor_data(value)
    except ProgramFormatError:
        return False
    return True


@pytest.mark.parametrize("name", BUILDERS)
def test_every_truncation_is_reported(programs, name):
    content = programs[name].read_bytes()
    program = pte.Program(content)
    ends = {segment.offset + cut for segment in program.segments for cut in (0, 1, segment.size - 1)}
    ends |= set(range(min(len(content), 200))) | set(range(0, len(content), max(1, len(content) // 300)))
    for end in sorted(e for e in ends if 0 <= e < len(content)):
        # A program without segments has no record of its size, so cuts behind the last table may pass.
        assert not _use_everything(pte.Program, content[:end]) or not program.segments, end


def _damage(content, rng):
    damaged = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 4])):
        at = rng.randrange(len(damaged) - 8)
        if rng.random() < 0.5:
            damaged[at] ^= 1 << rng.randrange(8)
        else:
            value = rng.choice([0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 0x80000000, len(content), at, rng.getrandbits(32)])
            damaged[at : at + 4] = struct.pack("<I", value)
    return bytes(damaged)


@pytest.mark.parametrize("name", BUILDERS)
def test_flipped_bytes_never_escape(programs, name):
    content = programs[name].read_bytes()
    rng = random.Random(name)
    outcomes = [_use_everything(pte.Program, _damage(content, rng)) for _ in range(1500)]
    assert not all(outcomes)


def test_damaged_data_file(ptd_path):
    content = ptd_path.read_bytes()
    rng = random.Random(1)
    assert not all(_use_everything(pte.DataFile, _damage(content, rng)) for _ in range(1500))
    for end in range(0, len(content), 7):
        assert not _use_everything(pte.DataFile, content[:end])


def test_each_header_byte_changed(programs):
    content = bytearray(programs["delegate"].read_bytes())
    for at in range(_HEADER_END):
        for value in (0, 0x7F, 0xFF):
            damaged = bytearray(content)
            damaged[at] = value
            _use_everything(pte.Program, damaged)


def test_tables_shared_beyond_reason_are_refused():
    """Lists of lists that all lead to the same table would cost the product of their lengths."""
    count = 3000
    # root table at 8 with one field: a list whose items all refer to the leaf table at the end
    data = bytearray(struct.pack("<I4s", 16, b"ET12") + struct.pack("<HHHH", 6, 8, 4, 0))
    data += struct.pack("<iI", 8, 4) + struct.pack("<I", count)
    start = len(data)
    leaf = start + 4 * count
    data += b"".join(struct.pack("<I", leaf - (start + 4 * i)) for i in range(count))
    data += struct.pack("<iI", leaf - 8, 0)
    root = FlatBuffer(memoryview(data), len(data), "x").root()
    assert len(root.tables(0)) == count
    with pytest.raises(ProgramFormatError, match="refer to each other more often"):
        _ = [root.tables(0) for _ in range(50)]


def test_newer_schema_version_is_refused(programs):
    content = bytearray(programs["methods"].read_bytes())
    root = struct.unpack_from("<I", content)[0]
    vtable = root - struct.unpack_from("<i", content, root)[0]
    slot = struct.unpack_from("<H", content, vtable + 4)[0]
    if not slot:  # version 0 is the default and so not stored: point it at a nonzero field (the list of methods)
        struct.pack_into("<H", content, vtable + 4, struct.unpack_from("<H", content, vtable + 6)[0])
    else:
        struct.pack_into("<I", content, root + slot, 9)
    with pytest.raises(ProgramFormatError, match="newer than this reader knows"):
        pte.Program(content)


def test_every_error_is_a_delegate_error():
    assert issubclass(ProgramFormatError, WebGPUDelegateError)
    assert issubclass(MissingDataError, WebGPUDelegateError)
    assert issubclass(InputError, ValueError)
