"""Perplexity of the shipped model: the program on the GPU and the eager module it was exported from agree."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

from executorch_webgpu.runtime import Runtime
from tests.harness import device

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from examples.stories import data  # noqa: E402
from examples.stories.evaluate import load_tokenizer  # noqa: E402
from examples.stories.llama import load_model, load_settings  # noqa: E402
from examples.stories.perplexity import VARIANTS, Row, measure, page, perplexity, stories, table  # noqa: E402

MATRICES = 1 + 6 * 7 + 1
"""Of the model: the table of tokens, seven projections a layer, the output layer."""


@pytest.fixture(scope="module")
def documents() -> list[list[int]]:
    return stories(1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gpu_and_eager_are_equal_to_four_digits(variant: str, documents: list[list[int]]) -> None:
    """One delegate (`measure` refuses others); quantised matrices packed. Where both compute in float32 they are equal
    to six digits; in float16 the eager module rounds after every operator, the GPU only weights and caches."""
    row = measure(variant, documents, Runtime(device("full")))
    assert row.tokens == len(documents[0]) - 1 > 300
    assert 1.2 < row.eager < 1.6
    assert abs(row.gpu - row.eager) < 0.5e-3, row
    assert variant == "fp16" or abs(row.difference) < 1e-6, row
    assert row.packed == (0 if variant.startswith("fp") else MATRICES)


def test_the_model_as_it_was_trained_has_that_perplexity(documents: list[list[int]]) -> None:
    """`perplexity` against PyTorch's own loss, on the module of the training script."""
    model = load_model()
    with torch.no_grad():
        found, count = perplexity(model, documents)
        ids = torch.tensor(documents)
        loss = torch.nn.functional.cross_entropy(model(ids)[0, :-1].double(), ids[0, 1:])
    assert (count, found) == (len(documents[0]) - 1, pytest.approx(math.exp(float(loss)), rel=1e-9))


def test_stories_are_held_out_and_fit() -> None:
    settings, tokenizer = load_settings(), load_tokenizer()
    found = stories(3)
    longest = settings["max_context"] - 1
    for number, ids in enumerate(found):
        text = data.document_text(data.make_story(data.EVAL_SEED_START + number))
        assert ids == [settings["bos_id"], *tokenizer.encode(text).ids][:longest]


def test_the_table() -> None:
    rows = [Row("fp32", 1234, 1.5, 1.5 * (1 + 2e-7), 0)]
    assert table(rows).splitlines()[2] == "| fp32 | 1,234 | 1.500000 | 1.500000 | +2.0e-07 |"
    text = page(rows, 7, "a device")
    assert table(rows) in text
    assert "--stories 7" in text
    assert max(map(len, text.splitlines())) <= 160
