"""Quantisation operators of torchao and of ExecuTorch's decomposed library, one by one, and `webgpu.fake_quantize`.

    torchao.dequantize_affine, torchao.quantize_affine       blocks of any shape that divide, up to four axes
    torchao.choose_qparams_affine, webgpu.fake_quantize      (a)symmetric, a block a row; choose: or the whole tensor
    torchao.dequantize_int4_tensor                           two codes a byte, scales [groups, N]
    quantized_decomposed.embedding_byte | 4bit | 2bit        lookups that dequantise

What a pass recognises around weights it packs (`backend/passes/quantized.py`); these are right for everything else.

`webgpu.fake_quantize(input, quant_min, quant_max, eps, symmetric=False)` gives, in one dispatch, what
`dequantize_affine` of `quantize_affine` of the input gives with the scale and zero point that `choose_qparams_affine`
finds for each row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

from .. import wgsl
from ..backend.graph import FLOATS, INTEGERS, Arg, Dim, Graph, Node, Ref, Value
from .base import Dispatch, Lowering, Param, register

MAX_RANK = 4
_WORKGROUP = 64
SMALLEST = {"f32": 2.0**-126, "f16": 2.0**-14, "bf16": 2.0**-126}
"""Smallest normal number of a type: the least scale where an operator names none."""
_RANGES = {"i8": (-128, 127), "u8": (0, 255), "i16": (-32768, 32767), "i32": (-(2**31), 2**31 - 1)}
DEQUANTIZE = "torchao.dequantize_affine.default"
QUANTIZE = "torchao.quantize_affine.default"
CHOOSE = "torchao.choose_qparams_affine.default"
INT4 = "torchao.dequantize_int4_tensor.default"
FAKE = "webgpu.fake_quantize"
MAPPINGS = {"ASYMMETRIC": False, "SYMMETRIC": True}
"""How a range becomes scale and zero point -> whether zero is in its middle."""
TABLES = {"byte": 8, "4bit": 4, "2bit": 2}


def _value(graph: Graph, arg: Arg, dtypes: Sequence[str], name: str) -> Value | str:
    if not isinstance(arg, Ref):
        return f"{name} is no tensor"
    value = graph.value(arg)
    if value.dtype not in dtypes or value.dtype == "f64":
        return f"{name} has dtype {value.dtype}; {', '.join(d for d in dtypes if d != 'f64')} are supported"
    return value


def _blocks(shape: Sequence[object], block: Arg, what: str) -> str | None:
    """What is wrong with blocks of a tensor of fixed size (or of symbolic axes that are blocks of 1, or whole)."""
    if not isinstance(block, tuple) or len(block) != len(shape):
        return f"{what} has {len(shape)} axes, its blocks are {block}"
    if len(shape) > MAX_RANK:
        return f"{what} has {len(shape)} axes; at most {MAX_RANK} are supported"
    for size, part in zip(shape, block, strict=True):
        if part == size or (isinstance(part, int) and part == 1):
            continue
        if not isinstance(part, int) or not isinstance(size, int):
            return f"blocks {block} of {what} {list(shape)} are not known at export"
        if part < 1 or size % part:
            return f"blocks {block} do not divide {what} {list(shape)}"
    return None


def _numbers(node: Node) -> str | None:
    for name in ("quant_min", "quant_max"):
        if isinstance(node.args[name], bool) or not isinstance(node.args[name], int | float | None):
            return f"{name} is not a number known at export"
    return None


def _count(graph: Graph, arg: Arg, shape: Sequence[object], block: tuple[Arg, ...], name: str) -> str | None:
    """Whether scales or zero points are as many as blocks, as far as sizes are known."""
    found = graph.value(arg).shape
    if all(isinstance(size, int) for size in (*found, *shape, *block)):
        wanted = prod(int(str(s)) // int(str(b)) for s, b in zip(shape, block, strict=True))
        if prod(int(str(size)) for size in found) != wanted:
            return f"{name} {list(found)} are not one for each of {wanted} blocks"
    return None


def supports_affine(graph: Graph, node: Node) -> str | None:
    """dequantize_affine and quantize_affine."""
    back = node.op == DEQUANTIZE
    ours, theirs = (tuple(INTEGERS), tuple(FLOATS)) if back else (tuple(FLOATS), tuple(INTEGERS))
    source = _value(graph, node.args["input"], ours, "the input")
    if isinstance(source, str):
        return source
    zero = node.args["zero_point"]
    for arg, kinds, name in (
        (node.args["scale"], tuple(FLOATS), "scale"),
        *(() if zero is None else ((zero, (*INTEGERS, *FLOATS), "zero_point"),)),
        (Ref(node.outputs[0]), theirs, "the result"),
    ):
        found = _value(graph, arg, kinds, name)
        if isinstance(found, str):
            return found
    reason = _numbers(node) or _blocks(source.shape, node.args["block_size"], "the input")
    if reason is not None:
        return reason
    block = node.args["block_size"]
    assert isinstance(block, tuple)
    for name in ("scale", "zero_point"):
        if node.args[name] is not None:
            reason = reason or _count(graph, node.args[name], source.shape, block, name)
    return reason


def _four(values: Sequence[int], fill: int) -> tuple[int, int, int, int]:
    padded = [fill] * (MAX_RANK - len(values)) + list(values)
    return padded[0], padded[1], padded[2], padded[3]


def _dispatch(
    ctx: Lowering, node: Node, source: Arg, scale: Arg, zero: Arg, sizes: Sequence[int], blocks: Sequence[int],
    steps: Sequence[int], **more: int | float | bool,
) -> Iterator[Dispatch]:  # fmt: skip
    """affine.wgsl; `more`: bits, low_first, offset, low, high, quantize, rows and idx of a lookup."""
    out = ctx.out(node)
    count = prod(sizes)
    if count == 0:
        return
    idx = more.get("idx")
    bindings = {"x": ctx.id(source), "scale": ctx.id(scale), "out": out.value}
    types = {"X": ctx.wgsl_type(source), "Scale": ctx.wgsl_type(scale), "Out": ctx.wgsl_type(out), "Zero": "f32"}
    if zero is not None:
        bindings["zero"], types["Zero"] = ctx.id(zero), ctx.wgsl_type(zero)
    if idx is not None:
        bindings["idx"] = int(idx)
    params: dict[str, Param] = {
        "sizes": _four(sizes, 1), "blocks": _four(blocks, 1), "steps": _four(steps, 0), "count": count,
        "rows": int(more.get("rows", 0)), "low": float(more.get("low", 0)), "high": float(more.get("high", 0)),
        "offset": float(more.get("offset", 0)),
    }  # fmt: skip
    consts = {
        "BITS": int(more.get("bits", 8)), "LOW_FIRST": bool(more.get("low_first", True)), "ZERO": zero is not None,
        "QUANTIZE": bool(more.get("quantize", False)), "GATHER": idx is not None,
    }  # fmt: skip
    yield Dispatch("affine", bindings, params, ctx.grid_1d(count, _WORKGROUP), consts=consts, types=types)


def lower_affine(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
    """Scales and zero points are as many as blocks, in row-major order, whatever their shape."""
    source, block = node.args["input"], node.args["block_size"]
    assert isinstance(block, tuple)
    sizes = ctx.shape(source)
    blocks = [ctx.int(part) for part in block]  # type: ignore[arg-type]
    steps, step = [0] * len(sizes), 1
    for axis in reversed(range(len(sizes))):
        steps[axis] = step
        step *= sizes[axis] // max(blocks[axis], 1)
    scale, zero = node.args["scale"], node.args["zero_point"]
    if node.op == QUANTIZE:
        low, high = _bounds(node, ctx.value(ctx.out(node)).dtype)
        yield from _dispatch(ctx, node, source, scale, zero, sizes, blocks, steps, quantize=True, low=low, high=high)
    else:
        yield from _dispatch(ctx, node, source, scale, zero, sizes, blocks, steps)


def _bounds(node: Node, dtype: str) -> tuple[float, float]:
    least, most = _RANGES.get(dtype, _RANGES["i32"])
    low, high = node.args["quant_min"], node.args["quant_max"]
    return float(least if low is None else str(low)), float(most if high is None else str(high))


register(DEQUANTIZE, QUANTIZE, supports=supports_affine, lower=lower_affine)


# -- rows by their own range


def rows_of(shape: tuple[Dim, ...]) -> tuple[Dim, ...]:
    """The blocks that are a tensor's rows."""
    return *(1 for _ in shape[:-1]), shape[-1]


