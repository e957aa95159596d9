"""Kept records: what scores are read from stays the same, and what names a machine does not come along."""

from __future__ import annotations

import json
from pathlib import Path

from lora_lab.record.kept_records import keep
from lora_lab.record.ledger import Ledger
from lora_lab.record.run_record import RunRecord
from lora_lab.study.samples import read_heldout, read_samples, samples_files
from tests.unit.ledger_samples import claim, digest, ended, loss, result_of, trial_of

SAMPLES = [
    {
        "doc_id": number,
        "doc_hash": f"{number:064x}",
        "filter": "none",
        "metrics": ["acc", "perplexity"],
        "acc": float(number % 2),
        "perplexity": [-12.5, 7],
        "doc": {"question": "what? " * 100},
        "resps": [["a long answer " * 50]],
    }
    for number in range(5)
]
HELDOUT = [{"index": number, "loss": 1.5 * number + 1, "loss_tokens": 3, "exact_match": None} for number in range(4)]
FACTS = {
    "executed": "alone",
    "model_folder": "/home/somebody/lab/cache/models/tiny-71ad",
    "notes": ["see https://example.org/a/b and 5.5 tokens/s/core", "from /scratch/x/y.json it came"],
}


def a_run(root: Path) -> RunRecord:
    """A run with everything that a real one leaves."""
    ledger = Ledger(root)
    folder = claim(ledger, trial_of())
    assert folder is not None
    with folder:
        (folder.path / "adapter").mkdir()
        (folder.path / "adapter" / "adapter_model.safetensors").write_bytes(b"0" * 100_000)
        folder.steps_path.write_text('{"step":1,"loss":2.0}\n')
        scores = folder.path / "eval"
        (scores / "deeper").mkdir(parents=True)
        (scores / "heldout.jsonl").write_text("".join(json.dumps(one) + "\n" for one in HELDOUT))
        (scores / "answers.jsonl").write_text('{"prompt":"a","expected":"b","answer":"c"}\n')
        lines = "".join(json.dumps(one) + "\n" for one in SAMPLES)
        (scores / "deeper" / "samples_task_2026-01-01T00-00-00.jsonl").write_text(lines)
        folder.write_result(result_of(folder, metrics={"heldout/loss": loss(2.0)}, facts=FACTS))
    record = ledger.find(digest(trial_of()), 0)
    assert record is not None
    return record


def test_scores_read_the_same_and_weights_and_texts_stay_behind(tmp_path: Path) -> None:
    record = a_run(tmp_path / "lab")
    (kept,) = keep(tmp_path / "lab", "ranks", [record.run_id, "never-begun"], tmp_path / "records")
    assert kept.run_id == record.run_id
    (copy,) = Ledger(tmp_path / "records").runs()
    assert copy.state == "COMPLETED" and copy.is_done and copy.header == record.header
    assert copy.result is not None and record.result is not None
    assert copy.result.metrics == record.result.metrics
    assert read_heldout(copy.eval_folder) == read_heldout(record.eval_folder) is not None
    (original,), (cut,) = (samples_files(one.eval_folder).values() for one in (record, copy))
    assert read_samples(cut) == read_samples(original) and len(read_samples(cut)) == 5
    assert json.loads(cut.read_text().splitlines()[0])["perplexity"] == [-12.5, 7]
    files = {path.name for path in copy.folder.rglob("*") if path.is_file()}
    assert files == {"trial.json", "result.json", "environment.json", "steps.jsonl", "heldout.jsonl", cut.name}
    assert sum(path.stat().st_size for path in copy.folder.rglob("*") if path.is_file()) < 8_000


def test_nothing_names_a_machine_or_a_folder_of_it(tmp_path: Path) -> None:
    record = a_run(tmp_path / "lab")
    path = record.folder / "environment.json"
    path.write_text(json.dumps({"hostname": "anvil", "machine_id": "m1", "variables": {"A": "b"}, "cpu": "x"}))
    keep(tmp_path / "lab", "ranks", [record.run_id], tmp_path / "records")
    (copy,) = Ledger(tmp_path / "records").runs()
    assert json.loads((copy.folder / "environment.json").read_text()) == {"machine_id": "m1", "cpu": "x"}
    assert copy.result is not None
    assert copy.result.facts["model_folder"] == "tiny-71ad"
    assert copy.result.facts["notes"] == ["see https://example.org/a/b and 5.5 tokens/s/core", "from y.json it came"]


def test_the_study_comes_along_and_a_second_keeping_replaces_the_first(tmp_path: Path) -> None:
    folder = tmp_path / "lab" / "studies" / "ranks"
    folder.mkdir(parents=True)
    (folder / "registration.json").write_text('{"digest": "a"}')
    (folder / "report.html").write_text("a page")
    keep(tmp_path / "lab", "ranks", [], tmp_path / "records")
    (folder / "registration.json").write_text('{"digest": "b"}')
    keep(tmp_path / "lab", "ranks", [], tmp_path / "records")
    kept = tmp_path / "records" / "studies" / "ranks"
    assert [path.name for path in kept.iterdir()] == ["registration.json"]
    assert json.loads((kept / "registration.json").read_text()) == {"digest": "b"}


def test_a_failed_run_stays_in_the_records(tmp_path: Path) -> None:
    record = ended(tmp_path / "lab", trial_of(), status="FAILED", reason="it broke in /home/somebody/code/x.py")
    keep(tmp_path / "lab", "ranks", [record.run_id], tmp_path / "records")
    (copy,) = Ledger(tmp_path / "records").runs()
    assert copy.state == "FAILED" and copy.result is not None and copy.result.reason == "it broke in x.py"
