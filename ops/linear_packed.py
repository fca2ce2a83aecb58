"""`webgpu.linear_packed`: a linear layer whose weight is packed, quantised or bfloat16 (`packed.py`).

Arguments:
    input: [.., K] of any rank from 1; float32, float16 or bfloat16. Or rows of 8-bit integers (`activations.py`).
    weight: u32 [N, words].
    bias: [N] or None.
    format: `Format.literal()` of the weight.

Result: [.., N], sums in f32 of x times scale * (code - zero), or times bfloat16, exact but for their order.

Few rows on a device with subgroups are streamed (`gemv_stream.py`; x as integers, which where the graph has 16 bits are
16 times finer than these for the largest of 32 or 16 columns), many go through tiles that dequantise as they load
(`gemm.py`), or of integers (`gemm_codes.py`); gemv_packed.wgsl takes what is left: few rows without subgroups, groups
that no cell is within, and bfloat16 in rows that are no multiple of eight columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import prod

from .. import wgsl
from ..backend.graph import FLOATS, Graph, Node, Ref
from . import gemm_codes
from .activations import columns, is_coded, widen
from .base import Dispatch, Lowering, register
from .gemm import gemm, takes
from .gemv_stream import MAX_ROWS, Projection, Tensor, fits, fits_passes, stream
from .packed import Format, format_of, rows_of

NAME = "webgpu.linear_packed"
BF16 = "bf16"
"""What a `Tensor` in words of bfloat16 has for its type: the kernels' parts are named after it."""
_WORKGROUP = 64
_LANES = 16
_BLOCK = 4


def check_weight(graph: Graph, weight: object, form: object, k: object) -> str | None:
    """What is wrong with a packed weight for inputs of K columns, or None."""
    try:
        found = format_of(form)  # type: ignore[arg-type]
        if not isinstance(weight, Ref):
            return "the weight is no value"
        rows_of(graph.value(weight), found)
    except ValueError as error:
        return str(error)
    return f"the input has {k} columns, the weight {found.k}" if isinstance(k, int) and k != found.k else None


def weight_tensor(ctx: Lowering, weight: Ref, form: Format | None) -> Tensor:
    """A weight of a projection, packed or not."""
    return Tensor(weight.value, BF16 if form is not None and form.floats else ctx.wgsl_type(weight))


def quantized(forms: Iterable[Format | None]) -> tuple[Format | None, ...]:
    """`Projection.formats` of weights: bfloat16 is a type of elements there."""
    found = tuple(None if form is None or form.floats else form for form in forms)
    return found if any(form is not None for form in found) else ()


def supports(graph: Graph, node: Node) -> str | None:
    """A float input, a weight of the format's size, a result that fits."""
    source, bias = node.args["input"], node.args.get("bias")
    if not isinstance(source, Ref) or not graph.value(source).shape:
        return "the input is no tensor, or a scalar"
    given, out = graph.value(source), graph.values[node.outputs[0]]
    for value in (given, out):
        if (value.dtype not in FLOATS or value.dtype == "f64") and not (value is given and is_coded(graph, source)):
            return f"{value.name} has dtype {value.dtype}; float32, float16 and bfloat16 are supported"
    try:
        k = columns(graph, source, format_of(node.args["format"]))
    except ValueError as error:
        return str(error)
    reason = check_weight(graph, node.args["weight"], node.args["format"], k)
    if reason is not None:
        return reason
    rows = graph.value(node.args["weight"]).shape[0]
    if out.shape != (*given.shape[:-1], rows):
        return f"the result {list(out.shape)} does not fit input {list(given.shape)} and {rows} rows of weights"
    if bias is not None and graph.value(bias).shape != (rows,):
        return f"bias {list(graph.value(bias).shape)} does not fit {rows} rows of weights"
    return None


def lower(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
    """See the module's docstring."""
    form = format_of(node.args["format"])
    source, out = node.args["input"], ctx.out(node)

    def tensor(arg: object) -> Tensor | None:
        return Tensor(arg.value, ctx.wgsl_type(arg)) if isinstance(arg, Ref) else None

    x, weight = tensor(source), Ref(ctx.id(node.args["weight"]))
    assert x is not None
    projection = Projection(
        x,
        prod(ctx.shape(source)[:-1]),
        form.k,
        (weight_tensor(ctx, weight, form),),
        (ctx.shape(weight)[0],),
        (Tensor(out.value, ctx.wgsl_type(out)),),
        bias=tensor(node.args.get("bias")),
        formats=quantized((form,)),
        dtype=ctx.dtype(source),
    )
    yield from product(ctx, projection, form)


def product(ctx: Lowering, p: Projection, form: Format) -> Iterator[Dispatch]:
    """x times one packed weight, by the kernel that suits its sizes; nothing where the result has no elements."""
    if p.m * p.sizes[0] == 0:
        return
    if fits(ctx.limits, p) or fits_passes(ctx.limits, p):
        yield from stream(ctx, p)
        return
    if p.coded and p.m > MAX_ROWS and gemm_codes.takes(ctx.limits, p):
        yield from gemm_codes.gemm_codes(ctx, p)
        return
    if p.coded:
        p, widened = widen(ctx, p)
        yield widened
    if fits_passes(ctx.limits, p):
        yield from stream(ctx, p)
    elif p.m > MAX_ROWS and takes(p):
        yield from gemm(ctx, p)
    else:
        yield from gemv(ctx, p, form)


def gemv(ctx: Lowering, p: Projection, form: Format) -> Iterator[Dispatch]:
    """gemv_packed.wgsl, in blocks of rows."""
    block = min(1 << (p.m - 1).bit_length(), _BLOCK)
    columns = _WORKGROUP // _LANES
    col_blocks = -(-p.sizes[0] // columns)
    total = col_blocks * -(-p.m // block)
    bindings = {"x": p.x.id, "w": p.weights[0].id, "out": p.outs[0].id}
    types = {"X": p.x.type, "Out": p.outs[0].type}
    for name, found in (("bias", p.bias), ("residual", p.residual)):
        types[name.capitalize()] = "f32" if found is None else found.type
        if found is not None:
            bindings[name] = found.id
    yield Dispatch(
        "gemv_packed",
        bindings,
        {"m": p.m, "n": p.sizes[0], "k": p.k, "row_words": form.words, "col_blocks": col_blocks, "total": total},
        ctx.fold_grid(total),
        consts={
            "WG": _WORKGROUP, "LANES": _LANES, "BLOCK": block, "BIAS": p.bias is not None,
            "RESIDUAL": p.residual is not None, **form.consts(),
        },
        types=types,
        body=wgsl.source(form.part),
    )  # fmt: skip


register(NAME, supports=supports, lower=lower)
