"""Operators that move whole axes, against PyTorch: bit-identical for every dtype."""

from typing import Any

import numpy as np
import pytest
import torch

from executorch_webgpu.backend.graph import Sym, make_dim
from executorch_webgpu.runtime.errors import InputError
from tests.harness import DEVICES, GraphBuilder, device, run
from tests.ops.copy_cases import NAMES, Case, check, execute, poison, ramp, reason, same

OPEN = 2**63 - 1
DTYPES = (torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


def one(name: str, op: str, self: torch.Tensor, literals: dict[str, Any], reference: Any, view: bool = False) -> Case:
    return Case(name, f"aten.{op}", {"self": self}, literals, reference, view)


def sliced(name: str, x: torch.Tensor, dim: int, start: Any, end: Any, step: int = 1, view: bool = False) -> Case:
    def reference(self: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten.slice.Tensor(self, dim, start, end, step).clone()

    return one(name, "slice_copy.Tensor", x, {"dim": dim, "start": start, "end": end, "step": step}, reference, view)


CASES = [
    one(
        "permute_heads",
        "permute_copy.default",
        ramp((1, 5, 3, 8)),
        {"dims": (0, 2, 1, 3)},
        lambda self: self.permute(0, 2, 1, 3),
    ),
    one("permute_odd", "permute.default", ramp((3, 5, 7)), {"dims": (2, 0, 1)}, lambda self: self.permute(2, 0, 1)),
    one(
        "permute_negative",
        "permute_copy.default",
        ramp((3, 5, 7)),
        {"dims": (-1, 1, -3)},
        lambda self: self.permute(2, 1, 0),
    ),
    one(
        "permute_rank8",
        "permute_copy.default",
        ramp((2, 3, 2, 2, 2, 3, 2, 2)),
        {"dims": (7, 6, 5, 4, 3, 2, 1, 0)},
        lambda self: self.permute(7, 6, 5, 4, 3, 2, 1, 0),
    ),
    one(
        "permute_ones",
        "permute_copy.default",
        ramp((1, 4, 1)),
        {"dims": (1, 2, 0)},
        lambda self: self.permute(1, 2, 0),
        True,
    ),
    one(
        "permute_empty",
        "permute_copy.default",
        ramp((3, 0, 2)),
        {"dims": (2, 1, 0)},
        lambda self: self.permute(2, 1, 0),
    ),
    *(
        one(
            f"permute_{NAMES[d]}",
            "permute_copy.default",
            ramp((4, 3, 8), d),
            {"dims": (1, 0, 2)},
            lambda self: self.permute(1, 0, 2),
        )
        for d in DTYPES
    ),
    one(
        "transpose", "transpose_copy.int", ramp((4, 6, 3)), {"dim0": -1, "dim1": 0}, lambda self: self.transpose(-1, 0)
    ),
    one("t", "t_copy.default", ramp((130, 3)), {}, lambda self: self.t()),
    one("t_vector", "t_copy.default", ramp((5,)), {}, lambda self: self.t(), True),
    one("transpose_scalar", "transpose_copy.int", ramp(()), {"dim0": 0, "dim1": -1}, lambda self: self.clone(), True),
    sliced("slice_last", ramp((2, 3, 8)), -1, 4, OPEN),
    sliced("slice_odd", ramp((2, 3, 7)), 2, 1, 6),
    sliced("slice_rows", ramp((9, 4)), 0, 3, 8),
    sliced("slice_step", ramp((2, 11)), 1, 1, 10, 3),
    sliced("slice_negative", ramp((2, 11)), 1, -5, -1),
    sliced("slice_beyond", ramp((5, 4)), 0, -100, 3),
    sliced("slice_past_end", ramp((5, 4)), 0, 7, 9),
    sliced("slice_whole", ramp((5, 4)), 0, 0, OPEN, 1, True),
    sliced("slice_none", ramp((5, 4)), 1, None, 2),
    *(sliced(f"slice_{NAMES[d]}", ramp((3, 8), d), 1, 4, 8) for d in DTYPES),
    one(
        "narrow",
        "narrow.default",
        ramp((4, 9)),
        {"dim": 1, "start": -4, "length": 3},
        lambda self: self.narrow(1, -4, 3),
    ),
    one("select_last", "select_copy.int", ramp((2, 3, 8)), {"dim": 1, "index": -1}, lambda self: self.select(1, -1)),
    one("select_inner", "select.int", ramp((3, 5)), {"dim": -1, "index": 2}, lambda self: self.select(-1, 2)),
    one(
        "select_vector",
        "select_copy.int",
        ramp((6,), torch.int64),
        {"dim": 0, "index": 4},
        lambda self: self.select(0, 4),
    ),
    one(
        "split_sizes",
        "split_with_sizes_copy.default",
        ramp((3, 12)),
        {"split_sizes": (8, 4), "dim": -1},
        lambda self: self.split([8, 4], -1),
    ),
    one(
        "split_odd",
        "split_with_sizes.default",
        ramp((7, 2)),
        {"split_sizes": (1, 0, 6), "dim": 0},
        lambda self: self.split([1, 0, 6], 0),
    ),
    one("split_size", "split_copy.Tensor", ramp((2, 7)), {"split_size": 3, "dim": 1}, lambda self: self.split(3, 1)),
    one("unbind", "unbind_copy.int", ramp((2, 3, 4)), {"dim": 1}, lambda self: self.unbind(1)),
    one("chunk", "chunk.default", ramp((2, 7)), {"chunks": 3, "dim": 1}, lambda self: self.chunk(3, 1)),
    one(
        "as_strided",
        "as_strided_copy.default",
        ramp((4, 5)),
        {"size": (3, 2), "stride": (5, 2), "storage_offset": 1},
        lambda self: self.as_strided((3, 2), (5, 2), 1),
    ),
    one(
        "expand_heads",
        "expand_copy.default",
        ramp((1, 2, 1, 3, 4)),
        {"size": (1, 2, 3, -1, 4), "implicit": False},
        lambda self: self.expand(1, 2, 3, -1, 4),
    ),
    one(
        "expand_lead",
        "expand_copy.default",
        ramp((3, 1)),
        {"size": (2, 3, 5), "implicit": False},
        lambda self: self.expand(2, 3, 5),
    ),
    one(
        "expand_scalar", "expand_copy.default", ramp(()), {"size": (7,), "implicit": False}, lambda self: self.expand(7)
    ),
    one(
        "expand_bool",
        "expand_copy.default",
        ramp((1, 1, 3, 4), torch.bool),
        {"size": (2, 2, 3, 4), "implicit": False},
        lambda self: self.expand(2, 2, 3, 4),
    ),
    one("repeat", "repeat.default", ramp((2, 3)), {"repeats": (2, 1, 3)}, lambda self: self.repeat(2, 1, 3)),
    one("repeat_zero", "repeat.default", ramp((2, 3)), {"repeats": (0, 2)}, lambda self: self.repeat(0, 2)),
    one(
        "interleave",
        "repeat_interleave.self_int",
        ramp((2, 3, 4)),
        {"repeats": 3, "dim": 1, "output_size": None},
        lambda self: self.repeat_interleave(3, 1),
    ),
    one(
        "interleave_flat",
        "repeat_interleave.self_int",
        ramp((2, 3)),
        {"repeats": 2, "dim": None, "output_size": None},
        lambda self: self.repeat_interleave(2),
    ),
    one("flip", "flip.default", ramp((3, 4, 5)), {"dims": (0, -1)}, lambda self: self.flip(0, -1)),
    one("flip_rows", "flip.default", ramp((3, 8)), {"dims": (0,)}, lambda self: self.flip(0)),
    one("flip_empty", "flip.default", ramp((0, 8)), {"dims": (0,)}, lambda self: self.flip(0)),
    one(
        "roll",
        "roll.default",
        ramp((3, 5)),
        {"shifts": (1, -2), "dims": (0, 1)},
        lambda self: self.roll((1, -2), (0, 1)),
    ),
    one("roll_flat", "roll.default", ramp((3, 5)), {"shifts": (4,), "dims": ()}, lambda self: self.roll(4)),
]


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_matches_torch(case: Case, on: str) -> None:
    check(case, on)


REFUSED = [
    (sliced("s", ramp((4,)), 0, 0, 4, 2), {"step": 0}, "step"),
    (
        one("as", "as_strided_copy.default", ramp((4,)), {}, lambda self: self),
        {"size": (4,), "stride": (2,), "storage_offset": 0},
        "element 6",
    ),
    (
        one("r", "roll.default", ramp((2, 2, 2, 2)), {}, lambda self: self),
        {"shifts": (1,) * 4, "dims": (0, 1, 2, 3)},
        "three",
    ),
    (one("rep", "repeat.default", ramp((2,) * 5), {}, lambda self: self), {"repeats": (2,) * 5}, "8 axes"),
    (one("p", "permute_copy.default", ramp((1,) * 9), {}, lambda self: self), {"dims": tuple(range(9))}, "8 axes"),
]


@pytest.mark.parametrize(("case", "literals", "words"), REFUSED, ids=lambda v: getattr(v, "name", ""))
def test_refused_with_a_reason(case: Case, literals: dict[str, Any], words: str) -> None:
    case = Case(case.name, case.op, case.inputs, {**case.literals, **literals}, case.reference)
    assert words in reason(case)


def live_slice(step: int = 1) -> tuple[GraphBuilder, Any]:
    """table[p : p + s] of a [12, 4] table: s the length of input 0, p the only element of input 1."""
    b = GraphBuilder()
    s, p = Sym("input_dim", (0, 0)), Sym("scalar", (1, 0))
    b.input("i64", (s,))
    b.input("i64", (1,))
    table = b.stored("constant", "f32", ramp((12, 4)).numpy(), "table")
    args: dict[str, Any] = {"self": table, "dim": 0, "start": p, "end": make_dim("add", p, s), "step": step}
    return b, b.graph(b.node("aten.slice_copy.Tensor", args, ("f32", (s, 4))))


@pytest.mark.parametrize("on", DEVICES)
def test_slice_at_a_live_start_needs_one_plan_per_length(on: str) -> None:
    b, graph = live_slice()
    delegate = b.load(graph, device(on))
    try:

        def step(length: int, at: int) -> Any:
            return execute(delegate, torch.zeros(length, dtype=torch.int64), torch.tensor([at]))[0]

        step(2, 0)
        plans = len(delegate._plans)
        before = delegate.device.counters.copy()
        for at in (5, 10, 0, -4):
            same(step(2, at), ramp((12, 4))[at : at + 2])
        same(step(2, -2), ramp((12, 4))[10:])
        spent = delegate.device.counters.since(before)
        assert (len(delegate._plans), spent.pipelines, spent.bind_groups) == (plans, 0, 0)
        for length, at in ((12, 0), (1, 11), (7, 3), (12, 0), (0, 4)):  # grows after shrinking
            poison(delegate)
            same(step(length, at), ramp((12, 4))[at : at + length])
        for length, at in ((2, 11), (12, 1), (1, 12), (1, -13)):
            with pytest.raises(InputError, match=r"start of a slice of \d+ along axis 0 \(size 12\) of table"):
                step(length, at)
        same(step(2, 9), ramp((12, 4))[9:11])
    finally:
        delegate.close()


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("inner", [4, 3])
def test_select_and_scatter_at_a_live_index(on: str, inner: int) -> None:
    """select, select_scatter and slice_scatter with one moving index; a negative one counts from the end."""
    x, new = ramp((3, 6, inner)), ramp((3, inner), start=100)
    p = Sym("scalar", (2, 0))
    b = GraphBuilder()
    a, c = b.input("f32", x.shape), b.input("f32", new.shape)
    b.input("i64", ())
    picked = b.node("aten.select_copy.int", {"self": a, "dim": 1, "index": p}, ("f32", new.shape))
    put = b.node("aten.select_scatter.default", {"self": a, "src": c, "dim": 1, "index": p}, ("f32", x.shape))
    wide = b.node("aten.unsqueeze_copy.default", {"self": c, "dim": 1}, ("f32", (3, 1, inner)))
    end = make_dim("add", p, 1)
    args: dict[str, Any] = {"self": a, "src": wide, "dim": 1, "start": p, "end": end, "step": 1}
    part = b.node("aten.slice_scatter.default", args, ("f32", x.shape))
    graph = b.graph(picked, put, part)
    for at in (0, 5, 2, -1, -6):
        got = run(b, graph, device(on), x, new, torch.tensor(at))
        same(got[0], x.select(1, at))
        same(got[1], x.select_scatter(new, 1, at))
        same(got[2], x.select_scatter(new, 1, at))
    for at in (6, -7):
        with pytest.raises(InputError, match="index"):
            run(b, graph, device(on), x, new, torch.tensor(at))


@pytest.mark.parametrize("on", DEVICES)
def test_dynamic_permute_grows_after_shrinking(on: str) -> None:
    b = GraphBuilder()
    s = Sym("input_dim", (0, 1))
    x = b.input("f32", (2, s, 4))
    y = b.node("aten.permute_copy.default", {"self": x, "dims": (1, 0, 2)}, ("f32", (s, 2, 4)))
    delegate = b.load(b.graph(y), device(on))
    try:
        for length in (5, 1, 9, 0, 64, 2):
            value = ramp((2, length, 4))
            execute(delegate, value)
            poison(delegate)
            same(execute(delegate, value)[0], value.permute(1, 0, 2))
    finally:
        delegate.close()


@pytest.mark.parametrize("on", DEVICES)
def test_more_workgroups_than_one_grid_axis_holds(on: str) -> None:
    """Above 65,535 workgroups of 64 the grid is folded: sample the result of a big expand, from its end too."""
    count, step = 65_535 * 64 + 130, 4_999
    b = GraphBuilder()
    x = b.input("i64", (1, 2))
    big = b.node("aten.expand_copy.default", {"self": x, "size": (count // 2, 2)}, ("i64", (count // 2, 2)))
    flat = b.node("aten.view_copy.default", {"self": big, "size": (count,)}, ("i64", (count,)), alias=[big])
    kept = len(range(0, count, step))
    some = b.node(
        "aten.slice_copy.Tensor", {"self": flat, "dim": 0, "start": 0, "end": OPEN, "step": step}, ("i64", (kept,))
    )
    tail = b.node(
        "aten.slice_copy.Tensor", {"self": flat, "dim": 0, "start": -9, "end": OPEN, "step": 1}, ("i64", (9,))
    )
    got = run(b, b.graph(some, tail), device(on), np.array([[7, 8]]))
    whole = np.tile([7, 8], count // 2)
    np.testing.assert_array_equal(got[0], whole[::step])
    np.testing.assert_array_equal(got[1], whole[-9:])
