"""`launch.stopping` as people write it: chosen in one override, wrong ones answered, and no part of a trial."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from lora_lab.app.cli import main
from lora_lab.app.compose import Composer
from lora_lab.errors import InputError
from lora_lab.record.ledger import Ledger
from lora_lab.record.result import Status
from lora_lab.schema.stopping import Stopping
from lora_lab.schema.trial import LAB_KEYS, read_lab
from tests.unit.ledger_samples import result_of

TINY = ("model=tiny_random", "evaluation.tasks=[]")
MEDIAN = {"rule": "median", "points": 4, "warmup_points": 1, "minimum_runs": 3}
HALVING = {"rule": "halving", "points": 2, "reduction": 3}


def stopping_of(mapping: Any) -> Stopping:
    """The section of a composed mapping."""
    return read_lab({key: value for key, value in mapping.items() if key in LAB_KEYS}).launch.stopping


@pytest.mark.parametrize(
    ("overrides", "settings"),
    [
        ((), {"rule": "off"}),
        (("launch.stopping.rule=off",), {"rule": "off"}),
        (("launch.stopping.rule='off'",), {"rule": "off"}),
        (("launch.stopping.rule=false",), {"rule": "off"}),
        (("launch.stopping.rule=median",), MEDIAN),
        (("launch.stopping.rule=halving",), HALVING),
        (("launch=local", "launch.stopping.rule=median", "launch.stopping.median.points=8"), {**MEDIAN, "points": 8}),
        (("launch.stopping={rule: halving, halving: {reduction: 2}}",), {**HALVING, "reduction": 2}),
    ],
    ids=" ".join,
)
def test_one_override_chooses_a_rule(composer: Composer, overrides: tuple[str, ...], settings: dict[str, Any]) -> None:
    assert stopping_of(composer.compose(overrides).mapping).settings() == settings


def test_a_study_chooses_it_too(composer: Composer) -> None:
    composed = composer.compose([], under={"launch.stopping.rule": "median"})
    assert stopping_of(composed.mapping).settings() == MEDIAN


def test_yamls_own_off_is_off(composer: Composer) -> None:
    """An unquoted `off` in a YAML file of the user's is false."""
    written = OmegaConf.to_container(OmegaConf.create("launch: {stopping: {rule: off}}"))
    assert written == {"launch": {"stopping": {"rule": False}}}
    mapping = json.loads(json.dumps(composer.compose([]).mapping))
    mapping["launch"]["stopping"] |= {"rule": False}
    assert stopping_of(mapping).settings() == {"rule": "off"}


@pytest.mark.parametrize(
    ("override", "where", "message"),
    [
        ("launch.stopping.rule=medain", "launch.stopping.rule", 'no such choice "medain"; did you mean "median"?'),
        ("launch.stopping.rule=true", "launch.stopping.rule", "no such choice true (choices: off, median, halving)"),
        ("launch.stopping.rule=null", "launch.stopping.rule", "empty value (null); expected one of off, median"),
        ("launch.stopping=median", "launch.stopping", "got median; a rule is chosen by launch.stopping.rule="),
        ("launch.stopping=off", "launch.stopping", "got off; a rule is chosen by launch.stopping.rule="),
        ("launch.stopping=null", "launch.stopping", "expected a mapping"),
        ("launch.stopping.halving.reduction=1", "launch.stopping.halving.reduction", "must be >= 2, got 1"),
        ("launch.stopping.halving.reduction=2.5", "launch.stopping.halving.reduction", "expected an integer, got 2.5"),
        ("launch.stopping.halving.points=0", "launch.stopping.halving.points", "must be >= 1, got 0"),
        ("launch.stopping.median.minimum_runs=0", "launch.stopping.median.minimum_runs", "must be >= 1, got 0"),
        ("launch.stopping.median.warmup_points=-1", "launch.stopping.median.warmup_points", "must be >= 0, got -1"),
        (
            "launch.stopping.median.warmup_points=4",
            "launch.stopping.median",
            "warmup_points=4 leaves none of the 4 points at which a run could be stopped; at most 3",
        ),
        (
            "launch.stopping.reduction=4",
            "launch.stopping.reduction",
            'did you mean "launch.stopping.halving.reduction"',
        ),
    ],
)
def test_what_is_wrong_is_said(composer: Composer, override: str, where: str, message: str) -> None:
    with pytest.raises(InputError) as raised:
        stopping_of(composer.compose([override]).mapping)
    (problem,) = raised.value.problems
    assert problem.where == where and message in problem.message


def plan(capsys: pytest.CaptureFixture[str], *overrides: str) -> tuple[int, Any, str]:
    """Exit code, rows and messages of `plan --json`."""
    code = main(["plan", "--json", *TINY, *overrides])
    out, err = capsys.readouterr()
    return code, json.loads(out) if out else None, err


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_rule_is_no_part_of_a_trial(capsys: pytest.CaptureFixture[str]) -> None:
    steps = "training.max_steps=40"
    plain, judged = (
        plan(capsys, steps, f"launch.stopping.rule={rule}")[1][0]["fingerprint"] for rule in ("off", "halving")
    )
    assert plain == judged


def test_what_a_rule_cannot_work_on_is_known_before_anything_is_run(capsys: pytest.CaptureFixture[str]) -> None:
    code, rows, err = plan(
        capsys, "training.max_steps=3", "evaluation.heldout=false", "launch.stopping.rule=median", "rank=0"
    )
    assert code == 2 and rows is None
    assert "rank: must be >= 1" in err, "with all else that is wrong"
    assert "evaluation.heldout: launch.stopping.rule=median compares runs by their held-out loss" in err
    assert "launch.stopping.median.points: 4 points need runs of at least 5 steps, and one has 3; at most 2" in err


def test_a_short_run_is_only_in_the_way_of_a_rule(capsys: pytest.CaptureFixture[str]) -> None:
    short = "training.max_steps=3"
    assert plan(capsys, short)[0] == 0
    assert plan(capsys, short, "launch.stopping.rule=median", "method=base")[0] == 0
    assert plan(capsys, short, "launch.stopping.rule=median", "launch.stopping.median.points=2")[0] == 0


def test_a_plan_counts_what_its_own_rule_has_stopped_as_done(capsys: pytest.CaptureFixture[str]) -> None:
    steps = "training.max_steps=40"
    (row,) = plan(capsys, steps)[1]
    folder = Ledger(Path("lab")).claim(
        row["fingerprint"],
        0,
        name=row["name"],
        setting=row["setting"],
        trial={},
        identities={},
        overrides=[],
        environment={},
    )
    assert folder is not None
    facts = {"stopping": {**HALVING, "point": 1, "step": 5, "value": 3.0, "reason": "behind"}}
    with folder:
        folder.write_result(result_of(folder, status=Status.STOPPED, facts=facts))
    rules = ("halving", "median", "off")
    states = [plan(capsys, steps, f"launch.stopping.rule={rule}")[1][0]["state"] for rule in rules]
    assert states == ["done", "new", "new"]
    other = plan(capsys, steps, "launch.stopping.rule=halving", "launch.stopping.halving.points=1")
    assert other[1][0]["state"] == "new", "other settings, another rule"
