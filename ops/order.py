"""topk and sort: NaN counts as the largest, of equal elements the first comes first. Kernels: `rank` and `topk`."""

from __future__ import annotations

from collections.abc import Iterator

from ..backend.graph import FLOATS, Graph, Node
from .base import Dispatch, Lowering, register
from .reduce import NAN_TEST, source_of
from .strides import around

WORKGROUP = 64
SHORT = 1024
"""Lines up to this length are ranked by counting; longer ones are searched once for each of the few results wanted."""
FEW = 64


def _supports(graph: Graph, node: Node) -> str | None:
    return None if isinstance(node.args["dim"], int) else "the dimension must be a literal"


def _lower(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
    source, values, dim = source_of(node), ctx.out(node), node.args["dim"]
    axis = dim if isinstance(dim, int) else 0
    outer, length, inner = around(ctx.shape(source), axis)
    _, keep, _ = around(ctx.shape(values), axis)
    if outer * inner * keep == 0:
        return
    ctx.require(keep, 0, length, f"{node.name}: k (the dimension has {length} elements)")
    kind = "f32" if ctx.dtype(source) in FLOATS else "i32"
    descending = bool(node.args["largest"] if "largest" in node.args else node.args["descending"])
    bindings = {"x": source.value, "out": values.value, "index": node.outputs[1]}
    types = {"X": ctx.wgsl_type(source), "Out": ctx.wgsl_type(values), "T": kind}
    sizes = {"length": length, "inner": inner, "keep": keep}
    if length > SHORT and keep <= FEW:
        params = {"lines": outer * inner, **sizes}
        grid = ctx.fold_grid(outer * inner)
        order = {"DESCENDING": int(descending)}
        yield Dispatch("topk", bindings, params, grid, overrides=order, types=types, body=NAN_TEST[kind])
        return
    count = outer * length * inner
    overrides = {"WG": WORKGROUP, "DESCENDING": int(descending)}
    grid = ctx.grid_1d(count, WORKGROUP)
    params = {"count": count, **sizes}
    yield Dispatch("rank", bindings, params, grid, overrides=overrides, types=types, body=NAN_TEST[kind])


register("aten.topk.default", "aten.sort.default", "aten.sort.stable", supports=_supports, lower=_lower)
