"""Uploads of stored tensors: conversions piece by piece, bounded staging memory, progress, and failures half-way."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from executorch_webgpu.backend.graph import ITEM_SIZE, Graph, Value
from executorch_webgpu.runtime import Runtime
from executorch_webgpu.runtime.errors import DeviceError, InputError, MissingDataError
from executorch_webgpu.runtime.gpu import upload
from executorch_webgpu.runtime.gpu.buffers import State, Weights, storage_size
from executorch_webgpu.runtime.gpu.device import Device
from executorch_webgpu.runtime.gpu.host import NUMPY, bf16_to_f32
from executorch_webgpu.runtime.gpu.random_weights import RandomFill, RandomWeights
from executorch_webgpu.runtime.gpu.upload import Upload
from executorch_webgpu.runtime.methods.delegate import Delegate
from tests import tiny_decoder
from tests.harness import DEVICES, GraphBuilder, device

STORED = {"f32": np.float32, "f16": np.float16, "i32": np.int32, "u32": np.uint32}


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 4 KiB and staging from 256 bytes on, so that small tensors take every path."""
    for name, size in {"PIECE": 4096, "SMALL": 256, "WINDOW": 1024}.items():
        monkeypatch.setattr(upload, name, size)


def numbers(dtype: str, count: int) -> np.ndarray[Any, Any]:
    """All kinds of values, as the file has them."""
    raw = np.random.default_rng(count).integers(0, 256, count * ITEM_SIZE[dtype], dtype=np.uint8)
    found = raw.view(NUMPY[dtype])
    if dtype == "bool":
        return np.asarray(raw % 2).view(bool)
    if dtype == "i64":
        return np.asarray(found % 1000 - 500)
    return np.asarray(np.nan_to_num(found, nan=1.5, posinf=2.0, neginf=-2.0) if dtype in ("f32", "f16") else found)


def read(on: Device, buffer: Any, dtype: str, count: int) -> np.ndarray[Any, Any]:
    kind = STORED[on.limits.wgsl_type(dtype)]
    return np.frombuffer(on.gpu.queue.read_buffer(buffer), kind)[:count]


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("count", [1, 3, 64, 1023, 1024, 1025, 10_001])
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "i64", "i8", "bool"])
@pytest.mark.usefixtures("small_pieces")
def test_every_type_arrives_whole(name: str, dtype: str, count: int) -> None:
    on, data = device(name), numbers(dtype, count)
    value = Value("constant", dtype, (count,), "w", "w")
    buffer = on.buffer(storage_size(on, dtype, count), "other", "w")
    before = on.counters.copy()
    with Upload(on) as run:
        run.tensor(buffer, value, data.tobytes())
    written = on.counters.since(before).bytes_written
    assert written == -(-count * STORED[on.limits.wgsl_type(dtype)]().itemsize // 4) * 4
    wanted = bf16_to_f32(data) if dtype == "bf16" else data
    np.testing.assert_array_equal(read(on, buffer, dtype, count), wanted)
    assert on.memory.by_purpose.get("upload", 0) == 0
    on.release(buffer, "other")


@pytest.mark.usefixtures("small_pieces")
def test_tensors_of_a_mapped_file_at_odd_places(tmp_path: Path) -> None:
    on, path = device("full"), tmp_path / "data"
    content = np.random.default_rng(0).integers(0, 1 << 14, 40_000, dtype=np.uint16)
    path.write_bytes(b"x" + content.tobytes())
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        view = memoryview(mapped)
        values = [Value("constant", "f16", (n,), f"w{n}", "w") for n in (5, 30_000, 9_995)]
        buffers, begin = [], 1
        with Upload(on) as run:
            for value in values:
                count = int(str(value.shape[0]))
                buffers.append(on.buffer(storage_size(on, "f16", count), "other", "w"))
                run.tensor(buffers[-1], value, view[begin : begin + 2 * count])
                begin += 2 * count
        for _ in range(2):  # pages that were given back are there again when they are read
            found = np.concatenate(
                [read(on, b, "f16", int(str(v.shape[0]))) for b, v in zip(buffers, values, strict=True)]
            )
            np.testing.assert_array_equal(found, content.view(np.float16))
            assert bytes(view[1:]) == content.tobytes()
        view.release()
    for buffer in buffers:
        on.release(buffer, "other")


def test_staging_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """However much is uploaded: SLOTS pieces of staging, and at most WINDOW and a tensor of queued writes."""
    on = device("full")
    monkeypatch.setattr(upload, "PIECE", 1 << 16)
    monkeypatch.setattr(upload, "SMALL", 1 << 12)
    monkeypatch.setattr(upload, "WINDOW", 1 << 14)
    flushed: list[int] = []
    inner = Upload._flush
    monkeypatch.setattr(Upload, "_flush", lambda run: (flushed.append(run._gathered), inner(run))[1])
    large, small = (Value("constant", "f32", (n,), "w", "w") for n in (1 << 20, 1 << 10))
    target = on.buffer(4 << 20, "other", "w")
    on.memory.peak, before = on.memory.total, on.memory.total
    with Upload(on) as run:
        run.tensor(target, large, bytes(4 << 20))
        for _ in range(16):
            run.tensor(target, small, bytes(4 << 10))
    assert on.memory.peak - before == upload.SLOTS << 16
    assert flushed == [1 << 14] * 4 + [0]
    on.release(target, "other")


def test_progress_counts_bytes_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "PIECE", 4096)
    seen: list[tuple[int, int]] = []
    weights = Weights(device("full"))
    weights.progress = lambda done, total: seen.append((done, total))
    values = [Value("constant", "bf16", (3000,), "a", "a"), Value("constant", "f32", (10,), "b", "b")]
    weights.load(values, {"a": bytes(6000), "b": bytes(40)}.__getitem__)
    assert seen == [(2048, 6040), (4096, 6040), (6000, 6040), (6040, 6040)]
    weights.close()


