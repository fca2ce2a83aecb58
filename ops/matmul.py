"""Matrix products: linear, mm, addmm, bmm, baddbmm, addmv, mv, dot, matmul, and the fused `webgpu.linear`.

Every operator is put into one form, `Product`:
    out[b, m, n] = alpha * sum_k A[b, m, k] * B[b, k, n] + beta * bias[b, m, n]
with A [.., M, K], B [.., K, N] or [.., N, K], f32 sums, and operands of any mix of f32, f16 and bf16. `dispatch`
chooses the kernel from sizes and limits alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

from ..backend.graph import Arg, Dim, Graph, Node, Ref, Value
from .base import Dispatch, Lower, Lowering, Param, Supports, register
from .gemv_stream import Projection, Tensor, fits, stream

FLOATS = ("f32", "f16", "bf16")
MAX_RANK = 6
"""Two matrix axes and four batch axes: what a vec4 of strides can say."""

NAIVE_K = 16
"""Up to this K the kernels gain nothing from sharing operands."""
GEMV_M = 16
"""Up to so many rows: two blocks of eight waste less than a tile of 32 (by count of work; not timed on a GPU yet)."""
GPU_INVOCATIONS = 1 << 17
"""Invocations that keep a large GPU busy (132 multiprocessors of 1,024 threads); work is cut finer to have as many."""
GPU_WORKGROUPS = 256
"""Workgroups of 256 invocations that keep a large GPU busy."""

Four = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Product:
    """One matrix product in numbers.

    Attributes:
        a, b, out, bias: value indices; bias may be None.
        a_type, b_type, bias_type, out_type: WGSL element types.
        m, n, k: sizes of one matrix product.
        b_nk: B is [.., N, K] (as the weight of a linear layer) instead of [.., K, N].
        sizes: batch sizes, outermost first, padded with 1 in front.
        a_strides, b_strides, bias_strides: elements per step of each batch index, 0 where broadcast.
        bias_row, bias_col: elements per row and column of the bias, 0 where broadcast.
        alpha, beta: factors of the product and of the bias.
    """

    a: int
    b: int
    out: int
    a_type: str
    b_type: str
    out_type: str
    m: int
    n: int
    k: int
    b_nk: bool
    bias: int | None = None
    bias_type: str = "f32"
    sizes: Four = (1, 1, 1, 1)
    a_strides: Four = (0, 0, 0, 0)
    b_strides: Four = (0, 0, 0, 0)
    bias_strides: Four = (0, 0, 0, 0)
    bias_row: int = 0
    bias_col: int = 0
    alpha: float = 1.0
    beta: float = 1.0

    @property
    def batch(self) -> int:
        return prod(self.sizes)

    def params(self) -> dict[str, Param]:
        """The fields that all kernels of the family share."""
        return {
            "sizes": self.sizes,
            "a_strides": self.a_strides,
            "b_strides": self.b_strides,
            "bias_strides": self.bias_strides,
            "m": self.m,
            "n": self.n,
            "k": self.k,
            "bias_row": self.bias_row,
            "bias_col": self.bias_col,
            "alpha": self.alpha,
            "beta": self.beta,
        }

    def bindings(self) -> dict[str, int]:
        found = {"a": self.a, "b": self.b, "out": self.out}
        return found if self.bias is None else {**found, "bias": self.bias}

    def types(self) -> dict[str, str]:
        return {"A": self.a_type, "B": self.b_type, "Bias": self.bias_type, "Out": self.out_type}


def batch_strides(shape: Sequence[int], batch: Sequence[int], matrix: int) -> list[int]:
    """Element strides of an operand's batch axes `shape`, aligned right to the result's `batch` axes.

    `matrix` is the number of elements of one matrix of the operand. Broadcast axes get 0.
    """
    strides = [0] * len(batch)
    step = matrix
    for i, size in enumerate(reversed(shape)):
        strides[-1 - i] = 0 if size == 1 else step
        step *= size
    return strides


def collapse(sizes: Sequence[int], operands: Sequence[Sequence[int]]) -> tuple[list[int], list[list[int]]]:
    """Drop axes of size 1, merge neighbours that all operands walk as one; returns (sizes, strides of each operand)."""
    kept_sizes: list[int] = []
    kept: list[list[int]] = [[] for _ in operands]
    for axis, size in enumerate(sizes):
        if size == 1:
            continue
        steps = [strides[axis] for strides in operands]
        if kept_sizes and all(have[-1] == step * size for have, step in zip(kept, steps, strict=True)):
            kept_sizes[-1] *= size
            for have, step in zip(kept, steps, strict=True):
                have[-1] = step
        else:
            kept_sizes.append(size)
            for have, step in zip(kept, steps, strict=True):
                have.append(step)
    return kept_sizes, kept


def _four(values: Sequence[int], fill: int) -> Four:
    padded = [fill] * (4 - len(values)) + list(values)
    return padded[0], padded[1], padded[2], padded[3]


def make_product(
    ctx: Lowering,
    node: Node,
    a: Arg,
    b: Arg,
    *,
    b_nk: bool = False,
    bias: Arg = None,
    alpha: float = 1.0,
    beta: float = 1.0,
) -> Product:
    """The `Product` of two value arguments whose shapes broadcast as `torch.matmul`'s.

    A vector A is one row, a vector B one column. With `b_nk`, B's last two axes are [N, K]. `bias` is broadcast to the
    result's shape.
    """
    out = ctx.out(node)
    a_shape, b_shape = ctx.shape(a), ctx.shape(b)
    a_vector, b_vector = len(a_shape) == 1, len(b_shape) == 1
    m, k = (1, a_shape[0]) if a_vector else (a_shape[-2], a_shape[-1])
    n = 1 if b_vector else b_shape[-2 if b_nk else -1]
    out_shape = list(ctx.shape(out))
    if b_vector:
        out_shape.append(1)
    if a_vector:
        out_shape.insert(len(out_shape) - 1, 1)
    batch = out_shape[:-2]
    a_steps = batch_strides(a_shape[:-2], batch, m * k)
    b_steps = batch_strides(b_shape[:-2], batch, k * n)
    bias_steps, bias_row, bias_col = [0] * len(batch), 0, 0
    if bias is not None:
        shape = list(ctx.shape(bias))
        if b_vector and shape:
            shape.append(1)
        shape = [1] * (2 - len(shape)) + shape
        bias_col = 0 if shape[-1] == 1 else 1
        bias_row = 0 if shape[-2] == 1 else shape[-1]
        bias_steps = batch_strides(shape[:-2], batch, shape[-2] * shape[-1])
    sizes, (a_steps, b_steps, bias_steps) = collapse(batch, (a_steps, b_steps, bias_steps))
    made = Product(
        ctx.id(a),
        ctx.id(b),
        out.value,
        ctx.wgsl_type(a),
        ctx.wgsl_type(b),
        ctx.wgsl_type(out),
        m,
        n,
        k,
        b_nk or b_vector,
        None if bias is None else ctx.id(bias),
        "f32" if bias is None else ctx.wgsl_type(bias),
        _four(sizes, 1),
        _four(a_steps, 0),
        _four(b_steps, 0),
        _four(bias_steps, 0),
        bias_row,
        bias_col,
        alpha,
        beta,
    )
    return simplify(made)


def simplify(p: Product) -> Product:
    """The same product, with a batch over one B folded into the rows, or a single column turned into a single row."""
    shared = not any(p.b_strides) and not any(p.bias_strides) and p.bias_row == 0
    if p.batch > 1 and shared and p.sizes[:3] == (1, 1, 1) and p.a_strides[3] == p.m * p.k:
        none = (0, 0, 0, 0)
        p = replace(p, m=p.batch * p.m, sizes=(1, 1, 1, 1), a_strides=none, b_strides=none, bias_strides=none)
    if p.n == 1:
        p = replace(p, b_nk=True)  # one column is one row of [N, K]
    if p.n == 1 and p.m > 1:  # A's rows are then the columns of a transposed product; B and the result are vectors
        p = replace(
            p,
            a=p.b,
            b=p.a,
            a_type=p.b_type,
            b_type=p.a_type,
            m=1,
            n=p.m,
            a_strides=p.b_strides,
            b_strides=p.a_strides,
            bias_row=p.bias_col,
            bias_col=p.bias_row,
        )
    return p


# -- kernels


def naive(ctx: Lowering, p: Product) -> Iterator[Dispatch]:
    """One invocation per output."""
    count = p.batch * p.m * p.n
    consts = {"B_NK": p.b_nk, "BIAS": p.bias is not None}
    yield Dispatch(
        "matmul_naive",
        p.bindings(),
        {**p.params(), "count": count},
        ctx.grid_1d(count, 64),
        consts=consts,
        types=p.types(),
    )


def _ceil_power(value: int) -> int:
    """The smallest power of two that is at least `value`."""
    return 1 << max(value - 1, 0).bit_length()


def _rows(m: int) -> int:
    return min(_ceil_power(m), 8)


def gemv(ctx: Lowering, p: Product) -> Iterator[Dispatch]:
    """Blocks of up to eight rows; B is read once per block."""
    rows = _rows(p.m)
    row_blocks = -(-p.m // rows)
    largest = min({1: 256, 2: 256, 4: 128, 8: 64}[rows], ctx.limits.max_invocations)  # at most 8 KiB of partial sums
    others = p.batch * row_blocks
    consts: dict[str, int | float | bool] = {"ROWS": rows, "BIAS": p.bias is not None}
    types = {**p.types(), "A4": f"vec4<{p.a_type}>", "B4": f"vec4<{p.b_type}>"}
    bindings = p.bindings()
    if p.b_nk:
        vector = p.k % 4 == 0
        quads = -(-p.k // 4)
        columns = 4 if -(-p.n // 4) * others * min(_ceil_power(quads), largest) >= GPU_INVOCATIONS // 2 else 1
        lanes = 8 if quads < 16 else 32  # few different values: each is a pipeline to compile
        while lanes < largest and 2 * lanes <= quads and -(-p.n // columns) * others * lanes < GPU_INVOCATIONS:
            lanes *= 2
        workgroup = min(64, largest) if lanes * -(-p.n // columns) <= 64 else largest
        per_group = columns * workgroup // lanes
        consts["COLS"] = columns
        if vector:
            bindings |= {"a4": p.a, "b4": p.b}
            del bindings["a"], bindings["b"]
    else:
        del types["A4"]
        vector = p.n % 4 == 0
        quads = -(-p.n // 4)
        workgroup = largest
        lanes = 8  # eight vec4 along N: 128 bytes in one run
        widest = min(32, largest // 4, quads)
        while 2 * lanes <= widest and quads // (2 * lanes) * others >= GPU_WORKGROUPS:
            lanes *= 2
        per_group = 4 * lanes
        if vector:
            bindings["b4"] = bindings.pop("b")
    col_blocks = -(-p.n // per_group)
    total = others * col_blocks
    consts |= {"WG": workgroup, "LANES": lanes, "VEC": vector}
    params = {**p.params(), "col_blocks": col_blocks, "row_blocks": row_blocks, "total": total}
    kernel = "gemv_nk" if p.b_nk else "gemv_kn"
    yield Dispatch(kernel, bindings, params, ctx.fold_grid(total), consts=consts, types=types)


def tiled(ctx: Lowering, p: Product) -> Iterator[Dispatch]:
    """Tiles of 128 x 64 outputs; of 64 x 64 or 32 x 32 where larger ones would leave most of a GPU idle."""

    def tiles(height: int, width: int) -> int:
        return p.batch * -(-p.m // height) * -(-p.n // width)

    fitting = [shape for shape in ((128, 64), (64, 64)) if tiles(*shape) >= GPU_WORKGROUPS and p.m > shape[0] // 2]
    height, side = fitting[0] if fitting and ctx.limits.max_invocations >= 256 else (32, 32)
    total = tiles(height, side)
    vector = not p.b_nk and p.n % 4 == 0
    bindings = p.bindings()
    if vector:
        bindings["b4"] = bindings.pop("b")
    params = {**p.params(), "row_tiles": -(-p.m // height), "col_tiles": -(-p.n // side), "total": total}
    consts = {"T": side // 4, "ROW_SETS": height // side, "B_NK": p.b_nk, "BIAS": p.bias is not None, "VEC": vector}
    types = {**p.types(), "B4": f"vec4<{p.b_type}>"}
    yield Dispatch("matmul_tiled", bindings, params, ctx.fold_grid(total), consts=consts, types=types)


def projection(p: Product) -> Projection | None:
    """A product in the form of gemv_stream.wgsl, None where it has none. A bias is a row, or a whole result to add."""
    if p.batch != 1 or not p.b_nk or p.alpha != 1 or (p.bias is not None and p.beta != 1):
        return None
    bias = None if p.bias is None else Tensor(p.bias, p.bias_type)
    row = p.bias_col == 1 and (p.bias_row == 0 or p.m == 1)
    if bias is not None and not row and (p.bias_row, p.bias_col) != (p.n, 1):
        return None
    return Projection(
        Tensor(p.a, p.a_type),
        p.m,
        p.k,
        (Tensor(p.b, p.b_type),),
        (p.n,),
        (Tensor(p.out, p.out_type),),
        bias=bias if row else None,
        residual=None if row else bias,
    )


def dispatch(ctx: Lowering, p: Product) -> Iterator[Dispatch]:
    """The product by the kernel that suits its sizes; nothing where the result has no elements."""
    if p.batch * p.m * p.n == 0:
        return
    streamed = projection(p)
    if p.k > NAIVE_K and streamed is not None and fits(ctx.limits, streamed):
        yield from stream(ctx, streamed)
        return
    kernel = naive if p.k <= NAIVE_K else gemv if p.m <= GEMV_M else tiled
    yield from kernel(ctx, p)


# -- operators

Parts = Callable[[Lowering, Node], Product]


def _lower(parts: Parts) -> Lower:
    def lower(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
        return dispatch(ctx, parts(ctx, node))

    return lower


def linear_parts(ctx: Lowering, node: Node) -> Product:
    """input [.., K], weight [N, K] (or [K, N] where `transposed` is false), bias [N]."""
    nk = bool(node.args.get("transposed", True))
    return make_product(ctx, node, node.args["input"], node.args["weight"], b_nk=nk, bias=node.args.get("bias"))


def _pair(a: str, b: str) -> Parts:
    """The plain product of two arguments."""
    return lambda ctx, node: make_product(ctx, node, node.args[a], node.args[b])


def _sum(a: str, b: str) -> Parts:
    """beta * self + alpha * a @ b; a `self` multiplied by 0 is not read, as in PyTorch."""

    def parts(ctx: Lowering, node: Node) -> Product:
        alpha, beta = _number(node.args.get("alpha", 1)), _number(node.args.get("beta", 1))
        bias = None if beta == 0 else node.args["self"]
        return make_product(ctx, node, node.args[a], node.args[b], bias=bias, alpha=alpha, beta=beta)

    return parts


def _number(arg: Arg) -> float:
    if not isinstance(arg, int | float):
        raise TypeError(f"expected a number, got {arg!r}")
    return float(arg)


def _unequal(left: Dim, right: Dim) -> bool:
    """Whether two sizes differ for certain."""
    return isinstance(left, int) and isinstance(right, int) and left != right


def _broadcasts(shape: Sequence[Dim], target: Sequence[Dim]) -> bool:
    """Whether `shape` may broadcast to `target` (sizes that are symbols are believed)."""
    if len(shape) > len(target):
        return False
    pairs = zip(reversed(shape), reversed(target), strict=False)
    return not any(size != 1 and _unequal(size, goal) for size, goal in pairs)


def _operand(graph: Graph, arg: Arg, name: str) -> Value | str:
    """The value of an operand, or what is wrong with it."""
    if not isinstance(arg, Ref):
        return f"{name} is no tensor"
    value = graph.value(arg)
    if value.dtype not in FLOATS:
        return f"{name} has dtype {value.dtype}; matrix products take float32, float16 and bfloat16: cast it first"
    if len(value.shape) > MAX_RANK:
        return f"{name} has rank {len(value.shape)}; at most {MAX_RANK} is supported: flatten leading axes"
    return value


def _check(graph: Graph, node: Node, a_name: str, b_name: str, bias_name: str | None, b_nk: bool) -> str | None:
    a, b = _operand(graph, node.args[a_name], a_name), _operand(graph, node.args[b_name], b_name)
    for found in (a, b):
        if isinstance(found, str):
            return found
    if isinstance(a, str) or isinstance(b, str):  # for the type checker: the loop has returned
        return None
    if not a.shape or not b.shape:
        return "a matrix product of a scalar"
    inner = b.shape[-1] if b_nk or len(b.shape) == 1 else b.shape[-2]
    if _unequal(a.shape[-1], inner):
        return f"{a_name} {list(a.shape)} and {b_name} {list(b.shape)} do not multiply: {a.shape[-1]} against {inner}"
    out = graph.values[node.outputs[0]]
    if out.dtype not in FLOATS:
        return f"the result has dtype {out.dtype}; float32, float16 and bfloat16 are supported"
    if len(out.shape) > MAX_RANK:
        return f"the result has rank {len(out.shape)}; at most {MAX_RANK} is supported: flatten leading axes"
    if bias_name is not None and node.args.get(bias_name) is not None:
        bias = _operand(graph, node.args[bias_name], bias_name)
        if isinstance(bias, str):
            return bias
        if not _broadcasts(bias.shape, out.shape):
            return f"{bias_name} {list(bias.shape)} does not broadcast to {list(out.shape)}"
    for name in ("alpha", "beta"):
        if not isinstance(node.args.get(name, 1), int | float):
            return f"{name} is not a number known at export"
    return None


def _supports(a: str, b: str, bias: str | None = None, b_nk: bool = False) -> Supports:
    def supports(graph: Graph, node: Node) -> str | None:
        return _check(graph, node, a, b, bias, b_nk)

    return supports


def linear_supports(graph: Graph, node: Node) -> str | None:
    nk = node.args.get("transposed", True)
    if not isinstance(nk, bool):
        return "transposed is not a literal bool"
    weight = node.args["weight"]
    if isinstance(weight, Ref) and len(graph.value(weight).shape) not in (1, 2):
        return f"weight {list(graph.value(weight).shape)} is neither a matrix nor a vector"
    return _check(graph, node, "input", "weight", "bias", nk)


register("aten.linear.default", "webgpu.linear", supports=linear_supports, lower=_lower(linear_parts))
for _name, _a, _b in (
    ("aten.mm.default", "self", "mat2"),
    ("aten.bmm.default", "self", "mat2"),
    ("aten.matmul.default", "self", "other"),
    ("aten.mv.default", "self", "vec"),
    ("aten.dot.default", "self", "tensor"),
):
    register(_name, supports=_supports(_a, _b), lower=_lower(_pair(_a, _b)))
for _name, _a, _b in (
    ("aten.addmm.default", "mat1", "mat2"),
    ("aten.baddbmm.default", "batch1", "batch2"),
    ("aten.addmv.default", "mat", "vec"),
):
    register(_name, supports=_supports(_a, _b, "self"), lower=_lower(_sum(_a, _b)))
