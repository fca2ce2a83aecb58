"""Matrix products against float64, and the kernels against each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from executorch_webgpu.backend.graph import Graph, Node, Ref, Sym, make_dim
from executorch_webgpu.ops import matmul, product
from executorch_webgpu.ops.base import Dispatch, Lower, Lowering, check_node, find, register
from executorch_webgpu.runtime.gpu.host import bf16_to_f32, f32_to_bf16
from tests.harness import DEVICES, GraphBuilder, device, run

Array = np.ndarray[Any, Any]
TOLERANCE = {"f32": 2e-6, "f16": 1e-3, "bf16": 8e-3}
rng = np.random.default_rng(7)


def random(dtype: str, shape: Sequence[int]) -> Array:
    """Values that `dtype` holds exactly, as float32."""
    values = rng.standard_normal(tuple(shape)).astype(np.float32)
    if dtype == "f16":
        return values.astype(np.float16).astype(np.float32)
    return bf16_to_f32(f32_to_bf16(values)) if dtype == "bf16" else values


class Case:
    """A node under test: inputs are graph inputs, bfloat16 ones constants (numpy cannot carry them in)."""

    def __init__(self) -> None:
        self.b = GraphBuilder()
        self.arrays: list[Array] = []

    def tensor(self, dtype: str, array: Array) -> Ref:
        if dtype == "bf16":
            return self.b.stored("constant", "bf16", f32_to_bf16(array), f"c{len(self.b.values)}")
        self.arrays.append(array.astype(np.float16) if dtype == "f16" else array)
        return self.b.input(dtype, array.shape)

    def run(self, on: str, op: str, args: dict[str, Any], dtype: str, shape: Sequence[int]) -> Array:
        out = self.b.node(op, args, (dtype, shape))
        graph = self.b.graph(out)
        assert check_node(graph, graph.nodes[-1]) is None
        (result,) = run(self.b, graph, device(on), *self.arrays)
        assert result.shape == tuple(shape)
        return np.asarray(result)


def close(got: Array, want: Array, scale: Array | float, dtype: str) -> None:
    """|got - want| <= tolerance * the sum of magnitudes that went in."""
    error = np.abs(got.astype(np.float64) - want)
    limit = TOLERANCE[dtype] * (scale + np.abs(want)) + 1e-30
    assert np.all(error <= limit), f"error {error.max()} at flat index {error.argmax()}, limit {limit.min()}"


def linear(
    on: str, op: str, m: int, n: int, k: int, dtypes: str = "f32 f32 f32 f32", bias: bool = True, nk: bool = True
) -> None:
    """One linear layer against float64. `dtypes`: input, weight, bias, result."""
    x_type, w_type, bias_type, out_type = dtypes.split()
    case = Case()
    x, w, c = random(x_type, (m, k)), random(w_type, (n, k) if nk else (k, n)), random(bias_type, (n,))
    args: dict[str, Any] = {
        "input": case.tensor(x_type, x),
        "weight": case.tensor(w_type, w),
        "bias": None,
        "transposed": nk,
    }
    wt = (w.T if nk else w).astype(np.float64)
    want, scale = x.astype(np.float64) @ wt, np.abs(x).astype(np.float64) @ np.abs(wt)
    if bias:
        args["bias"] = case.tensor(bias_type, c)
        want, scale = want + c, scale + np.abs(c)
    close(case.run(on, op, args, out_type, (m, n)), want, scale, out_type)


# -- every kernel by force

Kernel = Callable[[Lowering, product.Product], Iterator[Dispatch]]
KERNELS: dict[str, Kernel] = {
    "naive": matmul.naive,
    "gemv": matmul.gemv,
    "tiles": matmul.tiles,
}


def _force(kernel: Kernel) -> Lower:
    def lower(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
        return kernel(ctx, matmul.linear_parts(ctx, node))

    return lower


def _force_baddbmm(kernel: Kernel) -> Lower:
    def lower(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
        return kernel(
            ctx, product.make_product(ctx, node, node.args["batch1"], node.args["batch2"], bias=node.args["self"])
        )

    return lower


def _force_matmul(kernel: Kernel) -> Lower:
    def lower(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
        return kernel(ctx, product.make_product(ctx, node, node.args["self"], node.args["other"]))

    return lower


for _name, _kernel in KERNELS.items():
    register(f"test.linear_{_name}", supports=matmul.linear_supports, lower=_force(_kernel))
    register(f"test.matmul_{_name}", supports=lambda graph, node: None, lower=_force_matmul(_kernel))
    register(f"test.baddbmm_{_name}", supports=lambda graph, node: None, lower=_force_baddbmm(_kernel))

SIZES = (
    (1, 1, 1), (1, 257, 64), (1, 130, 127), (2, 5, 65), (3, 63, 130), (4, 4, 4), (5, 3, 257), (6, 65, 3),
    (7, 1, 257), (8, 64, 63), (9, 127, 5), (31, 65, 4), (32, 64, 64), (33, 130, 33), (63, 63, 65), (64, 3, 1),
    (65, 257, 17), (17, 1, 130),
)  # fmt: skip
"""(M, N, K)."""


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("nk", [True, False], ids=["nk", "kn"])
@pytest.mark.parametrize("kernel", [*KERNELS, "routed"])
def test_sizes(kernel: str, nk: bool, on: str) -> None:
    op = "webgpu.linear" if kernel == "routed" else f"test.linear_{kernel}"
    for i, (m, n, k) in enumerate(SIZES[1::3] if kernel == "tiles" else SIZES):  # the rest is in test_gemm.py
        linear(on, op, m, n, k, bias=i % 2 == 0, nk=nk)


MIXES = (
    "f16 f16 f16 f16",
    "f32 f16 f32 f32",
    "bf16 bf16 bf16 bf16",
    "f16 bf16 f32 f16",
    "f32 bf16 f16 f32",
    "bf16 f16 f32 f32",
)


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_dtypes(kernel: str, on: str) -> None:
    for i, mix in enumerate(MIXES):
        for m, n, k in ((9, 7, 13),) if kernel == "tiles" else ((3, 12, 24), (9, 7, 13)):
            linear(on, f"test.linear_{kernel}", m, n, k, mix, nk=i % 2 == 0)
            linear(on, f"test.linear_{kernel}", m, n, k, mix, nk=i % 2 == 1, bias=False)


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("nk", [True, False], ids=["nk", "kn"])
def test_kernels_agree_on_large_columns(nk: bool, on: str) -> None:
    """Sizes at which the matrix-vector kernels switch to more lanes and to four columns an invocation."""
    for m, n, k in ((1, 2048, 128), (2, 8192, 20), (1, 40, 4096), (8, 1024, 132)):
        for kernel in ("naive", "gemv"):
            linear(on, f"test.linear_{kernel}", m, n, k, bias=False, nk=nk)


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("nk", [True, False], ids=["nk", "kn"])
def test_large_tiles(nk: bool, on: str) -> None:
    """As many tiles of 128 x 128 as a large GPU runs at once, and more of 64 x 64."""
    linear(on, "test.linear_tiles", 128 * 128 + 69, 131, 19, nk=nk)
    linear(on, "test.linear_tiles", 61, 64 * 260 + 3, 18, bias=False, nk=nk)


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("nk", [True, False], ids=["nk", "kn"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_nan_and_infinity(kernel: str, nk: bool, on: str) -> None:
    """A NaN in a row reaches exactly this row, one in a column this column; infinity times 0 is NaN."""
    for m, n, k in ((5, 9, 21), (18, 36, 20)):
        for place in (0, k - 1):
            x, w = random("f32", (m, k)), random("f32", (k, n))
            x[2, place], x[3, place], w[place, 4], w[place, 5] = np.nan, np.inf, 0.0, -np.inf
            with np.errstate(invalid="ignore"):
                want = x.astype(np.float64) @ w.astype(np.float64)
            assert np.isnan(want[2]).all()
            assert np.isnan(want[3, 4])
            assert np.isinf([want[3, 6], want[0, 5]]).all()
            case = Case()
            args = {
                "input": case.tensor("f32", x),
                "weight": case.tensor("f32", w.T.copy() if nk else w),
                "bias": None,
                "transposed": nk,
            }
            got = case.run(on, f"test.linear_{kernel}", args, "f32", (m, n))
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


# -- the operators of PyTorch

MATMUL = (
    ((7,), (7,), ()), ((20,), (20,), ()), ((5, 20), (20,), (5,)), ((20,), (20, 6), (6,)),
    ((3, 5, 20), (20,), (3, 5)), ((20,), (3, 20, 6), (3, 6)), ((2, 3, 4, 20), (20, 6), (2, 3, 4, 6)),
    ((4, 20), (2, 3, 20, 6), (2, 3, 4, 6)), ((2, 1, 4, 20), (3, 20, 6), (2, 3, 4, 6)),
    ((2, 1, 3, 1, 5, 20), (1, 4, 1, 2, 20, 3), (2, 4, 3, 2, 5, 3)), ((1, 16, 1), (1, 1, 9), (1, 16, 9)),
    ((2, 17, 20), (2, 20, 6), (2, 17, 6)), ((3, 2, 18, 24), (3, 1, 24, 8), (3, 2, 18, 8)),
    ((4, 1, 5), (4, 5, 1), (4, 1, 1)), ((6, 20), (20, 1), (6, 1)), ((3, 6, 20), (3, 20, 1), (3, 6, 1)),
    ((1, 1), (1, 1), (1, 1)), ((0, 5), (5, 3), (0, 3)), ((2, 0), (0, 3), (2, 3)),
    ((2, 4, 0), (2, 0, 20), (2, 4, 20)), ((0, 4, 3), (0, 3, 2), (0, 4, 2)), ((3, 4), (4, 0), (3, 0)),
    ((0,), (0,), ()),
)  # fmt: skip
"""(shape of A, shape of B, shape of the result)."""


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("kernel", ["routed", *KERNELS])
def test_matmul_shapes(kernel: str, on: str) -> None:
    for a_shape, b_shape, out_shape in MATMUL:
        if (0 in out_shape and kernel != "routed") or (0 in a_shape and kernel == "tiles"):
            continue  # the routing makes no dispatch of these, and none by tiles where K is 0
        a, b = random("f32", a_shape), random("f32", b_shape)
        case = Case()
        args = {"self": case.tensor("f32", a), "other": case.tensor("f32", b)}
        op = "aten.matmul.default" if kernel == "routed" else f"test.matmul_{kernel}"
        got = case.run(on, op, args, "f32", out_shape)
        close(got, np.matmul(a.astype(np.float64), b.astype(np.float64)), np.matmul(np.abs(a), np.abs(b)), "f32")


PLAIN = (
    ("aten.mm.default", "self", "mat2", (5, 20), (20, 7)),
    ("aten.mm.default", "self", "mat2", (20, 20), (20, 33)),
    ("aten.bmm.default", "self", "mat2", (3, 5, 20), (3, 20, 7)),
    ("aten.bmm.default", "self", "mat2", (4, 19, 21), (4, 21, 8)),
    ("aten.mv.default", "self", "vec", (50, 20), (20,)),
    ("aten.dot.default", "self", "tensor", (33,), (33,)),
)


@pytest.mark.parametrize("on", DEVICES)
def test_plain_products(on: str) -> None:
    for op, a_name, b_name, a_shape, b_shape in PLAIN:
        a, b = random("f32", a_shape), random("f32", b_shape)
        want = np.matmul(a.astype(np.float64), b)
        case = Case()
        got = case.run(on, op, {a_name: case.tensor("f32", a), b_name: case.tensor("f32", b)}, "f32", want.shape)
        close(got, want, np.matmul(np.abs(a), np.abs(b)), "f32")


SUMS = (
    *(
        ("aten.addmm.default", "mat1", "mat2", (5, 20), (20, 7), shape)
        for shape in ((), (1,), (7,), (1, 7), (5, 1), (5, 7))
    ),
    *(("aten.addmm.default", "mat1", "mat2", (19, 20), (20, 8), shape) for shape in ((8,), (19, 1), (19, 8))),
    *(("aten.addmm.default", "mat1", "mat2", (19, 20), (20, 1), shape) for shape in ((1,), (19, 1), (1, 1))),
    *(("aten.addmm.default", "mat1", "mat2", (5, 3), (3, 7), shape) for shape in ((7,), (5, 1))),
    *(
        ("aten.baddbmm.default", "batch1", "batch2", (3, 5, 20), (3, 20, 7), shape)
        for shape in ((), (7,), (5, 1), (3, 1, 7), (3, 5, 7))
    ),
    *(
        ("aten.baddbmm.default", "batch1", "batch2", (3, 18, 20), (3, 20, 4), shape)
        for shape in ((3, 1, 1), (1, 18, 4))
    ),
    *(("aten.addmv.default", "mat", "vec", (18, 20), (20,), shape) for shape in ((), (1,), (18,))),
)


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize(("alpha", "beta"), [(1, 1), (0.5, -2.0)])
def test_sums(alpha: float, beta: float, on: str) -> None:
    for op, a_name, b_name, a_shape, b_shape, bias_shape in SUMS:
        a, b, c = random("f32", a_shape), random("f32", b_shape), random("f32", bias_shape)
        want = alpha * np.matmul(a.astype(np.float64), b) + beta * c
        case = Case()
        refs = {"self": case.tensor("f32", c), a_name: case.tensor("f32", a), b_name: case.tensor("f32", b)}
        got = case.run(on, op, {**refs, "alpha": alpha, "beta": beta}, "f32", want.shape)
        close(got, want, np.matmul(np.abs(a), np.abs(b)) + 2 * np.abs(c), "f32")


@pytest.mark.parametrize("on", DEVICES)
def test_beta_zero_ignores_self(on: str) -> None:
    for m in (2, 20):
        a, b, c = random("f32", (m, 20)), random("f32", (20, 6)), np.full((m, 6), np.nan, np.float32)
        case = Case()
        args = {
            "self": case.tensor("f32", c),
            "mat1": case.tensor("f32", a),
            "mat2": case.tensor("f32", b),
            "alpha": 1,
            "beta": 0,
        }
        got = case.run(on, "aten.addmm.default", args, "f32", (m, 6))
        close(got, a.astype(np.float64) @ b, np.abs(a) @ np.abs(b), "f32")


@pytest.mark.parametrize("on", DEVICES)
def test_linear_ranks(on: str) -> None:
    """Inputs of rank 1 to 4, a vector as the weight, rows that only together pass the matrix-vector limit."""
    for x_shape, w_shape, bias_shape in (
        ((20,), (6, 20), (6,)),
        ((3, 20), (6, 20), None),
        ((2, 3, 20), (6, 20), (6,)),
        ((4, 3, 2, 20), (8, 20), (8,)),
        ((2, 3, 20), (20,), ()),
        ((2, 3, 20), (20,), None),
        ((20,), (20,), None),
        ((0, 20), (3, 20), (3,)),
        ((3, 0), (2, 0), (2,)),
    ):
        x, w = random("f32", x_shape), random("f32", w_shape)
        want, scale = x.astype(np.float64) @ w.T, np.abs(x) @ np.abs(w.T)
        case = Case()
        args: dict[str, Any] = {"input": case.tensor("f32", x), "weight": case.tensor("f32", w), "bias": None}
        if bias_shape is not None:
            c = random("f32", bias_shape)
            args["bias"] = case.tensor("f32", c)
            want, scale = want + c, scale + np.abs(c)
        close(case.run(on, "aten.linear.default", args, "f32", want.shape), want, scale, "f32")


# -- dynamic sizes, limits, refusals


@pytest.mark.parametrize("on", DEVICES)
def test_dynamic_rows(on: str) -> None:
    """Rows that grow, shrink and grow again, through every kernel, with buffers that hold older results."""
    s = Sym("input_dim", (0, 1))
    b = GraphBuilder()
    w, v = random("f32", (40, 20)), random("f32", (40, 8))
    x = b.input("f32", (1, s, 20))
    wide = b.node(
        "aten.linear.default",
        {"input": x, "weight": b.stored("constant", "f32", w, "w"), "bias": None},
        ("f32", (1, s, 40)),
    )
    out = b.node(
        "aten.matmul.default", {"self": wide, "other": b.stored("constant", "f32", v, "v")}, ("f32", (1, s, 8))
    )
    delegate = b.load(b.graph(out), device(on))
    try:
        for rows in (3, 1, 33, 2, 70, 1, 17, 0, 70):
            data = random("f32", (1, rows, 20))
            ((_, got),) = delegate.execute([("f32", data)])
            middle = data.astype(np.float64) @ w.T
            scale = np.abs(data) @ np.abs(w.T) @ np.abs(v)
            close(np.asarray(got), middle @ v, scale, "f32")
    finally:
        delegate.close()


@pytest.mark.parametrize("on", DEVICES)
def test_dynamic_inner_size(on: str) -> None:
    """Attention's shape: K and N follow the sequence, alignment and kernel with them; long steps leave NaN."""
    s = Sym("input_dim", (0, 1))
    b = GraphBuilder()
    x = b.input("f32", (2, s, 12))
    y = b.input("f32", (2, 12, s))
    scores = b.node("aten.bmm.default", {"self": x, "mat2": y}, ("f32", (2, s, s)))
    out = b.node("aten.bmm.default", {"self": scores, "mat2": x}, ("f32", (2, s, 12)))
    delegate = b.load(b.graph(out), device(on))
    try:
        for size in (5, 36, 1, 7, 37, 0, 20, 3):
            left, right = random("f32", (2, size, 12)), random("f32", (2, 12, size))
            if size == 36:
                left[:] = np.nan
            ((_, got),) = delegate.execute([("f32", left), ("f32", right)])
            if size != 36:
                want = left.astype(np.float64) @ right @ left
                close(np.asarray(got), want, np.abs(left) @ np.abs(right) @ np.abs(left), "f32")
    finally:
        delegate.close()


