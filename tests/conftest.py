"""Records every shader variant that the tests compile, for `python -m tests.wgsl.tint` (see tests/wgsl/variants.py)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from executorch_webgpu.runtime.gpu.device import Device
from executorch_webgpu.runtime.gpu.kernel import Kernel, KernelKey
from tests.wgsl import variants

_recorded: dict[str, variants.Variants] = {}
"""Variants by the test file that asked for them; on an xdist controller, those of all workers."""
_partial: set[str] = set()
"""Test files of which this session ran only some tests."""
_collected: set[str] = set()
_compile = Device.kernel


def _kernel(self: Device, key: KernelKey) -> Kernel:
    kernel = _compile(self, key)
    test = os.environ.get("PYTEST_CURRENT_TEST", "").partition("::")[0]
    if test:
        needs = (self.limits.max_invocations, self.limits.max_workgroup_memory)
        variants.add(_recorded.setdefault(test, {}), {key: needs})
    return kernel


def pytest_configure() -> None:
    Device.kernel = _kernel  # type: ignore[method-assign]


def pytest_unconfigure() -> None:
    Device.kernel = _compile  # type: ignore[method-assign]


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    _partial.update(item.nodeid.partition("::")[0] for item in items)


def pytest_collection_finish(session: pytest.Session) -> None:
    _collected.update(item.nodeid.partition("::")[0] for item in session.items)
    if any("::" in argument for argument in session.config.args):
        _partial.update(_collected)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """On an xdist controller: take over what a worker recorded."""
    output = getattr(node, "workeroutput", {})
    for test, keys in output.get("variants", {}).items():
        variants.add(_recorded.setdefault(test, {}), variants.unpack(keys))
    _partial.update(output.get("partial", ()))
    _collected.update(output.get("collected", ()))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["variants"] = {test: variants.pack(keys) for test, keys in _recorded.items()}
        session.config.workeroutput["partial"] = sorted(_partial)
        session.config.workeroutput["collected"] = sorted(_collected)
        return
    whole = exitstatus == pytest.ExitCode.OK and not session.config.option.collectonly
    root = Path(session.config.rootpath)
    for test in _collected | set(_recorded):
        variants.save(root, test, _recorded.get(test, {}), replace=whole and test not in _partial)
