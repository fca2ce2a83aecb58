"""`webgpu.rope_cache` against float64 formulas, and attention whose grids it sizes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from executorch_webgpu.backend.graph import Arg, Sym
from executorch_webgpu.ops.base import check_node
from executorch_webgpu.runtime.errors import InputError
from executorch_webgpu.runtime.gpu.host import bf16_to_f32, f32_to_bf16, to_user
from executorch_webgpu.runtime.gpu.plan import Launch
from tests.harness import DEVICES, GraphBuilder, device
from tests.ops.copy_cases import poison
from tests.ops.test_rope import reference

Array = np.ndarray[Any, Any]
OP = "webgpu.rope_cache"
TOLERANCE = {"f32": 1e-6, "f16": 1e-3, "bf16": 8e-3}
BITS = {2: np.uint16, 4: np.uint32}


@dataclass(frozen=True)
class Case:
    """Sizes, style and dtypes of one operator; `rows` None: a symbol, the number of rows of a call."""

    heads: int = 4
    kv_heads: int = 2
    d: int = 16
    rot: int = 16
    dv: int | None = None
    batch: int = 1
    capacity: int = 80
    layout: str = "bshd"
    interleaved: bool = True
    wide_table: bool = False
    query: str = "f32"
    key: str = "f32"
    key_cache: str = "f32"
    value: str = "f32"  # and its cache
    out: str = "f32"
    table: str = "f32"
    kv_limit: str = "causal"
    window: int = 0
    in_place: bool = True
    sized: bool = True  # attention gets `sizes`

    @property
    def value_d(self) -> int:
        return self.d if self.dv is None else self.dv


def held(array: Array, dtype: str) -> Array:
    """What `dtype` holds of an array, as float32."""
    if dtype == "f16":
        return array.astype(np.float16).astype(np.float32)
    return bf16_to_f32(f32_to_bf16(array)) if dtype == "bf16" else array.astype(np.float32)


def host(array: Array, dtype: str) -> Array:
    """The host form of an array that `dtype` holds exactly."""
    if dtype == "f16":
        return array.astype(np.float16)
    return f32_to_bf16(array) if dtype == "bf16" else array


def first_cache(shape: tuple[int, ...], dtype: str, seed: int) -> Array:
    """Random numbers, and every third row NaN: rows that are not written must stay bit by bit, and are never read."""
    array = held(np.random.default_rng(seed).standard_normal(shape), dtype)
    array[:, ::3] = np.nan
    return array


class Layer:
    """The operator, with attention after it if asked for; inputs query, key, value, position (table row too)."""

    def __init__(self, case: Case, on: str, attends: bool = False) -> None:
        self.case, self.device = case, device(on)
        b = GraphBuilder()
        s, position = Sym("input_dim", (2, 1)), Sym("scalar", (3, 0))
        shape = self.shape(s, case.heads)
        query, key = b.input(case.query, shape), b.input(case.key, self.shape(s, case.kv_heads))
        value = b.input(case.value, (case.batch, s, case.kv_heads, case.value_d))
        b.input("i64", (1,))
        rng = np.random.default_rng(7)
        width = case.rot if case.wide_table else case.rot // 2
        self.cos, self.sin = (held(rng.standard_normal((case.capacity, width)), case.table) for _ in range(2))
        k_shape = (case.batch, case.capacity, case.kv_heads, case.d)
        v_shape = (*k_shape[:3], case.value_d)
        self.old = {"k": first_cache(k_shape, case.key_cache, 1), "v": first_cache(v_shape, case.value, 2)}
        if attends:  # whatever a row holds, only those before the position may count: they must be numbers
            self.old = {name: np.nan_to_num(array) for name, array in self.old.items()}
        caches = [
            b.stored("mutable", dtype, host(self.old[name], dtype), name)
            for name, dtype in (("k", case.key_cache), ("v", case.value))
        ]
        args: dict[str, Arg] = {
            "query": query, "key": key, "value": value, "key_cache": caches[0], "value_cache": caches[1],
            "cos": b.stored("constant", case.table, host(self.cos, case.table), "cos"),
            "sin": b.stored("constant", case.table, host(self.sin, case.table), "sin"),
            "start": position, "rot": case.rot, "interleaved": case.interleaved, "layout": case.layout,
            "start_pos": position, "kv_limit": case.kv_limit, "window": case.window,
        }  # fmt: skip
        outs = ((case.out, shape), (case.key_cache, k_shape), (case.value, v_shape), ("i32", (8,)))
        alias = [None, *caches] if case.in_place else []
        rotated, keys, values, sizes = b.node(OP, args, *outs, alias=alias)
        results = [rotated, keys, values, sizes]
        if attends:
            attend: dict[str, Arg] = {
                "query": rotated, "key": keys, "value": values, "q_layout": case.layout, "kv_layout": "bshd",
                "out_layout": "bshd", "start_pos": position, "kv_limit": case.kv_limit, "window": case.window,
                "sizes": sizes if case.sized else None,
            }  # fmt: skip
            attended = (case.batch, s, case.heads, case.value_d)
            results = [b.node("webgpu.attention", attend, (case.out, attended)), sizes]
        pairs = tuple(zip((c.value for c in caches), (keys.value, values.value), strict=True))
        self.graph = b.graph(*results, mutations=pairs if case.in_place else ())
        for node in self.graph.nodes:
            assert check_node(self.graph, node) is None
        self.delegate = b.load(self.graph, self.device)

    def shape(self, rows: Any, heads: int) -> tuple[Any, ...]:
        case = self.case
        return (case.batch, rows, heads, case.d) if case.layout == "bshd" else (case.batch, heads, rows, case.d)

    def inputs(self, rows: int, seed: int) -> dict[str, Array]:
        """query, key and value, with numbers that their dtypes hold."""
        case, rng = self.case, np.random.default_rng(seed)
        v_shape = (case.batch, rows, case.kv_heads, case.value_d)
        return {
            "query": held(rng.standard_normal(self.shape(rows, case.heads)), case.query),
            "key": held(rng.standard_normal(self.shape(rows, case.kv_heads)), case.key),
            "value": held(rng.standard_normal(v_shape), case.value),
        }

    def __call__(self, given: dict[str, Array], position: int) -> list[Array]:
        case = self.case
        dtypes = {"query": case.query, "key": case.key, "value": case.value}
        feeds: list[Any] = [(dtype, host(given[name], dtype)) for name, dtype in dtypes.items()]
        made = self.delegate.execute([*feeds, ("i64", np.array([position], np.int64))])
        return [np.asarray(to_user(dtype, np.asarray(array), False)) for dtype, array in made]

    def bits(self, name: str) -> Array:
        """What the GPU holds of a cache, as integers [batch, row, the rest]."""
        raw = bytes(self.device.gpu.queue.read_buffer(self.delegate.state.buffers()[name]))
        case, shape = self.case, self.old[name].shape
        stored = self.device.limits.wgsl_type(case.key_cache if name == "k" else case.value)
        kind = BITS[2 if stored == "f16" else 4]
        return np.frombuffer(raw, kind)[: int(np.prod(shape))].reshape(*shape[:2], -1)

    def expected(self, given: dict[str, Array], position: int) -> tuple[Array, Array]:
        """The rotated query and, as [B, S, Hkv, D], the rotated key, in float64."""
        case, rows = self.case, given["value"].shape[1]
        c, s = self.cos[position : position + rows], self.sin[position : position + rows]
        q, k = (reference(given[n], c, s, case.rot, case.layout, case.interleaved) for n in ("query", "key"))
        return q, k if case.layout == "bshd" else k.transpose(0, 2, 1, 3)

    def check(self, rows: int, position: int) -> None:
        """One call: results against the formulas, the rows not written against the bits before."""
        case = self.case
        given = self.inputs(rows, 100 * rows + position)
        before = {name: self.bits(name) for name in ("k", "v")}
        poison(self.delegate)
        rotated, keys, values, _ = self(given, position)
        q, k = self.expected(given, position)
        close(rotated, q, case.out)
        written = slice(position, position + rows)
        close(keys[:, written], k, case.key_cache)
        np.testing.assert_array_equal(values[:, written], given["value"])
        if case.rot < case.d:
            np.testing.assert_array_equal(rotated[..., case.rot :], held(given["query"][..., case.rot :], case.out))
        for name, new in (("k", keys), ("v", values)):
            outside = np.delete(np.arange(case.capacity), np.arange(case.capacity)[written])
            after = self.bits(name)
            np.testing.assert_array_equal(after[:, outside], before[name][:, outside])
            if case.in_place:
                self.old[name] = np.asarray(new, np.float32)
            else:
                np.testing.assert_array_equal(after, before[name])
                np.testing.assert_array_equal(new[:, outside], self.old[name][:, outside])

    def launches(self, kernel: str) -> list[Launch]:
        """The launches of a kernel in the plan that was made last."""
        *_, plan = self.delegate._plans.values()
        return [launch for launch in plan.launches if launch.kernel == kernel]

    def close(self) -> None:
        self.delegate.close()
        self.delegate.state.close()


@contextmanager
def layer(case: Case, on: str, attends: bool = False) -> Iterator[Layer]:
    made = Layer(case, on, attends)
    try:
        yield made
    finally:
        made.close()


def close(got: Array, want: Array, dtype: str) -> None:
    tolerance = TOLERANCE[dtype]
    np.testing.assert_allclose(got.astype(np.float64), want, rtol=tolerance, atol=6 * tolerance)


STYLES = {
    "interleaved": {"interleaved": True},
    "halves": {"interleaved": False},
    "halves-wide-table": {"interleaved": False, "wide_table": True},
}
SIZES = {
    "gqa-vectors": Case(batch=2),
    "partial-vectors": Case(d=20, rot=8, dv=12, heads=6, kv_heads=3),
    "partial-scalars": Case(d=14, rot=6, dv=5, heads=2, kv_heads=1, batch=2),
    "scalars-of-four": Case(d=12, rot=4, heads=3, kv_heads=3),
    "smallest": Case(d=2, rot=2, dv=1, heads=1, kv_heads=1),
}


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", SIZES)
def test_sizes_styles_and_positions(name: str, style: str, layout: str, on: str) -> None:
    """One to many rows at the first, a middle and the last position; every step is one dispatch."""
    case = replace(SIZES[name], layout=layout, **STYLES[style])  # type: ignore[arg-type]
    with layer(case, on) as made:
        for rows in (1, 2, 9, 65):
            for position in (0, (80 - rows) // 2, 80 - rows):
                made.check(rows, position)
        assert all(len(plan.launches) == 1 for plan in made.delegate._plans.values())
        assert len(made.delegate._plans) == 4


DTYPES = {
    "f16-caches": {"key_cache": "f16", "value": "f16"},
    "f16": dict.fromkeys(("query", "key", "key_cache", "value", "out", "table"), "f16"),
    "f16-f32-tables": dict.fromkeys(("query", "key", "key_cache", "value", "out"), "f16"),
    "f16-activations": {"query": "f16", "key": "f16", "out": "f32"},
    "bf16": dict.fromkeys(("query", "key", "key_cache", "value", "out", "table"), "bf16"),
    "mixed": {"query": "bf16", "key": "f16", "key_cache": "f32", "value": "f16", "table": "bf16", "out": "f16"},
}


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("name", DTYPES)
def test_dtypes(name: str, in_place: bool, on: str) -> None:
    """In place and into new caches, where the old ones keep their content."""
    for case in (Case(batch=2, in_place=in_place), Case(d=6, rot=6, dv=3, in_place=in_place, interleaved=False)):
        with layer(replace(case, **DTYPES[name]), on) as made:  # type: ignore[arg-type]
            for rows, position in ((1, 0), (3, 40), (2, 78)):
                made.check(rows, position)


@pytest.mark.parametrize("on", DEVICES)
def test_a_bad_number_stays_in_its_pair(on: str) -> None:
    with layer(Case(d=16, rot=16), on) as made:
        given = made.inputs(2, 3)
        given["query"][0, 1, 2, 5] = np.nan
        given["key"][0, 0, 1, 8] = np.inf
        given["value"][0, 1, 0, 3] = np.nan
        rotated, keys, values, _ = made(given, 4)
        found = [{tuple(map(int, p)) for p in np.argwhere(~np.isfinite(x))} for x in (rotated, keys[:, 4:6])]
        assert found == [{(0, 1, 2, 4), (0, 1, 2, 5)}, {(0, 0, 1, 8), (0, 0, 1, 9)}]
        np.testing.assert_array_equal(values[:, 4:6], given["value"])


@pytest.mark.parametrize("on", DEVICES)
def test_positions_past_the_capacity(on: str) -> None:
    """Refused by the host; lift its checks, as a position counted up on the GPU does, and the kernel writes nothing."""
    with layer(Case(), on) as made:
        made.check(3, 77)
        given, before = made.inputs(3, 5), {name: made.bits(name) for name in ("k", "v")}
        for position in (78, -1):
            with pytest.raises(InputError, match=r"cache k of capacity 80|rotary table"):
                made(given, position)
        for plan in made.delegate._plans.values():
            plan.checks = ()
        for position in (78, 80, 2**31 - 1, -1, -(2**31)):
            made(given, position)
            for name, bits in before.items():
                np.testing.assert_array_equal(made.bits(name), bits)


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("shared", ["key", "value"])
def test_an_input_in_the_buffer_of_a_cache(shared: str, on: str) -> None:
    """Key or value may be the very cache that is written; its old content is what counts."""
    rng = np.random.default_rng(0)
    shape = (1, 4, 2, 8)
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name in ("q", "k", "v", "x")}
    cos, sin = (rng.standard_normal((4, 4)).astype(np.float32) for _ in range(2))
    b = GraphBuilder()
    b.input("i64", (1,))
    q, k, v, x = (b.stored("mutable", "f32", array, name) for name, array in arrays.items())
    caches = {"key": k, "value": v}
    start = Sym("scalar", (0, 0))
    args: dict[str, Arg] = {
        "query": q, "key": x, "value": x, "key_cache": k, "value_cache": v, shared: caches[shared],
        "cos": b.stored("constant", "f32", cos, "cos"), "sin": b.stored("constant", "f32", sin, "sin"), "start": 0,
        "rot": 8, "interleaved": True, "layout": "bshd", "start_pos": start, "kv_limit": "causal", "window": 0,
    }  # fmt: skip
    outs = (("f32", shape), ("f32", shape), ("f32", shape), ("i32", (8,)))
    made = b.node(OP, args, *outs, alias=[None, k, v])
    delegate = b.load(b.graph(*made[:3], mutations=((k.value, made[1].value), (v.value, made[2].value))), device(on))
    try:
        rotated, keys, values = (np.asarray(a) for _, a in delegate.execute([("i64", np.array([0]))]))
    finally:
        delegate.close()
        delegate.state.close()
    close(rotated, reference(arrays["q"], cos, sin, 8, "bshd", True), "f32")
    close(keys, reference(arrays["k" if shared == "key" else "x"], cos, sin, 8, "bshd", True), "f32")
    np.testing.assert_array_equal(values, arrays["v" if shared == "value" else "x"])


def test_more_workgroups_than_a_dimension_holds() -> None:
    rows = 2 * 64 * 65536 // 3 + 7
    case = Case(heads=1, kv_heads=1, d=2, rot=2, dv=1, capacity=rows + 2)
    with layer(case, "full") as made:
        made.check(rows, 1)
        (launch,) = made.launches("rope_cache")
        assert launch.grid[1] > 1


# -- what is refused

GOOD: dict[str, Any] = {
    "query": ("f32", (1, 5, 4, 8)), "key": ("f32", (1, 5, 2, 8)), "value": ("f32", (1, 5, 2, 6)),
    "key_cache": ("f32", (1, 9, 2, 8)), "value_cache": ("f32", (1, 9, 2, 6)), "cos": ("f32", (9, 4)),
    "sin": ("f32", (9, 4)), "start": 0, "rot": 8, "interleaved": True, "layout": "bshd", "start_pos": 2,
    "kv_limit": "causal", "window": 0,
}  # fmt: skip
REFUSED: tuple[tuple[dict[str, Any], str], ...] = (
    ({"rot": 3}, "query: 3 rotary elements"),
    ({"key": ("f32", (1, 5, 2, 10))}, "differ in batch, positions or head size"),
    ({"key": ("f32", (1, 4, 2, 8))}, "differ in batch, positions or head size"),
    ({"key": ("i32", (1, 5, 2, 8))}, "key: "),
    ({"key_cache": ("f32", (1, 9, 1, 8))}, "differ in batch, heads or head size"),
    ({"key_cache": ("f32", (9, 2, 8))}, "differ in batch, heads or head size"),
    ({"key_cache": ("f32", (1, 8, 2, 8))}, "rows"),
    ({"key_cache": ("i32", (1, 9, 2, 8))}, "dtype i32"),
    ({"value": ("f16", (1, 5, 2, 6))}, "cast the value"),
    ({"value": ("i32", (1, 5, 2, 6)), "value_cache": ("i32", (1, 9, 2, 6))}, "dtype i32"),
    ({"cos": ("f32", (9, 3))}, "columns"),
    ({"start_pos": -1}, "negative"),
    ({"kv_limit": "none"}, "kv_limit"),
    ({"window": -1}, "window"),
    ({"layout": "sbhd"}, "layout"),
)


def refusal(change: dict[str, Any], sizes: Any = ("i32", (8,)), **results: Any) -> str | None:
    b = GraphBuilder()
    given = {**GOOD, **change}
    args = {k: b.input(*v) if isinstance(v, tuple) else v for k, v in given.items()}
    outs = [results.get(k, given[k]) for k in ("query", "key_cache", "value_cache")]
    graph = b.graph(*b.node(OP, args, *outs, sizes))
    return check_node(graph, graph.nodes[0])


@pytest.mark.parametrize(("change", "reason"), REFUSED, ids=[r[1] for r in REFUSED])
def test_refuses(change: dict[str, Any], reason: str) -> None:
    assert refusal({}) is None
    assert reason in str(refusal(change))


def test_refuses_results_of_another_kind() -> None:
    assert "sizes is" in str(refusal({}, ("i32", (6,))))
    assert "the new one f16" in str(refusal({}, key_cache=("f16", (1, 9, 2, 8))))
    assert "the result for" in str(refusal({}, query=("f32", (1, 5, 8, 4))))
