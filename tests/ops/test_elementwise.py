"""Elementwise operators: accuracy, special values, dtypes, promotion, broadcasting, live scalars, casts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from executorch_webgpu.backend.graph import Sym
from executorch_webgpu.ops.base import find
from executorch_webgpu.ops.elementwise import BINARY, cast_view
from tests.harness import DEVICES, GraphBuilder, device, run
from tests.ops.aten import SPECIAL, Case, check, integers, randn, refusal

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INTS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
both_devices = pytest.mark.parametrize("on", DEVICES)


# -- binary

FLOAT_PAIRS = (
    "add",
    "sub",
    "rsub",
    "mul",
    "div",
    "minimum",
    "maximum",
    "atan2",
    "fmod",
    "remainder",
    "floor_divide",
    "pow",
)
COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
LOGICAL = ("logical_and", "logical_or", "logical_xor")
BITWISE = ("bitwise_and", "bitwise_or", "bitwise_xor")
SHIFTS = ("bitwise_left_shift", "bitwise_right_shift")
INT_PAIRS = ("add", "sub", "rsub", "mul", "minimum", "maximum", "fmod", "remainder", "floor_divide", "pow")


def overload(name: str, *wanted: str) -> str:
    given = BINARY[name][1].split()
    return f"aten.{name}." + next(o for o in (*wanted, "Tensor", "default", "Tensor_Tensor") if o in given)


def operands(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Every special number against every other, and random pairs."""
    x, y = torch.meshgrid(SPECIAL, SPECIAL, indexing="ij")
    left = torch.cat([x.flatten(), randn(300, scale=4.0)])
    right = torch.cat([y.flatten(), randn(300, scale=1.5, seed=5)])
    return left.to(dtype), right.to(dtype)


@both_devices
@pytest.mark.parametrize("name", FLOAT_PAIRS)
def test_binary_floats(name: str, on: str) -> None:
    cases = []
    for dtype in FLOATS:
        x, y = operands(dtype)
        if dtype is torch.bfloat16 and name in ("fmod", "remainder", "floor_divide"):
            continue  # a quotient's jump is elsewhere in bfloat16 than in float64
        op = overload(name)
        cases.append(Case(op, (x, y)))
    check(cases, device(on))


@both_devices
def test_binary_integers(on: str) -> None:
    cases = []
    for name in INT_PAIRS:
        for dtype in INTS:
            low = 0 if dtype is torch.uint8 else -9
            x = integers(40, low=low, dtype=dtype)
            y = integers(40, low=1 if name in ("fmod", "remainder", "floor_divide") else 0, high=5, dtype=dtype, seed=3)
            if low < 0 and name in ("remainder", "fmod", "floor_divide"):
                y = y * torch.where(integers(40, low=0, high=2, seed=4) > 0, 1, -1).to(dtype)
            cases.append(Case(overload(name), (x, y)))
    for name in (*BITWISE, *SHIFTS):
        cases += [
            Case(overload(name), (integers(40, low=0, dtype=t), integers(40, low=0, high=7, dtype=t, seed=3)))
            for t in INTS
        ]
    truths = [integers(9, low=0, high=2, dtype=torch.bool, seed=s) for s in (0, 1)]
    cases += [Case(overload(name), tuple(truths))
              for name in (*BITWISE, "mul", "add", "minimum", "maximum")]  # fmt: skip
    cases += [Case("aten.div.Tensor", (integers(9), integers(9, low=1, seed=2)))]
    cases += [Case("aten.div.Tensor_mode", (integers(40), integers(40, low=1, high=4, seed=2)), {"rounding_mode": mode})
              for mode in ("floor", "trunc")]  # fmt: skip
    cases += [Case("aten.atan2.default", (integers(9), integers(9, seed=2)))]
    check(cases, device(on))


@both_devices
def test_comparisons_and_logic(on: str) -> None:
    cases = []
    for name in (*COMPARISONS, *LOGICAL):
        for dtype in (torch.float32, torch.float16, torch.int64, torch.bool):
            x, y = operands(torch.float32)
            if not dtype.is_floating_point:
                x, y = integers(50, low=-2, high=3), integers(50, low=-2, high=3, seed=7)
            cases.append(Case(overload(name), (x.to(dtype), y.to(dtype))))
        cases.append(Case(overload(name), (integers(30, low=-3, high=3), randn(30).round())))
        cases.append(Case(overload(name), (integers(30, low=0, high=2, dtype=torch.bool), integers(30, low=0, high=2))))
    for name in COMPARISONS:
        half = torch.tensor([0.1, 0.3, -math.inf, math.nan, 65504.0]).half()
        cases += [Case(f"aten.{name}.Scalar", (half, s)) for s in (0.1, 0.3, -math.inf, 1e9)]
        cases += [Case(f"aten.{name}.Scalar", (half.bfloat16(), 0.1)), Case(f"aten.{name}.Scalar", (integers(9), 1.5))]
        cases += [Case(f"aten.{name}.Scalar", (integers(9, low=0, high=2, dtype=torch.bool), True))]
        cases += [Case(f"aten.{name}.Scalar", (SPECIAL, s)) for s in (-math.inf, math.inf, math.nan, 0)]
    check(cases, device(on))