MANY = (
    ("naive", "full", (2100, 1), (1, 2003)),
    ("gemv", "default-limits", (65539, 1, 17), (65539, 17, 1)),
    ("gemv", "full", (65539, 1, 1), (65539, 1, 2)),
)


@pytest.mark.parametrize(("kernel", "on", "a_shape", "b_shape"), MANY, ids=["naive", "gemv-nk", "gemv-kn"])
def test_more_workgroups_than_a_dimension_holds(
    kernel: str, on: str, a_shape: tuple[int, ...], b_shape: tuple[int, ...]
) -> None:
    a, b = random("f32", a_shape), random("f32", b_shape)
    c = random("f32", (*a_shape[:-2], 1, 1))
    case = Case()
    args = {"self": case.tensor("f32", c), "batch1": case.tensor("f32", a), "batch2": case.tensor("f32", b)}
    want = np.matmul(a.astype(np.float64), b) + c
    got = case.run(on, f"test.baddbmm_{kernel}", args, "f32", want.shape)
    close(got, want, np.matmul(np.abs(a), np.abs(b)) + np.abs(c), "f32")


def test_routing_by_size() -> None:
    """Few rows read the weight by gemv, many go through tiles; a batch over one weight is one tall product."""

    def kernels(
        a_shape: tuple[Any, ...], b_shape: tuple[Any, ...], op: str, names: tuple[str, str], on: str = "full"
    ) -> list[tuple[str, Any]]:
        b = GraphBuilder()
        refs = [b.input("f32", a_shape), b.input("f32", b_shape)]
        n = b_shape[0] if op == "aten.linear.default" else b_shape[-1]
        out = b.node(op, dict(zip(names, refs, strict=True)), ("f32", (*a_shape[:-1], n)))
        graph = b.graph(out)
        found = find(op)
        assert found is not None
        ctx = Lowering(graph, device(on).limits, lambda s: 0)
        return [(d.kernel, d.params.get("m")) for d in found.lower(ctx, graph.nodes[0])]

    names = ("input", "weight")
    assert kernels((1, 1, 256), (512, 256), "aten.linear.default", names) == [("gemv_stream", 1)]
    assert kernels((2, 4, 20), (512, 20), "aten.linear.default", names) == [("gemv_stream", 8)]
    assert kernels((1, 1, 256), (512, 256), "aten.linear.default", names, "default-limits") == [("gemv_nk", 1)]
    assert kernels((1, 16, 256), (512, 256), "aten.linear.default", names) == [("gemv_stream", 16)]
    assert kernels((1, 17, 256), (512, 256), "aten.linear.default", names) == [("gemm", 17), ("gemm_merge", None)]
    assert kernels((1, 9, 256), (512, 256), "aten.linear.default", names, "default-limits")[0] == ("gemm", 9)
    assert kernels((1, 1, 254), (512, 254), "aten.linear.default", names) == [("gemv_nk", 1)]
    assert kernels((1, 512, 256), (512, 256), "aten.linear.default", names) == [("gemm", 512), ("gemm_merge", None)]
    assert kernels((4, 100, 256), (512, 256), "aten.linear.default", names) == [("gemm", 400), ("gemm_merge", None)]
    assert kernels((2, 4, 256), (256, 512), "aten.matmul.default", ("self", "other")) == [("gemv_kn", 8)]
    assert kernels((16, 1), (1, 512), "aten.mm.default", ("self", "mat2")) == [("matmul_naive", 16)]


