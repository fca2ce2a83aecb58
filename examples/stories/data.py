"""Deterministic synthetic stories with questions whose answers must be looked up in the story.

A story introduces a few people and interleaves facts about them (home town, job, pet, belongings and where they were
left, presents, favourite food, instrument, month of birth) with filler sentences. Every kind of fact normally occurs
for several people, so an answer can be found only by looking up the right sentence, often hundreds of tokens back.
A fact is always stated by the same clause (``Mia lived in York``), alone or inside a longer sentence, and the answer to
a question repeats that clause as a sentence. Every question names the first person of its clause: questions from a
value to a person ("Who lived in York?") are not part of the task.

Plain text format of a whole document (one paragraph of story, then one line per question and per answer)::

    Once upon a time, there were three friends: Mia, Tom and Eve. ... They all lived happily ever after.
    Question: Where did Mia live?
    Answer: Mia lived in York.
    Question: ...
    Answer: ...

The prompt for one question ends with ``Answer:`` (no trailing space); the model answers with a leading space and ends
the answer with a newline. A story prompt is simply the start of a story, e.g. ``Once upon a time``.

Only the standard library is used. Seeds below ``EVAL_SEED_START`` are for training; seeds from ``EVAL_SEED_START``
on are reserved for evaluation (the two ranges are disjoint, and `make_story` depends on nothing but the seed).
"""

# ruff: noqa: SIM905 (word lists read better as strings)
from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

TRAIN_SEED_START = 0
"""First seed of the training range (inclusive)."""
EVAL_SEED_START = 10_000_000
"""First seed of the evaluation range; every training seed is smaller."""

QUESTION_PREFIX = "Question: "
ANSWER_PREFIX = "Answer:"

_WOMEN = "Mia Eve Anna Lily Rosa Nora Ella Ruby Lucy Clara Zoe Ida Molly Alice Jane Iris".split()
_MEN = "Tom Ben Max Leo Sam Hugo Finn Jack Theo Adam Felix Ned Paul Otto Noah Karl".split()
_TOWNS = "York Bath Dover Hull Leeds Wells Derby Rye Ely Rome Paris Oslo Lima Cairo".split()
_JOBS = "baker farmer painter teacher doctor sailor tailor miller singer gardener carpenter hunter cook weaver".split()
_ANIMALS = "cat dog fox owl goat pony rabbit parrot turtle goose mouse donkey frog raven".split()
_PETS = "Pip Biscuit Shadow Pepper Button Ginger Patch Clover Bandit Muffin Rusty Snowy Ziggy Tiger".split()
_COLOURS = "red blue green yellow white black brown pink purple orange silver golden".split()
_THINGS = "kite hat bag cup boat ball lamp coat vase book mug chair scarf clock basket bicycle".split()
_PLACES = "attic cellar barn kitchen garden tower library stable cave shed hall forest school market".split()
_GIFTS = "key ring map coin feather letter rope candle shell box mirror stone rose pencil whistle spoon".split()
_FOODS = "plums cheese honey soup bread apples pancakes cherries fish rice pears beans cake nuts".split()
_INSTRUMENTS = "violin piano harp guitar trumpet flute banjo cello fiddle organ horn lute".split()
_MONTHS = "January February March April May June July August September October November December".split()

_VALUES = (
    _WOMEN, _MEN, _TOWNS, _JOBS, _ANIMALS, _PETS, _COLOURS, _THINGS, _PLACES, _GIFTS, _FOODS, _INSTRUMENTS, _MONTHS
)  # fmt: skip

_NUMBER_WORDS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven"}

