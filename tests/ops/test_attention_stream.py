"""The decode kernels of devices with subgroups: how work is divided, and variants that only larger subgroups run."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from executorch_webgpu.backend.graph import Ref, Sym
from executorch_webgpu.ops.attention_common import Problem
from executorch_webgpu.ops.attention_decode import (
    STREAM_WORKGROUPS,
    choose_stream,
    join_blocks,
    stream_memory,
)
from executorch_webgpu.ops.base import Dispatch, Limits
from executorch_webgpu.runtime import Sampling
from executorch_webgpu.runtime.decoding.chooser import Advance, Chooser, Logits
from executorch_webgpu.runtime.gpu.kernel import Kernel, KernelKey
from executorch_webgpu.runtime.gpu.plan import NodeCache
from tests.harness import GraphBuilder, device
from tests.ops.attention_reference import Attention, Case, arrays, assert_close, attention, reference

LARGE = Limits(
    max_invocations=1024, max_workgroup_memory=49152, max_storage_buffers=64, f16=True, subgroup_size=32,
    cheap_indirect=True, max_binding=2**31 - 4, max_buffer=2**32 - 1,
)  # fmt: skip
"""A device like a large discrete GPU."""


def problem(heads: int, kv_heads: int, d: int, capacity: int, rows: int = 1, batch: int = 1) -> Problem:
    return Problem(batch, heads, kv_heads, rows, capacity, d, d)


@pytest.mark.parametrize("batch", [1, 3, 8, 100])
@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 8), (8, 8), (24, 8), (28, 4), (64, 8), (1, 1), (71, 1)])
def test_work_is_divided_evenly(heads: int, kv_heads: int, batch: int) -> None:
    """Workgroups are near the aim whatever heads and batch are, and all rows have a place."""
    choice = choose_stream(problem(heads, kv_heads, 128, 65536, batch=batch), LARGE, 8)
    assert choice is not None
    assert choice.rows * choice.tiles * choice.row_tiles >= heads // kv_heads
    groups = batch * kv_heads * choice.row_tiles
    if groups <= STREAM_WORKGROUPS:
        assert STREAM_WORKGROUPS / 2 < groups * choice.splits <= STREAM_WORKGROUPS or choice.splits == 64
    else:
        assert choice.splits == 1
    used = stream_memory(choice.lanes, choice.shares, choice.rows, choice.tiles, LARGE.subgroup_size)
    assert used <= LARGE.max_workgroup_memory


def test_what_the_kernel_does_not_take_is_left_to_others() -> None:
    assert choose_stream(problem(8, 2, 12, 64), LARGE, 8) is None  # rows of f16 that 16 bytes do not divide
    assert choose_stream(problem(8, 2, 12, 64), LARGE, 4) is not None
    assert choose_stream(problem(8, 2, 64, 64), LARGE, 0) is None  # key and value stored in different types
    assert choose_stream(problem(8, 2, 264, 64), LARGE, 8) is None  # more lanes a row than a subgroup has
    assert choose_stream(problem(8, 2, 64, 64), replace(LARGE, subgroup_size=4), 8) is None
    assert choose_stream(problem(8, 2, 64, 64), replace(LARGE, subgroup_size=0), 8) is None
    assert choose_stream(problem(8, 2, 64, 64), replace(LARGE, max_workgroup_memory=1024), 8) is None


def dispatches(case: Case, limits: Limits) -> list[Dispatch]:
    """Those of one attention on a device with such limits; nothing is run."""
    b = GraphBuilder()
    q = b.input(case.q_dtype, (case.batch, case.rows, case.heads, case.d))
    k = b.input(case.kv_dtype, (case.batch, case.capacity, case.kv_heads, case.d))
    v = b.input(case.kv_dtype, (case.batch, case.capacity, case.kv_heads, case.value_d))
    b.input("i64", (1,))
    args = {
        "query": q, "key": k, "value": v, "q_layout": "bshd", "kv_layout": "bshd", "out_layout": "bshd",
        "attn_mask": b.input("f32", (case.rows, case.capacity)) if case.mask else None,
        "start_pos": Sym("scalar", (3, 0)), "kv_limit": "causal", "scale": None, "softcap": case.softcap,
        "window": 0, "sink": None,
    }  # fmt: skip
    out: Ref = b.node("webgpu.attention", args, (case.out_dtype, (case.batch, case.rows, case.heads, case.value_d)))

    class Fake:
        pass

    fake = Fake()
    fake.limits = limits  # type: ignore[attr-defined]
    return list(NodeCache(b.graph(out), fake).lower(0, lambda symbol: 0).dispatches)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("heads", "d", "rows", "capacity", "mask", "over"),
    [
        (8, 128, 1, 9000, None, 2), (8, 64, 1, 9000, None, 2), (8, 32, 1, 9000, None, 1), (4, 128, 1, 9000, None, 2),
        (2, 128, 1, 9000, None, 1), (8, 128, 1, 900, None, 1), (8, 128, 1, 900, "f32", 4), (8, 128, 3, 9000, None, 4),
        (8, 64, 3, 9000, None, 2), (8, 32, 3, 9000, None, 1), (4, 256, 1, 900, "f32", 2), (2, 128, 2, 9000, None, 2),
    ],
)  # fmt: skip
def test_how_many_lanes_divide_rows(heads: int, d: int, rows: int, capacity: int, mask: str | None, over: int) -> None:
    """Two where scores are only scaled, four at most where they cost more, none where keys are asked for ahead."""
    case = Case(heads, 2, d, rows, capacity, kv_dtype="f16", mask=mask)
    assert f"const OVER = {over}u;" in KernelKey.of(dispatches(case, LARGE)[0]).body


@pytest.mark.parametrize("prefetch", [0, 1])
@pytest.mark.parametrize("over", [1, 2, 4])
@pytest.mark.parametrize(
    ("heads", "rows", "d"), [(2, 1, 64), (4, 1, 64), (8, 1, 64), (6, 1, 40), (8, 3, 64), (4, 1, 32)]
)
def test_scores_that_climb_and_fall(heads: int, rows: int, d: int, over: int, prefetch: int) -> None:
    """Maxima rise in every round or never: scores of every second head climb from -200 to 200 along the keys."""
    variant = f"splits=2;lanes=128;prefetch={prefetch};over={over}"
    case = Case(heads, 2, d, rows, 1000, pos=990, scale=1.0, route="stream", variant=variant)
    tensors = dict(arrays(case))
    axis = np.full(d, d**-0.5, np.float32)
    signs = np.where(np.arange(heads) % 2, -1.0, 1.0).astype(np.float32)
    tensors["query"] = np.broadcast_to(signs[:, None, None] * axis, tensors["query"].shape).copy()
    climb = np.linspace(-200, 200, case.capacity, dtype=np.float32)
    tensors["key"] = np.broadcast_to(climb[:, None] * axis, tensors["key"].shape).copy()
    assert_close(attention(case, "full", tensors), reference(case, tensors))


@pytest.mark.parametrize("kv_dtype", ["f16", "f32"])
@pytest.mark.parametrize("mask", [None, "f32"])
@pytest.mark.parametrize(("heads", "rows"), [(2, 1), (4, 1), (8, 1), (16, 1), (6, 5)])
@pytest.mark.parametrize("d", [8, 40, 64, 96, 128, 256])
def test_variants_for_subgroups_of_32_compile(d: int, heads: int, rows: int, mask: str | None, kv_dtype: str) -> None:
    """This machine's driver may have smaller subgroups, but its compiler takes the text all the same."""
    on = device("full")
    case = Case(heads, 2, d, rows, 3000, kv_dtype=kv_dtype, mask=mask)
    found = dispatches(case, replace(LARGE, f16=on.limits.f16, max_workgroup_memory=on.limits.max_workgroup_memory))
    assert [dispatch.kernel for dispatch in found] == ["attention_stream", "attention_join"]
    for dispatch in found:
        on.kernel(KernelKey.of(dispatch))
    assert found[1].grid == (heads * join_blocks(problem(heads, 2, d, 3000, rows)), rows, 1)


