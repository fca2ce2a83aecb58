"""Generation: both calling conventions against PyTorch, capacity, rewinding, stops, seeds and text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from executorch_webgpu.runtime import Generator, InputError, Program, Runtime, Sampling, UnsupportedError
from executorch_webgpu.runtime.decoding import decoder
from executorch_webgpu.runtime.decoding.decoder import find_convention
from executorch_webgpu.runtime.decoding.generate import generate, generate_text
from executorch_webgpu.runtime.decoding.tokenizer import TextStream, Tokenizer
from executorch_webgpu.runtime.methods.method import MethodMeta, TensorInfo
from tests import tiny_decoder
from tests.harness import device
from tests.tiny_decoder import CAPACITY, LONGEST, VOCAB

PROMPT = [1, 2, 3]
LONG_PROMPT = [(7 * i + 2) % 256 for i in range(2 * LONGEST + 3)]
DRAWN = Sampling(temperature=1.0, top_k=50, seed=5)


@pytest.fixture(scope="module", params=["llama", "static", "hugging_face"])
def program(request: pytest.FixtureRequest) -> Iterator[Program]:
    with Runtime(device("full")).load_program(tiny_decoder.build(request.param).pte) as loaded:
        yield loaded


@pytest.fixture
def generator(program: Program) -> Generator:
    return Generator(program.load_method(), program)


@pytest.fixture(scope="module")
def llama() -> Iterator[Program]:
    with Runtime(device("full")).load_program(tiny_decoder.build("llama").pte) as loaded:
        yield loaded


@pytest.fixture
def text_generator(llama: Program) -> Generator:
    return Generator(llama.load_method(), llama)


@pytest.fixture(scope="module")
def reference() -> list[int]:
    return tiny_decoder.greedy(PROMPT, CAPACITY - len(PROMPT))


class Bytes:
    """A codec whose ids are bytes; others have no text."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")


# -- against PyTorch


def test_greedy_tokens_are_those_of_pytorch(generator: Generator, reference: list[int]) -> None:
    result = generator.generate(PROMPT, 12, stop_ids=())
    assert list(result.tokens) == reference[:12]
    assert result.stop_reason == "max_new_tokens"
    assert (result.prompt_tokens, result.decode_steps) == (3, 11)
    assert result.prefill_tokens_per_second > 0
    assert result.decode_tokens_per_second == pytest.approx(11 / result.decode_seconds)


