"""Quantised weights as exporters spell them: linear layers and lookups that read packed words (`ops/packed.py`).

It looks at the content of constants and writes them anew. What it knows:

    dequantize_affine(q i8|u8 [N, K], [1, group], scale, zero)         torchao: weights, and tables of lookups
    dequantize_int4_tensor(q u8 [N, K / 2], scale [groups, N], ..)     two codes a byte, the even column low
    _to_copy(q i8 [N, K]) .. mul(linear(x, q), scale [N])              scales after the product
    embedding_byte | embedding_4bit | embedding_2bit(q, scale, ..)     two codes a byte, the even column high; four, low

in front of `linear`, `mm`, `addmm` and `embedding`. Activations that are quantised row by row come first
(`quantized_activations.py`): integer products become linear layers.
"""

from __future__ import annotations

import re
from collections.abc import Collection, MutableMapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...ops.linear_packed import NAME as LINEAR_PACKED
from ..graph import Arg, Graph, Node, Ref, Value
from ..packing import QuantizationError as QuantizationError
from ..packing import pack, unpack_bits
from .cleanup import redirect
from .match import CAST, COPY, MUL, VIEW, operands
from .quantized_activations import fuse_activations, join_integer_products
from .rewrite import Editor, Links

Array = np.ndarray[Any, Any]
Constants = MutableMapping[str, tuple[str, Array]]
"""Data key -> (host dtype, content); bfloat16 as its 16 bits. What is set is stored with the program."""

_PARAMETRIZED = re.compile(r"\.parametrizations\.(\w+)\.original\d+$")
"""How torch names the parts of a quantised parameter."""

ORIGIN = "|"
"""Follows, in the data key of a packed constant, the key of its integers."""

AFFINE = "torchao.dequantize_affine.default"
INT4 = "torchao.dequantize_int4_tensor.default"
EMBEDDING = "aten.embedding.default"
EMBEDDING_PACKED = "webgpu.embedding_packed"
TABLES = {
    f"quantized_decomposed.embedding_{name}.{overload}": bits
    for name, bits in (("byte", 8), ("4bit", 4), ("2bit", 2))
    for overload in ("default", "dtype")
}
"""Lookup in a quantised table -> bits of a code."""
_LINEAR = ("aten.linear.default", "webgpu.linear")


@dataclass(frozen=True, slots=True)
class _Weight:
    """Where a dequantised matrix comes from.

    Attributes:
        source: the integers, a constant. scale, zero: constants, zero may be None.
        bits: of a code where several are in a byte (`low_first` says in which order), else 0: of the range `span`.
        span: smallest and largest integer.
        group: columns that share a scale.
        transposed: scales are [groups, N].
    """

    source: Ref
    scale: Ref
    zero: Ref | None
    bits: int
    span: tuple[int, int]
    group: int
    low_first: bool = True
    transposed: bool = False


def fuse_quantized(graph: Graph, constants: Constants) -> Graph:
    """The graph with quantised weights packed, wherever something above is found; what is not, stays as it is.

    Raises:
        QuantizationError: a weight that is found means nothing: groups that do not divide, scales that are not finite.
    """
    return _fuse_weights(fuse_activations(join_integer_products(graph, constants)), constants)


def _fuse_weights(graph: Graph, constants: Constants) -> Graph:
    links, editor = Links(graph), _Packer(graph, constants)
    mapping: dict[int, int] = {}
    products = [parts for node in graph.nodes if (parts := _product(links, node)) is not None]
    multiplied = {_dequantized(links, matrix) for _, matrix, _ in products}
    for node in graph.nodes:
        new = _lookup(links, editor, node, multiplied) or _linear(links, editor, node, mapping)
        editor.nodes.append(new or node)
    return redirect(editor.finish(), mapping)


def _lookup(links: Links, editor: _Packer, node: Node, multiplied: Collection[_Weight | None]) -> Node | None:
    """A lookup in a quantised table; one that is a layer's weight as well is packed as the layer wants it, once."""
    if node.op == EMBEDDING:
        weight = _dequantized(links, node.args["weight"])
    elif node.op in TABLES:
        weight = _table(links, node)
    else:
        return None
    if weight is None:
        return None
    packed, form = editor.packed(weight, stored_bits(weight, table=weight not in multiplied))
    args: dict[str, Arg] = {"weight": packed, "indices": node.args["indices"], "format": form}
    return Node(EMBEDDING_PACKED, args, node.outputs, node.name)


