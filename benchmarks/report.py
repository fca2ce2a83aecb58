"""One JSON line a measurement."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import tomllib
import wgpu

from executorch_webgpu.runtime.gpu.device import Device

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
    """Writes lines to stdout and, appended, to a file.

    Raises:
        OSError: the file cannot be written; known before anything is measured.
    """

    def __init__(self, device: Device, out: str | None = None, rates: Rates | None = None) -> None:
        self.device = device
        self.out = None if out is None else Path(out)
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.out.open("a", encoding="utf-8").close()
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
            with self.out.open("a", encoding="utf-8") as file:
                file.write(text + "\n")
        self.lines += 1
        return record
