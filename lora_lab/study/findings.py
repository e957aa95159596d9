"""All that a study has found so far, from its runs: what the page, the notebook and `report --json` show."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lora_lab.record.ledger import Ledger
from lora_lab.record.run_record import RunRecord
from lora_lab.record.study_folder import StudyRecord
from lora_lab.study.answer import Answer, answer_of
from lora_lab.study.axes import SweptAxes, swept_axes
from lora_lab.study.cohorts import Cohort, cohorts_of
from lora_lab.study.effects import Effect, effects_of
from lora_lab.study.predicted_memory import PredictedMemory, predicted_memory
from lora_lab.study.ranking import Ranking, ranking_of
from lora_lab.study.table import SettingsTable, settings_table


@dataclass(frozen=True, slots=True)
class Findings:
    """`effects`: of every axis on every metric of the table, the primary metric's first."""

    records: tuple[RunRecord, ...]
    table: SettingsTable
    axes: SweptAxes
    effects: tuple[Effect, ...]
    answer: Answer
    ranking: Ranking
    cohorts: tuple[Cohort, ...]
    predicted: PredictedMemory

    def to_json(self) -> dict[str, Any]:
        """Table, axes, effects, answer, ranking, cohorts and predicted memory; the runs by their ids."""
        return {
            "runs": [record.run_id for record in self.records],
            "answer_parts": self.answer.to_json(),
            "table": self.table.to_json(),
            "axes": self.axes.to_json(),
            "effects": [effect.to_json() for effect in self.effects],
            "ranking": self.ranking.to_json(),
            "cohorts": [cohort.to_json() for cohort in self.cohorts],
            "predicted_memory": self.predicted.to_json(),
        }


def study_findings(asked: StudyRecord, ledger: Ledger) -> Findings:
    """What a study has found so far, by the metrics that its file names; raises as `findings_of`."""
    return findings_of(asked.records(ledger), metrics=asked.metrics)


def findings_of(records: Iterable[RunRecord], *, metrics: Sequence[str] | None) -> Findings:
    """What these runs say; `metrics` as in `settings_table`, the first of them is the primary one.

    Raises:
        InputError: the runs cannot stand in one table.
    """
    every = tuple(records)
    table = settings_table(every, metrics=metrics)
    axes = swept_axes(every)
    effects = tuple(effect for column in table.columns for effect in effects_of(table, axes, column.name))
    answer, ranking = answer_of(table, effects), ranking_of(every, table)
    return Findings(every, table, axes, effects, answer, ranking, cohorts_of(every), predicted_memory(every))
