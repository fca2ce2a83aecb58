"""`webgpu.attention` with lengths per batch row: every route with every option (C14, C16 and group H of the acceptance
list). What must not be read is NaN: cache rows past each row's tokens, padding, partial results of an earlier step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from executorch_webgpu.backend.graph import Arg, Ref
from executorch_webgpu.ops.base import Lowering, check_node, find
from executorch_webgpu.runtime.gpu.host import f32_to_bf16, to_host, to_user
from executorch_webgpu.runtime.gpu.kernel import KernelKey
from tests.harness import DEVICES, GraphBuilder, device
from tests.ops.attention_reference import Array, Case, arrays, assert_close, attention, laid_out, reference
from tests.ops.copy_cases import poison
from tests.ops.ragged import Layer, program

PAIRS = (
    ("stream", "full"), ("decode", "full"), ("decode", "default-limits"), ("flash", "full"),
    ("flash", "default-limits"), ("prefill", "default-limits"), ("naive", "full"),
)  # fmt: skip
"""(route, device): each route, and again where it differs between devices."""
FEW = {"stream", "decode"}
CAPACITY = 300
HALF = {"absolute": 2e-3, "relative": 1e-2}


class Ragged:
    """A loaded graph with `webgpu.lengths` and one `webgpu.attention`; all tensors are inputs."""

    def __init__(self, case: Case, on: str, variant: str | None = None) -> None:
        self.case, b = case, GraphBuilder()

        def shape(heads: int, rows: int, d: int, layout: str) -> tuple[int, ...]:
            return (case.batch, rows, heads, d) if layout == "bshd" else (case.batch, heads, rows, d)

        query = b.input(case.q_dtype, shape(case.heads, case.rows, case.d, case.q_layout))
        key = b.input(case.kv_dtype, shape(case.kv_heads, case.capacity, case.d, case.kv_layout))
        value = b.input(case.kv_dtype, shape(case.kv_heads, case.capacity, case.value_d, case.kv_layout))
        past, q_len = (b.input("i32", (case.batch,)) for _ in range(2))
        given: dict[str, Arg] = {"past": past, "q_len": q_len, "rows": case.rows, "capacity": case.capacity}
        lengths = b.node("webgpu.lengths", given, ("i32", (case.batch, 4)))
        args: dict[str, Arg] = {
            "query": query, "key": key, "value": value, "q_layout": case.q_layout, "kv_layout": case.kv_layout,
            "out_layout": case.out_layout, "start_pos": 0, "kv_limit": case.kv_limit, "scale": case.scale,
            "softcap": case.softcap, "window": case.window, "lengths": lengths, "route": case.route,
        }  # fmt: skip
        if variant is not None:
            args["variant"] = variant
        if case.mask is not None:
            args["attn_mask"] = b.input(case.mask, case.mask_shape or (case.rows, case.capacity))
        if case.sink is not None:
            args["sink"] = b.input("f32", (case.heads,))
        out: Ref = b.node(
            "webgpu.attention", args, (case.out_dtype, shape(case.heads, case.rows, case.value_d, case.out_layout))
        )
        self.graph = b.graph(out)
        assert [check_node(self.graph, node) for node in self.graph.nodes] == [None, None]
        self.delegate = b.load(self.graph, device(on))

    def __call__(self, tensors: dict[str, Array], past: Sequence[int], new: Sequence[int]) -> Array:
        """[batch, heads, rows, dv]"""
        case = self.case

        def host(array: Array, dtype: str) -> Any:
            return ("bf16", f32_to_bf16(array)) if dtype == "bf16" else to_host(array)

        feeds = [host(laid_out(tensors["query"], case.q_layout), case.q_dtype)]
        feeds += [host(laid_out(tensors[name], case.kv_layout), case.kv_dtype) for name in ("key", "value")]
        feeds += [("i32", np.array(x, np.int32)) for x in (past, new)]
        if case.mask is not None:
            feeds.append(host(tensors["attn_mask"], case.mask))
        if case.sink is not None:
            feeds.append(to_host(tensors["sink"]))
        poison(self.delegate)
        [(dtype, array)] = self.delegate.execute(feeds)
        result: Array = to_user(dtype, np.asarray(array), False)
        return result.transpose(0, 2, 1, 3) if case.out_layout == "bshd" else result

    def kernels(self) -> list[str]:
        *_, plan = self.delegate._plans.values()
        return [launch.kernel for launch in plan.launches]

    def close(self) -> None:
        self.delegate.close()


def poisoned(case: Case, tensors: dict[str, Array], past: Sequence[int], new: Sequence[int]) -> dict[str, Array]:
    """The tensors with NaN in what no row may read."""
    made = {name: x.copy() for name, x in tensors.items()}
    for b, (first, count) in enumerate(zip(past, new, strict=True)):
        made["query"][b, :, count:] = np.nan
        for name in ("key", "value"):
            made[name][b, :, first + count if count else 0 :] = np.nan
    return made


def expected(case: Case, tensors: dict[str, Array], past: Sequence[int], new: Sequence[int]) -> Array:
    """float64 [batch, heads, rows, dv]: each batch row by itself, padding zero."""
    out = np.zeros((case.batch, case.heads, case.rows, case.value_d))
    limit = "prefix" if case.kv_limit == "all" else case.kv_limit
    for b, (first, count) in enumerate(zip(past, new, strict=True)):
        if not count:
            continue
        part = {name: tensors[name][b : b + 1] for name in ("key", "value")}
        part["query"] = tensors["query"][b : b + 1, :, :count]
        if case.mask is not None:
            columns = tensors["attn_mask"].shape[-1]
            full = np.broadcast_to(tensors["attn_mask"], (case.batch, case.heads, case.rows, columns))
            part["attn_mask"] = full[b : b + 1, :, :count]
        if case.sink is not None:
            part["sink"] = tensors["sink"]
        out[b, :, :count] = reference(case.with_(batch=1, rows=count, kv_limit=limit), part, first)[0]
    return out


def lengths(rows: int, capacity: int) -> tuple[list[int], list[int]]:
    """past and new of eight batch rows: nothing, one and all tokens, at both ends of the cache and around tiles."""
    past = [0, 0, 0, capacity - rows, 63, 64, capacity, 128]
    return past, [0, 1, rows, rows, 1, rows - 1, 0, min(rows, 2)]


def check(case: Case, on: str, tensors: dict[str, Array] | None = None, variant: str | None = None, **near: Any) -> Any:
    """A ragged call against the reference; returns the kernels that ran."""
    tensors = arrays(case) if tensors is None else tensors
    past, new = lengths(case.rows, case.capacity)
    if case.batch != len(past):
        past, new = past[1 : 1 + case.batch], new[1 : 1 + case.batch]
    loaded = Ragged(case, on, variant)
    try:
        for moved in (0, 3):  # another order of the same lengths on the same plan
            a, b = np.roll(past, moved), np.roll(new, moved)
            out = loaded(poisoned(case, tensors, a, b), a, b)
            assert_close(out, expected(case, tensors, a, b), **near)
            for row, count in enumerate(b):
                np.testing.assert_array_equal(out[row, :, count:], 0)
        return loaded.kernels()
    finally:
        loaded.close()


def case_of(route: str, **options: Any) -> Case:
    rows = options.pop("rows", 5 if route in FEW else 70)
    return Case(4, 2, 16, rows, CAPACITY, batch=8, route=route, **options)


@pytest.mark.parametrize(("route", "on"), PAIRS)
@pytest.mark.parametrize("kv_limit", ["causal", "prefix", "all"])
def test_routes_and_limits_of_keys(kv_limit: str, route: str, on: str) -> None:
    case = case_of(route, kv_limit=kv_limit)
    kernels = check(case.with_(batch=3) if route == "flash" else case, on)  # few enough tiles to split their keys
    assert kernels[:2] == ["lengths", f"attention_{route}"]
    assert len(kernels) == (2 if route in ("prefill", "naive") else 3)  # keys are split, and merged


@pytest.mark.parametrize(("route", "on"), PAIRS[:3])
def test_one_row_of_queries(route: str, on: str) -> None:
    """The variants for a decoding step: one row of queries, and one split of the keys."""
    for capacity in (CAPACITY, 31):
        case = Case(4, 2, 16, 1, capacity, batch=8, route=route)
        tensors = arrays(case)
        past = [min(n, capacity) for n in (0, 0, 5, 30, 63, 64, capacity - 1, capacity)]
        new = [0, 1, 1, 1, 1, 1, 1, 0] if capacity > 64 else [0, 1, 1, 1, 0, 0, 1, 0]
        loaded = Ragged(case, on)
        try:
            out = loaded(poisoned(case, tensors, past, new), past, new)
            assert_close(out, expected(case, tensors, past, new))
        finally:
            loaded.close()


@pytest.mark.parametrize(
    ("heads", "rows", "mask"), [(2, 1, None), (8, 1, None), (6, 5, "f32"), (16, 4, None), (32, 8, None)]
)
def test_variants_for_subgroups_of_32_compile(heads: int, rows: int, mask: str | None) -> None:
    """This machine's driver may have smaller subgroups, but its compiler takes the text all the same."""
    on = device("full")
    loaded = Ragged(Case(heads, 2, 64, rows, 3000, batch=8, kv_dtype="f16", mask=mask), "full")
    try:
        node = loaded.graph.nodes[1]
        op = find(node.op)
        assert op is not None
        found = list(op.lower(Lowering(loaded.graph, replace(on.limits, subgroup_size=32), lambda _: 0), node))
        wanted = ["attention_stream", "attention_join"]  # 512 workgroups need no splits
        assert [dispatch.kernel for dispatch in found] == (wanted if heads * rows < 256 else wanted[:1])
        for dispatch in found:
            assert (dispatch.consts["RAGGED"], dispatch.consts["LENGTHS"]) == (True, 8)
            on.kernel(KernelKey.of(dispatch))
    finally:
        loaded.close()


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("variant", ["small-whole", "medium-whole", "medium-wide", "small"])
def test_flash_tiles(variant: str, on: str) -> None:
    if on == "default-limits" and variant.startswith("medium"):
        variant = "small"  # the only size there
    check(case_of("flash"), on, variant=variant)


