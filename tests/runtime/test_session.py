"""Several sequences over one program: states, forks, snapshots, two methods, turns and threads (groups E and J of the
checklist)."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from executorch_webgpu.runtime import (
    Device,
    Generator,
    InputError,
    NGram,
    Program,
    Runtime,
    Sampling,
    State,
    UnsupportedError,
)  # fmt: skip
from executorch_webgpu.runtime.decoding.parts import find_methods
from executorch_webgpu.runtime.decoding.sampling import GREEDY
from tests import tiny_decoder, tiny_states
from tests.harness import device
from tests.runtime.sessions import DRAWN, PROMPT, after, golden, load, more
from tests.tiny_decoder import CAPACITY
from tests.tiny_states import EXACT

OTHER = [9, 8, 7, 6]


@pytest.fixture(params=[0, None, 3], ids=["host", "gpu", "gpu 3"])
def steps(request: pytest.FixtureRequest) -> int | None:
    found: int | None = request.param
    return found


@pytest.fixture
def fresh() -> Iterator[Program]:
    """A program that nothing else uses."""
    with Runtime(device("full")).load_program(tiny_decoder.build("llama").pte) as program:
        yield program


def used() -> dict[str, int]:
    gc.collect()  # generators that other tests have dropped
    return {name: size for name, size in device("full").memory.by_purpose.items() if size}


# -- several sequences


@pytest.mark.parametrize("kind", ["llama", "static", "both"])
def test_E6_two_generators_one_after_the_other_and_in_turns(kind: str, steps: int | None) -> None:
    expected = golden(kind, tuple(PROMPT), 16), golden(kind, tuple(OTHER), 16, DRAWN)
    with Generator(load(kind), steps_per_submit=steps) as first, Generator(load(kind), steps_per_submit=steps) as other:
        assert first.generate(PROMPT, 16, ()).tokens == expected[0]
        assert other.generate(OTHER, 16, (), DRAWN).tokens == expected[1]
        first.reset()
        other.rewind_to(0)
        streams = first.stream(PROMPT, 16, ()), other.stream(OTHER, 16, (), DRAWN)
        found = list(zip(*streams, strict=True))  # a token of each, in turn
        assert tuple(zip(*found, strict=True)) == expected


def test_E6_one_is_destroyed_the_other_goes_on(steps: int | None) -> None:
    expected = golden("llama", tuple(OTHER), 16)
    first, second = (Generator(load("llama"), steps_per_submit=steps) for _ in range(2))
    streams = first.stream(PROMPT, 16, ()), second.stream(OTHER, 16, ())
    found = [next(stream) for _ in range(5) for stream in streams][1::2]
    first.close()
    with pytest.raises(InputError, match="this generator was closed"):
        list(streams[0])
    assert (*found, *streams[1]) == expected
    second.close()


def test_E7_generators_leave_nothing_behind(fresh: Program) -> None:
    """Buffers, bytes and Python objects after the first are those after the twentieth."""
    memory, counts, objects = device("full").memory, [], []
    for turn in range(20):
        with Generator(fresh, steps_per_submit=(4, 0)[turn % 2]) as generator, generator.fork() as twin:
            assert generator.fallback is None or turn % 2
            generator.generate(PROMPT, 12, ())
            twin.generate(OTHER, 6, (), DRAWN)
        counts.append(memory.total)
        gc.collect()
        objects.append(len(gc.get_objects()))
    assert len(set(counts[2:])) == 1
    assert max(objects[10:]) - objects[9] < 50, objects


def test_E7_many_steps_leave_nothing_behind(steps: int | None) -> None:
    """Texts of the whole capacity, over and over; the program `benchmarks.sessions` does it with 20,000 steps."""
    with Generator(load("llama"), steps_per_submit=steps) as generator:
        sizes, counters = [], device("full").counters
        for turn in range(10):
            generator.rewind_to(0)
            before = counters.copy()
            generator.generate(PROMPT, None, ())
            if turn > 1:
                done = counters.since(before)
                assert (done.buffers, done.pipelines, done.bind_groups) == (0, 0, 0)
            gc.collect()
            sizes.append((device("full").memory.total, len(gc.get_objects())))
        assert len({size for size, _ in sizes[2:]}) == 1
        assert max(count for _, count in sizes[3:]) - sizes[2][1] < 50


def test_E7_dropped_generators_are_freed() -> None:
    before = used()
    generator = Generator(load("llama"))
    generator.append_tokens(PROMPT)
    assert used()["state"] > before.get("state", 0)
    del generator
    gc.collect()
    assert used().get("state", 0) == before.get("state", 0)


def test_E8_only_tokens_come_back_from_turns(fresh: Program) -> None:
    with Generator(fresh, steps_per_submit=4) as first, Generator(fresh, steps_per_submit=4) as second:
        for generator in (first, second):
            generator.generate(PROMPT, 9, ())
        before = device("full").counters.copy()
        for generator in (first, second):
            more(generator, 4)
        done = device("full").counters.since(before)
        assert (done.reads, done.bytes_read, done.submits) == (2, 32, 2)
        assert (done.buffers, done.pipelines, done.bind_groups) == (0, 0, 0)


def test_E9_a_prefill_of_another_sequence_between_steps(steps: int | None) -> None:
    """The longer call replaces buffers that the running stream was bound to, or at least its inputs."""
    with Runtime(device("full")).load_program(tiny_decoder.build("llama").pte) as program:
        first = Generator(program, steps_per_submit=steps)
        stream = first.stream(PROMPT[:1], 18, ())
        found = [next(stream) for _ in range(4)]
        second = Generator(program, steps_per_submit=steps)
        second.append_tokens(range(20))
        found += [next(stream) for _ in range(4)]
        second.rewind_to(0)
        second.append_tokens(range(7))
        assert (*found, *stream) == golden("llama", tuple(PROMPT[:1]), 18)


def test_E14_calls_of_several_lengths() -> None:
    """S in {1, 2, 4, 8} in one sequence, with another one between."""
    with Generator(load("long")) as one, Generator(load("long"), steps_per_submit=0) as other:
        text: list[int] = []
        for length in (8, 1, 4, 2, 1, 8, 4, 1):
            part = [(7 * i + len(text)) % 250 for i in range(length)]
            text += part
            one.append_tokens(part)
            other.reset()
            other.append_tokens(text)
            assert one.logits is not None
            assert other.logits is not None
            np.testing.assert_allclose(one.logits, other.logits, rtol=1e-4, atol=1e-4)


def test_E15_recurrent_state() -> None:
    """Five steps are those of PyTorch; the state of one sequence is not that of another."""
    import torch

    module = tiny_states.Recurrent().eval()
    with Generator(load("recurrent")) as generator, Generator(load("recurrent")) as other:
        for position, token in enumerate([5, 7, 5, 11, 2]):
            generator.append_tokens([token])
            other.append_tokens([token + position])
            with torch.no_grad():
                expected = module(torch.tensor([[token]]), torch.tensor([position]))[0]
            assert generator.logits is not None
            np.testing.assert_allclose(generator.logits, expected.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_E18_replay_changes_no_token(sampling: Sampling) -> None:
    """Over 256 tokens: each text goes on with the end of the last."""
    with Generator(load("long")) as captured, Generator(load("long"), steps_per_submit=0) as plain:
        prompt = list(PROMPT)
        for _ in range(4):
            texts = [g.generate(prompt, 64, (), sampling).tokens for g in (captured, plain)]
            assert texts[0] == texts[1]
            prompt = list(texts[0][-5:])
            captured.rewind_to(0)
            plain.reset()


# -- forks


@pytest.mark.parametrize("kind", ["llama", "static", "f16", "both", "ring", "recurrent"])
@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_J5_two_continuations_of_a_fork(kind: str, sampling: Sampling, steps: int | None) -> None:
    """Both are those of independent runs, in turns, and the fork outlives its origin."""
    expected = golden(kind, tuple(PROMPT), 14, sampling)
    other = after(kind, [*PROMPT, *expected[:5], 30, 31], 6, sampling)
    with Generator(load(kind), steps_per_submit=steps) as generator:
        generator.generate(PROMPT, 5, (), sampling)
        with generator.fork() as fork:
            assert fork.tokens == generator.tokens
            assert fork.steps_per_submit == generator.steps_per_submit
            fork.append_tokens([30, 31])
            assert more(generator, 2, sampling) == expected[5:7]
            assert more(fork, 3, sampling) == other[:3]
            assert more(generator, 3, sampling) == expected[7:10]
            generator.close()
            assert more(fork, 3, sampling) == other[3:]


def test_forks_keep_the_random_stream() -> None:
    """Also where the settings name no seed."""
    hot = Sampling(temperature=2.0)
    with Generator(load("llama")) as generator:
        generator.append_tokens(PROMPT)
        with generator.fork() as fork:
            assert more(generator, 12, hot) == more(fork, 12, hot)


def test_forks_copy_the_rows_in_use_alone(fresh: Program) -> None:
    """And cost the memory of a state (the params of a plan apart), no weights, no temporaries, no pipelines."""
    with Generator(fresh) as generator:
        generator.generate(PROMPT, 8, ())
        for name, buffer in generator.state.buffers().items():
            value = generator.state.values()[name]
            row = int(np.prod(value.shape[2:])) * 4
            device("full").gpu.queue.write_buffer(
                buffer, 10 * row, np.full((CAPACITY - 10) * row // 4, np.nan, np.float32)
            )
        memory, counters = used(), device("full").counters.copy()
        with generator.fork() as fork:
            expected = more(generator, 5)
            assert more(fork, 5) == expected
            now = used()
            own = sum(buffer.size for buffer in generator.state.buffers().values())
            assert now.pop("state") == memory.pop("state") + own
            assert now.pop("other") - memory.pop("other") < 8192
            assert now.pop("read-back") - memory.pop("read-back") <= 1024
            assert now == memory
            assert device("full").counters.since(counters).pipelines == 0
            for name, buffer in fork.state.buffers().items():
                content = np.frombuffer(device("full").gpu.queue.read_buffer(buffer), np.float32)
                assert np.isfinite(content).all(), name  # rows after the tenth were not copied


def test_snapshots_of_one_generator_restore_another() -> None:
    expected = golden("llama", tuple(PROMPT), 12)
    with Generator(load("llama")) as generator, Generator(load("llama")) as other:
        generator.generate(PROMPT, 6, ())
        snapshot = generator.snapshot()
        generator.reset()
        other.append_tokens(OTHER)
        other.restore(snapshot)
        assert other.tokens == (*PROMPT, *expected[:6])
        assert more(other, 6) == expected[6:]
        with Generator(load("hugging_face")) as foreign, pytest.raises(InputError, match="another program or device"):
            foreign.restore(snapshot)
        snapshot.close()
        with pytest.raises(InputError, match="closed"):
            generator.restore(snapshot)


# -- states and methods


def test_states_belong_to_whom_they_are_given(fresh: Program) -> None:
    before = used().get("state", 0)
    method = fresh.load_method()
    states = [method.new_state(), fresh.new_state(), method.new_state()]
    assert states[0].buffers().keys() == method.state.buffers().keys()
    expected = golden("llama", tuple(PROMPT), 6)
    for source in (fresh, method):
        for state in states:
            with Generator(source, fresh, state=state) as generator:
                assert generator.state is state
                assert generator.generate(PROMPT, 6, ()).tokens == expected
            assert not state.closed
    assert method.execute([np.array([[1]]), np.array([0])])[0].shape == (1, tiny_decoder.VOCAB)
    for state in states:
        state.close()
    assert used()["state"] == before + sum(buffer.size for buffer in method.state.buffers().values())


def test_a_state_taken_over_is_noticed(fresh: Program) -> None:
    method = fresh.load_method()
    first, second = Generator(method, fresh), Generator(method, fresh)
    first.generate(PROMPT, 4, ())
    assert second.generate(PROMPT, 4, ()).tokens == first.tokens[3:]
    for call in (
        first.generate_next, first.snapshot, first.fork, lambda: first.append_tokens([1]), lambda: first.rewind_to(1),
        lambda: first.stream(max_new_tokens=1),
    ):  # fmt: skip
        with pytest.raises(InputError, match="another generator has used this one's state"):
            call()
    assert first.length == 7
    first.reset()
    assert first.generate(PROMPT, 4, ()).tokens == second.tokens[3:]


@pytest.mark.parametrize("speculate", [None, NGram(adaptive=False)], ids=["plain", "drafts"])
@pytest.mark.parametrize("steps", [0, 1, 4], ids=["host", "one", "four"])
def test_a_state_taken_over_in_the_middle_of_a_stream_is_noticed(steps: int, speculate: NGram | None) -> None:
    """Tokens that were on their way may still come; none that other tokens' rows have changed."""
    program, right = load("hugging_face"), golden("hugging_face", (7, 7, 7), 20)
    with Generator(program, steps_per_submit=steps) as first:
        stream = first.stream([7, 7, 7], 20, (), speculate=speculate)
        found = [next(stream), next(stream)]
        with Generator(program, steps_per_submit=steps, state=first.state) as second:
            second.generate([100, 42, 9, 9, 9, 9, 9, 9], 8, ())
            with pytest.raises(InputError, match="another generator has used this one's state"):
                found.extend(stream)
            assert tuple(found) == right[: len(found)]
            assert len(found) < len(right)
            assert second.generate((), 2, ()).tokens == after("hugging_face", second.tokens[:16], 2)


