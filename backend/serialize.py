"""The blob: a `Graph` as a FlatBuffer (schema/webgpu_graph.fbs) and back. Neither torch nor wgpu."""

from __future__ import annotations

import struct
from typing import Any

import flatbuffers

from .graph import ARITHMETIC_OPS, DTYPES, FORMAT_VERSION, FREE_OPS, Arg, Dim, Graph, Node, Ref, Sym, SymbolRange, Value
from .schema import webgpu_graph_generated as fb

BACKEND_ID = "WebGPUBackend"
"""The name under which a `.pte` holds blobs of this package: that of the class in `preprocess.py`."""
IDENTIFIER = b"EWGP"
_OPS = ("constant", *FREE_OPS, *ARITHMETIC_OPS)
_KINDS = ("input", "constant", "mutable", "temp", "symint")


class BlobError(ValueError):
    """A blob cannot be read: foreign, truncated, corrupt, or newer than this reader."""


def serialize(graph: Graph) -> bytes:
    """The blob of a graph."""
    table = fb.GraphT()
    table.formatVersion = graph.format_version
    table.modelId = graph.model_id
    table.values = [_value(v) for v in graph.values]
    table.nodes = [_node(n) for n in graph.nodes]
    table.inputs = list(graph.inputs)
    table.outputs = [_arg("", o) for o in graph.outputs]
    table.mutations = [_mutation(*pair) for pair in graph.mutations]
    table.symbols = [_range(r) for r in graph.symbols]
    builder = flatbuffers.Builder(1024)
    builder.Finish(table.Pack(builder), IDENTIFIER)
    return bytes(builder.Output())


def _dim(dim: Dim) -> Any:
    table = fb.DimT()
    table.args = []
    if isinstance(dim, int):
        table.value = dim
        return table
    table.op = _OPS.index(dim.op)
    table.args = [_dim(arg) for arg in dim.args]
    return table


def _value(value: Value) -> Any:
    table = fb.ValueT()
    table.kind, table.dtype, table.name = value.kind, value.dtype, value.name
    table.data = value.data or ""
    table.shape = [_dim(d) for d in value.shape]
    table.alias = -1 if value.alias is None else value.alias
    return table


def _node(node: Node) -> Any:
    table = fb.NodeT()
    table.op, table.name, table.outputs = node.op, node.name, list(node.outputs)
    table.args = [_arg(name, arg) for name, arg in node.args.items()]
    return table


def _mutation(target: int, source: int) -> Any:
    table = fb.MutationT()
    table.target, table.source = target, source
    return table


def _range(bounds: SymbolRange) -> Any:
    table = fb.SymbolRangeT()
    table.symbol, table.low = _dim(bounds.symbol), bounds.low
    table.bounded, table.high = bounds.high is not None, bounds.high or 0
    return table


def _arg(name: str, arg: Arg) -> Any:
    table = fb.ArgT()
    table.name = name
    if arg is None:
        table.kind = fb.ArgKind.none
    elif isinstance(arg, Ref):
        table.kind, table.integer = fb.ArgKind.value, arg.value
    elif isinstance(arg, bool):
        table.kind, table.integer = fb.ArgKind.boolean, int(arg)
    elif isinstance(arg, int):
        table.kind, table.integer = fb.ArgKind.integer, arg
    elif isinstance(arg, float):
        table.kind, table.number = fb.ArgKind.float, arg
    elif isinstance(arg, str):
        table.kind, table.text = fb.ArgKind.string, arg
    elif isinstance(arg, Sym):
        table.kind, table.dim = fb.ArgKind.dim, _dim(arg)
    elif isinstance(arg, tuple):
        table.kind, table.items = fb.ArgKind.list, [_arg("", item) for item in arg]
    else:
        raise TypeError(f"argument {name} has type {type(arg).__name__}, which the blob cannot hold")
    return table


