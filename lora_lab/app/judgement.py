"""Everything that can be known to be wrong with the points of a call before a weight is read, collected.

Each section of a trial (base model, data, evaluation) is judged once per call, however many points share it, and also
where another section of the trial is wrong: one try shows all problems.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from lora_lab.app.compose import Composition
from lora_lab.data.jsonl import check_jsonl
from lora_lab.data.skills import check_mixture, check_skills_identity
from lora_lab.data.sources import count_train_rows
from lora_lab.errors import InputError, Problem
from lora_lab.evaluate.check import check_evaluation
from lora_lab.evaluate.identity import evaluation_identities
from lora_lab.plan.counts import counts_of
from lora_lab.plan.folder import with_known_shape
from lora_lab.plan.identity import base_identity, data_identities
from lora_lab.plan.paths import existing
from lora_lab.plan.steps import steps_of
from lora_lab.schema.data import Data, JsonlData, SkillsData
from lora_lab.schema.trial import LAB_KEYS, Lab, Trial, examine_trial, read_lab

T = TypeVar("T")

_SECTIONS_OF_STEPS = frozenset({"method", "training", "scheduler", "data"})
_SECTIONS_OF_COUNTS = frozenset({"method", "model", "target", "rank"})


class Findings:
    """Problems in the order in which they were found, each once."""

    def __init__(self) -> None:
        self._problems: dict[Problem, None] = {}

    def add(self, problems: Iterable[Problem]) -> None:
        """Adds those that are new."""
        self._problems.update(dict.fromkeys(problems))

    def attempt(self, read: Callable[[], T]) -> T | None:
        """What `read` returns, or None where it raises InputError, whose problems are added."""
        try:
            return read()
        except InputError as error:
            self.add(error.problems)
            return None

    def raise_if_any(self) -> None:
        """Raises InputError with all problems."""
        if self._problems:
            raise InputError(self._problems)

    def __iter__(self) -> Any:
        return iter(self._problems)


class Facts:
    """What is known about the sections of trials; each distinct section is looked at once.

    notes: sentences about the data for the user.
    """

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._known: dict[tuple[str, str], tuple[Any, tuple[Problem, ...]]] = {}
        self.notes: dict[str, None] = {}

    def base(self, trial: Trial, found: Findings) -> dict[str, str] | None:
        """The declared identity of the base model."""
        return self._once(trial.model, lambda: {"base": base_identity(trial.model, cache=self._cache)}, found)

    def data(self, trial: Trial, found: Findings) -> tuple[dict[str, str], int | None] | None:
        """The identities of the data, and the number of training rows (None where only loading would tell)."""
        return self._once(trial.data, lambda: self._read_data(trial.data), found)

    def evaluation(self, trial: Trial, found: Findings) -> dict[str, str] | None:
        """The identities of the texts that are scored on."""
        return self._once(trial.evaluation, lambda: self._read_evaluation(trial), found)

    def _once(self, section: BaseModel, read: Callable[[], T], found: Findings) -> T | None:
        key = type(section).__name__, section.model_dump_json()
        if key not in self._known:
            own = Findings()
            value = own.attempt(read)
            self._known[key] = value, tuple(own)
        value, problems = self._known[key]
        found.add(problems)
        return value

    def _read_data(self, data: Data) -> tuple[dict[str, str], int | None]:
        if isinstance(data, SkillsData):
            check_skills_identity(data)
            check_mixture(data.mixture)
        if isinstance(data, JsonlData):
            _files_exist(data)
            summary = check_jsonl(data)
            self.notes.update(dict.fromkeys(summary.notes))
            return data_identities(data, cache=self._cache), summary.rows
        return data_identities(data, cache=self._cache), count_train_rows(data)

    def _read_evaluation(self, trial: Trial) -> dict[str, str]:
        check_evaluation(trial.evaluation, cache=self._cache)
        return evaluation_identities(trial.evaluation, cache=self._cache)


def _files_exist(data: JsonlData) -> None:
    found = Findings()
    for where, path in (("data.path", data.path), ("data.heldout_path", data.heldout_path)):
        if path is not None:
            found.attempt(lambda path=path, where=where: existing(Path(path), where=where, kind="file"))
    found.raise_if_any()


def read_point(point: Composition, found: Findings) -> tuple[Lab | None, Trial]:
    """The housekeeping and the trial of a point; the trial has only the sections that are valid by themselves."""
    own = Findings()
    lab, trial = _read_mapping(point, point.mapping, own)
    if point.hidden and list(own):
        own = Findings()  # once more with what was written in the place of the environment's values
        _read_mapping(point, _masked(point), own)
    own.add(point.problems)
    found.add(placed(own, point))
    return lab, trial


def _read_mapping(point: Composition, mapping: Mapping[str, Any], found: Findings) -> tuple[Lab | None, Trial]:
    housekeeping = {key: value for key, value in mapping.items() if key in LAB_KEYS}
    examined = examine_trial(
        {key: value for key, value in mapping.items() if key not in LAB_KEYS}, left_out=point.doubtful
    )
    of_lab = Findings()
    lab = of_lab.attempt(lambda: read_lab(housekeeping))
    found.add(problem for problem in of_lab if problem.where.partition(".")[0] not in point.doubtful)
    found.add(examined.problems)
    return lab, examined.trial


def judge(trial: Trial, facts: Facts, found: Findings) -> Trial:
    """Adds what the sections of a trial, and the rules between them, turn out to be; returns it with a known shape."""
    has = trial.model_fields_set
    if "model" in has and found.attempt(lambda: facts_of_shape(trial)) is None:
        has = has - {"model"}
    elif "model" in has:
        trial = facts_of_shape(trial)
        facts.base(trial, found)
    rows = facts.data(trial, found) if "data" in has else None
    if "evaluation" in has:
        facts.evaluation(trial, found)
    if has >= _SECTIONS_OF_STEPS and rows is not None:
        found.attempt(lambda: steps_of(trial, rows[1]))
    if has >= _SECTIONS_OF_COUNTS:
        found.attempt(lambda: counts_of(trial))
    return trial