@pytest.mark.parametrize(("route", "on"), PAIRS)
def test_odd_sizes_and_layouts(route: str, on: str) -> None:
    """A group of three heads, value heads of another size, heads before rows; scalar loads where a route has them."""
    d, dv = (16, 24) if route in ("stream", "flash") else (6, 9)
    layouts = {"q_layout": "bhsd", "kv_layout": "bhsd", "out_layout": "bhsd"}
    rows = 3 if route in FEW else 41
    check(Case(6, 2, d, rows, CAPACITY, batch=8, dv=dv, route=route, **layouts), on)  # type: ignore[arg-type]


@pytest.mark.parametrize(("route", "on"), PAIRS)
def test_half_caches(route: str, on: str) -> None:
    check(case_of(route, kv_dtype="f16", q_dtype="f16", out_dtype="f16"), on, **HALF)


@pytest.mark.parametrize(("route", "on"), PAIRS)
def test_H1_window(route: str, on: str) -> None:
    for window in (1, 2, 63, 64, 65, 4096):
        check(case_of(route, window=window), on)
    check(case_of(route, window=20, kv_limit="all"), on)


@pytest.mark.parametrize(("route", "on"), PAIRS)
def test_H2_H3_sink(route: str, on: str) -> None:
    """Counted once, not at all in padding; H3's smooth softmax is a sink of 0."""
    for sink in (-np.inf, -5.0, 0.0, 5.0, 50.0):
        case = case_of(route, sink=sink)
        tensors = arrays(case)
        tensors["sink"] = tensors["sink"] + np.arange(4, dtype=np.float32) / 4
        check(case, on, tensors)


