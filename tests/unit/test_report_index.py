"""The index of studies: the committed one is what the study files and the recorded verdicts make."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from lora_lab.app.study_verdicts import judge_folder
from lora_lab.plan.study_file import read_study
from lora_lab.record.study_folder import study_folder
from lora_lab.record.verdicts import put_verdicts
from lora_lab.report.claim_rules import rule_text
from lora_lab.report.index import main, render_index
from tests.claims_ledger import CONTENT, claims_study, fill_claims

SWEEPS = Path(__file__).parents[2] / "sweeps"


def test_the_committed_index_is_current() -> None:
    told = "python -m lora_lab.report.index writes it anew"
    assert (SWEEPS / "README.md").read_text(encoding="utf-8") == render_index(SWEEPS), told


def test_every_claim_of_every_study_is_listed() -> None:
    text = (SWEEPS / "README.md").read_text(encoding="utf-8")
    studies = [read_study(path) for path in SWEEPS.glob("*.yaml")]
    claims = [claim for study in studies for claim in study.claims]
    assert claims and all(f"**{claim.id}**: " in text for claim in claims)
    assert all(f"\n## {study.name}\n" in text for study in studies)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Study files with records of one of them, judged."""
    folder = tmp_path / "sweeps"
    folder.mkdir()
    (folder / "crafted.yaml").write_text(yaml.safe_dump(CONTENT, sort_keys=False))
    records = folder / "records"
    fill_claims(records)
    judged = judge_folder(records, "crafted", claims_study(), "pocket")
    put_verdicts(study_folder(records, "crafted"), [0, 1, 2, 3, 4], [one.to_json() for one in judged.verdicts])
    return folder


def test_recorded_verdicts_are_told_with_their_sentences(folder: Path) -> None:
    assert main([str(folder)]) == 0
    text = (folder / "README.md").read_text()
    judged = judge_folder(folder / "records", "crafted", claims_study(), "pocket")
    for verdict in judged.verdicts:
        assert f"**{verdict.sentence[: len(verdict.word)]}**" in text
    assert "heldout/loss of all8 is 0.2278 nats/token below that of qv8" in text
    assert "rate tuned: **Same direction**" in text
    assert "the 58 recorded ones took" in text
    assert "| not run" not in text


def test_without_records_nothing_looks_judged(folder: Path) -> None:
    shutil.rmtree(folder / "records")
    text = render_index(folder)
    lines = [line for line in text.splitlines() if line.startswith("| **")]
    assert len(lines) == len(CONTENT["claims"])
    for line in lines:
        assert "| not run |" in line or "| not runnable |" in line
    assert "reproduced**" not in text and "direction**" not in text.lower()


def test_a_changed_criterion_takes_the_verdicts_away(folder: Path) -> None:
    path = folder / "crafted.yaml"
    path.write_text(path.read_text().replace("smallest_difference: 0.05", "smallest_difference: 0.04"))
    text = render_index(folder)
    assert "the file's criteria have changed since they were registered" in text
    assert "Same direction" not in text


def test_a_typo_in_words_keeps_them(folder: Path) -> None:
    path = folder / "crafted.yaml"
    path.write_text(path.read_text().replace("Rank 8 beats rank 2.", "Rank 8 is better than rank 2."))
    assert "Same direction" in render_index(folder)


def test_bad_files_are_told_and_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.yaml").write_text("question: q\ngrids: []\n")
    assert main([str(tmp_path)]) == 2
    assert "no grids" in capsys.readouterr().err
    assert not (tmp_path / "README.md").exists()


def test_signs_of_markdown_do_not_break_the_table(folder: Path) -> None:
    path = folder / "crafted.yaml"
    path.write_text(path.read_text().replace("Rank 8 beats rank 2.", "a | b <script> [x](javascript:y)"))
    text = render_index(folder)
    assert r"a \| b \<script\> \[x\](javascript:y)" in text


def test_rules_in_words() -> None:
    study = claims_study()
    told = {claim.id: rule_text(claim, study) for claim in study.claims}
    assert told == {
        "all_layers_better": "heldout/loss of all8 is below that of qv8 by more than 0.05 (95 % interval)",
        "rank_helps": "heldout/loss of the mean of qv8, all8 is below that of the mean of qv2, all2 by more than 0.05 "
        "(95 % interval)",
        "ranks_equal": "heldout/loss of qv8 and of qv2 differ by less than 0.1 (90 % interval)",
        "best": "heldout/loss of none of qv2, qv8, all2 is below that of all8 (95 % intervals)",
        "slower": "step_seconds of all8 / that of qv8 is at least 1.05 (95 % interval of the log ratios)",
        "headline": "100 * (slow_s / fast_s - 1) is from 38 to 40",
        "predicted": "planned(predicted_peak_allocated_bytes, all8) / 1e9 / peak_gb is from 0.95 to 1.05",
        "both": "all of all_layers_better, rank_helps hold",
        "judge": "not runnable here",
    }


def test_a_family_lowers_the_error_of_each() -> None:
    claims = [
        {**one, "family": "f"} if one["id"] in ("rank_helps", "ranks_equal") else one for one in CONTENT["claims"]
    ]
    study = claims_study(claims=claims)
    told = {claim.id: rule_text(claim, study) for claim in study.claims}
    assert told["rank_helps"].endswith("(97.5 % interval, one of 2 of the family f)")
    assert told["ranks_equal"].endswith("(95 % interval, one of 2 of the family f)")
