"""The compiled loop makes the calls that the loop in Python makes; without llvmlite, the latter does it all."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import decode_loop
from executorch_webgpu.runtime import Generator, Runtime
from executorch_webgpu.runtime.gpu import native
from executorch_webgpu.runtime.gpu.compiled_loop import JIT_VARIABLE, WORDS, CompiledLoop, compile_loop
from tests import tiny_decoder
from tests.harness import DEVICES, device

POINTER, HALF, WORD = ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint64
ENCODER = 0xFEDC_BA98_7654_3210
LARGE = 2**32 - 1
"""The largest number of a grid: a signed or cut argument would show."""


class Calls:
    """C functions of a compute pass encoder that write down what they were called with."""

    ARGUMENTS = (
        ("pipeline", (POINTER, POINTER)),
        ("group", (POINTER, HALF, POINTER, WORD, POINTER)),
        ("dispatch", (POINTER, HALF, HALF, HALF)),
        ("indirect", (POINTER, POINTER, WORD)),
    )

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []
        self.functions = [self._function(name, kinds) for name, kinds in self.ARGUMENTS]

    def _function(self, name: str, kinds: tuple[Any, ...]) -> Any:
        return ctypes.CFUNCTYPE(None, *kinds)(lambda *arguments: self.seen.append((name, *arguments)))

    def compile(self) -> CompiledLoop | None:
        return compile_loop(*(ctypes.cast(function, ctypes.c_void_p).value or 0 for function in self.functions))

    def run(self, dispatches: list[list[int]]) -> list[tuple[Any, ...]]:
        loop = self.compile()
        assert loop is not None
        words = np.array(dispatches, np.uint64).reshape(-1, WORDS)
        ctypes.CFUNCTYPE(None, WORD, WORD, WORD)(loop.address)(ENCODER, words.ctypes.data, len(words))
        return self.seen


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if nothing had been compiled or encoded in this process."""
    monkeypatch.setattr(native, "_tried", [])
    monkeypatch.setattr(native.Recording, "_from_python", 0)


def test_calls_have_all_arguments_in_order() -> None:
    first, second, buffer = 2**63 + 5, 7, 2**40 + 3
    seen = Calls().run(
        [
            [first, 11, LARGE, 2, 3, 0, 0],
            [0, 12, 1, LARGE, LARGE, 0, 0],  # the pipeline before
            [second, 13, 9, 9, 9, buffer, 2**33 + 16],  # indirect: no grid of its own
            [0, 14, 4, 5, 6, 0, 99],
        ]
    )
    assert seen == [
        ("pipeline", ENCODER, first),
        ("group", ENCODER, 0, 11, 0, 0),
        ("dispatch", ENCODER, LARGE, 2, 3),
        ("group", ENCODER, 0, 12, 0, 0),
        ("dispatch", ENCODER, 1, LARGE, LARGE),
        ("pipeline", ENCODER, second),
        ("group", ENCODER, 0, 13, 0, 0),
        ("indirect", ENCODER, buffer, 2**33 + 16),
        ("group", ENCODER, 0, 14, 0, 0),
        ("dispatch", ENCODER, 4, 5, 6),
    ]


@pytest.mark.parametrize("count", [0, 1, 1000])
def test_so_many_dispatches(count: int) -> None:
    seen = Calls().run([[number + 1, number, 1, 1, 1, 0, 0] for number in range(count)])
    assert [call[2] for call in seen if call[0] == "pipeline"] == list(range(1, count + 1))
    assert len(seen) == 3 * count


def test_without_llvmlite_nothing_is_compiled(
    anew: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "llvmlite", None)
    assert native.encoded_by() == "python"
    assert not caplog.records


