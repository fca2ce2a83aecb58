"""ExecuTorch's quantised KV cache as packed bytes: what the pass makes of a layer, the writes, and attention by each
route on codes with zero points."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from executorch_webgpu.backend.graph import Arg, Graph, Node, Ref, Sym
from executorch_webgpu.backend.passes import run_passes
from executorch_webgpu.ops.base import check_node
from executorch_webgpu.ops.quantize_update import NAME as QUANTIZE_UPDATE
from executorch_webgpu.ops.quantized_attention import ATTENTION, CHOOSE, PARTS, QUANTIZE
from executorch_webgpu.runtime.errors import InputError
from executorch_webgpu.runtime.gpu.host import to_host, to_user
from tests.harness import DEVICES, GraphBuilder, device
from tests.ops.attention_reference import Case, assert_close, reference
from tests.ops.test_quantized_attention import awkward_rows, quantized

Array = np.ndarray[Any, Any]
S, P = Sym("input_dim", (0, 1)), Sym("scalar", (3, 0))
PLAIN = Case(6, 2, 32, 1, 40)
_NUMPY = {"f32": np.float32, "f16": np.float16}


class Layer:
    """The records of a layer: query, key and value are inputs, and a position; the caches start with `codes` as they
    are, scales of 1 and zero points of 1, as ExecuTorch's do."""

    def __init__(self, case: Case, dtype: str = "f32", codes: int = 0) -> None:
        b = self.builder = GraphBuilder()
        self.case, self.constants = case, dict[str, tuple[str, Array]]()
        self.caches: dict[str, Ref] = {}
        heads = {"query": case.heads, "key": case.kv_heads, "value": case.kv_heads}
        inputs = {name: b.input(dtype, (case.batch, S, n, case.d)) for name, n in heads.items()}
        b.input("i64", (1,))
        args, self.mutations = dict[str, Arg](), list[tuple[int, int]]()
        for name, letter in PARTS.items():
            rows = (case.batch, S, heads[name], 1)
            scale, zero = b.node(CHOOSE, {"input": inputs[name], "dtype": "i8"}, ("f32", rows), ("i64", rows))
            given = {"input": inputs[name], "scales": scale, "zero_points": zero, "quant_min": -128, "quant_max": 127}
            made = {
                "": b.node(QUANTIZE, {**given, "dtype": "i8"}, ("i8", (*rows[:3], case.d))),
                "_scales": b.node("aten._to_copy.default", {"self": scale, "dtype": "f32"}, ("f32", rows)),
                "_zero_points": b.node("aten._to_copy.default", {"self": zero, "dtype": "i8"}, ("i8", rows)),
            }
            for suffix, part in made.items():
                if name != "query":
                    part = self.written(f"{letter}{suffix}", part, codes if not suffix else 1)
                args[name if not suffix else letter + suffix] = part
        options = {"start_pos": P, "attn_mask": None, "drpout_p": 0.0, "is_causal": True, "scale": None}
        out = (case.batch, S, case.heads, case.d)
        self.out = b.node(ATTENTION, {**args, **options, "is_seq_at_dim_2": None}, ("f32", out))

    def written(self, name: str, part: Ref, content: int) -> Ref:
        b, value = self.builder, self.builder.values[part.value]
        shape = (value.shape[0], self.case.capacity, *value.shape[2:])
        array = np.full([int(str(size)) for size in shape], content, np.int8 if value.dtype == "i8" else np.float32)
        cache = self.caches[name] = b.stored("mutable", value.dtype, array, name)
        if content:
            self.constants[name] = (value.dtype, array)
        else:
            b.values[cache.value] = replace(b.values[cache.value], data=None)
        new = b.node(
            "llama.update_cache.default", {"value": part, "cache": cache, "start_pos": P}, (value.dtype, shape)
        )
        self.mutations.append((cache.value, new.value))
        assert isinstance(new, Ref)
        return new

    def graph(self, *more: Ref) -> Graph:
        return self.builder.graph(self.out, *more, mutations=tuple(self.mutations))

    def passed(self) -> Graph:
        """The graph with packed caches, where it can have them."""
        graph = run_passes(self.graph(), constants=self.constants)
        self.builder.data |= {key: np.ascontiguousarray(x).tobytes() for key, (_, x) in self.constants.items()}
        for node in graph.nodes:
            assert check_node(graph, node) is None
        return graph


