"""Which figures a page holds, and the choices its reader has among them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import permutations, product
from typing import Any

from lora_lab.report.figures import COST_TITLES, Figure, heat_map, learning_curves, memory_bars, score_against_cost
from lora_lab.report.memory_figures import predicted_figure
from lora_lab.report.memory_words import error_sentence
from lora_lab.report.page_settings import colours_of
from lora_lab.report.text import clean
from lora_lab.study.curves import setting_curves
from lora_lab.study.findings import Findings
from lora_lab.study.memory_parts import memory_parts
from lora_lab.study.pareto import pareto_front

_CURVES = {
    "loss": "training loss (nats/token)",
    "gradient_norm": "gradient norm",
    "tokens_per_second": "tokens per second",
}
# More lines than these cannot be told apart.
_MOST_CURVES = 24
_MOST_BARS = 60
_MOST_AXES = 6
_SHOWN_REASONS = 3


@dataclass(frozen=True, slots=True)
class Pick:
    """A choice: values and their titles."""

    title: str
    options: tuple[tuple[str, str], ...]
    chosen: str

    def to_view(self) -> dict[str, Any]:
        """For the template."""
        options = [{"value": value, "title": clean(title)} for value, title in self.options]
        return {"title": self.title, "options": options, "chosen": self.chosen}


@dataclass(frozen=True, slots=True)
class Family:
    """Figures of one kind. `figures`: by the chosen values joined with `|`; "" where there is no choice."""

    id: str
    menu: str
    title: str
    legend: str
    picks: tuple[Pick, ...]
    figures: dict[str, Figure]
    notes: tuple[str, ...]

    def to_view(self) -> dict[str, Any]:
        """For the template."""
        return {
            "id": self.id,
            "menu": self.menu,
            "title": self.title,
            "legend": self.legend,
            "picks": [pick.to_view() for pick in self.picks],
            "notes": self.notes,
        }


def families(findings: Findings, alone: Sequence[str] = ()) -> list[Family]:
    """All that can be drawn of these runs; a family without any figure is left out. `alone`: what is said of settings
    without a run made alone, which have no point against a cost."""
    drawn = [_curves(findings), _costs(findings, alone), _heat_maps(findings), _memory(findings), _predicted(findings)]
    return [family for family in drawn if family is not None]


def _pick(title: str, options: Iterable[tuple[str, str]], chosen: int = 0) -> Pick:
    listed = tuple(options)
    return Pick(title, listed, listed[chosen][0])


def _curves(findings: Findings) -> Family | None:
    table = findings.table
    rows = _best_first(findings)[:_MOST_CURVES]
    trained = sum(not row.is_base for row in table.rows)
    figures = {}
    reasons: list[str] = []
    colours = colours_of(table)
    for key, title in _CURVES.items():
        curves, missing = setting_curves(findings.records, rows, key)
        if curves:
            figures[key] = learning_curves(curves, colours, title=title)
            reasons += missing
        else:
            reasons.append(f"No {title} ({_some(missing)}).")
    if not figures:
        return None
    cut = f"The {_MOST_CURVES} best of {trained} settings; every run's own curve is on its page."
    return Family(
        id="curves",
        menu="Curves",
        title="Learning curves",
        legend="Mean over seeds at each step; the band is the 95 % t interval over seeds, or the range of two. "
        "A click on a name of the legend hides or shows it.",
        picks=(_pick("Value", [(key, _CURVES[key]) for key in figures]),),
        figures=figures,
        notes=(*((cut,) if trained > _MOST_CURVES else ()), *dict.fromkeys(map(clean, reasons))),
    )


def _best_first(findings: Findings) -> Sequence[Any]:
    """Trained settings by their mean of the first metric, those without one last."""
    table = findings.table
    rows = [row for row in table.rows if not row.is_base]
    if not table.columns:
        return rows
    column = table.columns[0]
    sign = -1 if column.higher_is_better else 1

    def key(row: Any) -> tuple[bool, float]:
        mean = row.cells[column.name].mean
        return (mean is None, 0.0 if mean is None else sign * mean)

    return sorted(rows, key=key)


def _some(reasons: Sequence[str]) -> str:
    """The first of them."""
    distinct = list(dict.fromkeys(reasons))
    more = f"; and {len(distinct) - _SHOWN_REASONS} more" if len(distinct) > _SHOWN_REASONS else ""
    return ("; ".join(distinct[:_SHOWN_REASONS]) or "no step was logged") + more


def _costs(findings: Findings, alone: Sequence[str]) -> Family | None:
    table = findings.table
    colours = colours_of(table)
    figures = {}
    for column, cost in product(table.columns, COST_TITLES):
        front = pareto_front(table, column.name, cost)
        figures[f"{column.name}|{cost}"] = score_against_cost(front, table, column, cost, colours)
    if not any("data" in figure for figure in figures.values()):
        return None
    return Family(
        id="cost",
        menu="Score and cost",
        title="Score against cost",
        legend="One point per setting; whiskers are the 95 % interval over seeds. "
        "No setting is both better and cheaper than one on the dotted front.",
        picks=(
            _pick("Score", [(column.name, column.name) for column in table.columns]),
            _pick("Cost", COST_TITLES.items()),
        ),
        figures=figures,
        notes=tuple(map(clean, alone)),
    )


def _heat_maps(findings: Findings) -> Family | None:
    table = findings.table
    axes = [axis.name for axis in findings.axes.axes][:_MOST_AXES]
    if len(axes) < 2:
        return None
    figures = {
        f"{column.name}|{x}|{y}": heat_map(table, findings.axes, column, x, y)
        for column, (x, y) in product(table.columns, permutations(axes, 2))
    }
    if not any("data" in figure for figure in figures.values()):
        return None
    options = [(axis, axis) for axis in axes]
    across, down = sorted(range(len(axes)), key=lambda index: -len(findings.axes.axes[index].matched))[:2]
    cut = f"The first {_MOST_AXES} axes; the others are in the table."
    return Family(
        id="heat",
        menu="Two axes",
        title="Any two axes",
        legend="Mean over the settings that share both values; below it, of how many where there are several.",
        picks=(
            _pick("Score", [(column.name, column.name) for column in table.columns]),
            _pick("Across", options, chosen=across),
            _pick("Down", options, chosen=down),
        ),
        figures=figures,
        notes=(cut,) if len(findings.axes.axes) > _MOST_AXES else (),
    )


def _memory(findings: Findings) -> Family | None:
    rows = findings.table.rows[:_MOST_BARS]
    parts = [one for row in rows if (one := memory_parts(findings.records, row)) is not None]
    figure = memory_bars(parts)
    if "data" not in figure:
        return None
    left_out = [f"{clean(one.name)}: {one.missing}" for one in parts if one.missing is not None]
    return Family(
        id="memory",
        menu="Memory",
        title="Memory by part",
        legend="What is alive at the peak of a step. Activations and temporaries are what the peak has on top.",
        picks=(),
        figures={"": figure},
        notes=tuple(left_out),
    )


def _predicted(findings: Findings) -> Family | None:
    sentence = error_sentence(findings.predicted)
    if sentence is None:
        return None
    return Family(
        id="predicted",
        menu="Prediction",
        title="Predicted against measured memory",
        legend=f"{sentence} One point per run; on the dotted line both are equal.",
        picks=(),
        figures={"": predicted_figure(findings.predicted.pairs, colours_of(findings.table))},
        notes=(),
    )
