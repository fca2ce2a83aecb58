"""Bad input from end to end: every mistake has its exception and message, submits nothing, and harms no later call."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  (registers llama::*)

from executorch_webgpu.backend.graph import FORMAT_VERSION
from executorch_webgpu.backend.serialize import deserialize, serialize
from executorch_webgpu.partitioner import WebGPUPartitioner
from executorch_webgpu.runtime import (
    Device,
    DeviceError,
    InputError,
    Method,
    MissingDataError,
    ProgramFormatError,
    Runtime,
)
from executorch_webgpu.runtime.gpu import device as device_module
from tests.harness import device

CAPACITY, LONGEST, HEADS, D = 8, 5, 2, 4
Inputs = tuple[Any, ...]


class Layer(torch.nn.Module):
    """x f32[1, S, HEADS, D] is query, key and value; then a linear layer; offset f32[D] is added."""

    def __init__(self, capacity: int = CAPACITY, heads: int = HEADS, size: int = D) -> None:
        super().__init__()
        self.capacity = capacity
        self.linear = torch.nn.Linear(size, size)
        self.register_buffer("k_cache", torch.zeros(1, capacity, heads, size))
        self.register_buffer("v_cache", torch.zeros(1, capacity, heads, size))

    def forward(self, x: torch.Tensor, position: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        start = position[0].item()
        torch._check(start >= 0)
        torch._check(start + x.shape[1] <= self.capacity)
        torch.ops.llama.update_cache(x, self.k_cache, start)
        torch.ops.llama.update_cache(x, self.v_cache, start)
        y = torch.ops.llama.custom_sdpa(x, self.k_cache, self.v_cache, start, None, 0.0, True)
        return self.linear(y) + offset


def build(*sizes: int) -> Layer:
    torch.manual_seed(0)
    return Layer(*sizes).eval()


def lower(module: Layer, partitioner: WebGPUPartitioner) -> Any:
    heads, size = module.k_cache.shape[2:]
    seq = torch.export.Dim("seq", min=1, max=LONGEST)
    inputs = (torch.randn(1, 3, heads, size), torch.tensor([2]), torch.randn(size))
    with torch.no_grad():
        exported = torch.export.export(module, inputs, dynamic_shapes=({1: seq}, None, None), strict=True)
    config = EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True)
    return to_edge_transform_and_lower(exported, partitioner=[partitioner], compile_config=config).to_executorch()


@cache
def pte() -> bytes:
    return bytes(lower(build(), WebGPUPartitioner()).buffer)


def inputs(length: int, position: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(length + 10 * position)
    x = torch.randn(1, length, HEADS, D, generator=generator)
    return x, torch.tensor([position]), torch.arange(float(D))


def runtime() -> Runtime:
    return Runtime(device("full"))


@pytest.fixture
def method() -> Iterator[Method]:
    with runtime().load_program(pte()) as program:
        loaded = program.load_method("forward")
        assert len(loaded.delegates) == 1
        assert loaded.outside() == []
        yield loaded


def assert_same(method: Method, module: Layer, length: int, position: int) -> None:
    """The next correct call of the method gives what the eager module gives."""
    given = inputs(length, position)
    with torch.no_grad():
        expected = module(*given)
    torch.testing.assert_close(method.execute(given)[0], expected, atol=1e-5, rtol=1e-4)


# -- files


@pytest.mark.parametrize("size", [0, 3, 20, 100, 0.5, 0.9, -1])
def test_truncated_program(size: float) -> None:
    length = int(size * len(pte())) if isinstance(size, float) else size
    with pytest.raises(ProgramFormatError, match=r"(?i)truncated|bytes|too short|empty|size"):
        runtime().load_program(pte()[:length]).load_method("forward")


@pytest.mark.parametrize("content", [b"PK\x03\x04" * 100, b"GGUF" + bytes(400), b"\x08\x00\x00\x00TFL3" + bytes(400)])
def test_foreign_file(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "other.pte"
    path.write_bytes(content)
    with pytest.raises(ProgramFormatError, match=r"other\.pte"):
        runtime().load_program(path)


def test_newer_blob() -> None:
    blob = bytes(runtime().load_program(pte()).file.plan("forward").delegates[0].processed)
    newer = serialize(replace(deserialize(blob), format_version=FORMAT_VERSION + 1))
    assert len(newer) == len(blob) != 0
    assert pte().count(blob) == 1
    used = device("full").memory.total
    program = runtime().load_program(pte().replace(blob, newer))
    wanted = rf"forward, delegate 0.*format version {FORMAT_VERSION + 1}.*reads up to {FORMAT_VERSION}"
    with pytest.raises(ProgramFormatError, match=wanted):
        program.load_method("forward")
    assert device("full").memory.total == used


def test_missing_data_file(tmp_path: Path) -> None:
    made = lower(build(), WebGPUPartitioner(external_weights="weights"))
    made.write_tensor_data_to_file(str(tmp_path))
    content = bytes(made.buffer)
    used = device("full").memory.total
    program = runtime().load_program(content)
    with pytest.raises(MissingDataError, match=r"no data named '.*pass the \.ptd"):
        program.load_method("forward")
    assert device("full").memory.total == used
    with pytest.raises(FileNotFoundError, match=r"other\.ptd"):
        runtime().load_program(content, data_path=tmp_path / "other.ptd")
    with runtime().load_program(content, data_path=tmp_path / "weights.ptd") as found:
        assert_same(found.load_method("forward"), build(), 3, 0)


def test_unknown_method() -> None:
    with pytest.raises(InputError, match=r"no method 'prefill'.*forward"):
        runtime().load_program(pte()).load_method("prefill")


# -- inputs


X, POSITION, OFFSET = inputs(3, 3)
WRONG: dict[str, tuple[Inputs, str]] = {
    "too few": ((X, POSITION), r"forward takes 3 inputs, got 2"),
    "too many": ((X, POSITION, OFFSET, OFFSET), r"forward takes 3 inputs, got 4"),
    "dtype": ((X.double(), POSITION, OFFSET), r"input 0: dtype f64, expected f32"),
    "half": ((X, POSITION, OFFSET.half()), r"input 2: dtype f16, expected f32"),
    "not a tensor": ((X, POSITION, "text"), r"an input of type str"),
    "none": ((X, POSITION, None), r"an input of type NoneType"),
    "rows of several lengths": ((X, [[1], [2, 3]], OFFSET), r"an input of type list is no array: .*inhomogeneous"),
    "more than 64 bits": ((X, 2**70, OFFSET), r"an input of type int is no array: .*too large"),
    "a tensor instead of a list": (X, r"inputs of type Tensor, expected a list with one value for each input"),  # type: ignore[dict-item]
    "a number instead of a list": (5, r"inputs of type int, expected a list"),  # type: ignore[dict-item]
    "names": ({"x": X, "p": POSITION, "o": OFFSET}, r"inputs of type dict, expected a list"),  # type: ignore[dict-item]
    "rank": ((X[0], POSITION, OFFSET), r"input 0: rank 3 with shape \[3, 2, 4\], expected rank 4"),
    "static size": ((X, POSITION, torch.zeros(D + 1)), r"input 2: size 5 at axis 0.* exactly 4"),
    "broadcast": ((X, POSITION, torch.zeros(1)), r"input 2: size 1 at axis 0.* exactly 4"),
    "static axis of a dynamic input": (
        (X[:, :, :1], POSITION, OFFSET),
        r"input 0 \(x\): size 1 at axis 2, expected 2",
    ),
    "dynamic size too large": (
        (torch.zeros(1, LONGEST + 1, HEADS, D), torch.tensor([0]), OFFSET),
        r"input 0: size 6 at axis 1, this program takes at most 5",
    ),
    "dynamic size zero": (
        (X[:, :0], POSITION, OFFSET),
        r"input 0 \(x\): size at axis 1 is 0, outside \[1, 5\] of the export",
    ),
    "negative position": ((X, torch.tensor([-1]), OFFSET), r"-1.* outside \[0, "),
    "fractional position": ((X, torch.tensor([1.5]), OFFSET), r"input 1: dtype f32, expected i64"),
    "whole position as float": ((X, torch.tensor([1.0]), OFFSET), r"input 1: dtype f32, expected i64"),
    "past the capacity": ((X, torch.tensor([CAPACITY - 2]), OFFSET), r"6.* outside \[0, 5\]"),
    "far past the capacity": ((X, torch.tensor([2**40]), OFFSET), r"1099511627776"),
    "no position": ((X, torch.zeros(0, dtype=torch.int64), OFFSET), r"input 1: size 0 at axis 0.* exactly 1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input(name: str, method: Method) -> None:
    module = build()
    assert_same(method, module, 3, 0)
    before = device("full").counters.copy()
    given, message = WRONG[name]
    with pytest.raises(InputError, match=message):
        method.execute(given)
    since = device("full").counters.since(before)
    assert (since.submits, since.dispatches, since.writes) == (0, 0, 0)
    assert_same(method, module, 3, 3)  # reads the rows of the first call
    assert_same(method, module, 2, 6)


def test_wrong_input_as_the_first_call(method: Method) -> None:
    for given, message in WRONG.values():
        with pytest.raises(InputError, match=message):
            method.execute(given)
    assert_same(method, build(), 4, 0)


# -- devices


def test_no_such_adapter() -> None:
    with pytest.raises(DeviceError, match=r"no adapter's name contains 'no such adapter'; found: \['"):
        Device.create(adapter="no such adapter")


def test_no_such_adapter_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(device_module.ADAPTER_VARIABLE, "nor this one")
    with pytest.raises(DeviceError, match="'nor this one'"):
        Device.create()


def test_no_adapter_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_module.wgpu.gpu, "enumerate_adapters_sync", list)
    monkeypatch.setattr(Device, "_default", None)
    with pytest.raises(DeviceError, match=r"no WebGPU adapter.*Vulkan driver"):
        device_module.choose_adapter()
    program = Runtime().load_program(pte())  # reading needs no device
    assert program.metadata("forward").num_inputs() == 3
    with pytest.raises(DeviceError, match=r"no WebGPU adapter.*mesa-vulkan-drivers"):
        program.load_method("forward")


def test_model_too_large_for_the_device() -> None:
    on = device("default-limits")
    content = bytes(lower(build(600_000, 4, 16), WebGPUPartitioner()).buffer)
    before, used = on.counters.copy(), on.memory.total
    program = Runtime(on).load_program(content)
    wanted = r"mutable [kv]_cache f32\[1, 600000, 4, 16\] needs 153,600,000 bytes.* at most 134,217,728"
    with pytest.raises(DeviceError, match=wanted):
        program.load_method("forward")
    assert on.memory.total == used
    assert on.counters.since(before).submits == 0
    with Runtime(on).load_program(pte()) as small:
        assert_same(small.load_method("forward"), build(), 3, 0)


# -- unused rows


@pytest.mark.parametrize("lengths", [(3, 1, 1, 3), (1,) * CAPACITY, (5, 3)])
def test_nan_in_unused_cache_rows_reaches_no_output(lengths: tuple[int, ...], method: Method) -> None:
    buffers = method.state.buffers()
    assert set(buffers) == {"k_cache", "v_cache"}
    for buffer in buffers.values():
        method.device.write(buffer, np.full(buffer.size // 4, np.nan, np.float32))
    module, position = build(), 0
    for length in lengths:
        assert_same(method, module, length, position)
        position += length
    assert position == CAPACITY