# -- failures half-way


@pytest.fixture(scope="module")
def tiny() -> tiny_decoder.Tiny:
    return tiny_decoder.build("llama", external=True)


class Failing(Exception):
    """What a test makes go wrong."""


def fail_at(monkeypatch: pytest.MonkeyPatch, number: int, error: Exception) -> None:
    """Let the creation of the `number`th buffer fail."""
    made, count = Device.buffer, iter(range(1_000_000))

    def buffer(self: Device, *args: Any, **kwargs: Any) -> Any:
        if next(count) == number:
            raise error
        return made(self, *args, **kwargs)

    monkeypatch.setattr(Device, "buffer", buffer)


@pytest.mark.parametrize("number", [0, 1, 5, 6, 7])
def test_too_little_gpu_memory_frees_everything(
    monkeypatch: pytest.MonkeyPatch, tiny: tiny_decoder.Tiny, number: int
) -> None:
    """Weights are buffers 0 to 5, the caches 6 and 7."""
    on = device("full")
    before = dict(on.memory.by_purpose)
    with Runtime(on).load_program(tiny.pte, tiny.data) as program:
        with monkeypatch.context() as patched:
            fail_at(patched, number, DeviceError("no GPU buffer"))
            with pytest.raises(DeviceError, match="no GPU buffer"):
                program.load_method()
        assert {k: v for k, v in on.memory.by_purpose.items() if v} == {k: v for k, v in before.items() if v}
        program.load_method()  # and it can be loaded when there is memory


def graph_of(*names: str) -> tuple[GraphBuilder, Graph]:
    b = GraphBuilder()
    x = b.input("f32", (4,))
    for name in names:
        weight = b.stored("constant", "f32", np.full(4, len(name), np.float32), name)
        x = b.node("aten.mul.Tensor", {"self": x, "other": weight}, ("f32", (4,)))
    return b, b.graph(x)


@pytest.mark.parametrize("size", [0, 12, 20])
def test_data_of_a_wrong_size_is_found_before_anything_is_uploaded(size: int) -> None:
    on = device("full")
    b, graph = graph_of("a", "bb", "ccc")
    b.data["ccc"] = bytes(size)
    before, total = on.counters.copy(), on.memory.total
    with pytest.raises(MissingDataError, match=rf"ccc: 16 bytes expected for f32\[4\], the data has {size}; are"):
        b.load(graph, on)
    assert (on.counters.since(before).buffers, on.memory.total) == (0, total)


def test_missing_external_data_is_found_before_anything_is_uploaded(tiny: tiny_decoder.Tiny) -> None:
    on = device("full")
    before, total = on.counters.copy(), on.memory.total
    with (
        Runtime(on).load_program(tiny.pte) as program,
        pytest.raises(MissingDataError, match=r"pass the \.ptd written by the same export"),
    ):
        program.load_method()
    assert (on.counters.since(before).buffers, on.memory.total) == (0, total)


def test_a_second_delegate_that_fails_leaves_the_first_one_its_weights() -> None:
    """Data that break while they are read: what the failing load had uploaded is freed, nothing else."""
    on = device("full")
    weights = Weights(on)
    b, graph = graph_of("a", "bb")
    first = Delegate(graph, on, b.data.__getitem__, weights, State(on))
    total = on.memory.by_purpose["weights"]
    b, graph = graph_of("a", "ccc", "dddd")
    reads = {"dddd": 0}

    def source(key: str) -> bytes:
        if key == "dddd":
            reads[key] += 1
            if reads[key] > 1:  # the first look is at its size
                raise Failing
        return b.data[key]

    with pytest.raises(Failing):
        Delegate(graph, on, source, weights, State(on))
    assert on.memory.by_purpose["weights"] == total
    [(_, y)] = first.execute([("f32", np.ones(4, np.float32))])
    np.testing.assert_array_equal(y, np.full(4, 2.0))
    second = Delegate(graph, on, b.data.__getitem__, weights, State(on))
    [(_, y)] = second.execute([("f32", np.ones(4, np.float32))])
    np.testing.assert_array_equal(y, np.full(4, 12.0))
    weights.close()


