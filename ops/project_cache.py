"""`webgpu.project_cache`: from the input of a decoder layer to its attention; `webgpu.project` and then
`webgpu.rope_cache` as one node.

Arguments:
    input: [.., K], of B * S rows in all; float32, float16 or bfloat16.
    weights, formats, biases, norm_weight, norm_eps, quantize: as of `webgpu.project`, with three weights: of query
        [H * D, K], of key [Hkv * D, K], of value [Hv * Dv, K]. Their products have the dtype of `value_cache`.
    key_cache, value_cache, cos, sin, start, rot, interleaved, start_pos, lengths, kv_limit, window: as of
        `webgpu.rope_cache`, whose `layout` is "bshd".

Results: those of `webgpu.rope_cache`: the rotated query [B, S, H, D], the new caches, and `sizes`.

Few rows (`gemv_stream.py`) on a device with subgroups that binds `BUFFERS` storage buffers, `BIASED` with biases, are
one dispatch of gemv_stream_cache.wgsl, after copies of caches that cannot be written in place. Everything else becomes
the two operators, one after the other. Where positions are out of range, or padding, the same holds as there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from math import prod

from .. import wgsl
from ..backend.graph import Arg, Dim, Graph, Node, Ref, Value, product, refs
from . import activations, project, rope_cache
from .attention_common import Problem
from .base import Const, Dispatch, Limits, Lowering, Param, register
from .copies import copy_all
from .gemv_stream import (
    SIBLINGS,
    Choice,
    Projection,
    choose,
    fits,
    fits_passes,
    fits_quantizing,
    four,
    passes_of,
    pieces,
)
from .lengths import PART, batch_fits, lengths_consts

NAME = "webgpu.project_cache"
BUFFERS, BIASED = 11, 14
"""Storage buffers of the kernel without biases and with them."""
_PROJECT = ("input", "weights", "formats", "biases", "norm_weight", "norm_eps", "quantize")
_ROPE_CACHE = (
    "key_cache", "value_cache", "cos", "sin", "start", "rot", "interleaved", "start_pos", "lengths", "kv_limit",
    "window",
)  # fmt: skip
ARGUMENTS = (*_PROJECT, *_ROPE_CACHE)
_VIEW = "aten.view_copy.default"


def shapes(graph: Graph, node: Node) -> tuple[tuple[Dim, ...], ...]:
    """Of query, key and value, as [B, S, heads, head size]."""
    rotated, keys, values = (graph.values[i].shape for i in node.outputs[:3])
    return rotated, (*rotated[:2], *keys[2:]), (*rotated[:2], *values[2:])


def expanded(graph: Graph, node: Node, first: int) -> tuple[list[Value], list[Node]]:
    """The two operators that a node stands for, with views between them, and the values between, whose indices begin
    at `first`: three products, then the three views of them."""
    source, dtype = graph.value(node.args["input"]), graph.value(node.args["value_cache"]).dtype
    weights = node.args["weights"]
    if not isinstance(weights, tuple) or len(weights) != 3:
        raise ValueError("weights are not those of query, key and value")
    products = [
        Value("temp", dtype, (*source.shape[:-1], graph.value(weight).shape[0]), f"{node.name}.{i}")
        for i, weight in enumerate(weights)
    ]
    views = [
        Value("temp", dtype, shape, f"{node.name}.{3 + i}", alias=first + i)
        for i, shape in enumerate(shapes(graph, node))
    ]
    made = tuple(first + i for i in range(6))
    multiply = {name: node.args.get(name) for name in _PROJECT}
    write: dict[str, Arg] = {name: node.args[name] for name in _ROPE_CACHE if name in node.args}
    write |= {"query": Ref(made[3]), "key": Ref(made[4]), "value": Ref(made[5]), "layout": "bshd"}
    nodes = [
        Node(project.NAME, {**multiply, "residual": None, "gated": False}, made[:3], node.name),
        *(
            Node(_VIEW, {"self": Ref(made[i]), "size": view.shape}, made[3 + i : 4 + i], node.name)
            for i, view in enumerate(views)
        ),
        Node(rope_cache.NAME, write, node.outputs, node.name),
    ]
    return [*products, *views], nodes


def supports(graph: Graph, node: Node) -> str | None:
    """What the two operators support, and projections whose columns are the heads of query and of the caches."""
    if len(node.outputs) != 4:
        return f"{NAME} has four results, not {len(node.outputs)}"
    if any(len(graph.values[i].shape) != 4 for i in node.outputs[:3]):
        return "query and caches must have four axes"
    rows, places = graph.value(node.args["input"]).shape[:-1], graph.values[node.outputs[0]].shape[:2]
    if product(rows) != product(places):
        return f"an input of {list(rows)} rows does not give queries at {list(places)}"
    try:
        values, nodes = expanded(graph, node, len(graph.values))
    except ValueError as error:
        return str(error)
    for flat, view in zip(values[:3], values[3:], strict=True):
        width, heads = flat.shape[-1], view.shape[2:]
        if not isinstance(width, int) or product(heads) != width:
            return f"a weight of {width} rows does not make heads {list(heads)}"
    whole = replace(graph, values=graph.values + tuple(values))
    return project.supports(whole, nodes[0]) or rope_cache.supports(whole, nodes[-1])


def lower(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
    """See the module's docstring."""
    p, biases = projection(ctx, node), project.parts(node).biases
    batch = ctx.shape(ctx.out(node))[0]
    given = p
    if p.span is not None and not fits_quantizing(ctx.limits, p):
        p = activations.coded(p)
    if not _takes(ctx, node, p, biases) or not batch_fits(ctx, node.args.get("lengths"), batch):
        yield from _one_by_one(ctx, node)
        return
    keys, values = ctx.out(node, 1), ctx.out(node, 2)
    for name, new in (("key_cache", keys), ("value_cache", values)):
        old = node.args[name]
        if not isinstance(old, Ref):
            raise TypeError(f"{node.name}: {name} is {old!r}")
        yield from copy_all(ctx, old, new)
    if p.coded and given.span is not None:
        p, dispatch = activations.quantize(ctx, given)
        yield dispatch
    yield fused(ctx, node, p, biases)


