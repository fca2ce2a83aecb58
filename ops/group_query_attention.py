"""`executorch_webgpu::group_query_attention`: what its arguments may be. Its record is expanded before it is lowered.

The rules are stated once, over dtypes and sizes, for the operator itself (`executorch_webgpu.llm`, on tensors) and for
its record here. B batch, S rows of a call, C cache rows, Hq and Hkv heads, D and Dv the head sizes of key and value:

    query [B, S, Hq, D] or [B, S, Hq * D]; key and value likewise with Hkv heads; or packed: query
        [B, S, (Hq + Hkv) * D + Hkv * Dv], query heads first, then key heads, then value heads, key and value None.
    key_cache [B, C, Hkv, D], value_cache [B, C, Hkv, Dv], of one float dtype; or of packed integers with key_scales and
        value_scales, as in `packed_cache`.
    past, q_len: i32 or i64 of shape [B], [B, 1] or [1, B]; q_len may be None.
    cos, sin: [P, rot / 2], or None; rot at most D.
    q_norm, k_norm: [D], or both None.
    attn_bias: float (added) or bool (true: attend), broadcastable to [B, Hq, S, T]; T may differ from C.
    sink: [Hq], or None.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..backend.graph import Graph, Node, Ref, Value, refs
from . import packed_cache
from .base import Dispatch, Lowering, register
from .lengths import MAX_BATCH

NAME = "executorch_webgpu.group_query_attention.default"
FLOATS = ("f32", "f16", "bf16")
TENSORS = (
    "query", "key", "value", "key_cache", "value_cache", "past", "q_len", "cos", "sin", "q_norm", "k_norm",
    "attn_bias", "sink", "key_scales", "value_scales",
)  # fmt: skip
NUMBERS = (
    "num_heads", "num_kv_heads", "interleaved", "norm_eps", "window", "softcap", "smooth_softmax", "scale", "is_causal",
)  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """Sizes of a call; see the module's docstring. `packed`: query holds key and value as well."""

    batch: Any
    rows: Any
    heads: int
    kv_heads: int
    d: Any
    dv: Any
    capacity: Any
    packed: bool


def sizes(values: Mapping[str, Value | None], numbers: Mapping[str, object]) -> Sizes:
    """The sizes of arguments that `reason` accepts; ints where they are known."""
    values = packed_cache.as_floats(values)
    query, keys, stored = (_given(values, name) for name in ("query", "key_cache", "value_cache"))
    batch, capacity, _, d = keys.shape
    heads, kv_heads = _heads(numbers)
    return Sizes(batch, query.shape[1], heads, kv_heads, d, stored.shape[3], capacity, values["key"] is None)


def _given(values: Mapping[str, Value | None], name: str) -> Value:
    found = values[name]
    if found is None:
        raise TypeError(f"{name} is None")
    return found


def _heads(numbers: Mapping[str, object]) -> tuple[int, int]:
    heads, kv_heads = numbers["num_heads"], numbers["num_kv_heads"]
    if not isinstance(heads, int) or not isinstance(kv_heads, int):
        raise TypeError(f"expected numbers of heads, got {heads!r} and {kv_heads!r}")
    return heads, kv_heads


def _differ(a: object, b: object) -> bool:
    """Whether two sizes are known to differ. Those that only a call shows are its business."""
    return isinstance(a, int) and isinstance(b, int) and a != b


def _fits(shape: Sequence[object], wanted: Sequence[object]) -> bool:
    return len(shape) == len(wanted) and not any(_differ(a, b) for a, b in zip(shape, wanted, strict=True))


def _times(a: Any, b: Any) -> Any:
    """A product of sizes, None where it is not known."""
    return a * b if isinstance(a, int) and isinstance(b, int) else None


def show(value: Value) -> str:
    """A type in words: `f32[2, 3]`."""
    return f"{value.dtype}[{', '.join(map(str, value.shape))}]"


