"""Operators of torchao and ExecuTorch that quantise and dequantise, against those libraries on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from executorch.exir.passes import _quant_patterns_and_replacements  # noqa: F401  (registers the lookups)
from executorch.extension.llm.export import int4  # noqa: F401  (registers dequantize_int4_tensor)
from torchao.quantization import quant_primitives  # noqa: F401  (registers the affine operators)

from executorch_webgpu.backend.graph import Arg, Graph
from executorch_webgpu.ops.base import check_node
from executorch_webgpu.runtime.errors import InputError
from tests.harness import DEVICES, GraphBuilder, device, run
from tests.ops.aten import Case, add, check, integers, randn

F32, F16, I8 = torch.float32, torch.float16, torch.int8


def dequantize(shape: tuple[int, ...], block: list[int], zeros: bool = True, dtype: torch.dtype = F32) -> Case:
    count = tuple(s // b for s, b in zip(shape, block, strict=True))
    scale = randn(*count).abs() + 0.1
    zero = integers(*count, low=-8, high=8, dtype=I8) if zeros else None
    args = (integers(*shape, low=-8, high=8, dtype=I8), block, scale, zero, I8, -8, 7)
    kwargs = {} if dtype is F32 else {"output_dtype": dtype}

    # torchao subtracts and multiplies in the result's type; the reference does so in float64
    def exact(x: Any, *_: Any, **__: Any) -> torch.Tensor:
        wide = scale.double()
        shift = torch.zeros(count) if zero is None else zero
        for axis, part in enumerate(block):
            wide, shift = wide.repeat_interleave(part, axis), shift.repeat_interleave(part, axis)
        return (x.double() - shift) * wide

    return Case("torchao.dequantize_affine.default", args, kwargs, exact)


@pytest.mark.parametrize("on", DEVICES)
def test_dequantize_affine(on: str) -> None:
    cases = [
        dequantize((6, 64), [1, 32]), dequantize((6, 64), [1, 64]), dequantize((6, 64), [6, 64]),
        dequantize((5, 12), [1, 3], zeros=False), dequantize((4, 6, 8), [2, 3, 4]),
        dequantize((2, 3, 4, 5), [1, 3, 2, 5]),
        dequantize((7,), [7]), dequantize((3, 32), [1, 16], dtype=F16),
    ]  # fmt: skip
    check(cases, device(on))


@pytest.mark.parametrize("on", DEVICES)
def test_quantize_affine(on: str) -> None:
    x = torch.cat([randn(4, 30, scale=3.0), torch.tensor([[0.5, -2.5], [1.5, 2.5], [1e9, -1e9], [0.0, -0.5]])], 1)
    scale = torch.tensor([[1.0, 0.5], [1.0, 1.0], [0.25, 1.0], [2.0, 1.0]])
    zero = torch.tensor([[0, 3], [-1, 0], [5, -7], [0, 0]], dtype=I8)
    args = (x, [1, 16], scale, zero, I8, -128, 127)
    want = torch.ops.torchao.quantize_affine(*args)
    check([Case("torchao.quantize_affine.default", args, reference=lambda *_: want)], device(on))


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("shape", [(1, 5, 64), (3, 130), (1, 1), (2, 3, 1000)])
def test_rows_by_their_own_range(shape: tuple[int, ...], on: str) -> None:
    """Scales agree to the last bits, zero points and what is dequantised to a quantum at ties."""
    x = randn(*shape) * 3 + 1
    x.view(-1, shape[-1])[0] = 0
    block = [1] * (len(shape) - 1) + [shape[-1]]
    scale, zero = torch.ops.torchao.choose_qparams_affine(x, "ASYMMETRIC", block, I8, -128, 127, None, None, I8)
    case = Case("torchao.choose_qparams_affine.default", (x, "ASYMMETRIC", block, I8, -128, 127, None, None, I8))
    b = GraphBuilder()
    inputs: list[Any] = []
    outputs = add(b, case, [scale, zero], inputs)
    args: dict[str, Arg] = {"input": b.input("f32", shape), "quant_min": -128, "quant_max": 127, "eps": None}
    outputs.append(b.node("webgpu.fake_quantize", args, ("f32", shape)))
    graph = b.graph(*outputs)
    assert [check_node(graph, node) for node in graph.nodes] == [None, None]
    got_scale, got_zero, got = run(b, graph, device(on), *inputs, x)
    np.testing.assert_allclose(got_scale, scale.numpy(), rtol=2e-7)
    assert np.abs(got_zero.astype(int) - zero.numpy().astype(int)).max() <= 1
    assert np.mean(got_zero != zero.numpy()) <= 0.34
    q = torch.ops.torchao.quantize_affine(x, block, scale, zero, I8, -128, 127)
    want = torch.ops.torchao.dequantize_affine(q, block, scale, zero, I8, -128, 127).numpy()
    quanta = np.abs(got - want) / scale.numpy()[..., None]
    assert quanta.max() <= 1.01
    assert np.mean(quanta > 0.01) <= 0.01
    assert np.abs(got - x.numpy()).max() <= 0.51 * scale.max().item() + 1e-6  # it is x, rounded


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize(
    ("shape", "whole", "span", "eps"),
    [((200, 64), False, (-128, 127), 2.0**-23), ((2, 3, 37), False, (-64, 63), None),
     ((4, 3), False, (-127, 127), None), ((3, 301), False, (-8, 7), 0.5), ((5, 33), True, (-128, 127), 2.0**-23),
     ((9,), False, (-100, 20), None)],
)  # fmt: skip
def test_symmetric_rows(shape: tuple[int, ...], whole: bool, span: tuple[int, int], eps: float | None, on: str) -> None:
    """Scales and what is dequantised are torchao's bit by bit: rows of zeros, whose largest number is negative (a tie,
    where the range is even), of tiny numbers, and others."""
    x = randn(*shape) * 3
    rows = x.view(-1, shape[-1])
    for i, change in enumerate((lambda r: r * 0, lambda r: -r.abs(), lambda r: r * 1e-20, lambda r: r * 2 + 40)):
        if i < len(rows) - 1:
            rows[i] = change(rows[i])
    block = list(shape) if whole else [1] * (len(shape) - 1) + [shape[-1]]
    given = (x, "SYMMETRIC", block, I8, *span, eps, F32, I8, True)
    scale, zero = torch.ops.torchao.choose_qparams_affine(*given)
    b = GraphBuilder()
    inputs: list[Any] = []
    outputs = add(b, Case("torchao.choose_qparams_affine.default", given), [scale, zero], inputs)
    if not whole:
        args: dict[str, Arg] = {
            "input": b.input("f32", shape), "quant_min": span[0], "quant_max": span[1], "eps": eps, "symmetric": True,
        }  # fmt: skip
        outputs.append(b.node("webgpu.fake_quantize", args, ("f32", shape)))
    graph = b.graph(*outputs)
    assert [check_node(graph, node) for node in graph.nodes] == [None] * len(graph.nodes)
    got_scale, got_zero, *got = run(b, graph, device(on), *inputs, *([] if whole else [x]))
    np.testing.assert_array_equal(got_scale, scale.numpy())
    np.testing.assert_array_equal(got_zero, zero.numpy())
    q = torch.ops.torchao.quantize_affine(x, block, scale, zero, I8, *span)
    want = torch.ops.torchao.dequantize_affine(q, block, scale, zero, I8, *span).numpy()
    for values in got:
        np.testing.assert_array_equal(values, want)


@pytest.mark.parametrize("on", DEVICES)
def test_int4_tensor(on: str) -> None:
    q = integers(6, 32, low=0, high=256, dtype=torch.uint8)
    scale, zero = randn(4, 6).abs() + 0.1, integers(4, 6, low=0, high=16, dtype=I8)
    op = "torchao.dequantize_int4_tensor.default"
    cases = [
        Case(op, (q, scale, zero.float(), 16, F32), reference=torch.ops.torchao.dequantize_int4_tensor, rtol=1e-6),
        Case(op, (q, scale, zero, 16, F16), reference=torch.ops.torchao.dequantize_int4_tensor, rtol=2e-3),
    ]
    for case in cases:  # the operator's own result is in float32 whatever is asked for
        object.__setattr__(
            case, "reference", lambda q, s, z, g, t: torch.ops.torchao.dequantize_int4_tensor(q, s, z, g, F32)
        )
    check(cases, device(on))


@pytest.mark.parametrize("on", DEVICES)
def test_quantised_lookups(on: str) -> None:
    lib = torch.ops.quantized_decomposed
    idx = integers(2, 5, low=0, high=11)
    cases = []
    for name, bits, kind in (("byte", 8, I8), ("4bit", 4, torch.uint8), ("2bit", 2, torch.uint8)):
        for groups in (0, 1, 4):
            low = -128 if bits == 8 else 0
            weight = integers(11, 32 * bits // 8, low=low, high=low + 256, dtype=kind, seed=groups)
            scale = randn(11, *([groups] if groups else [])).abs() + 0.1
            zero = integers(*scale.shape, low=-2, high=2).float() if groups else None
            span = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1)
            for overload, extra in (("default", {}), ("dtype", {"dtype": F32})):
                op = getattr(getattr(lib, f"embedding_{name}"), overload)
                given = (weight, scale, zero, *span, idx)
                want = op(*given, **extra)
                name_ = f"quantized_decomposed.embedding_{name}.{overload}"
                cases.append(Case(name_, given, extra, lambda *_, want=want, **__: want, rtol=1e-6))
    check(cases, device(on))


def test_lookup_out_of_range_is_refused() -> None:
    b = GraphBuilder()
    args: dict[str, Arg] = {
        "weight": b.stored("constant", "i8", np.zeros((3, 4), np.int8), "w"),
        "weight_scales": b.stored("constant", "f32", np.ones(3, np.float32), "s"),
        "weight_zero_points": None, "weight_quant_min": -128, "weight_quant_max": 127, "indices": b.input("i64", (2,)),
    }  # fmt: skip
    graph = b.graph(b.node("quantized_decomposed.embedding_byte.default", args, ("f32", (2, 4))))
    with pytest.raises(InputError, match="token id"):
        run(b, graph, device("full"), np.array([0, 3]))


def refused(op: str, args: dict[str, Arg], builder: GraphBuilder, *outs: Any) -> str:
    builder.node(op, args, *outs)
    graph: Graph = builder.graph()
    reason = check_node(graph, graph.nodes[0])
    assert reason is not None
    return reason


def test_refusals() -> None:
    def affine(**changes: Any) -> str:
        b = GraphBuilder()
        args: dict[str, Any] = {
            "input": b.input("i8", (4, 32)), "block_size": (1, 16), "scale": b.input("f32", (4, 2)), "zero_point": None,
            "input_dtype": "i8", "quant_min": -8, "quant_max": 7, "output_dtype": "f32",
        }  # fmt: skip
        for name, change in changes.items():
            args[name] = b.input(*change) if isinstance(change, tuple) and isinstance(change[0], str) else change
        return refused("torchao.dequantize_affine.default", args, b, ("f32", (4, 32)))

    assert "do not divide" in affine(block_size=(1, 5))
    assert "not one for each" in affine(scale=("f32", (4, 3)))
    assert "dtype f32" in affine(input=("f32", (4, 32)))
    assert "axes" in affine(block_size=(1,))
    b = GraphBuilder()
    args: dict[str, Arg] = {
        "input": b.input("f32", (4, 32)), "mapping_type": "SYMMETRIC_NO_CLIPPING_ERR", "block_size": (1, 32),
        "target_dtype": "i8",
        "quant_min": -128, "quant_max": 127, "eps": None, "scale_dtype": None, "zero_point_dtype": "i8",
        "keepdim": False,
    }  # fmt: skip
    choose = "torchao.choose_qparams_affine.default"
    assert "ASYMMETRIC and SYMMETRIC" in refused(choose, args, b, ("f32", (4,)), ("i8", (4,)))
    b.nodes.clear()
    halves = args | {"mapping_type": "SYMMETRIC", "block_size": (1, 16)}
    assert "whole rows" in refused(choose, halves, b, ("f32", (4, 2)), ("i8", (4, 2)))
    b.nodes.clear()
    fake = {name: args[name] for name in ("input", "quant_min", "quant_max", "eps")} | {"symmetric": 1}
    assert "literal bool" in refused("webgpu.fake_quantize", fake, b, ("f32", (4, 32)))
    b = GraphBuilder()
    args = {
        "qdata": b.input("u8", (4, 16)), "scale": b.input("f32", (4, 2)), "zero_point": b.input("i8", (2, 4)),
        "group_size": 16, "output_dtype": "f32",
    }  # fmt: skip
    assert "is not [2, 4]" in refused("torchao.dequantize_int4_tensor.default", args, b, ("f32", (4, 32)))
