"""The operator `executorch_webgpu::group_query_attention`: attention of a batch whose rows have lengths of their own.

Importing this module registers it, and `executorch_webgpu::last_rows` (see `last_rows`). It takes the projections of a
decoder layer and its KV caches, writes the new keys and values to the caches, and attends. B batch rows, S tokens
of a call, C cache rows, Hq query heads that share Hkv key and value heads, D and Dv the head sizes of key and value:

    query: [B, S, Hq, D] or [B, S, Hq * D], f32, f16 or bf16. With key and value None it is packed:
        [B, S, (Hq + Hkv) * D + Hkv * Dv], query heads first, then key heads, then value heads.
    key, value: [B, S, Hkv, D] and [B, S, Hkv, Dv], or with heads and elements in one axis; of query's dtype.
    key_cache, value_cache: [B, C, Hkv, D] and [B, C, Hkv, Dv], f32, f16 or bf16; mutated. Or packed integers, with
        scales for each token and head: int8 of the same shapes (a delegate takes head sizes that are multiples of 4),
        or uint8 [B, C, Hkv, D / 2] and [B, C, Hkv, Dv / 2], two 4-bit codes a byte, of head sizes that are powers of
        two, 8 to 256. `ops/packed_cache.py` says what they hold. In a delegate nothing else may read them.
    past: int32 or int64 [B], [B, 1] or [1, B]: how many rows of the caches hold tokens, for each batch row.
    q_len: the same kind, or None: how many of the S tokens of each batch row are real (None: all). The others are
        padding behind the real ones: they are not written, and their results are zero. 0 is allowed.
    cos, sin: [P, rot / 2], or None: rotary embedding of query and key; token s of row b takes table row past_b + s. The
        first `rot` elements of a head turn. interleaved: in pairs (2i, 2i + 1), else (i, i + rot / 2).
    q_norm, k_norm: [D], or None: RMSNorm of each head of query and key, with `norm_eps`, before the rotary embedding.
    attn_bias: added to the scores (float), or true where a token may attend (bool); broadcastable to [B, Hq, S, T].
        Column t belongs to cache row t. T may be less or more than C, but every past + q_len must be within.
    window: 0, or w: token s sees only cache rows above past + s - w.
    softcap: 0, or c: scores become c * tanh(score / c), before the bias is added.
    sink: [Hq], or None: a logit for each query head that takes part in the softmax and has no value.
    smooth_softmax: a sink of 0.
    scale: of the products of query and key; 1 / sqrt(D) if None.
    is_causal: token s sees cache rows up to past + s; else all of past + q_len.
    key_scales, value_scales: f32 [B, C, Hkv, 1] of packed caches, else None; mutated.

The result is [B, S, Hq, Dv], or [B, S, Hq * Dv] for a query of three axes, of query's dtype. A token that sees no key
gives zeros. Sums are float32 (float64 for float64 arguments, which only the eager operator takes).

Errors: ValueError for wrong shapes, dtypes and lengths (negative, past + q_len above C or above the rotary table); the
caches stay as they were. In a delegate the host checks lengths before a step is submitted (`InputError`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..backend.graph import Value
from ..backend.translate import DTYPES
from ..ops import group_query_attention as rules
from ..ops import last_rows as last_rows_rules
from . import quantized_cache

SCHEMA = (
    "group_query_attention(Tensor query, Tensor? key, Tensor? value, Tensor(a!) key_cache, Tensor(b!) value_cache, "
    "Tensor past, Tensor? q_len, int num_heads, int num_kv_heads, *, Tensor? cos=None, Tensor? sin=None, "
    "bool interleaved=False, Tensor? q_norm=None, Tensor? k_norm=None, float norm_eps=1e-6, Tensor? attn_bias=None, "
    "int window=0, float softcap=0.0, Tensor? sink=None, bool smooth_softmax=False, float? scale=None, "
    "bool is_causal=True, Tensor(c!)? key_scales=None, Tensor(d!)? value_scales=None) -> Tensor"
)
LAST_ROWS = "last_rows(Tensor x, Tensor q_len) -> Tensor"
_FLOATS = (*rules.FLOATS, "f64")
LIBRARY = torch.library.Library("executorch_webgpu", "DEF")
LIBRARY.define(SCHEMA)
LIBRARY.define(LAST_ROWS)
OPERATOR = torch.ops.executorch_webgpu.group_query_attention.default


@dataclass(frozen=True)
class _Call:
    """The arguments of a call by name, checked, with its sizes."""

    tensors: dict[str, Tensor | None]
    numbers: dict[str, Any]
    sizes: rules.Sizes

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
        """Raises ValueError."""
        schema = OPERATOR._schema.arguments
        given = (
            {a.name: a.default_value for a in schema} | {a.name: v for a, v in zip(schema, args, strict=False)} | kwargs
        )
        tensors = {name: given[name] for name in rules.TENSORS}
        numbers = {name: given[name] for name in rules.NUMBERS}
        values = {name: None if t is None else _described(name, t) for name, t in tensors.items()}
        reason = rules.reason(values, numbers, _FLOATS)
        if reason is not None:
            raise ValueError(f"group_query_attention: {reason}")
        return cls(tensors, numbers, rules.sizes(values, numbers))

    def tensor(self, name: str) -> Tensor:
        found = self.tensors[name]
        assert found is not None
        return found

    def result_shape(self) -> list[Any]:
        sizes, query = self.sizes, self.tensor("query")
        tail = [sizes.heads * sizes.dv] if query.dim() == 3 else [sizes.heads, sizes.dv]
        return [sizes.batch, query.shape[1], *tail]


def _described(name: str, tensor: Tensor) -> Value:
    dtype = DTYPES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
    return Value("temp", dtype, tuple(tensor.shape), name)


def _fake(*args: Any, **kwargs: Any) -> Tensor:
    call = _Call.of(args, kwargs)
    query = call.tensor("query")
    for name in ("key", "value"):
        other = call.tensors[name]
        if other is not None:
            torch._check(other.shape[1] == query.shape[1])
    return query.new_empty(call.result_shape())


def _eager(*args: Any, **kwargs: Any) -> Tensor:
    call = _Call.of(args, kwargs)
    sizes, query = call.sizes, call.tensor("query")
    pasts, counts = _lengths(call)
    if call.tensor("key_cache").data_ptr() == call.tensor("value_cache").data_ptr():
        raise ValueError("group_query_attention: key_cache and value_cache are one tensor; they must be apart")
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    q, k, v = (part.to(wide) for part in _parts(call))
    for name in ("q", "k"):
        weight = call.tensors[f"{name}_norm"]
        if weight is not None:
            x = q if name == "q" else k
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + call.numbers["norm_eps"]) * weight.to(wide)
            q, k = (x, k) if name == "q" else (q, x)
    out = query.new_zeros((sizes.batch, query.shape[1], sizes.heads, sizes.dv), dtype=wide)
    for row, (past, new) in enumerate(zip(pasts, counts, strict=True)):
        if new == 0:
            continue
        end = past + new
        _write(call, "key", row, slice(past, end), _turned(call, k[row, :new], past))
        _write(call, "value", row, slice(past, end), v[row, :new])
        turned = _turned(call, q[row, :new], past)
        seen = (_read(call, name, row, end).to(wide) for name in ("key", "value"))
        out[row, :new] = _attended(call, row, turned, *seen)
    return out.reshape(call.result_shape()).to(query.dtype)


def _write(call: _Call, name: str, row: int, at: slice, x: Tensor) -> None:
    """x [n, Hkv, size] to rows `at` of a batch row's cache."""
    cache, scales = call.tensor(f"{name}_cache"), call.tensors[f"{name}_scales"]
    if scales is None:
        cache[row, at] = x.to(cache.dtype)
    else:
        cache[row, at], scales[row, at] = quantized_cache.quantize(x, cache.dtype)


