"""The command line: what it prints, its exit codes and its error messages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from executorch_webgpu.cli import main as entry
from executorch_webgpu.cli.commands import cli
from executorch_webgpu.cli.stats import by_kernel
from executorch_webgpu.runtime.files.ptd import DataFile
from executorch_webgpu.runtime.files.pte import Program
from executorch_webgpu.runtime.gpu import device as runtime_device
from executorch_webgpu.runtime.methods.delegate import KernelTime
from tests import tiny_decoder

PROMPT = "Hi!"
COUNT = 10


@dataclass(frozen=True)
class Files:
    model: str
    external: str
    data: str
    tokenizer: str


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("cli")
    inside, outside = tiny_decoder.build("llama"), tiny_decoder.build("llama", external=True)
    (folder / "model.pte").write_bytes(inside.pte)
    (folder / "external.pte").write_bytes(outside.pte)
    (folder / "weights.ptd").write_bytes(outside.data)
    tokenizer = tiny_decoder.write_tokenizer(folder)
    return Files(*(str(folder / name) for name in ("model.pte", "external.pte", "weights.ptd")), str(tokenizer))


@pytest.fixture(scope="module")
def expected() -> str:
    """The text that greedy decoding gives."""
    data = bytes(i for i in tiny_decoder.greedy(list(PROMPT.encode()), COUNT) if i < 256)
    return data.decode("utf-8", "replace").rstrip("\N{REPLACEMENT CHARACTER}")


def invoke(*args: str, text: str | bytes | None = None) -> Result:
    return CliRunner().invoke(cli, args, input=text)


def run(files: Files, *args: str, **options: Any) -> Result:
    return invoke("run", files.model, "--tokenizer", files.tokenizer, "-n", str(COUNT), *args, **options)


# -- run


@pytest.mark.parametrize("how", ["streamed", "at the end", "from stdin", "with external weights", "on a named adapter"])
def test_run_writes_the_text_to_standard_output(files: Files, expected: str, how: str) -> None:
    if how == "from stdin":
        result = run(files, "--prompt", "-", text=f"{PROMPT}\n")
    elif how == "with external weights":
        options = ("--tokenizer", files.tokenizer, "-p", PROMPT, "-n", str(COUNT), "--data", files.data)
        result = invoke("run", files.external, *options)
    elif how == "on a named adapter":
        result = run(files, "--prompt", PROMPT, "--adapter", runtime_device.choose_adapter().summary[:8].upper())
    else:
        result = run(files, "--prompt", PROMPT, *(["--no-stream"] if how == "at the end" else []))
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{expected}\n"
    assert result.stderr == ""


def test_sampling_options_and_seed(files: Files) -> None:
    options = ("-p", PROMPT, "--temperature", "1.5", "--top-k", "40", "--top-p", "0.9", "--min-p", "0.01")
    texts = [run(files, *options, "--repetition-penalty", "1.1", "--seed", seed).stdout for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


def test_stop_text(files: Files, expected: str) -> None:
    letter = next(c for c in expected if c.isprintable() and c != "\N{REPLACEMENT CHARACTER}")
    result = run(files, "-p", PROMPT, "--stop", letter, "--stats")
    assert result.stdout == expected[: expected.index(letter)] + "\n"
    assert "ended by: a stop string" in result.stderr


def test_statistics_go_to_standard_error(files: Files, expected: str) -> None:
    result = run(files, "-p", PROMPT, "--stats")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{expected}\n"
    for text in (
        f"adapter: {runtime_device.Device.default().name}",
        "prefill: 3 tokens in ",
        f"decode: {COUNT - 1} tokens in ",
        "tokens/s",
        "ended by: --max-new-tokens",
        "weights",
        "76.0 KiB",
        "peak",
        "One decode step",
        "attention_stream" if runtime_device.Device.default().limits.subgroup_size else "attention_decode",
        "100.0%",
    ):
        assert text in result.stderr


def test_statistics_without_timestamps_say_so(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = runtime_device.Device.create(features=())
    monkeypatch.setattr(runtime_device.Device, "_default", plain)
    monkeypatch.setattr("executorch_webgpu.runtime.Runtime._instance", None)
    result = run(files, "-p", PROMPT, "--stats")
    assert result.exit_code == 0, result.output
    assert "no kernel times: " in result.stderr
    assert "has no timestamp queries" in result.stderr


def test_kernel_times_are_added_up() -> None:
    times = [KernelTime("a", "gemv", 5), KernelTime("b", "copy", 20), KernelTime("c", "gemv", 10)]
    assert by_kernel(times) == [("copy", 1, 20), ("gemv", 2, 15)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "missing.pte"}, "Error: missing.pte: No such file or directory"),
        ({"tokenizer": "missing.json"}, "Error: missing.json: No such file or directory"),
        ({"options": ["--top-p", "2"]}, "Error: top_p is 2.0, expected a number in (0, 1] (1: off)"),
        ({"options": ["--method", "encode"]}, "no method 'encode'"),
        ({"options": ["--adapter", "no such card"]}, "Error: no adapter's name contains 'no such card'; found: "),
        ({"prompt": ""}, "Error: the prompt is empty"),
        ({"prompt": "x" * 30}, "Error: appending 30 tokens after 0 would exceed the program's capacity of 24 tokens"),
        ({"external": True}, "; pass the .ptd written by the same export"),
        ({"prompt": "-", "text": b"\xff"}, "Error: the prompt on standard input is not UTF-8"),
    ],
)
def test_errors_are_one_line(files: Files, change: dict[str, Any], message: str) -> None:
    model = files.external if change.get("external") else change.get("model", files.model)
    tokenizer, prompt = change.get("tokenizer", files.tokenizer), change.get("prompt", PROMPT)
    args = ("run", model, "--tokenizer", tokenizer, "-p", prompt, *change.get("options", []))
    result = invoke(*args, text=change.get("text"))
    assert result.exit_code == 1
    assert result.stdout == ""
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("Error: ")


@pytest.mark.parametrize("args", [("--debug", "inspect", "missing.pte"), ("inspect", "missing.pte", "--debug")])
def test_debug_lets_errors_through(args: tuple[str, ...]) -> None:
    result = invoke(*args)
    assert isinstance(result.exception, FileNotFoundError)


# -- devices


def test_devices_lists_adapters_and_marks_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(runtime_device.ADAPTER_VARIABLE, raising=False)
    result = invoke("devices")
    assert result.exit_code == 0
    name = runtime_device.choose_adapter().info["device"].split()[0]
    marked = [line for line in result.stdout.splitlines() if "*" in line and name in line]
    assert len(marked) == 1
    for column in ("name", "type", "backend", "f16", "subgroups", "timestamps", "buffer", "binding"):
        assert column in result.stdout


def test_devices_says_when_the_chosen_one_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(runtime_device.ADAPTER_VARIABLE, "no such card")
    result = invoke("devices")
    assert result.exit_code == 1
    assert "Adapters" in result.stdout
    assert "no adapter's name contains 'no such card'" in result.stderr


def test_devices_without_any_gives_the_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime_device, "adapters", list)
    result = invoke("devices")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "Error: no WebGPU adapter" in result.stderr
    assert "apt-get install mesa-vulkan-drivers" in result.stderr


# -- inspect


def test_inspect_as_json(files: Files) -> None:
    found = json.loads(invoke("inspect", files.model, "--json").stdout)
    assert found["bytes"] == Path(files.model).stat().st_size
    assert found["constant_methods"] == tiny_decoder.CONSTANTS["llama"]
    (method,) = found["methods"]
    assert method["outside"] == {}
    assert method["inputs"] == [
        {"name": "tokens", "dtype": "i64", "sizes": [1, tiny_decoder.LONGEST], "dynamic": True},
        {"name": "input_pos", "dtype": "i64", "sizes": [1], "dynamic": False},
    ]
    assert method["outputs"] == [{"dtype": "f32", "sizes": [1, tiny_decoder.VOCAB], "dynamic": False}]
    (delegate,) = method["delegates"]
    assert delegate["backend"] == "WebGPUBackend"
    assert delegate["symbols"] == [{"symbol": "in0.shape[1]", "low": 1, "high": tiny_decoder.LONGEST}]
    weights = sum(p.numel() for p in tiny_decoder.Llama().parameters()) * 4
    assert delegate["values"]["constant"] == {"count": 6, "views": 0, "bytes": weights}
    assert found["named_data"] == {"count": 6, "data_bytes": weights}
    assert delegate["values"]["mutable"]["bytes"] == 2 * tiny_decoder.CAPACITY * tiny_decoder.HEAD * 4
    assert delegate["values"]["input"]["bytes"] == (tiny_decoder.LONGEST + 1) * 8
    assert delegate["nodes"]["webgpu.project"] == 1  # query, key and value
    assert delegate["nodes"]["aten.linear.default"] == 1
    assert delegate["missing_data"] == []
    assert "graph" not in delegate


def test_inspect_as_text(files: Files) -> None:
    result = invoke("inspect", files.model, "--graph")
    assert result.exit_code == 0, result.output
    for text in (
        "get_max_context_len",
        "[257, 258]",
        "i64[1, <=8]",
        "Delegate 0: WebGPUBackend",
        "in0.shape[1] in [1, 8]",
        "aten.linear.default",
        "Nothing is outside the delegates.",
        "mutable %6 k_cache: f32[1, 24, 1, 16]",
    ):
        assert text in result.stdout


def test_inspect_tells_about_external_weights(files: Files) -> None:
    alone = json.loads(invoke("inspect", files.external, "--json").stdout)
    assert len(alone["methods"][0]["delegates"][0]["missing_data"]) == 6
    assert "6 data keys are in none of these files" in invoke("inspect", files.external).stdout
    both = json.loads(invoke("inspect", files.external, "--data", files.data, "--json").stdout)
    assert both["methods"][0]["delegates"][0]["missing_data"] == []
    assert both["data_files"][0]["count"] == 6


def test_inspect_one_method(files: Files) -> None:
    found = json.loads(invoke("inspect", files.model, "--method", "get_max_seq_len", "--json").stdout)
    assert (found["methods"], found["constant_methods"]) == ([], {"get_max_seq_len": tiny_decoder.CAPACITY})
    result = invoke("inspect", files.model, "--method", "backward")
    assert result.exit_code == 1
    assert "no method 'backward'; the program has forward" in result.stderr


def test_inspect_verifies_weights(files: Files, tmp_path: Path) -> None:
    """One changed bit of a weight, in a program and in a data file: named, and nothing is said without --verify."""
    assert json.loads(invoke("inspect", files.model, "--verify", "--json").stdout)["verified_data"] == 6
    both = ("inspect", files.external, "--data", files.data, "--verify")
    assert "6 weights are as they were exported" in invoke(*both).stdout
    assert "no data named" in invoke("inspect", files.external, "--verify").stderr
    for source, arguments in ((files.model, ()), (files.data, ("inspect", files.external, "--data"))):
        content = bytearray(Path(source).read_bytes())
        with (Program if not arguments else DataFile)(source) as opened:
            data = bytes(opened.named_data(opened.keys()[0]))
        content[content.index(data) + len(data) // 2] ^= 1
        damaged = tmp_path / Path(source).name
        damaged.write_bytes(content)
        command = (*(arguments or ("inspect",)), str(damaged))
        assert invoke(*command).exit_code == 0
        result = invoke(*command, "--verify")
        assert result.exit_code == 1
        assert "1 of 6 weights are damaged" in result.stderr
        assert f" in {damaged}" in " ".join(result.stderr.split())


def test_inspect_refuses_other_files(files: Files, tmp_path: Path) -> None:
    result = invoke("inspect", files.data)
    assert result.exit_code == 1
    assert "this looks like an ExecuTorch data file" in result.stderr
    damaged = tmp_path / "damaged.pte"
    damaged.write_bytes(Path(files.model).read_bytes()[:-5000])
    result = invoke("inspect", str(damaged))
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert invoke("inspect", str(tmp_path)).exit_code == 1  # a folder


def test_inspect_needs_neither_gpu_nor_torch(files: Files) -> None:
    """A real process in which no Vulkan driver is found and torch cannot be imported."""
    code = "import sys; sys.modules['torch'] = None; from executorch_webgpu.cli.main import main; main()"
    hidden = {"VK_ICD_FILENAMES": os.devnull, "VK_DRIVER_FILES": os.devnull}
    done = subprocess.run(
        [sys.executable, "-c", code, "inspect", files.model, "--json"],
        env={**os.environ, **hidden},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["methods"][0]["name"] == "forward"
    assert done.stderr == ""


# -- the command itself


def test_the_installed_command_generates(files: Files, expected: str) -> None:
    command = Path(sys.executable).with_name("executorch-webgpu")
    done = subprocess.run(
        [command, "run", files.model, "--tokenizer", files.tokenizer, "--prompt", "-", "-n", str(COUNT)],
        input=PROMPT,
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, f"{expected}\n"), done.stderr


def test_help_and_version() -> None:
    version = invoke("--version")
    assert version.exit_code == 0
    assert version.stdout.startswith("executorch-webgpu ")
    assert "wgpu 0.32" in version.stdout
    text = invoke("--help").stdout
    for name in ("run", "devices", "inspect"):
        assert f"\n  {name} " in text
        assert invoke(name, "--help").stdout.startswith(f"Usage: cli {name} ")
    assert invoke("run").exit_code == 2


def test_without_click_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delitem(sys.modules, "executorch_webgpu.cli.commands")
    monkeypatch.setitem(sys.modules, "click", None)
    with pytest.raises(SystemExit) as ended:
        entry.main()
    assert ended.value.code == 1
    assert "pip install 'executorch-webgpu[cli]'" in capsys.readouterr().err