def symmetric(node: Node) -> bool:
    """Whether choose_qparams_affine or `webgpu.fake_quantize` puts zero in the middle."""
    given = node.args.get("symmetric", False) if node.op == FAKE else MAPPINGS[str(node.args["mapping_type"])]
    return given is True


def supports_rows(graph: Graph, node: Node) -> str | None:
    """choose_qparams_affine and `webgpu.fake_quantize`."""
    source = _value(graph, node.args["input"], ("f32", "f16", "bf16"), "the input")
    if isinstance(source, str):
        return source
    if not source.shape:
        return "the input is a scalar"
    reason = _numbers(node)
    eps = node.args["eps"]
    if eps is not None and not isinstance(eps, int | float):
        return "eps is not a number known at export"
    if node.op == FAKE and not isinstance(node.args.get("symmetric", False), bool):
        return "symmetric is not a literal bool"
    if reason is not None or node.op == FAKE:
        return reason
    if node.args["mapping_type"] not in MAPPINGS:
        return f"mapping {node.args['mapping_type']}; {' and '.join(MAPPINGS)} are supported"
    if node.args["block_size"] not in (rows_of(source.shape), source.shape):
        return (
            f"blocks {node.args['block_size']} of an input {list(source.shape)}; whole rows, or the whole input, are "
            "supported"
        )
    scale = _value(graph, Ref(node.outputs[0]), ("f32", "f16", "bf16"), "the scale")
    zero = _value(graph, Ref(node.outputs[1]), tuple(INTEGERS), "the zero point")
    return next((found for found in (scale, zero) if isinstance(found, str)), None)


