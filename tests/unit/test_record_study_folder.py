"""What a study leaves in the ledger can be read again as it was asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_lab.errors import DataError, InputError
from lora_lab.record.ledger import Ledger
from lora_lab.record.result import Status
from lora_lab.record.study_folder import begin_study, read_study, study_names
from lora_lab.schema.study import Study, study_from
from tests.unit.ledger_samples import ended, trial_of

CONTENT = {
    "question": "Does it?",
    "source": {"title": "t", "url": "https://example.org"},
    "base": {"model": "tiny_random", "target": ["query", "key"]},
    "seeds": [0, 1],
    "grids": [{"rank": [2, 4], "zip": {"alpha": ["2r", 8], "dropout": [0.0, 0.1]}}, {"method": ["full"]}],
    "metrics": ["heldout/loss"],
    "claims": [{"id": "s", "statement": "s", "rule": "not_runnable", "reason": "r"}],
}


def study() -> Study:
    return study_from(CONTENT, name="mine")


def test_a_study_is_read_as_it_was_asked_for(tmp_path: Path) -> None:
    begin_study(tmp_path, study(), ["a", "b"])
    found = read_study(tmp_path, "mine")
    assert found.study == study()
    assert (found.name, found.run_ids) == ("mine", ("a", "b"))
    assert study_names(tmp_path) == ["mine"]


def test_its_runs_come_in_the_order_of_the_study(tmp_path: Path) -> None:
    records = [ended(tmp_path, trial_of(seed=seed)) for seed in (0, 1, 2)]
    begin_study(tmp_path, study(), [records[2].run_id, "f" * 16, records[0].run_id])
    found = read_study(tmp_path, "mine").records(Ledger(tmp_path))
    assert [record.run_id for record in found] == [records[2].run_id, records[0].run_id]


@pytest.mark.parametrize("last_asked", [0, 1])
def test_trials_that_were_measured_once_more_are_the_studys_whatever_the_last_call_asked_for(
    tmp_path: Path, last_asked: int
) -> None:
    both = [[ended(tmp_path, trial_of(seed=seed), repeat=repeat).run_id for repeat in (0, 1)] for seed in (0, 1)]
    ended(tmp_path, trial_of(seed=2), repeat=1)
    ended(tmp_path, trial_of(seed=0), repeat=2, status=Status.FAILED)
    begin_study(tmp_path, study(), [both[1][last_asked], both[0][last_asked]])
    found = read_study(tmp_path, "mine")
    assert [record.run_id for record in found.records(Ledger(tmp_path))] == [*both[1], *both[0]]
    assert found.has(both[0][1 - last_asked]) and not found.has("f" * 16)


def test_repeats_by_other_arithmetic_are_left_out(tmp_path: Path) -> None:
    """Else the study would have no table any more."""
    record, old = (ended(tmp_path, trial_of(), repeat=repeat) for repeat in (0, 1))
    path = old.folder / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"numerics_version": 7}))
    begin_study(tmp_path, study(), [record.run_id])
    found = read_study(tmp_path, "mine").records(Ledger(tmp_path))
    assert [one.run_id for one in found] == [record.run_id]


def test_no_such_study_names_the_nearest(tmp_path: Path) -> None:
    begin_study(tmp_path, study(), [])
    with pytest.raises(InputError, match=r'no study "mime".*did you mean "mine"'):
        read_study(tmp_path, "mime")


@pytest.mark.parametrize(
    ("name", "content"), [("runs.json", "[]"), ("runs.json", "{"), ("study.json", '{"name": "x"}')]
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: str) -> None:
    folder = begin_study(tmp_path, study(), [])
    (folder / name).write_text(content)
    with pytest.raises(DataError, match=name):
        read_study(tmp_path, "mine")


def test_an_older_folder_has_no_study_file(tmp_path: Path) -> None:
    folder = begin_study(tmp_path, study(), ["a"])
    (folder / "study.json").unlink()
    assert read_study(tmp_path, "mine").study is None
    assert json.loads((folder / "runs.json").read_text()) == {"runs": ["a"]}
