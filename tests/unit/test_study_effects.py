"""Effects of axes: paired by seed, over the same pairs of settings for every seed, against scipy's paired t test."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import pytest
from scipy import stats

from lora_lab.errors import InputError
from lora_lab.record.result import Status
from lora_lab.record.run_record import RunRecord
from lora_lab.study.axes import swept_axes
from lora_lab.study.effects import Effect, effects_of, scores_by_seed
from lora_lab.study.table import settings_table
from tests.unit.ledger_samples import trial_of
from tests.unit.study_samples import record_of

LOSS = "heldout/loss"


def _runs(score: Callable[..., float], points: list[dict[str, Any]], seeds: int = 3) -> list[RunRecord]:
    return [
        record_of(trial_of(seed=seed, **point), scores={LOSS: score(seed=seed, **point)})
        for point in points
        for seed in range(seeds)
    ]


def _effects(records: list[RunRecord]) -> list[Effect]:
    return list(effects_of(settings_table(records, metrics=None), swept_axes(records), LOSS))


def _noisy(generator: random.Random) -> Callable[..., float]:
    shift = {seed: generator.gauss(0, 1) for seed in range(10)}
    return lambda *, seed, rank, **_: 3 - 0.01 * rank + shift[seed] + generator.gauss(0, 0.1)


def test_one_pair_of_settings_is_the_paired_t_test() -> None:
    generator = random.Random(3)
    records = _runs(_noisy(generator), [{"rank": 2}, {"rank": 8}], seeds=5)
    (effect,) = _effects(records)
    low, high = (
        [r.result.metrics[LOSS].value for r in records if r.trial["rank"] == rank and r.result] for rank in (2, 8)
    )
    expected = stats.ttest_rel(high, low)
    bounds = expected.confidence_interval(0.95)
    assert effect.interval is not None
    assert (effect.interval.low, effect.interval.high) == pytest.approx((bounds.low, bounds.high), rel=1e-9)
    unpaired = stats.ttest_ind(high, low).confidence_interval(0.95)
    assert effect.interval.high - effect.interval.low < (unpaired.high - unpaired.low) / 3, "the seed's share drops out"
    assert (effect.axis, effect.low, effect.high, effect.seeds, effect.pairs) == ("rank", 2, 8, 5, 1)


def test_several_pairs_are_averaged_within_a_seed_before_the_interval() -> None:
    """By hand. Losses at (rank, rate), seeds 0 1 2; differences of rank 8 - 2: at rate 0.1: -1, -2, -3; at 0.2: -3, -2,
    -4. Per seed: -2, -2, -3.5; mean -2.5, s = sqrt(0.75), half width 4.302653 sqrt(0.75 / 3)."""
    losses = {(2, 0.1): (5, 5, 5), (8, 0.1): (4, 3, 2), (2, 0.2): (6, 6, 7), (8, 0.2): (3, 4, 3)}
    points = [{"rank": rank, "learning_rate": rate} for rank, rate in losses]
    records = _runs(lambda *, seed, rank, learning_rate: losses[rank, learning_rate][seed], points)
    rank, rate = sorted(_effects(records), key=lambda effect: effect.axis, reverse=True)
    assert rank.per_seed == {0: -2.0, 1: -2.0, 2: -3.5} and rank.pairs == 2 and rank.left_out == 0
    assert rank.difference == -2.5 and rank.interval is not None
    assert rank.interval.half_width == pytest.approx(4.302653 * 0.5, abs=1e-5)
    assert rate.axis == "learning_rate" and rate.per_seed == {0: 0.0, 1: 1.0, 2: 1.5}


def test_every_seed_averages_the_same_pairs() -> None:
    """Rate 0.2 lacks seed 2 at rank 8: its pair would shift seeds 0 and 1 against seed 2, so it is left out."""
    points = [{"rank": rank, "learning_rate": rate} for rank in (2, 8) for rate in (0.1, 0.2)]
    records = _runs(lambda *, seed, rank, learning_rate: seed + rank * learning_rate, points)
    lost = next(r for r in records if r.trial["rank"] == 8 and r.trial["learning_rate"] == 0.2 and r.trial["seed"] == 2)
    records[records.index(lost)] = record_of(lost.trial, status=Status.DIVERGED)
    rank = next(effect for effect in _effects(records) if effect.axis == "rank")
    assert rank.pairs == 1 and rank.left_out == 1
    assert list(rank.per_seed.values()) == pytest.approx([0.6, 0.6, 0.6])


def test_numbers_are_sorted_and_have_a_whole_range() -> None:
    records = _runs(lambda *, seed, rank: {2: 3.0, 8: 2.5, 32: 2.4}[rank] + seed, [{"rank": r} for r in (32, 2, 8)])
    told = [(e.low, e.high, e.is_whole_range, round(e.difference or 0, 6)) for e in _effects(records)]
    assert told == [(2, 8, False, -0.5), (8, 32, False, -0.1), (2, 32, True, -0.6)]


def test_words_keep_their_order_and_have_no_range() -> None:
    kinds = [{"method": {"kind": kind}} for kind in ("rslora", "lora", "dora")]
    effects = _effects(_runs(lambda *, seed, method: len(method["kind"]) + seed, kinds))
    assert [(e.low, e.high) for e in effects] == [("rslora", "lora"), ("lora", "dora")]


def test_values_are_neighbours_only_where_they_can_be_compared() -> None:
    """Full fine-tuning has rates of its own: 2e-5 and 1e-4 stand in no row with the adapters' 1e-3 and 1e-2."""
    points = [{"learning_rate": rate, "method": {"kind": "lora"}} for rate in (1e-3, 1e-2)]
    points += [{"learning_rate": rate, "method": {"kind": "full"}} for rate in (1e-4, 2e-5)]
    effects = _effects(_runs(lambda *, seed, learning_rate, method: learning_rate + seed, points))
    rates = [(e.low, e.high) for e in effects if e.axis == "learning_rate"]
    assert sorted(rates) == [(2e-5, 1e-4), (1e-3, 1e-2)]
    (method,) = (e for e in effects if e.axis == "method")
    assert (method.low, method.high, method.missing) == ("lora", "full", "no two settings differ in method alone")


