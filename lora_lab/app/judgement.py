"""Everything that can be known to be wrong with the points of a call before a weight is read, collected.

Each section of a trial (base model, data, evaluation) is judged once per call, however many points share it, and also
where another section of the trial is wrong: one try shows all problems.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import BaseModel

from lora_lab.app.changes import set_value, top, value_at
from lora_lab.app.compose import Composition
from lora_lab.app.memory_device import named_device
from lora_lab.data.jsonl import check_jsonl
from lora_lab.data.row_types import group_problems
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
from lora_lab.plan.stopping import stopping_problems
from lora_lab.schema.data import Data, JsonlData, SkillsData
from lora_lab.schema.trial import LAB_KEYS, Lab, Trial, examine_trial, read_lab

T = TypeVar("T")

# A shorter value of an environment variable is no secret, and taking it out would garble numbers.
_SHORTEST_SECRET = 4
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

    needs_weights: see `plan.identity.base_identity`. notes: sentences about the data for the user.
    """

    def __init__(self, cache: Path, *, needs_weights: bool) -> None:
        self._cache, self._needs_weights = cache, needs_weights
        self._known: dict[tuple[str, str], tuple[Any, tuple[Problem, ...]]] = {}
        self.notes: dict[str, None] = {}
        self._types: dict[str, Mapping[str, str]] = {}

    def base(self, trial: Trial, found: Findings) -> dict[str, str] | None:
        """The declared identity of the base model."""

        def read() -> dict[str, str]:
            return {"base": base_identity(trial.model, cache=self._cache, needs_weights=self._needs_weights)}

        return self._once(trial.model, read, found)

    def data(self, trial: Trial, found: Findings) -> tuple[dict[str, str], int | None] | None:
        """The identities of the data, and the number of training rows (None where only loading would tell)."""
        return self._once(trial.data, lambda: self._read_data(trial.data), found)

    def row_types(self, trial: Trial) -> Mapping[str, str]:
        """The types that a file's rows name, each with its first line; to be asked for after `data`."""
        return self._types.get(trial.data.model_dump_json(), {})

    def evaluation(self, trial: Trial, found: Findings) -> dict[str, str] | None:
        """The identities of the texts that are scored on."""
        return self._once(trial.evaluation, lambda: self._read_evaluation(trial), found)

    def identities(self, trial: Trial) -> tuple[dict[str, str], int | None]:
        """All identities of a trial without problems, as `plan.identity.identities_of` has them; and its rows."""
        found = Findings()
        base, data, texts = self.base(trial, found), self.data(trial, found), self.evaluation(trial, found)
        found.raise_if_any()
        if base is None or data is None or texts is None:
            raise AssertionError("a section without problems has identities")
        return base | data[0] | texts, data[1]

    def _once(self, section: BaseModel, read: Callable[[], T], found: Findings) -> T | None:
        key = type(section).__name__, section.model_dump_json()
        if key not in self._known:
            own = Findings()
            value = own.attempt(read)
            self._known[key] = value, tuple(own)
        known, problems = self._known[key]
        found.add(problems)
        return cast(T | None, known)

    def _read_data(self, data: Data) -> tuple[dict[str, str], int | None]:
        if isinstance(data, SkillsData):
            check_skills_identity(data)
            check_mixture(data.mixture)
        if isinstance(data, JsonlData):
            _files_exist(data)
            summary = check_jsonl(data)
            self.notes.update(dict.fromkeys(summary.notes))
            self._types[data.model_dump_json()] = summary.types
            return data_identities(data, cache=self._cache), summary.rows
        return data_identities(data, cache=self._cache), count_train_rows(data)

    def _read_evaluation(self, trial: Trial) -> dict[str, str]:
        check_evaluation(trial.evaluation, cache=self._cache)
        return evaluation_identities(trial.evaluation, cache=self._cache)


