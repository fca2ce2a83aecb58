"""Softmax, its logarithm and the safe softmax."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from executorch_webgpu.backend.graph import Sym
from tests.harness import DEVICES, GraphBuilder, device, run
from tests.ops.aten import Case, check, integers, randn, refusal

both_devices = pytest.mark.parametrize("on", DEVICES)
NAMES = ("aten._softmax.default", "aten._log_softmax.default", "aten._safe_softmax.default")
SHAPES = [
    ((1, 4, 3, 128), -1), ((5, 7), 1), ((1, 5000), 1), ((300, 3), -1), ((3, 70, 5), 1), ((40, 65), 0),
    ((2, 3, 4, 5), 2), ((1,), 0), ((), 0), ((3, 0), 1), ((0, 3), 1), ((2, 1000, 33), 1), ((6, 1), 1),
]  # fmt: skip


@both_devices
@pytest.mark.parametrize("name", NAMES)
def test_shapes_and_dtypes(name: str, on: str) -> None:
    last = () if "safe" in name else (False,)
    # x - max is rounded: half a unit of the last place of up to 40 is a relative error of 2e-6 after exp
    atol = 3e-7 if "log" in name else 1e-37
    cases = [Case(name, (randn(*s, scale=6.0), dim, *last), rtol=4e-6, atol=atol) for s, dim in SHAPES]
    cases += [
        Case(name, (randn(5, 65, scale=3.0).to(t), -1, *last), atol=1e-37) for t in (torch.float16, torch.bfloat16)
    ]
    check(cases, device(on))


@both_devices
def test_masked_and_special_rows(on: str) -> None:
    rows = randn(9, 40, scale=3.0)
    rows[0] = -math.inf  # fully masked: NaN, and 0 in the safe one
    rows[1, 3:] = -math.inf
    rows[2, :-1] = -math.inf
    rows[3, 7] = math.nan
    rows[4, 9] = math.inf
    rows[5] = 1e30
    rows[6] = -3e38
    rows[7, 0] = 80.0
    rows[8, :39] = -1e30
    cases = [Case(name, (x, 1, *(() if "safe" in name else (False,))), atol=1e-6 if "log" in name else 1e-37)
             for name in NAMES for x in (rows, rows[:, :2].contiguous())]  # fmt: skip
    columns = rows.T.contiguous()
    cases += [Case("aten._safe_softmax.default", (columns, 0)), Case("aten._softmax.default", (columns, 0, False))]
    check(cases, device(on))


@both_devices
def test_other_overloads_and_casts(on: str) -> None:
    x = randn(4, 33, dtype=torch.float16)
    cases = [
        Case("aten.softmax.int", (randn(4, 33), -1)),
        Case("aten.softmax.int", (x, -1, torch.float32)),
        Case("aten.softmax.int", (integers(4, 33), 0, torch.float32)),
        Case("aten.log_softmax.int", (randn(4, 33), -1), atol=1e-6),
        Case("aten._safe_softmax.default", (x, -1, torch.float32)),
    ]
    check(cases, device(on))


@both_devices
def test_rows_sum_to_one_over_a_vocabulary(on: str) -> None:
    x = randn(2, 33000, scale=4.0)
    builder = GraphBuilder()
    ref = builder.input("f32", x.shape)
    out = builder.node("aten._softmax.default", {"self": ref, "dim": -1, "half_to_float": False}, ("f32", x.shape))
    (got,) = run(builder, builder.graph(out), device(on), x)
    np.testing.assert_allclose(got, torch.softmax(x.double(), -1).numpy(), rtol=3e-6, atol=1e-37)
    np.testing.assert_allclose(got.astype(np.float64).sum(-1), 1.0, rtol=1e-6)


@both_devices
def test_more_workgroups_than_one_dimension_holds(on: str) -> None:
    lines = 65535 * 256 + 300  # lines of one element: 256 a workgroup
    builder = GraphBuilder()
    zeros = builder.node("aten.zeros.default", {"size": (lines, 1), "dtype": None}, ("f32", (lines, 1)))
    out = builder.node("aten._softmax.default", {"self": zeros, "dim": -1, "half_to_float": False}, ("f32", (lines, 1)))
    (got,) = run(builder, builder.graph(out), device(on))
    assert got.min() == got.max() == 1.0


@both_devices
def test_dynamic_sizes(on: str) -> None:
    builder = GraphBuilder()
    rows, columns = Sym("input_dim", (0, 0)), Sym("input_dim", (0, 1))
    ref = builder.input("f32", (rows, columns))
    out = builder.node(
        "aten._softmax.default", {"self": ref, "dim": 1, "half_to_float": False}, ("f32", (rows, columns))
    )
    delegate = builder.load(builder.graph(out), device(on))
    try:
        for shape in ((3, 50), (1, 2), (0, 4), (9, 700), (2, 1)):
            x = randn(*shape)
            ((_, got),) = delegate.execute([("f32", x.numpy())])
            np.testing.assert_allclose(got, torch.softmax(x.double(), 1).numpy(), rtol=2e-6)
    finally:
        delegate.close()


def test_refuses_integer_results() -> None:
    assert "softmax of dtype i64" in str(refusal(Case("aten._softmax.default", (integers(3), 0, False)), [integers(3)]))
