"""Rows of a batch in files, and forks to another batch: going on elsewhere, and what cannot be taken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from executorch_webgpu.runtime import BatchGenerator, Generator, InputError, Runtime, Sampling
from executorch_webgpu.runtime.decoding import snapshot
from executorch_webgpu.runtime.decoding.sampling import GREEDY
from executorch_webgpu.runtime.decoding.snapshot import Used
from tests import tiny_decoder
from tests.harness import device
from tests.runtime.batches import DRAWN, PROMPTS, grow, solo
from tests.runtime.sessions import load
from tests.tiny_decoder import BATCH, CAPACITY, HEAD, KV_HEADS

PENALTY = Sampling(temperature=0.9, repetition_penalty=1.7, seed=5)
WAYS: list[int | None] = [None, 0]
LONGER = PROMPTS[2]


@pytest.fixture(params=WAYS, ids=["ahead", "host"])
def steps(request: pytest.FixtureRequest) -> int | None:
    found: int | None = request.param
    return found


def one(batch: BatchGenerator, row: int, count: int, sampling: Sampling = GREEDY) -> list[int]:
    """Further tokens of a row."""
    return [batch.generate_next(row, sampling) for _ in range(count)]


def content(batch: BatchGenerator) -> dict[str, np.ndarray]:
    """Every bit of the caches, by batch row."""
    queue = batch.method.device.gpu.queue
    buffers = batch.method.state.buffers()
    return {n: np.frombuffer(queue.read_buffer(b), np.uint32).reshape(BATCH, -1).copy() for n, b in buffers.items()}


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN, PENALTY], ids=["greedy", "drawn", "penalty"])
@pytest.mark.parametrize("kind", ["ragged", "ragged_all", "ragged_int8", "ragged_int4"])
def test_a_row_goes_on_in_another_row(kind: str, sampling: Sampling, steps: int | None, tmp_path: Path) -> None:
    """Of the same batch, whose other rows keep every bit; and of one of another program object."""
    path = tmp_path / "row"
    with (
        BatchGenerator(load(kind), steps_per_submit=steps) as batch,
        Runtime(device("full")).load_program(tiny_decoder.build(kind).pte) as program,
        BatchGenerator(program, steps_per_submit=steps) as other,
    ):
        batch.append_tokens([PROMPTS[0], LONGER, None, PROMPTS[3]])
        first = one(batch, 1, 3, sampling)
        batch.save_row(1, path)
        rest = one(batch, 1, 6, sampling)  # saving changes nothing
        if kind in ("ragged", "ragged_all"):
            assert first + rest == solo(LONGER, 9, sampling)
        before = content(batch)
        batch.load_row(3, path)
        after = content(batch)
        assert all(np.array_equal(after[name][:3], rows[:3]) for name, rows in before.items())
        assert batch.tokens(3) == (*LONGER, *first)
        assert one(batch, 3, 6, sampling) == rest
        other.append_tokens([None, (77, 78), (5,), None])
        other.load_row(2, path)
        assert one(other, 2, 6, sampling) == rest
        other.load_row(0, path)
        assert (other.length(0), other.length(1)) == (len(LONGER) + 3, 2)
        assert one(other, 0, 6, sampling) == rest


def test_only_rows_in_use_are_stored_and_written(tmp_path: Path) -> None:
    """Four bytes to a word, and a scale: the last token was chosen, not run. What is behind stays."""
    with BatchGenerator(load("ragged_int8")) as batch:
        batch.append_tokens(2, LONGER)
        one(batch, 2, 2)
        batch.save_row(2, tmp_path / "s")
        found = load_file(tmp_path / "s")
        used = len(LONGER) + 1
        shapes = {name: array.shape for name, array in found.items() if name.startswith("state.")}
        assert {s for n, s in shapes.items() if "cache" in n} == {(1, used, KV_HEADS, HEAD // 4)}
        assert {s for n, s in shapes.items() if "scales" in n} == {(1, used, KV_HEADS, 1)}
        assert len(shapes) == 4
        source, old = content(batch), {name: np.full_like(rows, 0x55) for name, rows in content(batch).items()}
        for name, buffer in batch.method.state.buffers().items():
            batch.method.device.write(buffer, old[name])
        batch.load_row(1, tmp_path / "s")
        for name, rows in content(batch).items():
            words = used * rows.shape[1] // CAPACITY
            assert np.array_equal(rows[1, :words], source[name][2, :words])
            assert (rows[1, words:] == 0x55).all()
            assert (rows[[0, 2, 3]] == 0x55).all()
        batch.method.reset()


def test_the_random_stream_and_the_finished_flag(steps: int | None, tmp_path: Path) -> None:
    """A setting without a seed draws from the row's own stream, which the file has."""
    hot = Sampling(temperature=2.0)
    with BatchGenerator(load("ragged"), steps_per_submit=steps) as batch:
        batch.append_tokens(0, PROMPTS[0])
        token = batch.generate_next(0, hot)
        batch.rewind_to(0, len(PROMPTS[0]))
        assert batch.generate_next(0, hot, stop_ids=[token]) == token
        assert batch.finished(0)
        batch.save_row(0, tmp_path / "s")
        batch.load_row(2, tmp_path / "s")
        assert batch.finished(2)
        assert one(batch, 2, 8, hot) == one(batch, 0, 8, hot)


