"""Cohorts as their members' results tell them: sums of the members' own, shared numbers from the file that has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora_lab.record.cohort_facts import cohort_of, owns_peak, short_reason, why_missing
from lora_lab.record.ledger import Ledger
from lora_lab.record.result import Status
from lora_lab.study.cohorts import PEAK, SPEED, TRAIN, WALL, Cohort, cohorts_of
from tests.page_ledger import add_cohort, add_run
from tests.unit.ledger_samples import as_member, ended, trial_of
from tests.unit.study_samples import record_of


def _only(root: Path) -> Cohort:
    (cohort,) = cohorts_of(Ledger(root).runs())
    json.dumps(cohort.to_json(), allow_nan=False)
    return cohort


def test_numbers_of_a_cohort_are_those_of_its_members_files(tmp_path: Path) -> None:
    """The second member ended last, after 20 s; steps and tokens are 12 and 4,800 of each."""
    first, last = add_cohort(tmp_path, "c1", [trial_of(seed=0), trial_of(seed=1)], seats=4)
    add_run(tmp_path, trial_of(rank=2))
    cohort = _only(tmp_path)
    assert (cohort.id, cohort.seats, cohort.ended) == ("c1", 4, 2)
    assert sorted(cohort.members) == sorted([first.run_id, last.run_id])
    assert cohort.own == {"steps": 24, "tokens": 9600} and cohort.missing == {}
    told = json.loads((last.folder / "result.json").read_text())["measurements"]
    for name in (WALL, TRAIN, SPEED, PEAK):
        assert (cohort.shared[name].value, cohort.shared[name].run_id) == (told[name], last.run_id)


def test_the_peak_is_the_largest_that_any_member_saw(tmp_path: Path) -> None:
    fields = [as_member("c1", ["a"], seats=2, wall=wall) for wall in (10.0, 20.0)]
    fields[0]["measurements"][PEAK] = 10**12
    first, last = (ended(tmp_path, trial_of(seed=seed), **one) for seed, one in enumerate(fields))
    cohort = _only(tmp_path)
    assert (cohort.shared[PEAK].value, cohort.shared[PEAK].run_id) == (10**12, first.run_id)
    assert cohort.shared[WALL].run_id == last.run_id


def test_members_without_a_result_here_are_named_and_not_counted(tmp_path: Path) -> None:
    record = ended(tmp_path, trial_of(), **as_member("c1", ["x" * 16, "y" * 16], seats=2, wall=9.0))
    cohort = _only(tmp_path)
    assert (cohort.members, cohort.ended) == ((record.run_id, "x" * 16, "y" * 16), 1)


def test_what_was_not_measured_of_a_cohort_says_why(tmp_path: Path) -> None:
    fields = as_member("c1", ["a"], seats=2, wall=9.0)
    del fields["measurements"][PEAK]
    fields["missing"][PEAK] = "a CPU has no allocator to ask"
    ended(tmp_path, trial_of(), **fields)
    cohort = _only(tmp_path)
    assert PEAK not in cohort.shared and cohort.missing == {PEAK: "a CPU has no allocator to ask"}


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"executed": "alone"},
        {"executed": "alone", "cohort": {"id": "c", "seats": 2, "members": []}},
        {"executed": "cohort"},
        {"executed": "cohort", "cohort": "c"},
        {"executed": "cohort", "cohort": {"seats": 2}},
    ],
)
def test_no_cohort_where_the_facts_name_none(facts: dict[str, Any]) -> None:
    record = record_of(trial_of(), facts=facts)
    assert cohort_of(record.result) is None and cohorts_of([record]) == ()


def test_whose_a_peak_is() -> None:
    cases = {("alone", None): True, ("cohort", None): False, ("cohort", "alone"): True}
    for (executed, probe), own in cases.items():
        result = record_of(trial_of(), facts={"executed": executed, "probe": probe}).result
        assert result is not None and owns_peak(result) is own


def test_why_a_run_lacks_a_number() -> None:
    assert why_missing(None, "train_seconds") == "the run has not ended"
    together = {"executed": "cohort", "cohort": {"id": "c7", "seats": 2, "members": ["a", "b"]}}
    untold = record_of(trial_of(), facts=together).result
    told = record_of(trial_of(), facts=together, missing={"train_seconds": "in cohort c7 with 1 others"}).result
    lone = record_of(trial_of(), status=Status.FAILED, missing={"train_seconds": "no step was finished"}).result
    assert why_missing(told, "train_seconds") == "in cohort c7 with 1 others"
    assert "trained in cohort c7" in why_missing(untold, "train_seconds")
    assert short_reason(told, "train_seconds") == short_reason(untold, "train_seconds")
    assert "c7" not in short_reason(told, "train_seconds") and "cohort=off" in short_reason(told, "train_seconds")
    assert short_reason(lone, "train_seconds") == "no step was finished"
