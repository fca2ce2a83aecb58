"""What `bench` shows on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

from .bench import Phase, Report, Spread
from .tables import size, table


def show(out: Console, report: Report) -> None:
    """Print a report: rates, memory, kernels of a prefill call and of a step, peers."""
    decoder, work, memory = report.decoder, report.work, report.device.memory
    out.print(f"{report.program} on {report.device.name}", markup=False, soft_wrap=True)
    weights = size(memory.by_purpose.get("weights", 0))
    random = f", {report.random_weights} of its weights random" if report.random_weights else ""
    out.print(
        f"loaded in {report.load_seconds:.2f} s: {weights} of weights{random}; memory at most {size(memory.peak)}"
    )
    if decoder.fallback is None:
        out.print(f"tokens chosen on the GPU, up to {decoder.steps_per_submit} steps a submit")
    else:
        out.print(f"one step at a time: {decoder.fallback}", markup=False, soft_wrap=True)
    sequences = f", {decoder.batch} sequences" if decoder.batch > 1 else ""
    columns = ("tokens/s", "10 to 90 %", "time (ms)", "10 to 90 % (ms)")
    made = table(f"Median of {work.repetitions} runs{sequences}", "", *columns, right=columns)
    for name, phase in (
        (f"prefill, {work.prefill:,} tokens", report.prefill),
        (f"decode, {work.decode:,} steps at {work.depth:,} rows", report.decode),
    ):
        if phase is not None:
            milliseconds = Spread(*(1000 * getattr(phase.seconds, x) for x in ("median", "p10", "p90")))
            made.add_row(name, *_spread(phase.tokens_per_second), *_spread(milliseconds))
    for peer in report.peers:
        for what, rate, deviation in (
            ("prefill", peer.prefill_tokens_per_second, peer.prefill_deviation),
            ("decode", peer.decode_tokens_per_second, peer.decode_deviation),
        ):
            if rate is not None:
                made.add_row(escape(f"{what}, {peer.name} ({peer.about})"), f"{rate:,.1f}", f"+- {deviation or 0:,.1f}")
    out.print(made)
    if report.no_profile is not None:
        out.print(f"no kernel times: {report.no_profile}", markup=False, soft_wrap=True)
    for title, phase in (("A call of the prefill", report.prefill), ("One step", report.decode)):
        if phase is not None and phase.profile is not None:
            _kernels(out, title, phase)


def _spread(found: Spread) -> tuple[str, str]:
    digits = 1 if found.median >= 100 else 3
    return f"{found.median:,.{digits}f}", f"{found.p10:,.{digits}f} to {found.p90:,.{digits}f}"


def _kernels(out: Console, title: str, phase: Phase) -> None:
    assert phase.profile is not None
    kernels = phase.profile.kernels
    total = sum(kernel.nanoseconds for kernel in kernels)
    right = ("count", "time (us)", "share", "GB/s", "GFLOP/s")
    made = table(f"{title}, each dispatch by itself", "kernel", *right, right=right)
    for kernel in kernels:
        gb, gflop = kernel.gb_per_second, kernel.gflop_per_second
        made.add_row(
            kernel.kernel,
            str(kernel.count),
            f"{kernel.nanoseconds / 1e3:,.1f}",
            f"{kernel.nanoseconds / max(total, 1):.1%}",
            "" if gb is None else f"{gb:,.1f}",
            "" if gflop is None else f"{gflop:,.0f}",
        )
    made.add_section()
    made.add_row("total", str(sum(kernel.count for kernel in kernels)), f"{total / 1e3:,.1f}", "100.0%")
    out.print(made)
