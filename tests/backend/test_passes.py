"""Fusion passes: they find what exporters spell out, and switched off they give the same numbers."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pytest
import torch
from executorch.exir import EdgeCompileConfig, to_edge, to_edge_transform_and_lower
from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  (registers llama::*)
from torch import nn
from torch.export import Dim, export

from executorch_webgpu.backend.passes import OPTIONAL
from executorch_webgpu.partitioner import WebGPUPartitioner
from executorch_webgpu.runtime import Method, Runtime
from tests.harness import device

CONFIG = EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True)
HEADS, KV_HEADS, SIZE, CAPACITY = 4, 2, 8, 24


class Block(nn.Module):
    """A decoder block as Hugging Face writes it: RMSNorm, half-split rotary, repeated KV heads, gated activation."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        width = HEADS * SIZE
        self.norm = nn.Parameter(torch.rand(width) + 0.5)
        self.q, self.k = nn.Linear(width, width, bias=False), nn.Linear(width, KV_HEADS * SIZE)
        self.v, self.o = nn.Linear(width, KV_HEADS * SIZE, bias=False), nn.Linear(width, width, bias=False)
        self.gate, self.up = nn.Linear(width, 40, bias=False), nn.Linear(width, 40, bias=False)
        self.down = nn.Linear(40, width, bias=False)
        angles = torch.arange(CAPACITY)[:, None] * 0.3 ** torch.arange(SIZE // 2)[None].float()
        self.register_buffer("cos", torch.cat([angles, angles], -1).cos())
        self.register_buffer("sin", torch.cat([angles, angles], -1).sin())
        self.register_buffer("mask", torch.ones(CAPACITY, CAPACITY, dtype=torch.bool).tril())
        self.register_buffer("keys", torch.zeros(1, KV_HEADS, CAPACITY, SIZE))
        self.register_buffer("values", torch.zeros(1, KV_HEADS, CAPACITY, SIZE))
        self.to(dtype)

    def rotate(self, x: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        half = x.shape[-1] // 2
        turned = torch.cat([-x[..., half:], x[..., :half]], -1)
        return x * self.cos[where] + turned * self.sin[where]

    def forward(self, x: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        h = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * self.norm
        split = (1, x.shape[1], -1, SIZE)
        q, k, v = (m(h).view(split).transpose(1, 2) for m in (self.q, self.k, self.v))
        q, k = self.rotate(q, where), self.rotate(k, where)
        self.keys.index_copy_(2, where, k)
        self.values.index_copy_(2, where, v)
        keys, values = (c.repeat_interleave(HEADS // KV_HEADS, dim=1) for c in (self.keys, self.values))
        y = nn.functional.scaled_dot_product_attention(q, keys, values, self.mask[where])
        x = x + self.o(y.transpose(1, 2).reshape(1, x.shape[1], -1))
        return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def lowered(module: nn.Module, disabled: Collection[str], route: str) -> Method:
    inputs = (torch.randn(1, 5, HEADS * SIZE, dtype=next(module.parameters()).dtype), torch.arange(5))
    rows = Dim("rows", min=2, max=CAPACITY - 1)
    exported = export(module, inputs, dynamic_shapes=({1: rows}, {0: rows}))
    partitioner = WebGPUPartitioner(disable_passes=disabled)
    if route == "A":
        edge = to_edge(exported, compile_config=CONFIG).to_backend(partitioner)
    else:
        edge = to_edge_transform_and_lower(exported, partitioner=[partitioner], compile_config=CONFIG)
    method = Runtime(device("full")).load_program(bytes(edge.to_executorch().buffer)).load_method("forward")
    assert method.outside() == []
    assert len(method.delegates) == 1
    return method


def ops(method: Method) -> set[str]:
    return {node.op for node in method.delegates[0].graph.nodes}


def outputs(method: Method, dtype: torch.dtype) -> list[np.ndarray]:
    generator, results, position = torch.Generator().manual_seed(1), [], 0
    for count in (7, 1, 1, 4, 1):
        x = torch.randn(1, count, HEADS * SIZE, generator=generator).to(dtype)
        results.append(method.execute([x, torch.arange(position, position + count)])[0].float().numpy())
        position += count
    return results


@pytest.mark.parametrize("route", ["A", "B"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_pass_on_and_off_gives_the_same_numbers(dtype: torch.dtype, route: str) -> None:
    torch.manual_seed(0)
    module = Block(dtype).eval()
    fused, plain = lowered(module, (), route), lowered(module, tuple(OPTIONAL), route)
    projections = {"webgpu.project"} if route == "B" else {"webgpu.rms_norm", "webgpu.swiglu"}
    expected = {"webgpu.rope", *projections}
    assert expected <= ops(fused)
    assert not expected & ops(plain)
    if route == "A":
        assert "webgpu.linear" in ops(fused)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3
    for got, reference in zip(outputs(fused, dtype), outputs(plain, dtype), strict=True):
        np.testing.assert_allclose(got, reference, atol=tolerance, rtol=10 * tolerance)


def test_attention_reads_the_cache_itself() -> None:
    torch.manual_seed(0)
    method = lowered(Block(torch.float16).eval(), (), "B")
    graph = method.delegates[0].graph
    (attention,) = [node for node in graph.nodes if node.op == "webgpu.attention"]
    for name, cache in (("key", "keys"), ("value", "values")):
        arg = attention.args[name]
        assert graph.values[graph.root(graph.values.index(graph.value(arg)))].name == cache
        assert graph.value(arg).shape[1] == KV_HEADS
    assert not any(op.startswith(("aten.repeat_interleave", "aten.expand")) for op in ops(method))


@pytest.mark.parametrize("name", list(OPTIONAL))
def test_each_pass_alone_can_be_left_out(name: str) -> None:
    torch.manual_seed(0)
    module = Block(torch.float32).eval()
    reference, without = outputs(lowered(module, (), "B"), torch.float32), lowered(module, (name,), "B")
    for got, expected in zip(outputs(without, torch.float32), reference, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5, rtol=1e-4)


class Scaled(nn.Module):
    """Products and sums with a zero-dimensional tensor input: nothing for a fusion to trip over."""

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return x * scale + scale * x.t() + scale.permute(()) * x


@pytest.mark.parametrize("disabled", [(), tuple(OPTIONAL)])
def test_zero_dimensional_operands(disabled: Collection[str]) -> None:
    inputs = (torch.randn(3, 3), torch.tensor(2.0))
    partitioner = WebGPUPartitioner(disable_passes=disabled)
    edge = to_edge_transform_and_lower(export(Scaled(), inputs), partitioner=[partitioner], compile_config=CONFIG)
    method = Runtime(device("full")).load_program(bytes(edge.to_executorch().buffer)).load_method("forward")
    assert method.outside() == []
    torch.testing.assert_close(method.execute(inputs)[0], Scaled()(*inputs))
