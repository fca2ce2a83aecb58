"""Products of many rows through register tiles: see wgsl/gemm.wgsl and wgsl/gemm_merge.wgsl.

`gemm(ctx, p)` takes a `Projection`, as `webgpu.project` and linear layers have it; `multiply(ctx, problem)` any
`Problem`: batches, both layouts of the weights, general biases and factors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from math import prod

from .. import wgsl
from .base import Dispatch, Limits, Lowering, Param
from .gemv_stream import Projection, Tensor
from .packed import Format

Four = tuple[int, int, int, int]
NONE: Four = (0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Problem:
    """out[b, m, n] = alpha * sum_k x[b, m, k] * w[b, n, k] + beta * bias[b, m, n] + residual[b, m, n], in numbers.

    Attributes:
        x: [.., M, K]. weights: one, [.., N, K] with `nk`, else [.., K, N]; two where `gated`, [N, K] each:
            silu(x w0^T) * (x w1^T) + residual. f32 or f16 elements, or bf16 in words (`packed.py`), [N, K], no batch.
            out: [.., M, N], contiguous.
        m, n, k: sizes of one product, all at least 1.
        sizes: batch sizes, padded with 1 in front.
        x_strides, w_strides, bias_strides: elements per step of each batch index, 0 where broadcast.
        bias, bias_row, bias_col: elements per row and column, 0 where broadcast. Not where `gated`.
        residual: contiguous as the result, or None.
        format: of weights that are packed (`packed.py`), in groups of a multiple of four columns; [N, K], no batch.
    """

    x: Tensor
    weights: tuple[Tensor, ...]
    out: Tensor
    m: int
    n: int
    k: int
    nk: bool = True
    gated: bool = False
    sizes: Four = (1, 1, 1, 1)
    x_strides: Four = NONE
    w_strides: Four = NONE
    bias: Tensor | None = None
    bias_strides: Four = NONE
    bias_row: int = 0
    bias_col: int = 1
    residual: Tensor | None = None
    alpha: float = 1.0
    beta: float = 1.0
    format: Format | None = None

    @property
    def batch(self) -> int:
        return prod(self.sizes)


@dataclass(frozen=True, slots=True)
class Choice:
    """How work is cut.

    Attributes:
        ty, tx: lanes of a workgroup along rows and columns, multiples of 8 and at least `quads` / 2 * col_sets and
            `quads` / 2 * row_sets.
        row_sets, col_sets: sets of four rows (1, 2 or 4) and of four columns (1 or 2) of a lane; where gated at
            most 2 of rows, and 2 of columns.
        splits: ranges of K at most; 1: no partial results.
        unrolled: no loop over four quads of a step.
        quads: of k in a step, 4 or 8. With 8 a workgroup asks for more of each row at once and meets half as often,
            which is better where little else runs meanwhile: few rows, few workgroups.
    """

    ty: int
    tx: int
    row_sets: int
    col_sets: int
    splits: int = 1
    unrolled: bool = False
    quads: int = 4

    @property
    def step(self) -> int:
        """k of a step."""
        return 4 * self.quads

    @property
    def rows(self) -> int:
        """Of a tile."""
        return 4 * self.row_sets * self.ty

    @property
    def columns(self) -> int:
        """Of a tile; those of gate and up are counted apart."""
        return 4 * self.col_sets * self.tx

    @property
    def invocations(self) -> int:
        return self.ty * self.tx

    @property
    def memory(self) -> int:
        """Bytes of workgroup memory."""
        return 4 * self.step * (self.rows + self.columns)


LARGE = Choice(8, 16, 4, 2)
"""128 x 128 outputs, 16 x 8 a lane."""
GPU_LARGE = 264
"""Workgroups of LARGE that a large GPU runs at once: two on each of 132 multiprocessors."""
EVEN = 0.94
"""Share of those at work, on average over the rounds, from which LARGE is worth it: it loads less, but a round that is
not full costs more than with smaller tiles."""
LARGE_GAIN = 1.07
"""How much faster LARGE is then, for as many rows: where its tiles are to be filled up with more rows than that, it is
not."""
GPU_WORKGROUPS = 512
"""Workgroups of other tiles that keep a large GPU busy: K is split among more of them below."""
LEAST_SPLIT = 128
"""k of a split at least."""
MAX_SCRATCH = 32 << 20
"""Bytes of partial sums at most."""
LONG_WORK = 1 << 28
"""Multiply-adds from which a step of K is unrolled: 12 % faster, but a long text to compile for each variant."""


def tiles(p: Problem, choice: Choice) -> int:
    """Workgroups without splits."""
    columns = choice.columns // (2 if p.gated else 1)
    return p.batch * -(-p.m // choice.rows) * -(-p.n // columns)


def padded(p: Problem, choice: Choice) -> int:
    """Rows that tiles compute, those past the last one among them."""
    return -(-p.m // choice.rows) * choice.rows


def splittable(p: Problem) -> bool:
    """Whether gemm_merge.wgsl can finish the product."""
    return p.batch == 1 and p.n % 4 == 0 and not p.gated


def choose(limits: Limits, p: Problem) -> Choice:
    """The cut of a product, from its sizes and the device's limits alone."""
    unrolled = p.batch * p.m * p.n * p.k >= LONG_WORK
    choice = Choice(8, 8, 1 if p.m <= 32 else 2, 1 if p.n <= 32 and not p.gated else 2, unrolled=unrolled)
    large = tiles(p, LARGE)
    rounds = -(-large // GPU_LARGE)
    fits = LARGE.memory <= limits.max_workgroup_memory and LARGE.invocations <= limits.max_invocations
    full = large >= EVEN * rounds * GPU_LARGE and padded(p, LARGE) <= LARGE_GAIN * padded(p, choice)
    if fits and not p.gated and full:
        return replace(LARGE, unrolled=unrolled)
    if splittable(p):
        room = min(MAX_SCRATCH, limits.max_binding) // (4 * p.m * p.n)
        splits = min(-(-GPU_WORKGROUPS // tiles(p, choice)), p.k // LEAST_SPLIT, room)
        choice = replace(choice, splits=max(splits, 1))
    long = replace(choice, quads=8)
    waits = choice.row_sets == 1 or tiles(p, choice) * choice.splits < GPU_WORKGROUPS
    if waits and p.format is None and p.k > choice.step and long.memory <= limits.max_workgroup_memory:
        return long
    return choice


@cache
def _body(parts: tuple[str, ...]) -> str:
    return "\n".join(wgsl.source(part) for part in (*parts, "gemm_tiles"))


def _quarter(strides: Four, whole: bool) -> Four:
    """Strides in cells: of four elements where rows are read by fours."""
    return (strides[0] // 4, strides[1] // 4, strides[2] // 4, strides[3] // 4) if whole else strides


def multiply(ctx: Lowering, p: Problem, choice: Choice | None = None) -> Iterator[Dispatch]:
    """One dispatch, or two where K is split; K is at least 1."""
    choice = choose(ctx.limits, p) if choice is None else choice
    x_fours, w_columns, n_fours = p.k % 4 == 0, p.k if p.nk else p.n, p.n % 4 == 0
    weight = p.weights[0].type
    if weight == "bf16":
        w_columns = -(-w_columns // 8) * 8  # rows are filled up to 16 bytes
    w_fours = w_columns % 4 == 0
    w_row = p.format.words if p.format else w_columns // 4 if w_fours else w_columns
    steps = -(-p.k // choice.step)
    span = -(-steps // (choice.splits if splittable(p) else 1))
    splits = -(-steps // span)
    row_tiles = -(-p.m // choice.rows)
    total = tiles(p, choice) * splits
    col_tiles = total // (row_tiles * splits * p.batch)
    split = splits > 1
    out = Tensor(ctx.scratch("f32", splits * p.batch * p.m * p.n), "f32") if split else p.out
    parts = (
        f"gemm_x_{p.x.type}" if x_fours else "gemm_x_any",
        "gemm_weights_packed" if p.format else f"gemm_weights_{weight}" if w_fours else "gemm_weights_any",
        "gemm_store_4" if n_fours else "gemm_store_1",
    )
    types = {"Scale": "f32", "Bias": "f32" if p.bias is None else p.bias.type}
    if not x_fours:
        types["XCell"] = p.x.type
    if not w_fours and p.format is None:
        types["WCell"] = weight
    for name, tensor in (("Out", out), ("Residual", p.residual)):
        kind = "f32" if tensor is None else tensor.type
        types[name] = f"vec4<{kind}>" if n_fours else kind
    bindings = {"x": p.x.id, "w0": p.weights[0].id, "out": out.id}
    if p.gated:
        bindings["w1"] = p.weights[1].id
    addends = {name: t.id for name, t in (("bias", p.bias), ("residual", p.residual)) if t is not None}
    even_k = p.k % choice.step == 0
    consts: dict[str, int | float | bool] = {
        "TY": choice.ty, "TX": choice.tx, "ROW_SETS": choice.row_sets, "COL_SETS": choice.col_sets,
        "KQ": choice.quads, "UNROLLED": choice.unrolled,
        "W_NK": p.nk, "GATED": p.gated, "SPLIT": split, "EVEN": even_k,
        "BIAS": p.bias is not None and not split, "BIAS_ROWS": p.bias_row != 0,
        "RESIDUAL": p.residual is not None and not split,
    }  # fmt: skip
    if p.format is not None:
        consts |= p.format.consts()
    params: dict[str, Param] = {
        "sizes": p.sizes, "x_strides": _quarter(p.x_strides, x_fours), "w_strides": _quarter(p.w_strides, w_fours),
        "bias_strides": p.bias_strides, "m": p.m, "n": p.n, "k": p.k, "x_row": p.k // 4 if x_fours else p.k,
        "w_row": w_row, "bias_row": p.bias_row, "bias_col": p.bias_col,
        "alpha": p.alpha, "beta": p.beta, "row_tiles": row_tiles, "col_tiles": col_tiles, "splits": splits,
        "span": span * choice.step, "batch": p.batch, "total": total,
    }  # fmt: skip
    yield Dispatch(
        "gemm", bindings if split else {**bindings, **addends}, params, ctx.fold_grid(total), consts=consts,
        types=types, body=_body(parts),
    )  # fmt: skip
    if not split:
        return
    yield merge(
        ctx, out, p.out, p.m, p.n, splits, p.bias, p.residual,
        bias_row=p.bias_row, bias_col=p.bias_col, alpha=p.alpha, beta=p.beta,
    )  # fmt: skip


def merge(
    ctx: Lowering, partial: Tensor, out: Tensor, m: int, n: int, splits: int, bias: Tensor | None,
    residual: Tensor | None, bias_row: int = 0, bias_col: int = 1, alpha: float = 1.0, beta: float = 1.0,
) -> Dispatch:  # fmt: skip
    """What adds up the sums f32 [splits, m, n] of splits, n a multiple of four; the rest as of a `Problem`."""
    count = m * n // 4
    types = {
        "Bias": "f32" if bias is None else bias.type,
        "Residual": f"vec4<{'f32' if residual is None else residual.type}>",
        "Out": f"vec4<{out.type}>",
    }
    params: dict[str, Param] = {
        "count": count, "quads": n // 4, "splits": splits, "bias_row": bias_row, "bias_col": bias_col,
        "alpha": alpha, "beta": beta,
    }  # fmt: skip
    bindings = {"partial": partial.id, "out": out.id}
    bindings |= {name: tensor.id for name, tensor in (("bias", bias), ("residual", residual)) if tensor is not None}
    consts = {"BIAS": bias is not None, "RESIDUAL": residual is not None}
    return Dispatch("gemm_merge", bindings, params, ctx.grid_1d(count, 64), consts=consts, types=types)


def takes(p: Projection) -> bool:
    """Whether `gemm` has a form for a projection: without norm, weights of one type, no gated bias, K at least 1."""
    same = len({weight.type for weight in p.weights}) == 1 and len(set(p.formats)) <= 1
    if p.format is not None and p.format.group % 4:
        return False
    return p.eps is None and same and p.k > 0 and not (p.gated and p.bias is not None)


def gemm(ctx: Lowering, p: Projection) -> Iterator[Dispatch]:
    """The products of a projection, any number of rows; `takes` holds. Nothing where a result has no elements.

    Gate and up are one dispatch; other siblings are one each, and their merges follow together, so that a device may
    run them side by side.
    """
    groups = [p.weights] if p.gated else [(weight,) for weight in p.weights]
    merges: list[Dispatch] = []
    for weights, n, out in zip(groups, p.sizes, p.outs, strict=False):
        if p.m * n == 0:
            continue
        single = len(groups) == 1
        bias, residual = (p.bias, p.residual) if single else (None, None)
        first, *rest = multiply(
            ctx, Problem(p.x, weights, out, p.m, n, p.k, gated=p.gated, bias=bias, residual=residual, format=p.format)
        )
        yield first
        merges += rest
    yield from merges