def deserialize(blob: bytes | memoryview) -> Graph:
    """The graph of a blob.

    Raises:
        BlobError: foreign identifier, newer format version, truncated or corrupt bytes.
    """
    blob = bytes(blob)
    if len(blob) < 8 or blob[4:8] != IDENTIFIER:
        raise BlobError(f"not a WebGPU delegate blob: identifier {blob[4:8]!r}, expected {IDENTIFIER!r}")
    try:
        root = fb.Graph.GetRootAs(blob)
        version = root.FormatVersion()
        if version > FORMAT_VERSION:
            raise BlobError(
                f"the blob has format version {version}, this package reads up to {FORMAT_VERSION}; "
                "update executorch-webgpu or export again"
            )
        table = fb.GraphT.InitFromObj(root)
        graph = Graph(
            tuple(_read_value(v) for v in table.values or ()),
            tuple(_read_node(n) for n in table.nodes or ()),
            tuple(int(i) for i in _list(table.inputs)),
            tuple(_read_output(o) for o in table.outputs or ()),
            tuple((m.target, m.source) for m in table.mutations or ()),
            tuple(
                SymbolRange(_read_symbol(r.symbol), r.low, r.high if r.bounded else None) for r in table.symbols or ()
            ),
            _text(table.modelId),
            version,
        )
        _check_indices(graph)
    except BlobError:
        raise
    except (
        struct.error,
        IndexError,
        TypeError,
        ValueError,
        AttributeError,
        UnicodeDecodeError,
        RecursionError,
        MemoryError,
    ) as error:
        raise BlobError(f"the blob is truncated or corrupt: {error}") from error
    return graph


def _list(items: Any) -> list[Any]:
    return [] if items is None else list(items)


def _text(raw: bytes | str | None) -> str:
    return raw.decode() if isinstance(raw, bytes) else raw or ""


def _read_dim(table: Any) -> Dim:
    if table.op == 0:
        return int(table.value)
    return Sym(_OPS[table.op], tuple(_read_dim(arg) for arg in table.args))


def _read_symbol(table: Any) -> Sym:
    dim = _read_dim(table)
    if not isinstance(dim, Sym):
        raise BlobError("a symbol range names no symbol")
    return dim


def _read_value(table: Any) -> Value:
    kind, dtype = _text(table.kind), _text(table.dtype)
    if kind not in _KINDS or dtype not in DTYPES:
        raise BlobError(f"value of unknown kind {kind!r} or dtype {dtype!r}")
    shape = tuple(_read_dim(d) for d in table.shape or ())
    data = _text(table.data) or None
    return Value(kind, dtype, shape, _text(table.name), data, None if table.alias < 0 else table.alias)


def _read_node(table: Any) -> Node:
    args = {_text(arg.name): _read_arg(arg) for arg in table.args or ()}
    return Node(_text(table.op), args, tuple(int(i) for i in _list(table.outputs)), _text(table.name))


def _read_output(table: Any) -> Ref | int | Sym:
    arg = _read_arg(table)
    if not isinstance(arg, Ref | int | Sym) or isinstance(arg, bool):
        raise BlobError(f"output {arg!r} is neither a value nor an integer")
    return arg


def _read_arg(table: Any) -> Arg:
    kind = table.kind
    if kind == fb.ArgKind.none:
        return None
    if kind == fb.ArgKind.value:
        return Ref(table.integer)
    if kind == fb.ArgKind.boolean:
        return bool(table.integer)
    if kind == fb.ArgKind.integer:
        return int(table.integer)
    if kind == fb.ArgKind.float:
        return float(table.number)
    if kind == fb.ArgKind.string:
        return _text(table.text)
    if kind == fb.ArgKind.dim:
        return _read_dim(table.dim)
    if kind == fb.ArgKind.list:
        return tuple(_read_arg(item) for item in table.items or ())
    raise BlobError(f"argument of unknown kind {kind}")


def _check_indices(graph: Graph) -> None:
    """Every index names a value, and following aliases ends."""
    count = len(graph.values)
    named = [*graph.inputs, *(i for pair in graph.mutations for i in pair)]
    named += [o.value for o in graph.outputs if isinstance(o, Ref)]
    for node in graph.nodes:
        named += [*node.inputs(), *node.outputs]
    named += [value.alias for value in graph.values if value.alias is not None]
    wrong = [i for i in named if not 0 <= i < count]
    if wrong:
        raise BlobError(f"the blob names value {wrong[0]}, but holds {count}")
    for start in range(count):
        current = start
        for _ in range(count):
            alias = graph.values[current].alias
            if alias is None:
                break
            current = alias
        else:
            raise BlobError(f"the aliases of value {start} form a circle")
