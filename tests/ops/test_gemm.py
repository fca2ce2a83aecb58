"""The register-tiled product against float64: every cut by force, its choice, and `gemm` on projections."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from executorch_webgpu.backend.graph import Node, Ref, Sym
from executorch_webgpu.ops.base import Dispatch, Limits, Lowering, register
from executorch_webgpu.ops.gemm import LARGE, Choice, Problem, choose, gemm, multiply, takes
from executorch_webgpu.ops.gemv_stream import Projection, Tensor
from executorch_webgpu.ops.packed import Format
from tests.harness import DEVICES, GraphBuilder, device, run

Array = np.ndarray[Any, Any]
rng = np.random.default_rng(11)

CUTS = {
    "128x128": LARGE,
    "64x64": Choice(8, 8, 2, 2),
    "32x64": Choice(8, 8, 1, 2),
    "64x32": Choice(8, 8, 2, 1),
    "32x32": Choice(8, 8, 1, 1),
    **{f"{rows * 32}x{columns * 32}x32": Choice(8, 8, rows, columns, quads=8) for rows in (1, 2) for columns in (1, 2)},
}
"""Every cut that `choose` takes, without splits."""

forced: Choice | None = None
kernels: list[str] = []
most_workgroups = 0


def _tensor(ctx: Lowering, arg: Any) -> Tensor | None:
    return Tensor(arg.value, ctx.wgsl_type(arg)) if isinstance(arg, Ref) else None


def _needed(ctx: Lowering, arg: Any) -> Tensor:
    found = _tensor(ctx, arg)
    assert found is not None
    return found


def _lower(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
    """x [M, K] times w [N, K] or [K, N]; `up` makes it gated. The cut and the limit on a grid are the test's."""
    args, out = node.args, ctx.out(node)
    m, k = ctx.shape(args["x"])
    nk = bool(args["nk"])
    n = ctx.shape(args["w"])[0 if nk else 1]
    weights = tuple(_needed(ctx, args[name]) for name in ("w", "up") if args.get(name) is not None)
    problem = Problem(
        _needed(ctx, args["x"]), weights, _needed(ctx, out), m, n, k, nk, len(weights) > 1,
        bias=_tensor(ctx, args.get("bias")), residual=_tensor(ctx, args.get("residual")),
    )  # fmt: skip
    if most_workgroups:
        ctx.limits = replace(ctx.limits, max_workgroups=most_workgroups)
    for dispatch in multiply(ctx, problem, forced):
        kernels.append(dispatch.kernel)
        assert dispatch.grid[0] <= ctx.limits.max_workgroups
        yield dispatch


register("test.gemm", supports=lambda graph, node: None, lower=_lower)


def values(dtype: str, shape: Sequence[int]) -> Array:
    """Values that `dtype` holds exactly."""
    return rng.standard_normal(tuple(shape)).astype(np.float16 if dtype == "f16" else np.float32)


@dataclass(frozen=True)
class Case:
    m: int
    n: int
    k: int
    types: str = "f32 f32 f32"
    """Of x, weights, result."""
    nk: bool = True
    bias: bool = False
    residual: bool = False
    gated: bool = False