def test_long_prompts_are_run_in_as_few_calls_as_possible(generator: Generator) -> None:
    counters = device("full").counters
    before = counters.copy()
    generator.append_tokens(LONG_PROMPT)
    calls = counters.since(before).submits
    assert calls == -(-len(LONG_PROMPT) // generator.convention.chunk)
    assert generator.convention.chunk in (1, LONGEST)
    expected = tiny_decoder.last_logits(LONG_PROMPT).numpy()
    assert generator.logits is not None
    np.testing.assert_allclose(generator.logits, expected, rtol=1e-3, atol=1e-3)


def test_a_used_method_starts_anew(program: Program, reference: list[int]) -> None:
    method = program.load_method()
    assert list(Generator(method, program).generate(LONG_PROMPT, 2, stop_ids=()).tokens) != reference[:2]
    assert list(Generator(method, program).generate(PROMPT, 5, stop_ids=()).tokens) == reference[:5]


def test_prompts_may_come_in_parts(generator: Generator, reference: list[int]) -> None:
    generator.append_tokens(PROMPT[:1])
    generator.append_tokens(np.array(PROMPT[1:]))
    assert [generator.generate_next() for _ in range(5)] == reference[:5]
    assert generator.logits is None  # the last token was chosen, but not run
    generator.append_tokens(reference[5:8])  # runs the pending token too
    assert generator.generate_next() == reference[8]
    assert generator.tokens == (*PROMPT, *reference[:9])
    assert generator.length == 12


def test_of_all_logits_only_the_last_row_is_read(generator: Generator) -> None:
    """Whatever the program gives: four bytes a token of the vocabulary for each call."""
    generator.append_tokens(PROMPT)
    before = device("full").counters.copy()
    generator.append_tokens(LONG_PROMPT[:LONGEST])
    done = device("full").counters.since(before)
    assert done.bytes_read == 4 * VOCAB * done.reads
    expected = tiny_decoder.last_logits([*PROMPT, *LONG_PROMPT[:LONGEST]]).numpy()
    assert generator.logits is not None
    np.testing.assert_allclose(generator.logits, expected, rtol=1e-3, atol=1e-3)


# -- capacity


def test_capacity_is_found_with_and_without_constant_methods(program: Program) -> None:
    assert Generator(program.load_method(), program).capacity == CAPACITY
    assert Generator(program.load_method()).capacity == CAPACITY
    assert Generator(program.load_method(), {"get_max_seq_len": 10}).capacity == 10
    assert Generator(program.load_method(), {"get_max_seq_len": 10, "get_max_context_len": 20}).capacity == 20


def test_exceeding_the_capacity_runs_nothing_and_changes_nothing(generator: Generator, reference: list[int]) -> None:
    generator.append_tokens(PROMPT)
    counters = device("full").counters
    before = counters.copy()
    with pytest.raises(
        InputError, match=r"appending 22 tokens after 3 would exceed the program's capacity of 24 tokens"
    ):
        generator.append_tokens([0] * (CAPACITY - 2))
    with pytest.raises(InputError, match=r"token 1 is 260, expected an id in \[0, 260\)"):
        generator.append_tokens([0, VOCAB])
    with pytest.raises(InputError, match="no tokens"):
        generator.append_tokens([])
    assert counters.since(before).submits == 0
    assert generator.tokens == tuple(PROMPT)
    assert [generator.generate_next() for _ in range(4)] == reference[:4]


def test_generation_ends_at_the_capacity(generator: Generator, reference: list[int]) -> None:
    result = generator.generate(PROMPT, stop_ids=())
    assert list(result.tokens) == reference
    assert result.stop_reason == "capacity"
    assert generator.room == 0
    with pytest.raises(InputError, match="generating a token after 24 would exceed"):
        generator.generate_next()
    generator.reset()
    assert generator.room == CAPACITY
    assert list(generator.generate(PROMPT, 3, stop_ids=()).tokens) == reference[:3]


@pytest.mark.parametrize("rewindable", [True, False])
def test_a_failed_call_leaves_the_sequence_as_it_was(
    program: Program, reference: list[int], monkeypatch: pytest.MonkeyPatch, rewindable: bool
) -> None:
    method = program.load_method()
    if not rewindable:  # as if its state were not known to be caches by position: it must be rebuilt
        monkeypatch.setattr(decoder, "_by_position", lambda method, capacity: False)
    generator = Generator(method, program)
    assert generator.convention.rewindable == rewindable
    generator.append_tokens(PROMPT)
    execute, calls = method.execute, []

    def failing(inputs: Any, last_row: bool) -> Any:
        calls.append(inputs)
        if len(calls) == 2:
            raise RuntimeError("device lost")
        return execute(inputs, last_row)

    monkeypatch.setattr(method, "execute", failing)
    with pytest.raises(RuntimeError, match="device lost"):
        generator.append_tokens(LONG_PROMPT[: LONGEST + 1])
    monkeypatch.undo()
    assert generator.tokens == tuple(PROMPT)
    before = device("full").counters.copy()
    assert [generator.generate_next() for _ in range(4)] == reference[:4]
    steps = device("full").counters.since(before).submits
    assert steps == (3 if rewindable else 3 + -(-len(PROMPT) // generator.convention.chunk))


# -- rewind and reset


def test_rewinding_goes_on_as_if_the_rest_had_never_been(generator: Generator, reference: list[int]) -> None:
    generator.generate(PROMPT, 8, stop_ids=())
    generator.rewind_to(6)
    assert generator.tokens == (*PROMPT, *reference[:3])
    assert generator.logits is None
    assert [generator.generate_next() for _ in range(3)] == reference[3:6]
    generator.rewind_to(4)
    generator.append_tokens([9, 9])
    other = generator.generate_next()
    assert other == tiny_decoder.greedy([*PROMPT, reference[0], 9, 9], 1)[0]
    generator.rewind_to(6)  # drops only the token that was not run
    assert generator.logits is not None
    assert generator.generate_next() == other
    generator.rewind_to(0)
    assert list(generator.generate(PROMPT, 3, stop_ids=()).tokens) == reference[:3]


def test_rewinding_forward_is_an_error(generator: Generator) -> None:
    generator.append_tokens(PROMPT)
    for length in (4, -1):
        with pytest.raises(InputError, match=f"cannot rewind to {length}: the sequence has 3 tokens"):
            generator.rewind_to(length)


def test_state_without_rows_cannot_be_rewound(text_generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "_by_position", lambda method, capacity: False)
    generator = Generator(text_generator.method)
    generator.append_tokens(PROMPT)
    with pytest.raises(UnsupportedError, match="can only be reset"):
        generator.rewind_to(2)
    with pytest.raises(UnsupportedError, match="cannot be run twice"):
        generator.profile_step()
    generator.rewind_to(0)
    assert generator.length == 0


def test_profiling_a_step_changes_nothing(text_generator: Generator, reference: list[int]) -> None:
    text_generator.generate(PROMPT, 4, stop_ids=())
    times = text_generator.profile_step()
    assert sum(t.nanoseconds for t in times) > 0
    assert text_generator.length == 7
    assert text_generator.generate_next() == reference[4]


# -- stops and streams


def test_stop_ids_end_a_stream_and_are_not_yielded(text_generator: Generator, reference: list[int]) -> None:
    place = next(i for i in range(3, 10) if reference[i] not in reference[:i])
    result = text_generator.generate(PROMPT, 20, stop_ids=[reference[place]])
    assert list(result.tokens) == reference[:place]
    assert result.stop_reason == "stop_token"
    assert text_generator.tokens[-1] == reference[place]
    assert result.decode_steps == place


def test_the_program_names_its_stop_ids(program: Program, generator: Generator) -> None:
    expected = {"get_max_context_len": {257, 258}, "get_max_seq_len": {257}}
    known = next((expected[name] for name in expected if name in program.constants), set())
    assert generator.stop_ids == known


def test_streams_start_at_once_and_go_on_later(text_generator: Generator, reference: list[int]) -> None:
    with pytest.raises(InputError, match="capacity"):
        text_generator.stream([0] * 30)
    with pytest.raises(InputError, match="nothing to continue"):
        text_generator.stream()
    with pytest.raises(InputError, match="nothing to continue"):
        text_generator.generate_next()
    with pytest.raises(InputError, match="max_new_tokens is -1"):
        text_generator.stream(PROMPT, -1)
    stream = text_generator.stream(PROMPT, 4, stop_ids=())
    assert text_generator.length == 3
    assert list(stream) == reference[:4]
    assert list(text_generator.stream(max_new_tokens=3, stop_ids=())) == reference[4:7]
    assert text_generator.generate(max_new_tokens=0).tokens == ()


def test_without_a_capacity_a_maximum_is_needed(text_generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Generator, "capacity", None)
    with pytest.raises(InputError, match="give max_new_tokens"):
        text_generator.stream(PROMPT)
    assert len(text_generator.generate(PROMPT, 2, stop_ids=()).tokens) == 2


# -- seeds


def test_a_seed_makes_runs_repeatable(text_generator: Generator) -> None:
    first = text_generator.generate(PROMPT, 10, (), DRAWN).tokens
    text_generator.rewind_to(6)
    assert text_generator.generate((), 7, (), DRAWN).tokens == first[3:]  # whatever was drawn before
    text_generator.reset()
    others = []
    for seed in range(4):
        others.append(text_generator.generate(PROMPT, 10, (), Sampling(temperature=1.0, top_k=50, seed=seed)).tokens)
        text_generator.reset()
    assert len({first, *others}) == 5


def test_without_a_seed_generators_differ(llama: Program) -> None:
    texts = {Generator(llama.load_method(), llama).generate(PROMPT, 10, (), Sampling(2.0)).tokens for _ in range(3)}
    assert len(texts) == 3


# -- conventions that are refused


def _refusal(inputs: Sequence[TensorInfo | None], outputs: Sequence[TensorInfo | None]) -> str:
    names = SimpleNamespace(inputs=tuple(range(len(inputs))), chains=())
    meta = MethodMeta("forward", tuple(inputs), tuple(outputs))
    method: Any = SimpleNamespace(metadata=meta, plan=names, delegates=[])
    with pytest.raises(UnsupportedError) as caught:
        find_convention(method, {})
    return str(caught.value)


def test_other_conventions_are_refused_with_their_inputs() -> None:
    tokens, position = TensorInfo((1, 8), "i64", True), TensorInfo((1,), "i64", False)
    logits = TensorInfo((1, 99), "f32", False)
    image = TensorInfo((1, 3, 8, 8), "f32", False)
    text = _refusal([image], [logits])
    assert "it has 1 inputs, not 2. Its inputs: input 0 f32[1, 3, 8, 8]; expected (tokens i64[1, S]" in text
    assert "the first input (input 0) is no integer tensor of rank 2" in _refusal([image, position], [logits])
    assert "the second input (input 1) is no integer tensor of rank 1" in _refusal([tokens, None], [logits])
    assert "batch of 4" in _refusal([TensorInfo((4, 8), "i64", True), position], [logits])
    assert "exactly 8 tokens a call" in _refusal([TensorInfo((1, 8), "i64", False), position], [logits])
    assert "exactly 3 positions" in _refusal([tokens, TensorInfo((3,), "i64", False)], [logits])
    assert "not logits" in _refusal([tokens, position], [TensorInfo((1, 99), "i64", False)])
    assert "not logits" in _refusal([tokens, position], [])


def test_names_come_from_the_delegate(llama: Program) -> None:
    method = llama.load_method()
    method.metadata = MethodMeta("forward", (method.metadata.inputs[1], method.metadata.inputs[1]), ())
    with pytest.raises(UnsupportedError, match=r"Its inputs: tokens i64\[1\], input_pos i64\[1\]"):
        find_convention(method, {})


# -- text


def _stream(data: bytes, stops: Sequence[str] = (), prompt: bytes = b"") -> tuple[list[str], str | None]:
    stream = TextStream(Bytes(), list(prompt), stops)
    pieces = [stream.push(byte) for byte in data] + [stream.finish()]
    return pieces, stream.stopped


def test_characters_come_out_whole() -> None:
    text = "aé\N{GRINNING FACE}\N{EURO SIGN}b"
    pieces, _ = _stream(text.encode())
    assert [p for p in pieces if p] == list(text)
    cut, _ = _stream(text.encode()[:-3])  # in the middle of the euro sign
    assert "".join(cut) == "aé\N{GRINNING FACE}"
    broken, _ = _stream(b"a\xffb")  # a byte that can be no text stays visible
    assert "".join(broken) == "a\N{REPLACEMENT CHARACTER}b"


@pytest.mark.parametrize(
    ("text", "stops", "expected", "stopped"),
    [
        ("hello END more", ["END"], "hello ", "END"),
        ("hello EN", ["END"], "hello EN", None),
        ("aab", ["ab"], "a", "ab"),
        ("EEND", ["END"], "E", "END"),
        ("x\n\nUser: y", ["User:", "\n\n"], "x", "\n\n"),
        ("abcd", ["bc", "bcd"], "a", "bc"),
        ("été", ["té"], "é", "té"),
        ("END", ["END"], "", "END"),
    ],
)
def test_stop_strings_end_the_text(text: str, stops: list[str], expected: str, stopped: str | None) -> None:
    pieces, found = _stream(text.encode(), stops)
    assert ("".join(pieces), found) == (expected, stopped)
    for count in range(len(pieces)):  # what was handed out is never taken back
        assert expected.startswith("".join(pieces[:count]))


def test_empty_stop_strings_are_refused() -> None:
    with pytest.raises(InputError, match="not empty"):
        TextStream(Bytes(), (), [""])


def test_generated_text_is_the_text_of_the_tokens(text_generator: Generator, reference: list[int]) -> None:
    pieces: list[str] = []
    prompt = bytes(PROMPT).decode()
    result = generate_text(text_generator, Bytes(), prompt, max_new_tokens=12, stop_ids=(), on_text=pieces.append)
    expected = Bytes().decode(reference[:12])
    assert result.text == "".join(pieces) == expected.rstrip("\N{REPLACEMENT CHARACTER}")
    assert list(result.tokens) == reference[:12]
    assert result.stop_reason == "max_new_tokens"


def test_a_stop_string_ends_generation_early(text_generator: Generator, reference: list[int]) -> None:
    stop = Bytes().decode(reference[1:3])  # two ASCII characters
    assert stop.isascii()
    prompt = bytes(PROMPT).decode()
    result = generate_text(text_generator, Bytes(), prompt, max_new_tokens=20, stop_ids=(), stop=[stop])
    assert (result.stop_reason, len(result.tokens)) == ("stop_string", 3)
    assert result.text == "\N{REPLACEMENT CHARACTER}"


def test_one_call_from_file_to_text(reference: list[int], tmp_path: Any) -> None:
    tiny = tiny_decoder.build("llama", external=True)
    (tmp_path / "model.pte").write_bytes(tiny.pte)
    (tmp_path / "model.ptd").write_bytes(tiny.data)
    used = device("full").memory.total
    result = generate(
        tmp_path / "model.pte",
        bytes(PROMPT).decode(),
        Bytes(),
        data=tmp_path / "model.ptd",
        runtime=Runtime(device("full")),
        max_new_tokens=6,
        stop_ids=(),
    )
    assert list(result.tokens) == reference[:6]
    assert device("full").memory.total == used


# -- tokenizer files


def test_tokenizer_files(tmp_path: Any) -> None:
    path = tiny_decoder.write_tokenizer(tmp_path)
    tokenizer = Tokenizer(path)
    ids = tokenizer.encode("hé \N{GRINNING FACE}")
    assert len(ids) == 8
    assert tokenizer.decode([*ids, tiny_decoder.STOP]) == "hé \N{GRINNING FACE}"
    stream = TextStream(tokenizer, ids)
    assert [stream.push(i) for i in [*ids, tiny_decoder.STOP, *ids]].count("") == 9
    assert tokenizer.stop_ids == frozenset()
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<end>"}}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    assert Tokenizer(path).stop_ids == {3, 4, tiny_decoder.STOP}


def test_bad_tokenizers(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(FileNotFoundError):
        Tokenizer(path)
    path.write_text("{}")
    with pytest.raises(RuntimeError, match=r"not a tokenizer\.json"):
        Tokenizer(path)
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'executorch-webgpu\[cli\]'"):
        Tokenizer(path)
