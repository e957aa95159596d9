"""`doctor` on this very machine: everything is really tried, and nothing is left behind."""

from __future__ import annotations

import csv
import hashlib
import json
import sys
from pathlib import Path

import pytest

from lora_lab.record.environment import cpu_model
from tests.journey.program import call

_MACHINE = ["python", "torch", "device", "bitsandbytes", "transformers", "peft", "lm-eval", "runner"]
_PLACES = ["embedded model", "hub", "wandb", "disk", "root"]


def test_the_default_trial_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    answer = call("doctor", "model=tiny_random", "--json")
    checks = {one["check"]: one for one in answer.json()}
    tasks = [f"task {name}" for name in ("skills_trained", "skills_unseen", "prose_perplexity", "prose_completion")]
    assert list(checks) == [*_MACHINE, *_PLACES, "model tiny_random", "data skills", *tasks]
    assert answer.code == 0, answer.out
    for name in (*_MACHINE, "root", "model tiny_random", "data skills", *tasks):
        assert checks[name]["state"] in ("ok", "warning"), checks[name]
    for one in checks.values():
        assert set(one) == {"check", "state", "fact", "prevents", "advice"}
        assert (one["state"] == "ok") == (one["prevents"] is None) == (one["advice"] is None), one
    assert sys.executable in checks["python"]["fact"]
    assert cpu_model() in checks["device"]["fact"] or "cuda:0" in checks["device"]["fact"]
    assert "switched off by HF_HUB_OFFLINE=1" in checks["hub"]["fact"]
    assert list(tmp_path.iterdir()) == [], "it looks and leaves nothing"


def test_a_sweep_that_lacks_some_of_what_it_needs(tmp_path: Path) -> None:
    """Rows of a file that is not there; official rows in a mirror of which one file has changed."""
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    lines = []
    for task, split in (("piqa", "validation"), ("copa", "validation")):
        content = json.dumps({"goal": task, "sol1": "a", "sol2": "b", "label": 0}).encode()
        (mirror / f"{task}.jsonl").write_bytes(content)
        lines.append((split, f"{task}.jsonl", hashlib.sha256(content).hexdigest(), task))
    with (mirror / "MANIFEST.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("split", "file", "sha256", "lm_eval_task"), *lines])
    (mirror / "copa.jsonl").write_bytes(b"{}")

    own = ["model=tiny_random", "data=jsonl", f"data.path='{tmp_path / 'rows.jsonl'}'", f"root='{tmp_path / 'lab'}'"]
    own += ["evaluation.tasks=[piqa,copa]", f"evaluation.mirror='{mirror}'", "rank=2,4"]
    answer = call("doctor", *own)
    assert answer.code == 4
    found = {line.split("  ")[0].strip(): line for line in answer.out.splitlines()}
    assert "missing  have it not:" in found[f"data {tmp_path / 'rows.jsonl'}"]
    assert "no such file" in found[f"data {tmp_path / 'rows.jsonl'}"]
    assert f"ok       have it: official rows in the mirror, 54 B in {mirror}" in found["task piqa"]
    assert "missing  have it not:" in found["task copa"] and "SHA-256 is" in found["task copa"]
    assert answer.out.splitlines()[-1] == "what was asked for cannot run here yet"
    assert "\x1b" not in answer.out
