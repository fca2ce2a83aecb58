"""`fuse_project_cache`: what it finds, what it leaves alone, and that the numbers are the same with and without it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from executorch_webgpu.backend.graph import Arg, Graph, Ref, Sym
from executorch_webgpu.backend.passes import fuse_project_cache, run_passes
from executorch_webgpu.backend.passes.large import split_large
from executorch_webgpu.ops.base import check_node
from tests.backend.test_rope_cache_pass import CAPACITY, HEADS, K_SHAPE, KV_HEADS, SIZE, WIDTH, exported
from tests.harness import DEVICES, GraphBuilder, device
from tests.ops.copy_cases import poison
from tests.ops.quantized import quantized

NAME, FUSED = "fuse_project_cache", "webgpu.project_cache"
PARTS = ["webgpu.project", "webgpu.rope_cache"]
S, P = Sym("input_dim", (0, 1)), Sym("scalar", (1, 0))
COUNTS = {"query": HEADS, "key": KV_HEADS, "value": KV_HEADS}


@dataclass
class Layer:
    """Records as they stand before the pass: projections, views, rotary embedding with cache writes, attention.

    Attributes:
        order: of the weights.
        change: arguments of a node, by its name.
        extra: adds nodes before the one of that name; what they return are more outputs.
        views: how many views stand one after the other between the nodes.
    """

    order: tuple[str, ...] = ("query", "key", "value")
    biases: bool = False
    packed: bool = False
    change: dict[str, dict[str, Arg]] = field(default_factory=dict)
    extra: dict[str, Callable[[GraphBuilder, dict[str, Ref]], Ref | None]] = field(default_factory=dict)
    views: int = 1

    def __post_init__(self) -> None:
        self.builder = b = GraphBuilder()
        self.named: dict[str, Ref] = {}
        self.more: list[Ref] = []
        n, rng = self.named, np.random.default_rng(0)
        n["x"] = b.input("f32", (1, S, WIDTH))
        b.input("i64", (1,))

        def constant(name: str, *shape: int) -> Ref:
            n[name] = b.stored("constant", "f32", (rng.standard_normal(shape) / WIDTH**0.5).astype(np.float32), name)
            return n[name]

        weights, formats = [], []
        for i, name in enumerate(self.order):
            if self.packed:
                words, form = quantized(COUNTS[name] * SIZE, WIDTH, 4, 32, seed=i).packed()
                weights.append(b.stored("constant", "u32", words, f"w_{name}"))
                formats.append(form.literal())
            else:
                weights.append(constant(f"w_{name}", COUNTS[name] * SIZE, WIDTH))
        biases = tuple(constant(f"b_{name}", COUNTS[name] * SIZE) for name in self.order) if self.biases else None
        products: dict[str, Arg] = {
            "input": n["x"], "weights": tuple(weights), "formats": tuple(formats) or None, "biases": biases,
            "norm_weight": constant("norm", WIDTH), "norm_eps": 1e-5, "residual": None, "gated": False,
        }  # fmt: skip
        made = self.add("products", PARTS[0], products, *(("f32", (1, S, COUNTS[c] * SIZE)) for c in self.order))
        n.update({f"flat_{name}": ref for name, ref in zip(self.order, made, strict=True)})
        for name, heads in COUNTS.items():
            source, shape = n[f"flat_{name}"], (1, S, heads, SIZE)
            for i in range(self.views):
                args: dict[str, Arg] = {"self": source, "size": shape}
                n[name] = source = self.add(f"view_{name}_{i}", "aten.view_copy.default", args, ("f32", shape))
        for name in ("key_cache", "value_cache"):
            n[name] = b.stored("mutable", "f32", rng.standard_normal(K_SHAPE).astype(np.float32), name)
        write: dict[str, Arg] = {
            **{name: n[name] for name in (*COUNTS, "key_cache", "value_cache")},
            **{name: constant(name, CAPACITY, SIZE // 2) for name in ("cos", "sin")},
            "start": P, "rot": SIZE, "interleaved": True, "layout": "bshd", "start_pos": P, "kv_limit": "causal",
            "window": 0,
        }  # fmt: skip
        turned = (1, S, HEADS, SIZE)
        outs = (("f32", turned), ("f32", K_SHAPE), ("f32", K_SHAPE), ("i32", (8,)))
        query, keys, values, sizes = self.add("written", PARTS[1], write, *outs)
        attend: dict[str, Arg] = {
            "query": query, "key": keys, "value": values, "q_layout": "bshd", "kv_layout": "bshd", "sizes": sizes,
            "out_layout": "bshd", "start_pos": P, "kv_limit": "causal", "window": 0,
        }  # fmt: skip
        result = self.add("attended", "webgpu.attention", attend, ("f32", turned))
        pairs = ((n["key_cache"].value, keys.value), (n["value_cache"].value, values.value))
        self.graph = b.graph(result, *self.more, mutations=pairs)
        for node in self.graph.nodes:
            assert check_node(self.graph, node) is None, node.name

    def add(self, name: str, op: str, args: dict[str, Arg], *outs: Any) -> Any:
        if name in self.extra:
            output = self.extra[name](self.builder, self.named)
            self.more += [] if output is None else [output]
        changes = {k: self.named.get(str(v), v) for k, v in self.change.get(name, {}).items()}
        return self.builder.node(op, {**args, **changes}, *outs)

    def optimised(self, *disabled: str) -> Graph:
        return run_passes(self.graph, disabled)


def ops(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes]


def run(layer: Layer, graph: Graph, on: str, counts: Collection[int]) -> tuple[list[Any], list[bytes]]:
    """Outputs of calls of so many rows one after the other, and the caches after them."""
    results, position = [], 0
    delegate = layer.builder.load(graph, device(on))
    try:
        for count in counts:
            x = np.random.default_rng(position).standard_normal((1, count, WIDTH)).astype(np.float32)
            poison(delegate)
            feeds: list[Any] = [("f32", x), ("i64", np.array([position], np.int64))]
            results += [np.asarray(array) for _, array in delegate.execute(feeds)]
            position += count
        state = [bytes(delegate.device.gpu.queue.read_buffer(x)) for x in delegate.state.buffers().values()]
    finally:
        delegate.close()
        delegate.state.close()
    return results, state


def same_numbers(layer: Layer, graphs: tuple[Graph, Graph], on: str) -> None:
    (got, state), (want, plain) = (run(layer, graph, on, (9, 1, 1, 3)) for graph in graphs)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    for x, y in zip(state, plain, strict=True):
        a, b = (np.frombuffer(content, np.float32) for content in (x, y))
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def after(name: str) -> Callable[[GraphBuilder, dict[str, Ref]], Ref]:
    """A reader of a value that is an output."""

    def add(b: GraphBuilder, named: dict[str, Ref]) -> Ref:
        shape = b.values[named[name].value].shape
        made: Ref = b.node("aten.neg.default", {"self": named[name]}, ("f32", shape))
        return made

    return add


FOUND = {
    "plain": Layer(),
    "another order": Layer(order=("value", "query", "key")),
    "another order, biases": Layer(order=("key", "value", "query"), biases=True),
    "another order, packed": Layer(order=("value", "key", "query"), packed=True),
    "two views": Layer(views=2),
    "halves": Layer(change={"written": {"interleaved": False}}),
    "a reader of the input": Layer(extra={"attended": after("x")}),
    "a reader of the old cache before": Layer(extra={"written": after("key_cache")}),
    "a reader of the old cache after": Layer(extra={"attended": after("value_cache")}),
}


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("name", FOUND)
def test_found(name: str, on: str) -> None:
    layer = FOUND[name]
    graph = layer.optimised()
    assert [op for op in ops(graph) if op.startswith("webgpu")] == [FUSED, "webgpu.attention"]
    assert [op for op in ops(layer.optimised(NAME)) if op.startswith("webgpu")] == [*PARTS, "webgpu.attention"]
    same_numbers(layer, (graph, layer.optimised(NAME)), on)


@pytest.mark.parametrize("on", DEVICES)
def test_a_layer_is_one_dispatch_and_attention(on: str) -> None:
    layer = Layer()
    graph = layer.optimised()
    fused, attention = graph.nodes
    kinds = [graph.values[graph.root(output)].name for output in fused.outputs[1:3]]
    assert kinds == ["key_cache", "value_cache"]  # in place
    assert attention.args["sizes"] == Ref(fused.outputs[3])
    counted = []
    for made in (graph, layer.optimised(NAME)):
        loaded = layer.builder.load(made, device(on))
        feeds: list[Any] = [("f32", np.ones((1, 1, WIDTH), np.float32)), ("i64", np.array([0]))]
        try:
            counted.append(len(loaded.plan(loaded.bind(feeds)).launches))
        finally:
            loaded.close()
            loaded.state.close()
    assert counted == ([3, 4] if on == "full" else [7, 7])


def between(name: str) -> Layer:
    """Something stands between the projections and the write."""

    def add(b: GraphBuilder, named: dict[str, Ref]) -> None:
        shape = b.values[named[name].value].shape
        named[name] = b.node("aten.neg.default", {"self": named[name]}, ("f32", shape))

    return Layer(extra={"written": add}, change={"written": {name: name}})


LEFT = {
    "query is not the product": between("query"),
    "value is not the product": between("value"),
    "a view of key is read elsewhere": Layer(extra={"written": after("key")}),
    "a product is read elsewhere": Layer(extra={"attended": after("flat_value")}),
    "key and value are one product": Layer(change={"written": {"value": "key"}}),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_alone(name: str) -> None:
    graph = LEFT[name].graph
    assert fuse_project_cache(graph) == graph


def test_an_output_of_the_graph_is_left_alone() -> None:
    layer = Layer()
    graph = layer.builder.graph(*layer.graph.outputs, layer.named["query"], mutations=layer.graph.mutations)
    assert fuse_project_cache(graph) == graph


@pytest.mark.parametrize("on", DEVICES)
def test_a_weight_above_a_binding_is_cut(on: str) -> None:
    """The node becomes the operators that it stands for, those of the weight in parts."""
    layer = Layer(biases=True)
    graph = layer.optimised()
    limit = 4 * WIDTH * KV_HEADS * SIZE

    def size(value: Any) -> int:
        return 4 * int(np.prod(value.shape)) if all(isinstance(dim, int) for dim in value.shape) else 0

    small = split_large(graph, limit, size)
    assert FUSED not in ops(small)
    assert "webgpu.rope_cache" in ops(small)
    assert "aten.cat.default" in ops(small)
    assert max(size(value) for value in small.values if value.kind == "constant" and "w_" in value.name) <= limit
    source = {value.data: layer.builder.data[value.name.partition("[")[0]] for value in small.values if value.data}
    for value in small.values:
        if value.data and "[" in value.name:
            begin, end = (int(text) for text in value.name.partition("[")[2][:-1].split(":"))
            source[value.data] = source[value.data][4 * WIDTH * begin : 4 * WIDTH * end]
    layer.builder.data = {**layer.builder.data, **{str(key): data for key, data in source.items()}}
    same_numbers(layer, (small, graph), on)


@pytest.mark.parametrize(("dtype", "on"), [(torch.float16, "full"), (torch.float32, "default-limits")])
def test_an_export(dtype: torch.dtype, on: str) -> None:
    """Every layer is found, and a prompt followed by single tokens gives what it gives without the pass."""
    fused, plain = exported(dtype, (), on), exported(dtype, (NAME,), on)
    assert ops(fused.delegates[0].graph).count(FUSED) == 2
    assert not set(PARTS) & {node.op for node in fused.delegates[0].graph.nodes if node.outputs[1:]}
    assert [ops(plain.delegates[0].graph).count(op) for op in (FUSED, PARTS[1])] == [0, 2]
    generator, position = torch.Generator().manual_seed(1), 0
    for count in (20, 1, 60, 1, 1):
        x, at = torch.randn(1, count, WIDTH, generator=generator).to(dtype), torch.tensor([position])
        got, want = (method.execute([x, at])[0].float().numpy() for method in (fused, plain))
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
        position += count
    *_, plan = fused.delegates[0]._plans.values()
    kernels = [launch.kernel for launch in plan.launches]
    assert kernels.count("gemv_stream_cache") == (2 if on == "full" else 0)
    indirect = [launch.kernel for launch in plan.launches if launch.indirect is not None]
    assert len(indirect) == (4 if on == "full" else 0)
