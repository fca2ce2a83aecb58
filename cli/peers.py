"""Other engines that `bench` compares with, where they are installed: llama.cpp's bench binary, ONNX Runtime GenAI."""

from __future__ import annotations

import importlib
import json
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
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
    """What a peer is to run, as `bench.Work`; `gguf` and `folder` say which model."""

    prefill: int
    decode: int
    depth: int
    repetitions: int
    gguf: str | None = None


@dataclass(frozen=True)
class PeerResult:
    """Tokens a second of one sequence; None for what was not run.

    Attributes:
        spread: of the two rates, as standard deviations.
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
    common = [binary, "-m", job.gguf, "-r", str(job.repetitions), "-ngl", "99", "-fa", "1", "-o", "json"]
    found: dict[str, Mapping[str, Any]] = {}
    if job.prefill:
        found["prefill"] = _llama_record([*common, "-p", str(job.prefill), "-n", "0"])
    if job.decode:
        found["decode"] = _llama_record([*common, "-p", "0", "-n", str(job.decode), "-d", str(job.depth)])
    rates = {name: (float(r["avg_ts"]), float(r.get("stddev_ts", 0.0))) for name, r in found.items()}
    either: Mapping[str, Any] = next(iter(found.values()), {})
    about = ", ".join(
        str(either[key]) for key in ("build_commit", "backends", "gpu_info", "model_type") if either.get(key)
    )
    prefill, decode = rates.get("prefill", (None, None)), rates.get("decode", (None, None))
    return PeerResult("llama-bench", job.gguf, prefill[0], decode[0], prefill[1], decode[1], about)


def _llama_record(command: list[str]) -> Mapping[str, Any]:
    """The single test of a run's JSON list. Raises PeerError."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PeerError(f"llama-bench: {error}") from error
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise PeerError(f"llama-bench ended with {done.returncode}: {last}")
    try:
        [record] = json.loads(done.stdout)
        float(record["avg_ts"])
    except (ValueError, KeyError, TypeError) as error:
        raise PeerError(
            f"llama-bench's JSON is not what was expected ({error!r}); it began {done.stdout[:80]!r}"
        ) from error
    return dict(record)


# -- ONNX Runtime GenAI


def onnxruntime_genai(where: str, job: Job) -> PeerResult:
    """ONNX Runtime GenAI on its WebGPU provider (WHERE: the folder of a model made for it)."""
    if not where:
        raise InputError("--compare onnxruntime-genai=FOLDER: name the folder with the model's genai_config.json")
    try:
        og = importlib.import_module("onnxruntime_genai")
    except ImportError as error:
        raise PeerError(f"{error}: pip install onnxruntime-genai, in a build with WebGPU") from error
    if not (Path(where) / "genai_config.json").is_file():
        raise PeerError(f"{where} has no genai_config.json")
    try:
        return _genai(og, where, job)
    except Exception as error:
        raise PeerError(f"onnxruntime-genai with WebGPU does not run here: {error}") from error


def _genai(og: Any, folder: str, job: Job) -> PeerResult:
    config = og.Config(folder)
    config.clear_providers()
    config.append_provider("webgpu")
    model = og.Model(config)

    def generator(length: int) -> Any:
        options = og.GeneratorParams(model)
        options.set_search_options(do_sample=False, batch_size=1, min_length=length, max_length=length)
        return og.Generator(model, options)

    def prefill() -> float:
        made = generator(job.prefill + 1)
        began = time.perf_counter()
        made.append_tokens([1] * job.prefill)
        made.generate_next_token()
        return job.prefill / (time.perf_counter() - began)

    def decode() -> float:
        rows = max(job.depth, 1)
        made = generator(rows + job.decode + 1)
        made.append_tokens([1] * rows)
        made.generate_next_token()
        began = time.perf_counter()
        for _ in range(job.decode):
            made.generate_next_token()
        return job.decode / (time.perf_counter() - began)

    def measured(call: Callable[[], float]) -> tuple[float, float]:
        call()  # compiles
        rates = [call() for _ in range(job.repetitions)]
        return statistics.median(rates), statistics.pstdev(rates)

    before = measured(prefill) if job.prefill else (None, None)
    after = measured(decode) if job.decode else (None, None)
    version = getattr(og, "__version__", "")
    return PeerResult(
        "onnxruntime-genai", folder, before[0], after[0], before[1], after[1], f"{version} WebGPU".strip()
    )


PEERS: dict[str, Callable[[str, Job], PeerResult]] = {
    "llama-bench": llama_bench, "onnxruntime-genai": onnxruntime_genai
}  # fmt: skip
"""Name -> how it is run."""
