"""Arguments of generators that are of no use: a specific error, and the next right call works as if there was none."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.export import Dim, export

from executorch_webgpu.backend.graph import Sym, Value
from executorch_webgpu.partitioner import WebGPUPartitioner
from executorch_webgpu.runtime import (
    BatchGenerator,
    Device,
    DeviceError,
    DraftModel,
    Generator,
    InputError,
    NGram,
    Request,
    Runtime,
    Sampling,
)
from executorch_webgpu.runtime.gpu.plan import MAX_KEPT
from tests.harness import device
from tests.runtime.sessions import PROMPT, golden, load
from tests.tiny_decoder import CAPACITY, build

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
    (lambda g: g.generate(PROMPT, 3, on_token=5), "on_token is 5, expected a function"),  # type: ignore[arg-type]
    (lambda g: g.save(None), "path is None, expected the name of a file"),  # type: ignore[arg-type]
    (lambda g: g.save(b"name"), "path is b'name'"),  # type: ignore[arg-type]
    (lambda g: g.load(5), "path is 5, expected the name of a file"),  # type: ignore[arg-type]
]
SOURCES: list[tuple[Callable[[Generator], Any], str]] = [
    (lambda g: Generator(None), "expected a program or a method, got None: load it with"),  # type: ignore[arg-type]
    (lambda g: Generator(g), "expected a program or a method, got <"),  # type: ignore[arg-type]
    (lambda g: BatchGenerator(5), "expected a program or a method, got 5"),  # type: ignore[arg-type]
    (lambda g: Generator(load("hugging_face"), 5), "constants is 5, expected a program, or a dict"),  # type: ignore[arg-type]
    (lambda g: BatchGenerator(load("ragged"), [1]), r"constants is \[1\]"),  # type: ignore[arg-type]
    (
        lambda g: Generator(load("hugging_face"), {"get_max_seq_len": "a"}),
        "get_max_seq_len is 'a', expected a positive",
    ),
    (lambda g: Generator(load("hugging_face"), {"get_max_seq_len": 2.5}), "get_max_seq_len is 2.5"),
    (lambda g: Generator(load("hugging_face"), {"get_max_seq_len": 0}), "get_max_seq_len is 0"),
    (lambda g: BatchGenerator(load("ragged"), {"get_max_context_len": -1}), "get_max_context_len is -1"),
    (lambda g: BatchGenerator(load("ragged"), {"get_eos_ids": "ab"}), "get_eos_ids is 'ab', expected integers"),
    (lambda g: Generator(load("hugging_face"), {"get_eos_id": 1.5}), "get_eos_id is 1.5, expected integers"),
    (lambda g: Generator(load("hugging_face"), state=5), "state is 5, expected that of a method"),  # type: ignore[arg-type]
    (lambda g: load("hugging_face").load_method("forward", g), "state is <"),  # type: ignore[arg-type]
    (lambda g: g.method.on_state(5), "state is 5"),  # type: ignore[arg-type]
    (lambda g: Generator(load("llama on default-limits"), state=g.state), "the state is on another device"),
    (lambda g: Generator(load("hugging_face"), prefill=[1]), r"prefill is \[1\], expected the name of a method"),  # type: ignore[arg-type]
    (lambda g: Generator(g.method, prefill=5), "prefill is 5, expected a method"),  # type: ignore[arg-type]
]
BAD_ROWS: list[tuple[Callable[[BatchGenerator], Any], str]] = [
    (lambda b: b.append_tokens(1.0, [1]), "row is 1.0, expected the number of a row, or a list"),  # type: ignore[call-overload]
    (lambda b: b.append_tokens(True, [1]), "row is True"),
    (lambda b: b.rewind_to(1.0, 0), "row is 1.0"),  # type: ignore[call-overload]
    (lambda b: b.rewind_to("0", 0), "row is '0'"),  # type: ignore[call-overload]
    (lambda b: b.generate_next(0.0), "row is 0.0, expected the number of a row, or several"),  # type: ignore[call-overload]
    (lambda b: b.generate_next(False), "row is False"),
    (lambda b: b.generate_next([[0]]), r"there is no row \[0\]"),  # type: ignore[list-item]
    (lambda b: b.cancel(None), "expected a request, as join returns it, got None"),  # type: ignore[arg-type]
    (lambda b: b.cancel(Request([1])), "is not one of this batch's"),
    (lambda b: b.run(None), "requests is None, expected requests or prompts in a list"),  # type: ignore[arg-type]
    (lambda b: b.run([[1]], on_token=5), "on_token is 5, expected a function"),  # type: ignore[arg-type]
    (lambda b: b.join(Request([1]), 5), "has its settings already: give them where it is made"),
    (lambda b: b.join(Request([1]), stop_ids=np.array([1, 2])), "has its settings already"),
    (lambda b: b.join(Request([1]), sampling=np.zeros(2)), r"sampling is array\(\[0., 0.\]\), expected Sampling"),  # type: ignore[arg-type]
    (lambda b: b.save_row(0, None), "path is None, expected the name of a file"),  # type: ignore[arg-type]
    (lambda b: b.load_row(1, 5), "path is 5, expected the name of a file"),  # type: ignore[arg-type]
]


class Proposer:
    """A drafter that always proposes the same."""

    def __init__(self, proposal: Any, most: Any = 4) -> None:
        self.proposal, self.most = proposal, most

    def begin(self, *_: object) -> Proposer:
        return self

    def draft(self, *_: object) -> Any:
        return self.proposal


@pytest.mark.parametrize("steps", [None, 0], ids=["ahead", "host"])
def test_wrong_arguments_leave_a_generator_as_it_was(steps: int | None) -> None:
    with Generator(load("llama"), steps_per_submit=steps) as generator:
        generator.append_tokens(PROMPT)
        for call, message in BAD:
            with pytest.raises(InputError, match=message):
                call(generator)
            assert generator.tokens == tuple(PROMPT)
        assert generator.generate((), 5, ()).tokens == golden("llama", tuple(PROMPT), 5)


def test_wrong_programs_states_and_constants_are_refused_where_they_are_given() -> None:
    with Generator(load("llama")) as generator:
        generator.append_tokens(PROMPT)
        held = generator.state.buffers()
        for call, message in SOURCES:
            with pytest.raises(InputError, match=message):
                call(generator)
        assert generator.state.buffers() == held
        assert generator.generate((), 5, ()).tokens == golden("llama", tuple(PROMPT), 5)
    method = load("llama").load_method()
    method.close()
    for make in (lambda: Generator(method), lambda: BatchGenerator(method)):
        with pytest.raises(InputError, match="method forward was closed: load it again"):
            make()


def test_a_state_that_does_not_fit_stays_as_it_was() -> None:
    with Generator(load("llama")) as generator, BatchGenerator(load("ragged")) as batch:
        generator.append_tokens(PROMPT)
        held = generator.state.buffers()
        with pytest.raises(InputError, match="the state belongs to another program"):
            batch.method.on_state(generator.state)
        last = list(held)[-1]  # the others are made before this one is found to differ
        state = load("llama").new_state()
        state.get(Value("mutable", "f32", (3,), last), lambda key: b"")
        with pytest.raises(DeviceError, match=f"{last} is f32"):
            load("llama").load_method("forward", state)
        assert list(state.buffers()) == [last]
        state.close()
        assert generator.state.buffers() == held
        assert generator.generate((), 5, ()).tokens == golden("llama", tuple(PROMPT), 5)


@pytest.mark.parametrize("steps", [None, 0], ids=["ahead", "host"])
@pytest.mark.parametrize("proposal", [[1.0], [True], ["a"], [None], None, 5, "ab"])
def test_a_drafter_that_proposes_no_ids_is_told_so(proposal: Any, steps: int | None) -> None:
    with Generator(load("hugging_face"), steps_per_submit=steps) as generator:
        with pytest.raises(InputError, match=r"the drafter('s proposal is| proposes) "):
            generator.generate(PROMPT, 5, (), speculate=Proposer(proposal))
        assert generator.tokens == (*PROMPT, *golden("hugging_face", tuple(PROMPT), 1))
        assert generator.generate((), 4, ()).tokens == golden("hugging_face", tuple(PROMPT), 5)[1:]


@pytest.mark.parametrize("most", [None, 0, -1, 2.5, True, "4"])
def test_a_drafter_that_does_not_say_how_many(most: Any) -> None:
    with Generator(load("hugging_face")) as generator:
        with pytest.raises(InputError, match=f"most of the drafter is {most!r}, expected an integer of at least 1"):
            generator.generate(PROMPT, 3, speculate=Proposer([], most))
        assert generator.tokens == ()


def test_a_draft_model_that_was_closed_is_found_before_anything_runs() -> None:
    draft = Generator(load("llama"))
    drafter = DraftModel(draft)
    draft.close()
    with pytest.raises(InputError, match="the draft model was closed"):
        DraftModel(draft)
    with Generator(load("hugging_face")) as generator:
        before = generator.method.device.counters.copy()
        with pytest.raises(InputError, match="the draft model was closed"):
            generator.stream(PROMPT, 3, speculate=drafter)
        assert generator.tokens == ()
        assert generator.method.device.counters.since(before).submits == 0


def test_files_are_written_where_there_is_a_folder(tmp_path: Path) -> None:
    with Generator(load("llama")) as generator, BatchGenerator(load("ragged")) as batch:
        generator.append_tokens(PROMPT)
        batch.append_tokens(0, PROMPT)
        for save in (generator.save, lambda path: batch.save_row(0, path)):
            with pytest.raises(FileNotFoundError, match=r"there is no such folder.*nowhere'"):
                save(tmp_path / "nowhere" / "file")
            with pytest.raises(IsADirectoryError, match="expected the name of a file"):
                save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_request_is_cancelled_where_it_joined() -> None:
    with BatchGenerator(load("ragged")) as one, BatchGenerator(load("ragged_one")) as other:
        requests = [one.join([1, place], 3, ()) for place in range(5)]
        one.step()
        for request in requests:
            with pytest.raises(InputError, match="is not one of this batch's"):
                other.cancel(request)
        list(one.events())
        for request in requests:
            one.cancel(request)
            other.cancel(request)
            assert (len(request.tokens), request.stop_reason) == (3, "max_new_tokens")


def test_requests_do_not_wait_for_rows_that_nobody_frees() -> None:
    with BatchGenerator(load("ragged")) as batch:
        batch.append_tokens([[place + 1] for place in range(batch.rows)])
        request = Request([5, 6], 3, ())
        with pytest.raises(InputError, match="1 requests wait for a row, and all 4 hold sequences: reset one"):
            batch.run([request])
        assert (batch.requests, request.done) == ((), False)
        batch.join(request)
        with pytest.raises(InputError, match="1 requests wait for a row"):
            list(batch.events())
        assert batch.step() == []
        batch.reset(2)
        assert len(list(batch.events())) == 3
        assert [batch.tokens(row) for row in range(batch.rows)] == [(1,), (2,), (), (4,)]


@pytest.mark.parametrize("steps", [None, 0], ids=["ahead", "host"])
def test_a_sequence_that_is_reset_while_it_is_generated(steps: int | None) -> None:
    with Generator(load("llama"), steps_per_submit=steps) as generator:
        with pytest.raises(InputError, match="there is nothing to continue: the sequence was reset"):
            generator.generate(PROMPT, 6, (), on_token=lambda token: generator.reset())
        assert generator.generate(PROMPT, 5, ()).tokens == golden("llama", tuple(PROMPT), 5)


@pytest.mark.parametrize("speculate", [None, NGram(adaptive=False)], ids=["plain", "drafts"])
@pytest.mark.parametrize("steps", [None, 0, 4], ids=["ahead", "host", "four"])
def test_two_streams_of_one_sequence_take_turns(steps: int | None, speculate: Any) -> None:
    with Generator(load("hugging_face"), steps_per_submit=steps) as generator:
        generator.append_tokens(PROMPT)
        streams = [generator.stream((), None, (), speculate=speculate) for _ in range(3)]
        found = []
        for place in range(9):
            found += [next(streams[place % 2]), next(streams[place % 2])]
            if place == 4:
                streams[2].close()
        streams[0].close()  # drops nothing of the other's
        found += list(streams[1])
        assert tuple(found) == golden("hugging_face", tuple(PROMPT), CAPACITY - len(PROMPT))
        assert generator.tokens == (*PROMPT, *found)


def test_a_batch_of_a_program_that_was_closed_takes_no_requests() -> None:
    program = Runtime(device("full")).load_program(build("ragged").pte)
    with BatchGenerator(program) as batch:
        program.close()
        with pytest.raises(InputError, match="method forward was closed: load it again"):
            batch.join([1, 2])
        assert batch.requests == ()


def test_wrong_rows_leave_a_batch_as_it_was() -> None:
    with BatchGenerator(load("ragged")) as batch:
        batch.append_tokens(0, PROMPT)
        for call, message in BAD_ROWS:
            with pytest.raises(InputError, match=message):
                call(batch)
            assert [batch.tokens(row) for row in range(batch.rows)] == [tuple(PROMPT), *[()] * (batch.rows - 1)]
            assert batch.requests == ()
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
