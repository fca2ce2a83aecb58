"""Softmax and its logarithm along one dimension. Kernel: `softmax`."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ..backend.graph import FLOATS, Graph, Node
from .base import Dispatch, Lowering, register
from .reduce import THREADS, lanes, source_of
from .strides import around


def supports(graph: Graph, node: Node) -> str | None:
    """Floating results of any rank; the argument may be an integer tensor where the `dtype` argument casts it."""
    dtype = graph.values[node.outputs[0]].dtype
    return None if dtype in FLOATS else f"a softmax of dtype {dtype}"


def lower(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
    """One dispatch: 256 / LY lines a workgroup."""
    source, out, dim = source_of(node), ctx.out(node), node.args["dim"]
    outer, length, inner = around(ctx.shape(source), dim if isinstance(dim, int) else 0)
    lines = outer * inner
    if lines * length == 0:
        return
    count, along = lanes(length, inner)
    yield Dispatch(
        "softmax",
        {"x": source.value, "out": out.value},
        {"lines": lines, "length": length, "inner": inner, "inf": math.inf},
        ctx.fold_grid(-(-lines // (THREADS // count))),
        overrides={
            "LY": count,
            "ALONG": along,
            "LOG": int("log_softmax" in node.op),
            "SAFE": int("_safe_softmax" in node.op),
        },
        types={"X": ctx.wgsl_type(source), "Out": ctx.wgsl_type(out)},
    )


register(
    "aten._softmax.default",
    "aten.softmax.int",
    "aten._log_softmax.default",
    "aten.log_softmax.int",
    "aten._safe_softmax.default",
    supports=supports,
    lower=lower,
)
