"""Early stopping: the points, both rules on examples worked out by hand, and what holds for every search."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lora_lab.plan.stopping import (
    History,
    Stop,
    comparable_key,
    decide,
    evaluation_points,
    stopping_problems,
    was_stopped_by,
)
from lora_lab.schema.stopping import Stopping
from tests.conftest import MakeTrial

End = Literal["stopped", "diverged"] | None


def rule(name: str, **settings: int) -> Stopping:
    """A rule; `settings` are of its own section."""
    sections: dict[str, dict[str, int]] = {
        "median": {"points": 4, "warmup_points": 0, "minimum_runs": 3},
        "halving": {"points": 2, "reduction": 3},
    }
    if name in sections:
        sections[name] |= settings
    return Stopping.model_validate({"rule": name, **sections})


MEDIAN, HALVING, OFF = rule("median"), rule("halving"), rule("off")


def run(
    stopping: Stopping, name: str, losses: Sequence[float], *, total: int = 45, end: End = None, setting: str = ""
) -> History:
    """A run that has come through as many points as there are losses."""
    steps = evaluation_points(stopping, total)
    return History(name, setting or name, total, dict(zip(steps, losses, strict=False)), end)


def judged(stopping: Stopping, own: History, others: Sequence[History]) -> Stop | None:
    """The decision at the last point that the run has come to."""
    return decide(stopping, max(own.losses), own, others)


# Points.


def test_points_by_hand() -> None:
    assert evaluation_points(MEDIAN, 40) == (8, 16, 24, 32)
    assert evaluation_points(MEDIAN, 11) == (3, 5, 7, 9), "11 fifths are 2.2: no point comes before its share"
    assert evaluation_points(rule("median", points=1), 2) == (1,)
    assert evaluation_points(rule("halving", points=3), 81) == (3, 9, 27)
    assert evaluation_points(HALVING, 40) == (5, 14)
    assert evaluation_points(OFF, 40) == ()


@given(st.sampled_from(["median", "halving"]), st.integers(1, 6), st.integers(2, 4), st.integers(1, 5000))
def test_points_are_all_there_and_before_the_last_step_or_none_is(
    name: str, points: int, reduction: int, total: int
) -> None:
    stopping = rule(name, points=points, **({"reduction": reduction} if name == "halving" else {}))
    steps = evaluation_points(stopping, total)
    shares = (
        [part / (points + 1) for part in range(1, points + 1)]
        if name == "median"
        else [reduction**-power for power in range(points, 0, -1)]
    )
    if total * min(shares) < 1 - 1e-9:
        assert steps == ()
        return
    assert len(steps) == points and list(steps) == sorted(set(steps)) and steps[0] >= 1 and steps[-1] < total
    assert all(-1e-9 <= step - share * total < 1 for step, share in zip(steps, shares, strict=True))


# The median rule.

# Running averages at the second point: 2.25, 2.5 and 3.5.
THREE = [run(MEDIAN, "a", [2.5, 2.0]), run(MEDIAN, "b", [3.0, 2.0]), run(MEDIAN, "c", [4.0, 3.0])]


def test_median_by_hand() -> None:
    stop = judged(MEDIAN, run(MEDIAN, "own", [3.4, 2.75]), THREE)
    assert stop is not None and (stop.point, stop.step, stop.loss) == (2, 18, 2.75)
    assert stop.reason == (
        "best held-out loss so far 2.75 is above 2.5, the median of the running averages of 3 runs of other settings, "
        "at step 18 of 45 (point 2 of 4)"
    )
    assert judged(MEDIAN, run(MEDIAN, "own", [3.4, 2.5]), THREE) is None, "a tie ends nobody"
    assert judged(MEDIAN, run(MEDIAN, "own", [2.5, 9.0]), THREE) is None, "its best so far counts"
    four = [*THREE, run(MEDIAN, "d", [3.0, 2.5])]  # 2.75, so the median is 2.625
    assert judged(MEDIAN, run(MEDIAN, "own", [3.4, 2.625]), four) is None
    assert judged(MEDIAN, run(MEDIAN, "own", [3.4, 2.63]), four) is not None


def test_the_mean_of_equal_losses_is_that_loss() -> None:
    """Summing three of this one and dividing by three gives the float below it, and would end a run for a tie."""
    loss = 1.9023661934051606
    assert math.fsum([loss] * 3) / 3 < loss
    equals = [run(MEDIAN, name, [loss] * 3) for name in "abcd"]
    assert kept(MEDIAN, equals) == list("abcd")


def test_median_needs_enough_runs_that_have_come_as_far() -> None:
    own = run(MEDIAN, "own", [9.0, 9.0])
    behind = run(MEDIAN, "behind", [1.0])
    assert judged(MEDIAN, own, THREE[:2]) is None
    assert judged(MEDIAN, own, [*THREE[:2], behind]) is None, "it has not come to the second point"
    assert judged(MEDIAN, own, [*THREE[:2], replace(behind, end="stopped")]) is not None, "it will never come"
    assert judged(rule("median", minimum_runs=2), own, THREE[:2]) is not None


def test_median_warms_up() -> None:
    waiting = rule("median", warmup_points=1)
    assert judged(waiting, run(MEDIAN, "own", [9.0]), THREE) is None
    assert judged(waiting, run(MEDIAN, "own", [9.0, 9.0]), THREE) is not None


def test_a_stopped_run_counts_on_with_its_average_until_then() -> None:
    """Without it the bar would be the best half of the best half."""
    stopped = [run(MEDIAN, name, [loss], end="stopped") for name, loss in (("x", 5.0), ("y", 6.0))]
    own = run(MEDIAN, "own", [3.4, 3.4])
    assert judged(MEDIAN, own, THREE) is not None
    assert judged(MEDIAN, own, [*THREE, *stopped]) is None, "of 2.25, 2.5, 3.5, 5 and 6 the median is 3.5"


def test_a_run_that_diverged_is_the_worst_wherever_it_counts() -> None:
    looked_well = run(MEDIAN, "wild", [1.0, 1.0], end="diverged")
    never_seen = History("gone", "gone", None, {}, "diverged")
    own = run(MEDIAN, "own", [3.4, 3.4])
    assert judged(MEDIAN, own, [*THREE, looked_well]) is not None, "of 2.25, 2.5, 3.5 and infinity: 3"
    assert judged(MEDIAN, own, [*THREE, looked_well, never_seen]) is None, "with two infinities: 3.5"
    assert judged(MEDIAN, own, [*THREE, replace(looked_well, end=None), never_seen]) is not None, "it counts as 1"


# Successive halving.


def search(losses: Sequence[float], *, total: int = 45) -> list[History]:
    """Runs that stand at the first point together."""
    return [run(HALVING, f"run{number}", [loss], total=total) for number, loss in enumerate(losses)]


def kept(stopping: Stopping, runs: Sequence[History]) -> list[str]:
    """Names of the runs that go on, all judged on the same state."""
    return [own.fingerprint for own in runs if judged(stopping, own, runs) is None]


def test_halving_by_hand() -> None:
    runs = search([9.0, 1.0, 8.0, 2.0, 7.0, 3.0, 6.0, 4.0, 5.0])
    assert kept(HALVING, runs) == ["run1", "run3", "run5"]


def test_halving_says_what_decided() -> None:
    runs = search([1.0, 2.0, 3.0, 3.5])
    stop = judged(HALVING, runs[-1], runs)
    assert stop is not None and stop.reason == (
        "held-out loss 3.5 is not among the best 1 of 4 runs: 3 of other settings are better, at step 5 of 45 "
        "(point 1 of 2)"
    )
    assert stop.facts(HALVING) == {
        "rule": "halving",
        "points": 2,
        "reduction": 3,
        "point": 1,
        "step": 5,
        "value": 3.5,
        "reason": stop.reason,
    }


def test_nobody_is_ended_before_there_are_enough_to_choose_from() -> None:
    assert kept(HALVING, search([1.0, 2.0])) == ["run0", "run1"]
    assert kept(HALVING, search([1.0, 2.0, 3.0])) == ["run0"]


def test_ties_at_the_border_all_go_on() -> None:
    assert kept(HALVING, search([2.0, 1.0, 2.0, 2.0, 3.0, 4.0])) == ["run0", "run1", "run2", "run3"]
    assert kept(HALVING, search([math.nan] * 6)) == [f"run{number}" for number in range(6)]


def test_a_loss_that_is_not_finite_is_the_worst() -> None:
    assert kept(HALVING, search([math.nan, -math.inf, math.inf, 5.0, 6.0, 7.0])) == ["run3", "run4"]
    stop = judged(HALVING, search([1.0, 2.0, math.nan])[-1], search([1.0, 2.0, math.nan]))
    assert stop is not None and stop.facts(HALVING)["value"] is None
    assert stop.reason.startswith("held-out loss without a finite value is not among the best 1 of 3 runs")


def test_in_halving_a_diverged_run_is_out_at_the_point_it_did_not_reach() -> None:
    """One that diverged before the first point is one of six there, and none at the second."""
    early = History("gone", "gone", None, {}, "diverged")
    first = search([1.0, 2.0, 3.0, 4.0, 5.0])
    assert kept(HALVING, first) == ["run0"]
    with_lost = [own.fingerprint for own in first if judged(HALVING, own, [*first, early]) is None]
    assert with_lost == ["run0", "run1"], "it is one of the six"
    second = [run(HALVING, name, [1.0, loss]) for loss, name in enumerate("abcde", start=1)]
    alone = [own.fingerprint for own in second if judged(HALVING, own, [*second, early]) is None]
    assert alone == ["a"], "it was not promoted to the second point, where there are five"
    late = run(HALVING, "late", [0.5], end="diverged")
    assert [own.fingerprint for own in second if judged(HALVING, own, [*second, late]) is None] == ["a", "b"]
    both = run(HALVING, "both", [0.5, 0.5], end="diverged")
    assert [own.fingerprint for own in second if judged(HALVING, own, [*second, both]) is None] == ["a", "b"]


# Who is compared with whom.


@pytest.mark.parametrize("stopping", [MEDIAN, HALVING])
def test_seeds_of_one_setting_are_no_search(stopping: Stopping) -> None:
    seeds = [run(stopping, f"seed{number}", [float(number)], setting="one") for number in range(9)]
    assert kept(stopping, seeds) == [seed.fingerprint for seed in seeds]


def test_halving_keeps_settings_whole() -> None:
    """Nine settings by three seeds: all seeds of the best three settings go on, whatever the order within one."""
    runs = [
        run(HALVING, f"{setting}.{seed}", [setting + 0.1 * seed], setting=str(setting))
        for setting in range(9)
        for seed in range(3)
    ]
    assert kept(HALVING, runs) == [f"{setting}.{seed}" for setting in range(3) for seed in range(3)]


def test_repeats_of_a_trial_count_once() -> None:
    """The trial's losses are the same each time; the one of which most is known speaks for it."""
    own = run(HALVING, "own", [3.0])
    once = run(HALVING, "x", [1.0])
    assert judged(HALVING, own, [once, replace(once)]) is None, "two runs are too few to choose from"
    assert judged(HALVING, own, [once, run(HALVING, "y", [2.0])]) is not None
    begun = History("x", "x", 45, {}, None)
    assert judged(HALVING, own, [once, begun, run(HALVING, "y", [2.0])]) is not None


