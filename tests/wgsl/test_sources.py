"""Rules for every `.wgsl` file, checked on the text alone; running them and tint.py show that the variants compile."""

from __future__ import annotations

import ast
import re
from functools import cache
from importlib import resources
from itertools import takewhile
from pathlib import Path

import pytest

from executorch_webgpu import wgsl
from executorch_webgpu.runtime.gpu.kernel import KernelKey
from tests.wgsl import variants

ROOT = Path(__file__).parents[2]
FILES = sorted(path.stem for path in (ROOT / "wgsl").glob("*.wgsl"))
KERNELS = wgsl.kernels()
COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)


def code(name: str) -> str:
    """The text of a file without its comments."""
    return COMMENT.sub("", wgsl.source(name))


def head(name: str) -> str:
    """The comment that a file starts with, without its slashes."""
    lines = takewhile(lambda line: line.startswith("//"), wgsl.source(name).splitlines())
    return "\n".join(line.strip("/ ") for line in lines)


@cache
def operator_strings() -> frozenset[str]:
    """All string literals of the modules that name kernels, pieces of f-strings too."""
    found: set[str] = set()
    for path in (*(ROOT / "ops").rglob("*.py"), *(ROOT / "runtime").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return frozenset(found)


def test_package_data_is_the_folder() -> None:
    folder = resources.files(wgsl.__name__)
    assert sorted(item.name[:-5] for item in folder.iterdir() if item.name.endswith(".wgsl")) == FILES
    assert set(KERNELS) <= set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_head_comment(name: str) -> None:
    """A file starts with a comment: what it computes, what a workgroup does, memory traffic, what was tried."""
    assert len([line for line in head(name).splitlines() if line]) >= 2
    assert len(head(name)) >= 80


@pytest.mark.parametrize("name", FILES)
def test_plain_text(name: str) -> None:
    """A file is WGSL as it stands: no template marks, no `enable` lines, nothing that only some variants may use."""
    text = wgsl.source(name)
    assert text.isascii()
    assert not re.search(r"\{\{|\}\}|\{%|%\}|\$\{|<%|^\s*#|@@\w+@@", text, re.M)
    assert not re.search(r"^\s*(enable|requires)\b", code(name), re.M), "compose puts these lines before the text"
    assert not re.search(r"\bf16\b|\d+\.?\d*h\b", code(name)), "half precision comes in through an alias"
    if re.search(r"\b(subgroup|quad[A-Z])", code(name)):
        assert "subgroup" in head(name), "the head says that the device needs subgroups"


@pytest.mark.parametrize("name", KERNELS)
def test_interface(name: str) -> None:
    """What the host reflects is what the text declares, within WebGPU's default limits."""
    interface = wgsl.reflect(name)
    text = code(name)
    assert re.findall(r"@(?:compute|vertex|fragment)\b", text) == ["@compute"]
    assert re.search(r"@compute\s+@workgroup_size\([^@]*\)\s*fn\s+main\s*\(", text), "the entry point is main"
    assert len(re.findall(r"@binding\(", text)) == len(interface.bindings)
    assert sorted(b.index for b in interface.bindings.values()) == list(range(len(interface.bindings)))
    storage = sum(b.space == "storage" for b in interface.bindings.values())
    assert storage <= 8 or "more than 8 storage buffers" in head(name), "the head says what limit a device must have"
    assert sum(b.space == "uniform" for b in interface.bindings.values()) <= 12
    assert any(b.writes for b in interface.bindings.values())
    assert ("params" in interface.bindings) == bool(interface.params)
    assert len(re.findall(r"\boverride\s+\w+", text)) == len(interface.overrides)


@pytest.mark.parametrize("name", KERNELS)
def test_workgroup_size(name: str) -> None:
    """Literals, overrides with a default, or constants of the variant; literals and defaults give at most 256."""
    text = code(name)
    size = re.search(r"@workgroup_size\(([^@]*?)\)\s*fn", text)
    assert size
    defaults = dict(re.findall(r"\b(?:override|const)\s+(\w+)\s*(?::\s*\w+\s*)?=\s*(\d+)u?\s*;", text))
    total = 1
    for factor in re.split(r"[,*]", size[1]):
        factor = factor.strip()
        if not factor:
            continue
        number = defaults.get(factor, factor)
        literal = re.fullmatch(r"(\d+)u?", number)
        assert literal or re.fullmatch(r"[A-Z][A-Z0-9_]*", number), f"{factor}: a number or a NAME"
        total *= int(literal[1]) if literal else 1
    assert 1 <= total <= 256


@pytest.mark.parametrize("name", FILES)
def test_an_operator_uses_it(name: str) -> None:
    strings = operator_strings()
    split = any(name[: i + 1] in strings and name[i + 1 :] in strings for i, letter in enumerate(name) if letter == "_")
    assert name in strings or split, f"no module of ops/ or runtime/ names {name}.wgsl"


def test_recordings_come_back(tmp_path: Path) -> None:
    """Variants survive saving and loading, with the smallest limits seen; those of a changed shader file do not."""
    name = FILES[0]
    plain = KernelKey(name, (), (), (), "")
    rich = KernelKey(name, (("SCALE", 0.5), ("WG", 64)), (("FLAG", True),), (("T", "f32"),), "fn f() {}")
    variants.save(tmp_path, "tests/ops/test_a.py", {plain: (256, 16384)}, replace=True)
    variants.save(tmp_path, "tests/ops/test_a.py", {plain: (1024, 32768), rich: (1024, 32768)}, replace=False)
    variants.save(tmp_path, "tests/ops/test_b.py", {rich: (512, 32768)}, replace=True)
    found, origin = variants.load(tmp_path)
    assert found == {plain: (256, 16384), rich: (512, 32768)}
    assert origin == {plain: "tests.ops.test_a", rich: "tests.ops.test_a"}
    packed = variants.pack(found)
    assert variants.unpack(packed) == found
    packed["sources"] = {name: "the hash of another text"}
    assert variants.unpack(packed) == {}
    variants.save(tmp_path, "tests/ops/test_a.py", {}, replace=True)
    variants.save(tmp_path, "tests/ops/test_b.py", {}, replace=False)
    assert set(variants.load(tmp_path)[1].values()) == {"tests.ops.test_b"}


def test_f16_is_asked_for_by_code_alone() -> None:
    """A device without it refuses the whole shader, so a comment of a part that names it must not count."""
    assert "enable f16;" not in wgsl.compose("gemv_stream", {}, {"X": "vec4<f32>"}, "// or gemv_stream_f16.wgsl: f16\n")
    assert "enable f16;" in wgsl.compose("gemv_stream", {}, {"X": "vec4<f16>"})
    assert "enable f16;" in wgsl.compose("gemv_stream", {}, {"X": "vec4<f32>"}, "fn one() -> f16 { return f16(1); }\n")
