"""`executorch-webgpu bench --compare`: stand-ins that take the options and print the records of the real programs."""

from __future__ import annotations

import json
import stat
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from executorch_webgpu.cli import peers
from executorch_webgpu.cli.commands import cli
from tests import tiny_decoder

QUICK = ("--random-weights", "--prefill", "4", "--decode", "3", "--depth", "2", "--warm-up", "0", "--repetitions", "2")
LLAMA = """#!{python}
import json, os, sys
options = sys.argv[1:]
with open({log!r}, "a") as file:
    file.write(json.dumps(options) + "\\n")
if {broken!r} == "abort":
    print("load_backend: loaded Vulkan backend\\nggml_vulkan: no 16-bit storage.\\nerror: no model", file=sys.stderr)
    os.abort()
if {broken!r} == "exit":
    sys.exit("no device")
if {broken!r} == "text":
    print("| model |")
    sys.exit()
found = "No devices found." if {broken!r} == "cpu" else "Found 1 Vulkan devices:"
print("ggml_vulkan:", found, file=sys.stderr)
runs, tokens = (int(options[options.index(name) + 1]) for name in ("-r", "-p"))
# the first run of a process is slow, as on a GPU that was at rest
times = [400_000_000] + [100_000_000 + 1_000_000 * (i % 3) for i in range(runs)]
rates = [(tokens or 7) * 1e9 / t for t in times[:runs]]
print(json.dumps([{{
    "build_commit": "0ad4a86", "build_number": 1, "cpu_info": "Intel(R) Xeon(R) Processor",
    "gpu_info": "" if {broken!r} == "cpu" else "NVIDIA H200", "backends": "Vulkan", "model_type": "llama 1B Q4_0",
    "flash_attn": 1, "n_prompt": tokens, "avg_ns": 1, "stddev_ns": 0, "avg_ts": 1.0, "stddev_ts": 0.0,
    "samples_ns": times[:runs], "samples_ts": "none" if {broken!r} == "record" else rates,
}}]))
"""


def llama(folder: Path, broken: str = "") -> tuple[str, str, Path]:
    """(--compare, --gguf, log) of a program that answers as llama-bench does."""
    binary, log, gguf = folder / "llama-bench", folder / "log", folder / "model.gguf"
    binary.write_text(LLAMA.format(python=sys.executable, log=str(log), broken=broken))
    binary.chmod(binary.stat().st_mode | stat.S_IXUSR)
    gguf.write_bytes(b"GGUF")
    return f"llama-bench={binary}", str(gguf), log


def bench(folder: Path, *args: str) -> Result:
    """`bench` with `QUICK` on a program whose weights are nowhere."""
    path = folder / "model.pte"
    path.write_bytes(tiny_decoder.build("llama", external=True).pte)
    return CliRunner().invoke(cli, ["bench", str(path), *QUICK, *args])


# -- llama.cpp


def test_llama_bench(tmp_path: Path) -> None:
    compare, gguf, log = llama(tmp_path)
    record = tmp_path / "record.json"
    result = bench(tmp_path, "--compare", compare, "--gguf", gguf, "--json", str(record))
    assert result.exit_code == 0, result.output
    text = " ".join(result.stdout.split())
    assert "prefill, llama-bench (0ad4a86, Vulkan, NVIDIA H200, llama 1B Q4_0)" in text
    first, second = (json.loads(line) for line in log.read_text().splitlines())
    common = ["-m", gguf, "-ngl", "99", "-fa", "1", "-o", "json"]
    assert first == [*common, "-p", "4", "-n", "0", "-r", "2"]
    assert second == [*common, "-p", "0", "-n", "3", "-d", "2", "-r", "2"]
    [peer] = json.loads(record.read_text())["peers"]
    assert peer["prefill_tokens_per_second"] == pytest.approx((4 / 0.4 + 4 / 0.1) / 2)
    assert peer["decode_tokens_per_second"] == pytest.approx((7 / 0.4 + 7 / 0.1) / 2)
    assert (peer["prefill_deviation"], peer["model"]) == (pytest.approx((4 / 0.1 - 4 / 0.4) / 2), gguf)


