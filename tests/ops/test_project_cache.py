"""`webgpu.project_cache` against float64 formulas, and against the operators that it stands for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from executorch_webgpu.backend.graph import Arg
from executorch_webgpu.ops import gemv_stream, project_cache
from executorch_webgpu.ops.base import Limits, check_node
from executorch_webgpu.ops.gemv_stream import MAX_FLOAT_PASSES
from executorch_webgpu.runtime.errors import InputError
from tests.harness import DEVICES, GraphBuilder, device
from tests.ops.projected import OP, Case, close, layer
from tests.ops.test_rope_cache_sizes import direct, lowered

FUSED = ["gemv_stream_cache"]
BOUND, BOUND_WITH_BIASES = 11, 14
"""Storage buffers of that kernel."""


def fuses(on: str, biases: bool = False) -> bool:
    """Whether the test device can take that kernel at all. Lavapipe and large GPUs can."""
    limits = device(on).limits
    return limits.subgroup_size > 0 and limits.max_storage_buffers >= (BOUND_WITH_BIASES if biases else BOUND)


STYLES: dict[str, dict[str, Any]] = {
    "interleaved": {"interleaved": True},
    "halves": {"interleaved": False},
    "halves-wide-table": {"interleaved": False, "wide_table": True},
}
SIZES = {
    "gqa": Case(heads=6, kv_heads=2),
    "smallest": Case(heads=1, kv_heads=1, d=2, rot=2, dv=1, k=4, capacity=20),
    "four": Case(heads=3, kv_heads=1, d=4, rot=4, k=12),
    "partial": Case(heads=5, kv_heads=5, d=20, rot=6, dv=12, k=72),
    "large-heads": Case(heads=2, kv_heads=1, d=256, rot=64, k=32),
    "odd-pairs": Case(heads=2, kv_heads=2, d=14, rot=14, dv=3, k=520),
    "batch": Case(heads=4, kv_heads=2, d=8, rot=8, batch=3),
}


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", SIZES)
def test_sizes_styles_and_positions(name: str, style: str, on: str) -> None:
    """One to seventeen rows at the first, a middle and the last position; up to sixteen are one dispatch."""
    case = replace(SIZES[name], **STYLES[style])
    with layer(case, on) as made:
        for rows in (1, 3, 9, 17) if style == "interleaved" else (2, 8, 16):
            for position in {0, (case.capacity - rows) // 2, case.capacity - rows}:
                made.check(rows, position)
            assert (made.kernels() == FUSED) == (fuses(on) and case.batch * rows <= MAX_FLOAT_PASSES), (
                rows,
                made.kernels(),
            )


PACKED = {
    "4-bits": Case(weights=4, scale="f16", k=160),
    "4-bits-zeros": Case(weights=4, zeros=True, k=96, d=6, rot=4, interleaved=False),
    "4-bits-many-cells": Case(weights=4, k=2080, heads=2, kv_heads=1, d=64, rot=64, interleaved=False),
    "8-bits": Case(weights=8, scale="f16", zeros=True, k=192, batch=2),
    "8-bits-one-group": Case(weights=8, k=100, group=100, norm="", biases=(0, 1, 2)),
    "4-bits-f16": Case(weights=4, scale="f16", cache="f16", table="f16", interleaved=False),
}


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("name", PACKED)
def test_packed_weights(name: str, on: str) -> None:
    """Also rows that go by in passes, in this kernel or in those of the two operators."""
    with layer(PACKED[name], on) as made:
        for rows, position in ((1, 0), (6 if name == "4-bits" else 1, 34), (13, 27)):
            made.check(rows, position)
            if made.case.batch * rows <= 8:
                assert (made.kernels() == FUSED) == fuses(on, bool(made.case.biases))


DTYPES = {
    "f16-weights": {"weights": "f16"},
    "f16": dict.fromkeys(("weights", "x", "cache", "table"), "f16"),
    "bf16": dict.fromkeys(("x", "cache", "table"), "bf16"),
    "mixed": {"weights": "f16", "cache": "f16", "key_cache": "f32", "table": "bf16"},
}


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("name", DTYPES)
def test_dtypes(name: str, in_place: bool, on: str) -> None:
    """In place and into new caches, where the old ones keep their content."""
    case = Case(d=6, rot=6, dv=4, in_place=in_place, interleaved=False, **DTYPES[name])  # type: ignore[arg-type]
    with layer(case, on) as made:
        for rows, position in ((1, 0), (3, 37)):
            made.check(rows, position)
            if fuses(on):
                assert made.kernels()[-1:] == FUSED
                assert len(made.kernels()) == (1 if in_place else 3)


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("norm", ["", "plain", "weight"])
@pytest.mark.parametrize("biases", [(), (0, 1, 2), (2,)])
def test_norms_and_biases(biases: tuple[int, ...], norm: str, on: str) -> None:
    with layer(Case(norm=norm, biases=biases, interleaved=not biases), on) as made:
        for rows, position in ((1, 39), (2, 5), (10, 5), (18, 5)):
            made.check(rows, position)
            assert (made.kernels() == FUSED) == (fuses(on, bool(biases)) and rows <= MAX_FLOAT_PASSES)


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize(
    "case", [Case(batch=4, ragged=True), Case(batch=3, ragged=True, interleaved=False, weights="f16")]
)
def test_ragged_batches(case: Case, on: str) -> None:
    """Idle rows, full caches, padding whose input is NaN; only positions that are new are written."""
    capacity, batch = case.capacity, case.batch
    with layer(case, on) as made:
        for rows, past, new in (
            (1, (0, 7, capacity, capacity - 1), (1, 1, 0, 1)),
            (2, (0, capacity - 1, 5, 12), (2, 1, 0, 2)),
            (5, (0, capacity - 5, 9, 1), (0, 5, 3, 1)),
        ):
            made.check(rows, past[:batch], new[:batch])
            assert (made.kernels() == FUSED) == (fuses(on) and batch * rows <= MAX_FLOAT_PASSES)


CHOICES = [
    gemv_stream.Choice(256, 256, 2, 2), gemv_stream.Choice(64, 1, 4, 1), gemv_stream.Choice(128, 32, 2, 1, 2, 32),
    gemv_stream.Choice(128, 64, 4, 1, 4, 64),
]  # fmt: skip


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_every_choice_of_sizes(choice: gemv_stream.Choice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that no size of this test and no limit of this device leads to."""
    monkeypatch.setattr(project_cache, "choose", lambda limits, p: choice)
    packed = choice.sets > 1
    for style in STYLES.values():
        with layer(
            Case(d=20, rot=12, dv=6, k=1024 if packed else 96, weights=4 if packed else "f16", **style), "full"
        ) as made:
            for rows, position in ((1, 0),) if packed else ((1, 0), (2, 38)):
                made.check(rows, position)
            assert (made.kernels() == FUSED) == fuses("full")


