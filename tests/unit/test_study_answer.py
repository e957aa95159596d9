"""The answer: which claims the numbers carry, with corrected comparisons against scipy and against chance."""

from __future__ import annotations

import json
import random

import pytest
from scipy import stats

from lora_lab.study.answer import answer_of, corrected_half_width
from lora_lab.study.effects import Effect
from lora_lab.study.interval import t_interval
from tests.unit.study_samples import ACCURACY, LOSS, base_row, row_of, table_of

GOOD, MIDDLE, BAD = [2.00, 2.10, 2.22], [2.50, 2.61, 2.70], [2.02, 2.05, 2.31]


def _effect(axis: str, differences: list[float], metric: str = LOSS.name) -> Effect:
    interval = t_interval(differences)
    return Effect(axis, 1, 2, metric, interval.mean, interval, dict(enumerate(differences)), 1, 0, (), False, None)


@pytest.mark.parametrize("comparisons", [1, 2, 5, 40])
def test_corrected_intervals_are_those_of_scipy_at_the_stricter_level(comparisons: int) -> None:
    a, b = [2.0, 2.3, 2.1, 2.6], [1.0, 1.9, 1.2, 1.3]
    bounds = stats.ttest_rel(a, b).confidence_interval(1 - 0.05 / comparisons)
    interval = t_interval([x - y for x, y in zip(a, b, strict=True)])
    half = corrected_half_width(interval, comparisons)
    assert (interval.mean - half, interval.mean + half) == pytest.approx((bounds.low, bounds.high), rel=1e-9)


def test_best_runner_up_ties_and_base() -> None:
    answer = answer_of(table_of(base_row(4.9), row_of("m", MIDDLE), row_of("g", GOOD), row_of("b", BAD)), [])
    assert answer.case == "compared" and answer.best is not None and answer.best.name == "g"
    assert answer.best.interval == t_interval(GOOD) and answer.best.seeds == 3
    assert answer.comparisons == 3, "two other settings and the base"
    assert answer.runner_up is not None and answer.runner_up.name == "b" and answer.runner_up.verdict == "open"
    assert answer.ties == ("b",) and answer.beaten == ("m",)
    assert answer.runner_up.difference.mean == pytest.approx(-0.02)
    assert answer.base is not None and answer.base.mean == 4.9
    assert answer.against_base is not None and answer.against_base.verdict == "better"
    json.dumps(answer.to_json(), allow_nan=False)


def test_the_direction_of_the_metric_decides() -> None:
    rows = [row_of(name, values, column=ACCURACY) for name, values in [("g", GOOD), ("m", MIDDLE)]]
    answer = answer_of(table_of(base_row(9.0, column=ACCURACY), *rows, column=ACCURACY), [])
    assert answer.best is not None and answer.best.name == "m" and answer.beaten == ("g",)
    assert answer.against_base is not None and answer.against_base.verdict == "worse"


def test_what_one_comparison_would_show_a_dozen_do_not() -> None:
    """Differences 0.1, 0.14, 0.12: t = 10.4 with 2 degrees of freedom, two-sided p = 0.009. Good enough for 5
    comparisons (0.05 / 5 = 0.01), not for 6 (0.0083)."""
    other = [value + shift for value, shift in zip(GOOD, (0.10, 0.14, 0.12), strict=True)]
    p = stats.ttest_rel(other, GOOD).pvalue
    assert 0.05 / 6 < p < 0.05 / 5
    for count, beaten in ((5, True), (6, False)):
        rest = [row_of(f"far{index}", [90.0 + index, 95.0, 99.0]) for index in range(count - 1)]
        answer = answer_of(table_of(row_of("g", GOOD), row_of("other", other), *rest), [])
        assert ("other" in answer.beaten) == beaten, count


def test_chance_alone_rarely_drops_the_truly_best_or_beats_the_base() -> None:
    """Ten settings that are all as good as the base: in at most 5 of 100 studies is a given one called beaten, or is
    the best called better than the base. Uncorrected it would be 9 and 15 of 100."""
    generator = random.Random(11)
    studies = 600
    dropped = better = 0
    for _ in range(studies):
        rows = [row_of(f"row{index}", [generator.gauss(0, 1) for _ in range(4)]) for index in range(10)]
        answer = answer_of(table_of(base_row(0.0), *rows), [])
        dropped += "row0" in answer.beaten
        better += answer.against_base is not None and answer.against_base.verdict == "better"
    assert dropped / studies < 0.05 and better / studies < 0.05


