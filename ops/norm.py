"""Normalisations over the last axes: RMSNorm (`webgpu.rms_norm`, rms_norm, _fused_rms_norm) and LayerNorm."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from ..backend.graph import Arg, Dim, Graph, Node, Ref
from .base import Dispatch, Lowering, register

FLOATS = ("f32", "f16", "bf16")
DEFAULT_EPS = 2.0**-23
"""What rms_norm uses without an eps: the machine epsilon of float32, in which PyTorch computes for every dtype."""
GPU_INVOCATIONS = 1 << 17
"""Invocations that keep a large GPU busy; rows are shared by more invocations until there are as many."""


@dataclass(frozen=True, slots=True)
class Rows:
    """How a tensor is cut into rows, and rows into invocations."""

    rows: int
    elements: int
    vector: bool
    lanes: int
    workgroup: int

    @classmethod
    def of(cls, ctx: Lowering, x: Arg, axes: int) -> Rows:
        """`axes` trailing axes of `x` form a row."""
        shape = ctx.shape(x)
        split = len(shape) - axes
        rows, elements = prod(shape[:split]), prod(shape[split:])
        vector = elements % 4 == 0
        steps = max(elements // 4 if vector else elements, 1)
        largest = min(256, ctx.limits.max_invocations)
        lanes = min(8, 1 << (steps - 1).bit_length())
        while lanes < largest and 2 * lanes <= steps and (rows * lanes < GPU_INVOCATIONS or lanes * 8 < steps):
            lanes *= 2
        return cls(rows, elements, vector, lanes, max(min(64, largest), lanes))

    @property
    def params(self) -> dict[str, int | float]:
        return {
            "rows": self.rows,
            "size": self.elements // 4 if self.vector else self.elements,
            "elements": float(self.elements),
        }

    @property
    def consts(self) -> dict[str, int | float | bool]:
        return {"WG": self.workgroup, "LANES": self.lanes, "SPLAT": 1.0 if self.vector else 0.5}

    def type(self, name: str) -> str:
        """The WGSL type in which a row of elements of type `name` is walked."""
        return f"vec4<{name}>" if self.vector else name

    def grid(self, ctx: Lowering) -> tuple[int, int, int]:
        return ctx.grid_1d(self.rows, self.workgroup // self.lanes)


def _optional_type(ctx: Lowering, arg: Arg) -> str:
    return "f32" if arg is None else ctx.wgsl_type(arg)


def rms_norm(ctx: Lowering, x: Arg, weight: Arg, out: Ref, eps: float, axes: int) -> Iterator[Dispatch]:
    """x / sqrt(mean(x^2) + eps) * weight over the last `axes` axes."""
    if ctx.numel(x) == 0:
        return
    rows = Rows.of(ctx, x, axes)
    bindings = {"x": ctx.id(x), "out": out.value}
    if weight is not None:
        bindings["weight"] = ctx.id(weight)
    types = {"X": ctx.wgsl_type(x), "W": _optional_type(ctx, weight), "Out": ctx.wgsl_type(out), "F": "f32"}
    yield Dispatch(
        "rms_norm",
        bindings,
        {**rows.params, "eps": eps},
        rows.grid(ctx),
        consts={**rows.consts, "WEIGHT": weight is not None},
        types={name: rows.type(kind) for name, kind in types.items()},
    )


def layer_norm(
    ctx: Lowering,
    x: Arg,
    weight: Arg,
    bias: Arg,
    out: Ref,
    eps: float,
    axes: int,
    *,
    mean: Ref | None = None,
    rstd: Ref | None = None,
    center: bool = True,
) -> Iterator[Dispatch]:
    """(x - mean) * rstd * weight + bias over the last `axes` axes; mean and rstd [rows] are results where given."""
    rows = Rows.of(ctx, x, axes)
    if rows.rows == 0 or (rows.elements == 0 and mean is None and rstd is None):
        return
    bindings = {
        "x": ctx.id(x),
        "out": out.value,
        "mean_out": ctx.scratch("f32", rows.rows) if mean is None else mean.value,
        "rstd_out": ctx.scratch("f32", rows.rows) if rstd is None else rstd.value,
    }
    for name, arg in (("weight", weight), ("bias", bias)):
        if arg is not None:
            bindings[name] = ctx.id(arg)
    types = {
        "X": ctx.wgsl_type(x),
        "W": _optional_type(ctx, weight),
        "B": _optional_type(ctx, bias),
        "Out": ctx.wgsl_type(out),
        "F": "f32",
    }
    yield Dispatch(
        "layer_norm",
        bindings,
        {**rows.params, "eps": eps},
        rows.grid(ctx),
        consts={**rows.consts, "CENTER": center, "WEIGHT": weight is not None, "BIAS": bias is not None},
        types={
            **{name: rows.type(kind) for name, kind in types.items()},
            "Mean": _optional_type(ctx, mean),
            "Rstd": _optional_type(ctx, rstd),
        },
    )


def _eps(arg: Arg) -> float:
    return float(arg) if isinstance(arg, int | float) else DEFAULT_EPS


def _axes(node: Node) -> int:
    shape = node.args.get("normalized_shape")
    return len(shape) if isinstance(shape, tuple) else 1


def lower_rms(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
    """`webgpu.rms_norm` (last axis) and rms_norm."""
    args = node.args
    return rms_norm(ctx, args["input"], args.get("weight"), ctx.out(node), _eps(args.get("eps")), _axes(node))


def lower_fused_rms(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
    """_fused_rms_norm: (out, rstd [.., 1])."""
    args = node.args
    return layer_norm(
        ctx,
        args["input"],
        args.get("weight"),
        None,
        ctx.out(node),
        _eps(args.get("eps")),
        _axes(node),
        rstd=ctx.out(node, 1),
        center=False,
    )


def lower_layer(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
    """layer_norm, and native_layer_norm with its mean and rstd [.., 1]."""
    args = node.args
    native = len(node.outputs) == 3
    mean, rstd = (ctx.out(node, 1), ctx.out(node, 2)) if native else (None, None)
    eps = _eps(args.get("eps", 1e-5))
    return layer_norm(
        ctx, args["input"], args.get("weight"), args.get("bias"), ctx.out(node), eps, _axes(node), mean=mean, rstd=rstd
    )


def _differ(left: Dim, right: Dim) -> bool:
    return isinstance(left, int) and isinstance(right, int) and left != right


def supports(graph: Graph, node: Node) -> str | None:
    """Floats, a literal eps, and weights of the shape of the normalised axes."""
    x = graph.value(node.args["input"])
    if not x.shape:
        return "a norm of a scalar"
    wanted = node.args.get("normalized_shape", x.shape[-1:])
    if not isinstance(wanted, tuple) or not wanted or len(wanted) > len(x.shape):
        return f"normalized_shape {wanted} does not fit the input {list(x.shape)}"
    normalized = x.shape[len(x.shape) - len(wanted) :]
    for size, goal in zip(wanted, normalized, strict=True):
        if isinstance(size, int) and _differ(size, goal):
            return f"normalized_shape {list(wanted)} is not the end of the input's shape {list(x.shape)}"
    if len(node.outputs) > 1 and 0 in normalized:
        return "mean and rstd over no elements"
    eps = node.args.get("eps")
    if eps is not None and not isinstance(eps, int | float):
        return "eps is not a number known at export"
    for name in ("weight", "bias"):
        arg = node.args.get(name)
        if arg is not None:
            shape = graph.value(arg).shape
            if len(shape) != len(normalized) or any(_differ(s, n) for s, n in zip(shape, normalized, strict=True)):
                return f"{name} {list(shape)} has not the shape of the normalised axes {list(normalized)}"
    for index in (*node.inputs(), *node.outputs):
        if graph.values[index].dtype not in FLOATS:
            value = graph.values[index]
            return f"{value.name} has dtype {value.dtype}; norms take float32, float16 and bfloat16"
    return None


register("webgpu.rms_norm", "aten.rms_norm.default", supports=supports, lower=lower_rms)
register("aten._fused_rms_norm.default", supports=supports, lower=lower_fused_rms)
register("aten.layer_norm.default", "aten.native_layer_norm.default", supports=supports, lower=lower_layer)
