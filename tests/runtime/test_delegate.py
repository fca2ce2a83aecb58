"""A loaded graph: input checks, plans, pooled buffers, live scalars and state."""

from __future__ import annotations

import numpy as np
import pytest

from executorch_webgpu.backend.graph import Graph, Ref, Sym, SymbolRange
from executorch_webgpu.ops.base import Check
from executorch_webgpu.runtime.errors import DeviceError, InputError, MissingDataError
from executorch_webgpu.runtime.gpu.host import to_host
from executorch_webgpu.runtime.gpu.plan import tightest
from executorch_webgpu.runtime.methods.delegate import Delegate
from tests.harness import DEVICES, GraphBuilder, device

SIZE = Sym("input_dim", (0, 0))
SIZE_1 = Sym("input_dim", (0, 1))
POSITION = Sym("scalar", (1, 0))
CAPACITY = 12


def cache_graph() -> tuple[GraphBuilder, Graph]:
    """x [s, 4] is written at a position into a cache [1, 12, 1, 4] seen as an output; a second output is -x."""
    b = GraphBuilder()
    x = b.input("f32", (SIZE, 4))
    b.input("i64", (1,))
    cache = b.stored("mutable", "f32", np.full((1, CAPACITY, 1, 4), 7, np.float32), "cache")
    rows = b.node("aten.view_copy.default", {"self": x, "size": (1, SIZE, 1, 4)}, ("f32", (1, SIZE, 1, 4)), alias=[x])
    args = {"value": rows, "cache": cache, "start_pos": POSITION}
    new = b.node("llama.update_cache.default", args, ("f32", (1, CAPACITY, 1, 4)), alias=[cache])
    negated = b.node("aten.neg.default", {"self": x}, ("f32", (SIZE, 4)))
    ranges = (SymbolRange(SIZE, 1, 8),)
    return b, b.graph(new, negated, mutations=((cache.value, new.value),), symbols=ranges)


def step(delegate: Delegate, rows: int, position: int, fill: float = 1.0) -> list[np.ndarray]:
    x = np.full((rows, 4), fill, np.float32)
    return [a for _, a in delegate.execute([to_host(x), to_host(np.array([position]))])]


@pytest.mark.parametrize("name", DEVICES)
def test_a_step_after_warm_up_creates_nothing_and_writes_little(name: str) -> None:
    on = device(name)
    b, graph = cache_graph()
    delegate = b.load(graph, on)
    step(delegate, 3, 0)
    step(delegate, 1, 3)
    before = on.counters.copy()
    for position in range(4, CAPACITY):
        step(delegate, 1, position)
    made = on.counters.since(before)
    assert (made.buffers, made.pipelines, made.bind_groups) == (0, 0, 0)
    steps = CAPACITY - 4
    inputs = steps * (16 + 4)
    assert made.bytes_written - inputs <= steps * 256
    assert made.submits == steps


@pytest.mark.parametrize("name", DEVICES)
def test_growing_after_shrinking_and_back_gives_right_numbers(name: str) -> None:
    b, graph = cache_graph()
    delegate = b.load(graph, device(name))
    expected = np.full((CAPACITY, 4), 7, np.float32)
    for rows, position in ((1, 0), (8, 1), (1, 9), (2, 10), (8, 0), (1, 11)):
        cache, negated = step(delegate, rows, position, rows + position)
        expected[position : position + rows] = rows + position
        np.testing.assert_array_equal(cache.reshape(CAPACITY, 4), expected)
        np.testing.assert_array_equal(negated, np.full((rows, 4), -(rows + position), np.float32))


@pytest.mark.parametrize("name", DEVICES)
def test_two_sessions_interleaved_do_not_disturb_each_other(name: str) -> None:
    b, graph = cache_graph()
    first, second = b.load(graph, device(name)), b.load(graph, device(name))
    for position in range(5):
        step(first, 1, position, position)
        step(second, 2, position, -position)
    np.testing.assert_array_equal(step(first, 1, 5, 5)[0][0, :6, 0, 0], [0, 1, 2, 3, 4, 5])
    np.testing.assert_array_equal(step(second, 1, 6, 9)[0][0, :7, 0, 0], [0, -1, -2, -3, -4, -4, 9])


