"""Attention whose grids `webgpu.rope_cache` sizes for the live length."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from executorch_webgpu.backend.graph import Arg, Graph, Node, Ref
from executorch_webgpu.ops.base import Dispatch, Limits, Lowering, check_node, find
from tests.harness import DEVICES, GraphBuilder, device
from tests.ops.copy_cases import poison
from tests.ops.test_rope_cache import Array, Case, layer

MERGE = "attention_join" if device("full").limits.subgroup_size >= 32 else "attention_merge"
"""The kernel that follows the splits on the device with all limits."""


def direct(grid: tuple[int, ...], merge: tuple[int, ...], split: Dispatch, seen: int) -> list[int]:
    """The words of `sizes` for `seen` keys, by the formulas of attention_splits.wgsl, from the direct dispatches."""
    most, tile = int(str(split.consts["SPLITS"])), int(str(split.consts["SPLIT_TILE"]))
    tiles = -(-seen // tile)
    size = -(-tiles // most) * tile
    used = -(-seen // size) if size else 0
    assert used <= most
    return [max(used, 1), *grid[1:], 0, *(merge if used > 1 else (0, 0, 0)), 0]


def seen_keys(case: Case, rows: int, position: int) -> int:
    """Keys that any row sees."""
    end = case.capacity if case.kv_limit == "all" else min(position + rows, case.capacity)
    first = max(position + 1 - case.window, 0) if case.window else 0
    return end - min(first, end)


def lowered(graph: Graph, node: Node, limits: Limits, **free: int) -> list[Dispatch]:
    op = find(node.op)
    assert op is not None
    return list(op.lower(Lowering(graph, limits, lambda sym: free["rows"] if sym.op == "input_dim" else 0), node))


LIVE = {
    "causal": (Case(capacity=1100), 1),
    "four-rows-two-batches": (Case(capacity=1100, batch=2, heads=6), 4),
    "prefix": (Case(capacity=300, kv_limit="prefix"), 2),
    "all": (Case(capacity=300, kv_limit="all"), 1),
    "window-1": (Case(capacity=1100, window=1), 1),
    "window-31": (Case(capacity=1100, window=31), 2),
    "window-40": (Case(capacity=1100, window=40), 1),
    "window-150": (Case(capacity=1100, window=150, batch=2), 2),
    "window-64": (Case(capacity=1100, window=64), 3),
    "window-100-all": (Case(capacity=300, window=100, kv_limit="all"), 1),
}


@pytest.mark.parametrize("name", LIVE)
def test_grids_are_those_of_the_live_length(name: str) -> None:
    """Lengths 1 to 200: what the kernel writes against attention's own dispatches and the formulas."""
    case, rows = LIVE[name]
    with layer(case, "full", attends=True) as made:
        attention = made.graph.nodes[1]
        plain = replace(attention, args={**attention.args, "sizes": None})
        split, merge = lowered(made.graph, plain, made.device.limits, rows=rows)
        assert (split.indirect, merge.indirect) == (None, None)
        given, counts = made.inputs(rows, 0), set()
        for position in range(200 - rows + 1):
            _, sizes = made(given, position)
            wanted = direct(split.grid, merge.grid, split, seen_keys(case, rows, position))
            assert sizes.tolist() == wanted, position
            counts.add(wanted[0])
        most = max(seen_keys(case, rows, position) for position in range(200 - rows + 1))
        assert (max(counts) > 1) == (most > int(str(split.consts["SPLIT_TILE"])))
        assert split.grid[0] >= max(counts)


@pytest.mark.parametrize("subgroup", [8, 32, 64])
@pytest.mark.parametrize(
    "case",
    [
        Case(capacity=4096, d=64, rot=64),
        Case(capacity=4096, d=32, rot=16, key_cache="f16", value="f16", heads=8, batch=2),
    ],
    ids=["f32", "f16"],
)
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_both_operators_agree_on_any_device(rows: int, case: Case, subgroup: int) -> None:
    """The kernel is told the very grids and division of the attention that follows, for other devices' limits too."""
    limits = Limits(max_storage_buffers=16, subgroup_size=subgroup, cheap_indirect=True, f16=True)
    with layer(case, "full", attends=True) as made:
        rope, attention = made.graph.nodes
        (move,) = lowered(made.graph, rope, limits, rows=rows)
        split, merge = lowered(made.graph, attention, limits, rows=rows)
        assert move.kernel == "rope_cache_sizes"
        for dispatch, word, grid in ((split, 0, "split_grid"), (merge, 4, "merge_grid")):
            assert dispatch.indirect == rope.outputs[3]
            assert dispatch.indirect_word == word
            assert move.params[grid] == (*dispatch.grid, 0)
            for name in ("limit", "window", "capacity"):
                assert dispatch.params[name] == move.params[name], name
            for name in ("START", "SPLITS", "SPLIT_TILE"):
                assert dispatch.consts[name] == move.consts[name], name


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        ({}, 9),  # another route
        ({"max_storage_buffers": 8}, 1),
        ({"cheap_indirect": False}, 1),
        ({"subgroup_size": 0}, 1),
        ({"max_workgroups": 3}, 1),  # a folded merge: four heads
    ],
)
def test_fixed_grids_elsewhere(change: dict[str, Any], rows: int) -> None:
    given = Limits(max_storage_buffers=16, subgroup_size=32, cheap_indirect=True)
    with layer(Case(capacity=512), "full", attends=True) as made:
        rope, attention = made.graph.nodes
        (move,) = lowered(made.graph, rope, replace(given, **change), rows=rows)
        assert move.kernel == "rope_cache"
        dispatches = lowered(made.graph, attention, replace(given, **change), rows=rows)
        assert dispatches
        assert {d.indirect for d in dispatches} == {None}


