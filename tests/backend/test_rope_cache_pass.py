"""`fuse_rope_cache`: what it finds, what it leaves alone, and that the numbers are the same with and without it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  (registers llama::*)
from torch import nn
from torch.export import Dim, export

from executorch_webgpu.backend.graph import Arg, Graph, Node, Ref, Sym
from executorch_webgpu.backend.passes import fuse_rope_cache, run_passes
from executorch_webgpu.ops.base import check_node
from executorch_webgpu.partitioner import WebGPUPartitioner
from executorch_webgpu.runtime import Method, Runtime
from executorch_webgpu.runtime.methods.delegate import Delegate
from tests.harness import DEVICES, GraphBuilder, device
from tests.ops.copy_cases import poison

NAME, FUSED, WRITE = "fuse_rope_cache", "webgpu.rope_cache", "llama.update_cache.default"
HEADS, KV_HEADS, SIZE, CAPACITY = 4, 2, 16, 160
S, P = Sym("input_dim", (0, 1)), Sym("scalar", (3, 0))
K_SHAPE = (1, CAPACITY, KV_HEADS, SIZE)


@dataclass
class Layer:
    """Records as they stand before the pass: two rotary embeddings, two writes, attention. `change` edits arguments
    of a node by its name, `extra` adds nodes before the one of that name; what they return are more outputs."""

    change: dict[str, dict[str, Arg]] = field(default_factory=dict)
    extra: dict[str, Callable[[GraphBuilder, dict[str, Ref]], Ref | None]] = field(default_factory=dict)
    mutates: bool = True

    def __post_init__(self) -> None:
        self.builder = b = GraphBuilder()
        self.named: dict[str, Ref] = {}
        self.more: list[Ref] = []
        rng = np.random.default_rng(0)
        for name, heads in (("query", HEADS), ("key", KV_HEADS), ("value", KV_HEADS)):
            self.named[name] = b.input("f32", (1, S, heads, SIZE))
        self.named["position"] = b.input("i64", (1,))
        for name in ("cos", "sin", "other"):
            table = rng.standard_normal((CAPACITY, SIZE // 2)).astype(np.float32)
            self.named[name] = b.stored("constant", "f32", table, name)
        for name in ("key_cache", "value_cache"):
            cache = rng.standard_normal(K_SHAPE).astype(np.float32)
            self.named[name] = b.stored("mutable", "f32", cache, name)
        n = self.named
        table_args: dict[str, Arg] = {
            "cos": n["cos"], "sin": n["sin"], "start": P, "rot": SIZE, "interleaved": True, "layout": "bshd",
        }  # fmt: skip
        self.add("turned_query", "webgpu.rope", {"input": n["query"], **table_args}, (1, S, HEADS, SIZE))
        self.add("turned_key", "webgpu.rope", {"input": n["key"], **table_args}, (1, S, KV_HEADS, SIZE))
        for name, value in (("key", "turned_key"), ("value", "value")):
            write: dict[str, Arg] = {"value": n[value], "cache": n[f"{name}_cache"], "start_pos": P}
            self.add(f"new_{name}", WRITE, write, K_SHAPE)
        attend: dict[str, Arg] = {
            "query": n["turned_query"], "key": n["new_key"], "value": n["new_value"], "q_layout": "bshd",
            "kv_layout": "bshd", "out_layout": "bshd", "start_pos": P, "kv_limit": "causal", "window": 0,
        }  # fmt: skip
        self.add("attended", "webgpu.attention", attend, (1, S, HEADS, SIZE))
        self.place("end")
        pairs = [(n[f"{name}_cache"].value, n[f"new_{name}"].value) for name in ("key", "value")]
        self.graph = b.graph(n["attended"], *self.more, mutations=tuple(pairs) if self.mutates else ())
        for node in self.graph.nodes:
            assert check_node(self.graph, node) is None, node.name

    def place(self, name: str) -> None:
        if name in self.extra:
            output = self.extra[name](self.builder, self.named)
            self.more += [] if output is None else [output]

    def add(self, name: str, op: str, args: dict[str, Arg], shape: Any) -> None:
        self.place(name)
        changes = {k: self.named.get(str(v), v) for k, v in self.change.get(name, {}).items()}
        self.named[name] = self.builder.node(op, {**args, **changes}, ("f32", shape))

    def optimised(self, *disabled: str) -> Graph:
        return run_passes(self.graph, disabled)


def steps(delegate: Delegate, counts: Collection[int]) -> list[list[np.ndarray[Any, Any]]]:
    """Outputs of calls of so many rows each, one after the other in the cache, temporaries full of NaN."""
    results, position = [], 0
    for count in counts:
        rng = np.random.default_rng(position)
        shapes = [(1, count, heads, SIZE) for heads in (HEADS, KV_HEADS, KV_HEADS)]
        feeds: list[Any] = [("f32", rng.standard_normal(shape).astype(np.float32)) for shape in shapes]
        feeds.append(("i64", np.array([position], np.int64)))
        poison(delegate)
        results.append([np.asarray(array) for _, array in delegate.execute(feeds)])
        position += count
    return results


def same_numbers(layer: Layer, on: str, counts: Collection[int] = (7, 1, 1, 22, 1, 1, 2, 9, 1, 20, 1, 1)) -> None:
    """All outputs and the caches' bits, with the pass and without."""
    found = []
    for graph in (layer.optimised(), layer.optimised(NAME)):
        delegate = layer.builder.load(graph, device(on))
        try:
            outputs = steps(delegate, counts)
            state = {
                name: bytes(delegate.device.gpu.queue.read_buffer(buffer))
                for name, buffer in delegate.state.buffers().items()
            }
        finally:
            delegate.close()
            delegate.state.close()
        found.append((outputs, state))
    (fused, fused_state), (plain, plain_state) = found
    for got, want in zip(fused, plain, strict=True):
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert fused_state.keys() == plain_state.keys()
    for name, content in fused_state.items():
        a, b = (np.frombuffer(x, np.float32) for x in (content, plain_state[name]))
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def ops(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes]


