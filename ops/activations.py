"""Activations as integers of 8 bits: `webgpu.quantize_activations`, for products with packed weights.

Arguments:
    input: [.., K], K a multiple of four; float32, float16 or bfloat16.
    quant_min, quant_max: the range of codes, at most 255 apart.
    eps: least scale, a number.
    symmetric: as of `webgpu.fake_quantize`; not given: False.
    norm_weight, norm_eps: an RMSNorm over K that goes first, as `webgpu.rms_norm` computes it but for the last bits;
        None: no norm.

Result: u32 [.., `words(K)`]: of each row, scale, zero point and codes of its own range, such that scale * (code - zero)
is exactly what `webgpu.fake_quantize` gives. The words of a row are, in this order, each filled up to 16 bytes:

    codes   of blocks of 32 columns, four signed bytes a word, the first column lowest; ceil(K / 32) blocks
    zeros   of each block, a word: 0 where all of a block's differences code - zero fit a signed byte, and these stand
            for its codes; else the row's zero point (both less a shift that makes them signed bytes)
    scale   of the row, a float32; a NaN where the row has a number that is not finite

Columns past K stand for 0. With the zeros of most blocks at 0, a product with weights is as a rule one of signed bytes,
without the sum of the weights that a zero point costs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod

from .. import wgsl
from ..backend.graph import Arg, Dim, Graph, Node, Ref
from .base import Dispatch, Lowering, Param, register
from .gemv_stream import BITS, Projection, Tensor
from .gemv_stream import CODES as CODES
from .packed import Format

NAME = "webgpu.quantize_activations"
BLOCK = 32
"""Columns that share a zero."""
WIDEST = 255
"""Of a range: codes are bytes."""
_LEAST, _LARGEST = 256, 1024
"""Invocations of a workgroup."""
_FLOATS = ("f32", "f16", "bf16")


def blocks(k: int) -> int:
    """Of a row of K columns."""
    return -(-k // BLOCK)


def words(k: int) -> int:
    """Of a row of K columns."""
    return 8 * blocks(k) + -(-blocks(k) // 4) * 4 + 4


def takes(form: Format | None) -> bool:
    """Whether products with weights of a format have a form for such activations (which they may widen again)."""
    return form is not None and form.bits in BITS and form.k % 4 == 0 and (
        form.groups == 1 or form.group % form.per_cell == 0
    )  # fmt: skip


def is_coded(graph: Graph, arg: Arg) -> bool:
    """Whether an input of a product is such a value."""
    return isinstance(arg, Ref) and graph.value(arg).dtype == CODES


def columns(graph: Graph, arg: Arg, form: Format | None) -> Dim:
    """K of the input of a product: of rows of words that of the weights, where they agree.

    Raises:
        ValueError: words that are not those of a row for these weights.
    """
    width = graph.value(arg).shape[-1]
    if not is_coded(graph, arg):
        return width
    if form is None or not takes(form):
        raise ValueError("the input is quantised, the weights are not packed in a form for it")
    if width != words(form.k):
        raise ValueError(f"the input has rows of {width} words, those of {form.k} columns are {words(form.k)}")
    return form.k


def supports(graph: Graph, node: Node) -> str | None:
    """A float input of whole fours, a range of bytes, numbers known at export."""
    source, norm = node.args["input"], node.args.get("norm_weight")
    if not isinstance(source, Ref) or not graph.value(source).shape:
        return "the input is no tensor, or a scalar"
    given, out = graph.value(source), graph.values[node.outputs[0]]
    k = given.shape[-1]
    if given.dtype not in _FLOATS:
        return f"{given.name} has dtype {given.dtype}; {', '.join(_FLOATS)} are supported"
    if not isinstance(k, int) or k < 4 or k % 4:
        return f"rows of {k} columns; multiples of four are supported"
    if (out.dtype, out.shape) != (CODES, (*given.shape[:-1], words(k))):
        return f"the result {out.dtype}{list(out.shape)} is no {CODES} of rows of {words(k)} words"
    norm_eps = node.args.get("norm_eps")
    try:
        span_of(range_of(node))
    except ValueError as error:
        return str(error)
    if isinstance(norm_eps, bool) or not isinstance(norm_eps, float | int | None):
        return "norm_eps is not a number known at export"
    if norm is None:
        return None
    if norm_eps is None:
        return "norm_weight without norm_eps"
    weight = graph.value(norm)
    if weight.dtype not in _FLOATS or weight.shape != (k,):
        return f"norm_weight {weight.dtype}{list(weight.shape)} does not fit rows of {k} columns"
    return None


def _whole(arg: Arg) -> bool:
    return isinstance(arg, int) and not isinstance(arg, bool)


def range_of(node: Node) -> Arg:
    """(quant_min, quant_max, eps) of a node, with True behind them where it is symmetric: `quantize` of a product."""
    found = tuple(node.args.get(name) for name in ("quant_min", "quant_max", "eps"))
    symmetric = node.args.get("symmetric", False)
    return found if symmetric is False else (*found, symmetric)


def symmetric_of(arg: Arg) -> bool:
    """`Projection.symmetric` of what `range_of` gives."""
    return isinstance(arg, tuple) and arg[3:] == (True,)


def span_of(arg: Arg) -> tuple[float, float, float, float]:
    """`Projection.span` of what `range_of` gives.

    Raises:
        ValueError: it is something else, or codes are no bytes.
    """
    if not isinstance(arg, tuple) or len(arg) not in (3, 4) or not all(isinstance(flag, bool) for flag in arg[3:]):
        raise ValueError(f"{arg!r} is no range of codes with a least scale")
    low, high, eps = arg[:3]
    if not _whole(low) or not _whole(high) or not 0 < int(str(high)) - int(str(low)) <= WIDEST:
        raise ValueError(f"codes from {low} to {high}; whole numbers at most {WIDEST} apart are supported")
    if isinstance(eps, bool) or not isinstance(eps, float | int):
        raise ValueError("eps of scales is not a number known at export")
    least, most = float(str(low)), float(str(high))
    return least, most, float(eps), 0.0 if least >= -128 and most <= 127 else least + 128


def lower(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
    """A workgroup a row."""
    source, norm, eps = node.args["input"], node.args.get("norm_weight"), node.args.get("norm_eps")
    *rows, k = ctx.shape(source)
    p = Projection(
        Tensor(ctx.id(source), ctx.wgsl_type(source)),
        prod(rows),
        k,
        (),
        (),
        (),
        None if eps is None else float(str(eps)),
        Tensor(ctx.id(norm), ctx.wgsl_type(norm)) if isinstance(norm, Ref) else None,
        span=span_of(range_of(node)),
        symmetric=symmetric_of(range_of(node)),
    )
    if p.m:
        yield _quantize(ctx, p, node.outputs[0])


def quantize(ctx: Lowering, p: Projection) -> tuple[Projection, Dispatch]:
    """A projection with a `span` as one of integers, and the dispatch that makes them."""
    codes = ctx.scratch(CODES, p.m * words(p.k))
    return coded(p, codes), _quantize(ctx, p, codes)


def coded(p: Projection, codes: int = 0) -> Projection:
    """A projection with a `span` as one whose input is the integers in value `codes`."""
    return replace(p, x=Tensor(codes, CODES), eps=None, norm=None, dtype=CODES, span=None, symmetric=False)


def _quantize(ctx: Lowering, p: Projection, out: int) -> Dispatch:
    assert p.span is not None
    bindings, types = {"x": p.x.id, "out": out}, {"X": f"vec4<{p.x.type}>", "Norm": "vec4<f32>"}
    if p.norm is not None:
        bindings["norm"], types["Norm"] = p.norm.id, f"vec4<{p.norm.type}>"
    params: dict[str, Param] = {
        "rows": p.m, "quads": p.k // 4, "blocks": blocks(p.k), "words": words(p.k), "span": p.span,
        "norm_eps": 0.0 if p.eps is None else p.eps, "k": float(p.k),
    }  # fmt: skip
    size = 1 << (p.k // 8 - 1).bit_length() if p.k > 8 else 1  # two columns of four an invocation
    consts = {
        "WG": min(max(size, _LEAST), _LARGEST, ctx.limits.max_invocations), "NORM": p.eps is not None,
        "NORM_WEIGHT": p.norm is not None, "SYMMETRIC": p.symmetric,
    }  # fmt: skip
    body = wgsl.source("quantize_range") + wgsl.source("quotient")
    return Dispatch("quantize_activations", bindings, params, ctx.fold_grid(p.m), consts=consts, types=types, body=body)


def widen(ctx: Lowering, p: Projection) -> tuple[Projection, Dispatch]:
    """A projection of floats that are what its input stands for, and the dispatch that makes them."""
    count = p.m * p.k // 4
    floats = ctx.scratch("f32", p.m * p.k)
    params: dict[str, Param] = {"count": count, "quads": p.k // 4, "blocks": blocks(p.k), "words": words(p.k)}
    bindings = {"codes": p.x.id, "out": floats}
    dispatch = Dispatch("dequantize_activations", bindings, params, ctx.grid_1d(count, 64))
    return replace(p, x=Tensor(floats, "f32"), dtype="f32"), dispatch


register(NAME, supports=supports, lower=lower)