def test_while_requests_run_in_other_rows(tmp_path: Path) -> None:
    """Submits are under way; their rows' texts are as they would be alone."""
    with BatchGenerator(load("ragged"), steps_per_submit=2, chunk=4) as batch:
        batch.append_tokens(3, PROMPTS[3])
        first = one(batch, 3, 2)
        requests = [batch.join(PROMPTS[0], 12, ()), batch.join(LONGER, 10, ())]
        for _ in range(5):
            batch.step()
        assert not any(request.done for request in requests)
        batch.save_row(3, tmp_path / "s")
        batch.load_row(2, tmp_path / "s")
        with pytest.raises(InputError, match="row 0 runs a request"):
            batch.save_row(0, tmp_path / "t")
        with pytest.raises(InputError, match="row 1 runs a request"):
            batch.load_row(1, tmp_path / "s")
        going = batch.join((), 4, (), row=2)
        list(batch.events())
        assert [request.tokens for request in requests] == [solo(PROMPTS[0], 12), solo(LONGER, 10)]
        assert first + going.tokens == solo(PROMPTS[3], 6)
        assert first + one(batch, 3, 4) == solo(PROMPTS[3], 6)


def test_empty_rows_and_rows_that_were_not_run(steps: int | None, tmp_path: Path) -> None:
    with BatchGenerator(load("ragged"), steps_per_submit=steps) as batch:
        batch.save_row(1, tmp_path / "empty")
        batch.append_tokens([(9,), (3, 4), None, None])
        batch.save_row(0, tmp_path / "one")
        batch.load_row(1, tmp_path / "empty")
        assert batch.length(1) == 0
        with pytest.raises(InputError, match="row 1: there is nothing to continue"):
            batch.generate_next(1)
        batch.load_row(1, tmp_path / "one")
        assert one(batch, 1, 5) == solo((9,), 5)


# -- forks to another batch


@pytest.mark.parametrize("kind", ["ragged", "ragged_int4"])
def test_a_fork_to_another_batch(kind: str, steps: int | None) -> None:
    """On the GPU: one copy a cache, without a buffer between."""
    with (
        BatchGenerator(load(kind), steps_per_submit=steps) as batch,
        BatchGenerator(load(kind), steps_per_submit=steps) as other,
    ):
        batch.append_tokens(1, LONGER)
        other.append_tokens(0, PROMPTS[0])
        first = one(batch, 1, 3)
        before = device("full").counters.copy()
        batch.fork(1, 3, other)
        done = device("full").counters.since(before)
        assert (done.submits, done.buffers, done.writes) == (1, 0, 0)
        assert other.tokens(3) == (*LONGER, *first)
        batch.fork(1, 1, other)  # rows of the same number are not the same row
        assert one(other, 3, 5) == one(other, 1, 5) == one(batch, 1, 5)
        with BatchGenerator(load("ragged_one")) as third, pytest.raises(InputError, match="runs another program"):
            batch.fork(1, 0, third)
        small = {**load(kind).constants, "get_max_context_len": 18}
        with BatchGenerator(load(kind), small) as short, pytest.raises(InputError, match="a fork of 19 tokens after 0"):
            batch.fork(1, 0, short)
        with pytest.raises(InputError, match="to is 'b', expected a BatchGenerator"):
            batch.fork(1, 0, "b")  # type: ignore[arg-type]
        other.close()
        with pytest.raises(InputError, match="this batch was closed"):
            batch.fork(1, 0, other)


# -- files that are wrong


def rewrite(path: Path, change: Callable[[dict[str, str], dict[str, np.ndarray]], object]) -> None:
    """Change a file's content as somebody would who also knows the checksum."""
    from safetensors import safe_open

    with safe_open(str(path), framework="numpy") as file:
        names = dict(file.metadata())
    tensors = load_file(path)
    change(names, tensors)
    names["sha256"] = snapshot._digest(names, tensors)
    save_file(tensors, path, names)


