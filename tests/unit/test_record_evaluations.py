"""The evaluation log, and what the ledger makes of a run that the rule of a search has stopped."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from lora_lab.errors import DataError
from lora_lab.plan.stopping import History
from lora_lab.record.evaluation_log import (
    EVALUATIONS_FILE,
    carry_evaluations,
    early_stop,
    histories,
    history_of,
    write_evaluation,
)
from lora_lab.record.ledger import Ledger
from lora_lab.record.result import Status
from lora_lab.record.run_folder import RunFolder
from lora_lab.record.run_record import RunRecord
from tests.unit.ledger_samples import claim, digest, ended, result_of, setting_of, trial_of
from tests.unit.test_plan_stopping import HALVING, MEDIAN, OFF, rule

TOTAL = 45
FACTS = {**HALVING.settings(), "point": 1, "step": 5, "value": 3.0, "reason": "behind"}


def begun(root: Path, losses: dict[int, float], **trial: Any) -> RunFolder:
    """A run that is held by this process and has measured these losses."""
    folder = claim(Ledger(root), trial_of(**trial))
    assert folder is not None
    for step, loss in losses.items():
        write_evaluation(folder.path, step, total_steps=TOTAL, values={"heldout/loss": loss})
    return folder


def stopped(root: Path, trial: dict[str, Any], **changes: Any) -> RunRecord:
    """A run that HALVING has stopped."""
    return ended(root, trial, **{"status": Status.STOPPED, "reason": "behind", "facts": {"stopping": FACTS}} | changes)


def key(**trial: Any) -> tuple[str, int]:
    return digest(trial_of(**trial)), 0


def test_lines_are_as_they_are_documented(tmp_path: Path) -> None:
    write_evaluation(tmp_path, 5, total_steps=TOTAL, values={"heldout/loss": 2.5, "seconds": 0.25})
    write_evaluation(tmp_path, 15, total_steps=TOTAL, values={"heldout/loss": math.nan})
    lines = [json.loads(line) for line in (tmp_path / EVALUATIONS_FILE).read_text().splitlines()]
    assert lines == [
        {"step": 5, "total_steps": 45, "heldout/loss": 2.5, "seconds": 0.25},
        {"step": 15, "total_steps": 45, "nonfinite": {"heldout/loss": "NaN"}},
    ]
    with pytest.raises(ValueError, match="without heldout/loss"):
        write_evaluation(tmp_path, 20, total_steps=TOTAL, values={"seconds": 1.0})


def test_what_is_written_is_read(tmp_path: Path) -> None:
    with begun(tmp_path, {5: 2.5, 15: -math.inf}) as folder:
        expected = History(digest(trial_of()), setting_of(trial_of()), 45, {5: 2.5, 15: -math.inf}, None)
        assert history_of(folder.path, folder.header, "RUNNING") == expected


def test_a_run_without_a_log_has_no_losses(tmp_path: Path) -> None:
    with begun(tmp_path, {}) as folder:
        assert history_of(folder.path, folder.header, Status.DIVERGED) == History(
            folder.header.fingerprint, folder.header.setting, None, {}, "diverged"
        )


def test_a_torn_line_costs_only_itself(tmp_path: Path) -> None:
    """Without cutting it off the next line would be glued to it, and both be lost."""
    with begun(tmp_path, {5: 2.5}) as folder:
        path = folder.path / EVALUATIONS_FILE
        with path.open("ab") as stream:
            stream.write(b'{"step": 15, "total_st')
        assert history_of(folder.path, folder.header, "RUNNING").losses == {5: 2.5}
        write_evaluation(folder.path, 15, total_steps=TOTAL, values={"heldout/loss": 2.0})
        assert history_of(folder.path, folder.header, "RUNNING").losses == {5: 2.5, 15: 2.0}
        path.write_bytes(b'{"step": 5')
        write_evaluation(folder.path, 5, total_steps=TOTAL, values={"heldout/loss": 1.0})
        assert history_of(folder.path, folder.header, "RUNNING").losses == {5: 1.0}


def test_of_a_step_that_is_measured_again_the_later_line_counts(tmp_path: Path) -> None:
    with begun(tmp_path, {5: 2.5, 15: 9.0}) as folder:
        write_evaluation(folder.path, 15, total_steps=TOTAL, values={"heldout/loss": 2.0})
        assert history_of(folder.path, folder.header, "RUNNING").losses == {5: 2.5, 15: 2.0}


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 5, "heldout/loss": 1.0}',
        '{"step": 0, "total_steps": 45, "heldout/loss": 1.0}',
        '{"step": true, "total_steps": 45, "heldout/loss": 1.0}',
        '{"step": 5, "total_steps": 45, "heldout/loss": "1"}',
        '{"step": 5, "total_steps": 45, "nonfinite": {"heldout/loss": "many"}}',
        '{"step": 5, "total_steps": 45, "nonfinite": ["heldout/loss"]}',
        '{"step": 5, "total_steps": 45, "nonfinite": {"heldout/loss": 3}}',
        '{"step": 5, "total_steps": 45, "nonfinite": {"heldout/loss": []}}',
    ],
)
def test_a_line_that_holds_no_loss_at_a_step_says_nothing(tmp_path: Path, line: str) -> None:
    with begun(tmp_path, {}) as folder:
        (folder.path / EVALUATIONS_FILE).write_text(line + "\n")
        assert history_of(folder.path, folder.header, "RUNNING").losses == {}


def test_an_attempt_takes_over_what_the_earlier_one_had_measured(tmp_path: Path) -> None:
    """Up to the step of its checkpoint; the lines keep what else they hold."""
    aside, folder = tmp_path / "attempts" / "1", tmp_path / "run"
    aside.mkdir(parents=True)
    folder.mkdir()
    carry_evaluations(aside, folder, step=15)
    assert not (folder / EVALUATIONS_FILE).exists()
    write_evaluation(aside, 5, total_steps=TOTAL, values={"heldout/loss": 2.5, "seconds": 0.25})
    write_evaluation(aside, 15, total_steps=TOTAL, values={"heldout/loss": math.inf})
    write_evaluation(aside, 25, total_steps=TOTAL, values={"heldout/loss": 1.0})
    carry_evaluations(aside, folder, step=15)
    whole = (aside / EVALUATIONS_FILE).read_text().splitlines(keepends=True)
    assert (folder / EVALUATIONS_FILE).read_text() == "".join(whole[:2])


def test_the_ledger_tells_how_the_other_runs_are_doing(tmp_path: Path) -> None:
    """Running, failed, diverged and stopped ones; not those that were never begun, or cannot be read."""
    for rank, status in ((1, Status.FAILED), (2, Status.DIVERGED), (3, Status.STOPPED), (4, Status.COMPLETED)):
        with begun(tmp_path, {5: float(rank)}, rank=rank) as folder:
            folder.write_result(result_of(folder, status=status))
    with begun(tmp_path, {5: 5.0}, rank=5) as running, begun(tmp_path, {5: 6.0}, rank=6) as damaged:
        (damaged.path / EVALUATIONS_FILE).write_text("{]\n")
        found = histories(Ledger(tmp_path), [key(rank=rank) for rank in range(1, 8)])
        assert [(one.losses, one.end) for one in found] == [
            ({5: 1.0}, None),
            ({5: 2.0}, "diverged"),
            ({5: 3.0}, "stopped"),
            ({5: 4.0}, None),
            ({5: 5.0}, None),
        ]
        assert found[4].fingerprint == running.header.fingerprint
        with pytest.raises(DataError, match=EVALUATIONS_FILE):
            history_of(damaged.path, damaged.header, "RUNNING")


def test_a_run_by_other_arithmetic_is_no_rival(tmp_path: Path) -> None:
    record = ended(tmp_path, trial_of())
    write_evaluation(record.folder, 5, total_steps=TOTAL, values={"heldout/loss": 1.0})
    assert len(histories(Ledger(tmp_path), [key()])) == 1
    path = record.folder / "result.json"
    path.write_text(path.read_text().replace('"numerics_version": 1', '"numerics_version": 0'))
    assert histories(Ledger(tmp_path), [key()]) == []


def test_a_decision_is_made_from_the_files(tmp_path: Path) -> None:
    search = [key(rank=rank) for rank in (2, 4, 8, 16)]
    for rank, loss in ((2, 1.0), (4, 2.0)):
        begun(tmp_path, {5: loss}, rank=rank).close()  # killed, or another process's
    with begun(tmp_path, {5: 3.0}, rank=8) as folder:
        stop = early_stop(folder, HALVING, 5, search)
        assert stop is not None and "2 of other settings are better, at step 5 of 45" in stop.reason
        assert early_stop(folder, HALVING, 5, search[:1] + search[2:]) is None, "one is not of this search"
        assert early_stop(folder, OFF, 5, search) is None
        with pytest.raises(ValueError, match="step 15"):
            early_stop(folder, HALVING, 15, search)


# A stopped run in the ledger.


def test_a_stopped_run_is_done_under_the_very_rule_that_stopped_it(tmp_path: Path) -> None:
    record = stopped(tmp_path, trial_of())
    assert record.state == Status.STOPPED and not record.is_done and not record.state.is_final
    assert record.is_done_under(HALVING)
    for other in (OFF, MEDIAN, rule("halving", points=3), rule("halving", reduction=2)):
        assert not record.is_done_under(other)


@pytest.mark.parametrize(
    ("status", "is_done"),
    [(Status.COMPLETED, True), (Status.DIVERGED, True), (Status.FAILED, False), (Status.INTERRUPTED, False)],
)
def test_a_rule_changes_nothing_about_other_outcomes(tmp_path: Path, status: Status, is_done: bool) -> None:
    record = ended(tmp_path, trial_of(), status=status)
    assert [record.is_done_under(one) for one in (OFF, MEDIAN, HALVING)] == [is_done] * 3
    assert status.is_retried is not is_done


def test_stopped_is_neither_final_nor_tried_again_by_itself() -> None:
    assert [status for status in Status if not status.is_final and not status.is_retried] == [Status.STOPPED]


def test_a_stopped_run_by_other_arithmetic_goes_on(tmp_path: Path) -> None:
    assert not stopped(tmp_path, trial_of(), numerics_version=0).is_done_under(HALVING)


def test_a_stopped_run_whose_trial_is_gone_is_not_done(tmp_path: Path) -> None:
    record = stopped(tmp_path, trial_of())
    (record.folder / "trial.json").unlink()
    again = Ledger(tmp_path).find(*key())
    assert again is not None and not again.is_done_under(HALVING)


def test_finished_runs_are_those_of_the_rule(tmp_path: Path) -> None:
    stopped(tmp_path, trial_of(rank=2))
    ended(tmp_path, trial_of(rank=4))
    ledger = Ledger(tmp_path)
    assert ledger.finished(HALVING) == {key(rank=2), key(rank=4)}
    assert ledger.finished(OFF) == ledger.finished(MEDIAN) == {key(rank=4)}


def _claim_under(root: Path, stopping: Any) -> RunFolder | None:
    trial = trial_of()
    return Ledger(root).claim(
        digest(trial),
        0,
        name="lora-r8-s0",
        setting=setting_of(trial),
        trial=trial,
        identities={},
        overrides=[],
        environment={},
        stopping=stopping,
    )


def test_a_stopped_run_is_claimed_by_another_rule_only(tmp_path: Path) -> None:
    record = stopped(tmp_path, trial_of())
    assert _claim_under(tmp_path, HALVING) is None
    with _claim_under(tmp_path, OFF) as folder:  # type: ignore[union-attr]
        assert folder.attempt == 2
        aside = json.loads((record.folder / "attempts" / "1" / "result.json").read_text())
        assert aside["facts"]["stopping"] == FACTS
    again = Ledger(tmp_path).find(*key())
    assert again is not None and again.state == Status.INTERRUPTED and not again.is_done_under(HALVING)


def test_a_run_that_is_stopped_between_the_first_look_and_the_lease_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second look is made by the holder of the lease, for whom the run's state is RUNNING."""
    from lora_lab.record import ledger as module

    real = module.lease.take

    def take(path: Path) -> Any:
        monkeypatch.setattr(module.lease, "take", real)
        stopped(tmp_path, trial_of())
        return real(path)

    monkeypatch.setattr(module.lease, "take", take)
    assert _claim_under(tmp_path, HALVING) is None
    record = Ledger(tmp_path).find(*key())
    assert record is not None and record.state == Status.STOPPED and record.attempts == 1
