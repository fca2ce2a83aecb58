"""The compiled loop makes the calls that the loop in Python makes; without llvmlite, the latter does it all."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from executorch_webgpu.runtime import Generator, Runtime
from executorch_webgpu.runtime.gpu import native
from executorch_webgpu.runtime.gpu.compiled_loop import WORDS, CompiledLoop, compile_loop
from tests import tiny_decoder
from tests.harness import device

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
def without_llvmlite(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if it were not installed, for whoever asks from now on."""
    monkeypatch.setitem(sys.modules, "llvmlite", None)
    native.compiled.cache_clear()
    yield
    native.compiled.cache_clear()


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


def test_without_llvmlite_nothing_is_compiled(without_llvmlite: None) -> None:
    assert Calls().compile() is None
    assert native.encoded_by() == "python"


def test_what_cannot_be_compiled_is_left_to_python(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from llvmlite import binding

    def refuse(*_: Any) -> None:
        raise RuntimeError("no code for this machine")

    monkeypatch.setattr(binding, "create_mcjit_compiler", refuse)
    assert Calls().compile() is None
    assert "no code for this machine" in caplog.text


def test_this_environment_compiles() -> None:
    assert native.encoded_by() == "llvmlite"


def test_decoding_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Direct and indirect dispatches of a whole decoder, one step and many steps a submit, by both loops in turn."""

    def tokens(steps: int | None) -> tuple[int, ...]:
        with Runtime(device("full")).load_program(tiny_decoder.build("llama").pte) as program:
            generator = Generator(program.load_method(), program, steps_per_submit=steps)
            return generator.generate([1, 2, 3], max_new_tokens=30).tokens

    assert native.encoded_by() == "llvmlite"
    compiled = [tokens(steps) for steps in (None, 1, 8)]
    monkeypatch.setattr(native, "compiled", lambda: None)
    assert native.encoded_by() == "python"
    assert [tokens(steps) for steps in (None, 1, 8)] == compiled