@pytest.mark.parametrize("on", DEVICES)
def test_a_layer_becomes_one_dispatch_and_attention(on: str) -> None:
    layer = Layer()
    graph = layer.optimised()
    assert ops(graph) == [FUSED, "webgpu.attention"]
    fused, attention = graph.nodes
    kinds = [graph.values[graph.root(output)] for output in fused.outputs]
    assert [value.name for value in kinds[1:3]] == ["key_cache", "value_cache"]  # in place
    assert attention.args["sizes"] == Ref(fused.outputs[3])
    same_numbers(layer, on)
    counted = []
    for made in (graph, layer.optimised(NAME)):
        delegate = layer.builder.load(made, device(on))
        try:
            steps(delegate, (40, 1))
            before = delegate.device.counters.copy()
            steps(delegate, (1,))
            counted.append(delegate.device.counters.since(before).dispatches)
            *_, plan = delegate._plans.values()
        finally:
            delegate.close()
            delegate.state.close()
        indirect = {launch.kernel for launch in plan.launches if launch.indirect is not None}
        sized = made is graph and on == "full"
        assert indirect == ({"attention_stream", "attention_merge"} if sized else set())
    assert counted == [3, 6]


def after(name: str) -> Callable[[GraphBuilder, dict[str, Ref]], Ref]:
    """A reader of a value that is an output."""

    def add(b: GraphBuilder, named: dict[str, Ref]) -> Ref:
        shape = b.values[named[name].value].shape
        made: Ref = b.node("aten.neg.default", {"self": named[name]}, ("f32", shape))
        return made

    return add


def second_attention(b: GraphBuilder, named: dict[str, Ref]) -> Ref:
    """One more layer on the same caches, with a rotated query of its own."""
    rope, _, _, _, attention = b.nodes[:5]
    shape = b.values[rope.outputs[0]].shape
    query = b.node("webgpu.rope", {**rope.args, "input": named["attended"]}, ("f32", shape))
    made: Ref = b.node("webgpu.attention", {**attention.args, "query": query}, ("f32", shape))
    return made