def test_runs_of_other_lengths_are_compared_at_the_same_share_of_theirs() -> None:
    own = run(HALVING, "own", [3.0], total=45)  # at step 5
    longer = [run(HALVING, name, [loss], total=900) for name, loss in (("x", 2.0), ("y", 2.5))]  # at step 100
    assert judged(HALVING, own, longer) is not None
    too_early = [replace(one, losses={5: loss}) for one, loss in zip(longer, (2.0, 2.5), strict=True)]
    assert judged(HALVING, own, too_early) is None, "step 5 of 900 is none of its points"


def test_what_was_measured_under_another_rule_counts_where_its_step_is_a_point() -> None:
    other = History("other", "other", 45, {9: 1.0, 12: 50.0, 18: 1.0, 23: 1.0}, None)
    lenient = rule("median", minimum_runs=1)
    assert judged(lenient, run(lenient, "own", [2.0, 2.0]), [other]) is not None, "12 is none of its points"
    quarters = rule("halving", reduction=2, points=2)  # after 12 and 23 steps
    assert judged(quarters, run(quarters, "own", [60.0]), [other]) is not None
    assert judged(quarters, run(quarters, "own", [40.0]), [other]) is None


def test_later_losses_of_an_earlier_attempt_are_left_out() -> None:
    """The run was killed after its second point and goes on from before the first."""
    own = run(MEDIAN, "own", [3.4, 1.0])
    one = [run(MEDIAN, name, [3.0]) for name in "abc"]
    assert decide(MEDIAN, 9, own, one) is not None
    assert decide(MEDIAN, 18, own, [run(MEDIAN, name, [3.0, 3.0]) for name in "abc"]) is None


