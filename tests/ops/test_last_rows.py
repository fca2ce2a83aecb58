"""`executorch_webgpu::last_rows`, eager and on the GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from executorch_webgpu.backend.graph import Sym
from executorch_webgpu.llm.group_query_attention import last_rows
from executorch_webgpu.ops.base import check_node
from executorch_webgpu.ops.last_rows import NAME
from tests.harness import DEVICES, GraphBuilder, device, run
from tests.ops.aten import SHORT

BATCH, SIZE = 5, 7


def graph_of(x: torch.Tensor, q_len: torch.Tensor) -> Any:
    b = GraphBuilder()
    shape = (x.shape[0], Sym("input_dim", (0, 1)), *x.shape[2:])
    args = {"x": b.input(SHORT[x.dtype], shape), "q_len": b.input(SHORT[q_len.dtype], tuple(q_len.shape))}
    return b, b.graph(b.node(NAME, args, (SHORT[x.dtype], (x.shape[0], x.shape[-1]))))


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_rows(kind: torch.dtype, dtype: torch.dtype, on: str) -> None:
    """One, some, all and no real rows, and numbers that are no lengths."""
    for rows in (1, 4, 65):
        for shape in ((BATCH,), (BATCH, 1), (1, BATCH)):
            x = torch.randn(BATCH, rows, SIZE).to(dtype)
            q_len = torch.tensor([1, rows, 0, (rows + 1) // 2, rows], dtype=kind).reshape(shape)
            b, graph = graph_of(x, q_len)
            assert check_node(graph, graph.nodes[0]) is None
            [got] = run(b, graph, device(on), x, q_len)
            want = torch.stack([x[b, max(int(n), 1) - 1] for b, n in enumerate(q_len.reshape(-1))])
            np.testing.assert_array_equal(got.astype(np.float32), want.float().numpy())
            assert torch.equal(last_rows(x, q_len), want)
    b, graph = graph_of(x, q_len)
    bad = torch.tensor([-1, 66, 2**31 - 1, -(2**31), 2], dtype=torch.int32).reshape(1, BATCH).to(kind)
    [got] = run(b, graph, device(on), x, bad)
    want = torch.stack([x[b, row] for b, row in enumerate((0, 64, 64, 0, 1))])
    np.testing.assert_array_equal(got.astype(np.float32), want.float().numpy())


def test_more_workgroups_than_one_dimension_has() -> None:
    x, q_len = torch.randn(3, 2, 65535 * 64 // 3 + 40), torch.tensor([1, 2, 0], dtype=torch.int32)
    b, graph = graph_of(x, q_len)
    [got] = run(b, graph, device("full"), x, q_len)
    np.testing.assert_array_equal(got, last_rows(x, q_len).numpy())


@pytest.mark.parametrize(
    ("x", "q_len", "message"),
    [
        (
            torch.zeros(2, 3),
            torch.zeros(2).int(),
            r"x is f32\[2, 3\]; it must be a float tensor \[batch, rows, elements\]",
        ),
        (torch.zeros(2, 3, 4).int(), torch.zeros(2).int(), r"x is i32\[2, 3, 4\]"),
        (
            torch.zeros(2, 3, 4),
            torch.zeros(2),
            r"q_len is f32\[2\]; it must be i32 or i64, one for each of 2 batch rows",
        ),
        (torch.zeros(2, 3, 4), torch.zeros(3).int(), r"q_len is i32\[3\]"),
        (torch.zeros(2, 3, 4), torch.zeros(2, 2).int(), r"q_len is i32\[2, 2\]"),
    ],
)
def test_refusals(x: torch.Tensor, q_len: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        last_rows(x, q_len)
    if x.dim() == 3:
        _, graph = graph_of(x, q_len)
        reason = check_node(graph, graph.nodes[0])
        assert reason is not None
        assert reason.split("; ")[0].startswith(("x is i32", "q_len is"))


def test_opcheck() -> None:
    torch.library.opcheck(
        torch.ops.executorch_webgpu.last_rows.default, (torch.randn(2, 3, 4), torch.tensor([1, 3], dtype=torch.int32))
    )


def test_a_call_without_rows_is_refused() -> None:
    with pytest.raises(ValueError, match=r"x is f32\[2, 0, 4\]; it must have at least one row"):
        last_rows(torch.zeros(2, 0, 4), torch.zeros(2).int())
