"""cat, stack, scatters into slices, copy and padding, against PyTorch: bit-identical."""

from typing import Any

import numpy as np
import pytest
import torch

from executorch_webgpu.backend.graph import Sym, make_dim
from tests.harness import DEVICES, GraphBuilder, device, run
from tests.ops.copy_cases import NAMES, Case, check, execute, in_place, poison, ramp, reason, run_twice, same

OPEN = 2**63 - 1
BF16, F16, F32, I64 = torch.bfloat16, torch.float16, torch.float32, torch.int64


def cat(name: str, tensors: list[torch.Tensor], dim: int, view: bool = False) -> Case:
    return Case(
        name, "aten.cat.default", {"tensors": tensors}, {"dim": dim}, lambda tensors: torch.cat(tensors, dim), view
    )


def copied(name: str, own: torch.Tensor, src: torch.Tensor) -> Case:
    return Case(
        name,
        "aten.copy.default",
        {"self": own, "src": src},
        {"non_blocking": False},
        lambda self, src: torch.ops.aten.copy.default(self, src),
    )


def padded(name: str, own: torch.Tensor, pad: tuple[int, ...], value: float) -> Case:
    return Case(
        name,
        "aten.constant_pad_nd.default",
        {"self": own},
        {"pad": pad, "value": value},
        lambda self: torch.constant_pad_nd(self, pad, value),
    )


def into_slice(name: str, own: torch.Tensor, src: torch.Tensor, dim: int, start: Any, end: Any, step: int = 1) -> Case:
    return Case(
        name,
        "aten.slice_scatter.default",
        {"self": own, "src": src},
        {"dim": dim, "start": start, "end": end, "step": step},
        lambda self, src: self.slice_scatter(src, dim, start, end, step),
    )


FLOATS = torch.tensor([0.0, -0.0, 1.5, -1.5, 2.999, -127.4, 1e-30, torch.nan, torch.inf])
INTS = torch.tensor([0, 1, -1, 127, 128, -129, 255, 256, 70000, -70000])
CASES = [
    cat("cat_heads", [ramp((1, 3, 4, 12)), ramp((1, 3, 4, 12), start=500)], -1),
    cat("cat_pairs", [ramp((1, 3, 4, 5, 1)), ramp((1, 3, 4, 5, 1), start=500)], -1),
    cat("cat_many", [ramp((n, 3), start=n) for n in (1, 0, 4, 2, 7)], 0),
    cat("cat_empty_legacy", [ramp((0,)), ramp((2, 3)), ramp((1, 3))], 0),
    cat("cat_one", [ramp((2, 3))], 1, True),
    cat("cat_cast", [ramp((2, 4), F16), ramp((2, 8)), ramp((2, 4), I64)], 1),
    *(cat(f"cat_{NAMES[d]}", [ramp((2, 3), d), ramp((2, 5), d)], 1) for d in (F16, BF16, I64, torch.int8, torch.bool)),
    Case(
        "stack",
        "aten.stack.default",
        {"tensors": [ramp((2, 3)), ramp((2, 3), start=9), ramp((2, 3), start=20)]},
        {"dim": -1},
        lambda tensors: torch.stack(tensors, -1),
    ),
    Case(
        "stack_rows", "aten.stack.default", {"tensors": [ramp((2, 8)), ramp((2, 8), start=9)]}, {"dim": 0}, torch.stack
    ),
    into_slice("into_rows", ramp((7, 4)), ramp((3, 4), start=50), 0, 2, 5),
    into_slice("into_step", ramp((3, 9)), ramp((3, 3), start=50), 1, 1, 8, 3),
    into_slice("into_tail", ramp((3, 9), F16), ramp((3, 2), F16, 50), -1, -2, OPEN),
    into_slice("into_nothing", ramp((3, 4)), ramp((3, 0)), 1, 2, 2),
    Case(
        "into_select",
        "aten.select_scatter.default",
        {"self": ramp((3, 5, 4)), "src": ramp((3, 4), start=90)},
        {"dim": 1, "index": -2},
        lambda self, src: self.select_scatter(src, 1, -2),
    ),
    copied("copy_same", ramp((32,), I64), ramp((32,), I64, 7)),
    copied("copy_broadcast", ramp((2, 3, 5)), ramp((3, 1), start=40)),
    copied("copy_scalar", ramp((2, 3)), torch.tensor(4.5)),
    copied("copy_f16_f32", ramp((3, 4)), ramp((3, 4), F16)),
    copied("copy_f32_f16", ramp((3, 5), F16), ramp((3, 5))),
    copied("copy_f32_bf16", torch.zeros(9, dtype=BF16), FLOATS),
    copied("copy_f32_bool", torch.zeros(9, dtype=torch.bool), FLOATS),
    copied("copy_f32_i64", torch.zeros(7, dtype=I64), FLOATS[:7]),
    copied("copy_i64_i8", torch.zeros(10, dtype=torch.int8), INTS),
    copied("copy_i64_i16", torch.zeros(10, dtype=torch.int16), INTS),
    copied("copy_i64_u8", torch.zeros(10, dtype=torch.uint8), INTS),
    copied("copy_i64_f32", torch.zeros(10), INTS),
    copied("copy_i64_bool", torch.zeros(10, dtype=torch.bool), INTS),
    copied("copy_bool_f32", torch.zeros(12), ramp((12,), torch.bool)),
    copied("copy_bool_u8", torch.zeros(12, dtype=torch.uint8), ramp((12,), torch.bool)),
    padded("pad_both", ramp((2, 3, 4)), (1, 2, 0, 3), 7.5),
    padded("pad_crop", ramp((5, 6)), (-1, 2, -2, -1), float("-inf")),
    padded("pad_nan", ramp((3,), F16), (2, 0), float("nan")),
    padded("pad_int", ramp((2, 2), I64), (1, 1), -9),
    padded("pad_bool", ramp((4,), torch.bool), (1, 1), True),
    padded("pad_empty", ramp((0, 2)), (0, 0, 1, 2), 3.0),
]


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_matches_torch(case: Case, on: str) -> None:
    check(case, on)


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize(
    "case",
    [c for c in CASES if c.name.startswith(("into_rows", "into_step", "into_sel", "copy_same"))],
    ids=lambda c: c.name,
)
def test_in_place_writes_only_the_part(case: Case, on: str) -> None:
    b, graph, feeds = in_place(case)
    before = device(on).counters.copy()
    got = run_twice(b, graph, on, *feeds)
    assert device(on).counters.since(before).dispatches == 2  # one for each of the two runs
    same(got[0], case.expected()[0])