def reason(values: Mapping[str, Value | None], numbers: Mapping[str, object], floats: tuple[str, ...]) -> str | None:
    """Why the operator does not take these arguments, or None.

    Args:
        values: the tensor arguments by name; sizes that are no int are known only to a call.
        numbers: the others by name.
        floats: dtypes that query, key, value and caches may have.
    """
    for name in ("query", "key_cache", "value_cache", "past"):
        if values.get(name) is None:
            return f"{name} is missing"
    keys, stored = _given(values, "key_cache"), _given(values, "value_cache")
    if keys.dtype != stored.dtype:
        return f"key_cache is {keys.dtype}, value_cache {stored.dtype}; they must be equal"
    found = packed_cache.reason(values)
    if found is not None:
        return found
    values = packed_cache.as_floats(values)
    return (
        _numbers_reason(numbers)
        or _cache_reason(values, numbers, floats)
        or _projected_reason(values, numbers, floats)
        or _lengths_reason(values)
        or _rotary_reason(values)
        or _norm_reason(values)
        or _bias_reason(values, numbers)
    )


def _numbers_reason(numbers: Mapping[str, object]) -> str | None:
    for name in ("num_heads", "num_kv_heads"):
        count = numbers[name]
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            return f"{name} is {count!r}; it must be a positive integer"
    heads, kv_heads = _heads(numbers)
    if heads % kv_heads:
        return f"num_heads {heads} is no multiple of num_kv_heads {kv_heads}"
    window = numbers["window"]
    if isinstance(window, bool) or not isinstance(window, int) or not 0 <= window < 2**31:
        return f"window is {window!r}; it must be an integer that is not negative (0: none)"
    for name, low in (("softcap", 0.0), ("norm_eps", 0.0), ("scale", -math.inf)):
        number = numbers[name]
        if name == "scale" and number is None:
            continue
        if isinstance(number, bool) or not isinstance(number, int | float) or not low <= number < math.inf:
            return f"{name} is {number!r}; it must be a finite number" + (" that is not negative" if low == 0 else "")
    for name in ("interleaved", "smooth_softmax", "is_causal"):
        if not isinstance(numbers[name], bool):
            return f"{name} is {numbers[name]!r}; it must be a bool"
    return None


def _cache_reason(
    values: Mapping[str, Value | None], numbers: Mapping[str, object], floats: tuple[str, ...]
) -> str | None:
    keys, stored = _given(values, "key_cache"), _given(values, "value_cache")
    for name, cache in (("key_cache", keys), ("value_cache", stored)):
        if len(cache.shape) != 4:
            return f"{name} is {show(cache)}; it must be [batch, capacity, KV heads, head size]"
        if cache.dtype not in floats:
            return f"{name} is {cache.dtype}; it must be one of {', '.join(floats)}"
        if any(isinstance(size, int) and size < 1 for size in cache.shape):
            return f"{name} is {show(cache)}; its sizes must be positive"
        if _differ(cache.shape[2], numbers["num_kv_heads"]):
            return f"{name} is {show(cache)}; it must have {numbers['num_kv_heads']} heads on axis 2"
    if not _fits(keys.shape[:3], stored.shape[:3]):
        return f"key_cache {show(keys)} and value_cache {show(stored)} differ in batch, capacity or heads"
    return None


