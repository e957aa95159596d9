"""What the layer log says, by hand: places in order, kinds of modules, thinning, distances and their trend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora_lab.record.layer_log import write_observation
from lora_lab.record.result import Status
from lora_lab.record.run_record import RunRecord
from lora_lab.study.layers import MOST_OBSERVATIONS, by_layer, expert_distances, layer_norms, thinned


def record_in(folder: Path, *, state: Any = Status.COMPLETED) -> RunRecord:
    """A run of which only the folder matters."""
    return RunRecord(folder, None, None, state, None, None)


def test_norms_by_place_in_the_order_of_the_model(tmp_path: Path) -> None:
    path = tmp_path / "layers.jsonl"
    weight = {"head": 9.0, "10": 3.0, "2": 2.0, "final_norm": 4.0, "embedding": 1.0}
    write_observation(path, 5, "norms", {"weight": weight, "update": {"2": 0.5, "10": float("nan")}})
    write_observation(path, 5, "routing", {"routers": {}})
    write_observation(path, 10, "norms", {"weight": {**weight, "2": 2.5}, "update": {"2": 0.7, "10": 0.0}})
    found = layer_norms(record_in(tmp_path))
    assert found.places == ("embedding", "2", "10", "final_norm", "head")
    assert found.missing is None
    first, last = found.observations
    assert (first.step, last.step) == (5, 10)
    assert first.weight == (1.0, 2.0, 3.0, 4.0, 9.0)
    assert first.update == (None, 0.5, None, None, None)
    assert last.weight == (1.0, 2.5, 3.0, 4.0, 9.0) and last.update == (None, 0.7, 0.0, None, None)
    assert json.loads(json.dumps(found.to_json()))["observations"][1]["step"] == 10


def test_of_a_step_that_was_taken_twice_the_later_counts(tmp_path: Path) -> None:
    path = tmp_path / "layers.jsonl"
    for step, value in ((10, 2.0), (5, 1.0), (5, 3.0)):
        write_observation(path, step, "norms", {"weight": {"0": value}, "update": {}})
    assert [(one.step, one.weight) for one in layer_norms(record_in(tmp_path)).observations] == [
        (5, (3.0,)),
        (10, (2.0,)),
    ]


def test_many_observations_are_thinned_with_their_ends() -> None:
    assert thinned(list(range(100))) == [0, 14, 28, 42, 57, 71, 85, 99]
    assert len(thinned(list(range(100)))) == MOST_OBSERVATIONS
    assert thinned([1, 2]) == [1, 2] and thinned([1]) == [1] and thinned([]) == []


def test_kinds_of_modules_are_short_unless_two_end_alike() -> None:
    llama = {f"model.layers.{layer}.mlp.{name}": layer for layer in (1, 0) for name in ("up_proj", "down_proj")}
    assert by_layer({**llama, "lm_head": 7}) == ((0, 1), {"up_proj": (0, 1), "down_proj": (0, 1)})
    gpt2 = {"transformer.h.0.attn.c_proj": 1, "transformer.h.1.mlp.c_proj": 2, "transformer.h.0.mlp.c_fc": 3}
    assert by_layer(gpt2) == ((0, 1), {"attn.c_proj": (1, None), "mlp.c_proj": (None, 2), "c_fc": (3, None)})


def test_expert_distances_by_layer_and_their_trend(tmp_path: Path) -> None:
    path = tmp_path / "layers.jsonl"
    write_observation(path, 1, "experts", {"distances": {"model.layers.0.mlp.up_proj": 99.0}})
    up, down = [1.0, 3.0, 2.0, 4.0], [10.0, 11.0, None, 13.0]
    distances = {f"model.layers.{layer}.mlp.up_proj": value for layer, value in enumerate(up)}
    distances |= {f"model.layers.{layer}.mlp.down_proj": value for layer, value in enumerate(down)}
    write_observation(path, 8, "experts", {"distances": distances})
    found = expert_distances(record_in(tmp_path))
    assert found.step == 8 and found.layers == (0, 1, 2, 3) and found.missing is None
    assert found.by_kind == {"up_proj": tuple(up), "down_proj": tuple(down)}
    assert found.mean == (5.5, 7.0, None, 8.5), "only layers where each kind has a distance"
    trend = found.trends["up_proj"]
    assert trend is not None and trend.rho == pytest.approx(0.8), "1 - 6 * 2 / (4 * 15)"
    assert found.trend is not None and found.trend.rho == pytest.approx(1) and found.trend.n == 3


def test_single_experts_have_no_distance(tmp_path: Path) -> None:
    values = {"distances": {"model.layers.0.mlp.up_proj": None, "model.layers.1.mlp.up_proj": None}}
    write_observation(tmp_path / "layers.jsonl", 8, "experts", values)
    found = expert_distances(record_in(tmp_path))
    assert found.trend is None and found.trends == {"up_proj": None}
    assert found.missing == "no layer has two experts whose distance is known"


def test_no_log_and_damaged_logs_have_their_reason(tmp_path: Path) -> None:
    assert layer_norms(record_in(tmp_path)).missing == "the layer log holds no norms"
    assert expert_distances(record_in(tmp_path, state="RUNNING")).missing == "no layer was looked at yet"
    path = tmp_path / "layers.jsonl"
    for damage in ('{"step": 1\n', "[]\n", '{"kind": "norms", "step": 1, "weight": 3, "update": {}}\n', "\xff\n"):
        path.write_bytes(damage.encode("latin-1"))
        found = layer_norms(record_in(tmp_path))
        assert found.observations == () and str(found.missing).startswith(f"{path}: cannot be read: ")
    path.write_text('{"kind": "norms", "step": 1, "weight": {"0": 1.0}, "update": {}}\n{"kind": "no')
    assert len(layer_norms(record_in(tmp_path)).observations) == 1, "a line that is being written is not there yet"