def test_a_step_that_is_no_point_is_a_mistake_of_the_caller() -> None:
    own = run(HALVING, "own", [3.0])
    for step in (4, 15, 45):
        with pytest.raises(ValueError, match=f"step {step}"):
            decide(HALVING, step, own, [])
    with pytest.raises(ValueError, match="step 5"):
        decide(HALVING, 5, replace(own, total_steps=None), [])


# What holds for every search.

RULES = [MEDIAN, rule("median", points=2, minimum_runs=1), HALVING, rule("halving", points=3, reduction=2)]
LOSSES = st.one_of(st.sampled_from([1.0, 1.5, 2.0, math.nan, math.inf]), st.floats(0.0, 1e6))


@st.composite
def searches(draw: st.DrawFn) -> tuple[Stopping, History, list[History]]:
    """A rule, a run that stands at one of its points, and others of all kinds."""
    stopping = draw(st.sampled_from(RULES))
    points = stopping.settings()["points"]
    runs = []
    for number in range(draw(st.integers(1, 12))):
        losses = draw(st.lists(LOSSES, min_size=0 if number else 1, max_size=points))
        end: End = draw(st.sampled_from([None, None, "stopped", "diverged"])) if number else None
        setting = f"setting{draw(st.integers(0, 8))}"
        runs.append(
            run(stopping, str(number), losses, total=draw(st.sampled_from([8, 27, 45])), end=end, setting=setting)
        )
    assume(runs[0].losses)
    return stopping, runs[0], runs[1:]


