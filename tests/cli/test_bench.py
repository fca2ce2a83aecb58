"""`executorch-webgpu bench`: what it measures and prints, its JSON and trace, and errors."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from executorch_webgpu.backend.graph import Graph, Node, Ref, Sym, Value
from executorch_webgpu.cli import decoders
from executorch_webgpu.cli.bench import Spread, Work
from executorch_webgpu.cli.chrome_trace import events
from executorch_webgpu.cli.commands import cli
from executorch_webgpu.cli.costs import Cost, by_kernel, node_cost
from executorch_webgpu.cli.progress import loading
from executorch_webgpu.ops.base import Limits
from executorch_webgpu.runtime import Runtime
from executorch_webgpu.runtime.errors import InputError
from executorch_webgpu.runtime.gpu import device as runtime_device
from executorch_webgpu.runtime.methods.delegate import KernelTime
from tests import tiny_decoder
from tests.harness import device
from tests.tiny_decoder import CAPACITY, LONGEST, VOCAB

QUICK = ("--warm-up", "0", "--repetitions", "2")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A program whose weights are nowhere."""
    path = tmp_path_factory.mktemp("bench") / "model.pte"
    path.write_bytes(tiny_decoder.build("llama", external=True).pte)
    return str(path)


def bench(*args: str) -> Result:
    return CliRunner().invoke(cli, ["bench", *args])


def measured(*args: str) -> dict[str, Any]:
    result = bench(*args, *QUICK, "--json", "-")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert isinstance(found, dict)
    return found


# -- measurements


def test_everything_is_printed_and_written(model: str, tmp_path: Path) -> None:
    record, trace = tmp_path / "record.json", tmp_path / "trace.json"
    files = ("--json", str(record), "--trace", str(trace))
    result = bench(model, "--random-weights", "--prefill", "20", "--decode", "6", "--depth", "11", *QUICK, *files)
    assert result.exit_code == 0, result.output
    on = runtime_device.Device.default()
    for text in (
        f"{model} on {on.name}", "of its weights random", "tokens chosen on the GPU, up to ", "Median of 2 runs",
        "prefill, 20 tokens", "decode, 6 steps at 11 rows", "A call of the prefill", "One step", "GFLOP/s", "100.0%",
    ):  # fmt: skip
        assert text in result.stdout
    found = json.loads(record.read_text())
    assert (
        found["settings"] | {"batch": 1, "prefill": 20, "decode": 6, "depth": 11, "repetitions": 2} == found["settings"]
    )
    assert found["settings"]["random_weights"] > 4
    assert found["decoder"] | {"vocabulary": VOCAB, "capacity": CAPACITY, "chunk": LONGEST} == found["decoder"]
    assert found["decoder"]["one_step_at_a_time"] is None
    assert found["memory"]["weights"] > VOCAB * 32 * 4
    assert (found["prefill"]["tokens"], found["prefill"]["calls"]) == (20, 3)
    assert (found["decode"]["tokens"], found["decode"]["calls"]) == (6, 6)
    for name in ("prefill", "decode"):
        phase = found[name]
        rates, times, tokens = phase["tokens_per_second"], phase["seconds"], phase["tokens"]
        assert 0 < rates["p10"] <= rates["median"] <= rates["p90"]
        assert tokens / times["p90"] * 0.99 <= rates["median"] <= tokens / times["p10"] * 1.01
        assert sum(kernel["share"] for kernel in phase["kernels"]) == pytest.approx(1)
        assert sum(kernel["nanoseconds"] for kernel in phase["kernels"]) == pytest.approx(1000 * phase["step_us"])
    linear = [k for k in found["decode"]["kernels"] if k["flops"] and not k["kernel"].startswith("attention")]
    # q [32, 32], k and v [16, 32], out [260, 32]: what one token takes
    assert sum(kernel["flops"] for kernel in linear) == 2 * 32 * (32 + 16 + 16 + VOCAB)
    assert all(k["gflop_per_second"] == pytest.approx(k["flops"] / k["nanoseconds"]) for k in linear)
    content = json.loads(trace.read_text())
    threads = {e["args"]["name"]: e["tid"] for e in content["traceEvents"] if e["name"] == "thread_name"}
    assert set(threads) == {"prefill", "step"}
    for name, tid in ((phase, threads[thread]) for phase, thread in (("prefill", "prefill"), ("decode", "step"))):
        spans = [e for e in content["traceEvents"] if e["ph"] == "X" and e["tid"] == tid]
        assert len(spans) == sum(kernel["count"] for kernel in found[name]["kernels"])
        assert sum(e["dur"] for e in spans) == pytest.approx(found[name]["step_us"])
        assert spans[0]["ts"] == 0
        begins = [e["ts"] for e in spans]
        assert begins == sorted(begins)
        assert all(e["args"]["node"] and e["cat"] == "kernel" for e in spans)


