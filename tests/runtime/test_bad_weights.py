"""Quantised weights that mean nothing, and packed ones that cannot be loaded: specific errors, nothing left behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torchao.quantization import quantize_

from executorch_webgpu.backend.graph import Arg, Graph
from executorch_webgpu.backend.packing import QuantizationError
from executorch_webgpu.backend.passes.quantized import Constants, fuse_quantized
from executorch_webgpu.ops.packed import Format
from executorch_webgpu.partitioner import WebGPUPartitioner
from executorch_webgpu.runtime import Runtime
from executorch_webgpu.runtime.errors import DeviceError, MissingDataError
from executorch_webgpu.runtime.gpu.device import Device
from tests.harness import GraphBuilder, device
from tests.models.test_quantized import VOCABULARY, Net, lowered, weight_only
from tests.ops.quantized import quantized

Array = np.ndarray[Any, Any]
N, K, GROUP = 6, 40, 8


# -- found when a program is lowered, before there is one


def layer(content: dict[str, tuple[str, Array]], block: int = GROUP, high: int = 7) -> Graph:
    """x [2, K] times a matrix that `dequantize_affine` makes of the constants q, scale and zero."""
    b = GraphBuilder()
    x = b.input("f32", (2, K))
    stored = {name: b.stored("constant", dtype, array, name) for name, (dtype, array) in content.items()}
    args: dict[str, Arg] = {
        "input": stored["q"], "block_size": (1, block), "scale": stored["scale"], "zero_point": stored["zero"],
        "input_dtype": "i8", "quant_min": -8, "quant_max": high, "output_dtype": "f32",
    }  # fmt: skip
    matrix = b.node("torchao.dequantize_affine.default", args, ("f32", (N, K)))
    return b.graph(b.node("aten.linear.default", {"input": x, "weight": matrix, "bias": None}, ("f32", (2, N))))


def table(content: dict[str, tuple[str, Array]]) -> Graph:
    """Rows of a table in bytes."""
    b = GraphBuilder()
    stored = {name: b.stored("constant", dtype, array, name) for name, (dtype, array) in content.items()}
    args: dict[str, Arg] = {
        "weight": stored["q"], "weight_scales": stored["scale"], "weight_zero_points": stored["zero"],
        "weight_quant_min": -128, "weight_quant_max": 127, "indices": b.input("i64", (3,)),
    }  # fmt: skip
    return b.graph(b.node("quantized_decomposed.embedding_byte.default", args, ("f32", (3, K))))


def good() -> dict[str, tuple[str, Array]]:
    q = np.random.default_rng(0).integers(-8, 8, (N, K)).astype(np.int8)
    groups = (N, K // GROUP)
    return {
        "q": ("i8", q),
        "scale": ("f32", np.ones(groups, np.float32)),
        "zero": ("f32", np.zeros(groups, np.float32)),
    }


def changed(name: str, change: Callable[[Array], Array]) -> dict[str, tuple[str, Array]]:
    found = good()
    dtype, array = found[name]
    return {**found, name: (dtype, change(array))}


def with_one(value: float) -> Callable[[Array], Array]:
    def change(array: Array) -> Array:
        array = array.copy()
        array[2, 3] = value
        return array

    return change


LAYERS = {
    "a scale that is NaN": (changed("scale", with_one(np.nan)), {}, "q: scales are not finite"),
    "an infinite scale": (changed("scale", with_one(np.inf)), {}, "q: scales are not finite"),
    "a zero point that is NaN": (changed("zero", with_one(np.nan)), {}, "q: zero points are not finite"),
    "groups that do not divide": (good(), {"block": 7}, "scales: groups of 7 do not divide 40 columns"),
    "too few scales": (changed("scale", lambda a: a[:, 1:]), {}, r"scales are \[6, 4\], expected \[6, 5\]"),
    "scales of other rows": (changed("scale", lambda a: a[1:]), {}, r"scales are \[5, 5\], expected \[6, 5\]"),
    "too few zero points": (changed("zero", lambda a: a[:, :1]), {}, r"zero points are \[6, 1\], expected \[6, 5\]"),
    "codes out of range": (changed("q", with_one(100)), {}, "values from -8 to 100 are outside of -8 to 7"),
}


def content_of(given: dict[str, tuple[str, Array]]) -> Constants:
    return dict(given)


def test_what_is_right_is_packed() -> None:
    for graph in (layer(good()), table(good())):
        constants = content_of(good())
        assert [node.op for node in fuse_quantized(graph, constants).nodes][-1].endswith("packed")
        assert len(constants) == 4


@pytest.mark.parametrize("case", LAYERS)
def test_weights_of_a_layer_that_mean_nothing(case: str) -> None:
    given, more, message = LAYERS[case]
    constants = content_of(given)
    with pytest.raises(QuantizationError, match=message):
        fuse_quantized(layer(given, **more), constants)
    assert set(constants) == set(given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (changed("scale", lambda a: np.ones((N, 3), np.float32)), "groups of 0 do not divide 40 columns"),
        (changed("scale", with_one(-np.inf)), "q: scales are not finite"),
        (changed("zero", with_one(np.nan)), "q: zero points are not finite"),
    ],
)
def test_tables_that_mean_nothing(given: dict[str, tuple[str, Array]], message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        fuse_quantized(table(given), content_of(given))


def test_content_that_is_missing_is_named() -> None:
    given = good()
    constants = content_of({name: found for name, found in given.items() if name != "scale"})
    with pytest.raises(QuantizationError, match="scale: the program holds no content"):
        fuse_quantized(layer(given), constants)


@pytest.mark.parametrize("which", ["table", "layer"])
def test_a_model_with_a_bad_scale_gives_no_program(which: str) -> None:
    net = Net((64, 8)).eval()
    module = net.table if which == "table" else net.layers[0]
    quantize_(module, weight_only(8, 32), lambda m, _: m is module)
    module.weight.scale[3, 1] = float("inf")
    name = "table.weight" if which == "table" else r"layers\.0\.weight"
    with pytest.raises(QuantizationError, match=f"{name}.*scales are not finite"):
        lowered(net, "B")


# -- found when a program is loaded


def chain(*formats: tuple[int, int]) -> tuple[GraphBuilder, Graph]:
    """Layers of packed weights [32, 32], one after the other."""
    b = GraphBuilder()
    x = b.input("f32", (1, 32))
    for number, (bits, group) in enumerate(formats):
        words, form = quantized(32, 32, bits, group).packed()
        weight = b.stored("constant", "u32", words + np.uint32(number), f"w{number}")
        args: dict[str, Arg] = {"input": x, "weight": weight, "bias": None, "format": form.literal()}
        x = b.node("webgpu.linear_packed", args, ("f32", (1, 32)))
    return b, b.graph(x)


def state(on: Device) -> dict[str, int]:
    return {purpose: size for purpose, size in on.memory.by_purpose.items() if size}


@pytest.mark.parametrize("rows", [0, 31, 33])
def test_packed_data_of_another_shape(rows: int) -> None:
    """The last of three weights has other rows: nothing was uploaded."""
    on = device("full")
    b, graph = chain((4, 32), (8, 16), (4, 16))
    words = Format(32, 4, 16, "f32", False).words
    b.data["w2"] = bytes(4 * words * rows)
    before, held = on.counters.copy(), state(on)
    wanted = rf"w2: {4 * words * 32:,} bytes expected for u32\[32, {words}\], the data has {4 * words * rows:,}; are"
    with pytest.raises(MissingDataError, match=wanted):
        b.load(graph, on)
    assert (on.counters.since(before).buffers, state(on)) == (0, held)


def test_packed_weights_of_another_type() -> None:
    """The same columns in 8 bits instead of 4: other bytes a row."""
    on = device("full")
    b, graph = chain((4, 32))
    other, _ = chain((8, 32))
    b.data["w0"] = other.data["w0"]
    held = state(on)
    with pytest.raises(MissingDataError, match=r"w0: .* bytes expected for u32\[32, 8\], the data has 1,536"):
        b.load(graph, on)
    assert state(on) == held


@pytest.mark.parametrize("number", [0, 1, 2])
def test_too_little_gpu_memory_for_packed_weights(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    on = device("full")
    b, graph = chain((4, 32), (8, 16), (4, 16))
    held, made, seen = state(on), Device.buffer, []

    def buffer(self: Device, *args: Any, **kwargs: Any) -> Any:
        seen.append(args)
        if len(seen) > number:
            raise DeviceError("no GPU buffer of that size")
        return made(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(Device, "buffer", buffer)
        with pytest.raises(DeviceError, match="no GPU buffer"):
            b.load(graph, on)
    assert (len(seen), state(on)) == (number + 1, held)
    delegate = b.load(graph, on)  # and it can be loaded when there is memory
    [(_, y)] = delegate.execute([("f32", np.ones((1, 32), np.float32))])
    assert np.isfinite(y).all()
    delegate.close()
    delegate.weights.close()
    assert state(on).get("weights") == held.get("weights")


def test_external_data_of_another_export(tmp_path: Any) -> None:
    """Packed weights in a `.ptd`: none given, that of a model quantised otherwise, the right one."""
    pte: dict[int, bytes] = {}
    for bits in (4, 8):
        net = Net((64, 8)).eval()
        quantize_(net, weight_only(bits, 32))
        (tmp_path / str(bits)).mkdir()
        pte[bits] = lowered(net, "B", partitioner=WebGPUPartitioner(external_weights="w"), data=tmp_path / str(bits))
    on = device("full")
    held = state(on)
    for data in (None, tmp_path / "8" / "w.ptd"):
        with (
            Runtime(on).load_program(pte[4], data) as program,
            pytest.raises(MissingDataError, match=r"no data named '.*from the same export|pass the \.ptd"),
        ):
            program.load_method("forward")
        assert state(on) == held
    with Runtime(on).load_program(pte[4], tmp_path / "4" / "w.ptd") as program:
        assert program.verify_data() >= 2  # packed weights, scales
        [got] = program.load_method("forward").execute([torch.arange(VOCABULARY)[None, :5]])
        assert np.asarray(got).shape == (1, 5, 8)
    assert state(on).get("weights") == held.get("weights")
