"""Data files of random weights: readable by this package and by ExecuTorch, and what a program lacks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import data_file, loading
from executorch_webgpu.runtime import Program, Runtime
from executorch_webgpu.runtime.files import pte
from tests import tiny_decoder
from tests.harness import device

SIZES = {"first": 1, "second": 4096, "third": 70_001, "empty": 0}


def test_both_readers_find_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from executorch.extension.flat_tensor.serialize.serialize import FlatTensorSerializer

    monkeypatch.setattr(data_file, "PIECE", 4098)
    path = tmp_path / "w.ptd"
    size = data_file.write(path, SIZES)
    assert size == path.stat().st_size
    ours = pte.DataFile(path)
    theirs = FlatTensorSerializer().deserialize(path.read_bytes())
    assert set(ours.keys()) == set(theirs.named_data) == set(SIZES)
    for key, length in SIZES.items():
        content = bytes(ours.named_data(key))
        assert len(content) == length
        assert bytes(theirs.buffers[theirs.named_data[key].buffer_index]) == content
        if length > 1000:
            for dtype in (np.float16, np.float32):
                numbers = np.frombuffer(content[: length // 4 * 4], dtype)
                assert np.isfinite(numbers).all()
                assert len(np.unique(numbers)) > 500


def test_a_program_is_loaded_with_what_it_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = tiny_decoder.build("llama", external=True)
    path = tmp_path / "model.pte"
    path.write_bytes(tiny.pte)
    sizes = data_file.missing(path)
    assert sizes
    assert set(sizes) == set(pte.DataFile(tiny.data).keys())
    assert loading.main(["--program", str(path), "--runs", "2", "--folder", str(tmp_path)]) == 0
    lines = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    assert [line["cached"] for line in lines] == [True, False]
    for line in lines:
        assert line["shape"]["program"] == "model.pte"
        assert line["shape"]["bytes"] >= sum(sizes.values())
    data_file.write(tmp_path / "w.ptd", sizes)
    on = device("full")
    before = on.memory.total
    seconds, _ = loading.load_program(on, path, tmp_path / "w.ptd")
    assert seconds > 0
    assert on.memory.total == before
    with Runtime(on).load_program(path, tmp_path / "w.ptd") as program:
        assert isinstance(program, Program)
        assert program.load_method("forward").delegates


def test_a_program_with_its_weights_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.pte"
    path.write_bytes(tiny_decoder.build("llama").pte)
    assert data_file.missing(path) == {}
    with pytest.raises(SystemExit):
        loading.main(["--program", str(path)])
    assert "lacks no weights" in capsys.readouterr().err
