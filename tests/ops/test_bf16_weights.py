"""Matrices of bfloat16 in words: layers, projections and lookups that widen them in registers, against float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from executorch_webgpu.backend.graph import Arg, Graph, Ref
from executorch_webgpu.backend.packing import pack_bf16
from executorch_webgpu.ops.base import check_node
from executorch_webgpu.ops.gemv_stream import MAX_FLOAT_PASSES, MAX_ROWS
from executorch_webgpu.ops.packed import Format, format_of
from executorch_webgpu.runtime.gpu.host import bf16_to_f32, f32_to_bf16, to_host, to_user
from tests.harness import DEVICES, GraphBuilder, device, run
from tests.ops import projected
from tests.ops.copy_cases import poison
from tests.ops.projected import Layer
from tests.ops.quantized import quantized

Array = np.ndarray[Any, Any]
EPS = 1e-5


@dataclass(frozen=True)
class Case:
    """`webgpu.project` of x [m, k]; without norm, gate, residual and siblings a `webgpu.linear_packed`.

    Attributes:
        others: what weights are besides the first: `bf16`, `f32`, or `4` bits.
        dtype: of x and the result.
    """

    m: int
    n: int
    k: int
    others: tuple[str, ...] = ()
    norm: bool = False
    gated: bool = False
    residual: bool = False
    bias: bool = False
    dtype: str = "f32"


def weight(kind: str, n: int, k: int, seed: int) -> tuple[str, Array, Array, Format | None]:
    """(record dtype, what is stored, exact values, format)."""
    exact = np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)
    if kind == "bf16":
        bits = f32_to_bf16(exact)
        words, form = pack_bf16(bits)
        return "u32", words, bf16_to_f32(bits).astype(np.float64), form
    if kind == "4":
        made = quantized(n, k, 4, k, seed=seed)
        words, form = made.packed()
        return "u32", words, made.values, form
    return "f32", exact, exact.astype(np.float64), None


def build(case: Case) -> tuple[GraphBuilder, Graph, list[Any], list[Array], list[Array]]:
    """(builder, graph, inputs, float64 results, sums of absolute values)."""
    rng = np.random.default_rng(case.m + 7 * case.k)
    b = GraphBuilder()
    x = rng.standard_normal((case.m, case.k)).astype(np.float32)
    if case.dtype == "bf16":
        bits = f32_to_bf16(x)
        x = bf16_to_f32(bits)
        source, inputs = b.stored("constant", "bf16", bits, "x"), []
    else:
        source, inputs = b.input("f32", x.shape), [x]
    made = [weight(kind, case.n + i, case.k, i) for i, kind in enumerate(("bf16", *case.others))]
    if case.gated:
        made = [weight("bf16", case.n, case.k, i) for i in range(2)]
    refs = tuple(b.stored("constant", dtype, raw, f"w{i}") for i, (dtype, raw, *_) in enumerate(made))
    wide = x.astype(np.float64)
    norm = rng.uniform(0.5, 1.5, case.k).astype(np.float32)
    if case.norm:
        wide = wide / np.sqrt((wide * wide).mean(-1, keepdims=True) + EPS) * norm
    results = [wide @ exact.T for _, _, exact, _ in made]
    sizes = [np.abs(wide) @ np.abs(exact).T for _, _, exact, _ in made]
    biases: list[Arg] = [None] * len(made)
    if case.bias:
        for i, y in enumerate(results):
            added = rng.standard_normal(y.shape[1]).astype(np.float32)
            biases[i] = b.stored("constant", "f32", added, f"b{i}")
            results[i] = y + added
    residual = None
    if case.gated:
        results, sizes = [results[0] / (1 + np.exp(-results[0])) * results[1]], [sizes[0] * sizes[1]]
    if case.residual:
        inputs.append(rng.standard_normal(results[0].shape).astype(np.float32))
        residual = b.input("f32", results[0].shape)
        results[0] = results[0] + inputs[-1]
    outs = [(case.dtype, y.shape) for y in results]
    literals = tuple(None if form is None else form.literal() for *_, form in made)
    if case.norm or case.gated or case.residual or case.others:
        args: dict[str, Arg] = {
            "input": source, "weights": refs, "formats": literals, "biases": tuple(biases),
            "norm_eps": EPS if case.norm else None, "residual": residual, "gated": case.gated,
            "norm_weight": b.stored("constant", "f32", norm, "g") if case.norm else None,
        }  # fmt: skip
        found = b.node("webgpu.project", args, *outs)
    else:
        args = {"input": source, "weight": refs[0], "bias": biases[0], "format": literals[0]}
        found = b.node("webgpu.linear_packed", args, *outs)
    graph = b.graph(*(found if isinstance(found, tuple) else (found,)))
    assert check_node(graph, graph.nodes[0]) is None
    return b, graph, inputs, results, sizes


def check(case: Case, on: str) -> list[str]:
    """Runs twice, the second time with temporaries full of NaN; returns the kernels."""
    b, graph, inputs, results, sizes = build(case)
    delegate = b.load(graph, device(on))
    given = [to_host(x) for x in inputs]
    rounding = 8e-3 if case.dtype == "bf16" else 0.0
    try:
        for _ in range(2):
            for (dtype, got), exact, size in zip(delegate.execute(given), results, sizes, strict=True):
                error = np.abs(np.asarray(to_user(dtype, got, False), np.float64) - exact)
                assert np.all(error <= 3e-6 * (size + 1) + rounding * np.abs(exact)), f"{case}: {error.max()}"
            poison(delegate)
        return [launch.kernel for launch in delegate.plan(delegate.bind(given)).launches]
    finally:
        delegate.close()


LAYERS = [
    (Case(1, 40, 64), "gemv_stream"), (Case(1, 1, 8), "gemv_stream"), (Case(2, 33, 2056, bias=True), "gemv_stream"),
    (Case(3, 65, 1024), "gemv_stream"), (Case(5, 9, 40, dtype="bf16"), "gemv_stream"),
    (Case(8, 50, 264), "gemv_stream"), (Case(1, 40, 63), "gemv_packed"),
    (Case(2, 5, 1), "gemv_packed"), (Case(4, 33, 67, bias=True), "gemv_packed"),
    (Case(7, 6, 12), "gemv_packed"), (Case(8, 21, 30, dtype="bf16"), "gemv_packed"),
    (Case(9, 40, 64), "gemv_stream"), (Case(16, 41, 64, bias=True), "gemv_stream"), (Case(17, 40, 64), "gemm"),
    (Case(33, 70, 97, bias=True), "gemm"), (Case(10, 1, 4), "gemm"), (Case(9, 5, 1), "gemm"),
    (Case(65, 66, 20), "gemm"), (Case(17, 64, 1029, dtype="bf16"), "gemm"), (Case(33, 68, 1028), "gemm"),
]  # fmt: skip


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize(("case", "kernel"), LAYERS, ids=str)
def test_layers(case: Case, kernel: str, on: str) -> None:
    """Also K that is odd, or no multiple of the eight columns of 16 bytes."""
    other = kernel if kernel != "gemv_stream" else "gemv_packed" if case.m <= MAX_ROWS else "gemm"
    assert check(case, on)[0] == (kernel if on == "full" else other)


PROJECTIONS = [
    Case(1, 40, 64, norm=True, gated=True, residual=True), Case(3, 20, 72, ("bf16", "bf16"), norm=True),
    Case(1, 20, 72, ("bf16",), bias=True), Case(2, 30, 64, ("4",)), Case(12, 30, 64, ("f32",), norm=True),
    Case(20, 36, 33, norm=True, gated=True), Case(2, 20, 31, ("bf16", "bf16")), Case(9, 20, 64, ("bf16", "4")),
    Case(11, 33, 64, norm=True, residual=True, bias=True), Case(1, 17, 31, gated=True, residual=True),
]  # fmt: skip


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("case", PROJECTIONS, ids=str)
def test_projections(case: Case, on: str) -> None:
    """Fused forms, and weights of several kinds, which go one by one."""
    kernels = check(case, on)
    if on == "full" and case.k % 8 == 0 and case.m <= MAX_FLOAT_PASSES and set(case.others) <= {"bf16"}:
        streamed = "gemv_stream" if not case.others or case.bias else "gemv_stream_siblings"
        assert kernels == [streamed] * (len(case.others) + 1 if case.bias else 1)
    else:
        assert "gemv_stream_siblings" not in kernels


class DecoderLayer(Layer):
    """`webgpu.project_cache` whose matrices of bfloat16 are in words."""

    def _products(self, x: Ref) -> dict[str, Arg]:
        args = super()._products(x)
        weights, formats = [], []
        for i, exact in enumerate(self.weights):
            words, form = pack_bf16(f32_to_bf16(exact.astype(np.float32)))
            weights.append(self.builder.stored("constant", "u32", words, f"words{i}"))
            formats.append(form.literal())
        return {**args, "weights": tuple(weights), "formats": tuple(formats)}


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize(
    ("case", "fused"),
    [
        (projected.Case(weights="bf16", k=72, biases=(0, 2)), True),
        (projected.Case(weights="bf16", k=520, interleaved=False, norm=""), True),
        (projected.Case(weights="bf16", k=63), False),
    ],
)
def test_projections_into_caches(case: projected.Case, fused: bool, on: str) -> None:
    made = DecoderLayer(case, on)
    for rows in (1, 3, 9, 17):
        made.check(rows, 5)
        assert ("gemv_stream_cache" in made.kernels()) == (fused and on == "full" and rows <= MAX_FLOAT_PASSES)
    made.close()


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("k", [1, 5, 16, 30, 96])
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
def test_lookup_is_exact(k: int, dtype: str, on: str) -> None:
    """Rows as they are, infinities, NaN, the largest and the smallest normal number too."""
    b = GraphBuilder()
    exact = np.random.default_rng(k).standard_normal((37, k)).astype(np.float32)
    if dtype != "f16":
        exact[3, 0], exact[4, 0], exact[5, 0], exact[6, 0] = np.inf, -np.inf, 3.38e38, 2.0**-126
        exact[7, 0] = np.nan
    bits = f32_to_bf16(exact)
    words, form = pack_bf16(bits)
    tokens = b.input("i64", (2, 5))
    args: dict[str, Arg] = {
        "weight": b.stored("constant", "u32", words, "table"), "indices": tokens, "format": form.literal()
    }  # fmt: skip
    graph = b.graph(b.node("webgpu.embedding_packed", args, (dtype, (2, 5, k))))
    assert check_node(graph, graph.nodes[0]) is None
    given = np.array([[0, 36, 3, 4, 5], [6, 7, 1, 0, 36]])
    [got] = run(b, graph, device(on), given)
    want = bf16_to_f32(bits)[given]
    np.testing.assert_array_equal(got, want.astype(np.float16) if dtype == "f16" else want)


def test_words_are_the_bytes_of_whole_rows() -> None:
    bits = np.arange(48, dtype=np.uint16).reshape(3, 16)
    words, form = pack_bf16(bits)
    assert np.shares_memory(words, bits)
    assert words.nbytes == 2 * bits.size
    assert (form.k, form.words, form.cells, form.groups, form.scale_words) == (16, 8, 2, 1, 0)
    padded, form = pack_bf16(bits[:, :11])
    assert (padded.shape, form.words) == ((3, 8), 8)
    assert padded.view(np.uint16)[1].tolist() == [*range(16, 27), 0, 0, 0, 0, 0]
    assert format_of(form.literal()) == form == Format.bf16(11)


@pytest.mark.parametrize(
    "wrong", [(8, 16, 4, "none", False), (8, 16, 8, "f32", False), (8, 16, 8, "none", True), (0, 16, 0, "none", False)]
)
def test_formats_that_are_none(wrong: tuple[Arg, ...]) -> None:
    with pytest.raises(ValueError, match="columns of bfloat16"):
        format_of(wrong)
