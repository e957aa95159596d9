"""The points of a study's stages: which runs are made, with which rate, in which order."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from lora_lab.errors import InputError
from lora_lab.plan.stages import (
    arm_setting,
    judged_points,
    pick_rates,
    planned_points,
    setting_key,
    timing_points,
    tuning_points,
)
from lora_lab.schema.study import Study, study_from

CONTENT: dict[str, Any] = {
    "question": "Does the rank matter?",
    "base": {"training.max_steps": 12},
    "seeds": [0, 1, 2],
    "grids": [
        {"rank": [2, 8], "target": ["qv"], "learning_rate": [2e-3, "tuned"]},
        {"rank": [8], "target": ["mlp"], "learning_rate": ["tuned"]},
    ],
    "arms": {"small": {"rank": 2}, "large": {"rank": 8, "target": "qv"}, "mlp": {"target": "mlp"}},
    "tuning": {
        "metric": "heldout/loss",
        "seeds": [100, 101],
        "base": {"data.heldout_seed": 12},
        "rates": [{"when": {"rank": 2}, "values": [1e-3, 2e-3, 4e-3]}, {"values": [2e-3, 4e-3, 8e-3]}],
    },
    "timing": {"arms": ["small", "large"], "repeats": 4, "base": {"training.max_steps": 3}},
}


def study(**changes: Any) -> Study:
    """The study above, with other values for some keys."""
    return study_from({**CONTENT, **changes}, name="ranks")


def key(rank: int, target: str) -> Any:
    """The tuned setting of this rank and target."""
    values = {"training.max_steps": 12, "rank": rank, "target": target, "learning_rate": "tuned"}
    return setting_key(values)


def test_every_tuned_setting_is_tried_with_each_rate_and_tuning_seed() -> None:
    points = tuning_points(study())
    assert len(points) == 3 * 3 * 2
    tried = Counter((point.trial["rank"], point.trial["target"], point.trial["learning_rate"]) for point in points)
    assert set(tried.values()) == {2}
    assert {rate for rank, _, rate in tried if rank == 2} == {1e-3, 2e-3, 4e-3}
    assert {rate for rank, _, rate in tried if rank == 8} == {2e-3, 4e-3, 8e-3}
    for point in points:
        assert point.values["learning_rate"] == "tuned" and point.rate == point.trial["learning_rate"]
        assert point.trial["data.heldout_seed"] == 12 and "data.heldout_seed" not in point.values
        assert point.trial["seed"] in (100, 101)


def test_a_setting_without_a_grid_of_rates_is_refused() -> None:
    tuning = {**CONTENT["tuning"], "rates": [{"when": {"rank": 2}, "values": [1e-3, 2e-3, 4e-3]}]}
    with pytest.raises(InputError, match=r"no entry fits .*rank=8"):
        tuning_points(study(tuning=tuning))


def test_the_best_mean_is_picked_and_the_edge_is_told() -> None:
    scores: dict[Any, Any] = {
        (key(2, "qv"), 1e-3): [3.0, 1.0],
        (key(2, "qv"), 2e-3): [1.0, 3.0],  # the same mean: the lower rate
        (key(2, "qv"), 4e-3): [5.0, 0.0],
        (key(8, "qv"), 2e-3): [4.0, 4.0],
        (key(8, "qv"), 4e-3): [0.5, None],  # one seed diverged: no mean, however good the other
        (key(8, "qv"), 8e-3): [3.0, 3.0],
        (key(8, "mlp"), 2e-3): [4.0, 4.0],
        (key(8, "mlp"), 4e-3): [1.0, 1.0],
        (key(8, "mlp"), 8e-3): [3.0, 3.0],
    }
    small, large, mlp = pick_rates(study(), scores, higher_is_better=False)
    assert (small.rate, small.edge) == (1e-3, "lowest")
    assert (large.rate, large.edge) == (8e-3, "highest")
    assert large.tried == ((2e-3, 4.0), (4e-3, None), (8e-3, 3.0))
    assert (mlp.rate, mlp.edge) == (4e-3, None)


def test_of_a_metric_that_should_be_high_the_highest_is_picked() -> None:
    scores: dict[Any, Any] = {
        (key(2, "qv"), rate): [value] * 2 for rate, value in ((1e-3, 0.1), (2e-3, 0.9), (4e-3, 0.9))
    }
    small, *others = pick_rates(study(), scores, higher_is_better=True)
    assert (small.rate, small.edge) == (2e-3, None)
    assert [one.rate for one in others] == [None, None], "nothing was scored"


def test_a_rate_with_fewer_seeds_than_asked_for_is_not_picked() -> None:
    scores: dict[Any, Any] = {(key(2, "qv"), 1e-3): [0.1], (key(2, "qv"), 2e-3): [5.0, 5.0]}
    assert pick_rates(study(), scores, higher_is_better=False)[0].rate == 2e-3


def test_judged_points_take_the_picked_rate_and_leave_out_what_has_none() -> None:
    points = judged_points(study(), {key(2, "qv"): 4e-3})
    tuned = [point for point in points if point.values["learning_rate"] == "tuned"]
    assert [(point.trial["learning_rate"], point.trial["seed"]) for point in tuned] == [
        (4e-3, seed) for seed in (0, 1, 2)
    ]
    assert all(point.rate == 4e-3 for point in tuned)
    fixed = [point for point in points if point not in tuned]
    assert len(fixed) == 6 and all(point.rate is None and point.trial == point.values for point in fixed)
    later = judged_points(study(), {key(2, "qv"): 4e-3}, seeds=(7, 8))
    assert sorted({point.trial["seed"] for point in later}) == [7, 8] and len(later) == 6


def test_the_clock_sees_every_arm_in_every_repeat_in_an_order_that_is_shuffled_and_always_the_same() -> None:
    points = timing_points(study(), {})
    assert points == timing_points(study(), {})
    rounds = [[point.trial["rank"] for point in points if point.repeat == repeat] for repeat in range(4)]
    assert all(sorted(one) == [2, 8] for one in rounds) and len({tuple(one) for one in rounds}) == 2
    assert [point.repeat for point in points] == sorted(point.repeat for point in points)
    assert {point.trial["training.max_steps"] for point in points} == {3}
    assert {point.trial["seed"] for point in points} == {0}
    assert {point.values["learning_rate"] for point in points} == {2e-3}, "the fixed rate, where there is one"
    assert [point.repeat for point in timing_points(study(), {}, first_repeat=4)] == [one.repeat + 4 for one in points]


def test_a_tuned_arm_waits_for_its_rate_before_it_is_timed() -> None:
    timing = {**CONTENT["timing"], "arms": ["small", "mlp"]}
    assert timing_points(study(timing=timing), {}) == []
    points = timing_points(study(timing=timing), {key(8, "mlp"): 8e-3})
    assert {point.trial["learning_rate"] for point in points if point.values["target"] == "mlp"} == {8e-3}


def test_an_arm_is_one_setting() -> None:
    assert arm_setting(study(), "large", where="claims")["learning_rate"] == 2e-3
    with pytest.raises(InputError, match=r"rank=8 picks|target=qv picks 2 settings \(rank=2; rank=8\)"):
        arm_setting(study(arms={"wide": {"target": "qv"}}, timing=None), "wide", where="claims")
    with pytest.raises(InputError, match="no setting of the grids has rank=3"):
        arm_setting(study(arms={"three": {"rank": 3}}, timing=None), "three", where="claims")
    with pytest.raises(InputError, match='no arm "larg"; did you mean "large"'):
        arm_setting(study(), "larg", where="claims")


def test_what_is_only_planned_needs_no_picked_rate() -> None:
    (point,) = planned_points(study(), ["mlp", "mlp"])
    assert (
        point.stage == "planned" and point.trial["learning_rate"] == 2e-3 and point.values["learning_rate"] == "tuned"
    )


def test_a_setting_is_the_same_after_json() -> None:
    assert setting_key({"a": (1, 2), "seed": 3}) == setting_key({"seed": 4, "a": [1, 2]})
