"""Programs with caches of packed integers: lowered whole by both routes, and what is refused, by whom and why.

Tests with a letter and a number cover the row of that name of the attention checklist (group I).
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from executorch.exir import EdgeCompileConfig, to_edge, to_edge_transform_and_lower

from executorch_webgpu.backend.graph import Graph, Ref
from executorch_webgpu.ops.attention_decode import cell_columns
from executorch_webgpu.ops.base import Limits, Lowering, check_node
from executorch_webgpu.partitioner import WebGPUPartitioner
from executorch_webgpu.runtime import Runtime
from executorch_webgpu.runtime.errors import InputError
from tests.harness import device
from tests.llm.cases import (
    FORMS,
    Case,
    Layer,
    arguments,
    call,
    close,
    exported,
)
from tests.llm.packed import (
    DTYPES,
    SCALES,
    compiled,
    packed,
)
from tests.llm.records import CACHES, build

KINDS = tuple(DTYPES)
CONFIG = EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True)


# -- programs


@pytest.mark.parametrize("route", ["A", "B"])
@pytest.mark.parametrize("kind", KINDS)
def test_both_routes_give_one_delegate(kind: str, route: str) -> None:
    """Through a program file, with a dynamic number of rows; three calls on the same caches."""
    case = FORMS["norms and rotary"]
    floats = arguments(case)
    for cache in CACHES:
        floats[cache].zero_()
    given = packed(floats, kind)
    module = Layer(given)
    edge = lowered(module, given, route)
    method = Runtime(device("full")).load_program(bytes(edge.to_executorch().buffer)).load_method("forward")
    assert len(method.delegates) == 1
    assert method.outside() == []
    past = torch.zeros(case.batch, dtype=torch.int32)
    for seed, rows in enumerate((4, 1, 2)):
        counts = torch.tensor([(row + seed) % (rows + 1) for row in range(case.batch)], dtype=torch.int32)
        inputs = Layer.inputs(arguments(case.with_(rows=rows, seed=seed)) | {"past": past, "q_len": counts})
        want = module(*inputs)
        [got] = method.execute(list(inputs))
        close(got, want.double().numpy())
        past += counts
    method.close()


def lowered(module: torch.nn.Module, given: dict[str, Any], route: str) -> Any:
    program = exported(module, given)  # type: ignore[arg-type]
    if route == "A":
        return to_edge(program, compile_config=CONFIG).to_backend(WebGPUPartitioner())
    return to_edge_transform_and_lower(program, partitioner=[WebGPUPartitioner()], compile_config=CONFIG)


class Twice(Layer):
    """The layer on its tokens, then once more behind them: two calls share each cache."""

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        first = super().forward(*inputs)
        *tokens, past, q_len = inputs
        return first + super().forward(*tokens, past + q_len, q_len)


@pytest.mark.parametrize("kind", KINDS)
def test_calls_that_share_a_cache(kind: str) -> None:
    case = Case((0, 3), (4, 2), rot=8, d=16)
    given = packed(arguments(case), kind)
    module = Twice(given)
    edge = lowered(module, given, "B")
    method = Runtime(device("full")).load_program(bytes(edge.to_executorch().buffer)).load_method("forward")
    assert len(method.delegates) == 1
    assert method.outside() == []
    for past in ((0, 3), (8, 7)):
        inputs = Layer.inputs(given | {"past": torch.tensor(past, dtype=torch.int32)})
        want = module(*inputs)
        [got] = method.execute(list(inputs))
        close(got, want.double().numpy())
    method.close()


class Reads(Layer):
    """The layer, and a sum over its key cache, which only the host's bytes can give."""

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(*inputs) + self.key_cache.to(torch.float32).sum()


@pytest.mark.parametrize(("kind", "d", "module"), [("int8", 6, Layer), ("int8", 8, Reads)])
def test_what_the_delegate_refuses_runs_outside(kind: str, d: int, module: type[Layer]) -> None:
    """Heads that fill no words, and a cache that something else reads, stay outside of delegates."""
    case = Case((0, 0), (4, 2), d=d)
    floats = arguments(case)
    for cache in CACHES:
        floats[cache].zero_()
    given = packed(floats, kind)
    layer = module(given)
    edge = lowered(layer, given, "B")
    calls = [str(n.target) for n in edge.exported_program().graph.nodes if n.op == "call_function"]
    assert any("group_query_attention" in name or "auto_functionalized" in name for name in calls)


# -- refusals


def wrong(**changes: torch.Tensor | None) -> dict[str, torch.Tensor | None]:
    """What stands in the place of right arguments."""
    return changes