@both_devices
def test_scalar_operands(on: str) -> None:
    f, h, i = randn(2, 7, scale=3.0), randn(9, dtype=torch.float16), integers(2, 7)
    cases = [
        Case(f"aten.{n}.Scalar", (x, s))
        for n in ("add", "sub", "rsub", "mul", "div", "fmod", "remainder", "floor_divide")
        for x, s in ((f, 1.5), (f, 3), (h, 0.75), (i, 3), (i, -4), (i, 2.5))
        if not (n in ("fmod", "remainder", "floor_divide") and x is h)
    ]
    cases += [Case(f"aten.{n}.{o}", (x, y), {"alpha": a}) for n in ("add", "sub", "rsub") for o, x, y, a in (
        ("Tensor", f, randn(7), 2.5), ("Tensor", i, integers(7), -3),
        ("Scalar", f, 1.25, 2), ("Scalar", i, 2, 3))]  # fmt: skip
    cases += [Case(f"aten.{n}.Scalar", (i, 6)) for n in BITWISE]
    cases += [Case(f"aten.{n}.Scalar_Tensor", (13, integers(8, low=0))) for n in BITWISE]
    cases += [Case("aten.remainder.Scalar_Tensor", (7, integers(8, low=1)))]
    cases += [Case("aten.div.Scalar_mode", (f, 0.7), {"rounding_mode": m}) for m in (None, "floor", "trunc")]
    cases += [
        Case("aten.mul.Scalar", (f, math.inf)),
        Case("aten.add.Scalar", (f, math.nan)),
        Case("aten.mul.Scalar", (h, 1e-7)),
    ]
    check(cases, device(on))


@both_devices
def test_powers(on: str) -> None:
    base = torch.cat([SPECIAL, randn(60, scale=3.0)])
    exponents = (2, 3, 4, 5, -3, 0, 1, -1, -2, 0.5, -0.5, 2.5, -1.7, 7.0, 8.0, math.inf, -math.inf)
    cases = [Case("aten.pow.Tensor_Scalar", (base, e)) for e in exponents if e not in (0.5, -0.5)]
    cases += [Case("aten.pow.Tensor_Scalar", (base.abs(), e)) for e in (0.5, -0.5)]
    cases += [Case("aten.pow.Tensor_Scalar", (integers(20), e)) for e in (0, 1, 2, 3, 5, 2.0, 0.5) if e != 0.5]
    cases += [Case("aten.pow.Tensor_Scalar", (base.half(), 2)), Case("aten.pow.Tensor_Scalar", (base.bfloat16(), 3))]
    cases += [Case("aten.pow.Scalar", (s, base)) for s in (2, 0.5, 10000.0, -2)]
    rope = torch.arange(0, 64, 2).float() / 64
    cases += [Case("aten.pow.Scalar", (s, rope)) for s in (10000.0, 500000.0, 1e6)]
    grid = torch.linspace(-12, 12, 49)
    cases += [Case("aten.pow.Tensor_Tensor", (torch.linspace(0.01, 9.0, 49)[:, None], grid))]
    cases += [Case("aten.pow.Tensor_Tensor", (torch.arange(-6.0, 7.0)[:, None], torch.arange(-8.0, 9.0)))]
    check(cases, device(on))


