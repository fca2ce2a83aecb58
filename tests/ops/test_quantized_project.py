"""`webgpu.project` with packed weights against float64: every fused form, both routes, mixed formats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from executorch_webgpu.backend.graph import Arg, Graph
from executorch_webgpu.ops.base import check_node
from executorch_webgpu.runtime.gpu.host import to_host, to_user
from tests.harness import DEVICES, GraphBuilder, device
from tests.ops.copy_cases import poison
from tests.ops.quantized import Quantized, quantized
from tests.ops.test_linear_packed import dispatches

Array = np.ndarray[Any, Any]
EPS = 1e-5


@dataclass(frozen=True)
class Case:
    """A node; `bits` of each weight, 0 for one that is not packed."""

    m: int
    k: int
    sizes: tuple[int, ...]
    bits: tuple[int, ...]
    norm: bool = False
    gated: bool = False
    residual: bool = False
    bias: bool = False
    scale: str = "f32"
    zeros: bool = False
    group: int = 32
    dtype: str = "f32"


def build(case: Case) -> tuple[GraphBuilder, Graph, list[Array], list[Array], float | Array]:
    """(builder, graph, inputs, float64 results, what errors of the products are multiplied with at most)."""
    rng = np.random.default_rng(case.m + case.k)
    kind = {"f32": np.float32, "f16": np.float16}[case.dtype]
    x = rng.standard_normal((case.m, case.k)).astype(kind)
    b = GraphBuilder()
    inputs = [x]
    source = b.input(case.dtype, x.shape)
    weights, formats, values, biases, added = [], [], [], [], []
    for i, (n, bits) in enumerate(zip(case.sizes, case.bits, strict=True)):
        made: Quantized = quantized(n, case.k, bits or 4, case.group, case.scale, case.zeros, seed=i)
        words, form = made.packed()
        plain = made.values.astype(np.float32)
        stored = b.stored("constant", "u32", words, f"w{i}") if bits else b.stored("constant", "f32", plain, f"w{i}")
        weights.append(stored)
        formats.append(form.literal() if bits else None)
        values.append(made.values if bits else plain.astype(np.float64))
        added.append(rng.standard_normal(n).astype(np.float32) if case.bias else np.zeros(n, np.float32))
        biases.append(b.stored("constant", "f32", added[-1], f"b{i}") if case.bias else None)
    norm = rng.uniform(0.5, 1.5, case.k).astype(np.float32)
    args: dict[str, Arg] = {
        "input": source, "weights": tuple(weights), "formats": tuple(formats),
        "biases": tuple(biases) if case.bias else None, "norm_eps": EPS if case.norm else None,
        "norm_weight": b.stored("constant", "f32", norm, "g") if case.norm else None, "residual": None,
        "gated": case.gated,
    }  # fmt: skip
    wide = x.astype(np.float64)
    if case.norm:
        wide = wide / np.sqrt((wide * wide).mean(-1, keepdims=True) + EPS) * norm
    results = [wide @ w.T + bias for w, bias in zip(values, added, strict=True)]
    slack: float | Array = 1.0
    if case.gated:
        slack = np.maximum(1.0, np.abs(results[0]) + 1.1 * np.abs(results[1]))  # silu's slope is below 1.1
        results = [results[0] / (1 + np.exp(-results[0])) * results[1]]
    if case.residual:
        r = rng.standard_normal((case.m, case.sizes[0])).astype(kind)
        inputs.append(r)
        args["residual"] = b.input(case.dtype, r.shape)
        results[0] = results[0] + r
    outs = case.sizes[:1] if case.gated else case.sizes
    made_ = b.node("webgpu.project", args, *((case.dtype, (case.m, n)) for n in outs))
    graph = b.graph(*(made_ if isinstance(made_, tuple) else (made_,)))
    assert check_node(graph, graph.nodes[0]) is None
    return b, graph, inputs, results, slack


def check(case: Case, on: str) -> list[str]:
    """Runs twice, the second time with temporaries full of NaN; returns the kernels."""
    b, graph, inputs, exact, slack = build(case)
    absolute, relative = (1e-4, 1e-3) if case.dtype == "f32" else (2e-3 * slack, 1e-2)
    delegate = b.load(graph, device(on))
    given = [to_host(x) for x in inputs]
    try:
        for _ in range(2):
            for (dtype, array), want in zip(delegate.execute(given), exact, strict=True):
                got = np.asarray(to_user(dtype, array, False), np.float64)
                error = np.abs(got - want)
                assert np.all(error <= absolute + relative * np.abs(want)), f"{case}: {error.max()}"
            poison(delegate)
        found = dispatches(delegate, given)
        for dispatch in found:
            if dispatch.kernel.startswith("gemv_stream") and case.bits[0]:
                assert dispatch.consts.get("DIGITS", 0) in (0, 3 if case.dtype == "f32" else 2)
        return [dispatch.kernel for dispatch in found]
    finally:
        delegate.close()


FUSED = [
    Case(1, 96, (40,), (4,), residual=True), Case(1, 160, (33, 33), (4, 4), norm=True, gated=True, residual=True),
    Case(1, 2080, (40, 17, 5), (4, 4, 4), norm=True, scale="f16"), Case(3, 64, (9, 30), (8, 8), norm=True, zeros=True),
    Case(2, 192, (20, 20), (4, 4), gated=True, scale="f16", zeros=True, group=64),
    Case(8, 96, (33, 5, 7), (4, 4, 4), norm=True), Case(1, 64, (20,), (8,), norm=True, bias=True, residual=True),
    Case(5, 128, (20, 20), (8, 8), norm=True, gated=True, group=128),
    Case(1, 2080, (33, 9, 8), (4, 4, 4), norm=True, scale="f16", dtype="f16"),
    Case(4, 160, (33, 33), (4, 4), norm=True, gated=True, residual=True, dtype="f16"),
    Case(6, 96, (40,), (4,), residual=True, zeros=True, dtype="f16"),
    Case(7, 64, (9, 30), (8, 8), norm=True, dtype="f16"),
]  # fmt: skip
PASSES = [
    Case(9, 96, (40,), (4,), residual=True, bias=True), Case(24, 80, (9,), (8,), zeros=True, group=80, dtype="f16"),
    Case(9, 64, (20, 20), (4, 4), norm=True, gated=True, residual=True, dtype="f16"),
    Case(11, 64, (20, 9, 5), (4, 4, 4), norm=True, scale="f16", dtype="f16"),
]  # fmt: skip


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("case", FUSED + PASSES, ids=str)
def test_few_rows_in_one_dispatch(case: Case, on: str) -> None:
    found = check(case, on)
    if on == "full":
        assert found == ["gemv_stream" if len(case.sizes) == 1 or case.gated else "gemv_stream_siblings"]


@pytest.mark.parametrize("on", DEVICES)
def test_many_rows_through_tiles(on: str) -> None:
    assert check(Case(33, 96, (36, 36), (4, 4), norm=True, gated=True, residual=True), on) == ["rms_norm", "gemm"]
    assert check(Case(25, 70, (21, 5), (8, 8), zeros=True, group=10), on)[0] == "gemv_packed"
    assert check(Case(28, 136, (21, 40), (4, 8), scale="f16", group=136), on)[0] == "gemm"


@pytest.mark.parametrize("on", DEVICES)
def test_mixed_weights_go_one_by_one(on: str) -> None:
    for bits in ((4, 0), (4, 8), (0, 4)):
        assert len(check(Case(1, 64, (20, 20), bits, norm=True, gated=True), on)) >= 4


def test_refusals() -> None:
    _, graph, *_ = build(Case(1, 64, (20, 20), (4, 4)))
    node = graph.nodes[0]
    for changes, words in (
        ({"formats": (None,)}, "not one format"),
        ({"formats": (3, None)}, "no format"),
        ({"formats": (None, None)}, "dtype u32"),
    ):
        other = type(node)(node.op, {**node.args, **changes}, node.outputs, node.name)
        assert words in (check_node(graph, other) or ""), changes
