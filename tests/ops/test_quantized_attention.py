"""ExecuTorch's quantised KV cache: rows quantised by their own range, six cache writes, quantised attention."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from executorch.exir import EdgeCompileConfig, to_edge, to_edge_transform_and_lower
from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  (registers the operators)

from executorch_webgpu.backend.graph import Arg, Graph, Node, Ref
from executorch_webgpu.backend.passes import run_passes
from executorch_webgpu.ops.base import Lowering, check_node, find
from executorch_webgpu.ops.quantized_attention import ATTENTION, CHOOSE, DEQUANTIZE, PARTS, QUANTIZE
from executorch_webgpu.partitioner import WebGPUPartitioner
from executorch_webgpu.runtime import Runtime
from tests.harness import DEVICES, GraphBuilder, device, run
from tests.ops.attention_reference import Case, assert_close
from tests.ops.attention_reference import reference as attention_reference

Array = np.ndarray[Any, Any]
CONFIG = EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True)
CACHES = ("k_cache", "v_cache")


def quantized(x: Array) -> tuple[Array, Array, Array]:
    """Rows of x by torch's own operators: (codes, scales as float32, zero points)."""
    tensor = torch.from_numpy(np.float32(x))
    scales, zeros = torch.ops.quantized_decomposed.choose_qparams_per_token_asymmetric(tensor, torch.int8)
    codes = torch.ops.quantized_decomposed.quantize_per_token(tensor, scales, zeros, -128, 127, torch.int8)
    return codes.numpy(), scales.float().numpy(), zeros.numpy()


