"""Pairs of permutes that cancel, also around an RMSNorm."""

from __future__ import annotations

import numpy as np
import pytest

from executorch_webgpu.backend.graph import Graph
from executorch_webgpu.backend.passes.cleanup import cancel_permutes, remove_unused
from tests.harness import GraphBuilder, device, run

SIZES = (2, 3, 4, 5)
SWAP = (0, 2, 1, 3)


def build(first: tuple[int, ...], second: tuple[int, ...], norm: bool, read_twice: bool) -> tuple[GraphBuilder, Graph]:
    """x + 1, permuted, normalised if asked for, permuted again; what stands between may have another reader."""
    b = GraphBuilder()
    x = b.node("aten.add.Tensor", {"self": b.input("f32", SIZES), "other": 1, "alpha": 1}, ("f32", SIZES))
    middle = tuple(SIZES[i] for i in first)
    inner = b.node("aten.permute_copy.default", {"self": x, "dims": first}, ("f32", middle))
    if norm:
        weight = b.stored("constant", "f32", np.linspace(0.5, 2, middle[-1], dtype=np.float32), "weight")
        inner = b.node("webgpu.rms_norm", {"input": inner, "weight": weight, "eps": 1e-5}, ("f32", middle))
    last = tuple(middle[i] for i in second)
    out = b.node("aten.permute_copy.default", {"self": inner, "dims": second}, ("f32", last))
    return b, b.graph(out, *([inner] if read_twice else []))


@pytest.mark.parametrize(
    ("first", "second", "norm", "read_twice", "left"),
    [
        (SWAP, SWAP, False, False, 0),
        (SWAP, SWAP, True, False, 0),
        (SWAP, SWAP, False, True, 1),
        (SWAP, SWAP, True, True, 2),
        ((1, 2, 0, 3), (2, 0, 1, 3), True, False, 0),
        ((1, 2, 0, 3), (1, 2, 0, 3), True, False, 2),
        ((0, 1, 3, 2), (0, 1, 3, 2), False, False, 0),
        ((0, 1, 3, 2), (0, 1, 3, 2), True, False, 2),  # the norm is along another axis then
    ],
)
def test_pairs(first: tuple[int, ...], second: tuple[int, ...], norm: bool, read_twice: bool, left: int) -> None:
    b, graph = build(first, second, norm, read_twice)
    done = remove_unused(cancel_permutes(graph))
    assert sum(node.op == "aten.permute_copy.default" for node in done.nodes) == left
    x = np.random.default_rng(0).standard_normal(SIZES, dtype=np.float32)
    for got, want in zip(run(b, done, device("full"), x), run(b, graph, device("full"), x), strict=True):
        np.testing.assert_array_equal(got, want)