def check(on: str, case: Case, choice: Choice | None) -> None:
    """One product against float64; the error is below 3e-6 (1e-3 for halves) of the magnitudes that went in."""
    global forced
    forced = choice
    kernels.clear()
    x_type, w_type, out_type = case.types.split()
    b = GraphBuilder()
    x, w = values(x_type, (case.m, case.k)), values(w_type, (case.n, case.k))
    arrays = {"x": x, "w": w if case.nk else np.ascontiguousarray(w.T)}
    if case.gated:
        arrays["up"] = values(w_type, w.shape)
    if case.bias:
        arrays["bias"] = values("f32", (case.n,))
    if case.residual:
        arrays["residual"] = values(out_type, (case.m, case.n))
    args: dict[str, Any] = {"nk": case.nk}
    for name, array in arrays.items():
        args[name] = b.input("f16" if array.dtype == np.float16 else "f32", array.shape)
    out = b.node("test.gemm", args, (out_type, (case.m, case.n)))
    (got,) = run(b, b.graph(out), device(on), *arrays.values())
    exact = {name: array.astype(np.float64) for name, array in arrays.items()}
    want = exact["x"] @ w.astype(np.float64).T
    scale = np.abs(exact["x"]) @ np.abs(w.astype(np.float64)).T
    if case.gated:
        up, more = exact["x"] @ exact["up"].T, np.abs(exact["x"]) @ np.abs(exact["up"]).T
        scale = scale * (1 + np.abs(up)) + more * (1 + np.abs(want))
        want = want / (1 + np.exp(-want)) * up
    want = want + exact.get("bias", 0.0) + exact.get("residual", 0.0)
    limit = (1e-3 if out_type == "f16" else 3e-6) * (scale + np.abs(want) + 1)
    assert got.shape == want.shape
    assert np.all(np.abs(got - want) <= limit), (case, choice, float(np.abs(got - want).max()))
    assert kernels[0] == "gemm"


SIZES = (
    Case(130, 132, 48, "f32 f16 f32", residual=True), Case(33, 31, 1),
    Case(65, 67, 33, bias=True, residual=True), Case(66, 71, 17, nk=False, bias=True),
    Case(31, 72, 32, "f16 f16 f16", nk=False, residual=True),
)  # fmt: skip
TYPES = (
    Case(1, 1, 7), Case(127, 129, 36, nk=False), Case(66, 33, 21, "f16 f16 f32", residual=True),
    Case(20, 34, 19, "f32 f16 f16", nk=False, bias=True), Case(67, 136, 64, "f16 f32 f32", nk=False),
)  # fmt: skip


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("cut", CUTS)
def test_cuts(cut: str, on: str) -> None:
    """Odd sizes, one column of K, tile edges, both layouts, types, addends; each workgroup within default limits."""
    assert CUTS[cut].memory <= Limits().max_workgroup_memory
    assert CUTS[cut].invocations <= Limits().max_invocations
    for case in SIZES:
        check(on, case, CUTS[cut])
    assert kernels == ["gemm"]


@pytest.mark.parametrize("on", DEVICES)
def test_types(on: str) -> None:
    """Mixes of types with and without whole vectors."""
    for case in TYPES:
        check(on, case, CUTS["32x32"])


@pytest.mark.parametrize("on", DEVICES)
def test_unrolled(on: str) -> None:
    for cut in ("128x128", "64x64"):
        check(on, Case(130, 68, 52, "f32 f16 f32", bias=True), replace(CUTS[cut], unrolled=True))


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("cut", ["64x64", "32x64"])
def test_gated(cut: str, on: str) -> None:
    for case in (Case(70, 76, 36, "f32 f16 f32"), Case(33, 33, 15), Case(64, 64, 32, residual=True)):
        check(on, replace(case, gated=True), CUTS[cut])


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("cut", ["64x64", "32x32"])
def test_splits(cut: str, on: str) -> None:
    """Ranges of K of equal and unequal length, more splits than steps of K, addends after the merge."""
    for splits, case in (
        (2, Case(66, 68, 64, "f32 f16 f32", bias=True)),
        (3, Case(40, 132, 112, residual=True)),
        (5, Case(9, 36, 70, "f16 f16 f16", bias=True, residual=True)),
    ):
        check(on, case, replace(CUTS[cut], splits=splits))
        assert kernels == ["gemm", "gemm_merge"]
    check(on, Case(20, 20, 16), replace(CUTS[cut], splits=9))
    assert kernels == ["gemm"]


