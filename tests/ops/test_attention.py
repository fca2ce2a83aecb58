"""Attention kernels against the float64 reference: shapes, head sizes, layouts, dtypes (group A of the checklist)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from executorch_webgpu import wgsl
from executorch_webgpu.ops.attention_common import Problem
from executorch_webgpu.ops.attention_decode import choose_decode, decode_memory
from executorch_webgpu.ops.attention_prefill import choose_prefill_rows, prefill_memory
from executorch_webgpu.ops.base import Limits
from executorch_webgpu.runtime.errors import DeviceError
from executorch_webgpu.runtime.gpu.device import Device
from tests.harness import DEVICES, device
from tests.ops.attention_reference import Attention, Case, arrays, assert_close, attention, check, reference

HALF = {"absolute": 2e-3, "relative": 1e-2}
ROUTES = ("prefill", "decode", "stream")

PEERS = {
    "A1": Case(6, 2, 8, 4, 16, 0),
    "A2": Case(4, 4, 16, 3, 8, 0),
    "A3": Case(8, 4, 4, 5, 16, 0),
    "A4": Case(6, 2, 8, 2, 16, 2),
    "A5": Case(24, 8, 128, 128, 256, 0),
    "A6": Case(32, 8, 64, 128, 512, 0),
    "A9": Case(32, 8, 64, 1, 512, 127),
    "A10": Case(32, 8, 64, 1, 4096, 4095),
    "A11": Case(32, 8, 64, 1, 8192, 8191),
}


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("name", PEERS)
def test_peers_shapes(name: str, on: str) -> None:
    check(PEERS[name], on)


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("route", ROUTES)
def test_A12_large_logits(route: str, on: str) -> None:
    """Logits of some hundreds: exp without the running maximum would overflow."""
    case = Case(4, 4, 32, 4, 16, route=route, scale=4.0)
    tensors = {name: 2.5 * x for name, x in arrays(case).items()}
    assert float(np.abs(tensors["query"] @ tensors["key"].swapaxes(2, 3)).max()) * 4.0 > 177
    assert_close(attention(case, on, tensors), reference(case, tensors))


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("kv_dtype", ["f16", "bf16"])
@pytest.mark.parametrize(
    "case",
    [Case(16, 8, 128, 128, 256), Case(16, 8, 128, 17, 64, 31), Case(16, 8, 128, 1, 64, 63)],
    ids=["A13", "A14", "decode"],
)
def test_A13_A14_half_caches(case: Case, kv_dtype: str, on: str) -> None:
    check(case.with_(kv_dtype=kv_dtype), on, **HALF)


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("q", "kv", "out"),
    [
        ("f16", "f16", "f16"),
        ("bf16", "bf16", "bf16"),
        ("bf16", "f16", "f32"),
        ("f32", "f32", "f16"),
    ],
)
def test_dtypes_are_independent(q: str, kv: str, out: str, route: str, on: str) -> None:
    case = Case(4, 2, 16, 5, 48, 40, q_dtype=q, kv_dtype=kv, out_dtype=out, route=route)
    check(case, on, **({"absolute": 8e-3, "relative": 1e-2} if out == "bf16" else HALF))


@pytest.mark.parametrize("on", DEVICES)
def test_A17_context_lengths(on: str) -> None:
    """One row at every edge of tiles and lanes; lengths go up and down on one plan."""
    case = Case(8, 2, 64, 1, 160)
    tensors = arrays(case)
    loaded = Attention(case, on)
    try:
        for length in (129, 1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 160, 5):
            assert_close(loaded(tensors, length - 1), reference(case, tensors, length - 1))
    finally:
        loaded.close()


@pytest.mark.parametrize("on", DEVICES)
def test_A18_rows_and_positions(on: str) -> None:
    """Both routes and their edges with a dynamic number of rows that shrinks and grows again."""
    loaded = Attention(Case(4, 2, 16, 65, 136), on, dynamic=True)
    try:
        for rows in (65, 1, 2, 3, 4, 5, 7, 8, 9, 31, 32, 33, 63, 64, 65, 1, 33):
            case = Case(4, 2, 16, rows, 136)
            tensors = arrays(case, rows)
            for pos in (0, 1, 63, 64, 65):
                assert_close(loaded(tensors, pos), reference(case, tensors, pos))
    finally:
        loaded.close()


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("case", [Case(1, 1, 128, 128, 128), Case(16, 1, 128, 8, 128)], ids=["prefill", "few"])
def test_A19_every_key_of_a_tile_counts(case: Case, on: str) -> None:
    """Query number k is such that key k alone decides, whose value is k."""
    case = case.with_(kv_limit="all", scale=1.0)
    q = 60 * np.eye(128, dtype=np.float32).reshape(1, case.heads, case.rows, 128)
    v = np.repeat(np.arange(128, dtype=np.float32)[:, None], 128, 1).reshape(1, 1, 128, 128)
    k = np.eye(128, dtype=np.float32).reshape(1, 1, 128, 128)
    out = attention(case, on, {"query": q, "key": k, "value": v})
    expected = np.repeat(np.arange(128.0)[:, None], 128, 1).reshape(out.shape)
    np.testing.assert_allclose(out, expected, atol=1e-3)


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("group", [1, 3, 5, 16])
def test_groups_of_query_heads(group: int, route: str, on: str) -> None:
    check(Case(2 * group, 2, 16, 3, 50, 40, batch=2, route=route), on)


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("layouts", ["bshd bshd bhsd", "bhsd bshd bshd", "bshd bhsd bshd", "bhsd bhsd bhsd"])
def test_layouts_and_batches(layouts: str, route: str, on: str) -> None:
    q, kv, out = layouts.split()
    check(Case(6, 3, 16, 4, 37, 20, batch=3, dv=8, q_layout=q, kv_layout=kv, out_layout=out, route=route), on)


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("rows", [1, 9, 40])
@pytest.mark.parametrize("kv_limit", ["causal", "prefix", "all"])
def test_limits_of_keys(kv_limit: str, rows: int, on: str) -> None:
    check(Case(4, 2, 16, rows, 80, 33, kv_limit=kv_limit), on)


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("route", [*ROUTES, "naive"])
def test_routes_agree(route: str, on: str) -> None:
    """The oracle kernel and both fast routes with everything at once."""
    case = Case(6, 2, 16, 6, 90, 70, dv=8, batch=2, softcap=3.0, window=50, mask="f32", sink=0.5, route=route)
    check(case, on)


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("route", ROUTES)
def test_grids_are_folded(route: str, on: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As A23 with a small limit, on real work, the last row of the grid partly used."""
    monkeypatch.setattr(device(on), "limits", replace(device(on).limits, max_workgroups=5))
    check(Case(6, 3, 16, 34 if route == "prefill" else 3, 70, 30, batch=2, route=route), on)