def copied(name: str, *readers: str) -> Layer:
    """A value goes through two copies (a concatenation of it alone, a clone) on its way to its reader; other `readers`
    read the value or a copy."""

    def add(b: GraphBuilder, named: dict[str, Ref]) -> Ref | None:
        shape = b.values[named[name].value].shape
        for copy in ("first", "second"):
            source = named[name] if copy == "first" else named["first"]
            args: dict[str, Arg] = {"tensors": (source,), "dim": -1} if copy == "first" else {"self": source}
            named[copy] = b.node("aten.cat.default" if copy == "first" else "aten.clone.default", args, ("f32", shape))
        extra = [after(reader)(b, named) for reader in readers]
        return extra[0] if extra else None

    place, argument = ("new_key", "value") if name == "turned_key" else ("turned_key", "query")
    reader = "new_key" if name == "turned_key" else "attended"
    return Layer(extra={place: add}, change={reader: {argument: "second"}})


FOUND = {
    "a copied key": copied("turned_key"),
    "a copied query": copied("turned_query"),
    "reader of the new key cache at the end": Layer(extra={"end": after("new_key")}),
    "reader of the rotated query after the writes": Layer(extra={"attended": after("turned_query")}),
    "window": Layer(change={"attended": {"window": 50}}),
    "prefix": Layer(change={"attended": {"kv_limit": "prefix"}}),
    "halves": Layer(change={name: {"interleaved": False} for name in ("turned_query", "turned_key")}),
    "partial": Layer(change={name: {"rot": 8, "interleaved": False} for name in ("turned_query", "turned_key")}),
    "two attentions on one pair of caches": Layer(extra={"end": second_attention}),
    "caches that are not kept": Layer(mutates=False),
}


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("name", FOUND)
def test_found(name: str, on: str) -> None:
    layer = FOUND[name]
    assert ops(layer.optimised()).count(FUSED) == 1
    assert WRITE not in ops(layer.optimised())
    same_numbers(layer, on)


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("cache", ["key_cache", "value_cache"])
def test_readers_of_the_old_cache_see_the_old_content(cache: str, on: str) -> None:
    """Before the writes and after them; after, that cache cannot be written in place."""
    for place in ("turned_query", "new_value", "end"):
        layer = Layer(extra={place: after(cache)})
        graph = layer.optimised()
        (fused,) = [node for node in graph.nodes if node.op == FUSED]
        roots = [graph.values[graph.root(output)].name for output in fused.outputs[1:3]]
        assert (cache in roots) == (place != "end")
        same_numbers(layer, on)


def early(name: str) -> Layer:
    """A reader of a new value before the value is written: the new node has no place."""
    return Layer(extra={"new_value": after(name)})


LEFT = {
    "the rotated key is copied, and read elsewhere": copied("turned_key", "turned_key"),
    "a copy of the rotated key is read elsewhere": copied("turned_key", "first"),
    "the rotated query is copied, and read elsewhere": copied("turned_query", "turned_query"),
    "a copy of the rotated query is read elsewhere": copied("turned_query", "second"),
    "the rotated key is read elsewhere": Layer(extra={"end": after("turned_key")}),
    "the rotated query is read before the writes": early("turned_query"),
    "the new key cache is read before the value is written": early("new_key"),
    "another table for the key": Layer(change={"turned_key": {"cos": "other"}}),
    "another table row for the key": Layer(change={"turned_key": {"start": 3}}),
    "other pairs of the key": Layer(change={"turned_key": {"interleaved": False}}),
    "the key is written elsewhere": Layer(change={"new_key": {"start_pos": 3}}),
    "the value is written elsewhere": Layer(change={"new_value": {"start_pos": 3}}),
    "attention at another position": Layer(change={"attended": {"start_pos": 3}}),
    "the value is written to the new key cache": Layer(change={"new_value": {"cache": "new_key"}}),
    "attention reads the old value cache": Layer(change={"attended": {"value": "value_cache"}}),
    "the query is not rotated": Layer(change={"attended": {"query": "query"}}),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_alone(name: str) -> None:
    graph = LEFT[name].graph
    assert fuse_rope_cache(graph) == graph


def test_the_new_node_stands_where_the_last_of_the_old_ones_stood() -> None:
    """The value may depend on what is computed between the other nodes."""

    def between(b: GraphBuilder, named: dict[str, Ref]) -> None:
        shape = b.values[named["value"].value].shape
        named["value"] = b.node("aten.neg.default", {"self": named["value"]}, ("f32", shape))

    layer = Layer(extra={"new_value": between}, change={"new_value": {"value": "value"}})
    assert ops(layer.optimised()) == ["aten.neg.default", FUSED, "webgpu.attention"]
    same_numbers(layer, "full", (3, 1, 1))


# -- a real export

CONFIG = EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True)
WIDTH = HEADS * SIZE


