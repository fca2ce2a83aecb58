"""The kernels of attention: which one runs, and its numbers. `attention.py` has the operators.

Routes:
    decode: few query rows. The keys are split among workgroups, each serving all query heads of a KV head, then merged.
    prefill: many query rows. One workgroup a tile of rows of one head walks over the keys it needs.
    naive: the oracle of the tests, on request only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from .. import wgsl
from ..backend.graph import Arg, Ref, Sym
from .base import Dispatch, Limits, Lowering, Param

DECODE_ROWS = 8
"""Query rows (sequence positions) up to which the decode route is taken."""
MAX_SPLITS = 64
"""Splits of the keys at most: the lanes of the merge, each of which takes one."""
TILE = 32
"""Keys that a workgroup looks at together."""
TARGET_WORKGROUPS = 2048
"""Workgroups of the decode kernel beyond which keys are not split further."""
MAX_SCRATCH = 32 << 20
"""Bytes of partial results beyond which the keys are split less, or the prefill route is taken."""
ROUTES = ("auto", "decode", "prefill", "naive")
LIMITS_OF_KEYS = ("causal", "prefix", "all")

PREFILL_COLUMNS = 128
"""Value columns of one prefill workgroup; wider heads take several."""
DECODE_COLUMNS = 64
"""vec4 value columns of one decode workgroup; wider heads take several."""


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


@dataclass(frozen=True)
class DecodeChoice:
    """How the decode route divides its work: rows a workgroup, tiles of rows, passes over value columns, key splits."""

    rows: int
    row_tiles: int
    passes: int
    splits: int
    scratch_bytes: int


def vec4s(columns: int) -> int:
    return -(-columns // 4)


def power_of_two_up_to(n: int) -> int:
    """The largest power of two that is at most n (n >= 1)."""
    return 1 << (n.bit_length() - 1)


def prefill_memory(rows: int) -> int:
    """Bytes of workgroup memory of attention_prefill.wgsl at `rows` query rows a workgroup."""
    return 16 * 9 * (rows + TILE) + 16 * (TILE + 8) * (rows // 4)


def decode_memory(rows: int, d: int) -> int:
    """Bytes of workgroup memory of attention_decode.wgsl at `rows` rows a workgroup."""
    return rows * (16 * vec4s(d) + 1024 + 256 + 4)


def choose_prefill_rows(rows: int, limits: Limits) -> int:
    """Query rows of a prefill workgroup: 64 where there are as many and the device has the memory for it, else 32."""
    roomy = prefill_memory(64) <= limits.max_workgroup_memory and limits.max_invocations >= 128
    return 64 if roomy and rows > 32 else 32


def choose_decode(problem: Problem, limits: Limits) -> DecodeChoice | None:
    """The division of the decode route, or None where its queries or partial results would not fit."""
    count = problem.group * problem.rows
    rows = min(8, 1 << (count - 1).bit_length())
    while rows and decode_memory(rows, problem.d) > limits.max_workgroup_memory:
        rows //= 2
    if not rows:
        return None
    row_tiles = -(-count // rows)
    passes = -(-vec4s(problem.dv) // DECODE_COLUMNS)
    per_split = problem.results * (4 * vec4s(problem.dv) + 2) * 4
    groups = problem.batch * problem.kv_heads * row_tiles * passes
    room = min(MAX_SCRATCH, limits.max_binding) // per_split
    if not room:
        return None
    splits = max(1, min(MAX_SPLITS, -(-problem.capacity // TILE), TARGET_WORKGROUPS // groups, room))
    return DecodeChoice(rows, row_tiles, passes, splits, splits * per_split)


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


def attend(ctx: Lowering, args: Mapping[str, Arg], out: Ref) -> Iterator[Dispatch]:
    """Dispatches of one attention. `args` are those of `webgpu.attention`; see `attention.py`."""
    q_shape = as_bhsd(ctx.shape(args["query"]), str(args["q_layout"]))
    k_shape = as_bhsd(ctx.shape(args["key"]), str(args["kv_layout"]))
    v_shape = as_bhsd(ctx.shape(args["value"]), str(args["kv_layout"]))
    problem = Problem(q_shape[0], q_shape[1], k_shape[1], q_shape[2], k_shape[2], q_shape[3], v_shape[3])
    _require(ctx, args, problem, k_shape, v_shape)
    if problem.results * problem.dv == 0:
        return
    common = _params(ctx, args, problem, out)
    route = str(args.get("route", "auto"))
    choice = None
    if route == "decode" or (route == "auto" and problem.rows <= DECODE_ROWS):
        choice = choose_decode(problem, ctx.limits)
    if route == "naive":
        yield _naive(ctx, args, problem, out, common)
    elif choice is not None:
        yield from _decode(ctx, args, problem, out, common, choice)
    else:
        yield _prefill(ctx, args, problem, out, common)


def _dim(arg: Arg) -> int | Sym:
    if isinstance(arg, bool) or not isinstance(arg, int | Sym):
        raise TypeError(f"expected an integer or a symbol, got {arg!r}")
    return arg


def _number(arg: Arg) -> float:
    if isinstance(arg, bool) or not isinstance(arg, int | float):
        raise TypeError(f"expected a number, got {arg!r}")
    return float(arg)


def _require(ctx: Lowering, args: Mapping[str, Arg], problem: Problem, k: tuple[int, ...], v: tuple[int, ...]) -> None:
    """Host checks: what only the sizes and positions of a call can show."""
    start = _dim(args["start_pos"])
    name = ctx.node.name if ctx.node is not None else "attention"
    if args["kv_limit"] != "all" and args.get("check_range", True):
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


def _params(ctx: Lowering, args: Mapping[str, Arg], problem: Problem, out: Ref) -> dict[str, Param]:
    """The numbers that the kernels share; each takes those that its `struct Params` names."""
    start = _dim(args["start_pos"])
    moves = args["kv_limit"] != "all" or args["window"] != 0
    scale = args["scale"]
    params: dict[str, Param] = {
        "start_pos": ctx.live(start if moves else 0),
        "batch": problem.batch,
        "heads": problem.heads,
        "group": problem.group,
        "rows": problem.rows,
        "capacity": problem.capacity,
        "limit": LIMITS_OF_KEYS.index(str(args["kv_limit"])),
        "sinks": int(args.get("sink") is not None),
        "window": int(_number(args["window"])),
        "scale": 1.0 / math.sqrt(problem.d) if scale is None else _number(scale),
        "softcap": _number(args["softcap"]),
        "minus_inf": -math.inf,
    }
    layouts = {"q": ("query", args["q_layout"]), "k": ("key", args["kv_layout"]), "v": ("value", args["kv_layout"])}
    shapes = {letter: (ctx.shape(args[name]), str(layout)) for letter, (name, layout) in layouts.items()}
    shapes["o"] = (ctx.shape(out), str(args["out_layout"]))
    for letter, (shape, layout) in shapes.items():
        for axis, stride in zip("bsh", strides(shape, layout), strict=True):
            params[f"{letter}_{axis}"] = stride
    sizes = padded(ctx.shape(args["attn_mask"])) if args.get("attn_mask") is not None else (1, 1, 1, 1)
    steps = (sizes[1] * sizes[2] * sizes[3], sizes[2] * sizes[3], sizes[3], 1)
    for axis, size, step in zip("bhsk", sizes, steps, strict=True):
        params[f"mask_{axis}"] = step if size > 1 else 0
    return params


def _consts(ctx: Lowering, args: Mapping[str, Arg], problem: Problem) -> dict[str, int | float | bool]:
    mask = args.get("attn_mask")
    return {
        "D": problem.d,
        "DV": problem.dv,
        "K_WIDTH": 1 if problem.d % 4 else 4,
        "V_WIDTH": 1 if problem.dv % 4 else 4,
        "MASK": 0 if mask is None else 2 if ctx.dtype(mask) == "bool" else 1,
    }


def _types(ctx: Lowering, args: Mapping[str, Arg], problem: Problem, out: Ref) -> dict[str, str]:
    types = {"Q": ctx.wgsl_type(args["query"]), "Out": ctx.wgsl_type(out), "Mask": "f32", "Sink": "f32"}
    for letter, name, columns in (("K", "key", problem.d), ("V", "value", problem.dv)):
        kind = ctx.wgsl_type(args[name])
        types[letter] = kind if columns % 4 else f"vec4<{kind}>"
        types[f"{letter}Wide"] = "f32" if columns % 4 else "vec4<f32>"
    if args.get("attn_mask") is not None:
        types["Mask"] = ctx.wgsl_type(args["attn_mask"])
    if args.get("sink") is not None:
        types["Sink"] = ctx.wgsl_type(args["sink"])
    return types


def _bindings(ctx: Lowering, args: Mapping[str, Arg], *names: str) -> dict[str, int]:
    """Shader variable -> value for the tensors that are there."""
    known = {"mask": "attn_mask"}
    tensors = {name: args.get(known.get(name, name)) for name in names}
    return {name: ctx.id(arg) for name, arg in tensors.items() if arg is not None}


def _dispatch(
    ctx: Lowering,
    kernel: str,
    bindings: dict[str, int],
    every: Mapping[str, Param],
    own: Mapping[str, Param],
    groups: int,
    consts: dict[str, int | float | bool],
    types: dict[str, str],
    parts: tuple[str, ...],
) -> Dispatch:
    params = {field.name: {**every, **own}[field.name] for field in wgsl.reflect(kernel).params}
    body = "".join(wgsl.source(f"attention_{part}") for part in parts)
    return Dispatch(kernel, bindings, params, ctx.fold_grid(groups), consts=consts, types=types, body=body)


def _naive(ctx: Lowering, args: Mapping[str, Arg], problem: Problem, out: Ref, every: Mapping[str, Param]) -> Dispatch:
    total = problem.results * problem.dv
    bindings = {**_bindings(ctx, args, "query", "key", "value", "mask", "sink"), "out": out.value}
    consts, types = _consts(ctx, args, problem), _types(ctx, args, problem, out)
    own = {"total": total}
    return _dispatch(ctx, "attention_naive", bindings, every, own, -(-total // 64), consts, types, ("rules", "scores"))


def _prefill(
    ctx: Lowering, args: Mapping[str, Arg], problem: Problem, out: Ref, every: Mapping[str, Param]
) -> Dispatch:
    rows = choose_prefill_rows(problem.rows, ctx.limits)
    tiles, passes = -(-problem.rows // rows), -(-problem.dv // PREFILL_COLUMNS)
    total = problem.batch * problem.heads * tiles * passes
    bindings = {**_bindings(ctx, args, "query", "key", "value", "mask", "sink"), "out": out.value}
    consts = {**_consts(ctx, args, problem), "QROWS": rows, "PASSES": passes}
    types = _types(ctx, args, problem, out)
    own = {"total": total, "tiles": tiles}
    return _dispatch(ctx, "attention_prefill", bindings, every, own, total, consts, types, ("rules", "scores"))


def _decode(
    ctx: Lowering, args: Mapping[str, Arg], problem: Problem, out: Ref, every: Mapping[str, Param], choice: DecodeChoice
) -> Iterator[Dispatch]:
    columns = vec4s(problem.dv)
    partial = ctx.scratch("f32", problem.results * choice.splits * columns * 4)
    ml = ctx.scratch("f32", problem.results * choice.splits * 2)
    width = min(columns, DECODE_COLUMNS)
    common, types = _consts(ctx, args, problem), _types(ctx, args, problem, out)
    total = problem.batch * problem.kv_heads * choice.row_tiles * choice.passes * choice.splits
    own: dict[str, Param] = {"total": total, "splits": choice.splits, "row_tiles": choice.row_tiles}
    consts = {**common, "ROWS": choice.rows, "PASSES": choice.passes, "COLUMNS": width}
    consts["SUBS"] = power_of_two_up_to(min(8, 64 // width))
    bindings = {**_bindings(ctx, args, "query", "key", "value", "mask"), "partial": partial, "ml": ml}
    kinds = {k: v for k, v in types.items() if k not in ("Out", "Sink")}
    parts = ("rules", "splits", "scores")
    yield _dispatch(ctx, "attention_decode", bindings, every, own, total, consts, kinds, parts)

    own = {"total": problem.results, "splits": choice.splits}
    consts = {"DV": problem.dv, "COLUMNS": width, "SUBS": power_of_two_up_to(64 // width)}
    bindings = {**_bindings(ctx, args, "sink"), "partial": partial, "ml": ml, "out": out.value}
    kinds = {k: types[k] for k in ("Out", "Sink")}
    yield _dispatch(ctx, "attention_merge", bindings, every, own, problem.results, consts, kinds, ("rules", "splits"))
