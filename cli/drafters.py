"""What `run --speculate` names: a drafter by its text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from ..runtime import DraftModel, Generator, InputError, NGram, Runtime
from ..runtime.decoding.speculative import Drafter


@contextmanager
def drafter(text: str | None, runtime: Runtime) -> Iterator[Drafter | None]:
    """The drafter that `ngram`, `ngram:K`, `FILE.pte` or `FILE.pte:K` stands for; a program is closed afterwards.

    Raises:
        InputError: it is none of these, or K is not positive.
        WebGPUDelegateError, OSError: as loading a program.
    """
    if text is None:
        yield None
        return
    found = re.fullmatch(r"(ngram|.+\.pte)(?::(\d+))?", text)
    if found is None:
        raise InputError(f"--speculate {text}: expected ngram, ngram:K, FILE.pte or FILE.pte:K")
    name, most = found[1], None if found[2] is None else int(found[2])
    if name == "ngram":
        yield NGram() if most is None else NGram(most)
        return
    with runtime.load_program(name) as program, Generator(program) as generator:
        yield DraftModel(generator) if most is None else DraftModel(generator, most)
