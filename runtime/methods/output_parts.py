"""What a step reads back: the bytes of one output among all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..gpu.host import from_storage

HostArray = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class OutputPart:
    """The bytes `start` to `end` of an output's buffer, and where they stand among all that is read back."""

    dtype: str
    kind: str
    shape: tuple[int, ...]
    buffer: Any
    start: int
    end: int
    offset: int

    @property
    def first(self) -> int:
        """Where the copy begins: copies are in units of 4 bytes."""
        return self.start // 4 * 4

    @property
    def size(self) -> int:
        """Bytes copied."""
        return -(-self.end // 4) * 4 - self.first

    def read(self, data: memoryview) -> HostArray:
        """The output, from all that was read back."""
        begin = self.offset + self.start - self.first
        return from_storage(self.dtype, data[begin : begin + self.end - self.start], self.kind, self.shape)