def projection(ctx: Lowering, node: Node) -> Projection:
    """The matrix products of the node in numbers; biases are left out."""
    found, p = project.projection(ctx, node), project.parts(node)
    dtype = ctx.dtype(p.input if p.norm_eps is None else node.args["value_cache"])  # as `expanded` has it
    return replace(found, outs=found.outs[:3], dtype=dtype)


def _takes(ctx: Lowering, node: Node, p: Projection, biases: tuple[Ref | None, ...]) -> bool:
    """Whether the kernel takes the node: few rows, enough bindings, no pair that falls into two runs, a table with rows
    (without them the host refuses every step), and nothing to read in what is written."""
    buffers = BUFFERS if all(bias is None for bias in biases) else BIASED
    _, _, _, size = ctx.shape(ctx.out(node))
    streams = fits(ctx.limits, p) or fits_passes(ctx.limits, p)
    if not streams or ctx.limits.max_storage_buffers < buffers:
        return False
    if (node.args["interleaved"] is True and size % 2) or prod(ctx.shape(node.args["cos"])[:-1]) == 0:
        return False
    written = {ctx.graph.root(i) for i in node.outputs[1:3]}
    read = [i for name, arg in node.args.items() if name not in ("key_cache", "value_cache") for i in refs(arg)]
    return not written & {ctx.graph.root(i) for i in read}


