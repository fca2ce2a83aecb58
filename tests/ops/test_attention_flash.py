"""The flash route against the float64 reference and the prefill kernel: all variants, with and without key splits."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from executorch_webgpu import wgsl
from executorch_webgpu.backend.graph import Arg
from executorch_webgpu.ops.attention_common import Problem
from executorch_webgpu.ops.attention_decode import DECODE_ROWS, FEW_ROWS, SHORT_PROMPT, suits_stream
from executorch_webgpu.ops.attention_flash import (
    MAX_SCRATCH,
    VARIANTS,
    FlashChoice,
    choose_flash,
    flash_memory,
    split_bytes,
    variants,
)
from executorch_webgpu.ops.base import Limits, check_node
from executorch_webgpu.runtime.methods.delegate import Delegate
from tests.harness import DEVICES, device
from tests.ops.attention_reference import Array, Attention, Case, arrays, assert_close, reference

HALF = (2e-3, 1e-2)
ROOMY = Limits(max_workgroup_memory=49152, max_invocations=1024, subgroup_size=32)
PLAIN = ["attention_flash"]
WIDE = ["attention_flash_wide"]
SPLIT = ["attention_flash", "attention_flash_merge"]


class Flash(Attention):
    """An attention on the flash route in a variant by name."""

    def __init__(self, case: Case, on: str, variant: str = "auto", dynamic: bool = False) -> None:
        super().__init__(case.with_(route="flash"), on, dynamic)
        self._set(variant=variant)

    def _set(self, **args: Arg) -> None:
        old = self.delegate
        nodes = tuple(replace(node, args={**node.args, **args}) for node in self.graph.nodes)
        self.graph = replace(self.graph, nodes=nodes)
        old.close()
        self.delegate = Delegate(self.graph, self.device, dict[str, bytes]().__getitem__, old.weights, old.state)

    def kernels(self, tensors: dict[str, Array], pos: int) -> list[str]:
        """The kernels that a call with these tensors runs."""
        env = self.delegate.bind(self.inputs(tensors, pos))
        return [launch.kernel for launch in self.delegate.plan(env).launches]


def problem_of(case: Case) -> Problem:
    return Problem(case.batch, case.heads, case.kv_heads, case.rows, case.capacity, case.d, case.value_d)


def check(
    case: Case, on: str, variant: str = "auto", kernels: list[str] | None = None, close: tuple[float, float] = HALF
) -> Array:
    """The flash kernel against the reference; returns its result."""
    tensors = arrays(case)
    loaded = Flash(case, on, variant)
    try:
        ran = loaded.kernels(tensors, case.pos)
        assert ran == kernels if kernels is not None else ran[0] == "attention_flash"
        out = loaded(tensors, case.pos)
    finally:
        loaded.close()
    exact = "f32" in (case.kv_dtype, case.out_dtype) and case.kv_dtype == case.out_dtype == case.q_dtype
    assert_close(out, reference(case, tensors), *((1e-4, 1e-3) if exact else close))
    return out


SIZES = [(4, 4), (8, 8), (12, 20), (16, 16), (32, 32), (40, 64), (64, 64), (80, 80), (96, 40), (112, 112)]


@pytest.mark.parametrize(("d", "dv"), [*SIZES, (128, 128), (256, 256)])
def test_head_sizes(d: int, dv: int) -> None:
    """f16 caches on the device that has halves, f32 on the other; more rows than a tile, keys past several tiles."""
    case = Case(2, 1, d, 37, 150, 113, dv=dv)
    if d % 16 == 0 and d != 64:
        check(case, "default-limits")
    else:
        check(case.with_(kv_dtype="f16", q_dtype="f16"), "full")


@pytest.mark.parametrize("on", DEVICES)
def test_rows_and_positions(on: str) -> None:
    """Edges of tiles of rows and keys; one delegate, plans with and without splits."""
    loaded = Flash(Case(3, 1, 16, 300, 520), on, dynamic=True)
    ran = set()
    try:
        for rows in (300, 1, 2, 10, 11, 21, 22, 31, 32, 33, 64, 65, 85, 86, 128):
            case = Case(3, 1, 16, rows, 520)
            tensors = arrays(case, rows)
            for pos in (0, 1, 63, 64, 65, 520 - rows):
                ran.add(tuple(loaded.kernels(tensors, pos)))
                assert_close(loaded(tensors, pos), reference(case, tensors, pos))
    finally:
        loaded.close()
    assert ran == {tuple(SPLIT)}


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8])
def test_groups_of_query_heads(group: int, on: str) -> None:
    """Packed rows: no group but a power of two fits a tile's rows; against the prefill kernel as well."""
    case = Case(2 * group, 2, 16, 35, 120, 80, batch=2)
    out = check(case, on, kernels=PLAIN)
    loaded = Attention(case.with_(route="prefill"), on)
    try:
        assert_close(out, loaded(arrays(case), case.pos).astype(np.float64))
    finally:
        loaded.close()


