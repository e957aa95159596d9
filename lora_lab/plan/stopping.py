"""When a run of a search is ended early: points at which runs are compared, and the two rules that compare them.

A run is compared at a point with the runs of *other* settings that have come as far: its own setting's other seeds are
no competitors, so several seeds of one setting alone are no search, and which seed was lucky ends nothing. Of several
runs of one trial (`repeat`) one counts. Runs of other lengths are compared at the same point, which is the same share
of each run's own steps: there their learning rates stand at the same place of their schedules.

The rules are asynchronous: they judge by what is known when a run comes to a point, so a run that comes early is seldom
ended. They say nothing that depends on the order of the other runs, and a tie ends nobody.

What is known of other runs, by how they are at the time:
- A loss that is not finite counts as infinity.
- A run that diverged counts as the worst wherever it counts, also where it had looked well before.
- A run that was stopped counts with what it had until then. One that failed or was interrupted counts as one that has
  not come further yet.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lora_lab.errors import Problem
from lora_lab.schema.fingerprint import canonical
from lora_lab.schema.stopping import Stopping
from lora_lab.schema.trial import Trial

# Losses by point; None where a run has not been evaluated there.
_AtPoints = Sequence[float | None]
_End = Literal["stopped", "diverged"] | None
_Rivals = Sequence[tuple[_AtPoints, _End]]
_ABSENT = object()


@dataclass(frozen=True, slots=True)
class History:
    """How a run of a search has done so far.

    total_steps: of the whole run, None where it is not known yet. losses: held-out loss (nats/token, NaN and infinities
    allowed) by the step after which it was measured. end: whether it was stopped early or diverged; None for any other
    run, ended or not.
    """

    fingerprint: str
    setting: str
    total_steps: int | None
    losses: Mapping[int, float]
    end: _End


@dataclass(frozen=True, slots=True)
class Stop:
    """The decision to end a run at a point (1 is the first) after `step` steps, where its held-out loss was `loss`.
    `reason`: one sentence with the numbers that decided."""

    point: int
    step: int
    loss: float
    reason: str

    def facts(self, stopping: Stopping) -> dict[str, Any]:
        """What a result keeps under `facts["stopping"]`: the rule with its settings, and the decision. A loss that is
        not finite is null, as JSON has none."""
        value = self.loss if math.isfinite(self.loss) else None
        return {**stopping.settings(), "point": self.point, "step": self.step, "value": value, "reason": self.reason}


def evaluation_points(stopping: Stopping, total_steps: int) -> tuple[int, ...]:
    """The steps after which a run of `total_steps` is evaluated and judged, ascending; never the last step.

    median: the ends of the first `points` of `points + 1` equal parts, rounded up. halving: total / reduction^k for
    k = points, ..., 1, rounded up, the rungs of successive halving. A run too short for all points to fall on different
    steps has none, and is never stopped (`stopping_problems` says so before anything is run).
    """
    if stopping.rule == "median":
        parts = stopping.median.points + 1
        return tuple(-(-total_steps * part // parts) for part in range(1, parts)) if total_steps >= parts else ()
    if stopping.rule == "halving":
        reduction, points = stopping.halving.reduction, stopping.halving.points
        if total_steps < _fewest_steps(stopping):
            return ()
        return tuple(-(-total_steps // reduction**power) for power in range(points, 0, -1))
    return ()


def _fewest_steps(stopping: Stopping) -> int:
    """Of a run with all points."""
    if stopping.rule == "halving":
        return int(stopping.halving.reduction**stopping.halving.points)
    return stopping.median.points + 1


def decide(stopping: Stopping, step: int, own: History, others: Iterable[History]) -> Stop | None:
    """Whether the rule ends a run after `step` steps, one of its evaluation points; None lets it go on.

    own: the run's history, the loss at this step included; what it holds of later steps (of an attempt that had come
    further) is left out. others: the runs of the same search, those whose losses may be compared (`comparable_key`);
    runs of the same setting among them are passed over. Members of a cohort that come to a point together should all
    be evaluated before the first of them is judged: then halving is the synchronous one, exact to the run.

    Raises:
        ValueError: `step` is no evaluation point of the run, or it has no loss there.
    """
    steps = () if own.total_steps is None else evaluation_points(stopping, own.total_steps)
    if stopping.rule == "off":
        return None
    if step not in steps or step not in own.losses:
        raise ValueError(f"nothing to judge after step {step}: points {steps}, losses at {sorted(own.losses)}")
    index = steps.index(step)
    rivals = _one_of_each_trial(other for other in others if other.setting != own.setting)
    losses = _at_points(stopping, own)[: index + 1]
    rule = _median if stopping.rule == "median" else _halving
    why = rule(stopping, losses, [(_at_points(stopping, rival), rival.end) for rival in rivals])
    if why is None:
        return None
    where = f"step {step} of {own.total_steps} (point {index + 1} of {len(steps)})"
    return Stop(index + 1, step, own.losses[step], f"{why}, at {where}")


def _one_of_each_trial(histories: Iterable[History]) -> list[History]:
    """Of several runs of a trial, whose losses are the same, the one of which most is known."""

    def known(history: History) -> tuple[bool, int, bool]:
        return history.end == "diverged", len(history.losses), history.end == "stopped"

    return list({history.fingerprint: history for history in sorted(histories, key=known)}.values())


def _at_points(stopping: Stopping, history: History) -> _AtPoints:
    """Losses at the points of the rule; those that were measured at other steps, under another rule, are left out."""
    if history.total_steps is None:
        return ()
    found = [history.losses.get(step) for step in evaluation_points(stopping, history.total_steps)]
    return [math.inf if loss is not None and not math.isfinite(loss) else loss for loss in found]


def _median(stopping: Stopping, losses: _AtPoints, rivals: _Rivals) -> str | None:
    """The median stopping rule (Golovin et al. 2017, Google Vizier, section 3.2.1).

    A run is ended where its best loss so far is strictly worse than the median of the others' running averages up to
    the same point. As losses fall, averages lie above the present losses, which makes the rule a mild one.

    Differs from the source: not completed runs alone count, but all that have come as far, since in a cohort none is
    completed before the others; and, with their average until then, those that were stopped, or else the runs that are
    left would be measured by the best half of the best half. A diverged run's average is infinite.
    """
    rule = stopping.median
    place = len(losses) - 1
    averages = [average for one, end in rivals if (average := _running_average(one, place, end)) is not None]
    if place < rule.warmup_points or len(averages) < rule.minimum_runs:
        return None
    best = min(loss for loss in losses if loss is not None)
    median = statistics.median(averages)
    if best <= median:
        return None
    return (
        f"best held-out loss so far {_told(best)} is above {_told(median)}, the median of the running averages of "
        f"{len(averages)} runs of other settings"
    )


def _running_average(losses: _AtPoints, place: int, end: _End) -> float | None:
    """Up to a point; None for a run that has not come as far. The mean is rounded once, so it is never below the
    smallest of its losses."""
    if end == "diverged":
        return math.inf
    known = [loss for loss in losses[: place + 1] if loss is not None]
    has_come_as_far = place < len(losses) and losses[place] is not None
    return statistics.mean(known) if known and (has_come_as_far or end == "stopped") else None


def _halving(stopping: Stopping, losses: _AtPoints, rivals: _Rivals) -> str | None:
    """Asynchronous successive halving (Li et al. 2020, ASHA, arXiv 1810.05934, algorithm 2), the kind that stops.

    Of the n runs that have come to a point, this one and those of other settings, the best floor(n / reduction) go on;
    while there are fewer than `reduction`, all do. The points are `reduction` times as far apart as the runs are fewer:
    where reduction^points runs of R steps come to every point together, they take R steps to the first point and
    (1 - 1 / reduction) R to each next one and to the end, R + points (1 - 1 / reduction) R in all instead of
    reduction^points R.

    Differs from the source: there a run waits at a rung until it is promoted; here one that is not among the best is
    ended at once, and one that came early has gone on. Ties at the border all go on. A run that diverged between two
    points counts at the one it did not reach, as one that is not promoted there.
    """
    rule = stopping.halving
    place, loss = len(losses) - 1, losses[-1]
    rung = [other for one, end in rivals if (other := _rung_loss(one, place, end)) is not None]
    reached = len(rung) + 1
    if loss is None or reached < rule.reduction:
        return None
    kept = reached // rule.reduction
    better = sum(other < loss for other in rung)
    if better < kept:
        return None
    return (
        f"held-out loss {_told(loss)} is not among the best {kept} of {reached} runs: {better} of other settings are "
        "better"
    )


def _rung_loss(losses: _AtPoints, place: int, end: _End) -> float | None:
    """At a point; None for a run that has not come to it."""
    if end == "diverged":
        passed = sum(loss is not None for loss in losses)
        return math.inf if place <= passed else None
    return losses[place] if place < len(losses) else None


def _told(loss: float) -> str:
    return f"{loss:.6g}" if math.isfinite(loss) else "without a finite value"


def comparable_key(trial: Trial, identities: Mapping[str, str]) -> str:
    """Equal for trials whose held-out losses may be compared: one base model, and the same held-out rows as the same
    tokens with the same loss mask.

    The base is the one that was declared; quantization, precision and a start from another run are settings of a
    search. The data's own settings count but for those of the training rows; a file of held-out rows is known by its
    hash, and then the training file is a setting too.
    """
    content = canonical(trial, identities)["trial"]
    data = {key: value for key, value in content["data"].items() if not key.startswith("train_")}
    rows = {role: identities.get(role) for role in ("heldout" if "heldout" in identities else "data",)}
    return json.dumps([content["model"], identities.get("base"), data, rows], sort_keys=True)


def stopping_problems(stopping: Stopping, trial: Trial, steps: int | None) -> list[Problem]:
    """What keeps a rule from working on a trial of so many steps (None: not known); method=base is never judged."""
    if stopping.rule == "off" or trial.method.kind == "base":
        return []
    problems = []
    if not trial.evaluation.heldout:
        rule = f"launch.stopping.rule={stopping.rule} compares runs by their held-out loss; expected true, got false"
        problems.append(Problem("evaluation.heldout", rule))
    if steps is not None and steps < _fewest_steps(stopping):
        points = stopping.settings()["points"]
        fitting = _most_points(stopping, steps)
        rest = f"at most {fitting} of them fit" if fitting else "no point fits; launch.stopping.rule=off"
        message = f"{points} points need runs of at least {_fewest_steps(stopping)} steps, and one has {steps}; {rest}"
        problems.append(Problem(f"launch.stopping.{stopping.rule}.points", message))
    return problems


def _most_points(stopping: Stopping, steps: int) -> int:
    if stopping.rule == "median":
        return steps - 1
    most = 0
    while stopping.halving.reduction ** (most + 1) <= steps:
        most += 1
    return most


def was_stopped_by(stopping: Stopping, facts: Mapping[str, Any]) -> bool:
    """Whether a result's facts say that this very rule, settings included, has stopped the run."""
    known = facts.get("stopping")
    return isinstance(known, Mapping) and all(
        known.get(key, _ABSENT) == value for key, value in stopping.settings().items()
    )
