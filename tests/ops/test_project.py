"""`webgpu.project` against float64: every fused form, odd sizes, both routes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from executorch_webgpu.backend.graph import Arg, Graph, Ref, Sym
from executorch_webgpu.ops import gemv_stream
from executorch_webgpu.ops.base import Limits, check_node
from executorch_webgpu.ops.gemv_stream import MAX_FLOAT_PASSES
from executorch_webgpu.runtime.gpu.host import bf16_to_f32, f32_to_bf16, to_host, to_user
from executorch_webgpu.runtime.methods.delegate import Delegate
from tests.harness import DEVICES, GraphBuilder, device
from tests.ops.copy_cases import poison

Array = np.ndarray[Any, Any]
NAME = "webgpu.project"
TOLERANCE = {"f32": 4e-6, "f16": 1.5e-3, "bf16": 1e-2}


def rounded(dtype: str, values: Array) -> Array:
    """The nearest values that `dtype` holds, as float32."""
    if dtype == "f16":
        return values.astype(np.float16).astype(np.float32)
    return bf16_to_f32(f32_to_bf16(values)) if dtype == "bf16" else values.astype(np.float32)


@dataclass
class Case:
    """A node. `form`: single, gated, pair or triple; `dtypes`: activations, weights."""

    m: int
    k: int
    sizes: tuple[int, ...]
    form: str = "single"
    norm: str = ""
    bias: str = ""
    residual: bool = False
    dtypes: str = "f32 f32"
    lead: tuple[int, ...] = ()
    eps: float = 1e-5
    rows: Any = None
    factor: float = 1.0

    def arrays(self) -> dict[str, Any]:
        rng = np.random.default_rng(self.m * 7919 + self.k * 31 + sum(self.sizes))
        kind, stored = self.dtypes.split()

        def make(dtype: str, *shape: int) -> Array:
            return rounded(dtype, rng.standard_normal(shape).astype(np.float32))

        found: dict[str, Any] = {"input": make(kind, *self.lead, self.m, self.k) * np.float32(self.factor)}
        found["input"] = rounded(kind, found["input"])
        found["weights"] = [make(stored, n, self.k) for n in self.sizes]
        found["biases"] = [
            make(stored, n) if self.bias == "all" or (self.bias == "first" and i == 0) else None
            for i, n in enumerate(self.sizes)
        ]
        found["norm_weight"] = make(stored, self.k) if self.norm == "weight" else None
        found["residual"] = make(kind, *self.lead, self.m, self.sizes[0]) if self.residual else None
        return found

    @property
    def gated(self) -> bool:
        return self.form == "gated"

    def build(self, data: dict[str, Any]) -> tuple[GraphBuilder, Graph, list[Array]]:
        kind, stored = self.dtypes.split()
        b = GraphBuilder()
        inputs: list[Array] = []

        def dynamic(array: Array) -> Ref:
            shape = list(array.shape)
            if kind == "bf16":
                return b.stored("constant", kind, f32_to_bf16(array), f"x{len(b.values)}")
            inputs.append(array.astype(np.float16) if kind == "f16" else array)
            if self.rows is not None:
                shape[-2] = self.rows
            return b.input(kind, shape)

        def constant(array: Array | None) -> Ref | None:
            if array is None:
                return None
            raw = f32_to_bf16(array) if stored == "bf16" else array.astype(np.float16) if stored == "f16" else array
            return b.stored("constant", stored, raw, f"c{len(b.values)}")

        args: dict[str, Arg] = {
            "input": dynamic(data["input"]),
            "weights": tuple(constant(w) for w in data["weights"]),
            "biases": tuple(constant(c) for c in data["biases"]) if self.bias else None,
            "norm_weight": constant(data["norm_weight"]),
            "norm_eps": self.eps if self.norm else None,
            "residual": None if data["residual"] is None else dynamic(data["residual"]),
            "gated": self.gated,
        }
        sizes = self.sizes[:1] if self.gated else self.sizes
        m = self.m if self.rows is None else self.rows
        made = b.node(NAME, args, *((kind, (*self.lead, m, n)) for n in sizes))
        graph = b.graph(*(made if isinstance(made, tuple) else (made,)))
        assert check_node(graph, graph.nodes[0]) is None
        return b, graph, inputs


def reference(case: Case, data: dict[str, Any]) -> list[tuple[Array, Array]]:
    """(result, sum of magnitudes that went in) of each output in float64."""
    x = data["input"].astype(np.float64)
    if case.norm:
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + case.eps)
        if data["norm_weight"] is not None:
            x = x * data["norm_weight"]
    found = []
    for weight, bias in zip(data["weights"], data["biases"], strict=True):
        w = weight.astype(np.float64).T
        y, scale = x @ w, np.abs(x) @ np.abs(w)
        found.append((y + bias, scale + np.abs(bias)) if bias is not None else (y, scale))
    if case.gated:
        (gate, gate_scale), (up, up_scale) = found
        with np.errstate(over="ignore"):
            silu = gate / (1 + np.exp(-gate))
        found = [(silu * up, 1.1 * gate_scale * np.abs(up) + np.abs(silu) * up_scale)]
    if data["residual"] is not None:
        found = [(found[0][0] + data["residual"], found[0][1] + np.abs(data["residual"]))]
    return found


def kernels(delegate: Delegate, inputs: Sequence[Array]) -> list[str]:
    plan = delegate.plan(delegate.bind([to_host(x) for x in inputs]))
    return [launch.kernel for launch in plan.launches]


def check(case: Case, on: str) -> list[str]:
    """Run twice, the second time with temporaries full of NaN; returns the kernels of the plan."""
    data = case.arrays()
    b, graph, inputs = case.build(data)
    delegate = b.load(graph, device(on))
    try:
        for _ in range(2):
            made = delegate.execute([to_host(x) for x in inputs])
            results = [np.asarray(to_user(dtype, array, False), np.float64) for dtype, array in made]
            for got, (want, scale) in zip(results, reference(case, data), strict=True):
                assert got.shape == want.shape
                limit = TOLERANCE[case.dtypes.split()[0]] * (scale + np.abs(want)) + 1e-30
                assert np.all(np.abs(got - want) <= limit), f"{case}: error {np.abs(got - want).max()}"
            poison(delegate)
        return kernels(delegate, inputs)
    finally:
        delegate.close()


FORMS = (
    Case(1, 1, (1,), norm="weight"),
    Case(1, 1, (1,), norm="plain", bias="all", residual=True),
    Case(1, 1, (1,), residual=True),
    Case(1, 1, (1, 1), form="gated", norm="weight", residual=True),
    Case(1, 1, (1, 1), form="pair"),
    Case(1, 1, (1, 1, 1), form="triple", norm="weight"),
)
"""Forms that are one dispatch where there are subgroups; sizes are put in."""
SIZES = {
    "single": ((1,), (3,), (31,), (33,), (128,), (1000,)),
    "gated": ((1, 1), (33, 33), (130, 130)),
    "pair": ((31, 5), (128, 33)),
    "triple": ((1, 33, 3), (128, 31, 130)),
}
KS = {"f32": (8, 52, 256, 2052), "f16": (8, 40, 256, 2056)}


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("stored", ["f32", "f16"])
@pytest.mark.parametrize("form", FORMS, ids=lambda c: f"{c.form}-{c.norm}-{c.bias}-{c.residual}")
def test_sizes(form: Case, stored: str, on: str) -> None:
    """Sizes around the edges, with one row, three, nine, and more than go by in passes."""
    turn = 0
    for sizes in SIZES[form.form]:
        for k in KS[stored]:
            m = (1, 3, 17, 9)[turn % 4] if k * sum(sizes) < 200_000 else 1
            turn += 1
            found = check(replace(form, m=m, k=k, sizes=sizes, dtypes=f"f32 {stored}"), on)
            streams = on == "full" and m <= MAX_FLOAT_PASSES
            assert (found in (["gemv_stream"], ["gemv_stream_siblings"])) == streams, found


@pytest.mark.parametrize("on", DEVICES)
def test_rows(on: str) -> None:
    """Every number of rows, with leading axes; one route for up to sixteen of them, the other above."""
    for m in range(1, MAX_FLOAT_PASSES + 2):
        for form in (
            Case(m, 264, (70,), norm="weight", residual=True, dtypes="f16 f16"),
            Case(m, 264, (70, 70), form="gated", norm="weight", dtypes="f16 f16"),
            Case(m, 264, (70, 9, 33), form="triple", norm="weight", dtypes="f16 f16"),
        ):
            found = check(form, on)
            assert (len(found) == 1) == (on == "full" and m <= MAX_FLOAT_PASSES), found
    for lead, m, single in (((2,), 3, True), ((2, 2), 2, True), ((3,), 3, True), ((6,), 3, False), ((1, 1), 1, True)):
        found = check(Case(m, 40, (33,), norm="weight", bias="all", residual=True, lead=lead), on)
        assert (found == ["gemv_stream"]) == (single and on == "full")


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("dtypes", ["f32 f16", "f16 f16", "bf16 bf16", "f16 f32", "f32 bf16", "bf16 f16"])
def test_dtypes(dtypes: str, on: str) -> None:
    for form in FORMS:
        if form.form != "pair":
            found = check(replace(form, m=2, k=136, sizes=SIZES[form.form][-1], dtypes=dtypes), on)
            assert (found in (["gemv_stream"], ["gemv_stream_siblings"])) == (on == "full"), found


def test_what_is_not_one_dispatch() -> None:
    """Biases of several weights, sizes that are no multiple of a cell, many rows, mixed weights."""
    f16 = device("full").limits.f16  # without it 44 is a multiple of a cell
    for case, want in (
        (Case(2, 64, (33, 5, 7), form="triple", norm="weight", bias="all"), ["gemv_stream"] * 3),
        (Case(2, 64, (33, 5), form="pair", bias="first"), ["gemv_stream"] * 2),
        (Case(1, 64, (33, 33), form="gated", norm="weight", bias="all"), ["rms_norm", *["gemv_stream"] * 2, "swiglu"]),
        (Case(1, 42, (33,), norm="weight"), ["rms_norm", "gemv_nk"]),
        (Case(3, 44, (33,), residual=True, dtypes="f32 f16"), ["gemv_nk", "elementwise"] if f16 else ["gemv_stream"]),
        (Case(40, 64, (33, 33), form="gated", residual=True), ["gemm"]),
        (Case(40, 64, (33, 5, 7), form="triple", norm="weight", bias="all"), ["rms_norm", *["gemm"] * 3]),
    ):
        assert check(case, "full") == want


@pytest.mark.parametrize("on", DEVICES)
def test_other_routes(on: str) -> None:
    """The same forms where sizes or devices do not suit the kernel."""
    for form in FORMS:
        for m, k in ((9, 40), (3, 43), (40, 64)):
            check(replace(form, m=m, k=k, sizes=SIZES[form.form][-1], bias=form.bias), on)
    for form in (Case(2, 64, (33, 33), form="gated", bias="all", norm="weight"), Case(3, 64, (9, 8), form="pair")):
        check(form, on)


CHOICES = [(256, 32, 4, 1), (128, 64, 2, 4), (256, 256, 2, 2), (64, 1, 4, 2)]


@pytest.mark.parametrize(("workgroup", "lanes", "columns", "unroll"), CHOICES)
def test_every_choice_of_sizes(
    workgroup: int, lanes: int, columns: int, unroll: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those that no size of this test and no limit of this device leads to."""
    choice = gemv_stream.Choice(workgroup, lanes, columns, unroll)
    monkeypatch.setattr(gemv_stream, "choose", lambda limits, p: choice)
    for form in FORMS:
        for k, m in ((8 * 5 * lanes + 8, 1), (8 * lanes * unroll, 2), (8, 1)):
            found = check(replace(form, m=m, k=k, sizes=SIZES[form.form][-1], dtypes="f32 f16"), "full")
            assert len(found) == 1


