"""KV cache writes: the written rows are bit-identical to what was given, every other byte of the cache stays."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from executorch_webgpu.backend.graph import Node, Ref, Sym
from executorch_webgpu.ops import base
from executorch_webgpu.ops.base import Dispatch, Lowering, Op, check_node, find
from executorch_webgpu.runtime.errors import InputError
from executorch_webgpu.runtime.gpu.host import to_host
from tests.harness import DEVICES, GraphBuilder, device, run
from tests.ops.copy_cases import NAMES, execute, poison, ramp, same

PLAIN, BY_INDEX = "llama.update_cache.default", "llama.update_cache_with_indices.default"
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.int64)
S, P = Sym("input_dim", (0, 1)), Sym("scalar", (1, 0))


class Cache:
    """A program that writes into one cache: inputs value [B, s, H, D], position [1] and, by index, indices [B, s]."""

    def __init__(self, initial: torch.Tensor, on: str, *, indexed: bool = False, in_place: bool = True) -> None:
        b = GraphBuilder()
        dtype, shape = NAMES[initial.dtype], tuple(initial.shape)
        batch, _, *rest = shape
        value = b.input(dtype, (batch, S, *rest))
        b.input("i64", (1,))
        self.buffer = b.stored("mutable", dtype, to_host(initial)[1], "k_cache")
        args: dict[str, Any] = {"value": value, "cache": self.buffer, "start_pos": P}
        if indexed:
            args["indices"] = b.input("i64", (batch, S))
        made = b.node(BY_INDEX if indexed else PLAIN, args, (dtype, shape), alias=[self.buffer if in_place else None])
        mutations = ((self.buffer.value, made.value),) if in_place else ()
        self.graph = b.graph(made, mutations=mutations)
        assert check_node(self.graph, self.graph.nodes[0]) is None
        self.delegate = b.load(self.graph, device(on))

    def write(self, value: torch.Tensor, at: int, indices: torch.Tensor | None = None) -> Any:
        """Returns the new cache."""
        feeds = [value, torch.tensor([at])] + ([] if indices is None else [indices])
        return execute(self.delegate, *feeds)[0]

    def bytes(self) -> bytes:
        """What the GPU holds."""
        buffer = self.delegate.state.buffers()["k_cache"]
        return bytes(self.delegate.device.gpu.queue.read_buffer(buffer))


@contextmanager
def cache(initial: torch.Tensor, on: str, **options: bool) -> Iterator[Cache]:
    made = Cache(initial, on, **options)
    try:
        yield made
    finally:
        made.delegate.close()


def put(old: torch.Tensor, value: torch.Tensor, at: int) -> torch.Tensor:
    new = old.clone()
    new[:, at : at + value.shape[1]] = value
    return new


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_rows_are_written_exactly_and_the_others_kept(dtype: torch.dtype, in_place: bool, on: str) -> None:
    """Checklist B8, for a batch of two, in place and into a new tensor."""
    old = ramp((2, 9, 2, 4), dtype)
    with cache(old, on, in_place=in_place) as c:
        for length, at in ((3, 0), (1, 8), (9, 0), (2, 5)):
            value = ramp((2, length, 2, 4), dtype, 10 * length + at)
            expected = put(old, value, at)
            poison(c.delegate)
            same(c.write(value, at), expected)
            if in_place:
                old = expected


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 5, 1, 3), (3, 4, 2, 5), (1, 64, 2, 32)], ids=str)
def test_odd_sizes_and_positions_that_move(shape: tuple[int, ...], on: str) -> None:
    """Every position in turn with one row: no new plan, pipeline or bind group after the first (checklist B1)."""
    old = ramp(shape)
    with cache(old, on) as c:
        c.write(torch.zeros(shape[0], 1, *shape[2:]), 0)
        before = c.delegate.device.counters.copy()
        for at in range(shape[1]):
            value = ramp((shape[0], 1, *shape[2:]), start=1000 * at)
            old = put(old, value, at)
            got = c.write(value, at)
        same(got, old)
        spent = c.delegate.device.counters.since(before)
        assert (spent.pipelines, spent.bind_groups, spent.buffers, spent.dispatches) == (0, 0, 0, shape[1])


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize(
    ("length", "at"), [(1, 8), (4, 5), (9, 0), (10, 0), (1, -1), (3, -9), (1, 2**31), (1, 2**40), (1, -(2**31))]
)
def test_a_write_within_capacity_passes_and_one_beyond_leaves_every_byte(length: int, at: int, on: str) -> None:
    """Checklist B6 and B7 with capacity 8: pos + S == 8 passes, 9 raises before anything is written."""
    with cache(ramp((1, 8, 2, 4)), on) as c:
        value = ramp((1, length, 2, 4), start=300)
        if 0 < length <= 8:
            c.write(value, 8 - length)
        before = c.bytes()
        submits = c.delegate.device.counters.submits
        with pytest.raises(InputError, match=r"k_cache of capacity 8|32-bit"):
            c.write(value, at)
        assert c.bytes() == before
        assert c.delegate.device.counters.submits == submits


def test_the_message_names_cache_rows_capacity_and_position() -> None:
    with (
        cache(ramp((1, 8, 2, 4)), DEVICES[0]) as c,
        pytest.raises(
            InputError, match=r"writing 3 rows into cache k_cache of capacity 8 at start_pos .*: 6 is outside \[0, 5\]"
        ),
    ):
        c.write(ramp((1, 3, 2, 4)), 6)


@pytest.mark.parametrize("on", DEVICES)
def test_nan_rows_stay_nan(on: str) -> None:
    """Rows past the valid length may hold anything: a write neither reads nor touches them (bits compared)."""
    old = torch.full((1, 7, 1, 5), torch.nan)
    old[0, 6] = 1e30
    with cache(old, on) as c:
        rows = torch.arange(10.0).reshape(1, 2, 1, 5)
        before = np.frombuffer(c.bytes(), np.uint32)[:35].reshape(7, 5)
        got = c.write(rows, 3)
        after = np.frombuffer(c.bytes(), np.uint32)[:35].reshape(7, 5)
        np.testing.assert_array_equal(np.delete(after, [3, 4], 0), np.delete(before, [3, 4], 0))
        np.testing.assert_array_equal(got[:, 3:5], rows.numpy())


@pytest.mark.parametrize("on", DEVICES)
def test_the_kernel_itself_refuses_a_position_past_the_capacity(on: str) -> None:
    """Positions may be advanced on the GPU, where no host check sees them: lift the check and nothing is written."""
    with cache(ramp((1, 8, 1, 4)), on) as c:
        c.write(ramp((1, 3, 1, 4)), 0)
        before = c.bytes()
        for plan in c.delegate._plans.values():
            plan.checks = ()
        for at in (6, 8, 2**31 - 1, -1, -(2**31)):
            c.write(ramp((1, 3, 1, 4), start=70), at)
            assert c.bytes() == before
        c.write(ramp((1, 3, 1, 4), start=70), 5)
        assert c.bytes() != before


@pytest.mark.parametrize("on", DEVICES)
def test_a_value_in_the_cache_itself(on: str) -> None:
    """The value may be a view of the very buffer that is written; its old content is what counts."""
    old = ramp((1, 4, 1, 4))
    b = GraphBuilder()
    b.input("i64", (1,))
    k = b.stored("mutable", "f32", old.numpy(), "k")
    args: dict[str, Any] = {"value": k, "cache": k, "start_pos": Sym("scalar", (0, 0))}
    y = b.node(PLAIN, args, ("f32", (1, 4, 1, 4)), alias=[k])
    delegate = b.load(b.graph(y, mutations=((k.value, y.value),)), device(on))
    try:
        (got,) = execute(delegate, torch.tensor([0]))
        same(got, old)
    finally:
        delegate.close()


# -- by indices


def put_rows(old: torch.Tensor, value: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    new = old.clone()
    for b in range(indices.shape[0]):
        for s in range(indices.shape[1]):
            new[b, indices[b, s]] = value[b, s]
    return new


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_indices_say_where_and_the_last_of_several_writes_wins(dtype: torch.dtype, in_place: bool, on: str) -> None:
    old = ramp((2, 8, 2, 4), dtype)
    with cache(old, on, indexed=True, in_place=in_place) as c:
        for rows in ([[0, 7], [3, 3]], [[5], [0]], [[1, 6, 1, 6, 2], [0, 0, 0, 0, 0]], [list(range(8)), [7] * 8]):
            indices = torch.tensor(rows)
            value = ramp((2, indices.shape[1], 2, 4), dtype, 17)
            expected = put_rows(old, value, indices)
            poison(c.delegate)
            same(c.write(value, 100, indices), expected)  # start_pos does not matter
            if in_place:
                old = expected


@pytest.mark.parametrize("on", DEVICES)
def test_many_duplicates_are_deterministic(on: str) -> None:
    """700 rows into a ring of 16, as a long prompt does with a sliding window: more rows than a workgroup has lanes."""
    old, value = ramp((1, 16, 1, 6)), ramp((1, 700, 1, 6), start=50)
    indices = (torch.arange(700) * 7 % 16).reshape(1, 700)
    with cache(old, on, indexed=True) as c:
        same(c.write(value, 0, indices), put_rows(old, value, indices))


@pytest.mark.parametrize("on", DEVICES)
def test_writes_that_a_later_one_replaces_are_dropped(on: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel last_write alone: a CPU runs invocations in order, so the cache cannot show that it is needed."""

    def lower(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
        bindings = {"idx": ctx.id(node.args["self"]), "out": node.outputs[0]}
        yield Dispatch("last_write", bindings, {"count": 2 * 70, "length": 70}, ctx.grid_1d(2 * 70, 64))

    find("aten.neg.default")  # loads the registry
    monkeypatch.setitem(base._REGISTRY, "test.last_write", Op("test.last_write", lambda graph, node: None, lower))
    indices = np.stack([np.arange(70) * 3 % 16, np.arange(70)[::-1] % 64]).astype(np.int64)
    b = GraphBuilder()
    x = b.input("i64", indices.shape)
    (got,) = run(b, b.graph(b.node("test.last_write", {"self": x}, ("i64", indices.shape))), device(on), indices)
    expected = [[v if v not in row[s + 1 :] else -(2**31) for s, v in enumerate(row)] for row in indices.tolist()]
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("rows", [[[0, 8]], [[-1, 0]], [[2**31 - 1, 1]]])
def test_a_bad_index_is_refused_by_the_host_and_skipped_by_the_kernel(rows: list[list[int]], on: str) -> None:
    old, value = ramp((1, 8, 1, 4)), ramp((1, 2, 1, 4), start=60)
    indices = torch.tensor(rows)
    with cache(old, on, indexed=True) as c:
        c.write(value, 0, torch.tensor([[0, 1]]))
        before = c.bytes()
        with pytest.raises(InputError, match="k_cache of capacity 8"):
            c.write(value, 0, indices)
        with pytest.raises(InputError, match="start_pos"):
            c.write(value, -1, torch.tensor([[0, 1]]))
        assert c.bytes() == before
        for plan in c.delegate._plans.values():
            plan.element_checks = ()
        good = [(s, row) for s, row in enumerate(rows[0]) if 0 <= row < 8]
        expected = put(old, value, 0)
        for s, row in good:
            expected[0, row] = value[0, s]
        same(c.write(value, 0, indices), expected)


@pytest.mark.parametrize("on", DEVICES)
def test_more_workgroups_than_one_grid_axis_holds(on: str) -> None:
    """A write of 65,600 * 64 single elements (scalar path: the row length is odd) ends in the right last rows."""
    size = 4099
    length = -(-65_600 * 64 // size)
    b = GraphBuilder()
    row = b.input("i32", (1, 1, 1, size))
    b.input("i64", (1,))
    shape = (1, length, 1, size)
    value = b.node("aten.expand_copy.default", {"self": row, "size": shape}, ("i32", shape))
    k = b.stored("mutable", "i32", np.zeros((1, length + 1, 1, size), np.int32), "k")
    y = b.node(PLAIN, {"value": value, "cache": k, "start_pos": P}, ("i32", (1, length + 1, 1, size)), alias=[k])
    tail = b.node(
        "aten.slice_copy.Tensor",
        {"self": y, "dim": 3, "start": size - 2, "end": size, "step": 1},
        ("i32", (1, length + 1, 1, 2)),
    )
    delegate = b.load(b.graph(tail, mutations=((k.value, y.value),)), device(on))
    try:
        numbers = np.arange(size, dtype=np.int32).reshape(1, 1, 1, size)
        (got,) = execute(delegate, numbers, torch.tensor([1]))
        assert (got[0, 0] == 0).all()
        assert (got[0, 1:] == [size - 2, size - 1]).all()
    finally:
        delegate.close()
        delegate.state.close()


def refusal(op: str, value: tuple[str, Any], kept: tuple[str, Any], start: Any = P, indices: Any = None) -> str:
    b = GraphBuilder()
    args: dict[str, Any] = {"value": b.input(*value), "cache": b.input(*kept), "start_pos": start}
    if indices is not None:
        args["indices"] = b.input(*indices)
    out = b.node(op, args, kept)
    assert isinstance(out, Ref)
    graph = b.graph(out)
    found = check_node(graph, graph.nodes[0])
    assert found is not None
    return found


def test_refused_with_a_reason() -> None:
    good = ("f32", (1, S, 2, 4))
    held = ("f32", (1, 8, 2, 4))
    assert "cast the value" in refusal(PLAIN, ("f16", (1, S, 2, 4)), held)
    assert "axis 2" in refusal(PLAIN, ("f32", (1, S, 3, 4)), held)
    assert "axes" in refusal(PLAIN, ("f32", (S, 2, 4)), held)
    assert "negative" in refusal(PLAIN, good, held, -1)
    assert "integers" in refusal(BY_INDEX, good, held, P, ("f32", (1, S)))
    assert "batch and length" in refusal(BY_INDEX, good, held, P, ("i64", (S,)))
