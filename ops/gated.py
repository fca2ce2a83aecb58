"""`webgpu.swiglu`: silu(gate) * up in one pass."""

from __future__ import annotations

from collections.abc import Iterator

from ..backend.graph import Graph, Node
from .base import Dispatch, Lowering, register

FLOATS = ("f32", "f16", "bf16")


def supports(graph: Graph, node: Node) -> str | None:
    """Two float tensors of one shape."""
    gate, up = graph.value(node.args["gate"]), graph.value(node.args["up"])
    if gate.shape != up.shape:
        return f"gate {list(gate.shape)} and up {list(up.shape)} differ in shape"
    for value in (gate, up, graph.values[node.outputs[0]]):
        if value.dtype not in FLOATS:
            return f"{value.name} has dtype {value.dtype}; float32, float16 and bfloat16 are supported"
    return None


def lower(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
    """args: gate, up, both of the result's shape."""
    gate, up, out = node.args["gate"], node.args["up"], ctx.out(node)
    count = ctx.numel(out)
    if count == 0:
        return
    vector = count % 4 == 0
    items = count // 4 if vector else count
    types = {"Gate": ctx.wgsl_type(gate), "Up": ctx.wgsl_type(up), "Out": ctx.wgsl_type(out), "F": "f32"}
    yield Dispatch(
        "swiglu",
        {"gate": ctx.id(gate), "up": ctx.id(up), "out": out.value},
        {"count": items},
        ctx.grid_1d(items, 256),
        types={name: f"vec4<{kind}>" if vector else kind for name, kind in types.items()},
    )


register("webgpu.swiglu", supports=supports, lower=lower)