def test_enough_workgroups_and_no_lane_without_work() -> None:
    limits = Limits(subgroup_size=32, f16=True)

    def choose(m: int, k: int, *sizes: int) -> gemv_stream.Choice:
        weights = tuple(gemv_stream.Tensor(i + 1, "f16") for i in range(len(sizes)))
        return gemv_stream.choose(
            limits, gemv_stream.Projection(gemv_stream.Tensor(0, "f32"), m, k, weights, sizes, ())
        )

    for k, n in ((2048, 2048), (2048, 3072), (8192, 2048), (2048, 128256), (64, 64), (8, 5), (4096, 1), (8192, 16384)):
        for m in (1, 4, 8):
            choice = choose(m, k, n)
            assert choice.lanes <= choice.workgroup <= 256
            assert choice.lanes <= max(k // 8, 1)
            assert choice.workgroup % choice.lanes == 0
            if n * k >= 1 << 22:
                assert -(-n // (choice.workgroup // choice.lanes * choice.columns)) >= 512
    assert choose(1, 2048, 8192, 8192) == gemv_stream.Choice(256, 32, 2, 2)
    assert choose(4, 2048, 8192, 8192) == gemv_stream.Choice(256, 32, 4, 2)
    assert choose(1, 8192, 2048) == gemv_stream.Choice(256, 256, 2, 2)


@pytest.mark.parametrize("on", DEVICES)
def test_nan_and_infinity_stay_in_their_row(on: str) -> None:
    """A NaN in a row of x reaches this row alone, one in a weight its column alone; a norm of infinities is NaN."""
    for form in (Case(5, 72, (37,), norm="weight"), Case(5, 72, (37, 37), form="gated"), Case(5, 72, (37,))):
        case = replace(form, dtypes="f32 f16")
        data = case.arrays()
        data["input"][2, 71] = np.nan
        data["input"][3, 1] = np.inf
        data["weights"][-1][7, 9] = np.nan
        b, graph, inputs = case.build(data)
        delegate = b.load(graph, device(on))
        try:
            ((_, made),) = delegate.execute([to_host(x) for x in inputs])
        finally:
            delegate.close()
        with np.errstate(all="ignore"):
            ((want, _),) = reference(case, data)
        got = np.asarray(made)
        keep = [0, 1, 4]
        np.testing.assert_array_equal(np.isnan(got[keep]), np.isnan(want[keep]))
        assert np.isnan(got[keep][:, 7]).all()
        assert np.isnan(got[2]).all()
        assert not np.isfinite(got[3]).any() or case.gated
        np.testing.assert_allclose(got[keep], want[keep], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("on", DEVICES)
def test_large_and_small_inputs(on: str) -> None:
    """The norm of rows of zeros and of tiny and large numbers."""
    for factor in (0.0, 1e-12, 1e15):
        check(Case(3, 256, (33,), norm="weight", factor=factor), on)
        check(Case(2, 256, (33, 33), form="gated", norm="weight", factor=factor), on)


@pytest.mark.parametrize("on", DEVICES)
def test_rows_that_change(on: str) -> None:
    """One program: steps of many rows, one row and none, buffers full of NaN and of older results."""
    rows = Sym("input_dim", (0, 0))
    for form in (
        Case(1, 64, (33, 33), form="gated", norm="weight", rows=rows),
        Case(1, 64, (33, 5, 64), form="triple", norm="weight", bias="first", rows=rows),
        Case(1, 64, (64,), norm="plain", residual=True, rows=rows),
    ):
        first = form.arrays()
        b, graph, _ = form.build(first)
        delegate = b.load(graph, device(on))
        try:
            for m in (40, 1, 9, 0, 8, 1, 100, 3):
                data = {**first, **{k: v for k, v in replace(form, m=m).arrays().items() if k in ("input", "residual")}}
                feeds = [to_host(data[name]) for name in ("input", "residual") if data[name] is not None]
                poison(delegate)
                made = delegate.execute(feeds)
                for (_, got), (want, scale) in zip(made, reference(form, data), strict=True):
                    assert np.all(np.abs(np.asarray(got) - want) <= 4e-6 * (scale + np.abs(want)) + 1e-30)
        finally:
            delegate.close()


def test_refuses() -> None:
    def node(shape: Sequence[int] = (2, 8), outs: Sequence[Any] = (("f32", (2, 4)),), **changes: Any) -> str | None:
        b = GraphBuilder()
        weight, short = b.input("f32", (4, 8)), b.input("f32", (4,))
        args: dict[str, Any] = {"input": b.input("f32", shape), "weights": (weight,)}
        named = {"weight": weight, "short": short}
        for name, value in changes.items():
            args[name] = tuple(named[v] for v in value) if isinstance(value, tuple) else named.get(str(value), value)
        b.node(NAME, args, *outs)
        graph = b.graph()
        return check_node(graph, graph.nodes[0])

    assert node() is None
    two = (("f32", (2, 4)), ("f32", (2, 4)))
    assert node(weights=("weight", "weight"), outs=two) is None
    assert node(weights=("weight", "weight"), gated=True) is None
    for reason, args in {
        "gated with 1": {"gated": True},
        "4 weights": {"weights": ("weight",) * 4, "outs": two * 2},
        "0 weights": {"weights": ()},
        "1 results for 2": {"weights": ("weight", "weight")},
        "no matrix": {"weights": ("short",)},
        "does not fit input": {"outs": (("f32", (2, 5)),)},
        "does not fit weight": {"biases": ("weight",)},
        "differs from the result": {"residual": "short"},
        "a residual to several": {"weights": ("weight", "weight"), "outs": two, "residual": "short"},
        "norm_weight without": {"norm_weight": "short"},
        "not the shape of the norm": {"norm_weight": "short", "norm_eps": 1e-5},
        "not a number": {"norm_eps": "much"},
        "literal bool": {"gated": 1},
        "one bias": {"biases": ("short", "short")},
        "do not multiply": {"shape": (2, 9)},
        "dtype i32": {"outs": (("i32", (2, 4)),)},
    }.items():
        assert reason in str(node(**args)), reason
