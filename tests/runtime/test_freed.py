"""What nobody holds any more is freed at once: GPU memory does not wait for the garbage collector."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import pytest

from executorch_webgpu.runtime import BatchGenerator, DraftModel, Generator, NGram, Program, Request, Runtime, Sampling
from tests import tiny_decoder
from tests.harness import device

PROMPT = [3, 1, 4, 1, 5]


@pytest.fixture
def uncollected() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def _method(program: Program) -> None:
    program.load_method("forward")


def _on_the_gpu(program: Program) -> None:
    Generator(program).generate(PROMPT, 12, ())


def _sampled(program: Program) -> None:
    Generator(program).generate(PROMPT, 12, (), Sampling(temperature=0.8, top_k=5, seed=1))


def _on_the_host(program: Program) -> None:
    Generator(program, steps_per_submit=0).generate(PROMPT, 6, ())


def _forked(program: Program) -> None:
    first = Generator(program)
    first.generate(PROMPT, 6, ())
    second = first.fork()
    second.generate((), 6, ())
    kept = first.snapshot()
    first.generate((), 6, ())
    first.restore(kept)


def _streamed(program: Program) -> None:
    stream = Generator(program).stream(PROMPT, 12, ())
    next(stream)
    next(stream)


def _drafted(program: Program) -> None:
    Generator(program).generate(PROMPT, 12, (), speculate=NGram(4, 2, 1))


def _drafted_by_a_model(program: Program) -> None:
    Generator(program).generate(PROMPT, 12, (), speculate=DraftModel(Generator(program)))


def _batch(program: Program) -> None:
    BatchGenerator(program).run([Request(PROMPT, 6), Request(PROMPT[:2], 9)])


def _around_a_method(program: Program) -> None:
    Generator(program.load_method("forward"), program).generate(PROMPT, 12, ())


def _around_a_method_of_a_batch(program: Program) -> None:
    BatchGenerator(program.load_method("forward"), program).run([Request(PROMPT, 6)])


USES: dict[str, list[Callable[[Program], None]]] = {
    "llama": [_method, _on_the_gpu, _sampled, _on_the_host, _forked, _streamed, _around_a_method],
    "hugging_face": [_drafted, _drafted_by_a_model],
    "ragged": [_batch, _around_a_method_of_a_batch],
}


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize(("kind", "use"), [(kind, use) for kind, uses in USES.items() for use in uses])
def test_programs_and_sequences_that_were_never_closed(kind: str, use: Callable[[Program], None]) -> None:
    on, pte = device("full"), tiny_decoder.build(kind).pte

    def memory(purpose: str) -> int:
        return on.memory.by_purpose.get(purpose, 0)

    weights, state, seen = memory("weights"), memory("state"), []
    for _ in range(3):
        program = Runtime(on).load_program(pte)
        use(program)
        inside = memory("weights")
        use(program)
        assert memory("weights") == inside > weights
        assert memory("state") == state
        del program
        seen.append(on.memory.total)
    assert memory("weights") == weights
    assert seen[2] == seen[1]