_OPENINGS = (
    "Once upon a time, there were {n} friends: {people}.",
    "Once upon a time, {n} friends called {people} met by the old bridge.",
    "Once upon a time, on a {adj} {season} {part}, {n} friends came together: {people}.",
    "Once upon a time, in a {adj} land, there were {n} people named {people}.",
    "Long ago, in a {adj} land, {n} friends shared a table: {people}.",
    "One {season} {part}, {people} sat around the fire and told stories.",
    "This is the tale of {n} friends: {people}.",
)
_CLOSINGS = (
    "And so the {part} came to an end, and everyone went home happy.",
    "They all laughed together, and that was the end of the {part}.",
    "Soon the stars came out, and the friends said good night.",
    "They promised to meet again before the next {season}.",
    "And they all lived happily ever after.",
    "The fire burned low, and one by one the friends fell asleep.",
)
_ADJECTIVES = "quiet bright cold windy warm sunny rainy misty foggy peaceful".split()
_SEASONS = "spring summer autumn winter".split()
_PARTS = "morning afternoon evening day night".split()
_FILLERS = (
    "The sun was shining over the hills.",
    "A {adj} wind blew through the trees.",
    "The rain fell softly on the roofs.",
    "It was a {adj} {part}, and nobody was in a hurry.",
    "Far away, a dog barked and then all was still.",
    "The old road was long and full of dust.",
    "Clouds drifted slowly across the sky.",
    "The river sang its {adj} song.",
    "Somewhere a door closed, and then it was quiet again.",
    "The smell of fresh grass filled the air.",
    "{p} laughed and looked up at the sky.",
    "{p} told a long joke, and nobody understood it.",
    "{p} was a little tired that {part}.",
    "{p} could not stop smiling.",
    "{p} took a slow walk along the river.",
    "{p} waited for the rain to stop.",
    "{p} had a strange dream about a {adj} mountain.",
    "{p} wrote a short note and put it away.",
    "{p} counted the stars until it was late.",
    "{p} closed {his} eyes and listened to the wind.",
    "{p} waved to {q} from across the road.",
    "{p} and {q} talked for a long time.",
    "{p} and {q} raced each other down the hill.",
    "{p} asked {q} about the weather.",
    "{p} told {q} a secret, and {q} promised to keep it.",
    "{p} sat down next to {q} and said nothing at all.",
    "{q} thought that {p} looked very brave.",
    "{p} was late again, but {q} did not mind.",
)
_FILLER_LEADS = ("That {part}, ", "A little later, ", "Meanwhile, ", "Then ", "After a while, ", "Suddenly, ")
_FACT_LEADS = (
    "As everyone knew, ", "It was well known that ", "People said that ", "It was true that ", "In those days ",
    "Nobody was surprised that ", "The old miller remembered that ", "Strange as it was, ",
)  # fmt: skip
_FACT_TAILS = (
    ", and that was no secret", ", and everyone knew it", ", or so they said", ", and nobody asked why",
    ", which made people smile", " in those days", ", just like in the old songs",
)  # fmt: skip
_FACT_JOINTS = (" and ", ", while ", ", but ", "; ", ", and ")


@dataclass(frozen=True)
class Story:
    """One story and its questions.

    Attributes:
        text: The story, a single paragraph without newlines.
        questions: ``(question, answer)`` pairs in a random order in which every fact is asked about once before any
            fact is asked about a second time.
        evidence: For each question, the sentence of `text` whose clause the answer repeats.
    """

    text: str
    questions: list[tuple[str, str]]
    evidence: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Fact:
    clause: str
    questions: tuple[str, ...]