def _until(stopping: Stopping, history: History, place: int) -> list[float]:
    steps = evaluation_points(stopping, history.total_steps or 0)[: place + 1]
    losses = [history.losses[step] for step in steps if step in history.losses]
    return [loss if math.isfinite(loss) else math.inf for loss in losses]


@given(searches())
def test_the_best_so_far_is_never_ended(given_search: tuple[Stopping, History, list[History]]) -> None:
    stopping, own, others = given_search
    place = len(own.losses) - 1
    best = min([loss for other in others for loss in _until(stopping, other, place)], default=math.inf)
    step = max(own.losses)
    for loss in (best, best / 2):
        leading = replace(own, losses={**own.losses, step: loss})
        assert decide(stopping, step, leading, others) is None


@given(searches(), st.randoms(use_true_random=False))
def test_the_order_of_the_others_and_who_was_judged_before_decide_nothing(
    given_search: tuple[Stopping, History, list[History]], order: random.Random
) -> None:
    stopping, own, others = given_search
    decision = judged(stopping, own, others)
    shuffled = list(others)
    order.shuffle(shuffled)
    assert repr(judged(stopping, own, shuffled)) == repr(decision)  # a NaN is not equal to itself
    here = len(own.losses)
    after = [replace(one, end="stopped") if one.end is None and len(one.losses) == here else one for one in others]
    assert repr(judged(stopping, own, after)) == repr(decision)
    siblings = [replace(own, fingerprint="sibling", losses=dict.fromkeys(own.losses, 0.0))]
    assert repr(judged(stopping, own, [*others, *siblings])) == repr(decision)


