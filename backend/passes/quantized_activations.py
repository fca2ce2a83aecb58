"""Activations that are quantised row by row by their own range, as exporters spell them: `webgpu.fake_quantize`.

    s, z = choose_qparams_affine(x);  q = quantize_affine(x, s, z)
    dequantize_affine(q, s, z)                                 at once: torchao's configurations with IntX weights
    _int_mm(q, w^T) * s * scale [N] + bias                     torchao's Int8Tensor, symmetric: w i8 [N, K] a constant
    (_int_mm(q, w^T) * s - z * s * sum_k w) * scale + bias     asymmetric

The integer products become linear layers of what q and w stand for, which `quantized.py` packs and `activations.py`
makes products of integers again. Where the exporting processor prefers unsigned bytes, `_int_mm(q + 128, w^T) - 128 *
sum_k w` stands for `_int_mm(q, w^T)`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from ...ops.affine import CHOOSE, FAKE, MAPPINGS, QUANTIZE, rows_of
from ...ops.affine import DEQUANTIZE as AFFINE
from ..graph import FLOATS, INTEGERS, Arg, Dim, Graph, Node, Ref, Value
from .match import ADD, CAST, COPY, MUL, PERMUTE, SUB, TRANSPOSE, VIEW, operands, permutation
from .rewrite import Editor, Links

_INT_MM = "aten._int_mm.default"
_SUM = "aten.sum.dim_IntList"
Contents = Mapping[str, tuple[str, np.ndarray[Any, Any]]]
"""Data key of a constant -> (host dtype, content)."""
_SHIFT = 128
"""What makes unsigned bytes of signed ones."""
_KEPT = (*CAST, *COPY, *VIEW)
"""What keeps numbers as they are."""


def fuse_activations(graph: Graph) -> Graph:
    """dequantize(quantize(x, s, z), s, z) with (s, z) from x, row by row, as `webgpu.fake_quantize`."""
    links = Links(graph)
    nodes = [_activation(links, node) or node for node in graph.nodes]
    return replace(graph, nodes=tuple(nodes))


def _quantizer(links: Links, quantize: Node) -> Node | None:
    """The choose_qparams_affine whose scale and zero point a quantize_affine takes, if both go row by row."""
    choose = links.made_by(quantize.args["scale"], CHOOSE)
    x = quantize.args["input"]
    if choose is None or choose.args["mapping_type"] not in MAPPINGS or not isinstance(x, Ref):
        return None
    if any(choose.args[name] != quantize.args[name] for name in ("input", "block_size", "quant_min", "quant_max")):
        return None
    if (quantize.args["scale"], quantize.args["zero_point"]) != tuple(Ref(output) for output in choose.outputs):
        return None
    whole = all(isinstance(quantize.args[name], int) for name in ("quant_min", "quant_max"))
    return choose if whole and quantize.args["block_size"] == rows_of(links.value(x).shape) else None


def _fake(choose: Node, output: int, name: str) -> Node:
    args = {key: choose.args[key] for key in ("input", "quant_min", "quant_max", "eps")}
    if MAPPINGS[str(choose.args["mapping_type"])]:
        args["symmetric"] = True
    return Node(FAKE, args, (output,), name)


def _activation(links: Links, node: Node) -> Node | None:
    if node.op != AFFINE:
        return None
    quantize = links.made_by(node.args["input"], QUANTIZE)
    same = ("block_size", "scale", "zero_point", "quant_min", "quant_max")
    if quantize is None or any(quantize.args[name] != node.args[name] for name in same):
        return None
    choose = _quantizer(links, quantize)
    return None if choose is None else _fake(choose, node.outputs[0], node.name)


# -- integer products


@dataclass(frozen=True, slots=True)
class _Product:
    """An integer product with what scales it.

    Attributes:
        quantize, choose: of the activations. weight, scale, bias: constants i8 [N, K], N numbers, [N] or None.
        end: the value that is the result.
    """

    quantize: Node
    choose: Node
    weight: Ref
    scale: Ref
    bias: Ref | None
    end: int


def join_integer_products(graph: Graph, constants: Contents) -> Graph:
    """Integer products as linear layers of `webgpu.fake_quantize` and of a dequantised weight."""
    links, editor = Links(graph), Editor(graph)
    products = [found for node in graph.nodes if (found := _product(links, constants, node)) is not None]
    ends = {found.end: found for found in products}
    quantized = {found.quantize.outputs[0]: found.choose for found in products}
    floats: dict[int, Ref] = {}  # integers -> what they stand for
    for node in graph.nodes:
        first = node.outputs[0] if node.outputs else None
        if first in ends:
            editor.nodes.extend(_linear(editor, ends[first], floats, node.name))
            continue
        editor.nodes.append(node)
        if first in quantized:
            floats[first] = editor.temp(Ref(first), f"{node.name}.floats", dtype="f32")
            editor.nodes.append(_fake(quantized[first], floats[first].value, node.name))
    return editor.finish()


def _linear(editor: Editor, found: _Product, floats: Mapping[int, Ref], name: str) -> Iterator[Node]:
    columns = editor.graph.value(found.weight).shape[-1]
    matrix = editor.temp(found.weight, f"{name}.weight", dtype="f32")
    args: dict[str, Arg] = {
        "input": found.weight, "block_size": (1, columns), "scale": found.scale, "zero_point": None,
        "input_dtype": "i8", "quant_min": -128, "quant_max": 127, "output_dtype": "f32",
    }  # fmt: skip
    yield Node(AFFINE, args, (matrix.value,), name)
    x = floats[found.quantize.outputs[0]]
    yield Node("aten.linear.default", {"input": x, "weight": matrix, "bias": found.bias}, (found.end,), name)


def _product(links: Links, constants: Contents, node: Node) -> _Product | None:
    if node.op != _INT_MM:
        return None
    weight, integers, total = _weight(links, node.args["mat2"]), node.args["self"], node.outputs[0]
    if weight is None:
        return None
    signed = _unsigned(links, constants, integers)
    if signed is not None:
        less = _minus(links, total)
        if less is None or not _is_sums_shifted(links, constants, less[1], weight):
            return None
        integers, total = signed, less[0]
    quantize = links.made_by(_through(links, integers, *COPY, *VIEW), QUANTIZE)
    choose = None if quantize is None else _quantizer(links, quantize)
    if quantize is None or choose is None:
        return None
    if links.value(quantize.args["input"]).shape[-1] != links.value(weight).shape[1]:
        return None
    scaled = _scaled(links, _skip(links, total, *CAST), choose, weight)
    return None if scaled is None else _finished(links, scaled, quantize, choose, weight)


def _scaled(links: Links, total: int, choose: Node, weight: Ref) -> int | None:
    """The product times the rows' scales, less what an asymmetric zero point adds."""
    reader = links.only_reader(total)
    if reader is None or reader.op not in MUL or links.graph.values[reader.outputs[0]].dtype not in FLOATS:
        return None
    scale, zero = (Ref(output) for output in choose.outputs)
    if not any(one == Ref(total) and _is_column(links, other, scale) for one, other in operands(reader)):
        return None
    total = reader.outputs[0]
    low, high = (int(str(choose.args[name])) for name in ("quant_min", "quant_max"))
    if MAPPINGS[str(choose.args["mapping_type"])]:
        return total if int((low + high + 1) / 2) == 0 else None
    less = _minus(links, _skip(links, total, *CAST))
    if less is None:
        return None
    factors = list(_factors(links, less[1]))
    sums = [arg for arg in factors if _is_sums(links, arg, weight)]
    rest = [arg for arg in factors if arg not in sums]
    columns = [_is_column(links, arg, one) for arg, one in zip(rest, (scale, zero), strict=False)]
    swapped = [_is_column(links, arg, one) for arg, one in zip(rest, (zero, scale), strict=False)]
    return less[0] if (len(sums), len(rest)) == (1, 2) and (all(columns) or all(swapped)) else None