def test_runs_of_llama_bench_while_clocks_rise_do_not_count(tmp_path: Path) -> None:
    compare, gguf, log = llama(tmp_path)
    found = peers.run(compare, peers.Job(4, 0, 0, 3, gguf, warm_up=0.9))
    runs = [json.loads(line)[-1] for line in log.read_text().splitlines()]
    assert runs == ["1", "6"]  # 0.9 s are three runs as slow as the first
    assert found.prefill_tokens_per_second == pytest.approx(4 / 0.101)
    assert found.decode_tokens_per_second is found.decode_deviation is None


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("exit", "llama-bench ended with 1: no device"),
        ("abort", r"llama-bench ended by signal 6: ggml_vulkan: no 16-bit storage\. / error: no model"),
        ("text", "llama-bench's JSON is not what was expected"),
        ("record", "llama-bench's JSON is not what was expected"),
        ("cpu", r"llama-bench found no GPU and ran on the CPU; it said 'ggml_vulkan: No devices found\.'"),
    ],
)
def test_a_llama_bench_that_fails(tmp_path: Path, broken: str, message: str) -> None:
    compare, gguf, _ = llama(tmp_path, broken)
    with pytest.raises(peers.PeerError, match=message):
        peers.run(compare, peers.Job(4, 3, 2, 1, gguf))


def test_what_was_measured_outlives_a_peer_that_fails(tmp_path: Path) -> None:
    compare, gguf, _ = llama(tmp_path, "exit")
    record = tmp_path / "record.json"
    result = bench(tmp_path, "--compare", compare, "--gguf", gguf, "--json", str(record))
    assert result.exit_code == 1
    assert "llama-bench ended with 1: no device" in result.stderr
    assert "decode, 3 steps at 2 rows" in result.stdout
    found = json.loads(record.read_text())
    assert (found["decode"]["tokens"], found["peers"]) == (3, [])


def test_peers_that_are_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compare, gguf, _ = llama(tmp_path)
    with pytest.raises(peers.PeerError, match="no llama-bench at /nowhere/llama-bench"):
        peers.run("llama-bench=/nowhere/llama-bench", peers.Job(4, 3, 2, 1, gguf))
    with pytest.raises(peers.PeerError, match=r"missing\.gguf: no such file"):
        peers.run(compare, peers.Job(4, 3, 2, 1, "missing.gguf"))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(peers.PeerError, match="llama-bench is not in PATH"):
        peers.run("llama-bench", peers.Job(4, 3, 2, 1, gguf))
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    with pytest.raises(peers.PeerError, match="pip install onnxruntime-genai"):
        peers.run(f"onnxruntime-genai={tmp_path}", peers.Job(4, 3, 2, 1))


# -- ONNX Runtime GenAI

UNSUPPORTED = "WebGPU execution provider is not supported in this build. "
"""What 0.18 says where no provider was registered, or none that found a device."""


class FakeGenai(types.ModuleType):
    """The calls of ONNX Runtime GenAI that are used, and a note of each."""

    __version__ = "0.18.0"

    def __init__(self, fails: bool = False) -> None:
        super().__init__("onnxruntime_genai")
        self.notes: list[tuple[Any, ...]] = []
        notes = self.notes

        class Config:
            def __init__(self, folder: str) -> None:
                notes.append(("config", folder))

            def clear_providers(self) -> None:
                notes.append(("clear",))

            def append_provider(self, name: str) -> None:
                notes.append(("provider", name))

        class Model:
            def __init__(self, config: Config) -> None:
                if fails:
                    raise RuntimeError(UNSUPPORTED)

        class GeneratorParams:
            def __init__(self, model: Model) -> None:
                pass

            def set_search_options(self, **options: Any) -> None:
                notes.append(("length", options["max_length"], options["do_sample"]))

        class Generator:
            def __init__(self, model: Model, options: GeneratorParams) -> None:
                pass

            def append_tokens(self, tokens: list[int]) -> None:
                notes.append(("append", len(tokens)))

            def generate_next_token(self) -> None:
                notes.append(("next",))

        self.Config, self.Model, self.GeneratorParams, self.Generator = Config, Model, GeneratorParams, Generator

    def register_execution_provider_library(self, name: str, path: str) -> None:
        self.notes.append(("register", name, path))


