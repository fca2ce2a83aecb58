"""Reads and writes at places that a tensor holds, against PyTorch: bit-identical."""

from typing import Any

import numpy as np
import pytest
import torch

from executorch_webgpu.backend.graph import Sym
from executorch_webgpu.runtime.errors import InputError
from tests.harness import DEVICES, GraphBuilder, device, run
from tests.ops.copy_cases import NAMES, Case, check, execute, in_place, poison, ramp, reason, run_twice, same

OPEN = 2**63 - 1
F16, BF16, I64 = torch.float16, torch.bfloat16, torch.int64
DTYPES = (F16, BF16, I64, torch.int32, torch.int8, torch.uint8, torch.bool)


def ids(*shape: int, below: int, seed: int = 0, low: int = 0, dtype: torch.dtype = I64) -> torch.Tensor:
    return torch.randint(low, below, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def distinct(count: int, below: int, seed: int = 0) -> torch.Tensor:
    return torch.randperm(below, generator=torch.Generator().manual_seed(seed))[:count]


def index(name: str, own: torch.Tensor, indices: list[torch.Tensor | None]) -> Case:
    def reference(self: torch.Tensor, indices: list[torch.Tensor | None]) -> torch.Tensor:
        return torch.ops.aten.index.Tensor(self, [None if i is None else i.long() for i in indices])

    return Case(name, "aten.index.Tensor", {"self": own, "indices": indices}, {}, reference)


def put(name: str, own: torch.Tensor, indices: list[torch.Tensor | None], values: torch.Tensor) -> Case:
    return Case(
        name,
        "aten.index_put.default",
        {"self": own, "indices": indices, "values": values},
        {"accumulate": False},
        lambda self, indices, values: torch.ops.aten.index_put.default(self, indices, values),
    )


def embed(name: str, weight: torch.Tensor, indices: torch.Tensor) -> Case:
    literals = {"padding_idx": 0, "scale_grad_by_freq": False, "sparse": False}
    return Case(
        name,
        "aten.embedding.default",
        {"weight": weight, "indices": indices},
        literals,
        lambda weight, indices: torch.embedding(weight, indices),
        kinds={"weight": "constant"},
    )


def along(
    name: str, op: str, dim: int, reference: Any, literals: dict[str, Any] | None = None, **inputs: torch.Tensor
) -> Case:
    return Case(name, f"aten.{op}", inputs, {"dim": dim, **(literals or {})}, reference)


READS = [
    index("rows", ramp((9, 4)), [ids(3, below=9)]),
    index("rows_odd", ramp((9, 7)), [ids(5, below=9, low=-9)]),
    index("rows_i32", ramp((9, 8)), [ids(5, below=9, dtype=torch.int32)]),
    index("one_row", ramp((9, 16)), [ids(1, below=9)]),
    index("scalar_index", ramp((9, 3)), [torch.tensor(-2)]),
    index("inner", ramp((2, 3, 7)), [None, None, ids(4, below=7)]),
    index("middle_2d", ramp((2, 5, 8)), [None, ids(2, 3, below=5)]),
    index("two_adjacent", ramp((3, 4, 5)), [ids(6, below=3), ids(6, below=4, seed=1)]),
    index("two_broadcast", ramp((3, 4, 8)), [ids(2, 1, below=3), ids(3, below=4, seed=1, low=-4)]),
    index("two_inner", ramp((2, 3, 4, 5)), [None, ids(2, below=3), ids(2, below=4)]),
    index("two_apart", ramp((3, 4, 5)), [ids(6, below=3), None, ids(6, below=5, seed=2, low=-5)]),
    index("two_apart_inner", ramp((2, 3, 4, 5)), [None, ids(2, 2, below=3), None, ids(2, below=5)]),
    index("three", ramp((3, 4, 5)), [ids(4, below=3), ids(1, below=4), ids(2, 4, below=5)]),
    index("none_found", ramp((4, 3)), [torch.zeros(0, dtype=I64)]),
    index("empty_rest", ramp((4, 0)), [ids(3, below=4)]),
    *(index(f"rows_{NAMES[d]}", ramp((5, 8), d), [ids(3, below=5, seed=4)]) for d in DTYPES),
    embed("embed", ramp((30, 16)), ids(1, 5, below=30)),
    embed("embed_odd", ramp((7, 13)), ids(2, 3, below=7)),
    embed("embed_one", ramp((7, 1)), ids(1, below=7)),
    embed("embed_scalar", ramp((7, 4)), torch.tensor(6)),
    embed("embed_none", ramp((7, 4)), torch.zeros(1, 0, dtype=I64)),
    embed("embed_f16", ramp((9, 12), F16), ids(1, 4, below=9)),
    embed("embed_bf16", ramp((9, 6), BF16), ids(1, 4, below=9)),
    along(
        "index_select",
        "index_select.default",
        1,
        lambda self, index: self.index_select(1, index),
        self=ramp((2, 6, 4)),
        index=ids(5, below=6),
    ),
    along(
        "index_select_last",
        "index_select.default",
        -1,
        lambda self, index: self.index_select(-1, index),
        self=ramp((3, 6)),
        index=ids(2, below=6),
    ),
    along(
        "gather",
        "gather.default",
        1,
        lambda self, index: self.gather(1, index),
        {"sparse_grad": False},
        self=ramp((3, 6, 4)),
        index=ids(2, 8, 3, below=6),
    ),
    along(
        "gather_vector",
        "gather.default",
        0,
        lambda self, index: self.gather(0, index),
        self=ramp((6,), I64),
        index=ids(4, below=6),
    ),
    along(
        "gather_scalar",
        "gather.default",
        0,
        lambda self, index: self.gather(0, index),
        self=ramp(()),
        index=torch.tensor(0),
    ),
    Case(
        "take",
        "aten.take.default",
        {"self": ramp((3, 4)), "index": ids(2, 5, below=12, low=-12)},
        {},
        lambda self, index: self.take(index),
    ),
]
WRITES = [
    put("kv_heads_first", ramp((1, 2, 9, 8)), [None, None, distinct(3, 9)], ramp((1, 2, 3, 8), start=500)),
    put("kv_low_rank", ramp((1, 2, 9, 8), F16), [None, None, torch.tensor([4])], ramp((2, 1, 8), F16, 900)),
    put("kv_bf16", ramp((1, 2, 9, 6), BF16), [None, None, torch.tensor([8, 0])], ramp((1, 2, 2, 6), BF16, 50)),
    put("ring_positions", ramp((32,), I64), [distinct(5, 32)], ramp((5,), I64, 100)),
    put("negative", ramp((6, 4)), [torch.tensor([-1, 0])], ramp((2, 4), start=70)),
    put("scalar_value", ramp((6, 5)), [distinct(3, 6)], torch.tensor(2.5)),
    put("two", ramp((4, 5, 3)), [torch.tensor([0, 3, 1]), torch.tensor([4, -5, 2])], ramp((3, 3), start=90)),
    put("two_apart", ramp((4, 3, 5)), [torch.tensor([0, 3]), None, torch.tensor([4, 2])], ramp((2, 3), start=90)),
    put("nothing", ramp((4, 5)), [torch.zeros(0, dtype=I64)], ramp((0, 5))),
    *(put(f"rows_{NAMES[d]}", ramp((6, 8), d), [torch.tensor([5, 2])], ramp((2, 8), d, 3)) for d in DTYPES),
    along(
        "index_copy",
        "index_copy.default",
        1,
        lambda self, index, source: self.index_copy(1, index, source),
        self=ramp((2, 6, 4)),
        index=distinct(3, 6),
        source=ramp((2, 3, 4), start=80),
    ),
    along(
        "scatter_src",
        "scatter.src",
        1,
        lambda self, index, src: self.scatter(1, index, src),
        self=ramp((3, 6)),
        index=torch.stack([distinct(4, 6, s) for s in (1, 2)]),
        src=ramp((3, 5), start=60),
    ),
    along(
        "scatter_value",
        "scatter.value",
        0,
        lambda self, index: self.scatter(0, index, -1.5),
        {"value": -1.5},
        self=ramp((5, 3)),
        index=ids(2, 3, below=5),
    ),
    along(
        "scatter_value_bool",
        "scatter.value",
        0,
        lambda self, index: self.scatter(0, index, True),
        {"value": True},
        self=torch.zeros(5, dtype=torch.bool),
        index=ids(2, below=5),
    ),
]


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("case", READS + WRITES, ids=lambda c: c.name)
def test_matches_torch(case: Case, on: str) -> None:
    check(case, on)


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("case", WRITES, ids=lambda c: c.name)
def test_in_place(case: Case, on: str) -> None:
    b, graph, feeds = in_place(case)
    same(run_twice(b, graph, on, *feeds)[0], case.expected()[0])


@pytest.mark.parametrize("on", DEVICES)
def test_in_place_kv_write_is_one_dispatch(on: str) -> None:
    b, graph, feeds = in_place(WRITES[0])
    before = device(on).counters.copy()
    run(b, graph, device(on), *feeds)
    assert device(on).counters.since(before).dispatches == 1


OUT_OF_RANGE = [  # case, and a bad index that PyTorch refuses too
    (READS[0], "indices", -10),
    (READS[0], "indices", 9),
    (READS[5], "indices", 7),
    (next(c for c in READS if c.name == "embed"), "indices", -1),
    (next(c for c in READS if c.name == "embed"), "indices", 30),
    (next(c for c in READS if c.name == "index_select"), "index", -1),
    (next(c for c in READS if c.name == "gather"), "index", 6),
    (next(c for c in READS if c.name == "take"), "index", 12),
    (WRITES[0], "indices", 9),
    (WRITES[6], "indices", 5),
    (next(c for c in WRITES if c.name == "scatter_src"), "index", -1),
]


def spoiled(case: Case, name: str, bad: int) -> Case:
    """The case with the last index tensor's first element replaced; the reference stays that of the good indices."""
    good = case.expected()
    inputs = dict(case.inputs)
    tensors = list(inputs[name]) if isinstance(inputs[name], list) else [inputs[name]]
    tensors[-1] = tensors[-1].clone()
    tensors[-1].view(-1)[0] = bad
    inputs[name] = tensors if isinstance(inputs[name], list) else tensors[0]
    return Case(case.name, case.op, inputs, case.literals, lambda **_: good, kinds=case.kinds)


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize(("case", "name", "bad"), OUT_OF_RANGE)
def test_an_index_out_of_range_in_an_input_is_refused_by_the_host(case: Case, name: str, bad: int, on: str) -> None:
    with pytest.raises(InputError, match=rf"(index|token id).*size|index.*elements.*{bad}"):
        check(spoiled(case, name, bad), on)


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("bad", [-(2**31), -10, 9, 2**31 - 1])
def test_an_index_out_of_range_made_on_the_gpu_harms_nothing(on: str, bad: int) -> None:
    """Computed indices escape the host: a read is clamped, a write skipped, also with two index tensors."""
    b = GraphBuilder()
    own = ramp((9, 4))
    x, i = b.input("f32", (9, 4)), b.input("i64", (2,))
    values = b.input("f32", (2, 4))
    # A copy of the indices into a temporary is no input any more.
    made = b.node("aten.flip.default", {"self": i, "dims": (0,)}, ("i64", (2,)))
    read = b.node("aten.index.Tensor", {"self": x, "indices": (made,)}, ("f32", (2, 4)))
    args: dict[str, Any] = {"self": x, "indices": (made,), "values": values, "accumulate": False}
    written = b.node("aten.index_put.default", args, ("f32", (9, 4)))
    zero = b.stored("constant", "i64", np.zeros(2, np.int64), "zero")
    pair: dict[str, Any] = {"self": x, "indices": (made, zero), "accumulate": False}
    one = b.input("f32", (2,))
    both = b.node("aten.index_put.default", {**pair, "values": one}, ("f32", (9, 4)))
    args = {"self": x, "indices": (zero, made), "values": one, "accumulate": False}
    across = b.node("aten.index_put.default", args, ("f32", (9, 4)))
    new = ramp((2, 4), start=200)
    got = run(
        b, b.graph(read, written, both, across), device(on), own, torch.tensor([3, bad]), new, torch.tensor([5.0, 6.0])
    )
    same(got[0][1], own[3])
    same(got[0][0], own[0 if bad < 0 else 8])
    expected = own.clone()
    expected[3] = new[1]
    same(got[1], expected)
    expected = own.clone()
    expected[3, 0] = 6.0
    same(got[2], expected)
    expected = own.clone()  # here a bad index plus a good one would make a place inside the tensor
    expected[0, 3] = 6.0
    same(got[3], expected)


@pytest.mark.parametrize("on", DEVICES)
def test_dynamic_embedding_grows_after_shrinking(on: str) -> None:
    weight = ramp((11, 8))
    b = GraphBuilder()
    s = Sym("input_dim", (0, 1))
    i = b.input("i64", (1, s))
    w = b.stored("constant", "f32", weight.numpy(), "w")
    y = b.node("aten.embedding.default", {"weight": w, "indices": i, "padding_idx": -1}, ("f32", (1, s, 8)))
    delegate = b.load(b.graph(y), device(on))
    try:
        for length in (3, 1, 40, 0, 7):
            feed = ids(1, length, below=11, seed=length)
            execute(delegate, feed)
            poison(delegate)
            same(execute(delegate, feed)[0], weight[feed])
    finally:
        delegate.close()


def test_dynamic_sizes_that_do_not_fit_are_refused() -> None:
    """Sizes that only a call reveals: values that do not broadcast, an index longer than the tensor it goes along."""
    b = GraphBuilder()
    n, m = Sym("input_dim", (1, 0)), Sym("input_dim", (2, 0))
    x, i, v = b.input("f32", (6, 4)), b.input("i64", (n,)), b.input("f32", (m, 4))
    put_ = b.node("aten.index_put.default", {"self": x, "indices": (i,), "values": v}, ("f32", (6, 4)))
    rows = b.node("aten.expand_copy.default", {"self": i, "size": (4, n)}, ("i64", (4, n)))
    got = b.node("aten.gather.default", {"self": v, "dim": 1, "index": rows}, ("f32", (4, n)))
    graph = b.graph(put_, got)
    own, new = ramp((6, 4)), ramp((4, 4), start=50)
    indices = torch.tensor([3, 1, 0, 2])
    made = run(b, graph, device(DEVICES[0]), own, indices, new)
    same(made[0], own.index_put((indices,), new))
    same(made[1], new.gather(1, indices.expand(4, 4)))
    with pytest.raises(InputError, match="broadcast"):
        run(b, graph, device(DEVICES[0]), own, indices, ramp((5, 4)))
    with pytest.raises(InputError, match="at axis 0"):
        run(b, graph, device(DEVICES[0]), own, indices[:1], ramp((1, 4)))


@pytest.mark.parametrize("on", DEVICES)
def test_more_workgroups_than_one_grid_axis_holds(on: str) -> None:
    """One gather of more than 65,535 * 64 elements by two index tensors, so index_offsets folds its grid as well."""
    count = 65_535 * 64 + 65
    b = GraphBuilder()
    x, i = b.input("i64", (1, 3)), b.input("i64", (1,))
    many = b.node("aten.expand_copy.default", {"self": i, "size": (count,)}, ("i64", (count,)))
    zero = b.stored("constant", "i64", np.zeros(1, np.int64), "zero")
    big = b.node("aten.index.Tensor", {"self": x, "indices": (zero, many)}, ("i64", (count,)))
    some = b.node(
        "aten.slice_copy.Tensor",
        {"self": big, "dim": 0, "start": 0, "end": OPEN, "step": 4_999},
        ("i64", (len(range(0, count, 4_999)),)),
    )
    tail = b.node(
        "aten.slice_copy.Tensor", {"self": big, "dim": 0, "start": -70, "end": OPEN, "step": 1}, ("i64", (70,))
    )
    got = run(b, b.graph(some, tail), device(on), np.array([[7, 8, 9]]), np.array([2]))
    assert set(got[0].tolist()) == {9}
    assert set(got[1].tolist()) == {9}


MASK = ramp((4,), torch.bool)
REFUSED = [
    (
        Case(
            "m",
            "aten.index.Tensor",
            {"self": ramp((4, 2)), "indices": [MASK]},
            {},
            lambda self, indices: self[indices[0]],
        ),
        "mask",
    ),
    (
        Case(
            "f", "aten.gather.default", {"self": ramp((4,)), "index": ramp((4,))}, {"dim": 0}, lambda self, index: self
        ),
        "integer",
    ),
    (
        Case(
            "acc",
            "aten.index_put.default",
            {"self": ramp((4,)), "indices": [torch.tensor([1])], "values": ramp((1,))},
            {"accumulate": True},
            lambda self, **_: self,
        ),
        "accumulate",
    ),
    (
        Case(
            "dt",
            "aten.index_put.default",
            {"self": ramp((4,)), "indices": [torch.tensor([1])], "values": ramp((1,), F16)},
            {"accumulate": False},
            lambda self, **_: self,
        ),
        "f16",
    ),
    (Case("no", "aten.index.Tensor", {"self": ramp((4,)), "indices": [None]}, {}, lambda self, **_: self), "no index"),
]


@pytest.mark.parametrize(("case", "words"), REFUSED, ids=lambda v: getattr(v, "name", ""))
def test_refused_with_a_reason(case: Case, words: str) -> None:
    assert words in reason(case)
