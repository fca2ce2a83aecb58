"""Rotary embedding against float64 formulas written as the models write them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from executorch_webgpu.backend.graph import Sym, make_dim
from executorch_webgpu.ops.base import Lowering, check_node, find
from executorch_webgpu.runtime.errors import InputError
from executorch_webgpu.runtime.gpu.host import bf16_to_f32, f32_to_bf16
from tests.harness import DEVICES, GraphBuilder, device, run

Array = np.ndarray[Any, Any]
TOLERANCE = {"f32": 1e-6, "f16": 1e-3, "bf16": 8e-3}
rng = np.random.default_rng(3)


def random(dtype: str, shape: Sequence[int]) -> Array:
    """Values that `dtype` holds exactly, as float32."""
    values = rng.standard_normal(tuple(shape)).astype(np.float32)
    if dtype == "f16":
        return values.astype(np.float16).astype(np.float32)
    return bf16_to_f32(f32_to_bf16(values)) if dtype == "bf16" else values


def reference(x: Array, cos: Array, sin: Array, rot: int, layout: str, interleaved: bool) -> Array:
    """The rotated x; cos and sin [S, W] are the rows of the positions."""
    wide = x.astype(np.float64)
    body, rest = wide[..., :rot], wide[..., rot:]
    c, s = cos.astype(np.float64), sin.astype(np.float64)
    where = (slice(None), None) if layout == "bshd" else (None, slice(None))
    c, s = c[where], s[where]
    if interleaved:
        pairs = body.reshape(*body.shape[:-1], rot // 2, 2)
        real, imaginary = pairs[..., 0], pairs[..., 1]
        turned = np.stack([real * c - imaginary * s, real * s + imaginary * c], -1).reshape(body.shape)
    else:
        if c.shape[-1] != rot:
            c, s = np.concatenate([c, c], -1), np.concatenate([s, s], -1)
        rotated_half = np.concatenate([-body[..., rot // 2 :], body[..., : rot // 2]], -1)
        turned = body * c + rotated_half * s
    return np.concatenate([turned, rest], -1)


def close(got: Array, want: Array, dtype: str, scale: float) -> None:
    np.testing.assert_allclose(got.astype(np.float64), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * scale)


# (batch, positions, heads, head size, rotary elements, table rows, first row)
SIZES = (
    (1, 1, 1, 2, 2, 1, 0), (1, 1, 4, 32, 32, 64, 63), (1, 5, 3, 8, 8, 9, 4), (2, 3, 4, 16, 16, 3, 0),
    (1, 7, 2, 12, 8, 20, 2), (2, 2, 3, 7, 6, 5, 1), (1, 4, 2, 6, 2, 4, 0), (3, 33, 5, 10, 10, 40, 7),
)  # fmt: skip


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("style", ["interleaved", "half", "half-full-table"])
def test_sizes(style: str, layout: str, on: str) -> None:
    for batch, positions, heads, size, rot, rows, start in SIZES:
        shape = (batch, positions, heads, size) if layout == "bshd" else (batch, heads, positions, size)
        width = rot if style == "half-full-table" else rot // 2
        x, cos, sin = random("f32", shape), random("f32", (rows, width)), random("f32", (rows, width))
        b = GraphBuilder()
        args: dict[str, Any] = {
            "input": b.input("f32", shape),
            "cos": b.input("f32", cos.shape),
            "sin": b.input("f32", sin.shape),
            "start": start,
            "rot": rot,
            "layout": layout,
            "interleaved": style == "interleaved",
        }
        graph = b.graph(b.node("webgpu.rope", args, ("f32", shape)))
        assert check_node(graph, graph.nodes[0]) is None
        (got,) = run(b, graph, device(on), x, cos, sin)
        want = reference(
            x, cos[start : start + positions], sin[start : start + positions], rot, layout, style == "interleaved"
        )
        close(got, want, "f32", 4.0)
        assert np.array_equal(got[..., rot:], x[..., rot:])


@pytest.mark.parametrize("on", DEVICES)
def test_dtypes(on: str) -> None:
    """(input, table, result), sliced tables of several ranks."""
    for mix, table_shape in (
        ("f16 f32 f16", (5, 4)),
        ("f16 f16 f16", (1, 5, 4)),
        ("f16 f32 f32", (1, 5, 1, 4)),
        ("bf16 f32 bf16", (1, 1, 5, 4)),
        ("f32 f16 f32", (5, 1, 4)),
        ("bf16 bf16 f32", (5, 4)),
    ):
        x_type, table_type, out_type = mix.split()
        shape = (2, 5, 3, 8)
        x, cos, sin = random(x_type, shape), random(table_type, table_shape), random(table_type, table_shape)
        b = GraphBuilder()

        def stored(name: str, dtype: str, array: Array, b: GraphBuilder = b) -> Any:
            bits = f32_to_bf16(array) if dtype == "bf16" else array.astype(np.float16) if dtype == "f16" else array
            return b.stored("constant", dtype, bits, name)

        args: dict[str, Any] = {
            "input": stored("x", x_type, x),
            "cos": stored("cos", table_type, cos),
            "sin": stored("sin", table_type, sin),
            "layout": "bshd",
            "interleaved": True,
        }
        graph = b.graph(b.node("webgpu.rope", args, (out_type, shape)))
        assert check_node(graph, graph.nodes[0]) is None
        (got,) = run(b, graph, device(on))
        close(np.asarray(got), reference(x, cos.reshape(5, 4), sin.reshape(5, 4), 8, "bshd", True), out_type, 4.0)


@pytest.mark.parametrize("on", DEVICES)
def test_nan_and_infinity(on: str) -> None:
    """A bad number reaches its pair and nothing else."""
    x, table = random("f32", (1, 2, 2, 8)), np.ones((2, 4), np.float32)
    x[0, 0, 1, 2], x[0, 1, 0, 5] = np.nan, np.inf
    for interleaved, bad in (
        (True, {(0, 0, 1, 2), (0, 0, 1, 3), (0, 1, 0, 4), (0, 1, 0, 5)}),
        (False, {(0, 0, 1, 2), (0, 0, 1, 6), (0, 1, 0, 1), (0, 1, 0, 5)}),
    ):
        b = GraphBuilder()
        args: dict[str, Any] = {
            "input": b.input("f32", x.shape),
            "cos": b.input("f32", (2, 4)),
            "sin": b.input("f32", (2, 4)),
            "start": 0,
            "layout": "bshd",
            "interleaved": interleaved,
        }
        (got,) = run(b, b.graph(b.node("webgpu.rope", args, ("f32", x.shape))), device(on), x, table, table)
        assert {tuple(map(int, p)) for p in np.argwhere(~np.isfinite(got))} == bad
        np.testing.assert_allclose(got, reference(x, table, table, 8, "bshd", interleaved), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("on", DEVICES)
def test_moving_start_and_length(on: str) -> None:
    """The first row comes from an input; plans depend on the length alone, rows outside the table are refused."""
    s, start = Sym("input_dim", (0, 1)), Sym("scalar", (1, 0))
    b = GraphBuilder()
    cos, sin = random("f32", (16, 8)), random("f32", (16, 8))
    x = b.input("f32", (1, s, 2, 8))
    b.input("i64", (1,))
    args: dict[str, Any] = {
        "input": x,
        "cos": b.stored("constant", "f32", cos, "cos"),
        "sin": b.stored("constant", "f32", sin, "sin"),
        "start": start,
        "layout": "bshd",
        "interleaved": False,
        "rot": 8,
    }
    delegate = b.load(b.graph(b.node("webgpu.rope", args, ("f32", (1, s, 2, 8)))), device(on))

    def step(rows: int, first: int) -> tuple[Array, Array]:
        data = random("f32", (1, rows, 2, 8))
        ((_, got),) = delegate.execute([("f32", data), ("i64", np.array([first]))])
        return np.asarray(got), reference(data, cos[first : first + rows], sin[first : first + rows], 8, "bshd", False)

    try:
        for rows, first in ((3, 0), (1, 3), (1, 4), (1, 15), (16, 0), (2, 5), (0, 0), (5, 11)):
            got, want = step(rows, first)
            close(got, want, "f32", 4.0)
        assert len(delegate._plans) == 6  # lengths 3, 1, 16, 2, 0 and 5
        for rows, first in ((1, 16), (2, 15), (1, -1)):
            with pytest.raises(InputError, match="rotary table"):
                step(rows, first)
        got, want = step(1, 2)
        close(got, want, "f32", 4.0)
    finally:
        delegate.close()


def test_more_workgroups_than_a_dimension_holds() -> None:
    positions = 64 * 65536 + 3
    x, table = random("f32", (1, 4099, 1, 2)).repeat(1024, axis=1)[:, :positions], random("f32", (1, 1))
    positions = x.shape[1]
    rows = np.repeat(table, positions, axis=0)
    b = GraphBuilder()
    args: dict[str, Any] = {
        "input": b.input("f32", x.shape),
        "cos": b.input("f32", rows.shape),
        "sin": b.input("f32", rows.shape),
        "start": 0,
        "layout": "bshd",
        "interleaved": True,
    }
    graph = b.graph(b.node("webgpu.rope", args, ("f32", x.shape)))
    (got,) = run(b, graph, device("full"), np.ascontiguousarray(x), rows, rows)
    found = find("webgpu.rope")
    assert found is not None
    (dispatch,) = found.lower(Lowering(graph, device("full").limits, lambda s: 0), graph.nodes[0])
    assert dispatch.grid[1] > 1
    c = float(table[0, 0])
    want = np.stack([x[..., 0] * c - x[..., 1] * c, x[..., 0] * c + x[..., 1] * c], -1)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


REFUSED: tuple[tuple[dict[str, Any], str], ...] = (
    ({"rot": 3}, "3 rotary elements"),
    ({"rot": 10}, "10 rotary elements of 8"),
    ({"layout": "sbhd"}, "layout"),
    ({"cos": ("f32", (5, 3))}, "columns"),
    ({"cos": ("f32", (2, 5, 4))}, "between batch rows"),
    ({"cos": ("f32", (6, 4))}, "differ in shape"),
    ({"cos": ("f32", (5, 8)), "sin": ("f32", (5, 8)), "interleaved": True}, "columns"),
    ({"input": ("i32", (1, 5, 2, 8))}, "dtype i32"),
    ({"input": ("f32", (5, 2, 8))}, "rank 4"),
    ({"start": 1.5}, "start"),
)


@pytest.mark.parametrize(("change", "reason"), REFUSED, ids=[r[1] for r in REFUSED])
def test_refuses(change: dict[str, Any], reason: str) -> None:
    b = GraphBuilder()
    args: dict[str, Any] = {
        "input": ("f32", (1, 5, 2, 8)),
        "cos": ("f32", (5, 4)),
        "sin": ("f32", (5, 4)),
        "start": 0,
        "layout": "bshd",
        "interleaved": False,
    }
    args = {k: b.input(*v) if isinstance(v, tuple) else v for k, v in {**args, **change}.items()}
    graph = b.graph(b.node("webgpu.rope", args, ("f32", (1, 5, 2, 8))))
    assert reason in str(check_node(graph, graph.nodes[0]))


def test_start_may_be_an_expression() -> None:
    b = GraphBuilder()
    x = b.input("f32", (1, 2, 1, 4))
    b.input("i64", (2,))
    start = make_dim("sub", Sym("scalar", (1, 1)), Sym("scalar", (1, 0)))
    table = random("f32", (4, 2))
    args: dict[str, Any] = {
        "input": x,
        "cos": b.stored("constant", "f32", table, "c"),
        "sin": b.stored("constant", "f32", table, "s"),
        "start": start,
        "layout": "bshd",
        "interleaved": False,
    }
    data = random("f32", (1, 2, 1, 4))
    (got,) = run(b, b.graph(b.node("webgpu.rope", args, ("f32", (1, 2, 1, 4)))), device("full"), data, np.array([3, 5]))
    close(got, reference(data, table[2:], table[2:], 4, "bshd", False), "f32", 4.0)
