"""What a study may say: grids, seeds, fixed values; and every problem named where it stands."""

from __future__ import annotations

import re
from typing import Any

import pytest

from lora_lab.errors import InputError
from lora_lab.plan.expand import count, expand
from lora_lab.schema.study import Study, study_from


def study(**values: Any) -> Study:
    return study_from({"question": "Does it matter?", "grids": [{"rank": [2, 8]}], **values}, name="look")


def points(*grids: dict[str, Any], **values: Any) -> list[dict[str, Any]]:
    made = study(grids=list(grids), **values)
    expanded = expand(made)
    assert count(made) == len(expanded)
    return expanded


def test_only_question_and_grids_are_needed() -> None:
    least = study()
    assert (least.name, least.source, least.base, least.baseline, least.seeds) == ("look", None, {}, False, ())
    assert (least.metrics, least.claims) == ((), ())
    for key in ("question", "grids"):
        with pytest.raises(InputError, match=f"{key}: missing"):
            study_from({k: v for k, v in {"question": "q", "grids": [{}]}.items() if k != key}, name="look")


def test_the_first_axis_varies_slowest_and_the_seed_fastest() -> None:
    made = points({"rank": [2, 8], "target": ["qv", "mlp"]}, seeds=[0, 1])
    assert [(p["rank"], p["target"], p["seed"]) for p in made] == [
        (2, "qv", 0), (2, "qv", 1), (2, "mlp", 0), (2, "mlp", 1),
        (8, "qv", 0), (8, "qv", 1), (8, "mlp", 0), (8, "mlp", 1),
    ]  # fmt: skip


def test_zipped_axes_walk_together_beside_a_product() -> None:
    grid = {"dropout": [0.0, 0.1], "zip": {"rank": [8, 64], "alpha": [16, 128]}}
    assert [(p["dropout"], p["rank"], p["alpha"]) for p in points(grid)] == [
        (0.0, 8, 16), (0.0, 64, 128), (0.1, 8, 16), (0.1, 64, 128),
    ]  # fmt: skip
    assert [p["rank"] for p in points({"zip": grid["zip"], "dropout": [0.0, 0.1]})] == [8, 8, 64, 64]


def test_grids_follow_each_other_and_override_the_base() -> None:
    made = points(
        {"rank": [2]},
        {"quantization": ["nf4"], "rank": [8]},
        {},
        base={"model": "gpt2", "rank": 1, "training.epochs": 2},
    )
    shared = {"model": "gpt2", "training.epochs": 2}
    assert made == [{**shared, "rank": 2}, {**shared, "rank": 8, "quantization": "nf4"}, {**shared, "rank": 1}]


def test_duplicates_are_kept_for_the_fingerprint_to_merge() -> None:
    assert points({"rank": [8, 8]}, {"rank": [8]}) == [{"rank": 8}] * 3


def test_a_list_may_be_one_value_and_types_are_kept() -> None:
    values = [p["x"] for p in points({"x": [["q_proj", "v_proj"], 1, 1.0, True, None, "1"]})]
    assert values == [("q_proj", "v_proj"), 1, 1.0, True, None, "1"]
    assert [type(value) for value in values] == [tuple, int, float, bool, type(None), str]


def test_a_million_points_are_counted_without_being_made() -> None:
    axes = {f"a{index}": list(range(100)) for index in range(10)}
    assert count(study(grids=[axes], seeds=[0, 1])) == 2 * 100**10


@pytest.mark.parametrize(
    ("values", "where", "message"),
    [
        ({"gridz": []}, "gridz", 'unknown key; did you mean "grids"'),
        ({"name": "x"}, "name", "named by its file"),
        ({"question": " "}, "question", "empty"),
        ({"question": 3}, "question", "expected text"),
        ({"grids": []}, "grids", "no points to run"),
        ({"grids": {"rank": [8]}}, "grids", "expected a list"),
        ({"grids": [{"rank": []}]}, "grids.0.rank", "no values"),
        ({"grids": [{"rank": 8}]}, "grids.0.rank", "such as [8, 16]; got [8] without brackets"),
        ({"grids": [{"rank": [{"a": 1}]}]}, "grids.0.rank.0", "got a mapping; write nested keys with dots"),
        ({"grids": [{"rank": [[[1]]]}]}, "grids.0.rank.0", "may hold only text, numbers"),
        ({"grids": [{"rank": [float("nan")]}]}, "grids.0.rank.0", "finite"),
        ({"grids": [{"a b": [1]}]}, "grids.0", "expected configuration keys"),
        ({"grids": [{"+rank": [1]}]}, "grids.0", "expected configuration keys"),
        ({"grids": [{"zip": {"rank": [1, 2], "alpha": [1]}}]}, "grids.0", "many values; rank has 2, alpha has 1"),
        ({"grids": [{"zip": {}}]}, "grids.0", "zip has no axes"),
        ({"grids": [{"zip": [1]}]}, "grids.0", "expected a mapping, got [1]"),
        ({"grids": [{"rank": [1], "zip": {"rank": [1]}}]}, "grids.0", "rank stands both inside and outside"),
        ({"seeds": [0, -1]}, "seeds.1", "must be 0 to 4294967295"),
        ({"seeds": [True]}, "seeds.0", "got true"),
        ({"seeds": 3}, "seeds", "expected a list"),
        ({"seeds": [1], "base": {"seed": 2}}, "", "may not stand in base"),
        ({"seeds": [1], "grids": [{"seed": [2]}]}, "", "may not stand in base or in a grid"),
        ({"base": {"training": {"epochs": 2}}}, "base.training", "write nested keys with dots"),
        ({"baseline": "yes"}, "baseline", "expected true or false"),
        ({"source": {"titel": "x"}}, "source.titel", 'did you mean "title"'),
    ],
)  # fmt: skip
def test_problems(values: dict[str, Any], where: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        study(**values)
    assert any(problem.where.startswith(where) for problem in caught.value.problems), caught.value.problems


def test_all_problems_at_once() -> None:
    with pytest.raises(InputError) as caught:
        study(question=1, baseline=2, seeds=["x"], grids=[{"rank": 8}, {"zip": {"a": [1], "b": []}}])
    assert len(caught.value.problems) >= 5


@pytest.mark.parametrize("name", ["", "../x", "a/b", "-rf", "x" * 81])
def test_names_are_labels(name: str) -> None:
    with pytest.raises(InputError, match="name: expected 1 to 80"):
        study_from({"question": "q", "grids": [{}]}, name=name)
