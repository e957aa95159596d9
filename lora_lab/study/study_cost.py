"""What a study costs: how many runs it makes, and the time that runs took."""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from pathlib import Path

from lora_lab.plan.stages import SettingKey, judged_points, setting_key, timing_points, tuning_points
from lora_lab.record.ledger import Ledger
from lora_lab.record.result import Result
from lora_lab.record.study_folder import study_folder
from lora_lab.record.study_points import read_points
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


def results_of(root: Path, folder_name: str) -> list[Result]:
    """The results of a study's runs, those of tuning and for the clock with them, as far as the ledger has them.

    Raises:
        DataError: the list of its points is damaged.
    """
    points = read_points(study_folder(root, folder_name))
    wanted = {point.run_id for point in points if point.stage != "planned"}
    return [one.result for one in Ledger(root).runs() if one.run_id in wanted and one.result is not None]


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
