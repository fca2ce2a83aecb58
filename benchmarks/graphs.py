"""Graphs at records level with tensors whose random content is made on the GPU: attention layers, a decoder, a product.

No export and no file is needed, so that sizes of real models can be timed where no `.pte` of that size is at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from executorch_webgpu.backend.graph import Arg, Dim, Graph, Node, Ref, Sym, SymbolRange, Value
from executorch_webgpu.backend.passes import Pass
from executorch_webgpu.backend.passes.activations import keep_codes
from executorch_webgpu.backend.passes.cleanup import merge_equal_nodes, remove_unused
from executorch_webgpu.backend.passes.project import fuse_projections
from executorch_webgpu.backend.passes.project_cache import fuse_project_cache
from executorch_webgpu.backend.passes.rope_cache import fuse_rope_cache
from executorch_webgpu.backend.passes.storage import assign_storage
from executorch_webgpu.ops import activations
from executorch_webgpu.ops.base import Dispatch, check_node
from executorch_webgpu.ops.packed import Format
from executorch_webgpu.runtime.errors import MissingDataError, UnsupportedError
from executorch_webgpu.runtime.gpu.buffers import State
from executorch_webgpu.runtime.gpu.device import Device
from executorch_webgpu.runtime.gpu.plan import Plan
from executorch_webgpu.runtime.gpu.random_weights import RandomWeights
from executorch_webgpu.runtime.gpu.upload import static_numel
from executorch_webgpu.runtime.methods.delegate import Delegate

from .kernels import RandomFill

HostArray = np.ndarray[Any, Any]
Inputs = Sequence[tuple[str, HostArray]]
Range = tuple[float, float]

BITS = {"4bit": 4, "8bit": 8, "8da4w": 4, "8da8w": 8}
"""Of packed weights, by name."""
QUERIES: Range = (-6.0, 6.0)
KEYS: Range = (-1.0, 1.0)
VALUES: Range = (-0.5, 1.5)
"""Scores of the first layer have a standard deviation of 2, so that some keys count much more than others. Values have
a mean of 1/2, so that a chain of layers neither dies out nor grows."""


class Builder:
    """Builds a graph node by node; stored values are named and have a range that random values are drawn from."""

    def __init__(self) -> None:
        self.values: list[Value] = []
        self.nodes: list[Node] = []
        self.inputs: list[int] = []
        self.ranges: dict[str, Range] = {}
        self.mutations: list[tuple[int, int]] = []

    def _add(self, value: Value) -> Ref:
        self.values.append(value)
        return Ref(len(self.values) - 1)

    def input(self, dtype: str, shape: Sequence[Dim], name: str) -> Ref:
        ref = self._add(Value("input", dtype, tuple(shape), name))
        self.inputs.append(ref.value)
        return ref

    def constant(self, dtype: str, shape: Sequence[int], name: str, between: Range) -> Ref:
        """A weight."""
        self.ranges[name] = between
        return self._add(Value("constant", dtype, tuple(shape), name, data=name))

    def mutable(self, dtype: str, shape: Sequence[int], name: str, between: Range) -> Ref:
        """A buffer kept between calls."""
        self.ranges[name] = between
        return self._add(Value("mutable", dtype, tuple(shape), name))

    def node(self, op: str, args: Mapping[str, Arg], dtype: str, shape: Sequence[Dim]) -> Ref:
        """Append a node with one output."""
        out = self._add(Value("temp", dtype, tuple(shape), op))
        self.nodes.append(Node(op, dict(args), (out.value,), f"{op}_{len(self.nodes)}"))
        return out

    def graph(self, *outputs: Ref, symbols: Sequence[SymbolRange] = (), passes: Sequence[Pass] = ()) -> Graph:
        """The graph after these passes, checked as the partitioner checks it, with storage assigned.

        Raises:
            UnsupportedError: an operator refuses its arguments; says why.
        """
        graph = Graph(
            tuple(self.values), tuple(self.nodes), tuple(self.inputs), outputs, tuple(self.mutations), tuple(symbols)
        )
        for apply in passes:
            graph = remove_unused(apply(graph))
        for node in graph.nodes:
            reason = check_node(graph, node)
            if reason is not None:
                raise UnsupportedError(f"{node.name}: {reason}")
        return assign_storage(graph)


def _between(ranges: Mapping[str, Range]) -> Callable[[Value], Range]:
    """The range of a constant; a part of one that was too large for the device has its name before a bracket."""
    return lambda value: ranges[value.name.partition("[")[0]]


def _no_data(key: str) -> bytes:
    raise MissingDataError(key)


def _randomize(
    device: Device, fill: RandomFill, buffer: Any, value: Value, ranges: Mapping[str, Range], seed: int
) -> None:
    low, high = ranges[value.name]
    fill(buffer, device.limits.wgsl_type(value.dtype), low, high, seed)


class Loaded:
    """A graph on a device, with random weights and state."""

    def __init__(self, device: Device, builder: Builder, graph: Graph) -> None:
        self.device = device
        self.graph = graph
        fill = RandomFill(device)
        self.weights = RandomWeights(device, _between(builder.ranges))
        self.state = State(device)
        self.delegate = Delegate(graph, device, _no_data, self.weights, self.state)
        values = {value.name: value for value in graph.values if value.kind == "mutable" and value.alias is None}
        for seed, (name, buffer) in enumerate(self.state.buffers().items()):
            _randomize(device, fill, buffer, values[name], builder.ranges, 1_000_000 + seed)

    def ready(self, inputs: Inputs) -> Plan:
        """The plan for these inputs, with inputs and live scalars written: what `encode` then runs any number of
        times."""
        return ready(self.delegate, inputs)

    def dispatches(self, inputs: Inputs) -> list[list[Dispatch]]:
        """What each node became for these inputs."""
        env = self.delegate.bind(inputs)
        return [list(node.dispatches) for node in self.delegate.planner.lowered(env.__getitem__)]

    def stored(self, name: str) -> HostArray:
        """Content of a mutable value in its shape, as the device stores it (float32 or float16): a readback."""
        value = next(v for v in self.graph.values if v.name == name)
        kind = {"f32": np.float32, "f16": np.float16}[self.device.limits.wgsl_type(value.dtype)]
        shape = tuple(int(size) for size in value.shape if isinstance(size, int))
        raw = self.device.gpu.queue.read_buffer(self.state.buffers()[name])
        return np.frombuffer(raw, kind)[: static_numel(value)].reshape(shape)

    def close(self) -> None:
        """Free all GPU memory of the graph."""
        self.delegate.close()
        self.weights.close()
        self.state.close()


def ready(delegate: Delegate, inputs: Inputs) -> Plan:
    """One step of a delegate, for its uploads; then the plan it used, which can be encoded again as it is."""
    delegate.execute(inputs)
    return delegate.plan(delegate.bind(inputs))


def encode(compute: Any, plan: Plan) -> None:
    """All dispatches of a plan into a compute pass."""
    plan.records.encode(compute)


def splits_of(dispatches: Sequence[Dispatch]) -> int | None:
    """Into how many parts the keys are split, as far as the dispatches say."""
    for dispatch in dispatches:
        for numbers in (dispatch.params, dispatch.consts, dispatch.overrides):
            for name, value in numbers.items():
                if name.lower() in ("splits", "max_splits") and isinstance(value, int):
                    return int(value)
    return None


# -- attention


@dataclass(frozen=True)
class AttentionShape:
    """One attention layer: `rows` queries of each sequence after `past` rows of a cache with `capacity` rows."""

    batch: int
    heads: int
    kv_heads: int
    head_size: int
    rows: int
    past: int
    dtype: str = "f16"
    capacity: int = 0

    @property
    def keys(self) -> int:
        """Rows of the caches that hold something."""
        return self.past + self.rows

    @property
    def cache_rows(self) -> int:
        return self.capacity or self.keys

    @property
    def cache_shape(self) -> tuple[int, int, int, int]:
        return (self.batch, self.cache_rows, self.kv_heads, self.head_size)

    @property
    def query_shape(self) -> tuple[int, int, int, int]:
        return (self.batch, self.rows, self.heads, self.head_size)

    @property
    def flops(self) -> int:
        """Both products, of the keys that each row sees: 4 D a query and key."""
        pairs = self.rows * self.past + self.rows * (self.rows + 1) // 2
        return 4 * self.batch * self.heads * self.head_size * pairs

    def cache_bytes(self, item: int) -> int:
        """Of the valid rows of both caches, at `item` bytes an element."""
        return 2 * self.batch * self.keys * self.kv_heads * self.head_size * item

    def bytes(self, item: int) -> int:
        """What must be moved at least: caches once, queries and results (f32) once."""
        return self.cache_bytes(item) + 2 * self.batch * self.rows * self.heads * self.head_size * 4

    def record(self) -> dict[str, int]:
        """For the `shape` field."""
        return {
            "batch": self.batch, "heads": self.heads, "kv_heads": self.kv_heads, "head_size": self.head_size,
            "rows": self.rows, "past": self.past, "capacity": self.cache_rows,
        }  # fmt: skip


def attention_layers(
    device: Device, shape: AttentionShape, layers: int, extra: Mapping[str, Arg] | None = None, write: bool = False
) -> tuple[Loaded, Inputs]:
    """A chain of `layers` causal attention layers: the result of each is the next one's query; each has own caches.

    Args:
        extra: further arguments of the `webgpu.attention` nodes (`route`, `variant`).
        write: also write `rows` new rows into both caches of each layer in front of its attention.
    Returns:
        The loaded graph and its inputs (start_pos i64[1], equal to `past`). Its mutable values are `query` f32,
        `k0`, `v0`, `k1`, ... of the shape's dtype; its output is the last layer's result f32.
    Raises:
        UnsupportedError: the operator refuses the arguments.
    """
    b = Builder()
    b.input("i64", (1,), "start_pos")
    query = b.mutable("f32", shape.query_shape, "query", QUERIES)
    new = shape.query_shape[:2] + shape.cache_shape[2:]
    rows = [b.mutable(shape.dtype, new, name, between) for name, between in (("new_k", KEYS), ("new_v", VALUES))]
    start = Sym("scalar", (0, 0))
    for layer in range(layers):
        caches = [
            b.mutable(shape.dtype, shape.cache_shape, f"{name}{layer}", between)
            for name, between in (("k", KEYS), ("v", VALUES))
        ]
        if write:
            for number, (value, cache) in enumerate(zip(rows, list(caches), strict=True)):
                updated = b.node(
                    "llama.update_cache.default", {"value": value, "cache": cache, "start_pos": start},
                    shape.dtype, shape.cache_shape,
                )  # fmt: skip
                b.mutations.append((cache.value, updated.value))
                caches[number] = updated
        args = {**_attention_args(query, caches[0], caches[1], start), **(extra or {})}
        query = b.node("webgpu.attention", args, "f32", shape.query_shape)
    return Loaded(device, b, b.graph(query)), [("i64", np.array([shape.past], np.int64))]


def _attention_args(query: Ref, key: Ref, value: Ref, start: Dim) -> dict[str, Arg]:
    return {
        "query": query, "key": key, "value": value, "q_layout": "bshd", "kv_layout": "bshd", "out_layout": "bshd",
        "attn_mask": None, "start_pos": start, "kv_limit": "causal", "scale": None, "softcap": 0.0, "window": 0,
        "sink": None, "check_range": True,
    }  # fmt: skip


# -- one matrix product


def quantized(b: Builder, x: Ref, shape: tuple[int, ...], norm: Ref | None = None) -> Ref:
    """x, or its norm with a weight, as integers of 8 bits."""
    args: dict[str, Arg] = {
        "input": x, "quant_min": -128, "quant_max": 127, "eps": 1e-6, "norm_weight": norm,
        "norm_eps": None if norm is None else 1e-5,
    }  # fmt: skip
    return b.node(activations.NAME, args, activations.CODES, (*shape[:-1], activations.words(shape[-1])))


def product(device: Device, size: int, dtype: str = "f32") -> Loaded:
    """A [size, size] matrix product, `aten.mm.default`."""
    b = Builder()
    x, y = (b.constant(dtype, (size, size), name, (-1.0, 1.0)) for name in "xy")
    out = b.node("aten.mm.default", {"self": x, "mat2": y}, dtype, (size, size))
    return Loaded(device, b, b.graph(out))


# -- a decoder


@dataclass(frozen=True)
class DecoderSizes:
    """A Llama-shaped decoder. The defaults are the sizes of Llama 3.2 1B."""

    layers: int = 16
    dim: int = 2048
    heads: int = 32
    kv_heads: int = 8
    head_size: int = 64
    ffn: int = 8192
    vocabulary: int = 128256
    dtype: str = "f16"
    capacity: int = 2048
    weights: str = ""
    """`4bit` or `8bit`: matrices and the table of the embedding are packed in groups of 32, with scales in `dtype`.
    `8da4w` or `8da8w`: so, and the input of every layer is rounded to 8 bits."""
    codes: int = 1
    """0: what is rounded to 8 bits is multiplied as floats, without the pass that keeps its integers."""

    def record(self) -> dict[str, int]:
        """For the `shape` field."""
        return {name: value for name, value in vars(self).items() if isinstance(value, int)}

    def packed(self, columns: int) -> Format | None:
        """The format of a packed matrix."""
        if not self.weights:
            return None
        if columns % 32:
            raise UnsupportedError(f"packed weights need sizes that are multiples of 32, got {columns}")
        return Format(columns, BITS[self.weights], 32, self.dtype, zeros=False)


def decoder(device: Device, sizes: DecoderSizes) -> Loaded:
    """A decoder of the records that an export of Llama becomes, with random weights, after the passes that apply to it.

    Inputs: tokens i64[1, S] and the position of the first, i64[1]; output: logits of the last token [1, vocabulary].
    """
    b = Builder()
    kind, rows, width = sizes.dtype, Sym("input_dim", (0, 1)), sizes.heads * sizes.head_size
    tokens = b.input("i64", (1, rows), "tokens")
    b.input("i64", (1,), "input_pos")
    start = Sym("scalar", (1, 0))

    def packed(form: Format, rows: int, name: str) -> Ref:
        scale = (form.k * 4.0**form.bits / 12) ** -0.5
        return b.constant("u32", (rows, form.words), name, (0.5 * scale, 1.5 * scale))

    def linear(x: Ref, outputs: int, inputs: int, name: str, shape: Sequence[Dim]) -> Ref:
        bound = (3 / inputs) ** 0.5  # keeps the variance
        form = sizes.packed(inputs)
        if sizes.weights.startswith("8da"):
            span: dict[str, Arg] = {"quant_min": -128, "quant_max": 127, "eps": None}
            x = b.node("webgpu.fake_quantize", {"input": x, **span}, kind, (*shape, inputs))
        if form is not None:
            args: dict[str, Arg] = {"input": x, "weight": packed(form, outputs, name), "bias": None}
            return b.node("webgpu.linear_packed", {**args, "format": form.literal()}, kind, (*shape, outputs))
        weight = b.constant(kind, (outputs, inputs), name, (-bound, bound))
        return b.node("aten.linear.default", {"input": x, "weight": weight, "bias": None}, kind, (*shape, outputs))

    def norm(x: Ref, name: str, shape: Sequence[Dim]) -> Ref:
        weight = b.constant(kind, (sizes.dim,), name, (0.5, 1.5))
        return b.node("webgpu.rms_norm", {"input": x, "weight": weight, "eps": 1e-5}, kind, (*shape, sizes.dim))

    def view(x: Ref, shape: Sequence[Dim]) -> Ref:
        return b.node("aten.view_copy.default", {"self": x, "size": tuple(shape)}, kind, shape)

    def add(x: Ref, y: Ref) -> Ref:
        return b.node("aten.add.Tensor", {"self": x, "other": y, "alpha": 1}, kind, (1, rows, sizes.dim))

    def cached(x: Ref, name: str) -> Ref:
        shape = (1, sizes.capacity, sizes.kv_heads, sizes.head_size)
        cache = b.mutable(kind, shape, name, (-1.0, 1.0))
        new = b.node("llama.update_cache.default", {"value": x, "cache": cache, "start_pos": start}, kind, shape)
        b.mutations.append((cache.value, new.value))
        return new

    table = (sizes.capacity, sizes.head_size // 2)
    cos, sin = (b.constant(kind, table, name, (-1.0, 1.0)) for name in ("cos", "sin"))
    rotation: dict[str, Arg] = {
        "cos": cos, "sin": sin, "start": start, "rot": sizes.head_size, "interleaved": True, "layout": "bshd"
    }  # fmt: skip
    table_format = sizes.packed(sizes.dim)
    if table_format is None:
        embedding = b.constant(kind, (sizes.vocabulary, sizes.dim), "embedding", (-1.0, 1.0))
        op = "aten.embedding.default"
        embedded: dict[str, Arg] = {"padding_idx": -1, "scale_grad_by_freq": False, "sparse": False}
    else:
        embedding = packed(table_format, sizes.vocabulary, "embedding")
        op, embedded = "webgpu.embedding_packed", {"format": table_format.literal()}
    x = b.node(op, {"weight": embedding, "indices": tokens, **embedded}, kind, (1, rows, sizes.dim))
    for i in range(sizes.layers):
        h = norm(x, f"{i}.attention_norm", (1, rows))
        q, k, v = (
            view(
                linear(h, heads * sizes.head_size, sizes.dim, f"{i}.{name}", (1, rows)),
                (1, rows, heads, sizes.head_size),
            )
            for name, heads in (("wq", sizes.heads), ("wk", sizes.kv_heads), ("wv", sizes.kv_heads))
        )
        q = b.node("webgpu.rope", {"input": q, **rotation}, kind, (1, rows, sizes.heads, sizes.head_size))
        k = b.node("webgpu.rope", {"input": k, **rotation}, kind, (1, rows, sizes.kv_heads, sizes.head_size))
        keys, values = cached(k, f"{i}.k_cache"), cached(v, f"{i}.v_cache")
        a = b.node(
            "webgpu.attention", _attention_args(q, keys, values, start), kind, (1, rows, sizes.heads, sizes.head_size)
        )
        x = add(x, linear(view(a, (1, rows, width)), sizes.dim, width, f"{i}.wo", (1, rows)))
        h = norm(x, f"{i}.ffn_norm", (1, rows))
        gate, up = (linear(h, sizes.ffn, sizes.dim, f"{i}.{name}", (1, rows)) for name in ("w1", "w3"))
        h = b.node("webgpu.swiglu", {"gate": gate, "up": up}, kind, (1, rows, sizes.ffn))
        x = add(x, linear(h, sizes.dim, sizes.ffn, f"{i}.w2", (1, rows)))
    last = b.node("aten.select_copy.int", {"self": x, "dim": 1, "index": -1}, kind, (1, sizes.dim))
    logits = linear(norm(last, "norm", (1,)), sizes.vocabulary, sizes.dim, "output", (1,))
    symbols = (SymbolRange(rows, 1, sizes.capacity),)
    passes: list[Pass] = [merge_equal_nodes, fuse_projections, keep_codes, fuse_rope_cache, fuse_project_cache]
    if not sizes.codes:
        passes.remove(keep_codes)
    return Loaded(device, b, b.graph(logits, symbols=symbols, passes=passes))
