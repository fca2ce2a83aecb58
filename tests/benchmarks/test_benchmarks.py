"""Every benchmark in a tiny configuration: well-formed lines, wrong results found."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import attention, baseline, compare_ort, decode_loop, dispatch, report, timing, verify
from benchmarks.graphs import AttentionShape, DecoderSizes, Loaded, attention_layers, decoder
from benchmarks.kernels import RandomFill
from executorch_webgpu.runtime.errors import DeviceError, UnsupportedError
from executorch_webgpu.runtime.gpu.device import Device
from tests import tiny_decoder
from tests.harness import device

Line = dict[str, Any]


def _words(text: str) -> list[str]:
    return text.split()


COMMON = _words(
    "--samples 3 --warm-up 0.02 --pass-ms 0.1 --baseline-bytes 200000 --matrix-size 16 --rotate-bytes 60000"
)
HEADS = _words("--heads 4 --kv-heads 2 --head-size 16")
DECODER = _words("--layers 2 --dim 32 --heads 4 --kv-heads 2 --head-size 8 --ffn 48 --vocabulary 50 --capacity 32")
SHAPE = AttentionShape(1, 4, 2, 16, 1, 40)


def run(main: Any, arguments: list[str], capsys: pytest.CaptureFixture[str], code: int = 0) -> list[Line]:
    """The lines that a command prints."""
    assert main([*arguments, *COMMON]) == code
    return [check(json.loads(text)) for text in capsys.readouterr().out.splitlines()]


def check(line: Line) -> Line:
    """A line has all fields, and its numbers agree with each other."""
    assert set(report.FIELDS) <= set(line)
    assert 0 < line["p10_us"] <= line["median_us"] <= line["p90_us"] < math.inf
    assert set(line["versions"]) == {"package", "wgpu", "numpy"}
    if line["bytes"] is not None:
        assert line["gb_per_s"] == pytest.approx(line["bytes"] / line["median_us"] / 1e3, rel=1e-3)
        assert line["copy_share"] == pytest.approx(line["gb_per_s"] / line["baseline"]["copy_gb_per_s"], rel=1e-3)
    if line["flops"] is not None:
        best = max(line["baseline"]["fma_tflop_per_s"], line["baseline"]["matmul_tflop_per_s"])
        assert line["tflop_per_s"] == pytest.approx(line["flops"] / line["median_us"] / 1e6, rel=1e-3)
        assert line["matrix_share"] == pytest.approx(line["tflop_per_s"] / best, rel=1e-3)
    return line


# -- timing


def test_the_timed_work_runs_as_often_as_said() -> None:
    on = device("full")
    counter = on.buffer(16, "other", "counter")
    kernel = baseline.LocalKernel(on, "count")
    group = kernel.bind(counter)

    def runs(warm_up: float) -> int:
        on.write(counter, np.zeros(4, np.uint32))
        times = timing.time_passes(on, lambda compute: kernel.encode(compute, group, (1, 1, 1)), 7, 11, warm_up)
        assert (times.samples, times.repetitions) == (11, 7)
        return int(np.frombuffer(on.gpu.queue.read_buffer(counter), np.uint32)[0])

    assert runs(0.0) == 77
    warm = runs(0.01)
    assert warm > 77
    assert warm % 7 == 0
    on.release(counter, "other")


def test_timing_needs_timestamps() -> None:
    bare = Device.create(features=())
    with pytest.raises(DeviceError, match="timestamp"):
        timing.time_passes(bare, lambda compute: None, 1, 1)


@pytest.mark.parametrize(("repetitions", "samples"), [(0, 1), (1, 0), (1, 2049)])
def test_counts_out_of_range(repetitions: int, samples: int) -> None:
    with pytest.raises(ValueError, match="samples"):
        timing.time_passes(device("full"), lambda compute: None, repetitions, samples)


def test_percentiles() -> None:
    times = timing.Times.of(np.arange(101.0), 4)
    assert (times.median, times.p10, times.p90, times.samples, times.repetitions) == (50, 10, 90, 101, 4)
    assert times.divided(2).median == 25


# -- kernels and graphs


@pytest.mark.parametrize(("storage", "kind"), [("f32", np.float32), ("f16", np.float16)])
def test_random_values(storage: str, kind: Any) -> None:
    on = device("full")
    fill, count = RandomFill(on), 65536 * 4 // np.dtype(kind).itemsize
    found = []
    for seed in (1, 2):
        buffer = on.buffer(65536 * 4, "other", "random")
        fill(buffer, storage, -3.0, 5.0, seed)
        found.append(np.frombuffer(on.gpu.queue.read_buffer(buffer), kind).astype(np.float64))
        on.release(buffer, "other")
    for values in found:
        assert values.shape == (count,)
        assert -3 <= values.min() < -2.99
        assert 4.99 < values.max() <= 5
        assert abs(values.mean() - 1) < 0.05
        assert abs(values.std() - 8 / 12**0.5) < 0.05
        assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(*found)[0, 1]) < 0.02


def test_copy_and_read_kernels_touch_everything() -> None:
    on = device("full")
    groups = 3
    source = on.buffer(groups * baseline.READ_BYTES, "other", "source")
    target = on.buffer(groups * baseline.READ_BYTES, "other", "target")
    sums = on.buffer(groups * 4, "other", "sums")
    RandomFill(on)(source, "f32", 0.0, 1.0, 1)
    copy = baseline.LocalKernel(on, "copy", {"GROUPS": 2 * groups})
    read = baseline.LocalKernel(on, "read", {"GROUPS": groups})
    encoder = on.gpu.create_command_encoder()
    compute = encoder.begin_compute_pass()
    copy.encode(compute, copy.bind(source, target), (2 * groups, 1, 1))
    read.encode(compute, read.bind(source, sums), (groups, 1, 1))
    compute.end()
    on.gpu.queue.submit([encoder.finish()])
    given = np.frombuffer(on.gpu.queue.read_buffer(source), np.float32)
    np.testing.assert_array_equal(np.frombuffer(on.gpu.queue.read_buffer(target), np.float32), given)
    # invocation 0 of each workgroup stores what it summed: one vec4 of each stretch of 256
    mine = given.reshape(groups, 8, 256, 4)[:, :, 0].astype(np.float64).sum((1, 2))
    np.testing.assert_allclose(np.frombuffer(on.gpu.queue.read_buffer(sums), np.float32)[:groups], mine, rtol=1e-5)
    for buffer in (source, target, sums):
        on.release(buffer, "other")


@pytest.mark.parametrize("turns", [1, 40])
def test_fma_kernel_makes_as_many_operations_as_are_counted(turns: int) -> None:
    """acc -> acc / 2 + 1 shows how often: the distance from 2 halves every time, four times a turn."""
    on = device("full")
    factors, target = on.buffer(32, "other", "factors"), on.buffer(1024, "other", "sums")
    on.write(factors, np.array([0.5] * 4 + [1.0] * 4, np.float32))
    kernel = baseline.LocalKernel(on, "fma", {"GROUPS": 1, "TURNS": turns})
    encoder = on.gpu.create_command_encoder()
    compute = encoder.begin_compute_pass()
    kernel.encode(compute, kernel.bind(factors, target), (1, 1, 1))
    compute.end()
    on.gpu.queue.submit([encoder.finish()])
    starts = np.arange(256)[:, None] * 0.001 + np.arange(8)[None]
    expected = 4 * (2 + (starts - 2) * 0.5 ** (4 * turns)).sum(1)
    np.testing.assert_allclose(np.frombuffer(on.gpu.queue.read_buffer(target), np.float32), expected, rtol=1e-5)
    assert baseline.FMA_FLOPS == 2 * 4 * 8 * 4
    for buffer in (factors, target):
        on.release(buffer, "other")


def test_sizes_of_an_attention_shape() -> None:
    shape = AttentionShape(2, 4, 2, 16, 3, 5, "f16", 32)
    assert shape.cache_bytes(2) == 2 * 2 * 8 * 2 * 16 * 2
    assert shape.bytes(2) == shape.cache_bytes(2) + 2 * 2 * 3 * 4 * 16 * 4
    assert shape.flops == 4 * 2 * 4 * 16 * (6 + 7 + 8)
    assert shape.cache_shape == (2, 32, 2, 16)
    assert attention.layers_for(shape, 2, 0) == 1
    assert attention.layers_for(shape, 2, 5 * 2 * 2 * 32 * 2 * 16 * 2) == 6
    assert attention.layers_for(shape, 2, 1 << 30) == attention.MAX_LAYERS


def test_the_cache_write_is_part_of_the_layers_where_asked_for() -> None:
    loaded, inputs = attention_layers(device("full"), SHAPE, 2, write=True)
    before = loaded.stored("k1")
    loaded.ready(inputs)
    after, new = loaded.stored("k1"), loaded.stored("new_k")
    loaded.close()
    np.testing.assert_array_equal(after[:, :40], before[:, :40])
    np.testing.assert_array_equal(after[:, 40:], new)
    assert (after[:, 40:] != before[:, 40:]).any()


def test_an_unknown_route_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="route"):
        attention_layers(device("full"), SHAPE, 1, {"route": "nonsense"})


def test_the_random_decoder_decodes() -> None:
    sizes = DecoderSizes(2, 32, 4, 2, 8, 48, 50, "f16", 32)
    loaded = decoder(device("full"), sizes)

    def logits(tokens: list[int], position: int) -> Any:
        inputs = [("i64", np.array([tokens], np.int64)), ("i64", np.array([position], np.int64))]
        return np.asarray(loaded.delegate.execute(inputs)[0][1], np.float64)

    together = logits([3, 1, 4, 1, 5], 0)
    one_by_one = [logits([token], i) for i, token in enumerate([3, 1, 4, 1, 5])]
    loaded.close()
    assert together.shape == (1, 50)
    assert np.isfinite(together).all()
    assert together.std() > 0.1
    np.testing.assert_allclose(one_by_one[-1], together, atol=1e-2)
    assert np.abs(one_by_one[0] - one_by_one[1]).max() > 0.1


# -- verification


def test_a_wrong_result_is_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A reference that sees a key less stands for a kernel that is off by one."""
    right = verify.attend
    monkeypatch.setattr(verify, "attend", lambda q, k, v, past, rows: right(q, k, v, past - 1, rows))
    for check_result in (verify.verify_small, verify.verify_sampled):
        with pytest.raises(verify.WrongResultError, match="reference"):
            check_result(device("full"), SHAPE)
    assert run(attention.main, ["--decode", "--past", "40", "--verify", *HEADS], capsys, 1) == []


