"""The notebook runs from its first cell to its last on a small ledger, and is committed without outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from lora_lab.record.ledger import Ledger
from lora_lab.record.study_folder import begin_study, read_study
from lora_lab.report.sentence import answer_sentence
from lora_lab.schema.study import study_from
from lora_lab.study.findings import study_findings
from tests.journey.program import CHECKOUT, process_environment
from tests.page_ledger import add_cohort, fill
from tests.unit.ledger_samples import trial_of

NOTEBOOK = CHECKOUT / "notebooks" / "first_look.ipynb"


def test_it_is_committed_without_outputs() -> None:
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert cells and all(not cell.outputs and cell.execution_count is None for cell in cells)


def test_it_runs_on_a_ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "lab"
    fill(root, ranks=[2, 8], rates=[1e-3, 2e-3], seeds=[0, 1, 2])
    printed, figures = _executed(root, tmp_path, monkeypatch)
    findings = study_findings(read_study(root, "first_look"), Ledger(root))
    assert "Does the rank matter?" in printed
    assert answer_sentence(findings.answer) in printed
    assert len(figures) == 4, "curves, cost, memory, two axes"


@pytest.mark.slow
def test_it_runs_where_no_run_was_made_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a time or a peak of their own; what cannot be drawn says why."""
    root = tmp_path / "lab"
    add_cohort(root, "5f0c", [trial_of(rank=rank) for rank in (2, 8)], seats=2, on_cpu=False)
    printed, figures = _executed(root, tmp_path, monkeypatch)
    assert "none of 2 settings has one among their 2 runs: lora-r2, lora-r8" in printed
    curves, cost, memory = figures
    assert len(curves["data"]) == 2 and not cost["data"] and not memory["data"]
    reason = "no run was executed alone (1 of 1 trained in cohorts)"
    assert all(reason in figure["layout"]["annotations"][0]["text"] for figure in (cost, memory))


def _executed(root: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, list[Any]]:
    """What the notebook prints of a study of all runs of a ledger, and its figures."""
    run_ids = [record.run_id for record in Ledger(root).runs()]
    content = {"question": "Does the rank matter?", "grids": [{"rank": [2, 8]}], "metrics": ["heldout/loss"]}
    begin_study(root, study_from(content, name="first_look"), run_ids)
    monkeypatch.setenv("LORA_LAB_ROOT", str(root))
    monkeypatch.setenv("PYTHONPATH", process_environment()["PYTHONPATH"])
    monkeypatch.setenv("IPYTHONDIR", str(folder / "ipython"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    texts = [output.text if output.output_type == "stream" else output.data.get("text/plain", "") for output in outputs]
    printed = "".join(texts)  # rich shows its tables as data
    drawn = "application/vnd.plotly.v1+json"
    return printed, [output["data"][drawn] for output in outputs if drawn in output.get("data", {})]
