"""Other engines that `bench` compares with, where they are installed: llama.cpp's bench binary, ONNX Runtime GenAI."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import math
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runtime.errors import InputError, WebGPUDelegateError

TIMEOUT = 1800
"""Seconds that a peer may take."""


class PeerError(WebGPUDelegateError):
    """A peer is not installed, or does not run here; says why."""


@dataclass(frozen=True)
class Job:
    """What a peer is to run, as `bench.Work`; `gguf` says which model, where the peer's name does not."""

    prefill: int
    decode: int
    depth: int
    repetitions: int
    gguf: str | None = None
    warm_up: float = 0.0


@dataclass(frozen=True)
class PeerResult:
    """Tokens a second of one sequence, medians; None for what was not run.

    Attributes:
        prefill_deviation, decode_deviation: of the runs, standard deviations.
        about: versions, device and settings.
    """

    name: str
    model: str
    prefill_tokens_per_second: float | None
    decode_tokens_per_second: float | None
    prefill_deviation: float | None = None
    decode_deviation: float | None = None
    about: str = ""


def run(text: str, job: Job) -> PeerResult:
    """Run the peer that `NAME=WHERE` names.

    Raises:
        InputError: there is no such peer, or something to run it with was not given.
        PeerError: it is not installed or fails.
    """
    name, _, where = text.partition("=")
    if name not in PEERS:
        raise InputError(f"--compare {text}: no peer is called {name!r}; there are {', '.join(PEERS)}")
    return PEERS[name](where, job)


def package_version(name: str) -> str | None:
    """None where the package is not installed, as when it runs from its sources."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


# -- llama.cpp


def llama_bench(where: str, job: Job) -> PeerResult:
    """llama.cpp's `llama-bench` (WHERE: the binary; default: looked for in PATH) on `job.gguf`."""
    if job.gguf is None:
        raise InputError("--compare llama-bench needs --gguf FILE: the same model for llama.cpp")
    binary = shutil.which(where or "llama-bench")
    if binary is None:
        raise PeerError(
            f"no llama-bench at {where}" if where else "llama-bench is not in PATH: --compare llama-bench=/path/to/it"
        )
    if not Path(job.gguf).is_file():
        raise PeerError(f"{job.gguf}: no such file")
    common = [binary, "-m", job.gguf, "-ngl", "99", "-fa", "1", "-o", "json"]
    found: dict[str, Mapping[str, Any]] = {}
    if job.prefill:
        found["prefill"] = _llama_runs([*common, "-p", str(job.prefill), "-n", "0"], job)
    if job.decode:
        found["decode"] = _llama_runs([*common, "-p", "0", "-n", str(job.decode), "-d", str(job.depth)], job)
    rates = {name: r["samples_ts"][-job.repetitions :] for name, r in found.items()}
    either: Mapping[str, Any] = next(iter(found.values()), {})
    about = ", ".join(
        str(either[key]) for key in ("build_commit", "backends", "gpu_info", "model_type") if either.get(key)
    )
    before, after = (_summary(rates.get(name)) for name in ("prefill", "decode"))
    return PeerResult("llama-bench", job.gguf, before[0], after[0], before[1], after[1], about)


def _summary(rates: Sequence[float] | None) -> tuple[float, float] | tuple[None, None]:
    return (None, None) if rates is None else (statistics.median(rates), statistics.pstdev(rates))


def _llama_runs(command: list[str], job: Job) -> Mapping[str, Any]:
    """The record of a run whose last `job.repetitions` samples count. Raises PeerError.

    The program warms up with one run only, and a GPU that was at rest takes some tenths of a second to raise its
    clocks: how many runs that is, a first call of the program tells.
    """
    runs = job.repetitions
    if job.warm_up:
        first = _llama_record([*command, "-r", "1"])
        runs += math.ceil(job.warm_up * 1e9 / max(min(first["samples_ns"]), 1))
    return _llama_record([*command, "-r", str(runs)])