def test_one_split_at_most_has_fixed_grids() -> None:
    """A cache of one split: there is nothing to size, and no merge."""
    with layer(Case(capacity=32), "full", attends=True) as made:
        made(made.inputs(1, 0), 3)
        (launch,) = made.launches("attention_stream")
        assert launch.indirect is None
        assert not made.launches(MERGE)


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize(
    "case",
    [Case(capacity=1100), Case(capacity=1100, window=100, batch=2, heads=6, interleaved=False)],
    ids=["causal", "window"],
)
def test_attention_through_sizes_is_the_same(case: Case, on: str) -> None:
    """Bit by bit, where the number of splits changes and far from it; without splits to merge there is no merge."""
    with layer(case, on, attends=True) as sized, layer(replace(case, sized=False), on, attends=True) as plain:
        for rows in (1, 2):
            for position in (0, 30, 31, 32, 33, 62, 63, 64, 65, 96, 500, 1000, 1001, 1100 - rows):
                given = sized.inputs(rows, position)
                poison(sized.delegate)
                got, sizes = sized(given, position)
                want, _ = plain(given, position)
                np.testing.assert_array_equal(got, want)
                assert np.isfinite(want).all()
                if on == "full":
                    assert (sizes[4:7] == 0).all() == (sizes[0] == 1)
                    assert sizes[:3].min() > 0
            indirect = [x for k in ("attention_stream", MERGE) for x in sized.launches(k)]
            if on == "full":
                assert [(launch.indirect is not None, launch.indirect_offset) for launch in indirect] == [
                    (True, 0),
                    (True, 16),
                ]
                assert len(sized.launches("rope_cache_sizes")) == 1
            else:
                assert len(sized.launches("rope_cache")) == 1
                *_, plan = sized.delegate._plans.values()
                assert all(launch.indirect is None for launch in plan.launches)
            assert all(x.indirect is None for k in ("attention_stream", "attention_merge") for x in plain.launches(k))


def test_attention_takes_its_grids_from_the_tensor() -> None:
    """Given by hand: the grids of all splits give the result, those of one split, or no merge, another one."""
    b = GraphBuilder()
    q, kv = b.input("f32", (1, 1, 4, 16)), b.input("f32", (1, 512, 2, 16))
    sizes = b.input("i32", (8,))
    args: dict[str, Arg] = {
        "query": q, "key": kv, "value": kv, "q_layout": "bshd", "kv_layout": "bshd", "out_layout": "bshd",
        "start_pos": 511, "kv_limit": "causal", "sizes": sizes,
    }  # fmt: skip
    graph = b.graph(b.node("webgpu.attention", args, ("f32", (1, 1, 4, 16))))
    assert check_node(graph, graph.nodes[0]) is None
    delegate = b.load(graph, device("full"))
    rng = np.random.default_rng(0)
    feeds = [("f32", rng.standard_normal(shape).astype(np.float32)) for shape in ((1, 1, 4, 16), (1, 512, 2, 16))]

    def attended(*words: int) -> Array:
        poison(delegate)
        ((_, got),) = delegate.execute([*feeds, ("i32", np.array(words, np.int32))])
        return np.asarray(got)

    try:
        split, merge = lowered(graph, graph.nodes[0], device("full").limits)
        good = attended(*split.grid, 0, *merge.grid, 0)
        (query, keys) = (array.astype(np.float64) for _, array in feeds)
        for head in range(4):
            scores = keys[0, :, head // 2] @ query[0, 0, head] / 4
            weights = np.exp(scores - scores.max())
            np.testing.assert_allclose(good[0, 0, head], weights @ keys[0, :, head // 2] / weights.sum(), atol=1e-5)
        for words in ((1, *split.grid[1:], 0, *merge.grid, 0), (*split.grid, 0, 0, 0, 0, 0)):
            bad = attended(*words)
            assert not np.allclose(bad, good, atol=1e-3)
    finally:
        delegate.close()


def test_attention_refuses_sizes_of_another_kind() -> None:
    b = GraphBuilder()
    x = b.input("f32", (1, 1, 4, 16))
    args: dict[str, Arg] = {
        "query": x, "key": x, "value": x, "q_layout": "bhsd", "kv_layout": "bhsd", "out_layout": "bhsd",
        "start_pos": 0, "kv_limit": "all", "sizes": b.input("f32", (8,)),
    }  # fmt: skip
    out: Ref = b.node("webgpu.attention", args, ("f32", (1, 1, 4, 16)))
    graph = b.graph(out)
    assert "sizes is f32[8]" in str(check_node(graph, graph.nodes[0]))
