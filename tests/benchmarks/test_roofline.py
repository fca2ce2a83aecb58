"""Tables and the plot that are made of benchmark results."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import roofline
from benchmarks.graphs import AttentionShape

Line = dict[str, Any]
SHAPE = AttentionShape(1, 4, 2, 16, 1, 40)


def _line(**changes: Any) -> Line:
    shape = SHAPE.record()
    made: Line = {
        "benchmark": "attention.decode", "device": "card", "driver": "1.0", "backend": "Vulkan",
        "versions": {"package": "0", "wgpu": "1", "numpy": "2"}, "date": "2026-01-02T00:00:00+00:00", "shape": shape,
        "dtype": "f16", "median_us": 12.5, "p10_us": 12.0, "p90_us": 13.0, "bytes": 4_000_000, "flops": 8_000_000,
        "gb_per_s": 320.0, "tflop_per_s": 0.64, "copy_share": 0.5, "matrix_share": 0.25, "kernels": ["attention_x"],
        "splits": 9, "route": "auto", "variant": "auto",
        "baseline": {"copy_gb_per_s": 640.0, "read_gb_per_s": 700.0, "matmul_tflop_per_s": 2.0,
                     "fma_tflop_per_s": 2.56, "dispatch_us": 1.0},
    }  # fmt: skip
    return {**made, **changes}


def test_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        _line(median_us=99.0),
        _line(),
        _line(variant="b", median_us=7.0),
        _line(benchmark="attention.prefill", device="other card", date="2026-01-03T00:00:00+00:00"),
        _line(benchmark="compare_ort.peer", peer="onnxruntime 1", clock="wall"),
    ]
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert roofline.main([str(file)]) == 0
    text = capsys.readouterr().out
    assert text.index("## card") < text.index("### Attention, decode") < text.index("## other card")
    assert "12.5 (12 to 13)" in text
    assert "99" not in text  # measured again since
    assert "| b | 7 (12 to 13) | 320 | 50 % | 9 | `attention_x` |" in text
    assert "25 %" in text
    assert "onnxruntime 1" in text
    widths = {row.count("|") for row in text.split("### Attention, decode")[1].split("###")[0].splitlines() if row}
    assert len(widths - {0}) == 1


class _Axes:
    """Records what is drawn."""

    def __init__(self) -> None:
        self.points: list[tuple[float, float]] = []
        self.lines: list[Any] = []

    def plot(self, x: list[float], y: list[float], **_: Any) -> None:
        self.lines.append((x, y))

    def scatter(self, x: list[float], y: list[float], **_: Any) -> None:
        self.points += zip(x, y, strict=True)

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


def test_the_plot_holds_every_point_under_the_measured_roof() -> None:
    axes = _Axes()
    lines = [_line(), _line(benchmark="attention.prefill", flops=80_000_000, tflop_per_s=2.0), _line(benchmark="x.y")]
    assert roofline.draw(axes, lines) == 2
    assert sorted(axes.points) == [(2.0, 0.64), (20.0, 2.0)]
    [(x, y)] = axes.lines
    assert y[1:] == [2.56, 2.56]
    assert x[1] == pytest.approx(2560 / 700)
    assert y[0] == pytest.approx(x[0] * 0.7)


@pytest.mark.parametrize("text", ["{", "[]", '{"benchmark": "x"}'])
def test_a_bad_result_file(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(text)
    assert roofline.main([str(file)]) == 1
    assert "bad.jsonl, line 1" in capsys.readouterr().err


def test_a_file_that_is_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "model.pte"
    file.write_bytes(b"\x98\xff")
    assert roofline.main([str(file)]) == 1
    assert "model.pte: no lines of text" in capsys.readouterr().err


def test_the_plot_says_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(_line()))
    assert roofline.main([str(file), "--svg", str(tmp_path / "plot.svg")]) == 1
    assert "pip install matplotlib" in capsys.readouterr().err
    assert not (tmp_path / "plot.svg").exists()
