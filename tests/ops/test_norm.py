"""RMSNorm and LayerNorm against float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from executorch_webgpu.backend.graph import Ref, Sym
from executorch_webgpu.ops.base import Lowering, check_node, find
from executorch_webgpu.runtime.gpu.host import bf16_to_f32, f32_to_bf16
from tests.harness import DEVICES, GraphBuilder, device, run

Array = np.ndarray[Any, Any]
TOLERANCE = {"f32": 1e-6, "f16": 6e-4, "bf16": 4e-3}
EPS = 1e-5
rng = np.random.default_rng(11)


def random(dtype: str, shape: Sequence[int], offset: float = 0.0) -> Array:
    """Values that `dtype` holds exactly, as float32."""
    values = (rng.standard_normal(tuple(shape)) + offset).astype(np.float32)
    if dtype == "f16":
        return values.astype(np.float16).astype(np.float32)
    return bf16_to_f32(f32_to_bf16(values)) if dtype == "bf16" else values


def reference(
    x: Array, axes: int, weight: Array | None, bias: Array | None, eps: float, center: bool
) -> tuple[Array, Array, Array]:
    """(result, mean, rstd) in float64."""
    wide = x.astype(np.float64)
    over = tuple(range(x.ndim - axes, x.ndim))
    mean = wide.mean(over, keepdims=True) if center else np.zeros_like(wide.mean(over, keepdims=True))
    rstd = 1 / np.sqrt(((wide - mean) ** 2).mean(over, keepdims=True) + eps)
    out = (wide - mean) * rstd
    if weight is not None:
        out = out * weight
    return (out if bias is None else out + bias), mean, rstd


class Case:
    """A norm node: inputs are graph inputs, bfloat16 ones constants."""

    def __init__(self) -> None:
        self.b = GraphBuilder()
        self.arrays: list[Array] = []

    def tensor(self, dtype: str, array: Array | None) -> Ref | None:
        if array is None:
            return None
        if dtype == "bf16":
            return self.b.stored("constant", "bf16", f32_to_bf16(array), f"c{len(self.b.values)}")
        self.arrays.append(array.astype(np.float16) if dtype == "f16" else array)
        return self.b.input(dtype, array.shape)

    def run(self, on: str, op: str, args: dict[str, Any], *outs: tuple[str, Sequence[int]]) -> list[Array]:
        made = self.b.node(op, args, *outs)
        graph = self.b.graph(*(made if isinstance(made, tuple) else (made,)))
        assert check_node(graph, graph.nodes[-1]) is None
        return [np.asarray(r) for r in run(self.b, graph, device(on), *self.arrays)]


def close(got: Array, want: Array, dtype: str, scale: float = 0.0) -> None:
    least = 2.0**-25 if dtype == "f16" else 1e-30  # half the distance of subnormal float16: their rounding
    np.testing.assert_allclose(
        got.astype(np.float64), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * scale + least
    )


# (shape, normalised axes)
SHAPES = (
    ((1, 1), 1), ((1, 4), 1), ((3, 5), 1), ((2, 7, 64), 1), ((2, 3, 4, 32), 1), ((9, 63), 1),
    ((1, 1, 130), 1), ((5, 257), 1), ((1, 4096), 1), ((2, 1023), 1), ((33, 128), 1), ((2, 3, 4, 5), 2),
    ((6, 8, 16), 2), ((7,), 1), ((8,), 1),
)  # fmt: skip


@pytest.mark.parametrize("on", DEVICES)
def test_rms_norm_shapes(on: str) -> None:
    for i, (shape, axes) in enumerate(SHAPES):
        x = random("f32", shape)
        weight = random("f32", shape[len(shape) - axes :]) if i % 3 else None
        case = Case()
        args: dict[str, Any] = {"input": case.tensor("f32", x), "weight": case.tensor("f32", weight), "eps": EPS}
        op = "webgpu.rms_norm" if axes == 1 else "aten.rms_norm.default"
        if axes > 1:
            args["normalized_shape"] = shape[len(shape) - axes :]
        (got,) = case.run(on, op, args, ("f32", shape))
        close(got, reference(x, axes, weight, None, EPS, False)[0], "f32")


@pytest.mark.parametrize("on", DEVICES)
def test_layer_norm_shapes(on: str) -> None:
    for i, (shape, axes) in enumerate(SHAPES):
        end = shape[len(shape) - axes :]
        stats = (*shape[: len(shape) - axes], *[1] * axes)
        x = random("f32", shape, offset=3.0)
        weight, bias = random("f32", end) if i % 3 else None, random("f32", end) if i % 2 else None
        want, mean, rstd = reference(x, axes, weight, bias, EPS, True)
        for op, outs in (
            ("aten.layer_norm.default", (("f32", shape),)),
            ("aten.native_layer_norm.default", (("f32", shape), ("f32", stats), ("f32", stats))),
        ):
            case = Case()
            args: dict[str, Any] = {
                "input": case.tensor("f32", x),
                "normalized_shape": end,
                "weight": case.tensor("f32", weight),
                "bias": case.tensor("f32", bias),
                "eps": EPS,
            }
            got = case.run(on, op, args, *outs)
            # x - mean cancels: the error is relative to |x| * rstd, not to the result
            scale = float(np.abs(x).max() * rstd.max() * (1 if weight is None else np.abs(weight).max()))
            close(got[0], want, "f32", scale)
            if len(got) == 3:
                close(got[1], mean, "f32")
                close(got[2], rstd, "f32", float(rstd.max()) if shape[-1] == 1 else 0.0)


@pytest.mark.parametrize("on", DEVICES)
def test_fused_rms_norm_gives_rstd(on: str) -> None:
    for shape in ((3, 24), (5, 7)):
        x, weight = random("f32", shape), random("f32", shape[-1:])
        case = Case()
        args: dict[str, Any] = {
            "input": case.tensor("f32", x),
            "normalized_shape": shape[-1:],
            "weight": case.tensor("f32", weight),
            "eps": None,
        }
        got = case.run(on, "aten._fused_rms_norm.default", args, ("f32", shape), ("f32", (shape[0], 1)))
        want, _, rstd = reference(x, 1, weight, None, 2.0**-23, False)
        close(got[0], want, "f32")
        close(got[1], rstd, "f32")


@pytest.mark.parametrize("on", DEVICES)
def test_default_eps_is_that_of_float32(on: str) -> None:
    x = np.full((2, 4), 1e-3, np.float32)
    for dtype in ("f32", "f16"):
        case = Case()
        data = x.astype(np.float16).astype(np.float32) if dtype == "f16" else x
        args: dict[str, Any] = {
            "input": case.tensor(dtype, data),
            "normalized_shape": (4,),
            "weight": None,
            "eps": None,
        }
        (got,) = case.run(on, "aten.rms_norm.default", args, (dtype, (2, 4)))
        close(got, reference(data, 1, None, None, 2.0**-23, False)[0], dtype)


# (input, weight, result)
MIXES = ("f16 f16 f16", "f16 f32 f16", "f32 f16 f32", "bf16 bf16 bf16", "bf16 f32 bf16", "f16 bf16 f32", "f32 f32 f16")


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("op", ["webgpu.rms_norm", "aten.layer_norm.default"])
def test_dtypes(op: str, on: str) -> None:
    for mix in MIXES:
        x_type, w_type, out_type = mix.split()
        for shape in ((3, 24), (3, 13)):
            x, weight = random(x_type, shape), random(w_type, shape[-1:])
            case = Case()
            args: dict[str, Any] = {"input": case.tensor(x_type, x), "weight": case.tensor(w_type, weight), "eps": EPS}
            center = op.startswith("aten")
            if center:
                args |= {"normalized_shape": shape[-1:], "bias": case.tensor(w_type, weight)}
            (got,) = case.run(on, op, args, (out_type, shape))
            want = reference(x, 1, weight, weight if center else None, EPS, center)[0]
            close(got, want, out_type, 8.0 if center else 0.0)


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("op", ["webgpu.rms_norm", "aten.layer_norm.default"])
def test_nan_and_infinity_stay_in_their_row(op: str, on: str) -> None:
    for size in (8, 130, 2048):
        x, weight = random("f32", (5, size)), random("f32", (size,))
        x[1, size // 2], x[3, 0] = np.nan, np.inf
        case = Case()
        args: dict[str, Any] = {
            "input": case.tensor("f32", x),
            "normalized_shape": (size,),
            "weight": case.tensor("f32", weight),
            "bias": None,
            "eps": EPS,
        }
        if op.startswith("webgpu"):
            args = {k: args[k] for k in ("input", "weight", "eps")}
        (got,) = case.run(on, op, args, ("f32", (5, size)))
        with np.errstate(invalid="ignore"):
            want = reference(x, 1, weight, None, EPS, op.startswith("aten"))[0]
        assert np.isnan(want[1]).all()
        assert np.isnan(want[3, 0])
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("on", DEVICES)
def test_large_mean_costs_no_digits(on: str) -> None:
    """The variance is taken around the mean: E[x^2] - E[x]^2 would be off by a hundred percent here."""
    x = (1000 + rng.standard_normal((3, 512))).astype(np.float32)
    case = Case()
    args: dict[str, Any] = {
        "input": case.tensor("f32", x),
        "normalized_shape": (512,),
        "weight": None,
        "bias": None,
        "eps": EPS,
    }
    (got,) = case.run(on, "aten.layer_norm.default", args, ("f32", (3, 512)))
    np.testing.assert_allclose(got, reference(x, 1, None, None, EPS, True)[0], atol=2e-4)


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("op", ["webgpu.rms_norm", "aten.native_layer_norm.default"])
def test_dynamic_rows_and_zero_rows(op: str, on: str) -> None:
    s = Sym("input_dim", (0, 0))
    b = GraphBuilder()
    x = b.input("f32", (s, 36))
    weight = random("f32", (36,))
    args: dict[str, Any] = {
        "input": x,
        "normalized_shape": (36,),
        "weight": b.stored("constant", "f32", weight, "w"),
        "bias": None,
        "eps": EPS,
    }
    center = op.startswith("aten")
    outs: list[tuple[str, tuple[Any, ...]]] = [("f32", (s, 36))] + ([("f32", (s, 1))] * 2 if center else [])
    first = b.node(op, args, *outs)
    first = first[0] if center else first
    args = {**args, "input": first}
    second = b.node(op, args, *outs)
    delegate = b.load(b.graph(second[0] if center else second), device(on))
    try:
        for rows in (5, 1, 9, 0, 70, 2):
            data = random("f32", (rows, 36))
            if rows == 9:
                data[:] = np.nan
            ((_, got),) = delegate.execute([("f32", data)])
            if rows != 9:
                middle = reference(data, 1, weight, None, EPS, center)[0]
                np.testing.assert_allclose(
                    got, reference(middle, 1, weight, None, EPS, center)[0], rtol=2e-5, atol=2e-6
                )
    finally:
        delegate.close()


@pytest.mark.parametrize(("op", "on"), [("webgpu.rms_norm", "full"), ("aten.layer_norm.default", "default-limits")])
def test_more_workgroups_than_a_dimension_holds(op: str, on: str) -> None:
    rows = 64 * 65536 + 7  # 64 rows a workgroup at this size
    x = random("f32", (1025, 1)).repeat(-(-rows // 1025), axis=1).reshape(-1)[:rows, None]
    case = Case()
    args: dict[str, Any] = {
        "input": case.tensor("f32", x),
        "normalized_shape": (1,),
        "weight": None,
        "bias": None,
        "eps": 0.5,
    }
    bias = random("f32", (1,)) if op.startswith("aten") else None  # a row of one element is 0 in itself
    args["bias"] = None if bias is None else case.b.stored("constant", "f32", bias, "bias")
    (got,) = case.run(on, op, args, ("f32", (rows, 1)))
    np.testing.assert_allclose(got, reference(x, 1, None, bias, 0.5, bias is not None)[0], rtol=1e-6, atol=1e-30)
    graph = case.b.graph(Ref(len(case.b.values) - 1))
    found = find(op)
    assert found is not None
    (dispatch,) = found.lower(Lowering(graph, device(on).limits, lambda s: 0), graph.nodes[0])
    assert dispatch.grid[1] > 1


REFUSED: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("webgpu.rms_norm", {"weight": ("f32", (4,)), "eps": 1e-5}, "shape of the normalised axes"),
    ("webgpu.rms_norm", {"weight": ("i32", (5,)), "eps": 1e-5}, "dtype i32"),
    (
        "aten.rms_norm.default",
        {"weight": None, "eps": 1e-5, "normalized_shape": (3,)},
        "not the end of the input's shape",
    ),
    (
        "aten.layer_norm.default",
        {"weight": None, "bias": None, "eps": 1e-5, "normalized_shape": (2, 3, 5)},
        "does not fit",
    ),
    ("webgpu.rms_norm", {"weight": None, "eps": Sym("scalar", (0, 0))}, "eps"),
)


@pytest.mark.parametrize(("op", "args", "reason"), REFUSED, ids=[r[2] for r in REFUSED])
def test_refuses(op: str, args: dict[str, Any], reason: str) -> None:
    b = GraphBuilder()
    made: dict[str, Any] = {"input": b.input("f32", (3, 5))}
    made |= {k: b.input(v[0], v[1]) if isinstance(v, tuple) and isinstance(v[0], str) else v for k, v in args.items()}
    graph = b.graph(b.node(op, made, ("f32", (3, 5))))
    assert reason in str(check_node(graph, graph.nodes[0]))