def test_defaults_are_what_fits(model: str) -> None:
    found = measured(model, "--random-weights")
    settings = {key: found["settings"][key] for key in ("prefill", "decode", "depth")}
    assert settings == {"prefill": CAPACITY, "decode": CAPACITY, "depth": 0}


@pytest.mark.parametrize("option", ["--prefill", "--decode"])
def test_one_of_the_two_alone(model: str, option: str) -> None:
    found = measured(model, "--random-weights", option, "0")
    assert (found["prefill"] is None, found["decode"] is None) == (option == "--prefill", option == "--decode")


def test_real_weights(tmp_path: Path) -> None:
    tiny = tiny_decoder.build("llama", external=True)
    (tmp_path / "model.pte").write_bytes(tiny.pte)
    (tmp_path / "weights.ptd").write_bytes(tiny.data)
    data = ("--data", str(tmp_path / "weights.ptd"))
    found = measured(str(tmp_path / "model.pte"), *data, "--decode", "3", "--prefill", "3", "--random-weights")
    assert found["settings"]["random_weights"] == 0


def test_a_program_for_one_token_a_call(tmp_path: Path) -> None:
    path = tmp_path / "static.pte"
    path.write_bytes(tiny_decoder.build("static").pte)
    found = measured(str(path), "--prefill", "5", "--decode", "4", "--depth", "3", "--batch", "1")
    assert (found["prefill"]["calls"], found["decode"]["calls"]) == (5, 4)


@pytest.mark.parametrize("convention", ["ragged", "ragged_all"])
def test_a_batch(tmp_path: Path, convention: str) -> None:
    path = tmp_path / "ragged.pte"
    path.write_bytes(tiny_decoder.build(convention).pte)
    rows = str(tiny_decoder.BATCH)
    found = measured(str(path), "--prefill", "12", "--decode", "5", "--depth", "3", "--batch", rows)
    assert found["settings"]["batch"] == tiny_decoder.BATCH
    assert found["decoder"]["one_step_at_a_time"] is None
    assert (found["prefill"]["tokens"], found["prefill"]["calls"]) == (12 * tiny_decoder.BATCH, 2)
    assert found["decode"]["tokens"] == 5 * tiny_decoder.BATCH
    result = bench(str(path), "--batch", "3", *QUICK)
    assert f"takes {rows} sequences a call, not 3" in result.stderr


def test_a_batch_is_decoded_as_sequences_are() -> None:
    with Runtime(device("full")).load_program(tiny_decoder.build("ragged").pte) as program:
        made = decoders.find_decoder(program.load_method(), program.constants, None)
        assert made.prefill(9).tolist() == [tiny_decoder.greedy([decoders.TOKEN] * 9, 1)] * tiny_decoder.BATCH
        assert made.decode(0, 7) == 7 * tiny_decoder.BATCH
        made.run(np.full((made.batch, 2), decoders.TOKEN), 0)
        token = made.run(np.full((made.batch, 1), decoders.TOKEN), 2)
        assert token.tolist() == [tiny_decoder.greedy([decoders.TOKEN] * 3, 1)] * tiny_decoder.BATCH