def test_stale_pool_contents_never_show() -> None:
    on = device("full")
    b, graph = cache_graph()
    delegate = b.load(graph, on)
    step(delegate, 8, 0)
    for buffer in delegate.pool._buffers:
        on.write(buffer, np.full(buffer.size // 4, np.nan, np.float32))
    cache, negated = step(delegate, 1, 8, 2)
    assert not np.isnan(cache).any()
    assert not np.isnan(negated).any()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (([1.0],), "takes 2 inputs, got 1"),
        ((np.zeros((1, 4), np.float64), np.array([0])), r"input 0 \(input0\): dtype f64, expected f32"),
        ((np.zeros((1, 4), np.float32), np.array([0.5])), r"input 1 \(input1\): dtype f64, expected i64"),
        ((np.zeros((1, 4, 1), np.float32), np.array([0])), "rank 3 with shape .* expected rank 2"),
        ((np.zeros((1, 5), np.float32), np.array([0])), "size 5 at axis 1, expected 4"),
        ((np.zeros((9, 4), np.float32), np.array([0])), r"size at axis 0 is 9, outside \[1, 8\]"),
        ((np.zeros((0, 4), np.float32), np.array([0])), r"size at axis 0 is 0, outside \[1, 8\]"),
        ((np.zeros((1, 4), np.float32), np.array([-1])), r"-1 is outside \[0, 11\]"),
        ((np.zeros((1, 4), np.float32), np.array([CAPACITY])), r"12 is outside \[0, 11\]"),
        ((np.zeros((3, 4), np.float32), np.array([CAPACITY - 2])), r"10 is outside \[0, 9\]"),
        ((np.zeros((1, 4), np.float32), np.array([2**31])), "32-bit"),
        ((np.zeros((1, 4), np.float32), np.array([2**40])), "32-bit"),
    ],
)
def test_wrong_input_is_named_before_anything_is_submitted(inputs: tuple, message: str) -> None:
    on = device("full")
    b, graph = cache_graph()
    delegate = b.load(graph, on)
    before_cache = step(delegate, 2, 0, 3)[0]
    before = on.counters.copy()
    with pytest.raises(InputError, match=message):
        delegate.execute([to_host(x) for x in inputs])
    assert on.counters.since(before).submits == 0
    after = step(delegate, 1, 2, 4)[0]
    before_cache[0, 2] = 4
    np.testing.assert_array_equal(after, before_cache)


def test_last_slot_of_the_cache_is_legal() -> None:
    b, graph = cache_graph()
    cache, _ = step(b.load(graph, device("full")), 8, CAPACITY - 8, 5)
    np.testing.assert_array_equal(cache[0, -8:], np.full((8, 1, 4), 5))


def test_reset_restores_the_initial_content() -> None:
    b, graph = cache_graph()
    delegate = b.load(graph, device("full"))
    step(delegate, 8, 0, 1)
    delegate.state.reset()
    cache, _ = step(delegate, 1, 3, 2)
    expected = np.full((CAPACITY, 4), 7, np.float32)
    expected[3] = 2
    np.testing.assert_array_equal(cache.reshape(CAPACITY, 4), expected)


def test_state_too_large_for_the_device_is_refused_before_any_upload() -> None:
    on = device("default-limits")
    b = GraphBuilder()
    x = b.input("f32", (1,))
    b.values.append(b.values[x.value].__class__("mutable", "f32", (1, 40000, 1, 1024), "big_cache"))
    y = b.node("aten.neg.default", {"self": x}, ("f32", (1,)))
    used = on.memory.total
    with pytest.raises(DeviceError, match=r"big_cache.*163,840,000 bytes.*134,217,728"):
        b.load(b.graph(y), on)
    assert on.memory.total == used


def test_missing_data_is_named() -> None:
    on = device("full")
    b = GraphBuilder()
    b.stored("constant", "f32", np.zeros(4, np.float32), "weight")
    b.data["weight"] = b"123"
    with pytest.raises(MissingDataError, match="weight: 16 bytes expected"):
        b.load(b.graph(), on)