@pytest.mark.parametrize("on", DEVICES)
def test_rows(on: str) -> None:
    """All numbers of rows around the edges of tiles, as the routing cuts them."""
    for m in (9, 16, 17, 31, 32, 33, 48, 63, 64, 65, 100, 127, 128, 129, 130):
        check(on, Case(m, 44, 260, "f32 f16 f32", bias=True), None)


@pytest.mark.parametrize("on", DEVICES)
def test_grids_fold(on: str) -> None:
    """More workgroups than one dimension of a grid holds."""
    global most_workgroups
    most_workgroups = 3
    try:
        check(on, Case(70, 130, 20, bias=True), CUTS["32x32"])
        check(on, Case(70, 68, 40, residual=True), replace(CUTS["32x64"], splits=2))
    finally:
        most_workgroups = 0


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("n", [33, 36])
def test_memory_beyond_the_operands_is_not_used(n: int, on: str) -> None:
    """Buffers that held a longer sequence, full of NaN, and partial sums of it."""
    global forced
    forced = replace(CUTS["32x64"], splits=2)
    s = Sym("input_dim", (0, 0))
    b = GraphBuilder()
    w = values("f32", (n, 37))
    args: dict[str, Any] = {"x": b.input("f32", (s, 37)), "w": b.stored("constant", "f32", w, "w"), "nk": True}
    delegate = b.load(b.graph(b.node("test.gemm", args, ("f32", (s, n)))), device(on))
    try:
        for rows in (80, 33, 80, 5, 31):
            x = values("f32", (rows, 37))
            if rows == 80:
                x[:] = np.nan
            ((_, got),) = delegate.execute([("f32", x)])
            if rows == 80:
                assert np.isnan(np.asarray(got)).all()
            else:
                np.testing.assert_allclose(np.asarray(got), x.astype(np.float64) @ w.T, rtol=1e-4, atol=1e-4)
    finally:
        delegate.close()


def problem(m: int, n: int, k: int, **more: Any) -> Problem:
    return Problem(Tensor(0, "f32"), (Tensor(1, "f16"),), Tensor(2, "f32"), m, n, k, **more)


@pytest.mark.parametrize(
    "limits", [Limits(), Limits(f16=True, max_invocations=1024, max_workgroup_memory=49152, subgroup_size=32)]
)
def test_choice(limits: Limits) -> None:
    """Large tiles where their rounds are full, small ones else; K is split until there are enough workgroups."""
    deep, long = Choice(8, 8, 2, 2, quads=8), Choice(8, 8, 2, 2, unrolled=True)
    large = replace(LARGE, unrolled=True)
    assert choose(limits, problem(2048, 2048, 8192)) == large
    assert choose(limits, problem(512, 8192, 2048)) == large
    assert choose(limits, problem(2048, 2048, 32)) == LARGE
    assert choose(limits, problem(2048, 3072, 2048)) == long
    # rows that only fill tiles up: 32 of 128, 48 of 128, 192 of 256; 500 of 512 are as many with small tiles
    assert choose(limits, problem(32, 128256, 2048)) == Choice(8, 8, 1, 2, unrolled=True, quads=8)
    assert choose(limits, problem(48, 128256, 2048)) == long
    assert choose(limits, problem(192, 65536, 2048)) == long
    assert choose(limits, problem(500, 8192, 2048)) == large
    assert choose(limits, problem(512, 2048, 2048)) == replace(long, splits=2)
    assert choose(limits, problem(512, 512, 2048)) == replace(long, splits=8)
    assert choose(limits, problem(512, 511, 2048)) == replace(long, quads=8)
    assert choose(limits, problem(512, 512, 2048, sizes=(1, 1, 1, 2))) == replace(long, quads=8)
    assert choose(limits, problem(64, 64, 200)) == deep
    assert choose(limits, problem(20, 2048, 2048)) == Choice(8, 8, 1, 2, 16, quads=8)
    assert choose(limits, problem(200, 20, 64)) == Choice(8, 8, 2, 1, quads=8)
    assert choose(limits, problem(20, 20, 16)) == Choice(8, 8, 1, 1)  # one step
    assert choose(limits, problem(64, 8192, 2048, gated=True)) == replace(long, quads=8)
    assert choose(limits, problem(128, 8192, 2048, gated=True)) == long
    packed = problem(20, 2048, 2048, format=Format(2048, 4, 32, "f16", zeros=False))
    assert choose(limits, packed) == Choice(8, 8, 1, 2, 16)
    assert choose(replace(limits, max_workgroup_memory=8192), problem(20, 2048, 2048)) == Choice(8, 8, 1, 2, 16)
    assert choose(replace(limits, max_workgroup_memory=8192), problem(2048, 2048, 8192)) == long
    room = choose(replace(limits, max_binding=3 << 20), problem(512, 512, 2048)).splits
    assert room == 3


