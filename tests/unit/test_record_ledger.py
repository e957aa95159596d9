"""The ledger: each run claimed once, crashes leave nothing stuck, damage stays where it is."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from lora_lab.errors import InputError, MachineError
from lora_lab.record import lease
from lora_lab.record.ledger import Ledger, run_id_of
from lora_lab.record.result import Status
from tests.unit.ledger_samples import claim, digest, ended, loss, result_of, trial_of

_FORK = multiprocessing.get_context("fork")


def _claim_all(root: Path, start: Any, claims: Any) -> None:
    """One sweep: claims every run that is free and ends it, as the runner would."""
    ledger = Ledger(root)
    start.wait()
    mine = []
    for seed in range(50):
        folder = claim(ledger, trial_of(seed=seed))
        if folder is not None:
            with folder:
                mine.append((seed, str(folder.path)))
                folder.steps_path.write_text(f"{os.getpid()}\n")
                folder.write_result(result_of(folder))
    claims.put(mine)


def test_eight_processes_claim_fifty_runs_once_each(tmp_path: Path) -> None:
    start, claims = _FORK.Event(), _FORK.Queue()
    workers = [_FORK.Process(target=_claim_all, args=(tmp_path, start, claims)) for _ in range(8)]
    for worker in workers:
        worker.start()
    start.set()
    claimed = [entry for _ in workers for entry in claims.get(timeout=60)]
    for worker in workers:
        worker.join(timeout=60)
        assert worker.exitcode == 0
    assert sorted(seed for seed, _ in claimed) == list(range(50))
    records = Ledger(tmp_path).runs()
    assert [record.state for record in records] == [Status.COMPLETED] * 50
    assert all(len(record.steps_path.read_text().splitlines()) == 1 for record in records)
    assert all(record.attempts == 1 for record in records)


def test_a_reader_in_a_loop_never_costs_a_claim(tmp_path: Path) -> None:
    """Looking at a lock shares it for a moment; a claimer must not take the reader for an owner."""
    ledger, stop = Ledger(tmp_path), threading.Event()
    trials = [trial_of(seed=seed) for seed in range(20)]
    for trial in trials:
        folder = claim(ledger, trial)
        assert folder is not None
        folder.close()

    def look() -> None:
        while not stop.is_set():
            for trial in trials:
                lease.is_held(ledger.runs_folder / run_id_of(digest(trial), 0) / "lock")

    readers = [threading.Thread(target=look) for _ in range(2)]
    for reader in readers:
        reader.start()
    try:
        for trial in trials:
            folder = claim(ledger, trial)
            assert folder is not None
            folder.close()
    finally:
        stop.set()
        for reader in readers:
            reader.join()


_HOLDER = """
import sys, time
sys.path[:0] = [{tests!r}]
from pathlib import Path
from tests.unit.ledger_samples import claim, trial_of
from lora_lab.record.ledger import Ledger
folder = claim(Ledger(Path({root!r})), trial_of())
folder.steps_path.write_text("step")
import os
if not {fork} or os.fork() == 0:
    print("held", flush=True)