@both_devices
def test_selection_and_bounds(on: str) -> None:
    x, y = SPECIAL.repeat(3)[:30], randn(30)
    mask = integers(30, low=0, high=2, dtype=torch.bool)
    ints = integers(30)
    cases = [
        Case("aten.where.self", (mask, x, y)),
        Case("aten.where.self", (mask, ints, integers(30, seed=1))),
        Case("aten.where.self", (mask, mask, ~mask)),
        Case("aten.where.self", (mask.reshape(6, 5), torch.tensor(0.0), torch.tensor(-math.inf))),
        Case("aten.where.self", (mask.reshape(6, 5, 1), randn(5, 4), randn(6, 1, 4))),
        Case("aten.where.self", (mask, x.half(), y.half())),
        Case("aten.where.ScalarSelf", (mask, -math.inf, y)),
        Case("aten.where.ScalarOther", (mask, y, 2)),
        Case("aten.where.Scalar", (mask, 0.0, -math.inf)),
        Case("aten.masked_fill.Scalar", (y, mask, -math.inf)),
        Case("aten.masked_fill.Scalar", (randn(2, 6, 5), mask.reshape(6, 5), float(torch.finfo(torch.float32).min))),
        Case("aten.masked_fill.Scalar", (ints, mask, -1)),
        Case("aten.masked_fill.Tensor", (y, mask, torch.tensor(3.0))),
        Case("aten.clamp.Tensor", (x, y, y + 1)),
        Case("aten.clamp.Tensor", (y, x)),
        Case("aten.clamp.Tensor", (y, None, x)),
        Case("aten.clamp_min.Tensor", (x, y)),
        Case("aten.clamp_max.Tensor", (x, y)),
        Case("aten.clamp.default", (ints, -3, 4)),
        Case("aten.clamp.default", (ints, -(2**62), 2**63 - 1)),
        Case("aten.hardtanh.default", (ints, -3, 4)),
        Case("aten.min.other", (x, y)),
        Case("aten.max.other", (x, y)),
        Case("aten.addcmul.default", (y, randn(30, seed=1), randn(30, seed=2)), {"value": 0.5}, atol=1e-6),
        Case("aten.addcmul.default", (ints, integers(30, seed=1), integers(30, seed=2)), {"value": -3}),
        Case("aten.addcdiv.default", (y, randn(30, seed=1), randn(30, seed=2).abs() + 1), {"value": 2.0}, atol=1e-6),
    ]
    check(cases, device(on))


SHAPES = [
    ((1,), (1,)), ((), ()), ((5,), ()), ((), (5,)), ((3, 4), (4,)), ((4,), (3, 4)), ((2, 3, 1, 5), (1, 3, 4, 1)),
    ((1, 5, 4, 24), (5, 1, 24)), ((2, 1, 2, 1, 2, 1, 2, 1), (1, 3, 1, 3, 1, 3, 1, 3)), ((7, 1), (1, 9)),
    ((0, 3), (1, 3)), ((3, 0), (3, 1)), ((2, 3, 65), (2, 1, 65)), ((1, 1, 1), (6, 1, 1)), ((257,), (257,)),
]  # fmt: skip


@both_devices
def test_broadcasting(on: str) -> None:
    cases = [Case(op, (randn(*a), randn(*b, seed=1)), rtol=0.0 if "add" in op else None)
             for a, b in SHAPES for op in ("aten.add.Tensor", "aten.maximum.default")]  # fmt: skip
    cases = [Case(c.op, c.args, rtol=1e-6, atol=1e-7) for c in cases]
    check(cases, device(on))


@both_devices
def test_more_workgroups_than_one_dimension_holds(on: str) -> None:
    count = 65535 * 64 + 77
    x = integers(count, low=0, high=2, dtype=torch.bool).reshape(1, count)
    builder = GraphBuilder()
    ref = builder.input("bool", (1, count))
    out = builder.node("aten.logical_not.default", {"self": ref}, ("bool", (1, count)))
    (got,) = run(builder, builder.graph(out), device(on), x)
    np.testing.assert_array_equal(got, ~x.numpy())


@both_devices
def test_live_scalars_and_dynamic_sizes(on: str) -> None:
    """A SymInt operand moves without a new plan; sizes grow after they shrank."""
    builder = GraphBuilder()
    size = Sym("input_dim", (0, 0))
    x = builder.input("i64", (size, 3))
    builder.input("i64", (1,))
    start = Sym("scalar", (1, 0))
    less = builder.node("aten.lt.Scalar", {"self": x, "other": start}, ("bool", (size, 3)))
    total = builder.node("aten.add.Scalar", {"self": x, "other": start, "alpha": 2}, ("i64", (size, 3)))
    ratio = builder.node("aten.div.Scalar", {"self": x, "other": start}, ("f32", (size, 3)))
    delegate = builder.load(builder.graph(less, total, ratio), device(on))
    try:
        plans = set()
        for rows, at in ((4, 3), (4, -7), (2, 5), (9, 1), (1, 2), (4, 4), (0, 5), (70, 11)):
            data = integers(rows, 3, seed=at).numpy()
            got = delegate.execute([("i64", data), ("i64", np.array([at]))])
            np.testing.assert_array_equal(got[0][1], data < at)
            np.testing.assert_array_equal(got[1][1], data + 2 * at)
            np.testing.assert_allclose(got[2][1], data / at, rtol=1e-6)
            plans.add((rows, len(delegate._plans)))
        assert len(delegate._plans) == 6  # one for each number of rows, none for a position
    finally:
        delegate.close()


