"""The study of every method, in its small version: all of it runs, is compared, and runs only once."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_lab.plan.study_file import find_study, read_study
from lora_lab.record.ledger import Ledger
from lora_lab.record.result import Status
from lora_lab.schema.method import METHODS
from tests.journey.program import CHECKOUT, call, single_thread

SWEEPS = CHECKOUT / "sweeps"


@pytest.mark.slow
def test_methods_debug(tmp_path: Path) -> None:
    command = ("run", "-m", "study=methods_debug", f"root='{tmp_path / 'lab'}'", "tracking=off", "seed=0")
    with single_thread():
        answer = call(*command, "--json")
        assert answer.code == 0, answer.err
        again = call(*command)
    records = Ledger(tmp_path / "lab").runs()
    assert {record.state for record in records} == {Status.COMPLETED}
    assert {record.trial["method"]["kind"] for record in records} == set(METHODS)
    assert len(answer.json()["rows"]) == len(records) > len(METHODS)
    assert again.code == 0 and "started" not in again.err
    assert (tmp_path / "lab" / "studies" / "methods_debug" / "report.html").is_file()


def test_both_studies_name_every_method() -> None:
    for name in ("methods", "methods_debug"):
        study = read_study(find_study(name, [SWEEPS]))
        named = {
            "lora" if kind == "qlora" else str(kind)
            for grid in study.grids
            for axes in grid.dimensions
            for kind in axes.get("method", ())
        }
        assert named == set(METHODS) - {"base"}
