"""Cache writes and attention of one program over a sequence of calls (ATTENTION checklist B4, B5, D1-D4, D8)."""

from __future__ import annotations

import numpy as np
import pytest

from executorch_webgpu.backend.graph import Graph, Sym, SymbolRange
from executorch_webgpu.backend.passes import run_passes
from executorch_webgpu.runtime.errors import InputError
from executorch_webgpu.runtime.gpu.host import to_host
from executorch_webgpu.runtime.methods.delegate import Delegate
from tests.harness import DEVICES, GraphBuilder, device

ROWS = Sym("input_dim", (0, 1))
POSITION = Sym("scalar", (3, 0))
SEQUENCES = [
    ((8, 4, 4), 16, "f32", (3, 1, 1, 5, 1, 1, 2)),
    ((6, 2, 8), 16, "f32", (3, 1, 1, 5, 1, 1)),
    ((24, 8, 128), 256, "f32", (111, 1, 1, 1, 57, 1, 1)),
    ((16, 8, 128), 64, "f16", (17, 1)),
    ((4, 2, 8), 8, "f32", (1, 1, 1, 1, 4)),
]
"""((query heads, KV heads, head size), capacity, cache dtype, rows of each call)."""


def program(heads: tuple[int, int, int], capacity: int, dtype: str) -> tuple[GraphBuilder, Graph]:
    """q, k, v, input_pos -> attention over the updated caches, and the caches; as `sdpa_with_kv_cache` lowers."""
    b = GraphBuilder()
    many, few, size = heads
    query = b.input(dtype, (1, ROWS, many, size))
    fresh = [b.input(dtype, (1, ROWS, few, size)) for _ in range(2)]
    b.input("i64", (1,))
    kind = np.float16 if dtype == "f16" else np.float32
    caches = [b.stored("mutable", dtype, np.full((1, capacity, few, size), np.nan, kind), name) for name in ("k", "v")]
    args = {
        "query": query, "key": fresh[0], "value": fresh[1], "key_cache": caches[0], "value_cache": caches[1],
        "start_pos": POSITION, "seq_len": ROWS, "attn_mask": None, "drpout_p": 0.0, "is_causal": True, "scale": None,
    }  # fmt: skip
    shape = (1, capacity, few, size)
    outs = ((dtype, (1, ROWS, many, size)), (dtype, shape), (dtype, shape))
    attended, keys, values = b.node("llama.sdpa_with_kv_cache.default", args, *outs)
    mutations = ((caches[0].value, keys.value), (caches[1].value, values.value))
    ranges = (SymbolRange(ROWS, 1, capacity),)
    return b, run_passes(b.graph(attended, keys, values, mutations=mutations, symbols=ranges))