def awkward_rows() -> Array:
    """Positive, negative and mixed rows, zeros, tiny and large ones."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 4, 20))
    x[0, 0] = np.abs(x[0, 0])
    x[0, 1] = -np.abs(x[0, 1])
    x[1, 0, 0] = 0
    x[1, 1] *= 1e-9
    x[1, 2] *= 1e6
    return np.float32(x)


@pytest.mark.parametrize("on", DEVICES)
def test_rows_are_quantised_as_torch_does(on: str) -> None:
    """Zero points and codes to a unit where rounding decides; dequantised again within a step.

    Where the least scale stands, torch may put the range at the other end of the codes.
    """
    x = awkward_rows()
    b = GraphBuilder()
    source = b.input("f32", x.shape)
    rows = (*x.shape[:3], 1)
    scales, zeros = b.node(CHOOSE, {"input": source, "dtype": "i8"}, ("f32", rows), ("i64", rows))
    given: dict[str, Arg] = {"scales": scales, "zero_points": zeros, "quant_min": -128, "quant_max": 127}
    codes = b.node(QUANTIZE, {"input": source, **given, "dtype": "i8"}, ("i8", x.shape))
    given |= {"dtype": "i8", "output_dtype": "f32"}
    back = b.node(DEQUANTIZE, {"input": codes, **given}, ("f32", x.shape))
    graph = b.graph(zeros, codes, back)
    for node in graph.nodes:
        assert check_node(graph, node) is None
    found_zeros, found_codes, found = run(b, graph, device(on), x)
    want_codes, want_scales, want_zeros = quantized(x)
    usual = want_scales[..., 0] > 2.0**-23
    assert 0 < usual.sum() < usual.size
    assert np.abs(found_zeros - want_zeros)[usual].max() <= 1
    assert np.abs(found_codes.astype(int) - want_codes)[usual].max() <= 1
    assert np.mean(found_codes[usual] == want_codes[usual]) > 0.99
    assert (np.abs(found - x) <= want_scales * 1.001).all()
    assert (np.abs(found - x) <= want_scales * 0.51).mean() > 0.95  # zero points are rounded, so the ends clip


def built(case: Case, arrays: dict[str, Array]) -> tuple[GraphBuilder, Graph, list[Array]]:
    """A graph of one quantised attention, its inputs, and the dequantised tensors."""
    b, args, feeds = GraphBuilder(), dict[str, Arg](), []
    for name, letter in PARTS.items():
        codes, scales, zeros = quantized(arrays[name])
        for key, array, dtype in (
            (name, codes, "i8"), (f"{letter}_scales", scales, "f32"), (f"{letter}_zero_points", zeros, "i8")
        ):  # fmt: skip
            args[key] = b.input(dtype, array.shape)
            feeds.append(array.astype(np.int8) if dtype == "i8" else array)
        arrays[name] = (codes.astype(np.float64) - zeros) * scales.astype(np.float64)
    options: dict[str, Arg] = {
        "start_pos": case.pos, "attn_mask": None, "drpout_p": 0.0, "is_causal": case.kv_limit == "causal",
        "scale": case.scale, "is_seq_at_dim_2": False,
    }  # fmt: skip
    out = b.node(ATTENTION, {**args, **options}, ("f32", (case.batch, case.rows, case.heads, case.d)))
    return b, b.graph(out), feeds


CASES = {
    "decode": Case(8, 4, 16, 1, 40, 20),
    "last row": Case(4, 2, 64, 1, 33, 32),
    "prompt": Case(6, 2, 32, 17, 40, 3),
    "batch": Case(4, 4, 24, 3, 20, 5, batch=2),
    "no causal limit": Case(4, 2, 16, 3, 20, 5, kv_limit="prefix"),
    "scale": Case(4, 2, 16, 3, 20, 5, scale=0.7),
    "odd head": Case(2, 1, 7, 2, 9, 1),
}


def given(case: Case) -> dict[str, Array]:
    """query [B, S, Hq, D], key and value [B, C, Hkv, D]."""
    rng = np.random.default_rng(case.rows)
    kv = (case.batch, case.capacity, case.kv_heads, case.d)
    shapes = {"query": (case.batch, case.rows, case.heads, case.d), "key": kv, "value": kv}
    return {name: rng.standard_normal(shape) + 0.3 for name, shape in shapes.items()}


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_attention_of_codes(name: str, on: str) -> None:
    case, arrays = CASES[name], given(CASES[name])
    b, graph, feeds = built(case, arrays)
    assert check_node(graph, graph.nodes[0]) is None
    [got] = run(b, run_passes(graph), device(on), *feeds)
    want = attention_reference(case, {n: x.transpose(0, 2, 1, 3) for n, x in arrays.items()})
    assert_close(got, want.transpose(0, 2, 1, 3))


class Cached(torch.nn.Module):
    """What the exporter makes of a layer: everything int8, the query too."""

    def __init__(self, capacity: int, kv_heads: int, size: int) -> None:
        super().__init__()
        for name in CACHES:
            self.register_buffer(name, torch.zeros(1, capacity, kv_heads, size, dtype=torch.int8))
            self.register_buffer(f"{name}_scales", torch.ones(1, capacity, kv_heads, 1))
            self.register_buffer(f"{name}_zeros", torch.ones(1, capacity, kv_heads, 1, dtype=torch.int8))

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        start = position[0].item()
        torch._check_is_size(start)
        q_codes, q_scales, q_zeros = self.quantize(q)
        for name, x in zip(CACHES, (k, v), strict=True):
            for suffix, part in zip(("", "_scales", "_zeros"), self.quantize(x), strict=True):
                torch.ops.llama.update_cache(part, getattr(self, name + suffix), start)
        tails = [getattr(self, name + suffix) for name in CACHES for suffix in ("_zeros", "_scales")]
        mixed: torch.Tensor = torch.ops.llama.custom_quantized_sdpa(
            q_codes, self.k_cache, self.v_cache, start, None, 0.0, True, None, q_zeros, q_scales, *tails
        )
        return mixed

    @staticmethod
    def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        scales, zeros = torch.ops.quantized_decomposed.choose_qparams_per_token_asymmetric(x, torch.int8)
        codes = torch.ops.quantized_decomposed.quantize_per_token(x, scales, zeros, -128, 127, torch.int8)
        return codes, scales.float(), zeros.to(torch.int8)


@pytest.mark.parametrize("route", ["A", "B"])
def test_a_layer_is_one_delegate(route: str) -> None:
    """A prompt and three tokens, against float64 attention over what torch's operators quantise."""
    heads, kv_heads, size, capacity = 4, 2, 16, 24
    module = Cached(capacity, kv_heads, size)

    def tokens(rows: int, seed: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(1, rows, h, size, generator=generator) for h in (heads, kv_heads, kv_heads)]

    rows = {1: torch.export.Dim("rows", min=1, max=8)}
    example = (*tokens(3, 0), torch.tensor([0]))
    program = torch.export.export(module, example, dynamic_shapes=(rows, rows, rows, None), strict=False)
    if route == "A":
        edge = to_edge(program, compile_config=CONFIG).to_backend(WebGPUPartitioner())
    else:
        edge = to_edge_transform_and_lower(program, partitioner=[WebGPUPartitioner()], compile_config=CONFIG)
    method = Runtime(device("full")).load_program(bytes(edge.to_executorch().buffer)).load_method("forward")
    assert len(method.delegates) == 1
    assert method.outside() == []
    kept = {name: np.zeros((1, 0, kv_heads, size)) for name in ("key", "value")}
    for count in (5, 1, 1, 2):
        position = kept["key"].shape[1]
        given = tokens(count, position + 1)
        wide = []
        for x in given:
            codes, scales, zeros = quantized(x.numpy())
            wide.append((codes.astype(np.float64) - zeros) * scales.astype(np.float64))
        kept = {name: np.concatenate([kept[name], x], 1) for name, x in zip(kept, wide[1:], strict=True)}
        case = Case(heads, kv_heads, size, count, position + count, position)
        tensors = {n: x.transpose(0, 2, 1, 3) for n, x in (("query", wide[0]), *kept.items())}
        [got] = method.execute([*given, torch.tensor([position])])
        # a rounding that falls the other way moves a code by one
        assert_close(got.numpy(), attention_reference(case, tensors).transpose(0, 2, 1, 3), 2e-3, 2e-3)
    method.close()


