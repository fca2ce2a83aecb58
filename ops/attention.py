"""Attention: `webgpu.attention`, which the passes make, and the operators of ATen and of ExecuTorch's LLM library.

`webgpu.attention` takes, by name:

    query, key, value: float tensors of rank up to 4, each f32, f16 or bf16; key and value are usually whole KV caches.
        The value's head size may differ from the key's. Sums are float32.
    q_layout, kv_layout, out_layout: "bshd" [batch, rows, heads, head size] or "bhsd" [batch, heads, rows, head size]
        (a rank below 4 stands for leading sizes of 1).
    attn_mask: None, or additive (f32, f16, bf16) or boolean (true: attend), broadcastable to
        [batch, query heads, query rows, keys]. It may have more columns than there are keys.
    start_pos: keys before the first query: an int or a symbol, read live, so that no plan depends on it.
    kv_limit: which keys row i sees: "causal" j <= start_pos + i, "prefix" j < start_pos + rows, "all" every key.
        A mask narrows it further.
    scale: float, or None for 1 / sqrt(head size).
    softcap: 0.0, or c: scores become c * tanh(score / c), before the mask is added.
    window: 0, or w: row i sees only keys j > start_pos + i - w.
    sink: None, or a logit for each query head that takes part in the softmax and has no value.
    sizes: None, or i32[8] of `webgpu.rope_cache`, made from the same tensors, `kv_limit`, `window` and position: the
        grids of attention_stream.wgsl and its merge for the live length, used where `attention_decode.live_stream`
        says so.
    lengths: None, or i32[B, 4] of `webgpu.lengths`: (past, new, 0, 0) of each batch row. past then stands in the place
        of start_pos, which is ignored, and new in the place of the number of query rows: row i >= new is padding, whose
        result is zero, and "all" means the past + new keys of the batch row. Other cache rows are never read.
    bits: 0, or 8 or 4: key and value are caches of packed integers, u32 [B, C, Hkv, D * bits / 32] as in
        `packed_cache`, with key_scales and value_scales, f32 [B, C, Hkv, 1]; kv_layout is "bshd". A query of 4-bit keys
        is given transformed (`webgpu.quantize_cache`), and so is the result (`webgpu.hadamard`).
    zeros: whether the scales of 8 bits are f32 [B, C, Hkv, 2], (scale, zero point): code c stands for
        (c - zero point) * scale, as `webgpu.quantize_update` writes them.
    check_range (default True): refuse start_pos + rows past the last key, for "causal" and "prefix".
    route (default "auto"): for tests; see `attention_lower.ROUTES`.
    variant (default "auto"): of a route that is named, for tests and measurements; see `attention_flash.variants` and
        `attention_decode.choose_stream`.

Query head h reads KV head h // (query heads / KV heads). A row that sees no key, or only keys whose scores are -inf, is
zero. Rows of key and value that no query row's range holds are never read, and hidden keys have no effect whatever
they hold.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

from ..backend.graph import Arg, Dim, Graph, Node, Sym, Value
from .attention_decode import SIZES_WORDS, stream_variant
from .attention_flash import VARIANTS
from .attention_lower import LIMITS_OF_KEYS, ROUTES, attend
from .base import Dispatch, Lowering, register
from .lengths import lengths_reason
from .packed_cache import bits_of, elements, packed_reason

STORED_FLOATS = ("f32", "f16", "bf16")
CUSTOM = "llama.custom_sdpa.default"
WITH_CACHE = "llama.sdpa_with_kv_cache.default"
ATEN = "aten.scaled_dot_product_attention.default"
INTERNAL = "webgpu.attention"

_DEFAULTS: dict[str, Arg] = {
    "attn_mask": None,
    "scale": None,
    "softcap": 0.0,
    "window": 0,
    "sink": None,
    "sizes": None,
    "lengths": None,
    "bits": 0,
    "key_scales": None,
    "value_scales": None,
    "zeros": False,
    "check_range": True,
}


def canonical(node: Node, graph: Graph) -> dict[str, Arg]:
    """The arguments of the `webgpu.attention` that computes what `node` does.

    Args:
        node: a `llama.custom_sdpa.default`, `aten.scaled_dot_product_attention.default` or `webgpu.attention` that
            `supports` accepts.
    Raises:
        ValueError: another operator.
    """
    args = node.args
    if node.op == INTERNAL:
        return {**_DEFAULTS, **args}
    tensors = {name: args[name] for name in ("query", "key", "value")}
    mask, causal, scale = args.get("attn_mask"), args.get("is_causal", False), args.get("scale")
    if node.op == CUSTOM:
        layouts = {"q_layout": "bshd", "kv_layout": "bshd", "out_layout": "bshd"}
        limit = "all" if mask is not None else "causal" if causal else "prefix"
        own: dict[str, Arg] = {"start_pos": args["start_pos"], "kv_limit": limit}
    elif node.op == ATEN:
        layouts = {"q_layout": "bhsd", "kv_layout": "bhsd", "out_layout": "bhsd"}
        # more rows than keys are allowed: the last ones see every key
        own = {"start_pos": 0, "kv_limit": "causal" if causal else "all", "check_range": False}
    else:
        raise ValueError(f"{node.op} is no attention operator with a canonical form")
    return {**_DEFAULTS, **tensors, **layouts, "attn_mask": mask, "scale": scale, **own}


def _sizes(value: Value, layout: Arg) -> tuple[Dim, Dim, Dim, Dim]:
    """(batch, heads, rows, head size) as far as known ahead of time."""
    a, b, c, d = (1,) * (4 - len(value.shape)) + value.shape
    return (a, c, b, d) if layout == "bshd" else (a, b, c, d)


def _differ(a: Dim, b: Dim) -> bool:
    """Whether two sizes are known to differ. Those that only a call shows are checked by `lower`."""
    return isinstance(a, int) and isinstance(b, int) and a != b


def _check_mask(value: Value, batch: Dim, heads: Dim, rows: Dim, keys: Dim) -> str | None:
    if value.dtype not in (*STORED_FLOATS, "bool"):
        return f"the attention mask is {value.dtype}; it must be boolean or float"
    if len(value.shape) > 4:
        return f"the attention mask has rank {len(value.shape)}; at most 4 is supported"
    sizes = (1,) * (4 - len(value.shape)) + value.shape
    for size, wanted, axis in zip(sizes, (batch, heads, rows), ("batch", "query heads", "query rows"), strict=False):
        if size != 1 and _differ(size, wanted):
            return f"the attention mask {list(value.shape)} does not broadcast to the {axis} ({wanted})"
    last = sizes[3]
    if isinstance(last, int) and isinstance(keys, int) and last != 1 and last < keys:
        return f"the attention mask {list(value.shape)} has {last} columns for {keys} keys"
    return None


def _check_tensors(graph: Graph, args: Mapping[str, Arg]) -> str | None:
    """What holds for every attention, whichever operator it comes from."""
    reason = packed_reason(graph, args)
    if reason is not None:
        return reason
    values = {name: graph.value(args[name]) for name in ("query", "key", "value")}
    if bits := bits_of(args):
        values |= {n: replace(values[n], dtype="f32", shape=elements(values[n].shape, bits)) for n in ("key", "value")}
    for name, value in values.items():
        if value.dtype not in STORED_FLOATS:
            return f"{name} is {value.dtype}; attention is supported for float32, float16 and bfloat16"
        if not 2 <= len(value.shape) <= 4:
            return f"{name} has rank {len(value.shape)}; ranks 2 to 4 are supported"
    batch, heads, rows, d = _sizes(values["query"], args["q_layout"])
    k_batch, kv_heads, keys, k_d = _sizes(values["key"], args["kv_layout"])
    v_batch, v_heads, v_keys, dv = _sizes(values["value"], args["kv_layout"])
    if not (isinstance(heads, int) and isinstance(kv_heads, int) and isinstance(v_heads, int)):
        return f"the number of heads is dynamic: {heads} of query, {kv_heads} of key, {v_heads} of value"
    if not (isinstance(d, int) and isinstance(k_d, int) and isinstance(dv, int)):
        return f"the head size is dynamic: {d} of query, {k_d} of key, {dv} of value"
    if d == 0 or heads == 0 or kv_heads == 0:
        return "attention without heads or with a head size of 0"
    if k_d != d:
        return f"the head size of query is {d}, that of key {k_d}"
    if v_heads != kv_heads:
        return f"key has {kv_heads} heads, value {v_heads}"
    if heads % kv_heads:
        return f"{heads} query heads are no multiple of {kv_heads} KV heads"
    if _differ(keys, v_keys):
        return f"key has {keys} rows, value {v_keys}"
    for name, size in (("key", k_batch), ("value", v_batch)):
        if size != 1 and _differ(size, batch):
            return f"the batch size of query is {batch}, that of {name} {size}"
    if args.get("attn_mask") is not None:
        return _check_mask(graph.value(args["attn_mask"]), batch, heads, rows, keys)
    return None


def _check_start(args: Mapping[str, Arg], rows: Dim, keys: Dim) -> str | None:
    start = args["start_pos"]
    if isinstance(start, bool) or not isinstance(start, int | Sym):
        return f"start_pos is {start!r}; it must be an integer"
    if isinstance(start, int) and start < 0:
        return f"start_pos is {start}; it must not be negative"
    if args.get("lengths") is not None:
        return None
    checked = args.get("kv_limit") != "all" and args.get("check_range", True)
    if checked and isinstance(rows, int) and isinstance(keys, int):
        first = start if isinstance(start, int) else 0
        if first + rows > keys:
            return f"{rows} new tokens at position {first} do not fit a KV cache of {keys} rows"
    return None


def supports(graph: Graph, node: Node) -> str | None:
    """`webgpu.attention`."""
    args = canonical(node, graph)
    for name in ("q_layout", "kv_layout", "out_layout"):
        if args.get(name) not in ("bshd", "bhsd"):
            return f"{name} is {args.get(name)!r}; it must be 'bshd' or 'bhsd'"
    if args.get("kv_limit") not in LIMITS_OF_KEYS:
        return f"kv_limit is {args.get('kv_limit')!r}; it must be one of {LIMITS_OF_KEYS}"
    if args.get("route", "auto") not in ROUTES:
        return f"route is {args.get('route')!r}; it must be one of {ROUTES}"
    if args.get("route") == "flash" and args.get("variant", "auto") not in VARIANTS:
        return f"variant is {args.get('variant')!r}; it must be one of {VARIANTS}"
    if args.get("route") not in ("flash", "stream") and args.get("variant", "auto") != "auto":
        return f"variant is {args.get('variant')!r}; only the routes 'flash' and 'stream' have variants"
    if args.get("route") == "stream":
        try:
            stream_variant(str(args.get("variant", "auto")))
        except ValueError as error:
            return str(error)
    reason = _check_tensors(graph, args)
    if reason is not None:
        return reason
    batch, heads, rows, _ = _sizes(graph.value(args["query"]), args["q_layout"])
    reason = lengths_reason(graph, args["lengths"], batch)
    if reason is not None:
        return reason
    _, _, keys, _ = _sizes(graph.value(args["key"]), args["kv_layout"])
    if graph.values[node.outputs[0]].dtype not in STORED_FLOATS:
        return f"the result is {graph.values[node.outputs[0]].dtype}; it must be float32, float16 or bfloat16"
    softcap, window, scale = args["softcap"], args["window"], args["scale"]
    if isinstance(softcap, bool) or not isinstance(softcap, int | float) or not 0 <= softcap < math.inf:
        return f"softcap is {softcap!r}; it must be a finite number that is not negative"
    if isinstance(window, bool) or not isinstance(window, int) or not 0 <= window < 2**31:
        return f"window is {window!r}; it must be an integer that is not negative"
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, int | float)):
        return f"scale is {scale!r}; it must be a number"
    if args["sink"] is not None:
        sink = graph.value(args["sink"])
        if sink.dtype not in STORED_FLOATS or sink.shape != (heads,):
            return f"sink is {sink.dtype}{list(sink.shape)}; it must be a float for each of {heads} query heads"
    if args["sizes"] is not None:
        sizes = graph.value(args["sizes"])
        if sizes.dtype != "i32" or sizes.shape != (SIZES_WORDS,):
            return f"sizes is {sizes.dtype}{list(sizes.shape)}; it must be i32[{SIZES_WORDS}]"
    return _check_start(args, rows, keys)


def _check_llama(graph: Graph, args: Mapping[str, Arg], rows: Dim, keys: Dim) -> str | None:
    """What both operators of the LLM library demand of mask and dtypes."""
    query = graph.value(args["query"])
    if args.get("attn_mask") is None:
        return None
    if args.get("is_causal", False):
        return "attn_mask and is_causal=True exclude each other"
    mask = graph.value(args["attn_mask"])
    if mask.dtype != "f32" or len(mask.shape) != 2:
        return f"attn_mask is {mask.dtype} of rank {len(mask.shape)}; it must be float32 [query rows, cache rows]"
    if _differ(mask.shape[0], rows) or _differ(mask.shape[1], keys):
        return f"attn_mask is {list(mask.shape)} for query {list(query.shape)}; it must be exactly [{rows}, {keys}]"
    return None


def supports_custom(graph: Graph, node: Node) -> str | None:
    """`llama.custom_sdpa`: query [B, S, Hq, D], key and value [B, C, Hkv, D] of one dtype."""
    values = {name: graph.value(node.args[name]) for name in ("query", "key", "value")}
    for name, value in values.items():
        if len(value.shape) != 4:
            return f"{name} has rank {len(value.shape)}; it must be 4: [batch, rows, heads, head size]"
        if value.dtype != values["query"].dtype:
            return f"query is {values['query'].dtype}, {name} {value.dtype}; they must be equal"
        if _differ(value.shape[0], values["query"].shape[0]):
            return f"the batch size of query is {values['query'].shape[0]}, that of {name} {value.shape[0]}"
        if _differ(value.shape[3], values["query"].shape[3]):
            return f"the head size of query is {values['query'].shape[3]}, that of {name} {value.shape[3]}"
    args = canonical(node, graph)
    rows, keys = values["query"].shape[1], values["key"].shape[1]
    return _check_tensors(graph, args) or _check_llama(graph, node.args, rows, keys) or _check_start(args, rows, keys)


def supports_with_cache(graph: Graph, node: Node) -> str | None:
    """`llama.sdpa_with_kv_cache`: key and value [B, S, Hkv, D] are written to the caches [B, C, Hkv, D], which query
    [B, S, Hq, D] then attends to."""
    values = {name: graph.value(node.args[name]) for name in ("query", "key", "value", "key_cache", "value_cache")}
    query, cache = values["query"], values["key_cache"]
    for name, value in values.items():
        if len(value.shape) != 4:
            return f"{name} has rank {len(value.shape)}; it must be 4: [batch, rows, heads, head size]"
        if value.dtype != query.dtype:
            return f"query is {query.dtype}, {name} {value.dtype}; they must be equal"
        for axis, what in ((0, "batch size"), (3, "head size")):
            if _differ(value.shape[axis], query.shape[axis]):
                return f"the {what} of query is {query.shape[axis]}, that of {name} {value.shape[axis]}"
        if name in ("key", "value") and _differ(value.shape[1], query.shape[1]):
            return f"query has {query.shape[1]} rows, {name} {value.shape[1]}"
        if name in ("key", "value") and _differ(value.shape[2], cache.shape[2]):
            return f"{name} has {value.shape[2]} heads, the key cache {cache.shape[2]}"
    inner = {**node.args, "key": node.args["key_cache"], "value": node.args["value_cache"]}
    args = canonical(Node(CUSTOM, inner, node.outputs, node.name), graph)
    rows, keys = query.shape[1], cache.shape[1]
    reason = _check_tensors(graph, args) or _check_llama(graph, node.args, rows, keys)
    # the write is bounded by the cache even where a mask decides what is read
    return reason or _check_start({**args, "kv_limit": "causal"}, rows, keys)


def supports_aten(graph: Graph, node: Node) -> str | None:
    """`aten.scaled_dot_product_attention`: query [..., Hq, L, E], key [..., Hkv, S, E], value [..., Hkv, S, Ev]."""
    dropout = node.args.get("dropout_p", 0.0)
    if dropout != 0:
        return f"dropout_p is {dropout}; attention with dropout is not supported"
    query, key, value = (graph.value(node.args[name]) for name in ("query", "key", "value"))
    if len({len(query.shape), len(key.shape), len(value.shape)}) != 1:
        ranks = f"{len(query.shape)}, {len(key.shape)} and {len(value.shape)}"
        return f"query, key and value have ranks {ranks}; they must be equal"
    if len({query.dtype, key.dtype, value.dtype}) != 1:
        return f"query, key and value are {query.dtype}, {key.dtype} and {value.dtype}; they must be equal"
    args = canonical(node, graph)
    reason = _check_tensors(graph, args)
    if reason is not None:
        return reason
    _, heads, _, _ = _sizes(query, "bhsd")
    _, kv_heads, keys, _ = _sizes(key, "bhsd")
    if heads != kv_heads and kv_heads != 1 and not node.args.get("enable_gqa", False):
        return f"{heads} query heads and {kv_heads} KV heads without enable_gqa=True"
    if node.args.get("attn_mask") is None:
        return None
    if node.args.get("is_causal", False):
        return "attn_mask and is_causal=True exclude each other"
    mask = graph.value(node.args["attn_mask"])
    if not 2 <= len(mask.shape) <= len(query.shape):
        return f"the attention mask has rank {len(mask.shape)}; it must be 2 to {len(query.shape)} (that of query)"
    if mask.shape[-1] != 1 and _differ(mask.shape[-1], keys):
        return f"the attention mask {list(mask.shape)} does not broadcast to {keys} keys"
    return None


def lower(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
    """All attention operators with a canonical form."""
    yield from attend(ctx, canonical(node, ctx.graph), ctx.out(node))


def lower_with_cache(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
    """Never reached: the canonicalising pass leaves no such node."""
    raise NotImplementedError(
        f"{node.name}: {WITH_CACHE} has no kernel of its own; the backend's passes split it into two cache updates "
        f"and {INTERNAL}"
    )


register(INTERNAL, supports=supports, lower=lower)
register(CUSTOM, supports=supports_custom, lower=lower)
register(ATEN, supports=supports_aten, lower=lower)
register(WITH_CACHE, supports=supports_with_cache, lower=lower_with_cache)
