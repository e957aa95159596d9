"""What a study leaves in the ledger can be read again as it was asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_lab.errors import DataError, InputError
from lora_lab.record.ledger import Ledger
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
    "claims": [{"statement": "s", "at_least": 0.1}],
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
