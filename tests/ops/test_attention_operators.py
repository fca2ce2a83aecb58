"""The attention operators of ATen and of the LLM library, their canonical form; what is refused, and why."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from executorch_webgpu.backend.graph import Arg, Dim, Graph, Node, Sym
from executorch_webgpu.ops.attention import canonical
from executorch_webgpu.ops.base import Lowering, check_node, find
from executorch_webgpu.runtime.errors import InputError
from tests.harness import DEVICES, GraphBuilder, device, run
from tests.ops.attention_reference import Array, Case, arrays, assert_close, laid_out, reference, stored

CUSTOM = "llama.custom_sdpa.default"
WITH_CACHE = "llama.sdpa_with_kv_cache.default"
ATEN = "aten.scaled_dot_product_attention.default"
INTERNAL = "webgpu.attention"
Shape = tuple[Dim, ...]
S = Sym("input_dim", (0, 1))
POS = Sym("scalar", (3, 0))

CUSTOM_ARGS: dict[str, Arg] = {"start_pos": POS, "attn_mask": None, "drpout_p": 0.0, "is_causal": True, "scale": None}
ATEN_ARGS: dict[str, Arg] = {
    "attn_mask": None,
    "dropout_p": 0.0,
    "is_causal": False,
    "scale": None,
    "enable_gqa": False,
}


def build(
    op: str, tensors: dict[str, tuple[str, Shape]], out: tuple[str, Shape], **args: Arg
) -> tuple[GraphBuilder, Graph, Node]:
    """A graph with one node; every tensor is an input, the position input 3."""
    b = GraphBuilder()
    refs: dict[str, Arg] = {}
    for name, (dtype, shape) in tensors.items():
        if len(refs) == 3:
            b.input("i64", (1,))
        refs[name] = b.input(dtype, shape)
    if len(refs) == 3:
        b.input("i64", (1,))
    defaults = {CUSTOM: CUSTOM_ARGS, WITH_CACHE: {**CUSTOM_ARGS, "seq_len": 3}, ATEN: ATEN_ARGS}.get(op, {})
    made = b.node(op, {**defaults, **args, **refs}, out)
    graph = b.graph(made)
    return b, graph, graph.nodes[0]


def custom(q: Shape, kv: Shape, mask: Shape | None = None, dtype: str = "f32", **args: Arg) -> tuple[Graph, Node]:
    tensors = {"query": (dtype, q), "key": (dtype, kv), "value": (dtype, kv)}
    if mask is not None:
        tensors["attn_mask"] = ("f32", mask)
    _, graph, node = build(CUSTOM, tensors, (dtype, q), **args)
    return graph, node


# -- llama::custom_sdpa


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("form", ["causal", "prefix", "mask"])
@pytest.mark.parametrize("rows", [1, 12])
def test_custom_sdpa(rows: int, form: str, dtype: str, on: str) -> None:
    """All three legal forms; with a mask start_pos does not limit the keys."""
    case = Case(4, 2, 16, rows, 40, 9, batch=2, kv_limit="all" if form == "mask" else form)
    case = case.with_(q_dtype=dtype, kv_dtype=dtype, mask="f32" if form == "mask" else None, scale=0.3)
    tensors = arrays(case)
    kinds: dict[str, tuple[str, Shape]] = {
        name: (dtype, laid_out(tensors[name], "bshd").shape) for name in ("query", "key", "value")
    }
    if form == "mask":
        kinds["attn_mask"] = ("f32", (rows, 40))
    b, graph, node = build(CUSTOM, kinds, (dtype, (2, rows, 4, 16)), is_causal=form == "causal", scale=0.3)
    assert check_node(graph, node) is None
    given: list[Any] = [laid_out(tensors[name], "bshd") for name in ("query", "key", "value")]
    if dtype == "bf16":
        given = [torch.from_numpy(x).to(torch.bfloat16) for x in given]
    given += [np.array([9], np.int64), *([tensors["attn_mask"]] if form == "mask" else [])]
    [out] = run(b, graph, device(on), *given)
    expected = reference(case, tensors).transpose(0, 2, 1, 3)
    assert_close(out, expected, {"f32": 1e-4, "f16": 2e-3, "bf16": 8e-3}[dtype], 1e-2)


@pytest.mark.parametrize("on", DEVICES)
def test_custom_sdpa_position_beyond_the_cache(on: str) -> None:
    _, graph, _ = build(CUSTOM, dict.fromkeys(("query", "key", "value"), ("f32", (1, 8, 2, 4))), ("f32", (1, 8, 2, 4)))
    data = np.zeros((1, 8, 2, 4), np.float32)
    with pytest.raises(InputError, match=r"8 new tokens and a KV cache of 8 rows: 1 is outside \[0, 0\]"):
        run(GraphBuilder(), graph, device(on), data, data, data, np.array([1], np.int64))


CUSTOM_REFUSED = {
    "rank": (custom((1, 3, 8), (1, 16, 8)), "rank 3"),
    "heads": (custom((1, 3, 4, 8), (1, 16, 3, 8)), "4 query heads are no multiple of 3 KV heads"),
    "head size": (custom((1, 3, 4, 8), (1, 16, 2, 16)), "head size of query is 8, that of key 16"),
    "batch": (custom((2, 3, 4, 8), (1, 16, 2, 8)), "batch size of query is 2, that of key 1"),
    "integers": (custom((1, 3, 4, 8), (1, 16, 2, 8), dtype="i32"), "query is i32"),
    "int8": (custom((1, 3, 4, 8), (1, 16, 2, 8), dtype="i8"), "query is i8"),
    "mask and causal": (custom((1, 3, 4, 8), (1, 16, 2, 8), (3, 16)), "exclude each other"),
    "mask rank": (custom((1, 3, 4, 8), (1, 16, 2, 8), (1, 1, 3, 16), is_causal=False), "of rank 4"),
    "mask rows": (custom((1, 3, 4, 8), (1, 16, 2, 8), (1, 16), is_causal=False), r"must be exactly \[3, 16\]"),
    "mask columns": (custom((1, 3, 4, 8), (1, 16, 2, 8), (3, 19), is_causal=False), r"must be exactly \[3, 16\]"),
    "negative position": (custom((1, 3, 4, 8), (1, 16, 2, 8), start_pos=-1), "must not be negative"),
    "position is no integer": (custom((1, 3, 4, 8), (1, 16, 2, 8), start_pos=1.5), "must be an integer"),
    "too many tokens": (custom((1, 17, 4, 8), (1, 16, 2, 8)), "17 new tokens at position 0 do not fit"),
    "too far": (custom((1, 3, 4, 8), (1, 16, 2, 8), start_pos=14), "3 new tokens at position 14 do not fit"),
    "dynamic head size": (custom((1, 3, 4, S), (1, 16, 2, S)), "head size is dynamic"),
    "dynamic heads": (custom((1, 3, S, 8), (1, 16, 2, 8)), "number of heads is dynamic"),
}


@pytest.mark.parametrize("name", CUSTOM_REFUSED)
def test_custom_sdpa_refusals(name: str) -> None:
    (graph, node), reason = CUSTOM_REFUSED[name]
    assert re.search(reason, check_node(graph, node) or "accepted")


def test_custom_sdpa_dtypes_must_agree() -> None:
    """A25: query f32 with an f16 cache is what the library refuses; so do we, in its name."""
    q: Shape = (1, 3, 4, 8)
    kinds: dict[str, tuple[str, Shape]] = {
        "query": ("f32", q),
        "key": ("f16", (1, 16, 2, 8)),
        "value": ("f16", (1, 16, 2, 8)),
    }
    _, graph, node = build(CUSTOM, kinds, ("f32", q))
    assert check_node(graph, node) == "query is f32, key f16; they must be equal"
    mask: dict[str, tuple[str, Shape]] = {
        **dict.fromkeys(("query", "key", "value"), ("f32", (1, 3, 1, 8))),
        "attn_mask": ("bool", (3, 3)),
    }
    _, graph, node = build(CUSTOM, mask, ("f32", (1, 3, 1, 8)), is_causal=False)
    assert "attn_mask is bool of rank 2" in str(check_node(graph, node))


def test_A24_key_and_value_of_different_lengths() -> None:
    q: Shape = (1, 3, 4, 8)
    kinds: dict[str, tuple[str, Shape]] = {
        "query": ("f32", q),
        "key": ("f32", (1, 16, 2, 8)),
        "value": ("f32", (1, 15, 2, 8)),
    }
    _, graph, node = build(CUSTOM, kinds, ("f32", q))
    assert check_node(graph, node) == "key has 16 rows, value 15"


def test_custom_sdpa_accepts_dynamic_rows() -> None:
    graph, node = custom((1, S, 4, 8), (1, 16, 2, 8))
    assert check_node(graph, node) is None
    args = canonical(node, graph)
    assert (args["start_pos"], args["kv_limit"], args["q_layout"]) == (POS, "causal", "bshd")


def test_positions_stay_out_of_the_plan() -> None:
    graph, node = custom((1, S, 4, 8), (1, 16, 2, 8))
    ctx = Lowering(graph, device("default-limits").limits, lambda symbol: {S: 3, POS: 5}[symbol])
    op = find(CUSTOM)
    assert op is not None
    list(op.lower(ctx, node))
    assert ctx.used == {S}


# -- llama::sdpa_with_kv_cache


def with_cache(q: Shape, kv: Shape, cache: Shape, mask: Shape | None = None, **args: Arg) -> tuple[Graph, Node]:
    tensors: dict[str, tuple[str, Shape]] = {"query": ("f32", q), "key": ("f32", kv), "value": ("f32", kv)}
    tensors |= {"key_cache": ("f32", cache), "value_cache": ("f32", cache)}
    if mask is not None:
        tensors["attn_mask"] = ("f32", mask)
    _, graph, node = build(WITH_CACHE, tensors, ("f32", q), **args)
    return graph, node


WITH_CACHE_FORMS = {
    "good": (with_cache((1, 3, 4, 8), (1, 3, 2, 8), (1, 16, 2, 8)), None),
    "mask": (with_cache((1, 3, 4, 8), (1, 3, 2, 8), (1, 16, 2, 8), (3, 16), is_causal=False), None),
    "dynamic": (with_cache((1, S, 4, 8), (1, S, 2, 8), (1, 16, 2, 8)), None),
    "rows": (with_cache((1, 3, 4, 8), (1, 4, 2, 8), (1, 16, 2, 8)), "query has 3 rows, key 4"),
    "heads": (with_cache((1, 3, 4, 8), (1, 3, 4, 8), (1, 16, 2, 8)), "key has 4 heads, the key cache 2"),
    "mask and causal": (with_cache((1, 3, 4, 8), (1, 3, 2, 8), (1, 16, 2, 8), (3, 16)), "exclude each other"),
    "too many tokens": (with_cache((1, 17, 4, 8), (1, 17, 2, 8), (1, 16, 2, 8)), "17 new tokens at position 0"),
    "groups": (with_cache((1, 3, 4, 8), (1, 3, 3, 8), (1, 16, 3, 8)), "no multiple of 3"),
}


@pytest.mark.parametrize("name", WITH_CACHE_FORMS)
def test_sdpa_with_kv_cache(name: str) -> None:
    """Accepted for the pass that splits it; it never reaches the runtime, and says so if it does."""
    (graph, node), reason = WITH_CACHE_FORMS[name]
    answer = check_node(graph, node)
    assert (answer is None) if reason is None else reason in str(answer)
    op = find(WITH_CACHE)
    assert op is not None
    with pytest.raises(NotImplementedError, match="split it into two cache updates"):
        list(op.lower(Lowering(graph, device("full").limits, lambda symbol: 1), node))


# -- aten::scaled_dot_product_attention

ATEN_CASES: dict[str, tuple[Shape, Shape, Shape, dict[str, Any]]] = {
    "plain": ((2, 3, 5, 16), (2, 3, 7, 16), (2, 3, 7, 16), {}),
    "decode": ((1, 3, 1, 16), (1, 3, 70, 16), (1, 3, 70, 16), {"scale": 0.7}),
    "prefill": ((1, 2, 40, 16), (1, 2, 70, 16), (1, 2, 70, 8), {}),
    "causal": ((1, 2, 5, 16), (1, 2, 5, 16), (1, 2, 5, 16), {"is_causal": True}),
    "causal, fewer keys": ((1, 2, 40, 16), (1, 2, 7, 16), (1, 2, 7, 16), {"is_causal": True}),
    "causal, more keys": ((1, 2, 12, 16), (1, 2, 50, 16), (1, 2, 50, 16), {"is_causal": True}),
    "rank 3": ((3, 5, 16), (3, 7, 16), (3, 7, 8), {}),
    "rank 2": ((5, 16), (7, 16), (7, 16), {}),
    "gqa": ((2, 6, 5, 16), (2, 2, 7, 16), (2, 2, 7, 16), {"enable_gqa": True}),
    "bool mask": ((2, 4, 5, 16), (2, 4, 7, 16), (2, 4, 7, 16), {"mask": ("bool", (5, 7))}),
    "bool mask of rank 4": ((2, 4, 5, 16), (2, 4, 7, 16), (2, 4, 7, 16), {"mask": ("bool", (1, 1, 5, 7))}),
    "float mask": ((2, 4, 5, 16), (2, 4, 7, 16), (2, 4, 7, 16), {"mask": ("f32", (2, 1, 5, 7))}),
    "mask of rank 3": ((3, 5, 16), (3, 7, 16), (3, 7, 16), {"mask": ("f32", (3, 1, 7))}),
}


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("dtype", ["f32", "f16"])
@pytest.mark.parametrize("name", ATEN_CASES)
def test_A16_aten_sdpa_against_torch(name: str, dtype: str, on: str) -> None:
    """torch's own attention in float64 is the reference, independent of ours."""
    q, k, v, options = ATEN_CASES[name]
    options = dict(options)
    rng = np.random.default_rng(1)
    data: list[Array] = [stored(rng.standard_normal(tuple(map(int, map(str, s)))), dtype) for s in (q, k, v)]
    kinds = {n: (dtype, shape) for n, shape in zip(("query", "key", "value"), (q, k, v), strict=True)}
    mask = None
    if "mask" in options:
        kind, shape = options.pop("mask")
        kind = dtype if kind == "f32" else kind
        kinds["attn_mask"] = (kind, shape)
        noise = rng.standard_normal(shape)
        mask = noise > 0 if kind == "bool" else stored(noise, kind)
        if kind == "bool":
            mask.reshape(-1)[: shape[-1]] = False  # a row without keys: zeros in torch as well
    out_shape = (*q[:-1], v[-1])
    b, graph, node = build(ATEN, kinds, (dtype, out_shape), **options)
    assert check_node(graph, node) is None
    [out] = run(b, graph, device(on), *data, np.zeros(1, np.int64), *([] if mask is None else [mask]))
    wide = [torch.from_numpy(x.astype(np.float64)) for x in data]
    given = None if mask is None else torch.from_numpy(mask if mask.dtype == np.bool_ else mask.astype(np.float64))
    expected = torch.nn.functional.scaled_dot_product_attention(*wide, attn_mask=given, **options).numpy()
    assert_close(out, expected, 1e-4 if dtype == "f32" else 2e-3, 1e-3 if dtype == "f32" else 1e-2)


