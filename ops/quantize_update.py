"""`webgpu.quantize_update`: new keys and values into caches of packed bytes with scales and zero points, as
ExecuTorch's quantised cache keeps them (`quantized_attention` has its operators). It takes, by name:

    key, value: [B, S, H, D], of any float dtype; D is a multiple of 4 up to 1024.
    key_cache, value_cache: u32 [B, C, H, D / 4]: four int8 codes a word, the first in the lowest bits.
    key_scales, value_scales: f32 [B, C, H, 2]: (scale, zero point) of each token and head.
    start_pos: cache row of the first token, live.

    least = min(0, min x), most = max(0, max x)
    scale = max((most - least) / 255, 2^-23), zero point = clamp(-128 - round(least / scale), -128, 127)
    code = clamp(round(x / scale) + zero point, -128, 127), which stands for (code - zero point) * scale

Results: the new caches and scales, in the order of the old ones, whose buffers they may take over.
"""

from __future__ import annotations

from collections.abc import Iterator

from .. import wgsl
from ..backend.graph import Graph, Node, Ref, Sym
from .base import Dispatch, Lowering, register
from .copies import Side, copy_all, detached, side
from .packed_cache import MAX_SIZE

NAME = "webgpu.quantize_update"
WRITTEN = ("key_cache", "value_cache", "key_scales", "value_scales")


def supports(graph: Graph, node: Node) -> str | None:
    """Sizes that agree, float tokens, word caches, and a float32 scale and zero point for each head."""
    args, position = node.args, node.args["start_pos"]
    if len(node.outputs) != len(WRITTEN):
        return f"{NAME} has {len(WRITTEN)} results, not {len(node.outputs)}"
    shape = graph.value(args["key"]).shape
    for name in ("key", "value"):
        x, cache, scales = (graph.value(args[n]) for n in (name, f"{name}_cache", f"{name}_scales"))
        if x.dtype not in ("f32", "f16", "bf16") or len(x.shape) != 4 or x.shape != shape:
            return f"{name} is {x.dtype}{list(x.shape)}; key and value must be float of one shape with four axes"
        size, heads = x.shape[3], x.shape[2]
        if not isinstance(size, int) or size % 4 or not 0 < size <= MAX_SIZE or not isinstance(heads, int):
            return f"{name} has {heads} heads of {size} elements; multiples of 4 up to {MAX_SIZE} are supported"
        if cache.dtype != "u32" or len(cache.shape) != 4 or (cache.shape[0], *cache.shape[2:]) != (
            x.shape[0], heads, size // 4
        ):  # fmt: skip
            return f"cache {cache.name} is {cache.dtype}{list(cache.shape)} for {name} {list(x.shape)}"
        if scales.dtype != "f32" or scales.shape != (*cache.shape[:3], 2):
            return f"scales {scales.name} are {scales.dtype}{list(scales.shape)} for cache {list(cache.shape)}"
        if cache.shape[1] != graph.value(args["key_cache"]).shape[1]:
            return f"cache {cache.name} {list(cache.shape)} has other rows than that of keys"
    for name, out in zip(WRITTEN, node.outputs, strict=True):
        old = graph.value(args[name])
        if (graph.values[out].dtype, graph.values[out].shape) != (old.dtype, old.shape):
            return f"the new {name} differs from the old one in type"
    if isinstance(position, bool) or not isinstance(position, int | Sym):
        return "start_pos must be an integer"
    return f"start_pos is {position}; it must not be negative" if isinstance(position, int) and position < 0 else None


def _ref(node: Node, name: str) -> Ref:
    found = node.args[name]
    if not isinstance(found, Ref):
        raise TypeError(f"{node.name}: {name} is {found!r}")
    return found


def lower(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
    """One dispatch. A position past the end is refused by the host; one that only the GPU knows writes nothing."""
    position = node.args["start_pos"]
    if isinstance(position, bool) or not isinstance(position, int | Sym):
        raise TypeError(f"{node.name}: start_pos is {position!r}")
    written = [ctx.out(node, i) for i in range(len(WRITTEN))]
    batch, rows, heads, size = ctx.shape(node.args["key"])
    capacity = ctx.shape(written[0])[1]
    name = ctx.value(_ref(node, "key_cache")).name
    ctx.require(
        position,
        0,
        capacity - rows,
        f"writing {rows} rows into cache {name} of capacity {capacity} at start_pos {position}",
    )
    for old, new in zip(WRITTEN, written, strict=True):
        yield from copy_all(ctx, _ref(node, old), new)
    vectors = batch * rows * heads
    if vectors == 0 or capacity < rows:
        return
    read: dict[str, Side] = {}
    for source in ("key", "value"):
        read[source] = side(ctx, _ref(node, source))
        for out in written:
            if ctx.shares_storage(_ref(node, source), out):
                read[source], before = detached(ctx, _ref(node, source), out)
                yield from before
    yield Dispatch(
        "quantize_update",
        {**{n: x.value for n, x in read.items()}, **dict(zip(WRITTEN, (out.value for out in written), strict=True))},
        {"vectors": vectors, "heads": heads, "rows": rows, "capacity": capacity, "start": ctx.live(position)},
        ctx.fold_grid(2 * vectors),
        consts={"D": size},
        types={letter: ctx.stored_as(read[n].value, read[n].dtype) for letter, n in (("K", "key"), ("V", "value"))},
        body=wgsl.source("quotient"),
    )


register(NAME, supports=supports, lower=lower, inplace=dict(enumerate(WRITTEN)))
