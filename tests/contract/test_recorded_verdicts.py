"""What is committed under sweeps/records gives the committed verdicts again, and some of their numbers by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from lora_lab.app.study_verdicts import judge_folder
from lora_lab.plan.shown_study import file_name
from lora_lab.plan.study_file import read_study
from lora_lab.record.study_points import read_points
from lora_lab.record.verdicts import VerdictsFile, read_verdicts
from lora_lab.schema.claims import Equality, Superiority
from lora_lab.schema.study import Study

SWEEPS = Path(__file__).parents[2] / "sweeps"
RECORDS = SWEEPS / "records"
RECORDED = sorted(path.name for path in (RECORDS / "studies").glob("*"))
MOST_BYTES = 20_000_000


def _read(folder: str) -> tuple[Study, VerdictsFile]:
    known = read_verdicts(RECORDS / "studies" / folder)
    assert known is not None
    return read_study(SWEEPS / f"{file_name(folder, known.scale)}.yaml"), known


@pytest.mark.parametrize("folder", RECORDED)
def test_every_verdict_is_derived_again(folder: str) -> None:
    study, known = _read(folder)
    for look in known.looks:
        judged = judge_folder(RECORDS, folder, study, known.scale, seeds=look.seeds)
        _same([one.to_json() for one in judged.verdicts], [dict(one) for one in look.verdicts], folder)


def _same(a: Any, b: Any, where: str) -> None:
    """Equal but for the last digits of numbers, which differ with the processor."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        assert a.keys() == b.keys(), where
        for key in a:
            _same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        assert len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            _same(x, y, f"{where}.{index}")
    elif isinstance(a, float) and isinstance(b, float):
        assert math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12), where
    else:
        assert a == b, where


@pytest.mark.parametrize("folder", RECORDED)
def test_differences_of_loss_by_hand(folder: str) -> None:
    """Sum of nats over sum of tokens, read from the rows of every run by the standard library alone."""
    study, known = _read(folder)
    claims = {claim.id: claim for claim in study.claims}
    for verdict in known.looks[-1].verdicts:
        claim = claims[verdict["claim"]]
        if not isinstance(claim, (Superiority, Equality)) or claim.metric != "heldout/loss" or not verdict["estimate"]:
            continue
        if len(claim.arm) > 1 or len(claim.against) > 1:
            continue
        sides = [_loss(folder, study, name, verdict) for name in (claim.arm[0], claim.against[0])]
        assert math.isclose(sides[0] - sides[1], verdict["estimate"]["difference"], rel_tol=1e-9, abs_tol=1e-12)


def _loss(folder: str, study: Study, arm: str, verdict: Mapping[str, Any]) -> float:
    wanted = study.design(verdict["scale"]).arms[arm]
    nats = tokens = 0.0
    for point in read_points(RECORDS / "studies" / folder):
        is_tuned = point.values.get("learning_rate") == "tuned"
        of_arm = all(point.values.get(key) == value for key, value in wanted.items())
        if point.stage == "judged" and of_arm and is_tuned == (verdict["form"] == "tuned"):
            for line in (RECORDS / "runs" / point.run_id / "eval" / "heldout.jsonl").read_text().splitlines():
                row = json.loads(line)
                nats, tokens = nats + row["loss"], tokens + row["loss_tokens"]
    return nats / tokens


def test_the_records_are_small_and_hold_no_weights() -> None:
    files = [path for path in RECORDS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < MOST_BYTES
    assert {path.suffix for path in files} <= {".json", ".jsonl"}
