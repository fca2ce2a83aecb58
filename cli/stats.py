"""What `run --stats` shows: speed, memory, and where the time of a decode step went."""

from __future__ import annotations

from collections.abc import Iterable

from ..runtime.decoding.generate import GenerationResult, Generator
from ..runtime.errors import DeviceError, UnsupportedError
from ..runtime.methods.delegate import KernelTime
from .tables import console, size, table

_REASONS = {
    "stop_token": "a stop token",
    "stop_string": "a stop string",
    "max_new_tokens": "--max-new-tokens",
    "capacity": "the model's capacity",
    "stopped": "the caller",
}


def report(generator: Generator, result: GenerationResult) -> None:
    """Print to standard error. Runs one more decode step for the kernel times."""
    out, device = console(stderr=True), generator.method.device
    out.print(f"\nadapter: {device.name}", markup=False, soft_wrap=True)
    for name, count, seconds, rate in (
        ("prefill", result.prompt_tokens, result.prefill_seconds, result.prefill_tokens_per_second),
        ("decode", result.decode_steps, result.decode_seconds, result.decode_tokens_per_second),
    ):
        out.print(f"{name}: {count:,} tokens in {seconds:.3f} s, {rate:,.1f} tokens/s")
    if generator.fallback is None:
        out.print(f"tokens chosen on the GPU, up to {result.steps_per_submit} steps a submit")
    else:
        out.print(f"one step at a time: {generator.fallback}", markup=False, soft_wrap=True)
    drafts = result.speculation
    if drafts is not None:
        out.print(
            f"drafts: {drafts.accepted:,} of {drafts.drafted:,} tokens accepted in {drafts.calls:,} calls, "
            f"{drafts.tokens_per_call:.1f} tokens a call"
        )
    out.print("(The first calls of each size compile kernels; their time is included.)")
    out.print(f"ended by: {_REASONS[result.stop_reason]}")
    made = table("GPU memory", "purpose", "size", right=("size",))
    for purpose, count in sorted(device.memory.by_purpose.items(), key=lambda item: -item[1]):
        made.add_row(purpose, size(count))
    made.add_section()
    made.add_row("total", size(device.memory.total))
    made.add_row("peak", size(device.memory.peak))
    out.print(made)
    try:
        generator.profile_step()  # the first one also waits for a GPU that has gone to sleep
        times = generator.profile_step()
    except (DeviceError, UnsupportedError) as error:
        out.print(f"no kernel times: {error}", markup=False, soft_wrap=True)
        return
    made = table("One decode step", "kernel", "count", "time (us)", "share", right=("count", "time (us)", "share"))
    total = sum(t.nanoseconds for t in times)
    for kernel, count, nanoseconds in by_kernel(times):
        made.add_row(kernel, str(count), f"{nanoseconds / 1e3:,.1f}", f"{nanoseconds / max(total, 1):.1%}")
    made.add_section()
    made.add_row("total", str(len(times)), f"{total / 1e3:,.1f}", "100.0%")
    out.print(made)


def by_kernel(times: Iterable[KernelTime]) -> list[tuple[str, int, int]]:
    """(kernel, dispatches, nanoseconds), the longest first."""
    found: dict[str, tuple[int, int]] = {}
    for time in times:
        count, nanoseconds = found.get(time.kernel, (0, 0))
        found[time.kernel] = (count + 1, nanoseconds + time.nanoseconds)
    return sorted(((k, c, n) for k, (c, n) in found.items()), key=lambda item: (-item[2], item[0]))
