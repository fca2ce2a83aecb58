"""`webgpu.project`: the projections of a decoder layer with what stands before and after them.

Arguments:
    input: [.., M, K] of any rank from 1; float32, float16 or bfloat16. Or rows of 8-bit integers (`activations.py`),
        for packed weights and without norm.
    weights: one to three values [N_i, K], or packed ones.
    formats: for each weight the literal of its `Format` where it is packed (`packed.py`), else None; or None.
    biases: for each weight a value [N_i] or None; or None.
    norm_eps: a number: RMSNorm over K of the input goes first, as `webgpu.rms_norm` computes it. None: no norm.
    norm_weight: its weight [K], or None.
    quantize: (quant_min, quant_max, eps): the input, or its norm, is quantised to 8 bits row by row, as by
        `webgpu.quantize_activations`, and multiplied as integers; all weights are packed. None, or left out: it is not.
    residual: a value of the result's shape that is added last, or None; with one weight, or gated.
    gated: the weights are two, gate and up, of one size; the result is silu(x gate^T + bias) * (x up^T + bias), plus
        the residual.

Results: [.., M, N_i] for each weight, or one where gated.

For few rows on a device with subgroups all of it is one dispatch of gemv_stream.wgsl or gemv_stream_siblings.wgsl:
weights are read once and nothing in between goes to memory. Biases of several weights do not fit its bindings: each
is a dispatch of its own then, norm included. Many rows go through tiles (`gemm.py`, `gemm_codes.py`), after a norm of
its own. What is quantised is so by every workgroup of the one dispatch for very few rows (`fits_quantizing`), in a
dispatch of its own for more. Other sizes and devices get the operators that the node stands for, one by one. The fused
norm multiplies the sums by 1 / sqrt(mean(x^2) + eps) instead of the elements: equal but for the last bits, and for rows
whose products before the norm pass float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

from ..backend.graph import Arg, Dim, Graph, Node, Ref, Value
from . import activations, gemm_codes
from .activations import columns, is_coded
from .base import Dispatch, Lowering, find, register
from .gemm import gemm, takes
from .gemv_stream import Projection, Tensor, fits, fits_passes, fits_quantizing, stream
from .linear_packed import NAME as PACKED
from .linear_packed import check_weight, quantized, weight_tensor
from .matmul import GEMV_M, NAIVE_K
from .packed import Format, format_of

NAME = "webgpu.project"
FLOATS = ("f32", "f16", "bf16")
MAX_WEIGHTS = 3


@dataclass(frozen=True)
class Parts:
    """The arguments, with their types."""

    input: Ref
    weights: tuple[Ref, ...]
    formats: tuple[Format | None, ...]
    biases: tuple[Ref | None, ...]
    norm_weight: Ref | None
    norm_eps: float | None
    residual: Ref | None
    gated: bool
    quantize: Arg = None


def _optional(node: Node, name: str) -> Ref | None:
    found = node.args.get(name)
    if found is not None and not isinstance(found, Ref):
        raise ValueError(f"{name} is {found!r}, not a value")
    return found


def parts(node: Node) -> Parts:
    """The arguments of a node; ValueError where one has a wrong type."""
    source, weights, eps = node.args["input"], node.args["weights"], node.args.get("norm_eps")
    if not isinstance(source, Ref) or not isinstance(weights, tuple):
        raise ValueError("input is no value, or weights is no list of values")
    refs = tuple(weight for weight in weights if isinstance(weight, Ref))
    biases = node.args.get("biases") or (None,) * len(weights)
    found = tuple(bias for bias in biases if isinstance(bias, Ref | None)) if isinstance(biases, tuple) else ()
    if len(refs) != len(weights) or len(found) != len(refs):
        raise ValueError("weights are no list of values, or there is not one bias, or None, for each of them")
    given = node.args.get("formats") or (None,) * len(weights)
    if not isinstance(given, tuple) or len(given) != len(refs):
        raise ValueError("there is not one format, or None, for each weight")
    formats = tuple(None if form is None else format_of(form) for form in given)
    if eps is not None and (isinstance(eps, bool) or not isinstance(eps, int | float)):
        raise ValueError("norm_eps is not a number known at export")
    gated = node.args.get("gated", False)
    if not isinstance(gated, bool):
        raise ValueError("gated is not a literal bool")
    norm, residual = _optional(node, "norm_weight"), _optional(node, "residual")
    return Parts(source, refs, formats, found, norm, None if eps is None else float(eps), residual, gated,
                 node.args.get("quantize"))  # fmt: skip


def expanded(graph: Graph, node: Node, first: int) -> tuple[list[Value], list[Node]]:
    """The operators that a node stands for, and the values between them, whose indices begin at `first`."""
    p = parts(node)
    values: list[Value] = []
    nodes: list[Node] = []
    shape, dtype = graph.value(p.input).shape, graph.values[node.outputs[0]].dtype

    def between(dims: tuple[Dim, ...]) -> int:
        values.append(Value("temp", dtype, dims, f"{node.name}.{len(values)}"))
        return first + len(values) - 1

    def make(op: str, args: dict[str, Arg], output: int) -> Ref:
        nodes.append(Node(op, args, (output,), node.name))
        return Ref(output)

    x = p.input
    if p.quantize is not None:
        low, high, least, _ = activations.span_of(p.quantize)
        form, *_ = p.formats
        words = activations.words(0 if form is None else form.k)
        values.append(Value("temp", activations.CODES, (*shape[:-1], words), f"{node.name}.codes"))
        codes: dict[str, Arg] = {
            "input": x, "quant_min": int(low), "quant_max": int(high), "eps": least, "norm_weight": p.norm_weight,
            "norm_eps": p.norm_eps, "symmetric": activations.symmetric_of(p.quantize),
        }  # fmt: skip
        x = make(activations.NAME, codes, first)
    elif p.norm_eps is not None:
        args: dict[str, Arg] = {"input": x, "weight": p.norm_weight, "eps": p.norm_eps}
        x = make("webgpu.rms_norm", args, between(shape))
    sums: list[Ref] = []
    for i, (weight, bias) in enumerate(zip(p.weights, p.biases, strict=True)):
        last = not p.gated and p.residual is None
        size = graph.value(weight).shape[0]
        output = node.outputs[i] if last else between((*shape[:-1], size))
        args = {"input": x, "weight": weight, "bias": bias}
        form = p.formats[i]
        if form is None:
            sums.append(make("aten.linear.default", args, output))
        else:
            sums.append(make(PACKED, {**args, "format": form.literal()}, output))
    if p.gated:
        output = node.outputs[0] if p.residual is None else between(graph.values[node.outputs[0]].shape)
        sums = [make("webgpu.swiglu", {"gate": sums[0], "up": sums[1]}, output)]
    if p.residual is not None:
        make("aten.add.Tensor", {"self": sums[0], "other": p.residual, "alpha": 1}, node.outputs[0])
    return values, nodes


def supports(graph: Graph, node: Node) -> str | None:
    """What the operators that the node stands for support, and sizes that agree."""
    try:
        p = parts(node)
    except ValueError as error:
        return str(error)
    if not 1 <= len(p.weights) <= MAX_WEIGHTS:
        return f"{len(p.weights)} weights; one to {MAX_WEIGHTS} are supported"
    if p.gated and len(p.weights) != 2:
        return f"gated with {len(p.weights)} weights; it takes two"
    if len(node.outputs) != (1 if p.gated else len(p.weights)):
        return f"{len(node.outputs)} results for {len(p.weights)} weights"
    if p.residual is not None and len(node.outputs) > 1:
        return "a residual to several results"
    if p.norm_eps is None and p.norm_weight is not None:
        return "norm_weight without norm_eps"
    source = graph.value(p.input)
    if not source.shape:
        return "the input is a scalar"
    if is_coded(graph, p.input) and (p.norm_eps is not None or p.quantize is not None):
        return "a norm of what is quantised, or quantised again"
    if p.quantize is not None:
        try:
            activations.span_of(p.quantize)
        except ValueError as error:
            return str(error)
        if not all(activations.takes(form) for form in p.formats):
            return "quantised, and weights that are not packed in a form for it"
    for i, weight in enumerate(p.weights):
        shape = graph.value(weight).shape
        if len(shape) != 2:
            return f"weight {list(shape)} is no matrix"
        form = p.formats[i]
        try:
            k = columns(graph, p.input, form)
        except ValueError as error:
            return str(error)
        reason = None if form is None else check_weight(graph, weight, form.literal(), k)
        if reason is not None:
            return reason
        out = graph.values[node.outputs[0 if p.gated else i]]
        if out.shape != (*source.shape[:-1], shape[0]):
            return f"the result {list(out.shape)} does not fit input {list(source.shape)} and weight {list(shape)}"
        bias = p.biases[i]
        if bias is not None and graph.value(bias).shape != shape[:1]:
            return f"bias {list(graph.value(bias).shape)} does not fit weight {list(shape)}"
    if p.residual is not None:
        residual, out = graph.value(p.residual), graph.values[node.outputs[0]]
        if (residual.shape, residual.dtype) != (out.shape, out.dtype):
            return (
                f"residual {residual.dtype}{list(residual.shape)} differs from the result {out.dtype}{list(out.shape)}"
            )
    values, nodes = expanded(graph, node, len(graph.values))
    whole = replace(graph, values=graph.values + tuple(values))
    for inner in nodes:
        op = find(inner.op)
        reason = f"no operator {inner.op}" if op is None else op.supports(whole, inner)
        if reason is not None:
            return reason
    return None


def projection(ctx: Lowering, node: Node) -> Projection:
    """The node in numbers."""
    p = parts(node)

    def tensor(ref: Ref) -> Tensor:
        return Tensor(ref.value, ctx.wgsl_type(ref))

    def optional(ref: Ref | None) -> Tensor | None:
        return None if ref is None else tensor(ref)

    *rows, k = ctx.shape(p.input)
    form = p.formats[0]
    if form is not None and is_coded(ctx.graph, p.input):
        k = form.k
    return Projection(
        tensor(p.input),
        prod(rows) if k else 0,
        k,
        tuple(weight_tensor(ctx, weight, form) for weight, form in zip(p.weights, p.formats, strict=True)),
        tuple(ctx.shape(weight)[0] for weight in p.weights),
        tuple(tensor(ctx.out(node, i)) for i in range(len(node.outputs))),
        p.norm_eps,
        optional(p.norm_weight),
        p.gated,
        optional(p.biases[0]) if len(p.weights) == 1 else None,
        optional(p.residual),
        quantized(p.formats),
        multiplied(ctx, p, ctx.out(node)),
        None if p.quantize is None else activations.span_of(p.quantize),
        activations.symmetric_of(p.quantize),
    )


def multiplied(ctx: Lowering, p: Parts, result: Ref) -> str:
    """The dtype in the graph of what is multiplied with the weights: of the input, or of the norm, as `expanded` has
    it."""
    return ctx.dtype(p.input if p.norm_eps is None else result)


def lower(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
    """See the module's docstring."""
    p, found = parts(node), projection(ctx, node)
    several = len(p.weights) > 1 and any(bias is not None for bias in p.biases)
    if found.span is not None and (several or not fits_quantizing(ctx.limits, found)):
        whole = activations.coded(found)
        if several or not _takes_codes(ctx, whole):
            yield from _one_by_one(ctx, node)
            return
        found, dispatch = activations.quantize(ctx, found)
        yield dispatch
    streams = fits(ctx.limits, found) or fits_passes(ctx.limits, found)
    if not streams and not several and found.m > GEMV_M and gemm_codes.takes(ctx.limits, found):
        yield from gemm_codes.gemm_codes(ctx, found)
        return
    if (
        not streams
        and not several
        and not found.coded
        and found.m > GEMV_M
        and found.k > NAIVE_K
        and takes(replace(found, eps=None))
    ):
        yield from _tiled(ctx, node, found)
        return
    if not streams or (several and p.gated):
        yield from _one_by_one(ctx, node)
        return
    if not several:
        yield from stream(ctx, found)
        return
    for i, bias in enumerate(p.biases):
        alone = replace(
            found,
            weights=found.weights[i : i + 1],
            sizes=found.sizes[i : i + 1],
            outs=found.outs[i : i + 1],
            formats=found.formats[i : i + 1],
        )
        bound = None if bias is None else Tensor(bias.value, ctx.wgsl_type(bias))
        yield from stream(ctx, replace(alone, bias=bound))


