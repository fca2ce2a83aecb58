"""Who may import what, read from the syntax trees; see docs/ARCHITECTURE.md."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = sorted(path.parent.name for path in ROOT.glob("*/py.typed"))
MODULES = sorted(path.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

ALLOWED = {
    "torch": ("backend/translate.py", "backend/symbols.py", "backend/preprocess.py", "partitioner/", "llm/"),
    "executorch": ("backend/preprocess.py", "backend/schema/__main__.py", "partitioner/", "llm/"),
    "wgpu": ("runtime/",),
    "llvmlite": ("runtime/gpu/compiled_loop.py",),
}
"""Library -> the only files (or folders) that import it."""

DYNAMIC = {"torch": (*ALLOWED["torch"], "runtime/methods/outside.py", "runtime/gpu/host.py")}
"""Library -> where it may be reached through importlib or sys.modules: used when the caller has it, never needed."""

EXPORT_ONLY = ("backend.translate", "backend.symbols", "backend.preprocess", "partitioner", "llm")
"""Modules that need torch, which what runs programs must therefore not import."""


def tree(module: str) -> ast.Module:
    return ast.parse((ROOT / module).read_text(encoding="utf-8"))


def imports(module: str) -> Iterator[str]:
    """Dotted names of all that a module imports anywhere in it; relative ones from the package's folders on."""
    package = list(Path(module).parent.parts)
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module.split(".") if node.module else []
            if node.level:
                base = package[: len(package) - node.level + 1] + base
            yield from (".".join([*base, alias.name]) for alias in node.names)


def dynamic(module: str) -> Iterator[str]:
    """Library names in `import_module("x")`, `find_spec("x")`, `modules.get("x")`, `modules["x"]` and the like."""
    for node in ast.walk(tree(module)):
        found: ast.expr | None = None
        if isinstance(node, ast.Call) and node.args:
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            owner = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
            if name in ("import_module", "__import__", "find_spec", "import_") or owner.endswith("modules"):
                found = node.args[0]
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("sys.modules"):
            found = node.slice
        if isinstance(found, ast.Constant) and isinstance(found.value, str):
            yield found.value


def outside(found: Iterator[str], module: str, allowed: dict[str, tuple[str, ...]]) -> list[str]:
    """The restricted names among `found` that `module` may not use."""
    libraries = {name.partition(".")[0] for name in found} & set(ALLOWED)
    return sorted(name for name in libraries if not module.startswith(allowed.get(name, ALLOWED[name])))


def test_packages_are_found() -> None:
    assert {"backend", "ops", "partitioner", "runtime", "wgsl"} <= set(PACKAGES)
    assert len(MODULES) > 30


@pytest.mark.parametrize("module", MODULES)
def test_imports(module: str) -> None:
    assert outside(imports(module), module, ALLOWED) == []
    assert outside(dynamic(module), module, ALLOWED | DYNAMIC) == []


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith(("runtime/", "ops/", "wgsl/"))])
def test_running_needs_no_export_code(module: str) -> None:
    names = [name.removeprefix("executorch_webgpu.") for name in imports(module)]
    assert [name for name in names if f"{name}.".startswith(tuple(f"{part}." for part in EXPORT_ONLY))] == []


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith(("ops/", "wgsl/", "backend/"))])
def test_records_do_not_know_the_runtime(module: str) -> None:
    names = [name.removeprefix("executorch_webgpu.") for name in imports(module)]
    assert [name for name in names if name.partition(".")[0] in ("runtime", "cli", "llm")] == []


LAYERS = ("files", "gpu", "methods", "decoding", "batches")
"""Folders of the runtime, each of which imports only those before it."""


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("runtime/") and name.count("/") == 2])
def test_layers_of_the_runtime(module: str) -> None:
    folder = module.split("/")[1]
    below = set(LAYERS[: LAYERS.index(folder) + 1]) - ({"files"} if folder == "gpu" else set())
    used = {name.split(".")[1] for name in imports(module) if name.startswith("runtime.")}
    assert used - below <= {"errors"}


def test_relative_imports_inside_the_package() -> None:
    absolute = {module: [n for n in imports(module) if n.startswith("executorch_webgpu")] for module in MODULES}
    assert {module: names for module, names in absolute.items() if names} == {}


def test_no_module_is_named_like_one_of_the_standard_library() -> None:
    names = {module: Path(module).stem for module in MODULES} | {package: package for package in PACKAGES}
    assert [module for module, name in names.items() if name in sys.stdlib_module_names] == []


def test_the_root_is_no_package() -> None:
    assert not (ROOT / "__init__.py").exists()
    assert [module for module in MODULES if not (ROOT / module).with_name("__init__.py").exists()] == []
