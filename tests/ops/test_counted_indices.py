"""Indices counted up from an input of one element: the host knows where they end before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from executorch_webgpu.backend.graph import Graph, Ref, Sym
from executorch_webgpu.ops.base import Lowering
from executorch_webgpu.runtime.errors import InputError
from executorch_webgpu.runtime.gpu.host import to_host, to_user
from executorch_webgpu.runtime.methods.delegate import Delegate
from tests.harness import DEVICES, GraphBuilder, device
from tests.ops.copy_cases import ramp

S = Sym("input_dim", (0, 0))
ROWS = 9


def counted(b: GraphBuilder, position: Any, shape: tuple[int, ...], sign: str, cast: bool) -> Any:
    """`position + arange(S)`, or `position - arange(S)`, by way of what exporters put between."""
    steps = b.node("aten.arange.start_step", {"start": 0, "end": S, "step": 1}, ("i64", (S,)))
    if cast:
        position = b.node("aten._to_copy.default", {"self": position}, ("i64", shape))
    if len(shape) == 2:
        position = b.node("aten.view_copy.default", {"self": position, "size": (1,)}, ("i64", (1,)))
    return b.node(f"aten.{sign}.Tensor", {"self": position, "other": steps, "alpha": 1}, ("i64", (S,)))


class Written:
    """A buffer [9, 4] whose rows `position + arange(S)` are written with an input [S, 4], then read back."""

    def __init__(self, on: str, dtype: str = "i64", shape: tuple[int, ...] = (1,), sign: str = "add") -> None:
        b = GraphBuilder()
        self.builder, self.sign = b, sign
        values, position = b.input("f32", (S, 4)), b.input(dtype, shape)
        k = b.stored("mutable", "f32", ramp((ROWS, 4)).numpy(), "k")
        at = counted(b, position, shape, sign, dtype != "i64")
        args: dict[str, Any] = {"self": k, "indices": (at,), "values": values, "accumulate": False}
        written = b.node("aten.index_put.default", args, ("f32", (ROWS, 4)), alias=[k])
        read = b.node("aten.index.Tensor", {"self": written, "indices": (at,)}, ("f32", (S, 4)))
        self.delegate: Delegate = b.load(b.graph(read, k), device(on))
        self.make = lambda at: np.full(shape, at, np.int32 if dtype == "i32" else np.int64)
        self.content = ramp((ROWS, 4)).numpy()

    def __enter__(self) -> Written:
        return self

    def __exit__(self, *_: object) -> None:
        self.delegate.close()

    def execute(self, rows: int, at: int) -> list[np.ndarray[Any, Any]]:
        values = ramp((rows, 4), start=100 + at).numpy()
        found = self.delegate.execute([to_host(values), to_host(self.make(at))])
        places = at + np.arange(rows) * (1 if self.sign == "add" else -1)
        self.content[places] = values
        return [to_user(dtype, array, False) for dtype, array in found]

    def check(self, rows: int, at: int) -> None:
        read, whole = self.execute(rows, at)
        np.testing.assert_array_equal(read, ramp((rows, 4), start=100 + at).numpy())
        np.testing.assert_array_equal(whole, self.content)


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize(("dtype", "shape"), [("i64", (1,)), ("i32", (1,)), ("i64", (1, 1)), ("i64", ())])
def test_rows_up_to_the_last_are_written_and_none_past_it(dtype: str, shape: tuple[int, ...], on: str) -> None:
    with Written(on, dtype, shape) as case:
        for rows, at in ((1, 8), (9, 0), (4, 5), (1, 0)):
            case.check(rows, at)
        for rows, at in ((1, 9), (2, 8), (4, 6), (9, 1), (1, 2**31 - 1)):
            bad = rf"input 1.*index.*size 9.*: {at} is outside \[-?\d+, {ROWS - rows}\]"
            with pytest.raises(InputError, match=bad):
                case.execute(rows, at)
            case.check(1, 3)  # nothing was written, and the next step runs


@pytest.mark.parametrize("on", DEVICES)
def test_counted_down(on: str) -> None:
    with Written(on, sign="sub") as case:
        case.check(4, 3)
        case.check(1, 8)
        with pytest.raises(InputError, match=r"index.*-3 to 0 more than this: 9 is outside \[-?\d+, 8\]"):
            case.execute(4, 9)


def assert_unknown(graph: Graph, refs: Sequence[Ref], size: int) -> None:
    """No check is made of these as indices from 0 to 5, with S = `size`."""
    for ref in refs:
        lowering = Lowering(graph, device(DEVICES[0]).limits, {S: size}.__getitem__)
        lowering.require_elements(ref, 0, 5, "index")
        assert not lowering.checks
        assert not lowering.element_checks


def test_what_is_not_known_is_not_refused() -> None:
    """Two inputs, an input that is taken away and one of several elements could bound legal indices out."""
    b = GraphBuilder()
    values = b.input("f32", (S, 4))
    one, other, several = b.input("i64", (1,)), b.input("i64", (1,)), b.input("i64", (3,))
    first = counted(b, one, (1,), "add", False)
    found = [
        b.node("aten.add.Tensor", {"self": first, "other": other, "alpha": 1}, ("i64", (S,))),
        b.node("aten.sub.Tensor", {"self": first, "other": one, "alpha": 1}, ("i64", (S,))),
        b.node("aten.add.Tensor", {"self": several, "other": one, "alpha": 1}, ("i64", (3,))),
    ]
    graph = b.graph(values, *found)
    on = device(DEVICES[0])
    assert_unknown(graph, found, 3)
    lowering = Lowering(graph, on.limits, {S: 3}.__getitem__)
    lowering.require_elements(first, 0, 5, "index")
    [check] = lowering.element_checks
    assert (check.value, check.low, check.high) == (one.value, 0, 3)


def _slice(start: Any, end: Any, step: int, dim: int = 0) -> dict[str, Any]:
    return {"dim": dim, "start": start, "end": end, "step": step}


@pytest.mark.parametrize("wide", [False, True], ids=["1d", "2d"])
@pytest.mark.parametrize(
    ("cut", "args", "count", "of"),
    [
        ("slice_copy.Tensor", _slice(2, 4, 1), 2, slice(2, 4)),
        ("slice_copy.Tensor", _slice(None, None, 1), 6, slice(None)),
        ("slice_copy.Tensor", _slice(1, 2**62, 2), 3, slice(1, None, 2)),
        ("slice_copy.Tensor", _slice(-2, 2**62, 1), 2, slice(-2, None)),
        ("select_copy.int", {"dim": 0, "index": 4}, 1, slice(4, 5)),
        ("select_copy.int", {"dim": 0, "index": -1}, 1, slice(5, 6)),
    ],
)
def test_what_a_cut_leaves_is_what_counts(cut: str, args: dict[str, Any], count: int, of: slice, wide: bool) -> None:
    """Exactly the positions are refused at which one of the elements that are left is past the last row."""
    b = GraphBuilder()
    position = b.input("i64", (1,))
    at = counted(b, position, (1,), "add", False)
    length, shape, dim = 6, (6,), 0
    if wide:
        at = b.node("aten.unsqueeze_copy.default", {"self": at, "dim": 0}, ("i64", (1, S)))
        shape, dim = (1, 6), 1
    selected = cut.startswith("select")
    left = (count,) if not wide else (1, count)
    cut_at = b.node(f"aten.{cut}", {"self": at, **args, "dim": dim}, ("i64", left[:dim] if selected else left))
    graph = b.graph(b.input("f32", (S, 4)), cut_at)
    rows = np.arange(length)[of]
    assert shape[dim] == length
    assert len(rows) == count
    lowering = Lowering(graph, device(DEVICES[0]).limits, {S: length}.__getitem__)
    lowering.require_elements(cut_at, 0, ROWS - 1, "index")
    [check] = lowering.element_checks
    assert (check.value, check.low, check.high) == (position.value, -rows.min(), ROWS - 1 - rows.max())


def test_cuts_of_what_is_in_no_known_order_are_not_refused() -> None:
    b = GraphBuilder()
    values, position = b.input("f32", (S, 4)), b.input("i64", (1,))
    up, down = (counted(b, position, (1,), sign, False) for sign in ("add", "sub"))
    rows = b.node("aten.expand_copy.default", {"self": up, "size": (2, -1)}, ("i64", (2, S)))
    turned = b.node("aten.flip.default", {"self": up, "dims": (0,)}, ("i64", (S,)))
    cuts = [
        b.node("aten.slice_copy.Tensor", {"self": ref, **_slice(2, 4, 1, dim)}, ("i64", shape))
        for ref, dim, shape in ((down, 0, (2,)), (rows, 1, (2, 2)), (turned, 0, (2,)))
    ]
    graph = b.graph(values, *cuts, rows)
    on = device(DEVICES[0])
    assert_unknown(graph, cuts, 6)
    lowering = Lowering(graph, on.limits, {S: 6}.__getitem__)
    lowering.require_elements(rows, 0, ROWS, "index")  # all of it is known
    assert len(lowering.element_checks) == 1