@pytest.mark.parametrize("on", DEVICES)
def test_A26_a_cache_beyond_the_binding_limit_is_an_error(on: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(2, 2, 16, 1, 64)
    loaded = Attention(case, on)
    monkeypatch.setattr(device(on), "limits", replace(device(on).limits, max_binding=4096))
    with pytest.raises(DeviceError, match=r"attention_(decode|stream)\.key has 8,192 bytes"):
        loaded(arrays(case), 0)
    loaded.close()


def test_A25_storage_buffers() -> None:
    for name in ("naive", "prefill", "decode", "stream", "merge"):
        bindings = wgsl.reflect(f"attention_{name}").bindings.values()
        assert sum(b.space == "storage" for b in bindings) <= Limits().max_storage_buffers


def test_A27_one_compilation_a_variant() -> None:
    on = Device.create(default_limits=True, features=())
    for expected in (2, 0):  # the split kernel and its merge; nothing for the second program
        before = on.counters.copy()
        loaded = Attention(Case(4, 2, 8, 1, 16), "full")
        loaded.delegate.close()
        loaded.delegate = type(loaded.delegate)(
            loaded.graph, on, dict[str, bytes]().__getitem__, loaded.delegate.weights, loaded.delegate.state
        )
        loaded(arrays(loaded.case), 3)
        loaded.close()
        assert on.counters.since(before).pipelines == expected


@pytest.mark.parametrize("memory", [16384, 32768, 49152])
def test_A28_tiles_fit_the_limits(memory: int) -> None:
    limits = Limits(max_workgroup_memory=memory)
    for rows in (1, 32, 33, 2048):
        assert prefill_memory(choose_prefill_rows(rows, limits)) <= memory
    assert choose_prefill_rows(2048, limits) == (32 if memory == 16384 else 64)
    assert choose_prefill_rows(2048, replace(limits, max_invocations=64)) == 32
    for d in (*range(1, 520), 576, 1024, 8192):
        for heads, rows, capacity in ((1, 1, 1), (32, 1, 131072), (128, 8, 8192), (71, 3, 100)):
            choice = choose_decode(Problem(2, heads, 1, rows, capacity, d, d), limits)
            if d <= 576:
                assert choice is not None
            if choice is not None:
                assert decode_memory(choice.rows, d) <= memory
                assert choice.rows * choice.row_tiles >= heads * rows
                assert 1 <= choice.splits <= 64
                assert choice.scratch_bytes <= 32 << 20


@pytest.mark.parametrize("on", DEVICES)
def test_a_head_too_wide_for_the_decode_route(on: str) -> None:
    """4,000 columns of a query do not fit the workgroup memory of the decode kernel: the prefill kernel takes it."""
    check(Case(2, 1, 4000, 1, 40, 30, dv=4), on)


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("case", [Case(4, 2, 8, 0, 16), Case(4, 2, 8, 3, 16, batch=0), Case(4, 2, 8, 3, 16, dv=0)])
def test_empty_results(case: Case, on: str) -> None:
    assert attention(case, on).size == 0


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("sink", [None, 1.0])
@pytest.mark.parametrize("rows", [1, 40])
def test_no_keys_give_zeros(rows: int, sink: float | None, on: str) -> None:
    case = Case(4, 2, 16, rows, 0, kv_limit="all", sink=sink)
    out = attention(case, on)
    np.testing.assert_array_equal(out, np.zeros(out.shape))