@pytest.mark.parametrize("steps", [0, 4], ids=["host", "four"])
def test_a_sequence_of_one_token_takes_the_state_over(steps: int) -> None:
    program = load("hugging_face")
    first = Generator(program, steps_per_submit=steps)
    with first, Generator(program, steps_per_submit=steps, state=first.state) as second:
        second.generate(PROMPT, 4, ())
        first.become([5])
        assert first.generate((), 9, ()).tokens == golden("hugging_face", (5,), 9)
        with pytest.raises(InputError, match="another generator has used this one's state"):
            second.generate((), 2, ())


def test_what_was_closed_says_so(fresh: Program) -> None:
    state = fresh.new_state()
    generator = Generator(fresh, state=state)
    generator.append_tokens(PROMPT)
    counters = device("full").counters
    state.close()
    before = counters.copy()
    for call in (generator.generate_next, generator.reset, lambda: generator.append_tokens([1]), generator.fork):
        with pytest.raises(InputError, match="this state was closed: make a new one"):
            call()
    with pytest.raises(InputError, match="this state was closed"):
        generator.method.execute([np.array([[1]]), np.array([0])])
    with pytest.raises(InputError, match="this state was closed"):
        Generator(fresh, state=state)
    generator.close()
    generator.close()
    for call in (
        generator.generate_next, generator.reset, generator.fork, generator.snapshot, generator.profile_step,
        lambda: generator.append_tokens([1]), lambda: generator.rewind_to(1), lambda: generator.stream([1], 1),
        lambda: generator.save("nowhere"), lambda: generator.load("nowhere"),
    ):  # fmt: skip
        with pytest.raises(InputError, match="this generator was closed"):
            call()
    with pytest.raises(InputError, match="method forward was closed"):
        generator.method.execute([np.array([[1]]), np.array([0])])
    assert counters.since(before).submits == 0
    method = fresh.load_method()
    method.close()
    for call in (method.new_state, method.on_state):
        with pytest.raises(InputError, match="method forward was closed: load it again"):
            call()


