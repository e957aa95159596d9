"""Generated rows: the same everywhere, different from each other, never on both sides."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest

from lora_lab.data import skills
from lora_lab.data.skills import (
    SKILLS,
    TRAINED,
    UNSEEN,
    check_skills_identity,
    generate_skills,
    load_skills,
    side_of,
    skill_rows,
)
from lora_lab.errors import DataError, IdentityError, InputError
from lora_lab.schema.data import SkillsData

MIXTURE = {"chain_sum": 1.0, "gcd": 2.0}


def data(**changes: object) -> SkillsData:
    values: dict[str, Any] = {
        "kind": "skills",
        "template": "auto",
        "loss_on": "answer",
        "max_length": 256,
        "package_version": "0.1.25",
        "mixture": dict.fromkeys(TRAINED, 1.0),
        "types": {},
        "train_size": 200,
        "train_seed": 1,
        "heldout_size": 40,
        "heldout_seed": 1,
    }
    return SkillsData.model_validate({**values, **changes})


def _digest(rows: list[Any]) -> str:
    return hashlib.sha256(repr([row.content for row in rows]).encode()).hexdigest()


def test_neighbouring_seeds_share_no_run_of_rows() -> None:
    """reasoning-gym adds the index to the seed: seeds 1 and 2 would give nearly the same rows if passed through."""
    first = {row.content for row in generate_skills({"word_reversal": 1.0}, size=50, seed=1, side="train")}
    second = {row.content for row in generate_skills({"word_reversal": 1.0}, size=50, seed=2, side="train")}
    assert len(first & second) < 5


def test_same_arguments_same_rows_in_another_process_and_with_other_hashing() -> None:
    code = (
        "from tests.unit.test_skills import _digest\n"
        "from lora_lab.data.skills import SKILLS, generate_skills\n"
        "print(_digest(generate_skills(dict.fromkeys(SKILLS, 1.0), size=60, seed=3, side='heldout')))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    here = _digest(generate_skills(dict.fromkeys(SKILLS, 1.0), size=60, seed=3, side="heldout"))
    assert done.stdout.strip() == here


def test_sides_never_meet_even_with_equal_seeds() -> None:
    rows = load_skills(data())
    assert (len(rows.train), len(rows.heldout)) == (200, 40)
    prompts = [{row.content[0] for row in side} for side in (rows.train, rows.heldout)]
    assert not prompts[0] & prompts[1]
    assert len(prompts[0]) == 200, "no row twice"
    assert {side_of(row.content[0][1]) for row in rows.heldout} == {"heldout"}


def test_an_overlap_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skills, "side_of", lambda prompt: "train")
    monkeypatch.setattr(
        skills,
        "generate_skills",
        lambda mixture, *, size, seed, side: list(itertools.islice(skill_rows("gcd", seed=0, side="train"), size)),
    )
    with pytest.raises(DataError, match="both in the training and in the held-out rows"):
        load_skills(data())


def test_shares_follow_the_weights_exactly() -> None:
    rows = generate_skills(MIXTURE, size=100, seed=0, side="train")
    assert Counter(row.skill for row in rows) == {"gcd": 67, "chain_sum": 33}
    assert [row.skill for row in rows] != sorted(str(row.skill) for row in rows), "mixed, not one skill after another"


def test_a_larger_set_keeps_the_rows() -> None:
    small = {row.content for row in generate_skills(MIXTURE, size=30, seed=0, side="train")}
    large = {row.content for row in generate_skills(MIXTURE, size=60, seed=0, side="train")}
    assert small < large


@pytest.mark.parametrize("name", list(SKILLS))
def test_every_skill_gives_short_rows(name: str) -> None:
    """Enough prompts for a task's documents, single lines of answer, no left-over talk about the form."""
    rows = list(itertools.islice(skill_rows(name, seed=0, side="heldout"), 24))
    assert len(rows) == 24
    for row in rows:
        (_, prompt), (_, answer) = row.content
        assert prompt == prompt.strip()
        assert 0 < len(prompt) < 120
        assert 0 < len(answer) < 48
        assert "\n" not in answer
        assert "final answer as" not in prompt
        assert row.skill == name
    assert len({row.answer for row in rows}) >= 4


def test_answers_are_right_where_they_can_be_recomputed() -> None:
    for row in itertools.islice(skill_rows("gcd", seed=0, side="train"), 20):
        numbers = [int(word.strip(",.")) for word in row.content[0][1].partition(": ")[2].split()]
        assert row.answer == str(math.gcd(*numbers))
    for row in itertools.islice(skill_rows("word_reversal", seed=0, side="train"), 20):
        words = row.content[0][1].partition(": ")[2].split(", ")
        assert row.answer == ", ".join(reversed(words))


def test_an_exhausted_generator_names_the_skill() -> None:
    with pytest.raises(DataError, match=r"data\.mixture\.gcd: .* fewer than the 5000"):
        generate_skills({"gcd": 1.0}, size=5000, seed=0, side="train")


def test_unknown_and_reserved_skills_are_refused_together() -> None:
    with pytest.raises(InputError) as caught:
        load_skills(data(mixture={"chain_sums": 1.0, next(iter(UNSEEN)): 1.0}))
    text = str(caught.value)
    assert 'did you mean "chain_sum"' in text
    assert "kept for the task skills_unseen" in text
    assert len(caught.value.problems) == 2


def test_another_package_version_is_not_the_declared_data() -> None:
    check_skills_identity(data())
    with pytest.raises(IdentityError, match=r"made by reasoning-gym 9\.9, but here it is 0\.1\.25"):
        check_skills_identity(data(package_version="9.9"))


def test_checking_the_version_imports_neither_torch_nor_the_generators() -> None:
    code = (
        "import sys\n"
        "import lora_lab.data.skills\n"
        "print([name for name in ('torch', 'reasoning_gym', 'transformers') if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "[]"
