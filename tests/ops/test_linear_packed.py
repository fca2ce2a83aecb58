"""`webgpu.linear_packed` and `webgpu.embedding_packed` against float64, on every route."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pytest

from executorch_webgpu.backend.graph import Arg, Graph
from executorch_webgpu.backend.packing import QuantizationError, pack
from executorch_webgpu.ops import gemv_stream
from executorch_webgpu.ops.base import Dispatch, Limits, check_node
from executorch_webgpu.ops.packed import Format, format_of
from executorch_webgpu.runtime.gpu.host import bf16_to_f32, f32_to_bf16, to_host, to_user
from executorch_webgpu.runtime.methods.delegate import Delegate
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


def dispatches(delegate: Delegate, inputs: list[Any]) -> list[Dispatch]:
    env = delegate.bind(inputs)
    return [dispatch for node in delegate.planner.lowered(env.__getitem__) for dispatch in node.dispatches]


def check(case: Case, on: str) -> str:
    """Runs twice, the second time with temporaries full of NaN; returns the kernel. Streamed inputs of 16 bits are cut
    into two digits, others into three."""
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
        [found] = dispatches(delegate, inputs)[:1]
        if found.kernel == "gemv_stream":
            assert found.consts["DIGITS"] == (3 if case.dtype == "f32" else 2)
        return found.kernel
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
    Case(6, 40, 2080, scale="f16"), Case(1, 17, 8224, dtype="f16"), Case(2, 9, 1060, group=1060, dtype="f16"),
    Case(4, 35, 100, group=100, scale="f16", dtype="bf16"), Case(5, 21, 96, dtype="f16", zeros=True, bias=True),
    Case(6, 33, 36, group=36, dtype="f16"), Case(7, 20, 64, bits=8, dtype="f16", zeros=True),
    Case(8, 18, 2080, dtype="f16", zeros=True, scale="f16"), Case(8, 40, 48, bits=8, group=16, dtype="bf16"),
    Case(2, 4, 4, group=4, dtype="f16"), Case(3, 11, 52, bits=8, group=52, scale="f16", dtype="f16"),
]  # fmt: skip
PASSES = [
    Case(9, 40, 64, zeros=True), Case(12, 33, 64, dtype="f16", scale="f16"), Case(17, 20, 96, dtype="bf16", bias=True),
    Case(40, 31, 36, bits=8, group=36, dtype="f16"), Case(16, 20, 64, scale="f16"), Case(3, 9, 64, lead=(5,)),
]  # fmt: skip
OTHERS = [
    Case(1, 40, 48, group=16), Case(1, 5, 33, group=33), Case(2, 7, 66, group=6, zeros=True), Case(3, 6, 10, group=5),
    Case(17, 40, 64, zeros=True), Case(33, 70, 96, scale="f16"), Case(33, 30, 34, group=17, bias=True),
    Case(9, 20, 21, bits=8, group=7, zeros=True), Case(1, 3, 1, group=1), Case(33, 40, 160, bits=8, group=160),
    Case(41, 20, 64, dtype="f16", scale="f16"), Case(42, 20, 64, dtype="bf16"), Case(1, 30, 64, bits=2),
]  # fmt: skip


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("case", STREAMED, ids=str)
def test_groups_of_whole_cells(case: Case, on: str) -> None:
    kernel = check(case, on)
    assert kernel == ("gemv_stream" if on == "full" else kernel)


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("case", PASSES, ids=str)
def test_passes_of_few_rows(case: Case, on: str) -> None:
    """More rows than a workgroup takes, where tiles would be slower."""
    kernel = check(case, on)
    assert kernel == ("gemv_stream" if on == "full" else kernel)


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("case", OTHERS, ids=str)
def test_other_groups_and_many_rows(case: Case, on: str) -> None:
    assert check(case, on) != "gemv_stream"


def test_many_cells_of_few_columns_stay_in_range() -> None:
    """A matrix of many rows: several sets of rows for one x, and more workgroups than one row of the grid."""
    assert check(Case(1, 70003, 32, scale="f16"), "full") == "gemv_stream"


LARGE = [
    Case(1, 400, 96, zeros=True), Case(2, 300, 64, scale="f16"), Case(3, 300, 80, 8, 16), Case(1, 500, 96, dtype="f16"),
    Case(4, 300, 64, dtype="f16", zeros=True), Case(9, 400, 64, dtype="f16"),
]  # fmt: skip


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_variants_for_large_matrices(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four rows of weights a lane, and several sets of rows for one x, which only much larger matrices take."""
    monkeypatch.setattr(gemv_stream, "GPU_LOADS", 1)
    monkeypatch.setattr(gemv_stream, "PACKED_LOADS", 2)
    monkeypatch.setattr(gemv_stream, "PACKED_WORKGROUP", 32)
    monkeypatch.setattr(gemv_stream, "PACKED_WORKGROUPS", 1)
    monkeypatch.setattr(gemv_stream, "PACKED_LANES", 16)
    seen: list[gemv_stream.Choice] = []
    real = gemv_stream.choose

    def choose(limits: Limits, p: gemv_stream.Projection) -> gemv_stream.Choice:
        seen.append(real(limits, p))
        return seen[-1]

    monkeypatch.setattr(gemv_stream, "choose", choose)
    assert check(case, "full") == "gemv_stream"
    assert seen[0].columns == 4
    assert seen[0].sets > 1


