"""Memory of a prefill: what a layer of attention takes on the device is what its tensors take, and little more."""

from __future__ import annotations

from math import prod

import numpy as np
import torch
from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  (registers llama::*)

from executorch_webgpu.backend.graph import Sym, evaluate
from executorch_webgpu.partitioner import WebGPUPartitioner
from executorch_webgpu.runtime import Method, Runtime
from executorch_webgpu.runtime.gpu.host import STORAGE
from tests.harness import device

HQ, HKV, D, ROWS, MODEL = 32, 8, 64, 2048, 64
SLACK = 64 << 20
"""Bytes above the tensors themselves: scratch, parameters, read-back. The scores alone would be 512 MiB."""


class Layer(torch.nn.Module):
    """Projections from a narrow model (so that attention is what takes memory), caches, causal attention."""

    def __init__(self) -> None:
        super().__init__()
        self.q = torch.nn.Linear(MODEL, HQ * D, bias=False)
        self.k = torch.nn.Linear(MODEL, HKV * D, bias=False)
        self.v = torch.nn.Linear(MODEL, HKV * D, bias=False)
        self.out = torch.nn.Linear(HQ * D, MODEL, bias=False)
        self.register_buffer("k_cache", torch.zeros(1, ROWS, HKV, D))
        self.register_buffer("v_cache", torch.zeros(1, ROWS, HKV, D))

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q [1, S, HQ, D], k and v [1, S, HKV, D]."""
        length = x.shape[1]
        q = self.q(x).view(1, length, HQ, D)
        return q, self.k(x).view(1, length, HKV, D), self.v(x).view(1, length, HKV, D)

    def forward(self, x: torch.Tensor, input_pos: torch.Tensor) -> torch.Tensor:
        start, length = input_pos[0].item(), x.shape[1]
        torch._check(start >= 0)
        torch._check(start + length <= ROWS)
        q, k, v = self.project(x)
        torch.ops.llama.update_cache(k, self.k_cache, start)
        torch.ops.llama.update_cache(v, self.v_cache, start)
        y = torch.ops.llama.custom_sdpa(q, self.k_cache, self.v_cache, start, None, 0.0, True)
        return self.out(y.reshape(1, length, HQ * D))


def _tensors(method: Method, inputs: list[torch.Tensor]) -> int:
    """Bytes of every tensor of the graph that has memory of its own, each counted as if alive throughout."""
    (delegate,) = method.delegates
    sizes = dict(enumerate(tuple(x.shape) for x in inputs))

    def free(symbol: Sym) -> int:
        assert symbol.op == "input_dim"
        position, axis = symbol.args
        return sizes[int(str(position))][int(str(axis))]

    total = 0
    for index, value in enumerate(delegate.graph.values):
        if value.alias is None and value.kind != "symint":
            kind = method.device.limits.wgsl_type(delegate.graph.storage_dtype(index))
            total += prod(evaluate(dim, free) for dim in value.shape) * STORAGE[kind].itemsize
    return total


def test_prefill_of_2048_rows_takes_its_tensors_and_little_more() -> None:
    torch.manual_seed(0)
    module = Layer().eval()
    seq = torch.export.Dim("seq", min=1, max=ROWS)
    with torch.no_grad():
        exported = torch.export.export(
            module, (torch.randn(1, 3, MODEL), torch.tensor([0])), dynamic_shapes=({1: seq}, None), strict=True
        )
    edge = to_edge_transform_and_lower(
        exported,
        partitioner=[WebGPUPartitioner()],
        compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
    )
    on = device("default-limits")
    before = on.memory.total
    on.memory.peak = before
    with Runtime(on).load_program(bytes(edge.to_executorch().buffer)) as program:
        method = program.load_method("forward")
        assert method.outside() == []
        inputs = [torch.randn(1, ROWS, MODEL), torch.tensor([0])]
        (got,) = method.execute(inputs)
        growth = on.memory.peak - before
        tensors = _tensors(method, inputs)
        weights = 4 * (2 * HQ + 2 * HKV) * D * MODEL
        state = 4 * 2 * ROWS * HKV * D
        activations = 4 * ROWS * (2 * MODEL + 2 * HQ * D + 2 * HKV * D)
        assert weights + state + activations <= tensors + SLACK // 64  # nothing that must be there is left out
        assert growth <= weights + state + activations + SLACK
        assert growth <= tensors + SLACK
        (delegate,) = method.delegates
        (plan,) = delegate._plans.values()
        assert plan.scratch_bytes < SLACK

        rows = [0, 1, 31, 32, 1000, ROWS - 1]  # a few of the rows, in float64
        with torch.no_grad():
            q, k, v = (x.double()[0].numpy() for x in module.project(inputs[0]))
            for row in rows:
                heads = []
                for head in range(HQ):
                    scores = k[: row + 1, head // (HQ // HKV)] @ q[row, head] * D**-0.5
                    chances = np.exp(scores - scores.max())
                    heads.append(chances @ v[: row + 1, head // (HQ // HKV)] / chances.sum())
                expected = np.concatenate(heads) @ module.out.weight.double().numpy().T
                np.testing.assert_allclose(got[0, row].numpy(), expected, atol=1e-4, rtol=1e-3)
    assert on.memory.total <= before + (1 << 16)  # the device's own small buffers stay
