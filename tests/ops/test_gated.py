"""SwiGLU against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from executorch_webgpu.backend.graph import Sym
from executorch_webgpu.ops.base import check_node
from executorch_webgpu.runtime.gpu.host import bf16_to_f32, f32_to_bf16
from tests.harness import DEVICES, GraphBuilder, device, run

Array = np.ndarray[Any, Any]
TOLERANCE = {"f32": 1e-6, "f16": 1e-3, "bf16": 8e-3}
rng = np.random.default_rng(5)


def reference(gate: Array, up: Array) -> Array:
    wide = gate.astype(np.float64)
    with np.errstate(all="ignore"):
        return np.asarray(wide / (1 + np.exp(-wide)) * up)


@pytest.mark.parametrize("on", DEVICES)
def test_sizes(on: str) -> None:
    for shape in ((), (1,), (4,), (5,), (3, 7), (2, 3, 64), (1, 1, 257), (257, 4), (0, 3)):
        gate, up = (3 * rng.standard_normal(shape)).astype(np.float32), rng.standard_normal(shape).astype(np.float32)
        b = GraphBuilder()
        graph = b.graph(
            b.node("webgpu.swiglu", {"gate": b.input("f32", shape), "up": b.input("f32", shape)}, ("f32", shape))
        )
        assert check_node(graph, graph.nodes[0]) is None
        (got,) = run(b, graph, device(on), np.asarray(gate), np.asarray(up))
        np.testing.assert_allclose(got, reference(np.asarray(gate), np.asarray(up)), rtol=TOLERANCE["f32"])


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("size", [12, 13])
def test_dtypes(size: int, on: str) -> None:
    """(gate, up, result)."""
    for mix in ("f16 f16 f16", "f16 f32 f16", "bf16 bf16 bf16", "f32 f16 f32", "f16 f16 f32"):
        b = GraphBuilder()
        arrays, refs = [], []
        *operands, out_type = mix.split()
        for i, dtype in enumerate(operands):
            values = rng.standard_normal((3, size)).astype(np.float32)
            stored = f32_to_bf16(values) if dtype == "bf16" else values.astype(np.float16) if dtype == "f16" else values
            arrays.append(bf16_to_f32(stored) if dtype == "bf16" else stored.astype(np.float32))
            refs.append(b.stored("constant", dtype, stored, f"c{i}"))
        graph = b.graph(b.node("webgpu.swiglu", {"gate": refs[0], "up": refs[1]}, (out_type, (3, size))))
        assert check_node(graph, graph.nodes[0]) is None
        (got,) = run(b, graph, device(on))
        np.testing.assert_allclose(np.asarray(got, np.float64), reference(*arrays), rtol=TOLERANCE[out_type], atol=1e-7)


@pytest.mark.parametrize("on", DEVICES)
def test_extremes(on: str) -> None:
    """NaN and infinities as in PyTorch: silu(-inf) is NaN, silu of a large negative number is 0."""
    inf, nan = np.inf, np.nan
    gate = np.array([nan, 1, inf, inf, -inf, 0, 0, 100, -100, -1e30, 1e30, 2, -80], np.float32)
    up = np.array([1, nan, 1, 0, 1, inf, 5, 2, 2, 1, 1, -inf, 1], np.float32)
    for copies in (1, 4):  # scalars, vectors
        b = GraphBuilder()
        g, u = gate.repeat(copies), up.repeat(copies)
        graph = b.graph(
            b.node("webgpu.swiglu", {"gate": b.input("f32", g.shape), "up": b.input("f32", g.shape)}, ("f32", g.shape))
        )
        (got,) = run(b, graph, device(on), g, u)
        want = reference(gate, up)
        want[0], want[1], want[4], want[8] = nan, nan, nan, 0.0
        np.testing.assert_allclose(got, want.repeat(copies), rtol=4e-6, atol=1e-35)


@pytest.mark.parametrize("on", DEVICES)
def test_dynamic_size(on: str) -> None:
    s = Sym("input_dim", (0, 0))
    b = GraphBuilder()
    gate, up = b.input("f32", (s, 3)), b.input("f32", (s, 3))
    first = b.node("webgpu.swiglu", {"gate": gate, "up": up}, ("f32", (s, 3)))
    delegate = b.load(b.graph(b.node("webgpu.swiglu", {"gate": first, "up": up}, ("f32", (s, 3)))), device(on))
    try:
        for rows in (4, 1, 7, 0, 100, 2):
            x, y = rng.standard_normal((2, rows, 3)).astype(np.float32)
            ((_, got),) = delegate.execute([("f32", x), ("f32", y)])
            np.testing.assert_allclose(got, reference(reference(x, y), y), rtol=4e-6, atol=1e-7)
    finally:
        delegate.close()


def test_more_workgroups_than_a_dimension_holds() -> None:
    """An odd count, so scalars: as vec4 the operands would pass the 128 MiB that a binding holds by default."""
    count = 256 * 65536 + 257
    gate = np.resize(rng.standard_normal(8191).astype(np.float32), count)
    b = GraphBuilder()
    x = b.input("f32", (count,))
    (got,) = run(b, b.graph(b.node("webgpu.swiglu", {"gate": x, "up": x}, ("f32", (count,)))), device("full"), gate)
    np.testing.assert_allclose(got[::97], reference(gate[::97], gate[::97]), rtol=2e-6)
    np.testing.assert_allclose(got[-999:], reference(gate[-999:], gate[-999:]), rtol=2e-6)


def test_refuses() -> None:
    for gate, up, reason in (
        (("f32", (3,)), ("f32", (4,)), "differ in shape"),
        (("i32", (3,)), ("i32", (3,)), "dtype i32"),
    ):
        b = GraphBuilder()
        graph = b.graph(b.node("webgpu.swiglu", {"gate": b.input(*gate), "up": b.input(*up)}, ("f32", (3,))))
        assert reason in str(check_node(graph, graph.nodes[0]))
