"""Lower one configuration of the catalogue, run it on a device and compare with its reference.

    python -m tests.models.verify NAME|core|all [...] [--route B|A] [--steps 64] [--device full|default-limits]
    [--disable PASS,...]
        [--results FILE] [--part 0/2]

`--results` appends a JSON line for each configuration and leaves out what the file already holds for that route and
device;
`python -m tests.models.table FILE` makes the documentation's table from it. `--part i/n` takes every n-th
configuration.
Each configuration is built in a process of its own (repeated exports in one interpreter slow down).
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import sys
import time
import traceback
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.models.catalogue import CONFIGS, build, find
from tests.models.config import Built
from tests.models.ties import agreeing

TOLERANCES = {"fp32": (1e-4, 1e-3), "fp16": (2e-3, 1e-2), "bf16": (2e-2, 5e-2)}
"""dtype -> (absolute, relative): |got - ref| <= absolute + relative * |ref|."""
PREFILL = 9


@dataclass
class Report:
    """What lowering and running a configuration gave. `worst` is the largest error in units of the tolerance (1.0: at
    the limit), `flipped` how many values at ties the reference rounded to the other side (`ties.py`)."""

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
    flipped: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    error: str = ""

    @property
    def passed(self) -> bool:
        """One delegate, nothing outside (but ExecuTorch's copies into caches that the caller owns), right numbers."""
        inside = set(self.outside) <= ({"aten::copy_"} if "user_caches" in self.name else set())
        return not self.error and self.delegates == 1 and inside and self.worst <= 1.0

    def line(self) -> str:
        """One line for the terminal, with the reasons under it where it failed."""
        timing = " ".join(f"{k} {v:.1f}s" for k, v in self.seconds.items())
        text = (
            f"{'pass' if self.passed else 'FAIL'} {self.name} route {self.route}: {self.delegates} delegate(s), "
            f"worst {self.worst:.3g}, {self.dispatches} dispatches, {timing}"
        )
        if not self.passed:
            text += f"\n  outside {sorted(set(self.outside))}\n  refused {self.refused}\n{self.error}"
        return text


def lower(built: Built, route: str, disabled: Collection[str] = ()) -> tuple[bytes, dict[str, str]]:
    """The `.pte` of a configuration, and what the partitioner refused."""
    from executorch.exir import to_edge, to_edge_transform_and_lower

    from executorch_webgpu.partitioner import WebGPUPartitioner, separate_outputs

    partitioner = WebGPUPartitioner(disable_passes=disabled)
    if route == "A":
        edge = to_edge(separate_outputs(built.exported), **built.to_edge_kwargs()).to_backend(partitioner)
    else:
        edge = to_edge_transform_and_lower(built.exported, partitioner=[partitioner], **built.edge_kwargs)
    return bytes(edge.to_executorch().buffer), partitioner.refused


def chunks(built: Built, steps: int) -> list[int]:
    """Rows per call: a prefill, a second chunk and single steps where the shape is dynamic; single steps where it is
    static."""
    if built.min_seq == built.max_seq:
        return [built.min_seq] * max(1, min(steps, built.max_context // built.min_seq))
    if not built.stateful:
        return [min(n, built.max_seq) for n in (PREFILL, 3, built.max_seq, 5)]
    prefill = min(PREFILL, built.max_seq)
    rest = built.max_context - prefill
    calls = [prefill] + [1] * min(steps, rest)
    rest -= len(calls) - 1
    return calls + ([min(4, rest)] if rest > 1 else [])


def errors(got: Any, reference: Any, dtype: str) -> torch.Tensor:
    """The error of each element in units of the tolerance, f64[N]; infinite for a shape or NaN mismatch."""
    absolute, relative = TOLERANCES[dtype]
    got, reference = torch.as_tensor(got).double(), torch.as_tensor(reference).double()
    if got.shape != reference.shape or bool(torch.isnan(got).any()):
        return torch.tensor([float("inf")], dtype=torch.float64)
    found = ((got - reference).abs() / (absolute + relative * reference.abs())).masked_fill(got == reference, 0.0)
    return found.nan_to_num(nan=float("inf"), posinf=float("inf")).reshape(-1)  # a NaN would be lost among maxima


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
    # The oracle computes in float32; a device that has float16 keeps a float16 model's caches in it, as the model says.
    built.oracle.cache_dtype = torch.float16 if built.config.dtype == "fp16" and on.limits.f16 else None
    built.oracle.reset()

    def call(tokens: np.ndarray[Any, Any], position: int) -> float:
        """Run both; the largest ratio of the outputs."""
        before = on.counters.copy()
        got = method.execute(list(built.make_inputs(tokens, position)))
        report.dispatches = on.counters.since(before).dispatches
        if built.config.option("user_caches"):
            got = got[2:]  # ExecuTorch returns the new values of mutated inputs before the model's own outputs
        report.calls += 1

        def compare(references: tuple[Any, ...]) -> torch.Tensor:
            if len(got) != len(references):
                raise AssertionError(f"{len(got)} outputs, the reference has {len(references)}")
            found = [errors(g, r, built.config.dtype) for g, r in zip(got, references, strict=True)]
            return torch.cat([*found, torch.zeros(1, dtype=torch.float64)])

        if built.config.rounds_activations:
            worst, flipped = agreeing(built.oracle, tokens, position, compare)
            report.flipped += flipped
            return worst
        reference = built.oracle(tokens, position)
        return float(compare(reference if isinstance(reference, tuple | list) else (reference,)).max())

    position, worst = 0, 0.0
    for length in chunks(built, steps):
        worst = max(worst, call(generator.integers(0, built.vocab, length), position))
        if built.stateful:
            position += length
    report.worst = worst


def verify(
    name: str, route: str = "B", device: str = "full", steps: int = 64, disabled: Collection[str] = ()
) -> Report:
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


def known(path: Path, route: str, device: str) -> set[str]:
    """Names that a results file already holds as passed."""
    if not path.exists():
        return set()
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {r["name"] for r in rows if (r["route"], r["limits"]) == (route, device) and r["passed"]}


def preload() -> None:
    """Import what every child would import: forked processes then start with it."""
    for module in (
        "executorch.exir",
        "executorch.examples.models.llama.export_llama_lib",
        "executorch.extension.llm.custom_ops.custom_ops",
        "optimum.executorch",
        "transformers",
        "executorch_webgpu.partitioner",
        "executorch_webgpu.runtime",
    ):
        importlib.import_module(module)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--route", default="B", choices=("A", "B"))
    parser.add_argument("--device", default="full", choices=("full", "default-limits"))
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--disable", default="")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--part", default="0/1")
    options = parser.parse_args()
    torch.set_num_threads(1)  # so that processes may be forked
    preload()
    groups = {"all": [c.name for c in CONFIGS], "core": [c.name for c in CONFIGS if c.core]}
    names = [name for given in options.names for name in groups.get(given, [given])]
    part, parts = map(int, options.part.split("/"))
    done = known(options.results, options.route, options.device) if options.results else set()
    disabled = tuple(n for n in options.disable.split(",") if n)
    failed = 0
    for name in [n for n in names if n not in done][part::parts]:
        report = verify_in_process(name, options.route, options.device, options.steps, disabled)
        failed += not report.passed
        print(report.line(), flush=True)
        if options.results:
            with options.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(report) | {"limits": options.device, "passed": report.passed}) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
