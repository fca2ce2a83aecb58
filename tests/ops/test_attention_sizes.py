"""Attention over many head sizes, at long lengths and on large grids (A7, A8, A15, A22, A23)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.harness import DEVICES
from tests.ops.attention_reference import Attention, Case, arrays, assert_close, attention, check, reference

ROUTES = ("prefill", "decode", "stream")


@pytest.mark.parametrize(
    ("on", "case"),
    [("full", Case(32, 8, 64, 512, 512)), ("default-limits", Case(32, 8, 64, 2048, 2048))],
    ids=["A7", "A8"],
)
def test_A7_A8_long_prefill_without_scores_in_memory(on: str, case: Case) -> None:
    """The full size, held against the reference of two KV heads' first query heads; scratch stays below 64 MiB."""
    tensors = arrays(case)
    loaded = Attention(case, on)
    try:
        env = loaded.delegate.bind(loaded.inputs(tensors, 0))
        assert loaded.delegate.plan(env).scratch_bytes < 64 << 20
        out = loaded(tensors, 0)
    finally:
        loaded.close()
    part = {"query": tensors["query"][:, ::16], "key": tensors["key"][:, ::4], "value": tensors["value"][:, ::4]}
    assert_close(out[:, ::16], reference(replace(case, heads=2, kv_heads=2), part))
    assert np.isfinite(out).all()


HEAD_SIZES = [(d, d) for d in (1, 4, 6, 8, 12, 16, 32, 40, 64, 80, 96, 112, 128, 256)] + [
    (576, 512),
    (33, 266),
]


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize(("d", "dv"), HEAD_SIZES)
def test_A15_A22_head_sizes(d: int, dv: int, on: str) -> None:
    for route, rows in (("prefill", 6), ("decode", 3)):
        check(Case(4, 2, d, rows, 71, 64, dv=dv, route=route), on)


@pytest.mark.parametrize("route", ROUTES)
def test_A23_more_workgroups_than_one_axis_holds(route: str) -> None:
    """70,000 heads with a key and value of their own; one key each, so the result is the value."""
    case = Case(70_000, 70_000, 4, 1, 1, route=route)
    tensors = arrays(case)
    np.testing.assert_allclose(attention(case, "full", tensors), tensors["value"], rtol=1e-6)
