"""The page's cohorts: which runs were trained together, and what they shared; every number from a result file."""

from __future__ import annotations

from typing import Any

from lora_lab.report.text import UNKNOWN, bytes_text, clean, count_text, seconds_text
from lora_lab.study.cohorts import PEAK, SPEED, WALL, Cohort
from lora_lab.study.findings import Findings

_LEGEND = (
    "Runs that were trained together on one frozen base, with the same results as alone. Steps and tokens are sums of "
    "the runs' own. Speed, wall time and peak memory are shared by all runs of the cohort, so they are no setting's; "
    "they are as the run tells them that saw most of the cohort, and a click leads to it."
)
_TITLES = ("cohort", "seats", "runs", "steps", "tokens", "tokens/s", "wall time", "peak memory")


def cohorts_view(findings: Findings) -> dict[str, Any]:
    """Titles, legend and rows; no rows where every run was made alone."""
    known = {record.run_id: record.name for record in findings.records}
    return {
        "titles": _TITLES,
        "legend": _LEGEND,
        "rows": [_row(cohort, known) for cohort in findings.cohorts],
    }


def _row(cohort: Cohort, known: dict[str, str]) -> dict[str, Any]:
    count = len(cohort.members)
    ended = "" if cohort.ended == count else f"{cohort.ended} of "
    return {
        "id": clean(cohort.id),
        "cells": [
            _cell(str(cohort.seats), cohort.seats),
            _cell(f"{ended}{count}", count, hint="runs with a result here, of all that were in it" if ended else ""),
            *(_cell(count_text(cohort.own[name]), cohort.own[name]) for name in ("steps", "tokens")),
            *(_shared(cohort, name) for name in (SPEED, WALL, PEAK)),
        ],
        "members": [
            {"id": run_id, "name": clean(known.get(run_id, run_id)), "is_here": run_id in known}
            for run_id in cohort.members
        ],
    }


def _shared(cohort: Cohort, name: str) -> dict[str, Any]:
    """A shared number, with the run whose result holds it."""
    if name not in cohort.shared:
        return _cell(UNKNOWN, None, hint=clean(cohort.missing[name]))
    one = cohort.shared[name]
    write = {SPEED: lambda value: f"{value:,.0f}", WALL: seconds_text, PEAK: bytes_text}[name]
    return _cell(write(one.value), one.value, hint="from this run's result", run_id=one.run_id)


def _cell(text: str, sort: float | None, *, hint: str = "", run_id: str | None = None) -> dict[str, Any]:
    return {"text": text, "sort": sort, "hint": hint, "run_id": run_id}
