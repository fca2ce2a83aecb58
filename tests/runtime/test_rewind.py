"""Group F of the checklist: rewinding and going on, with steps one by one and on the GPU, over the programs'
conventions and dtypes. Rows F2 and F18 are about batches; see test_batch*.py."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from executorch_webgpu.runtime import Generator, InputError, Sampling, UnsupportedError
from executorch_webgpu.runtime.methods.delegate import Delegate
from tests.runtime.sessions import DRAWN, PROMPT, after, golden, load, more
from tests.tiny_decoder import CAPACITY, STOP
from tests.tiny_states import LONG, RING, WINDOW

KINDS = ("llama", "static", "hugging_face", "f16", "f16 on default-limits", "i32", "both", "exact")
"""One method and two; S dynamic and 1; positions given as one number and as many; f32, f16; i64, i32."""
REPLAY = {"host": 0, "gpu": None}


@pytest.fixture(params=REPLAY)
def steps(request: pytest.FixtureRequest) -> int | None:
    return REPLAY[request.param]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def generator(kind: str, steps: int | None) -> Iterator[Generator]:
    with Generator(load(kind), steps_per_submit=steps) as made:
        assert (made.fallback is None) == (steps is None)
        yield made


def test_F1_rewind_to_0(generator: Generator, kind: str) -> None:
    expected = golden(kind, tuple(PROMPT), 12)
    for _ in range(3):
        assert generator.generate(PROMPT, 12, ()).tokens == expected
        generator.rewind_to(0)
    assert generator.length == 0


def test_F3_the_first_10_of_15(generator: Generator, kind: str) -> None:
    expected = generator.generate(PROMPT, 12, ()).tokens
    kept = generator.tokens[:10]
    generator.rewind_to(10)
    assert generator.tokens == kept
    assert more(generator, 5) == expected[7:]


def test_F4_half_of_what_was_generated(generator: Generator, kind: str) -> None:
    expected = generator.generate(PROMPT, 10, ()).tokens
    generator.rewind_to(len(PROMPT) + 5)
    assert more(generator, 5) == expected[5:]


def test_F5_successive_rewinds(generator: Generator, kind: str) -> None:
    expected = (*PROMPT, *generator.generate(PROMPT, 7, ()).tokens)
    for length in (7, 5):
        generator.rewind_to(length)
        assert (*generator.tokens[:length], *more(generator, 10 - length)) == expected
    generator.rewind_to(0)
    assert generator.generate(PROMPT, 7, ()).tokens == expected[3:]


def test_F6_before_a_divergence(generator: Generator, kind: str) -> None:
    expected = generator.generate(PROMPT, 9, ()).tokens
    generator.rewind_to(6)
    generator.append_tokens([250, 17, 99])
    assert more(generator, 3) == after(kind, [*PROMPT, *expected[:3], 250, 17, 99], 3)
    generator.rewind_to(6)
    assert more(generator, 6) == expected[3:]


def test_F7_inside_the_prompt(generator: Generator, kind: str) -> None:
    generator.append_tokens([5, 6, 7, 8, 9, 10])
    generator.rewind_to(3)
    generator.append_tokens([40, 41])
    assert more(generator, 6) == after(kind, [5, 6, 7, 40, 41], 6)


def test_F8_the_last_prompt_token_again(generator: Generator, kind: str) -> None:
    expected = generator.generate(PROMPT, 5, ()).tokens
    generator.rewind_to(len(PROMPT) - 1)
    generator.append_tokens(PROMPT[-1:])
    assert more(generator, 5) == expected


def test_F9_deep(generator: Generator) -> None:
    expected = generator.generate(PROMPT, None, ()).tokens
    assert generator.length == CAPACITY
    for length in (CAPACITY - 3, 3):
        generator.rewind_to(length)
        assert more(generator, CAPACITY - length) == expected[length - 3 :]


@pytest.mark.parametrize("kind", ["long", "ring"])
def test_F9_after_50_tokens(kind: str, steps: int | None) -> None:
    with Generator(load(kind), steps_per_submit=steps) as generator:
        expected = generator.generate(PROMPT, 50, ()).tokens
        for back in (3, 50) if kind == "long" else (3, 7):  # a ring of 16 rows holds what the last 8 tokens see
            generator.rewind_to(generator.length - back)
            assert more(generator, back) == expected[-back:]


def test_F11_the_flows_run_on_all_kinds_of_programs(generator: Generator, kind: str, steps: int | None) -> None:
    """What the tests of F1 to F9 are parametrised over is what it says."""
    meta, prompts = generator.method.metadata, generator.prefill.metadata
    tokens, first = meta.input_tensor_meta(0), prompts.input_tensor_meta(0)
    assert tokens.dtype == meta.input_tensor_meta(1).dtype == ("i32" if kind == "i32" else "i64")
    assert {value.dtype for value in generator.state.values().values()} == {"f16" if kind[:3] == "f16" else "f32"}
    assert tokens.dynamic == (kind not in ("static", "both", "exact"))
    assert first.dynamic == (kind not in ("static", "exact"))
    assert generator.convention.every_position == (kind == "hugging_face")
    assert (generator.prefill is generator.method) == (kind not in ("both", "exact"))
    assert (generator.fallback is None) == (steps is None)


# -- limits and errors


def test_F10_what_cannot_be_rewound(generator: Generator) -> None:
    generator.generate(PROMPT, 4, ())
    tokens = generator.tokens
    before = generator.method.device.counters.copy()
    for length in (8, CAPACITY + 1, -1):
        with pytest.raises(InputError, match=f"cannot rewind to {length}: the sequence has 7 tokens"):
            generator.rewind_to(length)
    generator.rewind_to(7)
    done = generator.method.device.counters.since(before)
    assert (done.submits, done.writes, done.buffers, done.reads) == (0, 0, 0, 0)
    assert generator.tokens == tokens


@pytest.mark.parametrize("offset", [0, 1, 3])
def test_F12_the_last_kept_token_is_run_again(generator: Generator, offset: int) -> None:
    """rewind(L), generate == rewind(L - 1), append the old token L - 1, generate; the logits too."""
    expected = generator.generate(PROMPT, 8, ()).tokens
    length = len(PROMPT) + 4 + offset
    old = generator.tokens[length - 1]
    found, logits = [], []
    for again in (False, True):
        generator.rewind_to(length - again)
        if again:
            generator.append_tokens([old])
        generator.generate_next()
        generator.rewind_to(length)
        assert generator.logits is not None
        logits.append(generator.logits.copy())
        found.append(more(generator, 4 - offset))
    assert found[0] == found[1] == expected[4 + offset :]
    np.testing.assert_array_equal(logits[0], logits[1])


def test_F13_rewinding_costs_nothing(generator: Generator) -> None:
    """No write, no copy, no submit; and what the next step writes does not depend on the length."""
    counters = generator.method.device.counters
    generator.generate(PROMPT, None, ())
    costs = set()
    for length in (20, 13, 6, 2):
        before = counters.copy()
        generator.rewind_to(length)
        done = counters.since(before)
        assert (done.writes, done.bytes_written, done.submits, done.bind_groups, done.buffers) == (0, 0, 0, 0, 0)
        more(generator, 1)
        more(generator, 1)
        generator.rewind_to(length)
        before = counters.copy()
        more(generator, 1)
        done = counters.since(before)
        costs.add((done.writes, done.bytes_written, done.submits, done.buffers, done.bind_groups))
    assert len(costs) == 1, costs


def test_F14_stale_rows_are_not_read(generator: Generator) -> None:
    expected = generator.generate(PROMPT, 14, ()).tokens
    length = 9
    generator.rewind_to(length)
    poison(generator, length)
    assert more(generator, 8) == expected[6:14]


def poison(generator: Generator, length: int) -> None:
    """NaN in every cache row from `length` on."""
    for name, buffer in generator.state.buffers().items():
        value = generator.state.values()[name]
        item = 2 if value.dtype == "f16" and generator.method.device.limits.f16 else 4
        row = int(np.prod(value.shape[2:])) * item
        count = (buffer.size - length * row) // item
        bits = np.full(count, 0x7E00, np.uint16) if item == 2 else np.full(count, 0x7FC00000, np.uint32)
        generator.method.device.gpu.queue.write_buffer(buffer, length * row, bits)


@pytest.mark.parametrize("sampling", [DRAWN, Sampling(temperature=1.3, min_p=0.01)], ids=["seeded", "own seed"])
def test_F15_the_random_stream_is_rewound(generator: Generator, sampling: Sampling) -> None:
    """Whatever was drawn before: the number of an id depends on its position."""
    expected = generator.generate(PROMPT, 14, (), sampling).tokens
    generator.rewind_to(8)
    assert more(generator, 9, sampling) == expected[5:]
    generator.rewind_to(0)
    generator.append_tokens([*PROMPT, *expected[:5]])
    assert more(generator, 9, sampling) == expected[5:]


def test_F17_other_prompts_across_a_tile(steps: int | None) -> None:
    """Longer and shorter prompts than before in the middle of what was there, to lengths around 64."""
    with Generator(load("long"), steps_per_submit=steps) as generator:
        for length, end in ((0, 65), (63, 64), (62, 63), (7, 70), (60, 64), (1, 5), (4, 66)):
            generator.rewind_to(length)
            generator.append_tokens([(11 * i + end) % 250 for i in range(end - length)])
            assert more(generator, 3) == after("long", generator.tokens[:end], 3)


def test_F20_nothing_and_too_much(generator: Generator) -> None:
    generator.append_tokens(PROMPT)
    before = generator.method.device.counters.copy()
    with pytest.raises(InputError, match="no tokens"):
        generator.append_tokens([])
    with pytest.raises(InputError, match="capacity of 24"):
        generator.append_tokens([1] * (CAPACITY - 2))
    assert generator.method.device.counters.since(before).submits == 0
    assert generator.tokens == tuple(PROMPT)


def test_F21_the_finished_flag(generator: Generator, kind: str) -> None:
    expected = golden(kind, tuple(PROMPT), 12)
    stop = expected[6]
    place = expected.index(stop)
    assert not generator.finished
    result = generator.generate(PROMPT, 12, stop_ids=[stop])
    assert (result.tokens, result.stop_reason) == (expected[:place], "stop_token")
    assert generator.finished
    generator.rewind_to(generator.length - 1)
    assert not generator.finished
    assert generator.generate_next(stop_ids=[stop]) == stop
    assert generator.finished
    generator.append_tokens([5])
    assert not generator.finished
    generator.rewind_to(len(PROMPT))
    more(generator, CAPACITY - len(PROMPT))
    assert generator.finished  # the capacity is reached
    generator.rewind_to(CAPACITY - 1)
    assert not generator.finished
    assert STOP in generator.stop_ids or kind == "static"


def test_F22_over_and_over(generator: Generator, kind: str) -> None:
    expected = golden(kind, tuple(PROMPT), 8)
    memory, sizes = generator.method.device.memory, []
    for turn in range(50):
        generator.rewind_to(turn % 3 if generator.length else 0)
        generator.append_tokens(PROMPT[generator.length :])
        assert more(generator, 2 + turn % 7) == expected[: 2 + turn % 7]
        generator.rewind_to(2)
        generator.append_tokens([77, 78])
        if turn > 3:
            sizes.append(memory.total)
    assert len(set(sizes)) == 1


# -- state that is no cache by position


def test_F16_ring_buffers_go_back_as_far_as_they_hold(steps: int | None) -> None:
    """A ring of 16 rows for a window of 8: after n tokens it holds n - 16 and later; a token sees the 7 before it."""
    total = 40
    with Generator(load("ring"), steps_per_submit=steps) as generator:
        expected = (*PROMPT, *golden("ring", tuple(PROMPT), total - len(PROMPT)))
        assert (*PROMPT, *generator.generate(PROMPT, total - len(PROMPT), ()).tokens) == expected
        run = total - 1  # the last token was chosen, not run
        least = run - RING + WINDOW
        tokens = generator.tokens
        for length in (least - 1, 17, 1):
            with pytest.raises(UnsupportedError, match=f"the least length is {least}"):
                generator.rewind_to(length)
        assert generator.tokens == tokens
        for length in (least, least + 3, total - 1):
            generator.rewind_to(length)
            assert (*tokens[:length], *more(generator, total - length)) == expected
        generator.rewind_to(least)
        generator.append_tokens([250, 251, 252])
        with pytest.raises(UnsupportedError, match=f"the least length is {least}"):
            generator.rewind_to(least - 1)
        generator.rewind_to(least)  # nothing was evicted that was not there before
        assert (*tokens[:least], *more(generator, total - least)) == expected


def test_F16_before_a_ring_is_full_all_lengths_are_good(steps: int | None) -> None:
    with Generator(load("ring"), steps_per_submit=steps) as generator:
        expected = (*PROMPT, *generator.generate(PROMPT, 13, ()).tokens)
        for length in (5, 1, 15, 2):
            generator.rewind_to(length)
            if length < len(PROMPT):
                generator.append_tokens(PROMPT[length:])
            more(generator, 16 - generator.length)
            assert generator.tokens == expected
        generator.rewind_to(0)
        assert generator.generate(PROMPT, 13, ()).tokens == expected[3:]


def test_F16_unknown_rings_cannot_go_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """One record that differs from the known layout is enough."""
    from executorch_webgpu.runtime.decoding import rings

    with Generator(load("ring")) as generator:
        graph = generator.method.delegates[0].graph
        assert rings.find_rings(generator.method, LONG) == rings.Rings(RING, WINDOW)
        known = {id(node) for node in graph.nodes}
        assert known
        changes = [
            ("aten.lt.Scalar", "other", 1.5), ("aten.remainder.Scalar", "other", RING - 1),
            ("aten.full.default", "fill_value", 0), ("aten.ge.Scalar", "other", 1),
            ("aten.scalar_tensor.default", "s", 3), ("aten.sub.Tensor", "alpha", 2),
            ("aten.index_put.default", "accumulate", True), ("aten.arange.start_step", "start", 1),
        ]  # fmt: skip
        for op, name, value in changes:
            assert any(node.op == op for node in graph.nodes), op
            nodes = tuple(_changed(node, op, name, value) for node in graph.nodes)
            delegate = _like(generator.method.delegates[0], nodes)
            monkeypatch.setattr(generator.method, "delegates", [delegate])
            assert rings.find_rings(generator.method, LONG) is None, op
            monkeypatch.undo()


def _changed(node: object, op: str, name: str, value: object) -> object:
    from dataclasses import replace

    from executorch_webgpu.backend.graph import Node

    assert isinstance(node, Node)
    return replace(node, args={**node.args, name: value}) if node.op == op else node  # type: ignore[dict-item]


def _like(delegate: Delegate, nodes: tuple[object, ...]) -> object:
    from dataclasses import replace
    from types import SimpleNamespace

    return SimpleNamespace(graph=replace(delegate.graph, nodes=nodes))  # type: ignore[arg-type]


def test_F19_recurrent_state_goes_back_to_snapshots_only(steps: int | None) -> None:
    with Generator(load("recurrent"), steps_per_submit=steps) as generator:
        assert generator.fallback is not None
        expected = generator.generate(PROMPT, 10, ()).tokens
        generator.reset()
        generator.generate(PROMPT, 4, ())
        with generator.snapshot() as snapshot:
            assert snapshot.length == 7
            more(generator, 5)
            tokens = generator.tokens
            with pytest.raises(UnsupportedError, match="only be reset, or restored from a snapshot"):
                generator.rewind_to(7)
            assert generator.tokens == tokens
            for _ in range(2):
                generator.restore(snapshot)
                assert generator.tokens == (*PROMPT, *expected[:4])
                assert more(generator, 6) == expected[4:]
            generator.rewind_to(0)
            assert generator.generate(PROMPT, 10, ()).tokens == expected
        with pytest.raises(InputError, match="closed"):
            generator.restore(snapshot)
        assert generator.tokens == (*PROMPT, *expected)
        generator.rewind_to(generator.length - 1)  # the last one was not run yet
        assert more(generator, 1) == expected[-1:]