REFUSED = (
    ("aten.mm.default", {"self": ("i64", (2, 3)), "mat2": ("i64", (3, 4))}, "dtype i64"),
    ("aten.mm.default", {"self": ("f32", (2, 3)), "mat2": ("f32", (4, 4))}, "do not multiply"),
    ("aten.mm.default", {"self": ("f32", ()), "mat2": ("f32", (4, 4))}, "scalar"),
    ("aten.matmul.default", {"self": ("f32", (1, 1, 1, 1, 1, 2, 3)), "other": ("f32", (3, 4))}, "rank 7"),
    (
        "aten.addmm.default",
        {"self": ("f32", (3,)), "mat1": ("f32", (2, 3)), "mat2": ("f32", (3, 4))},
        "does not broadcast",
    ),
    ("aten.linear.default", {"input": ("f32", (2, 3)), "weight": ("i8", (4, 3))}, "dtype i8"),
)


@pytest.mark.parametrize(("op", "args", "reason"), REFUSED, ids=[r[2] for r in REFUSED])
def test_refuses(op: str, args: dict[str, tuple[str, tuple[int, ...]]], reason: str) -> None:
    b = GraphBuilder()
    refs = {name: b.input(dtype, shape) for name, (dtype, shape) in args.items()}
    graph: Graph = b.graph(b.node(op, refs, ("f32", (2, 4))))
    assert reason in str(check_node(graph, graph.nodes[0]))