class Loaded:
    def __init__(self, layer: Layer, on: str, graph: Graph | None = None) -> None:
        self.case, self.device = layer.case, device(on)
        self.delegate = layer.builder.load(layer.passed() if graph is None else graph, self.device)

    def __call__(self, tensors: dict[str, Array], position: int) -> Array:
        feeds = [to_host(tensors[name]) for name in PARTS] + [("i64", np.array([position], np.int64))]
        [(dtype, found)] = self.delegate.execute(feeds)
        assert not isinstance(found, int)
        return np.array(to_user(dtype, found, False))

    def kernels(self) -> list[str]:
        *_, plan = self.delegate._plans.values()
        return [launch.kernel for launch in plan.launches]

    def state(self, letter: str) -> tuple[Array, Array]:
        """Codes int8 [B, C, H, D] and f32 [B, C, H, 2] of the keys (k) or values (v)."""
        case, buffers = self.case, self.delegate.state.buffers()
        shape = (case.batch, case.capacity, case.kv_heads)
        raw = (
            bytes(self.device.gpu.queue.read_buffer(buffers[n])) for n in (letter, f"{letter}_scales and zero points")
        )
        codes, grid = (np.frombuffer(r, t) for r, t in zip(raw, (np.int8, np.float32), strict=True))
        count = int(np.prod(shape))
        return codes[: count * case.d].reshape(*shape, case.d), grid[: 2 * count].reshape(*shape, 2)

    def poison(self, length: int) -> None:
        """Rubbish in all rows from `length` on: codes of -1 and scales that are NaN."""
        for letter in "kv":
            for name, part in zip((letter, f"{letter}_scales and zero points"), self.state(letter), strict=True):
                changed = part.copy()
                changed[:, length:] = -1 if changed.dtype == np.int8 else np.nan
                self.device.write(self.delegate.state.buffers()[name], changed)

    def wide(self, stop: int) -> dict[str, Array]:
        """What the first `stop` rows stand for, float64 [B, H, rows, D]."""
        found = {}
        for name, letter in (("key", "k"), ("value", "v")):
            codes, grid = self.state(letter)
            numbers = (codes.astype(np.float64) - grid[..., 1:]) * grid[..., :1]
            found[name] = numbers[:, :stop].transpose(0, 2, 1, 3)
        return found


@contextmanager
def loaded(layer: Layer, on: str, graph: Graph | None = None) -> Iterator[Loaded]:
    made = Loaded(layer, on, graph)
    try:
        yield made
    finally:
        made.delegate.close()
        made.delegate.state.close()


def drawn(case: Case, rows: int, seed: int, dtype: str = "f32") -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    heads = {"query": case.heads, "key": case.kv_heads, "value": case.kv_heads}
    return {
        n: (rng.standard_normal((case.batch, rows, h, case.d)) + 0.2).astype(_NUMPY[dtype]) for n, h in heads.items()
    }


def attended(case: Case, query: Array, wide: dict[str, Array], rows: int, position: int) -> Array:
    """float64 [B, S, Hq, D] for a query that is quantised too, in float32 as on the GPU: where torch's float64 rounds
    the other way, a code of the query differs by one."""
    x = query.astype(np.float32)
    low, high = np.minimum(x.min(-1, keepdims=True), 0), np.maximum(x.max(-1, keepdims=True), 0)
    step = np.maximum((high - low) / np.float32(255), np.float32(2.0**-23))
    zero = np.clip(-128 - np.rint(low / step), -128, 127)
    codes = np.clip(np.rint(x * (np.float32(1) / step)) + zero, -128, 127)
    exact = ((codes - zero).astype(np.float64) * step).transpose(0, 2, 1, 3)
    known = case.with_(rows=rows, capacity=position + rows, pos=position)
    return reference(known, {"query": exact, **wide}).transpose(0, 2, 1, 3)


