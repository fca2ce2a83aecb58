"""Matrix products: linear, mm, addmm, bmm, baddbmm, addmv, mv, dot, matmul, _int_mm, and the fused `webgpu.linear`.

Every operator of floats is put into one form, `Product`:
    out[b, m, n] = alpha * sum_k A[b, m, k] * B[b, k, n] + beta * bias[b, m, n]
with A [.., M, K], B [.., K, N] or [.., N, K], f32 sums, and operands of any mix of f32, f16 and bf16. `dispatch`
chooses the kernel from sizes and limits alone. `_int_mm`, of bytes, is exact and has one kernel, for what
`backend/passes/quantized_activations.py` does not make a product with packed weights of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from ..backend.graph import Arg, Dim, Graph, Node, Ref, Value
from .base import Dispatch, Lower, Lowering, Supports, register
from .gemm import Problem, multiply
from .gemv_stream import Projection, Tensor, fits, fits_passes, stream
from .product import Product, make_product

FLOATS = ("f32", "f16", "bf16")
MAX_RANK = 6
"""Two matrix axes and four batch axes: what a vec4 of strides can say."""

NAIVE_K = 16
"""Up to this K the kernels gain nothing from sharing operands."""
GEMV_M = 8
"""Rows whose sums a lane of the matrix-vector kernels keeps; more go through tiles."""
GPU_INVOCATIONS = 1 << 17
"""Invocations that keep a large GPU busy (132 multiprocessors of 1,024 threads); work is cut finer to have as many."""
GPU_WORKGROUPS = 256
"""Workgroups of 256 invocations that keep a large GPU busy."""

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


def tiles(ctx: Lowering, p: Product) -> Iterator[Dispatch]:
    """Tiles in registers; K must be at least 1."""
    return multiply(ctx, problem(p))


def problem(p: Product) -> Problem:
    """A product in the form of gemm.wgsl. A bias of the result's own shape is read as vectors there."""
    bias = None if p.bias is None else Tensor(p.bias, p.bias_type)
    whole = bias is not None and p.batch == 1 and p.beta == 1 and (p.bias_row, p.bias_col) == (p.n, 1)
    return Problem(
        Tensor(p.a, p.a_type),
        (Tensor(p.b, p.b_type),),
        Tensor(p.out, p.out_type),
        p.m,
        p.n,
        p.k,
        nk=p.b_nk,
        sizes=p.sizes,
        x_strides=p.a_strides,
        w_strides=p.b_strides,
        bias=None if whole else bias,
        bias_strides=p.bias_strides,
        bias_row=p.bias_row,
        bias_col=p.bias_col,
        residual=bias if whole else None,
        alpha=p.alpha,
        beta=p.beta,
    )


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
    if p.k > NAIVE_K and streamed is not None and (fits(ctx.limits, streamed) or fits_passes(ctx.limits, streamed)):
        yield from stream(ctx, streamed)
        return
    kernel = naive if p.k <= NAIVE_K else gemv if p.m <= GEMV_M else tiles
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


# -- bytes


def supports_integers(graph: Graph, node: Node) -> str | None:
    """aten._int_mm: self [M, K] and mat2 [K, N] of int8 or uint8; the result is int32."""
    shapes: list[tuple[Dim, ...]] = []
    for name in ("self", "mat2"):
        arg = node.args[name]
        if not isinstance(arg, Ref):
            return f"{name} is no tensor"
        value = graph.value(arg)
        if value.dtype not in ("i8", "u8") or len(value.shape) != 2:
            return f"{name} is {value.dtype}{list(value.shape)}; matrices of int8 or uint8 are supported"
        shapes.append(value.shape)
    (m, k), (inner, n) = shapes
    if _unequal(k, inner):
        return f"self [{m}, {k}] and mat2 [{inner}, {n}] do not multiply: {k} against {inner}"
    out = graph.values[node.outputs[0]]
    if out.dtype != "i32" or len(out.shape) != 2:
        return f"the result is {out.dtype}{list(out.shape)}; a matrix of int32 is supported"
    return None


def lower_integers(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
    """An invocation an output."""
    a, b = node.args["self"], node.args["mat2"]
    (m, k), n = ctx.shape(a), ctx.shape(b)[1]
    if m * n:
        bindings = {"a": ctx.id(a), "b": ctx.id(b), "out": node.outputs[0]}
        yield Dispatch("int_mm", bindings, {"n": n, "k": k, "count": m * n}, ctx.grid_1d(m * n, 64))


register("aten._int_mm.default", supports=supports_integers, lower=lower_integers)