def lower_rows(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
    """A workgroup a row; the whole input is one row where it is one block."""
    source = node.args["input"]
    shape = ctx.value(source).shape
    whole = node.op == CHOOSE and node.args["block_size"] != rows_of(shape)
    k = ctx.numel(source) if whole else ctx.shape(source)[-1]
    rows = ctx.numel(source) // k if k else 0
    if rows == 0:
        return
    dtype = ctx.value(source).dtype
    low, high = _bounds(node, "i8" if node.op == FAKE else _target(node))
    eps = node.args["eps"]
    bindings = {"x": ctx.id(source)}
    types = {"X": ctx.wgsl_type(source), "Scale": "f32", "Out": "f32"}
    if node.op == FAKE:
        bindings["out"], types["Out"] = node.outputs[0], ctx.wgsl_type(ctx.out(node))
        bindings |= {"scale": ctx.scratch("f32", 1), "zero": ctx.scratch("i32", 1)}
    else:
        bindings |= {"scale": node.outputs[0], "zero": node.outputs[1], "out": ctx.scratch("f32", 1)}
        types["Scale"] = ctx.wgsl_type(ctx.out(node))
    numbers: dict[str, Param] = {
        "rows": rows, "k": k, "low": low, "high": high, "eps": SMALLEST[dtype] if eps is None else float(str(eps)),
    }  # fmt: skip
    consts = {"FAKE": node.op == FAKE, "SYMMETRIC": symmetric(node)}
    body = wgsl.source("quantize_range") + wgsl.source("quotient")
    yield Dispatch("quantize_rows", bindings, numbers, ctx.fold_grid(rows), consts=consts, types=types, body=body)


def _target(node: Node) -> str:
    return str(node.args["target_dtype"])


register(CHOOSE, FAKE, supports=supports_rows, lower=lower_rows)


# -- codes that share bytes


def supports_int4(graph: Graph, node: Node) -> str | None:
    source = _value(graph, node.args["qdata"], ("u8",), "qdata")
    if isinstance(source, str):
        return source
    group, out = node.args["group_size"], graph.values[node.outputs[0]]
    if len(source.shape) != 2 or not all(isinstance(size, int) for size in source.shape):
        return f"qdata {list(source.shape)} is no matrix of a fixed size"
    rows, columns = int(str(source.shape[0])), 2 * int(str(source.shape[1]))
    if not isinstance(group, int) or group < 1 or columns % group:
        return f"groups of {group} do not divide {columns} columns"
    for name in ("scale", "zero_point"):
        found = _value(graph, node.args[name], (*FLOATS, *INTEGERS), name)
        if isinstance(found, str):
            return found
        if found.shape != (columns // group, rows):
            return f"{name} {list(found.shape)} is not [{columns // group}, {rows}]"
    if out.dtype not in FLOATS or out.shape != (rows, columns):
        return f"the result {out.dtype}{list(out.shape)} does not fit"
    return None


def lower_int4(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
    rows, half = ctx.shape(node.args["qdata"])
    group = ctx.int(node.args["group_size"])  # type: ignore[arg-type]
    scale, zero = node.args["scale"], node.args["zero_point"]
    yield from _dispatch(
        ctx, node, node.args["qdata"], scale, zero, (rows, 2 * half), (1, group), (1, rows), bits=4, low_first=True
    )


register(INT4, supports=supports_int4, lower=lower_int4)


# -- lookups


def _bits(node: Node) -> int:
    return TABLES[node.op.split("embedding_")[1].split(".")[0]]


def supports_table(graph: Graph, node: Node) -> str | None:
    """embedding_byte, embedding_4bit, embedding_2bit."""
    source = _value(graph, node.args["weight"], ("i8", "u8"), "weight")
    indices = _value(graph, node.args["indices"], tuple(INTEGERS), "indices")
    for found in (source, indices):
        if isinstance(found, str):
            return found
    assert isinstance(source, Value)
    assert isinstance(indices, Value)
    if len(source.shape) != 2 or not all(isinstance(size, int) for size in source.shape):
        return f"weight {list(source.shape)} is no matrix of a fixed size"
    rows, columns = int(str(source.shape[0])), int(str(source.shape[1])) * 8 // _bits(node)
    for name in ("weight_scales", "weight_zero_points"):
        arg = node.args[name]
        if arg is None and name == "weight_zero_points":
            continue
        found = _value(graph, arg, (*FLOATS, *INTEGERS), name)
        if isinstance(found, str):
            return found
        groups = found.shape[1] if len(found.shape) == 2 else 1
        if len(found.shape) not in (1, 2) or found.shape[0] != rows:
            return f"{name} {list(found.shape)} are not one a row or group of weight {list(source.shape)}"
        if not isinstance(groups, int) or groups < 1 or columns % groups:
            return f"{groups} groups a row do not divide {columns} columns"
    out = graph.values[node.outputs[0]]
    if out.dtype not in FLOATS or out.shape != (*indices.shape, columns):
        return f"the result {out.dtype}{list(out.shape)} does not fit"
    return None


def lower_table(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
    """The even column of 4 bits is in the high half of a byte; the first of 2 bits in the lowest."""
    bits, indices, scales = _bits(node), node.args["indices"], node.args["weight_scales"]
    rows, stored = ctx.shape(node.args["weight"])
    name = ctx.value(node.args["weight"]).name
    ctx.require_elements(indices, 0, rows - 1, f"token id (axis 0 of size {rows} of {name})")
    columns = stored * 8 // bits
    groups = ctx.shape(scales)[1] if len(ctx.shape(scales)) == 2 else 1
    yield from _dispatch(
        ctx, node, node.args["weight"], scales, node.args["weight_zero_points"],
        (ctx.numel(indices), columns), (1, columns // groups), (groups, 1),
        bits=bits, low_first=bits == 2, offset=(1 << bits) // 2 if bits < 8 else 0, rows=rows, idx=ctx.id(indices),
    )  # fmt: skip


for _name in TABLES:
    for _overload in ("default", "dtype"):
        register(f"quantized_decomposed.embedding_{_name}.{_overload}", supports=supports_table, lower=lower_table)
