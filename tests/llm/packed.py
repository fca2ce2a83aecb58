"""Cases of `executorch_webgpu::group_query_attention` with caches of packed integers: the codes and scales that numpy
finds in float64, and calls on a test device with any attention route."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from executorch_webgpu.backend.graph import Graph
from tests.llm.cases import Array, Case, normed, turned
from tests.llm.records import CACHES, Compiled, array

DTYPES = {"int8": torch.int8, "int4": torch.uint8}
"""Name of a kind of cache -> dtype of its tensor."""
SCALES = ("key_scales", "value_scales")


def transform(size: int) -> Array:
    """The orthonormal Hadamard matrix, element by element from its definition."""
    signs = [[-1.0 if (i & j).bit_count() % 2 else 1.0 for j in range(size)] for i in range(size)]
    return np.array(signs) / np.sqrt(size)


def codes_of(x: Array, kind: str) -> tuple[Array, Array]:
    """Vectors x [..., D] as codes [..., D] and scales [..., 1], float64 (scales as float32 holds them)."""
    if kind == "int8":
        scales = np.float64(np.float32(np.abs(x).max(-1, keepdims=True) / 127))
        return np.rint(x / np.where(scales == 0, 1, scales)), scales
    y = x @ transform(x.shape[-1])
    above, below = (np.maximum(part.max(-1, keepdims=True), 0) for part in (y, -y))
    # the least positive scale with which no code is beyond -8 and 7, and the least negative one
    plus, minus = np.maximum(above / 7, below / 8), np.maximum(above / 8, below / 7)
    scales = np.float64(np.float32(np.where(plus <= minus, plus, -minus)))
    return np.rint(y / np.where(scales == 0, 1, scales)), scales


def stored(codes: Array, kind: str) -> Array:
    """Codes as the bytes of a cache."""
    if kind == "int8":
        return codes.astype(np.int8)
    low, high = codes[..., ::2].astype(np.int64) & 15, codes[..., 1::2].astype(np.int64) & 15
    return (low + 16 * high).astype(np.uint8)


def codes_in(cache: Array, kind: str) -> Array:
    """The codes that a cache's bytes hold, float64."""
    if kind == "int8":
        return cache.astype(np.float64)
    both = np.stack([cache & 15, cache >> 4], -1).astype(np.float64)
    both = both.reshape(*cache.shape[:-1], 2 * cache.shape[-1])
    return np.where(both > 7, both - 16, both)


def numbers(cache: Array, scales: Array, kind: str) -> Array:
    """What a cache stands for, float64."""
    x = codes_in(cache, kind) * scales.astype(np.float64)
    return x @ transform(x.shape[-1]) if kind == "int4" else x


def packed(given: dict[str, Any], kind: str) -> dict[str, Any]:
    """The arguments with packed caches of the same content."""
    made = dict(given)
    for cache, scales in zip(CACHES, SCALES, strict=True):
        codes, found = codes_of(given[cache].double().numpy(), kind)
        made[cache] = torch.from_numpy(stored(codes, kind))
        made[scales] = torch.from_numpy(found.astype(np.float32))
    return made


def tokens(case: Case, given: dict[str, Any]) -> dict[str, Array]:
    """The keys and values that are quantised, float64 [B, S, Hkv, D], after norm and rotary embedding."""
    tensors = {n: t.double().numpy() for n, t in given.items() if isinstance(t, torch.Tensor) and t.is_floating_point()}
    shapes = ((case.heads, case.d), (case.kv_heads, case.d), (case.kv_heads, case.v_size))
    if case.packed:
        parts = np.split(tensors["query"], np.cumsum([n * size for n, size in shapes])[:-1], axis=2)
    else:
        parts = [tensors[name] for name in ("query", "key", "value")]
    _, key, value = (p.reshape(case.batch, -1, *shape) for p, shape in zip(parts, shapes, strict=True))
    made = key.copy()
    for b, (past, new) in enumerate(zip(case.past, case.counts, strict=True)):
        for s in range(new):
            for h in range(case.kv_heads):
                made[b, s, h] = turned(case, normed(case, key[b, s, h], tensors.get("k_norm")), tensors, past + s)
    return {"key_cache": made, "value_cache": value}


class Packed(Compiled):
    """A case with packed caches on a device. `route`: of attention."""

    def __init__(self, case: Case, given: dict[str, Any], on: str, route: str = "auto") -> None:
        self.route = route
        super().__init__(case, given, on)

    def changed(self, graph: Graph) -> Graph:
        nodes = (
            replace(n, args={**n.args, "route": self.route}) if n.op == "webgpu.attention" else n for n in graph.nodes
        )
        return replace(graph, nodes=tuple(nodes))

    def kernels(self) -> list[str]:
        """The kernels of the plan that was used last."""
        *_, plan = self.delegate._plans.values()
        return [launch.kernel for launch in plan.launches]

    def state(self) -> dict[str, Array]:
        """All caches and scales."""
        return {name: self.cache(name) for name in (*CACHES, *SCALES)}

    def fill(self, given: dict[str, Any]) -> None:
        """Write caches and scales of the arguments over those of the device."""
        for name in (*CACHES, *SCALES):
            buffer = self.delegate.state.buffers()[name]
            self.device.gpu.queue.write_buffer(buffer, 0, np.ascontiguousarray(array(given[name])).tobytes())


@contextmanager
def compiled(case: Case, given: dict[str, Any], on: str = "full", route: str = "auto") -> Iterator[Packed]:
    made = Packed(case, given, on, route)
    try:
        yield made
    finally:
        made.close()