def _takes_codes(ctx: Lowering, p: Projection) -> bool:
    """Whether a projection of integers is one dispatch, or tiles."""
    return fits(ctx.limits, p) or fits_passes(ctx.limits, p) or (p.m > GEMV_M and gemm_codes.takes(ctx.limits, p))


def _tiled(ctx: Lowering, node: Node, found: Projection) -> Iterator[Dispatch]:
    """The norm by itself, then tiles that gate and add as they write."""
    if found.eps is not None:
        whole, first = ctx.graph, len(ctx.graph.values)
        [value, *_], [norm, *_] = expanded(whole, node, first)
        if ctx.scratch("f32", found.m * found.k) != first:
            raise RuntimeError(f"{node.name}: scratch values were taken before")
        ctx.graph = replace(whole, values=(*whole.values, value))
        try:
            op = find(norm.op)
            if op is None:
                raise RuntimeError(f"{node.name}: no operator {norm.op}")
            yield from op.lower(ctx, norm)
            found = replace(found, x=Tensor(first, ctx.stored_as(first, "f32")), eps=None, norm=None)
        finally:
            ctx.graph = whole
    yield from gemm(ctx, found)


def _one_by_one(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
    """The operators that the node stands for, with scratch values between them."""
    whole, first = ctx.graph, len(ctx.graph.values)
    values, nodes = expanded(whole, node, first)
    for number, value in enumerate(values):
        count = 1
        for dim in value.shape:
            count *= ctx.int(dim)
        if ctx.scratch("f32", count) != first + number:
            raise RuntimeError(f"{node.name}: scratch values were taken before")
    ctx.graph = replace(whole, values=whole.values + tuple(values))  # what the other operators look shapes up in
    try:
        for inner in nodes:
            op = find(inner.op)
            if op is None:
                raise RuntimeError(f"{node.name}: no operator {inner.op}")
            yield from op.lower(ctx, inner)
    finally:
        ctx.graph = whole


register(NAME, supports=supports, lower=lower)