def test_the_probe_compiles() -> None:
    on = device("full")
    on.kernel(KernelKey("subgroup_probe", (), (), (), ""))
    assert Kernel(on.gpu, KernelKey("subgroup_probe", (), (), (), "")).pipeline is not None
    assert on.limits.subgroup_size in (0, 4, 8, 16, 32, 64, 128)


@pytest.mark.parametrize("start", [62, 126])
def test_E5_a_length_that_only_the_gpu_advances(start: int) -> None:
    """The position moves past an edge of tiles between two runs of one submit, without the host."""
    on = device("full")
    case = Case(8, 2, 32, 1, 160)
    tensors = arrays(case)
    loaded = Attention(case, "full")
    try:
        assert_close(loaded(tensors, start), reference(case, tensors, start))
        plan = loaded.delegate.plan(loaded.delegate.bind(loaded.inputs(tensors, start)))
        [(_, word)] = [place for place in loaded.delegate.live.places() if place[0] in plan.live]
        logits = on.buffer(64, "other", "logits")
        advance = Advance(loaded.delegate.live.buffer, word, 1)
        chooser = Chooser(on, 8, 1, Logits(logits, 0, 8), 8, [], [advance])
        steps = chooser.launches(Sampling())
        for position in range(start + 1, start + 5):
            encoder = on.gpu.create_command_encoder()
            compute = encoder.begin_compute_pass()
            for launch in [*steps, *plan.launches]:
                compute.set_pipeline(launch.pipeline)
                compute.set_bind_group(0, launch.bind_group)
                compute.dispatch_workgroups(*launch.grid)
            compute.end()
            on.gpu.queue.submit([encoder.finish()])
            out = loaded.delegate.graph.outputs[0]
            assert isinstance(out, Ref)
            raw = on.gpu.queue.read_buffer(plan.buffers[out.value], 0, 4 * 8 * 32)
            expected = reference(case, tensors, position)
            assert_close(np.frombuffer(raw, np.float32).reshape(expected.shape), expected)  # one row: any layout
        chooser.close()
        on.release(logits, "other")
    finally:
        loaded.close()