@pytest.mark.parametrize("on", DEVICES)
def test_a_source_in_the_written_buffer_is_read_before(on: str) -> None:
    """copy of the buffer's own view into itself: the source shares the storage that is written."""
    b = GraphBuilder()
    own = ramp((4, 4))
    x = b.stored("mutable", "f32", own.numpy(), "x")
    seen = b.node("aten.view_copy.default", {"self": x, "size": (16,)}, ("f32", (16,)), alias=[x])
    y = b.node("aten.copy.default", {"self": x, "src": seen, "non_blocking": False}, ("f32", (16,)), alias=[x])
    (got,) = run(b, b.graph(y, mutations=((x.value, y.value),)), device(on))
    same(got, own.reshape(16))


@pytest.mark.parametrize("on", DEVICES)
def test_dynamic_cat_grows_after_shrinking(on: str) -> None:
    b = GraphBuilder()
    s = Sym("input_dim", (0, 0))
    x, y = b.input("f32", (s, 3)), b.input("f32", (2, 3))
    total = make_dim("add", s, 2)
    out = b.node("aten.cat.default", {"tensors": (x, y), "dim": 0}, ("f32", (total, 3)))
    delegate = b.load(b.graph(out), device(on))
    try:
        for length in (4, 1, 9, 0, 33, 2):
            feeds = [ramp((length, 3)), ramp((2, 3), start=77)]
            execute(delegate, *feeds)
            poison(delegate)
            same(execute(delegate, *feeds)[0], torch.cat(feeds))
    finally:
        delegate.close()


@pytest.mark.parametrize("on", DEVICES)
def test_padding_with_more_workgroups_than_one_grid_axis_holds(on: str) -> None:
    count = 65_535 * 64 + 70
    b = GraphBuilder()
    x = b.input("i64", (3,))
    big = b.node("aten.constant_pad_nd.default", {"self": x, "pad": (count - 3, 0), "value": 5}, ("i64", (count,)))
    tail = b.node("aten.slice_copy.Tensor", {"self": big, "dim": 0, "start": -5, "end": OPEN, "step": 1}, ("i64", (5,)))
    some = b.node(
        "aten.slice_copy.Tensor",
        {"self": big, "dim": 0, "start": 0, "end": OPEN, "step": 99_991},
        ("i64", (len(range(0, count, 99_991)),)),
    )
    got = run(b, b.graph(tail, some), device(on), np.array([1, 2, 3]))
    np.testing.assert_array_equal(got[0], [5, 5, 1, 2, 3])
    assert set(got[1].tolist()) == {5}


def test_refused_with_a_reason() -> None:
    step = into_slice("s", ramp((4,)), ramp((2,)), 0, 0, 4, 2)
    assert "step" in reason(Case("s", step.op, step.inputs, {**step.literals, "step": 0}, step.reference))
    wide = Case(
        "p", "aten.constant_pad_nd.default", {"self": ramp((1,) * 9)}, {"pad": (), "value": 0}, lambda self: self
    )
    assert "8 axes" in reason(wide)
    for own, value in ((ramp((3,)), 1e300), (ramp((3,), I64), 2**31)):
        case = Case(
            "v", "aten.constant_pad_nd.default", {"self": own}, {"pad": (1, 1), "value": value}, lambda self: self
        )
        assert "does not fit" in reason(case)
