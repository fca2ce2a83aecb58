"""Slices that are a run of elements of a temporary: bound where they are, copied where that is not possible."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from executorch_webgpu.backend.graph import Arg, Graph, Ref, Sym
from executorch_webgpu.ops.base import check_node
from tests.harness import DEVICES, GraphBuilder, device
from tests.ops.copy_cases import poison

S = Sym("input_dim", (0, 1))
COPY = "strided_copy"


def neg(b: GraphBuilder, x: Ref, shape: Any, dtype: str = "f32") -> Ref:
    made: Ref = b.node("aten.neg.default", {"self": x}, (dtype, shape))
    return made


def select(b: GraphBuilder, x: Ref, axis: int, index: Arg, shape: Any) -> Ref:
    made: Ref = b.node("aten.select_copy.int", {"self": x, "dim": axis, "index": index}, ("f32", shape))
    return made


def cut(b: GraphBuilder, x: Ref, axis: int, start: int, end: int, shape: Any) -> Ref:
    args: dict[str, Arg] = {"self": x, "dim": axis, "start": start, "end": end, "step": 1}
    made: Ref = b.node("aten.slice_copy.Tensor", args, ("f32", shape))
    return made


def given(*shape: int) -> Any:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def run(b: GraphBuilder, graph: Graph, on: str, *calls: list[Any]) -> tuple[list[list[Any]], list[list[str]]]:
    """Results and kernels of each call; temporaries are full of NaN before each."""
    for node in graph.nodes:
        assert check_node(graph, node) is None
    delegate = b.load(graph, device(on))
    results, kernels = [], []
    try:
        for call in calls:
            poison(delegate)
            feeds = [("f32", array) for array in call]
            results.append([np.asarray(array) for _, array in delegate.execute(feeds)])
            plan = delegate.plan(delegate.bind(feeds))
            kernels.append([launch.kernel for launch in plan.launches])
    finally:
        delegate.close()
        delegate.state.close()
    return results, kernels


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("width", [64, 5])
def test_the_last_row(width: int, on: str) -> None:
    """For every number of rows, where the device can bind a buffer from that row on; nothing takes the buffer before
    the last reader of the row."""
    b = GraphBuilder()
    x = b.input("f32", (1, S, width))
    hidden = neg(b, x, (1, S, width))
    last = select(b, hidden, 1, -1, (1, width))
    other = x
    for _ in range(3):  # these would take the buffer of `hidden`
        other = neg(b, other, (1, S, width))
    view = b.node("aten.view_copy.default", {"self": last, "size": (width,)}, ("f32", (width,)), alias=[last])
    graph = b.graph(neg(b, view, (width,)), other)
    rows = (1, 2, 9, 1)
    calls = [[given(1, n, width)] for n in rows]
    results, kernels = run(b, graph, on, *calls)
    align = max(device(on).limits.storage_alignment, device(on).limits.uniform_alignment)
    for n, (call,), (found, whole), names in zip(rows, calls, results, kernels, strict=True):
        np.testing.assert_array_equal(found, call[0, -1])
        np.testing.assert_array_equal(whole, -call)
        assert (COPY in names) == (4 * width * (n - 1) % align != 0), n


@pytest.mark.parametrize("on", DEVICES)
def test_parts_of_one_row(on: str) -> None:
    """A product of one token falls apart into windows, that of several does not; a part of a part is a window too."""
    b = GraphBuilder()
    x = b.input("f32", (1, S, 256))
    hidden = neg(b, x, (1, S, 256))
    args: dict[str, Arg] = {"self": hidden, "split_sizes": (64, 192), "dim": 2}
    first, second = b.node("aten.split_with_sizes_copy.default", args, *(("f32", (1, S, n)) for n in (64, 192)))
    inner = cut(b, second, 2, 64, 128, (1, S, 64))
    graph = b.graph(neg(b, first, (1, S, 64)), neg(b, second, (1, S, 192)), neg(b, inner, (1, S, 64)))
    calls = [[given(1, n, 256)] for n in (1, 3)]
    results, kernels = run(b, graph, on, *calls)
    for (call,), found in zip(calls, results, strict=True):
        for got, want in zip(found, (call[..., :64], call[..., 64:], call[..., 128:192]), strict=True):
            np.testing.assert_array_equal(got, want)
    assert [names.count(COPY) for names in kernels] == [0, 3]


@pytest.mark.parametrize("on", DEVICES)
def test_what_leaves_the_graph_is_copied(on: str) -> None:
    b = GraphBuilder()
    x = b.input("f32", (1, S, 64))
    row = select(b, neg(b, x, (1, S, 64)), 1, 0, (1, 64))
    results, kernels = run(b, b.graph(row), on, [given(1, 2, 64)])
    np.testing.assert_array_equal(results[0][0], -given(1, 2, 64)[:, 0])
    assert COPY in kernels[0]


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("moved", ["source", "inputs"])
def test_what_is_written_later_or_is_no_temporary_is_copied(moved: str, on: str) -> None:
    """A buffer that is written in place after the slice, and an input, which the host writes."""
    b = GraphBuilder()
    x, y = b.input("f32", (1, 4, 2, 32)), b.input("f32", (1, 1, 2, 32))
    hidden = neg(b, x, (1, 4, 2, 32)) if moved == "source" else x
    row = select(b, hidden, 1, 1, (1, 2, 32))
    results = [neg(b, row, (1, 2, 32))]
    if moved == "source":
        args: dict[str, Arg] = {"value": y, "cache": hidden, "start_pos": 1}
        new = b.node("llama.update_cache.default", args, ("f32", (1, 4, 2, 32)), alias=[hidden])
        results = [neg(b, row, (1, 2, 32)), neg(b, new, (1, 4, 2, 32))]
    feeds = [given(1, 4, 2, 32), given(1, 1, 2, 32)]
    [found], [kernels] = run(b, b.graph(*results), on, feeds)
    np.testing.assert_array_equal(found[0], feeds[0][:, 1] if moved == "source" else -feeds[0][:, 1])
    assert COPY in kernels
    if moved == "source":
        np.testing.assert_array_equal(found[1][:, 1], -feeds[1][:, 0])


@pytest.mark.parametrize("on", DEVICES)
def test_a_live_position_and_a_step_are_copied(on: str) -> None:
    b = GraphBuilder()
    x = b.input("f32", (1, 4, 64))
    b.input("i64", (1,))
    hidden = neg(b, x, (1, 4, 64))
    moving = select(b, hidden, 1, Sym("scalar", (1, 0)), (1, 64))
    args: dict[str, Arg] = {"self": hidden, "dim": 1, "start": 0, "end": 4, "step": 2}
    spaced = b.node("aten.slice_copy.Tensor", args, ("f32", (1, 2, 64)))
    graph = b.graph(neg(b, moving, (1, 64)), neg(b, spaced, (1, 2, 64)))
    delegate = b.load(graph, device(on))
    try:
        for position in (3, 0):
            feeds: list[Any] = [("f32", given(1, 4, 64)), ("i64", np.array([position]))]
            (_, row), (_, two) = delegate.execute(feeds)
            np.testing.assert_array_equal(row, given(1, 4, 64)[:, position])
            np.testing.assert_array_equal(two, given(1, 4, 64)[:, ::2])
            plan = delegate.plan(delegate.bind(feeds))
            assert [launch.kernel for launch in plan.launches].count(COPY) == 2
    finally:
        delegate.close()
