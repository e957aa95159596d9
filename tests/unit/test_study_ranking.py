"""Ranks, worked by hand: which rate stands for a contender, who shares a rank, and what has none."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from lora_lab.record.result import Metric, Status
from lora_lab.record.run_record import RunRecord
from lora_lab.study.answer import answer_of
from lora_lab.study.ranking import Contender, Ranking, ranking_of
from lora_lab.study.table import settings_table
from tests.unit.ledger_samples import trial_of
from tests.unit.study_samples import record_of

LOSS = "heldout/loss"
ALONE = {"executed": "alone"}


def runs(
    scores: Sequence[float], *, diverged: int = 0, facts: Any = ALONE, costs: Any = (), **trial: Any
) -> list[RunRecord]:
    """Seeds 0, 1, ... of one setting; the last `diverged` have no score. costs: measurements of each."""
    found = []
    for seed in range(len(scores) + diverged):
        is_scored = seed < len(scores)
        found.append(
            record_of(
                trial_of(seed=seed, **trial),
                scores={LOSS: scores[seed]} if is_scored else None,
                status=Status.COMPLETED if is_scored else Status.DIVERGED,
                facts=facts,
                measurements=costs[seed] if costs and is_scored else {},
            )
        )
    return found


def rated(rates: dict[float, Sequence[float]], **trial: Any) -> list[RunRecord]:
    """One contender with these scores by learning rate."""
    return [record for rate, scores in rates.items() for record in runs(scores, learning_rate=rate, **trial)]


def ranked(records: Sequence[RunRecord]) -> Ranking:
    """By the only metric."""
    ranking = ranking_of(records, settings_table(records, metrics=[LOSS]))
    json.dumps(ranking.to_json(), allow_nan=False)
    return ranking


def only(records: Sequence[RunRecord]) -> Contender:
    (one,) = ranked(records).contenders
    return one


def test_the_best_mean_stands_for_the_contender_not_the_best_seed() -> None:
    # means 3, 2, 2.5; the single lowest loss is of the last rate
    one = only(rated({1e-3: [3, 3, 3], 1e-2: [2.1, 2.0, 1.9], 1e-1: [1.0, 3.0, 3.5]}))
    assert (one.rate, one.rates, one.is_at_edge) == (1e-2, (1e-3, 1e-2, 1e-1), False)
    assert (one.score.mean, one.score_rank, one.stand) == (pytest.approx(2.0), 1, "first")
    # s = 0.1, t(2) = 4.3027: 4.3027 * 0.1 / sqrt(3)
    assert one.score.interval is not None and one.score.interval.half_width == pytest.approx(0.24841, abs=1e-5)


@pytest.mark.parametrize(("best", "is_at_edge"), [(1e-3, True), (1e-2, False), (1e-1, True)])
def test_the_edge_of_the_grid(best: float, is_at_edge: bool) -> None:
    # asked for in no order; what counts is the size
    one = only(rated({rate: [1.0 if rate == best else 2.0] * 3 for rate in (1e-2, 1e-1, 1e-3)}))
    assert (one.rate, one.is_at_edge) == (best, is_at_edge)


def test_a_single_rate_has_no_edge() -> None:
    ranking = ranked(rated({1e-3: [2, 2, 2]}))
    assert not ranking.contenders[0].is_at_edge and not ranking.sweeps_rates


def test_a_rate_that_lost_a_seed_does_not_stand_for_the_contender() -> None:
    whole = runs([2.0, 2.0, 2.0], learning_rate=1e-2)
    fewer = runs([1.0, 1.0], learning_rate=1e-1)
    assert only([*whole, *fewer]).rate == 1e-2
    assert only([*whole, *runs([1.0, 1.0, 1.0], learning_rate=1e-1)]).rate == 1e-1


def test_a_diverged_rate_never_wins_and_is_still_an_edge_that_was_tried() -> None:
    calm = runs([2.0, 2.0, 2.0], learning_rate=1e-2)
    wild = runs([1.0, 1.0, 1.0], diverged=1, learning_rate=1e-1)
    one = only([*runs([3.0, 3.0, 3.0], learning_rate=1e-3), *calm, *wild])
    assert (one.rate, one.rates, one.is_at_edge) == (1e-2, (1e-3, 1e-2, 1e-1), False)


def test_where_every_rate_diverged_nothing_stands() -> None:
    wild = [record for rate in (1e-2, 1e-1) for record in runs([1.0, 1.0, 1.0], diverged=1, learning_rate=rate)]
    other = runs([5.0, 5.1, 5.2], rank=4)
    first, last = ranked([*wild, *other]).contenders
    assert (first.score.mean, first.score_rank) == (pytest.approx(5.1), 1)
    assert last.rate is None and last.score_rank is None and last.memory_rank is None
    assert last.unranked == "no rate without a diverged run has a score"


def test_settings_that_differ_in_more_than_the_rate_are_contenders_of_their_own() -> None:
    scores = {1e-3: [2.0, 2.1, 2.2], 1e-2: [3.0, 3.1, 3.2]}
    ranking = ranked([*rated(scores, rank=4), *rated(scores, rank=8)])
    assert [one.rates for one in ranking.contenders] == [(1e-3, 1e-2)] * 2
    assert len({one.name for one in ranking.contenders}) == 2
    texts = [replace_identity(record, "other") for record in runs([2.5, 2.5, 2.5], learning_rate=1e-1, rank=4)]
    assert len(ranked([*rated(scores, rank=4), *texts]).contenders) == 2, "other data is another contender"


def replace_identity(record: RunRecord, data: str) -> RunRecord:
    """The same trial on other data."""
    assert record.header is not None
    scores = {name: metric.value for name, metric in record.result.metrics.items()} if record.result else None
    return record_of(record.header.trial, scores=scores, identities={"data": data})


def test_equal_means_share_a_rank_and_the_next_is_left_out() -> None:
    records = [*runs([2, 2, 2], rank=2), *runs([1, 1, 1], rank=4), *runs([2, 2, 2], rank=8), *runs([3, 3, 3], rank=16)]
    assert [one.score_rank for one in ranked(records).contenders] == [1, 2, 2, 4]


def test_higher_scores_first_where_higher_is_better() -> None:
    records = []
    for rank, values in {2: (0.1, 0.2, 0.3), 4: (0.7, 0.8, 0.9)}.items():
        for record in runs(values, rank=rank):
            assert record.result is not None
            metric = Metric(
                value=record.result.metrics[LOSS].value, unit="fraction", higher_is_better=True,
                standard_error=None, num_examples=10,
            )  # fmt: skip
            records.append(replace(record, result=record.result.model_copy(update={"metrics": {LOSS: metric}})))
    means = [one.score.mean for one in ranked(records).contenders]
    assert means == [pytest.approx(0.8), pytest.approx(0.2)]


def test_against_the_first_every_rate_is_a_comparison() -> None:
    """Three settings and a base: three comparisons, each at 1 - 0.05 / 3; t(2) there is 7.6488."""
    first = rated({1e-3: [2.0, 2.1, 2.2], 1e-2: [2.5, 2.6, 2.7]}, rank=4)
    behind = [2.0 + 0.9, 2.1 + 1.0, 2.2 + 1.1]
    base = [record_of(trial_of(method={"kind": "base"}), scores={LOSS: 5.0})]
    ranking = ranked([*base, *first, *runs(behind, rank=8)])
    best, other, last = ranking.contenders
    assert ranking.comparisons == 3 and other.against_first is not None
    # differences -0.9, -1.0, -1.1: s = 0.1, standard error 0.057735
    assert other.against_first.difference.mean == pytest.approx(-1.0)
    assert other.against_first.half_width == pytest.approx(7.6488 * 0.057735, abs=1e-4)
    assert (best.stand, other.stand, last.is_base, last.score_rank) == ("first", "behind", True, None)


def test_what_cannot_be_told_apart_is_what_the_answer_says() -> None:
    records = [
        *runs([2.0, 2.1, 2.2], rank=2),
        *runs([2.2, 2.1, 2.3], rank=4),
        *runs([3.0, 3.11, 3.2], rank=8),
        *runs([3.0, 3.1], rank=16),
    ]
    table = settings_table(records, metrics=[LOSS])
    answer, stands = answer_of(table, ()), {one.name: one.stand for one in ranking_of(records, table).contenders}
    assert ranking_of(records, table).comparisons == answer.comparisons == 3
    assert {name for name, stand in stands.items() if stand == "open"} == set(answer.ties) == {"lora-r4"}
    assert {name for name, stand in stands.items() if stand == "behind"} == set(answer.beaten) == {"lora-r8"}


def test_few_seeds_are_not_ranked_beside_others_that_have_three() -> None:
    lucky, whole = runs([0.5, 0.5], rank=2), runs([2.0, 2.1, 2.2], rank=4)
    first, last = ranked([*lucky, *whole]).contenders
    assert (first.score.mean, first.score_rank) == (pytest.approx(2.1), 1)
    assert (last.score_rank, last.unranked) == (None, "fewer than 3 seeds")
    one, two = ranked([*lucky, *runs([0.7], rank=4)]).contenders
    assert (one.score_rank, two.score_rank, two.stand) == (1, 2, "not_compared")


def costs_of(peaks: Sequence[int], seconds: Sequence[float]) -> list[dict[str, float]]:
    return [{"peak_allocated_bytes": p, "train_seconds": s} for p, s in zip(peaks, seconds, strict=True)]


def test_ranks_by_memory_and_time() -> None:
    records = [
        *runs([1, 1, 1], rank=2, costs=costs_of([100, 300, 200], [4.0, 5.0, 6.0])),
        *runs([2, 2, 2], rank=4, costs=costs_of([300, 300, 300], [1.0, 2.0, 3.0])),
        *runs([3, 3, 3], rank=8, costs=costs_of([250, 250, 250], [9.0, 9.0, 9.0])),
    ]
    first, second, third = ranked(records).contenders
    assert [one.memory for one in (first, second, third)] == [(100, 300), (300, 300), (250, 250)]
    assert [one.memory_rank for one in (first, second, third)] == [2, 2, 1]
    assert [one.time.mean for one in (first, second, third)] == [5.0, 2.0, 9.0]
    assert [one.time_rank for one in (first, second, third)] == [2, 1, 3]
    # s = 1: 4.3027 / sqrt(3)
    assert first.time.interval is not None and first.time.interval.half_width == pytest.approx(2.4841, abs=1e-4)


def test_costs_are_of_the_rate_that_stands_for_the_contender() -> None:
    slow = runs([1, 1, 1], learning_rate=1e-3, costs=costs_of([500] * 3, [5.0] * 3))
    fast = runs([2, 2, 2], learning_rate=1e-2, costs=costs_of([100] * 3, [1.0] * 3))
    one = only([*fast, *slow])
    assert (one.memory, one.time.mean) == ((500, 500), 5.0)


def test_a_time_of_shared_machines_or_of_several_is_absent_with_the_reason() -> None:
    shared = runs([1, 1, 1], rank=2, facts={"executed": "shared"}, costs=costs_of([1] * 3, [1.0] * 3))
    alone = runs([2, 2, 2], rank=4, costs=costs_of([1] * 3, [2.0] * 3))
    first, second = ranked([*shared, *alone]).contenders
    assert (first.time.mean, first.time_rank, first.time.missing) == (None, None, "no run was executed alone")
    assert (second.time.mean, second.time_rank) == (2.0, 1)
    mixed = only([on_machine(alone[0], "m2"), *alone[1:]])
    assert (mixed.time.mean, mixed.time.missing) == (None, "the runs come from 2 different machines")


def on_machine(record: RunRecord, machine: str) -> RunRecord:
    assert record.header is not None
    return replace(record, header=record.header.model_copy(update={"machine_id": machine}))


def test_times_of_different_machines_are_shown_and_not_ranked() -> None:
    here = runs([1, 1, 1], rank=2, costs=costs_of([1] * 3, [1.0] * 3))
    there = [on_machine(one, "m2") for one in runs([2, 2, 2], rank=4, costs=costs_of([1] * 3, [2.0] * 3))]
    ranking = ranked([*here, *there])
    assert ranking.machines == 2
    assert [(one.time.mean, one.time_rank, one.memory_rank) for one in ranking.contenders] == [
        (1.0, None, 1),
        (2.0, None, 1),
    ]


def test_before_anything_has_a_score() -> None:
    ranking = ranking_of([], settings_table([], metrics=None))
    assert ranking.metric is None and not ranking.contenders
    wild = runs([], diverged=2)
    one = ranking_of(wild, settings_table(wild, metrics=None)).contenders[0]
    assert (one.score_rank, one.unranked, one.runs, one.completed) == (None, "no score", 2, 0)


def test_a_cohorts_memory_and_time_are_no_contenders() -> None:
    """rank 4: in a cohort on CUDA, where a peak that stands there all the same is the cohort's; rank 8: its peak was
    counted on a step made alone; rank 2: alone."""
    costs = [{"peak_allocated_bytes": 10 * seed + 10, "train_seconds": 1.0 + seed} for seed in range(3)]
    together = {"executed": "cohort", "cohort": {"id": "c", "seats": 2, "members": ["a", "b"]}}
    found = {
        one.name: one
        for one in ranked(
            [
                *runs([2.0, 2.1, 2.2], rank=4, costs=costs, facts=together),
                *runs([2.0, 2.1, 2.3], rank=8, costs=costs, facts={**together, "probe": "alone"}),
                *runs([2.0, 2.1, 2.4], rank=2, costs=costs),
            ]
        ).contenders
    }
    assert found["lora-r4"].memory is None and found["lora-r4"].memory_rank is None
    assert found["lora-r4"].memory_missing == "no run was executed alone (3 of 3 trained in cohorts)"
    assert found["lora-r8"].memory == found["lora-r2"].memory == (10, 30) and found["lora-r8"].memory_rank == 1
    assert [found[name].time_rank for name in ("lora-r4", "lora-r8", "lora-r2")] == [None, None, 1]
    assert found["lora-r8"].time.missing == "no run was executed alone (3 of 3 trained in cohorts)"
