"""Attention of the timed graphs against a float64 reference: a fast wrong kernel is worthless."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from executorch_webgpu.backend.graph import Arg
from executorch_webgpu.runtime.gpu.device import Device

from .graphs import AttentionShape, attention_layers

Array = np.ndarray[Any, Any]
TOLERANCE = 2e-4
"""Largest absolute difference; results are about 1/2, inputs are exactly what the reference gets."""
PICKS = 48
"""Result rows that are compared where there are more; the first and the last are always among them."""


class WrongResultError(Exception):
    """A kernel's result differs from the reference."""


def attend(query: Array, key: Array, value: Array, past: int, rows: Sequence[int]) -> Array:
    """Causal attention of one head in float64: softmax(q k^T / sqrt(D)) v over the keys j <= past + i.

    Args:
        query: [S, D]; key, value: [C, D]; rows: which of the S rows.
    Returns:
        [len(rows), D]
    """
    query, key, value = (x.astype(np.float64) for x in (query, key, value))
    results = []
    for i in rows:
        seen = past + i + 1
        scores = key[:seen] @ query[i] / np.sqrt(query.shape[-1])
        weights = np.exp(scores - scores.max())
        results.append(weights @ value[:seen] / weights.sum())
    return np.stack(results)


def layer(query: Array, key: Array, value: Array, past: int) -> Array:
    """All heads of one layer: query [B, S, H, D], key and value [B, C, Hkv, D]; [B, S, H, D]."""
    out = np.empty(query.shape)
    group = query.shape[2] // key.shape[2]
    for b in range(query.shape[0]):
        for h in range(query.shape[2]):
            g = h // group
            out[b, :, h] = attend(query[b, :, h], key[b, :, g], value[b, :, g], past, range(query.shape[1]))
    return out


def _differ(actual: Array, expected: Array, what: str) -> float:
    difference = np.abs(actual - expected)
    worst = float(difference.max()) if np.isfinite(difference).all() else float("inf")
    if not worst <= TOLERANCE:
        raise WrongResultError(
            f"{what}: differs from the float64 reference by up to {worst:.3g}, more than {TOLERANCE}"
        )
    return worst


def verify_small(device: Device, shape: AttentionShape, extra: Mapping[str, Arg] | None = None) -> float:
    """A chain of two layers of a small shape like `shape`, compared as a whole; returns the largest difference.

    Raises:
        WrongResultError: it differs by more than TOLERANCE.
    """
    small = replace(shape, batch=min(shape.batch, 2), rows=min(shape.rows, 70), past=min(shape.past, 150), capacity=0)
    loaded, inputs = attention_layers(device, small, 2, extra)
    try:
        [(_, actual)] = loaded.delegate.execute(inputs)
        expected = loaded.stored("query")
        for number in range(2):
            expected = layer(expected, loaded.stored(f"k{number}"), loaded.stored(f"v{number}"), small.past)
    finally:
        loaded.close()
    return _differ(np.asarray(actual), expected, f"small shape {small.record()}")


def verify_sampled(device: Device, shape: AttentionShape, extra: Mapping[str, Arg] | None = None) -> float:
    """One layer of `shape` itself, PICKS rows of the result compared; returns the largest difference.

    Raises:
        WrongResultError: it differs by more than TOLERANCE.
    """
    loaded, inputs = attention_layers(device, shape, 1, extra)
    try:
        [(_, result)] = loaded.delegate.execute(inputs)
        query, key, value = (loaded.stored(name) for name in ("query", "k0", "v0"))
    finally:
        loaded.close()
    actual = np.asarray(result)
    total = shape.batch * shape.rows * shape.heads
    random = np.random.default_rng(7)
    picks = {0, total - 1, *random.integers(total, size=PICKS - 2).tolist()}
    found, expected = [], []
    for pick in sorted(picks):
        b, s, h = np.unravel_index(pick, (shape.batch, shape.rows, shape.heads))
        g = h // (shape.heads // shape.kv_heads)
        found.append(actual[b, s, h])
        expected.append(attend(query[b, :, h], key[b, :, g], value[b, :, g], shape.past, [int(s)])[0])
    return _differ(np.stack(found), np.stack(expected), f"shape {shape.record()}")
