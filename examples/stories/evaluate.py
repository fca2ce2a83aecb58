"""Asks a story model held-out questions and counts exact answers.

`evaluate` takes any generator with the signature `Generate`, so the same questions can be put to a compiled program.
As a script it runs the eager PyTorch reference::

    python -m examples.stories.evaluate --count 200
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from examples.stories import data
from examples.stories.llama import MODEL_DIR, load_model, load_settings

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Generate = Callable[[list[int], int, set[int]], list[int]]
"""``generate(prompt_token_ids, max_new_tokens, stop_ids)`` returns the new ids, without the stop id."""

MAX_ANSWER_TOKENS = 16


@dataclass(frozen=True)
class Answer:
    """One asked question.

    Attributes:
        question: The question.
        expected: The right answer.
        given: The model's answer, stripped of surrounding white space.
        prompt_tokens: Length of the prompt.
        distance: Tokens from the start of the sentence that holds the answer to the end of the prompt.
    """

    question: str
    expected: str
    given: str
    prompt_tokens: int
    distance: int

    @property
    def correct(self) -> bool:
        """Whether the answer matches exactly."""
        return self.given == self.expected


@dataclass(frozen=True)
class Report:
    """All answers of an evaluation and the seconds it took."""

    answers: list[Answer]
    seconds: float

    @property
    def accuracy(self) -> float:
        """Fraction of exact answers."""
        return sum(a.correct for a in self.answers) / len(self.answers)

    def __str__(self) -> str:
        """A one-line summary."""
        right = sum(a.correct for a in self.answers)
        distance = sum(a.distance for a in self.answers) / len(self.answers)
        return (
            f"{right} of {len(self.answers)} answers exact ({self.accuracy:.1%}), mean distance {distance:.0f} tokens, "
            f"{self.seconds:.1f} s"
        )


def load_tokenizer(directory: str | Path = MODEL_DIR) -> Tokenizer:
    """Loads the tokenizer of a saved model. It adds no special tokens: put ``bos_id`` before every prompt."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(Path(directory) / "tokenizer.json"))


def evaluate(
    generate: Generate, count: int = 200, questions_per_story: int = 4, directory: str | Path = MODEL_DIR
) -> Report:
    """Asks held-out questions, each with its whole story as a fresh prompt.

    Args:
        generate: Greedy generator.
        count: How many questions.
        questions_per_story: How many questions are taken from each held-out story.
        directory: The model's folder (for the tokenizer and the special ids).

    Returns:
        Every answer, in a fixed order.
    """
    tokenizer, settings = load_tokenizer(directory), load_settings(directory)
    answers = []
    start = time.perf_counter()
    for story, question, expected, evidence in data.evaluation_items(count, questions_per_story):
        text = data.prompt_text(story, question)
        prompt = [settings["bos_id"], *tokenizer.encode(text).ids]
        given = tokenizer.decode(generate(prompt, MAX_ANSWER_TOKENS, set(settings["stop_ids"]))).strip()
        distance = len(tokenizer.encode(text[text.index(evidence) :]).ids)
        answers.append(Answer(question, expected, given, len(prompt), distance))
    return Report(answers, time.perf_counter() - start)


def main() -> None:
    """Command-line entry point: evaluates the eager reference in float32."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL_DIR, help="folder of the model")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--questions-per-story", type=int, default=4)
    parser.add_argument("--verbose", action="store_true", help="print every answer, not only the wrong ones")
    args = parser.parse_args()
    report = evaluate(load_model(args.model).generate, args.count, args.questions_per_story, args.model)
    for answer in report.answers:
        if args.verbose or not answer.correct:
            print(f"{'ok   ' if answer.correct else 'WRONG'} {answer.question} {answer.given} ({answer.expected})")
    print(report)


if __name__ == "__main__":
    main()
