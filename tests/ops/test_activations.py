"""`webgpu.quantize_activations`, and products of its integers with packed weights, against float64."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pytest

from executorch_webgpu.backend.graph import Arg, Graph
from executorch_webgpu.ops import gemm_codes, gemv_stream
from executorch_webgpu.ops.activations import words
from executorch_webgpu.ops.base import Limits, check_node
from tests.harness import DEVICES, GraphBuilder, device, run
from tests.ops.coded import Coded, coded, read
from tests.ops.copy_cases import poison
from tests.ops.quantized import quantized
from tests.ops.test_linear_packed import dispatches

Array = np.ndarray[Any, Any]
EPS = 1e-5
TOLERANCE, WIDENED_TOLERANCE = 1e-6, 5e-6
"""Of sum |x| |w|: where integers are multiplied, and where their floats are, one column after the other."""


# -- rows as integers


def quantize(
    b: GraphBuilder, source: Any, shape: tuple[int, ...], span: tuple[int, int], least: float = 2.0**-126, **more: Arg
) -> Any:
    args: dict[str, Arg] = {"input": source, "quant_min": span[0], "quant_max": span[1], "eps": least}
    args |= {"norm_weight": None, "norm_eps": None} | more
    return b.node("webgpu.quantize_activations", args, ("u32", (*shape[:-1], words(shape[-1]))))


def rows_of(shape: tuple[int, ...]) -> Array:
    """Rows of zeros, of one sign, far from 0, with ties, and ordinary ones."""
    rng = np.random.default_rng(shape[-1])
    x = (rng.standard_normal(shape) * 3).astype(np.float32)
    flat = x.reshape(-1, shape[-1])
    makers = [
        lambda row: row * 0, np.abs, lambda row: -np.abs(row), lambda row: row + 100,
        lambda row: np.round(row) / 2 + 0.25, lambda row: row * 1e-30,
    ]  # fmt: skip
    for i, make in enumerate(makers[: len(flat)]):
        flat[i] = make(flat[i])
    return x


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize(
    ("shape", "span"),
    [((7, 4), (-128, 127)), ((2, 5, 36), (-128, 127)), ((9, 1060), (0, 255)), ((7, 2080), (-127, 127)),
     ((6, 64), (-8, 7)), ((8,), (-128, 127))],
)  # fmt: skip
def test_integers_are_those_of_fake_quantize(shape: tuple[int, ...], span: tuple[int, int], on: str) -> None:
    """Bit by bit, for every input dtype, with zero where the range has it and in the middle."""
    k = shape[-1]
    for dtype, symmetric in product(("f32", "f16"), (False, True)):
        x = rows_of(shape).astype(np.float16 if dtype == "f16" else np.float32)
        b = GraphBuilder()
        source = b.input(dtype, shape)
        least = 1e-3 if span == (-8, 7) else 2.0**-126
        args: dict[str, Arg] = {"input": source, "quant_min": span[0], "quant_max": span[1], "eps": least}
        middle: dict[str, Arg] = {"symmetric": True} if symmetric else {}
        fake = b.node("webgpu.fake_quantize", args | middle, ("f32", shape))
        graph = b.graph(fake, quantize(b, source, shape, span, least, **middle))
        assert [check_node(graph, node) for node in graph.nodes] == [None, None]
        want, got = run(b, graph, device(on), x)
        differences, scales = read(np.asarray(got).view(np.uint32).reshape(-1, words(k)), k)
        assert np.array_equal(differences.astype(np.float32) * scales[:, None], want.reshape(-1, k))


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize(("k", "weight"), [(36, True), (1060, True), (64, False)])
def test_norm_goes_first(k: int, weight: bool, on: str) -> None:
    rng = np.random.default_rng(k)
    x = (rng.standard_normal((5, k)) * [[1], [100], [1e-3], [1], [0]]).astype(np.float32)
    g = rng.uniform(-1.5, 1.5, k).astype(np.float32)
    b = GraphBuilder()
    norm = b.stored("constant", "f32", g, "g") if weight else None
    graph = b.graph(quantize(b, b.input("f32", x.shape), x.shape, (-128, 127), norm_weight=norm, norm_eps=EPS))
    assert check_node(graph, graph.nodes[0]) is None
    [got] = run(b, graph, device(on), x)
    differences, scales = read(np.asarray(got).view(np.uint32), k)
    wide = x.astype(np.float64)
    normed = wide / np.sqrt((wide * wide).mean(-1, keepdims=True) + EPS) * (g if weight else 1)
    span = normed.max(-1).clip(0) - normed.min(-1).clip(max=0)
    np.testing.assert_allclose(scales[:4], span[:4] / 255, rtol=1e-5)
    assert np.abs(differences * scales[:, None] - normed).max() <= 0.501 * scales.max()
    assert not differences[4].any()


@pytest.mark.parametrize("on", DEVICES)
def test_more_rows_than_a_grid_is_wide(on: str) -> None:
    x = np.random.default_rng(0).standard_normal((65_600, 4)).astype(np.float32)
    b = GraphBuilder()
    graph = b.graph(quantize(b, b.input("f32", x.shape), x.shape, (-128, 127)))
    [got] = run(b, graph, device(on), x)
    differences, scales = read(np.asarray(got).view(np.uint32), 4)
    assert np.all(np.abs(differences * scales[:, None] - x) <= 0.501 * scales[:, None])


@pytest.mark.parametrize("on", DEVICES)
def test_rows_that_are_not_finite(on: str) -> None:
    """Their products are not finite; other rows are as without them."""
    k, n = 64, 20
    weight = quantized(n, k)
    packed, form = weight.packed()
    for m, bad, fused in (
        (2, np.nan, True), (2, -np.inf, True), (3, np.nan, False), (3, np.inf, False), (20, -np.inf, False),
        (45, np.nan, False),
    ):  # fmt: skip
        x = np.random.default_rng(0).standard_normal((m, k)).astype(np.float32)
        x[1, 40] = bad
        b = GraphBuilder()
        source = b.input("f32", x.shape)
        args: dict[str, Arg] = {
            "input": source if fused else quantize(b, source, x.shape, (-128, 127)), "norm_eps": None,
            "norm_weight": None, "weights": (b.stored("constant", "u32", packed, "w"),),
            "formats": (form.literal(),), "biases": None, "residual": None, "gated": False,
            "quantize": (-128, 127, 1e-9) if fused else None,
        }  # fmt: skip
        graph = b.graph(b.node("webgpu.project", args, ("f32", (m, n))))
        [got] = run(b, graph, device(on), x)
        assert not np.isfinite(got[1]).any()
        others = [i for i in range(m) if i != 1]
        quantum = np.abs(x[others]).max() * 2 / 255
        assert np.all(
            np.abs(got[others] - x[others] @ weight.values.T) <= quantum * np.abs(weight.values).sum(-1)
        )  # fmt: skip


# -- products


@dataclass(frozen=True)
class Case:
    """Products of rows [m, k] with weights [n, k] of one format."""

    m: int
    k: int
    sizes: tuple[int, ...]
    bits: int = 4
    group: int = 32
    scale: str = "f32"
    zeros: bool = False
    gated: bool = False
    residual: bool = False
    bias: bool = False
    extreme: bool = False
    op: str = "webgpu.project"


def build(case: Case) -> tuple[GraphBuilder, Graph, list[Array], list[Array]]:
    """(builder, graph, float64 results, sums of magnitudes)."""
    rng = np.random.default_rng(case.m + case.k)
    x = coded(case.m, case.k)
    if case.extreme:
        x = Coded(np.full((case.m, case.k), -128), np.full(case.m, 127), x.scales)
        x.zeros[::2] = 0
    b = GraphBuilder()
    made = [
        quantized(n, case.k, case.bits, case.group, case.scale, case.zeros, seed=i) for i, n in enumerate(case.sizes)
    ]
    weights, formats, biases, added = [], [], [], []
    for i, (weight, n) in enumerate(zip(made, case.sizes, strict=True)):
        if case.extreme:
            weight.codes[:] = 0
        packed, form = weight.packed()
        weights.append(b.stored("constant", "u32", packed, f"w{i}"))
        formats.append(form.literal())
        added.append(rng.standard_normal(n).astype(np.float32) if case.bias else np.zeros(n, np.float32))
        biases.append(b.stored("constant", "f32", added[-1], f"b{i}") if case.bias else None)
    values, magnitudes = x.values, np.abs(x.values)
    results = [values @ w.values.T + extra for w, extra in zip(made, added, strict=True)]
    sizes = [magnitudes @ np.abs(w.values).T + np.abs(extra) for w, extra in zip(made, added, strict=True)]
    if case.gated:
        gate, up = results
        silu = gate / (1 + np.exp(-gate))
        sizes = [np.abs(silu) * sizes[1] + 1.1 * np.abs(up) * sizes[0] + np.abs(silu * up)]
        results = [silu * up]
    residual = None
    if case.residual:
        r = rng.standard_normal((case.m, case.sizes[0])).astype(np.float32)
        residual = b.stored("constant", "f32", r, "r")
        results[0], sizes[0] = results[0] + r, sizes[0] + np.abs(r)
    source = b.stored("constant", "u32", x.packed(), "x")
    args: dict[str, Arg]
    if case.op == "webgpu.linear_packed":
        args = {"input": source, "weight": weights[0], "bias": biases[0], "format": formats[0]}
    else:
        args = {
            "input": source, "weights": tuple(weights), "formats": tuple(formats),
            "biases": tuple(biases) if case.bias else None, "norm_eps": None, "norm_weight": None,
            "residual": residual, "gated": case.gated,
        }  # fmt: skip
    outs = case.sizes[:1] if case.gated else case.sizes
    made_ = b.node(case.op, args, *(("f32", (case.m, n)) for n in outs))
    graph = b.graph(*(made_ if isinstance(made_, tuple) else (made_,)))
    assert check_node(graph, graph.nodes[0]) is None
    return b, graph, results, sizes


def check(case: Case, on: str) -> list[str]:
    """Runs twice, the second time with temporaries full of NaN; returns the kernels."""
    b, graph, exact, sizes = build(case)
    delegate = b.load(graph, device(on))
    try:
        kernels = [dispatch.kernel for dispatch in dispatches(delegate, [])]
        tolerance = WIDENED_TOLERANCE if "dequantize_activations" in kernels else TOLERANCE
        for _ in range(2):
            for (_, got), want, size in zip(delegate.execute([]), exact, sizes, strict=True):
                error = np.abs(np.asarray(got, np.float64) - want) / size.clip(1e-30)
                assert error.max() <= tolerance, f"{case}: {error.max()}"
            poison(delegate)
        return kernels
    finally:
        delegate.close()


FEW = [
    Case(1, 64, (40,)), Case(1, 4, (5,), group=4), Case(1, 36, (33,), group=36, zeros=True), Case(1, 2080, (40, 17, 5)),
    Case(2, 160, (70,), scale="f16", zeros=True), Case(3, 96, (20, 20), gated=True, residual=True),
    Case(4, 192, (33, 7), group=64), Case(5, 64, (9,), bias=True, residual=True), Case(6, 256, (31,), group=128),
    Case(7, 4128, (24,), group=96, scale="f16"), Case(8, 288, (50, 9, 8)),
    Case(8, 64, (20, 20), zeros=True, gated=True),
    Case(1, 48, (33,), 8, 16, zeros=True), Case(4, 80, (30,), 8, 16, "f16"), Case(1, 2064, (17,), 8, 2064, bias=True),
    Case(8, 272, (20,), 8, 16, "f16", zeros=True), Case(3, 52, (11,), 8, 52),
    Case(1, 128, (20,), op="webgpu.linear_packed"), Case(2, 96, (20, 9), bias=True),
    Case(8, 16384, (6,), 8, 16384, extreme=True), Case(2, 16384, (6,), 4, 16384, extreme=True),
]  # fmt: skip
PASSES = [Case(9, 64, (40,), zeros=True), Case(17, 96, (20, 9)), Case(40, 36, (31,), 8, 36)]
MANY = [
    Case(41, 64, (130,)), Case(64, 96, (33, 9)), Case(129, 160, (129,), zeros=True, scale="f16"),
    Case(65, 4, (5,), group=4), Case(64, 68, (66,), group=68, bias=True, residual=True),
    Case(130, 2048, (12,), scale="f16", residual=True),
    Case(47, 1056, (8,), 8, 96, zeros=True), Case(50, 80, (70, 70), 8, 80, gated=True, residual=True),
    Case(70, 192, (65, 65), group=64, gated=True, scale="f16"), Case(41, 48, (7,), 8, 48),
    Case(129, 16384, (8,), 8, 16384, extreme=True), Case(44, 16384, (6,), 4, 16384, extreme=True),
    Case(44, 128, (20,), 8, 128), Case(60, 512, (33,), group=128, op="webgpu.linear_packed", bias=True),
    Case(45, 1024, (20,), group=256, bias=True),
]  # fmt: skip
WIDENED = [Case(41, 64, (20,), 8, 16), Case(42, 96, (9, 5), 8, 48, zeros=True), Case(41, 64, (9, 5), bias=True)]


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("case", FEW, ids=str)
def test_few_rows(case: Case, on: str) -> None:
    """One digit; devices without subgroups widen the integers."""
    kernels = check(case, on)
    streams = {"gemv_stream", "gemv_stream_siblings"}
    assert set(kernels) <= streams if on == "full" else not streams & set(kernels)


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("case", PASSES, ids=str)
def test_passes_of_few_rows(case: Case, on: str) -> None:
    kernels = check(case, on)
    assert ("gemm_codes" in kernels) == (on != "full")


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("case", MANY, ids=str)
def test_many_rows(case: Case, on: str) -> None:
    """Tiles of integers, with ranges of K and without."""
    kernels = check(case, on)
    assert "gemm_codes" in kernels
    assert ("gemm_merge" in kernels) == (case.k >= 512 and case.sizes[0] % 4 == 0)


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("case", WIDENED, ids=str)
def test_forms_without_tiles_of_integers(case: Case, on: str) -> None:
    kernels = check(case, on)
    assert "dequantize_activations" in kernels or case.bias


@pytest.mark.parametrize("splits", [1, 3, 5])
def test_ranges_of_k(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that only other sizes take, and that begin within a group."""
    monkeypatch.setattr(gemm_codes, "splits_of", lambda *_: splits)
    kernels = check(Case(70, 352, (132,), residual=True), "full")
    assert ("gemm_merge" in kernels) == (splits > 1)
    assert ("gemm_merge" in check(Case(41, 768, (8,), group=128), "full")) == (splits > 1)


