"""The story example: its data, its tokenizer and the shipped checkpoint."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from examples.stories import data  # noqa: E402

MODEL = ROOT / "examples" / "stories" / "model"


@pytest.fixture(scope="module")
def tokenizer():
    """The shipped tokenizer."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(MODEL / "tokenizer.json"))


@pytest.fixture(scope="module")
def model():
    """The shipped model in float32."""
    from examples.stories.llama import load_model

    return load_model()


def test_same_seed_same_story():
    for seed in (0, 7, data.EVAL_SEED_START):
        assert data.make_story(seed) == data.make_story(seed)
    assert data.make_story(1) != data.make_story(2)


def test_stories_do_not_change_between_versions():
    text = "".join(data.document_text(data.make_story(data.EVAL_SEED_START + i)) for i in range(20))
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "2b3ba54fc37b0e935e58c3f96ba7fc05a4e38527b29b951b021f24350c899a6a"
    )


def test_every_answer_stands_in_its_evidence():
    for seed in range(200):
        story = data.make_story(seed)
        assert "\n" not in story.text
        assert story.questions
        assert len(story.questions) == len(story.evidence)
        for (question, answer), evidence in zip(story.questions, story.evidence, strict=True):
            assert evidence in story.text
            assert answer.removesuffix(".") in evidence
            assert question.endswith("?")


def test_no_question_has_two_answers():
    for seed in range(200):
        answers: dict[str, str] = {}
        for question, answer in data.make_story(seed).questions:
            assert answers.setdefault(question, answer) == answer


def test_training_and_evaluation_seeds_are_disjoint():
    assert data.TRAIN_SEED_START < data.EVAL_SEED_START
    items = list(data.evaluation_items(50, questions_per_story=3))
    assert len(items) == 50
    expected = [data.make_story(data.EVAL_SEED_START + i // 3).text for i in range(50)]
    assert [story.text for story, *_ in items] == expected


def test_training_seeds_may_not_reach_evaluation_seeds(tokenizer):
    from examples.stories import train

    args = train.parse_args(["--out", "unused", "--full-documents", str(data.EVAL_SEED_START)])
    with pytest.raises(SystemExit):
        train.load_documents(args, tokenizer)


def test_tokenizer_round_trip(tokenizer):
    for seed in range(50):
        text = data.document_text(data.make_story(seed))
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    other = "Any other text: ünïcode, tabs\t, 1234 and\n\n  spaces."
    assert tokenizer.decode(tokenizer.encode(other).ids) == other


def test_prompt_is_a_token_prefix_of_the_document(tokenizer):
    story = data.make_story(3)
    prompt = tokenizer.encode(data.prompt_text(story, story.questions[0][0])).ids
    assert tokenizer.encode(data.document_text(story, 1)).ids[: len(prompt)] == prompt


def test_stories_fit_the_context(tokenizer):
    lengths = [len(tokenizer.encode(data.make_story(seed).text).ids) for seed in range(300)]
    assert min(lengths) > 80
    assert max(lengths) < 520


def test_training_document_marks_answers(tokenizer):
    story = data.make_story(5)
    ids, is_answer = data.training_document(story, lambda t: tokenizer.encode(t).ids, 0, 1, 640)
    assert len(ids) == len(is_answer) <= 640
    assert (ids[0], ids[-1]) == (0, 1)
    marked = tokenizer.decode([i for i, mark in zip(ids, is_answer, strict=True) if mark])
    asked = [answer for _, answer in story.questions]
    given = [line.strip() for line in marked.splitlines()]
    assert given == asked[: len(given)]


def test_shipped_files_are_small():
    assert sum(f.stat().st_size for f in MODEL.iterdir()) <= 10_000_000


def test_model_loads_and_runs(model, tokenizer):
    from examples.stories.llama import load_settings

    settings = load_settings()
    assert tokenizer.get_vocab_size() == model.config.vocab_size
    assert settings["eos_id"] in settings["stop_ids"]
    assert tokenizer.encode("\n").ids[0] in settings["stop_ids"]
    prompt = [settings["bos_id"], *tokenizer.encode("Once upon a time").ids]
    new = model.generate(prompt, 12, set(settings["stop_ids"]))
    assert new
    assert len(new) <= 12


def test_cached_generation_matches_the_full_forward(model):
    import torch

    tokens = torch.randint(2, 1024, (1, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        full = model(tokens)
        head, cache = model.forward_cached(tokens[:, :20])
        steps = [head]
        for i in range(20, 24):
            logits, cache = model.forward_cached(tokens[:, i : i + 1], cache)
            steps.append(logits)
    torch.testing.assert_close(torch.cat(steps, 1), full, atol=1e-4, rtol=1e-4)