@pytest.mark.parametrize("layouts", ["bshd bshd bhsd", "bhsd bshd bshd", "bshd bhsd bshd", "bhsd bhsd bhsd"])
@pytest.mark.parametrize("capacity", [70, 300])
def test_layouts_and_batches(layouts: str, capacity: int) -> None:
    q, kv, out = layouts.split()
    case = Case(6, 3, 16, 12, capacity, 50, batch=3, dv=8, q_layout=q, kv_layout=kv, out_layout=out)
    check(case.with_(kv_dtype="f16"), "full", kernels=PLAIN if capacity < 256 else SPLIT)


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize(
    ("q", "kv", "out"), [("f16", "f16", "f16"), ("bf16", "bf16", "bf16"), ("bf16", "f16", "f32"), ("f32", "f32", "f16")]
)
def test_dtypes(q: str, kv: str, out: str, on: str) -> None:
    case = Case(4, 2, 12, 15, 310, 270, dv=16, q_dtype=q, kv_dtype=kv, out_dtype=out)
    check(case, on, kernels=SPLIT, close=(8e-3, 1e-2) if out == "bf16" else HALF)


OPTIONS = {
    "prefix": {"kv_limit": "prefix"},
    "all": {"kv_limit": "all", "pos": 0},
    "window": {"window": 33},
    "wide-window": {"window": 150, "kv_limit": "prefix"},
    "past-the-window": {"window": 20, "kv_limit": "all", "pos": 900},
    "softcap": {"softcap": 2.0, "scale": 9.0},
    "negative-scale": {"scale": -0.4},
    "sink": {"sink": 2.0},
    "no-sink": {"sink": -np.inf},
    "sink-softcap": {"sink": 60.0, "softcap": 50.0},
    "bool-mask": {"mask": "bool", "kv_limit": "all"},
    "causal-mask": {"mask": "f32"},
    "head-mask": {"mask": "f16", "mask_shape": (1, 6, 1, 300), "kv_limit": "all"},
    "batch-mask": {"mask": "bool", "mask_shape": (2, 1, 21, 320), "kv_limit": "prefix"},
    "all-at-once": {"softcap": 3.0, "window": 70, "mask": "f32", "sink": 0.5},
}


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str, on: str) -> None:
    """With split keys on one device, with whole ones on the other."""
    changes: dict[str, Any] = OPTIONS[name]
    case = Case(6, 2, 16, 21, 300, 200, batch=2, dv=8).with_(**changes)
    if on == "full":
        check(case, on, kernels=SPLIT)
    else:
        check(case, on, "small-whole", kernels=PLAIN)


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("variant", ["auto", "small-whole"])
def test_hidden_rows_have_no_effect(variant: str, on: str) -> None:
    """NaN in rows past the valid length, before the window, and where the mask hides a key from every row; a key that
    is NaN for the rows that see it leaves the others alone; rows that see no key are zero."""
    case = Case(4, 2, 16, 40, 400, 130, window=100, mask="f32", kv_limit="causal")
    tensors = {name: array.copy() for name, array in arrays(case).items()}
    for name in ("key", "value"):
        tensors[name][:, :, 170:] = np.nan
        tensors[name][:, :, :31] = np.nan
        tensors[name][:, :, 77] = np.nan
    tensors["attn_mask"][:, 77] = -np.inf
    tensors["attn_mask"][[0, 39]] = -np.inf
    tensors["value"][:, :, 150] = np.nan  # seen by rows 20 and later
    loaded = Flash(case, on, variant)
    try:
        assert loaded.kernels(tensors, case.pos) == (SPLIT if variant == "auto" else PLAIN)
        out = loaded(tensors, case.pos)
    finally:
        loaded.close()
    np.testing.assert_array_equal(out[:, :, [0, 39]], 0)
    assert np.isfinite(out[:, :, :20]).all()
    assert np.isnan(out[:, :, 20:39]).all()
    tensors["value"][:, :, 150] = 0
    assert_close(out[:, :, :20], reference(case, tensors)[:, :, :20])