def test_integers_are_scaled_before_they_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm_codes, "LONGEST", 3)
    check(Case(41, 256, (9,), group=256), "full")


def test_more_workgroups_than_a_grid_is_wide() -> None:
    assert check(Case(1, 32, (70_003,), scale="f16"), "full") == ["gemv_stream"]


def test_choices() -> None:
    """Of the sizes of a 1B decoder."""
    limits = Limits(max_invocations=1024, max_workgroup_memory=49152, subgroup_size=32)
    tensor = gemv_stream.Tensor(0, "u32")
    _, form = quantized(1, 2048).packed()

    def splits(m: int, n: int, gated: bool = False) -> int:
        p = gemv_stream.Projection(
            tensor, m, 2048, (tensor,), (n,), (tensor,), gated=gated, formats=(form,), dtype="u32"
        )
        assert gemm_codes.takes(limits, p)
        return gemm_codes.splits_of(limits, p, n)

    assert splits(2048, 8192) == 1
    assert splits(512, 8192, gated=True) == 1
    assert splits(512, 2048) == 3
    assert splits(64, 512) == 8
    assert splits(512, 2047) == 1


# -- refusals


def refused(op: str, args: dict[str, Arg], b: GraphBuilder, out: tuple[str, tuple[int, ...]]) -> str:
    graph = b.graph(b.node(op, args, out))
    reason = check_node(graph, graph.nodes[0])
    assert reason is not None
    return reason


