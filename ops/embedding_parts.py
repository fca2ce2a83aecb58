"""`webgpu.embedding_parts`: a lookup in a table whose rows lie in several values, because one would be too large.

Arguments:
    weights: the parts [N_i, K] in their order, of one dtype; packed ones (`packed.py`) u32 [N_i, words].
    indices: integers of any shape, row numbers of the whole table.
    format: `Format.literal()` of packed parts, or None.

Result: [.., K] for indices [..]. Negative rows are out of range, as for `aten.embedding`.

Each part is a dispatch of embedding_part.wgsl or embedding_packed.wgsl, which writes the rows that it holds: every row
of the result is written by exactly one of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

from ..backend.graph import INTEGERS, Graph, Node, Ref
from .base import Dispatch, Lowering, register
from .embedding_packed import lookup
from .linear_packed import check_weight
from .packed import format_of

NAME = "webgpu.embedding_parts"
WORKGROUP = 64


def parts(node: Node) -> tuple[Ref, ...]:
    """The values that hold the table."""
    given = node.args["weights"]
    return tuple(item for item in given if isinstance(item, Ref)) if isinstance(given, tuple) else ()


def supports(graph: Graph, node: Node) -> str | None:
    """Matrices of one dtype and width, integer indices."""
    given, indices = parts(node), node.args["indices"]
    if not given or given != node.args["weights"]:
        return "weights is no list of values"
    if not isinstance(indices, Ref) or graph.value(indices).dtype not in INTEGERS:
        return "indices are no integer tensor"
    tables = [graph.value(part) for part in given]
    for table in tables:
        if len(table.shape) != 2 or not all(isinstance(size, int) for size in table.shape):
            return f"{table.name} {list(table.shape)} is no matrix of a fixed size"
        if (table.dtype, table.shape[1]) != (tables[0].dtype, tables[0].shape[1]):
            return f"{table.name} {table.dtype}{list(table.shape)} does not continue {tables[0].name}"
    out = graph.values[node.outputs[0]]
    if node.args.get("format") is not None:
        reasons = [check_weight(graph, part, node.args["format"], out.shape[-1]) for part in given]
        return next((reason for reason in reasons if reason is not None), None)
    if (out.dtype, out.shape) != (tables[0].dtype, (*graph.value(indices).shape, tables[0].shape[1])):
        return f"the result {out.dtype}{list(out.shape)} does not fit"
    return None


def lower(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
    """See the module's docstring."""
    given, out = parts(node), ctx.out(node)
    indices = Ref(ctx.id(node.args["indices"]))
    sizes = [ctx.shape(part)[0] for part in given]
    width, total, tokens = ctx.shape(given[0])[1], sum(sizes), ctx.numel(indices)
    name = ctx.value(given[0]).name.partition("[")[0]
    ctx.require_elements(indices, 0, total - 1, f"token id (axis 0 of size {total} of {name})")
    if node.args.get("format") is not None:
        form = format_of(node.args["format"])
        for part, size, end in zip(given, sizes, accumulate(sizes), strict=True):
            yield lookup(ctx, part, indices, out, form, end - size, total)
        return
    unit = 4 if width % 4 == 0 else 1
    types = {"W": ctx.wgsl_type(given[0]), "Out": ctx.wgsl_type(out)}
    if unit == 4:
        types = {key: f"vec4<{kind}>" for key, kind in types.items()}
    count = tokens * width // unit
    for part, size, end in zip(given, sizes, accumulate(sizes), strict=True):
        yield Dispatch(
            "embedding_part",
            {"weight": part.value, "idx": indices.value, "out": out.value},
            {"count": count, "width": width // unit, "first": end - size, "rows": size, "total": total},
            ctx.grid_1d(count, WORKGROUP),
            types=types,
        )


register(NAME, supports=supports, lower=lower)
