"""`benchmarks.sessions` on a tiny program."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import sessions
from executorch_webgpu.runtime import Runtime
from tests import tiny_states
from tests.harness import device


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(Runtime, "_instance", Runtime(device("full")))
    path = tmp_path / "long.pte"
    path.write_bytes(tiny_states.build("long"))
    return str(path)


def test_generators_in_turns(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert sessions.main([model, "--generators", "8", "--steps", "30", "--together", "12"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["generator"] for line in lines] == list(range(8))
    assert all(line["steps"] == 30 for line in lines)
    assert len({line["gpu_bytes"] for line in lines}) == 1


def test_growth_is_found(model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    kept: list[object] = []
    close = sessions.Generator.close

    def leak(self: sessions.Generator) -> None:
        kept.append(self.method.new_state())
        close(self)

    monkeypatch.setattr(sessions.Generator, "close", leak)
    assert sessions.main([model, "--generators", "4", "--steps", "2"]) == 1
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_drafts_are_compared(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert sessions.main([model, "--speculate", "4", "--tokens", "20", "--repetitions", "1"]) == 0
    plain, drafted = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert plain["tokens"] == drafted["tokens"] == 20
    assert drafted["equal"]
    assert drafted["tokens_per_second"] > 0