# -- casts

CAST_DTYPES = (*FLOATS, *INTS, torch.bool)


@both_devices
@pytest.mark.parametrize("source", CAST_DTYPES, ids=str)
def test_casts(source: torch.dtype, on: str) -> None:
    if source is torch.bool:
        x = integers(65, low=0, high=2, dtype=torch.bool)
    elif source.is_floating_point:
        x = torch.cat([randn(60, scale=20.0), torch.tensor([0.0, -0.0, 0.5, -0.9, 1.99])]).to(source)
    else:
        info = torch.iinfo(source)
        low, high = max(info.min, -(2**31)), min(info.max, 2**31 - 1)
        x = torch.cat([integers(63, low=0 if low == 0 else -60, high=61), torch.tensor([low, high])]).to(source)
    cases = [Case("aten._to_copy.default", (x,), {"dtype": target}) for target in CAST_DTYPES]
    if source.is_floating_point:  # negative floats to uint8 are undefined in C
        cases = [Case(c.op, (x.abs(),), c.kwargs) if c.kwargs["dtype"] is torch.uint8 else c for c in cases]
    for name in ("aten.to.dtype", "dim_order_ops._to_dim_order_copy.default"):
        assert find(name) is not None
    check([*cases, Case("aten.to.dtype", (x, torch.float32))], device(on))


@both_devices
def test_float_to_integer_saturates(on: str) -> None:
    x = torch.tensor([1e20, -1e20, math.inf, -math.inf, math.nan, 2147483648.0, -2147483648.0, 2147483520.0, -0.99])
    builder = GraphBuilder()
    ref = builder.input("f32", x.shape)
    out = builder.node("aten._to_copy.default", {"self": ref, "dtype": "i32"}, ("i32", x.shape))
    (got,) = run(builder, builder.graph(out), device(on), x)
    high, low = 2**31 - 1, -(2**31)
    assert got.tolist() == [high, low, high, low, 0, high, low, 2147483520, 0]


def test_casts_that_are_views() -> None:
    """Only casts that leave every stored bit as it is."""
    views = set()
    names = ("f32", "f16", "bf16", "i64", "i32", "i16", "i8", "u8", "bool")
    for source in names:
        for target in names:
            builder = GraphBuilder()
            x = builder.input(source, (2,))
            builder.node("aten._to_copy.default", {"self": x, "dtype": target}, (target, (2,)))
            graph = builder.graph()
            if cast_view(graph, graph.nodes[0]) and source != target:
                views.add((source, target))
    widening = {(a, b) for a in ("i8", "u8") for b in ("i16", "i32", "i64")} | {("i16", "i32"), ("i16", "i64")}
    assert views == widening | {
            ("i32", "i64"), ("i64", "i32"), ("f32", "bf16"), ("bf16", "f32"), ("f32", "f16"), ("f16", "f32"),
        }  # fmt: skip


# -- refusals and the table itself


def test_refusals_say_why() -> None:
    i, f = integers(3), randn(3)
    assert "32-bit" in str(refusal(Case("aten.add.Scalar", (i, 2**40))))
    assert "division by zero" in str(refusal(Case("aten.remainder.Scalar", (i, 0)), [i]))
    assert "float64" in str(refusal(Case("aten.add.Tensor", (f.double(), f.double()))))
    assert "integer values" in str(refusal(Case("aten.pow.Tensor_Scalar", (i, -1)), [i]))
    assert "dimensions" in str(refusal(Case("aten.add.Tensor", (torch.zeros([1] * 9), f[0]))))
    assert refusal(Case("aten.add.Scalar", (f, 2**40))) is None


def test_every_table_line_is_registered_and_tested() -> None:
    tested = {*FLOAT_PAIRS, *COMPARISONS, *LOGICAL, *BITWISE, *SHIFTS, "min", "max", "clamp", "clamp_min", "clamp_max"}
    assert set(BINARY) == tested | {"where", "masked_fill"}
    for name, (_, overloads) in BINARY.items():
        for each in overloads.split():
            assert find(f"aten.{name}.{each}") is not None
            getattr(getattr(torch.ops.aten, name), each)  # AttributeError for an overload that PyTorch lacks