def test_refuses_symbolic_factor() -> None:
    b = GraphBuilder()
    refs = {"self": b.input("f32", (4,)), "mat1": b.input("f32", (2, 3)), "mat2": b.input("f32", (3, 4))}
    alpha = make_dim("add", Sym("input_dim", (0, 0)), 1)
    graph = b.graph(b.node("aten.addmm.default", {**refs, "alpha": alpha, "beta": 1}, ("f32", (2, 4))))
    assert "alpha" in str(check_node(graph, graph.nodes[0]))


def test_sizes_that_are_symbols_are_believed() -> None:
    s = Sym("input_dim", (0, 1))
    b = GraphBuilder()
    refs = {"self": b.input("f32", (2, s)), "mat2": b.input("f32", (8, 4))}
    graph = b.graph(b.node("aten.mm.default", refs, ("f32", (2, 4))))
    assert check_node(graph, graph.nodes[0]) is None


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize(
    ("m", "k", "n", "kind"), [(1, 1, 1, "i8"), (7, 33, 5, "u8"), (3, 300, 130, "i8"), (4, 0, 3, "i8")]
)
def test_products_of_bytes_are_exact(m: int, k: int, n: int, kind: str, on: str) -> None:
    dtype = {"i8": np.int8, "u8": np.uint8}[kind]
    span = np.iinfo(dtype)
    x = rng.integers(span.min, span.max + 1, (m, k)).astype(dtype)
    y = rng.integers(-128, 128, (k, n)).astype(np.int8)
    x[:, ::3] = span.max
    y[::3] = -128
    b = GraphBuilder()
    args = {"self": b.input(kind, x.shape), "mat2": b.input("i8", y.shape)}
    graph = b.graph(b.node("aten._int_mm.default", args, ("i32", (m, n))))
    assert check_node(graph, graph.nodes[0]) is None
    [got] = run(b, graph, device(on), x, y)
    np.testing.assert_array_equal(got, x.astype(np.int64) @ y.astype(np.int64))


def test_products_of_other_integers_are_refused() -> None:
    for kind, shape, out, message in (
        ("i32", (4, 5), "i32", "int8 or uint8"), ("i8", (3, 5), "i32", "do not multiply"),
        ("i8", (4, 5), "f32", "matrix of int32"),
    ):  # fmt: skip
        b = GraphBuilder()
        args = {"self": b.input("i8", (2, 4)), "mat2": b.input(kind, shape)}
        graph = b.graph(b.node("aten._int_mm.default", args, (out, (2, 5))))
        assert message in (check_node(graph, graph.nodes[0]) or "")
