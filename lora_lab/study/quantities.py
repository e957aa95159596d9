"""Costs and counts that claims are decided by: what runs measured, what was planned, and ratios of both.

A number is taken only where it is one: of several runs of an arm all must agree, else it has chance in it. Times are
those of the timing stage only: made alone, on one machine, in turns with the arm they are divided by.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from lora_lab.plan import stages
from lora_lab.plan.stages import fits, setting_key
from lora_lab.record.cohort_facts import is_alone
from lora_lab.schema.claims import Exact, Form, Ratio
from lora_lab.schema.formula import Term
from lora_lab.study.arms import ArmRun, ArmRuns, Evidence, arm_runs, arm_setting, not_pairing
from lora_lab.study.cost import comparable_runs, is_time
from lora_lab.study.decisions import FEWEST_REPEATS
from lora_lab.study.verdict import ArmScore

_COUNTS = ("trainable_parameters", "total_parameters")


class NotKnownError(Exception):
    """A number is not known. reasons: every one; is_begun: whether any of the runs it needs is there;
    run_ids: of those that there are."""

    def __init__(self, reasons: Sequence[str], *, is_begun: bool = True, run_ids: Sequence[str] = ()) -> None:
        super().__init__("; ".join(reasons))
        self.reasons = tuple(reasons)
        self.is_begun = is_begun
        self.run_ids = tuple(run_ids)


@dataclass(frozen=True, slots=True)
class Costs:
    """Two arms' costs, pair by pair. pairs: (arm, against) by repeat, or by seed. is_exact: the runs of an arm agree,
    so that chance has no part. per: what a pair is. arms: as the verdict shows them. notes: what else to know."""

    pairs: tuple[tuple[float, float], ...]
    is_exact: bool
    per: str
    arms: tuple[ArmScore, ArmScore]
    run_ids: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def log_ratios(self) -> list[float]:
        """Natural logarithms of arm / against."""
        return [math.log(a / b) for a, b in self.pairs]


def ratio_costs(evidence: Evidence, claim: Ratio, form: Form) -> Costs:
    """The costs that a ratio claim is about.

    Raises:
        NotKnownError: with why they are not known. InputError: an arm is not exactly one setting.
    """
    return _times(evidence, claim, form) if is_time(claim.measure) else _sizes(evidence, claim, form)


def _times(evidence: Evidence, claim: Ratio, form: Form) -> Costs:
    if evidence.design.timing is None:
        raise NotKnownError(
            [f"{claim.measure}: times are taken from runs for the clock only, and the study has no timing"]
        )
    sides = [_timing_runs(evidence, name, form) for name in (claim.arm, claim.against)]
    reasons = [f"no run for the clock of {arm} was asked for yet" for arm, runs in sides if not runs]
    runs = [run for _, found in sides for run in found]
    if not any(run.record is not None for run in runs):
        raise NotKnownError(reasons or [f"no run for the clock of {claim.arm} or {claim.against}"], is_begun=False)
    reasons += [why for run in runs if (why := _why_no_time(run, claim.measure)) is not None]
    if reasons:
        raise NotKnownError(reasons)
    by_repeat = [{run.result.repeat: run for run in found} for _, found in sides]
    reasons = [*_not_in_turns(claim, by_repeat), *_other_machines(runs)]
    if (lacking := _too_few(evidence, by_repeat)) is not None:
        reasons.append(lacking)
    if reasons:
        raise NotKnownError(reasons)
    repeats = sorted(by_repeat[0])
    values = [[float(side[repeat].result.measurements[claim.measure]) for repeat in repeats] for side in by_repeat]
    arms = [_shown(arm, found, side) for (arm, found), side in zip(sides, values, strict=True)]
    pairs = tuple(zip(values[0], values[1], strict=True))
    return Costs(pairs, False, "repeat", (arms[0], arms[1]), tuple(run.run_id for run in runs), _loads(runs))


def _timing_runs(evidence: Evidence, name: str, form: Form) -> tuple[str, list[ArmRun]]:
    """The arm's runs for the clock: of its setting in this form, else of the one setting of it that was timed."""
    own = setting_key(arm_setting(evidence.design, name, form))
    timed = [one for one in evidence.points if one.stage == "timing" and fits(one.values, evidence.design.arms[name])]
    keys = {setting_key(one.values) for one in timed}
    chosen = own if own in keys or len(keys) != 1 else keys.pop()
    ids = dict.fromkeys(one.run_id for one in timed if setting_key(one.values) == chosen)
    return name, [ArmRun(name, None, run_id, evidence.records.get(run_id)) for run_id in ids]


def _why_no_time(run: ArmRun, measure: str) -> str | None:
    why = run.why_unusable()
    if why is not None:
        return why
    if not is_alone(run.result):
        return f"{run} was trained together with others (executed: {run.result.facts.get('executed')}), not alone"
    return _why_no_number(run, measure)


def _why_no_number(run: ArmRun, measure: str) -> str | None:
    value = run.result.measurements.get(measure)
    if value is None:
        return f"{run} has no {measure}: {run.result.missing.get(measure, 'not measured')}"
    return None if value > 0 else f"{run}: {measure} is {value}, which has no ratio"


def _not_in_turns(claim: Ratio, by_repeat: Sequence[dict[int, ArmRun]]) -> list[str]:
    """Repeats that do not pair, or arms that were timed one after the other, so that a drift of the machine is taken
    for a difference of the arms."""
    first, second = by_repeat
    if first.keys() != second.keys():
        told = [", ".join(map(str, sorted(side))) for side in by_repeat]
        return [f"the repeats do not pair: {claim.arm} has {told[0]}, {claim.against} has {told[1]}"]
    spans = [
        (
            min(_time(run.result.started_at) for run in side.values()),
            max(_time(run.result.finished_at) for run in side.values()),
        )
        for side in by_repeat
    ]
    (begun, ended), (other_begun, other_ended) = spans
    if len(first) > 1 and (ended < other_begun or other_ended < begun):
        return [f"all runs of one arm were timed before the first of the other: {claim.arm} and {claim.against}"]
    return []


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text)


