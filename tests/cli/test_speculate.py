"""`run --speculate`: the same text, and what is wrong with its argument."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from executorch_webgpu.cli.commands import cli
from tests import tiny_decoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("speculate")
    for name in ("llama", "hugging_face"):
        (made / f"{name}.pte").write_bytes(tiny_decoder.build(name).pte)
    tiny_decoder.write_tokenizer(made)
    return made


def run(folder: Path, model: str, *args: str) -> Result:
    tokenizer = str(folder / "tokenizer.json")
    return CliRunner().invoke(
        cli, ["run", str(folder / model), "--tokenizer", tokenizer, "-p", "Hi!", "-n", "12", *args]
    )


@pytest.mark.parametrize("how", ["ngram", "ngram:3", "llama.pte", "hugging_face.pte:2"])
@pytest.mark.parametrize("options", [(), ("--temperature", "1.2", "--seed", "5"), ("--steps-per-submit", "0")], ids=str)
def test_the_text_is_the_same(folder: Path, how: str, options: tuple[str, ...]) -> None:
    expected = run(folder, "hugging_face.pte", *options)
    assert expected.exit_code == 0, expected.output
    named = how if how.startswith("ngram") else str(folder / how)
    result = run(folder, "hugging_face.pte", *options, "--speculate", named)
    assert result.exit_code == 0, result.output
    assert result.stdout == expected.stdout


def test_statistics_are_shown(folder: Path) -> None:
    model = str(folder / "hugging_face.pte")
    result = run(folder, "hugging_face.pte", "--speculate", f"{model}:2", "--stats")
    assert result.exit_code == 0, result.output
    assert "drafts: 7 of 7 tokens accepted in 4 calls, 2.8 tokens a call" in result.stderr
    assert "drafts" not in run(folder, "hugging_face.pte", "--stats").stderr


@pytest.mark.parametrize(
    ("model", "how", "message"),
    [
        ("hugging_face.pte", "magic", "--speculate magic: expected ngram, ngram:K, FILE.pte or FILE.pte:K"),
        ("hugging_face.pte", "ngram:0", "most is 0, expected an integer of at least 1"),
        ("hugging_face.pte", "missing.pte", "missing.pte: No such file or directory"),
        ("llama.pte", "ngram", "drafts cannot be verified: method forward gives the logits of the last token only"),
    ],
)
def test_what_cannot_be(folder: Path, model: str, how: str, message: str) -> None:
    result = run(folder, model, "--speculate", how)
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stdout == ""
