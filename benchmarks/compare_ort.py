"""Attention side by side with ONNX Runtime's WebGPU execution provider (operator GroupQueryAttention).

    python -m benchmarks.compare_ort --decode|--prefill|--suite quick|full [shape options of benchmarks.attention]

Needs `pip install onnxruntime-webgpu onnx`. Both sides run a chain of L layers with own caches that stay on the device;
each layer writes its new rows into them first. ONNX Runtime gives no timestamps, so the time of a layer is the slope
over L of the wall time of many runs, which holds its host time where that is the longer; the package is timed in the
same way, and with timestamps besides.
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from executorch_webgpu.runtime.gpu.device import Device

from . import attention
from .baseline import measure
from .graphs import AttentionShape, attention_layers, encode, splits_of
from .options import command, say
from .report import ITEM_SIZE, Report
from .timing import Times, repetitions_for, time_passes, wait
from .verify import WrongResultError, attend

PROVIDER = "WebGpuExecutionProvider"
TOLERANCE = 5e-2
"""Largest absolute difference of ONNX Runtime's result, which it computes and rounds in float16."""
MAX_LAYERS = 16
"""Of the smaller of the two models."""
SAMPLE_SECONDS = 0.05

Array = np.ndarray[Any, Any]


class MissingPeerError(Exception):
    """ONNX Runtime, or its WebGPU provider, is not there or does not run here."""


@dataclass(frozen=True)
class Peer:
    """The optional packages."""

    ort: Any
    onnx: Any

    @classmethod
    def load(cls) -> Peer:
        """Raises MissingPeerError, which says what to install."""
        try:
            ort, onnx = importlib.import_module("onnxruntime"), importlib.import_module("onnx")
        except ImportError as error:
            raise MissingPeerError(
                f"{error}: this comparison needs ONNX Runtime with WebGPU: pip install onnxruntime-webgpu onnx"
            ) from error
        if PROVIDER not in ort.get_available_providers():
            raise MissingPeerError(
                f"this onnxruntime ({ort.__version__}) has no {PROVIDER}: "
                "uninstall onnxruntime, then pip install onnxruntime-webgpu"
            )
        return cls(ort, onnx)


def model(peer: Peer, shape: AttentionShape, layers: int) -> bytes:
    """An ONNX model: a chain of GroupQueryAttention, and the first elements of its result as `probe`.

    Inputs query [B, S, Hq D], key and value [B, S, Hkv D] (the new rows of every layer), seqlens_k i32 [B] (valid rows
    minus one), total i32 [1], and for each layer the caches past_k, past_v [B, Hkv, C, D], which it gives back.
    """
    helper, types = peer.onnx.helper, peer.onnx.TensorProto
    kind = types.FLOAT16 if shape.dtype == "f16" else types.FLOAT
    info = helper.make_tensor_value_info
    width, cached = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    cache = [shape.batch, shape.kv_heads, shape.cache_rows, shape.head_size]
    inputs = [
        info("query", kind, [shape.batch, shape.rows, width]),
        info("key", kind, [shape.batch, shape.rows, cached]),
        info("value", kind, [shape.batch, shape.rows, cached]),
        info("seqlens_k", types.INT32, [shape.batch]),
        info("total", types.INT32, [1]),
    ]
    outputs, nodes, last = [], [], "query"
    for i in range(layers):
        past, present = [f"past_k{i}", f"past_v{i}"], [f"present_k{i}", f"present_v{i}"]
        inputs += [info(name, kind, cache) for name in past]
        outputs += [info(name, kind, cache) for name in present]
        nodes.append(
            helper.make_node(
                "GroupQueryAttention",
                [last, "key", "value", *past, "seqlens_k", "total"],
                [f"result{i}", *present],
                domain="com.microsoft",
                num_heads=shape.heads,
                kv_num_heads=shape.kv_heads,
            )
        )
        last = f"result{i}"
    slices = {"starts": [0, 0, 0], "ends": [1, 1, 4], "axes": [0, 1, 2]}
    constants = [peer.onnx.numpy_helper.from_array(np.array(values, np.int64), name) for name, values in slices.items()]
    nodes.append(helper.make_node("Slice", [last, *slices], ["probe"]))
    outputs += [info("probe", kind, [1, 1, 4]), info(last, kind, [shape.batch, shape.rows, width])]
    graph = helper.make_graph(nodes, "attention", inputs, outputs, initializer=constants)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    made = helper.make_model(graph, opset_imports=opsets)
    made.ir_version = 8
    return bytes(made.SerializeToString())