@pytest.mark.parametrize(("route", "on"), PAIRS)
def test_H4_softcap_with_bias_and_window(route: str, on: str) -> None:
    """Cap, then bias, then window."""
    case = case_of(route, softcap=1.0, mask="f32", window=40, scale=3.0)
    plain = expected(case.with_(softcap=0.0), arrays(case), *lengths(case.rows, CAPACITY))
    capped = expected(case, arrays(case), *lengths(case.rows, CAPACITY))
    assert np.abs(plain - capped).max() > 0.01  # the cap matters here
    check(case, on)


@pytest.mark.parametrize(("route", "on"), PAIRS)
@pytest.mark.parametrize("mask", ["bool", "f32"])
def test_H5_a_fully_masked_row_is_zero(mask: str, route: str, on: str) -> None:
    case = case_of(route, kv_limit="all", mask=mask)
    tensors = arrays(case)
    tensors["attn_mask"] = tensors["attn_mask"].copy()
    tensors["attn_mask"][[0, 3]] = False if mask == "bool" else -np.inf
    check(case, on, tensors)


@pytest.mark.parametrize(("route", "on"), PAIRS)
def test_H6_large_halves(route: str, on: str) -> None:
    """Scores of 80,000, beyond what f16 holds: accumulated in f32."""
    case = case_of(route, q_dtype="f16", kv_dtype="f16", out_dtype="f16", rows=4 if route in FEW else 40)
    tensors = arrays(case)
    tensors["query"] = np.full_like(tensors["query"], 100)
    tensors["key"] = np.full_like(tensors["key"], 100)
    tensors["value"] = np.full_like(tensors["value"], 0.25)
    tensors["key"][:, :, 1::2] = 90
    tensors["value"][:, :, 1::2] = 0.75
    check(case, on, tensors, absolute=0.01, relative=0.01)


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize(
    "options",
    [
        {"interleaved": True},
        {"interleaved": False},
        {"interleaved": True, "rot": 8},
        {"interleaved": False, "d": 14, "rot": 6, "dv": 5},
    ],
    ids=str,
)
def test_H7_fused_rotary_and_write_equal_single_operators(options: dict[str, Any], on: str) -> None:
    past, new = (3, 0, 20), (4, 6, 0)
    with program(Layer(**options), on, past) as fused, program(Layer(**options, rotary="apart"), on, past) as apart:
        given = fused.tokens(6, 0)
        for a, b in zip(fused(given, past, new), apart(given, past, new), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)
        for name in "kv":
            np.testing.assert_allclose(fused.held(name), apart.held(name), atol=1e-6)


