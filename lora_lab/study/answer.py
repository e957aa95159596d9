"""What a study's numbers say about its first metric: the best setting, what it cannot be told apart from, and which
axis matters most. The sentence is written in report/.

The best setting is compared with every other and with the untouched base, by seeds in pairs. These comparisons are
corrected by Bonferroni: with m of them each is made at 1 - 0.05 / m. So the best setting and those that it cannot be
told apart from hold the truly best one in at least 95 of 100 studies (to drop out it would have to lose one of its own
m comparisons), and "better than each other" is wrong in at most 5. It is not enough for every single name in `beaten`:
of many settings that are all equal, the one that came out best is chosen for its luck, and in about one study of ten
beats some other. Effects of axes are corrected for the number of effects looked at.

A difference that is the same for every seed proves nothing (`effects.has_spread`), so it is not called established.
A setting of which a search has stopped runs early is not compared at all (`SettingRow.incomparable`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from scipy import special

from lora_lab.record.result import Status
from lora_lab.study.effects import SEEDS_FOR_INTERVAL, Effect, has_spread, scores_by_seed
from lora_lab.study.interval import CONFIDENCE, Interval, t_interval
from lora_lab.study.table import MetricColumn, SettingRow, SettingsTable

# nothing_ended: no run has an outcome. none_completed: trained runs have outcomes, but no scores. only_base: nothing
# trained was begun, or it still runs. no_score: completed runs lack the metric. cut_short: of every setting with a
# score some runs were stopped early. few_seeds: no setting has three seeds.
Case = Literal["nothing_ended", "none_completed", "only_base", "no_score", "cut_short", "few_seeds", "compared"]
# How the best setting stands to another one, or to the base.
Verdict = Literal["better", "worse", "open"]


@dataclass(frozen=True, slots=True)
class Standing:
    """A setting's place. `interval` (95 %, over seeds) as in the table; `lost`: its trials that have no score (yet)."""

    name: str
    setting: str
    mean: float
    interval: Interval | None
    seeds: int
    lost: int

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return {**asdict(self), "interval": None if self.interval is None else self.interval.to_json()}


@dataclass(frozen=True, slots=True)
class Against:
    """The best setting against another: score of the best - score of the other, over the seeds that both have.

    `half_width` is that of the corrected interval; `verdict` follows from it and the metric's direction.
    """

    name: str
    setting: str
    difference: Interval
    half_width: float
    verdict: Verdict

    def to_json(self) -> dict[str, Any]:
        """All fields; `difference` with its uncorrected interval, `half_width` corrected."""
        return {
            "name": self.name,
            "setting": self.setting,
            "difference": self.difference.mean,
            "seeds": self.difference.n,
            "interval": self.difference.to_json(),
            "corrected_half_width": self.half_width,
            "verdict": self.verdict,
        }


@dataclass(frozen=True, slots=True)
class Answer:
    """Everything the sentence is made of.

    `equals`: other settings whose mean is the very same as the best one's. `runner_up`: the next by mean. `beaten` and
    `ties`: names of the settings that the best one is, and is not, established to be better than; `not_compared`: those
    with fewer than three seeds in common with it; `cut_short`: those that have a score and lost runs to early stopping,
    which have no part in this. `base`: the untouched base that belongs to the best setting.
    `comparisons`, `effects_tested`: what was corrected for. `counts`: trained runs by status.
    """

    case: Case
    metric: MetricColumn | None
    best: Standing | None
    base: Standing | None
    against_base: Against | None
    runner_up: Against | None
    equals: int
    beaten: tuple[str, ...]
    ties: tuple[str, ...]
    not_compared: tuple[str, ...]
    cut_short: tuple[str, ...]
    comparisons: int
    effect: Effect | None
    effects_tested: int
    axes_tested: tuple[str, ...]
    counts: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        parts = {
            "best": self.best,
            "base": self.base,
            "against_base": self.against_base,
            "runner_up": self.runner_up,
            "effect": self.effect,
        }
        return {
            "case": self.case,
            "metric": None if self.metric is None else asdict(self.metric),
            **{name: None if part is None else part.to_json() for name, part in parts.items()},
            "equals": self.equals,
            "beaten": list(self.beaten),
            "ties": list(self.ties),
            "not_compared": list(self.not_compared),
            "cut_short": list(self.cut_short),
            "comparisons": self.comparisons,
            "effects_tested": self.effects_tested,
            "axes_tested": list(self.axes_tested),
            "correction": "Bonferroni",
            "counts": self.counts,
        }


def answer_of(table: SettingsTable, effects: Sequence[Effect]) -> Answer:
    """The answer on the table's first metric; effects on other metrics have no part in it."""
    trained = [row for row in table.rows if not row.is_base]
    counts = _counts(table, trained)
    if not table.columns:
        return _uncompared(_case_without_scores(table, counts, has_base=False), counts)
    column = table.columns[0]
    bases = [row for row in table.rows if row.is_base and row.cells[column.name].mean is not None]
    ranked = _ranked([row for row in trained if row.cells[column.name].mean is not None], column)
    scored = [row for row in ranked if row.incomparable is None]
    cut_short = tuple(row.name for row in ranked if row.incomparable is not None)
    if not scored:
        base = _standing(bases[0], column) if bases else None
        case = "cut_short" if cut_short else _case_without_scores(table, counts, has_base=bool(bases))
        return _uncompared(case, counts, column, base=base, cut_short=cut_short)
    ready = [row for row in scored if row.cells[column.name].interval is not None]
    best = (ready or scored)[0]
    base_row, standing, equals = _base_of(best, bases), _standing(best, column), _equals(best, scored, column)
    base = None if base_row is None else _standing(base_row, column)
    led = _uncompared("few_seeds", counts, column, best=standing, base=base, equals=equals, cut_short=cut_short)
    return _compared(led, column, best, [row for row in scored if row is not best], base_row, effects) if ready else led