def config_file(folder: Path, provider_options: list[dict[str, dict[str, str]]]) -> None:
    """As the model builder writes it, in the parts that matter."""
    decoder = {"session_options": {"log_id": "onnxruntime-genai", "provider_options": provider_options}}
    (folder / "genai_config.json").write_text(json.dumps({"model": {"decoder": decoder}}))


@pytest.fixture
def no_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_webgpu", None)


PREFILL = [("length", 5, False), ("append", 4), ("next",)]
DECODE = [("length", 14, False), ("append", 9), *[("next",)] * (2 + 3)]


@pytest.mark.parametrize("name", ["webgpu", "WebGPU"])
@pytest.mark.usefixtures("no_plugin")
def test_onnxruntime_genai_keeps_the_options_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    fake = FakeGenai()
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", fake)
    config_file(tmp_path, [{name: {"enableGraphCapture": "1", "validationMode": "disabled"}}])
    found = peers.run(f"onnxruntime-genai={tmp_path}", peers.Job(4, 3, 10, 1))
    assert found.about == "0.18.0, graphs captured"
    assert min(found.prefill_tokens_per_second or 0, found.decode_tokens_per_second or 0) > 0
    assert fake.notes == [("config", str(tmp_path)), *PREFILL * 2, *DECODE * 2]


@pytest.mark.parametrize("options", [[], [{"cuda": {"enable_cuda_graph": "0"}}]])
def test_onnxruntime_genai_on_the_provider_of_the_plugin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[dict[str, dict[str, str]]]
) -> None:
    fake, plugin = FakeGenai(), types.ModuleType("onnxruntime_ep_webgpu")
    plugin.__dict__.update(get_ep_name=lambda: "WebGpuExecutionProvider", get_library_path=lambda: "/provider.so")
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", fake)
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_webgpu", plugin)
    config_file(tmp_path, options)
    chosen = [("config", str(tmp_path)), ("clear",), ("provider", "webgpu")]
    peers.run(f"onnxruntime-genai={tmp_path}", peers.Job(4, 0, 0, 1))
    assert fake.notes == [("register", "WebGpuExecutionProvider", "/provider.so"), *chosen, *PREFILL * 2]
    fake.notes.clear()
    peers.run(f"onnxruntime-genai={tmp_path}", peers.Job(4, 0, 0, 1))
    assert fake.notes == [*chosen, *PREFILL * 2]  # a second registration would be an error


@pytest.mark.usefixtures("no_plugin")
def test_onnxruntime_genai_warms_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake, clock = FakeGenai(), iter(range(1000))
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", fake)
    monkeypatch.setattr("executorch_webgpu.cli.peers.time.perf_counter", lambda: next(clock))
    config_file(tmp_path, [])
    found = peers.run(f"onnxruntime-genai={tmp_path}", peers.Job(4, 0, 0, 2, warm_up=6.5))
    # the clock is read once at the start, twice in a run and once after it: 3 and 6 ticks have gone by after two runs
    assert fake.notes.count(("append", 4)) == 3 + 2
    assert found.prefill_tokens_per_second == 4


@pytest.mark.usefixtures("no_plugin")
def test_onnxruntime_genai_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", FakeGenai(fails=True))
    with pytest.raises(peers.PeerError, match=r"has no genai_config\.json"):
        peers.run(f"onnxruntime-genai={tmp_path}", peers.Job(4, 3, 2, 1))
    config_file(tmp_path, [])
    with pytest.raises(
        peers.PeerError, match=r"not supported in this build\. WebGPU comes with .*onnxruntime-ep-webgpu"
    ):
        peers.run(f"onnxruntime-genai={tmp_path}", peers.Job(4, 3, 2, 1))
    (tmp_path / "genai_config.json").write_text("{")
    with pytest.raises(peers.PeerError, match="does not run here: Expecting property name"):
        peers.run(f"onnxruntime-genai={tmp_path}", peers.Job(4, 3, 2, 1))
