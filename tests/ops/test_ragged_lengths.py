"""`webgpu.lengths`: what the host refuses, what the GPU makes of numbers that only it knows, and grids that follow from
them (groups D and E of the acceptance list)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from executorch_webgpu.backend.graph import Arg, Graph, Sym
from executorch_webgpu.ops.base import Limits, Lowering, check_node, find
from executorch_webgpu.ops.lengths import MAX_BATCH
from executorch_webgpu.runtime.errors import InputError
from executorch_webgpu.runtime.gpu.host import to_user
from executorch_webgpu.runtime.methods.replay import Replay
from tests.harness import DEVICES, GraphBuilder, device, run
from tests.ops.copy_cases import poison
from tests.ops.ragged import Array, Layer, Lengths, Program, program

# -- what is refused

BAD: tuple[tuple[Lengths, Lengths, str], ...] = (
    ((0, -1, 0), (1, 1, 1), r"-1 is outside \[0, 6\] \(batch row 1\)"),
    ((0, 0, 7), (1, 1, 0), r"7 is outside \[0, 6\] \(batch row 2\)"),
    ((2**31 - 1, 0, 0), (1, 1, 1), r"2147483647 is outside \[0, 6\] \(batch row 0\)"),
    ((0, 6, 0), (1, 1, 1), r"6 \+ 1 = 7 is outside \[0, 6\] \(batch row 1\)"),
    ((0, 5, 0), (2, 2, 2), r"5 \+ 2 = 7 is outside \[0, 6\] \(batch row 1\)"),
    ((0, 0, 0), (1, 1, 3), r"3 is outside \[0, 2\] \(batch row 2\)"),
    ((0, 0, 0), (-1, 1, 1), r"-1 is outside \[0, 2\] \(batch row 0\)"),
    ((-(2**31), 0, 0), (1, 1, 1), r"outside \[0, 6\] \(batch row 0\)"),
)


@pytest.mark.parametrize(("past", "new", "message"), BAD, ids=[b[2] for b in BAD])
def test_D1_D3_D4_bad_lengths_are_refused(past: Lengths, new: Lengths, message: str) -> None:
    """Before anything is written or submitted, naming the row and the numbers; the caches stay as they were."""
    with program(Layer(capacity=6), "full", (3, 2, 0)) as made:
        made.step(made.tokens(2, 0), (3, 2, 0), (2, 2, 2))
        held = {name: made.held(name) for name in "kv"}
        given = made.tokens(2, 1)
        before = made.device.counters.copy()
        with pytest.raises(InputError, match=message):
            made.delegate.execute(made.inputs(given, past, new))
        done = made.device.counters.since(before)
        assert (done.submits, done.writes) == (0, 0)
        for name, array in held.items():
            np.testing.assert_array_equal(made.held(name), array)


@pytest.mark.parametrize("on", DEVICES)
def test_D2_the_last_rows_are_legal(on: str) -> None:
    with program(Layer(capacity=6), on, (4, 5, 6)) as made:
        made.step(made.tokens(2, 0), (4, 5, 6), (2, 1, 0))


def test_without_q_len_all_tokens_must_fit() -> None:
    with program(Layer(capacity=6, all_new=True), "full", (4, 3, 0)) as made:
        made.step(made.tokens(2, 0), (4, 3, 0), (2, 2, 2))
        with pytest.raises(InputError, match=r"with 2 new tokens: 5 is outside \[0, 4\] \(batch row 1\)"):
            made.delegate.execute(made.inputs(made.tokens(2, 0), (4, 5, 0), (2, 2, 2)))


def test_lengths_behind_casts_are_checked() -> None:
    b = GraphBuilder()
    past = b.input("i64", (3,))
    narrow = b.node("aten._to_copy.default", {"self": past, "dtype": "i32"}, ("i32", (3,)))
    column = b.node("aten.view_copy.default", {"self": narrow, "size": (3, 1)}, ("i32", (3, 1)))
    args: dict[str, Arg] = {"past": column, "q_len": None, "rows": 2, "capacity": 9}
    graph = b.graph(b.node("webgpu.lengths", args, ("i32", (3, 4))))
    (made,) = run(b, graph, device("full"), np.array([0, 7, 3]))
    np.testing.assert_array_equal(made, [[0, 2, 0, 0], [7, 2, 0, 0], [3, 2, 0, 0]])
    with pytest.raises(InputError, match=r"8 is outside \[0, 7\] \(batch row 1\)"):
        run(b, graph, device("full"), np.array([0, 8, 3]))


@pytest.mark.parametrize("operator", ["rope_cache", "rope"])
def test_D7_positions_past_the_rotary_table(operator: str) -> None:
    """Refused by the host; where only the GPU knows, padding and clamping keep within the table."""
    rotary = "fused" if operator == "rope_cache" else "apart"
    with program(Layer(rotary=rotary, table_rows=20), "full", (18, 0, 3)) as made:
        made.step(made.tokens(2, 0), (18, 0, 3), (2, 2, 0))
        with pytest.raises(InputError, match=r"rotary table \(20 rows\): 19 \+ 2 = 21 is outside .* \(batch row 0\)"):
            made.delegate.execute(made.inputs(made.tokens(2, 0), (19, 0, 3), (2, 2, 0)))


def test_D7_tables_of_different_lengths() -> None:
    assert "cos and sin differ in shape" in str(refusal("webgpu.rope", sin=("f32", (2, 4))))


SHAPES: dict[str, dict[str, Any]] = {
    "webgpu.lengths": {"past": ("i32", (4,)), "q_len": ("i64", (4, 1)), "rows": 3, "capacity": 9},
    "webgpu.attention": {
        "query": ("f32", (4, 3, 2, 8)), "key": ("f32", (4, 9, 1, 8)), "value": ("f32", (4, 9, 1, 8)),
        "q_layout": "bshd", "kv_layout": "bshd", "out_layout": "bshd", "start_pos": 0, "kv_limit": "causal",
        "lengths": ("i32", (4, 4)),
    },
    "webgpu.rope": {
        "input": ("f32", (4, 3, 2, 8)), "cos": ("f32", (9, 4)), "sin": ("f32", (9, 4)), "rot": 8,
        "interleaved": True, "layout": "bshd", "lengths": ("i32", (4, 4)),
    },
    "webgpu.update_cache": {
        "value": ("f32", (4, 3, 2, 8)), "cache": ("f32", (4, 9, 2, 8)), "lengths": ("i32", (4, 4)),
    },
}  # fmt: skip
RESULTS = {
    "webgpu.lengths": ("i32", (4, 4)), "webgpu.attention": ("f32", (4, 3, 2, 8)),
    "webgpu.rope": ("f32", (4, 3, 2, 8)), "webgpu.update_cache": ("f32", (4, 9, 2, 8)),
}  # fmt: skip
REFUSED: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("webgpu.lengths", {"past": ("i32", (2, 2))}, "past is [2, 2]; it must have an element for each of 4"),
    ("webgpu.lengths", {"past": ("i32", (3,))}, "past is [3]"),
    ("webgpu.lengths", {"past": ("i32", ())}, "past is []"),
    ("webgpu.lengths", {"q_len": ("i32", (4, 4))}, "q_len is [4, 4]"),
    ("webgpu.lengths", {"past": ("f32", (4,))}, "past is f32; it must be int32 or int64"),
    ("webgpu.lengths", {"q_len": ("bool", (4,))}, "q_len is bool"),
    ("webgpu.lengths", {"past": None}, "past is missing"),
    ("webgpu.lengths", {"capacity": -1}, "capacity is -1"),
    ("webgpu.lengths", {"rows": -1}, "rows is -1"),
    *((op, {"lengths": ("i32", (3, 4))}, "lengths has 3 rows for a batch of 4") for op in list(SHAPES)[1:]),
    *((op, {"lengths": ("i32", (4, 2))}, "lengths is i32[4, 2]; it must be i32[B, 4]") for op in list(SHAPES)[1:]),
    *((op, {"lengths": ("i64", (4, 4))}, "lengths is i64[4, 4]") for op in list(SHAPES)[1:]),
    ("webgpu.update_cache", {"lengths": None}, "lengths is missing"),
    ("webgpu.update_cache", {"value": ("f16", (4, 3, 2, 8))}, "cast the value"),
    ("webgpu.update_cache", {"cache": ("f32", (4, 8, 2, 8))}, "the new cache is"),
)


def refusal(op: str, **change: Any) -> str | None:
    b = GraphBuilder()
    args = {k: b.input(*v) if isinstance(v, tuple) else v for k, v in {**SHAPES[op], **change}.items()}
    graph = b.graph(b.node(op, args, RESULTS[op]))
    return check_node(graph, graph.nodes[0])


@pytest.mark.parametrize(("op", "change", "reason"), REFUSED, ids=[f"{r[0]} {r[2]}" for r in REFUSED])
def test_D5_shapes_and_dtypes_that_are_refused(op: str, change: dict[str, Any], reason: str) -> None:
    assert refusal(op) is None
    assert reason in str(refusal(op, **change))


@pytest.mark.parametrize("dynamic", [False, True])
def test_batches_beyond_a_uniform_binding(dynamic: bool) -> None:
    """4,096 rows at most: refused at export, or by a step where the batch is a symbol; as many are right."""
    b = GraphBuilder()
    size: Any = Sym("input_dim", (0, 0)) if dynamic else MAX_BATCH + 1
    args: dict[str, Arg] = {
        "value": b.input("f32", (size, 1, 1, 1)),
        "cache": b.input("f32", (size, 2, 1, 1)),
        "lengths": b.input("i32", (size, 4)),
    }
    graph = b.graph(b.node("webgpu.update_cache", args, ("f32", (size, 2, 1, 1))))
    reason = check_node(graph, graph.nodes[0])
    if not dynamic:
        assert f"a batch of {MAX_BATCH + 1} rows with lengths; at most 4096" in str(reason)
        return
    assert reason is None

    def call(count: int) -> Array:
        numbers = np.tile(np.array([1, 1, 0, 0], np.int32), (count, 1))
        fresh = np.arange(count, dtype=np.float32).reshape(count, 1, 1, 1)
        old = np.full((count, 2, 1, 1), -1.0, np.float32)
        return np.asarray(run(b, graph, device("default-limits"), fresh, old, numbers)[0])

    made = call(MAX_BATCH)
    np.testing.assert_array_equal(made[:, 1, 0, 0], np.arange(MAX_BATCH))
    np.testing.assert_array_equal(made[:, 0], -1)
    with pytest.raises(InputError, match=r"batch rows with lengths: 4097 is outside \[0, 4096\]"):
        call(MAX_BATCH + 1)


# -- lengths that only the GPU knows


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("given", [True, False])
def test_D6_lengths_of_numbers_that_no_host_checks(given: bool, on: str) -> None:
    """In signed arithmetic: past in 0..6, new in 0..min(4, 6 - past), whatever the products on the GPU are."""
    past = np.array([0, 4, 5, 6, 7, 106, -1, 2**31 - 1, -(2**31), 3], np.int32)
    fresh = np.array([4, 4, 4, 4, 4, 2, -3, 2**31 - 1, -(2**31), 2], np.int32)
    b = GraphBuilder()
    one = b.stored("constant", "i32", np.ones(1, np.int32), "one")
    products = [
        b.node("aten.mul.Tensor", {"self": b.input("i32", (10,)), "other": one}, ("i32", (10,))) for _ in range(2)
    ]
    args: dict[str, Arg] = {"past": products[0], "q_len": products[1] if given else None, "rows": 4, "capacity": 6}
    (made,) = run(b, b.graph(b.node("webgpu.lengths", args, ("i32", (10, 4)))), device(on), past, fresh)
    first = np.clip(past.astype(np.int64), 0, 6)
    new = np.clip(fresh.astype(np.int64) if given else 4, 0, np.minimum(4, 6 - first))
    np.testing.assert_array_equal(made, np.stack([first, new, 0 * first, 0 * first], 1))


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("rotary", ["fused", "apart"])
@pytest.mark.parametrize("bad", [106, -1, 2**31 - 1, -(2**31), 6])
def test_D6_bad_lengths_on_the_gpu(bad: int, rotary: str, on: str) -> None:
    """S = 2, past = 4, capacity 6, and a past that no host checks in the batch's second row: its neighbours' rows stay
    bit by bit, nothing is read past the tokens, results are finite, the next step is right."""
    layer = Layer(capacity=6, counted=True, rotary=rotary)
    with WithPast(layer, on, (4, 4, 4), (4, bad, 4)) as made:
        before = {name: made.held(name) for name in "kv"}
        given = made.tokens(2, 0)
        out, query = made(given, (), (2, 2, 2))
        assert np.isfinite(out).all()
        assert np.isfinite(query).all()
        wanted = made.expected(given, (4, 0, 4), (2, 0, 2))
        np.testing.assert_allclose(out[[0, 2]], wanted[[0, 2]], atol=1e-4, rtol=1e-3)
        past = min(max(bad, 0), 6)
        fresh = min(2, 6 - past)
        if fresh == 0:
            np.testing.assert_array_equal(out[1], 0)
        for name in "kv":
            held, rest = made.held(name), [i for i in range(6) if not past <= i < past + fresh]
            np.testing.assert_array_equal(held[1, rest], before[name][1, rest])
            np.testing.assert_array_equal(held[[0, 2], :4], before[name][[0, 2], :4])
            np.testing.assert_allclose(held[[0, 2]], made.caches[name][[0, 2]], atol=1e-5)


class WithPast:
    """A program whose past is state with another content than the tokens in its caches."""

    def __init__(self, layer: Layer, on: str, start: Lengths, past: Lengths) -> None:
        self.made = Program(layer, on, start)
        wrong = np.array(past, np.int64).astype(np.int32)
        self.made.device.write(self.made.delegate.state.buffers()["past"], np.pad(wrong, (0, 1)))

    def __enter__(self) -> Program:
        return self.made

    def __exit__(self, *_: object) -> None:
        self.made.close()


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("op", ["webgpu.update_cache", "webgpu.attention", "webgpu.rope"])
@pytest.mark.parametrize("numbers", [(106, 2), (-1, 2), (5, 99), (2, -7), (2**31 - 1, 2**31 - 1), (-(2**31), -(2**31))])
def test_D6_kernels_trust_no_lengths(numbers: tuple[int, int], op: str, on: str) -> None:
    """`lengths` itself is wrong: kernels stay within the rows that exist, and within the batch row."""
    b = GraphBuilder()
    rng = np.random.default_rng(0)
    feeds: list[Array] = []
    args: dict[str, Arg] = {}
    for name, given in SHAPES[op].items():
        if not isinstance(given, tuple):
            args[name] = given
            continue
        args[name] = b.input(*given)
        feeds.append(rng.standard_normal(given[1]).astype(np.float32))
    feeds[-1] = np.array([[1, 2, 0, 0], [*numbers, 0, 0], [0, 3, 0, 0], [4, 1, 0, 0]], np.int32)
    graph = b.graph(b.node(op, args, RESULTS[op]))
    (out,) = run(b, graph, device(on), *feeds)
    assert np.isfinite(out).all()
    past = min(max(numbers[0], 0), 9)
    good = feeds[-1].copy()
    good[1] = past, min(max(numbers[1], 0), 3, 9 - past), 0, 0
    if op != "webgpu.rope":  # which clamps each row of its table by itself
        np.testing.assert_array_equal(out, run(b, graph, device(on), *feeds[:-1], good)[0])
    np.testing.assert_array_equal(out[[0, 2, 3]], run(b, graph, device(on), *feeds[:-1], good)[0][[0, 2, 3]])


# -- grids from lengths


def splits(made: Program, totals: Sequence[int], rows: int) -> tuple[int, int]:
    """The most splits of any batch row, by the formulas of attention_splits.wgsl, and the largest number of splits."""
    attention = made.graph.nodes[-1]
    op = find(attention.op)
    assert op is not None
    plain = replace(attention, args={**attention.args, "sizes": None})
    graph, limits = made.graph, made.device.limits
    first = next(iter(op.lower(Lowering(graph, limits, lambda sym: rows if sym.op == "input_dim" else 0), plain)))
    most, tile = int(str(first.consts["SPLITS"])), int(str(first.consts["SPLIT_TILE"]))
    used = []
    for total in totals:
        tiles = (total + tile - 1) // tile
        size = (tiles + most - 1) // most * tile
        used.append(-(-total // size) if size else 0)
    return max(1, *used), most


@pytest.mark.parametrize("rotary", ["fused", "apart"])
@pytest.mark.parametrize("start", [64, 128, 63])
def test_E5_lengths_that_only_the_gpu_advances(start: int, rotary: str) -> None:
    """Steps across an edge of tiles with no number from the host but q_len; grids follow the longest row."""
    past = (start - 1, 3, 0)
    with program(Layer(capacity=160, counted=True, rotary=rotary, d=32), "full", past) as made:
        for step in range(4):
            now = tuple(n + step for n in past)
            made.step(made.tokens(1, step), now, (1, 1, 1))
        kernels = made.launches("attention_stream", "attention_merge", "attention_join")
        assert len(kernels) == 2
        assert all((launch.indirect is not None) == (rotary == "fused") for launch in kernels)
        assert len(made.launches("rope_cache_sizes")) == (rotary == "fused")


LIVE: tuple[tuple[Lengths, Lengths], ...] = (
    ((0, 0, 0), (1, 0, 1)),
    ((31, 64, 5), (1, 1, 1)),
    ((299, 3, 0), (1, 1, 0)),
    ((7, 250, 200), (0, 0, 1)),
)


def test_E5_grids_are_those_of_the_longest_row() -> None:
    """The words that `webgpu.rope_cache` writes, for batches in which another row is the longest each time."""
    layer = Layer(capacity=300, d=32, batch=3)
    with program(layer, "full", (0, 0, 0)) as made:
        ref = made.graph.nodes[-2].outputs[3]
        graph = Graph(**{**vars_of(made.graph), "outputs": (*made.graph.outputs, type(made.graph.outputs[0])(ref))})
        delegate = made.builder.load(graph, made.device)
        try:
            for past, new in LIVE:
                poison(delegate)
                results = delegate.execute(made.inputs(made.tokens(1, 0), past, new))
                words = np.asarray(results[-1][1]).tolist()
                used, most = splits(made, [p + n if n else 0 for p, n in zip(past, new, strict=True)], 1)
                assert words[:3] == [used, layer.kv_heads, layer.batch]
                assert (words[4] == 0) == (used == 1)
                assert most > 1
        finally:
            delegate.close()


def vars_of(graph: Graph) -> dict[str, Any]:
    names = ("values", "nodes", "inputs", "outputs", "mutations", "symbols", "model_id")
    return {name: getattr(graph, name) for name in names}


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("rotary", ["fused", "apart", None])
@pytest.mark.parametrize("d", [128, 64])
def test_E3_E4_replay_with_swapped_rows(d: int, rotary: str | None, on: str) -> None:
    """Totals 2 and 130 of a cache of 130 rows, three tiles: captured once, replayed with the rows of everything
    swapped; the rotary table has NaN behind the rows in use."""
    table = {"table_rows": 130, "guards": 2} if rotary else {}
    layer = Layer(batch=2, heads=2, kv_heads=1, d=d, capacity=130, rotary=rotary, given=True, **table)  # type: ignore[arg-type]
    with program(layer, on, (0, 126)) as made:
        given, past, new = made.tokens(4, 0), (0, 126), (2, 4)
        caches = {name: x.copy() for name, x in made.caches.items()}
        replay = Replay(made.delegate, made.inputs(given, past, new))
        first = made.step(given, past, new, by=replay)
        for order in ([1, 0], [0, 1], [1, 0]):
            for name, x in caches.items():
                made.caches[name] = x[order].copy()
            moved = {name: x[order] for name, x in given.items()}
            out = made.step(moved, [past[i] for i in order], [new[i] for i in order], by=replay)
            np.testing.assert_array_equal(out, first[order])
        assert len(made.delegate._plans) == 1


@pytest.mark.parametrize("on", DEVICES)
def test_one_plan_for_all_lengths(on: str) -> None:
    """New lengths make no plan, no pipeline, no buffer, and are the only bytes written beside the tokens."""
    with program(Layer(capacity=64), on) as made:
        made.step(made.tokens(1, 0), (0, 0, 0), (1, 1, 0))
        (plan,) = made.delegate._plans.values()
        given = made.tokens(1, 1)
        before = made.device.counters.copy()
        results = made.delegate.execute(made.inputs(given, (30, 1, 63), (0, 1, 1)))
        done = made.device.counters.since(before)
        assert (done.pipelines, done.buffers, done.bind_groups) == (0, 0, 0)
        tokens = sum(x.astype(np.float32).nbytes for x in given.values())
        assert done.bytes_written <= tokens + 2 * 16
        assert list(made.delegate._plans.values()) == [plan]
        assert np.asarray(to_user(*results[0], False)).shape == (3, 1, 4, 16)  # type: ignore[misc]


def test_the_buffer_of_lengths_is_a_uniform_one_on_default_limits() -> None:
    """No kernel of a ragged step needs more than the 8 storage buffers that every device has."""
    limits = Limits()
    with program(Layer(), "default-limits") as made:
        made.step(made.tokens(1, 0), (0, 0, 0), (1, 0, 1))
        *_, plan = made.delegate._plans.values()
        kernels = {launch.kernel for launch in plan.launches}
        assert kernels == {"lengths", "rope_cache", "attention_decode", "attention_merge"}
        for key, kernel in made.device._kernels.items():
            if key.kernel in kernels:
                found = kernel.interface.bindings
                assert sum(x.space == "storage" for x in found.values()) <= limits.max_storage_buffers
                if key.kernel != "lengths":
                    assert found["lengths"].space == "uniform"
