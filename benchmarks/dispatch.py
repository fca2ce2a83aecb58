"""What a dispatch costs: on the GPU, direct and indirect, and on the host.

    python -m benchmarks.dispatch [--out FILE]

On the GPU: empty dispatches in one pass, each depending on the one before it. On the host: encoding by wgpu-py's
methods and as the runtime does, and a whole step of a small decoder.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import wgpu

from executorch_webgpu.runtime.gpu import native
from executorch_webgpu.runtime.gpu.device import Device

from .baseline import measure
from .graphs import DecoderSizes, decoder, encode
from .host import watched
from .kernels import LocalKernel
from .options import add_common, command
from .options import count as positive
from .report import Report
from .timing import Times, repetitions_for, time_passes, wait

SMALL = DecoderSizes(8, 64, 4, 2, 16, 64, 64, "f32", 64)
"""A decoder whose GPU time hardly counts."""


def _times(seconds: Sequence[float], parts: int = 1) -> Times:
    return Times.of(np.array(seconds) * 1e6 / parts)


def gpu_cost(report: Report, options: argparse.Namespace) -> None:
    """Dependent empty dispatches: direct, indirect, and a grid of 2,048 workgroups of which one does something."""
    device, count = report.device, options.count
    counter = device.buffer(16, "other", "counter")
    usage = wgpu.BufferUsage.INDIRECT | wgpu.BufferUsage.STORAGE | wgpu.BufferUsage.COPY_DST
    sizes = device.buffer(16, "other", "sizes", usage)
    device.write(sizes, np.array([1, 1, 1, 0], np.uint32))
    one, leave = LocalKernel(device, "count"), LocalKernel(device, "leave")
    group, leaving = one.bind(counter), leave.bind(counter)

    def direct(compute: Any) -> None:
        for _ in range(count):
            one.encode(compute, group, (1, 1, 1))

    def indirect(compute: Any) -> None:
        for _ in range(count):
            compute.set_pipeline(one.pipeline)
            compute.set_bind_group(0, group)
            compute.dispatch_workgroups_indirect(sizes, 0)

    def wide(compute: Any) -> None:
        for _ in range(count):
            leave.encode(compute, leaving, (2048, 1, 1))

    works: dict[str, tuple[Callable[[Any], None], str]] = {
        "direct": (direct, "count"), "indirect": (indirect, "count"), "leave": (wide, "leave")
    }  # fmt: skip
    for name, (work, kernel) in works.items():
        repetitions = repetitions_for(device, work, options.pass_ms / 1000)
        times = time_passes(device, work, repetitions, options.samples, options.warm_up).divided(count)
        report.line(f"dispatch.gpu.{name}", {"dispatches": count}, "u32", times, kernels=[kernel], clock="gpu")
    for buffer in (counter, sizes):
        device.release(buffer, "other")


def _encoding(device: Device, encode: Callable[[Any], None]) -> float:
    """Host seconds of encoding into a pass; its begin, end and submit are left out."""
    encoder = device.gpu.create_command_encoder()
    compute = encoder.begin_compute_pass()
    began = time.perf_counter()
    encode(compute)
    seconds = time.perf_counter() - began
    compute.end()
    device.gpu.queue.submit([encoder.finish()])
    wait(device)
    return seconds


def method_cost(report: Report, options: argparse.Namespace) -> None:
    """Host time of one dispatch by wgpu-py's methods."""
    device, count = report.device, options.count
    counter = device.buffer(16, "other", "counter")
    kernel = LocalKernel(device, "count")
    group = kernel.bind(counter)

    def run(compute: Any) -> None:
        for _ in range(count):
            kernel.encode(compute, group, (1, 1, 1))

    seconds = [_encoding(device, run) for _ in range(options.samples)]
    report.line(
        "dispatch.host.methods", {"dispatches": count}, "u32", _times(seconds, count), kernels=["count"], clock="host"
    )
    device.release(counter, "other")


def step_cost(report: Report, options: argparse.Namespace) -> None:
    """Host time a dispatch: of encoding a decoder's plan as the runtime does, and of a step but for submit and wait."""
    device = report.device
    native.compiled_loop()  # now, not when it pays
    loaded = decoder(device, SMALL)
    try:
        parts: dict[str, list[float]] = {"encode": [], "submit": [], "wait": []}
        inputs = [("i64", np.array([[1]], np.int64)), ("i64", np.array([0], np.int64))]
        plan = loaded.ready(inputs)
        count = len(plan.launches)
        encoded = _times(
            [_encoding(device, lambda compute: encode(compute, plan)) for _ in range(options.samples)], count
        )
        with watched() as clock:
            for step in range(options.samples):
                inputs[1] = ("i64", np.array([step % SMALL.capacity], np.int64))
                clock.start()
                loaded.delegate.execute(inputs)
                clock.stop()
                for name, found in parts.items():
                    found.append(getattr(clock, name))
    finally:
        loaded.close()
    medians = {f"{name}_us": float(f"{np.median(found) * 1e6:.5g}") for name, found in parts.items()}
    sizes = {"dispatches": count}
    report.line("dispatch.host.plan", sizes, SMALL.dtype, encoded, clock="host", encoded_by=native.encoded_by())
    times = _times(parts["encode"], count)
    report.line("dispatch.host.step", sizes, SMALL.dtype, times, clock="host", step=medians)


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dispatch", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--count", type=positive, default=200, help="dispatches of a run")
    add_common(parser)
    options = parser.parse_args(arguments)
    device = Device.create(options.adapter)
    report = Report(device, options.out)
    report.rates = measure(device, options)
    gpu_cost(report, options)
    method_cost(report, options)
    step_cost(report, options)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
