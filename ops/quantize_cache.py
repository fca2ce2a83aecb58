"""`webgpu.quantize_cache` and `webgpu.hadamard`: what stands around attention on caches of packed integers.

`webgpu.quantize_cache` takes, by name:

    query, key, value: [B, S, Hq, D], [B, S, Hkv, D] and [B, S, Hkv, Dv], of any float dtype.
    key_cache, value_cache: u32 [B, C, Hkv, D * bits / 32] and [B, C, Hkv, Dv * bits / 32].
    key_scales, value_scales: f32 [B, C, Hkv, 1].
    bits: 8 or 4; see `packed_cache` for what the caches hold.
    cos, sin, interleaved: tables [P, rot / 2] of the rotary embedding of query and key, or None.
    lengths: i32[B, 4] of `webgpu.lengths`: token s < new of row b takes table row and cache row past + s; the others
        are padding, whose query is zero and which are not written.

Results: the query f32 [B, S, Hq, D] with rotary embedding and, for 4 bits, the Hadamard transform; the new caches and
scales, which may take over the buffers of the old ones.

`webgpu.hadamard` (input [B, S, H, D], lengths): input H / sqrt(D), zero for padding. It undoes the transform of values
in the result of attention, since the matrix is its own inverse.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from .. import wgsl
from ..backend.graph import Arg, Graph, Node, Ref, Value
from .base import Const, Dispatch, Lowering, register
from .copies import Side, copy_all, detached, side
from .lengths import PART, batch_fits, lengths_reason, require_totals
from .packed_cache import INT4_SIZES, MAX_SIZE, bits_of, elements

NAME = "webgpu.quantize_cache"
HADAMARD = "webgpu.hadamard"
FLOATS = ("f32", "f16", "bf16")
WRITTEN = ("key_cache", "value_cache", "key_scales", "value_scales")
STORAGE_BUFFERS = 10
"""Storage buffers of a dispatch that quantises keys and values."""


def _ref(node: Node, name: str) -> Ref:
    found = node.args[name]
    if not isinstance(found, Ref):
        raise TypeError(f"{node.name}: {name} is {found!r}")
    return found


def supports(graph: Graph, node: Node) -> str | None:
    """`webgpu.quantize_cache`: sizes that agree, float tokens, word caches and float32 scales."""
    args, bits = node.args, node.args["bits"]
    if isinstance(bits, bool) or not isinstance(bits, int) or bits not in (8, 4) or len(node.outputs) != 5:
        return f"{NAME} with {bits!r} bits and {len(node.outputs)} results; it has 8 or 4 bits and five results"
    values = {name: graph.value(args[name]) for name in ("query", "key", "value", *WRITTEN)}
    query, key, value = (values[name] for name in ("query", "key", "value"))
    for name in ("query", "key", "value"):
        if values[name].dtype not in FLOATS or len(values[name].shape) != 4:
            return f"{name} is {values[name].dtype}{list(values[name].shape)}; it must be float of four axes"
    if key.shape[:3] != value.shape[:3] or query.shape[:2] != key.shape[:2] or query.shape[3] != key.shape[3]:
        return f"query {query.shape}, key {key.shape} and value {value.shape} differ in batch, positions or head size"
    for x, name in ((key, "key"), (value, "value")):
        cache, scales, size = values[f"{name}_cache"], values[f"{name}_scales"], x.shape[3]
        if not isinstance(size, int) or size % (32 // bits) or not 0 < size <= MAX_SIZE:
            return f"{name} has heads of {size} elements; for {bits} bits: multiples of {32 // bits} up to {MAX_SIZE}"
        if bits == 4 and size not in INT4_SIZES:
            return f"{name} has heads of {size} elements; for 4 bits: {INT4_SIZES}"
        if cache.dtype != "u32" or len(cache.shape) != 4 or elements(cache.shape, bits)[2:] != x.shape[2:]:
            return f"cache {cache.name} is {cache.dtype}{list(cache.shape)} for {name} {list(x.shape)}"
        if cache.shape[0] != x.shape[0] or cache.shape[1] != values["key_cache"].shape[1]:
            return f"cache {cache.name} {list(cache.shape)} differs in batch or rows"
        if scales.dtype != "f32" or scales.shape != (*cache.shape[:3], 1):
            return f"scales {scales.name} are {scales.dtype}{list(scales.shape)} for cache {list(cache.shape)}"
    for name, out in zip(WRITTEN, node.outputs[1:], strict=True):
        if (graph.values[out].dtype, graph.values[out].shape) != (values[name].dtype, values[name].shape):
            return f"the new {name} differs from the old one in type"
    if graph.values[node.outputs[0]].shape != query.shape:
        return f"the result for query {list(query.shape)} is {list(graph.values[node.outputs[0]].shape)}"
    return _table_reason(graph, args, key) or lengths_reason(graph, args["lengths"], key.shape[0])


def _table_reason(graph: Graph, args: Mapping[str, Arg], key: Value) -> str | None:
    if args["lengths"] is None:
        return "lengths is missing"
    if (args["cos"] is None) != (args["sin"] is None):
        return "cos and sin must both be given, or both be None"
    if args["cos"] is None:
        return None
    cos, sin = graph.value(args["cos"]), graph.value(args["sin"])
    width, size = cos.shape[-1], key.shape[3]
    if cos.shape != sin.shape or len(cos.shape) != 2 or not isinstance(width, int) or not isinstance(size, int):
        return f"cos {list(cos.shape)} and sin {list(sin.shape)} are no tables [positions, rotary size / 2]"
    if 2 * width > size or cos.dtype not in FLOATS or sin.dtype not in FLOATS:
        return f"cos is {cos.dtype}{list(cos.shape)} for heads of {size} elements"
    return None


def lower(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
    """One dispatch where the device binds 10 storage buffers and both head sizes are equal, else two."""
    args, bits = node.args, bits_of(node.args)
    written = [ctx.out(node, i) for i in range(1, 5)]
    batch, rows, heads, d = ctx.shape(args["query"])
    _, _, kv_heads, dv = ctx.shape(args["value"])
    capacity, lengths = ctx.shape(written[0])[1], args["lengths"]
    require_totals(ctx, lengths, capacity, f"the rows of the caches ({capacity})")
    if args["cos"] is not None:
        table_rows = ctx.shape(args["cos"])[0]
        require_totals(ctx, lengths, table_rows, f"the rows of the rotary table ({table_rows})")
    for name, out in zip(WRITTEN, written, strict=True):
        yield from copy_all(ctx, _ref(node, name), out)
    if batch * rows == 0 or not batch_fits(ctx, lengths, batch):
        return
    read: dict[str, Side] = {}
    for name in ("query", "key", "value"):
        read[name] = side(ctx, _ref(node, name))
        for out in written:
            if ctx.shares_storage(_ref(node, name), out):
                read[name], before = detached(ctx, _ref(node, name), out)
                yield from before
    key_cache, value_cache, key_scales, value_scales = written
    work = _Work(ctx, args, lengths, batch * rows, rows, capacity, bits)
    keys: dict[str, Side | Ref] = {"key": read["key"], "key_cache": key_cache, "key_scales": key_scales}
    keys |= {"query": read["query"], "query_out": ctx.out(node)}
    table: dict[str, Side | Ref] = (
        {} if args["cos"] is None else {"cosines": _ref(node, "cos"), "sines": _ref(node, "sin")}
    )
    if d == dv and ctx.limits.max_storage_buffers >= STORAGE_BUFFERS:
        values: dict[str, Side | Ref] = {"value": read["value"], "value_cache": value_cache}
        values["value_scales"] = value_scales
        yield work.dispatch({**keys, **values, **table}, d, heads, kv_heads, kv_heads)
        return
    yield work.dispatch({**keys, **table}, d, heads, kv_heads, 0)
    values = {"key": read["value"], "key_cache": value_cache, "key_scales": value_scales}
    yield work.dispatch(values, dv, 0, kv_heads, 0)


class _Work:
    """What the dispatches of a node share."""

    def __init__(
        self, ctx: Lowering, args: Mapping[str, Arg], lengths: Arg, tokens: int, rows: int, capacity: int, bits: int
    ) -> None:
        self.ctx, self.args, self.lengths, self.bits = ctx, args, lengths, bits
        self.tokens, self.rows, self.capacity = tokens, rows, capacity

    def dispatch(
        self, tensors: Mapping[str, Side | Ref], size: int, heads: int, kv_heads: int, value_heads: int
    ) -> Dispatch:
        """quantize_cache.wgsl over `tensors` by shader variable."""
        ctx = self.ctx
        width = ctx.shape(self.args["cos"])[1] if "cosines" in tensors else 0
        known = {name: x if isinstance(x, Side) else side(ctx, x) for name, x in tensors.items()}
        for name, dtype in (("query_out", "f32"), ("key_cache", "u32"), ("key_scales", "f32")):
            if name not in known:  # a variable that the kernel could write to has to be bound
                known[name] = Side(ctx.scratch(dtype, 1), dtype)
        letters = {"Q": "query", "K": "key", "V": "value", "Cos": "cosines", "Sin": "sines", "QOut": "query_out"}
        types = {
            letter: ctx.stored_as(known[name].value, known[name].dtype) if name in known else "f32"
            for letter, name in letters.items()
        }
        consts: dict[str, Const] = {
            "D": size, "BITS": self.bits, "HEADS": heads, "KV_HEADS": kv_heads, "VALUE_HEADS": value_heads,
            "ROT": 2 * width, "INTERLEAVED": self.args.get("interleaved") is True, "HADAMARD": self.bits == 4,
            "NORM": 1 / math.sqrt(size) if self.bits == 4 else 1.0, "LENGTHS": max(ctx.shape(self.lengths)[0], 1),
        }  # fmt: skip
        total = self.tokens * (heads + kv_heads + value_heads)
        table_rows = ctx.shape(self.args["cos"])[0] if width else 1
        part = "quantize_cache_value" if value_heads else "quantize_cache_alone"
        return Dispatch(
            "quantize_cache",
            {**{name: x.value for name, x in known.items()}, "lengths": ctx.id(self.lengths)},
            {"total": total, "rows": self.rows, "capacity": self.capacity, "table_rows": table_rows},
            ctx.fold_grid(total),
            consts=consts,
            types=types,
            body=wgsl.source("quotient") + wgsl.source(PART) + wgsl.source(part),
        )


register(NAME, supports=supports, lower=lower, inplace=dict(zip(range(1, 5), WRITTEN, strict=True)))


def supports_hadamard(graph: Graph, node: Node) -> str | None:
    """`webgpu.hadamard`: floats of four axes, the last a power of two as of 4-bit caches."""
    x, out = graph.value(node.args["input"]), graph.values[node.outputs[0]]
    if x.dtype not in FLOATS or out.dtype not in FLOATS or len(x.shape) != 4 or out.shape != x.shape:
        return (
            f"the transform of {x.dtype}{list(x.shape)} to {out.dtype}{list(out.shape)}; float of four axes, one shape"
        )
    if x.shape[3] not in INT4_SIZES:
        return f"the transform of {x.shape[3]} elements; {INT4_SIZES} are supported"
    if node.args["lengths"] is None:
        return "lengths is missing"
    return lengths_reason(graph, node.args["lengths"], x.shape[0])


def lower_hadamard(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
    """The queries' part of the kernel that quantises."""
    batch, rows, heads, size = ctx.shape(node.args["input"])
    lengths = node.args["lengths"]
    if batch * rows * heads == 0 or not batch_fits(ctx, lengths, batch):
        return
    work = _Work(ctx, node.args, lengths, batch * rows, rows, 2**31 - 1, 4)
    yield work.dispatch({"query": _ref(node, "input"), "query_out": ctx.out(node)}, size, heads, 0, 0)


register(HADAMARD, supports=supports_hadamard, lower=lower_hadamard)