@given(searches(), st.floats(1e-3, 1e3))
def test_a_worse_loss_saves_nobody(given_search: tuple[Stopping, History, list[History]], more: float) -> None:
    stopping, own, others = given_search
    if judged(stopping, own, others) is not None:
        worse = replace(own, losses={step: loss + more for step, loss in own.losses.items()})
        assert judged(stopping, worse, others) is not None


@given(searches())
def test_off_ends_nobody(given_search: tuple[Stopping, History, list[History]]) -> None:
    _, own, others = given_search
    assert decide(OFF, max(own.losses), own, others) is None


@given(st.lists(st.lists(st.floats(0.5, 9.0), min_size=2, max_size=2), min_size=4, max_size=12))
def test_the_median_rule_is_its_definition(losses: list[list[float]]) -> None:
    """Restated with numpy: ended iff min over the points so far > median of the others' means."""
    runs = [run(MEDIAN, str(number), pair) for number, pair in enumerate(losses)]
    bar = float(np.median(np.array(losses[1:]).mean(axis=1)))
    assume(abs(min(losses[0]) - bar) > 1e-9)
    assert (judged(MEDIAN, runs[0], runs[1:]) is not None) == (min(losses[0]) > bar)


# What a search spends.


def spent(stopping: Stopping, quality: Sequence[float], total: int) -> tuple[int, list[int]]:
    """Steps of a search whose runs come to every point together, and who finished. Losses fall towards the quality."""
    running: dict[int, dict[int, float]] = {number: {} for number in range(len(quality))}
    ended: dict[int, dict[int, float]] = {}
    steps = 0
    for step, before in zip(evaluation_points(stopping, total), (0, *evaluation_points(stopping, total)), strict=False):
        steps += len(running) * (step - before)
        for number, losses in running.items():
            losses[step] = quality[number] + 1 / step
        known = {number: History(str(number), str(number), total, losses, None) for number, losses in running.items()}
        gone = [History(str(number), str(number), total, losses, "stopped") for number, losses in ended.items()]
        for number, own in known.items():
            if decide(stopping, step, own, [*known.values(), *gone]) is not None:
                ended[number] = running.pop(number)
    return steps + len(running) * (total - evaluation_points(stopping, total)[-1]), list(running)


