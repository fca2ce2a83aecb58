"""Real exports from beginning to end, each in a process of its own: one delegate, nothing outside, right logits.

A cross section of the catalogue; `python -m tests.models.verify all` runs every configuration (docs/CONFIGURATIONS.md).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models.verify import Report

ROOT = Path(__file__).resolve().parents[2]
CASES = [
    ("bare_fused_fp32_dynamic_cache_returned", "B", "default-limits"),
    ("bare_split_fp32_dynamic_two_positions", "A", "full"),
    ("et_llama3_2_fp16_dynamic_custom", "B", "full"),
    ("et_qwen2_5_fp32_dynamic_custom", "A", "full"),
    ("et_phi_4_mini_fp32_dynamic_plain", "B", "default-limits"),
    ("et_llama3_2_fp32_dynamic_custom_ring", "B", "full"),
    ("hf_qwen3_fp32_dynamic_custom", "B", "full"),
    ("hf_llama_fp16_dynamic_plain", "B", "default-limits"),
    ("hf_granite_bf16_dynamic_custom", "B", "full"),
    ("et_llama3_2_fp16_dynamic_custom_4w", "A", "full"),
    ("hf_qwen3_fp32_dynamic_custom_8w_e8", "B", "default-limits"),
]


@pytest.mark.parametrize(("name", "route", "limits"), CASES, ids=[f"{n}-{r}-{d}" for n, r, d in CASES])
def test_export_lowers_to_one_delegate_with_right_logits(name: str, route: str, limits: str, tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    command = [sys.executable, "-m", "tests.models.verify", name, "--route", route, "--device", limits]
    done = subprocess.run(
        [*command, "--results", str(results)], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )
    assert results.exists(), done.stderr[-2000:]
    row = json.loads(results.read_text(encoding="utf-8"))
    row.pop("limits"), row.pop("passed")
    report = Report(**row)
    assert report.passed, report.line()
    assert done.returncode == 0