def test_without_timestamps(model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(runtime_device.Device, "_default", runtime_device.Device.create(features=()))
    monkeypatch.setattr("executorch_webgpu.runtime.Runtime._instance", None)
    args = (model, "--random-weights", "--prefill", "4", "--decode", "3", *QUICK)
    result = bench(*args)
    assert result.exit_code == 0, result.output
    assert "no kernel times: " in result.stdout
    assert "One step" not in result.stdout
    result = bench(*args, "--trace", str(tmp_path / "trace.json"))
    assert result.exit_code == 1
    assert "Error: no trace: " in result.stderr
    assert not (tmp_path / "trace.json").exists()


def test_one_step_at_a_time(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """State that cannot go back is computed from its beginning for each run, and the host chooses the tokens."""
    monkeypatch.setattr("executorch_webgpu.runtime.decoding.decoder._by_position", lambda method, capacity: False)
    ran: list[tuple[int, int]] = []
    run = decoders.Decoder.run
    monkeypatch.setattr(
        decoders.Decoder, "run", lambda d, tokens, at: (ran.append((at, tokens.shape[1])), run(d, tokens, at))[1]
    )
    found = measured(model, "--random-weights", "--prefill", "0", "--decode", "3", "--depth", "10")
    assert "cannot go back" in found["decoder"]["one_step_at_a_time"]
    assert ran[:5] == [(0, LONGEST), (LONGEST, 2), (10, 1), (11, 1), (12, 1)]
    assert ran == ran[:5] * 3 + [(0, LONGEST), (LONGEST, 3)]  # the profiled step is that in the middle
    assert found["decode"]["tokens"] == 3


def test_steps_on_the_gpu_and_on_the_host_choose_the_same(model: str) -> None:
    """What `decode` times is real decoding: its last token is the one that single steps give."""
    tiny = tiny_decoder.build("llama")
    with Runtime(device("full")).load_program(tiny.pte) as program:
        made = decoders.find_decoder(program.load_method(), program.constants, None)
        assert made.fallback is None
        following = made.prefill(3)
        assert following.tolist() == [tiny_decoder.greedy([decoders.TOKEN] * 3, 1)]
        assert made.decode(0, 7) == 7
        token = np.full((1, 1), decoders.TOKEN)
        for position in range(3):
            token = made.run(token, position)
        assert token.tolist() == [tiny_decoder.greedy([decoders.TOKEN], 3)[-1:]]


# -- errors


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "; pass the .ptd written by the same export"),
        (("--random-weights", "--prefill", "25"), "Error: --prefill 25: the program's capacity is 24 tokens"),
        (("--random-weights", "--depth", "20", "--decode", "5"), "--decode 5 at --depth 20: the program's capacity"),
        (("--random-weights", "--batch", "2"), "method forward takes 1 sequence a call, not 2: the batch is chosen"),
        (("--random-weights", "--method", "encode"), "no method 'encode'"),
        (("--random-weights", "--adapter", "no such card"), "no adapter's name contains 'no such card'"),
        (("--random-weights", "--compare", "vllm"), "no peer is called 'vllm'; there are llama-bench, onnx"),
        (("--random-weights", "--compare", "llama-bench"), "--compare llama-bench needs --gguf FILE"),
        (("--random-weights", "--json", "/no/such/folder/x.json"), "/no/such/folder/x.json cannot be written"),
        (("--random-weights", "--trace", "/"), "/ cannot be written: it is a folder"),
        (("--random-weights", "--prefill", "0", "--decode", "0"), "both 0: there is nothing to measure"),
        (("--random-weights", "--compare", "onnxruntime-genai"), "name the folder with the model's genai_config.json"),
    ],
)  # fmt: skip
def test_errors_are_one_line(model: str, args: tuple[str, ...], message: str) -> None:
    small = () if "--decode" in args or "--prefill" in args else ("--prefill", "1", "--decode", "1")
    result = bench(model, *args, *small, *QUICK)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def fake_decoder(capacity: int) -> Any:
    return types.SimpleNamespace(capacity=capacity)


@pytest.mark.parametrize(
    ("capacity", "given", "expected"),
    [
        (10_240, (None, None, None), (512, 128, 512)),
        (600, (None, None, None), (512, 128, 472)),
        (100, (None, None, None), (100, 100, 0)),
        (600, (None, None, 590), (512, 10, 590)),
        (600, (None, 500, None), (512, 500, 100)),
        (600, (600, 1, 599), (600, 1, 599)),
    ],
)
def test_work_fits_the_capacity(capacity: int, given: tuple[Any, ...], expected: tuple[int, ...]) -> None:
    work = Work.fit(fake_decoder(capacity), *given)
    assert (work.prefill, work.decode, work.depth) == expected


@pytest.mark.parametrize("given", [(601, 1, 1), (1, 1, 600), (1, 601, 0)])
def test_work_that_does_not_fit(given: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="the program's capacity is 600 tokens"):
        Work.fit(fake_decoder(600), *given)


def test_spread() -> None:
    assert Spread.of([float(x) for x in range(101)]) == Spread(50, 10, 90)


# -- costs and trace


def graph_of(op: str, args: dict[str, Any], shapes: list[tuple[str, str, tuple[Any, ...]]]) -> tuple[Graph, Node]:
    """A graph of one node; the last shape is its result's."""
    values = tuple(Value(kind, dtype, shape, f"v{i}") for i, (kind, dtype, shape) in enumerate(shapes))
    node = Node(op, args, (len(values) - 1,), "node")
    return Graph(values, (node,), (0,), (Ref(len(values) - 1),)), node


