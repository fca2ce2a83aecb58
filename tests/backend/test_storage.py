"""Which values share storage: views, in-place writes, hazards, and the copies that remain."""

from __future__ import annotations

import numpy as np
import pytest

from executorch_webgpu.backend.graph import Graph, Ref
from executorch_webgpu.backend.passes import run_passes
from executorch_webgpu.runtime.gpu.host import to_host
from executorch_webgpu.runtime.methods.delegate import Delegate
from tests.harness import GraphBuilder, device

SHAPE = (1, 4, 1, 2)


def builder() -> tuple[GraphBuilder, Ref, Ref]:
    b = GraphBuilder()
    rows = b.input("f32", (1, 1, 1, 2))
    cache = b.stored("mutable", "f32", np.arange(8, dtype=np.float32).reshape(SHAPE), "cache")
    return b, rows, cache


def write(b: GraphBuilder, rows: Ref, cache: Ref, position: int) -> Ref:
    args = {"value": rows, "cache": cache, "start_pos": position}
    return b.node("llama.update_cache.default", args, ("f32", SHAPE))


def load(b: GraphBuilder, graph: Graph) -> tuple[Graph, Delegate]:
    graph = run_passes(graph)
    return graph, b.load(graph, device("full"))


def call(delegate: Delegate, value: float) -> list[np.ndarray]:
    return [a for _, a in delegate.execute([to_host(np.full((1, 1, 1, 2), value, np.float32))])]


def test_a_cache_is_written_in_place_and_read_after() -> None:
    b, rows, cache = builder()
    new = write(b, rows, cache, 1)
    graph, delegate = load(
        b, b.graph(b.node("aten.neg.default", {"self": new}, ("f32", SHAPE)), mutations=((cache.value, new.value),))
    )
    assert [n.op for n in graph.nodes] == ["llama.update_cache.default", "aten.neg.default"]
    assert graph.root(graph.nodes[0].outputs[0]) == graph.mutations[0][0]
    np.testing.assert_array_equal(call(delegate, 9)[0].reshape(4, 2), [[0, -1], [-9, -9], [-4, -5], [-6, -7]])


def test_a_reader_of_the_old_content_after_the_write_sees_the_old_content() -> None:
    b, rows, cache = builder()
    new = write(b, rows, cache, 0)
    late = b.node("aten.neg.default", {"self": cache}, ("f32", SHAPE))
    graph, delegate = load(b, b.graph(late, new, mutations=((cache.value, new.value),)))
    assert graph.root(graph.nodes[0].outputs[0]) != graph.mutations[0][0]
    old, seen = call(delegate, 9)
    np.testing.assert_array_equal(old.reshape(-1), -np.arange(8, dtype=np.float32))
    assert seen.reshape(-1).tolist() == [9, 9, 2, 3, 4, 5, 6, 7]
    old, _ = call(delegate, 1)
    assert old.reshape(-1).tolist() == [-9, -9, -2, -3, -4, -5, -6, -7]


def test_the_old_content_as_an_output_is_kept() -> None:
    b, rows, cache = builder()
    new = write(b, rows, cache, 3)
    _, delegate = load(b, b.graph(cache, mutations=((cache.value, new.value),)))
    assert call(delegate, 9)[0].reshape(-1).tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert call(delegate, 9)[0].reshape(-1).tolist() == [0, 1, 2, 3, 4, 5, 9, 9]


def test_a_view_of_the_old_content_counts_as_a_reader() -> None:
    b, rows, cache = builder()
    view = b.node("aten.view_copy.default", {"self": cache, "size": (8,)}, ("f32", (8,)))
    new = write(b, rows, cache, 0)
    _, delegate = load(
        b, b.graph(b.node("aten.neg.default", {"self": view}, ("f32", (8,))), mutations=((cache.value, new.value),))
    )
    assert call(delegate, 9)[0].tolist() == [-0.0, -1, -2, -3, -4, -5, -6, -7]
    assert call(delegate, 8)[0].tolist() == [-9, -9, -2, -3, -4, -5, -6, -7]


