"""Documents of the tasks that need no network: multiple choice over skills, completion and perplexity on prose.

In both kinds of multiple choice a model that never reads the question scores chance on average: the right answers are
spread evenly over the answers there are, wrong ones are drawn from the same set, and the place is drawn too.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from lora_lab.data.prose import prose_passages, prose_sentences
from lora_lab.data.rows import Row
from lora_lab.data.skills import skill_rows
from lora_lab.errors import DataError, Problem
from lora_lab.schema.evaluation import ProseTasks, SkillsTasks

CHOICES = 4
PASSAGE_WORDS = 128
_POOL = 512

Document = dict[str, Any]


def skills_documents(names: Iterable[str], tasks: SkillsTasks) -> list[Document]:
    """`tasks.documents` questions, as many of each skill as of the others (to one), from the held-out side.

    Wrong choices are right answers to other questions of the same skill.

    Raises:
        DataError: a skill has too few different questions or answers.
    """
    ordered = sorted(names)
    documents: list[Document] = []
    for place, name in enumerate(ordered):
        count = tasks.documents // len(ordered) + (place < tasks.documents % len(ordered))
        documents += _skill_documents(name, count, seed=tasks.seed)
    return documents


def completion_documents(tasks: ProseTasks) -> list[Document]:
    """Sentences cut in the middle: the own second half among those of three others."""
    generator = _generator(tasks.seed, "prose_completion")
    halves = [_halved(sentence) for sentence in prose_sentences()]
    chosen = generator.sample(range(len(halves)), tasks.completion_documents)
    documents = []
    for index in chosen:
        start, end = halves[index]
        others = sorted({other for _, other in halves} - {end})
        documents.append({"start": start, **_shuffled_choices(end, generator.sample(others, CHOICES - 1), generator)})
    return documents


def perplexity_documents(tasks: ProseTasks) -> list[Document]:
    """The start of the text as passages of 128 words."""
    return [{"passage": text} for text in prose_passages(tasks.perplexity_words, passage_words=PASSAGE_WORDS)]


def _skill_documents(name: str, count: int, *, seed: int) -> Iterator[Document]:
    generator = _generator(seed, name)
    pool = list(itertools.islice(skill_rows(name, seed=seed, side="heldout"), max(_POOL, count)))
    answers = sorted({row.answer for row in pool})
    if len(pool) < count or len(answers) < CHOICES:
        have = f"{len(pool)} held-out questions with {len(answers)} answers"
        message = f"{name} has {have}, too few for {count} documents"
        raise DataError(Problem("evaluation.skills.documents", message))
    for row in _evenly(pool, answers, count, generator):
        wrong = generator.sample([answer for answer in answers if answer != row.answer], CHOICES - 1)
        yield {"skill": name, "question": row.content[0][1], **_shuffled_choices(row.answer, wrong, generator)}


def _evenly(pool: Sequence[Row], answers: Sequence[str], count: int, generator: random.Random) -> list[Row]:
    """`count` rows, the answers taking turns in a drawn order for as long as they have rows."""
    by_answer = {answer: [row for row in pool if row.answer == answer] for answer in answers}
    order = list(answers)
    generator.shuffle(order)
    turns = itertools.zip_longest(*(by_answer[answer] for answer in order))
    return list(itertools.islice((row for turn in turns for row in turn if row is not None), count))


def _shuffled_choices(right: str, wrong: Sequence[str], generator: random.Random) -> Document:
    choices = [right, *wrong]
    generator.shuffle(choices)
    return {"choices": choices, "label": choices.index(right)}


def _halved(sentence: str) -> tuple[str, str]:
    words = sentence.split()
    middle = len(words) // 2
    return " ".join(words[:middle]), " ".join(words[middle:])


def _generator(seed: int, label: str) -> random.Random:
    return random.Random(int.from_bytes(hashlib.sha256(f"{seed}:{label}".encode()).digest()[:8], "big"))
