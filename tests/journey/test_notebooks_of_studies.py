"""The notebooks about studies run from their first cell to their last, and are committed without outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from lora_lab.app.study_verdicts import judge_folder
from tests.claims_ledger import fill_claims
from tests.journey.program import CHECKOUT, process_environment

NOTEBOOKS = CHECKOUT / "notebooks"
_DRAWN = "application/vnd.plotly.v1+json"


@pytest.mark.parametrize("name", ["one_study", "own_study"])
def test_it_is_committed_without_outputs(name: str) -> None:
    cells = [cell for cell in _read(name).cells if cell.cell_type == "code"]
    assert cells and all(not cell.outputs and cell.execution_count is None for cell in cells)


def test_one_study_in_depth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "lab"
    study = fill_claims(root)
    monkeypatch.setenv("LORA_LAB_ROOT", str(root))
    monkeypatch.setenv("LORA_LAB_STUDY", "crafted")
    printed, figures = _executed("one_study", tmp_path, monkeypatch)
    for verdict in judge_folder(root, "crafted", study, "pocket").verdicts:
        assert verdict.sentence in printed
    assert "seeds x examples: (5, 48)" in printed
    lines = {line.partition(":")[0]: line.partition(":")[2].strip() for line in printed.splitlines()}
    assert lines["by hand"] == lines["judged"], "difference and interval, in five decimals"
    assert len(figures) >= 5, "the matrix, differences and targets of the claim, and other claims"


def test_a_study_of_ones_own(tmp_path: Path, tiny_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_LAB_OWN", str(tmp_path / "own"))
    monkeypatch.setenv("LORA_LAB_CACHE", str(tiny_cache))
    printed, _ = _executed("own_study", tmp_path, monkeypatch)
    assert "larger_is_better: Rank 16 learns more than rank 2." in printed
    assert "eight_times reproduced [None, None] needed [8.0, 8.0]" in printed
    assert "nearly_equal same direction" in printed
    assert "smallest_difference: 0.05 became 0.0" in printed, "the changed criterion is refused"
    page = tmp_path / "own" / "lab" / "studies" / "own" / "report.html"
    assert "Rank 16 learns more than rank 2." in page.read_text()


def _read(name: str) -> Any:
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def _executed(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, list[Any]]:
    """What a notebook prints, and its figures."""
    monkeypatch.setenv("PYTHONPATH", process_environment()["PYTHONPATH"])
    monkeypatch.setenv("IPYTHONDIR", str(folder / "ipython"))
    notebook = _read(name)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOKS)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    texts = [output.text if output.output_type == "stream" else output.data.get("text/plain", "") for output in outputs]
    return "".join(texts), [output["data"][_DRAWN] for output in outputs if _DRAWN in output.get("data", {})]
