"""`webgpu.linear_packed` and `webgpu.embedding_packed` against float64, on every route."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from executorch_webgpu.backend.graph import Arg, Graph
from executorch_webgpu.backend.packing import QuantizationError, pack
from executorch_webgpu.ops import gemv_stream
from executorch_webgpu.ops.base import Limits, check_node
from executorch_webgpu.ops.packed import Format, format_of
from executorch_webgpu.runtime.host import bf16_to_f32, f32_to_bf16, to_host, to_user
from tests.harness import DEVICES, GraphBuilder, device, run
from tests.ops.copy_cases import poison
from tests.ops.quantized import Quantized, quantized

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Case:
    """One layer x [lead.., m, k] w [n, k]^T."""

    m: int
    n: int
    k: int
    bits: int = 4
    group: int = 32
    scale: str = "f32"
    zeros: bool = False
    bias: bool = False
    dtype: str = "f32"
    lead: tuple[int, ...] = ()


def linear(case: Case) -> tuple[GraphBuilder, Graph, Array, Array, Array]:
    """(builder, graph, input, float64 result, sums of magnitudes)."""
    weight = quantized(case.n, case.k, case.bits, case.group, case.scale, case.zeros)
    rng = np.random.default_rng(case.m + case.k)
    x = rng.standard_normal((*case.lead, case.m, case.k)).astype(np.float16 if case.dtype == "f16" else np.float32)
    if case.dtype == "bf16":
        x = bf16_to_f32(f32_to_bf16(x))
    words, form = weight.packed()
    assert form.zeros == case.zeros
    b = GraphBuilder()
    bias = rng.standard_normal(case.n).astype(np.float32) if case.bias else None
    source = b.stored("constant", "bf16", f32_to_bf16(x), "x") if case.dtype == "bf16" else b.input(case.dtype, x.shape)
    args: dict[str, Arg] = {
        "input": source,
        "weight": b.stored("constant", "u32", words, "w"),
        "bias": None if bias is None else b.stored("constant", "f32", bias, "b"),
        "format": form.literal(),
    }
    graph = b.graph(b.node("webgpu.linear_packed", args, (case.dtype, (*case.lead, case.m, case.n))))
    assert check_node(graph, graph.nodes[0]) is None
    exact = x.astype(np.float64) @ weight.values.T
    size = np.abs(x).astype(np.float64) @ np.abs(weight.values).T
    return b, graph, x, exact if bias is None else exact + bias, size


def check(case: Case, on: str) -> str:
    """Runs twice, the second time with temporaries full of NaN; returns the kernel."""
    b, graph, x, exact, size = linear(case)
    tolerance = {"f32": 3e-6, "f16": 1e-3, "bf16": 8e-3}[case.dtype]
    delegate = b.load(graph, device(on))
    inputs = [] if case.dtype == "bf16" else [to_host(x)]
    try:
        for _ in range(2):
            [(dtype, got)] = delegate.execute(inputs)
            error = np.abs(np.asarray(to_user(dtype, got, False), np.float64) - exact)
            assert np.all(error <= tolerance * (size + np.abs(exact))), f"{case}: {error.max()}"
            assert case.dtype != "f32" or np.all(error <= 1e-4 + 1e-3 * np.abs(exact)), f"{case}: {error.max()}"
            poison(delegate)
        return delegate.plan(delegate.bind(inputs)).launches[0].kernel
    finally:
        delegate.close()


STREAMED = [
    Case(1, 40, 64), Case(1, 1, 32), Case(1, 33, 96, zeros=True), Case(2, 70, 256, scale="f16", zeros=True),
    Case(1, 40, 2080, scale="f16"), Case(1, 24, 4128, group=96, scale="f16", zeros=True), Case(3, 65, 160, scale="f16"),
    Case(4, 12, 192, group=64, zeros=True), Case(5, 31, 128, group=128), Case(7, 9, 224), Case(8, 50, 288, bias=True),
    Case(1, 50, 36, group=36), Case(1, 50, 100, group=100, scale="f16", zeros=True), Case(2, 5, 4, group=4),
    Case(1, 40, 64, bits=8), Case(1, 33, 48, bits=8, group=16, zeros=True),
    Case(4, 30, 80, bits=8, group=16, scale="f16"),
    Case(1, 17, 2064, bits=8, group=2064, bias=True), Case(8, 20, 272, bits=8, group=16, zeros=True, scale="f16"),
    Case(1, 20, 128, dtype="f16", scale="f16"), Case(2, 20, 128, dtype="bf16", zeros=True), Case(2, 9, 64, lead=(2, 2)),
]  # fmt: skip
OTHERS = [
    Case(1, 40, 48, group=16), Case(1, 5, 33, group=33), Case(2, 7, 66, group=6, zeros=True), Case(3, 6, 10, group=5),
    Case(9, 40, 64, zeros=True), Case(33, 70, 96, scale="f16"), Case(33, 30, 34, group=17, bias=True),
    Case(9, 20, 21, bits=8, group=7, zeros=True), Case(1, 3, 1, group=1), Case(33, 40, 160, bits=8, group=160),
    Case(12, 20, 64, dtype="f16", scale="f16"), Case(11, 20, 64, dtype="bf16"), Case(1, 30, 64, bits=2),
]  # fmt: skip


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("case", STREAMED, ids=str)
def test_groups_of_whole_cells(case: Case, on: str) -> None:
    kernel = check(case, on)
    assert kernel == ("gemv_stream" if on == "full" else kernel)


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("case", OTHERS, ids=str)
def test_other_groups_and_many_rows(case: Case, on: str) -> None:
    assert check(case, on) != "gemv_stream"


def test_many_cells_of_few_columns_stay_in_range() -> None:
    """A matrix of many rows: several sets of rows for one x, and more workgroups than one row of the grid."""
    assert check(Case(1, 70003, 32, scale="f16"), "full") == "gemv_stream"


@pytest.mark.parametrize("case", [Case(1, 70, 96, zeros=True), Case(2, 300, 64, scale="f16"), Case(6, 33, 80, 8, 16)])
def test_variants_for_large_matrices(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four rows of weights a lane, and several sets of rows for one x, which only much larger matrices take."""
    monkeypatch.setattr(gemv_stream, "GPU_LOADS", 1)
    monkeypatch.setattr(gemv_stream, "PACKED_LOADS", 2)
    monkeypatch.setattr(gemv_stream, "PACKED_WORKGROUP", 32)
    monkeypatch.setattr(gemv_stream, "PACKED_WORKGROUPS", 1)
    assert check(case, "full") == "gemv_stream"


