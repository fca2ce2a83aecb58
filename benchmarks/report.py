"""One JSON line a measurement, and the options that all benchmarks share."""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import tomllib
import wgpu

from executorch_webgpu.runtime.device import Device

from .timing import Times

FIELDS = (
    "benchmark", "device", "driver", "backend", "versions", "date", "shape", "dtype", "median_us", "p10_us", "p90_us",
    "bytes", "flops", "gb_per_s", "tflop_per_s", "copy_share", "matrix_share", "kernels", "splits", "baseline",
)  # fmt: skip
"""What every line has; a share or rate that makes no sense for a benchmark is null."""

ITEM_SIZE = {"f32": 4, "f16": 2}


@dataclass(frozen=True)
class Rates:
    """What the device reached in this run, in GB/s (1e9 bytes) and TFLOP/s (1e12)."""

    copy: float
    read: float
    matmul: float
    fma: float
    dispatch_us: float

    @property
    def matrix(self) -> float:
        """The better of the package's own matrix product and multiply-adds on registers."""
        return max(self.matmul, self.fma)

    def record(self) -> dict[str, float]:
        """For the `baseline` field."""
        names = {
            "copy_gb_per_s": self.copy, "read_gb_per_s": self.read, "matmul_tflop_per_s": self.matmul,
            "fma_tflop_per_s": self.fma, "dispatch_us": self.dispatch_us,
        }  # fmt: skip
        return {name: _short(value) for name, value in names.items()}


def _short(value: float) -> float:
    """Five significant digits."""
    return float(f"{value:.5g}")


def package_version() -> str:
    """The installed version, else that of the source tree."""
    try:
        return metadata.version("executorch-webgpu")
    except metadata.PackageNotFoundError:
        path = Path(__file__).parents[1] / "pyproject.toml"
        return str(tomllib.loads(path.read_text(encoding="utf-8"))["project"]["version"])


class Report:
    """Writes lines to stdout and, appended, to a file."""

    def __init__(self, device: Device, out: str | None = None, rates: Rates | None = None) -> None:
        self.device = device
        self.out = None if out is None else Path(out)
        self.rates = rates
        self.lines = 0

    def line(
        self,
        benchmark: str,
        shape: Mapping[str, Any],
        dtype: str,
        times: Times,
        *,
        traffic: float | None = None,
        flops: float | None = None,
        kernels: Sequence[str] = (),
        splits: int | None = None,
        **more: Any,
    ) -> dict[str, Any]:
        """Write one measurement and return it.

        Args:
            shape: sizes by name.
            times: of one run of what `benchmark` names.
            traffic, flops: bytes that must be moved at least, and floating-point operations, of one run.
            more: further fields.
        """
        info = self.device.adapter.info
        seconds = times.median / 1e6
        rates = self.rates
        gb = None if traffic is None else traffic / seconds / 1e9
        tf = None if flops is None else flops / seconds / 1e12
        record: dict[str, Any] = {
            "benchmark": benchmark,
            "device": info["device"],
            "driver": info["description"],
            "backend": info["backend_type"],
            "versions": {"package": package_version(), "wgpu": wgpu.__version__, "numpy": np.__version__},
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "shape": dict(shape),
            "dtype": dtype,
            "median_us": _short(times.median),
            "p10_us": _short(times.p10),
            "p90_us": _short(times.p90),
            "samples": times.samples,
            "repetitions": times.repetitions,
            "bytes": None if traffic is None else int(traffic),
            "flops": None if flops is None else int(flops),
            "gb_per_s": None if gb is None else _short(gb),
            "tflop_per_s": None if tf is None else _short(tf),
            "copy_share": None if gb is None or rates is None else _short(gb / rates.copy),
            "matrix_share": None if tf is None or rates is None else _short(tf / rates.matrix),
            "kernels": list(kernels),
            "splits": splits,
            "baseline": None if rates is None else rates.record(),
            **more,
        }
        text = json.dumps(record)
        print(text, flush=True)
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            with self.out.open("a", encoding="utf-8") as file:
                file.write(text + "\n")
        self.lines += 1
        return record


def say(message: str) -> None:
    """A word to the person at the terminal, beside the lines."""
    print(message, file=sys.stderr, flush=True)


def add_common(parser: argparse.ArgumentParser) -> None:
    """Options that every benchmark takes."""
    parser.add_argument("--out", help="append the lines to this file")
    parser.add_argument("--adapter", help="a part of the adapter's name; default: the best one")
    parser.add_argument("--samples", type=int, default=20, help="timed passes")
    parser.add_argument("--warm-up", type=float, default=0.3, help="seconds of the same work before timing")
    parser.add_argument(
        "--pass-ms", type=float, default=4.0, help="milliseconds that a timed pass should last at least"
    )
    parser.add_argument(
        "--rotate-bytes", type=int, default=256 << 20,
        help="distinct bytes that a pass walks over, so that no cache holds them",
    )  # fmt: skip
    parser.add_argument("--baseline-bytes", type=int, default=512 << 20, help="bytes of a buffer of the copy kernel")
    parser.add_argument("--matrix-size", type=int, default=4096, help="M = N = K of the matrix product of the baseline")


def numbers(text: str) -> list[int]:
    """`1,2,3` as ints."""
    return [int(part) for part in text.split(",")]


def names(text: str) -> list[str]:
    """`a,b` as strings."""
    return [part.strip() for part in text.split(",")]
