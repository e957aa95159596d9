"""The page's ranking: contenders by score, memory and time, each at the best of its learning rates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lora_lab.report.page_settings import (
    SETTING_DIGITS,
    Scale,
    colours_of,
    heading,
    metric_cell,
    metric_heading,
    plain_cell,
    scale_of,
)
from lora_lab.report.text import bytes_text, clean, count_text, interval_text, number_text
from lora_lab.study.cells import Cell
from lora_lab.study.findings import Findings
from lora_lab.study.ranking import Contender, Ranking, Stand

_RATE_HINT = "the learning rate with the best mean, which stands for the contender; how many were tried"
_EDGE = "best rate at the edge of its grid"
_STANDS: dict[Stand, str] = {
    "first": "first",
    "behind": "behind",
    "open": "not told apart",
    "ahead": "ahead on common seeds",
    "not_compared": "not compared",
}
_LEGEND = "Score: mean over seeds, time: over runs, with half of the 95 % t interval; of fewer than three the points."
_CHOSEN = (
    "The best rate was chosen on the runs that are shown, so small leads are flattered; times are of this machine, "
    "from runs that had it alone."
)
_TIMES = "Times are of this machine, from runs that had it alone."


def ranking_view(findings: Findings, alone: Sequence[str] = ()) -> dict[str, Any]:
    """The table of contenders, in the form of the table of settings; no rows before anything can be ranked. `alone`:
    what is said of settings without a run made alone."""
    ranking = findings.ranking
    column = ranking.metric
    is_ranked = any(one.score_rank is not None for one in ranking.contenders)
    if column is None or not is_ranked:
        return {"columns": [], "rows": [], "legend": "", "notes": []}
    colours = colours_of(findings.table)
    scale = scale_of([one.score for one in ranking.contenders])
    times = scale_of([one.time for one in ranking.contenders])
    return {
        "columns": [
            heading("rank", "", f"by {clean(column.name)}; equal means share a rank"),
            metric_heading(column),
            heading("against the first", "", "paired by seed, corrected for the number of comparisons"),
            *([heading("best rate", "of those tried", _RATE_HINT)] if ranking.sweeps_rates else []),
            heading("memory rank", "", "by the largest peak; equal ones share a rank"),
            heading("peak memory", "", "smallest to largest over seeds"),
            heading("time rank", "", "by the mean; equal ones share a rank"),
            heading("train time", "s", "mean over runs executed alone on one machine"),
            heading("trainable", "", "trainable parameters"),
        ],
        "rows": [
            {
                "id": one.setting[:SETTING_DIGITS],
                "name": clean(one.name),
                "is_base": one.is_base,
                "colour": colours[one.setting],
                "cells": [
                    _rank(one.score_rank, one.unranked),
                    metric_cell(one.score, scale, is_best=one.score_rank == 1),
                    _against_first(one),
                    *([_best_rate(one)] if ranking.sweeps_rates else []),
                    *_memory(one),
                    _rank(one.time_rank, one.time.missing or _why_no_time_rank(ranking)),
                    _time(one.time, times, is_best=one.time_rank == 1),
                    plain_cell(count_text(one.trainable_parameters), one.trainable_parameters),
                ],
            }
            for one in ranking.contenders
        ],
        "legend": _legend(ranking),
        "notes": [*_notes(ranking), *map(clean, alone)],
    }


def _legend(ranking: Ranking) -> str:
    parts = [_LEGEND]
    if ranking.sweeps_rates:
        parts.insert(0, "Settings that differ in the learning rate alone are one row, at the best rate.")
    if ranking.comparisons:
        parts.append(
            "Against the first: by seeds in pairs, at 95 % corrected for the number of comparisons (Bonferroni), "
            f"{ranking.comparisons}" + ("; every rate counts as one." if ranking.sweeps_rates else ".")
        )
    return " ".join(parts)


def _notes(ranking: Ranking) -> list[str]:
    notes = [_CHOSEN if ranking.sweeps_rates else _TIMES]
    edges = [clean(one.name) for one in ranking.contenders if one.is_at_edge]
    if edges:
        notes.append(f"{_EDGE.capitalize()}, so a better one may lie beyond it: {', '.join(edges)}.")
    if ranking.machines > 1:
        notes.append(f"Not ranked by time: {_why_no_time_rank(ranking)}.")
    left = [one for one in ranking.contenders if one.score_rank is None and not one.is_base]
    return [*notes, *(f"Not ranked: {clean(one.name)}: {clean(one.unranked or '')}." for one in left)]


def _why_no_time_rank(ranking: Ranking) -> str:
    return f"the times come from {ranking.machines} machines" if ranking.machines > 1 else ""


def _rank(rank: int | None, why: str | None) -> dict[str, Any]:
    if rank is None:
        return plain_cell("-", None, hint=clean(why or ""), is_missing=True)
    return plain_cell(str(rank), rank)


def _against_first(one: Contender) -> dict[str, Any]:
    """Sorted by the difference, the first's own being none."""
    if one.stand is None:
        return plain_cell("-", None, is_missing=True)
    against = one.against_first
    if against is None:
        hint = "fewer than three seeds in common" if one.stand == "not_compared" else ""
        return plain_cell(_STANDS[one.stand], 0 if one.stand == "first" else None, hint=hint)
    difference = against.difference
    text = interval_text(difference.mean, against.half_width)
    told = "cannot be told apart from the first; " if one.stand == "open" else ""
    hint = f"{told}first minus this one: {text} (corrected), {difference.n} seeds"
    return plain_cell(_STANDS[one.stand], abs(difference.mean), hint=hint)


def _best_rate(one: Contender) -> dict[str, Any]:
    """`0.01 of 3`; the hint lists what was tried."""
    if not one.rates:
        return plain_cell("-", None, is_missing=True)
    tried = f"tried: {', '.join(f'{rate:g}' for rate in one.rates)}"
    if one.rate is None:
        return plain_cell(
            f"none of {len(one.rates)}", None, hint=f"{clean(one.unranked or '')}; {tried}", is_missing=True
        )
    text = f"{one.rate:g} of {len(one.rates)}" + (", edge" if one.is_at_edge else "")
    return plain_cell(text, one.rate, hint=f"{_EDGE}; {tried}" if one.is_at_edge else tried)


def _memory(one: Contender) -> list[dict[str, Any]]:
    """Rank and bytes; the smallest beside the largest where they do not read alike."""
    rank = _rank(one.memory_rank, one.memory_missing)
    if one.memory is None:
        return [rank, plain_cell("-", None, hint=clean(one.memory_missing or ""), is_missing=True)]
    low, high = one.memory
    text, smallest = bytes_text(high), bytes_text(low)
    if smallest != text:
        text = f"{smallest.removesuffix(text[text.rindex(' ') :])} to {text}"
    hint = f"{high:,} bytes" if low == high else f"{low:,} to {high:,} bytes"
    return [rank, plain_cell(text, high, hint=hint) | {"best": one.memory_rank == 1}]


def _time(cell: Cell, scale: Scale, *, is_best: bool) -> dict[str, Any]:
    """As a score, but of runs."""
    values = ", ".join(number_text(point.value) for point in cell.points)
    shown = metric_cell(cell, scale, is_best=is_best)
    return shown | ({"hint": f"{len(cell.points)} runs: {values}"} if cell.points else {})