def all_rows(_: dict[str, str], tensors: dict[str, np.ndarray]) -> None:
    for name, array in tensors.items():
        if name.startswith("state."):
            tensors[name] = np.repeat(array, BATCH, 0)


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-1]), "no session file, or a truncated or damaged one"),
    "a flipped bit": (
        lambda p: p.write_bytes(p.read_bytes()[:-9] + bytes([p.read_bytes()[-9] ^ 4]) + p.read_bytes()[-8:]),
        "damaged: its content does not fit its checksum",
    ),
    "another model": (
        lambda p: rewrite(p, lambda m, t: m.update(model="0" * 64)), "to another export of it .forward, 0000"
    ),
    "too many tokens": (
        lambda p: rewrite(p, lambda m, t: t.update(tokens=np.ones(25, np.int32))),
        "has 25 tokens .its program takes 24., but this program takes 24",
    ),
    "a whole batch": (lambda p: rewrite(p, all_rows), r"has shape \[4, 12, 1, 16\], expected \[1, 12, 1, 16\]"),
    "a run of more": (lambda p: rewrite(p, lambda m, t: m.update(run="99")), "99 of 13 tokens were run"),
    "a foreign token": (
        lambda p: rewrite(p, lambda m, t: t.update(tokens=np.full(13, 260, np.int32))), "a token outside the vocabulary"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files_change_nothing(case: str, tmp_path: Path) -> None:
    damage, message = WRONG[case]
    path = tmp_path / "s"
    with BatchGenerator(load("ragged")) as batch:
        batch.append_tokens(PROMPTS)
        first = grow(batch, 2)
        batch.save_row(2, path)
        damage(path)
        tokens, bits = [batch.tokens(row) for row in range(BATCH)], content(batch)
        before = device("full").counters.copy()
        with pytest.raises(InputError, match=message):
            batch.load_row(0, path)
        done = device("full").counters.since(before)
        assert (done.writes, done.submits, done.buffers) == (0, 0, 0)
        assert [batch.tokens(row) for row in range(BATCH)] == tokens
        assert all(np.array_equal(rows, bits[name]) for name, rows in content(batch).items())
        rest = grow(batch, 3)
        assert [a + b for a, b in zip(first, rest, strict=True)] == [solo(prompt, 5) for prompt in PROMPTS]


def test_files_of_others_and_of_longer_rows(tmp_path: Path) -> None:
    with BatchGenerator(load("ragged_int8")) as batch, Generator(load("llama")) as generator:
        batch.append_tokens(0, LONGER)
        batch.save_row(0, tmp_path / "int8")
        generator.append_tokens(LONGER)
        generator.save(tmp_path / "solo")
        with pytest.raises(InputError, match="belongs to another model, or to another export"):
            generator.load(tmp_path / "int8")
    small = {**load("ragged_int8").constants, "get_max_context_len": 10}
    with BatchGenerator(load("ragged_int8"), small) as short, BatchGenerator(load("ragged")) as floats:
        with pytest.raises(InputError, match=r"11 tokens \(its program takes 24\), but this program takes 10"):
            short.load_row(0, tmp_path / "int8")
        for name in ("int8", "solo"):
            with pytest.raises(InputError, match="belongs to another model, or to another export"):
                floats.load_row(0, tmp_path / name)
        for row in (-1, BATCH, "0", True):
            for call in (floats.save_row, floats.load_row):
                with pytest.raises(InputError, match="there is no row"):
                    call(row, tmp_path / "int8")
        with pytest.raises(FileNotFoundError):
            floats.load_row(0, tmp_path / "missing")
    for call in (floats.save_row, floats.load_row):
        with pytest.raises(InputError, match="this batch was closed"):
            call(0, tmp_path / "int8")


def test_a_device_that_fails_half_way_leaves_an_empty_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with BatchGenerator(load("ragged")) as batch:
        batch.append_tokens(PROMPTS)
        batch.save_row(2, tmp_path / "s")

        def fail(*_: object) -> None:
            raise RuntimeError("device lost")

        monkeypatch.setattr(device("full"), "write", fail)
        with pytest.raises(RuntimeError, match="device lost"):
            batch.load_row(0, tmp_path / "s")
        monkeypatch.undo()
        assert batch.length(0) == 0
        assert one(batch, 1, 4) == solo(PROMPTS[1], 4)
        batch.append_tokens(0, PROMPTS[0])
        assert one(batch, 0, 4) == solo(PROMPTS[0], 4)


# -- which part of a buffer is a row's


@pytest.mark.parametrize("shape", [(3, 8, 2, 5), (3, 2, 8, 5), (3, 8, 8, 5)])
def test_pieces_of_a_row(shape: tuple[int, ...]) -> None:
    """Caches [B, C, H, D], [B, H, C, D] and one whose axis of positions cannot be told, against numpy's slices."""
    from executorch_webgpu.backend.graph import Value

    value = Value("mutable", "f32", shape, "cache")
    numbers = np.arange(np.prod(shape)).reshape(shape)
    for row in range(3):
        used = Used(3, 8, row)
        wanted = numbers[row : row + 1]
        if shape != (3, 8, 8, 5):
            wanted = wanted[:, :3] if shape[1] == 8 else wanted[:, :, :3]
        found = [i for first, count in used.runs(value) for i in range(first, first + count)]
        assert found == wanted.reshape(-1).tolist()
        assert used.shape(value) == wanted.shape
