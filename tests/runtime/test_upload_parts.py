"""Constants larger than what a device binds: tables and weights of linear layers in parts."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from executorch_webgpu.backend.graph import Graph, Ref, Sym, SymbolRange
from executorch_webgpu.backend.packing import pack_bf16
from executorch_webgpu.backend.passes.large import part_key, split_large, with_parts
from executorch_webgpu.ops.base import check_node
from executorch_webgpu.ops.packed import Format
from executorch_webgpu.runtime.errors import DeviceError, InputError, MissingDataError
from executorch_webgpu.runtime.gpu.device import OPTIONAL_FEATURES, Device
from executorch_webgpu.runtime.gpu.host import f32_to_bf16
from executorch_webgpu.runtime.methods.delegate import Delegate
from tests.harness import DEVICES, GraphBuilder, device, run
from tests.ops.quantized import quantized

LIMIT = 16384
"""Bytes that the small devices bind; their buffers hold twice as many."""
ROWS = Sym("input_dim", (0, 1))
TABLE = {"padding_idx": -1, "scale_grad_by_freq": False, "sparse": False}


@cache
def small(name: str) -> Device:
    """A test device that binds little."""
    like = device(name)
    limits = {
        "max-compute-invocations-per-workgroup": like.limits.max_invocations,
        "max-compute-workgroup-storage-size": like.limits.max_workgroup_memory,
        "max-storage-buffers-per-shader-stage": like.limits.max_storage_buffers,
        "max-storage-buffer-binding-size": LIMIT,
        "max-buffer-size": 2 * LIMIT,
    }
    found = Device(like.adapter, [f for f in OPTIONAL_FEATURES if f in like.features], limits)
    assert (found.limits.max_binding, found.limits.max_buffer) == (LIMIT, 2 * LIMIT)
    return found


def stored(kind: str, array: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """(as the file has it, its exact values) of numbers in a dtype."""
    if kind == "bf16":
        bits = f32_to_bf16(array)
        return bits, (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    made = array.astype({"f32": np.float32, "f16": np.float16}[kind])
    return made, made.astype(np.float64)


def matrix(rows: int, width: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)


def lookup(b: GraphBuilder, kind: str, weight: Ref, tokens: Ref, width: int) -> Ref:
    return b.node("aten.embedding.default", {"weight": weight, "indices": tokens, **TABLE}, (kind, (1, ROWS, width)))  # type: ignore[no-any-return]


def tied(kind: str, count: int, width: int) -> tuple[GraphBuilder, Graph, np.ndarray[Any, Any]]:
    """tokens i64[1, S] -> rows of a table, and their products with all of it."""
    b, (raw, exact) = GraphBuilder(), stored(kind, matrix(count, width))
    tokens = b.input("i64", (1, ROWS))
    weight = b.stored("constant", kind, raw, "table")
    x = lookup(b, kind, weight, tokens, width)
    args = {"input": x, "weight": weight, "bias": None}
    logits = b.node("aten.linear.default", args, (kind, (1, ROWS, count)))
    return b, b.graph(x, logits, symbols=(SymbolRange(ROWS, 1, 64),)), exact


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize(
    ("kind", "count", "width"),
    [("f32", 300, 64), ("f16", 611, 52), ("bf16", 257, 47), ("f32", 4096, 4), ("f32", 4093, 3)],
)
def test_a_tied_table_in_parts(name: str, kind: str, count: int, width: int) -> None:
    on = small(name)
    b, graph, exact = tied(kind, count, width)
    tokens = np.array([[count - 1, 0, count // 2, 1, count // 2 + 1][: LIMIT // (4 * count)]])  # results must fit
    tolerance = {"f32": 1e-5, "f16": 2e-3, "bf16": 8e-3}[kind]
    before = on.memory.by_purpose.get("weights", 0)
    delegate = b.load(graph, on)
    item = 2 if on.limits.wgsl_type(kind) == "f16" else 4
    assert 0 <= on.memory.by_purpose["weights"] - before - count * width * item < 16 * len(delegate.graph.values)
    assert sum(v.kind == "constant" for v in delegate.graph.values) == -(-count // (LIMIT // (width * item)))
    (_, rows), (_, logits) = delegate.execute([("i64", tokens)])
    delegate.close()
    delegate.weights.close()
    assert on.memory.by_purpose["weights"] == before
    values = [(a.astype(np.uint32) << 16).view(np.float32) if kind == "bf16" else a for a in (rows, logits)]
    np.testing.assert_array_equal(values[0][0], exact[tokens[0]])
    expected = exact[tokens[0]] @ exact.T
    np.testing.assert_allclose(values[1][0], expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("name", DEVICES)
def test_every_row_of_a_table_is_found(name: str) -> None:
    count, width = 1000, 8
    b, exact = GraphBuilder(), matrix(count, width)
    tokens = b.input("i64", (1, ROWS))
    weight = b.stored("constant", "f32", exact, "table")
    graph = b.graph(lookup(b, "f32", weight, tokens, width))
    for begin in range(0, count, 500):
        wanted = np.arange(begin, begin + 500)[None]
        [found] = run(b, graph, small(name), wanted)
        np.testing.assert_array_equal(found[0], exact[wanted[0]])


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("rows", [1, 3, 9, 33])
def test_a_bias_is_added_once(name: str, rows: int) -> None:
    count, width = 120, 96
    b, weight, bias = GraphBuilder(), matrix(120, 96), matrix(1, 120, 1)[0]
    x = b.input("f32", (1, ROWS, width))
    args = {
        "input": x, "weight": b.stored("constant", "f32", weight, "w"), "bias": b.stored("constant", "f32", bias, "b")
    }  # fmt: skip
    y = b.node("aten.linear.default", args, ("f32", (1, ROWS, count)))
    given = matrix(rows, width, 2)[None]
    [found] = run(b, b.graph(y), small(name), given)
    expected = given.astype(np.float64) @ weight.astype(np.float64).T + bias
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


def projection(b: GraphBuilder, weights: list[np.ndarray[Any, Any]], **more: Any) -> tuple[Ref, ...]:
    width = weights[0].shape[1]
    x = b.input("f32", (1, ROWS, width))
    args = {
        "input": x,
        "weights": tuple(b.stored("constant", "f32", w, f"w{i}") for i, w in enumerate(weights)),
        "biases": None,
        "norm_weight": b.stored("constant", "f32", np.linspace(0.5, 1.5, width, dtype=np.float32), "norm"),
        "norm_eps": 1e-5,
        "residual": None,
        "gated": False,
        **more,
    }
    sizes = [w.shape[0] for w in weights][: 1 if args["gated"] else None]
    outs = b.node("webgpu.project", args, *(("f32", (1, ROWS, size)) for size in sizes))
    return outs if isinstance(outs, tuple) else (outs,)


def normed(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    x = x.astype(np.float64)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * np.linspace(0.5, 1.5, x.shape[-1], dtype=np.float32)


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("rows", [1, 12])
def test_a_projection_with_one_large_weight_of_three(name: str, rows: int) -> None:
    b, weights = GraphBuilder(), [matrix(n, 64, i) for i, n in enumerate((200, 16, 30))]
    graph = b.graph(*projection(b, weights))
    given = matrix(rows, 64, 9)[None]
    found = run(b, graph, small(name), given)
    for weight, y in zip(weights, found, strict=True):
        np.testing.assert_allclose(y, normed(given) @ weight.astype(np.float64).T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", DEVICES)
def test_a_gated_projection_with_large_weights(name: str) -> None:
    b, weights = GraphBuilder(), [matrix(160, 40, i) for i in range(2)]
    graph = b.graph(*projection(b, weights, gated=True))
    given = matrix(2, 40, 9)[None]
    [found] = run(b, graph, small(name), given)
    gate, up = (normed(given) @ w.astype(np.float64).T for w in weights)
    np.testing.assert_allclose(found, gate / (1 + np.exp(-gate)) * up, rtol=1e-5, atol=1e-4)


def packed(
    count: int, width: int, bits: int, scale_type: str = "f16", zeros: bool = False, seed: int = 0
) -> tuple[np.ndarray[Any, Any], Format, np.ndarray[Any, Any]]:
    """(words, format, exact values); 16 bits: bfloat16."""
    if bits == 16:
        raw, exact = stored("bf16", matrix(count, width, seed))
        return (*pack_bf16(raw), exact)
    made = quantized(count, width, bits, 32, scale_type, zeros, seed=seed)
    return (*made.packed(), made.values)


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize(
    ("bits", "scale_type", "zeros"), [(4, "f16", False), (8, "f32", True), (2, "f16", True), (16, "", False)]
)
def test_a_tied_packed_table_in_parts(name: str, bits: int, scale_type: str, zeros: bool) -> None:
    count, width = 1003, 96
    words, form, table = packed(count, width, bits, scale_type, zeros)
    b, on = GraphBuilder(), small(name)
    tokens = b.input("i64", (1, ROWS))
    weight = b.stored("constant", "u32", words, "table")
    look = {"weight": weight, "indices": tokens, "format": form.literal()}
    x = b.node("webgpu.embedding_packed", look, ("f32", (1, ROWS, width)))
    args = {"input": x, "weight": weight, "bias": None, "format": form.literal()}
    graph = b.graph(x, b.node("webgpu.linear_packed", args, ("f32", (1, ROWS, count))))
    given = np.array([[count - 1, 0, count // 2]])
    delegate = b.load(graph, on)
    assert sum(v.kind == "constant" for v in delegate.graph.values) == -(-count // (LIMIT // (4 * form.words)))
    rows, logits = (np.asarray(a)[0] for _, a in delegate.execute([("i64", given)]))
    np.testing.assert_allclose(rows, table[given[0]], rtol=1e-6)
    expected = table[given[0]] @ table.T
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize(("rows", "bits", "width"), [(1, 4, 96), (3, 8, 96), (9, 4, 96), (1, 16, 57), (10, 16, 57)])
def test_a_packed_layer_with_a_bias_in_parts(name: str, rows: int, bits: int, width: int) -> None:
    on, bias = small(name), matrix(1, 403, 1)[0]
    words, form, exact = packed(403, width, bits)
    b = GraphBuilder()
    args = {
        "input": b.input("f32", (1, ROWS, width)), "weight": b.stored("constant", "u32", words, "w"),
        "bias": b.stored("constant", "f32", bias, "b"), "format": form.literal(),
    }  # fmt: skip
    graph = b.graph(b.node("webgpu.linear_packed", args, ("f32", (1, ROWS, 403))))
    given = matrix(rows, width, 2)[None]
    before = on.memory.by_purpose.get("weights", 0)
    delegate = b.load(graph, on)
    assert 0 <= on.memory.by_purpose["weights"] - before - words.nbytes - bias.nbytes < 16 * len(delegate.graph.values)
    assert sum(value.dtype == "u32" for value in delegate.graph.values) > 1
    [(_, found)] = delegate.execute([("f32", given)])
    expected = given.astype(np.float64) @ exact.T + bias
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-5 * np.abs(expected).max())
    delegate.close()
    delegate.weights.close()


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize(
    ("rows", "bits", "count", "gated"),
    [(1, 4, 620, False), (12, 8, 300, False), (2, 16, 300, False), (2, 4, 620, True)],
)
def test_a_packed_projection_with_large_weights(name: str, rows: int, bits: int, count: int, gated: bool) -> None:
    """Three weights of which one is too large; gate and up, both too large, with a residual."""
    sizes = (count, count) if gated else (count, 16, 30)
    made = [packed(n, 64, bits, seed=i) for i, n in enumerate(sizes)]
    b = GraphBuilder()
    x = b.input("f32", (1, ROWS, 64))
    args = {
        "input": x, "biases": None, "norm_eps": 1e-5, "gated": gated,
        "weights": tuple(b.stored("constant", "u32", words, f"w{i}") for i, (words, _, _) in enumerate(made)),
        "formats": tuple(form.literal() for _, form, _ in made),
        "norm_weight": b.stored("constant", "f32", np.linspace(0.5, 1.5, 64, dtype=np.float32), "norm"),
        "residual": b.input("f32", (1, ROWS, count)) if gated else None,
    }  # fmt: skip
    outs = b.node("webgpu.project", args, *(("f32", (1, ROWS, size)) for size in sizes[: 1 if gated else None]))
    graph = b.graph(*((outs,) if gated else outs))
    assert made[0][0].nbytes > LIMIT
    given, added = matrix(rows, 64, 9)[None], matrix(rows, count, 8)[None]
    found = run(b, graph, small(name), *((given, added) if gated else (given,)))
    expected = [normed(given) @ exact.T for _, _, exact in made]
    if gated:
        expected = [expected[0] / (1 + np.exp(-expected[0])) * expected[1] + added]
    for want, y in zip(expected, found, strict=True):
        np.testing.assert_allclose(y, want, rtol=1e-4, atol=2e-5 * np.abs(want).max())


# -- where to cut


def size(value: Any) -> int:
    return int(np.prod(value.shape)) * 4


def test_what_fits_stays_as_it_is() -> None:
    _, graph, _ = tied("f32", 256, 16)
    assert split_large(graph, 256 * 16 * 4, size) is graph
    assert split_large(graph, 256 * 16 * 4 - 1, size) is not graph


@pytest.mark.parametrize(
    ("count", "limit", "rows"), [(100, 64 * 40, [36, 36, 28]), (10, 64 * 3, [3, 3, 3, 1]), (7, 64, [1] * 7)]
)
def test_parts_are_few_and_of_about_one_size(count: int, limit: int, rows: list[int]) -> None:
    _, graph, _ = tied("f32", count, 16)
    split = split_large(graph, limit, size)
    parts = [value for value in split.values if value.kind == "constant"]
    assert [part.shape for part in parts] == [(n, 16) for n in rows]
    assert [check_node(split, node) for node in split.nodes] == [None] * len(split.nodes)
    whole = np.arange(count * 16, dtype=np.float32).tobytes()
    source = with_parts({"table": whole}.__getitem__)
    assert b"".join(source(str(part.data)) for part in parts) == whole
    assert source("table") == whole


def test_keys_that_look_like_parts_of_parts() -> None:
    source = with_parts({"a[0:4]": b"01234567"}.__getitem__)
    assert bytes(source(part_key("a[0:4]", 2, 5))) == b"234"


# -- what stays refused


def other_use(kind: str) -> tuple[GraphBuilder, Graph]:
    b = GraphBuilder()
    wide = kind == "a row alone is too large"
    x = b.input("f32", (1, ROWS, 5000 if wide else 64))
    if kind == "cache":
        cache = b.stored("mutable", "f32", np.zeros((1, 300, 1, 64), np.float32), "large")
        return b, b.graph(b.node("aten.neg.default", {"self": cache}, ("f32", (1, 300, 1, 64))))
    weight = b.stored("constant", "f32", matrix(8, 5000) if wide else matrix(300, 64), "large")
    count = 8 if wide else 300
    args = {"input": x, "weight": weight, "bias": None}
    y = b.node("aten.linear.default", args, ("f32", (1, ROWS, count)))
    if kind == "also read as a whole":
        return b, b.graph(y, b.node("aten.neg.default", {"self": weight}, ("f32", (300, 64))))
    if kind == "viewed":
        args = {"self": weight, "size": (64, 300)}
        return b, b.graph(y, b.node("aten.view_copy.default", args, ("f32", (64, 300)), alias=[weight]))
    if kind == "an output":
        return b, b.graph(y, weight)
    return b, b.graph(y)


@pytest.mark.parametrize("kind", ["cache", "also read as a whole", "viewed", "an output", "a row alone is too large"])
def test_other_uses_of_what_is_too_large_are_refused(kind: str) -> None:
    on = small("full")
    b, graph = other_use(kind)
    before, total = on.counters.copy(), on.memory.total
    with pytest.raises(DeviceError, match=rf"large f32.*needs [\d,]+ bytes, but this device binds at most {LIMIT:,}"):
        b.load(graph, on)
    assert (on.counters.since(before).buffers, on.memory.total) == (0, total)


@pytest.mark.parametrize("change", [-4, 4])
def test_data_of_another_size(change: int) -> None:
    on = small("full")
    b, graph, _ = tied("f32", 300, 64)
    data = b.data["table"]
    b.data["table"] = data[:change] if change < 0 else data + bytes(change)
    before = on.memory.total
    with pytest.raises(MissingDataError, match=f"76,800 bytes expected for f32.*has {76800 + change:,}"):
        b.load(graph, on)
    assert on.memory.total == before


@pytest.mark.parametrize("token", [-1, 300])
def test_tokens_out_of_range(token: int) -> None:
    on = small("full")
    b, graph, _ = tied("f32", 300, 64)
    delegate = b.load(graph, on)
    before = on.counters.copy()
    with pytest.raises(InputError, match=rf"token id \(axis 0 of size 300 of table\): {token} is outside \[0, 299\]"):
        delegate.execute([("i64", np.array([[1, token]]))])
    assert on.counters.since(before).submits == 0


@pytest.mark.parametrize("name", DEVICES)
def test_tokens_that_the_gpu_computed_are_clamped(name: str) -> None:
    b, exact = GraphBuilder(), matrix(300, 64)
    tokens = b.input("i64", (1, ROWS))
    weight = b.stored("constant", "f32", exact, "table")
    doubled = b.node("aten.mul.Tensor", {"self": tokens, "other": tokens}, ("i64", (1, ROWS)))
    negated = b.node("aten.neg.default", {"self": doubled}, ("i64", (1, ROWS)))
    graph = b.graph(lookup(b, "f32", weight, doubled, 64), lookup(b, "f32", weight, negated, 64))
    high, low = run(b, graph, small(name), np.array([[3, 17, 18, 40_000]]))
    np.testing.assert_array_equal(high[0], exact[[9, 289, 299, 299]])
    np.testing.assert_array_equal(low[0], exact[[0, 0, 0, 0]])


def test_delegates_of_a_program_share_the_parts() -> None:
    on = small("full")
    b, graph, _ = tied("f32", 300, 64)
    first = b.load(graph, on)
    before = on.counters.copy()
    second = Delegate(graph, on, b.data.__getitem__, first.weights, first.state)
    assert on.counters.since(before).buffers == 0
    tokens = [("i64", np.array([[7, 299]]))]
    for (_, one), (_, other) in zip(first.execute(tokens), second.execute(tokens), strict=True):
        np.testing.assert_array_equal(one, other)
