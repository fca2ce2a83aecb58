"""Package layout: each top-level folder is the sub-package `executorch_webgpu.<folder>`.

The import package is a namespace without an `__init__.py` of its own: the repository root stays free of package files.
"""

from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
FOLDERS = ("backend", "cli", "llm", "ops", "partitioner", "runtime", "wgsl")


def packages() -> dict[str, str]:
    """Map each package name to its folder, sub-packages included."""
    found: dict[str, str] = {}
    for folder in FOLDERS:
        for init in sorted((ROOT / folder).rglob("__init__.py")):
            relative = init.parent.relative_to(ROOT)
            found["executorch_webgpu." + ".".join(relative.parts)] = str(relative)
    return found


PACKAGES = packages()
setup(
    packages=list(PACKAGES),
    package_dir=PACKAGES,
    package_data={
        "": ["py.typed"],
        "executorch_webgpu.wgsl": ["*.wgsl"],
        "executorch_webgpu.backend.schema": ["*.fbs"],
    },
)
