"""Captured steps and decoding on the GPU (group E of the checklist): the same results as one step at a time, whatever
happens between, and errors instead of stale results."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

import numpy as np
import pytest

from executorch_webgpu.backend.graph import Sym
from executorch_webgpu.runtime import (
    BatchGenerator,
    Generator,
    InputError,
    Program,
    Runtime,
    Sampling,
    State,
    UnsupportedError,
)
from executorch_webgpu.runtime.decoding.resident import Batch, Resident, find_whole, growth
from executorch_webgpu.runtime.errors import DeviceError, WebGPUDelegateError
from executorch_webgpu.runtime.gpu.host import to_host
from executorch_webgpu.runtime.gpu.plan import Plan
from executorch_webgpu.runtime.methods.replay import Replay
from tests import tiny_decoder, tiny_states
from tests.harness import DEVICES, device
from tests.tiny_decoder import CAPACITY, STOP

PROMPT = [1, 2, 3]
DRAWN = Sampling(temperature=1.1, top_k=60, top_p=0.97, seed=11)
CONVENTIONS = ("llama", "static", "hugging_face")


@pytest.fixture(params=DEVICES)
def on(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=CONVENTIONS)
def program(request: pytest.FixtureRequest, on: str) -> Iterator[Program]:
    with Runtime(device(on)).load_program(tiny_decoder.build(request.param).pte) as loaded:
        yield loaded


@pytest.fixture
def llama(on: str) -> Iterator[Program]:
    with Runtime(device(on)).load_program(tiny_decoder.build("llama").pte) as loaded:
        yield loaded


def made(program: Program, steps: int | None = None) -> Generator:
    return Generator(program.load_method(), program, steps_per_submit=steps)


def tokens(generator: Generator, count: int, sampling: Sampling | None = None) -> tuple[int, ...]:
    return generator.generate(PROMPT, count, stop_ids=(), sampling=sampling or Sampling()).tokens


def step(token: int, position: int) -> list[tuple[str, Any]]:
    return [to_host(np.array([[token]])), to_host(np.array([position]))]


def logits(outputs: list[tuple[str, Any]]) -> np.ndarray[Any, Any]:
    return np.asarray(outputs[0][1]).copy()


# -- captured steps


def test_E1_E2_replays_are_executions(llama: Program) -> None:
    """Same shapes, other numbers, over and over; outputs and temporaries hold rubbish before each."""
    fresh, captured = llama.load_method().delegates[0], llama.load_method().delegates[0]
    replay = Replay(captured, step(9, 0))
    for position, token in enumerate([5, 7, 5, 11, 2]):
        poison(captured)
        np.testing.assert_array_equal(
            logits(replay.execute(step(token, position))), logits(fresh.execute(step(token, position)))
        )
    np.testing.assert_array_equal(logits(replay.execute(step(3, 0))), logits(fresh.execute(step(3, 0))))


def poison(delegate: Any) -> None:
    """NaN (as bits) in everything that a step computes and must not find there."""
    for buffer in delegate.pool._buffers:
        delegate.device.gpu.queue.write_buffer(buffer, 0, np.full(buffer.size // 4, 0x7FC00000, np.uint32))


def test_E9_a_prefill_between_replays(llama: Program) -> None:
    """A longer call replaces buffers that the captured step was bound to."""
    fresh, captured = llama.load_method().delegates[0], llama.load_method().delegates[0]
    replay = Replay(captured, step(1, 0))
    bound = replay.plan()
    for position in (0, 1):
        np.testing.assert_array_equal(
            logits(replay.execute(step(4, position))), logits(fresh.execute(step(4, position)))
        )
    long = [to_host(np.array([[6, 7, 8, 9, 10, 11, 12, 13]])), to_host(np.array([2]))]
    np.testing.assert_array_equal(logits(captured.execute(long)), logits(fresh.execute(long)))
    assert replay.plan() is not bound
    for position in (10, 11, 0):
        np.testing.assert_array_equal(
            logits(replay.execute(step(4, position))), logits(fresh.execute(step(4, position)))
        )


def test_E10_foreign_shapes_and_closed_delegates_raise(llama: Program) -> None:
    method = llama.load_method()
    replay = Replay(method.delegates[0], step(1, 0))
    first = logits(replay.execute(step(1, 0)))
    before = device_counters(llama)
    with pytest.raises(InputError, match=r"captured with inputs i64\[1, 1\], i64\[1\], got i64\[1, 2\], i64\[1\]"):
        replay.execute([to_host(np.array([[1, 2]])), to_host(np.array([0]))])
    with pytest.raises(InputError, match="captured with inputs"):
        replay.execute([to_host(np.array([[1]], np.int32)), to_host(np.array([0]))])
    with pytest.raises(InputError, match=rf"{CAPACITY} is outside"):
        replay.execute(step(1, CAPACITY))
    assert llama.runtime.device.counters.since(before).submits == 0
    np.testing.assert_array_equal(logits(replay.execute(step(1, 0))), first)
    method.close()
    with pytest.raises(InputError, match="closed"):
        replay.execute(step(1, 0))


def device_counters(program: Program) -> Any:
    return program.runtime.device.counters.copy()


def test_a_replay_whose_plan_was_dropped_binds_again(llama: Program) -> None:
    delegate = llama.load_method().delegates[0]
    replay = Replay(delegate, step(1, 0))
    expected = logits(replay.execute(step(1, 0)))
    delegate._drop_plans()
    np.testing.assert_array_equal(logits(replay.execute(step(1, 0))), expected)


def test_E14_captures_of_several_lengths(llama: Program) -> None:
    fresh, captured = llama.load_method().delegates[0], llama.load_method().delegates[0]

    def call(length: int, position: int) -> list[tuple[str, Any]]:
        return [to_host(np.arange(length)[None] + 3 * position), to_host(np.array([position]))]

    replays = {length: Replay(captured, call(length, 0)) for length in (1, 2, 4, 8)}
    position = 0
    for length in (8, 1, 4, 2, 1, 4, 1):
        inputs = call(length, position)
        np.testing.assert_array_equal(logits(replays[length].execute(inputs)), logits(fresh.execute(inputs)))
        position += length


def test_E16_profiling_changes_nothing(llama: Program) -> None:
    if "timestamp-query" not in llama.runtime.device.features:
        with pytest.raises(DeviceError, match="timestamp"):
            llama.load_method().delegates[0].profile(step(1, 0))
        return
    plain, profiled = llama.load_method().delegates[0], llama.load_method().delegates[0]
    for position in range(3):
        np.testing.assert_array_equal(
            logits(profiled.profile(step(5, position))[0]), logits(plain.execute(step(5, position)))
        )


# -- sizes that follow from the position


@pytest.fixture
def cut(on: str) -> Iterator[Program]:
    with Runtime(device(on)).load_program(tiny_states.build("cut")) as loaded:
        yield loaded


@pytest.mark.parametrize("count", [1, 3])
def test_a_replay_at_another_position_takes_the_plan_of_its_sizes(cut: Program, count: int) -> None:
    fresh, captured = cut.load_method().delegates[0], cut.load_method().delegates[0]

    def call(position: int) -> list[tuple[str, Any]]:
        return [to_host(np.arange(count)[None] + 5 * position), to_host(np.array([position]))]

    replay = Replay(captured, call(0))
    for position in (0, count, 2 * count, 0, count, CAPACITY - count):
        np.testing.assert_array_equal(logits(replay.execute(call(position))), logits(fresh.execute(call(position))))


def test_decoding_takes_one_step_at_a_time_where_sizes_follow_from_the_position(cut: Program) -> None:
    expected = tiny_decoder.greedy(PROMPT, 12)
    for steps in (0, 1, 4, None):
        generator = made(cut, steps)
        assert list(tokens(generator, 12)) == expected
        if steps != 0:
            assert str(generator.fallback).startswith("sizes follow from input_pos[0]")
        generator.rewind_to(len(PROMPT))
        drafted = generator.generate((), 12, stop_ids=(), speculate=Known([*PROMPT, *expected]))
        assert list(drafted.tokens) == expected
        assert drafted.speculation is not None
        assert drafted.speculation.accepted == drafted.speculation.drafted > 0


class Known:
    """A drafter that knows the text."""

    most, adaptive = 2, False

    def __init__(self, text: list[int]) -> None:
        self.text = text

    def begin(self, *_: object) -> Known:
        return self

    def draft(self, tokens: Sequence[int], count: int) -> list[int]:
        return self.text[len(tokens) : len(tokens) + count]


@pytest.mark.parametrize("position", [CAPACITY, 10**6, 2**31 - 1, 2**31, -3, -(2**31), -(2**63)])
def test_a_position_without_sizes_is_refused_before_memory_is_made(cut: Program, position: int) -> None:
    method = cut.load_method()
    first = method.execute([np.array([[4]]), np.array([0])])[0]
    memory, before = cut.runtime.device.memory.total, device_counters(cut)
    with pytest.raises(InputError, match=r"outside \[-24, 23\]|a size of its result, is -"):
        method.execute([np.array([[4]]), np.array([position])])
    assert cut.runtime.device.memory.total == memory
    assert cut.runtime.device.counters.since(before).submits == 0
    np.testing.assert_array_equal(method.execute([np.array([[4]]), np.array([0])])[0], first)


def test_batches_refuse_such_sizes(monkeypatch: pytest.MonkeyPatch, on: str) -> None:
    monkeypatch.setattr(Plan, "elements", [Sym("scalar", (1, 0))])
    with (
        Runtime(device(on)).load_program(tiny_decoder.build("ragged").pte) as program,
        BatchGenerator(program) as batch,
    ):
        assert batch.fallback == "sizes follow from past[0], which changes"


# -- decoding on the GPU


def calls_of(work: Callable[[], object]) -> int:
    """Python and C functions that `work` calls in this thread: what a step costs the host, without a clock."""
    count = 0

    def seen(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(seen)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def test_E17_a_replayed_step_costs_the_host_little(llama: Program) -> None:
    """Of the calls of a step whose plan must be looked up, a replayed one makes few; many steps in a submit fewer."""
    delegate = llama.load_method().delegates[0]
    replay = Replay(delegate, step(1, 0))
    for work in (lambda: replay.execute(step(1, 0)), lambda: delegate.execute(step(1, 0))):
        work()
    replayed = calls_of(lambda: replay.execute(step(1, 1)))
    executed = calls_of(lambda: delegate.execute(step(1, 2)))
    generator = made(llama, 16)
    tokens(generator, 2)
    generator.rewind_to(len(PROMPT))
    generator.append_tokens([4])
    resident = calls_of(lambda: generator.generate((), 17, stop_ids=())) / 17
    assert replayed < executed
    assert resident < executed / 4


@pytest.mark.parametrize("sampling", [Sampling(), DRAWN, Sampling(repetition_penalty=1.7)], ids=str)
def test_E18_steps_per_submit_change_no_token(program: Program, sampling: Sampling) -> None:
    expected = tokens(made(program, 0), CAPACITY - len(PROMPT), sampling)
    assert len(expected) == CAPACITY - len(PROMPT)
    for steps in (1, 4, 32, None):
        generator = made(program, steps)
        assert generator.fallback is None
        assert tokens(generator, CAPACITY - len(PROMPT), sampling) == expected
        assert generator.tokens == (*PROMPT, *expected)


@pytest.mark.parametrize("steps", [1, 3, 32])
def test_stop_tokens_are_honoured_exactly(llama: Program, steps: int) -> None:
    """Steps past the stop token have run; nothing of them remains."""
    expected = tokens(made(llama, 0), 16)
    generator = made(llama, steps)
    result = generator.generate(PROMPT, 16, stop_ids={expected[6]})
    assert result.tokens == expected[: expected.index(expected[6])]
    assert result.stop_reason == "stop_token"
    assert generator.tokens == (*PROMPT, *expected[: expected.index(expected[6]) + 1])
    plain = made(llama, 0)
    plain.append_tokens(generator.tokens)
    assert generator.generate((), 5, stop_ids=()).tokens == plain.generate((), 5, stop_ids=()).tokens


def test_the_sequence_may_change_inside_a_stream(llama: Program) -> None:
    expected = tokens(made(llama, 0), 10)
    generator = made(llama, 8)
    stream = generator.stream(PROMPT, 10, stop_ids=())
    seen = [next(stream) for _ in range(4)]
    generator.rewind_to(len(PROMPT) + 2)
    seen += [next(stream) for _ in range(3)]
    assert seen == [*expected[:4], *expected[2:5]]
    stream.close()  # type: ignore[attr-defined]
    assert generator.tokens == (*PROMPT, *expected[:5])
    assert generator.generate_next() == expected[5]


def test_E6_two_generators_interleaved_one_destroyed(llama: Program) -> None:
    expected = tokens(made(llama, 0), 16)
    other_prompt = [9, 8, 7, 6]
    plain = made(llama, 0)
    other = plain.generate(other_prompt, 16, stop_ids=()).tokens
    first, second = made(llama, 4), made(llama, 4)
    streams = first.stream(PROMPT, 16, stop_ids=()), second.stream(other_prompt, 16, stop_ids=())
    seen: tuple[list[int], list[int]] = ([], [])
    for _ in range(7):
        for stream, found in zip(streams, seen, strict=True):
            found.append(next(stream))
    streams[0].close()  # type: ignore[attr-defined]
    first.method.close()
    seen[1].extend(streams[1])
    assert seen[0] == list(expected[:7])
    assert seen[1] == list(other)


def test_E7_generators_leave_nothing_behind(llama: Program) -> None:
    method = llama.load_method()
    memory = llama.runtime.device.memory
    sizes, counts = [], []
    for _ in range(20):
        before = device_counters(llama)
        tokens(Generator(method, llama, steps_per_submit=4), 12)
        done = llama.runtime.device.counters.since(before)
        sizes.append(memory.total)
        counts.append((done.buffers, done.pipelines, done.bind_groups))
    assert len(set(sizes[1:])) == 1
    assert set(counts[1:]) == {(0, 0, 0)}


def test_E8_only_tokens_come_back(llama: Program) -> None:
    generator = made(llama, 4)
    tokens(generator, 8)
    generator.rewind_to(len(PROMPT))
    generator.append_tokens([4])
    before = device_counters(llama)
    generator.generate((), 9, stop_ids=())  # the first is chosen from logits that are here; eight more in two submits
    done = llama.runtime.device.counters.since(before)
    assert (done.reads, done.bytes_read, done.submits) == (2, 32, 2)
    assert done.bytes_written < 300
    assert (done.buffers, done.pipelines, done.bind_groups) == (0, 0, 0)


def test_E11_rubbish_between_replays_has_no_effect(llama: Program) -> None:
    expected = tokens(made(llama, 0), 12)
    generator = made(llama, 3)
    stream = generator.stream(PROMPT, 12, stop_ids=())
    seen = [next(stream) for _ in range(2)]
    stream.close()  # type: ignore[attr-defined]
    poison(generator.method.delegates[0])
    assert (*seen, *generator.generate((), 10, stop_ids=()).tokens) == expected


def test_E12_parts_outside_the_delegate_are_named(llama: Program) -> None:
    generator = made(llama)
    method = generator.method
    method.outside = lambda: ["aten::topk.values"]  # type: ignore[method-assign]
    with pytest.raises(UnsupportedError, match=r"aten::topk\.values run outside"):
        find_whole(method, generator.convention)
    assert Generator(method, llama).fallback == "aten::topk.values run outside the delegate"


def test_a_fallback_still_generates(llama: Program) -> None:
    expected = tokens(made(llama, 0), 6)
    generator = made(llama)
    generator.fallback = "for the test"
    result = generator.generate(PROMPT, 6, stop_ids=())
    assert result.tokens == expected
    assert result.steps_per_submit == 1


def test_a_run_does_not_pass_the_capacity(llama: Program) -> None:
    whole = find_whole(llama.load_method(), made(llama).convention)
    resident = Resident.of(whole, made(llama).convention, CAPACITY)
    resident.start(1, CAPACITY - 2, Sampling(), 0, ())
    before = device_counters(llama)
    with pytest.raises(InputError, match="outside"):
        resident.submit(3)
    assert llama.runtime.device.counters.since(before).submits == 0
    resident.submit(2)
    assert len(resident.collect()) == 2


def test_a_capacity_beyond_what_the_program_takes_is_found_out_step_by_step(llama: Program) -> None:
    whole = find_whole(llama.load_method(), made(llama).convention)
    resident = Resident.of(whole, made(llama).convention, CAPACITY + 9)
    for start, good in ((CAPACITY - 4, (3, 1)), (0, (2,)), (CAPACITY - 1, (1,))):
        resident.start(1, start, Sampling(), 0, ())
        for steps in good:
            with pytest.raises(InputError, match="outside"):
                resident.submit(CAPACITY + 1 - start)
            resident.submit(steps)
            assert len(resident.collect()) == steps


def test_no_more_submits_than_there_is_room_for(llama: Program) -> None:
    generator = made(llama)
    resident = Resident.of(find_whole(generator.method, generator.convention), generator.convention, CAPACITY)
    resident.start(1, 0, Sampling(), 0, ())
    resident.submit(1)
    resident.submit(1)
    with pytest.raises(DeviceError, match="collect one first"):
        resident.submit(1)
    resident.drop()
    assert resident.flying == 0


def test_nan_logits_are_an_error_and_the_sequence_stays(llama: Program) -> None:
    generator = made(llama, 2)
    tokens(generator, 3)
    [weights] = [buffer for value, buffer in weights_of(llama) if value == "out"]
    content = llama.runtime.device.gpu.queue.read_buffer(weights)
    llama.runtime.device.gpu.queue.write_buffer(weights, 0, np.full(weights.size // 4, np.nan, np.float32))
    length = generator.length
    with pytest.raises(WebGPUDelegateError, match="NaN"):
        generator.generate((), 4, stop_ids=())
    assert generator.length == length
    llama.runtime.device.gpu.queue.write_buffer(weights, 0, content)
    assert (*tokens_after(generator, 5),) == tokens(made(llama, 0), 8)[3:]


def tokens_after(generator: Generator, count: int) -> tuple[int, ...]:
    return generator.generate((), count, stop_ids=()).tokens


def weights_of(program: Program) -> list[tuple[str, Any]]:
    """(name, buffer) of every constant."""
    found = []
    for method in program._family:
        for delegate in method.delegates:
            for value in delegate.graph.values:
                if value.kind == "constant" and value.alias is None:
                    buffer = delegate.weights.get(value, delegate.source)
                    found.append((value.name.split("_")[-1].split(".")[-1], buffer))
    return list({id(buffer): (name, buffer) for name, buffer in found}.values())


def test_states_are_apart(llama: Program) -> None:
    """Two methods over one program's weights, decoding in turns on one delegate's shapes."""
    shared = State(llama.runtime.device)
    first = Generator(llama.load_method(state=shared), llama, steps_per_submit=2)
    expected = tokens(first, 6)
    second = Generator(llama.load_method(), llama, steps_per_submit=2)
    assert tokens(second, 6) == expected
    assert tokens_after(first, 4) == tokens_after(second, 4)


# -- small parts


def test_growth_of_live_scalars() -> None:
    position = Sym("scalar", (1, 0))
    assert growth(7, 1) == 0
    assert growth(Sym("input_dim", (0, 1)), 1) == 0
    assert growth(position, 1) == 1
    assert growth(position, 0) is None  # a token: nobody knows the next
    assert growth(Sym("add", (position, 5)), 1) == 1
    assert growth(Sym("sub", (3, position)), 1) == -1
    assert growth(Sym("mul", (4, position)), 1) == 4
    assert growth(Sym("mul", (position, position)), 1) is None
    assert growth(Sym("mod", (position, 8)), 1) is None
    assert growth(Sym("floordiv", (9, 2)), 1) == 0


def test_steps_per_submit_are_checked(llama: Program) -> None:
    with pytest.raises(InputError, match="steps_per_submit is -1"):
        made(llama, -1)


def test_batches_follow_the_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(np.cumsum([0.0, *[0.001] * 6, 1.0, 0.0]))
    monkeypatch.setattr("executorch_webgpu.runtime.decoding.resident.time.perf_counter", lambda: float(next(clock)))
    batch = Batch(None)
    sizes = []
    for _ in range(6):
        sizes.append(batch.steps)
        batch.done(batch.steps)
    assert sizes == [1, 2, 4, 8, 16, 32]
    batch.done(1)
    assert batch.steps == 1
    assert Batch(5).steps == 5


def test_the_stop_token_of_the_program(llama: Program) -> None:
    """Without stop ids given, those of the program count on the GPU path too."""
    assert STOP in made(llama).stop_ids