def test_the_environment_may_say_no(anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(JIT_VARIABLE, "0")
    assert native.encoded_by() == "python"


@pytest.mark.parametrize("error", [RuntimeError("no code for this machine"), AttributeError("gone"), OSError("no .so")])
@pytest.mark.parametrize("name", ["initialize_native_target", "parse_assembly", "create_mcjit_compiler"])
def test_an_llvmlite_that_does_not_work_is_done_without(
    name: str, error: Exception, anew: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A library that is missing or cut, a version with other names, a machine without a backend: one warning."""
    from llvmlite import binding

    def refuse(*_: Any) -> None:
        raise error

    monkeypatch.setattr(binding, name, refuse)
    assert [native.encoded_by() for _ in range(3)] == ["python"] * 3
    [record] = caplog.records
    assert str(error) in record.getMessage()
    assert JIT_VARIABLE in record.getMessage()


def test_an_import_that_fails_is_done_without(anew: None, tmp_path: Path) -> None:
    """In a process of its own: a package whose library is missing raises OSError where it is imported."""
    (tmp_path / "llvmlite").mkdir()
    (tmp_path / "llvmlite" / "__init__.py").write_text("raise OSError('Could not find the shared object file')")
    code = "from executorch_webgpu.runtime.gpu import native; print(native.encoded_by())"
    done = python(code, PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    assert done.stdout.split() == ["python"]
    assert "Could not find the shared object file" in done.stderr


def test_memory_that_must_not_run_is_not_run(anew: None, tmp_path: Path) -> None:
    """In a process of its own that the kernel lets make no more code, which llvmlite does not notice."""
    code = """
import ctypes
from executorch_webgpu.runtime.gpu import native
refused = ctypes.CDLL(None).prctl(65, 1, 0, 0, 0)  # PR_SET_MDWE, Linux 6.3
loop = native.compiled_loop()
if loop is not None:
    loop[0](native.ffi.NULL, native.ffi.NULL, 0)
print("old kernel" if refused else native.encoded_by())
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("python", "old kernel")
    assert ("forbids executable memory" in done.stderr) == (done.stdout.strip() == "python")


def test_memory_that_may_not_become_code_is_noticed(
    anew: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What the process above shows, on kernels that cannot be told so."""

    class Library:
        def __init__(self, name: None) -> None: ...

        def mprotect(self, *_: Any) -> int:
            return -1

    monkeypatch.setattr(ctypes, "CDLL", Library)
    assert native.encoded_by() == "python"
    assert "forbids executable memory" in caplog.text


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    given = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=given, timeout=300)


def test_this_environment_compiles(anew: None) -> None:
    assert native.encoded_by() == "llvmlite"


def test_threads_compile_once(anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(native, "compile_loop", lambda *functions: made.append(compile_loop(*functions)) or made[-1])
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda _: native.compiled_loop(), range(8)))
    assert len(made) == 1
    assert all(loop is found[0] for loop in found)


def test_it_is_compiled_when_it_pays(anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not before many dispatches, and a recording that is encoded once never calls it."""
    loop, called = native.compiled_loop(), []
    assert loop is not None
    native._tried.clear()
    monkeypatch.setattr(native, "compiled_loop", lambda: called.append("") or loop)
    with Runtime(device("full")).load_program(tiny_decoder.build("llama").pte) as program:
        method = program.load_method()

        def step(position: int) -> None:
            method.execute([np.array([[1]]), np.array([position])])

        step(0)
        step(1)
        assert not called
        before = native.Recording._from_python
        assert before > 0
        monkeypatch.setattr(native, "COMPILE_AFTER", before)
        step(2)
        assert called
        assert native.Recording._from_python == before  # none of them from Python
        called.clear()
        method.execute([np.array([[1, 2]]), np.array([3])])  # another plan, for the first time
        assert not called
        assert native.Recording._from_python > before


@pytest.mark.parametrize("on", DEVICES)
def test_decoding_is_the_same(on: str, anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole decoder, one step and many steps a submit, by both loops."""

    def tokens(steps: int | None) -> tuple[int, ...]:
        with Runtime(device(on)).load_program(tiny_decoder.build("llama").pte) as program:
            generator = Generator(program.load_method(), program, steps_per_submit=steps)
            return generator.generate([1, 2, 3], max_new_tokens=20).tokens

    from_python = [tokens(steps) for steps in (None, 0, 1, 8)]
    loop, calls = native.compiled_loop(), []
    assert loop is not None

    def counted(*arguments: Any) -> None:
        calls.append(arguments[-1])
        loop[0](*arguments)

    monkeypatch.setattr(native, "compiled_loop", lambda: (counted, loop))
    for steps, expected in zip((None, 0, 1, 8), from_python, strict=True):
        calls.clear()
        assert tokens(steps) == expected
        assert len(calls) > 10


def test_benchmarks_can_do_without() -> None:
    loop = native.compiled_loop()
    assert loop is not None
    assert decode_loop.in_python(lambda *_: native.compiled_loop())(*[None] * 4) is None  # type: ignore[arg-type]
    assert native.compiled_loop() is loop
