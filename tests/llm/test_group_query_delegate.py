"""The operator on the GPU: every legal form against float64, through both lowering routes, and what is refused.

Tests with a letter and a number cover the row of that name of the attention checklist (groups C, D, G and H).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from executorch.exir import EdgeCompileConfig, to_edge, to_edge_transform_and_lower

from executorch_webgpu.backend.graph import Sym
from executorch_webgpu.backend.preprocess import NotDelegable, lower
from executorch_webgpu.ops.base import Lowering, check_node, find
from executorch_webgpu.partitioner import WebGPUPartitioner
from executorch_webgpu.runtime import Runtime
from executorch_webgpu.runtime.errors import InputError
from tests.harness import DEVICES, device
from tests.llm.cases import FORMS, Case, Layer, arguments, close, exported, reference
from tests.llm.records import CACHES, Compiled, build

CONFIG = EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True)
ROWS = ("query", "key", "value", "past", "q_len")


@contextmanager
def compiled(case: Case, given: dict[str, Any], on: str) -> Iterator[Compiled]:
    made = Compiled(case, given, on)
    try:
        yield made
    finally:
        made.close()


def coarsest(case: Case) -> torch.dtype:
    return min((case.dtype, case.cache_dtype or case.dtype), key=lambda dtype: torch.finfo(dtype).bits)


def check(case: Case, on: str, poisoned: bool = True) -> None:
    """Result and caches against float64. Cache rows that no token may see are NaN, and stay bit for bit."""
    given = arguments(case)
    want, keys, values = reference(case, given)
    if poisoned:
        for row, past in enumerate(case.past):
            for name in CACHES:
                given[name][row, past:] = torch.nan
    with compiled(case, given, on) as layer:
        before = {name: layer.cache(name) for name in CACHES}
        got = layer(given)
        close(got, want, coarsest(case))
        for name, new in zip(CACHES, (keys, values), strict=True):
            after = layer.cache(name)
            for row, (past, count) in enumerate(zip(case.past, case.counts, strict=True)):
                close(after[row, past : past + count], new[row, past : past + count], coarsest(case))
                for part in (slice(0, past), slice(past + count, None)):
                    np.testing.assert_array_equal(after[row, part], before[name][row, part])
    for row, count in enumerate(case.counts):
        assert not got[row, count:].any()


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("name", FORMS)
def test_forms(name: str, on: str) -> None:
    check(FORMS[name], on)


@pytest.mark.parametrize("rows", [40, 70])
@pytest.mark.parametrize("name", ["packed", "everything", "not causal", "bool bias", "half"])
def test_prompts(name: str, rows: int) -> None:
    """Many rows: the kernels of prompts."""
    case = FORMS[name]
    counts = (rows, 17, 1)[: case.batch]
    bias = None if case.bias is None else (*case.bias[:-2], rows, 100)
    check(
        case.with_(rows=rows, q_len=counts, past=(3, 9, 80)[: case.batch], capacity=96, d=16, dv=None, bias=bias),
        "full",
    )


@pytest.mark.parametrize("route", ["A", "B"])
@pytest.mark.parametrize("name", ["ragged", "everything", "partial interleaved rotary", "half", "smooth softmax"])
def test_both_routes_give_one_delegate(name: str, route: str) -> None:
    """Through a program file, with a dynamic number of rows; three calls on the same caches."""
    case = FORMS[name]
    case = case.with_(bias=None if case.bias is None else (case.batch, 1, 1, 20))
    given = arguments(case)
    for cache in CACHES:
        given[cache].zero_()
    module = Layer(given)
    program = exported(module, given)
    if route == "A":
        edge = to_edge(program, compile_config=CONFIG).to_backend(WebGPUPartitioner())
    else:
        edge = to_edge_transform_and_lower(program, partitioner=[WebGPUPartitioner()], compile_config=CONFIG)
    method = Runtime(device("full")).load_program(bytes(edge.to_executorch().buffer)).load_method("forward")
    assert len(method.delegates) == 1
    assert method.outside() == []
    past = torch.zeros(case.batch, dtype=torch.int32)
    for seed, rows in enumerate((4, 1, 2)):
        counts = torch.tensor([(row + seed) % (rows + 1) for row in range(case.batch)], dtype=torch.int32)
        inputs = Layer.inputs(arguments(case.with_(rows=rows, seed=seed)) | {"past": past, "q_len": counts})
        want = module(*inputs)
        [got] = method.execute(list(inputs))
        close(got, want.double().numpy(), coarsest(case))
        past += counts
    method.close()


# -- batches


BATCHES = {"C1": (4, 2, 6), "C2": (20, 12, 33), "C3": (20, 12, 96), "C4 smooth softmax": (4, 2, 6)}


@pytest.mark.parametrize("name", BATCHES)
def test_C1_C2_C3_C4_C17_prompts_equal_their_solo_runs(name: str) -> None:
    """Each row alone on the same device, in a batch whose other rows are idle; then eight tokens one by one."""
    lengths = BATCHES[name]
    case = Case((0, 0, 0), lengths, rows=max(lengths), capacity=128, d=16, packed=True, rot=16, smooth="smooth" in name)
    given = arguments(case)
    want, _, _ = reference(case, given)
    with compiled(case, given, "full") as batch, compiled(case, given, "full") as solo:
        got = batch(given)
        assert np.isfinite(got).all()
        close(got, want)
        for row, count in enumerate(lengths):
            close(solo(alone(given, row, count))[row, :count], got[row, :count])
        generator = torch.Generator().manual_seed(9)
        for step in range(8):
            given = given | {
                "query": torch.randn(3, 1, given["query"].shape[2], generator=generator),
                "past": torch.tensor(lengths, dtype=torch.int32) + step,
                "q_len": torch.ones(3, dtype=torch.int32),
            }
            got = batch(given)
            for row in range(3):
                close(solo(alone(given, row, 1))[row], got[row])


def alone(given: dict[str, Any], row: int, rows: int) -> dict[str, Any]:
    """A call in which only one row has tokens, and no more of them than it has."""
    q_len = torch.zeros_like(given["q_len"])
    q_len[row] = rows
    return given | {"query": given["query"][:, :rows].contiguous(), "q_len": q_len}


@pytest.mark.parametrize("rows", [4, 40])
def test_C5_the_order_of_rows_does_not_matter(rows: int) -> None:
    case = Case((1, 0, 9), (rows, 1, rows - 2), rows=rows, capacity=64, rot=8)
    given = arguments(case)
    with compiled(case, given, "full") as layer:
        got = layer(given)
    for order in itertools.permutations(range(3)):
        other = {n: t[list(order)] if n in (*ROWS, *CACHES) else t for n, t in given.items()}
        with compiled(case, other, "full") as layer:
            np.testing.assert_array_equal(layer(other), got[list(order)])


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("q_len", [(1, 6), (6, 1), (0, 6), (0, 0)])
def test_C6_C7_C10_a_single_token_all_tokens_and_none_in_one_batch(q_len: tuple[int, ...], on: str) -> None:
    """`check` compares every cache row that is not written bit for bit."""
    check(Case((0, 3), q_len, rows=6, rot=8), on)


@pytest.mark.parametrize("on", DEVICES)
def test_C8_spreads_across_the_edges_of_tiles(on: str) -> None:
    check(Case((0, 63, 64, 65, 128), (1, 1, 1, 1, 1), rows=1, capacity=130, rot=8), on)


def test_C11_G10_what_padding_holds_has_no_effect() -> None:
    case = Case((0, 3), (2, 3), rot=8)
    given = arguments(case)
    other = given | {name: given[name].clone() for name in ("query", "key", "value")}
    for name in ("query", "key", "value"):
        other[name][0, 2:] = other[name][1, 3:] = torch.nan
    with compiled(case, given, "full") as layer, compiled(case, given, "full") as poisoned:
        np.testing.assert_array_equal(layer(given), poisoned(other))
        for name in CACHES:
            np.testing.assert_array_equal(layer.cache(name), poisoned.cache(name))


@pytest.mark.parametrize("on", DEVICES)
def test_C12_C13_rows_with_a_past_and_unequal_lengths_turn_by_their_own_positions(on: str) -> None:
    """The rotary table ends with the last position."""
    check(Case((2, 4), (3, 2), rot=8, table=6), on)


@pytest.mark.parametrize("shape", [(2, 1, 3, 3), (1, 1, 3, 3), (2, 4, 3, 3), (3, 3), (3, 16), (1, 1, 3, 40)])
def test_C14_bias_broadcasts(shape: tuple[int, ...]) -> None:
    check(Case((0, 0), (3, 2), rows=3, bias=shape), "full")


def test_C16_a_single_row_equals_attention_without_lengths() -> None:
    """One row, against the operator of the LLM library on the same numbers."""
    case = Case((5,), (4,), heads=4, kv_heads=2, d=16, capacity=24)
    given = arguments(case)
    want, keys, values = reference(case, given)
    plain = torch.nn.functional.scaled_dot_product_attention(
        given["query"].double().transpose(1, 2),
        *(torch.from_numpy(cache[:, :9]).transpose(1, 2) for cache in (keys, values)),
        attn_mask=torch.ones(4, 9, dtype=torch.bool).tril(5),
        enable_gqa=True,
    )
    close(plain.transpose(1, 2), want)
    check(case, "full")


# -- lengths


BAD_LENGTHS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "D1 negative": ((-1, 3), (1, 1)),
    "D1 one bad row": ((3, 17), (1, 1)),
    "D1 largest int": ((3, 2**31 - 1), (1, 1)),
    "D1 smallest int": ((-(2**31), 3), (1, 1)),
    "D1 full": ((3, 16), (1, 1)),
    "D3 negative count": ((3, 4), (1, -1)),
    "D4 more than there are": ((3, 4), (5, 1)),
    "D4 above the end": ((14, 4), (3, 1)),
}


@pytest.mark.parametrize("name", BAD_LENGTHS)
def test_D1_D3_D4_bad_lengths_raise_before_anything_is_submitted(name: str) -> None:
    case = Case((3, 4), (1, 1), rot=8)
    given = arguments(case)
    with compiled(case, given, "full") as layer:
        layer(given)
        before, counters = {n: layer.cache(n) for n in CACHES}, layer.device.counters.copy()
        bad = {n: torch.tensor(v, dtype=torch.int32) for n, v in zip(("past", "q_len"), BAD_LENGTHS[name], strict=True)}
        with pytest.raises(InputError, match=r"row (0|1)"):
            layer(given | bad)
        assert layer.device.counters.since(counters).submits == 0
        for cache in CACHES:
            np.testing.assert_array_equal(layer.cache(cache), before[cache])
        layer(given)


def test_D2_G7_lengths_at_both_ends() -> None:
    check(Case((15, 16, 0), (1, 0, 1), rot=8), "full")


@pytest.mark.parametrize("shape", [(2,), (2, 1), (1, 2)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_D5_shapes_of_lengths(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    case = Case((3, 0), (2, 4))
    given = arguments(case)
    want, _, _ = reference(case, given)
    given |= {name: given[name].to(dtype).reshape(shape) for name in ("past", "q_len")}
    with compiled(case, given, "full") as layer:
        close(layer(given), want)


@pytest.mark.parametrize("shape", [(2, 2), (3,), (), (1,)])
def test_D5_G4_G9_lengths_of_another_kind_are_refused(shape: tuple[int, ...]) -> None:
    """Also a mask [B, T], the form in which a batch padded on the left would come: lengths cannot say that."""
    case = Case((3, 0), (2, 4))
    for name in ("past", "q_len"):
        given = arguments(case) | {name: torch.zeros(shape, dtype=torch.int32)}
        _, graph = build(case, given)
        reason = check_node(graph, graph.nodes[0])
        assert reason is not None
        assert reason.startswith(f"{name} is i32[{', '.join(map(str, shape))}]; lengths are i32 or i64, one for each")
    _, graph = build(case, arguments(case) | {"past": torch.zeros(2)})
    assert str(check_node(graph, graph.nodes[0])).startswith("past is f32[2]; lengths are i32 or i64")


def test_D7_positions_above_the_rotary_table() -> None:
    case = Case((3, 0), (1, 4), rot=8, table=4)
    given = arguments(case)
    with compiled(case, given, "full") as layer:
        layer(given)
        with pytest.raises(InputError, match="table"):
            layer(given | {"q_len": torch.tensor([2, 4], dtype=torch.int32)})


@pytest.mark.parametrize("on", DEVICES)
def test_D8_growing_and_shrinking_steps(on: str) -> None:
    """(past, tokens), one of them going back."""
    first = Case((0,), (1,), rows=1, rot=8)
    given = arguments(first)
    caches = {name: given[name] for name in CACHES}
    with compiled(first, given, on) as layer:
        for seed, (past, rows) in enumerate(((0, 1), (1, 1), (2, 1), (0, 2), (2, 3))):
            case = Case((past,), (rows,), rows=rows, rot=8, seed=seed)
            given = arguments(case) | caches | {"cos": given["cos"], "sin": given["sin"]}
            want, keys, values = reference(case, given)
            close(layer(given), want)
            caches = dict(zip(CACHES, (torch.from_numpy(x).float() for x in (keys, values)), strict=True))


# -- lengths against a mask


@pytest.mark.parametrize("prompts", [(7,), (7, 2, 12)])
def test_G1_G2_G3_lengths_equal_a_full_mask(prompts: tuple[int, ...]) -> None:
    """A prompt, then token by token: against a bool mask over the whole cache. A step writes 4 bytes a row for the
    lengths that grow, whatever they are."""
    batch, capacity, rows = len(prompts), 48, max(prompts)
    case = Case((0,) * batch, prompts, rows=rows, capacity=capacity)
    masked = case.with_(causal=False, bias=(batch, 1, 1, capacity), bool_bias=True)
    given = arguments(case)
    for cache in CACHES:
        given[cache].zero_()
    mask = torch.zeros(batch, 1, 1, capacity, dtype=torch.bool)
    full = torch.tensor([capacity] * batch, dtype=torch.int32)
    assert full.shape == (batch,)
    written = []
    with compiled(case, given, "full") as layer, compiled(masked, given | {"attn_bias": mask}, "full") as other:
        layer(given)
        other(given | {"attn_bias": mask})
        past = given["q_len"]
        for step in range(capacity - rows):
            tokens = arguments(case.with_(rows=1, seed=step)) | {"past": past, "q_len": torch.ones_like(past)}
            counters = layer.device.counters.copy()
            got = layer(tokens)
            written.append(layer.device.counters.since(counters).bytes_written)
            seen = torch.arange(capacity)[None, :] <= past[:, None]
            np.testing.assert_allclose(got, other(tokens | {"attn_bias": seen[:, None, None]}), atol=1e-5)
            past = past + 1
    inputs = sum(tokens[name].numel() * 4 for name in ("query", "key", "value"))
    assert set(written[1:]) == {inputs + 2 * 4 * batch}, written


# -- options


@pytest.mark.parametrize("window", [1, 2, 63, 64, 65, 4096])
@pytest.mark.parametrize("rows", [1, 5, 64])
def test_H1_windows(rows: int, window: int) -> None:
    counts = (rows, max(rows - 1, 1), rows, 1)
    check(Case((0, 63, 64, 200), counts, rows=rows, window=window, capacity=264, heads=2, kv_heads=1), "full")


@pytest.mark.parametrize("rows", [1, 33])
@pytest.mark.parametrize("sink", [-np.inf, -5.0, 0.0, 5.0, 50.0])
def test_H2_sinks_count_once(sink: float, rows: int) -> None:
    check(Case((3, 140), (rows, 1), rows=rows, sinks=sink, capacity=180), "full")


@pytest.mark.parametrize("rows", [4, 33])
def test_H3_smooth_softmax_is_a_sink_of_zero(rows: int) -> None:
    case = Case((3, 12), (4, 1), rows=rows, smooth=True, capacity=48)
    given = arguments(case)
    sink = given | {"smooth_softmax": False, "sink": torch.zeros(4)}
    with compiled(case, given, "full") as smooth, compiled(case, sink, "full") as other:
        np.testing.assert_array_equal(smooth(given), other(sink))


@pytest.mark.parametrize("rows", [4, 33])
@pytest.mark.parametrize("softcap", [1.0, 30.0, 50.0])
def test_H4_softcap_comes_before_bias_and_window(softcap: float, rows: int) -> None:
    check(Case((3, 9), (4, 1), rows=rows, softcap=softcap, bias=(2, 4, rows, 48), window=5, capacity=48), "full")


@pytest.mark.parametrize("rows", [4, 33])
def test_H5_a_row_without_keys_gives_zeros(rows: int) -> None:
    case = Case((3, 9), (4, 1), rows=rows, bias=(rows, 48), capacity=48, causal=False)
    given = arguments(case)
    given["attn_bias"][1] = -torch.inf
    with compiled(case, given, "full") as layer:
        got = layer(given)
    assert np.isfinite(got).all()
    assert not got[0, 1].any()
    assert got[0, 0].all()


@pytest.mark.parametrize("rows", [4, 40])
def test_H6_large_numbers_in_half_precision(rows: int) -> None:
    case = Case((0, 3), (rows, rows - 1), rows=rows, capacity=48, dtype=torch.float16)
    given = arguments(case)
    given["query"].fill_(100.0)
    given["key"][:, ::2], given["key"][:, 1::2] = 100.0, 90.0
    given["value"][:, ::2], given["value"][:, 1::2] = 0.25, 0.75
    for cache in CACHES:
        given[cache].fill_(0.5)
    want, _, _ = reference(case, given)
    with compiled(case, given, "full") as layer:
        close(layer(given), want, torch.float16)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rows", [1, 33])
@pytest.mark.parametrize(("d", "rot"), [(8, 8), (16, 6), (10, 10)])
def test_H7_H8_H9_fused_equals_step_by_step(d: int, rot: int, rows: int, interleaved: bool) -> None:
    """Norms, rotary embedding and packed projections in the operator, and all done before it."""
    case = Case(
        (3, 0), (rows, 1), rows=rows, capacity=48, rot=rot, d=d, norm=True, packed=True, interleaved=interleaved
    )
    given = arguments(case)
    apart = [x.unflatten(2, (-1, d)) for x in given["query"].split([4 * d, 2 * d, 2 * d], 2)]
    positions = (given["past"].long()[:, None] + torch.arange(rows)).clamp(max=47)
    half = rot // 2
    pairs = (slice(0, rot, 2), slice(1, rot, 2)) if interleaved else (slice(0, half), slice(half, rot))
    for i, name in enumerate(("q_norm", "k_norm")):
        x = torch.nn.functional.rms_norm(apart[i], (d,), given[name], 1e-5)
        c, s = (given[t][positions][:, :, None] for t in ("cos", "sin"))
        apart[i] = x.clone()
        a, b = (x[..., pair] for pair in pairs)
        apart[i][..., pairs[0]], apart[i][..., pairs[1]] = a * c - b * s, b * c + a * s
    plain = given | dict.fromkeys(("cos", "sin", "q_norm", "k_norm"))
    plain |= {n: x.contiguous() for n, x in zip(("query", "key", "value"), apart, strict=True)}
    with (
        compiled(case, given, "full") as fused,
        compiled(case.with_(packed=False, rot=0, norm=False), plain, "full") as other,
    ):
        got = other(plain)
        np.testing.assert_allclose(fused(given).reshape(got.shape), got, atol=1e-5, rtol=1e-4)


# -- what is refused, and what is made


def test_lengths_are_made_once_for_all_layers() -> None:
    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Layer(arguments(FORMS["packed"])), Layer(arguments(FORMS["packed"]))

        def forward(self, query: torch.Tensor, past: torch.Tensor, q_len: torch.Tensor) -> torch.Tensor:
            first = self.first(query, past, q_len)
            return self.second(query + first.mean(), past, q_len)

    given = arguments(FORMS["packed"])
    program = torch.export.export(Two(), tuple(given[n] for n in ("query", "past", "q_len")), strict=False)
    graph = lower(to_edge(program, compile_config=CONFIG).exported_program()).graph
    ops = [node.op for node in graph.nodes]
    assert ops.count("webgpu.lengths") == 1
    assert ops.count("webgpu.attention") == 2
    assert "executorch_webgpu.group_query_attention.default" not in ops


def test_the_record_has_no_kernel_of_its_own() -> None:
    given = arguments(FORMS["plain"])
    _, graph = build(FORMS["plain"], given)
    op = find(graph.nodes[0].op)
    assert op is not None
    with pytest.raises(NotImplementedError, match="the backend's passes expand it"):
        list(op.lower(Lowering(graph, device("full").limits, lambda symbol: 1), graph.nodes[0]))


def test_what_only_the_delegate_refuses() -> None:
    """A bias whose columns a call decides, one cache for both, more rows than a uniform binding holds lengths of."""
    case = Case((0,) * 4097, rows=1, capacity=1, heads=1, kv_heads=1, d=1)
    _, graph = build(case, arguments(case))
    assert check_node(graph, graph.nodes[0]) == "a batch of 4097 rows; at most 4096 are supported"
    case = FORMS["short bias"]
    b, graph = build(case, arguments(case))
    index = graph.nodes[0].args["attn_bias"].value  # type: ignore[union-attr]
    b.values[index] = type(b.values[index])("input", "f32", (4, Sym("input_dim", (0, 1))), "bias")
    graph = b.graph(*graph.outputs)
    assert "its last axis must be known at export" in str(check_node(graph, graph.nodes[0]))
    node = graph.nodes[0]
    node = replace(node, args={**node.args, "attn_bias": None, "value_cache": node.args["key_cache"]})
    assert check_node(graph, node) == "key_cache and value_cache are one tensor; they must be apart"


class OneCache(torch.nn.Module):
    """Both caches are parts of one buffer."""

    def __init__(self, given: dict[str, Any]) -> None:
        super().__init__()
        self.register_buffer("caches", torch.zeros(2, *given["key_cache"].shape))

    def forward(self, query: torch.Tensor, past: torch.Tensor) -> torch.Tensor:
        attend = torch.ops.executorch_webgpu.group_query_attention
        return attend(query, None, None, self.caches[0], self.caches[1], past, None, 4, 2)


def test_parts_of_a_buffer_are_refused_as_caches() -> None:
    given = arguments(FORMS["packed"])
    program = torch.export.export(OneCache(given), (given["query"], given["past"]), strict=False)
    edge = to_edge(program, compile_config=CONFIG).exported_program()
    with pytest.raises(NotDelegable, match="writes to a part of a buffer; give each cache a buffer of its own"):
        lower(edge)
