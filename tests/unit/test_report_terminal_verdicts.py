"""Verdicts on a terminal and in a pipe."""

from __future__ import annotations

import io
from pathlib import Path

from lora_lab.app.study_verdicts import judge_folder
from lora_lab.report.terminal_verdicts import print_verdicts
from tests.claims_ledger import claims_study, fill_claims, with_claim


def test_all_of_every_verdict_is_printed_whole_in_a_pipe(tmp_path: Path) -> None:
    study = fill_claims(tmp_path)
    verdicts = judge_folder(tmp_path, "crafted", study, "pocket").verdicts
    stream = io.StringIO()
    print_verdicts(study, "pocket", verdicts, seeds=[0, 1, 2, 3, 4], looks=2, stream=stream)
    lines = stream.getvalue().splitlines()
    for verdict in verdicts:
        assert any(line.endswith(verdict.sentence) for line in lines)
        assert verdict.would_decide is None or f"    would decide it: {verdict.would_decide}" in lines
    assert sum(line.startswith("all_layers_better: Adapters on all layers") for line in lines) == 1, (
        "once for both forms"
    )
    assert [line for line in lines if line.startswith("  rate tuned: ")]
    assert lines[-2].startswith("crafted (pocket): 4 same direction")
    assert lines[-1] == "2 looks were taken at this study; these verdicts are of the seeds 0, 1, 2, 3, 4"
    assert "\x1b" not in stream.getvalue()


def test_nothing_to_judge() -> None:
    stream = io.StringIO()
    print_verdicts(claims_study(claims=[]), "pocket", [], stream=stream)
    assert stream.getvalue() == "crafted has no claims at the scale pocket\n"


def test_control_sequences_of_a_file_are_not_printed(tmp_path: Path) -> None:
    study = with_claim(statement="\x1b[31mred\x07")
    fill_claims(tmp_path, study)
    stream = io.StringIO()
    print_verdicts(study, "pocket", judge_folder(tmp_path, "crafted", study, "pocket").verdicts, stream=stream)
    assert "\x1b" not in stream.getvalue() and "\x07" not in stream.getvalue()