def test_a_difference_without_spread_proves_nothing() -> None:
    """Scores of 48 examples are multiples of 1/48; that three seeds gain one example each is no certainty. Neither is
    what rounding leaves of a spread."""
    a, b = [0.5, 25 / 48, 26 / 48], [25 / 48, 26 / 48, 27 / 48]
    rows = [row_of("a", a, column=ACCURACY), row_of("b", b, column=ACCURACY)]
    answer = answer_of(table_of(*rows, column=ACCURACY), [_effect("rank", [1 / 48, 1 / 48, 1 / 48], ACCURACY.name)])
    assert answer.ties == ("a",) and answer.effect is None and answer.effects_tested == 1


def test_equal_means_are_counted() -> None:
    rows = [row_of(name, [0.0, 0.0, 0.0], column=ACCURACY) for name in ("a", "b", "c")]
    answer = answer_of(table_of(*rows, column=ACCURACY), [])
    assert answer.best is not None and answer.best.name == "a" and answer.equals == 2 and answer.ties == ("b", "c")


def test_a_lucky_single_seed_is_not_the_best_and_is_not_hidden() -> None:
    lucky = row_of("lucky", [1.0], statuses={"COMPLETED": 1, "DIVERGED": 2})
    answer = answer_of(table_of(lucky, row_of("g", GOOD)), [])
    assert answer.best is not None and answer.best.name == "g" and answer.not_compared == ("lucky",)
    other_seeds = row_of("other", dict(zip((7, 8, 9), MIDDLE, strict=True)))
    assert answer_of(table_of(other_seeds, row_of("g", GOOD)), []).not_compared == ("other",)


def test_lost_runs_of_the_best_are_counted() -> None:
    answer = answer_of(table_of(row_of("g", GOOD, statuses={"COMPLETED": 3, "DIVERGED": 2})), [])
    assert answer.best is not None and answer.best.lost == 2 and answer.counts == {"COMPLETED": 3, "DIVERGED": 2}


def test_the_largest_established_effect_is_corrected_for_all_that_were_looked_at() -> None:
    strong, noisy = _effect("rank", [-0.40, -0.41, -0.42]), _effect("target", [-2.0, 0.5, -1.0])
    weak = _effect("alpha", [0.05, 0.051, 0.052])
    elsewhere = _effect("dropout", [9.0, 9.1, 9.2], metric="skills/acc")
    table = table_of(row_of("g", GOOD), row_of("m", MIDDLE))
    answer = answer_of(table, [noisy, weak, strong, elsewhere])
    assert answer.effect == strong and answer.effects_tested == 3
    assert answer.axes_tested == ("target", "alpha", "rank")
    assert answer_of(table, [noisy]).effect is None
    clear = _effect("rank", [0.10, 0.14, 0.12])  # two-sided p = 0.009, as above
    assert answer_of(table, [clear, *[noisy] * 4]).effect == clear
    assert answer_of(table, [clear, *[noisy] * 5]).effect is None


def test_the_base_is_the_one_that_shares_most_with_the_best() -> None:
    bases = [
        base_row(4.0, setting="1" * 64, axes={"method.kind": "base", "quantization.kind": "nf4"}),
        base_row(5.0, setting="2" * 64, axes={"method.kind": "base", "quantization.kind": "none"}),
    ]
    best = row_of("g", GOOD, axes={"method.kind": "lora", "quantization.kind": "none"})
    answer = answer_of(table_of(*bases, best), [])
    assert answer.base is not None and answer.base.mean == 5.0


@pytest.mark.parametrize(
    ("table", "case"),
    [
        (table_of(column=None), "nothing_ended"),
        (table_of(row_of("a", [], statuses={"RUNNING": 2}), column=None), "nothing_ended"),
        (table_of(column=None, problems=["trial.json: damaged"]), "none_completed"),
        (table_of(base_row(4.9)), "only_base"),
        (table_of(base_row(4.9), row_of("a", [], statuses={"RUNNING": 1})), "only_base"),
        (table_of(base_row(None, statuses={"FAILED": 1}), column=None), "none_completed"),
        (table_of(base_row(4.9), row_of("a", [], statuses={"FAILED": 2, "DIVERGED": 1})), "none_completed"),
        (table_of(base_row(4.9), row_of("a", [], statuses={"COMPLETED": 1})), "no_score"),
        (table_of(row_of("a", [], statuses={"COMPLETED": 1}), column=None), "no_score"),
        (table_of(base_row(4.9), row_of("a", [2.0, 2.1])), "few_seeds"),
        (table_of(row_of("a", GOOD)), "compared"),
    ],
)
def test_the_cases(table: object, case: str) -> None:
    assert answer_of(table, []).case == case  # type: ignore[arg-type]


def test_a_shared_lead_is_told_with_few_seeds_too() -> None:
    table = table_of(row_of("a", [2.0]), row_of("b", [2.0]), row_of("c", [3.0]))
    answer = answer_of(table, ())
    assert (answer.case, answer.equals) == ("few_seeds", 1)
