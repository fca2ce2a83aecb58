"""Recorded shader variants: `build/variants/<test file>.json`, written by tests/conftest.py, read by tint.py.

A file lists the variants that the tests of one test file compiled, each with the limits of the smallest device that
took it. Variants of a shader file that has changed since are left out on reading: they say nothing about the new text.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from executorch_webgpu import wgsl
from executorch_webgpu.runtime.gpu.kernel import KernelKey

FOLDER = Path("build") / "variants"

Needs = tuple[int, int]
"""Limits of a device: invocations of a workgroup, bytes of workgroup memory."""
Variants = dict[KernelKey, Needs]
Packed = dict[str, Any]
"""Plain lists, dicts, strings and numbers, as JSON and xdist take them: bodies stand once, variants refer to them."""


def add(to: Variants, keys: Mapping[KernelKey, Needs]) -> None:
    """Merge variants into `to`, keeping the smallest limits of each."""
    for key, needs in keys.items():
        to[key] = min(needs, to.get(key, needs))


def _hash(kernel: str) -> str:
    try:
        return hashlib.sha256(wgsl.source(kernel).encode()).hexdigest()[:16]
    except FileNotFoundError:
        return ""


def pack(recorded: Mapping[KernelKey, Needs]) -> Packed:
    """The variants as plain data, in a fixed order."""
    keys = sorted(recorded, key=repr)
    bodies = sorted({key.body for key in keys})
    place = {body: index for index, body in enumerate(bodies)}
    rows = [
        [key.kernel, dict(key.overrides), dict(key.consts), dict(key.types), place[key.body], *recorded[key]]
        for key in keys
    ]
    sources = {name: _hash(name) for name in sorted({key.kernel for key in keys})}
    return {"sources": sources, "bodies": bodies, "variants": rows}


def _pairs(group: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(group.items()))


def unpack(data: Packed) -> Variants:
    """The variants whose shader file is still the one that was recorded."""
    current = {name for name, text in data["sources"].items() if _hash(name) == text}
    found: Variants = {}
    for kernel, overrides, consts, types, body, *needs in data["variants"]:
        if kernel in current:
            key = KernelKey(kernel, _pairs(overrides), _pairs(consts), _pairs(types), data["bodies"][body])
            found[key] = (needs[0], needs[1])
    return found


def save(root: Path, test: str, recorded: Variants, replace: bool) -> None:
    """Write the variants of one test file, or add them to what is there."""
    path = root / FOLDER / (test.removesuffix(".py").replace("/", ".").replace("\\", ".") + ".json")
    together = dict(recorded)
    if not replace and path.exists():
        add(together, unpack(json.loads(path.read_text(encoding="utf-8"))))
    if not together:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(pack(together), separators=(",", ":")), encoding="utf-8")
    part.replace(path)


def load(root: Path) -> tuple[Variants, dict[KernelKey, str]]:
    """All recorded variants, and for each the name of a recording that has it."""
    found: Variants = {}
    origin: dict[KernelKey, str] = {}
    for path in sorted((root / FOLDER).glob("*.json")):
        here = unpack(json.loads(path.read_text(encoding="utf-8")))
        add(found, here)
        origin.update({key: path.stem for key in here if key not in origin})
    return found, origin


def unrecorded(keys: Iterable[KernelKey]) -> list[str]:
    """Names of `.wgsl` files of the package that no variant uses: as the kernel, or as a part appended to one."""
    keys = list(keys)
    folder = resources.files(wgsl.__name__)
    names = sorted(item.name.removesuffix(".wgsl") for item in folder.iterdir() if item.name.endswith(".wgsl"))
    used = {key.kernel for key in keys}
    bodies = {key.body for key in keys}
    return [n for n in names if n not in used and not any(wgsl.source(n).strip() in body for body in bodies)]
