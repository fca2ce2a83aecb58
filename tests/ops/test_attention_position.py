"""Attention at moving positions on one program; rows of the cache that must have no effect (A20, A21, group B)."""

from __future__ import annotations

import numpy as np
import pytest

from executorch_webgpu.runtime.errors import InputError
from tests.harness import DEVICES, device
from tests.ops.attention_reference import Array, Attention, Case, arrays, assert_close, attention, reference

SIZES = {"prefill": 40, "decode": 4}


def poisoned(tensors: dict[str, Array], keys: slice | Array, value: float) -> dict[str, Array]:
    """Keys and values of some cache rows replaced."""
    made = {name: array.copy() for name, array in tensors.items()}
    made["key"][:, :, keys] = value
    made["value"][:, :, keys] = value
    return made


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("first", [0, 3])
def test_B1_B2_B3_one_program_for_all_positions(first: int, on: str) -> None:
    """Steps at new positions make no pipeline, no buffer, no bind group."""
    case = Case(8, 4, 4, 1, 16)
    tensors = arrays(case)
    loaded = Attention(case, on)
    try:
        assert_close(loaded(tensors, first), reference(case, tensors, first))
        plan = loaded.delegate.plan(loaded.delegate.bind(loaded.inputs(tensors, first)))
        for pos in range(6):
            before = device(on).counters.copy()
            out = loaded(tensors, pos)
            done = device(on).counters.since(before)
            assert (done.pipelines, done.buffers, done.bind_groups) == (0, 0, 0)
            assert (done.submits, done.dispatches) == (1, len(plan.launches))
            assert_close(out, reference(case, tensors, pos))
    finally:
        loaded.close()


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("rows", SIZES.values(), ids=SIZES)
def test_B6_B7_positions_out_of_range(rows: int, on: str) -> None:
    case = Case(4, 2, 16, rows, 64)
    tensors = arrays(case)
    loaded = Attention(case, on)
    try:
        assert_close(loaded(tensors, 64 - rows), reference(case, tensors, 64 - rows))  # the last row of the cache
        before = device(on).counters.copy()
        for pos in (64 - rows + 1, 64, -1, 2**31, -(2**40)):
            with pytest.raises(InputError, match=r"start_pos|32-bit"):
                loaded(tensors, pos)
        done = device(on).counters.since(before)
        assert (done.writes, done.submits) == (0, 0)
    finally:
        loaded.close()


