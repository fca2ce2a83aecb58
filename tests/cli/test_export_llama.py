"""examples/export_llama.py: a Llama from ExecuTorch's own export, small without its weights, timed without them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from examples.export_llama import SHAPES, export, setting
from executorch_webgpu.cli.commands import cli
from executorch_webgpu.runtime import Runtime
from tests.harness import device

CONTEXT, LONGEST = 48, 16


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("llama")
    path, outside = export(
        folder / "tiny.pte", SHAPES["tiny"], folder / "tiny.ptd", dtype="fp16", context=CONTEXT, longest=LONGEST
    )
    assert outside == []
    return path, folder / "tiny.ptd"


def test_the_program_is_small_and_is_timed_without_weights(files: tuple[Path, Path]) -> None:
    assert files[0].stat().st_size < 64 << 10 < files[1].stat().st_size
    args = ("--random-weights", "--prefill", "20", "--decode", "4", "--depth", "40", "--warm-up", "0")
    result = CliRunner().invoke(cli, ["bench", str(files[0]), *args, "--repetitions", "1", "--json", "-"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["settings"]["random_weights"] > 20
    assert (found["decoder"]["capacity"], found["decoder"]["chunk"]) == (CONTEXT, LONGEST)
    assert found["decoder"]["one_step_at_a_time"] is None


def test_the_weights_that_were_written_fit(files: tuple[Path, Path]) -> None:
    with Runtime(device("full")).load_program(files[0], files[1]) as program:
        method = program.load_method()
        [logits] = method.execute([np.arange(5)[None], np.array([0])])
        assert logits.shape == (1, SHAPES["tiny"]["vocab_size"])
        assert np.isfinite(logits).all()
        assert logits.astype(np.float32).std() > 0.1  # weights that keep the variance do not die out
        stored = [v for d in method.delegates for v in d.graph.values if v.kind == "constant"]
        tied = {v.name: v.data for v in stored}
        assert "output.weight" not in tied or tied["output.weight"] == tied["tok_embeddings.weight"]


def test_settings() -> None:
    assert setting("quantization.qmode=4w") == ("quantization.qmode", "4w")
    assert setting("quantization.group_size=32") == ("quantization.group_size", 32)
    assert setting("quantization.use_hqq=false") == ("quantization.use_hqq", False)
    with pytest.raises(argparse.ArgumentTypeError, match="is not NAME=VALUE"):
        setting("quantization.qmode")


def test_unknown_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown LlmConfig setting 'quantization\.mode'"):
        export(tmp_path / "x.pte", SHAPES["tiny"], options={"quantization.mode": 4})
