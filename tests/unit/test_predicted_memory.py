"""Predicted beside measured memory: which runs count, how errors are made, and that every view tells the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest

from lora_lab.app.cli import main
from lora_lab.record.export import rows_of
from lora_lab.record.ledger import Ledger
from lora_lab.record.result import Status
from lora_lab.record.run_record import RunRecord
from lora_lab.record.wandb_mapping import summary_of
from lora_lab.report.memory_figures import predicted_figure
from lora_lab.report.memory_words import error_sentence, peak_sentence, percent_text
from lora_lab.report.page_figures import families
from lora_lab.report.page_memory import memory_view
from lora_lab.study.findings import findings_of
from lora_lab.study.predicted_memory import PredictedMemory, part_pairs, predicted_memory
from tests.page_ledger import add_run, fill
from tests.unit.ledger_samples import as_member, trial_of
from tests.unit.study_samples import record_of
from tests.unit.test_report_page import drawn
from tests.unit.timeline_samples import prediction_of_parts

GB = 1_000_000_000


def run(predicted: int | None, measured: int | None, *, seed: int = 0, **changes: Any) -> RunRecord:
    measurements = {} if measured is None else {"peak_allocated_bytes": measured}
    fields = {"measurements": measurements, "facts": {"executed": "alone", "device": "cpu"}, **changes}
    return record_of(trial_of(seed=seed), predicted_peak_allocated_bytes=predicted, **fields)


def test_errors_are_fractions_of_what_was_measured() -> None:
    found = predicted_memory([run(102, 100), run(990, 1000, seed=1), run(95, 100, seed=2), run(200, 200, seed=3)])
    assert [pair.peaks.error for pair in found.pairs] == pytest.approx([0.02, -0.01, -0.05, 0.0])
    assert found.median_error == pytest.approx(0.015), "of absolute errors: 0, 0.01, 0.02, 0.05"
    assert found.largest is not None and found.largest.name == "lora-r8-s2"
    assert error_sentence(found) == (
        "Over 4 runs that have a predicted and a measured peak, the median absolute error is 1.50 %, "
        "the largest error -5.0 % (lora-r8-s2)."
    )
    told = found.to_json()
    assert (told["count"], told["without"], told["largest_error"]) == (4, 0, pytest.approx(-0.05))
    assert told["runs"][0]["predicted_peak_allocated_bytes"] == 102 and told["runs"][0]["peak_allocated_bytes"] == 100
    json.dumps(told, allow_nan=False)


@pytest.mark.parametrize(
    ("record", "is_trained"),
    [
        (run(None, 100), True),
        (run(100, None), True),
        (run(100, 0), True),
        (run(100, 90, status=Status.FAILED), False),
        (run(100, 90, status=Status.OUT_OF_MEMORY), False),
        (run(100, 90, status=Status.INTERRUPTED), False),
        (run(100, 90, facts={"executed": "cohort"}), True),
    ],
)
def test_a_run_without_two_comparable_numbers_does_not_count(record: RunRecord, is_trained: bool) -> None:
    found = predicted_memory([record])
    assert (found.pairs, found.without) == ((), int(is_trained)) and error_sentence(found) is None


def test_a_base_is_not_asked_for_a_peak() -> None:
    assert predicted_memory([record_of(trial_of(method={"kind": "base"}))]) == PredictedMemory((), None, None, 0)


@pytest.mark.parametrize("status", [Status.STOPPED, Status.DIVERGED])
def test_a_run_that_ended_early_has_had_its_peak(status: Status) -> None:
    assert len(predicted_memory([run(100, 90, status=status)]).pairs) == 1


def test_a_member_whose_step_was_counted_alone_counts() -> None:
    member = as_member("c", ["a", "b"], seats=2, wall=5.0)
    found = predicted_memory([record_of(trial_of(), predicted_peak_allocated_bytes=707_000_000, **member)])
    assert [pair.peaks.error for pair in found.pairs] == [pytest.approx(0.01)]


@pytest.mark.parametrize(
    ("fraction", "text"),
    [(0.008, "+0.8 %"), (-0.012, "-1.2 %"), (0.0004, "+0.04 %"), (0.0, "0.00 %"), (-1e-9, "0.00 %"), (1.5, "+150.0 %")],
)
def test_percent(fraction: float, text: str) -> None:
    assert percent_text(fraction) == text


def test_a_run_says_both_or_why_not() -> None:
    def told(record: RunRecord) -> str | None:
        assert record.result is not None
        return peak_sentence(record.result)

    assert told(run(1_020_000_000, 1_012_000_000)) == "predicted 1.02 GB, measured 1.01 GB, +0.8 %"
    assert told(run(GB, None, missing={"peak_allocated_bytes": "no probe"})) == (
        "predicted 1.00 GB; not measured: no probe"
    )
    failed = told(run(GB, GB, status=Status.OUT_OF_MEMORY))
    assert failed is not None and "%" not in failed and "OUT_OF_MEMORY" in failed
    assert told(run(None, GB)) is None


PARTS = {"weights": 600, "quantization_constants": 10, "adapter": 40, "optimizer_state": 80, "activations": 250}
MEASURED = {
    "peak_allocated_bytes": 1000,
    "frozen_weight_bytes": 610,
    "trainable_weight_bytes": 40,
    "gradient_bytes": 40,
    "optimizer_state_bytes": 100,
}


def result_with(parts: dict[str, int], measured: dict[str, int], **changes: Any) -> Any:
    prediction = prediction_of_parts(parts, **changes)
    facts = {"executed": "alone", "prediction": json.loads(json.dumps(prediction.to_json()))}
    peak = prediction.peak_allocated_bytes
    return record_of(trial_of(), predicted_peak_allocated_bytes=peak, measurements=measured, facts=facts).result


def test_parts_stand_beside_what_was_measured_of_the_same_bytes() -> None:
    pairs = part_pairs(result_with(PARTS, MEASURED))
    assert [(pair.title, pair.predicted_bytes, pair.measured_bytes) for pair in pairs if not pair.is_detail] == [
        ("all weights", 650, 650),
        ("optimizer state", 80, 100),
        ("gradients, activations, temporary", 250, 250),
        ("peak", 980, 1000),
    ]
    assert [pair.title for pair in pairs if pair.is_detail] == ["weights", "quantization constants", "adapter"]
    groups = [pair for pair in pairs if not pair.is_detail]
    for side in ("predicted_bytes", "measured_bytes"):
        assert sum(getattr(pair, side) for pair in groups[:-1]) == getattr(groups[-1], side)


def test_states_in_managed_memory_have_no_counterpart() -> None:
    pairs = {
        pair.title: pair for pair in part_pairs(result_with({**PARTS, "optimizer_state": 0}, MEASURED, paged_bytes=80))
    }
    assert pairs["optimizer state"].measured_bytes is None
    assert pairs["gradients, activations, temporary"].measured_bytes is None
    assert pairs["all weights"].measured_bytes == 650


def test_a_missing_part_leaves_a_gap_and_no_number() -> None:
    measured = {name: value for name, value in MEASURED.items() if name != "frozen_weight_bytes"}
    pairs = {pair.title: pair.measured_bytes for pair in part_pairs(result_with(PARTS, measured))}
    assert pairs["all weights"] is None and pairs["gradients, activations, temporary"] is None
    assert pairs["optimizer state"] == 100 and pairs["peak"] == 1000


def test_a_run_without_a_kept_prediction_has_no_parts() -> None:
    for kept in ({}, {"prediction": None}, {"prediction": {"parts": {"weights": 1}}}, {"prediction": {"parts": 3}}):
        record = run(100, 90, facts={"executed": "alone", **kept})
        assert record.result is not None and part_pairs(record.result) == []
        view = memory_view(record.result)
        assert (
            view is not None and view["rows"] == [] and view["sentence"] == "Predicted 100 B, measured 90 B, +11.1 %."
        )


def test_the_figure_has_a_point_per_run_and_a_line_where_both_are_equal() -> None:
    found = predicted_memory([run(102, 100), run(990, 1000, seed=1)])
    figure = predicted_figure(found.pairs, {})
    line, points = figure["data"]
    assert line["x"] == line["y"] == [100, 1000]
    assert (points["x"], points["y"]) == ([100, 1000], [102, 990])
    assert points["customdata"][0] == ["lora-r8-s0 (cpu)", "102 B", "100 B", "+2.0 %"]
    assert figure["layout"]["xaxis"]["type"] == figure["layout"]["yaxis"]["type"] == "log"
    assert "type" not in predicted_figure(found.pairs[:1], {})["layout"]["xaxis"]
    go.Figure(figure)
    assert "missing" in predicted_figure((), {})


def predict(root: Path, factors: dict[int, float]) -> list[RunRecord]:
    """Runs by seed whose peak was predicted so many times too large."""
    records = []
    for seed, factor in factors.items():
        peak = 900_000_000 + 16 * 8000
        records.append(add_run(root, trial_of(seed=seed), predicted_peak_allocated_bytes=round(peak * factor)))
    return records


def test_page_and_json_tell_the_same_of_a_ledger(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    predict(tmp_path, {0: 1.01, 1: 0.97, 2: 1.0})
    add_run(tmp_path, trial_of(seed=3))
    page, findings, _ = drawn(tmp_path)
    assert [family.id for family in families(findings)][-1] == "predicted"
    assert "Over 3 runs that have a predicted and a measured peak, the median absolute error is 1.00 %" in page.text
    assert "the largest error -3.0 % (lora-r8-s1); 1 other trained run lacks one of the two." in page.text
    assert len(page.blocks["figures-predicted"][""]["data"][1]["x"]) == 3
    first = findings.records[0].run_id
    assert page.blocks[f"run-data-{first}"]["memory"]["sentence"] == "Predicted 909 MB, measured 900 MB, +1.0 %."
    assert main(["report", "--root", str(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["predicted_memory"]
    assert told == json.loads(json.dumps(findings.predicted.to_json())) and told["count"] == 3


def test_without_a_prediction_there_is_no_section(tmp_path: Path) -> None:
    fill(tmp_path, ranks=[2], rates=[1e-3], seeds=[0, 1])
    page, findings, _ = drawn(tmp_path)
    assert "figures-predicted" not in page.blocks and "against measured memory" not in page.text
    assert findings.to_json()["predicted_memory"]["count"] == 0
    assert all(page.blocks[f"run-data-{record.run_id}"]["memory"] is None for record in findings.records)


def test_exported_rows_and_wandb_have_predicted_measured_and_error(tmp_path: Path) -> None:
    prediction = prediction_of_parts(PARTS).to_json()
    add_run(
        tmp_path,
        trial_of(seed=0),
        predicted_peak_allocated_bytes=990,
        measurements={"peak_allocated_bytes": 1000},
        facts={"executed": "alone", "prediction": prediction},
    )
    add_run(tmp_path, trial_of(seed=1))
    records = Ledger(tmp_path).runs()
    row, other = rows_of(records)
    columns = ("predicted_peak_allocated_bytes", "peak_allocated_bytes", "predicted_peak_error_fraction")
    assert [row[name] for name in columns] == [990, 1000, pytest.approx(-0.01)]
    assert row["facts.prediction.parts.activations"] == 250
    assert "predicted_peak_error_fraction" not in other
    assert records[0].header is not None and records[1].header is not None
    summary = summary_of(records[0].header, records[0].result, state="COMPLETED")
    assert [summary[name] for name in columns] == [990, 1000, pytest.approx(-0.01)]
    assert summary["predicted_parts_bytes"] == prediction["parts"]
    plain = summary_of(records[1].header, records[1].result, state="COMPLETED")
    assert not {"predicted_parts_bytes", columns[2]} & plain.keys()


def test_findings_carry_them() -> None:
    assert len(findings_of([run(102, 100)], metrics=None).predicted.pairs) == 1
