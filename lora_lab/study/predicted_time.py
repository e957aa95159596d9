"""How long a training will take, by the runs of this machine that did the same work per step.

Runs are alike if they agree in everything that decides the work of a step: base, method with its settings,
quantization, target, rank, kind of optimizer, precision, batch sizes, checkpointing, data. Seeds, rates and schedules,
alpha, the number of steps and the evaluation change no step's work. Of a momentum and of dropout it counts whether
there is any. No model of speed stands behind this: without a like run there is no time, and the reason says what the
nearest runs differ in.
"""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lora_lab.record.cohort_facts import REMEDY, is_alone, is_together
from lora_lab.record.result import Result
from lora_lab.record.run_record import RunRecord
from lora_lab.schema.trial import Trial
from lora_lab.study.settings import ABSENT, is_base, setting_values

# Dotted keys that change no step's work. Names and paths are among them, since files are known by their identities.
_IDLE = re.compile(
    r"(alpha|learning_rate|init_from|init_as)$|(scheduler|evaluation)\."
    r"|model\.(name|path|shape\..*|seed)$|data\.(name|path|heldout_.*|train_seed)$"
    r"|training\.(epochs|max_steps|max_gradient_norm|layer_rates)$"
    r"|optimizer\.(weight_decay|betas|eps|rho|nesterov)$"
)
# Of these it only matters whether they are above 0: a buffer and an operation more.
_SWITCHES = ("dropout", "optimizer.momentum")
# Identities that decide a step's work, by the names under which a reader knows them.
_IDENTITIES = {"base": "model", "data": "data"}
_STEPS, _SECONDS = "steps", "step_seconds"

Work = dict[str, Any]


@dataclass(frozen=True, slots=True)
class PredictedTime:
    """seconds: of all steps together (loading, the memory probe and scoring come on top). step_seconds: the median over
    the runs it rests on, of which there are `runs`."""

    seconds: float
    step_seconds: float
    runs: int


@dataclass(frozen=True)
class Speeds:
    """What the runs of a ledger tell of the speed of one machine, read once for many trials.

    machine: as `record.environment.machine_id` names it.
    """

    records: tuple[RunRecord, ...]
    machine: str

    @cached_property
    def _trained(self) -> list[tuple[Work, RunRecord, Result]]:
        return [
            (work_of(record.trial, record.header.identities), record, record.result)
            for record in self.records
            if record.header is not None
            and record.result is not None
            and not is_base(record.trial)
            and record.header.machine_id == self.machine
        ]

    def predicted_time(
        self, trial: Trial, identities: Mapping[str, str], steps: int | None
    ) -> tuple[PredictedTime | None, str]:
        """The time of `steps` optimizer steps, and on what it rests; or None, and why nobody knows."""
        values = trial.model_dump(mode="json")
        if is_base(values):
            return None, "an untouched base takes no step"
        if steps is None:
            return None, "the number of steps is not known"
        if not self._trained:
            return None, self._why_no_run()
        work = work_of(values, identities)
        like = [result for other, _, result in self._trained if other == work]
        if not like:
            return None, f"no run like it in this machine's ledger; {_nearest(work, [w for w, _, _ in self._trained])}"
        speeds = [speed for result in like if (speed := _step_seconds(result)) is not None]
        if not speeds:
            return None, _why_untimed(like)
        step = statistics.median(speeds)
        return PredictedTime(step * steps, step, len(speeds)), _rests_on(len(speeds))

    def _why_no_run(self) -> str:
        ended = [record for record in self.records if record.header is not None and record.result is not None]
        trained = sum(not is_base(record.trial) for record in ended)
        if not trained:
            return "no run in this machine's ledger has trained anything"
        return f"no run of this machine in the ledger ({_runs(trained)} of other machines)"


def predicted_time(
    records: Iterable[RunRecord], trial: Trial, identities: Mapping[str, str], steps: int | None, *, machine: str
) -> tuple[PredictedTime | None, str]:
    """The time of one trial's training; `Speeds` reads the records once for many.

    Args:
        identities: as in `plan.job.Job`.
        steps: optimizer steps, None where they are not known.
        machine: `machine_id` of the environment that would be recorded.
    """
    return Speeds(tuple(records), machine).predicted_time(trial, identities, steps)


def work_of(trial: Mapping[str, Any], identities: Mapping[str, str]) -> Work:
    """What decides the work of a step, by dotted key, of a trial as the ledger keeps it."""
    work = {key: value for key, value in setting_values(trial).items() if not _IDLE.match(key)}
    if trial["model"]["kind"] == "random":  # its identity says nothing of its shape
        work |= {f"model.shape.{key}": value for key, value in trial["model"]["shape"].items()}
    for key in _SWITCHES:
        if key in work:
            work[key] = work[key] > 0
    return work | {title: identities.get(role) for role, title in _IDENTITIES.items()}


def _step_seconds(result: Result) -> float | None:
    """Mean seconds of a step of a run made alone; None where they are not its own, or were not measured."""
    steps, seconds = result.measurements.get(_STEPS, 0), result.measurements.get(_SECONDS)
    return seconds / steps if is_alone(result) and seconds is not None and steps else None


def _why_untimed(like: Sequence[Result]) -> str:
    together = sum(is_together(result) for result in like)
    if together == len(like):
        return f"{_runs(len(like))} like it, trained in cohorts; {REMEDY} measures one alone"
    reasons = [result.missing[_SECONDS] for result in like if _SECONDS in result.missing]
    return f"{_runs(len(like))} like it, without a measured step" + (f" ({reasons[0]})" if reasons else "")


def _nearest(work: Work, others: Sequence[Work]) -> str:
    """What the runs that differ in the fewest keys differ in, those keys first in which most of them do."""
    differing = [_difference(work, other) for other in others]
    fewest = min(map(len, differing))
    counts = Counter(keys for keys in differing if len(keys) == fewest)
    keys, count = counts.most_common(1)[0]
    return f"{_runs(count)} {'differs' if count == 1 else 'differ'} in: {', '.join(keys)}"


def _difference(work: Work, other: Work) -> tuple[str, ...]:
    """Keys that differ, a target's as one. Of a section whose kind or identity differs only its name is told, and of
    two methods no axis that only one of them has: those follow."""
    keys = [key for key in dict.fromkeys([*work, *other]) if work.get(key, ABSENT) != other.get(key, ABSENT)]
    heads = {key.removesuffix(".kind") for key in keys if key.endswith(".kind") or key in _IDENTITIES.values()}
    told = [key if key.partition(".")[0] not in {*heads, "target"} else key.partition(".")[0] for key in keys]
    if "method" in heads:
        told = [key for key in told if key in heads or not _is_axis_of_one(key, work, other)]
    return tuple(dict.fromkeys(told))


def _is_axis_of_one(told: str, work: Work, other: Work) -> bool:
    has = [any(key == told or key.startswith(f"{told}.") for key in one) for one in (work, other)]
    return has.count(True) == 1


def _rests_on(runs: int) -> str:
    return f"median of {runs} runs like it" if runs > 1 else "by 1 run like it"


def _runs(count: int) -> str:
    return f"{count} run{'' if count == 1 else 's'}"
