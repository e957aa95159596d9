"""Which parts of the model each setting adapts, beside what it scores: for studies of targets."""

from __future__ import annotations

from lora_lab.report.figures import Figure
from lora_lab.report.lattice_figures import LatticeRow, parts_of, target_lattice
from lora_lab.report.page_figures import Family, Pick
from lora_lab.report.page_settings import colours_of
from lora_lab.study.findings import Findings
from lora_lab.study.table import MetricColumn, SettingRow

_MOST_ROWS = 64


def target_families(findings: Findings) -> list[Family]:
    """The lattice of targets, best setting first; nothing where no two settings adapt different parts."""
    table = findings.table
    trials = {str(record.setting): record.trial for record in findings.records}
    parts = {
        row.setting: known
        for row in table.rows
        if not row.is_base and (known := parts_of(trials.get(row.setting, {}))) is not None
    }
    figures = {column.name: _figure(findings, column, parts) for column in table.columns}
    drawn = {name: figure for name, figure in figures.items() if "data" in figure}
    if not drawn:
        return []
    cut = f"The {_MOST_ROWS} best settings; the table has all."
    return [
        Family(
            id="targets",
            menu="Targets",
            title="Where the adapters sit",
            legend="A full dot: the part has adapters. Beside it the score of the setting, the best first; whiskers "
            "are the 95 % interval over seeds.",
            picks=(Pick("Score", tuple((name, name) for name in drawn), next(iter(drawn))),),
            figures=drawn,
            notes=(cut,) if len(parts) > _MOST_ROWS else (),
        )
    ]


def _figure(findings: Findings, column: MetricColumn, parts: dict[str, frozenset[str]]) -> Figure:
    colours = colours_of(findings.table)
    sign = -1.0 if column.higher_is_better else 1.0
    known = [row for row in findings.table.rows if row.setting in parts]
    rows = sorted(known, key=lambda row: _place(row, column, sign))[:_MOST_ROWS]
    lattice = [
        LatticeRow(
            row.name,
            parts[row.setting],
            row.cells[column.name].mean,
            None if (interval := row.cells[column.name].interval) is None else interval.half_width,
            colours[row.setting],
        )
        for row in rows
    ]
    return target_lattice(lattice, score=f"{column.name} ({column.unit})", whisker="95 % interval")


def _place(row: SettingRow, column: MetricColumn, sign: float) -> tuple[bool, float]:
    mean = row.cells[column.name].mean
    return (mean is None, 0.0 if mean is None else sign * mean)
