"""Whether the rates that were judged are those that tuning picks, from the tuning runs as they are in the ledger."""

from __future__ import annotations

from lora_lab.plan.stages import SEED, SettingKey, is_tuned, pick_rates, setting_key
from lora_lab.record.result import Status
from lora_lab.record.study_points import StudyPoint
from lora_lab.schema.design import Tuning
from lora_lab.study.arms import ArmRun, ArmRuns, Evidence

# What a rate at the edge of its grid asks for.
EXTEND = "extend the grid"


def tuning_reasons(evidence: Evidence, arm: ArmRuns) -> list[str]:
    """Why the picked rate of an arm decides nothing: a tuning run is gone, it picks another rate, or one at the edge.

    A rate one of whose runs diverged is not picked, and is no reason.
    """
    tuning = evidence.design.tuning
    if tuning is None or not is_tuned(arm.values):
        return []
    points = evidence.of_setting(arm.values, "tuning")
    asked = {(point.rate, point.values.get(SEED)): point for point in points}
    reasons: list[str] = []
    scores: dict[tuple[SettingKey, float], list[float | None]] = {}
    directions: set[bool] = set()
    for (rate, seed), point in asked.items():
        run = ArmRun(f"tuning {arm.name} at {rate}", None if seed is None else int(seed), point.run_id, None)
        score = _score(evidence, tuning, point, run, directions)
        if isinstance(score, str):
            reasons.append(score)
        elif rate is not None:
            scores.setdefault((setting_key(arm.values), rate), []).append(score)
    if not points:
        return [f"{arm.name}: no tuning run is listed, so its rate cannot be picked again"]
    return reasons or _outcome(evidence, arm, scores, higher_is_better=directions == {True})


def _score(
    evidence: Evidence, tuning: Tuning, point: StudyPoint, run: ArmRun, directions: set[bool]
) -> float | str | None:
    """A tuning run's score, None where it diverged, or why it is not known."""
    record = evidence.records.get(point.run_id)
    if record is not None and record.state == Status.DIVERGED:
        return None
    run = ArmRun(run.arm, run.seed, run.run_id, record)
    why = run.why_unusable()
    if why is not None:
        return why
    metric = run.result.metrics.get(tuning.metric)
    if metric is None:
        return f"{run} has no {tuning.metric}: {run.result.missing.get(tuning.metric, 'not scored')}"
    directions.add(metric.higher_is_better)
    return metric.value


def _outcome(
    evidence: Evidence,
    arm: ArmRuns,
    scores: dict[tuple[SettingKey, float], list[float | None]],
    *,
    higher_is_better: bool,
) -> list[str]:
    picks = pick_rates(evidence.design, scores, higher_is_better=higher_is_better)
    pick = next(one for one in picks if setting_key(one.values) == setting_key(arm.values))
    if pick.rate is None:
        return [f"{arm.name}: no rate was scored with every tuning seed"]
    if pick.rate != arm.rate:
        return [f"{arm.name}: the tuning runs pick the rate {pick.rate}, judged was {arm.rate}"]
    if pick.edge is not None:
        word = "smallest" if pick.edge == "lowest" else "largest"
        return [f"{arm.name}: picked rate {pick.rate} is the {word} tried; {EXTEND}"]
    return []
