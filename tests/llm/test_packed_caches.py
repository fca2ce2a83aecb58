"""The operator with caches of packed integers, int8 and int4, on the GPU and eagerly.

Tests with a letter and a number cover the row of that name of the attention checklist (groups E and I).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from executorch_webgpu.llm import quantized_cache
from executorch_webgpu.llm.group_query_attention import OPERATOR
from executorch_webgpu.runtime.gpu.host import to_host
from executorch_webgpu.runtime.methods.replay import Replay
from tests.harness import DEVICES, device
from tests.llm.cases import (
    FORMS,
    Array,
    Case,
    arguments,
    attended,
    call,
    close,
    normed,
    reference,
    turned,
)
from tests.llm.packed import (
    DTYPES,
    SCALES,
    Packed,
    codes_in,
    codes_of,
    compiled,
    numbers,
    packed,
    stored,
    tokens,
    transform,
)
from tests.llm.records import CACHES, INPUTS
from tests.ops.copy_cases import poison

KINDS = tuple(DTYPES)
NAMES = (
    "plain", "ragged", "one row, one token", "flat", "packed, sizes apart", "half-split rotary", "interleaved rotary",
    "partial rotary", "short table", "norms and rotary", "bias of a batch", "bias of heads", "short bias", "bool bias",
    "window", "softcap", "sink", "smooth softmax", "scale", "not causal", "not causal, window and sink", "everything",
    "half", "brain float",
)  # fmt: skip


def fitting(case: Case, kind: str) -> Case:
    """The case with head sizes that the kind of cache has."""
    return case.with_(dv=16) if kind == "int4" and case.dv is not None else case


def expected(case: Case, given: dict[str, Any], caches: tuple[Array, Array]) -> Array:
    """float64 result [B, S, Hq, Dv] of attention over given caches, new rows included."""
    tensors = {n: None if not isinstance(t, torch.Tensor) else t.double().numpy() for n, t in given.items()}
    query = tensors["query"]
    if case.packed:
        query = query[..., : case.heads * case.d]
    query = query.reshape(case.batch, -1, case.heads, case.d)
    out = np.zeros((case.batch, query.shape[1], case.heads, case.v_size))
    for b, (past, new) in enumerate(zip(case.past, case.counts, strict=True)):
        for s in range(new):
            for h in range(case.heads):
                q = turned(case, normed(case, query[b, s, h], tensors["q_norm"]), tensors, past + s)
                out[b, s, h] = attended(case, tensors, caches[0][b], caches[1][b], q, (b, h, s))
    return out


def check_codes(case: Case, given: dict[str, Any], state: dict[str, Array], kind: str) -> None:
    """Every new token and head: the scale is the largest value's, and codes are within half a step."""
    wanted = tokens(case, given)
    slack = 1e-5 if case.dtype == torch.float32 else 0.02  # a norm's result has the model's type
    for name, scales in zip(CACHES, SCALES, strict=True):
        for b, (past, new) in enumerate(zip(case.past, case.counts, strict=True)):
            at = slice(past, past + new)
            x = wanted[name][b, :new]
            y = x @ transform(x.shape[-1]) if kind == "int4" else x
            step = np.float64(state[scales][b, at])
            np.testing.assert_allclose(step, codes_of(x, kind)[1], rtol=slack)
            error = np.abs(codes_in(state[name][b, at], kind) * step - y)
            assert (error <= (0.51 + 100 * slack * case.norm) * np.abs(step) + slack).all()


