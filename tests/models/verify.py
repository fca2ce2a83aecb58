"""Lower one configuration of the catalogue, run it on a device and compare with its reference.

    python -m tests.models.verify NAME [NAME ...] [--route B|A] [--steps 64] [--device full|default-limits] [--disable PASS,...] [--json FILE]

Each configuration is built in a process of its own (repeated exports in one interpreter slow down).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
import traceback
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from tests.models.catalogue import build, find
from tests.models.config import Built

TOLERANCES = {"fp32": (1e-4, 1e-3), "fp16": (2e-3, 1e-2), "bf16": (2e-2, 5e-2)}
"""dtype -> (absolute, relative): |got - ref| <= absolute + relative * |ref|."""
PREFILL = 9


@dataclass
class Report:
    """What lowering and running a configuration gave. `worst` is the largest error in units of the tolerance (1.0: at the limit)."""

    name: str
    route: str
    device: str = ""
    delegates: int = 0
    outside: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    nodes: int = 0
    dispatches: int = 0
    calls: int = 0
    worst: float = float("nan")
    seconds: dict[str, float] = field(default_factory=dict)
    error: str = ""

    @property
    def passed(self) -> bool:
        return not self.error and self.delegates == 1 and not self.outside and self.worst <= 1.0


def lower(built: Built, route: str, disabled: Collection[str] = ()) -> tuple[bytes, dict[str, str]]:
    """The `.pte` of a configuration, and what the partitioner refused."""
    from executorch.exir import to_edge, to_edge_transform_and_lower

    from executorch_webgpu.partitioner import WebGPUPartitioner

    partitioner = WebGPUPartitioner(disable_passes=disabled)
    if route == "A":
        edge = to_edge(built.exported, **built.to_edge_kwargs()).to_backend(partitioner)
    else:
        edge = to_edge_transform_and_lower(built.exported, partitioner=[partitioner], **built.edge_kwargs)
    return bytes(edge.to_executorch().buffer), partitioner.refused


def chunks(built: Built, steps: int) -> list[int]:
    """Rows per call: a prefill, a second chunk and single steps where the shape is dynamic; single steps where it is static."""
    if built.min_seq == built.max_seq:
        return [built.min_seq] * max(1, min(steps, built.max_context // built.min_seq))
    if not built.stateful:
        return [min(n, built.max_seq) for n in (PREFILL, 3, built.max_seq, 5)]
    prefill = min(PREFILL, built.max_seq)
    rest = built.max_context - prefill
    calls = [prefill] + [1] * min(steps, rest)
    rest -= len(calls) - 1
    return calls + ([min(4, rest)] if rest > 1 else [])


def error_ratio(got: Any, reference: Any, dtype: str) -> float:
    """The largest error in units of the tolerance; infinite for a shape or NaN mismatch."""
    absolute, relative = TOLERANCES[dtype]
    got, reference = torch.as_tensor(got).double(), torch.as_tensor(reference).double()
    if got.shape != reference.shape or bool(torch.isnan(got).any()):
        return float("inf")
    if got.numel() == 0:
        return 0.0
    return float(((got - reference).abs() / (absolute + relative * reference.abs())).max())


def run(built: Built, pte: bytes, report: Report, device: str, steps: int) -> None:
    """Execute and compare; fills in the report."""
    from executorch_webgpu.runtime import Runtime
    from tests.harness import device as test_device

    on = test_device(device)
    report.device = on.name
    program = Runtime(on).load_program(pte)
    method = program.load_method("forward")
    report.delegates, report.outside = len(method.delegates), method.outside()
    report.nodes = sum(len(d.graph.nodes) for d in method.delegates)
    generator = np.random.default_rng(0)
    built.oracle.reset()
    position, worst = 0, 0.0
    for length in chunks(built, steps):
        tokens = generator.integers(0, built.vocab, length)
        before = on.counters.copy()
        got = method.execute(list(built.make_inputs(tokens, position)))
        report.dispatches = on.counters.since(before).dispatches
        reference = built.oracle(tokens, position)
        references = reference if isinstance(reference, tuple | list) else (reference,)
        if len(got) != len(references):
            raise AssertionError(f"{len(got)} outputs, the reference has {len(references)}")
        worst = max([worst, *(error_ratio(g, r, built.config.dtype) for g, r in zip(got, references, strict=True))])
        report.calls += 1
        if built.stateful:
            position += length
    report.worst = worst


def verify(name: str, route: str = "B", device: str = "full", steps: int = 64, disabled: Collection[str] = ()) -> Report:
    """Build, lower, run, compare; errors land in the report."""
    report = Report(name, route)
    started = time.perf_counter()
    try:
        torch.manual_seed(0)
        built = build(find(name))
        report.seconds["export"] = time.perf_counter() - started
        started = time.perf_counter()
        pte, report.refused = lower(built, route, disabled)
        report.seconds["lower"] = time.perf_counter() - started
        started = time.perf_counter()
        run(built, pte, report, device, steps)
        report.seconds["run"] = time.perf_counter() - started
    except Exception:
        report.error = traceback.format_exc(limit=-6)
    return report


def _child(send: Any, arguments: tuple[Any, ...]) -> None:
    send.send(asdict(verify(*arguments)))


def verify_in_process(name: str, *arguments: Any) -> Report:
    """`verify` in a fresh forked process."""
    receive, send = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_child, args=(send, (name, *arguments)))
    child.start()
    send.close()
    try:
        return Report(**receive.recv())
    except EOFError:
        return Report(name, str(arguments[:1]), error=f"the process ended with code {child.exitcode}")
    finally:
        child.join()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--route", default="B", choices=("A", "B"))
    parser.add_argument("--device", default="full", choices=("full", "default-limits"))
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--disable", default="")
    parser.add_argument("--json", default="")
    options = parser.parse_args()
    torch.set_num_threads(1)  # so that processes may be forked
    reports = []
    for name in options.names:
        disabled = tuple(n for n in options.disable.split(",") if n)
        report = verify_in_process(name, options.route, options.device, options.steps, disabled)
        reports.append(report)
        verdict = "pass" if report.passed else "FAIL"
        timing = " ".join(f"{k} {v:.1f}s" for k, v in report.seconds.items())
        print(f"{verdict} {name} route {report.route}: {report.delegates} delegate(s), worst {report.worst:.3g}, {report.dispatches} dispatches, {timing}", flush=True)
        if not report.passed:
            print(f"  outside {sorted(set(report.outside))}\n  refused {report.refused}\n{report.error}", flush=True)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump([asdict(r) for r in reports], file, indent=1)
    return 0 if all(r.passed for r in reports) else 1


if __name__ == "__main__":
    sys.exit(main())
