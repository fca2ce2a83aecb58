"""Fixtures of several test files of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Paths of all programs of `programs.BUILDERS` by name; external weights lie next to external.pte."""
    from tests.runtime.programs import BUILDERS

    folder = tmp_path_factory.mktemp("programs")
    return {name: build(folder) for name, build in BUILDERS.items()}


@pytest.fixture(scope="session")
def ptd_path(programs: dict[str, Path]) -> Path:
    (path,) = programs["external"].parent.glob("*.ptd")
    return path