def _counts(table: SettingsTable, trained: Sequence[SettingRow]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for row in trained or table.rows:
        counts.update(row.statuses)
    if not table.rows and table.problems:
        counts["DAMAGED"] = len(table.problems)
    return dict(counts)


def _case_without_scores(table: SettingsTable, counts: Mapping[str, int], *, has_base: bool) -> Case:
    is_begun = any(not row.is_base for row in table.rows) or not has_base
    ended = [status for status in counts if status != "RUNNING"] if is_begun else []
    if not ended:
        return "only_base" if has_base else "nothing_ended"
    return "no_score" if Status.COMPLETED in ended else "none_completed"


def _uncompared(
    case: Case,
    counts: dict[str, int],
    metric: MetricColumn | None = None,
    *,
    best: Standing | None = None,
    base: Standing | None = None,
    equals: int = 0,
    cut_short: tuple[str, ...] = (),
) -> Answer:
    return Answer(
        case=case,
        metric=metric,
        best=best,
        base=base,
        against_base=None,
        runner_up=None,
        equals=equals,
        beaten=(),
        ties=(),
        not_compared=(),
        cut_short=cut_short,
        comparisons=0,
        effect=None,
        effects_tested=0,
        axes_tested=(),
        counts=counts,
    )


def _compared(
    led: Answer,
    column: MetricColumn,
    best: SettingRow,
    others: Sequence[SettingRow],
    base: SettingRow | None,
    effects: Sequence[Effect],
) -> Answer:
    comparisons = len(others) + (base is not None)
    against = {row.setting: against_other(best, row, column, comparisons) for row in others}
    known = [one for one in against.values() if one is not None]
    tested = [effect for effect in effects if effect.metric == column.name and effect.interval is not None]
    return replace(
        led,
        case="compared",
        against_base=None if base is None else _against_base(best, base, column, comparisons),
        runner_up=known[0] if known else None,
        beaten=tuple(one.name for one in known if one.verdict == "better"),
        ties=tuple(one.name for one in known if one.verdict != "better"),
        not_compared=tuple(row.name for row in others if against[row.setting] is None),
        comparisons=comparisons,
        effect=_largest(tested),
        effects_tested=len(tested),
        axes_tested=tuple(dict.fromkeys(effect.axis for effect in tested)),
    )


def _ranked(rows: Sequence[SettingRow], column: MetricColumn) -> list[SettingRow]:
    """Best mean first; of equal ones the table's order."""
    sign = -1 if column.higher_is_better else 1
    return sorted(rows, key=lambda row: sign * (row.cells[column.name].mean or 0.0))


def _equals(best: SettingRow, rows: Sequence[SettingRow], column: MetricColumn) -> int:
    """How many other settings have the very same mean."""
    return sum(row is not best and row.cells[column.name].mean == best.cells[column.name].mean for row in rows)


def _standing(row: SettingRow, column: MetricColumn) -> Standing:
    cell = row.cells[column.name]
    assert cell.mean is not None  # only rows with a score stand anywhere
    return Standing(
        name=row.name,
        setting=row.setting,
        mean=cell.mean,
        interval=cell.interval,
        seeds=len(cell.points),
        lost=row.trials - row.trials_completed,
    )


def _base_of(best: SettingRow, bases: Sequence[SettingRow]) -> SettingRow | None:
    """Of several untouched bases (other models, another quantization) the one most like the best setting."""
    shared = [sum(best.axes.get(key) == value for key, value in row.axes.items()) for row in bases]
    return bases[shared.index(max(shared))] if bases else None


def against_other(best: SettingRow, other: SettingRow, column: MetricColumn, comparisons: int) -> Against | None:
    """Two scored settings over the seeds that both have, as one of `comparisons`; None for fewer than three."""
    first, second = scores_by_seed(best.cells[column.name]), scores_by_seed(other.cells[column.name])
    return _judged(other, [first[seed] - second[seed] for seed in first if seed in second], column, comparisons)


def _against_base(best: SettingRow, base: SettingRow, column: MetricColumn, comparisons: int) -> Against | None:
    """The base has one score whatever the seed, so every seed of the best setting is compared with it."""
    value = base.cells[column.name].mean
    assert value is not None  # only scored bases come here
    return _judged(base, [point.value - value for point in best.cells[column.name].points], column, comparisons)


def _judged(other: SettingRow, differences: Sequence[float], column: MetricColumn, comparisons: int) -> Against | None:
    if len(differences) < SEEDS_FOR_INTERVAL:
        return None
    interval = t_interval(differences)
    verdict: Verdict = "open"
    if is_established(interval, comparisons):
        verdict = "better" if (interval.mean > 0) == column.higher_is_better else "worse"
    return Against(other.name, other.setting, interval, corrected_half_width(interval, comparisons), verdict)


def corrected_half_width(interval: Interval, comparisons: int) -> float:
    """Half width of the interval at confidence 1 - 0.05 / comparisons (Bonferroni), two-sided."""
    quantile = float(special.stdtrit(interval.n - 1, 1 - (1 - CONFIDENCE) / comparisons / 2))
    return quantile * interval.standard_error


def is_established(interval: Interval, comparisons: int) -> bool:
    """Whether the corrected interval does not hold 0."""
    return has_spread(interval) and abs(interval.mean) > corrected_half_width(interval, comparisons)


def _largest(tested: Sequence[Effect]) -> Effect | None:
    established = [
        (abs(effect.interval.mean), -order)
        for order, effect in enumerate(tested)
        if effect.interval is not None and is_established(effect.interval, len(tested))
    ]
    return tested[-max(established)[1]] if established else None
