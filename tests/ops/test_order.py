"""topk and sort: order, ties, NaN, any dimension, both kernels against each other."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from executorch_webgpu.backend.graph import Sym
from executorch_webgpu.ops import order
from executorch_webgpu.runtime.errors import InputError
from tests.harness import DEVICES, GraphBuilder, device, run
from tests.ops.aten import randn

both_devices = pytest.mark.parametrize("on", DEVICES)


def ordered(x: torch.Tensor, dim: int, descending: bool) -> torch.Tensor:
    """Positions of a stable sort (PyTorch's own: NaN largest, first of equals first)."""
    return torch.sort(x, dim=dim, descending=descending, stable=True)[1]


def topk(builder: GraphBuilder, x: torch.Tensor, k: int, dim: int, largest: bool, short: str) -> tuple[Any, Any]:
    shape = list(x.shape)
    if shape:
        shape[dim] = k
    args: dict[str, Any] = {
        "self": builder.input(short, x.shape),
        "k": k,
        "dim": dim,
        "largest": largest,
        "sorted": True,
    }
    result: tuple[Any, Any] = builder.node("aten.topk.default", args, (short, shape), ("i64", shape))
    return result


CASES = [
    (randn(5, 8), 2, -1), (randn(3, 64).round(), 6, 1), (randn(4, 5, 6), 3, 1), (randn(2, 3000), 5, 1),
    (randn(1, 3000).round(), 70, 1),
    (randn(3000, 3), 4, 0), (torch.tensor([math.nan, 1.0, math.inf, math.nan, -math.inf, 1.0]), 6, 0),
    (randn(3, 4), 0, 1), (randn(0, 4), 2, 1),
    (torch.full((2, 1200), -math.inf), 3, 1), (torch.tensor(2.0), 1, 0),
]  # fmt: skip


@both_devices
@pytest.mark.parametrize("largest", [True, False])
def test_topk(largest: bool, on: str) -> None:
    builder = GraphBuilder()
    outputs: list[Any] = []
    for x, k, dim in CASES:
        outputs += topk(builder, x, k, dim, largest, "f32")
    ints = torch.tensor([[3, 1, 3, 2], [-5, 0, 7, 7]])
    outputs += topk(builder, ints, 3, 1, largest, "i64")
    half = randn(2, 9).half()
    outputs += topk(builder, half, 3, 1, largest, "f16")
    got = run(builder, builder.graph(*outputs), device(on), *(x for x, _, _ in CASES), ints, half)
    for number, (x, k, dim) in enumerate([*CASES, (ints, 3, 1), (half, 3, 1)]):
        positions = ordered(x, dim, largest)
        positions = positions.narrow(dim, 0, k) if x.dim() else positions
        np.testing.assert_array_equal(got[2 * number + 1], positions.numpy())
        wanted = x.gather(dim, positions) if x.dim() else x
        np.testing.assert_array_equal(got[2 * number], wanted.numpy())


@both_devices
def test_sort(on: str) -> None:
    tensors = [
        (randn(4, 33).round(), 1),
        (randn(3, 40, 5), 1),
        (randn(2, 1500).round(), -1),
        (torch.tensor([2.0, math.nan, -1.0, math.nan]), 0),
    ]
    builder = GraphBuilder()
    outputs: list[Any] = []
    for x, dim in tensors:
        for descending in (False, True):
            args: dict[str, Any] = {
                "self": builder.input("f32", x.shape),
                "stable": True,
                "dim": dim,
                "descending": descending,
            }
            outputs += builder.node("aten.sort.stable", args, ("f32", x.shape), ("i64", x.shape))
    got = run(builder, builder.graph(*outputs), device(on), *(x for x, _ in tensors for _ in range(2)))
    number = 0
    for x, dim in tensors:
        for descending in (False, True):
            positions = ordered(x, dim, descending)
            np.testing.assert_array_equal(got[number + 1], positions.numpy())
            np.testing.assert_array_equal(got[number], x.gather(dim, positions).numpy())
            number += 2


@both_devices
def test_both_kernels_agree(on: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = randn(3, 400).round()
    results = []
    for short in (1, 10**6):
        monkeypatch.setattr(order, "SHORT", short)
        builder = GraphBuilder()
        refs = topk(builder, x, 17, 1, True, "f32")
        results.append(run(builder, builder.graph(*refs), device(on), x))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    np.testing.assert_array_equal(results[0][1], results[1][1])


@both_devices
def test_more_workgroups_than_one_dimension_holds(on: str) -> None:
    rows = 65535 * 32 + 9  # rows of two elements, 32 a workgroup
    x = torch.arange(rows * 2).reshape(rows, 2) % 7
    builder = GraphBuilder()
    refs = topk(builder, x, 1, 1, True, "i64")
    values, positions = run(builder, builder.graph(*refs), device(on), x)
    np.testing.assert_array_equal(values[:, 0], x.amax(1).numpy())
    np.testing.assert_array_equal(positions[:, 0], (x[:, 1] > x[:, 0]).numpy())


@both_devices
def test_more_lines_than_one_dimension_holds(on: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "SHORT", 0)  # one workgroup a line
    x = torch.arange(65535 + 9).reshape(-1, 1) % 91
    builder = GraphBuilder()
    values, positions = run(builder, builder.graph(*topk(builder, x, 1, 1, True, "i64")), device(on), x)
    np.testing.assert_array_equal(values, x.numpy())
    assert not positions.any()


@both_devices
def test_k_beyond_a_dynamic_size_is_refused_before_the_step(on: str) -> None:
    builder = GraphBuilder()
    size = Sym("input_dim", (0, 0))
    x = builder.input("f32", (size,))
    args: dict[str, Any] = {"self": x, "k": 3, "dim": 0, "largest": True, "sorted": True}
    refs = builder.node("aten.topk.default", args, ("f32", (3,)), ("i64", (3,)))
    delegate = builder.load(builder.graph(*refs), device(on))
    try:
        for count in (5, 3, 90):
            data = randn(count).numpy()
            (_, values), _ = delegate.execute([("f32", data)])
            np.testing.assert_array_equal(values, np.sort(data)[::-1][:3])
        with pytest.raises(InputError, match="k \\(the dimension has 2 elements\\)"):
            delegate.execute([("f32", np.zeros(2, np.float32))])
    finally:
        delegate.close()