REFUSED: dict[str, tuple[str, int, dict[str, torch.Tensor | None], str]] = {
    "I2 D = 96": ("int4", 96, {}, "key_cache holds 4-bit codes of heads of 96 elements; the Hadamard transform needs"),
    "I2 D = 4": ("int4", 4, {}, "key_cache holds 4-bit codes of heads of 4 elements"),
    "I2 D = 512": ("int4", 512, {}, "key_cache holds 4-bit codes of heads of 512 elements"),
    "no scales": ("int8", 8, wrong(key_scales=None), "key_cache is i8; key_scales is missing"),
    "shape of scales": (
        "int8", 8, wrong(value_scales=torch.zeros(2, 16, 2)),
        r"value_scales is f32\[2, 16, 2\]; it must be f32\[2, 16, 2, 1\] for value_cache",
    ),
    "scales a group": ("int8", 8, wrong(key_scales=torch.zeros(2, 16, 2, 2)), r"key_scales is f32\[2, 16, 2, 2\]; it"),
    "rows of scales": ("int4", 8, wrong(key_scales=torch.zeros(2, 15, 2, 1)), r"key_scales is f32\[2, 15, 2, 1\]; it"),
    "half scales": (
        "int8", 8, wrong(key_scales=torch.zeros(2, 16, 2, 1, dtype=torch.float16)),
        r"key_scales is f16\[2, 16, 2, 1\]; it must be f32",
    ),
    "kinds apart": (
        "int8", 8, wrong(value_cache=torch.zeros(2, 16, 2, 8, dtype=torch.uint8)),
        "key_cache is i8, value_cache u8; they must be equal",
    ),
    "scales of floats": (
        "int8", 8, wrong(key_cache=torch.zeros(2, 16, 2, 8), value_cache=torch.zeros(2, 16, 2, 8)),
        "key_scales is given, but key_cache is f32; caches with scales are int8 or uint8",
    ),
    "another integer": (
        "int8", 8, wrong(**{n: torch.zeros(2, 16, 2, 8, dtype=torch.int16) for n in CACHES}, **dict.fromkeys(SCALES)),
        "key_cache is i16; it must be one of",
    ),
    "half of the head": ("int4", 16, wrong(key=torch.zeros(2, 4, 2, 8)), r"key is f32\[2, .*, 2, 8\]; it must be"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_reason(name: str) -> None:
    """By the operator, by its fake kernel, and by the partitioner's question."""
    kind, d, changes, message = REFUSED[name]
    case = Case((3, 0), (2, 4), d=d)
    floats = arguments(case)
    if d in (4, 96, 512):
        codes = torch.zeros(2, 16, 2, d // 2, dtype=torch.uint8)
        given = floats | dict.fromkeys(CACHES, codes) | dict.fromkeys(SCALES, torch.zeros(2, 16, 2, 1))
    else:
        given = packed(floats, kind)
    given = given | changes
    with pytest.raises(ValueError, match=message):
        call(given)
    with torch._subclasses.FakeTensorMode() as mode, pytest.raises(ValueError, match=message):
        call({n: mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for n, t in given.items()})
    _, graph = build(case, given)
    reason = check_node(graph, graph.nodes[0])
    assert reason is not None
    assert re.match(message, reason)


def test_what_only_the_delegate_refuses() -> None:
    """Caches that are inputs, or outputs, and heads that fill no words or no workgroup."""
    case = Case((3, 0), (2, 4))
    b, graph = build(case, packed(arguments(case), "int8"))
    node = graph.nodes[0]
    key = node.args["key_cache"]
    assert isinstance(key, Ref)
    assert check_node(graph, node) is None
    shown = Graph(graph.values, graph.nodes, graph.inputs, (*graph.outputs, Ref(node.outputs[1])), graph.mutations)
    assert str(check_node(shown, node)) == "key_cache key_cache is an output; packed caches are private to the operator"
    b.values[key.value] = type(b.values[key.value])("input", "i8", (2, 16, 2, 8), "cache")
    assert "is no buffer of the program" in str(check_node(b.graph(*graph.outputs), node))
    for d, message in ((6, "must fill words of 4"), (2048, "at most 1024 are supported")):
        case = Case((0,), (1,), rows=1, capacity=2, d=d, heads=1, kv_heads=1)
        _, graph = build(case, packed(arguments(case), "int8"))
        assert message in str(check_node(graph, graph.nodes[0]))


@pytest.mark.parametrize("kind", KINDS)
def test_bad_lengths_change_nothing(kind: str) -> None:
    case = Case((3, 4), (1, 1), rot=8)
    given = packed(arguments(case), kind)
    with compiled(case, given) as layer:
        layer(given)
        before, counters = layer.state(), layer.device.counters.copy()
        for past, q_len in (((-1, 3), (1, 1)), ((3, 14), (1, 3)), ((3, 2), (5, 1))):
            bad = {n: torch.tensor(v, dtype=torch.int32) for n, v in (("past", past), ("q_len", q_len))}
            with pytest.raises(InputError, match=r"row (0|1)"):
                layer(given | bad)
        assert layer.device.counters.since(counters).submits == 0
        for name, x in layer.state().items():
            np.testing.assert_array_equal(x, before[name])


def test_stream_needs_ten_storage_buffers() -> None:
    """A device with subgroups and WebGPU's default of eight takes the kernel of any device."""
    graph = build(Case((0,), (1,)), arguments(Case((0,), (1,))))[1]
    roomy = replace(Limits(), subgroup_size=32, max_storage_buffers=10)
    for limits, columns in ((roomy, 8), (replace(roomy, max_storage_buffers=8), 0)):
        assert cell_columns(Lowering(graph, limits, lambda symbol: 1), {"bits": 4}) == columns
