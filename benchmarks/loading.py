"""Loading weights: time against reading the file, and host memory at its peak.

    python -m benchmarks.loading [--bytes 700000000] [--dtype f16]      weights alone
    python -m benchmarks.loading --program MODEL.pte                    a program, loaded until it can be called

A file of random bytes is written, mapped, and uploaded as tensors of 32 MiB, as the runtime does it with a program's
weights; or random weights for what a program lacks are written as a `.ptd` file, and both are loaded. Reading the file
means `readinto` a buffer of 8 MiB. Both are done with the file in the system's page cache and without (after
POSIX_FADV_DONTNEED, where the system has it and takes the advice). On an adapter that is the CPU itself the weights
are host memory as well: their size is taken off the peak.
"""

from __future__ import annotations

import argparse
import mmap
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from executorch_webgpu.backend.graph import ITEM_SIZE, Value
from executorch_webgpu.runtime.gpu.buffers import Weights
from executorch_webgpu.runtime.gpu.device import Device
from executorch_webgpu.runtime.methods.program import Runtime

from . import data_file
from .options import add_common, command, count
from .report import Report
from .timing import Times

WIDTH = 2048
TENSOR_BYTES = 32 << 20
READ_BYTES = 8 << 20


def write_random(path: Path, size: int) -> None:
    """A file of `size` random bytes."""
    random = np.random.default_rng(0)
    with path.open("wb") as file:
        for begin in range(0, size, TENSOR_BYTES):
            file.write(random.bytes(min(TENSOR_BYTES, size - begin)))
        file.flush()
        os.fsync(file.fileno())


def forget(path: Path) -> None:
    """Drop a file from the page cache, as far as the system allows."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_seconds(path: Path) -> float:
    """Seconds to read a whole file into a small buffer."""
    began, buffer = time.perf_counter(), bytearray(READ_BYTES)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - began


def resident_bytes() -> int:
    """Memory of this process that is in use now, mapped files included; 0 where the system does not tell."""
    try:
        text = Path("/proc/self/statm").read_text(encoding="ascii")
    except OSError:
        return 0
    return int(text.split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Watch:
    """Most bytes of host memory beyond those at the start. Weights on an adapter that is the CPU are taken off."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.on_host = device.adapter.info["adapter_type"] == "CPU"
        self.before, self.most = self._now(), 0

    def _now(self) -> int:
        return resident_bytes() - (self.device.memory.total if self.on_host else 0)

    def __call__(self, *_: int) -> None:
        self.most = max(self.most, self._now() - self.before)


def load(device: Device, path: Path, dtype: str) -> tuple[float, int]:
    """(seconds, most bytes of host memory beyond those before) of one load of a file, which is freed again."""
    row = WIDTH * ITEM_SIZE[dtype]
    rows, size = TENSOR_BYTES // row, path.stat().st_size // row * row
    values, places = [], {}
    for begin in range(0, size, rows * row):
        end = min(begin + rows * row, size)
        values.append(Value("constant", dtype, ((end - begin) // row, WIDTH), f"w{begin}", str(begin)))
        places[str(begin)] = (begin, end)
    weights = Weights(device)
    weights.progress = watch = Watch(device)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        with memoryview(mapped) as view:
            began = time.perf_counter()
            weights.load(values, lambda key: view[slice(*places[key])])
            seconds = time.perf_counter() - began
        weights.close()
    return seconds, watch.most


def load_program(device: Device, program: Path, data: Path) -> tuple[float, int]:
    """As `load`, for all methods of a program with a data file."""
    watch = Watch(device)
    began = time.perf_counter()
    with Runtime(device).load_program(program, [data]) as loaded:
        for name in sorted(loaded.method_names - set(loaded.constants)):
            loaded.load_method(name, progress=watch)
        seconds = time.perf_counter() - began
        watch()
    return seconds, watch.most


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.loading", description=(__doc__ or "").split("\n")[0])
    made.add_argument("--bytes", type=count, default=700_000_000, help="size of the file")
    made.add_argument("--program", type=Path, help="a program without its weights, instead of --bytes")
    made.add_argument("--folder", help="where it is written; default: the system's folder for temporary files")
    made.add_argument("--runs", type=count, default=3)
    add_common(made)
    made.add_argument("--dtype", choices=("f16", "f32", "bf16"), default="f16", help="bf16 is stored as f32")
    return made


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    options_parser = parser()
    options = options_parser.parse_args(arguments)
    device = Device.create(options.adapter)
    report = Report(device, options.out)
    with tempfile.TemporaryDirectory(prefix="loading-", dir=options.folder) as folder:
        path = Path(folder) / "weights.ptd"
        if options.program is None:
            size = options.bytes
            write_random(path, size)
        else:
            sizes = data_file.missing(options.program)
            if not sizes:
                options_parser.error(f"{options.program} lacks no weights: export it with its weights outside")
            size = data_file.write(path, sizes)
        for cached in (True, False):
            reads, loads, memory = [], [], 0
            for _ in range(options.runs):
                if not cached:
                    forget(path)
                reads.append(read_seconds(path))
                if not cached:
                    forget(path)
                if options.program is None:
                    seconds, most = load(device, path, options.dtype)
                else:
                    seconds, most = load_program(device, options.program, path)
                loads.append(seconds)
                memory = max(memory, most)
            read = float(np.median(reads))
            report.line(
                "loading",
                {"bytes": size} if options.program is None else {"bytes": size, "program": options.program.name},
                options.dtype if options.program is None else "program",
                Times.of(np.array(loads) * 1e6),
                cached=cached,
                read_us=float(f"{read * 1e6:.5g}"),
                file_gb_per_s=float(f"{size / np.median(loads) / 1e9:.5g}"),
                times_reading=float(f"{np.median(loads) / read:.4g}"),
                peak_host_bytes=memory,
                peak_host_of_file=float(f"{memory / size:.4g}"),
                clock="host",
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
