"""Regenerate `webgpu_graph_generated.py` with the `flatc` that the executorch wheel brings."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
GENERATED = "webgpu_graph_generated.py"


def flatc() -> Path:
    """The FlatBuffers compiler of the executorch wheel (FileNotFoundError without it)."""
    import executorch.data.bin

    path = Path(next(iter(executorch.data.bin.__path__))) / "flatc"
    if not path.exists():
        raise FileNotFoundError(f"no flatc at {path}; install executorch")
    return path


def generate() -> str:
    """The generated Python code for the schema as it stands."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--python", "--gen-onefile", "--gen-object-api", "-o", folder]
        command = [str(flatc()), *options, str(HERE / "webgpu_graph.fbs")]
        subprocess.run(command, check=True, capture_output=True)
        return (Path(folder) / GENERATED).read_text(encoding="utf-8")


if __name__ == "__main__":
    (HERE / GENERATED).write_text(generate(), encoding="utf-8")
    sys.stdout.write(f"wrote {HERE / GENERATED}\n")
