"""The operator itself, eager: against float64 with every option, what it refuses, and how torch.export sees it.

Tests with a letter and a number cover the row of that name of the attention checklist (groups C, D, G and H).
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from executorch.exir import EdgeCompileConfig, to_edge

from executorch_webgpu.backend.translate import translate
from executorch_webgpu.llm.group_query_attention import OPERATOR
from tests.llm.cases import FORMS, Case, Layer, arguments, call, close, copied, exported, permuted, reference


def check(case: Case) -> None:
    """The result and the caches against float64; cache rows beside the new ones bit for bit as they were."""
    given = arguments(case)
    before = copied(given)
    want, keys, values = reference(case, given)
    got = call(given)
    flat = case.packed or case.flat
    assert got.shape == ((*want.shape[:2], case.heads * case.v_size) if flat else want.shape)
    assert got.dtype == case.dtype
    coarsest = min((case.dtype, case.cache_dtype or case.dtype), key=lambda dtype: torch.finfo(dtype).bits)
    close(got, want, coarsest)
    for name, new in (("key_cache", keys), ("value_cache", values)):
        close(given[name], new, coarsest)
        for row, (past, count) in enumerate(zip(case.past, case.counts, strict=True)):
            for part in (slice(0, past), slice(past + count, None)):
                assert torch.equal(given[name][row, part], before[name][row, part])
    for row, count in enumerate(case.counts):
        assert not got[row, count:].any()


@pytest.mark.parametrize("name", FORMS)
def test_forms(name: str) -> None:
    check(FORMS[name])


@pytest.mark.parametrize("name", ["everything", "not causal", "bool bias", "interleaved rotary"])
def test_float64_stays_float64(name: str) -> None:
    check(FORMS[name].with_(dtype=torch.float64))


@pytest.mark.parametrize("lengths", [(4, 2, 6), (20, 12, 33), (20, 12, 96)])
def test_C1_C2_C3_C17_prompts_of_unequal_length_equal_their_solo_runs(lengths: tuple[int, ...]) -> None:
    """Packed projections and rotary; then eight tokens one by one."""
    case = Case((0, 0, 0), lengths, rows=max(lengths), capacity=128, d=16, packed=True, rot=16)
    given = arguments(case)
    solo = [
        {n: t[row : row + 1].clone() if n in BATCHED and t is not None else t for n, t in given.items()}
        for row in range(3)
    ]
    got = call(given)
    for row, count in enumerate(lengths):
        alone = solo[row] | {"query": solo[row]["query"][:, :count]}
        torch.testing.assert_close(got[row, :count], call(alone)[0])
    generator = torch.Generator().manual_seed(9)
    for step in range(8):
        given |= {
            "query": torch.randn(3, 1, given["query"].shape[2], generator=generator),
            "past": torch.tensor(lengths, dtype=torch.int32) + step,
            "q_len": torch.ones(3, dtype=torch.int32),
        }
        got = call(given)
        for row in range(3):
            alone = {n: given[n][row : row + 1] for n in ("query", "past", "q_len")}
            torch.testing.assert_close(got[row], call(solo[row] | alone)[0])


BATCHED = ("query", "key", "value", "key_cache", "value_cache", "past", "q_len")


def test_C4_smooth_softmax_of_unequal_prompts() -> None:
    check(Case((0, 0, 0), (4, 2, 6), rows=6, packed=True, rot=8, smooth=True))


def test_C5_the_order_of_rows_does_not_matter() -> None:
    case = Case((1, 0, 5), (4, 2, 3), rot=8)
    given = arguments(case)
    got = call(copied(given))
    for order in itertools.permutations(range(3)):
        other = {n: t[list(order)] if n in BATCHED and t is not None else t for n, t in given.items()}
        assert permuted(case.past, order) == tuple(other["past"].tolist())
        assert torch.equal(call(copied(other)), got[list(order)])


@pytest.mark.parametrize("q_len", [(1, 6), (6, 1), (0, 6), (6, 0), (0, 0)])
def test_C6_C7_a_single_token_all_tokens_and_none_in_one_batch(q_len: tuple[int, ...]) -> None:
    check(Case((0, 3), q_len, rows=6, rot=8))


@pytest.mark.parametrize("batch", [1, 2, 4, 8, 16])
def test_C8_C9_spreads_and_batches(batch: int) -> None:
    past = tuple((0, 63, 64, 65, 128)[row % 5] for row in range(batch))
    check(Case(past, tuple(1 + row % 2 for row in range(batch)), rows=2, capacity=130, kv_heads=1, heads=2))


def test_C11_G10_what_padding_holds_has_no_effect() -> None:
    """Padding of NaN, and real tokens equal to padding: only lengths count."""
    given = arguments(Case((0, 3), (2, 3), rot=8))
    got = call(copied(given))
    other = copied(given)
    for name in ("query", "key", "value"):
        other[name] = other[name].clone()
        other[name][0, 2:] = other[name][1, 3:] = torch.nan
    assert torch.equal(call(other), got)
    assert torch.isfinite(other["key_cache"]).all()


def test_C12_C13_rows_with_a_past_and_unequal_lengths_turn_by_their_own_positions() -> None:
    """The rotary table ends with the last position."""
    check(Case((2, 4), (3, 2), rot=8, table=6))


@pytest.mark.parametrize("shape", [(2, 1, 3, 3), (1, 1, 3, 3), (2, 4, 3, 3), (3, 3), (3, 16), (1, 1, 3, 40)])
def test_C14_bias_broadcasts(shape: tuple[int, ...]) -> None:
    check(Case((0, 0), (3, 2), rows=3, bias=shape))


BAD_LENGTHS: dict[str, tuple[tuple[int, ...], tuple[int, ...], str]] = {
    "D1 negative": ((-1, 3), (1, 1), r"past of batch row 0 is -1, outside \[0, 16\]"),
    "D1 one bad row": ((3, 17), (1, 1), r"past of batch row 1 is 17, outside \[0, 16\]"),
    "D1 largest int": ((3, 2**31 - 1), (1, 1), r"past of batch row 1 is 2147483647, outside \[0, 16\]"),
    "D1 full": ((3, 16), (1, 1), r"past 16 \+ q_len 1 of batch row 1 is above the 16 rows of the caches"),
    "D3 negative count": ((3, 4), (1, -1), r"q_len of batch row 1 is -1, outside \[0, 4\]"),
    "D4 more than there are": ((3, 4), (5, 1), r"q_len of batch row 0 is 5, outside \[0, 4\]"),
    "D4 above the end": ((14, 4), (3, 1), r"past 14 \+ q_len 3 of batch row 0 is above the 16 rows"),
}


@pytest.mark.parametrize("name", BAD_LENGTHS)
def test_D1_D3_D4_lengths_outside_their_range(name: str) -> None:
    past, q_len, message = BAD_LENGTHS[name]
    given = arguments(Case((3, 4), (1, 1)))
    given |= {n: torch.tensor(v, dtype=torch.int32) for n, v in (("past", past), ("q_len", q_len))}
    before = copied(given)
    with pytest.raises(ValueError, match=message):
        call(given)
    assert torch.equal(given["key_cache"], before["key_cache"])


def test_one_tensor_for_both_caches_is_refused() -> None:
    given = arguments(Case((3, 4), (1, 1)))
    given["value_cache"] = given["key_cache"]
    before = given["key_cache"].clone()
    with pytest.raises(ValueError, match="key_cache and value_cache are one tensor; they must be apart"):
        call(given)
    assert torch.equal(given["key_cache"], before)


def test_D2_G7_lengths_at_both_ends() -> None:
    check(Case((15, 16, 0), (1, 0, 1), rot=8))


@pytest.mark.parametrize("shape", [(2,), (2, 1), (1, 2)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_D5_shapes_of_lengths(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    case = Case((3, 0), (2, 4))
    given = arguments(case)
    want, _, _ = reference(case, given)
    for name in ("past", "q_len"):
        given[name] = given[name].to(dtype).reshape(shape)
    close(call(given), want)


@pytest.mark.parametrize(
    "lengths", [torch.zeros(2, 2), torch.zeros(3), torch.zeros(()), torch.zeros(1), torch.zeros(2)]
)
@pytest.mark.parametrize("name", ["past", "q_len"])
def test_D5_G4_G9_lengths_of_another_kind(name: str, lengths: torch.Tensor) -> None:
    """A mask, a wrong count, a scalar; floats (also of the right count)."""
    given = arguments(Case((3, 0), (2, 4)))
    right = lengths.shape == (2,)
    given[name] = lengths if right else lengths.int()
    kind = "f32" if right else "i32"
    with pytest.raises(
        ValueError, match=rf"{name} is {kind}\[.*one for each of 2 batch rows: \[2\], \[2, 1\] or \[1, 2\]"
    ):
        call(given)


def test_D7_positions_above_the_rotary_table() -> None:
    given = arguments(Case((3, 0), (2, 4), rot=8, table=4))
    with pytest.raises(ValueError, match=r"past 3 \+ q_len 2 of batch row 0 is above the 4 rows of the rotary table"):
        call(given)
    given["sin"] = given["sin"][:2]
    with pytest.raises(ValueError, match=r"cos is f32\[4, 4\], sin f32\[2, 4\]; they must have one shape"):
        call(given)


def test_D8_growing_steps() -> None:
    given = arguments(Case((0,), (1,), rows=1, rot=8))
    for seed, (past, rows) in enumerate(((0, 1), (1, 1), (2, 1), (0, 2), (2, 3))):
        case = Case((past,), (rows,), rows=rows, rot=8, seed=seed)
        caches = {n: given[n] for n in ("key_cache", "value_cache")}
        given = arguments(case) | caches | {"cos": given["cos"], "sin": given["sin"]}
        want, _, _ = reference(case, given)
        close(call(given), want)


@pytest.mark.parametrize("window", [1, 2, 63, 64, 65, 4096])
@pytest.mark.parametrize("rows", [1, 5])
def test_H1_windows(rows: int, window: int) -> None:
    check(Case((0, 63, 64, 200), (rows,) * 4, rows=rows, window=window, capacity=208, heads=2, kv_heads=1))


@pytest.mark.parametrize("sink", [-torch.inf, -5.0, 0.0, 5.0, 50.0])
def test_H2_sinks(sink: float) -> None:
    check(Case((3, 12), (4, 1), sinks=sink))


def test_H3_smooth_softmax_is_a_sink_of_zero() -> None:
    given = arguments(Case((3, 12), (4, 1), smooth=True))
    sink = given | {"smooth_softmax": False, "sink": torch.zeros(4)}
    assert torch.equal(call(copied(given)), call(copied(sink)))


@pytest.mark.parametrize("softcap", [1.0, 30.0, 50.0])
def test_H4_softcap_comes_before_bias_and_window(softcap: float) -> None:
    check(Case((3, 9), (4, 1), softcap=softcap, bias=(2, 4, 4, 16), window=5))


def test_H5_a_row_without_keys_gives_zeros() -> None:
    given = arguments(Case((3, 9), (4, 1), bias=(4, 16), causal=False))
    given["attn_bias"][1] = -torch.inf
    got = call(given)
    assert torch.isfinite(got).all()
    assert not got[0, 1].any()
    assert got[0, 0].all()


def test_H7_H8_H9_fused_equals_step_by_step() -> None:
    """Norms and rotary embedding beside the operator, and parts apart instead of packed."""
    case = Case((3, 0), (4, 3), rot=6, norm=True, packed=True, d=8)
    given = arguments(case)
    fused = call(copied(given))
    apart = [x.unflatten(2, (-1, 8)) for x in given["query"].split([32, 16, 16], 2)]
    positions = given["past"].long()[:, None] + torch.arange(4)
    for i, name in enumerate(("q_norm", "k_norm")):
        x = torch.nn.functional.rms_norm(apart[i], (8,), given[name], 1e-5)
        c, s = (given[t][positions][:, :, None] for t in ("cos", "sin"))
        a, b, rest = x[..., :3], x[..., 3:6], x[..., 6:]
        apart[i] = torch.cat((a * c - b * s, b * c + a * s, rest), -1)
    plain = dict.fromkeys(("cos", "sin", "q_norm", "k_norm"))
    got = call(copied(given) | plain | dict(zip(("query", "key", "value"), apart, strict=True)))
    torch.testing.assert_close(got.flatten(2), fused, atol=1e-6, rtol=1e-5)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "heads": ({"num_heads": 3}, "num_heads 3 is no multiple of num_kv_heads 2"),
    "no heads": ({"num_heads": 0}, "num_heads is 0; it must be a positive integer"),
    "window": ({"window": -1}, "window is -1"),
    "softcap": ({"softcap": -1.0}, "softcap is -1.0"),
    "scale": ({"scale": float("nan")}, "scale is nan"),
    "one of two": ({"key": None}, "key and value must both be given"),
    "packed width": (
        {"key": None, "value": None},
        r"packed query is f32\[2, 4, 4, 8\]; it must be \[batch, rows, 64\]",
    ),
    "head size": ({"query": torch.zeros(2, 4, 4, 6)}, r"query is f32\[2, 4, 4, 6\]; it must be \[batch, rows, 4, 8\]"),
    "rows": ({"key": torch.zeros(2, 3, 2, 8)}, "query has 4 rows, key 3"),
    "batch": ({"value": torch.zeros(3, 4, 2, 8)}, "the caches have a batch of 2"),
    "dtypes": ({"value": torch.zeros(2, 4, 2, 8).half()}, "query is f32, value f16"),
    "integers": ({"key_cache": torch.zeros(2, 16, 2, 8).int()}, "key_cache is i32"),
    "cache rank": ({"key_cache": torch.zeros(16, 2, 8)}, r"key_cache is f32\[16, 2, 8\]; it must be \[batch"),
    "cache heads": ({"key_cache": torch.zeros(2, 16, 4, 8)}, "it must have 2 heads"),
    "capacities": ({"value_cache": torch.zeros(2, 15, 2, 8)}, "differ in batch, capacity or heads"),
    "cache dtypes": ({"value_cache": torch.zeros(2, 16, 2, 8).half()}, "key_cache is f32, value_cache f16"),
    "one table": ({"cos": torch.zeros(16, 4)}, "cos and sin must both be given"),
    "wide table": ({"cos": torch.zeros(16, 5), "sin": torch.zeros(16, 5)}, "10 rotary elements of a head size of 8"),
    "one norm": ({"q_norm": torch.zeros(8)}, "q_norm and k_norm must both be given"),
    "norm size": ({"q_norm": torch.zeros(8), "k_norm": torch.zeros(7)}, r"k_norm is f32\[7\]"),
    "bias rows": ({"attn_bias": torch.zeros(3, 16)}, r"attn_bias is f32\[3, 16\]; it does not broadcast to the rows"),
    "bias heads": ({"attn_bias": torch.zeros(2, 4, 16)}, "does not broadcast to the heads"),
    "bias columns": ({"attn_bias": torch.zeros(4, 5)}, r"past 3 \+ q_len 4 of batch row 0 is above the 5 columns"),
    "integer bias": ({"attn_bias": torch.zeros(4, 16).int()}, "it must be float or bool"),
    "sink": ({"sink": torch.zeros(2)}, r"sink is f32\[2\]; it must be a float for each of 4 query heads"),
    "two sinks": ({"sink": torch.zeros(4), "smooth_softmax": True}, "it excludes sink"),
    "too many rows": (
        {n: torch.zeros(2, 17, h, 8) for n, h in (("query", 4), ("key", 2), ("value", 2))},
        "17 rows a call",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_refusals(name: str) -> None:
    changes, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call(arguments(Case((3, 0))) | changes)


@pytest.mark.parametrize("name", ["ragged", "everything"])
def test_opcheck(name: str) -> None:
    """torch's own checks of schema, fake kernel and functionalisation, static and dynamic."""
    given = arguments(FORMS[name])
    schema = OPERATOR._schema.arguments
    positional = tuple(given.get(a.name) for a in schema if not a.kwarg_only)
    torch.library.opcheck(OPERATOR, positional, {a.name: given.get(a.name) for a in schema if a.kwarg_only})


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_a_dynamic_number_of_rows(strict: bool) -> None:
    """One functionalised node, both caches mutated; the exported program computes what the module does."""
    case = FORMS["norms and rotary"]
    given = arguments(case)
    module = Layer(given)
    program = exported(module, given, strict).run_decompositions({})
    assert set(program.graph_signature.buffers_to_mutate.values()) == {"key_cache", "value_cache"}
    for rows in (1, 4, 7):
        other = arguments(case.with_(rows=rows, q_len=(1, min(3, rows)), seed=5))
        inputs, eager = Layer.inputs(other), Layer(copied(given))
        torch.testing.assert_close(program.module()(*inputs), eager(*inputs))
    edge = to_edge(program, compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True))
    translation = translate(edge.exported_program())
    assert not translation.refused
    [node] = translation.graph.nodes
    assert node.op == "executorch_webgpu.group_query_attention.default"
    assert len(translation.graph.mutations) == 2
    assert np.all([translation.graph.values[o].kind == "temp" for o in node.outputs])