# -- refusals


def test_refused_with_a_reason() -> None:
    case = CASES["decode"]
    _, graph, _ = built(case, given(case))
    node = graph.nodes[0]

    def reason(change: dict[str, Arg], **values: tuple[str, tuple[int, ...]]) -> str:
        changed = list(graph.values)
        for name, (dtype, shape) in values.items():
            index = node.args[name]
            assert isinstance(index, Ref)
            changed[index.value] = replace(changed[index.value], dtype=dtype, shape=shape)
        other = replace(graph, values=tuple(changed))
        return str(check_node(other, replace(node, args={**node.args, **change})))

    assert reason({"is_seq_at_dim_2": True}) == "is_seq_at_dim_2 is true; rows are supported on axis 1"
    assert reason({"k_scales": None}) == "k_scales is missing"
    assert reason({}, k_scales=("f32", (1, 40, 4))) == "k_scales is f32[1, 40, 4]; it must be f32[1, 40, 4, 1]"
    assert re.match(
        r"v_zero_points is i32\[.*; it must be i8\[1, 40, 4, 1\]", reason({}, v_zero_points=("i32", (1, 40, 4, 1)))
    )
    assert re.match(r"query is f32\[1, 1, 8, 16\]; it must be int8", reason({}, query=("f32", (1, 1, 8, 16))))
    assert "do not fit a KV cache of 40 rows" in reason({"start_pos": 40})


def test_a_wide_scale_stays_out() -> None:
    """torch's scales are float64: only what casts them, or quantises by them, may read them."""
    b = GraphBuilder()
    source = b.input("f32", (2, 8))
    scales, zeros = b.node(CHOOSE, {"input": source, "dtype": "i8"}, ("f32", (2, 1)), ("i64", (2, 1)))
    more = b.node("aten.neg.default", {"self": scales}, ("f32", (2, 1)))
    graph = b.graph(zeros, more)
    assert "its float64 scale is read by aten.neg.default" in str(check_node(graph, graph.nodes[0]))
    shown = Graph(graph.values, graph.nodes[:1], graph.inputs, (scales,))
    assert "its float64 scale is an output" in str(check_node(shown, graph.nodes[0]))
    wrong = Node(CHOOSE, {"input": source, "dtype": "u8"}, graph.nodes[0].outputs)
    assert check_node(graph, wrong) == "quantisation to u8; only int8 is supported"


def test_the_record_has_no_kernel_of_its_own() -> None:
    case = CASES["decode"]
    _, graph, _ = built(case, given(case))
    op = find(ATTENTION)
    assert op is not None
    with pytest.raises(NotImplementedError, match="the backend's passes expand it"):
        list(op.lower(Lowering(graph, device("full").limits, lambda symbol: 1), graph.nodes[0]))
