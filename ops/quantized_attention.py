"""`llama.custom_quantized_sdpa`, and the operators by which ExecuTorch's quantised KV cache makes its int8 rows.

    quantized_decomposed.choose_qparams_per_token_asymmetric(input [.., K]): scale and zero point [.., 1] of each row.
        The scale, float64 in a program, is float32 here: what a program makes of it at once.
    quantized_decomposed.quantize_per_token, dequantize_per_token: by such scales and zero points.
    llama.custom_quantized_sdpa: as `llama.custom_sdpa` of (query, key, value - zero point) * scale, each int8 with
        scales f32 and zero points i8 [B, S or C, H, 1]; the result is float32.

The caches are written by `llama.update_cache`. Where these operators stand together as ExecuTorch's quantised cache has
them, a pass makes packed bytes of it (`backend/passes/quantized_attention.py`): `webgpu.quantize_update` writes them,
attention reads them. Elsewhere integers are i32 on a device, four bytes an element, and attention dequantises all of a
cache before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ..backend.graph import Arg, Graph, Node, Ref
from . import affine
from .attention import CUSTOM, supports_custom
from .base import Dispatch, Lowering, register

CHOOSE = "quantized_decomposed.choose_qparams_per_token_asymmetric.default"
QUANTIZE = "quantized_decomposed.quantize_per_token.default"
DEQUANTIZE = "quantized_decomposed.dequantize_per_token.default"
ATTENTION = "llama.custom_quantized_sdpa.default"
_COPIES = ("aten._to_copy.default", "dim_order_ops._to_dim_order_copy.default")
EPS = 2.0**-23
"""Least scale of a row."""
PARTS = {"query": "q", "key": "k", "value": "v"}
"""Tensor of the attention -> what the names of its scales and zero points begin with."""


def _rows(rank: int, last: Arg) -> tuple[Arg, ...]:
    return (*(1 for _ in range(rank - 1)), last)


def as_affine(graph: Graph, node: Node) -> Node:
    """The operator of torchao that computes the same."""
    args = node.args
    shape = graph.value(args["input"]).shape
    blocks = _rows(len(shape), shape[-1] if shape else 1)
    if node.op == CHOOSE:
        given: dict[str, Arg] = {"mapping_type": "ASYMMETRIC", "target_dtype": "i8", "eps": EPS}
        limits: dict[str, Arg] = {"quant_min": -128, "quant_max": 127}
        return Node(affine.CHOOSE, {"input": args["input"], "block_size": blocks, **given, **limits}, node.outputs)
    given = {"input": args["input"], "block_size": blocks, "scale": args["scales"], "zero_point": args["zero_points"]}
    limits = {name: args[name] for name in ("quant_min", "quant_max")}
    return Node(affine.QUANTIZE if node.op == QUANTIZE else affine.DEQUANTIZE, {**given, **limits}, node.outputs)


def supports_choose(graph: Graph, node: Node) -> str | None:
    """int8, and a scale that leaves no float64 behind."""
    if node.args["dtype"] != "i8":
        return f"quantisation to {node.args['dtype']}; only int8 is supported"
    scale = node.outputs[0]
    for reader in graph.nodes:
        if scale not in reader.inputs():
            continue
        narrows = reader.op in _COPIES and graph.values[reader.outputs[0]].dtype in ("f32", "f16", "bf16")
        if not narrows and reader.op not in (QUANTIZE, DEQUANTIZE):
            return f"its float64 scale is read by {reader.name or reader.op}; WGSL has no wider type than float32"
    if any(isinstance(out, Ref) and out.value == scale for out in graph.outputs):
        return "its float64 scale is an output; WGSL has no wider type than float32"
    return affine.supports_rows(graph, as_affine(graph, node))


def supports_tokens(graph: Graph, node: Node) -> str | None:
    """quantize_per_token and dequantize_per_token."""
    return affine.supports_affine(graph, as_affine(graph, node))


def lower_choose(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
    """A workgroup a row."""
    yield from affine.lower_rows(ctx, as_affine(ctx.graph, node))


def lower_tokens(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
    """As the operator of torchao."""
    yield from affine.lower_affine(ctx, as_affine(ctx.graph, node))


def supports_attention(graph: Graph, node: Node) -> str | None:
    """int8 tensors [B, rows, heads, D] with a scale and a zero point a row and head; else as `llama.custom_sdpa`."""
    args = node.args
    if args.get("is_seq_at_dim_2") not in (None, False):
        return "is_seq_at_dim_2 is true; rows are supported on axis 1"
    values = list(graph.values)
    for name, letter in PARTS.items():
        found = args[name]
        if not isinstance(found, Ref):
            return f"{name} is no tensor"
        value = graph.values[found.value]
        if value.dtype != "i8" or len(value.shape) != 4:
            return f"{name} is {value.dtype}{list(value.shape)}; it must be int8 [batch, rows, heads, head size]"
        for what, dtype in (("scales", "f32"), ("zero_points", "i8")):
            given = args.get(f"{letter}_{what}")
            if not isinstance(given, Ref):
                return f"{letter}_{what} is missing"
            parameter = graph.value(given)
            if parameter.dtype != dtype or parameter.shape != (*value.shape[:3], 1):
                wanted = [*value.shape[:3], 1]
                return f"{letter}_{what} is {parameter.dtype}{list(parameter.shape)}; it must be {dtype}{wanted}"
        values[found.value] = replace(value, dtype="f32")
    out = graph.values[node.outputs[0]]
    if out.dtype != "f32":
        return f"the result is {out.dtype}; it is float32"
    return supports_custom(replace(graph, values=tuple(values)), Node(CUSTOM, args, node.outputs, node.name))


def lower_attention(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
    """Never reached: the canonicalising pass leaves no such node."""
    raise NotImplementedError(f"{node.name}: {ATTENTION} has no kernel of its own; the backend's passes expand it")


register(CHOOSE, supports=supports_choose, lower=lower_choose)
register(QUANTIZE, DEQUANTIZE, supports=supports_tokens, lower=lower_tokens)
register(ATTENTION, supports=supports_attention, lower=lower_attention)
