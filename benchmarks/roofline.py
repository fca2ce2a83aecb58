"""Tables and a roofline plot from result files.

    python -m benchmarks.roofline [RESULTS.jsonl ...] [--svg docs/roofline.svg] > docs/BENCHMARKS.md

Without files: those of benchmarks/results/. The plot needs matplotlib; without --svg there is none.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Record = Mapping[str, Any]
Column = tuple[str, Callable[[Record], object]]

RESULTS = Path(__file__).with_name("results")
INTRODUCTION = """# Benchmarks

Made by `python -m benchmarks.roofline` from the lines in `benchmarks/results/`; `benchmarks/README.md` says how they
are measured and what each number means. Times are medians of GPU timestamps where nothing else is said. Shares compare
with what the same device reached in the same run: of its copy bandwidth, and of its fp32 rate (the better of
multiply-adds on registers and of the package's matrix product).
"""


class ResultsError(Exception):
    """A result file cannot be read."""


def load(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """The lines of all files; of several for the same measurement on the same device the last one.

    Raises:
        ResultsError: a line is no JSON object with the fields of a measurement.
    """
    found: dict[str, dict[str, Any]] = {}
    for path in paths:
        try:
            content = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ResultsError(f"{path}: no lines of text: {error}") from error
        for number, text in enumerate(content.splitlines(), 1):
            if not text.strip():
                continue
            try:
                line = json.loads(text)
                key = [line[name] for name in ("benchmark", "device", "backend", "shape", "dtype")]
            except (ValueError, KeyError, TypeError) as error:
                raise ResultsError(f"{path}, line {number}: no measurement: {error}") from error
            key += [line.get(name) for name in ("route", "variant", "peer", "peer_options")]
            found[json.dumps(key, sort_keys=True)] = line
    return list(found.values())


def _number(value: object) -> str:
    """Three digits, or what it is."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def table(columns: Sequence[Column], records: Sequence[Record]) -> Iterator[str]:
    """Markdown lines."""
    yield "| " + " | ".join(name for name, _ in columns) + " |"
    yield "|" + " --- |" * len(columns)
    for record in records:
        yield "| " + " | ".join(_number(get(record)) for _, get in columns) + " |"
    yield ""


def _shape(name: str) -> Callable[[Record], object]:
    return lambda record: record["shape"].get(name)


def _field(name: str) -> Callable[[Record], object]:
    return lambda record: record.get(name)


def _kernels(record: Record) -> str:
    return ", ".join(f"`{name}`" for name in record["kernels"])


def _way(record: Record) -> str:
    """Route and variant where they were asked for."""
    return " ".join(record[name] for name in ("route", "variant") if record.get(name, "auto") != "auto") or "auto"


def _spread(record: Record) -> str:
    median, low, high = (
        f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
        for value in (record["median_us"], record["p10_us"], record["p90_us"])
    )
    return f"{median} ({low} to {high})"


def _cost(record: Record) -> str | None:
    """What a step costs the host; without a spread where that was not measured."""
    host = record.get("host", {})
    if "cost_us" in host:
        low, middle, high = (f"{host[name]:.4g}" for name in ("cost_p10_us", "cost_us", "cost_p90_us"))
        return f"{middle} ({low} to {high})"
    return f"{host['encode_us'] + host['submit_us']:.4g}" if host else None


_SPREAD: Column = ("us (p10 to p90)", _spread)
_HEADS: list[Column] = [
    ("dtype", _field("dtype")),
    ("batch", _shape("batch")),
    ("heads", lambda r: f"{r['shape']['heads']}/{r['shape']['kv_heads']}"),
    ("head size", _shape("head_size")),
    ("new rows", _shape("rows")),
    ("past", _shape("past")),
]
_SECTIONS: list[tuple[str, str, str, list[Column]]] = [
    (
        "baseline.",
        "Baseline",
        "",
        [
            ("what", lambda r: r["benchmark"].partition(".")[2]),
            _SPREAD,
            ("GB/s", _field("gb_per_s")),
            ("TFLOP/s", _field("tflop_per_s")),
        ],
    ),
    (
        "attention.decode",
        "Attention, decode",
        "One layer. Bytes: both caches' valid rows once, queries and results once.",
        [
            *_HEADS, ("route", _way), _SPREAD, ("GB/s", _field("gb_per_s")),
            ("of copy", lambda r: _percent(r["copy_share"])), ("splits", _field("splits")), ("kernels", _kernels),
        ],
    ),
    (
        "attention.prefill",
        "Attention, prefill",
        "One layer, causal: operations of the keys that each row sees.",
        [
            *_HEADS, ("route", _way), _SPREAD, ("TFLOP/s", _field("tflop_per_s")),
            ("of fp32 rate", lambda r: _percent(r["matrix_share"])), ("kernels", _kernels),
        ],
    ),
    (
        "dispatch.",
        "Dispatches",
        "One dispatch: GPU time in a chain of dependent empty ones, or host time of encoding.",
        [("what", lambda r: r["benchmark"].partition(".")[2]), _SPREAD, ("dispatches", _shape("dispatches"))],
    ),
    (
        "decode_loop.",
        "Decoding",
        "Whole steps: wall time for steps, GPU time for a prefill.",
        [
            ("mode", lambda r: r["benchmark"].partition(".")[2]), ("dtype", _field("dtype")),
            ("layers", _shape("layers")), ("dim", _shape("dim")), ("rows", _shape("rows")), ("past", _shape("past")),
            _SPREAD, ("tokens/s", _field("tokens_per_s")),
            ("encode and submit us (p10 to p90)", _cost), ("wait us", lambda r: r.get("host", {}).get("wait_us")),
            ("GPU us", _field("gpu_us")), ("GPU busy", lambda r: _percent(r.get("gpu_busy"))),
            ("of copy", lambda r: _percent(r.get("gpu_copy_share"))), ("dispatches", _field("dispatches")),
        ],
    ),
    (
        "compare_ort.",
        "Beside ONNX Runtime",
        "One layer with its cache writes. Wall: slope over the number of layers of the wall time of many runs.",
        [
            ("who", lambda r: r.get("peer", "package")), *_HEADS,
            ("wall us", lambda r: r["median_us"] if r.get("clock") == "wall" else r.get("wall_us")),
            ("GPU us", lambda r: r["median_us"] if r.get("clock") == "gpu" else None),
        ],
    ),
]  # fmt: skip


def document(records: Sequence[Record], plot: str | None = None) -> str:
    """The whole page; `plot` is the plot's path as seen from it."""
    lines = [INTRODUCTION]
    if plot is not None:
        lines += [f"![Roofline of the attention kernels]({plot})", ""]
    for device in dict.fromkeys(record["device"] for record in records):
        own = [record for record in records if record["device"] == device]
        dates = sorted(str(record["date"])[:10] for record in own)
        period = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
        versions = ", ".join(
            f"{name} {' and '.join(sorted({r['versions'][name] for r in own}))}" for name in ("package", "wgpu")
        )
        drivers = " and ".join(sorted({f"{r['driver'] or 'driver unknown'} ({r['backend']})" for r in own}))
        lines += [f"## {device}", "", f"{drivers}; {versions}; {period}.", ""]
        for prefix, title, about, columns in _SECTIONS:
            part = [record for record in own if record["benchmark"].startswith(prefix)]
            if part:
                lines += [f"### {title}", "", *([about, ""] if about else []), *table(columns, part)]
    return "\n".join(lines)


def draw(axes: Any, records: Sequence[Record]) -> int:
    """Roofs and attention points of one device onto matplotlib axes; returns the number of points.

    x: operations a byte, y: TFLOP/s, both logarithmic. The roof of a device is min(x * bandwidth, rate), with the read
    bandwidth and the better fp32 rate as measured.
    """
    points = [r for r in records if r["benchmark"].startswith("attention.") and r["bytes"] and r["flops"]]
    if not points:
        return 0
    rates = [r["baseline"] for r in points]
    bandwidth = max(max(r["read_gb_per_s"], r["copy_gb_per_s"]) for r in rates)
    matrix = max(max(r["fma_tflop_per_s"], r["matmul_tflop_per_s"]) for r in rates)
    intensity = [r["flops"] / r["bytes"] for r in points]
    edge = matrix * 1000 / bandwidth
    low, high = min(*intensity, edge) / 2, max(*intensity, edge) * 2
    axes.plot([low, edge, high], [low * bandwidth / 1000, matrix, matrix], color="black", linewidth=1)
    groups: dict[str, list[tuple[float, float]]] = {}
    for x, r in zip(intensity, points, strict=True):
        kind = r["benchmark"].partition(".")[2]
        name = f"{kind} {r['dtype']} D{r['shape']['head_size']}" + ("" if _way(r) == "auto" else f" {_way(r)}")
        groups.setdefault(name, []).append((x, r["tflop_per_s"]))
    for name, found in groups.items():
        marker = "o" if name.startswith("decode") else "s"
        axes.scatter([x for x, _ in found], [y for _, y in found], label=name, marker=marker, s=18)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations a byte")
    axes.set_ylabel("TFLOP/s")
    axes.set_title(f"{points[0]['device']}: {bandwidth:,.0f} GB/s read, {matrix:.3g} TFLOP/s fp32", fontsize=9)
    axes.legend(fontsize=7)
    return len(points)


def save_plot(path: Path, records: Sequence[Record]) -> None:
    """One panel a device with attention lines, as SVG.

    Raises:
        ResultsError: matplotlib is missing, or there is nothing to plot.
    """
    try:
        matplotlib = importlib.import_module("matplotlib")
        matplotlib.use("svg")
        pyplot = importlib.import_module("matplotlib.pyplot")
    except ImportError as error:
        raise ResultsError(f"{error}: the plot needs matplotlib (pip install matplotlib)") from error
    timed = [record for record in records if record["benchmark"].startswith("attention.")]
    devices = list(dict.fromkeys(record["device"] for record in timed))
    if not devices:
        raise ResultsError("no line of benchmarks.attention: nothing to plot")
    matplotlib.rcParams["svg.hashsalt"] = "roofline"  # the same lines give the same file
    figure, panels = pyplot.subplots(len(devices), 1, figsize=(7, 4.5 * len(devices)), squeeze=False)
    for panel, device in zip(panels[:, 0], devices, strict=True):
        draw(panel, [record for record in timed if record["device"] == device])
    figure.tight_layout()
    figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 1 with a sentence where files, or matplotlib for the plot, are missing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "results", nargs="*", type=Path, help="files of JSON lines; default: benchmarks/results/*.jsonl"
    )
    parser.add_argument("--svg", type=Path, help="also write the plot to this file; the page refers to it by name")
    options = parser.parse_args(arguments)
    paths = options.results or sorted(RESULTS.glob("*.jsonl"))
    try:
        if not paths:
            raise ResultsError(f"no result files: neither given nor in {RESULTS}")
        records = load(paths)
        if options.svg is not None:
            save_plot(options.svg, records)
    except (ResultsError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(document(records, None if options.svg is None else options.svg.name))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
