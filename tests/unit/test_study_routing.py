"""Routing statistics by hand: averages over layers and routers, the control, settings over seeds, missing files."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lora_lab.record.layer_log import write_observation
from lora_lab.record.result import Status
from lora_lab.study.interval import t_interval
from lora_lab.study.routing import has_routers, routing_at_evaluation, routing_in_training, routing_rows
from lora_lab.study.table import settings_table
from tests.unit.ledger_samples import trial_of
from tests.unit.study_samples import record_of
from tests.unit.test_study_layers import record_in


def router(load: list[float | None], entropy: float | None, top2: float = 0.9) -> dict[str, Any]:
    share = [1 / len(load)] * len(load)
    fields = {"entropy": 0.5, "relative_entropy": entropy, "chosen": share, "first": share}
    return {"tokens": 10, "load": load, "top2_mass": top2, **fields}


def test_entropy_over_training_is_a_mean_over_layers_and_load_that_of_the_end(tmp_path: Path) -> None:
    """Two experts in layer 0, three in layer 1, a single one in layer 2: that has no relative entropy."""
    path = tmp_path / "layers.jsonl"
    name = "base_model.model.model.layers.{}.mlp.up_proj".format
    early = {
        name(0): router([0.5, 0.5], 1.0),
        name(1): router([0.4, 0.3, 0.3], 0.8),
        name(2): router([1.0], None),
    }
    late = {
        name(0): router([0.75, 0.25], 0.6),
        name(1): router([1.0, 0.0, 0.0], 0.0),
        name(2): router([1.0], None),
    }
    write_observation(path, 25, "routing", {"routers": early})
    write_observation(path, 100, "routing", {"routers": late})
    found = routing_in_training(record_in(tmp_path))
    assert found.steps == (25, 100) and found.layers == (0, 1, 2) and found.missing is None
    assert found.relative_entropy == {"up_proj": (pytest.approx(0.9), pytest.approx(0.3))}
    assert found.loads == {"up_proj": ((0.75, 0.25), (1.0, 0.0, 0.0), (1.0,))}
    assert json.loads(json.dumps(found.to_json()))["loads"]["up_proj"][1] == [1.0, 0.0, 0.0]


def test_a_router_that_is_not_finite_is_left_out(tmp_path: Path) -> None:
    routers = {"h.0.c_fc": router([math.nan, 0.5], 0.5), "h.1.c_fc": router([0.5, 0.5], math.nan)}
    write_observation(tmp_path / "layers.jsonl", 5, "routing", {"routers": routers})
    found = routing_in_training(record_in(tmp_path))
    assert found.loads == {"c_fc": ((0.5, 0.5),)} and found.relative_entropy == {"c_fc": (None,)}


def evaluation_file(folder: Path, labels: list[dict[str, Any]], **specialization: Any) -> None:
    (folder / "eval").mkdir()
    content = {"schema_version": 1, "labels": labels, "specialization": {"trained": None, "all": None}}
    content["specialization"] |= specialization  # type: ignore[operator]
    (folder / "eval" / "routing.json").write_text(json.dumps(content))


def label(name: str, *, trained: bool, routers: dict[str, Any]) -> dict[str, Any]:
    counts = {"sequences": 3, "tokens": 30}
    return {"label": name, "source": "task", "trained": trained, "routers": routers, **counts}


def test_load_by_task_is_a_mean_over_routers_with_as_many_experts(tmp_path: Path) -> None:
    routers = {
        "layers.0.q": router([0.5, 0.5], 1.0, 1.0),
        "layers.1.q": router([0.9, 0.1], 0.5, 1.0),
        "layers.2.q": router([0.2, 0.3, 0.5], 0.75, 0.8),
        "layers.3.q": router([1.0], None, 1.0),
    }
    control = {"statistic": 0.2, "shuffled_mean": 0.1, "shuffled_quantile_95": 0.15, "p_value": 0.001}
    other = label("other", trained=False, routers={"layers.0.q": router([1.0, 0.0], 0.0)})
    evaluation_file(
        tmp_path, [other, label("own", trained=True, routers=routers)], all={**control, "permutations": 999, "seed": 0}
    )
    found = routing_at_evaluation(record_in(tmp_path))
    own, last = found.labels
    assert (own.label, own.trained, last.label) == ("own", True, "other"), "what was trained on comes first"
    assert own.loads == {1: (1.0,), 2: pytest.approx((0.7, 0.3)), 3: (0.2, 0.3, 0.5)}
    assert own.relative_entropy == 0.75 and own.top2_mass == pytest.approx(0.95)
    assert found.trained is None
    assert found.all is not None and (found.all.labels, found.all.p_value, found.all.permutations) == (2, 0.001, 999)
    assert json.loads(json.dumps(found.to_json()))["all"]["statistic"] == 0.2


def test_files_that_are_not_there_or_damaged(tmp_path: Path) -> None:
    record = record_in(tmp_path)
    assert routing_in_training(record).missing == "the layer log holds no routing"
    assert routing_at_evaluation(record).missing == "its routers were not looked at when it was scored"
    evaluation_file(tmp_path, [])
    assert routing_at_evaluation(record).missing == "there was no held-out row and no task"
    for damage in ("{", "[]", '{"labels": [{}], "specialization": {}}', '{"labels": []}'):
        (tmp_path / "eval" / "routing.json").write_text(damage)
        found = routing_at_evaluation(record)
        assert found.labels == () and "cannot be read" in str(found.missing)


def summary(entropies: tuple[float, float, float], p: float | None) -> dict[str, Any]:
    labels = {
        f"task/{place}": {"trained": place < 2, "relative_entropy": entropy, "top2_mass": entropy / 2}
        for place, entropy in enumerate(entropies)
    }
    return {"evaluation": {"routing": {"labels": labels, "p_value": {"trained": None, "all": p}}}}


def routed(seed: int, **changes: Any) -> Any:
    trial = trial_of(method={"kind": "molora", "experts": 4}, seed=seed)
    return record_of(trial, scores={"heldout/loss": 1.0}, **changes)


def test_settings_side_by_side_with_intervals_over_seeds() -> None:
    facts = [summary((0.8 + seed / 10, 0.6, 0.2 * seed), 0.01 * (seed + 1)) for seed in range(3)]
    records = [routed(seed, facts=facts[seed]) for seed in range(3)]
    records += [routed(3, status=Status.FAILED, facts=summary((0, 0, 0), 1.0)), record_of(trial_of(), scores={})]
    assert [has_routers(record) for record in records] == [True] * 4 + [False]
    (row,) = routing_rows(records, settings_table(records, metrics=None))
    trained, other = row.cells["relative_entropy", "trained"], row.cells["relative_entropy", "untrained"]
    assert [point.value for point in trained.points] == pytest.approx([0.7, 0.75, 0.8])
    assert [point.seed for point in trained.points] == [0, 1, 2]
    assert trained.interval == t_interval([point.value for point in trained.points])
    assert other.mean == pytest.approx(0.2)
    assert row.cells["top2_mass", "untrained"].mean == pytest.approx(0.1)
    assert [point.value for point in row.p_values["all"]] == pytest.approx([0.01, 0.02, 0.03])
    assert row.p_values["trained"] == ()
    assert "relative_entropy/trained" in json.dumps(row.to_json())


def test_a_trial_that_was_repeated_counts_once() -> None:
    first = routed(0, facts=summary((0.8, 0.6, 0.2), 0.01))
    again = replace(first, folder=first.folder.with_name(f"{first.run_id}.r1"))
    (row,) = routing_rows([first, again], settings_table([first, again], metrics=None))
    assert len(row.cells["relative_entropy", "trained"].points) == 1 and len(row.p_values["all"]) == 1


def test_settings_without_a_number_have_their_reason() -> None:
    records = [routed(0, status=Status.FAILED)]
    (row,) = routing_rows(records, settings_table(records, metrics=None))
    assert row.cells["top2_mass", "trained"].missing == "no completed run"
    records = [routed(0)]
    (row,) = routing_rows(records, settings_table(records, metrics=None))
    assert row.cells["top2_mass", "trained"].missing == "not measured"
    only = {"evaluation": {"routing": {"labels": {}, "p_value": {"trained": None, "all": None}}}}
    records = [routed(0, facts=only)]
    (row,) = routing_rows(records, settings_table(records, metrics=None))
    assert row.cells["top2_mass", "trained"].missing == "no label of this side"
