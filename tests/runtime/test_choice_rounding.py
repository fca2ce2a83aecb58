"""Logits of 16 bits: the GPU keeps them as f32, but chooses from what the host sees, ties included."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from executorch_webgpu.runtime import Sampling
from executorch_webgpu.runtime.decoding.chooser import NAN_LOGITS, Chooser, Logits
from executorch_webgpu.runtime.decoding.sampling import choose
from executorch_webgpu.runtime.gpu.device import Device
from executorch_webgpu.runtime.gpu.host import bf16_to_f32, f32_to_bf16
from tests.harness import DEVICES, GraphBuilder, device

Array = np.ndarray[Any, Any]
VOCABULARY = 1500
SAMPLING = [Sampling(), Sampling(repetition_penalty=1.3), Sampling(temperature=0.8), Sampling(0.9, top_k=3)]


def as_host(dtype: str, logits: Array) -> Array:
    """f32 logits as a program of `dtype` gives them to the host."""
    if dtype == "bf16":
        return bf16_to_f32(f32_to_bf16(logits))
    with np.errstate(over="ignore"):
        return logits.astype(np.float16 if dtype == "f16" else np.float32)


class Pair:
    """A chooser of one row over f32 logits that stand for a program's logits of `dtype`."""

    def __init__(self, on: Device, dtype: str, vocabulary: int) -> None:
        self.device = on
        self.buffer = on.buffer(4 * vocabulary, "other", "test logits")
        self.chooser = Chooser(on, vocabulary, 1, Logits(self.buffer, 0, vocabulary, "f32", dtype), 1)

    def __call__(self, logits: Array, sampling: Sampling = SAMPLING[0], seen: list[int] | None = None) -> int:
        self.device.write(self.buffer, logits.astype(np.float32))
        self.chooser.configure(sampling, 7)
        self.chooser.start(3)
        self.chooser.seen(seen or [])
        encoder = self.device.gpu.create_command_encoder()
        compute = encoder.begin_compute_pass()
        for launch in self.chooser.launches(sampling):
            compute.set_pipeline(launch.pipeline)
            compute.set_bind_group(0, launch.bind_group)
            compute.dispatch_workgroups(*launch.grid)
        compute.end()
        self.device.gpu.queue.submit([encoder.finish()])
        return int(np.frombuffer(self.device.gpu.queue.read_buffer(self.chooser.tokens), np.int32)[0])

    def close(self) -> None:
        self.chooser.close()
        self.device.release(self.buffer, "other")


@pytest.fixture(params=DEVICES)
def on(request: pytest.FixtureRequest) -> Device:
    return device(request.param)


@pytest.fixture(params=["f16", "bf16"])
def pair(request: pytest.FixtureRequest, on: Device) -> Iterator[tuple[str, Pair]]:
    made = Pair(on, request.param, VOCABULARY)
    yield request.param, made
    made.close()


def test_ties_of_rounding_are_ties(pair: tuple[str, Pair]) -> None:
    """Many logits within one step of 16 bits of the largest: the host's token, which is not that of the f32 logits."""
    dtype, chooser = pair
    rng = np.random.default_rng(5)
    different = 0
    for _ in range(40):
        logits = np.float32(20) + rng.random(VOCABULARY).astype(np.float32) * np.float32(0.3)
        seen = [int(x) for x in rng.integers(0, VOCABULARY, 5)]
        for sampling in SAMPLING[:2]:
            found = chooser(logits, sampling, seen)
            assert found == choose(as_host(dtype, logits), sampling, 7, 3, seen)
            different += found != choose(logits, sampling, 7, 3, seen)
    assert different > 20


@pytest.mark.parametrize("sampling", SAMPLING[2:], ids=["drawn", "top-k"])
def test_drawn_tokens_are_the_hosts(pair: tuple[str, Pair], sampling: Sampling) -> None:
    dtype, chooser = pair
    rng = np.random.default_rng(6)
    different = 0
    for _ in range(40):
        logits = np.float32(60) + rng.standard_normal(VOCABULARY).astype(np.float32) * np.float32(0.02)
        found = chooser(logits, sampling)
        assert found == choose(as_host(dtype, logits), sampling, 7, 3, ())
        different += found != choose(logits, sampling, 7, 3, ())
    assert different > 0


def numbers(dtype: str) -> Array:
    """f32 numbers around everything that rounds in its own way, both signs."""
    cuts = [0.0, 2.0**-25, 2.0**-24, 3 * 2.0**-25, 2.0**-14, 1.0, 2048.0, 65504.0, 65519.0, 65520.0, 65536.0, 3.3e38]
    if dtype == "bf16":
        cuts += [2.0**-126, 256.0, 3.3895314e38, 3.3961775e38]
    found: list[np.float32] = []
    for cut in cuts:
        low = high = np.float32(cut)
        for _ in range(3):
            found += [low, high]
            low, high = np.nextafter(low, np.float32(-np.inf)), np.nextafter(high, np.float32(np.inf))
        for ulps in (0.5, 1, 1.5, 2.5):  # the middle between two numbers of 16 bits, and beside it
            step = np.float32(cut) * np.float32(2.0 ** -(7 if dtype == "bf16" else 10) * ulps)
            found += [np.float32(cut) + step, np.nextafter(np.float32(cut) + step, np.float32(np.inf))]
    values = np.array(found, np.float32)
    values = values[np.isfinite(values)]
    values = values[(values == 0) | (np.abs(values) >= np.finfo(np.float32).tiny)]  # devices may flush smaller ones
    return np.unique(np.concatenate([values, -values]))


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_every_kind_of_number_is_rounded_as_on_the_host(on: Device, dtype: str) -> None:
    """Two logits, neighbours in f32: the first counts exactly where they are the same number of 16 bits."""
    values = numbers(dtype)
    chooser = Pair(on, dtype, 2)
    try:
        with np.errstate(over="ignore"):
            ties = 0
            for low, high in itertools.pairwise(values):
                a, b = as_host(dtype, np.array([low, high], np.float32)).astype(np.float64)
                if np.isinf([a, b]).any():
                    continue
                assert chooser(np.array([low, high])) == int(b > a), (low, high)
                ties += a == b
    finally:
        chooser.close()
    assert ties > 20


def test_what_is_too_large_is_infinite(pair: tuple[str, Pair]) -> None:
    dtype, chooser = pair
    logits = np.zeros(VOCABULARY, np.float32)
    logits[[7, 900]] = (3.4e38, np.inf)
    assert chooser(logits) == 7 == int(np.argmax(as_host(dtype, logits)))
    logits[[3, 7, 900]] = (np.nan, 1.0, 1.0)
    assert chooser(logits) == NAN_LOGITS


def test_logits_of_32_bits_stay_as_they_are(on: Device) -> None:
    chooser = Pair(on, "f32", 2)
    try:
        for value in numbers("f16"):
            larger = np.nextafter(value, np.float32(np.inf))
            if np.finfo(np.float32).tiny <= abs(larger) and np.isfinite(larger):
                assert chooser(np.array([value, larger])) == 1
    finally:
        chooser.close()


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_a_programs_logits_say_what_they_are_rounded_to(on: Device, dtype: str) -> None:
    b = GraphBuilder()
    out = b.node("aten.neg.default", {"self": b.input(dtype, (1, 5))}, (dtype, (1, 5)))
    buffer = object()
    found = Logits.of(on, b.graph(out), 0, {out.value: buffer}, 5)
    assert found.buffer is buffer
    assert (found.dtype, found.type, found.offset, found.stride) == (dtype, "f32", 0, 5)