SIZES = {
    "decode heads": PLAIN,
    "batch": Case(4, 2, 64, 1, 24, batch=2),
    "no cell of eight": Case(2, 1, 20, 1, 24),
    "one word": Case(3, 3, 4, 1, 24),
    "wide": Case(2, 1, 256, 1, 24),
}


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("dtype", ["f32", "f16"])
@pytest.mark.parametrize("name", SIZES)
def test_a_layer(name: str, dtype: str, on: str) -> None:
    """Prompts and tokens from row 3 on; what stands before keeps its initial content, codes of 0 for -1. Rows behind
    the position are rubbish. One write and the attention, no pass over the cache, at a byte an element."""
    case = SIZES[name]
    position = 3
    with loaded(Layer(case, dtype), on) as layer:
        for rows, seed in ((5, 0), (1, 1), (1, 2), (9, 3)):
            tensors = drawn(case, rows, seed, dtype)
            layer.poison(position)
            got = layer(tensors, position)
            wide = layer.wide(position + rows)
            for x, letter in (("key", "k"), ("value", "v")):
                exact = tensors[x].astype(np.float64)
                new = slice(position, position + rows)
                step = layer.state(letter)[1][:, new, :, :1]
                # zero points are rounded, so the ends of a range may clip
                assert (np.abs(wide[x][:, :, new].transpose(0, 2, 1, 3) - exact) <= 1.01 * step).all()
                assert (wide[x][:, :, :3] == -1).all()
                codes, grid = layer.state(letter)
                assert (codes[:, position + rows :] == -1).all()
                assert np.isnan(grid[:, position + rows :]).all()
            assert_close(got, attended(case, tensors["query"], wide, rows, position))
            kernels = layer.kernels()
            assert kernels[:2] == ["quantize_rows", "quantize_update"]  # the query's and the caches'
            assert all(kernel.startswith("attention") for kernel in kernels[2:])
            position += rows
        sizes = {n: b.size for n, b in layer.delegate.state.buffers().items()}
    rows = case.batch * case.capacity * case.kv_heads
    assert sum(sizes.values()) == 2 * rows * (case.d + 8)


@pytest.mark.parametrize("on", DEVICES)
def test_codes_are_those_of_torch(on: str) -> None:
    """Positive, negative and mixed rows, zeros, tiny and large ones; rows around them keep every bit."""
    x = awkward_rows()  # [2, 3, 4, 20]
    case = Case(4, 4, 20, 3, 9, batch=2)
    with loaded(Layer(case, codes=77), on) as layer:
        layer({"query": x, "key": x, "value": -x}, 4)
        for letter, source in (("k", x), ("v", -x)):
            codes, grid = layer.state(letter)
            want_codes, want_scales, want_zeros = quantized(source)
            np.testing.assert_allclose(grid[:, 4:7, :, :1], want_scales, rtol=2e-7)
            usual = want_scales[..., 0] > 2.0**-23  # elsewhere torch may put the range at the other end of the codes
            assert 0 < usual.sum() < usual.size
            found = codes[:, 4:7].astype(int)
            assert np.abs(grid[:, 4:7, :, 1:] - want_zeros)[usual].max() <= 1
            assert np.abs(found - want_codes)[usual].max() <= 1
            assert np.mean(found[usual] == want_codes[usual]) > 0.99
            assert (np.abs((found - grid[:, 4:7, :, 1:]) * grid[:, 4:7, :, :1] - source) <= 1.001 * want_scales).all()
            for rest in (slice(0, 4), slice(7, None)):
                assert (codes[:, rest] == 77).all()
                assert (grid[:, rest] == 1).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_stay_visible(bad: float) -> None:
    tensors = drawn(PLAIN, 2, 0)
    tensors["value"][0, 1, 1, 5] = bad
    with loaded(Layer(PLAIN), "full") as layer:
        got = layer(tensors, 0)
        _, grid = layer.state("v")
    np.testing.assert_array_equal(np.isnan(grid[0, :2, :, 0]), [[False, False], [False, True]])
    np.testing.assert_array_equal(np.isnan(got).any(-1), [[[False] * 6, [False] * 3 + [True] * 3]])


