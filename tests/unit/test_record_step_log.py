"""The step log: strict JSON lines on disk at once, and a reader that forgives one torn end."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lora_lab.errors import DataError, MachineError
from lora_lab.record.step_log import StepLog, copy_steps, read_steps


def test_lines_are_read_back_and_missing_stays_missing(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    with StepLog(path) as log:
        log.write(1, {"loss": 2.5, "tokens": 96, "allocated_bytes": None})
        log.write(2, {"loss": 2.25, "tokens": 80, "allocated_bytes": 4096})
    assert read_steps(path) == [
        {"step": 1, "loss": 2.5, "tokens": 96},
        {"step": 2, "loss": 2.25, "tokens": 80, "allocated_bytes": 4096},
    ]


def test_nonfinite_numbers_are_text_under_their_own_key(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    with StepLog(path) as log:
        log.write(1, {"loss": math.nan, "gradient_norm": -math.inf, "learning_rate": 0.1, "seconds": math.inf})

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    line = json.loads(path.read_text(), parse_constant=refuse)
    assert line == {
        "step": 1,
        "learning_rate": 0.1,
        "nonfinite": {"loss": "NaN", "gradient_norm": "-Infinity", "seconds": "Infinity"},
    }


def test_every_line_survives_kill_9(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    code = (
        "import sys, time; from pathlib import Path; from lora_lab.record.step_log import StepLog\n"
        f"log = StepLog(Path({str(path)!r}))\n"
        "for step in range(1, 8): log.write(step, {'loss': 1.0})\n"
        "print('written', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "written\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert [line["step"] for line in read_steps(path)] == list(range(1, 8))


def test_only_the_last_line_may_be_torn(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    assert [line["step"] for line in read_steps(path)] == [1, 2]
    path.write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(DataError, match=r"steps\.jsonl:2: damaged"):
        read_steps(path)
    path.write_text("[1]\n")
    with pytest.raises(DataError, match=r"steps\.jsonl:1: expected a JSON object, got list"):
        read_steps(path)


def test_a_disk_that_refuses_is_a_machine_error(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="No such file or directory"):
        StepLog(tmp_path / "nowhere" / "steps.jsonl")
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    log = StepLog(Path("/dev/full"))
    with pytest.raises(MachineError, match="No space left on device"):
        log.write(1, {"loss": 1.0})
    with contextlib.suppress(MachineError):  # a device that cannot be synced says so
        log.close()
    log.close()


def test_a_new_attempt_begins_with_the_steps_before_the_checkpoint(tmp_path: Path) -> None:
    """Byte for byte, without what was logged after it and without a torn end; then it is written on."""
    old, new = tmp_path / "old.jsonl", tmp_path / "new" / "steps.jsonl"
    with StepLog(old) as log:
        for step in range(1, 6):
            log.write(step, {"loss": 1 / step, "seconds": math.inf if step == 2 else 0.5})
    whole = old.read_bytes()
    with old.open("ab") as stream:
        stream.write(b'{"step": 6, "lo')
    assert copy_steps(old, new, up_to=3) == 3
    assert new.read_bytes() == b"".join(whole.splitlines(keepends=True)[:3])
    with StepLog(new) as log:
        log.write(4, {"loss": 0.25})
    assert [line["step"] for line in read_steps(new)] == [1, 2, 3, 4]
    assert copy_steps(old, new, up_to=5) == 5 and new.read_bytes() == whole, "an earlier file is replaced"
    assert copy_steps(tmp_path / "none", new, up_to=0) == 0 and new.read_bytes() == b""


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ('{"step": 1}\n{"step": 3}\n', "old.jsonl: does not hold each of the steps 1 to 3 once"),
        ('{"step": 1}\n{"step": 2}\n{"step": 3', "does not hold"),
        ('{"step": 1}\n{"step": 2}\n{"step": 2}\n{"step": 3}\n', "does not hold"),
        ('{"step": 1}\n{"st\n{"step": 3}\n', "old.jsonl:2: damaged line"),
        ('{"step": 1}\n{"loss": 2}\n{"step": 3}\n', "old.jsonl:2: expected a step, got None"),
        (None, "does not hold"),
    ],
    ids=["a gap", "torn", "twice", "damaged", "no step", "no log"],
)
def test_a_curve_that_is_not_whole_is_not_begun(tmp_path: Path, content: str | None, match: str) -> None:
    old, new = tmp_path / "old.jsonl", tmp_path / "new.jsonl"
    if content is not None:
        old.write_text(content)
    with pytest.raises(DataError, match=match):
        copy_steps(old, new, up_to=3)
    assert not new.exists()


def test_a_synced_log_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda one: (synced.append(os.fstat(one).st_ino), fsync(one)))
    with StepLog(tmp_path / "steps.jsonl") as log:
        log.write(1, {"loss": 1.0})
        log.sync()
        assert synced == [(tmp_path / "steps.jsonl").stat().st_ino]
        log.write(2, {"loss": 1.0})
    assert len(read_steps(tmp_path / "steps.jsonl")) == 2