def _linear(links: Links, editor: _Packer, node: Node, mapping: dict[int, int]) -> Node | None:
    """A linear layer whose weight is dequantised in front of it, or scaled after it."""
    parts = _product(links, node)
    if parts is None:
        return None
    x, matrix, bias = parts
    weight = _dequantized(links, matrix)
    if weight is None and bias is None:
        found = _scaled_after(links, node, matrix)
        if found is not None:
            weight, last, product = found
            mapping[last] = product
    if weight is None or not isinstance(x, Ref):
        return None
    packed, form = editor.packed(weight, stored_bits(weight))
    args: dict[str, Arg] = {"input": x, "weight": packed, "bias": bias, "format": form}
    return Node(LINEAR_PACKED, args, node.outputs, node.name)


def _product(links: Links, node: Node) -> tuple[Arg, Arg, Arg] | None:
    """(x, w, bias) of x w^T + bias with a matrix w [N, K]."""
    if node.op not in _LINEAR or node.args.get("transposed", True) is not True:
        return None
    return node.args["input"], node.args["weight"], node.args.get("bias")


def _constant(links: Links, arg: Arg, dtypes: tuple[str, ...]) -> Ref | None:
    if not isinstance(arg, Ref):
        return None
    value = links.value(arg)
    stored = value.kind == "constant" and value.data is not None and value.dtype in dtypes
    return arg if stored and all(isinstance(size, int) for size in value.shape) else None


_FLOATS = ("f32", "f16", "bf16")
_BYTES = ("i8", "u8")


def _dequantized(links: Links, arg: Arg) -> _Weight | None:
    """The quantised matrix behind a dequantised one."""
    node = links.made_by(arg, AFFINE, INT4)
    if node is None:
        return None
    if node.op == INT4:
        source, scale = _constant(links, node.args["qdata"], ("u8",)), _constant(links, node.args["scale"], _FLOATS)
        zero = _constant(links, node.args["zero_point"], (*_FLOATS, *_BYTES))
        group = node.args["group_size"]
        if source is None or scale is None or zero is None or not isinstance(group, int):
            return None
        return _Weight(source, scale, zero, 4, (0, 15), group, transposed=True)
    source, scale = _constant(links, node.args["input"], _BYTES), _constant(links, node.args["scale"], _FLOATS)
    given = node.args["zero_point"]
    zero = _constant(links, given, (*_FLOATS, *_BYTES, "i16", "i32", "i64"))
    block = node.args["block_size"]
    if source is None or scale is None or (given is not None and zero is None):
        return None
    if not isinstance(block, tuple) or len(block) != 2 or block[0] != 1 or not isinstance(block[1], int):
        return None
    span = _span(links.value(source), node.args["quant_min"], node.args["quant_max"])
    return None if span is None else _Weight(source, scale, zero, 0, span, block[1])


def _span(value: Value, low: Arg, high: Arg) -> tuple[int, int] | None:
    """Smallest and largest integer of a stored tensor, by its dtype unless the operator says so."""
    least, most = (-128, 127) if value.dtype == "i8" else (0, 255)
    low, high = least if low is None else low, most if high is None else high
    if not isinstance(low, int | float) or not isinstance(high, int | float):
        return None
    return (int(low), int(high)) if least <= low < high <= most else (least, most)


def _table(links: Links, node: Node) -> _Weight | None:
    """The table of a quantised lookup."""
    bits = TABLES[node.op]
    source = _constant(links, node.args["weight"], _BYTES)
    scale, zero = _constant(links, node.args["weight_scales"], _FLOATS), node.args["weight_zero_points"]
    stored_zero = _constant(links, zero, (*_FLOATS, *_BYTES))
    if source is None or scale is None or (zero is not None and stored_zero is None):
        return None
    value, scales = links.value(source), links.value(scale)
    if len(value.shape) != 2 or len(scales.shape) not in (1, 2):
        return None
    columns, groups = value.shape[1], 1 if len(scales.shape) == 1 else scales.shape[1]
    assert isinstance(columns, int)
    assert isinstance(groups, int)
    columns *= 8 // bits
    group = columns // groups if groups and columns % groups == 0 else 0
    if bits == 8:
        span = _span(value, node.args["weight_quant_min"], node.args["weight_quant_max"])
        return None if span is None else _Weight(source, scale, stored_zero, 0, span, group)
    middle = 1 << (bits - 1)
    return _Weight(source, scale, stored_zero, bits, (-middle, middle - 1), group, low_first=bits == 2)