def divided(limits: Limits, p: Projection, interleaved: bool) -> Choice:
    """How work is cut; two runs of weight rows at least in a workgroup where pairs are apart."""
    choice = choose(limits, p)
    if not interleaved and choice.lanes == choice.workgroup:
        return replace(choice, lanes=choice.workgroup // 2)
    return choice


def runs(n: int, size: int, rot: int, per: int, plain: bool) -> int:
    """Runs of `per` weight rows of a matrix of n rows; see gemv_stream_cache.wgsl."""
    if plain:
        return -(-n // per)
    return n // size * (2 * -(-(rot // 2) // per) + -(-(size - rot) // per))


def fused(ctx: Lowering, node: Node, p: Projection, biases: tuple[Ref | None, ...]) -> Dispatch:
    """The one dispatch."""
    args = node.args
    rotated, keys, values, sizes = (ctx.out(node, i) for i in range(4))
    batch, rows, heads, size = ctx.shape(rotated)
    capacity, kv_heads = ctx.shape(keys)[1:3]
    v_heads, v_size = ctx.shape(values)[2:]
    rot = args.get("rot") or size
    if not isinstance(rot, int):
        raise TypeError(f"expected a number of elements, got {rot!r}")
    table = ctx.shape(args["cos"])
    table_rows = prod(table[:-1])
    rope_cache.require_room(ctx, node, rows, capacity, table_rows)
    interleaved = args["interleaved"] is True
    passes = passes_of(p)
    one = replace(p, m=-(-p.m // passes))
    choice = divided(ctx.limits, one, interleaved)
    made = pieces(ctx, one, choice)
    per = choice.columns * choice.sets
    together = choice.workgroup // choice.lanes
    groups = [-(-runs(n, size, rot, per, interleaved or i == 2) // together) for i, n in enumerate(p.sizes)]
    ends = [sum(groups[: i + 1]) for i in range(3)]
    problem = Problem(batch, heads, kv_heads, rows, capacity, size, v_size)
    grids = rope_cache.live_grids(ctx, args, keys, values, problem, v_heads)
    bindings = {
        **made.bindings,
        "cosines": ctx.id(args["cos"]), "sines": ctx.id(args["sin"]),
        "query_out": rotated.value, "key_cache": keys.value, "value_cache": values.value, "sizes": sizes.value,
    }  # fmt: skip
    params: dict[str, Param] = {
        **made.params, "m": p.m, "n": four(p.sizes), "ends": four(ends),
        **rope_cache.positions(ctx, args, rows, capacity, table_rows),
        "batch": batch, "limit": 0, "window": 0, "split_grid": four(()), "merge_grid": four(()),
    }  # fmt: skip
    consts: dict[str, Const] = {
        **made.consts, "PASSES": passes, "D": size, "ROT": rot, "WIDTH": table[-1], "INTERLEAVED": interleaved,
        "SIZED": grids is not None, "START": 0, "SPLITS": 1, "SPLIT_TILE": 1,
        **lengths_consts(args.get("lengths") is not None, batch),
    }  # fmt: skip
    types = {
        **made.types,
        **{name: ctx.wgsl_type(args[arg]) for name, arg in (("Cos", "cos"), ("Sin", "sin"))},
        "QOut": ctx.wgsl_type(rotated), "KCache": ctx.wgsl_type(keys), "VCache": ctx.wgsl_type(values),
    }  # fmt: skip
    if args.get("lengths") is not None:
        bindings["lengths"] = ctx.id(args["lengths"])
    if grids is not None:
        params |= grids.params
        consts |= grids.consts
    biased = any(bias is not None for bias in biases)
    if biased:
        consts |= {f"BIAS{i}": bias is not None for i, bias in enumerate(biases)}
        types |= {f"Bias{i}": "f32" if bias is None else ctx.wgsl_type(bias) for i, bias in enumerate(biases)}
        bindings |= {f"bias{i}": bias.value for i, bias in enumerate(biases) if bias is not None}
    return Dispatch(
        "gemv_stream_cache",
        bindings,
        params,
        ctx.fold_grid(ends[-1] * passes + (grids is not None)),
        consts=consts,
        types=types,
        body=made.body + _body(biased, rope_cache.grid_parts(args)),
    )


@cache
def _body(biased: bool, grids: tuple[str, ...]) -> str:
    biases = "gemv_stream_cache_biases" if biased else "gemv_stream_cache_plain"
    return "".join(wgsl.source(part) for part in (SIBLINGS, biases, PART, rope_cache.POSITIONS, *grids))


def _one_by_one(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
    """The two operators, with scratch values between them, which need no views: the second one sees the products in
    their other shapes."""
    whole, first = ctx.graph, len(ctx.graph.values)
    values, nodes = expanded(whole, node, first)
    for number, value in enumerate(values[:3]):
        if ctx.scratch("f32", prod(ctx.int(dim) for dim in value.shape)) != first + number:
            raise RuntimeError(f"{node.name}: scratch values were taken before")
    heads = {name: Ref(first + i) for i, name in enumerate(("query", "key", "value"))}
    seen = tuple(replace(view, alias=None) for view in values[3:])
    steps = (
        (tuple(values[:3]), nodes[0], project.lower),
        (seen, replace(nodes[-1], args={**nodes[-1].args, **heads}), rope_cache.lower),
    )
    try:
        for between, inner, lower_inner in steps:
            ctx.graph = replace(whole, values=whole.values + between)  # what the operator looks shapes up in
            yield from lower_inner(ctx, inner)
    finally:
        ctx.graph = whole


register(NAME, supports=supports, lower=lower, inplace={1: "key_cache", 2: "value_cache"})