class PeerLayers:
    """A session whose inputs and outputs are bound to buffers on its device; the caches are both.

    Raises:
        MissingPeerError: the provider finds no adapter, or refuses the model.
    """

    def __init__(self, peer: Peer, shape: AttentionShape, layers: int, options: Sequence[str]) -> None:
        self.shape, self.layers = shape, layers
        given = peer.ort.SessionOptions()
        given.log_severity_level = 3
        given.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        choices = dict(item.split("=", 1) for item in options)
        try:
            self.session = peer.ort.InferenceSession(
                model(peer, shape, layers), given, providers=[(PROVIDER, choices)], enable_fallback=0
            )
        except Exception as error:
            raise MissingPeerError(f"ONNX Runtime's {PROVIDER} does not run here: {error}") from error
        random = np.random.default_rng(3)
        kind = np.float16 if shape.dtype == "f16" else np.float32
        cache = (shape.batch, shape.kv_heads, shape.cache_rows, shape.head_size)
        rows = (shape.batch, shape.rows, shape.kv_heads * shape.head_size)

        def uniform(size: tuple[int, ...], low: float, high: float) -> Array:
            values: Array = random.uniform(low, high, size).astype(kind)
            return values

        self.query = uniform((shape.batch, shape.rows, shape.heads * shape.head_size), -6.0, 6.0)
        self.new = [uniform(rows, -1.0, 1.0), uniform(rows, -0.5, 1.5)]
        self.caches = [uniform(cache, -1.0, 1.0), uniform(cache, -0.5, 1.5)]
        self._bind()

    def _bind(self) -> None:
        """Upload once; what the first run puts into device buffers is input and output of all others."""
        small: dict[str, Array] = {
            "query": self.query, "key": self.new[0], "value": self.new[1],
            "seqlens_k": np.full(self.shape.batch, self.shape.keys - 1, np.int32),
            "total": np.array([self.shape.keys], np.int32),
        }  # fmt: skip
        names = [output.name for output in self.session.get_outputs()]
        first, self.binding = self.session.io_binding(), self.session.io_binding()
        for name, array in small.items():
            first.bind_cpu_input(name, array)
        for i in range(self.layers):
            for name, array in zip("kv", self.caches, strict=True):
                first.bind_cpu_input(f"past_{name}{i}", array)
        for name in names:
            first.bind_output(name, "webgpu", 0)
        self.session.run_with_iobinding(first)
        self.outputs = dict(zip(names, first.get_outputs(), strict=True))
        for name, array in small.items():
            self.binding.bind_cpu_input(name, array)
        for name, value in self.outputs.items():
            if name.startswith("present"):
                self.binding.bind_ortvalue_input(name.replace("present", "past"), value)
            self.binding.bind_ortvalue_output(name, value)

    def run(self) -> None:
        """Queue one run."""
        self.session.run_with_iobinding(self.binding)

    def wait(self) -> None:
        """Until all runs are done: a read of four numbers."""
        self.outputs["probe"].numpy()

    def result(self) -> Array:
        """[B, S, Hq, D] of the last layer."""
        value: Array = self.outputs[f"result{self.layers - 1}"].numpy()
        return value.reshape(self.shape.query_shape)


