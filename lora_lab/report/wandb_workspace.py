"""A saved view and a report in W&B for a study; the one file that imports wandb_workspaces.

Both show what the study's runs carry there (`record/wandb_mapping.py`): learning curves by setting, scores, scores
against memory and time, a comparison of runs, and the lab's own table with its intervals, since W&B has none over
groups. They hold no numbers but that table's; everything else is drawn from the runs. Of a cost that no setting has
there is no panel, and the text beside the table says why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_lab.report.cohort_words import alone_sentences
from lora_lab.report.text import interval_text, number_text
from lora_lab.study.alone import NotAlone

_WIDE, _HALF, _HEIGHT = 24, 12, 8
_COSTS = (("peak_allocated_bytes", "Score against peak memory"), ("train_seconds", "Score against training time"))
_GROUP = "Group"
_MOST_RUNS = 100
_OF_TRAINING = "train/"
_SPEED = "tokens_per_second"


@dataclass(frozen=True, slots=True)
class Windows:
    """wandb_workspaces' own objects, unsaved."""

    workspace: Any
    report: Any

    def specs(self) -> dict[str, Any]:
        """What would be saved, as JSON values."""
        return {
            "workspace": self.workspace._to_model().model_dump(mode="json", by_alias=True, exclude_none=True),
            "report": self.report._to_model().model_dump(mode="json", by_alias=True, exclude_none=True),
        }

    def save(self) -> dict[str, str]:
        """Saves both; returns their addresses.

        Raises:
            Exception: whatever wandb raises without a login or a network.
        """
        self.workspace.save()
        self.report.save()
        return {"workspace": str(self.workspace.url), "report": str(self.report.url)}


def study_windows(
    study: str, table: Mapping[str, Any], *, question: str | None, project: str, entity: str | None
) -> Windows:
    """The view and the report of a study. table: `SettingsTable.to_json`.

    Nothing is asked of a server where `entity` is given.
    """
    import wandb_workspaces.reports.v2 as reports
    import wandb_workspaces.workspaces as workspaces

    scores = [metric for metric in table["metrics"] if not metric["name"].startswith(_OF_TRAINING)]
    owner = {} if entity is None else {"entity": entity}
    runs_only = workspaces.And(workspaces.Tags().isin([study]), workspaces.Metric("JobType") != "study")
    text = intervals_markdown(table, study=study)
    curves, costs = _curves(reports, table), _costs(reports, table, scores)
    report = reports.Report(
        project=project,
        title=f"Study {study}",
        description=question or "",
        blocks=[
            reports.H1(text=question or f"Study {study}"),
            reports.MarkdownBlock(text=text),
            reports.PanelGrid(
                runsets=[reports.Runset(name="runs of the study", filters=runs_only, groupby=[_GROUP])],
                panels=[*curves, *_bars(reports, scores), *costs, _comparer(reports)],
            ),
        ],
        width="fluid",
        **owner,
    )
    sections = [
        ("Answer", [reports.MarkdownPanel(markdown=text, layout=_layout(reports, 0, _WIDE))]),
        ("Scores", _bars(reports, scores)),
        ("Scores and costs", costs),
        ("Learning", curves),
        ("Runs", [_comparer(reports)]),
    ]
    workspace = workspaces.Workspace(
        entity=report.entity,
        project=project,
        name=f"Study {study}",
        sections=[workspaces.Section(name=name, panels=panels, is_open=True) for name, panels in sections if panels],
        settings=workspaces.WorkspaceSettings(x_axis="train/step", max_runs=_MOST_RUNS),
        runset_settings=workspaces.RunsetSettings(filters=runs_only, groupby=[workspaces.Metric(_GROUP)]),
    )
    return Windows(workspace, report)