def test_states_of_other_programs_do_not_fit(fresh: Program) -> None:
    with (
        Generator(load("f16")) as foreign,
        pytest.raises(InputError, match="the state belongs to another program"),
    ):
        Generator(fresh, state=foreign.state)


def test_programs_free_the_states_of_their_forks() -> None:
    before = used()
    program = Runtime(device("full")).load_program(tiny_decoder.build("static").pte)
    generator = Generator(program)
    generator.append_tokens(PROMPT)
    fork = generator.fork()
    snapshot = fork.snapshot()
    generator.close()
    program.close()
    snapshot.close()
    assert used() == before
    with pytest.raises(InputError, match="this state was closed"):
        fork.generate_next()


# -- two methods


def test_two_methods_share_one_state(steps: int | None) -> None:
    expected = golden("hugging_face", tuple(PROMPT), 12)
    program = load("both")
    with Generator(program, steps_per_submit=steps) as generator:
        assert (generator.prefill.name, generator.method.name) == ("prefill", "decode")
        assert generator.prefill.state is generator.method.state
        before = device("full").counters.copy()
        generator.append_tokens(PROMPT)
        assert device("full").counters.since(before).submits <= 2  # one call, and clearing the state
        assert more(generator, 12) == expected
    with Generator(program.load_method("decode"), program, prefill=program.load_method("prefill")) as loaded:
        assert loaded.generate(PROMPT, 12, ()).tokens == expected
    with Generator(program, decode="decode", prefill="decode") as single:
        assert single.generate(PROMPT, 12, ()).tokens == expected
    with Generator(program, decode="prefill", prefill="prefill") as wide:
        assert wide.generate(PROMPT, 12, ()).tokens == expected


