"""The arms of a claim: which setting each one picks, which runs it has, and why some of them cannot be used.

An arm is one setting of the design's grids, in each form (at a fixed rate, or at the rate that tuning picked). Every
seed of the look needs its run; a run that is gone, failed or diverged is a reason not to decide.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lora_lab.errors import InputError, Problem, nearest
from lora_lab.plan.shown_study import reproduce_command
from lora_lab.plan.stages import SEED, Stage, fits, is_tuned, setting_key, settings_of, told_values
from lora_lab.record.result import Result, Status
from lora_lab.record.run_record import RunRecord
from lora_lab.record.study_points import StudyPoint
from lora_lab.schema.claims import Form, Scale
from lora_lab.schema.design import RATE, Design
from lora_lab.schema.study import Study
from lora_lab.study.settings import is_base

Values = Mapping[str, Any]
# By run id: each known number by its name, or as a text why it has none; or one text why none is known.
Planned = Mapping[str, Mapping[str, float | int | str] | str]


@dataclass(frozen=True)
class Evidence:
    """Everything that claims are judged by. records: by run id. seeds: of the look; none where the design has none."""

    study: Study
    scale: Scale
    points: tuple[StudyPoint, ...]
    planned: Planned
    records: Mapping[str, RunRecord]
    seeds: tuple[int, ...]
    registered_at: str | None

    @cached_property
    def design(self) -> Design:
        """The design of the scale."""
        return self.study.design(self.scale)

    @property
    def command(self) -> str:
        """How what is missing is run."""
        return reproduce_command(self.study.name, self.scale)

    def of_setting(self, values: Values, stage: Stage) -> list[StudyPoint]:
        """A setting's points of a stage, judged ones of the look's seeds only."""
        key = setting_key(values)
        found = [one for one in self.points if one.stage == stage and setting_key(one.values) == key]
        if stage != "judged" or not self.seeds:
            return found
        return [one for one in found if one.values.get(SEED, self.seeds[0]) in self.seeds]


@dataclass(frozen=True, slots=True)
class ArmRun:
    """One run of an arm. seed: of the point; None where the study draws none."""

    arm: str
    seed: int | None
    run_id: str
    record: RunRecord | None

    def __str__(self) -> str:
        seed = "" if self.seed is None else f", seed {self.seed}"
        return f"run {self.run_id} ({self.arm}{seed})"

    @property
    def result(self) -> Result:
        """Its result; for runs that have completed."""
        assert self.record is not None and self.record.result is not None
        return self.record.result

    def why_unusable(self) -> str | None:
        """Why nothing is judged by it, or None."""
        record = self.record
        if record is None:
            return f"{self} is not in the ledger: never run, or deleted"
        if record.state == Status.COMPLETED and record.result is not None:
            told = record.trial.get("seed")
            if self.seed is not None and not is_base(record.trial) and told != self.seed:
                return f"{self} was made with seed {told}"
            return None
        if record.state == "RUNNING":
            return f"{self} has not ended"
        words = {Status.DIVERGED: "diverged", Status.OUT_OF_MEMORY: "ran out of memory", "DAMAGED": "is damaged"}
        why = record.problem or (record.result.reason if record.result is not None else None)
        told = f": {why.splitlines()[0]}" if why else ""
        return f"{self} {words.get(record.state, f'ended as {record.state}')}{told}"


@dataclass(frozen=True, slots=True)
class ArmRuns:
    """An arm's setting and its judged runs in the order of their seeds; of an untouched base one run.

    rate: that tuning picked; None where the file gives it. reasons: why it cannot be judged by all of them.
    """

    name: str
    values: Values
    rate: float | None
    runs: tuple[ArmRun, ...]
    reasons: tuple[str, ...]

    @property
    def is_begun(self) -> bool:
        """Whether the ledger has any of its runs."""
        return any(run.record is not None for run in self.runs)

    @property
    def is_base(self) -> bool:
        """Whether nothing is trained in it, so that seeds have no part in its scores."""
        records = [run.record for run in self.runs if run.record is not None]
        return bool(records) and all(record.header is not None and is_base(record.trial) for record in records)

    @property
    def seeds(self) -> tuple[int | None, ...]:
        """Of its runs."""
        return tuple(run.seed for run in self.runs)

    @property
    def run_ids(self) -> tuple[str, ...]:
        """Of its runs."""
        return tuple(run.run_id for run in self.runs)


def arm_setting(design: Design, name: str, form: Form) -> Values:
    """The one setting that an arm picks in a form. A setting that trains nothing serves in the tuned form as well.

    Raises:
        InputError: no such arm, or it picks no setting or several: which ones, or which is nearest.
    """
    if name not in design.arms:
        raise InputError(Problem("arms", f'no arm "{name}"' + nearest(name, list(design.arms))))
    wanted = design.arms[name]
    settings = settings_of(design)
    fitting = [one for one in settings if fits(one, wanted)]
    found = [one for one in fitting if is_tuned(one) == (form == "tuned")]
    if not found and form == "tuned":
        found = [one for one in fitting if one.get("method") == "base"]
    if len(found) == 1:
        return found[0]
    where, asked = f"arms.{name}", told_values(wanted) or "an arm without values"
    if found:
        keys = [key for key in found[0] if len({repr(one.get(key)) for one in found}) > 1]
        told = "; ".join(told_values({key: one.get(key) for key in keys}) for one in found)
        raise InputError(Problem(where, f"{asked} picks {len(found)} settings ({told}); an arm is one"))
    if fitting:
        rate = f"{RATE}: tuned" if form == "tuned" else f"a fixed {RATE}"
        raise InputError(Problem(where, f"the form {form} needs a setting with {rate}; {asked} has none"))
    closest = max(settings, key=lambda one: sum(fits(one, {key: value}) for key, value in wanted.items()))
    told = told_values({key: closest.get(key, "(absent)") for key in wanted})
    raise InputError(Problem(where, f"no setting of the grids has {asked}; the nearest has {told}"))


def arm_runs(evidence: Evidence, name: str, form: Form) -> ArmRuns:
    """The judged runs of an arm.

    Raises:
        InputError: as `arm_setting`.
    """
    values = arm_setting(evidence.design, name, form)
    points = evidence.of_setting(values, "judged")
    found = [ArmRun(name, one.values.get(SEED), one.run_id, evidence.records.get(one.run_id)) for one in points]
    unique = {(run.run_id, run.seed): run for run in found}
    runs = sorted(unique.values(), key=lambda run: -1 if run.seed is None else run.seed)
    rates = {one.rate for one in points}
    rate = points[0].rate if points and len(rates) == 1 else None
    if len({run.run_id for run in runs}) == 1 and values.get("method") == "base":
        runs = [ArmRun(name, None, runs[0].run_id, runs[0].record)]  # every seed is the same run
    reasons = _lacking(evidence, name, values, [run.seed for run in runs])
    if len(rates) > 1:
        reasons.append(f"{name} was run at several picked rates: {', '.join(map(str, rates))}")
    reasons += [why for run in runs if (why := run.why_unusable()) is not None]
    return ArmRuns(name, values, rate, tuple(runs), tuple(reasons))


def _lacking(evidence: Evidence, name: str, values: Values, seeds: Sequence[int | None]) -> list[str]:
    if not seeds and is_tuned(values):
        return [f"tuning has picked no rate for {name} yet"]
    if not seeds:
        return [f"no run of {name} was asked for yet"]
    absent = [seed for seed in evidence.seeds if seed not in seeds] if None not in seeds else []
    return [f"{name} has no run with seed {seed}" for seed in absent]


def not_pairing(arms: Sequence[ArmRuns]) -> list[str]:
    """Why the arms' runs cannot be compared seed by seed, or by one arithmetic."""
    trained = [arm for arm in arms if not arm.is_base and arm.runs]
    reasons = []
    for arm in trained[1:]:
        if set(arm.seeds) != set(trained[0].seeds):
            told = [f"{one.name} has {', '.join(map(str, one.seeds))}" for one in (trained[0], arm)]
            reasons.append(f"the seeds do not pair: {', '.join(told)}")
    versions: dict[int, str] = {}
    for run in (run for arm in arms for run in arm.runs if run.record is not None and run.record.result is not None):
        versions.setdefault(run.result.numerics_version, str(run))
    if len(versions) > 1:
        told = [f"{run} by {version}" for version, run in sorted(versions.items())]
        reasons.append(f"runs were made by different numerics versions: {', '.join(told)}")
    return reasons


def completed(arm: ArmRuns) -> list[ArmRun]:
    """Those of its runs that can be used."""
    return [run for run in arm.runs if run.why_unusable() is None]