def _join(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"


# Each kind of fact: its clause and the questions that the clause answers.
_TEMPLATES: dict[str, tuple[str, tuple[str, ...]]] = {
    "home": ("{p} lived in {town}", ("Where did {p} live?", "In which town did {p} live?")),
    "job": ("{p} worked as a {job}", ("What was {p}'s job?", "What work did {p} do?")),
    "pet": ("{p} had a pet {animal}", ("What pet did {p} have?", "Which animal did {p} have?")),
    "name": ("{p}'s pet was called {pet}", ("What was {p}'s pet called?", "What was the name of {p}'s pet?")),
    "own": ("{p}'s {thing} was {colour}", ("What colour was {p}'s {thing}?", "Which colour did {p}'s {thing} have?")),
    "place": ("{p} left the {lost} in the {place}", ("Where did {p} leave the {lost}?",)),
    "give": ("{p} gave the {gift} to {q}", ("What did {p} give to {q}?", "Who got the {gift} from {p}?")),
    "food": ("{p} liked to eat {food}", ("What did {p} like to eat?",)),
    "music": ("{p} played the {music}", ("Which instrument did {p} play?",)),
    "month": ("{p} was born in {month}", ("When was {p} born?", "In which month was {p} born?")),
}


def _lead(lead: str, sentence: str, proper: set[str]) -> str:
    """Puts a lead-in before a sentence, lower-casing the sentence's first letter unless it is a name."""
    first = sentence.split(" ", 1)[0].rstrip(",.'")
    return lead + (sentence if first in proper else sentence[0].lower() + sentence[1:])


def _draw_facts(rng: random.Random, people: list[str], kinds: list[str]) -> list[_Fact]:
    """Draws a fact of each kind for each person; values of one kind are distinct within a story."""
    n = len(people)
    drawn: dict[str, list[str]] = {
        name: rng.sample(values, n)
        for name, values in (
            ("town", _TOWNS), ("job", _JOBS), ("animal", _ANIMALS), ("pet", _PETS), ("colour", _COLOURS),
            ("thing", _THINGS), ("lost", _THINGS), ("place", _PLACES), ("gift", _GIFTS), ("food", _FOODS),
            ("music", _INSTRUMENTS), ("month", _MONTHS),
        )
    }  # fmt: skip
    if rng.random() < 0.7:  # everyone has the same thing, each in another colour
        drawn["thing"] = drawn["thing"][:1] * n
    receivers = people[1:] + people[:1]  # everyone gives one present and gets one, never their own
    facts: list[_Fact] = []
    for i, person in enumerate(people):
        slots = {name: values[i] for name, values in drawn.items()} | {"p": person, "q": receivers[i]}
        for kind in kinds:
            clause, questions = _TEMPLATES[kind]
            facts.append(_Fact(clause.format(**slots), tuple(q.format(**slots) for q in questions)))
    return facts


def make_story(seed: int, min_words: int = 75, max_words: int = 270) -> Story:
    """Makes the story of a seed.

    Each story uses a few kinds of facts and tells them for all its people, so that the kind of a question alone says
    little about its answer.

    Args:
        seed: Any non-negative integer; see `TRAIN_SEED_START` and `EVAL_SEED_START`.
        min_words: Lower end of the range from which the story's approximate length is drawn.
        max_words: Upper end of that range.

    Returns:
        The story with its questions, the same for the same arguments on every machine.
    """
    rng = random.Random(seed)
    target = rng.randint(min_words, max_words)
    n_people = rng.randint(2, 3) if target < 60 else rng.randint(3, 4 if target < 120 else 5)
    people = rng.sample(_WOMEN + _MEN, n_people)
    proper = set(people)

    def fill(template: str) -> str:
        first, second = rng.sample(people, 2)
        return template.format(
            adj=rng.choice(_ADJECTIVES), season=rng.choice(_SEASONS), part=rng.choice(_PARTS), p=first, q=second,
            his="her" if first in _WOMEN else "his", n=_NUMBER_WORDS[n_people], people=_join(people),
        )  # fmt: skip

    filler_rate = rng.uniform(0.1, 0.5)
    n_kinds = int(target * (1 - filler_rate) / (8 * n_people))
    facts = _draw_facts(rng, people, rng.sample(list(_TEMPLATES), min(max(n_kinds, 1), len(_TEMPLATES))))
    rng.shuffle(facts)
    opening, closing = fill(rng.choice(_OPENINGS)), fill(rng.choice(_CLOSINGS))
    fillers = rng.sample(_FILLERS, len(_FILLERS))

    sentences = [opening]
    asked: list[list[tuple[str, str, str]]] = []  # per told fact: (question, answer, evidence)
    words = len(opening.split()) + len(closing.split())
    while (facts and words < target + 20) or (fillers and words < target):
        if fillers and (not facts or rng.random() < filler_rate):
            sentence = fill(fillers.pop())
            if rng.random() < 0.35:
                sentence = _lead(fill(rng.choice(_FILLER_LEADS)), sentence, proper)
        else:
            told = [facts.pop()]
            if facts and rng.random() < 0.25:
                told.append(facts.pop())
            sentence = rng.choice(_FACT_JOINTS).join(fact.clause for fact in told)
            if rng.random() < 0.2:
                sentence = rng.choice(_FACT_LEADS) + sentence
            sentence += f"{rng.choice(_FACT_TAILS)}." if rng.random() < 0.15 else "."
            for fact in told:
                asked.append([(question, f"{fact.clause}.", sentence) for question in fact.questions])
                rng.shuffle(asked[-1])
        sentences.append(sentence)
        words += len(sentence.split())
    sentences.append(closing)

    ordered: list[tuple[str, str, str]] = []
    while any(asked):
        rng.shuffle(asked)
        ordered += [pairs.pop() for pairs in asked if pairs]
    return Story(" ".join(sentences), [(q, a) for q, a, _ in ordered], [e for _, _, e in ordered])


def value_words() -> list[str]:
    """Every name and value that a fact can have; a tokenizer does well to have one token for each of them."""
    return sorted({word for words in _VALUES for word in words})


def question_text(question: str) -> str:
    """The text that asks a question: goes right after a story's (or a previous answer's) newline."""
    return f"{QUESTION_PREFIX}{question}\n{ANSWER_PREFIX}"


def prompt_text(story: Story, question: str) -> str:
    """The prompt for one question about a story; the expected continuation is ``" <answer>\\n"``."""
    return f"{story.text}\n{question_text(question)}"


def document_text(story: Story, max_questions: int | None = None) -> str:
    """The whole training document of a story: the story and its first `max_questions` questions with answers."""
    lines = [story.text + "\n"]
    lines += [f"{question_text(q)} {a}\n" for q, a in story.questions[:max_questions]]
    return "".join(lines)


def training_document(
    story: Story, encode: Callable[[str], list[int]], bos_id: int, eos_id: int, max_tokens: int
) -> tuple[list[int], list[int]] | None:
    """Token ids of a story followed by as many of its questions and answers as fit.

    Args:
        story: The story.
        encode: Tokenises text without adding special tokens.
        bos_id: Id put at the start.
        eos_id: Id put at the end.
        max_tokens: Longest document allowed.

    Returns:
        ``(ids, is_answer)``, two lists of the same length: the token ids, and 1 where the token belongs to an answer
        (its newline included), else 0. None if not even one question fits.
    """
    ids = [bos_id, *encode(story.text + "\n")]
    is_answer = [0] * len(ids)
    count = 0
    for question, answer in story.questions:
        asked, answered = encode(question_text(question)), encode(f" {answer}\n")
        if len(ids) + len(asked) + len(answered) + 1 > max_tokens:
            break
        ids += asked + answered
        is_answer += [0] * len(asked) + [1] * len(answered)
        count += 1
    if not count:
        return None
    return [*ids, eos_id], [*is_answer, 0]


def recall_document(
    seed: int, encode: Callable[[str], list[int]], bos_id: int, max_tokens: int
) -> tuple[list[int], list[int]]:
    """A bare exercise in looking things up: clauses of facts, then the same clauses again in another order.

    Args:
        seed: Any non-negative integer.
        encode: Tokenises text without adding special tokens.
        bos_id: Id put at the start.
        max_tokens: Longest document allowed; repetitions that do not fit are left out.

    Returns:
        As `training_document`; 1 marks the last word of each repeated clause.
    """
    rng = random.Random(seed)
    people = rng.sample(_WOMEN + _MEN, rng.randint(2, 5))
    facts = _draw_facts(rng, people, rng.sample(list(_TEMPLATES), rng.choice((1, 1, 2, 3))))
    rng.shuffle(facts)
    clauses = [encode(f" {fact.clause}") for fact in facts[:8]]
    stop = encode(".")
    ids = [bos_id]
    for clause in clauses:
        ids += clause + stop
    is_answer = [0] * len(ids)
    while len(ids) < max_tokens - 10:
        rng.shuffle(clauses)
        for clause in clauses:
            if len(ids) + len(clause) + 1 <= max_tokens:
                ids += clause + stop
                is_answer += [0] * (len(clause) - 1) + [1, 0]
    return ids, is_answer


def evaluation_items(
    count: int, questions_per_story: int = 4, first_seed: int = EVAL_SEED_START
) -> Iterator[tuple[Story, str, str, str]]:
    """Held-out questions.

    Args:
        count: How many questions.
        questions_per_story: How many are taken from each story before the next seed is used.
        first_seed: Seed of the first story.

    Yields:
        ``(story, question, answer, evidence)`` tuples, in the same order every time.
    """
    seed = first_seed
    while count > 0:
        story = make_story(seed)
        pairs = list(zip(story.questions, story.evidence, strict=True))
        for (question, answer), evidence in pairs[: min(questions_per_story, count)]:
            yield story, question, answer, evidence
            count -= 1
        seed += 1
