"""Attention in one canonical form, `webgpu.attention`, and what stands around it taken into the kernel.

Exporters wrap attention in work on the whole KV cache: casts to float32, permutes between [B,S,H,D] and [B,H,S,D],
repeats of KV heads.
The kernel reads any of these forms from the cache itself, so the wrapping is peeled off: otherwise each token would
copy the cache.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from ...ops.attention import canonical
from ..graph import FLOATS, Arg, Graph, Node, Ref
from .match import CAST, COPY, EXPAND, UNSQUEEZE, VIEW, swaps_middle
from .rewrite import Editor, Links, map_nodes

_OTHER_LAYOUT = {"bshd": "bhsd", "bhsd": "bshd"}


def canonical_attention(graph: Graph) -> Graph:
    """Replace the three attention operators by `webgpu.attention` (and cache updates, for `sdpa_with_kv_cache`)."""
    editor = Editor(graph)

    def change(node: Node) -> Iterable[Node] | None:
        if node.op == "llama.sdpa_with_kv_cache.default":
            return _split_with_cache(graph, node)
        if node.op in ("llama.custom_sdpa.default", "aten.scaled_dot_product_attention.default"):
            return [replace(node, op="webgpu.attention", args=canonical(node, graph))]
        return None

    return map_nodes(graph, change, editor)


def _split_with_cache(graph: Graph, node: Node) -> list[Node]:
    """Write K and V to their caches, then attend to the new caches. `seq_len` is only a check of the original: it
    repeats S."""
    args = node.args
    output, key_cache, value_cache = node.outputs
    writes = [
        Node(
            "llama.update_cache.default",
            {"value": args[name], "cache": args[f"{name}_cache"], "start_pos": args["start_pos"]},
            (new,),
            f"{node.name}.{name}",
        )
        for name, new in (("key", key_cache), ("value", value_cache))
    ]
    attend = {k: args[k] for k in ("query", "start_pos", "attn_mask", "drpout_p", "is_causal", "scale")}
    attend |= {"key": Ref(key_cache), "value": Ref(value_cache)}
    inner = Node("llama.custom_sdpa.default", attend, (output,), node.name)
    return [*writes, replace(inner, op="webgpu.attention", args=canonical(inner, graph))]


def peel_attention(graph: Graph) -> Graph:
    """Let attention read caches, queries and results in the form they have, without casts, permutes and repeats
    around it."""
    links = Links(graph)
    folded: set[int] = set()  # results of nodes that an attention before them took over

    def change(node: Node) -> Iterable[Node] | None:
        if node.op == "webgpu.attention":
            new = _peel_output(links, _peel_inputs(links, node))
            folded.update(() if new.outputs == node.outputs else new.outputs)
            return [new]
        return [] if folded.intersection(node.outputs) else None

    return map_nodes(graph, change)


def _peel_inputs(links: Links, node: Node) -> Node:
    args = dict(node.args)
    query_forms = list(_forms(links, args["query"], str(args["q_layout"]), repeats=False))
    args["query"], args["q_layout"] = query_forms[-1]
    key_forms = list(_forms(links, args["key"], str(args["kv_layout"]), repeats=True))
    value_forms = list(_forms(links, args["value"], str(args["kv_layout"]), repeats=True))
    pairs = [
        (i + j, key, value, layout)
        for i, (key, layout) in enumerate(key_forms)
        for j, (value, other) in enumerate(value_forms)
        if layout == other and _heads(links, key, layout) == _heads(links, value, layout)
    ]
    _, args["key"], args["value"], args["kv_layout"] = max(pairs, key=lambda pair: pair[0])
    return replace(node, args=args)


def _heads(links: Links, arg: Arg, layout: str) -> object:
    return links.value(arg).shape[layout.index("h")]


def _forms(links: Links, arg: Arg, layout: str, repeats: bool) -> Iterable[tuple[Arg, str]]:
    """The value an operand is made from, step by step backwards, each with its layout; the operand itself first."""
    yield arg, layout
    while True:
        node = links.made_by(arg)
        step = None if node is None else _step(links, node, layout, repeats)
        if step is None:
            return
        arg, layout = step
        yield arg, layout


def _step(links: Links, node: Node, layout: str, repeats: bool) -> tuple[Arg, str] | None:
    source = node.args.get("self", node.args.get("input"))
    if not isinstance(source, Ref):
        return None
    result = links.graph.values[node.outputs[0]]
    if node.op in COPY:
        return source, layout
    if node.op in CAST:
        wider = ("f32",) if links.value(source).dtype in ("f16", "bf16") else ()
        same = links.value(source).dtype == result.dtype
        return (source, layout) if same or result.dtype in wider else None
    if swaps_middle(links, node):
        return source, _OTHER_LAYOUT[layout]
    if node.op in VIEW and links.value(source).shape == result.shape:
        return source, layout
    if repeats:
        origin = _repeated(links, node, layout)
        if origin is not None:
            return origin, layout
    return None


def _repeated(links: Links, node: Node, layout: str) -> Ref | None:
    """The tensor whose KV heads a node repeats, each n times in a row, or None.

    Two spellings: `repeat_interleave(x, n, heads)`, and view(clone(expand(unsqueeze(x)))) with the new axis after the
    heads.
    """
    heads = layout.index("h")
    if node.op == "aten.repeat_interleave.self_int":
        source, axis = node.args["self"], node.args["dim"]
        return source if isinstance(source, Ref) and axis in (heads, heads - 4) else None
    if node.op not in VIEW:
        return None
    inner: Node | None = links.made_by(node.args["self"])
    while inner is not None and inner.op in COPY:
        inner = links.made_by(inner.args["self"])
    if inner is None or inner.op not in EXPAND:
        return None
    unsqueezed = links.made_by(inner.args["self"], *UNSQUEEZE, *VIEW)
    if unsqueezed is None:
        return None
    source = unsqueezed.args["self"]
    before, wide = links.value(source).shape, links.graph.values[inner.outputs[0]].shape
    after = links.graph.values[node.outputs[0]].shape
    if not isinstance(source, Ref) or len(before) != 4 or len(wide) != 5 or len(after) != 4:
        return None
    expected_narrow = (*before[: heads + 1], 1, *before[heads + 1 :])
    times, count = wide[heads + 1], before[heads]
    if not isinstance(times, int) or not isinstance(count, int):
        return None
    matches = (
        links.graph.values[unsqueezed.outputs[0]].shape == expected_narrow
        and wide == (*before[: heads + 1], times, *before[heads + 1 :])
        and after == (*before[:heads], count * times, *before[heads + 1 :])
    )
    return source if matches else None


def _peel_output(links: Links, node: Node) -> Node:
    """The attention with the casts and permutes of its result folded in, as long as each is the only reader of what
    it changes."""
    while True:
        follower = links.only_reader(node.outputs[0])
        if follower is None:
            return node
        source, result = links.graph.values[node.outputs[0]], links.graph.values[follower.outputs[0]]
        if swaps_middle(links, follower):
            layout = _OTHER_LAYOUT[str(node.args["out_layout"])]
            node = replace(node, args={**node.args, "out_layout": layout}, outputs=follower.outputs)
        elif follower.op in CAST and {source.dtype, result.dtype} <= FLOATS - {"f64"}:
            node = replace(node, outputs=follower.outputs)
        else:
            return node
