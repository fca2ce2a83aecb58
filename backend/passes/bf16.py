"""Matrices of bfloat16 that stay so on the GPU: two bytes an element instead of four.

Other tensors of bfloat16 become 32-bit floats when they are uploaded; activations are such floats anyway. A constant
[N, K] that only linear layers and lookups read becomes words (`ops/packed.py`), which they widen in registers: the
layers `webgpu.linear_packed`, the lookups `webgpu.embedding_packed`, all of them with one copy. Where anything else
reads it too, it stays as it is, so that it is never kept twice.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from ...ops import embedding_packed, linear_packed
from ...ops.base import check_node
from ...ops.packed import Format
from ..graph import Arg, Graph, Node, Ref, Value
from ..packing import pack_bf16
from .quantized import EMBEDDING, ORIGIN, Array, Constants
from .rewrite import Editor, Links

NAME = "store_bf16"
_LINEAR = ("aten.linear.default", "webgpu.linear")


def store_bf16(graph: Graph, constants: Constants) -> Graph:
    """The graph with matrices of bfloat16 in words, wherever all that reads one can take it so."""
    links, editor = Links(graph), Editor(graph)
    made: dict[int, Node] = {}
    for index in _matrices(graph, links):
        whole = graph.values[index]
        rows, form = whole.shape[0], Format.bf16(int(str(whole.shape[1])))
        key = f"{whole.data}{ORIGIN}{NAME}"
        words = Value("constant", "u32", (rows, form.words), whole.name, data=key)
        seen = replace(graph, values=(*editor.values, words))
        nodes = {n: _reader(graph.nodes[n], Ref(len(editor.values)), form) for n in links.readers[index]}
        if whole.data in constants and all(check_node(seen, node) is None for node in nodes.values()):
            editor.add_value(words)
            made |= nodes
            constants[key] = ("u32", pack_bf16(_content(constants, whole))[0])
    editor.nodes = [made.get(number, node) for number, node in enumerate(graph.nodes)]
    return editor.finish()


def _matrices(graph: Graph, links: Links) -> list[int]:
    """Constants of bfloat16 [N, K] that nothing but linear layers and lookups read, as their weights."""
    return [
        index
        for index, value in enumerate(graph.values)
        if (value.kind, value.dtype, len(value.shape)) == ("constant", "bf16", 2)
        and value.alias is None
        and value.data is not None
        and all(isinstance(size, int) and size > 0 for size in value.shape)
        and links.readers.get(index)
        and all(number < len(graph.nodes) and _is_weight(graph.nodes[number], index) for number in links.readers[index])
        and not any(index in mutation for mutation in graph.mutations)
    ]


def _is_weight(node: Node, index: int) -> bool:
    """Whether a node is a layer x w^T or a lookup, and the value its weight and nothing else."""
    reads = Counter(node.inputs())[index] == 1 and node.args.get("weight") == Ref(index)
    layer = node.op in _LINEAR and node.args.get("transposed", True) is True
    return reads and (layer or node.op == EMBEDDING)


def _reader(node: Node, packed: Ref, form: Format) -> Node:
    """A reader of the words in place of one of the matrix."""
    if node.op == EMBEDDING:
        args: dict[str, Arg] = {"weight": packed, "indices": node.args["indices"], "format": form.literal()}
        return replace(node, op=embedding_packed.NAME, args=args)
    names: dict[str, Arg] = {"input": node.args["input"], "weight": packed, "bias": node.args.get("bias")}
    return replace(node, op=linear_packed.NAME, args={**names, "format": form.literal()})


def _content(constants: Constants, value: Value) -> Array:
    """Its bits, uint16 [N, K]; none of them are copied."""
    return constants[str(value.data)][1].reshape(tuple(int(str(size)) for size in value.shape))
