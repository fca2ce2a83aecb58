"""GPU time of products of many rows with the weights of linear layers.

    python -m benchmarks.gemm [--rows 512,2048] [--outputs 2048,8192 --inputs 2048] [--dtype f16] [--layout nk|kn]
    python -m benchmarks.gemm --suite llama

One product is x [M, K] in f32 times weights [N, K] (kn: [K, N]), with f32 sums, merges of split K included. Several
weights take turns, so that together they exceed --rotate-bytes. `--suite llama` has the products of a decoder layer of
the sizes of Llama 3.2 1B at 512 and 2,048 tokens; `benchmarks.decode_loop --prefill` times such a decoder as a whole.
--dtype 8da4w, 8da8w: x is rounded to 8 bits, once for all weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product as combinations
from typing import Any

import numpy as np

from executorch_webgpu.backend.graph import Arg, Ref
from executorch_webgpu.ops.packed import Format
from executorch_webgpu.runtime.errors import UnsupportedError, WebGPUDelegateError
from executorch_webgpu.runtime.gpu.device import Device

from .baseline import measure
from .graphs import BITS, Builder, Loaded, encode, quantized, splits_of
from .options import add_common, command, counts, say
from .report import ITEM_SIZE, Report
from .timing import repetitions_for, time_passes
from .verify import WrongResultError

MAX_WEIGHTS = 16
GROUP = 32
"""Columns that share a scale of packed weights."""
VERIFIED = 64
"""Rows of x whose products are compared with float64."""
LLAMA = ((2048, 2048), (512, 2048), (3072, 2048), (8192, 2048), (16384, 2048), (2048, 8192))
"""(N, K): output and query; key or value; the three of attention in one; gate or up; both; down."""


@dataclass(frozen=True)
class GemmShape:
    """x [rows, inputs] times weights of `outputs` rows (or columns, where the layout is kn)."""

    rows: int
    outputs: int
    inputs: int
    dtype: str = "f16"
    layout: str = "nk"

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.outputs * self.inputs

    @property
    def weight(self) -> tuple[int, int]:
        """The shape of the weights."""
        return (self.outputs, self.inputs) if self.layout == "nk" else (self.inputs, self.outputs)

    def bytes(self, item: float) -> int:
        """What must be moved at least: weights of `item` bytes an element, x and the result in f32, once each."""
        return int(self.outputs * self.inputs * item) + 4 * self.rows * (self.inputs + self.outputs)

    def record(self) -> dict[str, int | str]:
        """For the `shape` field."""
        return {"rows": self.rows, "outputs": self.outputs, "inputs": self.inputs, "layout": self.layout}


def products(device: Device, shape: GemmShape, count: int) -> Loaded:
    """A graph of `count` products of one x with weights of their own; its outputs are their results."""
    b = Builder()
    x = b.mutable("f32", (shape.rows, shape.inputs), "x", (-1.0, 1.0))
    found: list[Ref] = []
    bits = BITS.get(shape.dtype)
    if bits is not None and shape.inputs % GROUP:
        raise UnsupportedError(f"packed weights need a multiple of {GROUP} inputs, got {shape.inputs}")
    if shape.dtype.startswith("8da"):
        x = quantized(b, x, (shape.rows, shape.inputs))
    for i in range(count):
        if bits is not None:
            form = Format(shape.inputs, bits, GROUP, "f16", zeros=False)
            packed = b.constant("u32", (shape.outputs, form.words), f"w{i}", (0.01, 0.02))
            layer: dict[str, Arg] = {"input": x, "weight": packed, "bias": None, "format": form.literal()}
            found.append(b.node("webgpu.linear_packed", layer, "f32", (shape.rows, shape.outputs)))
            continue
        weight = b.constant(shape.dtype, shape.weight, f"w{i}", (-1.0, 1.0))
        args = {"input": x, "weight": weight, "bias": None, "transposed": shape.layout == "nk"}
        found.append(b.node("webgpu.linear", args, "f32", (shape.rows, shape.outputs)))
    return Loaded(device, b, b.graph(*found))


def verify(device: Device, shape: GemmShape) -> float:
    """The largest error of one product, in its first rows, against float64, in parts of the magnitudes that went in.

    Raises:
        WrongResultError: it is above 1e-5.
    """
    b = Builder()
    x = b.mutable("f32", (shape.rows, shape.inputs), "x", (-1.0, 1.0))
    weight = b.mutable(shape.dtype, shape.weight, "w", (-1.0, 1.0))
    args = {"input": x, "weight": weight, "bias": None, "transposed": shape.layout == "nk"}
    loaded = Loaded(device, b, b.graph(b.node("webgpu.linear", args, "f32", (shape.rows, shape.outputs))))
    try:
        [(_, got)] = loaded.delegate.execute([])
        left, right = (loaded.stored(name).astype(np.float64) for name in "xw")
    finally:
        loaded.close()
    left, right = left[:VERIFIED], right.T if shape.layout == "nk" else right
    error = np.abs(np.asarray(got)[:VERIFIED] - left @ right) / (np.abs(left) @ np.abs(right))
    worst = float(error.max())
    if not worst <= 1e-5:
        raise WrongResultError(f"{shape.record()} {shape.dtype}: error {worst:.3g}")
    return worst


def time_gemm(report: Report, shape: GemmShape, options: argparse.Namespace) -> None:
    """Measure one shape and write its line.

    Raises:
        WrongResultError: with --verify, where the result differs from the reference.
    """
    device = report.device
    more: dict[str, float] = {}
    if options.verify and shape.dtype not in BITS:
        more["largest_error"] = float(f"{verify(device, shape):.3g}")
    bits = BITS.get(shape.dtype)
    item = ITEM_SIZE[device.limits.wgsl_type(shape.dtype)] if bits is None else bits / 8 + 2 / GROUP
    count = max(1, min(MAX_WEIGHTS, int(options.rotate_bytes / (shape.outputs * shape.inputs * item)) + 1))
    loaded = products(device, shape, count)
    try:
        plan = loaded.ready([])
        dispatches = loaded.dispatches([])[0]

        def run(compute: Any) -> None:
            encode(compute, plan)

        repetitions = repetitions_for(device, run, options.pass_ms / 1000)
        times = time_passes(device, run, repetitions, options.samples, options.warm_up).divided(count)
    finally:
        loaded.close()
    report.line(
        "gemm",
        shape.record(),
        shape.dtype,
        times,
        traffic=shape.bytes(item),
        flops=shape.flops,
        kernels=[dispatch.kernel for dispatch in dispatches],
        splits=splits_of(dispatches),
        weights=count,
        grids=[list(dispatch.grid) for dispatch in dispatches],
        **more,
    )


def shapes(options: argparse.Namespace) -> Iterator[GemmShape]:
    """The shapes that the options ask for."""
    sizes = LLAMA if options.suite else tuple(combinations(options.outputs, options.inputs))
    for rows, (outputs, inputs) in combinations(options.rows, sizes):
        yield GemmShape(rows, outputs, inputs, options.dtype, options.layout)


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.gemm", description=(__doc__ or "").split("\n")[0])
    made.add_argument("--suite", choices=("llama",))
    made.add_argument("--rows", type=counts, default=[512, 2048], help="M; several: 512,2048")
    made.add_argument("--outputs", type=counts, default=[2048], help="N")
    made.add_argument("--inputs", type=counts, default=[2048], help="K")
    made.add_argument("--dtype", choices=("f16", "f32", *BITS), default="f16", help="of the weights")
    made.add_argument("--layout", choices=("nk", "kn"), default="nk", help="of the weights")
    made.add_argument("--verify", action="store_true", help="compare with a float64 reference before timing")
    add_common(made)
    return made


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 1 if a result was wrong or nothing could be measured."""
    options = parser().parse_args(arguments)
    device = Device.create(options.adapter)
    report = Report(device, options.out)
    report.rates = measure(device, options)
    wrong = 0
    for shape in shapes(options):
        try:
            time_gemm(report, shape, options)
        except WrongResultError as error:
            say(f"WRONG, not timed: {error}")
            wrong += 1
        except WebGPUDelegateError as error:
            say(f"left out: {shape.record()} {shape.dtype}: {error}")
    return int(wrong > 0 or report.lines == 0)


if __name__ == "__main__":
    raise SystemExit(main())
