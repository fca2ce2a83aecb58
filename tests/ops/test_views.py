"""Views: recognised without moving anything, and right as copies where no storage is shared."""

import pytest
import torch

from executorch_webgpu.backend.graph import Sym, make_dim
from executorch_webgpu.ops import find
from executorch_webgpu.ops.base import check_node, viewed
from executorch_webgpu.ops.views import NAMES as VIEW_NAMES
from tests.harness import DEVICES, GraphBuilder, device, run
from tests.ops.copy_cases import Case, check, ramp, reason, same

F = torch.float32
CASES = [
    Case(
        "view",
        "aten.view_copy.default",
        {"self": ramp((2, 3, 4))},
        {"size": (6, -1)},
        lambda self: self.view(6, -1),
        True,
    ),
    Case("reshape", "aten.reshape.default", {"self": ramp((5, 1))}, {"size": (5,)}, lambda self: self.reshape(5), True),
    Case("scalar", "aten.view_copy.default", {"self": ramp((1,))}, {"size": ()}, lambda self: self.view(()), True),
    Case(
        "empty", "aten.view_copy.default", {"self": ramp((0, 3))}, {"size": (3, 0)}, lambda self: self.view(3, 0), True
    ),
    Case(
        "unsqueeze",
        "aten.unsqueeze_copy.default",
        {"self": ramp((3, 2), torch.int64)},
        {"dim": 1},
        lambda self: self.unsqueeze(1),
        True,
    ),
    Case(
        "squeeze_dims",
        "aten.squeeze_copy.dims",
        {"self": ramp((2, 1, 3, 1), torch.float16)},
        {"dim": (1, 3)},
        lambda self: self.squeeze((1, 3)),
        True,
    ),
    Case(
        "clone_bf16", "aten.clone.default", {"self": ramp((3, 5), torch.bfloat16)}, {}, lambda self: self.clone(), True
    ),
    Case(
        "clone_bool",
        "dim_order_ops._clone_dim_order.default",
        {"self": ramp((7,), torch.bool)},
        {"non_blocking": False},
        lambda self: self.clone(),
        True,
    ),
    Case("alias_i8", "aten.alias_copy.default", {"self": ramp((9,), torch.int8)}, {}, lambda self: self.clone(), True),
]


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_view_as_a_copy(case: Case, on: str) -> None:
    check(case, on)


def test_every_name_is_registered_with_a_view_rule() -> None:
    for name in VIEW_NAMES:
        op = find(name)
        assert op is not None
        assert op.view is not None


@pytest.mark.parametrize("on", DEVICES)
def test_a_view_that_shares_storage_makes_no_dispatch(on: str) -> None:
    b = GraphBuilder()
    x = b.input("f32", (2, 6))
    y = b.node("aten.view_copy.default", {"self": x, "size": (3, 4)}, ("f32", (3, 4)), alias=[x])
    value = ramp((2, 6))
    before = device(on).counters.copy()
    (got,) = run(b, b.graph(y), device(on), value)
    assert device(on).counters.since(before).dispatches == 0
    same(got, value.view(3, 4))


def test_reinterpreting_a_dtype_is_refused() -> None:
    case = Case(
        "v", "aten.view_copy.default", {"self": ramp((4,))}, {"size": (4,)}, lambda self: self.view(torch.int32)
    )
    assert "reinterpreting f32 as i32" in reason(case)


S = Sym("input_dim", (0, 1))
TWICE = make_dim("mul", S, 2)
RULES = [  # operator, self shape, literals, result shape, is a view
    ("aten.permute_copy.default", (1, S, 4), {"dims": (1, 0, 2)}, (S, 1, 4), True),
    ("aten.permute_copy.default", (2, S, 4), {"dims": (1, 0, 2)}, (S, 2, 4), False),
    ("aten.permute_copy.default", (1, S, 4, 1), {"dims": (3, 1, 2, 0)}, (1, S, 4, 1), True),
    ("aten.permute_copy.default", (1, 4, S, 8), {"dims": (2, 0, 1, 3)}, (S, 1, 4, 8), False),
    ("aten.transpose_copy.int", (1, S), {"dim0": 0, "dim1": -1}, (S, 1), True),
    ("aten.t_copy.default", (3, S), {}, (S, 3), False),
    ("aten.expand_copy.default", (1, S, 1), {"size": (1, -1, 1)}, (1, S, 1), True),
    ("aten.expand_copy.default", (S, 1), {"size": (1, S, 1)}, (1, S, 1), True),
    ("aten.expand_copy.default", (1, S, 1), {"size": (1, S, 2)}, (1, S, 2), False),
    ("aten.expand_copy.default", (1, 1), {"size": (1, S)}, (1, S), False),
    ("aten.slice_copy.Tensor", (1, S, 4), {"dim": 1, "start": 0, "end": 2**63 - 1, "step": 1}, (1, S, 4), True),
    ("aten.slice_copy.Tensor", (1, TWICE, 4), {"dim": 1, "start": 0, "end": S, "step": 1}, (1, S, 4), False),
    ("aten.slice_copy.Tensor", (1, 8, 4), {"dim": 1, "start": 0, "end": S, "step": 1}, (1, S, 4), False),
    ("aten.select_copy.int", (1, S, 4), {"dim": 0, "index": -1}, (S, 4), True),
    ("aten.select_copy.int", (2, S, 4), {"dim": 0, "index": 0}, (S, 4), False),
    ("aten.repeat.default", (S, 4), {"repeats": (1, 1, 1)}, (1, S, 4), True),
    ("aten.repeat.default", (S, 4), {"repeats": (2, 1)}, (TWICE, 4), False),
    ("aten.repeat_interleave.self_int", (S, 4), {"repeats": 1, "dim": 0, "output_size": None}, (S, 4), True),
    ("aten.split_copy.Tensor", (S, 4), {"split_size": 4, "dim": 1}, (S, 4), True),
]


@pytest.mark.parametrize(("op", "shape", "literals", "result", "view"), RULES)
def test_view_rules_with_dynamic_sizes(op, shape, literals, result, view) -> None:  # type: ignore[no-untyped-def]
    b = GraphBuilder()
    b.input("i64", (1, S))
    x = b.input("f32", shape)
    y = b.node(op, {"self": x, **literals}, ("f32", result))
    graph = b.graph(y)
    assert check_node(graph, graph.nodes[0]) is None
    assert viewed(graph, graph.nodes[0]) == (x.value if view else None)


def test_cat_of_one_tensor_is_a_view_of_it_unless_cast() -> None:
    for dtype, expected in (("f32", True), ("f16", False)):
        b = GraphBuilder()
        x = b.input(dtype, (2, S))
        y = b.node("aten.cat.default", {"tensors": (x,), "dim": -1}, ("f32", (2, S)))
        graph = b.graph(y)
        assert (viewed(graph, graph.nodes[0]) == x.value) == expected
