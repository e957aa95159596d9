"""Checkpoints in a run's folder: put aside with their attempt, found again, and removed once the run is over."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_lab.errors import DataError, MachineError
from lora_lab.record import checkpoint as checkpoint_module
from lora_lab.record.checkpoint import is_complete, read_checkpoint, remove_checkpoint, write_checkpoint
from lora_lab.record.ledger import Ledger
from lora_lab.record.run_folder import RunFolder
from lora_lab.record.run_record import RunHeader
from lora_lab.schema.fingerprint import NUMERICS_VERSION
from tests.unit.ledger_samples import claim, result_of, trial_of


def saved(folder: Path, step: int) -> int:
    return write_checkpoint(folder, {"step": step}, lambda path: path.write_bytes(b"tensors of %d" % step))


def step_of(folder: Path | None) -> int | None:
    return None if folder is None else int(read_checkpoint(folder)[0]["step"])


def attempt(root: Path, act: Callable[[RunFolder], object] = lambda folder: None) -> Path | None:
    """An attempt that does something and is killed; what it could have gone on from."""
    folder = claim(Ledger(root), trial_of())
    assert folder is not None
    with folder:
        found = folder.resumable()
        act(folder)
    return found


def saving(step: int) -> Callable[[RunFolder], object]:
    return lambda folder: saved(folder.checkpoint_folder, step)


def test_it_goes_aside_with_its_attempt_and_is_found_there(tmp_path: Path) -> None:
    def work(folder: RunFolder) -> None:
        saved(folder.checkpoint_folder, 5)
        folder.steps_path.write_text("log")

    assert attempt(tmp_path, work) is None
    found = attempt(tmp_path)
    assert found is not None and step_of(found) == 5
    assert found.parent.name == "1" and (found.parent / "steps.jsonl").read_text() == "log"


def test_the_newest_attempt_that_saved_one_is_gone_on_from(tmp_path: Path) -> None:
    """Attempts that came to nothing hide none; of two the later, which had begun with the earlier or without it."""
    assert attempt(tmp_path, saving(5)) is None
    assert step_of(attempt(tmp_path)) == 5
    assert step_of(attempt(tmp_path, lambda folder: folder.checkpoint_folder.mkdir())) == 5
    assert step_of(attempt(tmp_path, saving(3))) == 5
    for _ in range(8):  # attempts are counted, not sorted as text: 10 comes after 4
        assert step_of(attempt(tmp_path)) == 3
    assert step_of(attempt(tmp_path, saving(9))) == 3
    assert step_of(attempt(tmp_path)) == 9


def tear(folder: RunFolder) -> None:
    """Killed in its first save, with a tensors file half written and no manifest."""
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(folder.checkpoint_folder, {}, interrupted)
    (folder.checkpoint_folder / "tensors-1.safetensors").write_bytes(b"half")


def interrupted(path: Path) -> None:
    path.write_bytes(b"half")
    raise KeyboardInterrupt


def truncate(folder: RunFolder) -> None:
    saved(folder.checkpoint_folder, 7)
    (tensors,) = folder.checkpoint_folder.glob("*.safetensors")
    tensors.write_bytes(tensors.read_bytes()[:-1])


def flip(folder: RunFolder) -> None:
    saved(folder.checkpoint_folder, 7)
    (tensors,) = folder.checkpoint_folder.glob("*.safetensors")
    tensors.write_bytes(tensors.read_bytes().replace(b"t", b"d"))


def lie(folder: RunFolder) -> None:
    saved(folder.checkpoint_folder, 7)
    path = folder.checkpoint_folder / "checkpoint.json"
    path.write_text(path.read_text().replace('"step": 7', '"step": 8'))


@pytest.mark.parametrize("damage", [tear, truncate, flip, lie])
def test_a_damaged_one_is_passed_over(tmp_path: Path, damage: Callable[[RunFolder], None]) -> None:
    attempt(tmp_path, saving(5))
    attempt(tmp_path, damage)
    assert step_of(attempt(tmp_path)) == 5


@pytest.mark.parametrize(
    "header",
    [{"numerics_version": NUMERICS_VERSION - 1}, {"fingerprint": "f" * 64}, {"numerics_version": None}],
    ids=["numerics", "fingerprint", "unknown"],
)
def test_one_of_other_arithmetic_or_another_trial_is_passed_over(tmp_path: Path, header: dict[str, Any]) -> None:
    attempt(tmp_path, saving(5))
    attempt(tmp_path)
    (path,) = tmp_path.glob("runs/*/attempts/1/trial.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | header))
    assert attempt(tmp_path) is None
    path.unlink()
    assert attempt(tmp_path) is None, "nobody knows what it is of"


def test_a_crash_while_putting_aside_loses_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(folder: RunFolder) -> None:
        saved(folder.checkpoint_folder, 5)
        folder.steps_path.write_text("log")
        (folder.path / ".adapter.12345678.tmp").mkdir()
        (folder.path / ".adapter.12345678.tmp" / "half").write_bytes(b"half")

    attempt(tmp_path, work)
    real = Path.rename
    for moves_before in (0, 1, 1, 1, 1):
        moves = 0

        def rename(self: Path, target: Path, moves_before: int = moves_before) -> Path:
            nonlocal moves
            if moves == moves_before:
                raise KeyboardInterrupt
            moves += 1
            return real(self, target)

        monkeypatch.setattr(Path, "rename", rename)
        with pytest.raises(KeyboardInterrupt):
            claim(Ledger(tmp_path), trial_of())
        monkeypatch.undo()
    found = attempt(tmp_path)
    assert found is not None and step_of(found) == 5 and found.parent.name == "1"
    assert (found.parent / "steps.jsonl").read_text() == "log"
    assert (found.parent / ".adapter.12345678.tmp").is_dir(), "what was half written goes with the rest"


def test_all_are_removed_once_the_result_is_final(tmp_path: Path) -> None:
    attempt(tmp_path, saving(3))
    attempt(tmp_path, tear)
    folder = claim(Ledger(tmp_path), trial_of())
    assert folder is not None
    with folder:
        saved(folder.checkpoint_folder, 5)
        folder.drop_earlier_checkpoints()
        assert list(folder.path.glob("attempts/*/checkpoint")) == [] and is_complete(folder.checkpoint_folder)
        folder.drop_earlier_checkpoints()
        folder.write_result(result_of(folder))
        folder.drop_checkpoints()
        assert list(folder.path.rglob("*checkpoint*")) == []
        folder.drop_checkpoints()
    assert (folder.path / "attempts" / "1" / "trial.json").is_file(), "nothing else is"
    assert claim(Ledger(tmp_path), trial_of()) is None


def test_a_crash_while_removing_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt(tmp_path, saving(3))
    folder = claim(Ledger(tmp_path), trial_of())
    assert folder is not None
    with folder:
        saved(folder.checkpoint_folder, 5)
        folder.write_result(result_of(folder))

        def half(path: Path) -> None:
            (path / "checkpoint.json").unlink()
            raise KeyboardInterrupt

        monkeypatch.setattr(checkpoint_module.shutil, "rmtree", half)
        with pytest.raises(KeyboardInterrupt):
            folder.drop_checkpoints()
        monkeypatch.undo()
        assert folder.resumable() is None
    assert claim(Ledger(tmp_path), trial_of()) is None
    (record,) = Ledger(tmp_path).runs()
    assert record.is_done and record.state == "COMPLETED"


def test_a_disk_that_does_not_let_go_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(MachineError, match=r"checkpoint: Permission denied"):
        remove_checkpoint(tmp_path / "checkpoint")


def test_a_failed_write_leaves_the_older_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    saved(folder, 1)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(folder, {"step": 2}, interrupted)
    with pytest.raises(ValueError, match="JSON"):
        write_checkpoint(folder, {"step": float("nan")}, lambda path: path.write_bytes(b"x"))
    assert len(list(folder.iterdir())) == 2 and step_of(folder) == 1


def test_reading_says_what_is_wrong(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    with pytest.raises(DataError, match=r"checkpoint\.json: no such file"):
        read_checkpoint(folder)
    saved(folder, 1)
    state, tensors = read_checkpoint(folder)
    assert state == {"step": 1} and tensors.read_bytes() == b"tensors of 1"


def test_a_header_of_today_has_what_is_compared() -> None:
    assert {"fingerprint", "numerics_version"} <= set(RunHeader.model_fields)