def test_closing_frees_the_memory() -> None:
    on = device("full")
    assert on.null_buffer is not None  # made at first use, and then the device's
    used = on.memory.total
    b, graph = cache_graph()
    delegate = b.load(graph, on)
    step(delegate, 3, 0)
    assert on.memory.total > used
    delegate.close()
    delegate.weights.close()
    delegate.state.close()
    assert on.memory.total == used


def test_integer_outputs_and_unused_inputs() -> None:
    b = GraphBuilder()
    b.input("f32", (SIZE, 4))
    b.input("i64", (2,))
    graph = b.graph(Sym("add", (SIZE, 1)), Sym("scalar", (1, 1)), Ref(0))
    outputs = b.load(graph, device("full")).execute([to_host(np.ones((3, 4), np.float32)), to_host(np.array([5, 6]))])
    assert outputs[0] == ("i64", 4)
    assert outputs[1] == ("i64", 6)
    np.testing.assert_array_equal(outputs[2][1], np.ones((3, 4)))


def test_more_live_scalars_than_a_window_holds() -> None:
    b = GraphBuilder()
    b.input("i64", (200,))
    table = b.stored("constant", "f32", np.arange(1000, dtype=np.float32), "table")
    outs = []
    for i in range(150):
        start = Sym("scalar", (0, i))
        args = {"self": table, "dim": 0, "start": start, "end": Sym("add", (start, 1)), "step": 1}
        outs.append(b.node("aten.slice_copy.Tensor", args, ("f32", (1,))))
    delegate = b.load(b.graph(*outs), device("default-limits"))
    for seed in (0, 1):
        at = np.random.default_rng(seed).integers(0, 1000, 200)
        got = [float(a[0]) for _, a in delegate.execute([to_host(at)])]
        assert got == [float(v) for v in at[:150]]


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("columns", [1, 3, 4, 5])
@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_only_the_last_row_of_an_output(name: str, columns: int, dtype: str) -> None:
    """Rows of f16 may begin between multiples of 4 bytes; the other output is whole."""
    b = GraphBuilder()
    x = b.input(dtype, (1, SIZE_1, columns))
    first = b.node("aten.neg.default", {"self": x}, (dtype, (1, SIZE_1, columns)))
    other = b.node("aten.abs.default", {"self": x}, (dtype, (1, SIZE_1, columns)))
    on = device(name)
    delegate = b.load(b.graph(first, other, symbols=(SymbolRange(SIZE_1, 0, 9),)), on)
    for rows in (1, 2, 3, 8):
        data = (
            -np.arange(1, rows * columns + 1).reshape(1, rows, columns).astype(np.float32 if dtype == "f32" else "f2")
        )
        before = on.counters.copy()
        [(_, whole), _] = delegate.execute([to_host(data)])
        all_bytes = on.counters.since(before).bytes_read
        before = on.counters.copy()
        [(_, last), (_, rest)] = delegate.execute([to_host(data)], 0)
        np.testing.assert_array_equal(last, whole[:, -1:])
        np.testing.assert_array_equal(rest, -data)
        assert on.counters.since(before).bytes_read <= all_bytes
    assert delegate.execute([to_host(data[:, :0])], 0)[0][1].shape == (1, 0, columns)
    delegate.close()


def test_of_the_checks_of_a_plan_the_tightest_stay() -> None:
    """Random limits of a few expressions: what passes the few passes all, what fails is named by one that fails."""
    rng = np.random.default_rng(4)
    dims = (SIZE, POSITION, Sym("add", (POSITION, 1)))
    for _ in range(50):
        limits = rng.integers(-5, 5, (12, 2))
        checks = [Check(dims[i % 3], int(low), int(low + width), str(i)) for i, (low, width) in enumerate(limits)]
        kept = tightest(checks)
        assert len(kept) <= 6
        assert set(kept) <= set(checks)
        for dim in dims:
            for value in range(-8, 12):
                failing = {check for check in checks if check.dim == dim and not check.low <= value <= check.high}
                named = {check for check in kept if check.dim == dim and not check.low <= value <= check.high}
                assert named <= failing
                assert bool(named) == bool(failing)


def test_equal_checks_of_many_layers_are_one() -> None:
    checks = [Check(POSITION, 0, 11, f"cache {layer}") for layer in range(16)]
    assert tightest(checks) == (checks[0],)