def _scaled_after(links: Links, node: Node, matrix: Arg) -> tuple[_Weight, int, int] | None:
    """(weight, product with the scales, what takes its place) for mul(linear(x, cast(q)), scales [N])."""
    cast = links.made_by(matrix, *CAST)
    source = None if cast is None else _constant(links, cast.args["self"], _BYTES)
    if source is None or len(links.value(source).shape) != 2:
        return None
    rows, columns = links.value(source).shape
    assert isinstance(columns, int)
    result = node.outputs[0]
    reader = links.only_reader(result)
    while reader is not None and reader.op in (*VIEW, *COPY):
        if links.graph.values[reader.outputs[0]].shape[-1:] != (rows,):
            return None
        result = reader.outputs[0]
        reader = links.only_reader(result)
    if reader is None or reader.op not in MUL:
        return None
    for one, other in operands(reader):
        scale = _constant(links, other, _FLOATS)
        if one != Ref(result) or scale is None or links.value(scale).shape != (rows,):
            continue
        product = links.graph.values[reader.outputs[0]]
        if (product.shape, product.dtype) != (links.graph.values[result].shape, links.graph.values[result].dtype):
            continue
        span = _span(links.value(source), None, None)
        assert span is not None
        return _Weight(source, scale, None, 0, span, columns), reader.outputs[0], result
    return None


def stored_bits(weight: _Weight, table: bool = False) -> int:
    """Bits of the packed codes: the least that hold the range; products take 4 and 8."""
    low, high = weight.span
    shifts = ((bits, _shift(weight, bits)) for bits in (2, 4, 8))
    needed = next(bits for bits, shift in shifts if -shift <= low and high < (1 << bits) - shift)
    return needed if table else max(needed, 4)


def _shift(weight: _Weight, bits: int) -> int:
    """What is added to an integer to give its code: zero is in the middle of the range where integers have signs."""
    return 1 << (bits - 1) if weight.span[0] < 0 else 0


class _Packer(Editor):
    """Adds packed constants, each once."""

    def __init__(self, graph: Graph, constants: Constants) -> None:
        super().__init__(graph)
        self._constants = constants
        self._made: dict[tuple[_Weight, int], tuple[Ref, Arg]] = {}

    def packed(self, weight: _Weight, bits: int) -> tuple[Ref, Arg]:
        """(packed constant, format) of a weight."""
        found = self._made.get((weight, bits))
        if found is None:
            found = self._made[weight, bits] = self._pack(weight, bits)
        return found

    def _pack(self, weight: _Weight, bits: int) -> tuple[Ref, Arg]:
        source = self.graph.value(weight.source)
        name = _PARAMETRIZED.sub(r".\1", source.name)
        codes = self._codes(weight, bits)
        scales = self._grid(weight.scale, weight, codes, f"{name}: scales")
        zeros = None if weight.zero is None else self._grid(weight.zero, weight, codes, f"{name}: zero points")
        shift = _shift(weight, bits)
        zeros = np.full_like(scales, shift) if zeros is None else zeros + shift
        scale_type = "f16" if self.graph.value(weight.scale).dtype == "f16" else "f32"
        words, form = pack(codes, scales, zeros, bits, scale_type, name)
        key = f"{source.data}{ORIGIN}{self.graph.value(weight.scale).data}{ORIGIN}{bits}"
        self._constants[key] = ("u32", words)
        packed = self.add_value(Value("constant", "u32", words.shape, f"{name}.packed", data=key))
        return packed, form.literal()

    def _content(self, ref: Ref) -> Array:
        value = self.graph.value(ref)
        assert value.data is not None
        if value.data not in self._constants:
            raise QuantizationError(f"{value.name}: the program holds no content for this tensor")
        dtype, array = self._constants[value.data]
        if dtype == "bf16":
            array = (array.astype(np.uint32) << 16).view(np.float32)
        return array.reshape(tuple(int(str(size)) for size in value.shape))

    def _codes(self, weight: _Weight, bits: int) -> Array:
        """uint8 [N, K], not negative."""
        raw = self._content(weight.source)
        if raw.ndim != 2:
            raise QuantizationError(f"{self.graph.value(weight.source).name}: {list(raw.shape)} is no matrix")
        if weight.bits:
            return unpack_bits(raw, weight.bits, weight.low_first)
        wide = raw.astype(np.int16) + np.int16(_shift(weight, bits))
        if wide.size and (int(wide.min()) < 0 or int(wide.max()) >> bits):
            raise QuantizationError(
                f"{self.graph.value(weight.source).name}: values from {raw.min()} to {raw.max()} are outside of "
                f"{weight.span[0]} to {weight.span[1]}"
            )
        return wide.astype(np.uint8)

    def _grid(self, ref: Ref, weight: _Weight, codes: Array, what: str) -> Array:
        """float64 [N, groups]."""
        rows, columns = codes.shape
        if weight.group < 1 or columns % weight.group:
            raise QuantizationError(f"{what}: groups of {weight.group} do not divide {columns} columns")
        found = self._content(ref).astype(np.float64)
        wanted = (rows, columns // weight.group)
        if weight.transposed and found.ndim == 2:
            found = found.T
        if found.size != rows * wanted[1] or (found.ndim == 2 and found.shape != wanted):
            raise QuantizationError(f"{what} are {list(self.graph.value(ref).shape)}, expected {list(wanted)}")
        return np.ascontiguousarray(found.reshape(wanted))
