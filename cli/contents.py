"""What a `.pte` holds, as plain dictionaries for `inspect`. Parses only: neither GPU nor torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from ..backend.graph import ITEM_SIZE, Graph, Ref, Sym, Value, evaluate
from ..backend.serialize import BACKEND_ID, BlobError, deserialize
from ..runtime.errors import InputError, ProgramFormatError
from ..runtime.files.integrity import verify_data
from ..runtime.files.pte import DataFile, Delegate, DelegateCall, ExecutionPlan, KernelCall, Program
from ..runtime.files.pte_records import EValue
from ..runtime.methods.method import TensorInfo, describe

Record = dict[str, Any]


def describe_program(
    model: str, data: Sequence[str] = (), method: str | None = None, graphs: bool = False, verify: bool = False
) -> Record:
    """Everything that `inspect` shows; JSON can hold it.

    Args:
        model, data: paths of the `.pte` and of its `.ptd` files.
        method: only this method.
        graphs: with the text of each delegate's graph.
        verify: hash the weights and compare with what was exported.
    Raises:
        ProgramFormatError, InputError: a file or a blob is damaged; no such method.
        MissingDataError: to be verified, but in none of the files.
        OSError: a file cannot be read.
    """
    with ExitStack() as opened:
        file = opened.enter_context(Program(model))
        files = [opened.enter_context(DataFile(path)) for path in data]
        if method is not None and method not in file.method_names:
            raise InputError(f"{file.label}: no method {method!r}; the program has {', '.join(file.method_names)}")
        plans = [file.plan(name) for name in file.method_names if method in (None, name)]
        keys = set(file.keys()).union(*(each.keys() for each in files))
        checked = {"verified_data": verify_data(file, files)} if verify else {}
        return {
            "file": model,
            "bytes": file.nbytes,
            "named_data": _named(file),
            "data_files": [{"file": path, "bytes": f.nbytes, **_named(f)} for path, f in zip(data, files, strict=True)],
            "constant_methods": {p.name: _constant(p) for p in plans if p.is_constant},
            "methods": [_method(p, keys, graphs) for p in plans if not p.is_constant],
            **checked,
        }


def _named(file: Program | DataFile) -> Record:
    """Number of keys, and bytes of their data; data that several keys share count once."""
    keys = file.keys()
    parts = [np.frombuffer(file.named_data(key), np.uint8) for key in keys]
    places = {(part.ctypes.data, part.nbytes) for part in parts if part.nbytes}
    return {"count": len(keys), "data_bytes": sum(nbytes for _, nbytes in places)}


def _constant(plan: ExecutionPlan) -> Any:
    values: list[EValue] = list(plan.output_values)
    plain = [v if isinstance(v, int | float | str) or v is None else type(v).__name__ for v in values]
    return plain[0] if len(plain) == 1 else plain


def _method(plan: ExecutionPlan, keys: set[str], graphs: bool) -> Record:
    meta = describe(plan)
    used = [i for chain in plan.chains for i in chain.instructions]
    outside = Counter(plan.operators[i.op_index].full_name for i in used if isinstance(i, KernelCall))
    names = [f"input {i}" for i in range(len(plan.inputs))]
    delegates = []
    for number, part in enumerate(plan.delegates):
        graph = _graph(plan.name, number, part)
        delegates.append(_delegate(part, graph, keys, graphs))
        for call in used:
            if graph is not None and isinstance(call, DelegateCall) and call.delegate_index == number:
                _name_inputs(plan, call, graph, names)
    return {
        "name": plan.name,
        "inputs": [{"name": name, **_tensor(info)} for name, info in zip(names, meta.inputs, strict=True)],
        "outputs": [_tensor(info) for info in meta.outputs],
        "delegates": delegates,
        "outside": dict(outside.most_common()),
    }


def _name_inputs(plan: ExecutionPlan, call: DelegateCall, graph: Graph, names: list[str]) -> None:
    """Inputs are called as in the graph that they go to."""
    for argument, value in zip(call.args, graph.inputs, strict=False):
        if argument in plan.inputs:
            names[plan.inputs.index(argument)] = graph.values[value].name


def _tensor(info: TensorInfo | None) -> Record:
    if info is None:
        return {"dtype": "int", "sizes": None, "dynamic": False}
    return {"dtype": info.dtype, "sizes": list(info.sizes), "dynamic": info.dynamic}


def _graph(method: str, number: int, part: Delegate) -> Graph | None:
    """The graph of a delegate of this package; None for another backend's."""
    if part.id != BACKEND_ID:
        return None
    try:
        return deserialize(part.processed)
    except BlobError as error:
        raise ProgramFormatError(f"method {method}, delegate {number}: {error}") from error


def _delegate(part: Delegate, graph: Graph | None, keys: set[str], graphs: bool) -> Record:
    record: Record = {"backend": part.id, "blob_bytes": part.processed.nbytes}
    if graph is None:
        return record
    wanted = {value.data for value in graph.values if value.data is not None}
    record |= {
        "format_version": graph.format_version,
        "model_id": graph.model_id,
        "symbols": [{"symbol": str(r.symbol), "low": r.low, "high": r.high} for r in graph.symbols],
        "values": _values(graph),
        "nodes": dict(Counter(node.op for node in graph.nodes).most_common()),
        "outputs": [
            f"{v.dtype}[{', '.join(map(str, v.shape))}]" if (v := _output(graph, o)) is not None else str(o)
            for o in graph.outputs
        ],
        "missing_data": sorted(wanted - keys),
    }
    if graphs:
        record["graph"] = str(graph)
    return record


def _output(graph: Graph, output: Ref | int | Sym) -> Value | None:
    return graph.values[output.value] if isinstance(output, Ref) else None


def _values(graph: Graph) -> Record:
    """By kind: how many values, how many of them share storage, and bytes on the host at the largest sizes.

    Bytes are None where a size has no bound. Constants with the same content count once.
    """
    highs = {bounds.symbol: bounds.high for bounds in graph.symbols}

    def high(symbol: Sym) -> int:
        bound = highs.get(symbol)
        if bound is None:
            raise KeyError(str(symbol))
        return bound

    record: Record = {}
    counted: set[str] = set()
    for value in graph.values:
        entry = record.setdefault(value.kind, {"count": 0, "views": 0, "bytes": 0})
        entry["count"] += 1
        if value.alias is not None:
            entry["views"] += 1
            continue
        if value.kind == "constant" and value.data is not None:
            if value.data in counted:
                continue
            counted.add(value.data)
        if entry["bytes"] is not None:
            size = _nbytes(value, high)
            entry["bytes"] = None if size is None else entry["bytes"] + size
    return record


def _nbytes(value: Value, high: Any) -> int | None:
    count = ITEM_SIZE[value.dtype]
    try:
        for dim in value.shape:
            count *= evaluate(dim, high)
    except KeyError:
        return None
    return count