def check(case: Case, kind: str, on: str, route: str = "auto") -> list[str]:
    """A call: codes, scales, result, padding, and every other row of the state. Returns the kernels that ran."""
    given = packed(arguments(case), kind)
    for b, past in enumerate(case.past):
        for name in SCALES:
            given[name][b, past:] = torch.nan
    with compiled(case, given, on, route) as layer:
        before = layer.state()
        got = layer(given)
        after, kernels = layer.state(), layer.kernels()
    check_codes(case, given, after, kind)
    for b, (past, new) in enumerate(zip(case.past, case.counts, strict=True)):
        for name, x in after.items():
            for part in (slice(0, past), slice(past + new, None)):
                np.testing.assert_array_equal(x[b, part], before[name][b, part])
    caches = tuple(numbers(after[n], after[s], kind) for n, s in zip(CACHES, SCALES, strict=True))
    close(got, expected(case, given, caches), case.dtype)  # type: ignore[arg-type]
    got = got.reshape(case.batch, case.rows, -1)
    for row, count in enumerate(case.counts):
        assert not got[row, count:].any()
    return kernels


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_I5_forms(name: str, kind: str) -> None:
    """Every option; rows that hold no token have NaN for a scale and stay as they were, byte for byte."""
    check(fitting(FORMS[name], kind), kind, "full")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["ragged", "packed, sizes apart", "interleaved rotary", "everything", "half"])
def test_I5_forms_on_default_limits(name: str, kind: str) -> None:
    check(fitting(FORMS[name], kind), kind, "default-limits")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["packed", "everything", "not causal", "bool bias", "half", "sink"])
def test_prompts(name: str, kind: str) -> None:
    """Many rows, past the edges of tiles."""
    case = fitting(FORMS[name], kind)
    counts = (70, 17, 1)[: case.batch]
    bias = None if case.bias is None else (*case.bias[:-2], 70, 100)
    case = case.with_(rows=70, q_len=counts, past=(3, 9, 80)[: case.batch], capacity=96, d=16, bias=bias)
    assert "attention_flash" in check(case, kind, "full")


ROUTES = {
    "stream": ("full", "attention_stream"),
    "decode": ("default-limits", "attention_decode"),
    "flash": ("default-limits", "attention_flash"),
    "prefill": ("full", "attention_prefill"),
    "naive": ("full", "attention_naive"),
}


