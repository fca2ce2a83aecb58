"""`webgpu.lengths`: how many tokens each batch row has in the cache, and how many new ones; made once a step.

Arguments:
    past: i32 or i64 with B elements, [B], [B, 1] or [1, B]: tokens of each batch row in the cache.
    q_len: as past: new tokens of each row, which stand at the front of its S positions; None: all rows have S.
    rows: S, the positions of this step.
    capacity: rows of the cache.

Result: i32[B, 4], a row (past, new, 0, 0) for each batch row, with past in 0..capacity and new in
0..min(S, capacity - past) whatever the arguments hold. Where these are inputs, the host checks their elements and the
sums before each step (InputError); elsewhere numbers out of range are clamped.

The operators that take it as `lengths` (`webgpu.attention`, `webgpu.rope_cache`, `webgpu.rope`, `webgpu.update_cache`)
bind it as a uniform buffer: MAX_BATCH rows at most, the 64 KiB that every device binds.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..backend.graph import Arg, Dim, Graph, Node, Ref, Sym, Value
from .base import Const, Dispatch, Lowering, register

NAME = "webgpu.lengths"
WORDS = 4
"""Numbers of the result for each batch row."""
MAX_BATCH = 65536 // (4 * WORDS)
"""Batch rows whose lengths fit a uniform binding of the size that WebGPU guarantees."""
EACH = "batch row"
PART = "ragged_rows"
"""The part of a shader that reads `lengths`."""
_ATTENTION = {False: ("attention_whole",), True: (PART, "attention_ragged")}
_SAME = ("aten._to_copy.", "dim_order_ops._to_dim_order_copy.", "aten.view", "aten.reshape", "aten.unsqueeze",
         "aten.squeeze", "aten.clone.", "aten.alias", "aten.detach", "dim_order_ops._clone_dim_order.")  # fmt: skip
"""Beginnings of operators that keep every element and its order."""


def _capacity(node: Node) -> int:
    found = node.args["capacity"]
    if isinstance(found, bool) or not isinstance(found, int):
        raise TypeError(f"{node.name}: capacity is {found!r}")
    return found


def _rows(node: Node) -> Dim:
    found = node.args["rows"]
    if isinstance(found, bool) or not isinstance(found, int | Sym):
        raise TypeError(f"{node.name}: rows is {found!r}")
    return found


def counts_reason(value: Value, batch: Dim, what: str) -> str | None:
    """Why a tensor is no list of one integer for each batch row, or None if it is."""
    if value.dtype not in ("i32", "i64"):
        return f"{what} is {value.dtype}; it must be int32 or int64"
    if value.shape not in ((batch,), (batch, 1), (1, batch)):
        shape = list(value.shape)
        return f"{what} is {shape}; it must have an element for each of {batch} batch rows: [B], [B, 1] or [1, B]"
    return None


def supports(graph: Graph, node: Node) -> str | None:
    """One integer for each batch row, a capacity known at export, and the result described above."""
    out, capacity, rows = graph.values[node.outputs[0]], node.args["capacity"], node.args["rows"]
    if out.dtype != "i32" or len(out.shape) != 2 or out.shape[1] != WORDS:
        return f"lengths is {out.dtype}{list(out.shape)}; it must be i32[B, {WORDS}]"
    if isinstance(capacity, bool) or not isinstance(capacity, int) or not 0 <= capacity < 2**31:
        return f"capacity is {capacity!r}; it must be an integer that is not negative"
    if isinstance(rows, bool) or not isinstance(rows, int | Sym) or (isinstance(rows, int) and rows < 0):
        return f"rows is {rows!r}; it must be a size"
    for name in ("past", "q_len"):
        if node.args.get(name) is not None:
            reason = counts_reason(graph.value(node.args[name]), out.shape[0], name)
            if reason is not None:
                return reason
    return None if node.args["past"] is not None else "past is missing"


def lower(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
    """See the module's docstring."""
    out, capacity, rows = ctx.out(node), _capacity(node), ctx.int(_rows(node))
    past, q_len = origin(ctx.graph, node.args["past"]), node.args.get("q_len")
    ctx.require_elements(past, 0, capacity, f"tokens of a batch row in a cache of {capacity} rows", EACH)
    if q_len is not None:
        ctx.require_elements(origin(ctx.graph, q_len), 0, rows, f"new tokens of a batch row, of {rows} positions", EACH)
    require_totals(ctx, out, capacity, f"the rows of the cache ({capacity})")
    batch = ctx.shape(out)[0]
    bindings = {"past": ctx.id(node.args["past"]), "out": out.value}
    if q_len is not None:
        bindings["q_len"] = ctx.id(q_len)
    yield Dispatch(
        "lengths",
        bindings,
        {"count": batch, "rows": rows, "capacity": capacity},
        (-(-batch // 64), 1, 1),
        consts={"GIVEN": q_len is not None},
    )


def origin(graph: Graph, arg: Arg) -> Arg:
    """The integer tensor whose elements `arg` has in the same order: seen through casts and reshapes."""
    while isinstance(arg, Ref):
        made = next((node for node in graph.nodes if arg.value in node.outputs), None)
        if made is None or not made.op.startswith(_SAME):
            break
        before = made.args.get("self", made.args.get("input"))
        if not isinstance(before, Ref) or graph.values[before.value].dtype not in ("i32", "i64"):
            break
        arg = before
    return arg


def require_totals(ctx: Lowering, lengths: Arg, limit: int, what: str) -> None:
    """Host checks that past + new of each batch row is at most `limit`, where `lengths` is made from inputs."""
    made = next((n for n in ctx.graph.nodes if isinstance(lengths, Ref) and lengths.value in n.outputs), None)
    if made is None or made.op != NAME:
        return
    past, q_len = origin(ctx.graph, made.args["past"]), made.args.get("q_len")
    text = f"past and new tokens of a batch row, against {what}"
    if q_len is None:
        rows = ctx.int(_rows(made))
        ctx.require_elements(past, 0, limit - rows, f"{text}, with {rows} new tokens", EACH)
    else:
        ctx.require_sums(past, origin(ctx.graph, q_len), 0, limit, text, EACH)


# -- what the operators that take `lengths` share


def lengths_reason(graph: Graph, arg: Arg, batch: Dim) -> str | None:
    """Why an argument `lengths` does not fit `batch` batch rows; None if it is absent or fits."""
    if arg is None:
        return None
    value = graph.value(arg)
    if value.dtype != "i32" or len(value.shape) != 2 or value.shape[1] != WORDS:
        return f"lengths is {value.dtype}{list(value.shape)}; it must be i32[B, {WORDS}]"
    kind = graph.values[graph.root(arg.value)].kind if isinstance(arg, Ref) else ""
    if kind not in ("temp", "input"):
        return f"lengths is {kind}; it must be computed, or an input, to be bound as a uniform buffer"
    if isinstance(batch, int) and isinstance(value.shape[0], int) and value.shape[0] != batch:
        return f"lengths has {value.shape[0]} rows for a batch of {batch}"
    if isinstance(batch, int) and batch > MAX_BATCH:
        return f"a batch of {batch} rows with lengths; at most {MAX_BATCH} are supported"
    return None


def batch_fits(ctx: Lowering, lengths: Arg, batch: int) -> bool:
    """Host checks of what only a call shows of the batch. False: no step passes them, so nothing need be lowered."""
    if lengths is None:
        return True
    name = ctx.node.name if ctx.node is not None else NAME
    rows = ctx.shape(lengths)[0]
    if rows != batch:
        ctx.require(rows, batch, batch, f"{name}: rows of lengths, for a batch of {batch}")
    if batch > MAX_BATCH:
        ctx.require(batch, 0, MAX_BATCH, f"{name}: batch rows with lengths")
    return rows == batch and batch <= MAX_BATCH


def lengths_parts(ragged: bool) -> tuple[str, ...]:
    """The parts of a shader that say how many keys and query rows attention's batch rows have."""
    return _ATTENTION[ragged]


def lengths_consts(ragged: bool, batch: int) -> dict[str, Const]:
    """The constants of a shader that declares `lengths`; `ragged`: they are given."""
    return {"RAGGED": ragged, "LENGTHS": max(batch, 1) if ragged else 1}


register(NAME, supports=supports, lower=lower)
