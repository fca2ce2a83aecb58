"""Profiled steps as a Chrome trace: JSON for chrome://tracing or https://ui.perfetto.dev.

The format is the "JSON Object Format" of the Trace Event documentation: complete events (`ph` X) with begin and
duration in microseconds, and metadata events (`ph` M) that name processes and threads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..runtime.methods.delegate import KernelTime

_PROCESS = 1


def events(steps: Mapping[str, Sequence[KernelTime]]) -> list[dict[str, Any]]:
    """The events of profiled steps: a thread for each step, all beginning at 0."""
    found: list[dict[str, Any]] = [_named("process_name", 0, "GPU")]
    for thread, (step, times) in enumerate(steps.items(), 1):
        found.append(_named("thread_name", thread, step))
        for time in times:
            found.append(
                {
                    "name": time.kernel,
                    "cat": "kernel",
                    "ph": "X",
                    "ts": time.begin / 1000,
                    "dur": time.nanoseconds / 1000,
                    "pid": _PROCESS,
                    "tid": thread,
                    "args": {"node": time.node},
                }
            )
    return found


def _named(what: str, thread: int, name: str) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": _PROCESS, "tid": thread, "args": {"name": name}}


def write(path: str | Path, steps: Mapping[str, Sequence[KernelTime]], about: Mapping[str, Any]) -> None:
    """Write the trace; `about` goes into its `otherData`."""
    content = {"traceEvents": events(steps), "displayTimeUnit": "ns", "otherData": dict(about)}
    Path(path).write_text(json.dumps(content), encoding="utf-8")