def _files_exist(data: JsonlData) -> None:
    found = Findings()
    for where, path in (("data.path", data.path), ("data.heldout_path", data.heldout_path)):
        if path is not None:
            found.attempt(functools.partial(existing, Path(path), where=where, kind="file"))
    found.raise_if_any()


def judge(point: Composition, facts: Facts | None, found: Findings) -> tuple[Lab | None, Trial]:
    """Adds everything wrong with a point; returns its housekeeping, and its trial, its shape filled in where known.

    The trial of a point with problems holds only the sections that are valid by themselves. facts: None leaves out what
    looks at files.
    """
    own = Findings()
    lab, trial = _read(point, point.mapping, facts, own)
    if point.hidden and list(own):
        own = _with_hidden_values_as_written(point, facts, own)
    found.add(_placed(problem, point) for problem in (*point.problems, *own))
    return lab, trial


def _read(
    point: Composition, mapping: Mapping[str, Any], facts: Facts | None, found: Findings
) -> tuple[Lab | None, Trial]:
    of_lab, of_trial = Findings(), {key: value for key, value in mapping.items() if key not in LAB_KEYS}
    lab = of_lab.attempt(lambda: read_lab({key: value for key, value in mapping.items() if key in LAB_KEYS}))
    if lab is not None and lab.memory.device is not None:
        of_lab.attempt(functools.partial(named_device, lab.memory.device, where="memory.device"))
    found.add(problem for problem in of_lab if top(problem.where) not in point.doubtful)
    examined = examine_trial(of_trial, left_out=point.doubtful)
    found.add(examined.problems)
    return lab, examined.trial if facts is None else _judge_sections(examined.trial, lab, facts, found)


def _judge_sections(trial: Trial, lab: Lab | None, facts: Facts, found: Findings) -> Trial:
    has = trial.model_fields_set - {top(problem.where) for problem in found}
    if "model" in has:
        known = found.attempt(lambda: with_known_shape(trial))
        if known is not None:
            trial = known
            facts.base(trial, found)
    data = facts.data(trial, found) if "data" in has else None
    if "evaluation" in has:
        facts.evaluation(trial, found)
    if data is not None and "method" in has:
        found.add(group_problems(trial.method, facts.row_types(trial)))
    if data is not None and has >= _SECTIONS_OF_STEPS:
        steps = found.attempt(lambda: steps_of(trial, data[1]))
        if lab is not None and "evaluation" in has:
            found.add(stopping_problems(lab.launch.stopping, trial, None if steps is None else steps.steps))
    if has >= _SECTIONS_OF_COUNTS:
        found.attempt(lambda: counts_of(trial))
    return trial


def _with_hidden_values_as_written(point: Composition, facts: Facts | None, found: Findings) -> Findings:
    """The same problems, each about a value of the environment told as if the text of the override were the value."""
    mapping = copy.deepcopy(dict(point.mapping))
    for key, written in point.hidden.items():
        set_value(mapping, key, written)
    again = Findings()
    _read(point, mapping, facts, again)
    told = {problem.where: problem for problem in again}
    hidden = Findings()
    for problem in found:
        where = problem.where
        for key, written in point.hidden.items():
            if where == key or where.startswith(f"{key}."):
                problem = told.get(where, Problem(where, f"{written} gives a value that is not allowed here"))
        hidden.add([problem])
    return hidden


def _placed(problem: Problem, point: Composition) -> Problem:
    """The problem with the line of the study file that set the value, and without values of the environment."""
    where, message = problem.where, problem.message
    for key, written in point.hidden.items():
        value = value_at(point.mapping, key)
        if isinstance(value, str) and len(value) >= _SHORTEST_SECRET:
            where, message = where.replace(value, str(written)), message.replace(value, str(written))
    key = where
    while key and key not in point.places:
        key = key.rpartition(".")[0]
    if key:
        return Problem(point.places[key], f"{where}: {message}")
    return Problem(where, message)