def _llama_record(command: list[str]) -> Mapping[str, Any]:
    """The single test of a run's JSON list, with the time and the rate of each run in `samples_ns`, `samples_ts`.

    Raises:
        PeerError: the program failed, printed something else, or ran on the CPU, which it does without complaint where
            its backend finds no device.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PeerError(f"llama-bench: {error}") from error
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-2:]
        how = f"with {done.returncode}" if done.returncode > 0 else f"by signal {-done.returncode}"
        raise PeerError(f"llama-bench ended {how}: {' / '.join(last)}")
    try:
        [record] = json.loads(done.stdout)
        statistics.fmean(record["samples_ts"] + record["samples_ns"])
        gpu = str(record["gpu_info"])
    except (ValueError, KeyError, TypeError) as error:
        raise PeerError(
            f"llama-bench's JSON is not what was expected ({error!r}); it began {done.stdout[:80]!r}"
        ) from error
    if not gpu:
        devices = [line for line in done.stderr.splitlines() if "devices" in line]
        raise PeerError(f"llama-bench found no GPU and ran on the CPU; it said {' / '.join(devices) or 'nothing'!r}")
    return dict(record)


# -- ONNX Runtime GenAI

CONFIG = "genai_config.json"
REGISTERED = "_executorch_webgpu_registered"
"""Set on the module: a library must not be registered twice."""


def onnxruntime_genai(where: str, job: Job) -> PeerResult:
    """ONNX Runtime GenAI on its WebGPU provider (WHERE: the folder of a model made for it)."""
    if not where:
        raise InputError("--compare onnxruntime-genai=FOLDER: name the folder with the model's genai_config.json")
    try:
        og = importlib.import_module("onnxruntime_genai")
    except ImportError as error:
        raise PeerError(f"{error}: pip install onnxruntime-genai onnxruntime-ep-webgpu") from error
    if not (Path(where) / CONFIG).is_file():
        raise PeerError(f"{where} has no {CONFIG}")
    try:
        return _genai(og, where, job)
    except Exception as error:
        hint = ""
        if "not supported in this build" in str(error):
            hint = (
                ". WebGPU comes with the package onnxruntime-ep-webgpu; where ONNX Runtime finds no GPU itself, "
                "ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER=1 lets it use what Vulkan finds"
            )
        raise PeerError(f"onnxruntime-genai with WebGPU does not run here: {str(error).rstrip(' .')}{hint}") from error


def _provider(og: Any) -> str:
    """Register the provider of `onnxruntime-ep-webgpu` where that is installed; `onnxruntime-webgpu` has its own.

    Returns:
        Versions, for the report.
    """
    names = ["onnxruntime-webgpu"]
    try:
        package = importlib.import_module("onnxruntime_ep_webgpu")
    except ImportError:
        pass
    else:
        if not getattr(og, REGISTERED, False):
            og.register_execution_provider_library(package.get_ep_name(), package.get_library_path())
            setattr(og, REGISTERED, True)
        names = ["onnxruntime", "onnxruntime-ep-webgpu"]
    found = {name: package_version(name) for name in names}
    return ", ".join([og.__version__, *(f"{name} {number}" for name, number in found.items() if number)])


def _webgpu_options(folder: str) -> Mapping[str, str] | None:
    """What the model's own settings ask of WebGPU, such as `enableGraphCapture`; None where they do not choose it.

    Raises:
        ValueError, OSError: the file is no JSON, or cannot be read.
    """
    config = json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8"))
    entries = config["model"]["decoder"].get("session_options", {}).get("provider_options", [])
    return next((options for entry in entries for name, options in entry.items() if name.lower() == "webgpu"), None)


def _genai(og: Any, folder: str, job: Job) -> PeerResult:
    about, options = _provider(og), _webgpu_options(folder)
    config = og.Config(folder)
    if options is None:
        config.clear_providers()
        config.append_provider("webgpu")
    elif options.get("enableGraphCapture") == "1":
        about += ", graphs captured"
    model = og.Model(config)

    def generator(length: int) -> Any:
        search = og.GeneratorParams(model)
        search.set_search_options(do_sample=False, batch_size=1, min_length=length, max_length=length)
        return og.Generator(model, search)

    def prefill() -> float:
        made = generator(job.prefill + 1)
        began = time.perf_counter()
        made.append_tokens([1] * job.prefill)
        made.generate_next_token()
        return job.prefill / (time.perf_counter() - began)

    def decode() -> float:
        rows = max(job.depth - 1, 1)
        made = generator(rows + job.decode + 2)
        made.append_tokens([1] * rows)
        made.generate_next_token()  # chooses from the prompt's logits
        made.generate_next_token()  # the first step, in which a graph may be captured
        began = time.perf_counter()
        for _ in range(job.decode):
            made.generate_next_token()
        return job.decode / (time.perf_counter() - began)

    def measured(call: Callable[[], float]) -> tuple[float, float] | tuple[None, None]:
        began = time.perf_counter()
        call()  # compiles
        while time.perf_counter() - began < job.warm_up:
            call()
        return _summary([call() for _ in range(job.repetitions)])

    before = measured(prefill) if job.prefill else _summary(None)
    after = measured(decode) if job.decode else _summary(None)
    return PeerResult("onnxruntime-genai", folder, before[0], after[0], before[1], after[1], about)


PEERS: dict[str, Callable[[str, Job], PeerResult]] = {
    "llama-bench": llama_bench, "onnxruntime-genai": onnxruntime_genai
}  # fmt: skip
"""Name -> how it is run."""