@pytest.mark.parametrize(("reduction", "points", "total"), [(3, 2, 9), (3, 2, 90), (3, 3, 27), (2, 4, 64), (4, 1, 8)])
def test_halving_spends_what_its_arithmetic_says(reduction: int, points: int, total: int) -> None:
    """R steps to the first point and (1 - 1 / reduction) R to each next one and to the end; one run is left."""
    runs = reduction**points
    quality = [float(number) for number in range(runs)]
    random.Random(0).shuffle(quality)
    steps, finished = spent(rule("halving", reduction=reduction, points=points), quality, total)
    assert steps == total + points * (total - total // reduction)
    assert finished == [quality.index(0.0)]
    assert steps < runs * total


def test_the_median_rule_ends_the_worse_half_and_no_more() -> None:
    """At equal falls of all runs: who is above the median at the second point is above it at every later one."""
    quality = [1.0 + 0.1 * number for number in range(9)]
    steps, finished = spent(rule("median", points=4, warmup_points=1), quality, 45)
    assert finished[0] == 0 and 4 <= len(finished) < 9
    assert steps < 9 * 45


def test_one_after_another_costs_more_than_together() -> None:
    """Best first, nine runs of 9 steps: the first two find nobody to be chosen from, the others end at step 1."""
    done: list[History] = []
    steps = 0
    for number in range(9):
        losses: dict[int, float] = {}
        end: End = None
        for step in evaluation_points(HALVING, 9):
            losses[step] = float(number)
            if decide(HALVING, step, History(str(number), str(number), 9, losses, None), done) is not None:
                end = "stopped"
                break
        steps += max(losses) if end else 9
        done.append(History(str(number), str(number), 9, losses, end))
    assert steps == 2 * 9 + 7 * 1


# What may be compared, and what cannot be done.

IDENTITIES = {"base": "b", "data": "d"}


@pytest.mark.parametrize(
    "same",
    [
        ["rank=4"],
        ["method=dora", "learning_rate=1e-4", "optimizer=sgd"],
        ["quantization=nf4", "training.precision=bf16"],
        ["seed=3", "training.max_steps=7"],
        ["data.train_size=40", "data.train_seed=5"],
    ],
    ids=" ".join,
)
def test_settings_of_a_search_may_be_compared(make_trial: MakeTrial, same: list[str]) -> None:
    assert comparable_key(make_trial(*same), IDENTITIES) == comparable_key(make_trial(), IDENTITIES)


@pytest.mark.parametrize(
    "other",
    [
        ["data.heldout_seed=77"],
        ["data.heldout_size=20"],
        ["data.max_length=64"],
        ["data.loss_on=all"],
        ["model.seed=9"],
    ],
    ids=" ".join,
)
def test_other_rows_tokens_or_models_may_not(make_trial: MakeTrial, other: list[str]) -> None:
    assert comparable_key(make_trial(*other), IDENTITIES) != comparable_key(make_trial(), IDENTITIES)


@pytest.mark.parametrize(
    ("identities", "is_same"),
    [
        ({"base": "b", "data": "d", "eval": "other"}, True),
        ({"base": "b", "data": "other"}, False),
        ({"base": "other", "data": "d"}, False),
    ],
)
def test_identities_decide_too(make_trial: MakeTrial, identities: Mapping[str, str], is_same: bool) -> None:
    key = comparable_key(make_trial(), IDENTITIES)
    assert (comparable_key(make_trial(), identities) == key) is is_same


def test_a_file_of_heldout_rows_makes_the_training_file_a_setting(make_trial: MakeTrial) -> None:
    trial = make_trial()
    one, two = ({"base": "b", "data": data, "heldout": "h"} for data in ("d", "other"))
    assert comparable_key(trial, one) == comparable_key(trial, two)
    assert comparable_key(trial, one) != comparable_key(trial, {**one, "heldout": "other"})


@pytest.mark.parametrize(
    ("stopping", "steps", "where", "message"),
    [
        (
            MEDIAN,
            3,
            "launch.stopping.median.points",
            "4 points need runs of at least 5 steps, and one has 3; at most 2 of them fit",
        ),
        (
            HALVING,
            8,
            "launch.stopping.halving.points",
            "2 points need runs of at least 9 steps, and one has 8; at most 1 of them fit",
        ),
        (
            HALVING,
            2,
            "launch.stopping.halving.points",
            "2 points need runs of at least 9 steps, and one has 2; no point fits; launch.stopping.rule=off",
        ),
    ],
)
def test_a_run_too_short_for_the_points(
    make_trial: MakeTrial, stopping: Stopping, steps: int, where: str, message: str
) -> None:
    (problem,) = stopping_problems(stopping, make_trial(), steps)
    assert (problem.where, problem.message) == (where, message)
    fitting = [int(word) for word in message.split() if word.isdigit()][1]
    assert stopping_problems(stopping, make_trial(), fitting) == []


def test_a_trial_without_heldout_loss_cannot_be_judged(make_trial: MakeTrial) -> None:
    blind = make_trial("evaluation.heldout=false")
    (problem,) = stopping_problems(MEDIAN, blind, 40)
    assert problem.where == "evaluation.heldout" and "launch.stopping.rule=median" in problem.message
    assert stopping_problems(OFF, blind, 2) == [] == stopping_problems(MEDIAN, make_trial("method=base"), None)


def test_the_very_rule_that_stopped_a_run() -> None:
    stop = judged(HALVING, search([1.0, 2.0, 3.0])[-1], search([1.0, 2.0, 3.0]))
    assert stop is not None
    facts: dict[str, Any] = {"stopping": stop.facts(HALVING)}
    assert was_stopped_by(HALVING, facts)
    others = (OFF, MEDIAN, rule("halving", reduction=2), rule("halving", points=3))
    assert not any(was_stopped_by(other, facts) for other in others)
    assert not was_stopped_by(HALVING, {}) and not was_stopped_by(HALVING, {"stopping": "by hand"})