def _read(call: _Call, name: str, row: int, end: int) -> Tensor:
    """The first `end` rows of a batch row's cache, as floats."""
    cache, scales = call.tensor(f"{name}_cache"), call.tensors[f"{name}_scales"]
    return cache[row, :end] if scales is None else quantized_cache.dequantize(cache[row, :end], scales[row, :end])


def _lengths(call: _Call) -> tuple[list[int], list[int]]:
    """Past and number of new tokens of each batch row. Raises ValueError, naming row, value and limit."""
    rows, capacity = int(call.tensor("query").shape[1]), call.sizes.capacity
    pasts = call.tensor("past").reshape(-1).tolist()
    given = call.tensors["q_len"]
    counts = [rows] * len(pasts) if given is None else given.reshape(-1).tolist()
    limits = [(capacity, "rows of the caches")]
    cos, bias = call.tensors["cos"], call.tensors["attn_bias"]
    if cos is not None:
        limits.append((cos.shape[0], "rows of the rotary table"))
    if bias is not None and bias.shape[-1] != 1:
        limits.append((bias.shape[-1], "columns of attn_bias"))
    for row, (past, new) in enumerate(zip(pasts, counts, strict=True)):
        for name, value, high in (("past", past, capacity), ("q_len", new, rows)):
            if not 0 <= value <= high:
                raise ValueError(f"group_query_attention: {name} of batch row {row} is {value}, outside [0, {high}]")
        for limit, what in limits:
            if past + new > limit:
                raise ValueError(
                    f"group_query_attention: past {past} + q_len {new} of batch row {row} is above the {limit} {what}"
                )
    return pasts, counts


