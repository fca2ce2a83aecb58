"""What the device reaches on plain work, measured in the same run as what is compared with it.

    python -m benchmarks.baseline [--out FILE]

Copy and read bandwidth of vec4 kernels over buffers that no cache holds, the fp32 rate of multiply-adds on registers
and of the package's own matrix product, and the time of an empty dispatch that depends on the one before it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np

from executorch_webgpu.runtime.gpu.device import Device

from .graphs import encode as encode_plan
from .graphs import product
from .kernels import LocalKernel, RandomFill, fold_grid
from .options import add_common, command
from .report import Rates, Report
from .timing import Encode, Times, repetitions_for, time_passes

COPY_BYTES = 256 * 4 * 16
READ_BYTES = 256 * 8 * 16
"""Bytes of a workgroup of copy.wgsl and read.wgsl."""
FMA_TURNS = 512
FMA_FLOPS = 256
"""Floating-point operations of an invocation of fma.wgsl a turn: 8 vec4, 4 times, a multiplication and an addition."""


def _time(device: Device, encode: Encode, options: argparse.Namespace) -> Times:
    repetitions = repetitions_for(device, encode, options.pass_ms / 1000)
    return time_passes(device, encode, repetitions, options.samples, options.warm_up)


def time_copy(device: Device, options: argparse.Namespace) -> tuple[int, Times]:
    """(bytes read and written, times) of copying a buffer."""
    size = min(options.baseline_bytes, device.limits.max_binding, device.limits.max_buffer)
    groups = max(size // COPY_BYTES, 1)
    source, target = (device.buffer(groups * COPY_BYTES, "other", name) for name in ("source", "target"))
    RandomFill(device)(source, "f32", 0.0, 1.0, 1)
    kernel = LocalKernel(device, "copy", {"GROUPS": groups})
    group, grid = kernel.bind(source, target), fold_grid(device, groups)
    times = _time(device, lambda compute: kernel.encode(compute, group, grid), options)
    for buffer in (source, target):
        device.release(buffer, "other")
    return 2 * groups * COPY_BYTES, times


def time_read(device: Device, options: argparse.Namespace) -> tuple[int, Times]:
    """(bytes read, times) of summing up a buffer."""
    size = min(options.baseline_bytes, device.limits.max_binding, device.limits.max_buffer)
    groups = max(size // READ_BYTES, 1)
    source, target = device.buffer(groups * READ_BYTES, "other", "source"), device.buffer(groups * 4, "other", "sums")
    RandomFill(device)(source, "f32", 0.0, 1.0, 1)
    kernel = LocalKernel(device, "read", {"GROUPS": groups})
    group, grid = kernel.bind(source, target), fold_grid(device, groups)
    times = _time(device, lambda compute: kernel.encode(compute, group, grid), options)
    for buffer in (source, target):
        device.release(buffer, "other")
    return groups * READ_BYTES, times


def time_fma(device: Device, options: argparse.Namespace) -> tuple[int, Times]:
    """(floating-point operations, times) of multiply-adds on registers, one workgroup a row of the matrix."""
    groups = options.matrix_size
    factors, target = device.buffer(32, "other", "factors"), device.buffer(groups * 1024, "other", "sums")
    device.write(factors, np.array([0.5] * 4 + [1.0] * 4, np.float32))
    kernel = LocalKernel(device, "fma", {"GROUPS": groups, "TURNS": FMA_TURNS})
    group, grid = kernel.bind(factors, target), fold_grid(device, groups)
    times = _time(device, lambda compute: kernel.encode(compute, group, grid), options)
    for buffer in (factors, target):
        device.release(buffer, "other")
    return groups * 256 * FMA_TURNS * FMA_FLOPS, times


def time_matmul(device: Device, options: argparse.Namespace) -> tuple[int, Times, list[str]]:
    """(floating-point operations, times, kernels) of the package's fp32 matrix product."""
    loaded = product(device, options.matrix_size)
    try:
        plan = loaded.ready([])
        times = _time(device, lambda compute: encode_plan(compute, plan), options)
        return 2 * options.matrix_size**3, times, [launch.kernel for launch in plan.launches]
    finally:
        loaded.close()


def time_dispatch(device: Device, options: argparse.Namespace, count: int = 200) -> Times:
    """One empty dispatch that depends on the one before it."""
    counter = device.buffer(16, "other", "counter")
    kernel = LocalKernel(device, "count")
    group = kernel.bind(counter)

    def run(compute: object) -> None:
        for _ in range(count):
            kernel.encode(compute, group, (1, 1, 1))

    times = _time(device, run, options).divided(count)
    device.release(counter, "other")
    return times


def measure(device: Device, options: argparse.Namespace, report: Report | None = None) -> Rates:
    """All baselines; written to `report` where one is given."""
    copied, copy = time_copy(device, options)
    summed, read = time_read(device, options)
    made, fma = time_fma(device, options)
    multiplied, matmul, kernels = time_matmul(device, options)
    dispatch = time_dispatch(device, options)
    rates = Rates(
        copied / copy.median / 1e3, summed / read.median / 1e3, multiplied / matmul.median / 1e6,
        made / fma.median / 1e6, dispatch.median,
    )  # fmt: skip
    if report is not None:
        report.rates = rates
        size = options.matrix_size
        report.line("baseline.copy", {"bytes": copied // 2}, "f32", copy, traffic=copied, kernels=["copy"])
        report.line("baseline.read", {"bytes": summed}, "f32", read, traffic=summed, kernels=["read"])
        report.line("baseline.fma", {"workgroups": size, "turns": FMA_TURNS}, "f32", fma, flops=made, kernels=["fma"])
        report.line(
            "baseline.matmul", {"m": size, "n": size, "k": size}, "f32", matmul,
            traffic=12 * size * size, flops=multiplied, kernels=kernels,
        )  # fmt: skip
        report.line("baseline.dispatch", {}, "u32", dispatch, kernels=["count"])
    return rates


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.baseline", description=(__doc__ or "").split("\n")[0])
    add_common(parser)
    options = parser.parse_args(arguments)
    device = Device.create(options.adapter)
    measure(device, options, Report(device, options.out))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
