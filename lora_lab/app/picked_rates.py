"""Which learning rates tuning has picked, read from the ledger's tuning runs."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import replace
from pathlib import Path

from lora_lab.app.study_call import StagePlan
from lora_lab.errors import InputError, Problem
from lora_lab.plan.stages import Pick, SettingKey, pick_rates, setting_key
from lora_lab.record.ledger import Ledger
from lora_lab.record.result import Metric, Status
from lora_lab.schema.design import RATE, Design


def picks_of(design: Design, stage: StagePlan, root: Path) -> tuple[Pick, ...]:
    """A pick for every tuned setting; without a rate where one of its runs has not ended yet, since that may be the
    best. A rate at which a run diverged is out.

    Raises:
        InputError: a run that ended has no score of the metric.
    """
    if design.tuning is None:
        return ()
    ledger = Ledger(root)
    scores: dict[tuple[SettingKey, float], list[float | None]] = {}
    waits: set[SettingKey] = set()
    higher = False
    for point, row in zip(stage.points, stage.rows, strict=True):
        assert point.rate is not None
        key, record = setting_key(point.values), ledger.find(row.fingerprint, row.repeat)
        if record is None or record.result is None or not record.is_done:
            waits.add(key)
            continue
        score = None
        if record.result.status == Status.COMPLETED:
            score = _score(record.result.metrics, design.tuning.metric, record.name)
            higher = score.higher_is_better
        scores.setdefault((key, point.rate), []).append(None if score is None else score.value)
    picks = pick_rates(design, scores, higher_is_better=higher)
    return tuple(replace(one, rate=None, edge=None) if setting_key(one.values) in waits else one for one in picks)


def _score(metrics: dict[str, Metric], name: str, run: str) -> Metric:
    if name not in metrics:
        raise InputError(Problem("tuning.metric", f'the run {run} has no score "{name}" to pick a rate by'))
    return metrics[name]


def told(picks: Iterable[Pick], *, base: Container[str]) -> list[str]:
    """A line per setting, for people: what was tried, what was picked, and whether the grid ended there.

    base: keys that all settings share, and are not told.
    """
    lines = []
    for pick in picks:
        tried = ", ".join(f"{rate:g}: {'-' if mean is None else f'{mean:.4g}'}" for rate, mean in pick.tried)
        found = "no rate yet" if pick.rate is None else f"{pick.rate:g}"
        edge = "" if pick.edge is None else f" (the {pick.edge} that was tried: extend the grid)"
        named = ", ".join(f"{key}={value}" for key, value in pick.values.items() if key != RATE and key not in base)
        lines.append(f"{named or 'the one setting'}: {found}{edge}; tried {tried}")
    return lines
