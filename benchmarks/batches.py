"""Decoding of batches whose rows have lengths of their own: rows times steps a second; a part of `decode_loop`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import numpy as np

from executorch_webgpu.runtime.batches.generator import BatchGenerator
from executorch_webgpu.runtime.batches.loop import BatchLoop, Choice, Piece
from executorch_webgpu.runtime.batches.rows import Request
from executorch_webgpu.runtime.decoding.decoder import find_ragged
from executorch_webgpu.runtime.decoding.resident import DEPTH, find_whole
from executorch_webgpu.runtime.decoding.sampling import GREEDY
from executorch_webgpu.runtime.errors import InputError, UnsupportedError
from executorch_webgpu.runtime.gpu.device import Device
from executorch_webgpu.runtime.methods.program import Program, Runtime

from .report import Report
from .timing import Stamps, Times

TOGETHER = 8
"""Steps of one submit."""


def open_batched(device: Device, path: str) -> Program:
    """A program for batches.

    Raises:
        UnsupportedError: it is none.
        WebGPUDelegateError, OSError: as loading a program.
    """
    program = Runtime(device).load_program(path)
    try:
        with BatchGenerator(program) as batch:
            if batch.fallback is not None:
                raise UnsupportedError(batch.fallback)
    except BaseException:
        program.close()
        raise
    return program


def batches(report: Report, program: Program, options: argparse.Namespace) -> None:
    """Time a program for batches with each number of active rows that `options.rows` asks for.

    `decode_loop.batch`: steps of rows at position `past`, as the loop on the GPU runs them; `decode_loop.texts`: whole
    requests of one prompt token, which grow to `steps` tokens, with all that the host does about them.

    Raises:
        InputError: more rows, positions or steps than it has.
    """
    for rows in options.rows:
        _steps(report, program, rows, options)
    for rows in options.rows:
        _texts(report, program, rows, options)


def _steps(report: Report, program: Program, rows: int, options: argparse.Namespace) -> None:
    method = program.load_method()
    convention = find_ragged(method, program.constants)
    if not 1 <= rows <= convention.rows:
        raise InputError(f"{rows} rows of a batch of {convention.rows}")
    if options.steps < TOGETHER:
        raise InputError(f"{options.steps} steps of rows that decode {TOGETHER} steps a submit: give at least as many")
    steps = min(options.steps, convention.capacity - options.past) // TOGETHER * TOGETHER
    if steps < 1:
        raise InputError(f"no room for {TOGETHER} steps at position {options.past} of {convention.capacity}")
    loop = BatchLoop(find_whole(method, convention), convention, TOGETHER)
    stamps = Stamps(method.device, steps // TOGETHER)

    def run(count: int) -> list[float]:
        pieces = {row: Piece([1], options.past) for row in range(rows)}
        loop.start(pieces, 1, {row: Choice(GREEDY, 0) for row in pieces})
        found, sent = [], 0
        for _ in range(count):
            began = time.perf_counter()
            while sent < count and loop.flying < DEPTH:
                loop.submit(TOGETHER)
                sent += 1
            loop.collect()
            found.append((time.perf_counter() - began) / TOGETHER)
        return found

    try:
        began = time.perf_counter()
        while True:  # until clocks and caches have settled
            run(1)
            if time.perf_counter() - began >= options.warm_up:
                break
        loop.pass_options = stamps.next
        found = run(steps // TOGETHER)
    finally:
        loop.close()
        method.close()
    _line(report, "decode_loop.batch", (rows, convention.rows), options.past, steps, found, stamps.busy())


def _texts(report: Report, program: Program, rows: int, options: argparse.Namespace) -> None:
    with BatchGenerator(program) as batch:
        steps: int = min(options.steps, batch.capacity - 1)

        def run() -> float:
            requests = [Request((1 + row,), steps, ()) for row in range(rows)]
            began = time.perf_counter()
            batch.run(requests)
            return (time.perf_counter() - began) / steps

        run()
        found = [run() for _ in range(options.samples)]
        _line(report, "decode_loop.texts", (rows, batch.rows), 0, steps, found, None)


def _line(
    report: Report,
    name: str,
    rows: tuple[int, int],
    past: int,
    steps: int,
    seconds: Sequence[float],
    busy: float | None,
) -> None:
    times = Times.of(np.array(seconds) * 1e6)
    active, batch = rows
    mean = float(np.mean(seconds))
    report.line(
        name,
        {"rows": active, "batch": batch, "past": past, "steps": steps},
        "program",
        times,
        steps_per_s=float(f"{1 / mean:.5g}"),
        tokens_per_s=float(f"{active / mean:.5g}"),
        gpu_busy_by_stamps=None if busy is None else float(f"{busy:.4g}"),
        clock="host",
    )