@pytest.mark.parametrize("d", [8, 64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("route", ROUTES)
def test_routes(route: str, kind: str, d: int) -> None:
    """Each route by name, with splits, a window and a sink; value heads half as wide."""
    on, kernel = ROUTES[route]
    if route == "stream" and device(on).limits.subgroup_size < max(4, d // 8):
        kernel = "attention_prefill"  # with eight columns a lane, a cache row needs a wider subgroup
    rows = 5 if route in ("stream", "decode") else 9
    case = Case((0, 63, 150), (rows, 1, rows - 1), rows=rows, capacity=170, d=d, dv=max(8, d // 2), rot=d, window=100)
    assert kernel in check(case.with_(sinks=0.3, heads=6), kind, on, route)


@pytest.mark.parametrize("d", [4, 12, 20, 80, 96, 112, 256])
def test_int8_head_sizes(d: int) -> None:
    """Also those that no power of two is: the stream kernel takes multiples of 8."""
    kernels = check(Case((3, 40), (1, 2), rows=2, capacity=48, d=d, rot=d), "int8", "full")
    assert ("attention_stream" in kernels) == (d % 8 == 0 and d <= 8 * device("full").limits.subgroup_size)


@pytest.mark.parametrize("d", [8, 16, 32, 64, 128, 256])
def test_int4_head_sizes(d: int) -> None:
    kernels = check(Case((3, 40), (1, 2), rows=2, capacity=48, d=d, rot=d), "int4", "full")
    assert ("attention_stream" in kernels) == (d <= 8 * device("full").limits.subgroup_size)


# -- accuracy against floats

LIMITS = {"int8": ((0.02, 0.03), (0.01, 0.01)), "int4": ((0.2, 0.3), (0.15, 0.25))}
"""Kind -> (relative root mean square error, largest error) of prompts, and of tokens that follow one."""

NORMAL = 0.5
"""Standard deviation of normal numbers. The limits of largest errors are absolute; the peers' numbers are below 1/2."""


def ramp(shape: tuple[int, ...], modulus: int, offset: int) -> torch.Tensor:
    """The checklist's ramps, ((31 i) % modulus - offset) / 16."""
    return (((31 * torch.arange(int(np.prod(shape)))) % modulus - offset) / 16).reshape(shape)


def drawn(data: str, shape: tuple[int, ...], step: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """Ramps of `step` (modulus, offset); uniform numbers below 1/2, as the peers' tests have them; or normal ones."""
    if data == "ramps":
        return ramp(shape, *step)
    if data == "uniform":
        return torch.rand(shape, generator=generator) - 0.5
    return NORMAL * torch.randn(shape, generator=generator)


def filled(data: str, case: Case, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments with such numbers for query, key and value, and a real rotation."""
    steps = {"query": (17, 8), "key": (13, 6), "value": (11, 5)}
    generator = torch.Generator().manual_seed(case.rows)
    made = given | {name: drawn(data, given[name].shape, step, generator) for name, step in steps.items()}
    angle = torch.arange(case.capacity)[:, None] * 10000 ** (-torch.arange(case.rot // 2) / max(1, case.rot // 2))
    return made | ({"cos": angle.cos(), "sin": angle.sin()} if case.rot else {})


def far(got: Array, want: Array, limits: tuple[float, float]) -> None:
    error = got.reshape(want.shape) - want
    assert np.sqrt(np.mean(error**2) / np.mean(want**2)) < limits[0]
    assert np.abs(error).max() < limits[1]


@pytest.mark.parametrize("rows", [4, 40])
@pytest.mark.parametrize("data", ["ramps", "uniform", "normal"])
@pytest.mark.parametrize("kind", KINDS)
def test_I1_I2_a_prompt_and_a_token_against_floats(kind: str, data: str, rows: int) -> None:
    """From empty caches, with rotary embedding, then one token; the prompt's bytes stay."""
    case = Case((0, 0), (rows, rows), rows=rows, capacity=64, d=64, heads=8, kv_heads=2, rot=64)
    floats = filled(data, case, arguments(case))
    for cache in CACHES:
        floats[cache].zero_()
    given = packed(floats, kind)
    with compiled(case, given) as layer:
        want, keys, values = reference(case, floats)
        far(layer(given), want, LIMITS[kind][0])
        before = layer.state()
        one = case.with_(past=(rows, rows), q_len=(1, 1), rows=1, seed=3)
        token = filled(data, one, arguments(one))
        token |= {n: torch.from_numpy(x) for n, x in zip(CACHES, (keys, values), strict=True)}
        want, _, _ = reference(one, token)
        got = layer(token)
        # the ramps of 41 tokens cancel all but 1/41 of a value: what remains is below the noise of any code of 4 bits
        if (kind, data, rows) != ("int4", "ramps", 40):
            far(got, want, LIMITS[kind][1])
        after = layer.state()
    for name, x in before.items():
        np.testing.assert_array_equal(after[name][:, :rows], x[:, :rows])
        assert not np.array_equal(after[name][:, rows], x[:, rows])


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_I3_exact_bytes(kind: str, on: str) -> None:
    """Numbers that are codes already come back as these very codes; in int4, whose transform is sums of integers."""
    case = Case((2,), (3,), rows=3, capacity=8, d=16, heads=2, kv_heads=2)
    least, most = (-127, 127) if kind == "int8" else (-8, 7)
    codes = np.random.default_rng(5).integers(least, most + 1, (1, 3, 2, 16))
    codes[..., 0] = least
    x = codes / 64 @ (transform(16) if kind == "int4" else np.eye(16))
    given = packed(arguments(case), kind)
    given |= {name: torch.from_numpy(x).float() for name in ("key", "value")}
    with compiled(case, given, on) as layer:
        layer(given)
        for name in CACHES:
            np.testing.assert_array_equal(layer.cache(name)[:, 2:5], stored(codes, kind))
        for name in SCALES:
            np.testing.assert_allclose(layer.cache(name)[:, 2:5], 1 / 64, rtol=1e-6)


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("d", [8, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_I3_within_half_a_scale_and_equal_to_the_host(kind: str, d: int, on: str) -> None:
    """Vectors that reach further above zero, further below, equally far, and only to one side; in int4 the transform's
    results do. No code is clipped, all codes are those of the eager operator, scales to the last bit but one."""
    generator = torch.Generator().manual_seed(d)
    y = torch.rand(1, 12, 2, d, generator=generator) - 0.5
    y[:, 0:2] = y[:, 0:2].abs()
    y[:, 2:4] = -y[:, 2:4].abs()
    for row, ends in ((4, (1.0, -1.0)), (5, (1.0, -0.875)), (6, (0.875, -1.0)), (7, (1.0, -0.9)), (8, (0.9, -1.0))):
        y[:, row, :, :2] = torch.tensor(ends)
    x = quantized_cache.hadamard(y) if kind == "int4" else y
    case = Case((0,), (12,), rows=12, capacity=12, d=d, heads=2, kv_heads=2)
    given = packed(arguments(case), kind) | {"key": x, "value": -x}
    with compiled(case, given, on) as layer:
        layer(given)
        state = layer.state()
    for cache, scales, source in zip(CACHES, SCALES, (x, -x), strict=True):
        codes, wanted = quantized_cache.quantize(source, DTYPES[kind])
        np.testing.assert_array_equal(state[cache], codes)
        np.testing.assert_allclose(state[scales], wanted, rtol=2e-7)
        exact = source.double().numpy()
        exact = exact @ transform(d) if kind == "int4" else exact
        step = np.abs(np.float64(state[scales]))
        assert (np.abs(codes_in(state[cache], kind) * state[scales] - exact) <= 0.501 * step).all()
        if kind == "int4":
            far, near = (f(exact.max(-1), -exact.min(-1)) for f in (np.maximum, np.minimum))
            np.testing.assert_allclose(step[..., 0], np.maximum(far / 8, near / 7), rtol=1e-6)


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_I3_tiny_and_huge_scales(kind: str, on: str) -> None:
    """Scales are f32, so tokens of 2e-6 and of 1e30 keep their precision; zeros have a scale of 0."""
    case = Case((0,), (3,), rows=3, capacity=4, d=16, heads=1, kv_heads=1)
    given = packed(arguments(case), kind)
    x = given["value"] / given["value"].abs().amax(-1, keepdim=True)
    x = x * torch.tensor([2e-6, 0.0, 1e30])[None, :, None, None]
    with compiled(case, given, on) as layer:
        layer(given | {"value": x})
        state = layer.state()
    got = numbers(state["value_cache"], state["value_scales"], kind)[0]
    want = x[0].double().numpy()
    assert not got[1].any()
    assert state["value_scales"][0, 1, 0, 0] == 0
    assert np.abs(got[0] - want[0]).max() < 5e-7
    for row in (0, 2):
        assert np.sqrt(np.mean((got[row] - want[row]) ** 2) / np.mean(want[row] ** 2)) < (
            0.1 if kind == "int8" else 0.15
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_none_stay_visible(bad: float, kind: str) -> None:
    """A token with a NaN or an infinity makes its head's results NaN, as in caches of floats; eagerly too."""
    case = Case((2, 2), (1, 1), rows=1)
    given = packed(arguments(case), kind)
    given["value"][0, 0, 1, 3] = bad
    with compiled(case, given) as layer:
        got = layer(given)
        state = layer.state()
    want = call({n: t.clone() if isinstance(t, torch.Tensor) else t for n, t in given.items()}).numpy()
    for x in (got, want):
        np.testing.assert_array_equal(np.isnan(x).any(-1), [[[False, False, True, True]], [[False] * 4]])
    assert np.isnan(state["value_scales"][0, 2, 1])
    assert not state["value_cache"][0, 2, 1].any()


@pytest.mark.parametrize("kind", KINDS)
def test_I4_swapped_rows(kind: str) -> None:
    """Lengths 20 and 24: bytes, scales and results swap, bit for bit."""
    case = Case((20, 24), (4, 1), capacity=32, d=16, rot=16)
    given = packed(arguments(case), kind)
    rows = (*CACHES, *SCALES, "query", "key", "value", "past", "q_len")
    other = {n: t.flip(0) if n in rows else t for n, t in given.items()}
    with compiled(case, given) as layer, compiled(case.with_(past=(24, 20), q_len=(1, 4)), other) as swapped:
        np.testing.assert_array_equal(swapped(other), layer(given)[::-1])
        for name, x in layer.state().items():
            np.testing.assert_array_equal(swapped.state()[name], x[::-1])


@pytest.mark.parametrize("kind", KINDS)
def test_I6_memory(kind: str) -> None:
    """Device memory of a cache of 1024 rows: codes and a scale a head, nothing else."""
    case = Case((0,), (1,), rows=1, capacity=1024, d=64, kv_heads=2)
    with compiled(case, packed(arguments(case), kind)) as layer:
        sizes = {name: buffer.size for name, buffer in layer.delegate.state.buffers().items()}
    bits = 8 if kind == "int8" else 4
    assert sum(sizes.values()) == 2 * 1024 * 2 * (64 * bits // 8 + 4)


# -- replay


@pytest.mark.parametrize("on", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rot", [128, 0])
def test_E4_replay_with_swapped_rows(rot: int, kind: str, on: str) -> None:
    """Totals 2 and 130 of caches of 130 rows, captured once, then rows of everything swapped; the rotary table is NaN
    behind the longest row."""
    case = Case((0, 126), (2, 4), capacity=130, d=128, heads=2, kv_heads=1, rot=rot, table=132)
    given = packed(arguments(case), kind)
    if rot:
        given["cos"][130:] = given["sin"][130:] = torch.nan
    with compiled(case, given, on) as layer:
        replay = Replay(layer.delegate, feeds(given))
        first = run(layer, replay, given)
        rows = (*CACHES, *SCALES, *INPUTS)
        for order in ([1, 0], [0, 1], [1, 0]):
            moved = {n: t[order] if n in rows and t is not None else t for n, t in given.items()}
            layer.fill(moved)
            out = run(layer, replay, moved)
            np.testing.assert_array_equal(out, first[order])
        assert len(layer.delegate._plans) == 1
        state = layer.state()
    caches = tuple(numbers(state[n], state[s], kind)[::-1] for n, s in zip(CACHES, SCALES, strict=True))
    close(first, expected(case, given, caches))  # type: ignore[arg-type]


def feeds(given: dict[str, Any]) -> list[tuple[str, Array]]:
    return [to_host(given[name].contiguous()) for name in INPUTS if given[name] is not None]


def run(layer: Packed, replay: Replay, given: dict[str, Any]) -> Array:
    poison(layer.delegate)
    [(_, found)] = replay.execute(feeds(given))
    return np.array(found)


# -- eagerly


@pytest.mark.parametrize("size", [8, 16, 64, 256])
def test_the_transform_is_its_own_inverse(size: int) -> None:
    x = torch.randn(3, size, dtype=torch.float64)
    np.testing.assert_allclose(quantized_cache.hadamard(x), x.numpy() @ transform(size), atol=1e-12)
    np.testing.assert_allclose(quantized_cache.hadamard(quantized_cache.hadamard(x)), x, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_eager_forms(name: str, kind: str) -> None:
    """Bytes, scales and results of the CPU operator against numpy."""
    case = fitting(FORMS[name], kind)
    given = packed(arguments(case), kind)
    before = {n: given[n].numpy().copy() for n in (*CACHES, *SCALES)}
    out = call(given)
    state = {n: given[n].numpy() for n in (*CACHES, *SCALES)}
    check_codes(case, given, state, kind)
    for b, (past, new) in enumerate(zip(case.past, case.counts, strict=True)):
        for n, x in state.items():
            for part in (slice(0, past), slice(past + new, None)):
                np.testing.assert_array_equal(x[b, part], before[n][b, part])
    caches = tuple(numbers(state[n], state[s], kind) for n, s in zip(CACHES, SCALES, strict=True))
    close(out, expected(case, given, caches), case.dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind: str) -> None:
    given = packed(arguments(FORMS["half-split rotary"]), kind)
    schema = OPERATOR._schema.arguments
    positional = tuple(given[a.name] for a in schema if not a.kwarg_only)
    torch.library.opcheck(OPERATOR, positional, {a.name: given[a.name] for a in schema if a.kwarg_only})
