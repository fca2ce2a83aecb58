"""What `bench` measures: prefill and decode of a decoder program, its kernels, and what peers reach on this machine."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from ..runtime.errors import DeviceError, InputError
from ..runtime.gpu.device import Device
from ..runtime.methods.delegate import KernelTime
from .costs import KernelCost
from .decoders import Decoder, Profile, seconds
from .peers import PeerResult, package_version

PREFILL, DECODE, DEPTH = 512, 128, 512
"""What is measured unless told otherwise, as far as the program's capacity goes."""


@dataclass(frozen=True)
class Work:
    """Tokens of the prompt; steps, and rows in the caches before them; runs of each; seconds before anything counts."""

    prefill: int
    decode: int
    depth: int
    repetitions: int = 5
    warm_up: float = 0.5

    @classmethod
    def fit(
        cls,
        decoder: Decoder,
        prefill: int | None = None,
        decode: int | None = None,
        depth: int | None = None,
        repetitions: int = 5,
        warm_up: float = 0.5,
    ) -> Work:
        """Numbers given are taken as they are; None becomes the default, or less where the capacity is less.

        Raises:
            InputError: more than the program's capacity, or nothing at all.
        """
        room = decoder.capacity
        prompt = min(PREFILL, room) if prefill is None else prefill
        steps = min(DECODE, max(room - (depth or 0), 0)) if decode is None else decode
        rows = min(DEPTH, max(room - steps, 0)) if depth is None else depth
        if prompt == steps == 0:
            raise InputError("--prefill and --decode are both 0: there is nothing to measure")
        if prompt > room:
            raise InputError(f"--prefill {prompt:,}: the program's capacity is {room:,} tokens")
        if rows + steps > room:
            raise InputError(
                f"--decode {steps:,} at --depth {rows:,}: the program's capacity is {room:,} tokens; "
                "choose less, or export the model with a longer context"
            )
        return cls(prompt, steps, rows, repetitions, warm_up)


@dataclass(frozen=True)
class Spread:
    """Median, 10th and 90th percentile of the runs."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        low, middle, high = (float(f"{x:.6g}") for x in np.percentile(np.array(values), (10, 50, 90)))
        return cls(middle, low, high)


@dataclass(frozen=True)
class Phase:
    """Runs of a prompt, or of a number of steps.

    Attributes:
        tokens: of all sequences, in one run.
        seconds: of a run, until its tokens are on the host.
        profile: one call with a timestamp around each dispatch; None where the device has none.
        calls: calls of the method in a run.
    """

    tokens: int
    calls: int
    seconds: Spread
    tokens_per_second: Spread
    profile: Profile | None

    @property
    def times(self) -> list[KernelTime]:
        return [] if self.profile is None else self.profile.times


@dataclass
class Report:
    """Everything that was measured."""

    program: str
    device: Device
    work: Work
    decoder: Decoder
    load_seconds: float
    random_weights: int
    prefill: Phase | None = None
    decode: Phase | None = None
    no_profile: str | None = None
    peers: list[PeerResult] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """As plain data, for JSON. Times are in seconds, rates in tokens of all sequences a second."""
        info, decoder = self.device.adapter.info, self.decoder
        return {
            "program": self.program,
            "device": {"name": info["device"], "driver": info["description"], "backend": info["backend_type"]},
            "versions": {name: package_version(name) for name in ("executorch-webgpu", "wgpu", "numpy")},
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "settings": {**asdict(self.work), "batch": decoder.batch, "random_weights": self.random_weights},
            "decoder": {
                "vocabulary": decoder.vocabulary, "capacity": decoder.capacity, "chunk": decoder.chunk,
                "steps_per_submit": decoder.steps_per_submit, "one_step_at_a_time": decoder.fallback,
            },
            "load_seconds": self.load_seconds,
            "memory": {**self.device.memory.by_purpose, "peak": self.device.memory.peak},
            "prefill": None if self.prefill is None else _phase(self.prefill),
            "decode": None if self.decode is None else _phase(self.decode),
            "no_kernel_times": self.no_profile,
            "peers": [asdict(peer) for peer in self.peers],
        }  # fmt: skip


def _phase(phase: Phase) -> dict[str, Any]:
    found = {f.name: getattr(phase, f.name) for f in fields(phase) if f.name != "profile"}
    found |= {name: asdict(found[name]) for name in ("seconds", "tokens_per_second")}
    kernels = [] if phase.profile is None else phase.profile.kernels
    total = sum(kernel.nanoseconds for kernel in kernels)
    return {**found, "step_us": total / 1000 if kernels else None, "kernels": [_kernel(k, total) for k in kernels]}


def _kernel(kernel: KernelCost, total: int) -> dict[str, Any]:
    return {
        **asdict(kernel),
        "share": kernel.nanoseconds / max(total, 1),
        "gb_per_second": kernel.gb_per_second,
        "gflop_per_second": kernel.gflop_per_second,
    }


def measure(
    program: str,
    device: Device,
    decoder: Decoder,
    work: Work,
    load_seconds: float,
    random_weights: int,
    say: Callable[[str], object],
) -> Report:
    """Time the program.

    Args:
        say: told what is being done.
    Raises:
        DeviceError, WebGPUDelegateError: the device failed, or logits are NaN.
    """
    report = Report(program, device, work, decoder, load_seconds, random_weights)

    def profiled(rows: int, position: int) -> Profile | None:
        try:
            return decoder.profile(rows, position)
        except DeviceError as error:
            if "timestamp-query" in device.features:
                raise
            report.no_profile = str(error)
            return None

    if work.prefill:
        say(f"prefill of {work.prefill:,} tokens")
        times = _runs(lambda: seconds(decoder.prefill, work.prefill), work)
        rows = min(work.prefill, decoder.chunk)
        calls = -(-work.prefill // decoder.chunk)
        report.prefill = _summary(work.prefill * decoder.batch, calls, times, profiled(rows, 0))
    if work.decode:
        say(f"{work.decode:,} steps at {work.depth:,} tokens")

        def steps() -> float:
            decoder.approach(work.depth)
            return seconds(decoder.decode, work.depth, work.decode)

        times = _runs(steps, work)
        middle = work.depth + work.decode // 2
        report.decode = _summary(work.decode * decoder.batch, work.decode, times, profiled(1, middle))
    return report


def _runs(run: Callable[[], float], work: Work) -> list[float]:
    """Seconds of each run, after runs that do not count: kernels are compiled, clocks rise."""
    began = time.perf_counter()
    run()
    while time.perf_counter() - began < work.warm_up:
        run()
    return [run() for _ in range(work.repetitions)]


def _summary(tokens: int, calls: int, times: list[float], profile: Profile | None) -> Phase:
    return Phase(tokens, calls, Spread.of(times), Spread.of([tokens / t for t in times]), profile)