def _finished(links: Links, total: int, quantize: Node, choose: Node, weight: Ref) -> _Product | None:
    """With the scales of the weight and a bias behind it, as far as only they read it."""
    columns = links.value(weight).shape[0]
    wanted = (*links.value(quantize.args["input"]).shape[:-1], columns)
    scale: Ref | None = None
    bias: Ref | None = None
    best: _Product | None = None
    while (reader := links.only_reader(total)) is not None:
        result = links.graph.values[reader.outputs[0]]
        if reader.op in MUL and scale is None:
            scale = _row(links, reader, total, columns)
            if scale is None:
                break
        elif reader.op in ADD and scale is not None and bias is None:
            bias = _row(links, reader, total, columns)
            if bias is None or links.value(bias).shape != (columns,):
                break
        elif reader.op not in _KEPT:
            break
        if result.dtype not in ("f32", "f16", "bf16") or result.shape[-1:] != (columns,):
            break
        total = reader.outputs[0]
        if scale is not None and result.shape == wanted:
            best = _Product(quantize, choose, weight, scale, bias, total)
    return best


def _row(links: Links, node: Node, value: int, columns: Dim) -> Ref | None:
    """The constant of N floats beside a value in a node that goes along its last axis."""
    for one, other in operands(node):
        found = _through(links, other, *_KEPT)
        if one != Ref(value) or not isinstance(other, Ref) or not isinstance(found, Ref):
            continue
        stored, shape = links.value(found), links.value(other).shape
        if (
            stored.kind == "constant"
            and stored.dtype in ("f32", "f16", "bf16")
            and _count(stored) == columns == (shape[-1] if shape else 0)
            and links.value(other).dtype in FLOATS
        ):
            return found
    return None


