"""Instruction/answer rows made by reasoning-gym from seeds: the data that needs no network.

Every prompt belongs to one *side*, decided by a hash of the prompt itself: a quarter of all prompts is held out, the
rest is for training. So training rows never meet held-out rows or evaluation documents, whatever the seeds and sizes,
and `load_skills` checks it. A few skills are in no mixture: they are kept for the task `skills_unseen`.

Torch-free. `reasoning_gym` takes a second to import and every plan of a sweep passes through here to check the version,
so the import sits in the one function that generates.
"""

from __future__ import annotations

import hashlib
import logging
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any, Literal

from lora_lab.data.rows import Row, Rows
from lora_lab.errors import DataError, IdentityError, InputError, Problem, nearest
from lora_lab.schema.data import SkillsData

PACKAGE = "reasoning-gym"
Side = Literal["train", "heldout"]

_HELDOUT_ONE_IN = 4
_ATTEMPTS_PER_ROW = 40
_SPARE_ATTEMPTS = 2000


@dataclass(frozen=True, slots=True)
class Skill:
    """A reasoning-gym generator with settings that keep prompts short and answers a few tokens long.

    start, cut: the prompt begins with the one text and ends before the other, where the generator would go on about the
    form of the answer. The same words go from every prompt of a skill, so nothing that tells prompts apart is lost.
    """

    generator: str
    settings: Mapping[str, Any]
    start: str | None = None
    cut: str | None = None


TRAINED: Mapping[str, Skill] = {
    "chain_sum": Skill("chain_sum", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}),
    "gcd": Skill("gcd", {"min_value": 2, "max_value": 40}, cut=" Give only"),
    "letter_jumble": Skill("letter_jumble", {"min_words": 2, "max_words": 2}, start="unscramble these words"),
    "number_sequence": Skill(
        "number_sequence", {"min_terms": 4, "max_terms": 5, "min_value": 0, "max_value": 20, "max_complexity": 2}
    ),
    "spell_backward": Skill("spell_backward", {"min_word_len": 3, "max_word_len": 4}),
    "word_reversal": Skill("word_sequence_reversal", {"min_words": 3, "max_words": 3}, start="Reverse this list"),
}
UNSEEN: Mapping[str, Skill] = {
    "fraction_simplification": Skill(
        "fraction_simplification",
        {"min_value": 1, "max_value": 12, "max_factor": 9, "styles": ["plain"]},
        cut=" Give only",
    ),
    "lcm": Skill("lcm", {"min_value": 2, "max_value": 20}, cut=" Give only"),
    "prime_factorization": Skill("prime_factorization", {"min_value": 4, "max_value": 200}, cut=" Write the factors"),
    "sentence_reordering": Skill("sentence_reordering", {"min_words_in_sentence": 3, "max_words_in_sentence": 5}),
}
SKILLS: Mapping[str, Skill] = {**TRAINED, **UNSEEN}


def check_skills_identity(data: SkillsData) -> None:
    """The generators are code: rows are what was declared only when the package version is.

    Raises:
        IdentityError: the installed reasoning-gym is another version than `data.package_version`, or is not installed.
    """
    try:
        installed = metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        installed = "not installed"
    if installed != data.package_version:
        raise IdentityError(
            Problem(
                "data.package_version",
                f"the rows were declared as made by {PACKAGE} {data.package_version}, but here it is {installed}; "
                f"install {PACKAGE}=={data.package_version}, or declare another version: it makes other rows",
            )
        )


def check_mixture(mixture: Mapping[str, float]) -> None:
    """Raises InputError for names that are no skill, or a skill that is kept for `skills_unseen`."""
    problems = []
    for name in mixture:
        where = f"data.mixture.{name}"
        if name in UNSEEN:
            problems.append(
                Problem(where, "kept for the task skills_unseen, so never trained on" + nearest("", list(TRAINED)))
            )
        elif name not in TRAINED:
            problems.append(Problem(where, f'no such skill "{name}"' + nearest(name, list(TRAINED))))
    if problems:
        raise InputError(problems)


