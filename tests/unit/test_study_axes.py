"""Axes: which keys are swept, what moves along, and which settings differ in one axis alone."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from lora_lab.record.run_record import RunRecord
from lora_lab.study.axes import SweptAxes, swept_axes
from lora_lab.study.settings import setting_values
from tests.unit.ledger_samples import ended, trial_of
from tests.unit.study_samples import record_of

QV = {"query": True, "value": True, "key": False, "projection": False, "mlp": False, "modules": []}
ALL = {**dict.fromkeys(QV, True), "modules": []}
NF4 = {"kind": "nf4", "double_quantization": True}


def _axes(trials: list[dict[str, Any]]) -> SweptAxes:
    return swept_axes([record_of(trial) for trial in trials])


def _values(axes: SweptAxes) -> dict[str, tuple[Any, ...]]:
    return {axis.name: axis.values for axis in axes.axes}


def test_what_always_moves_together_is_one_axis_named_by_its_head() -> None:
    trials = [
        trial_of(rank=16, alpha=32.0, target=QV),
        trial_of(rank=2, alpha=4.0, target=QV),
        trial_of(rank=2, alpha=4.0, target=ALL),
        trial_of(rank=16, alpha=32.0, target=ALL),
        trial_of(rank=16, alpha=32.0, target=QV, quantization=NF4),
    ]
    axes = _axes(trials)
    assert _values(axes) == {"quantization": ("none", "nf4"), "target": ("qv", "all_linear"), "rank": (2, 16)}
    rank = next(axis for axis in axes.axes if axis.name == "rank")
    assert rank.is_numeric and len(rank.matched) == 2, "the 4-bit setting has no partner of another rank"
    assert axes.along(rank, rank.matched) == ("alpha",)
    (quantization,) = (axis for axis in axes.axes if axis.name == "quantization")
    assert axes.along(quantization, quantization.matched) == (), "double quantization is of the same section"
    json.dumps(axes.to_json(), allow_nan=False)


def test_alpha_that_follows_from_rank_and_method_together_is_no_axis() -> None:
    trials = [
        trial_of(method={"kind": kind}, rank=rank, alpha=alpha)
        for kind, rank, alpha in [("lora", 2, 4.0), ("lora", 8, 16.0), ("rslora", 2, 2.0), ("rslora", 8, 8.0)]
    ]
    axes = _axes(trials)
    assert _values(axes) == {"method": ("lora", "rslora"), "rank": (2, 8)}
    assert [len(axis.matched) for axis in axes.axes] == [2, 2]
    assert all(axes.along(axis, axis.matched) == ("alpha",) for axis in axes.axes)


def test_a_method_with_a_rate_of_its_own_is_not_taken_for_the_effect_of_the_rate() -> None:
    points = [("lora", 1e-3), ("lora", 1e-2), ("full", 1e-4), ("full", 2e-5)]
    trials = [trial_of(method={"kind": kind}, learning_rate=rate) for kind, rate in points]
    method, rate = _axes(trials).axes
    assert method.name == "method" and method.matched == (), "nowhere does the method change alone"
    assert len(rate.matched) == 2, "within lora and within full"


def test_what_moves_alone_anywhere_is_an_axis_of_its_own() -> None:
    double = {"kind": "nf4", "double_quantization": True}
    plain = {"kind": "nf4", "double_quantization": False}
    axes = _axes([trial_of(), trial_of(quantization=plain), trial_of(quantization=double)])
    assert _values(axes) == {"quantization": ("none", "nf4"), "quantization.double_quantization": (False, True)}
    assert not any(axis.is_numeric for axis in axes.axes), "true is no number"


def test_a_key_that_one_side_lacks_is_nothing_to_differ_in() -> None:
    sgd = [trial_of(optimizer={"kind": "sgd", "momentum": momentum}) for momentum in (0.9, 0.0)]
    axes = _axes([trial_of(optimizer={"kind": "adamw", "eps": 1e-8}), *sgd])
    found = {axis.name: axis for axis in axes.axes}
    assert found["optimizer"].values == ("adamw", "sgd") and len(found["optimizer"].matched) == 2
    assert found["optimizer.momentum"].values == (0.0, 0.9) and len(found["optimizer.momentum"].matched) == 1


def test_full_fine_tuning_has_no_rank_and_is_compared_with_every_rank() -> None:
    """Its trials carry a rank and a target all the same, which nothing uses."""
    full = {"method": {"kind": "full"}}
    trials = [trial_of(rank=rank, target=QV) for rank in (2, 8, 32)]
    trials += [trial_of(**full, rank=8, target=ALL), trial_of(**full, rank=2, target=QV, learning_rate=1e-5)]
    axes = _axes(trials)
    assert {axis.name: len(axis.matched) for axis in axes.axes} == {"method": 3, "rank": 3, "learning_rate": 1}
    assert all(axes.along(axis, axis.matched) == () for axis in axes.axes)


def test_base_and_unreadable_runs_have_no_part_and_seeds_are_no_axis(tmp_path: Path) -> None:
    records = [ended(tmp_path, trial_of(seed=seed)) for seed in (0, 1)]
    records.append(ended(tmp_path, trial_of(method={"kind": "base"}, rank=4), name="base"))
    records.append(RunRecord(tmp_path / "x", None, None, "DAMAGED", "damaged", None))
    axes = swept_axes(records)
    assert axes.axes == () and len(axes.settings) == 1
    assert swept_axes([]).axes == ()


def test_other_texts_under_the_same_values_are_never_matched() -> None:
    first, second = record_of(trial_of()), record_of(trial_of(rank=2), identities={"data": "another"})
    axes = swept_axes([first, second])
    assert [axis.name for axis in axes.axes] == ["rank"] and axes.along(axes.axes[0], axes.axes[0].matched) == ()
    third = record_of(trial_of(rank=2))
    (rank, data) = swept_axes([first, second, third]).axes
    assert rank.matched == ((str(third.setting), str(first.setting)),)
    assert data.name == "identities.data"


def test_targets_are_told_by_their_parts_where_they_name_modules() -> None:
    named = {**QV, "query": True, "value": False, "modules": ["q_proj", "lm_head"]}
    axes = _axes([trial_of(target=QV), trial_of(target=named), trial_of(target={**named, "modules": ["q_proj"]})])
    assert _values(axes) == {"target": ("qv", "query, q_proj, lm_head", "query, q_proj")}


KEYS = {"rank": (2, 4), "alpha": (1.0, 2.0), "learning_rate": (0.1, 0.2), "dropout": (0.0, 0.5)}


@given(st.sets(st.tuples(*(st.sampled_from(values) for values in KEYS.values())), min_size=2, max_size=10))
def test_matched_settings_differ_in_their_axis_and_in_nothing_else_but_followers(
    points: set[tuple[float, ...]],
) -> None:
    """Brute force over all pairs of settings of a random design."""
    records = [record_of(trial_of(**dict(zip(KEYS, point, strict=True)))) for point in sorted(points)]
    axes = swept_axes(records)
    names = {axis.name for axis in axes.axes}
    by_setting = {str(record.setting): setting_values(record.trial) for record in records}
    told = {tuple(sorted(values.items())) for values in axes.settings.values()}
    assert len(told) == len(points), "any two settings differ in some axis"
    for axis in axes.axes:
        expected = {
            frozenset((one, other))
            for one, other in itertools.combinations(by_setting, 2)
            if {name for name in names if by_setting[one][name] != by_setting[other][name]} == {axis.name}
        }
        assert {frozenset(pair) for pair in axis.matched} == expected
        assert all(by_setting[low][axis.name] < by_setting[high][axis.name] for low, high in axis.matched)


def test_five_hundred_settings_are_no_trouble() -> None:
    trials = [
        trial_of(rank=rank, alpha=2.0 * rank, learning_rate=rate, dropout=dropout)
        for rank in range(1, 11)
        for rate in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
        for dropout in [place / 20 for place in range(10)]
    ]
    axes = _axes(trials)
    assert {axis.name: len(axis.matched) for axis in axes.axes} == {
        "rank": 45 * 50,
        "learning_rate": 10 * 100,
        "dropout": 45 * 50,
    }