def test_integers_that_do_not_fit_free_what_came_before() -> None:
    on, weights = device("full"), Weights(device("full"))
    before = on.memory.total
    values = [Value("constant", "f32", (4,), "a", "a"), Value("constant", "i64", (2,), "b", "b")]
    data = {"a": bytes(16), "b": np.array([1, 2**40]).tobytes()}
    with pytest.raises(InputError, match="b: values from 1 to 1099511627776 do not fit"):
        weights.load(values, data.__getitem__)
    assert on.memory.total == before


def test_two_methods_share_one_copy(tiny: tiny_decoder.Tiny) -> None:
    """Equal content is one buffer, whatever it is called."""
    on = device("full")
    weights = Weights(on)
    b, graph = graph_of("a", "bb")
    first = Delegate(graph, on, b.data.__getitem__, weights, State(on))
    made = on.counters.copy()
    second = Delegate(graph, on, b.data.__getitem__, weights, State(on))
    assert (on.counters.since(made).buffers, on.counters.since(made).bytes_written) == (0, 0)
    assert first.planner.fixed(1) is second.planner.fixed(1)
    weights.close()
    with Runtime(on).load_program(tiny.pte, tiny.data) as program:
        program.load_method()
        used = on.memory.by_purpose["weights"]
        program.load_method()
        assert on.memory.by_purpose["weights"] == used


# -- random weights


def test_random_weights_stand_in_for_missing_data(tiny: tiny_decoder.Tiny) -> None:
    on = device("full")
    with Runtime(on).load_program(tiny.pte, random_weights=True) as program:
        method = program.load_method()
        assert isinstance(program._weights, RandomWeights)
        assert program._weights.made == len(program._weights.known()) > 4
        [logits] = method.execute([np.array([[1, 2, 3]]), np.array([0])])
        assert np.isfinite(logits).all()
        assert logits.std() > 0
        [again] = method.execute([np.array([[1, 2, 3]]), np.array([0])])
        np.testing.assert_array_equal(logits, again)


def test_data_that_are_there_are_used() -> None:
    on = device("full")
    b, graph = graph_of("a", "bb")
    del b.data["bb"]

    def source(key: str) -> bytes:
        if key not in b.data:
            raise MissingDataError(key)
        return b.data[key]

    weights = RandomWeights(on, lambda value: (3.0, 4.0))
    [(_, y)] = Delegate(graph, on, source, weights, State(on)).execute([("f32", np.ones(4, np.float32))])
    assert weights.made == 1
    assert ((y >= 3) & (y < 4)).all()
    b.data["a"] = bytes(12)
    with pytest.raises(MissingDataError, match="16 bytes expected"):
        Delegate(graph, on, source, RandomWeights(on), State(on))
    weights.close()


def filled(dtype: str, shape: tuple[int, ...]) -> Iterator[np.ndarray[Any, Any]]:
    on = device("full")
    for seed in range(2):
        weights, count = RandomWeights(on), int(np.prod(shape))
        weights.made = seed

        def source(key: str) -> bytes:
            raise MissingDataError(key)

        yield read(on, weights.get(Value("constant", dtype, shape, "w", "w"), source), dtype, count).copy()
        weights.close()


@pytest.mark.parametrize(
    ("dtype", "shape", "low", "high", "mean", "deviation"),
    [
        ("f32", (300, 100), -0.0347, 0.0347, 0, 0.02),
        ("f16", (300, 100), -0.0347, 0.0347, 0, 0.02),
        ("bf16", (30_000,), 0.965, 1.035, 1, 0.02),
        ("i8", (300, 100), -128, 127, -0.5, 73.9),
        ("u8", (300, 100), 0, 255, 127.5, 73.9),
        ("i64", (300, 100), 0, 0, 0, 0),
        ("bool", (300, 100), 0, 0, 0, 0),
    ],
)
def test_random_values_by_dtype(
    dtype: str, shape: tuple[int, ...], low: float, high: float, mean: float, deviation: float
) -> None:
    one, other = (values.astype(np.float64) for values in filled(dtype, shape))
    assert low <= one.min()
    assert one.max() <= high
    assert abs(one.mean() - mean) <= 0.02 * deviation
    assert abs(one.std() - deviation) <= 0.02 * deviation
    if deviation:
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.02


def test_random_words_of_packed_weights() -> None:
    """Random bits, but as scales both halves are small 16-bit floats."""
    on = device("full")
    buffer = on.buffer(1 << 16, "other", "words")
    RandomFill(on)(buffer, "u32", 0, 0, 3)
    raw = np.frombuffer(on.gpu.queue.read_buffer(buffer), np.uint32)
    halves = np.abs(raw.view(np.float16).astype(np.float64))
    assert 1 / 32 <= halves.min() < 0.032
    assert 0.062 < halves.max() < 1 / 16
    free = [bit for bit in range(32) if bit % 16 not in range(10, 15)]
    bits = (raw[:, None] >> np.array(free, np.uint32)) & 1
    assert (abs(bits.mean(0) - 0.5) < 0.02).all()
    assert (abs(np.corrcoef(bits.T) - np.eye(len(free))) < 0.05).all()
    on.release(buffer, "other")