@pytest.mark.parametrize(("route", "on"), PAIRS)
def test_C14_bias_broadcasts(route: str, on: str) -> None:
    """A bias with as many columns as the cache has rows, with more, and with one; every way to broadcast."""
    for shape in ((2, 1, 3, 12), (1, 1, 3, 12), (2, 4, 3, 17), (1, 4, 1, 12), (2, 1, 3, 1)):
        case = Case(4, 2, 8, 3, 12, batch=2, mask="f32", mask_shape=shape, route=route)
        tensors = arrays(case)
        loaded = Ragged(case, on)
        try:
            for past, new in (((0, 0), (3, 2)), ((9, 4), (1, 3)), ((0, 7), (0, 2))):
                out = loaded(poisoned(case, tensors, past, new), past, new)
                assert_close(out, expected(case, tensors, past, new))
        finally:
            loaded.close()


FULL_ROWS = [(route, on, rows) for route, on in PAIRS for rows in ((1, 5) if route in FEW else (40,))]


@pytest.mark.parametrize(("route", "on", "rows"), FULL_ROWS)
def test_C16_one_full_row_equals_the_program_without_lengths(route: str, on: str, rows: int) -> None:
    case = Case(4, 2, 16, rows, CAPACITY, 70, route=route)
    tensors = arrays(case)
    loaded = Ragged(case, on)
    try:
        np.testing.assert_array_equal(loaded(tensors, [70], [rows]), attention(case, on, tensors))
    finally:
        loaded.close()