def verify_peer(peer: Peer, shape: AttentionShape, options: Sequence[str]) -> float:
    """One layer of the peer against the float64 reference, so that both sides are known to compute the same.

    Raises:
        WrongResultError: they differ by more than TOLERANCE.
    """
    layers = PeerLayers(peer, shape, 1, options)
    layers.run()
    actual = layers.result()
    query = layers.query.reshape(shape.query_shape)
    caches = []
    for cache, new in zip(layers.caches, layers.new, strict=True):
        full = cache.copy()
        rows = new.reshape(shape.batch, shape.rows, shape.kv_heads, shape.head_size)
        full[:, :, shape.past : shape.keys] = rows.transpose(0, 2, 1, 3)
        caches.append(full)
    worst = 0.0
    for b, h, s in ((0, 0, 0), (shape.batch - 1, shape.heads - 1, shape.rows - 1), (0, shape.heads // 2, 0)):
        g = h // (shape.heads // shape.kv_heads)
        expected = attend(query[b, :, h], caches[0][b, g], caches[1][b, g], shape.past, [s])[0]
        worst = max(worst, float(np.abs(actual[b, s, h].astype(np.float64) - expected).max()))
    if not worst <= TOLERANCE:
        raise WrongResultError(f"ONNX Runtime's result differs from the reference by {worst:.3g}")
    return worst


def slope(
    small: tuple[Callable[[], None], Callable[[], None]],
    large: tuple[Callable[[], None], Callable[[], None]],
    layers: int,
    samples: int,
    warm_up: float,
) -> Times:
    """Wall time a layer: (time of `large` - time of `small`) / layers, each (run, wait) run as often as the other.

    Returns:
        Microseconds; the percentiles are of differences of neighbouring samples.
    """

    def seconds(work: tuple[Callable[[], None], Callable[[], None]], count: int) -> float:
        run, finish = work
        began = time.perf_counter()
        for _ in range(count):
            run()
        finish()
        return time.perf_counter() - began

    seconds(small, 1)
    began, count = time.perf_counter(), 1
    while True:
        once = seconds(large, count) / count
        count = max(1, min(1000, round(SAMPLE_SECONDS / once)))
        if time.perf_counter() - began >= warm_up:
            break
    differences = []
    for _ in range(samples):
        low = seconds(small, count)
        differences.append((seconds(large, count) - low) / count / layers)
    return Times.of(np.array(differences) * 1e6, count)


def time_peer(report: Report, peer: Peer, shape: AttentionShape, layers: int, options: argparse.Namespace) -> Times:
    """Write the line of ONNX Runtime."""
    more: dict[str, Any] = {}
    if options.verify:
        more["largest_error"] = float(f"{verify_peer(peer, shape, options.ort_option):.3g}")
    pair = [PeerLayers(peer, shape, count, options.ort_option) for count in (layers, 2 * layers)]
    small, large = ((each.run, each.wait) for each in pair)
    times = slope(small, large, layers, options.samples, options.warm_up)
    report.line(
        "compare_ort.peer", shape.record(), shape.dtype, times, traffic=shape.bytes(ITEM_SIZE[shape.dtype]),
        flops=shape.flops, kernels=["GroupQueryAttention"], layers=layers, clock="wall",
        peer=f"onnxruntime {peer.ort.__version__}", peer_options=list(options.ort_option), **more,
    )  # fmt: skip
    return times


def time_package(
    report: Report, shape: AttentionShape, layers: int, options: argparse.Namespace
) -> tuple[Times, Times]:
    """Write the line of the package; (GPU time, wall time) of a layer."""
    device = report.device
    pair = [attention_layers(device, shape, count, write=True) for count in (layers, 2 * layers)]
    try:
        plans = [loaded.ready(inputs) for loaded, inputs in pair]

        def runner(number: int) -> Callable[[], None]:
            def run() -> None:
                encoder = device.gpu.create_command_encoder()
                compute = encoder.begin_compute_pass()
                encode(compute, plans[number])
                compute.end()
                device.gpu.queue.submit([encoder.finish()])

            return run

        def finish() -> None:
            wait(device)

        wall = slope((runner(0), finish), (runner(1), finish), layers, options.samples, options.warm_up)
        repetitions = repetitions_for(device, lambda compute: encode(compute, plans[1]), options.pass_ms / 1000)
        gpu = time_passes(
            device, lambda compute: encode(compute, plans[1]), repetitions, options.samples, options.warm_up
        ).divided(2 * layers)
        dispatches = [d for node in pair[0][0].dispatches(pair[0][1])[:3] for d in node]
    finally:
        for loaded, _ in pair:
            loaded.close()
    report.line(
        "compare_ort.package", shape.record(), shape.dtype, gpu,
        traffic=shape.bytes(attention.item_size(device, shape.dtype)), flops=shape.flops,
        kernels=[d.kernel for d in dispatches], splits=splits_of(dispatches), layers=layers, clock="gpu",
        wall_us=float(f"{wall.median:.5g}"),
    )  # fmt: skip
    return gpu, wall


def compare(report: Report, peer: Peer, shape: AttentionShape, options: argparse.Namespace) -> None:
    """Both sides of one shape."""
    item = attention.item_size(report.device, shape.dtype)
    layers = options.layers or min(MAX_LAYERS, attention.layers_for(shape, item, options.rotate_bytes))
    theirs = time_peer(report, peer, shape, layers, options)
    gpu, wall = time_package(report, shape, layers, options)
    say(
        f"{shape.record()} {shape.dtype}: ONNX Runtime {theirs.median:.1f} us, package {wall.median:.1f} us "
        f"({theirs.median / wall.median:.2f}x), on the GPU {gpu.median:.1f} us"
    )


def _setting(text: str) -> str:
    if not text.partition("=")[0] or "=" not in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return text


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 1 with a sentence where ONNX Runtime's WebGPU is missing, or its result is wrong."""
    made = attention.parser("python -m benchmarks.compare_ort", __doc__)
    made.add_argument(
        "--ort-option", type=_setting, action="append", default=[], help="NAME=VALUE, an option of the provider"
    )
    options = made.parse_args(arguments)
    wrong = 0
    try:
        peer = Peer.load()
        device = Device.create(options.adapter)
        report = Report(device, options.out)
        report.rates = measure(device, options)
        for shape in attention.shapes(options):
            try:
                compare(report, peer, shape, options)
            except WrongResultError as error:
                say(f"WRONG, not timed: {shape.record()} {shape.dtype}: {error}")
                wrong += 1
    except MissingPeerError as error:
        say(str(error))
        return 1
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