@pytest.mark.parametrize("on", DEVICES)
def test_positions_past_the_capacity(on: str) -> None:
    """The host refuses them before anything is written; the kernel writes nothing."""
    with loaded(Layer(PLAIN, codes=9), on) as layer:
        for rows, position in ((1, 40), (3, 38), (1, -1)):
            tensors = drawn(PLAIN, rows, 0)
            with pytest.raises(InputError, match="of capacity 40"):
                layer(tensors, position)
            for plan in layer.delegate._plans.values():
                plan.checks = ()
            layer(tensors, position)
            for letter in "kv":
                codes, grid = layer.state(letter)
                assert (codes == 9).all()
                assert (grid == 1).all()


def test_the_wide_form_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the caches' initial content nothing is packed; four bytes an element, equal results."""
    layer = Layer(PLAIN)
    wide = run_passes(layer.graph())
    assert QUANTIZE_UPDATE not in {node.op for node in wide.nodes}
    with loaded(layer, "full", wide) as before, loaded(Layer(PLAIN), "full") as after:
        for rows, position in ((4, 0), (1, 4), (11, 5)):
            tensors = drawn(PLAIN, rows, position)
            np.testing.assert_allclose(after(tensors, position), before(tensors, position), atol=1e-5, rtol=1e-4)
        sizes = [sum(b.size for b in one.delegate.state.buffers().values()) for one in (before, after)]
    assert sizes == [2 * 40 * 2 * (32 * 4 + 8), 2 * 40 * 2 * (32 + 8)]


# -- attention on codes with zero points


ROUTES = {
    "stream": ("full", 64, 5), "decode": ("default-limits", 64, 5), "flash": ("default-limits", 64, 17),
    "prefill": ("full", 20, 17), "naive": ("full", 12, 3), "flash_wide": ("full", 64, 17),
}  # fmt: skip