def aten(q: Shape, k: Shape, v: Shape, mask: tuple[str, Shape] | None = None, **args: Arg) -> tuple[Graph, Node]:
    tensors = {"query": ("f32", q), "key": ("f32", k), "value": ("f32", v)}
    if mask is not None:
        tensors["attn_mask"] = mask
    _, graph, node = build(ATEN, tensors, ("f32", (*q[:-1], v[-1])), **args)
    return graph, node


Q, KV = (1, 4, 5, 8), (1, 4, 7, 8)
ATEN_REFUSED = {
    "dropout": (aten(Q, KV, KV, dropout_p=0.1), "dropout"),
    "ranks": (aten(Q, (4, 7, 8), KV), "ranks 4, 3 and 4"),
    "rank 5": (aten((1, *Q), (1, *KV), (1, *KV)), "rank 5"),
    "gqa not enabled": (aten(Q, (1, 2, 7, 8), (1, 2, 7, 8)), "without enable_gqa"),
    "groups": (aten(Q, (1, 3, 7, 8), (1, 3, 7, 8), enable_gqa=True), "no multiple of 3"),
    "key and value heads": (aten(Q, KV, (1, 2, 7, 8), enable_gqa=True), "key has 4 heads, value 2"),
    "key and value rows": (aten(Q, KV, (1, 4, 6, 8)), "key has 7 rows, value 6"),
    "batch": (aten(Q, (2, 4, 7, 8), (2, 4, 7, 8)), "batch size of query is 1, that of key 2"),
    "mask and causal": (aten(Q, KV, KV, ("bool", (5, 7)), is_causal=True), "exclude each other"),
    "mask rows": (aten(Q, KV, KV, ("bool", (4, 7))), "does not broadcast to the query rows"),
    "mask columns": (aten(Q, KV, KV, ("f32", (5, 9))), "does not broadcast to 7 keys"),
    "mask heads": (aten(Q, KV, KV, ("f32", (1, 3, 5, 7))), "does not broadcast to the query heads"),
    "mask dtype": (aten(Q, KV, KV, ("i32", (5, 7))), "it must be boolean or float"),
    "mask rank": (aten(Q, KV, KV, ("bool", (1, 1, 1, 5, 7))), "rank 5"),
    "head size 0": (aten((1, 4, 5, 0), (1, 4, 7, 0), KV), "head size of 0"),
}