def test_choices() -> None:
    """Of the sizes of a 1B decoder, on a GPU with 48 KiB of workgroup memory and on one with 16."""

    def choice(k: int, n: int, m: int = 1, memory: int = 49152) -> gemv_stream.Choice:
        limits = Limits(max_invocations=1024, max_workgroup_memory=memory, subgroup_size=32)
        form = Format(k, 4, 32, "f16", False)
        tensor = gemv_stream.Tensor(0, "f32")
        return gemv_stream.choose(
            limits, gemv_stream.Projection(tensor, m, k, (tensor,), (n,), (tensor,), formats=(form,))
        )

    assert choice(2048, 2048) == gemv_stream.Choice(512, 64, 2, 1, 1)
    assert choice(8192, 2048) == gemv_stream.Choice(1024, 128, 2, 2, 1)
    assert choice(2048, 128256) == gemv_stream.Choice(512, 32, 4, 2, 4)
    small = choice(8192, 2048, memory=16384)
    assert 112 * small.lanes * small.unroll <= 16384 - gemv_stream.STAGED_SPARE
    assert choice(8192, 2048, 8).lanes * choice(8192, 2048, 8).unroll * 112 * 8 <= 49152 - gemv_stream.STAGED_SPARE


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize(
    ("bits", "group", "scale", "zeros", "k"),
    [(4, 32, "f16", False, 64), (8, 40, "f32", True, 40), (2, 16, "f32", False, 48), (4, 3, "f16", True, 9)],
)
def test_lookup(bits: int, group: int, scale: str, zeros: bool, k: int, on: str) -> None:
    table: Quantized = quantized(37, k, bits, group, scale, zeros)
    words, form = table.packed()
    idx = np.random.default_rng(0).integers(0, 37, (2, 5))
    for dtype in ("f32", "f16"):
        b = GraphBuilder()
        args: dict[str, Arg] = {
            "weight": b.stored("constant", "u32", words, "w"), "indices": b.input("i64", (2, 5)),
            "format": form.literal(),
        }  # fmt: skip
        graph = b.graph(b.node("webgpu.embedding_packed", args, (dtype, (2, 5, k))))
        assert check_node(graph, graph.nodes[0]) is None
        [got] = run(b, graph, device(on), idx)
        np.testing.assert_allclose(got, table.values[idx], rtol=1e-6 if dtype == "f32" else 1e-3, atol=1e-7)


