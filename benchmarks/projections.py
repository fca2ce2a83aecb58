"""GPU time of the projections of a decoder layer for few rows, each one dispatch that waits for the one before.

    python -m benchmarks.projections [--rows 1,2,4,8] [--weights 4bit|8bit|8da4w|8da8w|f16|f32] [--dtype f16|f32]
        [--only gate,down]

The projections are those of a layer of the sizes of Llama 3.2 1B, and its logits, with what is fused to them. Weights
take turns, so that together they exceed --rotate-bytes; all write to the same buffers, so that no dispatch runs beside
another. --dtype is that of the activations in the graph. 8da4w, 8da8w: x, or its norm, is quantised to
8 bits first.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from executorch_webgpu.backend.graph import Arg, Node, Ref, Value
from executorch_webgpu.ops.packed import Format
from executorch_webgpu.runtime.errors import WebGPUDelegateError
from executorch_webgpu.runtime.gpu.device import Device

from .baseline import measure
from .graphs import BITS, Builder, Loaded, encode
from .options import add_common, command, count, counts, names, say
from .report import ITEM_SIZE, Report
from .timing import repetitions_for, time_passes

MAX_WEIGHTS = 64
GROUP = 32


@dataclass(frozen=True)
class Kind:
    """x [rows, inputs] times weights [outputs_i, inputs], with what goes before and after."""

    inputs: int
    outputs: tuple[int, ...]
    norm: bool = False
    gated: bool = False
    residual: bool = False


KINDS = {
    "output": Kind(2048, (2048,), residual=True),
    "qkv": Kind(2048, (2048, 512, 512), norm=True),
    "gate": Kind(2048, (8192, 8192), norm=True, gated=True),
    "down": Kind(8192, (2048,), residual=True),
    "logits": Kind(2048, (128256,), norm=True),
}


def divided(kind: Kind, by: int) -> Kind:
    """The same with sizes divided, in whole groups."""
    less = tuple(max(n // by, GROUP) // GROUP * GROUP for n in (kind.inputs, *kind.outputs))
    return replace(kind, inputs=less[0], outputs=less[1:])


def weight_bytes(kind: Kind, form: Format | None, item: int) -> int:
    """Of all weights; codes and scales where they are packed."""
    rows = sum(kind.outputs)
    return rows * kind.inputs * item if form is None else rows * form.words * 4


def format_of(kind: Kind, weights: str, scale: str) -> Format | None:
    """The format of weights named as in the options."""
    bits = BITS.get(weights)
    return None if bits is None else Format(kind.inputs, bits, GROUP, scale, zeros=False)


def layers(device: Device, kind: Kind, rows: int, weights: str, dtype: str, scale: str, count: int) -> Loaded:
    """A graph of `count` projections of one x with weights of their own, all of which write to the same buffers.

    x, residual and results have `dtype` in the graph and are f32 in memory, as temporaries of a model are.
    """
    b = Builder()

    def shared(columns: int, name: str) -> Ref:
        stored = b.mutable("f32", (rows, columns), name, (-1.0, 1.0))
        b.values.append(Value("temp", dtype, (rows, columns), name, alias=stored.value))
        return Ref(len(b.values) - 1)

    x = shared(kind.inputs, "x")
    form = format_of(kind, weights, scale)
    made = kind.outputs[:1] if kind.gated else kind.outputs
    outs = [shared(n, f"out{i}") for i, n in enumerate(made)]
    residual = shared(made[0], "residual") if kind.residual else None
    norm = b.constant("f32", (kind.inputs,), "norm", (0.5, 1.5)) if kind.norm else None
    bound = (3 / kind.inputs) ** 0.5
    for layer in range(count):
        matrices = tuple(
            b.constant("u32", (n, form.words), f"w{layer}.{i}", (0.5 * bound, 1.5 * bound)) if form is not None
            else b.constant(weights, (n, kind.inputs), f"w{layer}.{i}", (-bound, bound))
            for i, n in enumerate(kind.outputs)
        )  # fmt: skip
        args: dict[str, Arg] = {
            "input": x, "weights": matrices, "biases": None, "residual": residual, "gated": kind.gated,
            "formats": None if form is None else (form.literal(),) * len(matrices),
            "norm_eps": 1e-5 if kind.norm else None, "norm_weight": norm,
            "quantize": (-128, 127, 1e-6) if weights.startswith("8da") else None,
        }  # fmt: skip
        b.nodes.append(Node("webgpu.project", args, tuple(out.value for out in outs), f"project{layer}"))
    return Loaded(device, b, b.graph(*outs))


def time_projection(report: Report, name: str, kind: Kind, rows: int, options: argparse.Namespace) -> None:
    """Measure one projection and write its line."""
    device, item = report.device, ITEM_SIZE.get(options.weights, 0)
    traffic = weight_bytes(kind, format_of(kind, options.weights, options.scales), item)
    count = max(1, min(MAX_WEIGHTS, options.rotate_bytes // traffic + 1))
    if traffic > options.rotate_bytes // 4:
        count = 1
    loaded = layers(device, kind, rows, options.weights, options.dtype, options.scales, count)
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
        "projection",
        {"projection": name, "rows": rows, "inputs": kind.inputs, "outputs": list(kind.outputs)},
        options.dtype,
        times,
        traffic=traffic,
        flops=2 * rows * sum(kind.outputs) * kind.inputs,
        kernels=[dispatch.kernel for dispatch in dispatches],
        weights=options.weights,
        grids=[list(dispatch.grid) for dispatch in dispatches],
        consts=[{name: value for name, value in dispatch.consts.items() if name.isupper()} for dispatch in dispatches],
    )


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.projections", description=(__doc__ or "").split("\n")[0])
    made.add_argument("--rows", type=counts, default=[1, 2, 4, 8], help="of x; several: 1,8")
    made.add_argument("--weights", choices=(*BITS, "f16", "f32"), default="4bit")
    made.add_argument("--scales", choices=("f16", "f32"), default="f16", help="of packed weights")
    made.add_argument("--dtype", choices=("f16", "bf16", "f32"), default="f16", help="of the activations in the graph")
    made.add_argument("--only", type=names, default=list(KINDS), help=", ".join(KINDS))
    made.add_argument("--divide", type=count, default=1, help="sizes by this")
    add_common(made)
    return made


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 1 if nothing could be measured."""
    made = parser()
    options = made.parse_args(arguments)
    unknown = sorted(set(options.only) - set(KINDS))
    if unknown:
        made.error(f"unknown projections {unknown}; there are {list(KINDS)}")
    device = Device.create(options.adapter)
    report = Report(device, options.out)
    report.rates = measure(device, options)
    for name, rows in product(options.only, options.rows):
        try:
            time_projection(report, name, divided(KINDS[name], options.divide), rows, options)
        except WebGPUDelegateError as error:
            say(f"left out: {name}, {rows} rows: {error}")
    return int(report.lines == 0)


if __name__ == "__main__":
    raise SystemExit(main())
