"""How runs are launched: what may be written, how it is read, that no fingerprint changes, what a plan tells of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.types import RunMode

from lora_lab.app.cli import main
from lora_lab.app.compose import Composer, config_loader
from lora_lab.app.interpolation import plain_mapping
from lora_lab.schema.trial import LAB_KEYS, LocalLaunch, read_lab

Plan = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Plan:
    """plan("-m", "seed=0,1"): the rows of `lora-lab plan --json` for the tiny model."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> list[dict[str, Any]]:
        capsys.readouterr()
        assert main(["plan", "--json", "model=tiny_random", "evaluation.tasks=[]", *arguments]) == 0
        rows: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
        return rows

    return run


def launch_of(mapping: Any) -> LocalLaunch:
    return read_lab({key: mapping[key] for key in LAB_KEYS}).launch


def test_defaults(composer: Composer) -> None:
    launch = launch_of(composer.compose([]).mapping)
    assert (launch.device, launch.cohort, launch.memory_fraction) == ("auto", "auto", 0.8)
    assert (launch.checkpoint_seconds, launch.retries) == (60, 0)


@pytest.mark.parametrize(
    ("written", "key", "value"),
    [
        ("launch.cohort=auto", "cohort", "auto"),
        ("launch.cohort=off", "cohort", "off"),
        ("launch.cohort=false", "cohort", "off"),
        ("launch.cohort=1", "cohort", 1),
        ("launch.cohort=16", "cohort", 16),
        ("launch.device=cuda", "device", "cuda"),
        ("launch.device=[cuda:0,cuda:1]", "device", ("cuda:0", "cuda:1")),
        ("launch.device=[cpu,cpu]", "device", ("cpu", "cpu")),
        ("launch.device=[cuda:1]", "device", ("cuda:1",)),
        ("launch.checkpoint_seconds=0", "checkpoint_seconds", 0),
        ("launch.memory_fraction=1", "memory_fraction", 1),
    ],
)
def test_read_back(composer: Composer, written: str, key: str, value: object) -> None:
    """By the lab's own way and by Hydra's, which keeps its own idea of what is text."""
    hydras = plain_mapping(config_loader().load_configuration("config", [written], RunMode.RUN))
    for mapping in (composer.compose([written]).mapping, hydras):
        read = getattr(launch_of(mapping), key)
        assert read == value and isinstance(read, bool) is False


def test_off_in_a_file_of_ones_own(composer: Composer, tmp_path: Path) -> None:
    """A bare `off` in a leaf is False to Hydra; in a study it is text."""
    (tmp_path / "launch").mkdir()
    leaf = "kind: local\ndevice: cpu\nretries: 0\ncohort: off\nmemory_fraction: 0.5\ncheckpoint_seconds: 1\n"
    leaf += "stopping: {rule: off, median: {points: 4, warmup_points: 1, minimum_runs: 3}, "
    leaf += "halving: {points: 2, reduction: 3}}\n"
    (tmp_path / "launch" / "mine.yaml").write_text(leaf)
    loader = config_loader(extra=tmp_path)
    own = Composer(loader, loader.load_configuration("config", [], RunMode.RUN)).compose(["launch=mine"]).mapping
    assert own["launch"]["cohort"] is False
    assert launch_of(own).cohort == "off"
    under = {"launch.cohort": "off", "launch.device": ("cpu", "cpu")}
    studys = launch_of(composer.compose([], under=under).mapping)
    assert (studys.cohort, studys.device) == ("off", ("cpu", "cpu"))


def test_no_fingerprint_depends_on_how_runs_are_launched(plan: Plan) -> None:
    plain = plan()
    for written in (
        ["launch.cohort=off"],
        ["launch.cohort=3"],
        ["launch.device=[cpu,cpu]", "launch.retries=2"],
        ["launch.memory_fraction=0.3", "launch.checkpoint_seconds=0"],
    ):
        assert [row["fingerprint"] for row in plan(*written)] == [row["fingerprint"] for row in plain], written
    assert plan("rank=3")[0]["fingerprint"] != plain[0]["fingerprint"]


def test_a_plan_tells_cohorts(plan: Plan) -> None:
    rows = plan("-m", "method=lora,ia3,full", "training.precision=fp32,bf16", "seed=0,1,0")
    kinds = [row["name"].partition("-")[0] for row in rows]
    told = {(kind, row["cohort"] is None, row["cohort_size"]) for kind, row in zip(kinds, rows, strict=True)}
    # Of the third of every three, a duplicate, nothing is told.
    assert told == {
        *(("lora", False, 4), ("ia3", False, 4), ("full", True, 1)),
        *((kind, True, None) for kind in ("lora", "ia3", "full")),
    }
    assert len({row["cohort"] for row in rows} - {None}) == 2, "one per precision"
    reasons = {kind: row["why_alone"] for kind, row in zip(kinds, rows, strict=True) if row["state"] == "new"}
    assert reasons["lora"] is None and str(reasons["full"]).startswith("method=full trains weights")
    duplicates = [row for row in rows if row["state"] == "duplicate"]
    assert len(duplicates) == 6 and all(row["why_alone"] is None for row in duplicates)


def test_a_plan_for_two_devices_has_two_cohorts(plan: Plan) -> None:
    line = ("-m", "seed=range(0,6)")
    one, two, off = plan(*line), plan(*line, "launch.device=[cpu,cpu]"), plan(*line, "launch.cohort=off")
    assert [row["cohort_size"] for row in one] == [6] * 6 and len({row["cohort"] for row in one}) == 1
    assert [row["cohort_size"] for row in two] == [3] * 6 and len({row["cohort"] for row in two}) == 2
    assert {(row["cohort"], row["cohort_size"], row["why_alone"]) for row in off} == {(None, 1, "launch.cohort=off")}


def test_a_plan_names_the_cohort_and_who_is_alone(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    cohort = plan("-m", "seed=0,1", "method=lora,full")[0]["cohort"]
    assert main(["plan", "model=tiny_random", "evaluation.tasks=[]", "-m", "seed=0,1", "method=lora,full"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(f"{cohort} of 2" in line for line in lines) == 2
    assert f"{cohort}: 2 trials train together" in lines
    assert any(line.startswith("alone: full-s0, full-s1: method=full trains weights") for line in lines)
