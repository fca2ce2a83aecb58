"""A layer without keys and values of its own, which attends to the caches of the layer before (checklist E13)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from executorch_webgpu.backend.graph import Arg, Ref, Sym
from executorch_webgpu.ops.base import check_node
from executorch_webgpu.runtime.gpu.host import to_host
from executorch_webgpu.runtime.methods.delegate import Delegate
from executorch_webgpu.runtime.methods.replay import Replay
from tests.harness import DEVICES, GraphBuilder, device
from tests.ops.copy_cases import poison

HEADS, KV_HEADS, SIZE, CAPACITY = 4, 2, 16, 520
POSITION = Sym("scalar", (4, 0))


def two_layers(b: GraphBuilder) -> tuple[Ref, ...]:
    """query, key, value, other query, position -> both layers' results and the sizes of their grids."""
    shape = (1, 1, HEADS, SIZE)
    query, *fresh = (b.input("f32", (1, 1, heads, SIZE)) for heads in (HEADS, KV_HEADS, KV_HEADS))
    other = b.input("f32", shape)
    b.input("i64", (1,))
    cache = (1, CAPACITY, KV_HEADS, SIZE)
    caches = [b.stored("mutable", "f32", np.full(cache, np.nan, np.float32), name) for name in ("k", "v")]
    table = {"cos": np.ones((CAPACITY, SIZE // 2), np.float32), "sin": np.zeros((CAPACITY, SIZE // 2), np.float32)}
    args: dict[str, Arg] = {
        "query": query, "key": fresh[0], "value": fresh[1], "key_cache": caches[0], "value_cache": caches[1],
        **{name: b.stored("constant", "f32", rows, name) for name, rows in table.items()},
        "start": POSITION, "rot": SIZE, "interleaved": True, "layout": "bshd", "start_pos": POSITION,
        "kv_limit": "causal", "window": 0,
    }  # fmt: skip
    outs = (("f32", shape), ("f32", cache), ("f32", cache), ("i32", (8,)))
    rotated, keys, values, sizes = b.node("webgpu.rope_cache", args, *outs, alias=[None, *caches])
    attend: dict[str, Arg] = {
        "key": keys, "value": values, "q_layout": "bshd", "kv_layout": "bshd", "out_layout": "bshd",
        "start_pos": POSITION, "kv_limit": "causal", "sizes": sizes,
    }  # fmt: skip
    own, shared = (b.node("webgpu.attention", {"query": q, **attend}, ("f32", shape)) for q in (rotated, other))
    return own, shared, sizes


@pytest.fixture(params=DEVICES)
def delegate(request: pytest.FixtureRequest) -> Delegate:
    b = GraphBuilder()
    graph = b.graph(*two_layers(b))
    for node in graph.nodes:
        assert check_node(graph, node) is None
    return b.load(graph, device(request.param))


def attended(query: Any, keys: Any, values: Any) -> Any:
    """float64; query [Hq, D], keys and values [T, Hkv, D]."""
    out = np.empty(query.shape)
    for head, q in enumerate(query.astype(np.float64)):
        scores = keys[:, head // (HEADS // KV_HEADS)].astype(np.float64) @ q / np.sqrt(SIZE)
        weights = np.exp(scores - scores.max())
        out[head] = weights @ values[:, head // (HEADS // KV_HEADS)] / weights.sum()
    return out


def test_E13_a_layer_without_keys_of_its_own(delegate: Delegate) -> None:
    """Both layers are right at every length in a replayed step, and no grid of the splits is ever empty."""
    rng = np.random.default_rng(3)
    shapes = [(1, 1, heads, SIZE) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    steps = [[rng.standard_normal(shape).astype(np.float32) for shape in shapes] for _ in range(CAPACITY)]
    replay = Replay(delegate, [*map(to_host, steps[0]), to_host(np.array([0]))])
    keys, values = (np.stack([step[i][0, 0] for step in steps]) for i in (1, 2))
    sized = delegate.device.limits.max_storage_buffers > 8 and delegate.device.limits.subgroup_size > 0
    for position, step in enumerate(steps):
        if position % 37 in (0, 5):
            poison(delegate)
        own, shared, sizes = (a for _, a in replay.execute([*map(to_host, step), to_host(np.array([position]))]))
        seen = slice(0, position + 1)
        if position % 37 in (0, 5) or position in (31, 32, 63, 64, 127, 128, CAPACITY - 1):
            np.testing.assert_allclose(own[0, 0], attended(step[0][0, 0], keys[seen], values[seen]), atol=1e-5)
            np.testing.assert_allclose(shared[0, 0], attended(step[3][0, 0], keys[seen], values[seen]), atol=1e-5)
        if sized:
            assert np.asarray(sizes)[:3].min() > 0
    delegate.close()
