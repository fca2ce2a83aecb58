"""Attention with windows, sinks, caps and masks (group H of the acceptance list)."""

from __future__ import annotations

import numpy as np
import pytest

from executorch_webgpu.runtime.errors import InputError
from tests.harness import DEVICES
from tests.ops.attention_reference import Attention, Case, arrays, assert_close, attention, check, reference

ROUTES = ("prefill", "decode", "stream")


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("window", [1, 2, 63, 64, 65, 4096])
def test_H1_window(window: int, on: str) -> None:
    loaded = Attention(Case(4, 2, 16, 64, 264, window=window), on, dynamic=True)
    try:
        for rows in (1, 5, 64):
            case = Case(4, 2, 16, rows, 264, window=window)
            tensors = arrays(case)
            for pos in (0, 63, 64, 200):
                assert_close(loaded(tensors, pos), reference(case, tensors, pos))
    finally:
        loaded.close()


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("kv_limit", ["prefix", "all"])
@pytest.mark.parametrize("rows", [3, 40])
def test_H1_window_without_causality(rows: int, kv_limit: str, on: str) -> None:
    check(Case(4, 2, 16, rows, 120, 70, window=20, kv_limit=kv_limit), on)


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("rows", [2, 40])
def test_H1_window_past_all_keys(rows: int, on: str) -> None:
    """A position beyond the keys (legal for "all"): every key has left the window."""
    case = Case(4, 2, 16, rows, 30, 200, window=20, kv_limit="all")
    np.testing.assert_array_equal(attention(case, on), np.zeros((1, 4, rows, 16)))


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("sink", [-np.inf, -5.0, 0.0, 5.0, 50.0])
def test_H2_H3_sink(sink: float, route: str, on: str) -> None:
    """Counted once, whatever the number of tiles and splits; H3's smooth softmax is a sink of 0."""
    for pos in (0, 90):
        case = Case(4, 2, 16, 3, 100, pos, sink=sink, route=route)
        tensors = arrays(case)
        tensors["sink"] = tensors["sink"] + np.arange(4, dtype=np.float32) / 4  # a head's own
        assert_close(attention(case, on, tensors), reference(case, tensors))


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("softcap", [1.0, 30.0, 50.0])
def test_H4_softcap(softcap: float, route: str, on: str) -> None:
    """Cap, then mask, then window. Scores reach some hundreds, where some drivers' tanh overflows."""
    case = Case(4, 2, 16, 5, 70, 60, softcap=softcap, mask="f32", window=40, scale=9.0, route=route)
    tensors = arrays(case)
    tensors["attn_mask"] = 3 * tensors["attn_mask"]
    assert_close(attention(case, on, tensors), reference(case, tensors))
    plain = reference(case.with_(softcap=0.0), tensors)
    assert np.abs(plain - reference(case, tensors)).max() > 0.01  # the cap matters here


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("mask", ["bool", "f32"])
def test_H5_a_fully_masked_row_is_zero(mask: str, route: str, on: str) -> None:
    case = Case(4, 2, 16, 5, 70, kv_limit="all", mask=mask, route=route)
    tensors = arrays(case)
    tensors["attn_mask"] = tensors["attn_mask"].copy()
    tensors["attn_mask"][[0, 3]] = False if mask == "bool" else -np.inf
    out = attention(case, on, tensors)
    np.testing.assert_array_equal(out[:, :, [0, 3]], np.zeros((1, 4, 2, 16)))
    assert_close(out, reference(case, tensors))


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("route", ROUTES)
def test_masks_of_the_lowest_float(route: str, on: str) -> None:
    """Masks made with finfo.min: such keys vanish beside others; a row of nothing else gives the mean of the values."""
    case = Case(2, 1, 16, 3, 70, kv_limit="all", mask="f32", route=route)
    tensors = arrays(case)
    lowest = np.finfo(np.float32).min
    tensors["attn_mask"] = np.where(np.arange(210).reshape(3, 70) % 3 == 0, np.float32(0), lowest)
    tensors["attn_mask"][1] = lowest
    out = attention(case, on, tensors)
    assert np.isfinite(out).all()
    part = [0, 2]
    assert_close(out[:, :, part], reference(case, tensors)[:, :, part])
    assert_close(out[0, :, 1], np.broadcast_to(tensors["value"][0, 0].mean(0, dtype=np.float64), (2, 16)), 1e-3)


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("mask", ["f32", "bool", "f16", "bf16"])
def test_mask_shapes(mask: str, route: str, on: str) -> None:
    """Every way to broadcast to [2, 4, 5, 45]; a mask may have more columns than there are keys (C14)."""
    shapes = [
        (5, 45),
        (1, 45),
        (5, 1),
        (1, 1),
        (1, 5, 45),
        (4, 5, 45),
        (2, 1, 5, 45),
        (2, 4, 5, 45),
        (1, 4, 1, 45),
        (5, 52),
    ]
    for shape in shapes if mask in ("f32", "bool") else shapes[-3:]:
        check(Case(4, 2, 16, 5, 45, 33, batch=2, kv_limit="all", mask=mask, mask_shape=shape, route=route), on)


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("rows", [4, 40])
@pytest.mark.parametrize("mask", ["f32", "bool"])
def test_causal_with_mask(mask: str, rows: int, on: str) -> None:
    check(Case(4, 2, 16, rows, 90, 33, mask=mask), on)


@pytest.mark.parametrize("on", DEVICES)
def test_dynamic_masks_grow_after_shrinking(on: str) -> None:
    loaded = Attention(Case(4, 2, 16, 40, 64, mask="f32", kv_limit="all"), on, dynamic=True)
    try:
        for rows in (9, 1, 40, 3):
            case = Case(4, 2, 16, rows, 64, mask="f32", kv_limit="all")
            tensors = arrays(case, rows)
            assert_close(loaded(tensors, 0), reference(case, tensors))
    finally:
        loaded.close()


@pytest.mark.parametrize("on", DEVICES)
def test_masks_of_a_wrong_size_are_refused(on: str) -> None:
    """What only a call shows: the mask's rows are fixed, those of the query are not."""
    loaded = Attention(Case(4, 2, 8, 3, 64, mask="f32", mask_shape=(3, 64), kv_limit="all"), on, dynamic=True)
    try:
        case = Case(4, 2, 8, 5, 64, mask="f32", mask_shape=(3, 64), kv_limit="all")
        with pytest.raises(InputError, match="attention mask along the query row axis: 3"):
            loaded(arrays(case), 0)
    finally:
        loaded.close()


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("rows", [4, 40])
@pytest.mark.parametrize("second", [90.0, 100.0])
def test_H6_large_halves(second: float, rows: int, on: str) -> None:
    """Scores of 80,000, beyond what f16 holds: accumulated in f32."""
    case = Case(2, 2, 64, rows, 64, q_dtype="f16", kv_dtype="f16", out_dtype="f16", kv_limit="all")
    tensors = arrays(case)
    tensors["query"] = np.full_like(tensors["query"], 100)
    tensors["key"] = np.full_like(tensors["key"], 100)
    tensors["value"] = np.full_like(tensors["value"], 0.25)
    tensors["key"][:, :, 1::2] = second
    tensors["value"][:, :, 1::2] = 0.75
    assert_close(attention(case, on, tensors), reference(case, tensors), 0.01, 0.01)
