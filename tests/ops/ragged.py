"""A decoder layer's cache writes and attention with lengths per batch row, and its float64 reference, for the ragged
tests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from executorch_webgpu.backend.graph import Arg, Dim, Graph, Ref, Sym
from executorch_webgpu.ops.base import check_node
from executorch_webgpu.runtime.gpu.host import f32_to_bf16, to_host, to_user
from executorch_webgpu.runtime.gpu.plan import Launch
from tests.harness import GraphBuilder, device
from tests.ops.attention_reference import Case, assert_close
from tests.ops.attention_reference import reference as attention_reference
from tests.ops.attention_reference import stored as held
from tests.ops.copy_cases import poison
from tests.ops.test_rope import reference as rotated

Array = np.ndarray[Any, Any]
Lengths = Sequence[int]


@dataclass(frozen=True)
class Layer:
    """Sizes and options. S is a symbol.

    Attributes:
        rotary: "fused" (`webgpu.rope_cache`), "apart" (`webgpu.rope` and `webgpu.update_cache`), or None (the latter).
        table_rows: of the rotary table; the capacity where None.
        guards: rows of NaN behind the rotary table's.
        counted: past is state, which each step advances by q_len on the GPU.
        given: the caches are inputs and results, not state.
        shape: of past and q_len: "b", "b1" or "1b".
    """

    batch: int = 3
    heads: int = 4
    kv_heads: int = 2
    d: int = 16
    dv: int | None = None
    capacity: int = 40
    rotary: str | None = "fused"
    rot: int | None = None
    interleaved: bool = False
    layout: str = "bshd"
    cache: str = "f32"
    window: int = 0
    softcap: float = 0.0
    sink: float | None = None
    kv_limit: str = "causal"
    route: str = "auto"
    table_rows: int | None = None
    guards: int = 0
    counted: bool = False
    given: bool = False
    lengths: str = "i32"
    shape: str = "b"
    all_new: bool = False  # q_len is None

    @property
    def value_d(self) -> int:
        return self.d if self.dv is None else self.dv

    @property
    def turned(self) -> int:
        return self.d if self.rot is None else self.rot


class Program:
    """The layer on a test device, with a mirror of its caches in numpy.

    Inputs: query, key, value, past (unless counted), q_len, caches (if given).
    """

    def __init__(self, layer: Layer, on: str, start: Lengths = ()) -> None:
        """`start`: what is in the cache of each batch row; all other cache rows are NaN."""
        self.layer, self.device = layer, device(on)
        self.start = tuple(start) or (0,) * layer.batch
        rng = np.random.default_rng(11)
        kv = (layer.batch, layer.capacity, layer.kv_heads)
        self.caches = {name: np.full((*kv, d), np.nan) for name, d in (("k", layer.d), ("v", layer.value_d))}
        for cache in self.caches.values():
            for b, count in enumerate(self.start):
                cache[b, :count] = held(rng.standard_normal((count, *cache.shape[2:])), layer.cache)
        rows = layer.capacity if layer.table_rows is None else layer.table_rows
        self.cos, self.sin = (np.float32(rng.standard_normal((rows + layer.guards, layer.turned // 2))) for _ in "cs")
        for table in (self.cos, self.sin):
            table[rows:] = np.nan
        self.builder, self.graph = self._build()
        for node in self.graph.nodes:
            assert check_node(self.graph, node) is None
        self.delegate = self.builder.load(self.graph, self.device)

    def _build(self) -> tuple[GraphBuilder, Graph]:
        layer, b = self.layer, GraphBuilder()
        s: Dim = Sym("input_dim", (2, 1))
        count = {"b": (layer.batch,), "b1": (layer.batch, 1), "1b": (1, layer.batch)}[layer.shape]
        q_shape, k_shape = (self._shape(s, h) for h in (layer.heads, layer.kv_heads))
        query, key = b.input("f32", q_shape), b.input("f32", k_shape)
        value = b.input("f32", (layer.batch, s, layer.kv_heads, layer.value_d))
        host = np.array(self.start, np.int64 if layer.lengths == "i64" else np.int32).reshape(count)
        past = b.stored("mutable", layer.lengths, host, "past") if layer.counted else b.input(layer.lengths, count)
        q_len = b.input(layer.lengths, count)
        shapes = {name: cache.shape for name, cache in self.caches.items()}
        if layer.given:
            old = {name: b.input(layer.cache, shape) for name, shape in shapes.items()}
        else:
            old = {n: b.stored("mutable", layer.cache, host_of(a, layer.cache), n) for n, a in self.caches.items()}
        lengths = b.node(
            "webgpu.lengths",
            {"past": past, "q_len": None if layer.all_new else q_len, "rows": s, "capacity": layer.capacity},
            ("i32", (layer.batch, 4)),
        )
        mutations: list[tuple[Ref, Ref]] = []
        if layer.counted:
            advanced = b.node("aten.add.Tensor", {"self": past, "other": q_len, "alpha": 1}, (layer.lengths, count))
            b.node("aten.copy.default", {"self": past, "src": advanced}, (layer.lengths, count), alias=[past])
        alias = [] if layer.given else [old["k"], old["v"]]
        query, keys, values, sizes = self._written(b, (query, key, value), old, lengths, alias)
        attend: dict[str, Arg] = {
            "query": query, "key": keys, "value": values, "q_layout": layer.layout, "kv_layout": "bshd",
            "out_layout": "bshd", "start_pos": 0, "kv_limit": layer.kv_limit, "window": layer.window,
            "softcap": layer.softcap, "sink": None, "lengths": lengths, "sizes": sizes, "route": layer.route,
        }  # fmt: skip
        if layer.sink is not None:
            self.logits = np.float32(layer.sink + np.arange(layer.heads) / 4)
            attend["sink"] = b.stored("constant", "f32", self.logits, "sink")
        out = b.node("webgpu.attention", attend, ("f32", (layer.batch, s, layer.heads, layer.value_d)))
        results = [out, query]
        if layer.given:
            results += [keys, values]
        else:
            mutations += [(old["k"], keys), (old["v"], values)]
        return b, b.graph(*results, mutations=tuple((x.value, y.value) for x, y in mutations))

    def _written(
        self, b: GraphBuilder, qkv: tuple[Ref, Ref, Ref], old: dict[str, Ref], lengths: Ref, alias: list[Ref]
    ) -> tuple[Ref, Ref, Ref, Ref | None]:
        layer, (query, key, value) = self.layer, qkv
        k_out, v_out = ((layer.cache, self.caches[name].shape) for name in "kv")
        if value_dtype := layer.cache if layer.cache != "f32" else None:  # the write wants the cache's dtype
            value = b.node("aten._to_copy.default", {"self": value, "dtype": value_dtype}, (value_dtype, self._v()))
        table: dict[str, Arg] = {}
        if layer.rotary is not None:
            cos, sin = (b.stored("constant", "f32", x, name) for x, name in ((self.cos, "cos"), (self.sin, "sin")))
            table = {"cos": cos, "sin": sin, "rot": layer.turned, "interleaved": layer.interleaved}
            table |= {"layout": layer.layout, "lengths": lengths, "start": 0}
        shapes = [b.values[x.value].shape for x in (query, key)]
        if layer.rotary == "fused":
            args: dict[str, Arg] = {
                "query": query, "key": key, "value": value, "key_cache": old["k"], "value_cache": old["v"], **table,
                "start_pos": 0, "kv_limit": layer.kv_limit, "window": layer.window,
            }  # fmt: skip
            outs = (("f32", shapes[0]), k_out, v_out, ("i32", (8,)))
            made: tuple[Ref, Ref, Ref, Ref] = b.node("webgpu.rope_cache", args, *outs, alias=[None, *alias])
            return made
        if layer.rotary == "apart":
            query, key = (
                b.node("webgpu.rope", {"input": x, **table}, ("f32", shape))
                for x, shape in zip((query, key), shapes, strict=True)
            )
        if value_dtype:
            key = b.node("aten._to_copy.default", {"self": key, "dtype": value_dtype}, (value_dtype, shapes[1]))
        keys, values = (
            b.node(
                "webgpu.update_cache",
                {"value": x, "cache": old[name], "lengths": lengths},
                out,
                alias=alias[i : i + 1],
            )
            for i, (name, x, out) in enumerate((("k", key, k_out), ("v", value, v_out)))
        )
        return query, keys, values, None

    def _v(self) -> tuple[Dim, ...]:
        return (self.layer.batch, Sym("input_dim", (2, 1)), self.layer.kv_heads, self.layer.value_d)

    def _shape(self, rows: Any, heads: int) -> tuple[Any, ...]:
        layer = self.layer
        return (layer.batch, rows, heads, layer.d) if layer.layout == "bshd" else (layer.batch, heads, rows, layer.d)

    # -- steps

    def tokens(self, rows: int, seed: int) -> dict[str, Array]:
        """query, key and value as [B, S, heads, head size], with numbers that a cache holds."""
        layer, rng = self.layer, np.random.default_rng(seed)
        sizes = {"query": (layer.heads, layer.d), "key": (layer.kv_heads, layer.d)}
        sizes["value"] = (layer.kv_heads, layer.value_d)
        return {n: held(rng.standard_normal((layer.batch, rows, *size)), layer.cache) for n, size in sizes.items()}

    def inputs(self, given: dict[str, Array], past: Lengths, new: Lengths) -> list[tuple[str, Array]]:
        layer = self.layer
        heads_first = layer.layout == "bhsd"
        arrays = [x.transpose(0, 2, 1, 3) if heads_first else x for x in (given["query"], given["key"])]
        feeds = [to_host(np.ascontiguousarray(np.float32(x))) for x in (*arrays, given["value"])]
        count = {"b": (layer.batch,), "b1": (layer.batch, 1), "1b": (1, layer.batch)}[layer.shape]
        kind = np.int64 if layer.lengths == "i64" else np.int32
        numbers = [x for x, there in ((past, not layer.counted), (new, True)) if there]
        feeds += [(layer.lengths, np.array(x, kind).reshape(count)) for x in numbers]
        if layer.given:
            feeds += [(layer.cache, host_of(self.caches[name], layer.cache)) for name in "kv"]
        return feeds

    def __call__(self, given: dict[str, Array], past: Lengths, new: Lengths, by: Any = None) -> list[Array]:
        """The attention's result [B, S, heads, dv], the rotated query and, if given, the new caches.

        `by`: a `Replay` of this program, in the place of its delegate.
        """
        poison(self.delegate)
        made = (by or self.delegate).execute(self.inputs(given, past, new))
        return [np.asarray(to_user(dtype, np.asarray(array), False)) for dtype, array in made]

    def step(self, given: dict[str, Array], past: Lengths, new: Lengths, by: Any = None) -> Array:
        """A call whose result, padding and caches are checked. Returns the attention's result."""
        before = {name: self.held(name) for name in "kv"}
        out, query, *caches = self(given, past, new, by)
        expected = self.expected(given, past, new)
        tolerance = TOLERANCE[self.layer.cache]
        assert_close(out, expected, **tolerance)
        after = dict(zip("kv", caches, strict=True)) if caches else {name: self.held(name) for name in "kv"}
        for b, count in enumerate(new):
            np.testing.assert_array_equal(out[b, count:], 0)
            written = slice(past[b], past[b] + count)
            for name in "kv":
                outside = np.delete(np.arange(self.layer.capacity), np.arange(self.layer.capacity)[written])
                np.testing.assert_array_equal(after[name][b, outside], before[name][b, outside])
                assert_close(after[name][b, written], self.caches[name][b, written], **tolerance)
        assert np.isfinite(query).all()
        return out

    def expected(self, given: dict[str, Array], past: Lengths, new: Lengths) -> Array:
        """float64 [B, S, heads, dv], each batch row by itself; the mirror of the caches is written."""
        layer = self.layer
        rows = given["query"].shape[1]
        out = np.zeros((layer.batch, rows, layer.heads, layer.value_d))
        for b, (first, count) in enumerate(zip(past, new, strict=True)):
            if not count:
                continue
            at = slice(first, first + count)
            q, k = (given[name][b : b + 1, :count].astype(np.float64) for name in ("query", "key"))
            if layer.rotary is not None:
                q, k = (rotated(x, self.cos[at], self.sin[at], layer.turned, "bshd", layer.interleaved) for x in (q, k))
            self.caches["k"][b, at] = held(k[0], layer.cache)
            self.caches["v"][b, at] = held(given["value"][b, :count], layer.cache)
            limit = "prefix" if layer.kv_limit == "all" else layer.kv_limit
            case = Case(
                layer.heads, layer.kv_heads, layer.d, count, layer.capacity, first, dv=layer.value_d, kv_limit=limit,
                softcap=layer.softcap, window=layer.window,
            )  # fmt: skip
            tensors = {"query": q.transpose(0, 2, 1, 3)}
            tensors |= {n: self.caches[n[0]][b : b + 1].transpose(0, 2, 1, 3) for n in ("key", "value")}
            if layer.sink is not None:
                tensors["sink"] = self.logits
            out[b, :count] = attention_reference(case, tensors)[0].transpose(1, 0, 2)
        return out

    def held(self, name: str) -> Array:
        """What the GPU holds of a cache [B, C, H, D] (before the call, if the caches are inputs)."""
        if self.layer.given:
            return self.caches[name].copy()
        raw = bytes(self.device.gpu.queue.read_buffer(self.delegate.state.buffers()[name]))
        kind = np.float16 if self.device.limits.wgsl_type(self.layer.cache) == "f16" else np.float32
        shape = self.caches[name].shape
        return np.frombuffer(raw, kind)[: int(np.prod(shape))].reshape(shape).astype(np.float64)

    def launches(self, *kernels: str) -> list[Launch]:
        """The launches of some kernels in the plan that was used last."""
        *_, plan = self.delegate._plans.values()
        return [launch for launch in plan.launches if launch.kernel in kernels]

    def close(self) -> None:
        self.delegate.close()
        self.delegate.state.close()


TOLERANCE = {
    "f32": {"absolute": 1e-4, "relative": 1e-3},
    "f16": {"absolute": 2e-3, "relative": 1e-2},
    "bf16": {"absolute": 2e-2, "relative": 2e-2},  # the device rounds no rotated key to bfloat16
}


def host_of(array: Array, dtype: str) -> Array:
    """The host form of numbers that `dtype` holds."""
    single = array.astype(np.float32)
    return f32_to_bf16(single) if dtype == "bf16" else single.astype(np.float16) if dtype == "f16" else single


@contextmanager
def program(layer: Layer, on: str, start: Lengths = (), **changes: Any) -> Iterator[Program]:
    made = Program(replace(layer, **changes), on, start)
    try:
        yield made
    finally:
        made.close()