def reference(query: np.ndarray, keys: np.ndarray, values: np.ndarray, position: int) -> np.ndarray:
    """Causal attention in float64; q [1, S, Hq, D], caches [1, C, Hkv, D]."""
    rows, many, size = query.shape[1:]
    group = many // keys.shape[2]
    out = np.empty(query.shape, np.float64)
    for i in range(rows):
        seen = position + i + 1
        for h in range(many):
            k, v = (c[0, :seen, h // group].astype(np.float64) for c in (keys, values))
            scores = k @ query[0, i, h].astype(np.float64) / np.sqrt(size)
            weights = np.exp(scores - scores.max())
            out[0, i, h] = weights @ v / weights.sum()
    return out


def call(delegate: Delegate, generator: np.random.Generator, rows: int, position: int) -> tuple[list, list]:
    """One call with random q, k, v; returns (inputs, outputs)."""
    graph = delegate.graph
    shapes = [graph.values[i].shape for i in graph.inputs[:3]]
    kind = np.float16 if graph.values[graph.inputs[0]].dtype == "f16" else np.float32
    given = [generator.standard_normal((1, rows, *shape[2:])).astype(kind) for shape in shapes]
    results = delegate.execute([*map(to_host, given), to_host(np.array([position]))])
    return given, [array for _, array in results]


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize(("heads", "capacity", "dtype", "calls"), SEQUENCES)
def test_B4_sequence_of_calls_on_one_cache(
    name: str, heads: tuple[int, int, int], capacity: int, dtype: str, calls: tuple[int, ...]
) -> None:
    b, graph = program(heads, capacity, dtype)
    delegate = b.load(graph, device(name))
    generator, position = np.random.default_rng(0), 0
    keys = np.full((1, capacity, heads[1], heads[2]), np.nan, np.float16 if dtype == "f16" else np.float32)
    values = keys.copy()
    absolute, relative = (1e-4, 1e-3) if dtype == "f32" else (2e-3, 1e-2)
    for rows in calls:
        (query, k, v), (got, new_keys, new_values) = call(delegate, generator, rows, position)
        keys[:, position : position + rows], values[:, position : position + rows] = k, v
        np.testing.assert_array_equal(new_keys, keys)
        np.testing.assert_array_equal(new_values, values)
        expected = reference(query, keys, values, position)
        assert (np.abs(got - expected) <= absolute + relative * np.abs(expected)).all()
        position += rows
    delegate.close()


@pytest.mark.parametrize("name", DEVICES)
def test_B5_positions_change_no_dispatch(name: str) -> None:
    b, graph = program((8, 4, 4), 64, "f32")
    delegate = b.load(graph, device(name))
    generator = np.random.default_rng(0)
    call(delegate, generator, 1, 0)
    (plan,) = delegate._plans.values()
    launches = list(plan.launches)
    before = device(name).counters.copy()
    for position in range(1, 64):
        call(delegate, generator, 1, position)
    assert list(delegate._plans.values()) == [plan]
    assert plan.launches == launches
    made = device(name).counters.since(before)
    assert (made.buffers, made.pipelines, made.bind_groups) == (0, 0, 0)


@pytest.mark.parametrize("name", DEVICES)
def test_D8_growing_and_going_back(name: str) -> None:
    b, graph = program((4, 2, 8), 6, "f32")
    delegate = b.load(graph, device(name))
    generator = np.random.default_rng(3)
    keys, values = (np.full((1, 6, 2, 8), np.nan, np.float32) for _ in range(2))
    for position in (0, 1, 2, 1, 3, 0, 4, 5):
        (query, k, v), (got, *_) = call(delegate, generator, 1, position)
        keys[:, position], values[:, position] = k[:, 0], v[:, 0]
        np.testing.assert_allclose(got, reference(query, keys, values, position), atol=1e-4)


@pytest.mark.parametrize(("rows", "position"), [(1, -1), (1, 6), (1, 2**31 - 1), (1, -(2**31)), (3, 4), (6, 1), (2, 5)])
def test_D1_D3_D4_bad_positions_leave_the_caches_as_they_were(rows: int, position: int) -> None:
    b, graph = program((4, 2, 8), 6, "f32")
    delegate = b.load(graph, device("full"))
    _, (_, keys, values) = call(delegate, np.random.default_rng(0), 4, 0)
    before = device("full").counters.copy()
    with pytest.raises(InputError, match="outside"):
        call(delegate, np.random.default_rng(1), rows, position)
    assert device("full").counters.since(before).submits == 0
    (_, k, v), (_, new_keys, new_values) = call(delegate, np.random.default_rng(2), 1, 4)
    keys[:, 4], values[:, 4] = k[:, 0], v[:, 0]
    np.testing.assert_array_equal(new_keys, keys)
    np.testing.assert_array_equal(new_values, values)


def test_D2_the_last_row_is_legal() -> None:
    b, graph = program((4, 2, 8), 6, "f32")
    delegate = b.load(graph, device("full"))
    for rows, position in ((6, 0), (1, 5), (2, 4)):
        _, (got, *_) = call(delegate, np.random.default_rng(0), rows, position)
        assert np.isfinite(got).all()