@pytest.mark.parametrize("on", DEVICES)
def test_full_tiles_with_poison_behind(on: str) -> None:
    """Without a mask: the causal edge alone keeps rows from keys that are NaN for the rows after them."""
    case = Case(2, 1, 16, 90, 256, 100)
    tensors = {name: array.copy() for name, array in arrays(case).items()}
    tensors["key"][:, :, 150:] = np.nan
    tensors["value"][:, :, 150:] = np.nan
    loaded = Flash(case, on)
    try:
        out = loaded(tensors, case.pos)
    finally:
        loaded.close()
    assert_close(out[:, :, :50], reference(case, arrays(case))[:, :, :50])
    assert np.isnan(out[:, :, 50:]).all()


@pytest.mark.parametrize("on", DEVICES)
def test_masks_of_the_lowest_float(on: str) -> None:
    """Such keys vanish beside others; a row of nothing else gives the mean of the values."""
    case = Case(2, 1, 16, 3, 70, kv_limit="all", mask="f32")
    tensors = arrays(case)
    lowest = np.finfo(np.float32).min
    tensors["attn_mask"] = np.where(np.arange(210).reshape(3, 70) % 3 == 0, np.float32(0), lowest)
    tensors["attn_mask"][1] = lowest
    loaded = Flash(case, on)
    try:
        out = loaded(tensors, 0)
    finally:
        loaded.close()
    assert_close(out[:, :, [0, 2]], reference(case, tensors)[:, :, [0, 2]])
    assert_close(out[0, :, 1], np.broadcast_to(tensors["value"][0, 0].mean(0, dtype=np.float64), (2, 16)), 1e-3)


@pytest.mark.parametrize("on", DEVICES)
def test_large_logits(on: str) -> None:
    """Logits of some hundreds: without the running maximum the powers would overflow."""
    case = Case(4, 4, 32, 20, 300, 280, scale=4.0)
    tensors = {name: 2.5 * x for name, x in arrays(case).items()}
    assert float(np.abs(tensors["query"] @ tensors["key"].swapaxes(2, 3)).max()) * 4.0 > 177
    loaded = Flash(case, on)
    try:
        assert_close(loaded(tensors, 280), reference(case, tensors))
    finally:
        loaded.close()


@pytest.mark.parametrize("name", [name for name in VARIANTS if name.startswith(("medium", "small"))])
def test_variants(name: str) -> None:
    """Every variant that a device with 32 KiB of workgroup memory can run, on several tiles of rows and keys."""
    case = Case(4, 2, 64, 37, 290, 230, kv_dtype="f16", window=200)
    choice = choose_flash(problem_of(case), device("full").limits, name)
    assert choice is not None
    assert (choice.splits == 1) == name.endswith(("-whole", "-wide"))
    kernels = WIDE if name.endswith("-wide") else PLAIN if choice.splits == 1 else SPLIT
    check(case, "full", name, kernels=kernels)


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("pos", [0, 63, 64, 130])
def test_wide_tiles(d: int, pos: int) -> None:
    """Tiles of 128 keys of which the last one ends in the first or the second half, with a window too; f16, f32."""
    case = Case(2, 2, d, 40, 190, pos, kv_dtype="f16" if pos % 2 else "f32")
    check(case, "full", "medium-wide", kernels=WIDE)
    check(case.with_(heads=1, kv_heads=1, batch=40, rows=5, window=100), "full", "medium-wide", kernels=WIDE)


