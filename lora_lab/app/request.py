"""What one call asks for: its points, composed, and the study they belong to."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from lora_lab.app.compose import Composer, Composition
from lora_lab.app.locations import sweep_folders
from lora_lab.app.overrides import parse
from lora_lab.errors import InputError, Problem
from lora_lab.plan.expand import count, expand
from lora_lab.plan.stages import is_tuned
from lora_lab.plan.study_file import find_study, read_study_with_places, value_key
from lora_lab.schema.design import RATE, TUNED
from lora_lab.schema.study import Study

_Places = Mapping[tuple[str, str], str]


@dataclass(frozen=True, slots=True)
class Request:
    """All points of one call, the study they belong to, if any, and what is wrong with the call as a whole.

    places: `file:line:column` of what the study sets, by `plan.study_file.value_key`. needs_weights: False where only
    memory is planned, for which a model folder's config.json is enough.
    """

    points: tuple[Composition, ...]
    study: Study | None
    problems: tuple[Problem, ...] = ()
    places: _Places = field(default_factory=dict)
    needs_weights: bool = True


def single(point: Composition) -> Request:
    """The request of one point; a study is none."""
    study = point.mapping["study"]
    problem = Problem("study", f"a study is a sweep: lora-lab run -m study={study}")
    return Request((point,), None, () if study is None else (problem,))


def gather(composer: Composer, points: Sequence[Sequence[str]]) -> Request:
    """Composes all points of a sweep; `study=NAME` stands for the sweep of that study.

    What is wrong with a point is kept with it, and what is wrong with a study in `problems`.
    """
    composed: list[Composition] = []
    problems: dict[Problem, None] = {}
    study: Study | None = None
    places: _Places = {}
    for point in points:
        first = composer.attempt(point)
        if first.mapping["study"] is None:
            composed.append(first)
            continue
        try:
            study, places = read_study_with_places(find_study(str(first.mapping["study"]), sweep_folders()))
            _check_rates(study)
            _check_size(study, limit=first.mapping["max_runs"])
            composed += _study_points(composer, study, point, places)
        except InputError as error:
            problems.update(dict.fromkeys(error.problems))
            composed.append(first)
    return Request(tuple(composed), study, tuple(problems), places)


def _check_rates(study: Study) -> None:
    """A rate that tuning is to pick is known only after runs of another stage."""
    if any(map(is_tuned, expand(study))):
        text = (
            f"{RATE}: {TUNED} is picked by runs that come first: lora-lab reproduce {study.name} (--dry-run plans it)"
        )
        raise InputError(Problem("study", text))


def _check_size(study: Study, *, limit: object) -> None:
    size = count(study)
    if isinstance(limit, int) and 1 <= limit < size:
        raise InputError(Problem("max_runs", f"{size:,} runs; limit {limit:,}; pass max_runs={size} to allow it"))


def _study_points(composer: Composer, study: Study, point: Sequence[str], places: _Places) -> Iterator[Composition]:
    own = {parse(text).key_or_group for text in point}
    for values in expand(study):
        found = {key: places[value_key(key, value)] for key, value in values.items() if key not in own}
        yield dataclasses.replace(composer.attempt(point, under=values), places=found)