def _curves(reports: Any, table: Mapping[str, Any]) -> list[Any]:
    """Mean over the seeds of a setting, with their range; the speed is of runs made alone, or there is none."""
    series = [("train/loss", "Training loss")]
    if _is_measured(table, _SPEED):
        series.append((f"train/{_SPEED}", "Tokens per second, of runs made alone"))
    return [
        reports.LinePlot(
            title=title,
            x="train/step",
            y=[key],
            groupby=_GROUP,
            groupby_aggfunc="mean",
            groupby_rangefunc="minmax",
            max_runs_to_show=_MOST_RUNS,
            layout=_layout(reports, index, _HALF),
        )
        for index, (key, title) in enumerate(series)
    ]


def _bars(reports: Any, scores: Sequence[Mapping[str, Any]]) -> list[Any]:
    return [
        reports.BarPlot(
            title=f"{score['name']} ({_direction(score)})",
            metrics=[f"eval/{score['name']}"],
            title_x=score["unit"],
            groupby=_GROUP,
            groupby_aggfunc="mean",
            groupby_rangefunc="minmax",
            max_runs_to_show=_MOST_RUNS,
            layout=_layout(reports, index, _HALF),
        )
        for index, score in enumerate(scores)
    ]


def _costs(reports: Any, table: Mapping[str, Any], scores: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The primary score over memory and over time, one point per run that has both."""
    measured = [(cost, title) for cost, title in _COSTS if _is_measured(table, cost)]
    return [
        reports.ScatterPlot(
            title=f"{title}: {score['name']} ({_direction(score)})",
            x=reports.SummaryMetric(cost),
            y=reports.SummaryMetric(f"eval/{score['name']}"),
            layout=_layout(reports, index, _HALF),
        )
        for score in scores[:1]
        for index, (cost, title) in enumerate(measured)
    ]


def _is_measured(table: Mapping[str, Any], cost: str) -> bool:
    return any(cost in row["measurements"] for row in table["rows"])


def _comparer(reports: Any) -> Any:
    return reports.RunComparer(diff_only="split", layout=_layout(reports, 0, _WIDE))


def _layout(reports: Any, index: int, width: int) -> Any:
    columns = _WIDE // width
    return reports.Layout(x=index % columns * width, y=index // columns * _HEIGHT, w=width, h=_HEIGHT)


def _direction(score: Mapping[str, Any]) -> str:
    return "higher is better" if score["higher_is_better"] else "lower is better"


def intervals_markdown(table: Mapping[str, Any], *, study: str | None = None) -> str:
    """The study's table in Markdown: mean and 95 % interval over seeds; with fewer than three seeds the mean alone.

    Below it: which settings have no time or memory to compare, and how `study` measures them.
    """
    metrics = table["metrics"]
    names = [f"{one['name']} {'↑' if one['higher_is_better'] else '↓'}" for one in metrics]
    lines = [["setting", "seeds", *names], ["---", *("---:" for _ in range(len(metrics) + 1))]]
    for row in table["rows"]:
        cells = [_cell_text(row["metrics"][metric["name"]]) for metric in metrics]
        lines.append([row["name"], f"{row['trials_completed']} of {row['trials']}", *cells])
    text = "\n".join("| " + " | ".join(_escaped(cell) for cell in line) + " |" for line in lines)
    lacking = [NotAlone(**{**one, "settings": tuple(one["settings"])}) for one in table["not_alone"]]
    notes = ["Mean ± 95 % t interval over seeds; ↑ higher, ↓ lower is better.", *alone_sentences(lacking, study=study)]
    return "\n\n".join([text, *map(_escaped, notes)])


def _cell_text(cell: Mapping[str, Any]) -> str:
    if cell["mean"] is None:
        return "not measured"
    if cell["interval"] is None:
        return f"{number_text(cell['mean'])} (n = {len(cell['points'])})"
    return f"{interval_text(cell['mean'], cell['interval']['half_width'])} (n = {len(cell['points'])})"


def _escaped(text: str) -> str:
    """A cell of a Markdown table that shows its text and nothing else."""
    flat = " ".join(text.split())
    return "".join(f"\\{character}" if character in "\\|`*_[]<>#!" else character for character in flat)
