"""A decoder layer from its input to its attention as one `webgpu.project_cache`, and its float64 reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from executorch_webgpu.backend.graph import Arg, Dim, Ref, Sym
from executorch_webgpu.ops.base import check_node
from executorch_webgpu.runtime.gpu.host import to_user
from tests.harness import GraphBuilder, device
from tests.ops.copy_cases import poison
from tests.ops.quantized import quantized
from tests.ops.test_rope import reference as rotated
from tests.ops.test_rope_cache import BITS, Array, held, host

OP = "webgpu.project_cache"
EPS = 1e-5
TOLERANCE = {"f32": 0.0, "f16": 1e-3, "bf16": 8e-3}
"""Of what is rounded to a dtype."""


@dataclass(frozen=True)
class Case:
    """Sizes, style and dtypes; S is a symbol. `weights`: a float dtype, or bits of packed ones; `biases`: which weights
    have one."""

    heads: int = 4
    kv_heads: int = 2
    d: int = 16
    rot: int = 16
    dv: int | None = None
    k: int = 64
    batch: int = 1
    capacity: int = 40
    interleaved: bool = True
    wide_table: bool = False
    weights: str | int = "f32"
    scale: str = "f32"
    zeros: bool = False
    group: int = 32
    x: str = "f32"
    cache: str = "f32"
    key_cache: str = ""  # as `cache`
    table: str = "f32"
    norm: str = "weight"
    biases: tuple[int, ...] = ()
    kv_limit: str = "causal"
    window: int = 0
    ragged: bool = False
    in_place: bool = True
    quantize: bool = False
    attends: bool = False

    @property
    def value_d(self) -> int:
        return self.d if self.dv is None else self.dv

    @property
    def slack(self) -> float:
        """What sums may be off by, of the magnitudes that went in: packed weights cut 16-bit x into 15 bits."""
        multiplied = self.cache if self.norm else self.x
        return 3e-4 if isinstance(self.weights, int) and multiplied != "f32" else 2e-5

    @property
    def kinds(self) -> dict[str, str]:
        """The dtype of each cache."""
        return {"k": self.key_cache or self.cache, "v": self.cache}

    @property
    def rows(self) -> tuple[int, int, int]:
        """Of the weights."""
        return self.heads * self.d, self.kv_heads * self.d, self.kv_heads * self.value_d


class Layer:
    """The operator on a test device, with attention after it if the case says so. Inputs: x, then the position (table
    row too), or `past` and `q_len` where ragged."""

    def __init__(self, case: Case, on: str) -> None:
        self.case, self.device = case, device(on)
        self.rng = np.random.default_rng(case.d + case.k)
        self.builder = b = GraphBuilder()
        s: Dim = Sym("input_dim", (0, 1))
        x = b.input(case.x, (case.batch, s, case.k))
        args = self._products(x) | self._table() | self._place(s)
        shapes = {"k": (case.batch, case.capacity, case.kv_heads, case.d)}
        shapes["v"] = (*shapes["k"][:3], case.value_d)
        self.old = {}
        for name, shape in shapes.items():
            self.old[name] = held(self.rng.standard_normal(shape), case.kinds[name])
            if not case.attends:  # rows that are not written must stay bit by bit, and are never read
                self.old[name][:, ::3] = np.nan
        caches = [b.stored("mutable", case.kinds[n], host(self.old[n], case.kinds[n]), n) for n in "kv"]
        args |= {"key_cache": caches[0], "value_cache": caches[1], "kv_limit": case.kv_limit, "window": case.window}
        turned = (case.batch, s, case.heads, case.d)
        outs = (("f32", turned), *((case.kinds[name], shapes[name]) for name in "kv"), ("i32", (8,)))
        made = b.node(OP, args, *outs, alias=[None, *caches] if case.in_place else [])
        results = list(made)
        if case.attends:
            attend: dict[str, Arg] = {
                "query": made[0], "key": made[1], "value": made[2], "q_layout": "bshd", "kv_layout": "bshd",
                "out_layout": "bshd", "start_pos": args["start_pos"], "kv_limit": case.kv_limit,
                "window": case.window, "sizes": made[3], "lengths": args.get("lengths"),
            }  # fmt: skip
            results = [b.node("webgpu.attention", attend, ("f32", (*turned[:3], case.value_d))), made[3]]
        pairs = tuple((old.value, new.value) for old, new in zip(caches, made[1:3], strict=True))
        self.graph = b.graph(*results, mutations=pairs if case.in_place else ())
        for node in self.graph.nodes:
            assert check_node(self.graph, node) is None
        self.delegate = b.load(self.graph, self.device)

    def _products(self, x: Ref) -> dict[str, Arg]:
        case, b = self.case, self.builder
        self.weights: list[Array] = []
        weights: list[Ref] = []
        formats: list[Arg] = []
        for i, n in enumerate(case.rows):
            if isinstance(case.weights, int):
                made = quantized(n, case.k, case.weights, case.group, case.scale, case.zeros, seed=i)
                words, form = made.packed()
                self.weights.append(made.values)
                weights.append(b.stored("constant", "u32", words, f"w{i}"))
                formats.append(form.literal())
            else:
                plain = held(self.rng.standard_normal((n, case.k)), case.weights)
                self.weights.append(plain.astype(np.float64))
                weights.append(b.stored("constant", case.weights, host(plain, case.weights), f"w{i}"))
                formats.append(None)
        self.biases = [self.rng.standard_normal(n) if i in case.biases else None for i, n in enumerate(case.rows)]
        self.biases = [None if bias is None else bias.astype(np.float32) for bias in self.biases]
        self.norm = self.rng.uniform(0.5, 1.5, case.k).astype(np.float32)
        biases = tuple(
            None if a is None else b.stored("constant", "f32", a, f"b{i}") for i, a in enumerate(self.biases)
        )
        return {
            "input": x, "weights": tuple(weights), "formats": None if formats == [None] * 3 else tuple(formats),
            "biases": biases if case.biases else None, "norm_eps": EPS if case.norm else None,
            "norm_weight": b.stored("constant", "f32", self.norm, "g") if case.norm == "weight" else None,
            "quantize": (-128, 127, 1e-9) if case.quantize else None,
        }  # fmt: skip

    def _table(self) -> dict[str, Arg]:
        case, b = self.case, self.builder
        width = case.rot if case.wide_table else case.rot // 2
        self.cos, self.sin = (held(self.rng.standard_normal((case.capacity, width)), case.table) for _ in "cs")
        cos, sin = (
            b.stored("constant", case.table, host(table, case.table), name)
            for table, name in ((self.cos, "cos"), (self.sin, "sin"))
        )
        return {"cos": cos, "sin": sin, "rot": case.rot, "interleaved": case.interleaved}

    def _place(self, s: Dim) -> dict[str, Arg]:
        case, b = self.case, self.builder
        if not case.ragged:
            b.input("i64", (1,))
            position = Sym("scalar", (1, 0))
            return {"start": position, "start_pos": position}
        past, q_len = b.input("i32", (case.batch,)), b.input("i32", (case.batch,))
        given: dict[str, Arg] = {"past": past, "q_len": q_len, "rows": s, "capacity": case.capacity}
        return {"start": 0, "start_pos": 0, "lengths": b.node("webgpu.lengths", given, ("i32", (case.batch, 4)))}

    # -- steps

    def x(self, rows: int, seed: int = 0) -> Array:
        shape = (self.case.batch, rows, self.case.k)
        return held(np.random.default_rng(1000 * rows + seed).standard_normal(shape), self.case.x)

    def feeds(self, x: Array, position: int | Sequence[int], new: Sequence[int] = ()) -> list[Any]:
        given: list[Any] = [(self.case.x, host(x, self.case.x))]
        if not isinstance(position, int):
            return [*given, ("i32", np.array(position, np.int32)), ("i32", np.array(new, np.int32))]
        return [*given, ("i64", np.array([position], np.int64))]

    def __call__(self, x: Array, position: int | Sequence[int], new: Sequence[int] = ()) -> list[Array]:
        """A step, with every temporary full of NaN before."""
        poison(self.delegate)
        made = self.delegate.execute(self.feeds(x, position, new))
        return [np.asarray(to_user(dtype, np.asarray(array), False)) for dtype, array in made]

    def expected(self, x: Array, first: Sequence[int]) -> tuple[list[Array], float]:
        """Rotated query and key and value [B, S, heads, head size] in float64, positions counted from `first` of each
        batch row, and what products may be off by."""
        case = self.case
        wide = x.astype(np.float64)
        if case.norm:
            wide = wide / np.sqrt((wide * wide).mean(-1, keepdims=True) + EPS)
            wide = wide * self.norm if case.norm == "weight" else wide
        quantum = 0.0
        if case.quantize:  # two elements near ties may fall to either side
            least, most = wide.min(-1, keepdims=True).clip(max=0), wide.max(-1, keepdims=True).clip(0)
            step = (most - least) / 255
            zero = np.clip(-128 - np.round(least / step), -128, 127)
            wide = (np.clip(np.round(wide / step) + zero, -128, 127) - zero) * step
            quantum = 2 * float(np.nanmax(step))
        sums, slack = [], 0.0
        for weight, bias, heads in zip(
            self.weights, self.biases, (case.heads, case.kv_heads, case.kv_heads), strict=True
        ):
            y = wide @ weight.T + (0 if bias is None else bias)
            sums.append(y.reshape(*y.shape[:2], heads, -1))
            slack = max(slack, case.slack * float(np.nanmax(np.abs(wide) @ np.abs(weight).T)))
            slack = max(slack, quantum * float(np.abs(weight).max()))
        tables = [
            [t[np.minimum(np.arange(p, p + x.shape[1]), case.capacity - 1)] for t in (self.cos, self.sin)]
            for p in first
        ]
        for i in range(2):
            rows = [
                rotated(sums[i][b : b + 1], *tables[b], case.rot, "bshd", case.interleaved) for b in range(case.batch)
            ]
            sums[i] = np.concatenate(rows)
        return sums, slack

    def bits(self, name: str) -> Array:
        """What the GPU holds of a cache, as integers [batch, row, the rest]."""
        raw = bytes(self.device.gpu.queue.read_buffer(self.delegate.state.buffers()[name]))
        stored = self.device.limits.wgsl_type(self.case.kinds[name])
        shape = self.old[name].shape
        return np.frombuffer(raw, BITS[2 if stored == "f16" else 4])[: int(np.prod(shape))].reshape(*shape[:2], -1)

    def check(self, rows: int, position: int | Sequence[int], new: Sequence[int] = ()) -> None:
        """One call: results against the formulas, rows not written against the bits before."""
        case = self.case
        first = [position] * case.batch if isinstance(position, int) else list(position)
        count = [rows] * case.batch if isinstance(position, int) else list(new)
        x, before = self.x(rows, first[0]), {name: self.bits(name) for name in "kv"}
        for b, n in enumerate(count):
            x[b, n:] = np.nan  # padding
        turned, keys, values, _ = self(x, position, new)
        (q, k, v), slack = self.expected(x, first)
        for b, n in enumerate(count):
            close(turned[b, :n], q[b, :n], "f32", slack)
            np.testing.assert_array_equal(turned[b, n:], 0)
            at = slice(first[b], first[b] + n)
            for name, got, want in (("k", keys, k), ("v", values, v)):
                close(got[b, at], want[b, :n], case.kinds[name], slack)
                outside = np.delete(np.arange(case.capacity), np.arange(case.capacity)[at])
                np.testing.assert_array_equal(self.bits(name)[b, outside], before[name][b, outside])
                if not case.in_place:
                    np.testing.assert_array_equal(self.bits(name), before[name])
                    np.testing.assert_array_equal(got[b, outside], self.old[name][b, outside])

    def kernels(self) -> list[str]:
        """Of the plan that was made last, without those that only the graph around the operator needs."""
        *_, plan = self.delegate._plans.values()
        return [launch.kernel for launch in plan.launches if launch.kernel != "lengths"]

    def close(self) -> None:
        self.delegate.close()
        self.delegate.state.close()


def close(got: Array, want: Array, dtype: str, slack: float) -> None:
    np.testing.assert_allclose(got.astype(np.float64), want, rtol=TOLERANCE[dtype], atol=slack + TOLERANCE[dtype])


@contextmanager
def layer(case: Case, on: str) -> Iterator[Layer]:
    made = Layer(case, on)
    try:
        yield made
    finally:
        made.close()
