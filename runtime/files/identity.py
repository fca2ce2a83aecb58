"""Which program is it? What a program's weights have written, keys and values above all, means nothing to other weights
of the same shapes; so a state says whose it is, by this name.

The blobs of the delegates name each weight by SHA-256 of dtype and bytes (`preprocess.content_key`). A digest of the
blobs therefore stands for all weights, and reads none of them: weights in a `.ptd` may be replaced by others only under
other keys, which these blobs do not look for. Other bytes under an old key are a damaged file, which
`integrity.verify_data` finds. Two cases have no such keys. Tensors of operators outside of the delegates, in the
program or in a `.ptd` that may be replaced, count by a sample of their bytes. Random weights in the place of missing
ones depend on the order in which methods were loaded; a program with such weights is another one than that with the
real ones, but two of them are not told apart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

from ...backend.serialize import BACKEND_ID
from ..errors import MissingDataError, ProgramFormatError
from .integrity import stored_values
from .ptd import DataFile
from .pte import Program, TensorMeta

PIECE, PIECES = 256, 64
"""Bytes of each piece of a sample, and how many pieces it has, evenly spread over the tensor."""


def program_identity(program: Program, data_files: Sequence[DataFile] = (), random_weights: bool = False) -> str:
    """A name for a program and its weights: 64 hex digits, equal for equal files, on any device and in any process.

    Constant methods do not count, as they change nothing that others compute. A method that cannot be read counts by
    its name. Reads blobs and samples only: milliseconds for a model of any size.

    Args:
        data_files: where its external weights are.
        random_weights: weights that are in none of the files are made up.
    """
    found = hashlib.sha256()
    for name in sorted(program.method_names):
        try:
            plan = program.plan(name)
        except ProgramFormatError:
            found.update(f"method {name!r} unknown\n".encode())
            continue
        if plan.is_constant:
            continue
        found.update(f"method {name!r}\n".encode())
        for part in plan.delegates:
            if part.id == BACKEND_ID:
                found.update(hashlib.sha256(part.processed).digest())
            else:  # may hold its weights itself, and cannot run here
                found.update(f"{part.id!r} {len(part.processed)}\n".encode())
        for index, value in enumerate(plan.values):
            if isinstance(value, TensorMeta) and value.has_data:
                found.update(f"tensor {index} {value.scalar_type.name} {value.sizes}\n".encode())
                for piece in sample(_data(program, value, data_files)):
                    found.update(piece)
    if random_weights and _lacks_data(program, data_files):
        found.update(b"random weights")
    return found.hexdigest()


def sample(data: memoryview) -> Iterator[memoryview]:
    """Pieces of data, evenly spread, the last bytes among them; all data where that is not more."""
    if len(data) <= PIECE * PIECES:
        yield data
        return
    for number in range(PIECES):
        start = (len(data) - PIECE) * number // (PIECES - 1)
        yield data[start : start + PIECE]


def _data(program: Program, tensor: TensorMeta, data_files: Sequence[DataFile]) -> memoryview:
    """A stored tensor's bytes; none where they are missing, which running it reports."""
    try:
        found = program.tensor_data(tensor, data_files)
    except (MissingDataError, ProgramFormatError):
        found = None
    return memoryview(b"") if found is None else found


def _lacks_data(program: Program, data_files: Sequence[DataFile]) -> bool:
    """Whether weights of delegates are in none of the files."""
    files = (program, *data_files)
    try:
        keys = {value.data for value in stored_values(program) if value.data is not None}
    except ProgramFormatError:
        return True
    return any(not any(key in file for file in files) for key in keys)