@pytest.mark.parametrize("length", [1, EXACT - 1, EXACT, EXACT + 1, 3 * EXACT + 2])
def test_a_prefill_method_may_take_exactly_so_many(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = [(5 * i + 1) % 256 for i in range(length)]
    with Generator(load("exact")) as generator:
        calls: list[int] = []
        execute = generator.prefill.execute
        monkeypatch.setattr(
            generator.prefill, "execute", lambda x, cut: (calls.append(x[0].shape[1]), execute(x, cut))[1]
        )
        assert generator.generate(prompt, 6, ()).tokens == golden("llama", tuple(prompt), 6)
        assert calls == [EXACT] * (length // EXACT)


def test_methods_are_found_or_asked_for(fresh: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    program = load("both")
    assert find_methods(fresh) == ("forward", "forward")
    assert find_methods(program) == ("prefill", "decode")
    assert find_methods(program, decode="prefill") == ("prefill", "prefill")
    assert find_methods(program, prefill="decode", decode="decode") == ("decode", "decode")
    info = program.metadata("prefill")
    monkeypatch.setattr(program, "metadata", lambda name: info)
    with pytest.raises(InputError, match=r"has the decoders decode, prefill: say which one runs prompts"):
        find_methods(program)
    with pytest.raises(InputError, match="methods are named where a program is given"):
        Generator(fresh.load_method(), fresh, decode="decode")
    with pytest.raises(InputError, match="prefill is a method"):
        Generator(program, prefill=fresh.load_method())


def test_methods_with_other_state_are_refused() -> None:
    ring, recurrent = load("ring").load_method(), load("recurrent").load_method()
    memory = used()
    with pytest.raises(UnsupportedError, match=r"do not keep the same state.*cache_positions"):
        Generator(ring, load("ring"), prefill=recurrent, state=ring.state)
    assert used() == memory
    recurrent.close()
    ring.close()


# -- threads


def test_K3_four_sessions_in_four_threads(fresh: Program) -> None:
    """Each thread's text is that of a run alone."""
    prompts = [[i + 1, 2 * i + 5, 40] for i in range(4)]
    expected = [golden("llama", tuple(p), 18, DRAWN if i % 2 else GREEDY) for i, p in enumerate(prompts)]
    generators = [Generator(fresh, steps_per_submit=(None, 3, 0, 1)[i]) for i in range(4)]
    found: dict[int, list[tuple[int, ...]]] = {i: [] for i in range(4)}
    start = threading.Barrier(4)

    def work(number: int) -> None:
        start.wait()
        for _ in range(3):
            sampling = DRAWN if number % 2 else GREEDY
            found[number].append(generators[number].generate(prompts[number], 18, (), sampling).tokens)
            generators[number].rewind_to(0)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(4):
        assert found[number] == [expected[number]] * 3


def test_sessions_on_several_devices() -> None:
    other: Device = device("default-limits")
    with Generator(load("llama")) as here, Generator(load("llama on default-limits")) as there:
        assert there.method.device is other
        streams = here.stream(PROMPT, 10, ()), there.stream(PROMPT, 10, ())
        found = list(zip(*streams, strict=True))
        assert all(a == b for a, b in found)
        with pytest.raises(InputError, match="another program or device"):
            here.restore(there.snapshot())


def test_a_new_state_is_empty() -> None:
    state = State(device("full"))
    assert (state.buffers(), state.values(), state.closed) == ({}, {}, False)
