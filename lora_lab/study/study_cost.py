"""What a study costs: how many runs it makes, and the time that runs took."""

from __future__ import annotations

import datetime
from collections.abc import Iterable

from lora_lab.plan.stages import SettingKey, judged_points, setting_key, timing_points, tuning_points
from lora_lab.record.result import Result
from lora_lab.schema.design import Design


def count_runs(design: Design) -> int:
    """Distinct points of all stages, and the baseline; a setting that is written in two ways counts twice."""
    stand_ins = {setting_key(one.values): one.rate or 0.0 for one in tuning_points(design)}
    points = [*tuning_points(design), *judged_points(design, stand_ins), *timing_points(design, stand_ins)]
    distinct: set[tuple[SettingKey, object, int]] = {
        (setting_key({**one.trial, "tuned": one.values.get("learning_rate")}), one.trial.get("seed"), one.repeat)
        for one in points
    }
    return len(distinct) + design.baseline


def busy_seconds(results: Iterable[Result]) -> float:
    """The time in which at least one of the runs was going on."""
    spans = sorted((_time(one.started_at), _time(one.finished_at)) for one in results)
    total, until = 0.0, float("-inf")
    for start, end in spans:
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def _time(text: str) -> float:
    return datetime.datetime.fromisoformat(text).timestamp()
