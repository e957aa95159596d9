"""Parts of the peak: they add up, come from one run, and are missing with a reason where they cannot."""

from __future__ import annotations

import json

import pytest

from lora_lab.record.result import Status
from lora_lab.record.run_record import RunRecord
from lora_lab.study.memory_parts import PARTS, REST, MemoryParts, memory_parts
from lora_lab.study.table import settings_table
from tests.unit.ledger_samples import trial_of
from tests.unit.study_samples import record_of

MEASURED = {
    "peak_allocated_bytes": 1000,
    "frozen_weight_bytes": 600,
    "trainable_weight_bytes": 50,
    "gradient_bytes": 40,
    "optimizer_state_bytes": 100,
}


def _parts(records: list[RunRecord]) -> MemoryParts:
    (row,) = settings_table(records, metrics=None).rows
    parts = memory_parts(records, row)
    assert parts is not None
    return parts


def test_the_parts_of_the_largest_run_add_up_to_its_peak() -> None:
    smaller = record_of(trial_of(seed=0), measurements={**MEASURED, "peak_allocated_bytes": 900})
    largest = record_of(trial_of(seed=1), measurements=MEASURED, facts={"device": "cpu"})
    another = record_of(trial_of(seed=0, rank=2), measurements={**MEASURED, "peak_allocated_bytes": 9000})
    failed = record_of(trial_of(seed=2), status=Status.FAILED, measurements={**MEASURED, "peak_allocated_bytes": 5000})
    row = settings_table([smaller, largest, failed], metrics=None).rows[0]
    parts = memory_parts([another, smaller, largest, failed], row)
    assert parts is not None and parts.missing is None
    assert parts.parts[REST] == 210 and sum(parts.parts.values()) == parts.peak_bytes == 1000
    assert list(parts.parts) == list(PARTS) and parts.run_id == largest.run_id and parts.device == "cpu"
    json.dumps(parts.to_json(), allow_nan=False)


@pytest.mark.parametrize("absent", [name for name in MEASURED if name != "peak_allocated_bytes"])
def test_without_any_one_part_there_are_none(absent: str) -> None:
    """On CUDA nobody counts gradients; the result says why."""
    measured = {name: value for name, value in MEASURED.items() if name != absent}
    parts = _parts([record_of(trial_of(), measurements=measured, missing={absent: "only a CPU needs it"})])
    assert parts.parts == {} and parts.missing == f"no {absent}: only a CPU needs it" and parts.peak_bytes == 1000


def test_a_sum_above_the_peak_is_no_split() -> None:
    parts = _parts([record_of(trial_of(), measurements={**MEASURED, "optimizer_state_bytes": 311})])
    assert parts.parts == {} and str(parts.missing).startswith(
        "weights, gradients and optimizer state are 1 bytes more"
    )
    assert _parts([record_of(trial_of(), measurements={**MEASURED, "optimizer_state_bytes": 310})]).parts[REST] == 0


def test_without_a_peak_the_reason_is_told_and_a_base_has_no_parts() -> None:
    assert _parts([record_of(trial_of(), status=Status.DIVERGED, measurements=MEASURED)]).missing == "no completed run"
    assert _parts([record_of(trial_of())]).missing == "the peak was not measured"
    told = record_of(trial_of(), missing={"peak_allocated_bytes": "this device has no allocator"})
    assert _parts([told]).missing == "this device has no allocator"
    base = record_of(trial_of(method={"kind": "base"}))
    (row,) = settings_table([base], metrics=None).rows
    assert memory_parts([base], row) is None


def test_the_peak_of_a_cohort_is_not_split_and_that_of_a_step_made_alone_is() -> None:
    together = {"executed": "cohort", "cohort": {"id": "c", "seats": 2, "members": ["a", "b"]}}
    shared = _parts([record_of(trial_of(), measurements=MEASURED, facts=together)])
    assert shared.parts == {} and shared.missing == "no run was executed alone (1 of 1 trained in cohorts)"
    own = _parts([record_of(trial_of(), measurements=MEASURED, facts={**together, "probe": "alone"})])
    assert own.missing is None and own.peak_bytes == 1000
