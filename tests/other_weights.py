"""A program of the same shapes with other weights, made from the bytes of one: what an export of it would give."""

from __future__ import annotations

import hashlib

import numpy as np

from executorch_webgpu.runtime.files.integrity import stored_values
from executorch_webgpu.runtime.files.pte import Program


def with_other_weights(pte: bytes) -> bytes:
    """The program whose largest weight, of f32, has its elements in reverse order, under the key that names them."""
    program = Program(pte)
    constants = [value for value in stored_values(program) if value.kind == "constant" and value.dtype == "f32"]
    key, old = max(
        ((value.data or "", bytes(program.find_named_data(value.data or ""))) for value in constants),
        key=lambda item: len(item[1]),
    )
    new = np.frombuffer(old, np.float32)[::-1].tobytes()
    assert new != old
    assert pte.count(old) == 1
    name = hashlib.sha256(b"torch.float32" + new).hexdigest()
    return pte.replace(old, new).replace(key.encode(), name.encode())
