"""States go on under the program whose weights filled them, and are refused by others of the same shapes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from executorch_webgpu.backend.graph import Value
from executorch_webgpu.runtime import BatchGenerator, Generator, InputError, Program, Runtime, State
from executorch_webgpu.runtime.errors import DeviceError, ProgramFormatError
from executorch_webgpu.runtime.files import identity, pte
from executorch_webgpu.runtime.files.identity import program_identity
from executorch_webgpu.runtime.files.ptd import DataFile
from tests import tiny_decoder, tiny_states
from tests.harness import device
from tests.other_weights import with_other_weights
from tests.runtime.sessions import PROMPT, golden, load, more

OTHER = [9, 8, 7, 6]
ANOTHER = "the state belongs to another program"


def _bytes(kind: str) -> bytes:
    return tiny_decoder.build(kind).pte if kind in tiny_decoder.CONSTANTS else tiny_states.build(kind)


@cache
def other(kind: str) -> Program:
    """A program of the same shapes with other weights."""
    return Runtime(device("full")).load_program(with_other_weights(_bytes(kind)))


@cache
def other_golden(kind: str, count: int) -> tuple[int, ...]:
    """What the other program makes of OTHER."""
    with Generator(other(kind), steps_per_submit=0) as generator:
        return generator.generate(OTHER, count, ()).tokens


def test_the_other_program_is_whole_and_computes_something_else() -> None:
    for kind in ("llama", "ragged", "both"):
        assert other(kind).verify_data() == load(kind).verify_data()
        assert other(kind).identity != load(kind).identity
    with Generator(other("llama")) as theirs, Generator(load("llama")) as ours:
        assert theirs.generate(PROMPT, 8, ()).tokens != ours.generate(PROMPT, 8, ()).tokens
        types = [[(n, v.dtype, v.shape) for n, v in one.state.values().items()] for one in (theirs, ours)]
        assert types[0] == types[1], "its state differs in nothing but its content"


# -- one sequence


@dataclass
class Two:
    """A sequence of one program and one of another, both in the middle."""

    ours: Generator
    theirs: Generator
    folder: Path

    def saved(self) -> Path:
        self.ours.save(self.folder / "ours")
        return self.folder / "ours"


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Two]:
    with Generator(load("llama")) as ours, Generator(other("llama")) as theirs:
        ours.generate(PROMPT, 4, ())
        theirs.generate(OTHER, 4, ())
        yield Two(ours, theirs, tmp_path)


ENTRIES: dict[str, tuple[Callable[[Two, Any], object], str]] = {
    "load_method": (lambda two, given: other("llama").load_method("forward", given.state), ANOTHER),
    "on_state": (lambda two, given: two.theirs.method.on_state(given.state), ANOTHER),
    "a program's generator": (lambda two, given: Generator(other("llama"), state=given.state), ANOTHER),
    "a method's generator": (lambda two, given: Generator(two.theirs.method, state=given.state), ANOTHER),
    "a new state": (lambda two, given: two.theirs.method.on_state(given.new), ANOTHER),
    "a method's new state": (lambda two, given: other("llama").load_method("forward", given.made), ANOTHER),
    "a prompt method": (
        lambda two, given: Generator(two.theirs.method, prefill=two.ours.method),
        "methods forward and forward are of two programs",
    ),
    "a copy": (lambda two, given: two.theirs.state.copy_from(given.state, lambda value, size: [(0, size)]), ANOTHER),
    "restore": (lambda two, given: two.theirs.restore(given.snapshot), "snapshot belongs to another program or device"),
    "load": (lambda two, given: two.theirs.load(given.path), "session belongs to another model, or to another export"),
}  # fmt: skip


@dataclass
class Given:
    state: State
    new: State
    made: State
    snapshot: Any
    path: Path


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_state_of_another_program_is_refused(entry: str, two: Two) -> None:
    call, message = ENTRIES[entry]
    given = Given(
        two.ours.state, load("llama").new_state(), two.ours.method.new_state(), two.ours.snapshot(), two.saved()
    )
    before = device("full").counters.copy()
    with pytest.raises(InputError, match=message):
        call(two, given)
    done = device("full").counters.since(before)
    assert (done.submits, done.writes, done.buffers) == (0, 0, 0)
    assert two.theirs.tokens == (*OTHER, *other_golden("llama", 4))
    assert more(two.theirs, 5) == other_golden("llama", 9)[4:]
    assert more(two.ours, 5) == golden("llama", tuple(PROMPT), 9)[4:]
    for state in (given.new, given.made):
        state.close()
    given.snapshot.close()


def test_the_same_file_loaded_twice_is_one_program(two: Two, tmp_path: Path) -> None:
    """From bytes and from a path, and of methods of which each came from one of them."""
    path = tmp_path / "again.pte"
    path.write_bytes(_bytes("llama"))
    expected = golden("llama", tuple(PROMPT), 9)
    snapshot, file = two.ours.snapshot(), two.saved()
    with Runtime(device("full")).load_program(path) as again:
        assert again.identity == load("llama").identity
        method = again.load_method("forward", two.ours.state)
        last = np.array([two.ours.tokens[-1:]]), np.array([two.ours.length - 1])
        assert int(method.execute(last)[0][0].argmax()) == expected[4]
        assert more(two.ours, 5) == expected[4:]
        with Generator(again) as twin:
            for back in (lambda: twin.restore(snapshot), lambda: twin.load(file)):
                back()
                assert more(twin, 5) == expected[4:]
        with Generator(again, state=two.ours.state) as taken:
            assert taken.generate(PROMPT, 9, ()).tokens == expected
    snapshot.close()


def test_methods_of_one_program_share_a_state() -> None:
    program = load("both")
    again = Runtime(device("full")).load_program(_bytes("both"))
    expected = golden("both", tuple(PROMPT), 8)
    for source in (program, again):
        step, first = program.load_method("decode"), source.load_method("prefill")
        with Generator(step, program, prefill=first) as generator:
            assert generator.generate(PROMPT, 8, ()).tokens == expected
        first.close()
        step.close()
    shared = program.load_method("decode")
    with Generator(program, state=shared.state) as generator:
        assert generator.generate(PROMPT, 8, ()).tokens == expected
    with pytest.raises(InputError, match="methods prefill and decode are of two programs"):
        Generator(shared, program, prefill=other("both").load_method("prefill"))
    shared.close()
    again.close()


def test_a_bare_state_is_the_first_programs() -> None:
    state = State(device("full"))
    kept = next(iter(load("llama").load_method().state.buffers()))
    wrong = State(device("full"))
    wrong.get(Value("mutable", "f32", (3,), kept), lambda key: b"")
    with pytest.raises(DeviceError, match="it needs a state of its own"):
        load("llama").load_method("forward", wrong)
    assert wrong.program is None, "nothing was loaded on it"
    with Generator(load("llama"), state=state) as generator:
        generator.append_tokens(PROMPT)
    assert state.program == load("llama").identity
    with pytest.raises(InputError, match=ANOTHER):
        Generator(other("llama"), state=state)
    with Generator(load("llama"), state=state) as generator:
        assert generator.generate(PROMPT, 4, ()).tokens == golden("llama", tuple(PROMPT), 4)
    for one in (state, wrong):
        one.close()


# -- batches


def test_rows_of_another_program_are_refused(tmp_path: Path) -> None:
    with BatchGenerator(load("ragged")) as ours, BatchGenerator(other("ragged")) as theirs:
        for batch, ids in ((ours, PROMPT), (theirs, OTHER)):
            batch.append_tokens(1, ids)
        first = [batch.generate_next(1) for batch in (ours, theirs)]
        ours.save_row(1, tmp_path / "row")
        calls: list[tuple[Callable[[], object], str]] = [
            (lambda: ours.fork(1, 0, theirs), "the other batch runs another program"),
            (lambda: theirs.load_row(1, tmp_path / "row"), "belongs to another model, or to another export"),
            (lambda: theirs.method.on_state(ours.method.state), ANOTHER),
            (lambda: other("ragged").load_method("forward", ours.method.state), ANOTHER),
        ]
        before = device("full").counters.copy()
        for call, message in calls:
            with pytest.raises(InputError, match=message):
                call()
        done = device("full").counters.since(before)
        assert (done.submits, done.writes, done.buffers) == (0, 0, 0)
        assert (theirs.tokens(0), theirs.tokens(1)) == ((), (*OTHER, first[1]))
        assert (first[0], ours.generate_next(1)) == golden("llama", tuple(PROMPT), 2)
        assert (first[1], theirs.generate_next(1)) == other_golden("llama", 2)


# -- names of programs


def test_a_name_is_the_same_in_another_process(tmp_path: Path) -> None:
    path = tmp_path / "llama.pte"
    path.write_bytes(_bytes("llama"))
    code = (
        "import sys; from executorch_webgpu.runtime.files import identity, pte;"
        "print(identity.program_identity(pte.Program(sys.argv[1])))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        capture_output=True, text=True, check=True, env={**os.environ, "PYTHONHASHSEED": "7"},
    )  # fmt: skip
    assert found.stdout.strip() == load("llama").identity
    assert load("llama on default-limits").identity == load("llama").identity


def test_a_name_takes_no_weights_to_know(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = load("both").identity
    program = pte.Program(_bytes("both"))

    def read(*_: object) -> memoryview:
        raise AssertionError("weights were read")

    monkeypatch.setattr(program, "named_data", read)
    assert program_identity(program) == wanted


def test_constant_methods_do_not_count_and_others_do(monkeypatch: pytest.MonkeyPatch) -> None:
    program = pte.Program(_bytes("both"))
    wanted, names = program_identity(program), program.method_names
    assert program.plan("get_vocab_size").is_constant
    monkeypatch.setattr(program, "method_names", tuple(name for name in names if not name.startswith("get_")))
    assert program_identity(program) == wanted
    monkeypatch.setattr(program, "method_names", ("decode",))
    assert program_identity(program) != wanted


def test_a_method_that_cannot_be_read_is_no_reason_to_refuse_others(monkeypatch: pytest.MonkeyPatch) -> None:
    program = pte.Program(_bytes("both"))
    plan = program.plan

    def damaged(name: str) -> pte.ExecutionPlan:
        if name == "prefill":
            raise ProgramFormatError("damaged")
        return plan(name)

    monkeypatch.setattr(program, "plan", damaged)
    assert len({program_identity(program), program_identity(program), load("both").identity}) == 2


def test_random_weights_make_another_program(tmp_path: Path) -> None:
    """Only where they stand for missing ones."""
    tiny = tiny_decoder.build("llama", external=True)
    runtime = Runtime(device("full"))
    real = runtime.load_program(tiny.pte, tiny.data)
    found = [runtime.load_program(tiny.pte, data, random_weights=True) for data in (tiny.data, None, None)]
    names = [program.identity for program in found]
    assert names[0] == real.identity
    assert names[1] == names[2] != real.identity
    with Generator(found[1]) as random, Generator(real) as generator, Generator(found[0]) as complete:
        random.append_tokens(PROMPT)
        random.save(tmp_path / "random")
        with pytest.raises(InputError, match="another model"):
            generator.load(tmp_path / "random")
        with pytest.raises(InputError, match=ANOTHER):
            Generator(real, state=random.state)
        generator.append_tokens(PROMPT)
        generator.save(tmp_path / "real")
        complete.load(tmp_path / "real")
        assert more(complete, 5) == golden("llama", tuple(PROMPT), 5)
    for program in (real, *found):
        program.close()


def test_tensors_outside_of_delegates_count(programs: dict[str, Path], ptd_path: Path) -> None:
    """Those in the program and those in a data file, which may be replaced under the same names."""
    external, data = pte.Program(programs["external"]), ptd_path.read_bytes()
    file = DataFile(data)
    weight = bytes(file.named_data(max(file.keys(), key=lambda key: len(file.named_data(key)))))
    changed = data.replace(weight, weight[::-1])
    assert changed != data
    names = [program_identity(external, files) for files in ([file], [DataFile(changed)], [])]
    assert len(set(names)) == 3
    assert program_identity(pte.Program(programs["external"]), [DataFile(data)]) == names[0]
    inside = programs["methods"].read_bytes()
    table = np.arange(12).tobytes()
    assert inside.count(table) == 1
    names = [program_identity(pte.Program(one)) for one in (inside, inside.replace(table, table[::-1]))]
    assert names[0] != names[1]


def test_blobs_of_other_backends_are_not_read(programs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = programs["delegate"]
    blob = b"blob of the backend"
    data = path.read_bytes()
    assert data.count(blob) == 1
    names = [program_identity(pte.Program(one)) for one in (data, data.replace(blob, blob[::-1]))]
    assert names[0] == names[1]


@pytest.mark.parametrize("size", [0, 1, 16384, 16385, 100_000])
def test_a_sample_is_small_and_spread(size: int) -> None:
    pieces = list(identity.sample(memoryview(bytes(i % 251 for i in range(size)))))
    joined = b"".join(pieces)
    whole = bytes(i % 251 for i in range(size))
    assert len(joined) == min(size, identity.PIECE * identity.PIECES)
    assert joined[:200] == whole[:200]
    assert joined[-200:] == whole[-200:]
    if size == 100_000:
        assert [bytes(piece[:1])[0] for piece in pieces] == [(99_744 * n // 63) % 251 for n in range(64)]