def test_refusals() -> None:
    def quantizing(**changes: Any) -> str:
        b = GraphBuilder()
        k = changes.pop("k", 32)
        args: dict[str, Arg] = {
            "input": b.input(changes.pop("dtype", "f32"), (3, k)), "quant_min": -128, "quant_max": 127, "eps": 1e-5,
            "norm_weight": None, "norm_eps": None,
        }  # fmt: skip
        if "norm" in changes:
            args["norm_weight"] = b.input("f32", changes.pop("norm"))
        out = changes.pop("out", ("u32", (3, words(k))))
        return refused("webgpu.quantize_activations", args | changes, b, out)

    assert "multiples of four" in quantizing(k=33)
    assert "dtype i32" in quantizing(dtype="i32")
    assert "at most 255 apart" in quantizing(quant_max=128)
    assert "eps of scales" in quantizing(eps=None)
    assert "without norm_eps" in quantizing(norm=(32,))
    assert "does not fit" in quantizing(norm=(31,), norm_eps=1e-5)
    assert "rows of 16 words" in quantizing(out=("u32", (3, 12)))
    for k, bits, group, message in ((32, 4, 32, "rows of 20 words"), (36, 4, 4, "not packed in a form")):
        b = GraphBuilder()
        packed, form = quantized(5, k, bits, group).packed()
        args: dict[str, Arg] = {
            "input": b.input("u32", (3, 20)), "weight": b.stored("constant", "u32", packed, "w"), "bias": None,
            "format": form.literal(),
        }  # fmt: skip
        assert message in refused("webgpu.linear_packed", args, b, ("f32", (3, 5)))
        project: dict[str, Arg] = {
            "input": args["input"], "weights": (args["weight"],), "formats": (form.literal(),), "biases": None,
            "norm_eps": None, "norm_weight": None, "residual": None, "gated": False,
        }  # fmt: skip
        for more, reason in (
            ({}, message), ({"norm_eps": 1e-5}, "norm of what is quantised"),
            ({"quantize": (-128, 127, 1e-5)}, "quantised again"),
        ):  # fmt: skip
            b.nodes.clear()
            assert reason in refused("webgpu.project", project | more, b, ("f32", (3, 5)))
        project["input"] = b.input("f32", (3, k))
        for given, reason in (
            ((-128, 127), "no range"),
            ((0, 256, 1e-5), "255 apart"),
            ((0, 255, None), "eps of scales"),
            ((0, 255, 1e-5, 1), "no range"),
        ):
            b.nodes.clear()
            assert reason in refused("webgpu.project", project | {"quantize": given}, b, ("f32", (3, 5)))
