"""The benchmark of loading, in a tiny configuration."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import loading, report
from executorch_webgpu.runtime.gpu import upload
from executorch_webgpu.runtime.gpu.device import Device
from tests.harness import device


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_lines(dtype: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["--bytes", "5000000", "--runs", "2", "--dtype", dtype, "--folder", str(tmp_path)]
    assert loading.main(arguments) == 0
    lines = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    assert [line["cached"] for line in lines] == [True, False]
    for line in lines:
        assert set(report.FIELDS) <= set(line)
        assert (line["benchmark"], line["shape"], line["dtype"]) == ("loading", {"bytes": 5_000_000}, dtype)
        assert line["times_reading"] == pytest.approx(line["median_us"] / line["read_us"], rel=1e-2)
        assert line["file_gb_per_s"] == pytest.approx(5e6 / line["median_us"] / 1e3, rel=1e-2)
        assert 0 <= line["peak_host_bytes"] < 1 << 30
    assert list(tmp_path.iterdir()) == []


def test_what_is_loaded_is_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "TENSOR_BYTES", 1 << 16)
    monkeypatch.setattr(upload, "SMALL", 1 << 10)
    on, path, found = device("full"), tmp_path / "weights", []
    loading.write_random(path, 300_000)
    release = Device.release

    def released(self: Device, buffer: object, purpose: str) -> None:
        if purpose == "weights":
            found.append(bytes(on.gpu.queue.read_buffer(buffer)))
        release(self, buffer, purpose)

    monkeypatch.setattr(Device, "release", released)
    seconds, _ = loading.load(on, path, "f16")
    assert seconds > 0
    rows = 300_000 // (2 * loading.WIDTH) * 2 * loading.WIDTH
    assert b"".join(found) == path.read_bytes()[:rows]
    assert len(found) == 5
    assert len(np.unique(np.frombuffer(found[0], np.uint8))) == 256