ROWS = Sym("input_dim", (0, 1))


@pytest.mark.parametrize("f16", [False, True])
def test_cost_of_a_product(f16: bool) -> None:
    shapes = [("input", "f32", (1, ROWS, 64)), ("constant", "f16", (100, 64)), ("temp", "f32", (1, ROWS, 100))]
    graph, node = graph_of("aten.linear.default", {"input": Ref(0), "weight": Ref(1), "bias": None}, shapes)
    cost = node_cost(graph, node, Limits(f16=f16), {ROWS: 7}.__getitem__, 0)
    assert cost == Cost(4 * 7 * 64 + (2 if f16 else 4) * 6400 + 4 * 700, 2 * 7 * 64 * 100)


def test_cost_of_a_gated_projection() -> None:
    shapes = [("input", "f32", (7, 64)), *[("constant", "f32", (100, 64))] * 2, ("temp", "f32", (7, 100))]
    args = {"input": Ref(0), "weights": (Ref(1), Ref(2)), "gated": True}
    graph, node = graph_of("webgpu.project", args, shapes)
    assert node_cost(graph, node, Limits(), {}.__getitem__, 0).flops == 2 * 2 * 7 * 64 * 100


@pytest.mark.parametrize(("layout", "shape"), [("bshd", (1, ROWS, 8, 16)), ("bhsd", (1, 8, ROWS, 16))])
def test_cost_of_attention_is_that_of_the_rows_in_use(layout: str, shape: tuple[Any, ...]) -> None:
    cache = ("mutable", "f32", (1, 100, 2, 16))
    shapes = [("input", "f32", shape), cache, cache, ("temp", "f32", shape)]
    args = {"query": Ref(0), "key": Ref(1), "value": Ref(2), "q_layout": layout}
    graph, node = graph_of("webgpu.attention", args, shapes)
    cost = node_cost(graph, node, Limits(), {ROWS: 3}.__getitem__, 53)
    pairs = 51 + 52 + 53
    assert cost == Cost(2 * 4 * 3 * 8 * 16 + 2 * 4 * 53 * 2 * 16, 4 * 8 * 16 * pairs)


def test_cost_of_a_lookup_is_not_that_of_the_table() -> None:
    shapes = [("input", "i64", (1, 5)), ("constant", "f32", (1000, 64)), ("temp", "f32", (1, 5, 64))]
    graph, node = graph_of("aten.embedding.default", {"weight": Ref(1), "indices": Ref(0)}, shapes)
    assert node_cost(graph, node, Limits(), {}.__getitem__, 0) == Cost(2 * 4 * 5 * 64)


def test_costs_go_to_the_longest_dispatch_of_a_node() -> None:
    times = [
        KernelTime(n, k, t) for n, k, t in (("a", "mul", 5), ("b", "split", 4), ("b", "join", 9), ("c", "mul", 10))
    ]
    found = by_kernel(times, [(Cost(50, 100), 1), (Cost(90), 2), (Cost(1), 0), (Cost(10), 1)])
    assert [(k.kernel, k.count, k.nanoseconds, k.bytes, k.flops) for k in found] == [
        ("mul", 2, 15, 60, 100), ("join", 1, 9, 90, None), ("split", 1, 4, None, None)
    ]  # fmt: skip
    assert [k.gb_per_second for k in found] == [4, 10, None]
    assert [k.gflop_per_second for k in found] == [100 / 15, None, None]
    assert [k.bytes for k in by_kernel(times)] == [None] * 3


def test_trace_events() -> None:
    found = events({"step": [KernelTime("n", "k", 1500, 0), KernelTime("m", "l", 500, 2500)]})
    assert [e["ph"] for e in found] == ["M", "M", "X", "X"]
    assert found[3] == {
        "name": "l", "cat": "kernel", "ph": "X", "ts": 2.5, "dur": 0.5, "pid": 1, "tid": 1, "args": {"node": "m"}
    }  # fmt: skip


def test_a_bar_shows_on_a_terminal_only() -> None:
    with loading(Console(force_terminal=False)) as callback:
        assert callback is None
    out = Console(force_terminal=True, record=True, width=100)
    with loading(out) as callback:
        assert callback is not None
        callback(3 << 20, 12 << 20)
        callback(12 << 20, 12 << 20)
    text = out.export_text()
    assert "loading weights" in text
    assert "12.0/12.0 MiB" in text