def test_two_writes_one_after_the_other_stay_in_place() -> None:
    b, rows, cache = builder()
    second = write(b, rows, write(b, rows, cache, 0), 2)
    graph, delegate = load(b, b.graph(second, mutations=((cache.value, second.value),)))
    assert len(graph.nodes) == 2
    assert {graph.root(n.outputs[0]) for n in graph.nodes} == {graph.mutations[0][0]}
    assert call(delegate, 5)[0].reshape(-1).tolist() == [5, 5, 2, 3, 5, 5, 6, 7]


def test_a_mutation_by_an_operator_that_cannot_write_in_place_is_copied_back() -> None:
    b, _, cache = builder()
    doubled = b.node("aten.add.Tensor", {"self": cache, "other": cache, "alpha": 1}, ("f32", SHAPE))
    graph, delegate = load(b, b.graph(doubled, mutations=((cache.value, doubled.value),)))
    assert graph.nodes[-1].op == "aten.copy.default"
    for factor in (2, 4, 8):
        np.testing.assert_array_equal(call(delegate, 0)[0].reshape(-1), factor * np.arange(8, dtype=np.float32))


def test_two_buffers_may_exchange_their_contents() -> None:
    b, _, first = builder()
    second = b.stored("mutable", "f32", np.full(SHAPE, 9, np.float32), "other")
    pairs = ((first.value, second.value), (second.value, first.value))
    _, delegate = load(b, b.graph(first, second, mutations=pairs))
    for expected in (0, 9, 0, 9):
        one, two = call(delegate, 0)
        assert {float(one.reshape(-1)[0]), float(two.reshape(-1)[0])} == {0, 9}
        assert one.reshape(-1)[0] == expected


@pytest.mark.parametrize("constant", [True, False])
def test_a_constant_is_never_written(constant: bool) -> None:
    b, rows, _ = builder()
    table = b.stored("constant" if constant else "mutable", "f32", np.zeros(SHAPE, np.float32), "table")
    graph = run_passes(b.graph(write(b, rows, table, 0)))
    shared = graph.root(graph.nodes[0].outputs[0]) != graph.nodes[0].outputs[0]
    assert shared is not constant


def test_float16_between_operators_is_kept_as_float32_so_a_cast_of_it_moves_nothing() -> None:
    b = GraphBuilder()
    x = b.input("f32", SHAPE)
    half = b.node(
        "aten._to_copy.default",
        {"self": b.node("aten.neg.default", {"self": x}, ("f32", SHAPE)), "dtype": "f16"},
        ("f16", SHAPE),
    )
    back = b.node("aten._to_copy.default", {"self": half, "dtype": "f32"}, ("f32", SHAPE))
    graph = run_passes(b.graph(half, back))
    assert len({graph.root(index) for node in graph.nodes for index in node.outputs}) == 1
    delegate = b.load(graph, device("full"))
    given = np.array([1, 2**-12 + 1, -3, 0, 5, 6, 7, 8], np.float32).reshape(SHAPE)
    (kind, narrow), (_, wide) = delegate.execute([to_host(given)])
    assert kind == "f16"
    np.testing.assert_array_equal(narrow, -given.astype(np.float16))
    np.testing.assert_allclose(wide, -given, rtol=2**-10)


@pytest.mark.parametrize("kind", ["input", "mutable"])
def test_a_cast_between_float16_and_float32_of_what_is_stored_moves_it(kind: str) -> None:
    b = GraphBuilder()
    given = np.arange(8, dtype=np.float16).reshape(SHAPE)
    x = b.input("f16", SHAPE) if kind == "input" else b.stored("mutable", "f16", given, "cache")
    flat = b.node("aten.view.default", {"self": x, "size": (8,)}, ("f16", (8,)))
    wide = b.node("aten._to_copy.default", {"self": flat, "dtype": "f32"}, ("f32", (8,)))
    graph = run_passes(b.graph(wide))
    assert graph.root(graph.nodes[-1].outputs[0]) != graph.root(x.value)
    delegate = b.load(graph, device("full"))
    ((_, got),) = delegate.execute([to_host(given)] if kind == "input" else [])
    np.testing.assert_array_equal(got, np.arange(8))
