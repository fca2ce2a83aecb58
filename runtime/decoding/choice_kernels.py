"""The kernels of a choice: which dispatches each kind takes, and a row's settings as the kernels read them.

See `chooser.py` for what they do together.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence

from ... import wgsl
from ...ops.base import Dispatch, Param
from ..errors import InputError
from .sampling import Sampling

HISTOGRAM = 2048 * 3
"""Words of a histogram: 2,048 bins of count and mass (two words)."""
_NOT_NOW = 0xFFFFFFFF
_SHIFTS = (21, 10, 0)
_SMALLEST, _LARGEST = 1e-30, 1e30
"""Temperatures and penalties beyond are no different in float32."""
_NO_WEIGHT = -1e30
"""Logarithm of a weight that counts as 0: NO_WEIGHT of choose_weights.wgsl."""

_PARTS = {
    "choose_argmax": ("choose_keys",),
    "choose_greedy": ("choose_keys", "choose_outputs"),
    "choose_level": ("philox", "choose_keys", "choose_weights", "choose_search"),
    "choose_sums": ("philox", "choose_keys", "choose_weights", "choose_search"),
    "choose_draw": ("philox", "choose_keys", "choose_weights", "choose_outputs"),
}
"""Kernel -> files without an entry point that are appended to it."""


ROUNDING = {"f32": "choose_round_f32", "f16": "choose_round_f16", "bf16": "choose_round_bf16"}
"""Dtype of a program's logits -> the file that rounds to it, which `choose_argmax` needs as well."""


def choice_dispatch(
    kernel: str, params: Mapping[str, Param], grid: tuple[int, int, int], types: Mapping[str, str] | None = None,
    parts: Sequence[str] = (),
) -> Dispatch:  # fmt: skip
    body = "\n".join(wgsl.source(part) for part in (*_PARTS[kernel], *parts))
    return Dispatch(kernel, {}, params, grid, types=types or {}, body=body)


def search_levels(histograms: int) -> dict[str, list[dict[str, Param]]]:
    """Kind of choice -> what the search does in each of its dispatches; the last is that of `choose_sums`."""
    where = [histograms + i * HISTOGRAM for i in range(5)]

    def step(
        k: tuple[int, int] | None, p: tuple[int, int] | None, out: tuple[int, int] | None, after_k: bool = False
    ) -> dict[str, Param]:
        """`k`, `p`: (histogram, level) to find a digit from; `out`: (histogram, level) to count for."""
        fields: dict[str, Param] = {
            "k_histogram": where[k[0]] if k else _NOT_NOW,
            "k_shift": _SHIFTS[k[1]] if k else 0,
            "p_histogram": where[p[0]] if p else _NOT_NOW,
            "p_shift": _SHIFTS[p[1]] if p else 0,
            "p_first": int(p is not None and p[1] == 0 and not after_k),
            "p_after_k": int(after_k),
        }
        if out is not None:
            level = out[1]
            fields |= {
                "out_histogram": where[out[0]],
                "out_shift": _SHIFTS[level],
                "out_digits": (2047, 2047, 1023)[level],
                "out_mask": (0, 0xFFE00000, 0xFFFFFC00)[level],
                "out_p": int(p is not None),
            }
        return fields

    begin = step(None, None, (0, 0))
    top_k = [begin, step((0, 0), None, (1, 1)), step((1, 1), None, (2, 2))]
    return {
        "plain": [step(None, None, None)],
        "top-k": [*top_k, step((2, 2), None, None)],
        "top-p": [
            begin,
            step(None, (0, 0), (1, 1)),
            step(None, (1, 1), (2, 2)),
            step(None, (2, 2), None),
        ],
        "both": [
            *top_k,
            step((2, 2), (0, 0), (3, 1), after_k=True),
            step(None, (3, 1), (4, 2)),
            step(None, (4, 2), None),
        ],
    }


def pack_settings(sampling: Sampling, seed: int, stream: int) -> bytes:
    """A row's settings, 8 words: 1 / temperature (0: greedy), top-k, top-p in units of 2**-32 (0: off), logarithm of
    min-p, penalty, seed (low, high), stream.

    Raises:
        InputError: the seed is out of range.
    """
    key = seed if sampling.seed is None else sampling.seed
    if not 0 <= key < 2**64:
        raise InputError(f"seed is {key}, expected an integer in [0, 2**64)")
    penalty = min(max(sampling.repetition_penalty, _SMALLEST), _LARGEST)
    if sampling.greedy:
        return struct.pack("<fIIffQI", 0.0, 0, 0, _NO_WEIGHT, penalty, key, stream)
    inverse = 1.0 / min(max(sampling.temperature, _SMALLEST), _LARGEST)
    kept = min(sampling.top_k, 0xFFFFFFFF)
    portion = 0 if sampling.top_p >= 1 else max(int(sampling.top_p * 2**32), 1)
    least = math.log(sampling.min_p) if sampling.min_p else _NO_WEIGHT
    return struct.pack("<fIIffQI", inverse, kept, portion, least, penalty, key, stream)