@pytest.mark.parametrize("name", ATEN_REFUSED)
def test_aten_sdpa_refusals(name: str) -> None:
    (graph, node), reason = ATEN_REFUSED[name]
    assert reason in (check_node(graph, node) or "accepted")


# -- webgpu.attention

GOOD: dict[str, Arg] = {
    "q_layout": "bshd", "kv_layout": "bshd", "out_layout": "bshd", "start_pos": POS, "kv_limit": "causal",
}  # fmt: skip
INTERNAL_REFUSED: dict[str, tuple[dict[str, Arg], str]] = {
    "layout": ({"q_layout": "sbhd"}, "q_layout is 'sbhd'"),
    "limit": ({"kv_limit": "some"}, "kv_limit is 'some'"),
    "route": ({"route": "fast"}, "route is 'fast'"),
    "softcap": ({"softcap": -1.0}, "softcap is -1.0"),
    "infinite softcap": ({"softcap": float("inf")}, "softcap is inf"),
    "window": ({"window": -1}, "window is -1"),
    "scale": ({"scale": "1"}, "scale is '1'"),
    "position": ({"start_pos": None}, "start_pos is None"),
}


@pytest.mark.parametrize("name", ["good", *INTERNAL_REFUSED])
def test_internal_refusals(name: str) -> None:
    changes, reason = INTERNAL_REFUSED.get(name, ({}, ""))
    kinds: dict[str, tuple[str, Shape]] = dict.fromkeys(("query", "key", "value"), ("f32", (1, 5, 2, 8)))
    _, graph, node = build(INTERNAL, kinds, ("f32", (1, 5, 2, 8)), **{**GOOD, **changes})
    answer = check_node(graph, node)
    assert answer is None if name == "good" else reason in str(answer)


def test_internal_sink_and_mask_shapes() -> None:
    for name, kind, shape, reason in (
        ("sink", "f32", (3,), "a float for each of 2 query heads"),
        ("sink", "i32", (2,), "a float for each of 2 query heads"),
        ("attn_mask", "f32", (5, 4), "4 columns for 5 keys"),
        ("attn_mask", "i64", (5, 5), "must be boolean or float"),
    ):
        kinds: dict[str, tuple[str, Shape]] = dict.fromkeys(("query", "key", "value"), ("f32", (1, 5, 2, 8)))
        kinds[name] = (kind, shape)
        _, graph, node = build(INTERNAL, kinds, ("f32", (1, 5, 2, 8)), **GOOD)
        assert reason in str(check_node(graph, node))


def test_canonical_refuses_other_operators() -> None:
    graph, node = custom((1, 3, 4, 8), (1, 16, 2, 8))
    with pytest.raises(ValueError, match="no attention operator"):
        canonical(Node("aten.add.Tensor", node.args, node.outputs), graph)
