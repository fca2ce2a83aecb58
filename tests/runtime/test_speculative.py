"""Speculative decoding: the same tokens as without drafts, whatever was drafted (row J4 of the checklist)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from executorch_webgpu.runtime import DraftModel, Generator, InputError, NGram, Sampling, Speculation, UnsupportedError
from executorch_webgpu.runtime.decoding.sampling import GREEDY
from executorch_webgpu.runtime.decoding.session import Session
from executorch_webgpu.runtime.decoding.speculative import Proposals, Verifier
from executorch_webgpu.runtime.errors import WebGPUDelegateError
from tests.harness import device
from tests.runtime.sessions import DRAWN, PROMPT, golden, load, more
from tests.tiny_decoder import CAPACITY, VOCAB
from tests.tiny_states import LONG

KINDS = ("hugging_face", "long", "both")
"""Programs that give all logits: positions as many, as one, and in a second method."""
PENALISED = Sampling(temperature=0.9, top_k=40, repetition_penalty=1.4, seed=3)
SAMPLINGS = {
    "greedy": GREEDY,
    "drawn": DRAWN,
    "penalised": PENALISED,
    "greedy penalised": Sampling(repetition_penalty=1.3),
}


class Oracle:
    """Drafts a given text, of which every n-th token is wrong."""

    def __init__(self, text: Sequence[int], most: int, wrong: int = 0) -> None:
        self.text, self.most, self.wrong = list(text), most, wrong

    def begin(self, target: Session, sampling: Sampling, seed: int) -> Proposals:
        return self

    def draft(self, tokens: Sequence[int], count: int) -> list[int]:
        found = []
        for place in range(len(tokens), min(len(tokens) + count, len(self.text))):
            bad = self.wrong and place % self.wrong == 0
            found.append((self.text[place] + 1) % VOCAB if bad else self.text[place])
        return found


@pytest.fixture(params=[0, None], ids=["host", "gpu"])
def steps(request: pytest.FixtureRequest) -> int | None:
    found: int | None = request.param
    return found


@pytest.mark.parametrize("how", SAMPLINGS)
@pytest.mark.parametrize("most", [1, 2, 4, 8])
def test_J4_the_tokens_are_those_of_plain_decoding(most: int, how: str, steps: int | None) -> None:
    sampling = SAMPLINGS[how]
    for kind in KINDS:
        count = 40 if kind == "long" else CAPACITY - len(PROMPT)
        expected = golden(kind, tuple(PROMPT), count, sampling)
        text = [*PROMPT, *expected]
        for drafter in (Oracle(text, most), Oracle(text, most, 5), Oracle(text, most, 1), NGram(most, 3, 1)):
            with Generator(load(kind), steps_per_submit=steps) as generator:
                result = generator.generate(PROMPT, count, (), sampling, speculate=drafter)
                assert result.tokens == expected, (kind, drafter)
                assert generator.tokens == (*PROMPT, *expected)
                assert result.stop_reason == "max_new_tokens"
                found = result.speculation
                assert found is not None
                assert 0 <= found.accepted <= found.drafted <= found.calls * min(most, 7)
                if isinstance(drafter, Oracle) and drafter.wrong == 0:
                    assert found.accepted == found.drafted > 0
                    calls, rest = divmod(count - 1, min(most, 7) + 1)  # but for the first
                    assert found.calls == calls + (rest > 1)
                elif isinstance(drafter, Oracle) and drafter.wrong == 1:
                    assert found.accepted == 0 < found.drafted


@pytest.mark.parametrize("count", [2, 3, 5, 8])
def test_J4_logits_of_several_tokens_are_those_of_single_ones(count: int) -> None:
    with Generator(load("long")) as one, Generator(load("long")) as several:
        ids = [(13 * i + 4) % VOCAB for i in range(count)]
        one.append_tokens(PROMPT)
        several.append_tokens(PROMPT)
        part = several._first
        rows = np.asarray(part.method.execute(part.convention.inputs(ids, len(PROMPT)))[0])[0]
        whole = Verifier.of_part(part)
        chosen = whole.choose(ids, len(PROMPT))
        for row, token, best in zip(rows, ids, chosen, strict=True):
            one.append_tokens([token])
            assert one.logits is not None
            np.testing.assert_allclose(row, one.logits, rtol=1e-3, atol=1e-4)
            assert best == int(np.argmax(row))


def test_stop_tokens_end_the_text_inside_a_draft(steps: int | None) -> None:
    expected = golden("long", tuple(PROMPT), 30)
    for place in (1, 4, 6, 11):
        stop = expected[place]
        first = expected.index(stop)
        with Generator(load("long"), steps_per_submit=steps) as generator:
            drafter = Oracle([*PROMPT, *expected], 7)
            result = generator.generate(PROMPT, 30, stop_ids=[stop], speculate=drafter)
            assert (result.tokens, result.stop_reason) == (expected[:first], "stop_token")
            assert generator.tokens == (*PROMPT, *expected[: first + 1])
            assert generator.finished
            assert more(generator, 20 - first) == expected[first + 1 : 21]


@pytest.mark.parametrize("prompt_length", [1, LONG - 1, LONG - 2, LONG - 9, LONG - 10])
def test_the_capacity_is_reached_exactly(prompt_length: int, steps: int | None) -> None:
    prompt = tuple((3 * i + 1) % 250 for i in range(prompt_length))
    expected = golden("long", prompt, LONG - prompt_length)
    with Generator(load("long"), steps_per_submit=steps) as generator:
        result = generator.generate(list(prompt), None, (), speculate=Oracle([*prompt, *expected, 1, 2, 3], 7))
        assert (result.tokens, result.stop_reason) == (expected, "capacity")
        assert generator.finished


def test_a_caller_may_stop_or_rewind_between(steps: int | None) -> None:
    expected = golden("long", tuple(PROMPT), 30)
    drafter = Oracle([*PROMPT, *expected], 7)
    with Generator(load("long"), steps_per_submit=steps) as generator:
        result = generator.generate(PROMPT, 30, (), on_token=lambda t: generator.length == 9, speculate=drafter)
        assert (result.tokens, result.stop_reason) == (expected[:6], "stopped")
        assert generator.length == 9
        stream = generator.stream((), 20, (), speculate=drafter)
        assert [next(stream) for _ in range(4)] == list(expected[6:10])
        generator.rewind_to(7)
        assert [next(stream) for _ in range(4)] == list(expected[4:8])
        with generator.fork() as fork:
            assert more(fork, 5) == expected[8:13]
        assert next(stream) == expected[8]


def test_only_tokens_are_read_back_and_nothing_is_made() -> None:
    expected = golden("long", tuple(PROMPT), 60)
    drafter = Oracle([*PROMPT, *expected], 7)
    with Generator(load("long")) as generator:
        generator.generate(PROMPT, 24, (), speculate=drafter)
        before = device("full").counters.copy()
        result = generator.generate((), 32, (), speculate=drafter)
        done = device("full").counters.since(before)
        assert result.tokens == expected[24:56]
        assert result.speculation == Speculation(drafted=28, accepted=28, calls=4)
        assert result.speculation.tokens_per_call == 8
        assert (done.submits, done.reads, done.bytes_read) == (4, 4, 4 * 32)
        assert (done.buffers, done.bind_groups, done.pipelines) == (0, 0, 0)


def test_without_drafts_steps_stay_on_the_gpu() -> None:
    class Silent(Oracle):
        def draft(self, tokens: Sequence[int], count: int) -> list[int]:
            return []

    expected = golden("long", tuple(PROMPT), 41)
    with Generator(load("long"), steps_per_submit=8) as generator:
        generator.append_tokens(PROMPT)
        before = device("full").counters.copy()
        result = generator.generate((), 41, (), speculate=Silent([], 4))
        assert result.tokens == expected
        assert result.speculation == Speculation()
        assert result.speculation.tokens_per_call == 0
        assert device("full").counters.since(before).submits <= 9


# -- n-grams


def proposed(tokens: Sequence[int], count: int, drafter: NGram) -> Sequence[int]:
    with Generator(load("llama")) as generator:
        return drafter.begin(generator, GREEDY, 0).draft(tokens, count)


def test_n_grams_propose_what_came_last_time() -> None:
    text = [1, 2, 3, 4, 5, 1, 2, 9, 4, 5, 1, 2]
    assert proposed(text, 3, NGram(3, 2, 2)) == [9, 4, 5]  # the later of two occurrences
    assert proposed([7, 3, 1, 2, 8, 9, 4, 1, 2, 5, 3, 1, 2], 2, NGram(4, 3, 2)) == [8, 9]  # the longer one counts
    assert proposed([7, 3, 1, 2, 8, 9, 4, 1, 2, 5, 3, 1, 2], 2, NGram(4, 2, 2)) == [5, 3]
    assert proposed([1, 2, 3], 3, NGram(3, 2, 1)) == []
    assert proposed([5], 3, NGram(3, 2, 1)) == []
    assert proposed([4, 4], 3, NGram(3, 2, 1)) == [4, 4, 4]  # beyond its end, a period goes on
    assert proposed([8, 1, 2, 3, 1, 2, 3], 7, NGram(7, 3, 2)) == [1, 2, 3, 1, 2, 3, 1]
    assert proposed([8, 1, 2, 3, 1, 2, 3], 2, NGram(7, 3, 2)) == [1, 2]


def test_n_grams_follow_a_sequence_that_changes() -> None:
    with Generator(load("llama")) as generator:
        work = NGram(4, 2, 2).begin(generator, GREEDY, 0)
        assert work.draft([1, 2, 3, 1, 2], 1) == [3]
        assert work.draft([1, 2, 3, 1, 2, 4, 1, 2], 1) == [4]
        assert work.draft([1, 2, 3, 1, 2], 1) == [3]
        assert work.draft([6, 7, 8, 9, 6, 7], 2) == [8, 9]


def test_n_grams_pay_where_text_repeats(steps: int | None) -> None:
    """The text ends in a period: from there on most drafts are right."""
    expected = golden("long", tuple(PROMPT), 70)
    assert any(expected[-20:] == (expected[-period:] * 20)[-20:] for period in range(1, 13)), expected
    with Generator(load("long"), steps_per_submit=steps) as generator:
        result = generator.generate([*PROMPT, *expected[:54]], 16, (), speculate=NGram(7, 3, 2))
        assert result.tokens == expected[54:]
        assert result.speculation is not None
        assert result.speculation.tokens_per_call > 5


# -- draft models


@pytest.mark.parametrize("how", SAMPLINGS)
def test_a_draft_model_that_is_the_model_is_always_right(how: str, steps: int | None) -> None:
    sampling = SAMPLINGS[how]
    expected = golden("long", tuple(PROMPT), 40, sampling)
    with Generator(load("long"), steps_per_submit=steps) as generator, Generator(load("long")) as draft:
        result = generator.generate(PROMPT, 40, (), sampling, speculate=DraftModel(draft, 4))
        assert result.tokens == expected
        assert result.speculation is not None
        assert result.speculation.accepted >= 0.9 * result.speculation.drafted > 0


def test_a_draft_model_that_is_another_one(steps: int | None) -> None:
    """With other positions, and a smaller capacity: from its end on there are no drafts."""
    expected = golden("long", tuple(PROMPT), 40)
    with Generator(load("long"), steps_per_submit=steps) as generator, Generator(load("hugging_face")) as draft:
        speculate = DraftModel(draft, 3)
        result = generator.generate(PROMPT, 25, (), speculate=speculate)
        assert result.tokens == expected[:25]
        assert result.speculation is not None
        assert result.speculation.drafted > result.speculation.accepted
        assert generator.generate((), 15, (), speculate=speculate).tokens == expected[25:]


# -- what cannot be


def test_programs_that_cannot_verify_say_how_to_export(steps: int | None) -> None:
    cases = {
        "llama": r"method forward gives the logits of the last token only, \[1, 260\]; export it with those of every",
        "static": "method forward takes one token a call; export the program with a dynamic number of tokens",
        "ring": "the program's state cannot go back behind wrong ones",
    }
    for kind, message in cases.items():
        with Generator(load(kind), steps_per_submit=steps) as generator:
            before = device("full").counters.copy()
            with pytest.raises(UnsupportedError, match=message):
                generator.generate(PROMPT, 5, speculate=NGram())
            assert generator.length == 0
            assert device("full").counters.since(before).submits == 0


def test_drafters_that_do_not_fit() -> None:
    for bad in (lambda: NGram(0), lambda: NGram(3, 2, 3), lambda: NGram(3, 2, 0)):
        with pytest.raises(InputError, match="expected"):
            bad()
    with Generator(load("long")) as generator, Generator(load("recurrent")) as recurrent:
        with pytest.raises(InputError, match="most is 0"):
            DraftModel(generator, 0)
        with pytest.raises(UnsupportedError, match="must be able to go back"):
            DraftModel(recurrent)
        with pytest.raises(InputError, match="a state of its own"):
            generator.generate(PROMPT, 5, speculate=DraftModel(generator))
        with Generator(load("long")) as other:
            other._step = other._first = _with_vocabulary(other, 99)
            with pytest.raises(InputError, match="the draft model has 99 tokens, the model 260"):
                generator.generate(PROMPT, 5, speculate=DraftModel(other))


def _with_vocabulary(generator: Generator, size: int) -> object:
    from dataclasses import replace

    return replace(generator._step, convention=replace(generator._step.convention, vocabulary=size))


def test_drafted_ids_must_be_in_the_vocabulary() -> None:
    with Generator(load("long")) as generator:
        with pytest.raises(InputError, match=r"the drafter proposes 260, expected ids in \[0, 260\)"):
            generator.generate(PROMPT, 9, (), speculate=Oracle([*PROMPT, 1, 2, VOCAB, VOCAB, VOCAB, VOCAB], 3))
        assert generator.length >= len(PROMPT)


def test_logits_that_are_nan_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Verifier, "choose", lambda self, ids, position: [-1] * len(ids))
    with Generator(load("long")) as generator:
        expected = golden("long", tuple(PROMPT), 9)
        with pytest.raises(WebGPUDelegateError, match="NaN"):
            generator.generate(PROMPT, 9, (), speculate=Oracle([*PROMPT, *expected], 3))
        assert generator.tokens == (*PROMPT, expected[0])
        monkeypatch.undo()
        assert more(generator, 8) == expected[1:]


def test_what_drafts_were_worth_is_kept_for_the_next_call() -> None:
    with Generator(load("long")) as generator:
        generator.generate(PROMPT, 10, (), speculate=NGram(4, 2, 1))
        kept = generator._pace
        generator.generate((), 10, (), speculate=NGram(4, 2, 1))
        assert generator._pace is kept is not None
        generator.generate((), 10, (), speculate=NGram(5, 2, 1))
        assert generator._pace is not kept
        with generator.fork() as fork:
            assert fork._pace is None
