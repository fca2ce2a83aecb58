"""Constants, ranges, identity matrices and triangles."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from executorch_webgpu.backend.graph import Sym
from executorch_webgpu.ops.base import find
from executorch_webgpu.ops.fill import EMPTY, EYES, FULL, ONES, RANGES, ZEROS
from tests.harness import DEVICES, GraphBuilder, device, run
from tests.ops.aten import Case, check, integers, randn, refusal

both_devices = pytest.mark.parametrize("on", DEVICES)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool)


@both_devices
def test_constants(on: str) -> None:
    x, i = randn(3, 5), integers(4)
    cases = [Case("aten.full.default", ([2, 3], v), {"dtype": t}) for t in DTYPES for v in (1, 0, 3)]
    cases += [Case("aten.full.default", ([5], v)) for v in (-1, -math.inf, math.nan, 2.5, True, 0)]
    cases += [Case("aten.full_like.default", (x, 0)), Case("aten.full_like.default", (i, 7), {"dtype": torch.float32})]
    cases += [Case("aten.new_full.default", (x, [2], 1.5)), Case("aten.fill.Scalar", (x, -2.0))]
    cases += [Case(f"aten.{n}.default", ([3, 0, 2],), {"dtype": t}) for n in ("zeros", "ones") for t in DTYPES]
    cases += [Case(f"aten.{n}.default", ([130],), {"dtype": t}) for n in ("zeros", "ones") for t in DTYPES]
    cases += [Case(f"aten.{n}_like.default", (v,)) for n in ("zeros", "ones") for v in (x, i, i > 0)]
    cases += [Case(f"aten.new_{n}.default", (v, [3, 2])) for n in ("zeros", "ones") for v in (x, i)]
    cases += [Case("aten.scalar_tensor.default", (v,), {"dtype": t}) for v, t in (
        (0.0, torch.float32), (0, torch.float32), (-math.inf, torch.float32),
        (-3, torch.int64), (2.5, torch.float16))]  # fmt: skip
    check(cases, device(on))


@both_devices
def test_ranges_and_matrices(on: str) -> None:
    cases = [Case("aten.arange.default", (n,)) for n in (0, 1, 200, 7.5)]
    cases += [Case("aten.arange.start", (-3, 9)), Case("aten.arange.start", (1, 70), {"dtype": torch.float32})]
    cases += [Case("aten.arange.start_step", a) for a in ((0, 32), (5, -10, -3), (0.0, 1.0, 0.125), (10, 10))]
    cases += [Case("aten.arange.start_step", (0, 9, 2), {"dtype": t}) for t in DTYPES if t is not torch.bool]
    cases += [
        Case("aten.eye.default", (5,)),
        Case("aten.eye.m", (3, 7), {"dtype": torch.int64}),
        Case("aten.eye.m", (0, 2)),
    ]
    for name in ("tril", "triu"):
        cases += [Case(f"aten.{name}.default", (randn(5, 7), d)) for d in (0, 1, -2, 9, -9)]
        cases += [
            Case(f"aten.{name}.default", (t,))
            for t in (randn(2, 3, 4, 4), integers(9, 3), integers(5, 5) > 0, randn(0, 3))
        ]
        cases += [Case(f"aten.{name}.default", (torch.full((4, 4), math.nan).half(), 1))]
        cases += [Case(f"aten.{name}.default", (torch.ones(6, 6, dtype=torch.bool), 1))]
    check(cases, device(on))


@both_devices
def test_live_starts_and_dynamic_sizes(on: str) -> None:
    """`scalar_tensor(pos)`, `arange(pos, pos + s)`: positions move without a new plan."""
    builder = GraphBuilder()
    size, position = Sym("input_dim", (0, 0)), Sym("scalar", (1, 0))
    x = builder.input("f32", (size, size))
    builder.input("i64", (1,))
    end = Sym("add", (position, size))
    outs: list[Any] = [
        builder.node("aten.scalar_tensor.default", {"s": position, "dtype": "i32"}, ("i32", ())),
        builder.node("aten.scalar_tensor.default", {"s": position, "dtype": "f32"}, ("f32", ())),
        builder.node(
            "aten.arange.start_step", {"start": position, "end": end, "step": 1, "dtype": None}, ("i64", (size,))
        ),
        builder.node(
            "aten.full.default", {"size": (size,), "fill_value": position, "dtype": "bool"}, ("bool", (size,))
        ),
        builder.node("aten.tril.default", {"self": x, "diagonal": position}, ("f32", (size, size))),
    ]
    delegate = builder.load(builder.graph(*outs), device(on))
    try:
        for count, at in ((4, 3), (4, 0), (1, -1), (9, 2), (4, -2), (70, 100)):
            data = randn(count, count).numpy()
            got = [array for _, array in delegate.execute([("f32", data), ("i64", np.array([at]))])]
            assert got[0] == at
            assert got[1] == at
            np.testing.assert_array_equal(got[2], np.arange(at, at + count))
            np.testing.assert_array_equal(got[3], np.full(count, at != 0))
            np.testing.assert_array_equal(got[4], np.tril(data, at))
        assert len(delegate._plans) == 4  # one a size
    finally:
        delegate.close()


@both_devices
def test_more_workgroups_than_one_dimension_holds(on: str) -> None:
    count = 65535 * 64 + 5
    builder = GraphBuilder()
    out = builder.node("aten.arange.default", {"end": count, "dtype": None}, ("i64", (count,)))
    matrix = builder.node("aten.ones.default", {"size": (count // 4, 4), "dtype": None}, ("f32", (count // 4, 4)))
    lower = builder.node("aten.tril.default", {"self": matrix, "diagonal": 4 - count // 4}, ("f32", (count // 4, 4)))
    got, triangle = run(builder, builder.graph(out, lower), device(on))
    np.testing.assert_array_equal(got, np.arange(count))
    np.testing.assert_array_equal(triangle, np.tril(np.ones((count // 4, 4)), 4 - count // 4))


@both_devices
def test_empty_is_zero(on: str) -> None:
    """Reused memory must not leak into results: what PyTorch leaves undefined is 0 here."""
    builder = GraphBuilder()
    x = builder.input("f32", (100,))
    builder.node("aten.neg.default", {"self": x}, ("f32", (100,)))
    out = builder.node("aten.empty.memory_format", {"size": (100,), "dtype": None}, ("f32", (100,)))
    (got,) = run(builder, builder.graph(out), device(on), np.full(100, np.nan, np.float32))
    assert not got.any()


def test_refusals_say_why() -> None:
    assert "32-bit" in str(refusal(Case("aten.full.default", ([2], 2**40))))
    assert "integer" in str(refusal(Case("aten.full.default", ([2], 2.5), {"dtype": torch.int64})))
    assert "fewer than two" in str(refusal(Case("aten.tril.default", (randn(3),)), [randn(3)]))
    for name in (*FULL, *ZEROS, *ONES, *EMPTY, *RANGES, *EYES):
        assert find(name) is not None