def test_variants_by_shuffle() -> None:
    """Shuffles among fewer lanes than the device permits, down to none."""
    most = device("full").limits.subgroup_size
    case = Case(2, 1, 16, 40, 100, 60)
    assert most >= 4, "the adapter has no subgroups"
    for lanes in (1, 2, 4):
        loaded = Flash(case, "full", "medium")
        old = loaded.device.limits
        try:
            loaded.device.limits = replace(old, subgroup_size=lanes)
            out = loaded(arrays(case), case.pos)
        finally:
            loaded.device.limits = old
            loaded.close()
        assert_close(out, reference(case, arrays(case)))


@pytest.mark.parametrize("on", DEVICES)
def test_splits_of_a_live_length(on: str) -> None:
    """16 splits by capacity: most are empty at short lengths, which one plan serves as well as long ones. Rows of the
    cache that are not valid yet are NaN, and so is whatever an earlier call left in the scratch of the splits."""
    case = Case(2, 1, 16, 20, 2048)
    choice = choose_flash(problem_of(case), device(on).limits)
    assert choice is not None
    assert choice.splits == 16
    tensors = arrays(case)
    poisoned = {name: np.full_like(array, np.nan) for name, array in tensors.items()}
    loaded = Flash(case, on)
    try:
        for pos in (2028, 0, 1, 43, 44, 45, 63, 64, 65, 900, 1003, 1004, 1005, 2000):
            assert loaded.kernels(tensors, pos) == SPLIT
            assert np.isnan(loaded(poisoned, 2028)).all()
            given = {name: array.copy() for name, array in tensors.items()}
            given["key"][:, :, pos + 20 :] = np.nan
            given["value"][:, :, pos + 20 :] = np.nan
            assert_close(loaded(given, pos), reference(case, given, pos))
    finally:
        loaded.close()


@pytest.mark.parametrize(("d", "on"), [(4, "full"), (128, "default-limits")])
def test_many_splits(d: int, on: str) -> None:
    """64 splits: at a head size of 128 more than the merge has lanes for side by side, at 4 fewer."""
    case = Case(1, 1, d, 9, 8192, 8000, window=7000)
    choice = choose_flash(problem_of(case), device(on).limits)
    assert choice is not None
    assert choice.splits == 64
    check(case, on, kernels=SPLIT)