CHOICES = [
    ((32, 1, 4, 1, 2, 3), Case(1, 21, 64, dtype="f16")), ((64, 2, 4, 1, 1, 2), Case(3, 21, 160, zeros=True)),
    ((64, 2, 2, 2, 1, 4), Case(2, 21, 288, dtype="f16")), ((64, 4, 4, 2, 1, 8), Case(2, 21, 80, 8, 16, zeros=True)),
    ((128, 64, 4, 1, 1, 64), Case(1, 21, 288)), ((64, 16, 2, 1, 4, 48), Case(1, 21, 1056, zeros=True, dtype="f16")),
    ((512, 32, 4, 2, 1, 64), Case(4, 21, 2080, dtype="f16")),
    ((64, 4, 2, 1, 1, 8), Case(3, 21, 304, 8, 16, dtype="f16")),
]  # fmt: skip


@pytest.mark.parametrize(("sizes", "case"), CHOICES, ids=str)
def test_every_choice_of_sizes(sizes: tuple[int, ...], case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that no size of this test leads to: x in one chunk or in several, lanes without cells."""
    choice = gemv_stream.Choice(*sizes)
    monkeypatch.setattr(gemv_stream, "choose", lambda limits, p: choice)
    assert check(case, "full") == "gemv_stream"


def projection(k: int, n: int, m: int = 1, dtype: str = "f16", bits: int = 4, zeros: bool = False) -> Any:
    form, tensor = Format(k, bits, 32, "f16", zeros), gemv_stream.Tensor(0, "f32")
    return gemv_stream.Projection(tensor, m, k, (tensor,), (n,), (tensor,), formats=(form,), dtype=dtype)


def test_choices() -> None:
    """Of the sizes of a 1B decoder, on a GPU with 48 KiB of workgroup memory."""
    limits = Limits(max_invocations=1024, max_workgroup_memory=49152, subgroup_size=32)

    def choice(k: int, n: int, m: int = 1, dtype: str = "f16") -> gemv_stream.Choice:
        return gemv_stream.choose(limits, projection(k, n, m, dtype))

    assert choice(2048, 2048) == gemv_stream.Choice(512, 64, 2, 1, 1, 64)
    assert choice(8192, 2048) == gemv_stream.Choice(1024, 128, 2, 1, 1, 256)
    assert choice(2048, 128256) == gemv_stream.Choice(256, 32, 4, 1, 4, 64)
    assert choice(2048, 128256, dtype="f32") == gemv_stream.Choice(512, 32, 4, 2, 4, 64)
    assert choice(2048, 3072, 2) == gemv_stream.Choice(512, 64, 4, 1, 1, 64)
    assert choice(2048, 16384, 4) == gemv_stream.Choice(256, 32, 4, 2, 2, 64)
    assert choice(8192, 2048, 8) == gemv_stream.Choice(512, 64, 2, 1, 1, 64)
    assert choice(2048, 128256, 8) == gemv_stream.Choice(512, 32, 4, 2, 4, 64)


def test_every_choice_fits_workgroup_memory() -> None:
    for memory, invocations, subgroup in ((49152, 1024, 32), (32768, 1024, 8), (16384, 256, 8), (16384, 256, 64)):
        limits = Limits(max_invocations=invocations, max_workgroup_memory=memory, subgroup_size=subgroup)
        for k, n, m, bits, dtype, zeros in product(
            (32, 64, 2080, 14336), (5, 2048, 300000), (1, 2, 3, 5, 8), (4, 8), ("f16", "f32"), (False, True)
        ):
            p = projection(k, n, m, dtype, bits, zeros)
            choice = gemv_stream.choose(limits, p)
            meet = min(choice.lanes, 32, subgroup)
            assert gemv_stream.packed_memory(p, p.formats[0], choice, meet) <= memory
            assert choice.workgroup <= invocations
            assert choice.workgroup % choice.lanes == 0
            assert choice.chunk % (choice.lanes * choice.unroll) == 0
            assert choice.sets == 1 or choice.chunk >= p.formats[0].cells


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
@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_what_is_not_finite_stays_so(dtype: str, on: str) -> None:
    """A row of x with NaN or an infinity gives no finite result; the other rows are as without it."""
    b, graph, x, exact, _ = linear(Case(3, 20, 64, dtype=dtype))
    for bad in (np.nan, np.inf, -np.inf):
        x[1, 40] = bad
        [got] = run(b, graph, device(on), x)
        assert not np.isfinite(got[1]).any()
        near = 1e-4 if dtype == "f32" else 5e-3
        np.testing.assert_allclose(got[[0, 2]], exact[[0, 2]], rtol=near, atol=near)


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_large_and_small_inputs(dtype: str, on: str) -> None:
    """Each cell of x has its own unit."""
    given = np.random.default_rng(5).standard_normal((1, 256)).astype(np.float32)
    given[0, :64] *= np.float32(1e20)
    given[0, 64:128] = 0
    given[0, 128:192] *= np.float32(1e-20)
    weight = quantized(20, 256)
    words, form = weight.packed()
    tiny = given.copy()
    tiny[0, :64] = 0
    tiny[0, 192:] = 0
    near = {"f32": 1e-4, "bf16": 2e-3}[dtype]
    for x in (given, tiny):
        b = GraphBuilder()
        wide = bf16_to_f32(f32_to_bf16(x)) if dtype == "bf16" else x
        source = b.input("f32", x.shape) if dtype == "f32" else b.stored("constant", "bf16", f32_to_bf16(x), "x")
        args: dict[str, Arg] = {
            "input": source, "weight": b.stored("constant", "u32", words, "w"), "bias": None, "format": form.literal()
        }  # fmt: skip
        graph = b.graph(b.node("webgpu.linear_packed", args, ("f32", (1, 20))))
        [got] = run(b, graph, device(on), *([x] if dtype == "f32" else []))
        sizes = np.abs(wide).astype(np.float64) @ np.abs(weight.values).T
        assert np.all(np.abs(got - wide.astype(np.float64) @ weight.values.T) <= near * sizes)


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_one_large_element_of_a_cell(dtype: str, bits: int, on: str) -> None:
    """No element of x is further off than the head of gemv_stream_packed.wgsl says, whatever is beside it: a product is
    off by at most that times the sum of |w|, cell by cell, and sums of 32-bit floats. The result is f32 in the graph,
    so that nothing rounds it."""
    rng = np.random.default_rng(bits)
    k, cell, rows = 256, 128 // bits, 5
    x = rng.standard_normal((rows, k)) * 2.0 ** rng.integers(-14, -4, (rows, k))
    x[:, ::cell] = rng.standard_normal((rows, k // cell)) * 2.0 ** rng.integers(0, 12, (rows, k // cell))
    x = x.astype(np.float32 if dtype == "f32" else np.float16)
    weight = quantized(40, k, bits, zeros=True)
    words, form = weight.packed()
    b = GraphBuilder()
    args: dict[str, Arg] = {
        "input": b.input(dtype, x.shape), "weight": b.stored("constant", "u32", words, "w"), "bias": None,
        "format": form.literal(),
    }  # fmt: skip
    graph = b.graph(b.node("webgpu.linear_packed", args, ("f32", (rows, 40))))
    assert check_node(graph, graph.nodes[0]) is None
    [got] = run(b, graph, device(on), x)
    wide, size = x.astype(np.float64), np.abs(weight.values)
    most = np.abs(wide).reshape(rows, -1, cell).max(-1)
    unit = 2.0 ** np.floor(np.log2(most)) * (2.0**-14 * 128 / 127 if dtype == "f16" else 2.0**-21)
    off = np.abs(got - wide @ weight.values.T)
    added = 2e-6 * np.abs(wide) @ np.abs(weight.codes.astype(np.float64) - weight.zeros.repeat(32, 1)).T
    allowed = unit / 2 @ size.reshape(40, -1, cell).sum(-1).T + added
    assert np.all(off <= allowed)
    if on == "full" and dtype == "f16":
        assert off.max() > 2e-2 * allowed.max(), "the bound says nothing"


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