def test_a_value_that_stands_alone_is_listed_with_the_reason() -> None:
    points: list[dict[str, Any]] = [{"method": {"kind": "lora"}}, {"method": {"kind": "dora"}}]
    points += [{"method": {"kind": "full"}, "learning_rate": rate} for rate in (1e-5, 1e-4)]
    effects = _effects(_runs(lambda *, seed, method, learning_rate=0.0: float(seed), points))
    full = next(e for e in effects if e.high == "full")
    assert full.difference is None and full.missing == "no two settings differ in method alone" and full.seeds == 0
    assert len(effects) == len({(e.axis, e.low, e.high) for e in effects})


def test_two_seeds_have_points_and_no_interval_and_no_scores_have_a_reason() -> None:
    (effect,) = _effects(_runs(lambda *, seed, rank: rank * (seed + 1), [{"rank": 1}, {"rank": 2}], seeds=2))
    assert effect.interval is None and effect.per_seed == {0: 1.0, 1: 2.0} and effect.difference == 1.5
    records = [
        record_of(trial_of(rank=2, seed=0), scores={LOSS: 1.0}),
        record_of(trial_of(rank=8, seed=1), scores={LOSS: 1.0}),
    ]
    (effect,) = _effects(records)
    assert effect.difference is None and effect.missing == "no seed has a score on both sides"
    json.dumps(effect.to_json(), allow_nan=False)


def test_runs_that_share_a_seed_within_a_setting_are_not_paired() -> None:
    seeds = [{"data": seed, "init": 0, "dropout": 0, "layers": 0} for seed in range(3)]
    records = [record_of(trial_of(seed=0, seeds=own), scores={LOSS: 1.0 * own["data"]}) for own in seeds]
    (row,) = settings_table(records, metrics=None).rows
    assert len(row.cells[LOSS].points) == 3 and scores_by_seed(row.cells[LOSS]) == {}


def test_what_moves_along_is_named_and_bases_are_no_side() -> None:
    records = _runs(lambda *, seed, rank, alpha: rank + seed, [{"rank": r, "alpha": 2.0 * r} for r in (2, 8)])
    records.append(record_of(trial_of(method={"kind": "base"}, rank=4), scores={LOSS: 9.0}))
    (effect,) = _effects(records)
    assert (effect.axis, effect.along, effect.difference) == ("rank", ("alpha",), 6.0)


def test_clear_is_what_does_not_hold_zero_and_has_a_spread() -> None:
    def clear(differences: list[float]) -> bool:
        score = {2: lambda seed: 0.1 * seed, 8: lambda seed: 0.1 * seed + differences[seed]}
        (effect,) = _effects(_runs(lambda *, seed, rank: score[rank](seed), [{"rank": 2}, {"rank": 8}]))
        return effect.is_clear

    assert clear([0.50, 0.51, 0.52]) and clear([-0.50, -0.51, -0.52])
    assert not clear([0.5, -0.1, 0.2]), "the interval holds 0"
    assert not clear([1 / 48] * 3), "equal but for rounding"
    assert not clear([0.0] * 3)


def test_an_unknown_metric_is_refused_with_the_nearest() -> None:
    records = _runs(lambda *, seed, rank: 1.0, [{"rank": 2}])
    with pytest.raises(InputError, match='"heldout/los"; did you mean "heldout/loss"'):
        effects_of(settings_table(records, metrics=None), swept_axes(records), "heldout/los")
