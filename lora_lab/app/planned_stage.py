"""Facts for `planned()` in formulas: the arms that claims ask about, counted and predicted, nothing run.

They belong to the published design where the study has one and the claim is made at its scale: then nothing of what the
source ran needs to be here. torch comes in with the first prediction, and only where a formula asks for bytes.
"""

from __future__ import annotations

import dataclasses

from lora_lab.app.memory_device import named_device
from lora_lab.app.memory_predicted import Predictor
from lora_lab.app.planning import Plan, cache_folder
from lora_lab.app.study_call import StudyCall, plan_points
from lora_lab.plan.job import Job
from lora_lab.plan.prediction import DeviceKind
from lora_lab.plan.row import PlanRow
from lora_lab.plan.shown_study import shown_study
from lora_lab.plan.stages import planned_points
from lora_lab.record.planned_facts import PlannedFacts, predicted_values
from lora_lab.record.study_points import StudyPoint
from lora_lab.schema.claims import Exact, Scale
from lora_lab.schema.study import Study
from lora_lab.schema.trial import Lab
from lora_lab.study.judge import claims_judged

_PREDICTED = "predicted_"
_COUNTED = ("trainable_parameters", "adapter_parameters", "router_parameters", "total_parameters", "steps")


def planned_arms(study: Study, scale: Scale) -> dict[Scale, dict[str, set[str]]]:
    """The quantities that formulas ask for: by the scale of the design that they belong to, and by arm."""
    asked: dict[Scale, dict[str, set[str]]] = {}
    for claim in claims_judged(study, scale):
        if isinstance(claim, Exact):
            arms = asked.setdefault(study.planned_scale(claim), {})
            for term in claim.formula.terms:
                if term.function == "planned" and term.arm is not None:
                    arms.setdefault(term.arm, set()).add(term.name)
    return {one: arms for one, arms in asked.items() if arms}


def planned_stage(call: StudyCall) -> tuple[list[StudyPoint], dict[str, PlannedFacts]]:
    """Points of the stage `planned`, and by run id what is known of them.

    Raises:
        InputError: an arm that is not exactly one setting; points that cannot be composed.
    """
    points: list[StudyPoint] = []
    facts: dict[str, PlannedFacts] = {}
    for scale, arms in planned_arms(call.study, call.scale).items():
        at_scale = dataclasses.replace(call, scale=scale, shown=shown_study(call.study, scale))
        stage = plan_points(at_scale, planned_points(at_scale.design, arms), needs_weights=False)
        points += stage.study_points()
        for names, row, run_id in zip(arms.values(), stage.rows, stage.run_ids, strict=True):
            known = facts.get(run_id)
            found = _facts_of(row, stage.plan, names, scale)
            facts[run_id] = found if known is None else _joined(known, found)
    return points, facts


def _facts_of(row: PlanRow, plan: Plan, names: set[str], scale: Scale) -> PlannedFacts:
    counted = {name: getattr(row, name) for name in _COUNTED}
    values = {name: value for name, value in counted.items() if value is not None}
    missing = {name: row.missing.get(name, "not known before a run") for name in counted if name not in values}
    notes: tuple[str, ...] = ()
    if any(name.startswith(_PREDICTED) for name in names):
        job = next(one for one in plan.jobs if (one.fingerprint, one.repeat) == (row.fingerprint, row.repeat))
        predicted = _predicted(job, plan.lab, scale)
        if isinstance(predicted, str):
            missing |= {name: predicted for name in names if name.startswith(_PREDICTED)}
        else:
            values, notes = {**values, **predicted.values}, predicted.notes
    return PlannedFacts(values, missing, notes)


def _predicted(job: Job, lab: Lab, scale: Scale) -> PlannedFacts | str:
    found = Predictor(_kind(lab, scale), lab.memory.style, cache_folder(lab)).of(job)
    if isinstance(found, str):
        return found
    rows, prediction = found
    where = f"predicted of a step on {prediction.device_kind} in style {prediction.style}, {prediction.how}"
    return PlannedFacts(predicted_values(prediction), {}, (where, f"rows: {rows.source}", *prediction.notes))


def _kind(lab: Lab, scale: Scale) -> DeviceKind:
    """A published run had a GPU; one here has what it has, unless the study names a device."""
    if lab.memory.device is not None:
        return named_device(lab.memory.device, where="memory.device").kind
    return "cuda" if scale == "published" else "cpu"


def _joined(first: PlannedFacts, second: PlannedFacts) -> PlannedFacts:
    """Of two arms that are one run."""
    values = {**first.values, **second.values}
    missing = {name: why for name, why in {**first.missing, **second.missing}.items() if name not in values}
    return PlannedFacts(values, missing, tuple(dict.fromkeys((*first.notes, *second.notes))))
