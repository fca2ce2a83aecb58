"""benchmarks/gemm.py in a tiny configuration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import gemm
from benchmarks.graphs import Loaded
from benchmarks.verify import WrongResultError
from tests.harness import device

TINY = (
    "--rows 20,40 --outputs 36 --inputs 24 --samples 2 --warm-up 0.01 --pass-ms 0.1 --baseline-bytes 200000 "
    "--matrix-size 16 --rotate-bytes 4000 --verify"
)


@pytest.mark.parametrize("layout", ["nk", "kn"])
def test_lines(layout: str, tmp_path: Path) -> None:
    out = tmp_path / "gemm.jsonl"
    assert gemm.main([*TINY.split(), "--layout", layout, "--out", str(out)]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["shape"]["rows"] for line in lines] == [20, 40]
    for line in lines:
        assert line["benchmark"] == "gemm"
        assert line["kernels"] == ["gemm"]
        assert line["flops"] == 2 * line["shape"]["rows"] * 36 * 24
        assert line["median_us"] > 0
        assert line["weights"] == 3
        assert 0 <= line["largest_error"] <= 1e-5


def test_wrong_results_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A result that is compared with other weights."""
    shape = gemm.GemmShape(20, 36, 24)
    assert gemm.verify(device("full"), shape) <= 1e-5
    stored = Loaded.stored
    monkeypatch.setattr(Loaded, "stored", lambda loaded, name: stored(loaded, name) * (1.001 if name == "w" else 1))
    with pytest.raises(WrongResultError, match="error"):
        gemm.verify(device("full"), shape)