class Decoder(nn.Module):
    """Two attention layers as in ExecuTorch's llama model: interleaved rotary embedding, caches of its library."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        kv = KV_HEADS * SIZE
        self.weights = nn.ParameterList(
            nn.Parameter(torch.randn(rows, WIDTH) * WIDTH**-0.5) for _ in range(2) for rows in (WIDTH, kv, kv, WIDTH)
        )
        angles = torch.arange(CAPACITY)[:, None] * 0.3 ** torch.arange(SIZE // 2)[None].float()
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        for name in ("k0", "v0", "k1", "v1"):
            self.register_buffer(name, torch.zeros(K_SHAPE))
        self.to(dtype)

    def turn(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        a, b = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)
        cos, sin = cos[None, :, None], sin[None, :, None]
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(3).type_as(x)

    def forward(self, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        length = x.shape[1]
        start = position[0].item()
        torch._check(start >= 0)
        torch._check(start + length <= CAPACITY)
        cos, sin = (table.narrow(0, start, length) for table in (self.cos, self.sin))
        for i, (keys, values) in enumerate(((self.k0, self.v0), (self.k1, self.v1))):
            q, k, v, o = self.weights[4 * i : 4 * i + 4]
            heads = [nn.functional.linear(x, w).view(1, length, -1, SIZE) for w in (q, k, v)]
            torch.ops.llama.update_cache(self.turn(heads[1], cos, sin), keys, start)
            torch.ops.llama.update_cache(heads[2], values, start)
            turned = self.turn(heads[0], cos, sin)
            y = torch.ops.llama.custom_sdpa(turned, keys, values, start, None, 0.0, True)
            x = x + nn.functional.linear(y.reshape(1, length, -1), o)
        return x


def exported(dtype: torch.dtype, disabled: Collection[str], on: str) -> Method:
    torch.manual_seed(0)
    module = Decoder(dtype).eval()
    rows = Dim("rows", min=1, max=CAPACITY - 1)
    inputs = (torch.randn(1, 3, WIDTH, dtype=dtype), torch.tensor([2]))
    with torch.no_grad():
        program = export(module, inputs, dynamic_shapes=({1: rows}, None), strict=True)
    partitioner = WebGPUPartitioner(disable_passes=disabled)
    edge = to_edge_transform_and_lower(program, partitioner=[partitioner], compile_config=CONFIG)
    method = Runtime(device(on)).load_program(bytes(edge.to_executorch().buffer)).load_method("forward")
    assert method.outside() == []
    return method


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_export_with_the_library_s_caches(dtype: torch.dtype, on: str) -> None:
    """Every layer is found, and a prompt followed by single tokens gives what it gives without the pass."""
    fused, plain = exported(dtype, ("fuse_project_cache",), on), exported(dtype, (NAME,), on)
    nodes: list[Node] = list(fused.delegates[0].graph.nodes)
    graph = fused.delegates[0].graph
    assert [node.op for node in nodes].count(FUSED) == 2
    assert not {WRITE, "webgpu.rope"} & {node.op for node in nodes}
    for node in nodes:
        if node.op == FUSED:
            assert [graph.values[graph.root(output)].kind for output in node.outputs[1:3]] == ["mutable", "mutable"]
    assert [node.op for node in plain.delegates[0].graph.nodes].count(WRITE) == 4
    generator, position = torch.Generator().manual_seed(1), 0
    for count in (20, 1, 1, 9, *[1] * 6, 60, *[1] * 3, 2):
        x, at = torch.randn(1, count, WIDTH, generator=generator).to(dtype), torch.tensor([position])
        got, want = (method.execute([x, at])[0].float().numpy() for method in (fused, plain))
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
        position += count
    *_, plan = fused.delegates[0]._plans.values()
    indirect = [launch.kernel for launch in plan.launches if launch.indirect is not None]
    assert indirect == (["attention_stream", "attention_merge"] * 2 if on == "full" else [])