def test_a_result_that_is_not_finite_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    run_step = verify.attention_layers

    def corrupted(*args: Any, **kwargs: Any) -> Any:
        loaded, inputs = run_step(*args, **kwargs)
        execute = loaded.delegate.execute

        def spoiled(given: Any) -> Any:
            [(dtype, array)] = execute(given)
            array[..., -1] = np.nan
            return [(dtype, array)]

        monkeypatch.setattr(loaded.delegate, "execute", spoiled)
        return loaded, inputs

    monkeypatch.setattr(verify, "attention_layers", corrupted)
    for check_result in (verify.verify_small, verify.verify_sampled):
        with pytest.raises(verify.WrongResultError, match="reference"):
            check_result(device("full"), SHAPE)


@pytest.mark.parametrize(
    "shape", [SHAPE, AttentionShape(2, 6, 2, 8, 21, 5, "f32", 40), AttentionShape(1, 2, 2, 4, 1, 0)]
)
def test_right_results_pass(shape: AttentionShape) -> None:
    assert verify.verify_small(device("full"), shape) < 1e-5
    assert verify.verify_sampled(device("full"), shape) < 1e-5


# -- the commands


def test_baseline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "folder" / "lines.jsonl"
    lines = run(baseline.main, ["--out", str(out)], capsys)
    assert [line["benchmark"].partition(".")[2] for line in lines] == ["copy", "read", "fma", "matmul", "dispatch"]
    assert [json.loads(text) for text in out.read_text().splitlines()] == lines
    assert lines[0]["copy_share"] == pytest.approx(1, rel=1e-3)
    run(baseline.main, ["--out", str(out)], capsys)
    assert len(out.read_text().splitlines()) == 10


