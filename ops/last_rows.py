"""`executorch_webgpu::last_rows`: of each batch row, padded on the right, the last real row.

x: [B, S, K], float. q_len: i32 or i64 of shape [B], [B, 1] or [1, B]; the result [B, K] is x[b, q_len[b] - 1].
A q_len of 0 gives the first row, which means nothing but is as finite as x is; one above S the last.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..backend.graph import Graph, Node, Value
from .base import Dispatch, Lowering, register

NAME = "executorch_webgpu.last_rows.default"
FLOATS = ("f32", "f16", "bf16")


def reason(x: Value, q_len: Value, floats: tuple[str, ...]) -> str | None:
    """Why the operator does not take these arguments, or None."""
    if len(x.shape) != 3 or x.dtype not in floats:
        return f"x is {x.dtype}{list(x.shape)}; it must be a float tensor [batch, rows, elements]"
    if isinstance(x.shape[1], int) and x.shape[1] < 1:
        return f"x is {x.dtype}{list(x.shape)}; it must have at least one row"
    batch = x.shape[0]
    if q_len.dtype not in ("i32", "i64") or q_len.shape not in ((batch,), (batch, 1), (1, batch)):
        return f"q_len is {q_len.dtype}{list(q_len.shape)}; it must be i32 or i64, one for each of {batch} batch rows"
    return None


def supports(graph: Graph, node: Node) -> str | None:
    return reason(graph.value(node.args["x"]), graph.value(node.args["q_len"]), FLOATS)


def lower(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
    """One dispatch."""
    x, q_len, out = node.args["x"], node.args["q_len"], ctx.out(node)
    _, rows, size = ctx.shape(x)
    count = ctx.numel(out)
    if count == 0:
        return
    yield Dispatch(
        "last_rows",
        {"x": ctx.id(x), "q_len": ctx.id(q_len), "out": out.value},
        {"count": count, "rows": rows, "size": size},
        ctx.grid_1d(count, 64),
        types={"X": ctx.wgsl_type(x), "Out": ctx.wgsl_type(out)},
    )


register(NAME, supports=supports, lower=lower)