time.sleep(60)
"""


def _holder(root: Path, *, fork: bool = False) -> subprocess.Popen[str]:
    code = _HOLDER.format(tests=str(Path(__file__).parents[2]), root=str(root), fork=fork)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("fork", [False, True], ids=["alone", "with a child that lives on"])
def test_kill_9_frees_the_claim_and_leaves_interrupted(tmp_path: Path, fork: bool) -> None:
    holder, ledger = _holder(tmp_path, fork=fork), Ledger(tmp_path)
    try:
        assert claim(ledger, trial_of()) is None
        running = ledger.find(digest(trial_of()), 0)
        assert running is not None and running.state == "RUNNING" and not running.is_done
        assert running.owner is not None and running.owner.pid == holder.pid
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        (record,) = ledger.runs()
        assert record.state == Status.INTERRUPTED and record.owner is None and not record.is_done
        with claim(ledger, trial_of()) as folder:  # type: ignore[union-attr]
            assert folder.attempt == 2
            assert (folder.path / "attempts" / "1" / "steps.jsonl").read_text() == "step"
            assert not folder.steps_path.exists()
            folder.write_result(result_of(folder))
        (record,) = ledger.runs()
        assert record.state == Status.COMPLETED and record.attempts == 2 and record.is_done
    finally:
        with contextlib.suppress(ProcessLookupError):  # the group is gone unless a child lives on
            os.killpg(holder.pid, signal.SIGKILL)
        holder.stdout.close()  # type: ignore[union-attr]


def test_two_holders_in_one_process_are_two(tmp_path: Path) -> None:
    first = claim(Ledger(tmp_path), trial_of())
    assert first is not None
    assert claim(Ledger(tmp_path), trial_of()) is None
    first.close()
    second = claim(Ledger(tmp_path), trial_of())
    assert second is not None and second.attempt == 2
    second.close()


@pytest.mark.parametrize("status", [Status.FAILED, Status.OUT_OF_MEMORY, Status.INTERRUPTED])
def test_outcomes_that_are_tried_again_are_put_aside_whole(tmp_path: Path, status: Status) -> None:
    ledger = Ledger(tmp_path)
    with claim(ledger, trial_of()) as folder:  # type: ignore[union-attr]
        (folder.eval_folder / "samples.jsonl").write_text("1")
        folder.write_result(result_of(folder, status=status, reason="because"))
    for attempt in (2, 3):
        with claim(ledger, trial_of()) as folder:  # type: ignore[union-attr]
            assert folder.attempt == attempt
            folder.steps_path.write_text(str(attempt))
            folder.write_result(result_of(folder, status=status, reason="again"))
    aside = folder.path / "attempts"
    assert json.loads((aside / "1" / "result.json").read_text())["reason"] == "because"
    assert (aside / "1" / "eval" / "samples.jsonl").read_text() == "1"
    assert (aside / "2" / "steps.jsonl").read_text() == "2"
    assert folder.steps_path.read_text() == "3"


@pytest.mark.parametrize("status", [Status.COMPLETED, Status.DIVERGED])
def test_final_outcomes_are_not_claimed_again(tmp_path: Path, status: Status) -> None:
    ended(tmp_path, trial_of(), status=status, reason="r")
    assert claim(Ledger(tmp_path), trial_of()) is None
    other = claim(Ledger(tmp_path), trial_of(), repeat=1)
    assert other is not None and other.run_id.endswith(".r1")
    other.close()


def test_a_crash_while_putting_aside_is_picked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, names = Ledger(tmp_path), ["a", "b", "c"]
    with claim(ledger, trial_of()) as folder:  # type: ignore[union-attr]
        for name in names:
            (folder.path / name).write_text(name)
    real = Path.rename
    for crash_at in (1, 2):
        moves = 0

        def rename(self: Path, target: Path, crash_at: int = crash_at) -> Path:
            nonlocal moves
            moves += 1
            if moves > crash_at:
                raise KeyboardInterrupt
            return real(self, target)

        monkeypatch.setattr(Path, "rename", rename)
        with pytest.raises(KeyboardInterrupt):
            claim(ledger, trial_of())
        monkeypatch.undo()
    with claim(ledger, trial_of()) as folder:  # type: ignore[union-attr]
        assert folder.attempt == 2
        aside = folder.path / "attempts"
        assert [entry.name for entry in aside.iterdir()] == ["1"]
        assert {*names, "trial.json"} <= {entry.name for entry in (aside / "1").iterdir()}


def test_two_ledgers_in_the_same_second_share_nothing(tmp_path: Path) -> None:
    trials = [trial_of(seed=seed) for seed in range(5)]
    one, two = Ledger(tmp_path / "one"), Ledger(tmp_path / "two")
    folders = [claim(ledger, trial) for trial in trials for ledger in (one, two)]
    paths = [folder.path for folder in folders if folder is not None]
    assert len(set(paths)) == 10
    for folder in folders:
        assert folder is not None
        folder.close()
    assert {record.folder for record in one.runs()} | {record.folder for record in two.runs()} == set(paths)


def test_two_sweeps_in_the_same_second_in_one_ledger_share_no_folder(tmp_path: Path) -> None:
    seen = []
    for sweep in (Ledger(tmp_path), Ledger(tmp_path)):
        for seed in range(4):
            folder = claim(sweep, trial_of(seed=seed))
            if folder is not None:
                seen.append(folder)
    assert len({folder.path for folder in seen}) == len(seen) == 4
    for folder in seen:
        folder.close()


def test_what_was_asked_is_written_when_claimed(tmp_path: Path) -> None:
    with claim(Ledger(tmp_path), trial_of(), name="first") as folder:  # type: ignore[union-attr]
        header = json.loads((folder.path / "trial.json").read_text())
        assert header["trial"] == trial_of() and header["name"] == "first"
        assert header["fingerprint"] == digest(trial_of()) and header["identities"] == {"model": "0" * 64}
        assert json.loads((folder.path / "overrides.json").read_text()) == ["rank=8"]
        assert json.loads((folder.path / "environment.json").read_text()) == {"machine_id": "m1"}
        assert not (folder.path / "result.json").exists()


def test_a_result_of_another_run_is_refused(tmp_path: Path) -> None:
    with claim(Ledger(tmp_path), trial_of()) as folder:  # type: ignore[union-attr]
        with pytest.raises(ValueError, match="handed to run"):
            folder.write_result(result_of(folder, attempt=7))
        assert not (folder.path / "result.json").exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"schema_version": 1}', b"\xff\xfe", b"null", b'{"schema_version": "1"}'],
    ids=["empty", "torn", "list", "keys missing", "binary", "null", "version as text"],
)
def test_a_damaged_result_hides_no_other_run_and_is_tried_again(tmp_path: Path, content: bytes) -> None:
    damaged, good = ended(tmp_path, trial_of(seed=0)), ended(tmp_path, trial_of(seed=1))
    (damaged.folder / "result.json").write_bytes(content)
    states = {record.run_id: record for record in Ledger(tmp_path).runs()}
    assert states[good.run_id].state == Status.COMPLETED
    record = states[damaged.run_id]
    assert record.state == "DAMAGED" and not record.is_done
    assert record.problem is not None and str(damaged.folder / "result.json") in record.problem
    with claim(Ledger(tmp_path), trial_of(seed=0)) as folder:  # type: ignore[union-attr]
        assert folder.attempt == 2
        assert (folder.path / "attempts" / "1" / "result.json").read_bytes() == content


def test_a_damaged_trial_file_is_reported_with_its_path(tmp_path: Path) -> None:
    record = ended(tmp_path, trial_of())
    (record.folder / "trial.json").write_text('{"schema_version": 1,\n "name"')
    (found,) = Ledger(tmp_path).runs()
    assert found.state == "DAMAGED" and found.name == record.run_id
    assert found.problem is not None and f"{record.folder / 'trial.json'}:2" in found.problem


def test_a_newer_result_is_refused_not_damaged(tmp_path: Path) -> None:
    record = ended(tmp_path, trial_of())
    path = record.folder / "result.json"
    newer = json.loads(path.read_text()) | {"schema_version": 2, "something": "new"}
    path.write_text(json.dumps(newer))
    (found,) = Ledger(tmp_path).runs()
    assert found.state == "NEWER" and "schema 2, this one reads 1" in str(found.problem)
    with pytest.raises(InputError, match="newer lora-lab"):
        claim(Ledger(tmp_path), trial_of())
    assert json.loads(path.read_text()) == newer, "a newer ledger is left as it is"


def test_results_of_another_numerics_version_are_listed_but_not_done(tmp_path: Path) -> None:
    record = ended(tmp_path, trial_of())
    path = record.folder / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"numerics_version": 0}))
    (found,) = Ledger(tmp_path).runs()
    assert found.state == Status.COMPLETED and found.numerics_version == 0 and not found.is_done
    again = claim(Ledger(tmp_path), trial_of())
    assert again is not None and again.attempt == 2
    again.close()


def test_a_fingerprint_that_only_begins_alike_is_refused(tmp_path: Path) -> None:
    record = ended(tmp_path, trial_of())
    path = record.folder / "trial.json"
    other = record.run_id + "f" * 48
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fingerprint": other}))
    (record.folder / "result.json").unlink()
    with pytest.raises(MachineError, match="belongs to another trial"):
        claim(Ledger(tmp_path), trial_of())
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fingerprint": digest(trial_of())}))
    again = claim(Ledger(tmp_path), trial_of())
    assert again is not None, "the refused claim gave its lease back"
    again.close()


def test_resolve_by_id_name_and_unique_beginning(tmp_path: Path) -> None:
    a = ended(tmp_path, trial_of(rank=4), name="lora-r4-s0")
    b = ended(tmp_path, trial_of(rank=64), name="lora-r64-s0")
    c = ended(tmp_path, trial_of(rank=6), name="lora-r6")
    ledger = Ledger(tmp_path)
    for name in (a.run_id, a.run_id[:9], "lora-r4-s0", "lora-r4", digest(trial_of(rank=4))):
        assert ledger.resolve(name).run_id == a.run_id
    assert ledger.resolve("lora-r6").run_id == c.run_id, "an exact name wins over the beginning of another"
    with pytest.raises(InputError) as caught:
        ledger.resolve("lora-r")
    assert all(record.run_id in str(caught.value) for record in (a, b, c))
    with pytest.raises(InputError, match='did you mean "lora-r64-s0"'):
        ledger.resolve("lora-r64-s1")


@pytest.mark.parametrize("name", ["", "..", "../x", "/etc/passwd", "a/b", "-x", "x" * 500, "a\x00b", "\x1b[31m"])
def test_names_are_never_paths(tmp_path: Path, name: str) -> None:
    ended(tmp_path, trial_of())
    (tmp_path / "x").mkdir()
    with pytest.raises(InputError) as caught:
        Ledger(tmp_path).resolve(name)
    assert len(str(caught.value)) < 300 and "\x1b" not in str(caught.value)


def test_an_empty_ledger_is_said_to_be_empty(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "lab")
    assert ledger.runs() == [] and ledger.find("0" * 64, 0) is None
    assert not (tmp_path / "lab").exists(), "reading makes nothing"
    with pytest.raises(InputError, match="the ledger is empty"):
        ledger.resolve("x")


def test_a_root_that_is_a_file_is_one_line_and_exit_4(tmp_path: Path) -> None:
    root = tmp_path / "lab"
    root.write_text("")
    ledger = Ledger(root)
    for act in (ledger.runs, ledger.prepare, lambda: claim(ledger, trial_of())):
        with pytest.raises(MachineError) as caught:
            act()
        assert caught.value.exit_code == 4 and "\n" not in str(caught.value) and str(root) in str(caught.value)


def test_a_read_only_root_is_refused_for_writing_and_open_for_reading(tmp_path: Path) -> None:
    root = tmp_path / "lab"
    ended(root, trial_of())
    if os.geteuid() != 0:
        pytest.skip("a read-only bind mount needs root")
    bound = subprocess.run(["mount", "--bind", str(root), str(root)], capture_output=True)
    if bound.returncode:
        pytest.skip(f"mount refused: {bound.stderr.decode().strip()}")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(root)], check=True)
        ledger = Ledger(root)
        assert [record.state for record in ledger.runs()] == [Status.COMPLETED]
        assert claim(ledger, trial_of()) is None, "a finished run needs no writing"
        for act in (ledger.prepare, lambda: claim(ledger, trial_of(seed=9))):
            with pytest.raises(MachineError, match="Read-only file system"):
                act()
    finally:
        subprocess.run(["umount", str(root)], check=True)


def test_foreign_entries_and_leftover_temporaries_are_no_runs(tmp_path: Path) -> None:
    record = ended(tmp_path, trial_of(), metrics={"heldout/loss": loss(2.5)})
    runs = Ledger(tmp_path).runs_folder
    (runs / "notes.txt").write_text("mine")
    (runs / "empty").mkdir()
    (record.folder / ".result.json.abc.tmp").write_text("torso")
    (found,) = Ledger(tmp_path).runs()
    assert found.result is not None and found.result.metrics["heldout/loss"].value == 2.5


def test_five_hundred_runs_are_listed_in_two_seconds(tmp_path: Path) -> None:
    template = ended(tmp_path, trial_of())
    files = {name: (template.folder / name).read_bytes() for name in ("trial.json", "result.json", "lock")}
    for number in range(500):
        folder = template.folder.with_name(f"{number:016x}")
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
    assert len(Ledger(tmp_path).runs()) == 501