@pytest.mark.parametrize("route", ROUTES)
def test_routes(route: str) -> None:
    """Values as they are, keys with a zero point far from the middle; a window and a sink."""
    on, d, rows = ROUTES[route]
    if route == "stream" and device(on).limits.subgroup_size < max(4, d // 8):
        d = 32
    case = Case(6, 2, d, rows, 170, 100, window=90, sink=0.3)
    rng = np.random.default_rng(d)
    shape = (1, case.capacity, case.kv_heads, d)
    b, wide, feeds = GraphBuilder(), dict[str, Array](), []
    query = rng.standard_normal((1, rows, case.heads, d)).astype(np.float32)
    feeds.append(query)
    args: dict[str, Arg] = {"query": b.input("f32", query.shape)}
    for name in ("key", "value"):
        codes = rng.integers(-128, 128, shape).astype(np.int8)
        grid = np.stack([rng.uniform(0.005, 0.02, shape[:3]), rng.integers(-128, 128, shape[:3])], -1).astype(
            np.float32
        )
        wide[name] = ((codes.astype(np.float64) - grid[..., 1:]) * grid[..., :1]).transpose(0, 2, 1, 3)
        codes[:, 100 + rows :], grid[:, 100 + rows :] = 0, np.nan
        args[name] = b.input("u32", (*shape[:3], d // 4))
        args[f"{name}_scales"] = b.input("f32", (*shape[:3], 2))
        feeds += [codes.view(np.uint32), grid]
    args |= {
        **dict.fromkeys(("q_layout", "kv_layout", "out_layout"), "bshd"), "attn_mask": None, "start_pos": 100,
        "kv_limit": "causal", "scale": None, "softcap": 0.0, "window": 90, "sink": b.input("f32", (case.heads,)),
        "bits": 8, "zeros": True, "route": route.removesuffix("_wide"),
    }  # fmt: skip
    if route.endswith("_wide"):
        args["variant"] = "medium-wide"
    feeds.append(np.full(case.heads, 0.3, np.float32))
    graph = b.graph(b.node("webgpu.attention", args, ("f32", query.shape)))
    assert check_node(graph, graph.nodes[0]) is None
    delegate = b.load(graph, device(on))
    given = [(b.values[number].dtype, x) for number, x in zip(b.inputs, feeds, strict=True)]
    [(_, got)] = delegate.execute(given)
    *_, plan = delegate._plans.values()
    assert f"attention_{route}" in [launch.kernel for launch in plan.launches]
    delegate.close()
    tensors = {"query": query.transpose(0, 2, 1, 3), **wide, "sink": feeds[-1]}
    assert_close(np.asarray(got), reference(case, tensors).transpose(0, 2, 1, 3))


# -- what is not packed, and refusals


def test_what_stays_wide() -> None:
    """Head sizes that fill no words; caches that others read, or that are results; writes that differ."""

    def ops(layer: Layer, graph: Graph | None = None) -> set[str]:
        passed = run_passes(layer.graph() if graph is None else graph, constants=layer.constants)
        return {node.op for node in passed.nodes}

    assert QUANTIZE_UPDATE in ops(Layer(PLAIN))
    assert QUANTIZE_UPDATE not in ops(Layer(PLAIN.with_(d=6)))
    for name in ("k", "v_scales", "k_zero_points"):
        layer = Layer(PLAIN)
        old = layer.caches[name]
        new = next(source for target, source in layer.mutations if target == old.value)
        for read in (old.value, new):
            assert QUANTIZE_UPDATE not in ops(layer, layer.graph(Ref(read)))
    layer = Layer(PLAIN)
    graph = layer.graph()

    def changed(name: str, **args: Arg) -> Graph:
        """One write with other arguments."""
        return replace(
            graph,
            nodes=tuple(
                replace(node, args={**node.args, **args}) if node.args.get("cache") == layer.caches[name] else node
                for node in graph.nodes
            ),
        )

    assert QUANTIZE_UPDATE in ops(layer, changed("k", start_pos=P))
    assert QUANTIZE_UPDATE not in ops(layer, changed("v_zero_points", start_pos=2))
    other = next(node.args["value"] for node in graph.nodes if node.args.get("cache") == layer.caches["v"])
    assert QUANTIZE_UPDATE not in ops(layer, changed("k", value=other))


def test_refused_with_a_reason() -> None:
    graph = Layer(PLAIN).passed()
    node = next(node for node in graph.nodes if node.op == QUANTIZE_UPDATE)

    def reason(change: dict[str, Arg] | None = None, **values: tuple[str, tuple[Any, ...]]) -> str:
        changed = list(graph.values)
        for name, (dtype, shape) in values.items():
            index = node.args[name]
            assert isinstance(index, Ref)
            changed[index.value] = replace(changed[index.value], dtype=dtype, shape=shape)
        return str(
            check_node(replace(graph, values=tuple(changed)), replace(node, args={**node.args, **(change or {})}))
        )

    assert reason() == "None"
    assert reason({"start_pos": -1}) == "start_pos is -1; it must not be negative"
    assert reason({"start_pos": True}) == "start_pos must be an integer"
    assert "key has 2 heads of 30 elements" in reason(key=("f32", (1, S, 2, 30)), value=("f32", (1, S, 2, 30)))
    assert "value is i8[" in reason(value=("i8", (1, S, 2, 32)))
    assert "cache k is i8[1, 40, 2, 8]" in reason(key_cache=("i8", (1, 40, 2, 8)))
    assert "are f32[1, 40, 2, 1] for cache" in reason(value_scales=("f32", (1, 40, 2, 1)))
    assert "has other rows" in reason(value_cache=("u32", (1, 41, 2, 8)), value_scales=("f32", (1, 41, 2, 2)))
    few = Node(node.op, node.args, node.outputs[:3], node.name)
    assert check_node(graph, few) == "webgpu.quantize_update has 4 results, not 3"
    attention = next(node for node in graph.nodes if node.op == "webgpu.attention")
    four = replace(attention, args={**attention.args, "bits": 4})
    assert "zeros is True for 4 bits; only codes of 8 bits have zero points" in str(check_node(graph, four))
    plain = replace(attention, args={**attention.args, "zeros": False})
    assert "it must be f32[1, 40, 2, 1]" in str(check_node(graph, plain))