def test_attention_decode_over_routes(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--decode", "--past", "40,70", "--routes", "decode,prefill", "--verify", *HEADS]
    lines = run(attention.main, options, capsys)
    assert [(line["shape"]["past"], line["route"]) for line in lines] == [
        (40, "decode"), (40, "prefill"), (70, "decode"), (70, "prefill")
    ]  # fmt: skip
    assert {line["benchmark"] for line in lines} == {"attention.decode"}
    assert [line["layers"] for line in lines] == [12, 12, 7, 7]  # as many as exceed 60,000 bytes
    assert lines[0]["splits"] >= 1
    assert lines[1]["splits"] is None
    assert lines[0]["kernels"] != lines[1]["kernels"]
    assert all(line["largest_error"] < 1e-5 and line["kernels"] for line in lines)


def test_attention_names_the_routes_where_one_is_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is measured: a typing error must not cost the run of the other routes."""
    with pytest.raises(SystemExit) as ended:
        attention.main([*_words("--decode --past 40 --routes decode,nonsense"), *HEADS, *COMMON])
    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert not printed.out
    assert "nonsense" in printed.err
    assert "stream, decode" in printed.err


def test_attention_leaves_out_what_the_operator_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    options = [*_words("--decode --past 40 --routes decode,flash --variants auto,small"), *HEADS]
    assert attention.main([*options, *COMMON]) == 0
    printed = capsys.readouterr()
    lines = [check(json.loads(text)) for text in printed.out.splitlines()]
    assert [(line["route"], line["variant"]) for line in lines] == [
        ("decode", "auto"), ("flash", "auto"), ("flash", "small")
    ]  # fmt: skip
    assert "route decode, variant small" in printed.err
    assert "only the routes 'flash' and 'stream' have variants" in printed.err


def test_attention_prefill(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--prefill", "--rows", "20", "--past", "9", "--layers", "2", "--dtype", "f32", "--batch", "2", *HEADS]
    [line] = run(attention.main, options, capsys)
    assert (line["benchmark"], line["dtype"], line["layers"]) == ("attention.prefill", "f32", 2)
    assert line["shape"] == {
        "batch": 2, "heads": 4, "kv_heads": 2, "head_size": 16, "rows": 20, "past": 9, "capacity": 29
    }  # fmt: skip


@pytest.mark.parametrize("name", ["quick", "full"])
def test_suites_hold_shapes_that_the_operator_takes(name: str) -> None:
    shapes = attention.suite(name)
    assert len(set(shapes)) == len(shapes)
    assert any(shape.rows == 1 for shape in shapes)
    assert any(shape.rows > 16 for shape in shapes)
    assert all(shape.heads % shape.kv_heads == 0 for shape in shapes)


def test_dispatch(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(dispatch.main, ["--count", "5"], capsys)
    names = [line["benchmark"] for line in lines]
    assert names == [
        "dispatch.gpu.direct", "dispatch.gpu.indirect", "dispatch.gpu.leave",
        "dispatch.host.methods", "dispatch.host.plan", "dispatch.host.step",
    ]  # fmt: skip
    assert set(lines[-1]["step"]) == {"encode_us", "submit_us", "wait_us"}
    assert all(value > 0 for value in lines[-1]["step"].values())


def test_decode_loop(capsys: pytest.CaptureFixture[str]) -> None:
    *modes, prefill = run(decode_loop.main, [*DECODER, "--past", "4", "--steps", "6", "--prefill", "7"], capsys)
    assert [line["benchmark"] for line in modes] == [f"decode_loop.{name}" for name in decode_loop.DEFAULT_MODES]
    for line in modes:
        stamped = line["benchmark"].startswith("decode_loop.resident")
        assert (line["gpu_busy_by_stamps"] is not None) == stamped
        assert not stamped or 0 < line["gpu_busy_by_stamps"] <= 1
        assert line["encoded_by"] == "llvmlite"
        cost = line["host"]
        assert 0 < cost["cost_p10_us"] <= cost["cost_us"] <= cost["cost_p90_us"]
    step = modes[0]
    assert prefill["benchmark"] == "decode_loop.prefill"
    assert all(value > 0 for value in step["host"].values())
    # f16 weights but the embedding, the tables, and 8 of 32 rows of both layers' caches
    layer = 2 * 32 + (32 * 32 + 2 * 16 * 32) + 32 * 32 + 3 * 32 * 48
    assert step["bytes"] == 2 * (2 * layer + 32 + 50 * 32 + 2 * 32 * 4) + 2 * 2 * 8 * 2 * 8 * 2
    assert step["tokens_per_s"] > 0
    assert step["dispatches"] > 10
    assert prefill["shape"]["rows"] == 7


def test_decode_loop_of_a_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "tiny.pte"
    file.write_bytes(tiny_decoder.build("llama").pte)
    options = ["--pte", str(file), "--past", "2", "--steps", "5", "--prefill", "4", "--modes", "single,resident-4"]
    step, resident, prefill = run(decode_loop.main, options, capsys)
    assert resident["tokens_per_s"] > 0
    assert (step["dtype"], step["shape"]["capacity"]) == ("program", tiny_decoder.CAPACITY)
    assert step["bytes"] > 0
    assert step["dispatches"] == prefill["dispatches"] > 5
    assert all(value > 0 for value in step["host"].values())


@pytest.mark.parametrize("kind", ["static", "hugging_face"])
def test_captured_steps_get_token_and_position_in_the_delegates_order(kind: str, tmp_path: Path) -> None:
    """A delegate's inputs stand as its operators first use them."""
    file = tmp_path / "tiny.pte"
    file.write_bytes(tiny_decoder.build(kind).pte)
    model = decode_loop.ProgramDecoder(device("full"), str(file), ())
    seen: list[list[int]] = []
    try:
        whole = model.whole()
        inner = whole.delegate.run

        def run(plan: Any, inputs: Any, *more: Any) -> Any:
            seen.append([int(inputs[place][1].item()) for place in (whole.tokens, whole.positions)])
            return inner(plan, inputs, *more)

        setattr(whole.delegate, "run", run)  # noqa: B010
        for mode in (decode_loop.single_steps, decode_loop.replayed_steps):
            mode(model, 200, 3, 4)
    finally:
        model.close()
    single, replayed = seen[:4], seen[-4:]
    assert [position for _, position in replayed] == [3, 4, 5, 6]
    assert replayed == single


def test_decode_loop_of_a_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, several = tmp_path / "one.pte", tmp_path / "several.pte"
    one.write_bytes(tiny_decoder.build("llama").pte)
    several.write_bytes(tiny_decoder.build("ragged").pte)
    options = ["--pte", str(one), "--past", "2", "--steps", "16", "--modes", "resident-4"]
    options += ["--batched", str(several), "--rows", "1,4"]
    _, *steps, alone, together = run(decode_loop.main, options, capsys)
    assert [line["benchmark"] for line in steps] == ["decode_loop.batch"] * 2
    assert [line["shape"]["rows"] for line in (*steps, alone, together)] == [1, 4, 1, 4]
    for line in (*steps, alone, together):
        assert line["tokens_per_s"] == pytest.approx(line["shape"]["rows"] * line["steps_per_s"], rel=1e-3)
    assert all(0 < line["gpu_busy_by_stamps"] <= 1 for line in steps)
    assert (alone["benchmark"], alone["shape"]["steps"]) == ("decode_loop.texts", 16)
    for wrong, message in [
        ([*options[:-1], "5"], "5 rows of a batch of 4"),
        ([*options, "--past", "20"], "no room for 8 steps at position 20"),
        ([*options, "--steps", "7"], "7 steps of rows that decode 8 steps a submit"),
        (["--pte", str(one), "--batched", str(one)], "none of the program's methods take three inputs"),
        (["--pte", str(one), "--batched", __file__], "wrong file identifier"),
        (["--pte", str(one), "--batched", "none.pte"], "No such file or directory: 'none.pte'"),
        (["--pte", str(several)], "it takes batches of 4 rows"),
        (["--pte", "none.pte"], "No such file or directory: 'none.pte'"),
    ]:
        assert decode_loop.main([*wrong, *COMMON]) == 1
        assert message in capsys.readouterr().err


class _Model:
    """A decoder of which only the parts that a mode uses are there."""

    def __init__(self) -> None:
        self.device = device("full")
        self.seen: list[tuple[list[int], int]] = []

    def delegates(self) -> list[Any]:
        return []

    def run(self, tokens: list[int], position: int) -> Any:
        self.seen.append((tokens, position))
        return np.eye(9)[(tokens[0] * 2) % 9]


def test_single_steps_feed_the_largest_logit_back() -> None:
    model: Any = _Model()
    found = decode_loop.single_steps(model, 1, 5, 4).steps
    assert model.seen == [([1], 5), ([2], 6), ([4], 7), ([8], 8)]
    assert all(0 < step.encode <= step.total and step.submit == step.wait == 0 for step in found)


def test_no_room_for_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    assert decode_loop.main([*DECODER, "--past", "32", *COMMON]) == 1
    assert "no room for a step at position 32" in capsys.readouterr().err


def test_the_comparison_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    assert compare_ort.main(["--decode", *COMMON]) == 1
    assert "pip install onnxruntime-webgpu onnx" in capsys.readouterr().err


def test_the_package_side_of_the_comparison(capsys: pytest.CaptureFixture[str]) -> None:
    options = attention.parser().parse_args(["--decode", *HEADS, *COMMON])
    written = report.Report(device("full"), rates=report.Rates(1.0, 1.0, 1.0, 1.0, 1.0))
    gpu, wall = compare_ort.time_package(written, SHAPE, 2, options)
    line = check(json.loads(capsys.readouterr().out))
    assert line["benchmark"] == "compare_ort.package"
    assert line["kernels"][:2] == ["strided_copy", "strided_copy"]
    assert line["wall_us"] == pytest.approx(wall.median, rel=1e-3)
    assert gpu.median > 0


def test_slope_is_the_time_of_the_layers_between(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that only the work moves: 3 ms a run, 4 ms a layer, 10 ms for waiting."""
    now = [0.0]
    monkeypatch.setattr(compare_ort.time, "perf_counter", lambda: now[0])

    def spend(seconds: float) -> None:
        now[0] += seconds

    def work(layers: int) -> tuple[Any, Any]:
        return (lambda: spend(0.003 + 0.004 * layers)), (lambda: spend(0.01))

    times = compare_ort.slope(work(1), work(3), 2, 3, 0.1)
    assert times.median == pytest.approx(4000)
    assert times.repetitions > 1


def test_loaded_graphs_free_their_memory() -> None:
    on = device("full")
    before = on.memory.total
    loaded, inputs = attention_layers(on, SHAPE, 2)
    assert isinstance(loaded, Loaded)
    loaded.ready(inputs)
    assert on.memory.total > before
    loaded.close()
    assert on.memory.total == before
