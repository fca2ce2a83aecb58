"""Cases of `executorch_webgpu::group_query_attention`: arguments, and what they give, computed token by token in
float64 by other formulas than the operator's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from executorch_webgpu.llm import group_query_attention  # noqa: F401  (registers the operator)

Array = np.ndarray[Any, Any]
TENSORS = (
    "query", "key", "value", "key_cache", "value_cache", "past", "q_len", "cos", "sin", "q_norm", "k_norm",
    "attn_bias", "sink",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A call. `bias`: shape of attn_bias (None: none); `flat`: heads and elements in one axis; `sinks`: first of a row
    of logits that differ from head to head; `table`: rows of the rotary table, the capacity if None."""

    past: tuple[int, ...]
    q_len: tuple[int, ...] | None = None
    rows: int = 4
    capacity: int = 16
    heads: int = 4
    kv_heads: int = 2
    d: int = 8
    dv: int | None = None
    packed: bool = False
    flat: bool = False
    rot: int = 0
    interleaved: bool = False
    table: int | None = None
    norm: bool = False
    bias: tuple[int, ...] | None = None
    bool_bias: bool = False
    window: int = 0
    softcap: float = 0.0
    sinks: float | None = None
    smooth: bool = False
    scale: float | None = None
    causal: bool = True
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype | None = None
    seed: int = 0

    @property
    def batch(self) -> int:
        return len(self.past)

    @property
    def v_size(self) -> int:
        return self.d if self.dv is None else self.dv

    @property
    def counts(self) -> tuple[int, ...]:
        """New tokens of each batch row."""
        return (self.rows,) * self.batch if self.q_len is None else self.q_len

    def with_(self, **changes: Any) -> Case:
        return replace(self, **changes)


