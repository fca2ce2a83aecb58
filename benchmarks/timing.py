"""Times of GPU work from timestamps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import wgpu

from executorch_webgpu.runtime.errors import DeviceError
from executorch_webgpu.runtime.gpu import native
from executorch_webgpu.runtime.gpu.device import Device

Encode = Callable[[Any], None]
"""Encodes one run of the timed work into a compute pass."""

LEAD_SECONDS = 0.1
"""Work that is queued in front of the timed passes, so that the GPU does not idle before them."""
CHUNK_SECONDS = 0.02
"""Work of one submit while warming up."""
MAX_LEAD = 256
"""Command buffers that lead at most."""


@dataclass(frozen=True)
class Times:
    """Microseconds of one run: the median over the samples and the 10th and 90th percentile."""

    median: float
    p10: float
    p90: float
    samples: int
    repetitions: int

    @classmethod
    def of(cls, microseconds: np.ndarray[Any, Any], repetitions: int = 1) -> Times:
        """From one number a sample, in microseconds a run."""
        low, middle, high = (float(x) for x in np.percentile(microseconds, (10, 50, 90)))
        return cls(middle, low, high, len(microseconds), repetitions)

    def divided(self, parts: int) -> Times:
        """The times of one of `parts` equal parts of a run."""
        return Times(self.median / parts, self.p10 / parts, self.p90 / parts, self.samples, self.repetitions)


def wait(device: Device) -> None:
    """Return when everything submitted is done (wgpu-py 0.32's own call for this fails)."""
    native.wait(device.gpu)


class _Stamps:
    """Begin and end timestamps of passes."""

    def __init__(self, device: Device, passes: int) -> None:
        self.device = device
        self.size = 16 * passes
        self.queries = device.gpu.create_query_set(type="timestamp", count=2 * passes)
        usage = wgpu.BufferUsage.QUERY_RESOLVE | wgpu.BufferUsage.COPY_SRC
        self.resolved = device.gpu.create_buffer(size=max(self.size, 256), usage=usage)

    def commands(self, encode: Encode, repetitions: int) -> Any:
        """A command buffer of all passes."""
        encoder = self.device.gpu.create_command_encoder(label="timed")
        for number in range(self.size // 16):
            stamps = {
                "query_set": self.queries,
                "beginning_of_pass_write_index": 2 * number,
                "end_of_pass_write_index": 2 * number + 1,
            }
            compute = encoder.begin_compute_pass(label="timed", timestamp_writes=stamps)
            for _ in range(repetitions):
                encode(compute)
            compute.end()
        encoder.resolve_query_set(self.queries, 0, self.size // 8, self.resolved, 0)
        return encoder.finish()

    def read(self) -> np.ndarray[Any, Any]:
        """Wait, free the buffers and return the microseconds of each pass."""
        raw = np.frombuffer(self.device.gpu.queue.read_buffer(self.resolved, 0, self.size), np.uint64).reshape(-1, 2)
        self.resolved.destroy()
        ticks = raw[:, 1].astype(np.int64) - raw[:, 0].astype(np.int64)
        return ticks * (native.timestamp_period(self.device.gpu) / 1000.0)


class Stamps:
    """Timestamps of the passes of somebody else's submits: `next` gives the options of the next pass."""

    def __init__(self, device: Device, passes: int) -> None:
        require_timestamps(device)
        self.device = device
        self.count = 0
        self.passes = passes
        self.queries = device.gpu.create_query_set(type="timestamp", count=2 * passes)

    def next(self) -> dict[str, Any]:
        """The options of a compute pass that stamp it."""
        number, self.count = self.count, self.count + 1
        if number >= self.passes:
            raise ValueError(f"more than {self.passes} passes")
        return {
            "timestamp_writes": {
                "query_set": self.queries,
                "beginning_of_pass_write_index": 2 * number,
                "end_of_pass_write_index": 2 * number + 1,
            }
        }

    def busy(self) -> float:
        """Time inside passes over the time from the first begin to the last end, of the passes so far."""
        usage = wgpu.BufferUsage.QUERY_RESOLVE | wgpu.BufferUsage.COPY_SRC
        resolved = self.device.gpu.create_buffer(size=max(16 * self.count, 256), usage=usage)
        encoder = self.device.gpu.create_command_encoder(label="stamps")
        encoder.resolve_query_set(self.queries, 0, 2 * self.count, resolved, 0)
        self.device.gpu.queue.submit([encoder.finish()])
        raw = np.frombuffer(self.device.gpu.queue.read_buffer(resolved, 0, 16 * self.count), np.uint64).reshape(-1, 2)
        resolved.destroy()
        return float((raw[:, 1] - raw[:, 0]).sum() / (raw[-1, 1] - raw[0, 0]))


def require_timestamps(device: Device) -> None:
    """DeviceError where the device has no timestamps."""
    if "timestamp-query" not in device.features:
        raise DeviceError(f"{device.name} has no timestamp queries: nothing can be timed on it")


def _commands(device: Device, encode: Encode, repetitions: int) -> Any:
    encoder = device.gpu.create_command_encoder(label="warm-up")
    compute = encoder.begin_compute_pass(label="warm-up")
    for _ in range(repetitions):
        encode(compute)
    compute.end()
    return encoder.finish()


def _warm_up(device: Device, encode: Encode, repetitions: int, estimate: float, seconds: float) -> float:
    """Run the work for `seconds`; returns the seconds of one pass of `repetitions` runs as last seen."""
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        count = max(1, min(MAX_LEAD, round(CHUNK_SECONDS / max(estimate, 1e-6))))
        buffers = [_commands(device, encode, repetitions) for _ in range(count)]
        start = time.perf_counter()
        device.gpu.queue.submit(buffers)
        wait(device)
        estimate = (time.perf_counter() - start) / count
    return estimate


def time_passes(device: Device, encode: Encode, repetitions: int, samples: int, warm_up_seconds: float = 0.3) -> Times:
    """Time GPU work.

    One submit holds `samples` compute passes of `repetitions` runs each, with a timestamp at the begin and the end of
    each pass. The same work runs before it for `warm_up_seconds`, the last tenth of a second of it queued in front of
    the timed submit: a GPU that idles for a moment, as during an upload or a readback, drops to a fraction of its
    clock.

    Args:
        encode: encodes one run; called `repetitions` times a pass.
        samples: passes timed, at most 2,048.
    Returns:
        Microseconds of one run.
    Raises:
        DeviceError: the device has no timestamps.
        ValueError: a count below 1, or too many samples.
    """
    require_timestamps(device)
    if repetitions < 1 or not 1 <= samples <= 2048:
        raise ValueError(
            f"{repetitions} repetitions, {samples} samples: expected at least 1, and at most 2,048 samples"
        )
    lead = []
    if warm_up_seconds > 0:
        first = _Stamps(device, 1)
        device.gpu.queue.submit([first.commands(encode, repetitions)])
        estimate = float(first.read()[0]) / 1e6
        estimate = _warm_up(device, encode, repetitions, estimate, warm_up_seconds)
        count = min(MAX_LEAD, math.ceil(min(LEAD_SECONDS, warm_up_seconds) / max(estimate, 1e-6)))
        lead = [_commands(device, encode, repetitions) for _ in range(count)]
    stamps = _Stamps(device, samples)
    timed = stamps.commands(encode, repetitions)
    for commands in [*lead, timed]:
        device.gpu.queue.submit([commands])
    return Times.of(stamps.read() / repetitions, repetitions)


def repetitions_for(device: Device, encode: Encode, pass_seconds: float, most: int = 1000) -> int:
    """How many runs fill a pass of about `pass_seconds`: from one pass of one run, on a clock that may be low."""
    time_passes(device, encode, 1, 1, 0.0)
    once = time_passes(device, encode, 1, 3, 0.0).median / 1e6
    return max(1, min(most, round(pass_seconds / max(once, 1e-7))))
