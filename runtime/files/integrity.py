"""Are the weights the ones that were exported? Their keys tell: `preprocess.content_key` names data by SHA-256 of dtype
and bytes. Reading a file for a run does not hash it, which would take longer than the upload."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

from ...backend.graph import Value
from ...backend.serialize import BACKEND_ID, BlobError, deserialize
from ..errors import ProgramFormatError
from .ptd import DataFile
from .pte import Program

_TORCH_NAMES = {
    "f32": "float32", "f16": "float16", "bf16": "bfloat16", "f64": "float64", "i64": "int64", "i32": "int32",
    "u32": "int32", "i16": "int16", "i8": "int8", "u8": "uint8", "bool": "bool",
}  # fmt: skip
_SHOWN = 3


def verify_data(program: Program, data_files: Sequence[DataFile] = ()) -> int:
    """Hash the weights of all delegates.

    Returns:
        How many different data were checked. What other backends and operators outside the delegates use is not.
    Raises:
        ProgramFormatError: some are not what was exported; names the weights and the files that they stand in.
        MissingDataError: some are in none of the files.
    """
    seen: set[str] = set()
    damaged: list[str] = []
    for value in stored_values(program):
        key = value.data
        if key is None or key in seen:
            continue
        seen.add(key)
        data = program.find_named_data(key, data_files)
        first = _TORCH_NAMES[value.dtype]
        names = [first, *sorted({*_TORCH_NAMES.values()} - {first})]
        if not any(_digest(name, data) == key for name in names):
            file = next(file for file in (program, *data_files) if key in file)
            damaged.append(f"{value.name} in {file.label}")
    if damaged:
        more = f" and {len(damaged) - _SHOWN} more" if len(damaged) > _SHOWN else ""
        raise ProgramFormatError(
            f"{len(damaged)} of {len(seen)} weights are damaged: {', '.join(damaged[:_SHOWN])}{more}; copy or export "
            "the file again"
        )
    return len(seen)


def stored_values(program: Program) -> Iterator[Value]:
    """The values with data of all delegates of this package."""
    for plan in program.plans:
        for number, part in enumerate(plan.delegates):
            if part.id != BACKEND_ID:
                continue
            try:
                graph = deserialize(part.processed)
            except BlobError as error:
                raise ProgramFormatError(f"method {plan.name}, delegate {number}: {error}") from error
            yield from (value for value in graph.values if value.data is not None)


def _digest(dtype: str, data: memoryview) -> str:
    found = hashlib.sha256(f"torch.{dtype}".encode())
    found.update(data)
    return found.hexdigest()