@pytest.mark.parametrize("style", STYLES)
def test_the_numbers_of_the_two_operators(style: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And words of `sizes`, at lengths around the ends of splits; attention reads both."""
    case = Case(capacity=1100, attends=True, batch=2, weights=4 if style == "halves" else "f16", **STYLES[style])
    with layer(case, "full") as one, layer(case, "full") as two:
        for rows in (1,) if style == "halves" else (3,):
            for position in (0, 31, 64, 500, 1100 - rows):
                x = one.x(rows, position)
                got, sizes = one(x, position)
                with monkeypatch.context() as patch:
                    patch.setattr(project_cache, "BUFFERS", 1 << 20)
                    want, words = two(x, position)
                np.testing.assert_array_equal(sizes, words)
                np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
            assert (one.kernels()[0] == FUSED[0]) == fuses("full")
            if fuses("full"):
                assert two.kernels()[:2] == ["gemv_stream_siblings", "rope_cache_sizes"]
        for name in "kv":
            a, b = (made.bits(name).view(np.float32) for made in (one, two))
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "case", [Case(capacity=1100), Case(capacity=1100, window=70, kv_limit="prefix", interleaved=False)]
)
def test_grids_are_those_of_the_live_length(case: Case) -> None:
    with layer(replace(case, attends=True), "full") as made:
        attention = made.graph.nodes[1]
        plain = replace(attention, args={**attention.args, "sizes": None})
        split, merge = lowered(made.graph, plain, made.device.limits, rows=2)
        for position in (0, 30, 31, 62, 63, 64, 126, 300, 1098):
            _, sizes = made(made.x(2), position)
            first = max(position + 1 - case.window, 0) if case.window else 0
            assert sizes.tolist() == direct(split.grid, merge.grid, split, position + 2 - first), position


def test_grids_of_a_ragged_batch_are_those_of_its_longest_row() -> None:
    with layer(Case(batch=3, capacity=1100, ragged=True, attends=True), "full") as made:
        attention = made.graph.nodes[2]
        plain = replace(attention, args={**attention.args, "sizes": None})
        split, merge = lowered(made.graph, plain, made.device.limits, rows=2)
        for past, new in (((0, 0, 0), (1, 0, 2)), ((5, 700, 40), (2, 1, 2)), ((5, 700, 40), (2, 0, 2))):
            _, sizes = made(made.x(2), past, new)
            longest = max(p + n for p, n in zip(past, new, strict=True) if n)
            assert sizes.tolist() == direct(split.grid, merge.grid, split, longest)


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("interleaved", [True, False])
def test_positions_past_the_capacity(interleaved: bool, on: str) -> None:
    """Refused by the host; lift its checks, as a position counted up on the GPU does, and no cache is written."""
    with layer(Case(interleaved=interleaved), on) as made:
        made.check(3, 37)
        x, before = made.x(3), {name: made.bits(name) for name in "kv"}
        for position in (38, -1):
            with pytest.raises(InputError, match=r"cache k of capacity 40|rotary table"):
                made(x, position)
        for plan in made.delegate._plans.values():
            plan.checks = ()
        for position in (38, 40, 2**31 - 1, -1, -(2**31)):
            made(x, position)
            for name, bits in before.items():
                np.testing.assert_array_equal(made.bits(name), bits)


@pytest.mark.parametrize("on", DEVICES)
def test_a_bad_number_stays_where_it_belongs(on: str) -> None:
    """A NaN in a row of x in that row, one in a row of the weight of query in its pair, past the rotary part alone."""
    with layer(Case(d=8, rot=4, interleaved=False), on) as made:
        x = made.x(3)
        x[0, 1, 5] = np.nan
        turned, keys, values, _ = made(x, 4)
        for array in (turned, keys[:, 4:7], values[:, 4:7]):
            np.testing.assert_array_equal(np.isnan(array).all((2, 3)), [[False, True, False]])
            np.testing.assert_array_equal(np.isnan(array).any((2, 3)), [[False, True, False]])
    for column, found in ((9, (9, 11)), (14, (14,))):
        with layer(Case(d=8, rot=4, interleaved=False), on) as made:
            weight = made.builder.data["w0"]
            words = np.frombuffer(weight, np.float32).reshape(32, 64).copy()
            words[column, 3] = np.nan
            made.builder.data["w0"] = words.tobytes()
            made.close()
            made.delegate = made.builder.load(made.graph, made.device)
            turned, *_ = made(made.x(1), 4)
            assert tuple(np.flatnonzero(np.isnan(turned))) == found


def test_what_the_kernel_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes without whole cells, heads of an odd size with neighbouring pairs, few bindings, mixed weights."""
    for case, last in (
        (Case(k=42), "rope_cache"),
        (Case(d=5, rot=4), "rope_cache"),
        (Case(d=5, rot=4, interleaved=False), FUSED[0] if fuses("full") else "rope_cache"),
    ):
        with layer(case, "full") as made:
            made.check(2, 7)
            assert made.kernels()[-1] in (last, f"{last}_sizes")
    limits = device("full").limits
    with layer(Case(), "full") as plain, layer(Case(biases=(1,)), "full") as biased:
        for buffers in (10, 11, 13, 14):
            for made, least in ((plain, 11), (biased, 14)):
                node = made.graph.nodes[0]
                given = replace(limits, max_storage_buffers=buffers)
                found = [d.kernel for d in lowered(made.graph, node, given, rows=2)]
                assert (found == FUSED) == (buffers >= least), (buffers, found)
        for given in (replace(limits, subgroup_size=0), Limits()):
            assert FUSED[0] not in [d.kernel for d in lowered(plain.graph, plain.graph.nodes[0], given, rows=2)]


@pytest.mark.parametrize("on", DEVICES)
def test_an_input_in_the_buffer_of_a_cache(on: str) -> None:
    """The input may be the very cache that is written; its old content is what counts."""
    case = Case(heads=2, kv_heads=2, d=8, rot=8, k=16, capacity=4, norm="")
    with layer(case, on) as made:
        b, (node,) = made.builder, made.graph.nodes
        args: dict[str, Arg] = dict(node.args)
        data = made.old["k"] = np.nan_to_num(made.old["k"])
        b.data["k"] = data.tobytes()
        other = GraphBuilder()
        other.values, other.data, other.inputs = list(made.graph.values), b.data, list(made.graph.inputs)
        view = other.node(
            "aten.view_copy.default", {"self": args["key_cache"], "size": (1, 4, 16)}, ("f32", (1, 4, 16))
        )
        other.values[view.value] = replace(other.values[view.value], alias=made.graph.root(node.outputs[1]))
        args["input"] = view
        other.nodes.append(replace(node, args=args))
        shape = (1, 4, 2, 8)
        other.values[node.outputs[0]] = replace(other.values[node.outputs[0]], shape=shape)
        graph = replace(made.graph, values=tuple(other.values), nodes=tuple(other.nodes))
        delegate = other.load(graph, made.device)
        try:
            feeds = [("f32", np.zeros((1, 4, 16), np.float32)), ("i64", np.array([0], np.int64))]
            found = [np.asarray(array) for _, array in delegate.execute(feeds)]
        finally:
            delegate.close()
            delegate.state.close()
        wanted, slack = made.expected(data.reshape(1, 4, 16), [0])
        for got, want in zip(found[:3], wanted, strict=True):
            close(got, want, "f32", slack)


# -- what is refused

GOOD: dict[str, Any] = {
    "input": ("f32", (1, 5, 16)), "weights": (("f32", (32, 16)), ("f32", (16, 16)), ("f32", (12, 16))),
    "key_cache": ("f32", (1, 9, 2, 8)), "value_cache": ("f32", (1, 9, 2, 6)), "cos": ("f32", (9, 4)),
    "sin": ("f32", (9, 4)), "start": 0, "rot": 8, "interleaved": True, "start_pos": 2, "kv_limit": "causal",
    "window": 0,
}  # fmt: skip
REFUSED: tuple[tuple[dict[str, Any], str], ...] = (
    ({"weights": (("f32", (32, 16)), ("f32", (16, 16)))}, "weights are not those"),
    ({"weights": (("f32", (40, 16)), ("f32", (16, 16)), ("f32", (12, 16)))}, "a weight of 40 rows"),
    ({"weights": (("f32", (32, 15)), ("f32", (16, 16)), ("f32", (12, 16)))}, ""),
    ({"key_cache": ("f32", (1, 9, 4, 8))}, "a weight of 16 rows does not make heads [4, 8]"),
    ({"key_cache": ("f32", (9, 2, 8))}, "four axes"),
    ({"key_cache": ("f32", (1, 8, 2, 8))}, "rows"),
    ({"value_cache": ("i32", (1, 9, 2, 6))}, "i32"),
    ({"cos": ("f32", (9, 3))}, "columns"),
    ({"rot": 3}, "3 rotary elements"),
    ({"norm_weight": ("f32", (16,))}, "norm_weight without norm_eps"),
    ({"start_pos": -1}, "negative"),
    ({"kv_limit": "none"}, "kv_limit"),
    ({"window": -1}, "window"),
)


def refusal(change: dict[str, Any], query: Any = (1, 5, 4, 8), sizes: Any = ("i32", (8,))) -> str | None:
    b = GraphBuilder()
    given = {**GOOD, **change}

    def arg(v: Any) -> Any:
        if isinstance(v, tuple) and isinstance(v[0], tuple):
            return tuple(arg(item) for item in v)
        return b.input(*v) if isinstance(v, tuple) else v

    args = {name: arg(v) for name, v in given.items()}
    graph = b.graph(*b.node(OP, args, ("f32", query), given["key_cache"], given["value_cache"], sizes))
    return check_node(graph, graph.nodes[0])


@pytest.mark.parametrize(("change", "reason"), REFUSED, ids=[str(r[0])[:40] for r in REFUSED])
def test_refuses(change: dict[str, Any], reason: str) -> None:
    assert refusal({}) is None
    found = refusal(change)
    assert found is not None
    assert reason in found


def test_refuses_results_of_another_kind() -> None:
    assert "sizes is" in str(refusal({}, sizes=("i32", (6,))))
    assert refusal({}, query=(1, 4, 4, 8)) is not None
    assert "does not make heads [2, 8]" in str(refusal({}, query=(1, 5, 2, 8)))
