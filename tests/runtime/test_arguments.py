"""Arguments of generators that are of no use: a specific error, and the next right call works as if there was none."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.export import Dim, export

from executorch_webgpu.backend.graph import Sym
from executorch_webgpu.partitioner import WebGPUPartitioner
from executorch_webgpu.runtime import (
    BatchGenerator,
    Device,
    DraftModel,
    Generator,
    InputError,
    NGram,
    Request,
    Runtime,
    Sampling,
)
from executorch_webgpu.runtime.plan import MAX_KEPT
from tests.harness import device
from tests.runtime.sessions import PROMPT, golden, load
from tests.tiny_decoder import build

BAD: list[tuple[Callable[[Generator], Any], str]] = [
    (lambda g: g.generate(PROMPT, 2.5), "max_new_tokens is 2.5, expected an integer of at least 0"),  # type: ignore[arg-type]
    (lambda g: g.generate(PROMPT, float("nan")), "max_new_tokens is nan"),  # type: ignore[arg-type]
    (lambda g: g.generate(PROMPT, True), "max_new_tokens is True"),
    (lambda g: g.generate(PROMPT, 3, 7), "stop_ids is 7, expected integers in a list"),  # type: ignore[arg-type]
    (lambda g: g.generate(PROMPT, 3, "ab"), "stop_ids is 'ab'"),  # type: ignore[arg-type]
    (lambda g: g.generate(PROMPT, 3, (), "greedy"), "sampling is 'greedy', expected Sampling"),  # type: ignore[arg-type]
    (lambda g: g.generate(None, 3), "prompt_ids is None, expected token ids"),  # type: ignore[arg-type]
    (lambda g: g.generate("text", 3), "prompt_ids is 'text', expected token ids in a list; a tokenizer"),  # type: ignore[arg-type]
    (lambda g: g.generate([[1, 2]], 3), r"token 0 is \[1, 2\]"),  # type: ignore[list-item]
    (lambda g: g.append_tokens(None), "ids is None"),  # type: ignore[arg-type]
    (lambda g: g.rewind_to(0.5), "cannot rewind to 0.5"),  # type: ignore[arg-type]
    (lambda g: g.rewind_to(False), "cannot rewind to False"),
    (lambda g: g.generate_next(None), "sampling is None"),  # type: ignore[arg-type]
    (lambda g: g.generate(PROMPT, 3, speculate="ngram"), r"speculate is 'ngram', expected a drafter: NGram\(\)"),  # type: ignore[arg-type]
    (lambda g: g.generate(PROMPT, 3, speculate=NGram), "speculate is <class"),  # type: ignore[arg-type]
    (lambda g: NGram(most=2.5), "most is 2.5, expected an integer of at least 1"),  # type: ignore[arg-type]
    (lambda g: NGram(shortest=True), "shortest is True"),
    (lambda g: DraftModel(g, most=0), "most is 0"),
    (lambda g: DraftModel("draft.pte"), "a draft model of 'draft.pte', expected a Generator"),  # type: ignore[arg-type]
    (lambda g: g.restore(None), "expected a snapshot, got None"),  # type: ignore[arg-type]
]
BAD_ROWS: list[tuple[Callable[[BatchGenerator], Any], str]] = [
    (lambda b: b.append_tokens(1.0, [1]), "row is 1.0, expected the number of a row, or a list"),  # type: ignore[call-overload]
    (lambda b: b.append_tokens(True, [1]), "row is True"),
    (lambda b: b.rewind_to(1.0, 0), "row is 1.0"),  # type: ignore[call-overload]
    (lambda b: b.rewind_to("0", 0), "row is '0'"),  # type: ignore[call-overload]
    (lambda b: b.generate_next(0.0), "row is 0.0, expected the number of a row, or several"),  # type: ignore[call-overload]
    (lambda b: b.generate_next(False), "row is False"),
]


@pytest.mark.parametrize("steps", [None, 0], ids=["ahead", "host"])
def test_wrong_arguments_leave_a_generator_as_it_was(steps: int | None) -> None:
    with Generator(load("llama"), steps_per_submit=steps) as generator:
        generator.append_tokens(PROMPT)
        for call, message in BAD:
            with pytest.raises(InputError, match=message):
                call(generator)
            assert generator.tokens == tuple(PROMPT)
        assert generator.generate((), 5, ()).tokens == golden("llama", tuple(PROMPT), 5)


def test_wrong_rows_leave_a_batch_as_it_was() -> None:
    with BatchGenerator(load("ragged")) as batch:
        batch.append_tokens(0, PROMPT)
        for call, message in BAD_ROWS:
            with pytest.raises(InputError, match=message):
                call(batch)
            assert [batch.tokens(row) for row in range(batch.rows)] == [tuple(PROMPT), *[()] * (batch.rows - 1)]
        chosen = batch.generate_next(0)
    with BatchGenerator(load("ragged"), steps_per_submit=0) as other:
        other.append_tokens(0, PROMPT)
        assert other.generate_next(0) == chosen


@pytest.mark.parametrize(
    "ids",
    [np.array(PROMPT), torch.tensor(PROMPT), tuple(PROMPT), iter(PROMPT)],
    ids=["array", "tensor", "tuple", "iterator"],
)
def test_prompts_are_lists_arrays_tensors_or_iterators(ids: Any) -> None:
    with Generator(load("llama")) as generator:
        result = generator.generate(ids, 5, ())
        assert (result.prompt_tokens, result.tokens) == (3, golden("llama", tuple(PROMPT), 5))


@pytest.mark.parametrize("kind", [Generator, BatchGenerator])
@pytest.mark.parametrize("steps", [2.5, float("nan"), "3", True])
def test_steps_per_submit_is_an_integer(kind: Any, steps: Any) -> None:
    program = load("llama" if kind is Generator else "ragged")
    with pytest.raises(InputError, match="steps_per_submit is"):
        kind(program, steps_per_submit=steps)


def test_a_file_is_no_program() -> None:
    for kind in (Generator, BatchGenerator):
        with pytest.raises(InputError, match=r"got 'model.pte': load it with Runtime.get\(\).load_program"):
            kind("model.pte")


def test_numbers_of_numpy_set_up_sampling() -> None:
    given = Sampling(temperature=np.float32(0.5), top_k=np.int64(3), seed=np.uint64(2**63))  # type: ignore[arg-type]
    assert given == Sampling(temperature=0.5, top_k=3, seed=2**63)
    assert [type(x) for x in (given.temperature, given.top_k, given.seed)] == [float, int, int]
    with pytest.raises(InputError, match="temperature is 1000"):
        Sampling(temperature=10**400)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sampling": None}, "sampling is None"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5"),
        ({"stop_ids": 3}, "stop_ids is 3"),
        ({"prompt_ids": 3}, "prompt_ids is 3"),
    ],
)
def test_a_wrong_request_does_not_enter_a_batch(wrong: dict[str, Any], message: str) -> None:
    with BatchGenerator(load("ragged")) as batch:
        with pytest.raises(InputError, match=message):
            batch.run([Request([1, 2], 3), Request(**{"prompt_ids": [5, 6], "max_new_tokens": 3, **wrong})])
        assert batch.requests == ()
        right, alone = Request([5, 6], 3, ()), Request([5, 6], 3, ())
        batch.run([right])
        batch.run([alone])
        assert right.tokens == alone.tokens
        assert len(right.tokens) == 3


def test_requests_leave_their_rows_where_a_run_fails() -> None:
    def fail(request: Request, token: int) -> bool:
        raise KeyError(token)

    with BatchGenerator(load("ragged")) as batch:
        with pytest.raises(KeyError):
            batch.run([Request([1, 2], 9), Request([3], 9)], fail)
        assert batch.requests == ()
        assert [len(batch.tokens(row)) for row in range(batch.rows)] == [0] * batch.rows
        assert len(batch.run([Request([5, 6], 3, ())])[0].tokens) == 3


@pytest.mark.parametrize("trial", range(3))
def test_generators_begin_in_threads_on_a_device_that_has_compiled_nothing(trial: int) -> None:
    """Plans are made, and temporaries grow, while others run: without the lock, about every second trial submits a step
    whose buffers another thread has just replaced, or mixes up tokens."""
    program = Runtime(Device.create()).load_program(build("llama").pte)
    prompts = [tuple((3 * i + k) % 250 for i in range(1 + k)) for k in range(20 - trial)]
    start = threading.Barrier(len(prompts))
    found: dict[int, tuple[int, ...]] = {}

    def work(number: int) -> None:
        start.wait()
        with Generator(program) as generator:
            for prompt in (prompts[number], prompts[-1 - number]):
                generator.reset()
                found[number] = generator.generate(prompt, 6, ()).tokens

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {k: golden("llama", prompts[-1 - k], 6) for k in range(len(prompts))}
    program.close()


class Measured(torch.nn.Module):
    """An input of which only the size is used."""

    def forward(self, x: torch.Tensor, past: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return x * past.shape[0] + ids.shape[0]


def test_an_input_that_is_only_measured_may_grow_and_is_not_written() -> None:
    from executorch.exir import to_edge_transform_and_lower

    sizes = ({}, {0: Dim("P", min=1, max=1000)}, {0: Dim("I", min=1, max=1000)})
    example = (torch.randn(3), torch.zeros(5), torch.zeros(4, dtype=torch.int64))
    lowered = to_edge_transform_and_lower(
        export(Measured(), example, dynamic_shapes=sizes), partitioner=[WebGPUPartitioner()]
    )
    on = device("full")
    method = Runtime(on).load_program(bytes(lowered.to_executorch().buffer)).load_method("forward")
    assert method.outside() == []
    x = torch.randn(3)
    for past, ids in ((5, 4), (2, 900), (9, 1), (1000, 70)):
        before = on.counters.bytes_written
        result = method.execute([x, torch.zeros(past), torch.zeros(ids, dtype=torch.int64)])[0]
        torch.testing.assert_close(result, x * past + ids, atol=1e-4, rtol=1e-5)
        assert on.counters.bytes_written - before < 4 * ids + 2048
    first = on.counters.bytes_written
    method.execute([x, torch.zeros(1000), torch.zeros(70, dtype=torch.int64)])
    assert on.counters.bytes_written - first < 1000


def test_lowered_nodes_are_kept_for_a_bounded_number_of_sizes() -> None:
    from tests.harness import GraphBuilder

    builder = GraphBuilder()
    rows = Sym("input_dim", (0, 0))
    x = builder.input("f32", (rows, 3))
    graph = builder.graph(builder.node("aten.neg.default", {"self": x}, ("f32", (rows, 3))))
    delegate = builder.load(graph, device("full"))
    for size in (*range(1, 3 * MAX_KEPT), 1):
        values = np.arange(3.0 * size, dtype=np.float32).reshape(size, 3)
        np.testing.assert_array_equal(delegate.execute([("f32", values)])[0][1], -values)
    assert max(len(kept) for node in delegate.planner.nodes._known for kept in node.values()) == MAX_KEPT
    delegate.close()