def arguments(case: Case) -> dict[str, Any]:
    """Every argument by name. Cache rows from past on hold large numbers, which must have no effect."""
    generator = torch.Generator().manual_seed(case.seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    batch, rows, dtype = case.batch, case.rows, case.dtype
    counts = (case.heads, case.kv_heads, case.kv_heads)
    parts = [random(batch, rows, n, size) for n, size in zip(counts, (case.d, case.d, case.v_size), strict=True)]
    if case.packed:
        query, key, value = torch.cat([p.flatten(2) for p in parts], 2).to(dtype), None, None
    else:
        query, key, value = ((p.flatten(2) if case.flat else p).to(dtype) for p in parts)
    given: dict[str, Any] = {"query": query, "key": key, "value": value}
    for name, size in (("key_cache", case.d), ("value_cache", case.v_size)):
        cache = random(batch, case.capacity, case.kv_heads, size)
        for row, past in enumerate(case.past):
            cache[row, past:] = 1e4
        given[name] = cache.to(case.cache_dtype or dtype)
    given["past"] = torch.tensor(case.past, dtype=torch.int32)
    given["q_len"] = None if case.q_len is None else torch.tensor(case.q_len, dtype=torch.int32)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    given["cos"] = given["sin"] = None
    if case.rot:
        shape = (case.table or case.capacity, case.rot // 2)
        given |= {name: random(*shape).to(wide) for name in ("cos", "sin")}
    for name in ("q_norm", "k_norm"):
        given[name] = (1 + 0.3 * random(case.d)).to(dtype) if case.norm else None
    bias = None if case.bias is None else random(*case.bias)
    given["attn_bias"] = None if bias is None else (bias > -0.7) if case.bool_bias else bias.to(wide)
    given["sink"] = None if case.sinks is None else (case.sinks + 0.3 * torch.arange(case.heads)).to(wide)
    return given | {
        "num_heads": case.heads,
        "num_kv_heads": case.kv_heads,
        "interleaved": case.interleaved,
        "norm_eps": 1e-5,
        "window": case.window,
        "softcap": case.softcap,
        "smooth_softmax": case.smooth,
        "scale": case.scale,
        "is_causal": case.causal,
    }


def copied(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments with caches of their own."""
    return given | {name: given[name].clone() for name in ("key_cache", "value_cache")}


def call(given: dict[str, Any]) -> torch.Tensor:
    """The eager operator; it changes the caches."""
    names = ("query", "key", "value", "key_cache", "value_cache", "past", "q_len", "num_heads", "num_kv_heads")
    options = {name: value for name, value in given.items() if name not in names}
    result: torch.Tensor = torch.ops.executorch_webgpu.group_query_attention(*(given[n] for n in names), **options)
    return result


class Layer(torch.nn.Module):
    """The operator on inputs query, key and value (unless packed), past and q_len; the rest is the module's own."""

    INPUTS = ("query", "key", "value", "past", "q_len")

    def __init__(self, given: dict[str, Any]) -> None:
        super().__init__()
        self.names = [name for name in self.INPUTS if given[name] is not None]
        self.options = {n: v for n, v in given.items() if not isinstance(v, torch.Tensor)}
        for name, value in given.items():
            if isinstance(value, torch.Tensor) and name not in self.INPUTS:
                self.register_buffer(name, value)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return call(self.options | dict(self.named_buffers()) | dict(zip(self.names, inputs, strict=True)))

    @classmethod
    def inputs(cls, given: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        return tuple(given[name] for name in cls.INPUTS if given[name] is not None)


def exported(module: Layer, given: dict[str, Any], strict: bool = False) -> torch.export.ExportedProgram:
    """The program of a layer, with 1 to 8 rows a call."""
    rows = {1: torch.export.Dim("rows", min=1, max=8)}
    shapes = (tuple(None if name in ("past", "q_len") else rows for name in module.names),)
    return torch.export.export(module, Layer.inputs(given), dynamic_shapes=shapes, strict=strict)


def reference(case: Case, given: dict[str, Any]) -> tuple[Array, Array, Array]:
    """(result [B, S, Hq, Dv], new key cache, new value cache), float64."""
    tensors = {n: None if given[n] is None else given[n].double().numpy() for n in TENSORS}
    shapes = ((case.heads, case.d), (case.kv_heads, case.d), (case.kv_heads, case.v_size))
    if case.packed:
        edges = np.cumsum([n * size for n, size in shapes])[:-1]
        parts = np.split(tensors["query"], edges, axis=2)
    else:
        parts = [tensors[name] for name in ("query", "key", "value")]
    q, k, v = (p.reshape(case.batch, case.rows, *shape) for p, shape in zip(parts, shapes, strict=True))
    keys, values = tensors["key_cache"].copy(), tensors["value_cache"].copy()
    out = np.zeros((case.batch, case.rows, case.heads, case.v_size))
    for b, (past, new) in enumerate(zip(case.past, case.counts, strict=True)):
        for s in range(new):
            for h in range(case.kv_heads):
                vector = turned(case, normed(case, k[b, s, h], tensors["k_norm"]), tensors, past + s)
                keys[b, past + s, h] = rounded(vector, given["key_cache"].dtype)
                values[b, past + s, h] = rounded(v[b, s, h], given["value_cache"].dtype)
        for s in range(new):
            for h in range(case.heads):
                query = turned(case, normed(case, q[b, s, h], tensors["q_norm"]), tensors, past + s)
                out[b, s, h] = attended(case, tensors, keys[b], values[b], query, (b, h, s))
    return out, keys, values


def rounded(x: Array, dtype: torch.dtype) -> Array:
    return np.asarray(torch.from_numpy(x).to(dtype).double().numpy())


def normed(case: Case, x: Array, weight: Array | None) -> Array:
    return x if weight is None else x / np.sqrt(np.mean(x * x) + 1e-5) * weight


def turned(case: Case, x: Array, tensors: dict[str, Any], position: int) -> Array:
    """Each pair as a complex number times cos + i sin."""
    if not case.rot:
        return x
    factor = tensors["cos"][position] + 1j * tensors["sin"][position]
    half = case.rot // 2
    first, second = np.arange(half), half + np.arange(half)
    if case.interleaved:
        first, second = 2 * np.arange(half), 2 * np.arange(half) + 1
    pairs = (x[first] + 1j * x[second]) * factor
    result = x.copy()
    result[first], result[second] = pairs.real, pairs.imag
    return result


def attended(
    case: Case, tensors: dict[str, Any], keys: Array, values: Array, query: Array, at: tuple[int, int, int]
) -> Array:
    """One query vector of (batch row, head, token)."""
    b, h, s = at
    position, end = case.past[b] + s, case.past[b] + case.counts[b]
    first = max(0, position - case.window + 1) if case.window else 0
    seen = np.arange(first, position + 1 if case.causal else end)
    kv = h // (case.heads // case.kv_heads)
    scores = keys[seen, kv] @ query * (case.d**-0.5 if case.scale is None else case.scale)
    if case.softcap:
        scores = case.softcap * np.tanh(scores / case.softcap)
    if case.bias is not None:
        columns = (case.bias[-1],) if case.bias[-1] != 1 else (case.capacity,)
        bias = np.broadcast_to(tensors["attn_bias"], (case.batch, case.heads, case.rows, *columns))[b, h, s, seen]
        scores = np.where(bias > 0, scores, -np.inf) if case.bool_bias else scores + bias
    sink = 0.0 if case.smooth else -np.inf if tensors["sink"] is None else tensors["sink"][h]
    logits = np.append(scores, sink)
    if np.max(logits) == -np.inf:
        return np.zeros(case.v_size)
    weights = np.exp(logits - np.max(logits))
    return np.asarray((weights / weights.sum())[:-1] @ values[seen, kv])


def close(got: Any, want: Array, dtype: torch.dtype = torch.float32, factor: float = 1.0) -> None:
    """Assert that results are right, to the tolerance of the coarsest dtype involved."""
    absolute, relative = {
        torch.float64: (1e-12, 1e-12),
        torch.float32: (1e-4, 1e-3),
        torch.float16: (2e-3, 1e-2),
        torch.bfloat16: (1e-2, 2e-2),
    }[dtype]
    got = got.double().numpy() if isinstance(got, torch.Tensor) else np.asarray(got, np.float64)
    np.testing.assert_allclose(got.reshape(want.shape), want, atol=absolute * factor, rtol=relative * factor)


def permuted(values: Sequence[int] | None, order: Sequence[int]) -> tuple[int, ...] | None:
    return None if values is None else tuple(values[i] for i in order)


FORMS: dict[str, Case] = {
    "plain": Case((0, 5, 12), None),
    "ragged": Case((0, 5, 12), (4, 0, 2)),
    "one row, one token": Case((7,), (1,), rows=1),
    "flat": Case((3, 0), (2, 4), flat=True),
    "packed": Case((3, 0), (2, 4), packed=True),
    "packed, sizes apart": Case((3, 0), (2, 4), packed=True, dv=4, heads=6),
    "half-split rotary": Case((3, 0, 9), (2, 4, 1), rot=8),
    "interleaved rotary": Case((3, 0, 9), (2, 4, 1), rot=8, interleaved=True),
    "partial rotary": Case((3, 0), (4, 3), rot=6, d=16, packed=True),
    "partial interleaved rotary": Case((3, 0), (4, 3), rot=4, interleaved=True, dv=12),
    "short table": Case((3, 0), (4, 3), rot=8, table=7),
    "norms": Case((3, 0), (4, 3), norm=True),
    "norms and rotary": Case((3, 0), (4, 3), norm=True, rot=8, packed=True),
    "bias of a batch": Case((3, 0), (4, 3), bias=(2, 1, 4, 16)),
    "bias of heads": Case((3, 0), (4, 3), bias=(1, 4, 4, 20)),
    "short bias": Case((3, 0), (4, 3), bias=(4, 7)),
    "one column of bias": Case((3, 0), (4, 3), bias=(2, 4, 1, 1)),
    "bool bias": Case((3, 0), (4, 3), bias=(2, 4, 4, 16), bool_bias=True),
    "window": Case((3, 12), (4, 4), window=3, rot=8),
    "softcap": Case((3, 12), (4, 4), softcap=1.5),
    "sink": Case((3, 12), (4, 4), sinks=-1.0),
    "smooth softmax": Case((3, 12), (4, 4), smooth=True),
    "scale": Case((3, 12), (4, 4), scale=0.1),
    "not causal": Case((3, 12), (4, 2), causal=False),
    "not causal, window and sink": Case((3, 12), (4, 2), causal=False, window=4, sinks=0.5),
    "everything": Case(
        (3, 0, 11), (4, 0, 2), packed=True, rot=6, norm=True, bias=(3, 1, 4, 20), window=6, softcap=5.0, sinks=0.0,
        scale=0.5, dv=12, heads=6,
    ),
    "one head": Case((2, 3), (1, 2), heads=1, kv_heads=1, d=3, rows=2, capacity=5),
    "half": Case((3, 0), (4, 3), dtype=torch.float16, rot=8),
    "brain float": Case((3, 0), (4, 3), dtype=torch.bfloat16, rot=8),
    "half cache": Case((3, 0), (4, 3), cache_dtype=torch.float16, rot=8),
    "half cache without rotary": Case((3, 0), (4, 3), cache_dtype=torch.float16),
}  # fmt: skip
