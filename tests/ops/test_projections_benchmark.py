"""benchmarks/projections.py in a tiny configuration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import projections

TINY = (
    "--divide 64 --samples 2 --warm-up 0.01 --pass-ms 0.1 --baseline-bytes 200000 --matrix-size 16 --rotate-bytes 3000"
)


@pytest.mark.parametrize(("weights", "dtype", "digits"), [("4bit", "f16", 2), ("8bit", "f32", 3), ("f16", "f16", None)])
def test_lines(weights: str, dtype: str, digits: int | None, tmp_path: Path) -> None:
    out = tmp_path / "projections.jsonl"
    options = [*TINY.split(), "--rows", "1,2", "--only", "output,qkv", "--weights", weights, "--dtype", dtype]
    assert projections.main([*options, "--out", str(out)]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["shape"]["rows"] for line in lines] == [1, 2, 1, 2]
    assert [line["shape"]["projection"] for line in lines] == ["output"] * 2 + ["qkv"] * 2
    for line in lines:
        assert len(line["kernels"]) == 1
        assert line["kernels"][0].startswith("gemv_stream")
        assert line["consts"][0].get("DIGITS") == digits
        assert line["median_us"] > 0
    assert lines[0]["bytes"] == {"4bit": 32 * 32, "8bit": 32 * 48, "f16": 32 * 64}[weights]