@pytest.mark.parametrize("on", DEVICES)
def test_what_is_not_finite_stays_so(on: str) -> None:
    """A row of x with NaN or an infinity gives no finite result; the other rows are as without it."""
    b, graph, x, exact, _ = linear(Case(3, 20, 64))
    for bad in (np.nan, np.inf):
        x[1, 40] = bad
        [got] = run(b, graph, device(on), x)
        assert not np.isfinite(got[1]).any()
        np.testing.assert_allclose(got[[0, 2]], exact[[0, 2]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("on", DEVICES)
def test_large_and_small_inputs(on: str) -> None:
    """Each cell of x has its own power of two."""
    b, graph, x, _, _ = linear(Case(1, 20, 256))
    x[0, :64] *= np.float32(1e20)
    x[0, 64:128] = 0
    x[0, 128:192] *= np.float32(1e-20)
    weight = quantized(20, 256)
    [got] = run(b, graph, device(on), x)
    np.testing.assert_allclose(got, x.astype(np.float64) @ weight.values.T, rtol=1e-4)
    x[0, :64] = 0
    x[0, 192:] = 0
    [got] = run(b, graph, device(on), x)
    np.testing.assert_allclose(got, x.astype(np.float64) @ weight.values.T, rtol=1e-3, atol=1e-25)


def test_what_cannot_be_packed_is_named() -> None:
    codes, scales = np.zeros((4, 32), np.uint8), np.ones((4, 2))
    with pytest.raises(QuantizationError, match="do not divide"):
        pack(codes[:, :31], scales, None, 4, "f32", "w")
    with pytest.raises(QuantizationError, match="w: scales are not finite"):
        pack(codes, np.array([[1.0, np.nan]] * 4), None, 4, "f32", "w")
    with pytest.raises(QuantizationError, match="zero points are not finite"):
        pack(codes, scales, np.array([[1.0, np.inf]] * 4), 4, "f32", "w")
    with pytest.raises(QuantizationError, match="not exact in float16"):
        pack(codes, scales * (1 + 2.0**-14), None, 4, "f16", "w")
    with pytest.raises(QuantizationError, match="do not fit 4 bits"):
        pack(codes + np.uint8(16), scales, None, 4, "f32", "w")
    with pytest.raises(QuantizationError, match="do not fit"):
        pack(codes[:3], scales, None, 4, "f32", "w")
    with pytest.raises(QuantizationError, match="differ"):
        pack(codes, scales, np.ones((4, 1)), 4, "f32", "w")


def test_formats() -> None:
    form = Format(2048, 4, 32, "f16", False)
    assert (form.cells, form.groups, form.scale_words, form.words) == (64, 64, 32, 288)
    assert format_of(form.literal()) == form
    for wrong in (None, (1, 2), (32, 4, 32, "f64", False), (32, 3, 32, "f32", False), (32, 4, 5, "f32", False)):
        with pytest.raises(ValueError, match=r"format|bits|type|divide"):
            format_of(wrong)


def refusal(shape: tuple[int, ...], words: tuple[int, ...], form: Any, out: tuple[int, ...], dtype: str = "f32") -> Any:
    b = GraphBuilder()
    weight = b.stored("constant", "u32", np.zeros(words, np.uint32), "w")
    args: dict[str, Arg] = {"input": b.input(dtype, shape), "weight": weight, "bias": None, "format": form}
    graph = b.graph(b.node("webgpu.linear_packed", args, (dtype, out)))
    return check_node(graph, graph.nodes[0])


def test_refusals() -> None:
    form = Format(64, 4, 32, "f32", False)
    good = (5, form.words)
    assert refusal((2, 64), good, form.literal(), (2, 5)) is None
    assert "32 columns" in refusal((2, 32), good, form.literal(), (2, 5))
    assert "does not fit input" in refusal((2, 64), good, form.literal(), (2, 6))
    assert "packed in rows" in refusal((2, 64), (5, 3), form.literal(), (2, 5))
    assert "no format" in refusal((2, 64), good, 3, (2, 5))
    assert "dtype" in refusal((2, 64), good, form.literal(), (2, 5), "i32")
