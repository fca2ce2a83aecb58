"""Decoding token by token: tokens a second, where the host's time goes, and how busy the GPU is.

    python -m benchmarks.decode_loop --pte FILE [--data FILE ...]
    python -m benchmarks.decode_loop [--layers 16 --dim 2048 ...]
    python -m benchmarks.decode_loop --pte FILE --batched FILE [--rows 1,8]

Without a program a Llama-shaped decoder with random weights is made on the device, by default of the sizes of Llama 3.2
1B. `DEFAULT_MODES` are the ways to run steps, each a function; NAME-python is the same without llvmlite's loop.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np

from executorch_webgpu.backend.graph import ITEM_SIZE, Graph, product
from executorch_webgpu.runtime.decoding.decoder import Convention, find_convention
from executorch_webgpu.runtime.decoding.resident import DEPTH, Resident, Whole, find_whole
from executorch_webgpu.runtime.decoding.sampling import GREEDY
from executorch_webgpu.runtime.errors import InputError, UnsupportedError
from executorch_webgpu.runtime.gpu import native
from executorch_webgpu.runtime.gpu.device import Device
from executorch_webgpu.runtime.methods.delegate import Delegate
from executorch_webgpu.runtime.methods.program import Runtime
from executorch_webgpu.runtime.methods.replay import Replay

from .baseline import measure
from .batches import batches, open_batched
from .graphs import BITS, DecoderSizes, Inputs, decoder, encode, ready
from .host import python_loop, watched
from .options import add_common, command, count, counts, names, natural
from .report import Report
from .timing import Stamps, Times, repetitions_for, time_passes

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class StepTimes:
    """Host seconds of one step: checks, uploads and encoding; submit; waiting and reading back; choosing the token."""

    encode: float
    submit: float
    wait: float
    choose: float
    total: float


class Decoder(Protocol):
    """What is decoded with."""

    device: Device
    capacity: int

    def run(self, tokens: Sequence[int], position: int) -> Array:
        """Run tokens at a position; the logits [V] of the last."""
        ...

    def delegates(self) -> Sequence[Delegate]:
        """Where its work is done, in order."""
        ...

    def inputs(self, tokens: Sequence[int], position: int) -> Sequence[Inputs]:
        """What each delegate gets in such a run."""
        ...

    def whole(self) -> Whole:
        """Which inputs of its only delegate are tokens and positions."""
        ...

    def resident(self) -> Resident:
        """Its loop on the GPU."""
        ...

    def record(self) -> dict[str, Any]:
        """For the `shape` field."""
        ...

    def close(self) -> None: ...


class RecordsDecoder:
    """The decoder of `graphs.decoder`."""

    def __init__(self, device: Device, sizes: DecoderSizes) -> None:
        self.device = device
        self.sizes = sizes
        self.capacity = sizes.capacity
        self.loaded = decoder(device, sizes)

    def run(self, tokens: Sequence[int], position: int) -> Array:
        [(_, logits)] = self.loaded.delegate.execute(self.inputs(tokens, position)[0])
        return np.asarray(logits).reshape(-1)

    def delegates(self) -> Sequence[Delegate]:
        return [self.loaded.delegate]

    def inputs(self, tokens: Sequence[int], position: int) -> Sequence[Inputs]:
        return [[("i64", np.array([tokens], np.int64)), ("i64", np.array([position], np.int64))]]

    def whole(self) -> Whole:
        return Whole(self.loaded.delegate, 0, 1, 0)

    def resident(self) -> Resident:
        convention = Convention(False, self.capacity, self.sizes.vocabulary, self.capacity, True)
        return Resident.of(self.whole(), convention, self.capacity)

    def record(self) -> dict[str, Any]:
        return dict(self.sizes.record())

    def close(self) -> None:
        self.loaded.close()


class ProgramDecoder:
    """A decoder method of a `.pte`."""

    def __init__(self, device: Device, pte: str, data: Sequence[str], method: str = "forward") -> None:
        self.device = device
        self.program = Runtime(device).load_program(pte, list(data))
        try:
            self.method = self.program.load_method(method)
            self.convention = find_convention(self.method, self.program.constants)
        except BaseException:
            self.program.close()
            raise
        if self.convention.capacity is None:
            self.program.close()
            raise UnsupportedError(f"{pte} does not say how many tokens a sequence may have")
        self.capacity = self.convention.capacity

    def run(self, tokens: Sequence[int], position: int) -> Array:
        outputs = self.method.execute(self.convention.inputs(tokens, position))
        return self.convention.last_logits(outputs[0])

    def delegates(self) -> Sequence[Delegate]:
        return self.method.delegates

    def inputs(self, tokens: Sequence[int], position: int) -> Sequence[Inputs]:
        found: list[Inputs] = []
        execute = Delegate.execute

        def recorded(delegate: Delegate, inputs: Inputs, *more: Any) -> Any:
            found.append(inputs)
            return execute(delegate, inputs, *more)

        for delegate in self.method.delegates:
            setattr(delegate, "execute", lambda inputs, *more, to=delegate: recorded(to, inputs, *more))  # noqa: B010
        try:
            self.run(tokens, position)
        finally:
            for delegate in self.method.delegates:
                del delegate.execute
        return found

    def whole(self) -> Whole:
        return find_whole(self.method, self.convention)

    def resident(self) -> Resident:
        return Resident.of(self.whole(), self.convention, self.capacity)

    def record(self) -> dict[str, Any]:
        return {"vocabulary": self.convention.vocabulary, "capacity": self.capacity}

    def close(self) -> None:
        self.program.close()


# -- ways to run steps


@dataclass(frozen=True)
class Run:
    """What a mode measured in a turn.

    Attributes:
        steps: the times of each step.
        costs: of each submit, seconds a step that the host encodes and submits, without any waiting.
        busy: the GPU's share between the first and the last pass by timestamps; None where it was not stamped.
    """

    steps: list[StepTimes]
    costs: list[float]
    busy: float | None = None


def single_steps(model: Decoder, token: int, position: int, steps: int) -> Run:
    """One step a submit; the host reads the logits back and takes the largest."""
    found = []
    with watched() as clock:
        for step in range(steps):
            began = time.perf_counter()
            clock.start()
            logits = model.run([token], position + step)
            clock.stop()
            token = int(logits.argmax())
            ended = time.perf_counter()
            choose = ended - began - clock.total
            found.append(StepTimes(clock.encode, clock.submit, clock.wait, choose, ended - began))
    return Run(found, [step.encode + step.submit for step in found])


def replayed_steps(model: Decoder, token: int, position: int, steps: int) -> Run:
    """As `single_steps`, with the step captured."""
    whole = model.whole()
    first = model.inputs([token], position)[0]
    replay = Replay(whole.delegate, first)
    found = []
    with watched() as clock:
        for step in range(steps):
            inputs = _moved(first, whole, token, position + step)
            began = time.perf_counter()
            clock.start()
            outputs = replay.execute(inputs)
            clock.stop()
            token = int(np.asarray(outputs[whole.logits][1]).reshape(-1).argmax())
            ended = time.perf_counter()
            choose = ended - began - clock.total
            found.append(StepTimes(clock.encode, clock.submit, clock.wait, choose, ended - began))
    return Run(found, [step.encode + step.submit for step in found])


def _moved(inputs: Inputs, whole: Whole, token: int, position: int) -> Inputs:
    """The inputs of a step with another token and position."""
    values = {whole.tokens: token, whole.positions: position}
    return [(dtype, np.full_like(array, values[place])) for place, (dtype, array) in enumerate(inputs)]


def resident_steps(together: int) -> Mode:
    """The loop on the GPU, so many steps a submit, two submits in flight."""

    def mode(model: Decoder, token: int, position: int, steps: int) -> Run:
        resident = model.resident()
        submits = [min(together, steps - done) for done in range(0, steps, together)]
        stamps = Stamps(model.device, len(submits))
        resident.pass_options = stamps.next
        resident.start(token, position, GREEDY, 0, ())
        found: list[StepTimes] = []
        costs: list[float] = []
        try:
            with watched() as clock:
                for count in submits:
                    began = time.perf_counter()
                    clock.start()
                    while len(costs) < len(submits) and resident.flying < DEPTH:
                        sending, size = time.perf_counter(), submits[len(costs)]
                        resident.submit(size)
                        costs.append((time.perf_counter() - sending) / size)
                    resident.collect()
                    clock.stop()
                    took = time.perf_counter() - began
                    parts = (clock.encode, clock.submit, clock.wait, 0.0, took)
                    found += [StepTimes(*(part / count for part in parts))] * count
        finally:
            resident.drop()
            resident.pass_options = dict
        return Run(found, costs, stamps.busy())

    return mode


Mode = Callable[[Decoder, int, int, int], Run]
"""(decoder, first token, its position, steps) -> what was measured."""
DEFAULT_MODES: dict[str, Mode] = {
    "single": single_steps,
    "replay": replayed_steps,
    **{f"resident-{count}": resident_steps(count) for count in (1, 4, 8, 32)},
}


def in_python(mode: Mode) -> Mode:
    """The mode with dispatches encoded by the loop in Python, whether or not llvmlite is installed."""

    def slower(model: Decoder, token: int, position: int, steps: int) -> Run:
        with python_loop():
            return mode(model, token, position, steps)

    return slower


MODES = {**DEFAULT_MODES, **{f"{name}-python": in_python(mode) for name, mode in DEFAULT_MODES.items()}}


CHOICES = {"dtype": ("f16", "f32"), "weights": ("", *BITS)}
"""Of the fields of `DecoderSizes` that are words."""


# -- measuring


def gpu_times(
    model: Decoder, tokens: Sequence[int], position: int, options: argparse.Namespace
) -> tuple[Times, list[str]]:
    """(GPU time of a run by timestamps, the kernel of each dispatch)."""
    given = model.inputs(tokens, position)
    plans = [ready(delegate, inputs) for delegate, inputs in zip(model.delegates(), given, strict=True)]

    def run(compute: Any) -> None:
        for plan in plans:
            encode(compute, plan)

    repetitions = repetitions_for(model.device, run, options.pass_ms / 1000)
    times = time_passes(model.device, run, repetitions, options.samples, options.warm_up)
    return times, [launch.kernel for plan in plans for launch in plan.launches]


def traffic(graph: Graph, device: Device, keys: int, capacity: int) -> int:
    """Bytes that a run of few tokens must read: every weight but a table that is only looked up in, and `keys` of
    `capacity` rows of the state."""
    read = {index for node in graph.nodes for index in node.inputs() if "embedding" not in node.op}
    total = 0
    for index, value in enumerate(graph.values):
        count = product(value.shape)
        if value.kind not in ("constant", "mutable") or value.alias is not None or not isinstance(count, int):
            continue
        size = count * (4 if device.limits.wgsl_type(value.dtype) != "f16" else ITEM_SIZE["f16"])
        if value.kind == "mutable":
            total += size * keys // capacity
        elif index in read:
            total += size
    return total


def take_turns(model: Decoder, options: argparse.Namespace) -> dict[str, list[Run]]:
    """What each mode measured. Modes run the same steps in turns, because the host is faster at some times than at
    others: numbers that are to be compared must come from the same times."""
    steps = min(options.steps, model.capacity - options.past)
    if steps < 1:
        raise InputError(f"no room for a step at position {options.past}: the decoder has {model.capacity} rows")
    found: dict[str, list[Run]] = {name: [] for name in options.modes}
    for _ in range(options.turns):
        for name in options.modes:
            began, mode = time.perf_counter(), MODES[name]
            while True:  # the same work, until clocks and caches have settled
                mode(model, 1, options.past, min(steps, 8))
                if time.perf_counter() - began >= options.warm_up:
                    break
            found[name].append(mode(model, 1, options.past, steps))
    return found


def steps_of(
    report: Report, model: Decoder, name: str, runs: Sequence[Run], dtype: str, options: argparse.Namespace
) -> None:
    """Write the line of a mode."""
    found = [step for run in runs for step in run.steps]
    steps = len(runs[0].steps)
    middle = options.past + steps // 2
    gpu, kernels = gpu_times(model, [1], middle, options)
    total = Times.of(np.array([step.total for step in found]) * 1e6)
    wall = sum(step.total for step in found)
    needed = sum(traffic(d.graph, model.device, middle + 1, model.capacity) for d in model.delegates())
    parts = {
        f"{field.name}_us": float(f"{np.median([getattr(step, field.name) for step in found]) * 1e6:.5g}")
        for field in fields(StepTimes)
    }
    costs = np.percentile([cost for run in runs for cost in run.costs], (10, 50, 90)) * 1e6
    for label, cost in zip(("cost_p10_us", "cost_us", "cost_p90_us"), costs, strict=True):
        parts[label] = float(f"{cost:.5g}")
    busy = [run.busy for run in runs if run.busy is not None]
    report.line(
        f"decode_loop.{name}",
        {**model.record(), "past": options.past, "steps": steps, "turns": len(runs)},
        dtype,
        total,
        traffic=needed,
        tokens_per_s=float(f"{len(found) / wall:.5g}"),
        host=parts,
        encoded_by="python" if name.endswith("-python") else native.encoded_by(),
        gpu_us=float(f"{gpu.median:.5g}"),
        gpu_busy=float(f"{gpu.median * len(found) / 1e6 / wall:.4g}"),
        gpu_busy_by_stamps=float(f"{np.mean(busy):.4g}") if busy else None,
        gpu_gb_per_s=float(f"{needed / gpu.median / 1e3:.5g}"),
        gpu_copy_share=None if report.rates is None else float(f"{needed / gpu.median / 1e3 / report.rates.copy:.4g}"),
        kernels=sorted(set(kernels)),
        dispatches=len(kernels),
        clock="host",
    )


def prefill_of(report: Report, model: Decoder, rows: int, dtype: str, options: argparse.Namespace) -> None:
    """GPU time of one run of `rows` tokens at the start of a sequence."""
    times, kernels = gpu_times(model, [1] * rows, 0, options)
    report.line(
        "decode_loop.prefill",
        {**model.record(), "past": 0, "rows": rows},
        dtype,
        times,
        tokens_per_s=float(f"{rows / times.median * 1e6:.5g}"),
        kernels=sorted(set(kernels)),
        dispatches=len(kernels),
        clock="gpu",
    )


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.decode_loop", description=(__doc__ or "").split("\n")[0])
    made.add_argument("--pte", help="a program; without one, a random decoder of the sizes below")
    made.add_argument("--data", nargs="*", default=[], help="its .ptd files")
    sizes = DecoderSizes()
    for field in fields(DecoderSizes):
        default = getattr(sizes, field.name)
        flag = f"--{field.name.replace('_', '-')}"
        if isinstance(default, str):
            made.add_argument(flag, choices=CHOICES[field.name], default=default)
        else:
            made.add_argument(flag, type=natural if field.name == "codes" else count, default=default)
    made.add_argument("--past", type=natural, default=128, help="position of the first step")
    made.add_argument("--steps", type=count, default=64)
    made.add_argument("--turns", type=count, default=3, help="so often the modes run the steps, one after the other")
    made.add_argument("--modes", type=names, default=list(DEFAULT_MODES), help=f"of {', '.join(MODES)}")
    made.add_argument("--prefill", type=counts, default=[], help="also the GPU time of runs of so many tokens: 128,512")
    made.add_argument("--batched", help="also a program for batches (`batches.py`), whose rows decode together")
    made.add_argument("--rows", type=counts, default=[1], help="with --batched: so many active rows: 1,8")
    add_common(made)
    return made


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    made = parser()
    options = made.parse_args(arguments)
    unknown = sorted(set(options.modes) - set(MODES))
    if unknown:
        made.error(f"unknown modes {unknown}; there are {sorted(MODES)}")
    with ExitStack() as opened:
        _measured(options, opened)
    return 0


def _measured(options: argparse.Namespace, opened: ExitStack) -> None:
    """All that was asked for; programs are opened before the first measurement."""
    device = Device.create(options.adapter)
    batched = None if options.batched is None else opened.enter_context(open_batched(device, options.batched))
    model: Decoder
    if options.pte is not None:
        model = ProgramDecoder(device, options.pte, options.data)
        dtype = "program"
    else:
        model = RecordsDecoder(device, DecoderSizes(**{f.name: getattr(options, f.name) for f in fields(DecoderSizes)}))
        dtype = options.dtype
    opened.callback(model.close)
    report = Report(device, options.out)
    report.rates = measure(device, options)
    native.compiled_loop()  # now, not when it pays
    for name, runs in take_turns(model, options).items():
        steps_of(report, model, name, runs, dtype, options)
    for rows in options.prefill:
        prefill_of(report, model, rows, dtype, options)
    if batched is not None:
        batches(report, batched, options)


if __name__ == "__main__":
    raise SystemExit(main())
