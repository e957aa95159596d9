"""All stages of a study in their order: tuning, then what is judged, then the clock; and what is written before."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_lab.app.before_loading import check_before_loading
from lora_lab.app.claim_checks import metrics_of
from lora_lab.app.picked_rates import picks_of, told
from lora_lab.app.planned_stage import planned_stage
from lora_lab.app.planning import cache_folder
from lora_lab.app.study_call import StagePlan, StudyCall, plan_points
from lora_lab.plan.stages import (
    SEED,
    Pick,
    Rates,
    StagePoint,
    is_tuned,
    judged_points,
    rates_of,
    setting_key,
    timing_points,
    tuning_points,
)
from lora_lab.record.ledger import Ledger, run_id_of
from lora_lab.record.planned_facts import write_planned
from lora_lab.record.registration import register
from lora_lab.record.study_folder import begin_study, read_study, study_folder, write_table
from lora_lab.record.study_points import StudyPoint, read_points, write_points
from lora_lab.record.verdicts import begin_look
from lora_lab.record.wandb_tracker import WandbTracker
from lora_lab.study.table import settings_table


@dataclass(frozen=True, slots=True)
class Stages:
    """A study's stages as far as they are known. None: the study has no such stage, or it waits for the stage before.

    picks: of tuning; those without a rate wait for runs. waiting: judged points whose rate is not picked yet.
    """

    tuning: StagePlan | None
    picks: tuple[Pick, ...]
    judged: StagePlan | None
    waiting: tuple[StagePoint, ...]
    timing: StagePlan | None

    @property
    def plans(self) -> list[StagePlan]:
        """Those that are known, in the order in which they run."""
        return [one for one in (self.tuning, self.judged, self.timing) if one is not None]


def plan_stages(call: StudyCall, *, seeds: Sequence[int] = ()) -> Stages:
    """Plans every stage as far as the ledger's tuning runs allow; what waits for a rate is checked with one in place.

    seeds: of a later look. Nothing is written.

    Raises:
        InputError: with what is wrong with the first stage that has problems.
    """
    design, tuning = call.design, None
    picks: tuple[Pick, ...] = ()
    if points := tuning_points(design):
        assert design.tuning is not None
        tuning = plan_points(call, points, metrics=[design.tuning.metric])
        picks = picks_of(design, tuning, call.root)
    rates = {setting_key(pick.values): pick.rate for pick in picks if pick.rate is not None}
    every = judged_points(design, {**_stand_ins(call), **rates}, seeds=seeds)
    waiting = tuple(one for one in every if is_tuned(one.values) and setting_key(one.values) not in rates)
    metrics = metrics_of(call.study, call.scale)
    if waiting:  # what is wrong with them is told before tuning has run for an hour
        plan_points(call, every, metrics=metrics, baseline=design.baseline)
    known = [one for one in every if one not in waiting]
    judged = None
    if known:
        judged = plan_points(call, known, metrics=() if waiting else metrics, baseline=design.baseline)
    return Stages(tuning, picks, judged, waiting, _timing(call, rates, judged))


def _stand_ins(call: StudyCall) -> Rates:
    tuning = call.design.tuning
    if tuning is None:
        return {}
    return {setting_key(one.values): rates_of(tuning, one.values)[0] for one in tuning_points(call.design)}


def _timing(call: StudyCall, rates: Rates, judged: StagePlan | None) -> StagePlan | None:
    """The runs for the clock are this study's own: repeats that neither its judged runs nor another study has, since
    runs that were made on another day are not interleaved with these."""
    points = timing_points(call.design, rates)
    if not points:
        return None
    planned = plan_points(call, points, for_the_clock=True)
    kept = [point.run_id for point in read_points(folder_of(call)) if point.stage == "timing"]
    if kept:
        first = min(map(_repeat, kept))
    else:
        taken = {record.run_id for record in Ledger(call.root).runs()} | set(judged.run_ids if judged else ())
        prints = {row.fingerprint for row in planned.rows}
        repeats = {point.repeat for point in points}
        first = 0
        while any(run_id_of(one, first + repeat) in taken for one in prints for repeat in repeats):
            first += 1
    if first == 0:
        return planned
    return plan_points(call, timing_points(call.design, rates, first_repeat=first), for_the_clock=True)


def _repeat(run_id: str) -> int:
    _, _, repeat = run_id.partition(".r")
    return int(repeat or 0)


def folder_of(call: StudyCall) -> Path:
    """The study's folder at this scale."""
    return study_folder(call.root, call.shown.name)


def run_stages(call: StudyCall, *, seeds: Sequence[int] = ()) -> tuple[Stages, bool]:
    """Runs what is missing of every stage; returns the stages as they are then, and whether every run has an answer.

    The study is registered once nothing is found wrong with it, before its first run.

    Raises:
        InputError: as `plan_stages`; the study has changed since it was registered. MachineError: as
            `check_before_loading`.
    """
    from lora_lab.app.stage_runs import run_stage

    stages = plan_stages(call, seeds=seeds)
    planned, facts = planned_stage(call)
    for one in stages.plans:
        check_before_loading(one.plan)
    folder = folder_of(call)
    registration = register(folder, call.study, call.scale)
    begin_look(folder, registration.digest, call.scale, seeds)
    write_planned(folder, facts)
    write_stages(call, stages, planned)
    with WandbTracker(call.lab.tracking, call.root, cache=cache_folder(call.lab), study=call.shown.name) as tracker:
        is_whole = True
        if stages.tuning is not None:
            _say("tuning", stages.tuning)
            is_whole = run_stage(stages.tuning, tracker, study=None, one_by_one=False)
            stages = plan_stages(call, seeds=seeds)
            write_stages(call, stages, planned)
            for line in told(stages.picks, base=call.design.base):
                print(f"picked: {line}", file=sys.stderr)
        if stages.judged is not None:
            _say("judged", stages.judged)
            is_whole &= run_stage(stages.judged, tracker, study=call.shown, one_by_one=False)
        if stages.timing is not None:
            _say("timing", stages.timing)
            is_whole &= run_stage(stages.timing, tracker, study=None, one_by_one=True)
        table = _table(call)
        write_table(folder, table)
        tracker.study_finished(call.shown.name, table)
    return stages, is_whole and not stages.waiting


def _table(call: StudyCall) -> dict[str, Any]:
    records = read_study(call.root, call.shown.name).records(Ledger(call.root))
    return settings_table(records, metrics=call.shown.metrics or None).to_json()


def _say(name: str, stage: StagePlan) -> None:
    done = sum(row.state == "done" for row in stage.plan.rows)
    print(f"{name}: {len(stage.plan.jobs)} runs, {done} done", file=sys.stderr)


def write_stages(call: StudyCall, stages: Stages, planned: Sequence[StudyPoint]) -> None:
    """Puts down what is asked for: the study, its judged runs, and which run is which point."""
    folder = folder_of(call)
    points = merged([point for one in stages.plans for point in one.study_points()], read_points(folder))
    points += planned
    asked = [] if stages.judged is None else [run_id_of(job.fingerprint, job.repeat) for job in stages.judged.plan.jobs]
    asked += [point.run_id for point in points if point.stage == "judged"]
    begin_study(call.root, call.shown, list(dict.fromkeys(asked)))
    write_points(folder, points)


def merged(new: Sequence[StudyPoint], kept: Sequence[StudyPoint]) -> list[StudyPoint]:
    """The new points, and of those that were kept before the judged ones of other looks."""
    seeds = {point.values.get(SEED) for point in new if point.stage == "judged"}
    return [*new, *(one for one in kept if one.stage == "judged" and one.values.get(SEED) not in seeds)]
