"""The page's facts, its table of effects, and how to read it all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lora_lab.record.result import Status
from lora_lab.report.text import clean, interval_text, points_text, value_text
from lora_lab.study.answer import is_established
from lora_lab.study.effects import Effect
from lora_lab.study.findings import Findings

METHOD = (
    "A cell is the mean over seeds with half of its 95 % interval by Student's t; the mark below it shows mean and "
    "interval on the scale of its column. With fewer than three seeds there is no interval, and the points are shown. "
    "Interval and standard error inside one run cover its examples, not seeds.",
    "Only completed runs enter a mean. A diverged or failed run is counted and explained, never averaged. So is one "
    "that a search stopped early; a setting with such a run is compared with no other, since the runs that it has left "
    "are its better ones. A missing number is missing, with its reason.",
    "Peak memory is the allocator's on CUDA. On a CPU it is the bytes of live tensors at the peak of one step on the "
    "longest rows, counted on a step that is left out of time and speed. GB is 10^9 bytes. Time is wall clock; tokens "
    "per second count real tokens, no padding. Of a setting the largest memory and the median time over its runs are "
    "shown.",
    "A predicted peak was computed before anything was loaded. Its error is what was predicted too much, in percent of "
    "what was measured; only runs whose measured peak is their own count.",
    "Runs may be trained together on one frozen base, in a cohort. That changes no score, and scores count whichever "
    "way a run was made, a repeated trial once. Time and speed are compared between runs made alone only; so are peaks "
    "of memory, but for one that was counted on a step that the run made alone.",
)
_EFFECT_TITLES = ("axis", "from", "to", "difference", "seeds", "pairs of settings", "verdict")


def facts(findings: Findings, *, planned: int | None) -> list[dict[str, str]]:
    """Counts and provenance for the head of the page."""
    records = findings.records
    states = Counter(str(record.state) for record in records)
    told = [_fact(state.lower().replace("_", " "), str(count), _tone(state)) for state, count in states.items()]
    if planned is not None and planned > len(records):
        told.append(_fact("not begun", str(planned - len(records)), "muted"))
    machines = {record.header.machine_id for record in records if record.header is not None}
    models = _values(findings, "model", "name")
    data = _values(findings, "data", "name")
    finished = max((r.result.finished_at for r in records if r.result is not None), default=None)
    seeds = sorted(
        {
            point.seed
            for row in findings.table.rows
            for cell in row.cells.values()
            for point in cell.points
            if point.seed is not None
        }
    )
    return [
        *told,
        *([_fact("seeds", ", ".join(map(str, seeds)) if len(seeds) <= 6 else str(len(seeds)))] if seeds else []),
        *([_fact("model", ", ".join(models))] if models else []),
        *([_fact("data", ", ".join(data))] if data else []),
        *([_fact("machines", str(len(machines)))] if machines else []),
        *([_fact("cohorts", _cohorts(findings))] if findings.cohorts else []),
        *([_fact("last run ended", finished[:16].replace("T", " ") + " UTC")] if finished else []),
    ]


def _cohorts(findings: Findings) -> str:
    return f"{len(findings.cohorts)}, of {sum(cohort.ended for cohort in findings.cohorts)} runs"


def _fact(name: str, value: str, tone: str = "") -> dict[str, str]:
    return {"name": name, "value": clean(value), "tone": tone}


def _tone(state: str) -> str:
    if state == Status.COMPLETED:
        return "good"
    if state == Status.STOPPED:
        return "muted"
    return "bad" if state in (Status.FAILED, "DAMAGED", "NEWER") else "warn" if state != "RUNNING" else ""


def _values(findings: Findings, section: str, key: str) -> list[str]:
    found = (record.trial.get(section, {}).get(key) for record in findings.records)
    return list(dict.fromkeys(str(value) for value in found if value is not None))


def sections(page: Mapping[str, Any]) -> list[dict[str, str]]:
    """What the page's own menu leads to."""
    entries = []
    if page["claims"] is not None:
        entries.append({"id": "claims", "title": "Claims"})
    if page["table"]["rows"]:
        entries.append({"id": "settings", "title": "Settings"})
    if page["ranking"]["rows"]:
        entries.append({"id": "ranking", "title": "Ranking"})
    if page["effects"]["rows"]:
        entries.append({"id": "effects", "title": "Axes"})
    entries += [{"id": family["id"], "title": family["menu"]} for family in page["families"]]
    if page["routing"]["rows"]:
        entries.append({"id": "routing", "title": "Routing"})
    if page["cohorts"]["rows"]:
        entries.append({"id": "cohorts", "title": "Cohorts"})
    return [*entries, {"id": "runs", "title": "Runs"}, {"id": "method", "title": "How to read"}]


def effects_view(findings: Findings) -> dict[str, Any]:
    """Titles and cells of the table of effects."""
    metrics = list(dict.fromkeys(effect.metric for effect in findings.effects))
    tested = Counter(effect.metric for effect in findings.effects if effect.interval is not None)
    return {
        "metrics": [clean(metric) for metric in metrics],
        "titles": _EFFECT_TITLES,
        "legend": (
            "Settings that differ in one axis only, compared seed by seed: the score at the second value minus the "
            "score at the first, with its 95 % interval. Clear: that interval does not hold 0, which with many effects "
            "some do by chance. Established: nor does the one that is corrected for the number of effects (Bonferroni)."
        ),
        "rows": [
            {"metric": clean(effect.metric), "cells": _effect_cells(effect, tested[effect.metric])}
            for effect in findings.effects
        ],
    }


def _effect_cells(effect: Effect, tested: int) -> Sequence[dict[str, Any]]:
    return [
        _cell(clean(effect.axis) + _with(effect)),
        _cell(clean(value_text(effect.low))),
        _cell(clean(value_text(effect.high))),
        _difference(effect),
        _cell(str(effect.seeds), effect.seeds),
        _cell(str(effect.pairs), effect.pairs),
        _verdict(effect, tested),
    ]


def _with(effect: Effect) -> str:
    """What moved together with the axis."""
    return f" (with {', '.join(map(clean, effect.along))})" if effect.along else ""


def _verdict(effect: Effect, tested: int) -> dict[str, Any]:
    if effect.difference is None:
        return _cell("", None, "missing")
    if effect.interval is None:
        return _cell("fewer than 3 seeds", None, "missing")
    if is_established(effect.interval, tested):
        return _cell("established", None, "clear")
    return _cell("clear, not established" if effect.is_clear else "not told apart from 0")


def _cell(text: str, sort: float | int | None = None, tone: str = "") -> dict[str, Any]:
    return {"text": text, "sort": sort, "tone": tone}


def _difference(effect: Effect) -> dict[str, Any]:
    if effect.difference is None:
        return _cell(effect.missing or "-", None, "missing")
    interval = effect.interval
    if interval is None:
        return _cell(points_text([effect.difference]), effect.difference)
    sign = "+" if interval.mean > 0 else ""
    return _cell(
        sign + interval_text(interval.mean, interval.half_width), interval.mean, "clear" if effect.is_clear else ""
    )
