"""The float64 reference of attention, and graphs with one attention node, for the attention tests."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from executorch_webgpu.backend.graph import Arg, Dim, Graph, Ref, Sym
from executorch_webgpu.runtime.gpu.host import bf16_to_f32, f32_to_bf16, to_host, to_user
from executorch_webgpu.runtime.methods.delegate import Delegate
from tests.harness import GraphBuilder, device

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Case:
    """One attention: sizes, what limits the keys, options. Tensors are made by `arrays`."""

    heads: int
    kv_heads: int
    d: int
    rows: int
    capacity: int
    pos: int = 0
    batch: int = 1
    dv: int | None = None
    kv_limit: str = "causal"
    q_layout: str = "bshd"
    kv_layout: str = "bshd"
    out_layout: str = "bshd"
    q_dtype: str = "f32"
    kv_dtype: str = "f32"
    out_dtype: str = "f32"
    scale: float | None = None
    softcap: float = 0.0
    window: int = 0
    mask: str | None = None  # dtype
    mask_shape: tuple[int, ...] | None = None  # default: [rows, capacity]
    sink: float | None = None
    route: str = "auto"
    variant: str = ""  # of a route, by the attention nodes' argument of that name

    @property
    def value_d(self) -> int:
        return self.d if self.dv is None else self.dv

    def with_(self, **changes: Any) -> Case:
        return replace(self, **changes)


def laid_out(array: Array, layout: str) -> Array:
    """[batch, heads, rows, d] in the given layout."""
    return np.ascontiguousarray(array.transpose(0, 2, 1, 3) if layout == "bshd" else array)


def stored(array: Array, dtype: str) -> Array:
    """Values as a dtype holds them, in float32 (float16 as itself)."""
    if dtype == "f16":
        return array.astype(np.float16)
    return bf16_to_f32(f32_to_bf16(array)) if dtype == "bf16" else array.astype(np.float32)


@functools.lru_cache(maxsize=64)
def _random(shape: tuple[int, ...], seed: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def arrays(case: Case, seed: int = 0) -> dict[str, Array]:
    """query, key, value as [batch, heads, rows, d], with values that their dtypes hold; attn_mask and sink if any."""
    q = stored(_random((case.batch, case.heads, case.rows, case.d), seed), case.q_dtype)
    k = stored(_random((case.batch, case.kv_heads, case.capacity, case.d), seed + 1), case.kv_dtype)
    v = stored(_random((case.batch, case.kv_heads, case.capacity, case.value_d), seed + 2), case.kv_dtype)
    made = {"query": q, "key": k, "value": v}
    if case.mask is not None:
        shape = case.mask_shape or (case.rows, case.capacity)
        noise = _random(shape, seed + 3)
        made["attn_mask"] = noise > -0.5 if case.mask == "bool" else stored(noise, case.mask)
    if case.sink is not None:
        made["sink"] = np.full(case.heads, case.sink, np.float32)
    return made


def visible(case: Case, pos: int) -> Array:
    """bool [rows, capacity]: the keys in the range of each row, masks aside."""
    i = pos + np.arange(case.rows)[:, None]
    j = np.arange(case.capacity)[None, :]
    seen = np.ones((case.rows, case.capacity), bool)
    if case.kv_limit == "causal":
        seen &= j <= i
    elif case.kv_limit == "prefix":
        seen &= j < pos + case.rows
    if case.window:
        seen &= j > i - case.window
    return seen


def reference(case: Case, tensors: dict[str, Array], pos: int | None = None) -> Array:
    """float64 [batch, heads, rows, dv]. Hidden keys are left out altogether; a row without keys is zero."""
    pos = case.pos if pos is None else pos
    seen = visible(case, pos)
    used = np.flatnonzero(seen.any(0))
    stop = int(used[-1]) + 1 if used.size else 0
    seen = seen[:, :stop]
    mask = tensors.get("attn_mask")
    if mask is not None:
        shape = (case.batch, case.heads, case.rows, case.capacity)
        mask = mask if mask.shape[-1] == 1 else mask[..., : case.capacity]
        mask = np.broadcast_to(mask, shape)[..., :stop]
    scale = case.d**-0.5 if case.scale is None else case.scale
    out = np.zeros((case.batch, case.heads, case.rows, case.value_d))
    for b in range(case.batch):
        for h in range(case.heads):
            g = h // (case.heads // case.kv_heads)
            k = tensors["key"][b % len(tensors["key"]), g, :stop].astype(np.float64)
            v = tensors["value"][b % len(tensors["value"]), g, :stop].astype(np.float64)
            with np.errstate(invalid="ignore", over="ignore"):
                x = tensors["query"][b, h].astype(np.float64) @ k.T * scale
                if case.softcap:
                    x = case.softcap * np.tanh(x / case.softcap)
                hidden: Array = ~seen
                if mask is not None and mask.dtype == np.bool_:
                    hidden = hidden | ~mask[b, h]
                elif mask is not None:
                    x = x + mask[b, h].astype(np.float64)
                    hidden = hidden | (mask[b, h] == -np.inf)
                x = np.where(hidden, -np.inf, x)
                logit = float(tensors["sink"][h]) if "sink" in tensors else -np.inf
                top: Array = np.maximum(x.max(-1, initial=-np.inf, keepdims=True), logit)
                p = np.where(hidden, 0.0, np.exp(x - np.where(top == -np.inf, 0.0, top)))
                total = p.sum(-1) + np.exp(logit - np.where(top == -np.inf, 0.0, top))[:, 0]
                total = np.where(total == 0, 1.0, total)
                unread: Array = np.all(hidden, axis=0)
                out[b, h] = p @ np.where(unread[:, None], 0.0, v) / total[:, None]
    return out


def _upload(array: Array, dtype: str) -> tuple[str, Array]:
    return ("bf16", f32_to_bf16(array)) if dtype == "bf16" else to_host(array)


class Attention:
    """A loaded graph with one `webgpu.attention`; q, k, v, mask, sink and the position are inputs.

    With `dynamic` the number of query rows is a symbol, so that one delegate serves cases that differ in it.
    """

    def __init__(self, case: Case, on: str, dynamic: bool = False) -> None:
        self.case = case
        b = GraphBuilder()
        s: Dim = Sym("input_dim", (0, 1 if case.q_layout == "bshd" else 2)) if dynamic else case.rows

        def shape(batch: int, heads: int, rows: Dim, d: int, layout: str) -> tuple[Dim, ...]:
            return (batch, rows, heads, d) if layout == "bshd" else (batch, heads, rows, d)

        q = b.input(case.q_dtype, shape(case.batch, case.heads, s, case.d, case.q_layout))
        k = b.input(case.kv_dtype, shape(case.batch, case.kv_heads, case.capacity, case.d, case.kv_layout))
        v = b.input(case.kv_dtype, shape(case.batch, case.kv_heads, case.capacity, case.value_d, case.kv_layout))
        b.input("i64", (1,))
        args: dict[str, Arg] = {
            "query": q, "key": k, "value": v, "q_layout": case.q_layout, "kv_layout": case.kv_layout,
            "out_layout": case.out_layout, "attn_mask": None, "start_pos": Sym("scalar", (3, 0)),
            "kv_limit": case.kv_limit, "scale": case.scale,
            "softcap": case.softcap, "window": case.window, "sink": None, "route": case.route,
        }  # fmt: skip
        if case.variant:
            args["variant"] = case.variant
        if case.mask is not None:
            args["attn_mask"] = b.input(case.mask, case.mask_shape or (s, case.capacity))
        if case.sink is not None:
            args["sink"] = b.input("f32", (case.heads,))
        out: Ref = b.node(
            "webgpu.attention", args, (case.out_dtype, shape(case.batch, case.heads, s, case.value_d, case.out_layout))
        )
        self.graph: Graph = b.graph(out)
        self.device = device(on)
        self.delegate: Delegate = b.load(self.graph, self.device)

    def inputs(self, tensors: dict[str, Array], pos: int) -> list[tuple[str, Array]]:
        case = self.case
        given = [_upload(laid_out(tensors["query"], case.q_layout), case.q_dtype)]
        given += [_upload(laid_out(tensors[name], case.kv_layout), case.kv_dtype) for name in ("key", "value")]
        given.append(("i64", np.array([pos], np.int64)))
        if case.mask is not None:
            given.append(_upload(tensors["attn_mask"], case.mask))
        if case.sink is not None:
            given.append(to_host(tensors["sink"]))
        return given

    def __call__(self, tensors: dict[str, Array], pos: int) -> Array:
        """[batch, heads, rows, dv]"""
        [(dtype, array)] = self.delegate.execute(self.inputs(tensors, pos))
        assert not isinstance(array, int)
        result: Array = to_user(dtype, array, False)
        return result.transpose(0, 2, 1, 3) if self.case.out_layout == "bshd" else result

    def close(self) -> None:
        self.delegate.close()


def attention(case: Case, on: str, tensors: dict[str, Array] | None = None) -> Array:
    """One attention on a test device: [batch, heads, rows, dv]."""
    loaded = Attention(case, on)
    try:
        return loaded(arrays(case) if tensors is None else tensors, case.pos)
    finally:
        loaded.close()


def assert_close(actual: Array, expected: Array, absolute: float = 1e-4, relative: float = 1e-3) -> None:
    """|difference| at most `absolute`, or `relative` of the expected value; NaN and infinities where expected."""
    assert actual.shape == expected.shape
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
    finite = np.isfinite(expected)
    difference = np.abs(actual[finite].astype(np.float64) - expected[finite])
    worst = float((difference / np.maximum(absolute, relative * np.abs(expected[finite]))).max(initial=0.0))
    assert worst <= 1, f"{worst:.1f} times the tolerance; largest difference {difference.max(initial=0.0):.2e}"


def check(case: Case, on: str, absolute: float = 1e-4, relative: float = 1e-3) -> None:
    """The kernel against the reference on random tensors."""
    tensors = arrays(case)
    assert_close(attention(case, on, tensors), reference(case, tensors), absolute, relative)
