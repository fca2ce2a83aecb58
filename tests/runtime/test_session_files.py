"""Sessions in files: going on elsewhere, and every way in which a file can be wrong."""

from __future__ import annotations

import stat
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from executorch_webgpu.runtime import Generator, InputError, Runtime, Sampling, UnsupportedError
from executorch_webgpu.runtime.decoding import snapshot
from executorch_webgpu.runtime.decoding.sampling import GREEDY
from tests import tiny_decoder, tiny_states
from tests.harness import device
from tests.runtime.sessions import DRAWN, PROMPT, golden, load, more
from tests.tiny_decoder import CAPACITY, HEAD, KV_HEADS


def metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(str(path), framework="numpy") as file:
        return dict(file.metadata())


def rewrite(path: Path, change: Callable[[dict[str, str], dict[str, np.ndarray]], object]) -> None:
    """Change a file's content as somebody would who also knows the checksum."""
    names, tensors = metadata(path), load_file(path)
    change(names, tensors)
    names["sha256"] = snapshot._digest(names, tensors)
    save_file(tensors, path, names)


@pytest.mark.parametrize("kind", ["llama", "hugging_face", "f16", "both", "ring", "recurrent"])
@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_a_session_goes_on_where_it_was_saved(kind: str, sampling: Sampling, tmp_path: Path) -> None:
    """In another program object of the same file; with the last token run, and with it only chosen."""
    expected = golden(kind, tuple(PROMPT), 14, sampling)
    pte = tiny_decoder.build(kind).pte if kind in tiny_decoder.CONSTANTS else tiny_states.build(kind)
    with Generator(load(kind)) as generator, Runtime(device("full")).load_program(pte) as program:
        generator.append_tokens(PROMPT)
        generator.save(tmp_path / "prompt")
        generator.generate((), 6, (), sampling)
        generator.save(tmp_path / "text")
        assert more(generator, 8, sampling) == expected[6:]  # saving changes nothing
        other = Generator(program)
        other.append_tokens([77] * 12)
        for name, count in (("text", 6), ("prompt", 0), ("text", 6)):
            other.load(tmp_path / name)
            assert other.tokens == (*PROMPT, *expected[:count])
            assert (other.logits is None) == bool(count)
            assert more(other, 14 - count, sampling) == expected[count:]


def test_only_rows_in_use_are_stored(tmp_path: Path) -> None:
    with Generator(load("f16")) as generator:
        generator.append_tokens(PROMPT)
        generator.save(tmp_path / "s")
        found = load_file(tmp_path / "s")
        caches = {name: array.shape for name, array in found.items() if "cache" in name}
        assert set(caches.values()) == {(1, 3, KV_HEADS, HEAD)}
        assert len(caches) == 2
        assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o644
        names = metadata(tmp_path / "s")
        assert (names["run"], names["capacity"], names["methods"]) == ("3", str(CAPACITY), "forward")
        assert int(names["seed"]) == generator._seed


def test_a_session_moves_between_devices(tmp_path: Path) -> None:
    """One keeps f16, the other f32."""
    expected = golden("f16", tuple(PROMPT), 10)
    for here, there in (("f16", "f16 on default-limits"), ("f16 on default-limits", "f16")):
        with Generator(load(here)) as generator, Generator(load(there)) as other:
            generator.generate(PROMPT, 5, ())
            generator.save(tmp_path / "s")
            other.load(tmp_path / "s")
            assert more(other, 5) == expected[5:]


def test_the_finished_flag_and_the_random_stream_are_stored(tmp_path: Path) -> None:
    hot = Sampling(temperature=2.0)
    with Generator(load("llama")) as generator, Generator(load("llama")) as other:
        first = generator.generate(PROMPT, 3, ()).tokens
        generator.rewind_to(len(PROMPT))
        generator.generate((), 3, stop_ids=[first[1]])
        assert generator.finished
        generator.save(tmp_path / "s")
        other.load(tmp_path / "s")
        assert other.finished
        assert more(other, 8, hot) == more(generator, 8, hot)


def test_rings_know_what_they_hold_after_loading(tmp_path: Path) -> None:
    with Generator(load("ring")) as generator, Generator(load("ring")) as other:
        generator.generate(PROMPT, 30, ())
        generator.save(tmp_path / "s")
        other.load(tmp_path / "s")
        for each in (generator, other):
            with pytest.raises(UnsupportedError, match="the least length is 24"):
                each.rewind_to(23)
            each.rewind_to(24)
        assert more(generator, 9) == more(other, 9)


