"""Reductions, positions of extrema, variances, norms and cumulative sums."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from executorch_webgpu.backend.graph import Sym
from executorch_webgpu.ops.reduce import lanes
from executorch_webgpu.runtime.errors import InputError
from tests.harness import DEVICES, GraphBuilder, device, run
from tests.ops.aten import SPECIAL, Case, check, integers, randn, refusal

both_devices = pytest.mark.parametrize("on", DEVICES)

# shape, reduced dimensions: last, first, middle, several, not neighbours, long rows, many short rows, single elements
REDUCED = [
    ((5, 128), [-1]), ((3, 1, 33), [2]), ((1, 4096), [-1]), ((2, 5000), [1]), ((700, 3), [1]), ((130, 70), [0]),
    ((3, 40, 5), [1]), ((4, 5, 6), [0, 1]), ((4, 5, 6), [0, 2]), ((2, 3, 4, 5, 6), [1, 3]),
    ((2, 3, 4, 5, 6), [0, 2, 4]),
    ((7,), [0]), ((1, 1), [0, 1]), ((6, 1), [1]), ((3, 0, 4), [0]), ((9, 257, 65), [1]),
    ((2, 3, 1, 2, 2, 2, 2, 3), [0, 3, 5]),
]  # fmt: skip
EMPTY = [((3, 0), [1]), ((0, 4), [0]), ((2, 0, 3), [0, 1, 2])]


@both_devices
@pytest.mark.parametrize("name", ["sum.dim_IntList", "mean.dim", "amax.default", "amin.default"])
def test_floats(name: str, on: str) -> None:
    cases = []
    for shape, dims in REDUCED:
        for keep in (False, True):
            x = randn(*shape, scale=2.0) + 0.5
            terms = math.prod(shape[d] for d in dims)
            # a sum's error is relative to the sum of the magnitudes
            scale = {"s": terms, "m": 1}.get(name[0], 0)  # extrema are exact
            cases.append(Case(f"aten.{name}", (x, dims, keep), rtol=1e-6 if scale else 0, atol=3e-7 * scale))
    for dtype in (torch.float16, torch.bfloat16):
        cases.append(Case(f"aten.{name}", (randn(6, 128, dtype=dtype), [-1], True), atol=1e-5))
    if name.startswith(("sum", "mean")):
        cases += [Case(f"aten.{name}", (torch.zeros(shape), dims)) for shape, dims in EMPTY]
        cases += [Case(f"aten.{name}", (randn(3, 4), None), atol=1e-6), Case(f"aten.{name}", (randn(), [0]), atol=1e-6)]
    special = torch.stack([torch.roll(SPECIAL, i)[:9] for i in range(12)])
    cases += [Case(f"aten.{name}", (special, [d])) for d in (0, 1)]
    check(cases, device(on))


@both_devices
def test_whole_tensors_and_dtypes(on: str) -> None:
    x, i = randn(3, 40, 7), integers(3, 40, 7)
    b = integers(5, 6, low=0, high=2, dtype=torch.bool)
    cases = [Case(f"aten.{n}.default", (x,), atol=1e-4) for n in ("sum", "mean", "max", "min")]
    cases += [
        Case("aten.prod.default", (randn(50),), rtol=1e-5),
        Case("aten.prod.dim_int", (randn(6, 9), 1), rtol=5e-6),
    ]
    cases += [Case(f"aten.{n}.default", (i,)) for n in ("sum", "max", "min", "any", "all")]
    cases += [Case("aten.amax.default", (i, [0, 2])), Case("aten.amin.default", (i.to(torch.int8), [1], True))]
    cases += [Case("aten.sum.dim_IntList", (t, [1])) for t in (i, b, i.to(torch.int32), i.to(torch.uint8))]
    cases += [Case("aten.sum.dim_IntList", (i, [1]), {"dtype": torch.float32}), Case("aten.sum.default", (b,))]
    cases += [Case("aten.mean.dim", (i, [0]), {"dtype": torch.float32}), Case("aten.prod.dim_int", (integers(4, 5), 0))]
    cases += [
        Case("aten.sum.dim_IntList", (randn(4, 5, dtype=torch.float16), [1]), {"dtype": torch.float32}, atol=1e-5)
    ]
    cases += [Case("aten.amax.default", (torch.full((2, 3), -math.inf), [1])), Case("aten.amax.default", (b, [0]))]
    check(cases, device(on))


@both_devices
def test_any_and_all(on: str) -> None:
    rows = torch.tensor([[0, 0, 0], [0, 1, 0], [1, 1, 1]], dtype=torch.bool)
    f = torch.tensor([[0.0, -0.0, 0.0], [math.nan, 0.0, 0.0], [1.0, math.nan, -math.inf]])
    cases = []
    for name in ("any", "all"):
        for x in (rows, f, f.half(), rows.long()):
            cases += [Case(f"aten.{name}.dim", (x, -1, keep)) for keep in (True, False)]
            cases += [Case(f"aten.{name}.default", (x,)), Case(f"aten.{name}.dims", (x, [0, 1]))]
        cases += [
            Case(f"aten.{name}.dim", (torch.zeros(2, 0, dtype=torch.bool), 1)),
            Case(f"aten.{name}.dims", (rows,)),
        ]
        cases += [
            Case(f"aten.{name}.dim", (rows.to(torch.uint8), 1)),
            Case(f"aten.{name}.dim", (integers(1, 4, 9, 300) > 8, -1, True)),
        ]
    check(cases, device(on))


@both_devices
def test_positions(on: str) -> None:
    ties = torch.tensor(
        [[3.0, 1.0, 3.0, 1.0], [math.nan, 5.0, math.nan, 1.0], [-math.inf] * 4, [math.inf, 1.0, math.inf, -1.0]]
    )
    cases = []
    for x in (ties, ties.half(), randn(5, 3000), randn(3, 70, 5), randn(700, 3), integers(4, 50), torch.zeros(1, 1)):
        for dim in range(x.dim()):
            cases += [Case(f"aten.{n}.default", (x, dim, keep)) for n in ("argmax", "argmin") for keep in (False, True)]
            cases += [Case(f"aten.{n}.dim", (x, dim, True)) for n in ("max", "min")]
        cases += [Case(f"aten.{n}.default", (x,)) for n in ("argmax", "argmin")]
    cases += [Case("aten.max.dim", (torch.tensor(3.0), 0)), Case("aten.argmax.default", (torch.zeros(0, 3), 1))]
    cases += [Case("aten.max.dim", (integers(5, 6, low=0, high=2, dtype=torch.bool), 1))]
    check(cases, device(on))


@both_devices
def test_spread_and_norms(on: str) -> None:
    x = randn(6, 40, 5) + 30.0
    cases = []
    for name in ("var", "std", "var_mean"):
        cases += [
            Case(f"aten.{name}.correction", (x, [1]), {"correction": c, "keepdim": True}, rtol=5e-6) for c in (0, 1, 2)
        ]
        cases += [
            Case(f"aten.{name}.dim", (x, [0, 2], False), rtol=5e-6),
            Case(f"aten.{name}.default", (x, False), rtol=5e-6),
        ]
        cases += [Case(f"aten.{name}.dim", (x[:, :1], [1])), Case(f"aten.{name}.correction", (x,), rtol=5e-6)]
    cases += [Case("aten.linalg_vector_norm.default", (x, p, [-1], True)) for p in (1, 2, math.inf, 2.0)]
    cases += [
        Case("aten.linalg_vector_norm.default", (x,)),
        Case("aten.norm.Scalar", (x,)),
        Case("aten.norm.ScalarOpt_dim", (x, 2, [0])),
    ]
    check(cases, device(on))


@both_devices
def test_cumulative_sums(on: str) -> None:
    cases = [Case("aten.cumsum.default", (randn(*shape), dim), rtol=1e-5, atol=1e-4)
             for shape, dim in (((7,), 0), ((3, 256), 1), ((2, 1000), -1), ((600, 3), 0),
                                ((3, 40, 5), 1), ((3, 0), 1), ((), 0))]  # fmt: skip
    cases += [Case("aten.cumsum.default", (integers(3, 700, dtype=t, low=0), 1)) for t in (torch.int64, torch.int32)]
    cases += [Case("aten.cumsum.default", (integers(3, 300, low=0, high=2, dtype=torch.bool), 1))]
    cases += [Case("aten.cumsum.default", (integers(9), 0), {"dtype": torch.float32})]
    cases += [Case("aten.cumsum.default", (torch.tensor([1.0, math.inf, 2.0, math.nan]), 0))]
    check(cases, device(on))


@both_devices
def test_more_workgroups_than_one_dimension_holds(on: str) -> None:
    """Lines of one element: 256 a workgroup for the reductions, one a workgroup for the cumulative sum."""
    assert lanes(1, 1) == (1, 1)
    count = 65535 * 256 + 300
    builder = GraphBuilder()
    args: dict[str, Any] = {"end": count, "dtype": "i32"}
    column = builder.node("aten.arange.default", args, ("i32", (count, 1)))
    top = builder.node("aten.amax.default", {"self": column, "dim": (1,), "keepdim": False}, ("i32", (count,)))
    places = ("aten.max.dim", {"self": column, "dim": 1, "keepdim": False})
    best, _ = builder.node(*places, ("i32", (count,)), ("i64", (count,)))
    got = run(builder, builder.graph(top, best), device(on))
    assert np.array_equal(got[0], np.arange(count))
    assert np.array_equal(got[1], np.arange(count))

    count = 65535 + 9
    builder = GraphBuilder()
    column = builder.node("aten.arange.default", {"end": count, "dtype": None}, ("i64", (count, 1)))
    out = builder.node("aten.cumsum.default", {"self": column, "dim": 1, "dtype": None}, ("i64", (count, 1)))
    (got,) = run(builder, builder.graph(out), device(on))
    assert np.array_equal(got[:, 0], np.arange(count))


@both_devices
def test_dynamic_sizes(on: str) -> None:
    builder = GraphBuilder()
    size = Sym("input_dim", (0, 0))
    x = builder.input("f32", (size, 6))
    total = builder.node(
        "aten.sum.dim_IntList", {"self": x, "dim": (0,), "keepdim": False, "dtype": None}, ("f32", (6,))
    )
    rows = builder.node("aten.mean.dim", {"self": x, "dim": (-1,), "keepdim": True, "dtype": None}, ("f32", (size, 1)))
    place = builder.node("aten.argmax.default", {"self": x, "dim": 1, "keepdim": False}, ("i64", (size,)))
    top = builder.node("aten.amax.default", {"self": x, "dim": (0,), "keepdim": False}, ("f32", (6,)))
    delegate = builder.load(builder.graph(total, rows, place, top), device(on))
    try:
        for count in (5, 2, 40, 1, 300):
            data = randn(count, 6).numpy()
            got = [array for _, array in delegate.execute([("f32", data)])]
            np.testing.assert_allclose(got[0], data.astype(np.float64).sum(0), rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(got[1], data.astype(np.float64).mean(1, keepdims=True), rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(got[2], data.argmax(1))
            np.testing.assert_array_equal(got[3], data.max(0))
        with pytest.raises(InputError, match="size of reduced dimension 0"):
            delegate.execute([("f32", np.zeros((0, 6), np.float32))])
    finally:
        delegate.close()


def test_refusals_say_why() -> None:
    x = randn(3, 4)
    assert "norms 1, 2 and infinity" in str(refusal(Case("aten.linalg_vector_norm.default", (x, 3))))
    empty = torch.zeros(3, 0)
    assert "no elements" in str(refusal(Case("aten.amax.default", (empty, [1])), [x[0]]))
    assert "no elements" in str(refusal(Case("aten.argmax.default", (empty, 1)), [integers(3)]))
    assert refusal(Case("aten.amax.default", (empty, [0]))) is None
    assert "dimensions" in str(refusal(Case("aten.sum.dim_IntList", (torch.zeros([1] * 9), [0]))))


def test_lanes_fill_a_workgroup() -> None:
    for length in (1, 2, 3, 4, 5, 31, 64, 128, 4096, 10**6):
        for inner in (1, 2, 31, 32, 1000):
            count, along = lanes(length, inner)
            assert 1 <= count <= 256
            assert count & (count - 1) == 0
            assert along == (inner == 1)