def load_skills(data: SkillsData) -> Rows:
    """Training and held-out rows of one configuration.

    Raises:
        IdentityError: see `check_skills_identity`.
        InputError: see `check_mixture`.
        DataError: a generator has fewer different prompts than asked for.
    """
    check_skills_identity(data)
    check_mixture(data.mixture)
    train = generate_skills(data.mixture, size=data.train_size, seed=data.train_seed, side="train")
    heldout = generate_skills(data.mixture, size=data.heldout_size, seed=data.heldout_seed, side="heldout")
    train, heldout = _typed(train, data), _typed(heldout, data)
    common = {row.content[0] for row in train} & {row.content[0] for row in heldout}
    if common:
        raise DataError(f"{len(common)} prompts are both in the training and in the held-out rows")
    return Rows(train, heldout)


def _typed(rows: list[Row], data: SkillsData) -> list[Row]:
    return [replace(row, type=data.types[row.skill]) for row in rows if row.skill is not None] if data.types else rows


def generate_skills(mixture: Mapping[str, float], *, size: int, seed: int, side: Side) -> list[Row]:
    """`size` different rows of one side, in a seeded order.

    Each skill gets its share of `size` by weight (largest remainder, so shares are exact to one row). The same
    arguments give the same rows in every process; a larger `size` keeps the rows that each skill had.

    Raises:
        DataError: a skill ran out of different prompts; names it.
    """
    rows: list[Row] = []
    for name, count in _quotas(mixture, size).items():
        stream = skill_rows(name, seed=seed, side=side)
        for _ in range(count):
            rows.append(_next_row(stream, name=name, wanted=count, side=side))
    random.Random(_derived_seed(seed, "order")).shuffle(rows)
    return rows


def skill_rows(name: str, *, seed: int, side: Side) -> Iterator[Row]:
    """Different rows of one skill and one side, in generator order; ends when the generator only repeats itself."""
    generate = _generator(name, seed=seed)
    seen: set[str] = set()
    tries = 0
    index = 0
    while tries < _SPARE_ATTEMPTS + _ATTEMPTS_PER_ROW * len(seen):
        prompt, answer = generate(index)
        tries, index = tries + 1, index + 1
        if prompt in seen or side_of(prompt) != side:
            continue
        seen.add(prompt)
        yield Row.from_pair(prompt, answer, source=f"{PACKAGE}:{name}:{seed}:{index - 1}", skill=name)


def side_of(prompt: str) -> Side:
    """The side a prompt belongs to: `heldout` for a quarter of all prompts."""
    return "heldout" if hashlib.sha256(prompt.encode()).digest()[0] % _HELDOUT_ONE_IN == 0 else "train"


def _next_row(stream: Iterator[Row], *, name: str, wanted: int, side: Side) -> Row:
    row = next(stream, None)
    if row is None:
        raise DataError(
            Problem(
                f"data.mixture.{name}",
                f"the generator has fewer than the {wanted} different {side} prompts asked for; "
                "ask for fewer rows, or give the skill a smaller weight",
            )
        )
    return row


def _quotas(mixture: Mapping[str, float], size: int) -> dict[str, int]:
    """Rows per skill: proportional to the weights, summing to `size`; ties go to the name that comes first."""
    total = sum(mixture.values())
    exact = {name: size * weight / total for name, weight in sorted(mixture.items())}
    quotas = {name: int(share) for name, share in exact.items()}
    by_remainder = sorted(exact, key=lambda name: (quotas[name] - exact[name], name))
    for name in by_remainder[: size - sum(quotas.values())]:
        quotas[name] += 1
    return quotas


def _derived_seed(seed: int, label: str) -> int:
    """A seed of its own per label. reasoning-gym adds the row's index to its seed, so neighbouring seeds share rows."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{label}".encode()).digest()[:6], "big")


def _generator(name: str, *, seed: int) -> Callable[[int], tuple[str, str]]:
    """Index to (prompt, answer) of one skill. Importing reasoning-gym prints warnings that concern none of ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            import reasoning_gym
        finally:
            logging.disable(before)
    skill = SKILLS[name]
    items = reasoning_gym.create_dataset(skill.generator, seed=_derived_seed(seed, name), **skill.settings)

    def generate(index: int) -> tuple[str, str]:
        item = items[index]
        question = str(item["question"])
        if skill.start is not None:
            question = skill.start + question.partition(skill.start)[2]
        if skill.cut is not None:
            question = question.partition(skill.cut)[0]
        return question.strip(), str(item["answer"]).strip()

    return generate