@pytest.mark.parametrize("on", DEVICES)
def test_grids_are_folded(on: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More workgroups than one axis holds, the last row of the grid partly used; both kernels."""
    monkeypatch.setattr(device(on), "limits", replace(device(on).limits, max_workgroups=7))
    check(Case(6, 3, 16, 34, 300, 130, batch=2), on, kernels=SPLIT)


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("sink", [None, 1.0])
def test_no_keys_give_zeros(sink: float | None, on: str) -> None:
    case = Case(4, 2, 16, 20, 0, kv_limit="all", sink=sink)
    loaded = Flash(case, on)
    try:
        assert loaded.kernels(arrays(case), 0) == PLAIN
        np.testing.assert_array_equal(loaded(arrays(case), 0), 0)
    finally:
        loaded.close()


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize(
    ("case", "kernels"),
    [
        (Case(4, 2, 16, 9, 100, route="flash"), PLAIN),
        (Case(4, 2, 16, 9, 256, route="flash"), SPLIT),
        (Case(4, 2, 18, 9, 100), ["attention_prefill"]),
        (Case(4, 2, 16, 9, 100, dv=6), ["attention_prefill"]),
        (Case(4, 2, 16, 9, 100, route="prefill"), ["attention_prefill"]),
        (Case(4, 2, 18, 9, 100, route="flash"), ["attention_prefill"]),
    ],
)
def test_routes(case: Case, kernels: list[str], on: str) -> None:
    loaded = Attention(case, on)
    try:
        env = loaded.delegate.bind(loaded.inputs(arrays(case), 0))
        assert [launch.kernel for launch in loaded.delegate.plan(env).launches] == kernels
    finally:
        loaded.close()


@pytest.mark.parametrize(
    ("case", "kernels"),
    [
        (Case(4, 2, 16, 9, 100), ["attention_stream"]),
        (Case(4, 2, 16, 9, 256), ["attention_stream", "attention_merge"]),
        (Case(8, 2, 16, 64, 1100, window=40), ["attention_stream", "attention_merge"]),
        (Case(32, 2, 16, 61, 96, mask="f32", softcap=5.0), ["attention_stream"]),
        (Case(8, 2, 16, 16, 6200), ["attention_stream", "attention_merge"]),
        (Case(8, 2, 16, 17, 6200), SPLIT),
        (Case(8, 2, 16, 65, 3100), PLAIN),
    ],
)
def test_few_rows_and_short_prompts_stream(case: Case, kernels: list[str]) -> None:
    """Many workgroups that wait for one load each are faster than few that walk; large problems are not for them."""
    on = device("full")
    shape = Problem(1, case.heads, case.kv_heads, case.rows, case.capacity, case.d, case.d)
    count = case.heads // case.kv_heads * case.rows
    streams = count <= FEW_ROWS or case.kv_heads * -(-count // 4) * case.capacity <= SHORT_PROMPT
    assert suits_stream(shape) == streams == (kernels[0] == "attention_stream")
    if not on.limits.subgroup_size or case.d > 8 * on.limits.subgroup_size:
        kernels = ["attention_flash"]
    loaded, start = Attention(case, "full"), case.capacity - case.rows - 3
    try:
        tensors = arrays(case)
        assert_close(loaded(tensors, start), reference(case, tensors, start))
        ran = loaded.delegate.plan(loaded.delegate.bind(loaded.inputs(tensors, start))).launches
        names = [launch.kernel.replace("attention_join", "attention_merge") for launch in ran]
        assert names[: len(kernels)] == kernels
    finally:
        loaded.close()


def test_few_rows_are_not_for_this_route() -> None:
    loaded = Attention(Case(4, 2, 16, DECODE_ROWS, 300), "full")
    try:
        env = loaded.delegate.bind(loaded.inputs(arrays(loaded.case), 0))
        ran = {launch.kernel for launch in loaded.delegate.plan(env).launches}
        assert ran
        assert not ran & {*SPLIT, "attention_prefill"}
    finally:
        loaded.close()


def test_an_unknown_variant_is_refused() -> None:
    loaded = Attention(Case(4, 2, 16, 9, 100, route="flash"), "full")
    loaded.close()
    node = loaded.graph.nodes[0]
    assert check_node(loaded.graph, node) is None
    assert "variant is 'huge'" in str(check_node(loaded.graph, replace(node, args={**node.args, "variant": "huge"})))


def shader_memory(choice: FlashChoice, dv: int) -> int:
    """Bytes of the workgroup variables of attention_flash.wgsl, from its own text."""
    text = wgsl.source("attention_flash" if choice.keys == 64 else "attention_flash_wide")
    known: dict[str, Any] = {"QROWS": choice.rows, "CHUNK": choice.chunk, "VKEYS": choice.value_keys}
    known |= {"SUB": choice.shuffle, "DV": dv, "min": min, "max": max}
    for name, formula in re.findall(r"^const (\w+) = ([^;]+);", text, re.M):
        if name in ("KEYS", "HALF", "TY", "DV4", "PITCH", "P_PITCH", "BLOCKS", "VW", "PARTS", "V_AT"):
            known[name] = eval(re.sub(r"(\d)u", r"\1", formula).replace("/", "//"), known)
    [size] = re.findall(r"var<workgroup> \w+: array<vec4<f32>, (.+)>;", text)
    total: int = 16 * eval(re.sub(r"(\d)u", r"\1", size), known)
    return total


@pytest.mark.parametrize("dv", [4, 16, 64, 68, 128, 256])
def test_memory_is_that_of_the_shader(dv: int) -> None:
    found = variants(Problem(1, 8, 2, 512, 8192, 128, dv), ROOMY)
    assert {name.split("-")[0] for name in found} == {"large", "medium", "small"}
    for choice in found.values():
        for shuffle in (1, 2, 4, 8, 16):
            other = replace(choice, shuffle=shuffle)
            assert flash_memory(other, dv) == shader_memory(other, dv)


@pytest.mark.parametrize(("memory", "largest"), [(16384, 32), (32768, 64), (49152, 128)])
def test_choices_fit_the_limits(memory: int, largest: int) -> None:
    limits = replace(ROOMY, max_workgroup_memory=memory)
    seen = set()
    for d in (4, 36, 64, 80, 128, 256, 576):
        for batch, heads, rows, capacity in ((1, 1, 1, 1), (1, 32, 32, 8192), (1, 32, 512, 8704), (4, 32, 4096, 4096)):
            problem = Problem(batch, heads, max(1, heads // 4), rows, capacity, d, d)
            found = variants(problem, limits)
            assert set(found) <= set(VARIANTS)
            for choice in (*found.values(), choose_flash(problem, limits)):
                assert choice is not None
                assert flash_memory(choice, d) <= memory
                assert choice.invocations <= limits.max_invocations
                assert 1 <= choice.splits <= 64
                assert choice.splits == 1 or choice.splits * split_bytes(problem) <= MAX_SCRATCH
                # at most four loads of each tensor a lane
                assert choice.keys * choice.chunk <= 4 * choice.invocations
                assert choice.value_keys * min(32, 16 * -(-d // 64)) <= 4 * choice.invocations
                assert 64 % choice.value_keys == 0
                seen.add(choice.rows)
    assert max(seen) == largest
    assert choose_flash(problem, replace(limits, max_workgroup_memory=8192)) is None


def test_sizes_by_problem() -> None:
    """Large tiles for long prompts, smaller ones where large ones would leave a device idle; splits likewise."""
    long = choose_flash(Problem(1, 32, 8, 4096, 4096, 128, 128), ROOMY)
    assert long == FlashChoice(128, 8, 16, 16, 1, keys=128)
    narrow = choose_flash(Problem(1, 32, 8, 2048, 2048, 128, 128), ROOMY)
    assert narrow == FlashChoice(128, 8, 16, 16, 1)
    behind = choose_flash(Problem(1, 32, 8, 512, 8704, 128, 128), ROOMY)
    assert behind == long
    half = choose_flash(Problem(1, 32, 8, 2048, 2048, 64, 64), ROOMY)
    assert half == FlashChoice(128, 8, 32, 16, 1, keys=128)
    short = choose_flash(Problem(1, 32, 8, 128, 8192, 128, 128), ROOMY)
    assert short is not None
    assert (short.rows, short.splits) == (128, 4)
    alone = choose_flash(Problem(1, 32, 8, 512, 512, 128, 128), ROOMY)
    assert alone is not None
    assert (alone.rows, alone.splits) == (64, 1)
    few = choose_flash(Problem(1, 4, 4, 9, 4096, 128, 128), ROOMY)
    assert few is not None
    assert few.rows == 32
    assert choose_flash(Problem(1, 32, 8, 4096, 4096, 126, 128), ROOMY) is None
    assert choose_flash(Problem(1, 32, 8, 4096, 4096, 128, 126), ROOMY) is None
    assert choose_flash(Problem(1, 32, 8, 4096, 4096, 128, 128), Limits(max_invocations=32)) is None