# -- matchers


def _through(links: Links, arg: Arg, *ops: str) -> Arg:
    """What `ops` make a value of."""
    while (node := links.made_by(arg, *ops)) is not None:
        arg = node.args["self"]
    return arg


def _skip(links: Links, value: int, *ops: str) -> int:
    """What `ops` make of a value that nothing else reads."""
    while (node := links.only_reader(value)) is not None and node.op in ops:
        value = node.outputs[0]
    return value


def _count(value: Value) -> int | None:
    """Elements, where that is known."""
    return prod(int(str(size)) for size in value.shape) if all(isinstance(size, int) for size in value.shape) else None


def _minus(links: Links, value: int) -> tuple[int, Arg] | None:
    """(difference, what is taken off) where a subtraction alone reads a value."""
    node = links.only_reader(value)
    if node is None or node.op not in SUB or node.args.get("alpha", 1) != 1 or node.args["self"] != Ref(value):
        return None
    return node.outputs[0], node.args["other"]


def _factors(links: Links, arg: Arg) -> Iterator[Arg]:
    """What a tree of products multiplies, each as it is read."""
    node = links.made_by(_through(links, arg, *CAST, *COPY), *MUL)
    if node is None:
        yield arg
    else:
        yield from _factors(links, node.args["self"])
        yield from _factors(links, node.args["other"])


def _is_column(links: Links, arg: Arg, source: Ref) -> bool:
    """Whether a value is `source`, a number a row, as [rows, 1]."""
    if not isinstance(arg, Ref) or _through(links, arg, *_KEPT) != source:
        return False
    shape = links.value(arg).shape
    return len(shape) == 2 and shape[1] == 1


def _weight(links: Links, arg: Arg) -> Ref | None:
    """The constant i8 [N, K] of its transpose."""
    node = links.made_by(_through(links, arg, *COPY), *PERMUTE, *TRANSPOSE)
    if node is None or permutation(links, node) != (1, 0):
        return None
    found = _through(links, node.args["self"], *COPY)
    if not isinstance(found, Ref):
        return None
    value = links.value(found)
    stored = value.kind == "constant" and value.data is not None and value.dtype == "i8"
    return found if stored and len(value.shape) == 2 and _count(value) is not None else None


def _is_sums(links: Links, arg: Arg, weight: Ref) -> bool:
    """Whether a value is the sums of a weight's rows, as [.., N]."""
    node = links.made_by(_through(links, arg, *_KEPT), _SUM)
    if node is None or not isinstance(arg, Ref) or links.value(arg).dtype not in (*FLOATS, "i32", "i64"):
        return False
    rows, dims = links.value(weight).shape[0], node.args["dim"]
    axis = 1 if _through(links, node.args["self"], *COPY) == weight else 0
    if axis == 0 and _weight(links, node.args["self"]) != weight:
        return False
    value = links.value(arg)
    whole = isinstance(dims, tuple) and len(dims) == 1 and int(str(dims[0])) % 2 == axis
    return whole and value.shape[-1:] == (rows,) and _count(value) == rows


def _number(links: Links, constants: Contents, arg: Arg) -> float | None:
    """A literal, or the content of a constant of one element."""
    if isinstance(arg, int | float) and not isinstance(arg, bool):
        return arg
    source = _through(links, arg, *CAST, *COPY)
    if not isinstance(source, Ref):
        return None
    value = links.value(source)
    if value.kind != "constant" or value.data is None or _count(value) != 1:
        return None
    dtype, content = constants[value.data]
    return float(content.reshape(-1)[0]) if dtype in (*INTEGERS, "f32", "f64") else None


def _unsigned(links: Links, constants: Contents, arg: Arg) -> Arg | None:
    """The signed bytes that unsigned ones are made of by adding `_SHIFT`."""
    if not isinstance(arg, Ref) or links.value(arg).dtype != "u8":
        return None
    add = links.made_by(_through(links, arg, *CAST, *COPY), *ADD)
    for one, other in operands(add):
        wide = isinstance(one, Ref) and links.value(one).dtype in ("i16", "i32", "i64")
        if wide and _number(links, constants, other) == _SHIFT:
            return _through(links, one, *CAST)
    return None


def _is_sums_shifted(links: Links, constants: Contents, arg: Arg, weight: Ref) -> bool:
    """Whether a value is the sums of a weight's rows times `_SHIFT`."""
    node = links.made_by(_through(links, arg, *CAST, *COPY), *MUL)
    return any(
        _is_sums(links, one, weight) and _number(links, constants, other) == _SHIFT for one, other in operands(node)
    )