def _parts(call: _Call) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value as [B, S, heads, head size]."""
    sizes, query = call.sizes, call.tensor("query")
    if not sizes.packed:
        shapes = ((sizes.heads, sizes.d), (sizes.kv_heads, sizes.d), (sizes.kv_heads, sizes.dv))
        given = (query, call.tensor("key"), call.tensor("value"))
        q, k, v = (x.reshape(*x.shape[:2], *shape) for x, shape in zip(given, shapes, strict=True))
        return q, k, v
    heads, kv_heads = sizes.heads, sizes.kv_heads
    q, k, v = query.split([heads * sizes.d, kv_heads * sizes.d, kv_heads * sizes.dv], -1)
    return (
        q.unflatten(-1, (heads, sizes.d)),
        k.unflatten(-1, (kv_heads, sizes.d)),
        v.unflatten(-1, (kv_heads, sizes.dv)),
    )


def _turned(call: _Call, x: Tensor, past: int) -> Tensor:
    """x [n, heads, D] of positions past ... past + n - 1 with the rotary embedding, if there is one."""
    cos, sin = call.tensors["cos"], call.tensors["sin"]
    if cos is None or sin is None:
        return x
    c, s = (table[past : past + x.shape[0], None].to(x.dtype) for table in (cos, sin))
    return rotate(x, c, s, call.numbers["interleaved"])


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The rotary embedding of x [..., D] by tables [..., rot / 2] that broadcast; elements from `rot` on stay."""
    half = cos.shape[-1]
    turning, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        a, b = turning[..., ::2], turning[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = turning[..., :half], turning[..., half:]
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    return torch.cat((turned, rest), -1)


def _attended(call: _Call, row: int, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """q [n, Hq, D] of batch row `row`; keys [T, Hkv, D] and values [T, Hkv, Dv] end with its own -> [n, Hq, Dv]."""
    sizes, numbers = call.sizes, call.numbers
    new, total = q.shape[0], keys.shape[0]
    group = sizes.heads // sizes.kv_heads
    scale = sizes.d**-0.5 if numbers["scale"] is None else numbers["scale"]
    scores = torch.einsum("nhgd,thd->hgnt", q.unflatten(1, (sizes.kv_heads, group)), keys).flatten(0, 1) * scale
    if numbers["softcap"]:
        scores = numbers["softcap"] * torch.tanh(scores / numbers["softcap"])
    i = total - new + torch.arange(new)[:, None]
    j = torch.arange(total)[None, :]
    seen = j <= i if numbers["is_causal"] else torch.ones(new, total, dtype=torch.bool)
    if numbers["window"]:
        seen = seen & (j > i - numbers["window"])
    bias = call.tensors["attn_bias"]
    if bias is not None:
        bias = bias.reshape((1,) * (4 - bias.dim()) + tuple(bias.shape))
        bias = bias[row if bias.shape[0] != 1 else 0]
        bias = bias if bias.shape[1] == 1 else bias[:, :new]
        bias = bias if bias.shape[2] == 1 else bias[:, :, :total]
        scores, seen = (scores, seen & bias) if bias.dtype == torch.bool else (scores + bias.to(scores.dtype), seen)
    scores = scores.masked_fill(~seen, float("-inf"))
    sink = call.tensors["sink"]
    if numbers["smooth_softmax"]:
        sink = scores.new_zeros(sizes.heads)
    most = scores.amax(-1, keepdim=True)
    if sink is not None:
        most = torch.maximum(most, sink.to(scores.dtype)[:, None, None])
    most = most.masked_fill(most == float("-inf"), 0.0)
    weights = torch.exp(scores - most)
    weight = weights.sum(-1, keepdim=True)
    if sink is not None:
        weight = weight + torch.exp(sink.to(scores.dtype)[:, None, None] - most)
    weights = weights / weight.masked_fill(weight == 0, 1.0)
    mixed = torch.einsum("hgnt,thd->nhgd", weights.unflatten(0, (sizes.kv_heads, group)), values)
    return mixed.flatten(1, 2)


LIBRARY.impl("group_query_attention", _eager, "CPU")
torch.library.register_fake("executorch_webgpu::group_query_attention", _fake, lib=LIBRARY)


def group_query_attention(*args: Any, **kwargs: Any) -> Tensor:
    """The operator; arguments and result as in the module's docstring. Raises ValueError."""
    result: Tensor = OPERATOR(*args, **kwargs)
    return result


def _check_last_rows(x: Tensor, q_len: Tensor) -> None:
    reason = last_rows_rules.reason(_described("x", x), _described("q_len", q_len), _FLOATS)
    if reason is not None:
        raise ValueError(f"last_rows: {reason}")


def _fake_last_rows(x: Tensor, q_len: Tensor) -> Tensor:
    _check_last_rows(x, q_len)
    return x.new_empty((x.shape[0], x.shape[2]))


def _eager_last_rows(x: Tensor, q_len: Tensor) -> Tensor:
    _check_last_rows(x, q_len)
    return x[torch.arange(x.shape[0]), q_len.reshape(-1).long().clamp(1, x.shape[1]) - 1]


LIBRARY.impl("last_rows", _eager_last_rows, "CPU")
torch.library.register_fake("executorch_webgpu::last_rows", _fake_last_rows, lib=LIBRARY)


def last_rows(x: Tensor, q_len: Tensor) -> Tensor:
    """The last real row of each batch row: x [B, S, K] and integers q_len [B], [B, 1] or [1, B] -> [B, K].

    A q_len of 0 gives row 0, of no meaning. Raises ValueError for wrong shapes and dtypes.
    """
    result: Tensor = torch.ops.executorch_webgpu.last_rows(x, q_len)
    return result