@pytest.mark.parametrize("on", DEVICES)
def test_B9_prefill_equals_single_steps(on: str) -> None:
    """Row t of one prefill is what a step at position t gives on the same cache."""
    case = Case(4, 2, 16, 12, 40)
    tensors = arrays(case)
    whole = attention(case, on, tensors)
    step = Attention(case.with_(rows=1), on)
    try:
        for t in range(12):
            one = step({**tensors, "query": tensors["query"][:, :, t : t + 1]}, t)
            assert_close(one[:, :, 0], whole[:, :, t])
    finally:
        step.close()


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("rows", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("kv_limit", ["causal", "prefix"])
@pytest.mark.parametrize("dims", [(16, 16), (6, 9)])
@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e30])
def test_A20_rows_past_the_length_have_no_effect(
    garbage: float, dims: tuple[int, int], kv_limit: str, rows: int, on: str
) -> None:
    case = Case(4, 2, dims[0], rows, 128, 37, dv=dims[1], kv_limit=kv_limit)
    tensors = arrays(case)
    tail = slice(37 + rows, None)
    out = attention(case, on, poisoned(tensors, tail, garbage))
    assert np.isfinite(out).all()
    np.testing.assert_array_equal(out, attention(case, on, poisoned(tensors, tail, 0.0)))
    assert_close(out, reference(case, tensors))


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("rows", SIZES.values(), ids=SIZES)
def test_A20_keys_hidden_from_one_row_do_not_reach_it(rows: int, on: str) -> None:
    """The last new row holds NaN: causal rows before it stay as they were, only the last one is NaN."""
    case = Case(4, 2, 16, rows, 128, 50)
    tensors = arrays(case)
    clean = attention(case, on, tensors)
    out = attention(case, on, poisoned(tensors, slice(50 + rows - 1, 50 + rows), np.nan))
    np.testing.assert_array_equal(out[:, :, :-1], clean[:, :, :-1])
    assert np.isnan(out[:, :, -1]).all()


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("rows", SIZES.values(), ids=SIZES)
def test_A20_keys_before_the_window_have_no_effect(rows: int, on: str) -> None:
    case = Case(4, 2, 16, rows, 128, 60, window=9)
    tensors = arrays(case)
    out = attention(case, on, poisoned(tensors, slice(0, 60 - 8), np.nan))
    assert_close(out, reference(case, tensors))


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("rows", SIZES.values(), ids=SIZES)
def test_A20_keys_that_left_the_window_of_later_rows(rows: int, on: str) -> None:
    """NaN in the first key of the first row's window: no other row sees it, though it stands in their tile."""
    case = Case(4, 2, 16, rows, 128, 60, window=40)
    tensors = arrays(case)
    out = attention(case, on, poisoned(tensors, slice(21, 22), np.nan))
    assert np.isnan(out[:, :, 0]).all()
    assert_close(out[:, :, 1:], reference(case, tensors)[:, :, 1:])


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("rows", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("mask", ["bool", "f32", "f16"])
def test_A20_masked_keys_have_no_effect(mask: str, rows: int, on: str) -> None:
    """Rows of a ring cache that nothing was written to, hidden by the mask alone, spread over the tiles."""
    case = Case(4, 2, 16, rows, 80, kv_limit="all", mask=mask)
    tensors = arrays(case)
    hidden = np.flatnonzero(np.arange(80) * 7 % 5 < 2)
    tensors["attn_mask"] = tensors["attn_mask"].copy()
    tensors["attn_mask"][:, hidden] = False if mask == "bool" else -np.inf
    out = attention(case, on, poisoned(tensors, hidden, np.nan))
    assert_close(out, reference(case, tensors))


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("rows", SIZES.values(), ids=SIZES)
def test_nan_that_is_seen_is_kept(rows: int, on: str) -> None:
    """NaN in a value stays in its column, in a key it takes the whole row; infinite values pass."""
    case = Case(2, 1, 16, rows, 96, 45)
    tensors = arrays(case)
    tensors["value"] = tensors["value"].copy()
    tensors["value"][0, 0, 5, 3] = np.nan
    tensors["value"][0, 0, 40, 7] = np.inf
    assert_close(attention(case, on, tensors), reference(case, tensors))
    tensors["key"] = tensors["key"].copy()
    tensors["key"][0, 0, 46, 2] = np.nan  # rows from the second on see it
    out = attention(case, on, tensors)
    assert np.isnan(out[:, :, 1:]).all()
    assert np.isnan(out[:, :, 0, [0, 3, 7, 15]]).tolist() == [[[False, True, False, False]] * 2]


@pytest.mark.parametrize("on", DEVICES)
def test_A21_partial_results_of_an_earlier_step_have_no_effect(on: str) -> None:
    """A long step on NaN leaves NaN in all scratch; a short one afterwards gives what a fresh program gives."""
    case = Case(8, 2, 16, 2, 2048)
    tensors = arrays(case)
    loaded = Attention(case, on)
    try:
        assert np.isnan(loaded({name: np.full_like(x, np.nan) for name, x in tensors.items()}, 2046)).all()
        for pos in (0, 30, 31, 1000):
            assert_close(loaded(tensors, pos), reference(case, tensors, pos))
    finally:
        loaded.close()


@pytest.mark.parametrize("on", DEVICES)
def test_splits_that_do_not_divide_the_length(on: str) -> None:
    """64 splits of a long cache: lengths of fewer tiles, as many, and more, whole and in part."""
    case = Case(4, 2, 16, 1, 4096)
    tensors = arrays(case)
    loaded = Attention(case, on)
    try:
        for length in (2048, 2049, 2047, 2080, 2081, 3000, 4064, 4065, 4096, 33):
            assert_close(loaded(tensors, length - 1), reference(case, tensors, length - 1))
    finally:
        loaded.close()
