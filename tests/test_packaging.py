"""The wheel, and running a program where only its run-time requirements are installed: no torch, no executorch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
import torch
from executorch.exir import to_edge_transform_and_lower
from packaging.requirements import Requirement

from executorch_webgpu.partitioner import WebGPUPartitioner

ROOT = Path(__file__).parents[1]
FOLDERS = sorted(path.parent.name for path in ROOT.glob("*/py.typed"))
DATA = ("*.wgsl", "*.fbs", "py.typed", "*.py")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources so that no build folder appears beside them."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    done = subprocess.run([*command, "--wheel-dir", str(out), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_holds_everything(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        f"executorch_webgpu/{path.relative_to(ROOT).as_posix()}"
        for folder in FOLDERS
        for pattern in DATA
        for path in (ROOT / folder).rglob(pattern)
    }
    assert any(name.endswith(".wgsl") for name in expected)
    assert any(name.endswith(".fbs") for name in expected)
    assert expected - names == set()
    assert {name for name in names if ".dist-info/" not in name} - expected == set()
    assert "executorch_webgpu/__init__.py" not in names
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_the_wheel_names_its_requirements(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        text = next(archive.read(name).decode() for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    requirements = [Requirement(line[15:]) for line in text.splitlines() if line.startswith("Requires-Dist: ")]
    always = {r.name for r in requirements if r.marker is None}
    assert always == {"wgpu", "numpy", "flatbuffers"}
    export = {r.name for r in requirements if r.marker and r.marker.evaluate({"extra": "export"})}
    assert {"torch", "executorch"} <= export


def needed(names: list[str], found: dict[str, Distribution]) -> dict[str, Distribution]:
    """The distributions of `names` and all that these need on this machine, without extras."""
    for name in names:
        if name not in found:
            found[name] = distribution(name)
            given = [Requirement(text) for text in found[name].requires or []]
            needed([r.name for r in given if r.marker is None or r.marker.evaluate({"extra": ""})], found)
    return found


@pytest.fixture(scope="module")
def bare_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment with the wheel, wgpu, numpy, flatbuffers and what those need."""
    home = tmp_path_factory.mktemp("bare") / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    query = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([python, "-c", query], capture_output=True, text=True, check=True).stdout.strip())
    zipfile.ZipFile(wheel).extractall(site)
    for dist in needed(["wgpu", "numpy", "flatbuffers"], {}).values():
        tops = {file.parts[0] for file in dist.files or () if file.parts[0] not in ("..", "__pycache__")}
        for top in tops:
            link = site / top
            if not link.exists():
                link.symlink_to(Path(str(dist.locate_file(top))))
    return python


def execute(python: Path, code: str, *arguments: str) -> str:
    """What `code` prints in the bare environment, run outside the repository."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [python, "-c", code, *arguments], capture_output=True, text=True, env=env, cwd=python.parent, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_runtime_needs_no_torch(bare_python: Path) -> None:
    code = """
import importlib.util, json, sys
missing = [name for name in ("torch", "executorch", "pip") if importlib.util.find_spec(name) is None]
import executorch_webgpu.runtime, executorch_webgpu.ops, executorch_webgpu.wgsl, executorch_webgpu.backend.serialize
executorch_webgpu.ops.load_all()
print(json.dumps([missing, executorch_webgpu.runtime.__file__]))
"""
    missing, path = json.loads(execute(bare_python, code))
    assert missing == ["torch", "executorch", "pip"]
    assert Path(path).is_relative_to(bare_python.parents[1])


class Tiny(torch.nn.Module):  # type: ignore[misc]
    """A linear layer, a nonlinearity and a reduction: weights, kernels of three families, one delegate."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(12, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(torch.sigmoid(self.linear(x)) * 3.0, dim=-1)


def test_a_program_runs_without_torch(bare_python: Path, tmp_path: Path) -> None:
    module, x = Tiny().eval(), torch.linspace(-2, 2, 36).reshape(3, 12)
    edge = to_edge_transform_and_lower(torch.export.export(module, (x,)), partitioner=[WebGPUPartitioner()])
    program = tmp_path / "tiny.pte"
    program.write_bytes(edge.to_executorch().buffer)
    code = """
import json, sys
import numpy as np
from executorch_webgpu.runtime import Runtime
method = Runtime.get().load_program(sys.argv[1]).load_method("forward")
(out,) = method.execute([np.linspace(-2, 2, 36, dtype=np.float32).reshape(3, 12)])
print(json.dumps([out.tolist(), "torch" in sys.modules]))
"""
    out, imported = json.loads(execute(bare_python, code, str(program)))
    assert not imported
    torch.testing.assert_close(torch.tensor(out), module(x).detach(), rtol=1e-5, atol=1e-6)