def _projected_reason(
    values: Mapping[str, Value | None], numbers: Mapping[str, object], floats: tuple[str, ...]
) -> str | None:
    """Query, key and value, packed or apart."""
    query, key, value = _given(values, "query"), values.get("key"), values.get("value")
    keys, stored = _given(values, "key_cache"), _given(values, "value_cache")
    if (key is None) != (value is None):
        return "key and value must both be given, or both be None where query is packed"
    (heads, kv_heads), d, dv = _heads(numbers), keys.shape[3], stored.shape[3]
    if key is None:
        parts = _times(heads + kv_heads, d), _times(kv_heads, dv)
        width = None if None in parts else sum(parts)
        if len(query.shape) != 3 or _differ(query.shape[2], width):
            return (
                f"packed query is {show(query)}; it must be [batch, rows, {width}] for {heads} + 2 * {kv_heads} heads"
            )
    given = [("query", query, heads, d)] if key is not None else []
    given += [(n, v, kv_heads, size) for n, v, size in (("key", key, d), ("value", value, dv)) if v is not None]
    for name, tensor, count, size in given:
        wide = _times(count, size)
        if not (_fits(tensor.shape[2:], (count, size)) or _fits(tensor.shape[2:], (wide,))):
            return f"{name} is {show(tensor)}; it must be [batch, rows, {count}, {size}] or [batch, rows, {wide}]"
    for name, found in (("query", query), ("key", key), ("value", value)):
        if found is None:
            continue
        if found.dtype not in floats:
            return f"{name} is {found.dtype}; it must be one of {', '.join(floats)}"
        if found.dtype != query.dtype:
            return f"query is {query.dtype}, {name} {found.dtype}; they must be equal"
        if _differ(found.shape[0], keys.shape[0]):
            return f"{name} is {show(found)}; the caches have a batch of {keys.shape[0]}"
        if _differ(found.shape[1], query.shape[1]):
            return f"query has {query.shape[1]} rows, {name} {found.shape[1]}"
    rows, capacity = query.shape[1], keys.shape[1]
    if isinstance(rows, int) and isinstance(capacity, int) and rows > capacity:
        return f"{rows} rows a call do not fit caches of {capacity} rows"
    return None


def _lengths_reason(values: Mapping[str, Value | None]) -> str | None:
    batch = _given(values, "key_cache").shape[0]
    for name in ("past", "q_len"):
        lengths = values.get(name)
        if lengths is None:
            continue
        if lengths.dtype not in ("i32", "i64") or not any(
            _fits(lengths.shape, shape) for shape in ((batch,), (batch, 1), (1, batch))
        ):
            return (
                f"{name} is {show(lengths)}; lengths are i32 or i64, one for each of {batch} batch rows: "
                f"[{batch}], [{batch}, 1] or [1, {batch}]"
            )
    return None


def _rotary_reason(values: Mapping[str, Value | None]) -> str | None:
    cos, sin, cache = values.get("cos"), values.get("sin"), _given(values, "key_cache")
    if cos is None and sin is None:
        return None
    if cos is None or sin is None:
        return "cos and sin must both be given, or both be None"
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dtype not in (*FLOATS, "f64") or len(table.shape) != 2:
            return f"{name} is {show(table)}; it must be a float table [positions, rotary size / 2]"
        if any(isinstance(size, int) and size < 1 for size in table.shape):
            return f"{name} is {show(table)}; its sizes must be positive"
    if not _fits(cos.shape, sin.shape):
        return f"cos is {show(cos)}, sin {show(sin)}; they must have one shape"
    turning, d = _times(2, cos.shape[1]), cache.shape[3]
    if isinstance(turning, int) and isinstance(d, int) and turning > d:
        return f"cos is {show(cos)}: {turning} rotary elements of a head size of {d}"
    return None


def _norm_reason(values: Mapping[str, Value | None]) -> str | None:
    weights, cache = (values.get("q_norm"), values.get("k_norm")), _given(values, "key_cache")
    if (weights[0] is None) != (weights[1] is None):
        return "q_norm and k_norm must both be given, or both be None"
    for name, weight in zip(("q_norm", "k_norm"), weights, strict=True):
        if weight is not None and (weight.dtype not in (*FLOATS, "f64") or not _fits(weight.shape, cache.shape[3:])):
            return f"{name} is {show(weight)}; it must be a float for each of {cache.shape[3]} elements of a head"
    return None


