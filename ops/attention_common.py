"""What the routes of attention share: sizes, host checks, and the numbers, types and bindings of their kernels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from .. import wgsl
from ..backend.graph import Arg, Ref, Sym
from .base import Dispatch, Grid, Live, Lowering, Param
from .lengths import lengths_consts, lengths_parts
from .packed_cache import bits_of, elements, scales_part

TILE = 32
"""Keys that a workgroup looks at together."""
LIMITS_OF_KEYS = ("causal", "prefix", "all")


@dataclass(frozen=True)
class Problem:
    """Sizes of one attention as numbers: `rows` query rows, `capacity` key rows, head sizes `d` and `dv` (value)."""

    batch: int
    heads: int
    kv_heads: int
    rows: int
    capacity: int
    d: int
    dv: int

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def results(self) -> int:
        """Rows of the result over all heads and batch rows."""
        return self.batch * self.heads * self.rows


def vec4s(columns: int) -> int:
    return -(-columns // 4)


def power_of_two_up_to(n: int) -> int:
    """The largest power of two that is at most n (n >= 1)."""
    return 1 << (n.bit_length() - 1)


def padded(shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """A shape of up to four sizes with ones put before it."""
    a, b, c, d = (1,) * (4 - len(shape)) + shape
    return a, b, c, d


def as_bhsd(shape: tuple[int, ...], layout: str) -> tuple[int, int, int, int]:
    """(batch, heads, rows, head size) of a tensor in `layout`."""
    first, second, third, last = padded(shape)
    return (first, third, second, last) if layout == "bshd" else (first, second, third, last)


def strides(shape: tuple[int, ...], layout: str) -> tuple[int, int, int]:
    """Element strides over (batch, rows, heads) of a contiguous tensor in `layout`; 0 for a batch or head axis of 1."""
    batch, heads, rows, d = as_bhsd(shape, layout)
    row, head = (heads * d, d) if layout == "bshd" else (d, rows * d)
    return (heads * rows * d if batch > 1 else 0), row, (head if heads > 1 else 0)


def tensor_shape(ctx: Lowering, args: Mapping[str, Arg], name: str) -> tuple[int, ...]:
    """The sizes of query, key or value in elements, however many of these share a word."""
    return elements(ctx.shape(args[name]), 0 if name == "query" else bits_of(args))


def _dim(arg: Arg) -> int | Sym:
    if isinstance(arg, bool) or not isinstance(arg, int | Sym):
        raise TypeError(f"expected an integer or a symbol, got {arg!r}")
    return arg


def number(arg: Arg) -> float:
    if isinstance(arg, bool) or not isinstance(arg, int | float):
        raise TypeError(f"expected a number, got {arg!r}")
    return float(arg)


def limit_of(args: Mapping[str, Arg]) -> int:
    """The number of `kv_limit` in the shaders. All keys of a batch row are those up to its own last one."""
    limit = str(args["kv_limit"])
    return LIMITS_OF_KEYS.index("prefix" if limit == "all" and args.get("lengths") is not None else limit)


def require_sizes(
    ctx: Lowering, args: Mapping[str, Arg], problem: Problem, k: tuple[int, ...], v: tuple[int, ...]
) -> None:
    """Host checks: what only the sizes and positions of a call can show."""
    start = _dim(args["start_pos"])
    name = ctx.node.name if ctx.node is not None else "attention"
    if args.get("lengths") is not None:
        pass  # checked where they are made
    elif args["kv_limit"] != "all" and args.get("check_range", True):
        high = problem.capacity - problem.rows
        what = f"{name}: start_pos, with {problem.rows} new tokens and a KV cache of {problem.capacity} rows"
        ctx.require(start, 0, high, what)
    elif isinstance(start, Sym):
        ctx.require(start, 0, 2**31 - 1 - problem.rows, f"{name}: start_pos")

    def same(size: int, expected: int, what: str, high: int | None = None) -> None:
        """Sizes are numbers here, so only a check that fails need be kept."""
        if not expected <= size <= (expected if high is None else high):
            ctx.require(size, expected, expected if high is None else high, f"{name}: {what}")

    for what, (batch, heads, rows, _) in (("key", k), ("value", v)):
        if batch != 1:
            same(batch, problem.batch, f"batch size of {what}")
        same(heads, problem.kv_heads, f"heads of {what}")
        same(rows, problem.capacity, f"rows of {what}")
    if args.get("attn_mask") is not None:
        wanted = (problem.batch, problem.heads, problem.rows)
        sizes = padded(ctx.shape(args["attn_mask"]))
        for size, expected, axis in zip(sizes, wanted, ("batch", "head", "query row"), strict=False):
            if size != 1:
                same(size, expected, f"size of the attention mask along the {axis} axis")
        if sizes[3] != 1:  # one longer than the cache is allowed: the columns past it are not read
            same(sizes[3], problem.capacity, "columns of the attention mask", 2**31 - 1)


def shared_params(ctx: Lowering, args: Mapping[str, Arg], problem: Problem, out: Ref) -> dict[str, Param]:
    """The numbers that the kernels share; each takes those that its `struct Params` names."""
    start = _dim(args["start_pos"]) if args.get("lengths") is None else 0
    moves = args["kv_limit"] != "all" or args["window"] != 0
    scale = args["scale"]
    params: dict[str, Param] = {
        "start_pos": ctx.live(start if moves else 0),
        "batch": problem.batch,
        "heads": problem.heads,
        "group": problem.group,
        "rows": problem.rows,
        "capacity": problem.capacity,
        "limit": limit_of(args),
        "sinks": int(args.get("sink") is not None),
        "window": int(number(args["window"])),
        "scale": 1.0 / math.sqrt(problem.d) if scale is None else number(scale),
        "softcap": number(args["softcap"]),
        "minus_inf": -math.inf,
    }
    layouts = {"q": ("query", args["q_layout"]), "k": ("key", args["kv_layout"]), "v": ("value", args["kv_layout"])}
    shapes = {letter: (tensor_shape(ctx, args, name), str(layout)) for letter, (name, layout) in layouts.items()}
    shapes["o"] = (ctx.shape(out), str(args["out_layout"]))
    for letter, (shape, layout) in shapes.items():
        for axis, stride in zip("bsh", strides(shape, layout), strict=True):
            params[f"{letter}_{axis}"] = stride
    sizes = padded(ctx.shape(args["attn_mask"])) if args.get("attn_mask") is not None else (1, 1, 1, 1)
    steps = (sizes[1] * sizes[2] * sizes[3], sizes[2] * sizes[3], sizes[3], 1)
    for axis, size, step in zip("bhsk", sizes, steps, strict=True):
        params[f"mask_{axis}"] = step if size > 1 else 0
    return params


def consts_of(ctx: Lowering, args: Mapping[str, Arg], problem: Problem) -> dict[str, int | float | bool]:
    mask, bits = args.get("attn_mask"), bits_of(args)
    return {
        **({"BITS": bits} if bits else {}),
        "D": problem.d,
        "DV": problem.dv,
        "K_WIDTH": 1 if problem.d % 4 else 4,
        "V_WIDTH": 1 if problem.dv % 4 else 4,
        "MASK": 0 if mask is None else 2 if ctx.dtype(mask) == "bool" else 1,
    }


def types_of(ctx: Lowering, args: Mapping[str, Arg], problem: Problem, out: Ref) -> dict[str, str]:
    types = {"Q": ctx.wgsl_type(args["query"]), "Out": ctx.wgsl_type(out), "Mask": "f32", "Sink": "f32"}
    for letter, name, columns in (("K", "key", problem.d), ("V", "value", problem.dv)):
        kind = ctx.wgsl_type(args[name])
        types[letter] = kind if columns % 4 or bits_of(args) else f"vec4<{kind}>"
        types[f"{letter}Wide"] = "f32" if columns % 4 else "vec4<f32>"
    if args.get("attn_mask") is not None:
        types["Mask"] = ctx.wgsl_type(args["attn_mask"])
    if args.get("sink") is not None:
        types["Sink"] = ctx.wgsl_type(args["sink"])
    return types


def bindings_of(ctx: Lowering, args: Mapping[str, Arg], *names: str) -> dict[str, int]:
    """Shader variable -> value for the tensors that are there, lengths and the caches' scales among them."""
    known = {"mask": "attn_mask"}
    scales = ("key_scales", "value_scales") if "key" in names and bits_of(args) else ()
    tensors = {name: args.get(known.get(name, name)) for name in (*names, *scales, "lengths")}
    return {name: ctx.id(arg) for name, arg in tensors.items() if arg is not None}


def loads_of(args: Mapping[str, Arg]) -> tuple[str, ...]:
    """The parts by which kernels that take any head size load queries, keys and values."""
    return (scales_part(args), "loads_packed") if bits_of(args) else ("loads",)


def dispatch_of(
    ctx: Lowering,
    kernel: str,
    bindings: dict[str, int],
    every: Mapping[str, Param],
    own: Mapping[str, Param],
    groups: int | Grid,
    consts: Mapping[str, int | float | bool],
    types: dict[str, str],
    parts: tuple[str, ...],
) -> Dispatch:
    params = {field.name: {**every, **own}[field.name] for field in wgsl.reflect(kernel).params}
    start = every["start_pos"]
    if not isinstance(start, Live):
        raise TypeError(f"start_pos is {start!r}, no live scalar")
    ragged = "lengths" in bindings
    files = (*lengths_parts(ragged), *(f"attention_{part}" for part in parts))
    body = "".join(wgsl.source(part) for part in files)
    grid = ctx.fold_grid(groups) if isinstance(groups, int) else groups
    known = {**consts, **lengths_consts(ragged, int(str(every["batch"]))), "START": start}
    return Dispatch(kernel, bindings, params, grid, consts=known, types=types, body=body)
