"""One call of `reproduce`: a study at one scale, the housekeeping it runs under, and its points composed and planned.

Points go to the same composer and planner as those of `run -m`, without Hydra's command line around them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.types import RunMode

from lora_lab.app import overrides as checks
from lora_lab.app.changes import top
from lora_lab.app.claim_checks import check_claims
from lora_lab.app.compose import Composer, config_loader
from lora_lab.app.locations import sweep_folders
from lora_lab.app.planning import Plan, make_plan
from lora_lab.app.request import Request
from lora_lab.errors import InputError, Problem
from lora_lab.plan.row import PlanRow
from lora_lab.plan.shown_study import shown_study
from lora_lab.plan.stages import StagePoint
from lora_lab.plan.study_file import find_study, read_study_with_places, value_key
from lora_lab.record.ledger import run_id_of
from lora_lab.record.study_points import StudyPoint
from lora_lab.schema.claims import Scale
from lora_lab.schema.design import Design
from lora_lab.schema.study import Study
from lora_lab.schema.trial import LAB_KEYS, Lab, read_lab

# Housekeeping that says which runs are meant, which a study says itself.
_OF_THE_STUDY = ("study", "repeat")
_CLOCK = {"launch.cohort": "launch.cohort=off"}


@dataclass(frozen=True, slots=True)
class StudyCall:
    """study: as its file says. shown: the same with the design of `scale` as its own, named as its folder is.

    overrides: of housekeeping, as on the command line. lab: what they and `conf/` make of it.
    """

    study: Study
    scale: Scale
    shown: Study
    overrides: tuple[str, ...]
    lab: Lab
    composer: Composer
    places: Mapping[tuple[str, str], str]
    file: Path

    @property
    def design(self) -> Design:
        """What is run."""
        return self.study.design(self.scale)

    @property
    def root(self) -> Path:
        """The lab's folder."""
        return Path(self.lab.root)


@dataclass(frozen=True, slots=True)
class StagePlan:
    """Points and their plan, which may have the untouched bases in front."""

    points: tuple[StagePoint, ...]
    plan: Plan

    @property
    def rows(self) -> tuple[PlanRow, ...]:
        """What is known of each point's run, in their order."""
        return self.plan.rows[len(self.plan.rows) - len(self.points) :]

    @property
    def run_ids(self) -> tuple[str, ...]:
        """The run that each point becomes."""
        return tuple(run_id_of(row.fingerprint, row.repeat) for row in self.rows)

    def study_points(self) -> list[StudyPoint]:
        """As `points.json` keeps them."""
        return [
            StudyPoint(point.stage, point.values, run_id, point.rate)
            for point, run_id in zip(self.points, self.run_ids, strict=True)
        ]


def open_call(name: str, scale: Scale, overrides: Sequence[str]) -> StudyCall:
    """Reads the study and the housekeeping.

    Raises:
        InputError: no such study, or none at that scale; an arm that is no one setting; an override that is none of
            housekeeping.
    """
    file = find_study(name, sweep_folders())
    study, places = read_study_with_places(file)
    check_claims(study, scale)
    check_overrides(overrides)
    loader = config_loader()
    composer = Composer(loader, loader.load_configuration("config", [], RunMode.RUN))
    mapping = composer.compose(overrides).mapping
    lab = read_lab({key: value for key, value in mapping.items() if key in LAB_KEYS})
    return StudyCall(study, scale, shown_study(study, scale), tuple(overrides), lab, composer, places, file)


def check_overrides(texts: Sequence[str]) -> None:
    """Raises InputError for everything that is not an override of housekeeping; all at once."""
    checked = checks.check(texts)
    problems = list(checked.problems)
    for one in checked.overrides:
        problems += checks.sweep_problems(one)
        key = one.key_or_group
        first = top(key.partition("/")[0])
        if first in _OF_THE_STUDY:
            problems.append(Problem(key, "is given by the study: reproduce NAME, and timing.repeats in its file"))
        elif first not in LAB_KEYS:
            allowed = ", ".join(sorted(LAB_KEYS - set(_OF_THE_STUDY)))
            problems.append(Problem(key, f"would change what the study has fixed; only {allowed} may be given here"))
    if problems:
        raise InputError(problems)


def plan_points(
    call: StudyCall,
    points: Sequence[StagePoint],
    *,
    metrics: Iterable[str] = (),
    baseline: bool = False,
    for_the_clock: bool = False,
    needs_weights: bool = True,
) -> StagePlan:
    """Composes, checks and plans points.

    metrics: those that some trial must have. baseline: the untouched base besides. for_the_clock: each run by itself.

    Raises:
        InputError: with everything that is wrong, of all points together.
    """
    names = tuple(dict.fromkeys(metrics))
    places = {**{value_key("metrics", name): str(call.file) for name in names}, **call.places}
    asked = call.shown.model_copy(update={"baseline": baseline, "metrics": names})
    overrides = list(call.overrides)
    if for_the_clock:
        overrides = [text for text in overrides if checks.parse(text).key_or_group not in _CLOCK] + [*_CLOCK.values()]
    composed = []
    for point in points:
        own = [*overrides, f"repeat={point.repeat}"] if point.repeat else overrides
        found = {key: places[known] for key, value in point.trial.items() if (known := value_key(key, value)) in places}
        composed.append(dataclasses.replace(call.composer.attempt(own, under=point.trial), places=found))
    plan = make_plan(Request(tuple(composed), asked, (), places, needs_weights=needs_weights))
    return StagePlan(tuple(points), dataclasses.replace(plan, study=call.shown))
