"""`keep_codes`: which products get integers, what stays, and that the numbers are those without it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from executorch_webgpu.backend.graph import Arg, Graph, Ref
from executorch_webgpu.backend.passes import fuse_projections, keep_codes
from executorch_webgpu.backend.passes.cleanup import remove_unused
from executorch_webgpu.ops.base import check_node
from tests.harness import DEVICES, GraphBuilder, device, run
from tests.ops.quantized import quantized

K = 64
FAKE, PROJECT, PACKED, QUANTIZE = (
    "webgpu.fake_quantize", "webgpu.project", "webgpu.linear_packed", "webgpu.quantize_activations"
)  # fmt: skip


class Records:
    """A graph on one input x [M, K], made node by node; values are f32."""

    def __init__(self, m: int = 3) -> None:
        self.b, self.m = GraphBuilder(), m
        self.x: Any = self.b.input("f32", (m, K))

    def fake(self, x: Ref, high: int = 127, eps: float | None = None, **more: Arg) -> Any:
        args: dict[str, Arg] = {"input": x, "quant_min": -128, "quant_max": high, "eps": eps, **more}
        return self.b.node(FAKE, args, ("f32", (self.m, K)))

    def norm(self, x: Ref) -> Any:
        weight = self.b.stored("constant", "f32", np.linspace(0.5, 1.5, K, dtype=np.float32), f"g{len(self.b.values)}")
        return self.b.node("webgpu.rms_norm", {"input": x, "weight": weight, "eps": 1e-5}, ("f32", (self.m, K)))

    def linear(self, x: Ref, n: int = 20, bits: int = 4, group: int = 32, bias: bool = False) -> Any:
        words, form = quantized(n, K, bits, group, seed=len(self.b.values)).packed()
        name = f"w{len(self.b.values)}"
        args: dict[str, Arg] = {
            "input": x, "weight": self.b.stored("constant", "u32", words, name), "format": form.literal(),
            "bias": self.b.stored("constant", "f32", np.ones(n, np.float32), f"{name}.bias") if bias else None,
        }  # fmt: skip
        return self.b.node(PACKED, args, ("f32", (self.m, n)))

    def add(self, x: Ref, y: Ref) -> Any:
        return self.b.node("aten.add.Tensor", {"self": x, "other": y, "alpha": 1}, ("f32", (self.m, K)))


def after(graph: Graph) -> Graph:
    for apply in (fuse_projections, keep_codes):
        graph = remove_unused(apply(graph))
    assert [check_node(graph, node) for node in graph.nodes] == [None] * len(graph.nodes)
    return graph


def ops(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes]


def cases() -> dict[str, tuple[Records, Graph, list[str]]]:
    found: dict[str, tuple[Records, Graph, list[str]]] = {}

    def case(name: str, expected: list[str], *outputs: Any) -> None:
        found[name] = (r, r.b.graph(*outputs), expected)

    r = Records()
    case("alone, with a bias", [PROJECT], r.linear(r.fake(r.x), bias=True))
    r = Records()
    case("behind a norm", [PROJECT], r.linear(r.fake(r.norm(r.x))))
    r = Records()
    case("symmetric", [PROJECT], r.linear(r.fake(r.x, symmetric=True), bits=8, group=K))
    r = Records()
    h = r.fake(r.x, symmetric=True)
    case("symmetric, for many", [QUANTIZE, PROJECT, PACKED], *(r.linear(h, n) for n in (20, 8, 8, 4)))
    r = Records()
    h = r.fake(r.norm(r.x), eps=1e-3)
    case("siblings", [PROJECT], *(r.linear(h, n) for n in (20, 8, 8)))
    r = Records()
    h = r.fake(r.x, high=100)
    case("more readers than fit one product", [QUANTIZE, PROJECT, PACKED], *(r.linear(h, n) for n in (20, 8, 8, 4)))
    r = Records()
    h = r.fake(r.norm(r.x))
    case("something else reads the floats", ["webgpu.rms_norm", FAKE, PROJECT], r.linear(h), h)
    r = Records()
    h = r.fake(r.x)
    case("its floats are added as well", [FAKE, PROJECT], r.add(r.linear(h, K), h))
    r = Records()
    h = r.norm(r.x)
    case("the norm is read elsewhere", ["webgpu.rms_norm", PROJECT], r.linear(r.fake(h)), h)
    r = Records()
    case("groups without a form", [FAKE, PACKED], r.linear(r.fake(r.x), group=16))
    r = Records()
    case("codes that are no bytes", [FAKE, PACKED], r.linear(r.fake(r.x, high=200)))
    return found


CASES = cases()


@pytest.mark.parametrize("name", CASES)
def test_what_is_found(name: str) -> None:
    _, graph, expected = CASES[name]
    assert ops(after(graph)) == expected


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("name", [name for name in CASES if name != "codes that are no bytes"])
def test_the_numbers_are_the_same(name: str, on: str) -> None:
    r, graph, _ = CASES[name]
    x = np.random.default_rng(1).standard_normal((r.m, K)).astype(np.float32)
    want, got = (run(r.b, made, device(on), x) for made in (graph, after(graph)))
    for a, b in zip(want, got, strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-4)
