"""Where the host's time of a step goes, seen from outside: the runtime itself is not changed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from executorch_webgpu.runtime.gpu import native


@dataclass
class StepClock:
    """Seconds spent since `start`, by what the host did.

    `submit`: inside the queue's submit; `wait`: reading outputs back, until the GPU is done; `total`: from `start` to
    `stop`. The rest, checks, uploads and encoding, is `encode`.
    """

    submit: float = 0.0
    wait: float = 0.0
    total: float = 0.0
    _began: float = field(default=0.0, repr=False)

    @property
    def encode(self) -> float:
        return self.total - self.submit - self.wait

    def start(self) -> None:
        self.submit = self.wait = self.total = 0.0
        self._began = time.perf_counter()

    def stop(self) -> None:
        self.total = time.perf_counter() - self._began


@contextmanager
def python_loop() -> Iterator[None]:
    """Recordings are encoded by the loop in Python while the context lasts, as where llvmlite is missing."""
    compiled = native.compiled_loop
    setattr(native, "compiled_loop", lambda: None)  # noqa: B010
    try:
        yield
    finally:
        setattr(native, "compiled_loop", compiled)  # noqa: B010


@contextmanager
def watched() -> Iterator[StepClock]:
    """A clock that counts every submit and every readback of the runtime while the context lasts."""
    clock = StepClock()
    replaced: list[tuple[Any, str, Any]] = []

    def watch(owner: Any, name: str, add: Callable[[float], None]) -> None:
        inner = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                add(time.perf_counter() - began)

        setattr(owner, name, timed)
        replaced.append((owner, name, inner))

    def submitted(seconds: float) -> None:
        clock.submit += seconds

    def waited(seconds: float) -> None:
        clock.wait += seconds

    try:
        watch(native, "submit", submitted)
        watch(native.Download, "finish", waited)
        yield clock
    finally:
        for owner, name, inner in replaced:
            setattr(owner, name, inner)
