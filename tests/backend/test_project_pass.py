"""`fuse_projections`: what it finds, what it leaves alone, and that the numbers are the same with and without it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  (registers llama::*)
from torch.export import Dim, export

from executorch_webgpu.backend.graph import Arg, Graph, Ref, Sym
from executorch_webgpu.backend.passes import fuse_projections, run_passes
from executorch_webgpu.ops.base import check_node
from executorch_webgpu.partitioner import WebGPUPartitioner
from executorch_webgpu.runtime import Method, Runtime
from executorch_webgpu.runtime.gpu.host import to_host
from tests.harness import DEVICES, GraphBuilder, device
from tests.models import test_greedy
from tests.ops.copy_cases import poison
from tests.tiny_decoder import _CLASSES, LONGEST

NAME, FUSED, LINEAR = "fuse_projections", "webgpu.project", "aten.linear.default"
ROWS = Sym("input_dim", (0, 0))
WIDTH, HIDDEN = 32, 40


class Records:
    """A graph on one input x [ROWS, WIDTH] made node by node; values are f32."""

    def __init__(self) -> None:
        self.b = GraphBuilder()
        self.rng = np.random.default_rng(3)
        self.x: Ref = self.b.input("f32", (ROWS, WIDTH))

    def constant(self, *shape: int) -> Ref:
        array = self.rng.standard_normal(shape).astype(np.float32) / np.sqrt(shape[-1]).astype(np.float32)
        return self.b.stored("constant", "f32", array, f"c{len(self.b.values)}")

    def node(self, op: str, args: dict[str, Arg], width: int) -> Ref:
        made: Ref = self.b.node(op, args, ("f32", (ROWS, width)))
        return made

    def linear(self, x: Ref, inputs: int, outputs: int, bias: bool = False, weight: Ref | None = None) -> Ref:
        args: dict[str, Arg] = {
            "input": x,
            "weight": weight or self.constant(outputs, inputs),
            "bias": self.constant(outputs) if bias else None,
        }
        return self.node(LINEAR, args, outputs)

    def norm(self, x: Ref) -> Ref:
        return self.node("webgpu.rms_norm", {"input": x, "weight": self.constant(WIDTH), "eps": 1e-5}, WIDTH)

    def add(self, x: Ref, y: Ref, alpha: int = 1) -> Ref:
        return self.node("aten.add.Tensor", {"self": x, "other": y, "alpha": alpha}, WIDTH)

    def neg(self, x: Ref, width: int = WIDTH) -> Ref:
        return self.node("aten.neg.default", {"self": x}, width)

    def swiglu(self, gate: Ref, up: Ref) -> Ref:
        return self.node("webgpu.swiglu", {"gate": gate, "up": up}, HIDDEN)

    def graph(self, *outputs: Ref) -> Graph:
        graph = self.b.graph(*outputs)
        assert all(check_node(graph, node) is None for node in graph.nodes)
        return graph


def results(r: Records, graph: Graph, on: str) -> tuple[list[list[np.ndarray[Any, Any]]], list[int]]:
    """(outputs, number of dispatches) of calls of some numbers of rows; temporaries full of NaN before each."""
    delegate = r.b.load(graph, device(on))
    found, counts = [], []
    try:
        for rows in (3, 1, 20, 1, 8):
            x = np.random.default_rng(rows).standard_normal((rows, WIDTH)).astype(np.float32)
            poison(delegate)
            before = delegate.device.counters.copy()
            found.append([np.asarray(array) for _, array in delegate.execute([to_host(x)])])
            counts.append(delegate.device.counters.since(before).dispatches)
    finally:
        delegate.close()
    return found, counts


def same_numbers(r: Records, graph: Graph, on: str) -> tuple[list[int], list[int]]:
    """Compare outputs with the pass and without; returns the numbers of dispatches of both."""
    (fused, counts), (plain, plain_counts) = (results(r, run_passes(graph, off), on) for off in ((), (NAME,)))
    for got, want in zip(fused, plain, strict=True):
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    return counts, plain_counts


def ops(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes]


def layer(r: Records, bias: bool = False) -> list[Ref]:
    """Query, key and value of a norm, a projection with residual, a gated feed-forward layer, a norm and logits."""
    h = r.norm(r.x)
    q, k, v = r.linear(h, WIDTH, WIDTH, bias), r.linear(h, WIDTH, 8, bias), r.linear(h, WIDTH, 8, bias)
    x = r.add(r.x, r.linear(r.neg(q), WIDTH, WIDTH, bias))
    h = r.norm(x)
    gate = r.linear(h, WIDTH, HIDDEN)
    up = r.linear(h, WIDTH, HIDDEN)
    x = r.add(r.linear(r.swiglu(gate, up), HIDDEN, WIDTH, bias), x)
    return [r.linear(r.norm(x), WIDTH, 100), k, v]


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_becomes_five_nodes(bias: bool, on: str) -> None:
    r = Records()
    graph = r.graph(*layer(r, bias))
    fused = run_passes(graph)
    assert ops(fused) == [FUSED, "aten.neg.default", *[FUSED] * 4]
    qkv, out, gated, down, logits = (node.args for node in fused.nodes if node.op == FUSED)
    assert [len(args["weights"]) for args in (qkv, out, gated, down, logits)] == [3, 1, 2, 1, 1]  # type: ignore[arg-type]
    assert [args["gated"] for args in (qkv, out, gated, down, logits)] == [False, False, True, False, False]
    assert [args["norm_eps"] for args in (qkv, out, gated, down, logits)] == [1e-5, None, 1e-5, None, 1e-5]
    assert [args["residual"] is None for args in (qkv, out, gated, down, logits)] == [True, False, True, False, True]
    counts, plain = same_numbers(r, graph, on)
    few = [0, 1, 3, 4]  # calls; devices without subgroups run the operators one by one
    if on == "full":
        assert [counts[i] for i in few] == [8 if bias else 6] * 4
        assert [plain[i] for i in few] == [15] * 4
    else:
        assert [counts[i] for i in few] == [plain[i] for i in few]
    assert (counts[2], plain[2]) == (11, 15)  # many rows: tiles that gate and add


def norm_read_elsewhere(r: Records) -> list[Ref]:
    h = r.norm(r.x)
    return [r.linear(h, WIDTH, 5), r.linear(h, WIDTH, 7), r.neg(h)]


def norm_is_an_output(r: Records) -> list[Ref]:
    h = r.norm(r.x)
    return [r.linear(h, WIDTH, 5), r.linear(h, WIDTH, 7), h]


def four_siblings(r: Records) -> list[Ref]:
    return [r.linear(r.x, WIDTH, n, bias=n == 7) for n in (5, 6, 7, 8)]


def four_siblings_of_a_norm(r: Records) -> list[Ref]:
    h = r.norm(r.x)
    return [r.linear(h, WIDTH, n) for n in (5, 6, 7, 8)]


def gate_read_elsewhere(r: Records) -> list[Ref]:
    gate, up = r.linear(r.x, WIDTH, HIDDEN), r.linear(r.x, WIDTH, HIDDEN)
    return [r.swiglu(gate, up), gate]


def gate_and_up_of_different_inputs(r: Records) -> list[Ref]:
    return [r.swiglu(r.linear(r.x, WIDTH, HIDDEN), r.linear(r.neg(r.x), WIDTH, HIDDEN))]


def gate_after_up(r: Records) -> list[Ref]:
    up = r.linear(r.x, WIDTH, HIDDEN, bias=True)
    return [r.swiglu(r.linear(r.x, WIDTH, HIDDEN), up)]


def gated_with_residual(r: Records) -> list[Ref]:
    h = r.norm(r.x)
    y = r.swiglu(r.linear(h, WIDTH, HIDDEN), r.linear(h, WIDTH, HIDDEN))
    other = r.linear(r.x, WIDTH, HIDDEN)
    return [r.node("aten.add.Tensor", {"self": other, "other": y, "alpha": 1}, HIDDEN)]


def residual_made_later(r: Records) -> list[Ref]:
    y = r.linear(r.x, WIDTH, WIDTH)
    return [r.add(y, r.neg(r.neg(r.x)))]


def residual_of_itself(r: Records) -> list[Ref]:
    y = r.linear(r.x, WIDTH, WIDTH)
    return [r.add(y, y)]


def residual_times_two(r: Records) -> list[Ref]:
    return [r.add(r.linear(r.x, WIDTH, WIDTH), r.x, alpha=2)]


def residual_of_one_row(r: Records) -> list[Ref]:
    return [r.add(r.linear(r.x, WIDTH, WIDTH), r.constant(1, WIDTH))]


def sum_and_result_are_outputs(r: Records) -> list[Ref]:
    y = r.linear(r.x, WIDTH, WIDTH)
    return [r.add(y, r.x), y]


def sum_of_two_layers(r: Records) -> list[Ref]:
    return [r.add(r.linear(r.x, WIDTH, WIDTH), r.linear(r.neg(r.x), WIDTH, WIDTH))]


def sum_of_siblings(r: Records) -> list[Ref]:
    return [r.add(r.linear(r.x, WIDTH, WIDTH), r.linear(r.x, WIDTH, WIDTH))]


def weight_made_between(r: Records) -> list[Ref]:
    first = r.linear(r.x, WIDTH, 5)
    weight: Ref = r.b.node("aten.neg.default", {"self": r.constant(7, WIDTH)}, ("f32", (7, WIDTH)))
    return [first, r.linear(r.x, WIDTH, 7, weight=weight)]


def read_between(r: Records) -> list[Ref]:
    first = r.linear(r.x, WIDTH, 5)
    negative = r.neg(first, 5)
    return [negative, r.linear(r.x, WIDTH, 7)]


def chain(r: Records) -> list[Ref]:
    x = r.x
    for _ in range(3):
        x = r.add(x, r.linear(r.norm(x), WIDTH, WIDTH))
    return [x]


SHAPES: dict[Callable[[Records], list[Ref]], dict[str, int]] = {
    norm_read_elsewhere: {FUSED: 1, "webgpu.rms_norm": 1, "aten.neg.default": 1},
    norm_is_an_output: {FUSED: 1, "webgpu.rms_norm": 1},
    four_siblings: {FUSED: 1, LINEAR: 1},
    four_siblings_of_a_norm: {FUSED: 1, LINEAR: 1, "webgpu.rms_norm": 1},
    gate_read_elsewhere: {FUSED: 1, "webgpu.swiglu": 1},
    gate_and_up_of_different_inputs: {LINEAR: 2, "webgpu.swiglu": 1, "aten.neg.default": 1},
    gate_after_up: {FUSED: 1},
    gated_with_residual: {FUSED: 1, LINEAR: 1},
    residual_made_later: {FUSED: 1, "aten.neg.default": 2},
    residual_of_itself: {LINEAR: 1, "aten.add.Tensor": 1},
    residual_times_two: {LINEAR: 1, "aten.add.Tensor": 1},
    residual_of_one_row: {LINEAR: 1, "aten.add.Tensor": 1},
    sum_and_result_are_outputs: {LINEAR: 1, "aten.add.Tensor": 1},
    sum_of_two_layers: {FUSED: 1, LINEAR: 1, "aten.neg.default": 1},
    sum_of_siblings: {FUSED: 1, "aten.add.Tensor": 1},
    weight_made_between: {LINEAR: 2, "aten.neg.default": 1},
    read_between: {FUSED: 1, "aten.neg.default": 1},
    chain: {FUSED: 3},
}


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("make", SHAPES, ids=lambda make: make.__name__)
def test_shapes_of_graphs(make: Callable[[Records], list[Ref]], on: str) -> None:
    """What remains beside the fused nodes, and equal numbers: each node stands after what it reads."""
    r = Records()
    graph = r.graph(*make(r))
    fused = fuse_projections(graph)
    if FUSED not in SHAPES[make]:
        assert fused == graph
    made = run_passes(graph)
    assert Counter(ops(made)) == SHAPES[make]
    counts, plain = same_numbers(r, graph, on)
    assert all(now <= before for now, before in zip(counts, plain, strict=True))


# -- exports

CONFIG = EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True)


def tiny(disabled: Sequence[str], on: str) -> Method:
    """The decoder of tests/tiny_decoder.py."""
    rows = Dim("seq", min=1, max=LONGEST)
    example = (torch.arange(3)[None], torch.tensor([2]))
    with torch.no_grad():
        program = export(_CLASSES["llama"]().eval(), example, dynamic_shapes=({1: rows}, None), strict=True)
    partitioner = WebGPUPartitioner(disable_passes=disabled)
    edge = to_edge_transform_and_lower(program, partitioner=[partitioner], compile_config=CONFIG)
    return Runtime(device(on)).load_program(bytes(edge.to_executorch().buffer)).load_method("forward")


def greedy(family: str) -> Callable[[Sequence[str], str], Method]:
    """A decoder of tests/models/test_greedy.py; "llama" has the structure of the shipped story model."""

    def made(disabled: Sequence[str], on: str) -> Method:
        program = Runtime(device(on)).load_program(test_greedy.lowered(family, frozenset(disabled)))
        return program.load_method("forward")

    return made


EXPORTS: dict[str, tuple[Callable[[Sequence[str], str], Method], dict[str, int], int]] = {
    "tiny": (tiny, {FUSED: 1, LINEAR: 1}, 2),
    "llama": (greedy("llama"), {FUSED: 4 * test_greedy.LAYERS + 1}, 8 * test_greedy.LAYERS + 1),
    "gpt": (greedy("gpt"), {FUSED: 3 * test_greedy.LAYERS, LINEAR: test_greedy.LAYERS + 1}, 2 * test_greedy.LAYERS),
}
"""Name -> (export, nodes of projections with the pass, dispatches of a step less than without)."""
PROJECTIONS = (FUSED, LINEAR, "webgpu.rms_norm", "webgpu.swiglu")


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("name", EXPORTS)
def test_exports(name: str, on: str) -> None:
    """A prompt and single tokens give the same logits; a step has fewer dispatches where there are subgroups."""
    make, nodes, fewer = EXPORTS[name]
    methods = [make(disabled, on) for disabled in ((), (NAME,))]
    found = Counter(node.op for node in methods[0].delegates[0].graph.nodes if node.op in PROJECTIONS)
    assert found == nodes
    position, counts = 0, [0, 0]
    for length in (5, 1, 1, 3, 1):
        tokens = (torch.arange(length) * 7 + position) % 100
        where = torch.tensor([position]) if name == "tiny" else torch.arange(position, position + length)
        outputs = []
        for number, method in enumerate(methods):
            before = device(on).counters.copy()
            outputs.append(method.execute([tokens[None], where])[0].numpy())
            counts[number] = device(on).counters.since(before).dispatches
        np.testing.assert_allclose(*outputs, rtol=1e-4, atol=1e-5)
        position += length
    assert counts[1] - counts[0] == (fewer if on == "full" else 0)
