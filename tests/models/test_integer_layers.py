"""torchao's layers of integer products (`Int8DynamicActivationInt8WeightConfig`): one delegate, numbers to the bit of
the activations' codes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from executorch.exir import EdgeCompileConfig, to_edge, to_edge_transform_and_lower
from torchao.kernel import intmm
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, PerTensor, quantize_
from torchao.quantization.quant_primitives import MappingType

from executorch_webgpu.partitioner import WebGPUPartitioner
from executorch_webgpu.runtime import Runtime
from tests.harness import device

SYMMETRIC, ASYMMETRIC = MappingType.SYMMETRIC, MappingType.ASYMMETRIC
INT8, ROWS = torch.int8, 48
ROUNDING = {torch.float32: (1e-4, 1e-3), torch.float16: (2e-2, 2e-2), torch.bfloat16: (2e-2, 2e-2)}
"""Absolute and relative tolerance of a result, by the model's dtype."""


class Layers(torch.nn.Module):
    """Siblings of one input of three axes, two of them without biases, and a layer of an odd width."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide = torch.nn.ModuleList(torch.nn.Linear(96, n, bias=n == 33) for n in (33, 8, 8, 1)).to(dtype)
        self.odd = torch.nn.Linear(65, 33).to(dtype)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return *(layer(x) for layer in self.wide), self.odd(y)


def exact(layer: torch.nn.Linear, x: torch.Tensor, mapping: MappingType, whole: bool) -> torch.Tensor:
    """Codes as torchao rounds them in float32, then in float64."""
    x = x.float()
    block = list(x.shape) if whole else [1] * (x.dim() - 1) + [x.shape[-1]]
    eps = torch.finfo(torch.float32).eps
    scale, zero = torch.ops.torchao.choose_qparams_affine(
        x, mapping.name, block, INT8, -128, 127, eps, torch.float32, INT8, True
    )
    codes = torch.ops.torchao.quantize_affine(x, block, scale, zero, INT8, -128, 127)
    weight: Any = layer.weight
    products = (codes.double() - zero.double()) @ weight.qdata.double().T
    bias = 0 if layer.bias is None else layer.bias.detach().double()
    return products * scale.double() * weight.scale.double().flatten() + bias


def inputs(rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of zeros, of one sign, of tiny and of large numbers."""
    made = torch.Generator().manual_seed(rows)
    x, y = torch.randn(2, rows, 96, generator=made), torch.randn(rows, 65, generator=made) + 1
    x[0, 0], y[-1] = -x[0, 0].abs(), 0
    x[1, 0], y[0] = x[1, 0] * 1e-3, y[0] * 30
    return x.to(dtype), y.to(dtype)


def lowered(layers: Layers, route: str, dtype: torch.dtype, disabled: tuple[str, ...]) -> bytes:
    """A `.pte` with a dynamic number of rows; route A or B as in test_quantized.py."""
    count = torch.export.Dim("count", min=1, max=ROWS)
    sizes = {"x": {1: count}, "y": {0: count}}
    program = torch.export.export(layers, inputs(12, dtype), dynamic_shapes=sizes).run_decompositions({})
    config = EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=route == "B")
    part = WebGPUPartitioner(disable_passes=disabled)
    if route == "A":
        edge = to_edge(program, compile_config=config).to_backend(part)
    else:
        edge = to_edge_transform_and_lower(program, partitioner=[part], compile_config=config)
    assert part.refused == {}
    return bytes(edge.to_executorch().buffer)


@pytest.mark.parametrize(
    ("route", "on", "mapping", "unsigned", "dtype"),
    [
        ("B", "full", SYMMETRIC, True, torch.float32), ("A", "default-limits", SYMMETRIC, False, torch.float32),
        ("A", "full", ASYMMETRIC, True, torch.float32), ("B", "default-limits", ASYMMETRIC, False, torch.float16),
        ("B", "full", SYMMETRIC, True, torch.bfloat16),
    ],
)  # fmt: skip
def test_layers_of_integer_products(
    route: str, on: str, mapping: MappingType, unsigned: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`unsigned`: as the layers are exported on processors that prefer unsigned bytes, or as on others."""
    graph = check(monkeypatch, route, on, mapping, unsigned, dtype)
    assert {node.op for node in graph.nodes} == {
        "webgpu.project", "webgpu.quantize_activations", "webgpu.linear_packed", "webgpu.fake_quantize"
    }  # fmt: skip
    found = [node for node in graph.nodes if node.op in ("webgpu.quantize_activations", "webgpu.fake_quantize")]
    assert [node.args.get("symmetric", False) for node in found] == [mapping is SYMMETRIC] * 2


@pytest.mark.parametrize(("whole", "unsigned"), [(False, True), (True, False)])
def test_operator_by_operator(whole: bool, unsigned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the pass, and where the whole input has one scale, the integer products are operators of their own."""
    disabled = () if whole else ("fuse_quantized",)
    graph = check(monkeypatch, "B", "full", SYMMETRIC, unsigned, torch.float32, whole, disabled)
    assert [node.op for node in graph.nodes].count("aten._int_mm.default") == 5


def check(
    monkeypatch: pytest.MonkeyPatch, route: str, on: str, mapping: MappingType, unsigned: bool, dtype: torch.dtype,
    whole: bool = False, disabled: tuple[str, ...] = (),
) -> Any:  # fmt: skip
    """Runs 1, 3 and 48 rows in one delegate, whose graph it gives."""
    monkeypatch.setattr(intmm, "_cpu_is_vnni_supported", lambda: unsigned)
    monkeypatch.setattr(intmm, "_cpu_is_amx_tile_supported", lambda: False)
    layers = Layers(dtype).eval()
    config: dict[str, Any] = {"granularity": PerTensor()} if whole else {}
    quantize_(layers, Int8DynamicActivationInt8WeightConfig(act_mapping_type=mapping, **config))
    with torch.no_grad():
        method = Runtime(device(on)).load_program(lowered(layers, route, dtype, disabled)).load_method("forward")
        assert (len(method.delegates), method.outside()) == (1, [])
        for rows in (1, 3, ROWS):
            x, y = inputs(rows, dtype)
            got = method.execute([x, y])
            wanted = [exact(layer, x, mapping, whole) for layer in layers.wide] + [exact(layers.odd, y, mapping, whole)]
            absolute, relative = ROUNDING[dtype]
            for mine, want in zip(got, wanted, strict=True):
                error = (torch.as_tensor(mine).double() - want).abs()
                assert bool((error <= absolute + relative * want.abs()).all()), (rows, float(error.max()))
    return method.delegates[0].graph