# -- files that are wrong


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "another file": (lambda p: p.write_bytes(b"hello"), "no session file, or a truncated or damaged one"),
    "empty": (lambda p: p.write_bytes(b""), "no session file, or a truncated or damaged one"),
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-1]), "no session file, or a truncated or damaged one"),
    "truncated header": (lambda p: p.write_bytes(p.read_bytes()[:40]), "no session file, or a truncated"),
    "too long": (lambda p: p.write_bytes(p.read_bytes() + b"x"), "no session file, or a truncated or damaged one"),
    "a flipped bit": (
        lambda p: p.write_bytes(p.read_bytes()[:-9] + bytes([p.read_bytes()[-9] ^ 4]) + p.read_bytes()[-8:]),
        "damaged: its content does not fit its checksum",
    ),
    "no session": (lambda p: save_file({"x": np.zeros(3)}, p), "a safetensors file, but no session"),
    "a newer version": (lambda p: rewrite(p, lambda m, t: m.update(version="2")), "version 2; this package reads"),
    "incomplete": (lambda p: rewrite(p, lambda m, t: m.pop("seed")), "incomplete: 'seed'"),
    "no number": (lambda p: rewrite(p, lambda m, t: m.update(run="many")), "incomplete: invalid literal"),
    "another model": (
        lambda p: rewrite(p, lambda m, t: m.update(model="0" * 64)), "to another export of it .forward, 0000"
    ),
    "a run of more": (lambda p: rewrite(p, lambda m, t: m.update(run="8")), "8 of 7 tokens were run"),
    "a bad seed": (lambda p: rewrite(p, lambda m, t: m.update(seed="-1")), "the seed is -1"),
    "a foreign token": (
        lambda p: rewrite(p, lambda m, t: t.update(tokens=np.array([1, 2, 3, 260, 1, 1, 1], np.int32))),
        "a token outside the vocabulary",
    ),
    "too many tokens": (
        lambda p: rewrite(p, lambda m, t: t.update(tokens=np.ones(25, np.int32))),
        "has 25 tokens .its program takes 24., but this program takes 24",
    ),
    "missing state": (lambda p: rewrite(p, lambda m, t: t.pop(_cache(t))), "state is missing .'.*_cache'."),
    "extra state": (
        lambda p: rewrite(p, lambda m, t: t.update({"state.more": np.zeros(3)})), ".'more'. is not this program's"
    ),
    "a wrong shape": (
        lambda p: rewrite(p, lambda m, t: t.update({_cache(t): np.zeros((1, 5, 1, HEAD), np.float32)})),
        r"has shape \[1, 5, 1, 16\], expected \[1, 6, 1, 16\]",
    ),
    "a wrong dtype": (
        lambda p: rewrite(p, lambda m, t: t.update({_cache(t): np.zeros((1, 6, 1, HEAD), np.int32)})), "is int32"
    ),
    "wrong logits": (
        lambda p: rewrite(p, lambda m, t: t.update(logits=np.zeros(3, np.float32))), r"logits of shape \[3\]"
    ),
}  # fmt: skip


def _cache(tensors: dict[str, np.ndarray]) -> str:
    return next(name for name in sorted(tensors) if "cache" in name)


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files_change_nothing(case: str, tmp_path: Path) -> None:
    damage, message = WRONG[case]
    path = tmp_path / "s"
    with Generator(load("llama")) as generator:
        generator.generate(PROMPT, 4, ())
        generator.save(path)
        expected = golden("llama", tuple(PROMPT), 9)
        damage(path)
        before = device("full").counters.copy()
        with pytest.raises(InputError, match=message):
            generator.load(path)
        done = device("full").counters.since(before)
        assert (done.writes, done.submits) == (0, 0)
        assert generator.tokens == (*PROMPT, *expected[:4])
        assert more(generator, 5) == expected[4:]


def test_sessions_of_other_programs_and_capacities(tmp_path: Path) -> None:
    with Generator(load("long")) as generator:
        generator.append_tokens(range(30))
        generator.save(tmp_path / "s")
    with Generator(load("llama")) as other:
        with pytest.raises(InputError, match=r"30 tokens \(its program takes 80\), but this program takes 24"):
            other.load(tmp_path / "s")
        assert other.length == 0
    with Generator(load("ring")) as third, pytest.raises(InputError, match="belongs to another model"):
        third.load(tmp_path / "s")
    with (
        Generator(load("long"), {"get_max_seq_len": 20}) as small,
        pytest.raises(InputError, match="but this program takes 20"),
    ):
        small.load(tmp_path / "s")


def test_files_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with Generator(load("llama")) as generator:
        generator.append_tokens(PROMPT)
        with pytest.raises(FileNotFoundError, match="missing"):
            generator.load(tmp_path / "missing")
        with pytest.raises(FileNotFoundError):
            generator.save(tmp_path / "no folder" / "s")
        generator.save(tmp_path / "s")
        old = (tmp_path / "s").read_bytes()
        (tmp_path / "folder").mkdir()
        with pytest.raises(OSError, match="folder"):
            generator.save(tmp_path / "folder")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "s"]  # no half-written files
        assert (tmp_path / "s").read_bytes() == old


def test_without_safetensors_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with Generator(load("llama")) as generator:
        generator.append_tokens(PROMPT)
        for call in (generator.save, generator.load):
            with pytest.raises(UnsupportedError, match=r"pip install 'executorch-webgpu\[sessions\]'"):
                call(tmp_path / "s")
        generator.method.outside = lambda: ["aten::topk"]  # type: ignore[method-assign]
        with pytest.raises(UnsupportedError, match="operators outside of its delegates"):
            generator.save(tmp_path / "s")


def test_a_device_that_fails_half_way_leaves_an_empty_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Generator(load("llama")) as generator:
        generator.append_tokens(PROMPT)
        generator.save(tmp_path / "s")

        def fail(*_: object) -> None:
            raise RuntimeError("device lost")

        monkeypatch.setattr(device("full"), "write", fail)
        with pytest.raises(RuntimeError, match="device lost"):
            generator.load(tmp_path / "s")
        monkeypatch.undo()
        assert generator.length == 0
        assert generator.generate(PROMPT, 5, ()).tokens == golden("llama", tuple(PROMPT), 5)