def _project(ctx: Lowering, node: Node) -> Iterator[Dispatch]:
    args = node.args
    m, k = ctx.shape(args["x"])
    weights = args["weights"]
    assert isinstance(weights, tuple)
    found = Projection(
        _needed(ctx, args["x"]), m, k, tuple(_needed(ctx, w) for w in weights),
        tuple(ctx.shape(w)[0] for w in weights), tuple(Tensor(i, ctx.stored_as(i, "f32")) for i in node.outputs),
        gated=bool(args["gated"]), residual=_tensor(ctx, args.get("residual")),
    )  # fmt: skip
    assert takes(found)
    for dispatch in gemm(ctx, found):
        kernels.append(dispatch.kernel)
        yield dispatch


register("test.gemm_project", supports=lambda graph, node: None, lower=_project)


@pytest.mark.parametrize("on", DEVICES)
def test_projections(on: str) -> None:
    """Siblings are products of their own whose merges come last; gate and up are one; none without rows or columns."""
    for m, sizes, gated, expected in (
        (40, (36, 0, 8), False, ["gemm", "gemm", "gemm_merge", "gemm_merge"]),
        (12, (40,), False, ["gemm", "gemm_merge"]),
        (70, (33, 33), True, ["gemm"]),
        (0, (4, 4), False, []),
    ):
        kernels.clear()
        x, weights = values("f32", (m, 256)), [values("f16", (n, 256)) for n in sizes]
        b = GraphBuilder()
        refs = [b.input("f32", x.shape), *(b.input("f16", w.shape) for w in weights)]
        residual = None if len(sizes) > 1 and not gated else values("f32", (m, sizes[0]))
        args: dict[str, Any] = {"x": refs[0], "weights": tuple(refs[1:]), "gated": gated}
        arrays = [x, *weights]
        if residual is not None:
            args["residual"] = b.input("f32", residual.shape)
            arrays.append(residual)
        outs = b.node("test.gemm_project", args, *(("f32", (m, n)) for n in (sizes[:1] if gated else sizes)))
        got = run(b, b.graph(*(outs if isinstance(outs, tuple) else (outs,))), device(on), *arrays)
        sums = [x.astype(np.float64) @ w.astype(np.float64).T for w in weights]
        want = [sums[0] / (1 + np.exp(-sums[0])) * sums[1]] if gated else sums
        if residual is not None:
            want[0] = want[0] + residual
        assert kernels == expected
        for one, other in zip(got, want, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-3)


def test_what_projections_it_takes() -> None:
    plain = Projection(Tensor(0, "f32"), 9, 8, (Tensor(1, "f16"),), (8,), (Tensor(2, "f32"),))
    two = (Tensor(1, "f16"), Tensor(3, "f32"))
    assert takes(plain)
    assert not takes(replace(plain, eps=1e-5))
    assert not takes(replace(plain, k=0))
    assert not takes(replace(plain, weights=two, sizes=(8, 8)))
    gated = replace(plain, weights=two[:1] * 2, sizes=(8, 8), gated=True)
    assert takes(gated)
    assert not takes(replace(gated, bias=Tensor(4, "f32")))
