"""GPU time of attention layers.

    python -m benchmarks.attention --decode [--heads 32 --kv-heads 8 --head-size 128 --rows 1 --past 2048 ...]
    python -m benchmarks.attention --prefill [--rows 2048 ...]
    python -m benchmarks.attention --suite quick|full

A graph of L layers with own caches runs in one compute pass; the time of a layer is that of the pass over L, merges
included. L is as large as it takes for the caches to exceed --rotate-bytes, so that no layer finds its keys in a cache
of the GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product as combinations

from executorch_webgpu.backend.graph import Arg
from executorch_webgpu.ops.attention_lower import ROUTES
from executorch_webgpu.runtime.errors import WebGPUDelegateError
from executorch_webgpu.runtime.gpu.device import Device

from .baseline import measure
from .graphs import AttentionShape, attention_layers, encode, splits_of
from .options import add_common, command, count, counts, names, natural, naturals, say
from .report import ITEM_SIZE, Report
from .timing import repetitions_for, time_passes
from .verify import WrongResultError, verify_sampled, verify_small

MAX_LAYERS = 64


def decode_shape(keys: int, **changes: int | str) -> AttentionShape:
    """One token that sees `keys` rows; 32 query and 8 KV heads of 128 in f16 if not said otherwise."""
    return replace(AttentionShape(1, 32, 8, 128, 1, keys - 1), **changes)  # type: ignore[arg-type]


def prefill_shape(rows: int, **changes: int | str) -> AttentionShape:
    """`rows` tokens of a new sequence, heads as in `decode_shape`."""
    return replace(AttentionShape(1, 32, 8, 128, rows, 0), **changes)  # type: ignore[arg-type]


def suite(name: str) -> list[AttentionShape]:
    """The shapes of a preset, `quick` or `full`."""
    if name == "quick":
        return [decode_shape(2048), decode_shape(8192), prefill_shape(512), prefill_shape(2048)]
    decode = [decode_shape(keys) for keys in (2048, 8192, 32768)]
    decode += [decode_shape(8192, head_size=size) for size in (64, 96)]
    groups = ((8, 8), (24, 8), (28, 4), (64, 8))
    decode += [decode_shape(8192, heads=heads, kv_heads=kv_heads) for heads, kv_heads in groups]
    decode += [decode_shape(8192, dtype="f32"), decode_shape(8192, batch=8)]
    prefill = [prefill_shape(rows) for rows in (32, 64, 128, 512, 1024, 2048, 4096)]
    prefill += [prefill_shape(4096, dtype="f32")]
    prefill += [prefill_shape(rows, head_size=64) for rows in (2048, 4096)]
    prefill += [prefill_shape(512, past=8192)]
    return decode + prefill


def layers_for(shape: AttentionShape, item: int, rotate_bytes: int) -> int:
    """Layers whose caches together exceed `rotate_bytes`, at most MAX_LAYERS."""
    one = 2 * shape.batch * shape.cache_rows * shape.kv_heads * shape.head_size * item
    return max(1, min(MAX_LAYERS, rotate_bytes // one + 1))


def item_size(device: Device, dtype: str) -> int:
    """Bytes of an element as the device stores it."""
    return ITEM_SIZE[device.limits.wgsl_type(dtype)]


def time_attention(
    report: Report, shape: AttentionShape, route: str, variant: str, options: argparse.Namespace
) -> None:
    """Measure one shape and write its line.

    Raises:
        UnsupportedError: the operator refuses route or variant.
        WrongResultError: with --verify, where the result differs from the reference.
    """
    device = report.device
    extra: dict[str, Arg] = {"route": route}
    if variant != "auto":
        extra["variant"] = variant
    more: dict[str, float] = {}
    if options.verify:
        worst = max(verify_small(device, shape, extra), verify_sampled(device, shape, extra))
        more["largest_error"] = float(f"{worst:.3g}")
    item = item_size(device, shape.dtype)
    layers = options.layers or layers_for(shape, item, options.rotate_bytes)
    loaded, inputs = attention_layers(device, shape, layers, extra)
    try:
        plan = loaded.ready(inputs)
        dispatches = loaded.dispatches(inputs)[0]
        repetitions = repetitions_for(device, lambda compute: encode(compute, plan), options.pass_ms / 1000)
        times = time_passes(
            device, lambda compute: encode(compute, plan), repetitions, options.samples, options.warm_up
        ).divided(layers)
    finally:
        loaded.close()
    kind = "decode" if shape.rows <= 16 else "prefill"
    report.line(
        f"attention.{kind}",
        shape.record(),
        shape.dtype,
        times,
        traffic=shape.bytes(item),
        flops=shape.flops,
        kernels=[dispatch.kernel for dispatch in dispatches],
        splits=splits_of(dispatches),
        route=route,
        variant=variant,
        layers=layers,
        grids=[list(dispatch.grid) for dispatch in dispatches],
        **more,
    )


def shapes(options: argparse.Namespace) -> Iterator[AttentionShape]:
    """The shapes that the options ask for."""
    if options.suite:
        yield from suite(options.suite)
        return
    rows = options.rows or ([1] if options.decode else [2048])
    past = options.past or ([2048] if options.decode else [0])
    sizes = (options.batch, options.heads, options.kv_heads, options.head_size)
    for s, p in combinations(rows, past):
        yield AttentionShape(*sizes, s, p, options.dtype, options.capacity)


def _layers(text: str) -> int:
    """A number of layers; 0 for `auto`."""
    return 0 if text == "auto" else natural(text)


def parser(prog: str = "python -m benchmarks.attention", about: str | None = __doc__) -> argparse.ArgumentParser:
    """The options of a command that times shapes of attention."""
    made = argparse.ArgumentParser(prog=prog, description=(about or "").split("\n")[0])
    what = made.add_mutually_exclusive_group(required=True)
    what.add_argument("--decode", action="store_true", help="one new row over a cache")
    what.add_argument("--prefill", action="store_true", help="many new rows")
    what.add_argument("--suite", choices=("quick", "full"))
    made.add_argument("--heads", type=count, default=32)
    made.add_argument("--kv-heads", type=count, default=8)
    made.add_argument("--head-size", type=count, default=128)
    made.add_argument("--rows", type=counts, help="new rows; several: 1,2,4")
    made.add_argument("--past", type=naturals, help="rows of the caches before them; several: 2048,8192")
    made.add_argument("--capacity", type=natural, default=0, help="rows of the caches; default: past + rows")
    made.add_argument("--dtype", choices=("f16", "f32"), default="f16", help="of the caches")
    made.add_argument("--batch", type=count, default=1)
    made.add_argument(
        "--layers", type=_layers, default=0,
        help="a number, or auto: as many as --rotate-bytes takes",
    )  # fmt: skip
    made.add_argument("--route", "--routes", dest="routes", type=names, default=["auto"])
    made.add_argument("--variant", "--variants", dest="variants", type=names, default=["auto"])
    made.add_argument("--verify", action="store_true", help="compare with a float64 reference before timing")
    add_common(made)
    return made


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 1 if a result was wrong or nothing could be measured."""
    made = parser()
    options = made.parse_args(arguments)
    unknown = sorted(set(options.routes) - set(ROUTES))
    if unknown:
        made.error(f"unknown routes {unknown}; there are {', '.join(ROUTES)}")
    device = Device.create(options.adapter)
    report = Report(device, options.out)
    report.rates = measure(device, options)
    wrong = 0
    for shape in shapes(options):
        for route, variant in combinations(options.routes, options.variants):
            try:
                time_attention(report, shape, route, variant, options)
            except WrongResultError as error:
                say(f"WRONG, not timed: route {route}, variant {variant}, {error}")
                wrong += 1
            except WebGPUDelegateError as error:
                say(f"left out: {shape.record()} {shape.dtype}, route {route}, variant {variant}: {error}")
    return int(wrong > 0 or report.lines == 0)


if __name__ == "__main__":
    raise SystemExit(main())