def _other_machines(runs: Sequence[ArmRun]) -> list[str]:
    machines: dict[str | None, str] = {}
    for run in runs:
        if run.record is not None and run.record.header is not None:
            machines.setdefault(run.record.header.machine_id, str(run))
    return [f"timed on different machines: {' and '.join(machines.values())}"] if len(machines) > 1 else []


def _too_few(evidence: Evidence, by_repeat: Sequence[dict[int, ArmRun]]) -> str | None:
    needed = FEWEST_REPEATS if evidence.design.timing is None else evidence.design.timing.repeats
    count = len(by_repeat[0])
    return f"{count} repeats, {needed} are declared" if count < needed else None


def _loads(runs: Sequence[ArmRun]) -> tuple[str, ...]:
    loads = [run.result.measurements.get("load_average_before") for run in runs]
    known = [load for load in loads if load is not None]
    return (f"load average before the runs: {min(known):.2g} to {max(known):.2g}",) if known else ()


def _sizes(evidence: Evidence, claim: Ratio, form: Form) -> Costs:
    arms = [arm_runs(evidence, name, form) for name in (claim.arm, claim.against)]
    if not any(arm.is_begun for arm in arms):
        raise NotKnownError([reason for arm in arms for reason in arm.reasons], is_begun=False)
    reasons = [*(reason for arm in arms for reason in arm.reasons), *not_pairing(arms)]
    if reasons:
        raise NotKnownError(reasons)
    values = [measured_values(arm, claim.measure) for arm in arms]
    shown = [_shown(arm.name, arm.runs, side) for arm, side in zip(arms, values, strict=True)]
    is_exact = all(len(set(side)) == 1 for side in values)
    length = max(map(len, values))
    first, second = (side * length if len(side) == 1 else side for side in values)
    ids = tuple(run_id for arm in arms for run_id in arm.run_ids)
    return Costs(tuple(zip(first, second, strict=True)), is_exact, "seed", (shown[0], shown[1]), ids, ())


def measured_values(arm: ArmRuns, name: str) -> list[float]:
    """A measurement, or a count of parameters, of every run of an arm; positive.

    Raises:
        NotKnownError: a run lacks it, or it is not the run's own (trained together with others).
    """
    if name in _COUNTS:
        counts = [(run, getattr(run.result, name)) for run in arm.runs]
        if lacking := [f"{run} has no {name}" for run, count in counts if not count]:
            raise NotKnownError(lacking)
        return [float(count) for _, count in counts]
    told = [(run.record, run.result) for run in arm.runs if run.record is not None]
    own = {record.run_id for record, _ in comparable_runs(told, name)[0]}
    reasons = [
        f"{run} was not measured alone, so it has no {name} of its own" for run in arm.runs if run.run_id not in own
    ]
    reasons += [why for run in arm.runs if run.run_id in own and (why := _why_no_number(run, name)) is not None]
    if reasons:
        raise NotKnownError(reasons)
    return [float(run.result.measurements[name]) for run in arm.runs]


def _shown(name: str, runs: Sequence[ArmRun], values: Sequence[float]) -> ArmScore:
    """The geometric mean, whose ratio is the ratio that is judged."""
    mean = values[0] if len(set(values)) == 1 else math.exp(math.fsum(map(math.log, values)) / len(values))
    return ArmScore(name, mean, None, len(values), None, tuple(run.run_id for run in runs), None)


def term_value(evidence: Evidence, claim: Exact, term: Term) -> tuple[float, tuple[str, ...]]:
    """What a term of a formula stands for, and the runs (planned or made) that it comes from.

    Raises:
        NotKnownError: with why it is not known. InputError: its arm is not exactly one setting.
    """
    if term.arm is None:
        return next(one.value for one in claim.published if one.id == term.name), ()
    if term.function == "planned":
        return _planned(evidence, claim, term.name, term.arm)
    design = evidence.design
    form: Form = "tuned" if stages.is_tuned(stages.arm_setting(design, term.arm, where="claims")) else "as_published"
    arm = arm_runs(evidence, term.arm, form)
    if arm.reasons:
        raise NotKnownError(arm.reasons, is_begun=arm.is_begun)
    values = measured_values(arm, term.name)
    if len(set(values)) > 1:
        told = f"from {min(values):.6g} to {max(values):.6g}"
        raise NotKnownError([f"{term}: the runs of {term.arm} do not agree ({told}), so chance has a part in it"])
    return values[0], arm.run_ids


def _planned(evidence: Evidence, claim: Exact, name: str, arm: str) -> tuple[float, tuple[str, ...]]:
    design = evidence.study.design(evidence.study.planned_scale(claim))
    values = stages.arm_setting(design, arm, where="claims")
    ids = [one.run_id for one in evidence.of_setting(values, "planned")]
    facts = next((evidence.planned[run_id] for run_id in ids if run_id in evidence.planned), None)
    if facts is None:
        raise NotKnownError([f"planned({name}, {arm}): nothing was planned for {arm} yet"], is_begun=False)
    known = facts if isinstance(facts, str) else facts.get(name)
    if known is None and not isinstance(facts, str):
        known = f"no such number; there are {', '.join(key for key, one in facts.items() if not isinstance(one, str))}"
    if isinstance(known, str) or known is None:
        raise NotKnownError([f"planned({name}, {arm}) is not known: {known}"])
    return float(known), tuple(ids[:1])
