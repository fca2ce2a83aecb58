"""`webgpu.embedding_packed`: a lookup in a packed table, quantised or bfloat16 (`packed.py`).

Arguments:
    weight: u32 [V, words].
    indices: integers of any shape, row numbers. Negative ones are out of range, as for `aten.embedding`.
    format: `Format.literal()` of the table.

Result: [.., K] for indices [..], float32, float16 or bfloat16. Only the rows asked for are read and dequantised.
"""

from __future__ import annotations

from collections.abc import Iterator

from .. import wgsl
from ..backend.graph import FLOATS, INTEGERS, Graph, Node, Ref
from .base import Dispatch, Lowering, register
from .linear_packed import check_weight
from .packed import Format, format_of

NAME = "webgpu.embedding_packed"
_WORKGROUP = 64


def supports(graph: Graph, node: Node) -> str | None:
    """A table of the format's size, integer indices, a float result that fits."""
    indices, out = node.args["indices"], graph.values[node.outputs[0]]
    if not isinstance(indices, Ref) or graph.value(indices).dtype not in INTEGERS:
        return "indices are no integer tensor"
    reason = check_weight(graph, node.args["weight"], node.args["format"], None)
    if reason is not None:
        return reason
    form = format_of(node.args["format"])
    if out.dtype not in FLOATS or out.dtype == "f64" or out.shape != (*graph.value(indices).shape, form.k):
        return f"the result {out.dtype}{list(out.shape)} does not fit"
    return None


def lower(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
    """See the module's docstring."""
    weight, indices = Ref(ctx.id(node.args["weight"])), Ref(ctx.id(node.args["indices"]))
    rows = ctx.shape(weight)[0]
    ctx.require_elements(indices, 0, rows - 1, f"token id (axis 0 of size {rows} of {ctx.value(weight).name})")
    yield lookup(ctx, weight, indices, ctx.out(node), format_of(node.args["format"]), 0, rows)


def lookup(ctx: Lowering, weight: Ref, indices: Ref, out: Ref, form: Format, first: int, total: int) -> Dispatch:
    """The rows of a table of `total` rows that `weight` holds, which are those from `first` on."""
    quads = -(-form.k // 4)
    count = ctx.numel(indices) * quads
    sizes = {"rows": ctx.shape(weight)[0], "first": first, "total": total}
    return Dispatch(
        "embedding_packed",
        {"w": weight.value, "idx": indices.value, "out": out.value},
        {"count": count, "quads": quads, "columns": form.k, "row_words": form.words, **sizes},
        ctx.grid_1d(count, _WORKGROUP),
        consts=form.consts(),
        types={"Out": ctx.wgsl_type(out)},
        body=wgsl.source(form.part),
    )


register(NAME, supports=supports, lower=lower)
