"""`webgpu.project` and `webgpu.project_cache` that quantise their input, against the operators that they stand for."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pytest

from executorch_webgpu.backend.graph import Arg, Graph
from executorch_webgpu.backend.passes.large import split_large, with_parts
from executorch_webgpu.ops import gemv_stream
from executorch_webgpu.ops.base import Limits, check_node
from executorch_webgpu.ops.packed import Format
from executorch_webgpu.runtime.gpu.buffers import State, Weights
from executorch_webgpu.runtime.gpu.host import to_host
from executorch_webgpu.runtime.methods.delegate import Delegate
from tests.harness import DEVICES, GraphBuilder, device, run
from tests.ops import projected
from tests.ops.coded import read
from tests.ops.copy_cases import poison
from tests.ops.quantized import quantized
from tests.ops.test_activations import EPS, Case, check, quantize, rows_of

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Whole:
    """A `webgpu.project` with `quantize`."""

    m: int
    k: int
    sizes: tuple[int, ...]
    bits: int = 4
    group: int = 32
    zeros: bool = False
    norm: bool = False
    gated: bool = False
    residual: bool = False
    bias: bool = False
    dtype: str = "f32"
    span: tuple[int, int] = (-128, 127)
    symmetric: bool = False


WHOLE = [
    Whole(1, 64, (40,)), Whole(1, 2080, (20, 9, 5), norm=True), Whole(2, 36, (33,), group=36, zeros=True, norm=True),
    Whole(3, 96, (20, 20), gated=True, residual=True, norm=True), Whole(4, 80, (30,), 8, 16, span=(0, 255)),
    Whole(1, 4, (5,), group=4, span=(-8, 7)), Whole(2, 48, (33,), 8, 16, zeros=True, dtype="f16"),
    Whole(4, 8256, (9,), dtype="f16", norm=True), Whole(1, 96, (20, 9), bias=True, norm=True), Whole(7, 96, (9,)),
    Whole(17, 96, (9, 6), norm=True), Whole(44, 160, (36,), residual=True, norm=True),
    Whole(50, 96, (20, 20), gated=True), Whole(41, 48, (9,), 8, 16, norm=True), Whole(42, 64, (9, 5), bias=True),
    Whole(1, 96, (20,), 8, 96, symmetric=True), Whole(2, 2080, (9, 5), norm=True, symmetric=True),
    Whole(50, 96, (20, 20), gated=True, symmetric=True),
]  # fmt: skip


def whole(case: Whole) -> tuple[GraphBuilder, Graph, list[Array]]:
    """(builder, graph of the project and, beside it, of the integers and the same project of these, inputs)."""
    rng = np.random.default_rng(case.m + case.k)
    x = rows_of((case.m + 4, case.k))[4:].astype(np.float16 if case.dtype == "f16" else np.float32)
    b = GraphBuilder()
    source = b.input(case.dtype, x.shape)
    norm: dict[str, Arg] = {"norm_eps": None, "norm_weight": None}
    if case.norm:
        g = rng.uniform(-1.5, 1.5, case.k).astype(np.float32)
        norm = {"norm_eps": EPS, "norm_weight": b.stored("constant", "f32", g, "g")}
    made = [
        quantized(n, case.k, case.bits, case.group, "f32", case.zeros, seed=i).packed()
        for i, n in enumerate(case.sizes)
    ]
    shared: dict[str, Arg] = {
        "weights": tuple(b.stored("constant", "u32", packed, f"w{i}") for i, (packed, _) in enumerate(made)),
        "formats": tuple(form.literal() for _, form in made), "biases": None, "residual": None, "gated": case.gated,
    }  # fmt: skip
    if case.bias:
        shared["biases"] = tuple(
            b.stored("constant", "f32", rng.standard_normal(n).astype(np.float32), f"b{i}")
            for i, n in enumerate(case.sizes)
        )
    if case.residual:
        shared["residual"] = b.stored(
            "constant", "f32", rng.standard_normal((case.m, case.sizes[0])).astype(np.float32), "r"
        )
    outs = [("f32", (case.m, n)) for n in (case.sizes[:1] if case.gated else case.sizes)]
    how = (*case.span, 2.0**-100, *((True,) if case.symmetric else ()))
    one = b.node("webgpu.project", {"input": source, **norm, **shared, "quantize": how}, *outs)
    codes = quantize(b, source, x.shape, case.span, 2.0**-100, symmetric=case.symmetric, **norm)
    two = b.node("webgpu.project", {"input": codes, "norm_eps": None, "norm_weight": None, **shared}, *outs)
    graph = b.graph(*(one if isinstance(one, tuple) else (one,)), *(two if isinstance(two, tuple) else (two,)), codes)
    assert [check_node(graph, node) for node in graph.nodes] == [None] * 3
    return b, graph, [x]


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("case", WHOLE, ids=str)
def test_products_that_quantise(case: Whole, on: str) -> None:
    """As the integers of an operator of its own, and a product of these; with a norm, whose sum is in another order, up
    to one quantum of a row in few columns."""
    b, graph, given = whole(case)
    inputs = [to_host(x) for x in given]
    delegate = b.load(graph, device(on))
    try:
        for _ in range(2):
            *found, (_, codes) = delegate.execute(inputs)
            poison(delegate)
            differences, scales = read(np.asarray(codes).view(np.uint32), case.k)
            count = len(found) // 2
            values = np.abs(differences * scales[:, None].astype(np.float64))
            weights = [
                np.abs(quantized(n, case.k, case.bits, case.group, "f32", case.zeros, seed=i).values)
                for i, n in enumerate(case.sizes)
            ]
            sizes = [values @ w.T for w in weights]
            slacks = [
                2e-6 * size + (2 * scales[:, None] * w.max(-1) if case.norm else 0)
                for size, w in zip(sizes, weights, strict=True)
            ]
            if case.gated:
                slacks = [1.1 * slacks[0] * (sizes[1] + slacks[1]) + sizes[0] * slacks[1]]
            for (_, got), (_, want), slack in zip(found[:count], found[count:], slacks, strict=True):
                assert np.all(np.abs(got - want) <= slack + 1e-6 * np.abs(want)), (case, np.abs(got - want).max())
        env = delegate.bind(inputs)
        [first, *_] = delegate.planner.lowered(env.__getitem__)
        kernels = [dispatch.kernel for dispatch in first.dispatches]
        alone = on == "full" and case.m <= 2 and not case.bias
        assert ("quantize_activations" in kernels) != alone
        assert len(kernels) == 1 or not alone
    finally:
        delegate.close()


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize(
    "case",
    [
        projected.Case(weights=4, k=96, capacity=60, quantize=True),
        projected.Case(
            weights=8, k=160, group=80, zeros=True, capacity=60, quantize=True, interleaved=False, biases=(0, 2)
        ),
    ],
    ids=["4-bits", "8-bits"],
)
def test_up_to_the_caches(case: projected.Case, on: str) -> None:
    """`webgpu.project_cache`: one dispatch for few rows, after one that quantises for more, tiles for many."""
    fused = "gemv_stream_cache" if on == "full" else ""
    with projected.layer(case, on) as made:
        for rows, expected in ((1, [fused]), (2, [fused]), (5, ["quantize_activations", fused]), (45, [])):
            made.check(rows, 3)
            kernels = made.kernels()
            assert kernels == expected if fused and expected else "quantize_activations" in kernels
    if not case.biases:
        assert "gemm_codes" in kernels


def test_weights_in_parts() -> None:
    """A matrix that is cut because it is too large for the device: integers are made once for all parts."""
    on = device("full")
    b, graph, [x] = whole(Whole(2, 64, (40, 8), norm=True))
    want = run(b, graph, on, x)
    split = split_large(graph, 1200, lambda value: 4 * int(np.prod(value.shape)))
    assert [node.op for node in split.nodes].count("webgpu.quantize_activations") == 2
    assert [node.op for node in split.nodes].count("aten.cat.default") == 2
    assert [check_node(split, node) for node in split.nodes] == [None] * len(split.nodes)
    delegate = Delegate(split, on, with_parts(b.data.__getitem__), Weights(on), State(on))
    try:
        got = [np.asarray(array) for _, array in delegate.execute([to_host(x)])]
    finally:
        delegate.close()
    for made, expected in zip(got[:-1], want[:-1], strict=True):
        np.testing.assert_allclose(made, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


CHOICES = [
    ((32, 1, 4, 1, 2, 3), Whole(1, 96, (21,), zeros=True)), ((64, 2, 4, 1, 1, 6), Whole(2, 160, (21,), norm=True)),
    ((64, 16, 2, 1, 4, 48), Whole(1, 1056, (21,), norm=True)), ((128, 64, 4, 1, 1, 64), Whole(2, 288, (21, 9, 5))),
    ((512, 32, 4, 2, 1, 128), Whole(1, 2080, (21, 21), gated=True, norm=True)),
    ((64, 4, 2, 1, 2, 20), Whole(2, 304, (21,), 8, 16, zeros=True)),
]  # fmt: skip


@pytest.mark.parametrize(("sizes", "case"), CHOICES, ids=str)
def test_every_choice_of_sizes(sizes: tuple[int, ...], case: Whole, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that no size of this test leads to: several sets of rows, lanes without cells, small workgroups."""
    choice = gemv_stream.Choice(*sizes)
    monkeypatch.setattr(gemv_stream, "choose", lambda limits, p: choice)
    test_products_that_quantise(case, "full")
    exact = Case(case.m, case.k, case.sizes, case.bits, case.group, zeros=case.zeros, gated=case.gated)
    assert check(exact, "full") == ["gemv_stream_siblings" if len(case.sizes) == 3 else "gemv_stream"]


def test_every_choice_fits_workgroup_memory() -> None:
    tensor, span = gemv_stream.Tensor(0, "f32"), (-128.0, 127.0, 1e-9, 0.0)
    for memory, invocations, subgroup in ((49152, 1024, 32), (32768, 1024, 8), (16384, 256, 8), (16384, 256, 64)):
        limits = Limits(max_invocations=invocations, max_workgroup_memory=memory, subgroup_size=subgroup)
        for k, n, m, bits, zeros in product((32, 64, 2080, 14336), (5, 2048, 300000), (1, 2, 8), (4, 8), (False, True)):
            form = Format(k, bits, 32, "f16", zeros)
            p = gemv_stream.Projection(tensor, m, k, (tensor,), (n,), (tensor,), formats=(form,), span=span)
            choice = gemv_stream.choose(limits, p)
            meet = min(choice.lanes, 32, subgroup)
            assert gemv_stream.packed_memory(p, form, choice, meet) <= memory
            assert choice.workgroup % choice.lanes == 0
            assert choice.chunk % (choice.lanes * choice.unroll) == 0
            assert gemv_stream.fits_quantizing(limits, p) == (m <= 2 and n < 65536 and choice.chunk >= form.cells)