def _bias_reason(values: Mapping[str, Value | None], numbers: Mapping[str, object]) -> str | None:
    bias, sink, query, cache = (
        values.get("attn_bias"),
        values.get("sink"),
        _given(values, "query"),
        _given(values, "key_cache"),
    )
    heads, _ = _heads(numbers)
    if sink is not None:
        if numbers["smooth_softmax"] is True:
            return "smooth_softmax is a sink of 0; it excludes sink"
        if sink.dtype not in (*FLOATS, "f64") or not _fits(sink.shape, (heads,)):
            return f"sink is {show(sink)}; it must be a float for each of {heads} query heads"
    if bias is None:
        return None
    if bias.dtype not in (*FLOATS, "f64", "bool") or not 1 <= len(bias.shape) <= 4:
        return f"attn_bias is {show(bias)}; it must be float or bool of rank 1 to 4"
    shape = (1,) * (4 - len(bias.shape)) + tuple(bias.shape)
    limits = (("batch", cache.shape[0]), ("heads", heads), ("rows", query.shape[1]))
    for size, (what, wanted) in zip(shape, limits, strict=False):
        if size != 1 and _differ(size, wanted):
            return f"attn_bias is {show(bias)}; it does not broadcast to the {what} ({wanted})"
    return None


def supports(graph: Graph, node: Node) -> str | None:
    """The rules, and what the delegate needs besides: caches apart, and a bias whose columns are known at export."""
    values = described(graph, node)
    found = reason(values, {name: node.args[name] for name in NUMBERS}, FLOATS)
    if found is not None:
        return found
    for name in ("key_cache", "value_cache", "cos", "sin"):
        value = values[name]
        if value is not None and not all(isinstance(size, int) for size in value.shape):
            return f"{name} is {show(value)}; its sizes must be known at export"
    batch = _given(values, "key_cache").shape[0]
    if isinstance(batch, int) and batch > MAX_BATCH:
        return f"a batch of {batch} rows; at most {MAX_BATCH} are supported"
    if node.args["key_cache"] == node.args["value_cache"]:
        return "key_cache and value_cache are one tensor; they must be apart"
    found = _packed_reason(graph, node, values)
    if found is not None:
        return found
    bias = values["attn_bias"]
    if bias is not None and not isinstance(bias.shape[-1], int):
        return f"attn_bias is {show(bias)}; its last axis must be known at export (for example the caches' capacity)"
    return None


def _packed_reason(graph: Graph, node: Node, values: Mapping[str, Value | None]) -> str | None:
    """Caches of packed integers become words, which nothing but this operator can read."""
    if _given(values, "key_cache").dtype not in packed_cache.CODES:
        return None
    if node.args.get("key_scales") == node.args.get("value_scales"):
        return "key_scales and value_scales are one tensor; they must be apart"
    for name, output in (("key_cache", node.outputs[1]), ("value_cache", node.outputs[2])):
        cache, found = _given(values, name), packed_cache.storage_reason(_given(values, name))
        if found is not None:
            return found
        given = node.args[name]
        assert isinstance(given, Ref)
        made = next((n for n in graph.nodes if given.value in n.outputs), None)
        if cache.kind != "mutable" and (made is None or made.op != NAME):
            return f"{name} {cache.name} is no buffer of the program; caches of packed integers must be"
        for value in (given.value, output):
            for reader in graph.nodes:
                others = {n for n, a in reader.args.items() if value in refs(a)} - {name}
                if others or (reader.op != NAME and value in reader.inputs()):
                    return f"{name} {cache.name} is also read by {reader.name or reader.op}; packed caches are private"
            if any(isinstance(out, Ref) and out.value == value for out in graph.outputs):
                return f"{name} {cache.name} is an output; packed caches are private to the operator"
    return None


def described(graph: Graph, node: Node) -> dict[str, Value | None]:
    """The tensor arguments of a record."""
    return {name: graph.value(arg) if isinstance(arg := node.args.get(name), Ref) else None for name in TENSORS}


def lower(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
    """Never reached: the pass `expand_group_query` leaves no such node."""
    raise NotImplementedError(f"{node.name}: {NAME} has no kernel of its own; the backend's passes expand it")


register(NAME, supports=supports, lower=lower)
