"""The process beside the training: whatever wandb does there, nobody here waits long, and one line is said.

wandb is a stand-in of a few lines, found before the real one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from lora_lab.record.wandb_process import CopyProcess, Destination, copy_environment
from lora_lab.record.wandb_tracker import WandbTracker, allowed_mode, destination_of
from lora_lab.record.watcher import CohortMember, CohortView
from lora_lab.schema.tracking import TrackingOff, WandbTracking, check_wandb_name

INIT_SECONDS, FINISH_SECONDS = 0.5, 1.0
# The process starts and imports in this time on a busy machine; the limits above come on top.
GENEROUS_SECONDS = 25.0
RUN = {"id": "a1", "name": "n", "group": "g", "job_type": "train", "tags": [], "config": {}}
OFFLINE = WandbTracking(kind="wandb", mode="offline", project="p", entity=None)

FAKE = """
import json, os, pathlib, sys, time
print("noise on standard output"); print("noise", file=sys.stderr)
class Settings(dict): pass
class Table:
    def __init__(self, columns, data): self.columns = columns
class Run:
    starting_step = 0
    def __init__(self, options):
        self.id = options["id"]
        self.summary, self.config = {{}}, {{}}
        self.dir = os.path.join(options["dir"], "wandb", f"offline-run-1-{{self.id}}", "files")
        os.makedirs(self.dir, exist_ok=True)
        self.rows = open(os.path.join(options["dir"], self.id + ".rows"), "a")
    def define_metric(self, *names, **options): pass
    def log(self, row):
        {log}
        self.rows.write(json.dumps(row) + "\\n"); self.rows.flush()
    def finish(self, exit_code):
        {finish}
        self.rows.write(f"end {{exit_code}}\\n"); self.rows.close()
class _Config(dict):
    def update(self, *values, **options): pass
def init(**options):
    {init}
    run = Run(options)
    run.config = _Config()
    return run
def teardown():
    {teardown}
{body}
"""


class Tried:
    """A copy process whose wandb does `what`, and what was said about it."""

    def __init__(self, folder: Path, **what: str) -> None:
        parts = {"init": "pass", "log": "pass", "finish": "pass", "teardown": "pass", "body": ""}
        (folder / "wandb.py").write_text(FAKE.format(**{**parts, **what}))
        self.said: list[str] = []
        self.root = folder / "lab"
        self.root.mkdir()
        self.process = CopyProcess(
            self.root,
            Destination("offline", "p", None),
            cache=folder / "cache",
            environ={**os.environ, "PYTHONPATH": str(folder)},
            on_trouble=self.said.append,
            init_seconds=INIT_SECONDS,
            finish_seconds=FINISH_SECONDS,
        )

    def one_run(self, *, rows: int = 3, name: str = "a1") -> None:
        """A whole run, as a training tells it."""
        self.process.start_run({**RUN, "id": name})
        for step in range(rows):
            self.process.row(name, {"train/step": step})
        self.process.finish_run(name, summary={"status": "COMPLETED"}, exit_code=0)

    def written(self, name: str = "a1") -> list[str]:
        """What the stand-in has kept of a run."""
        return (self.root / f"{name}.rows").read_text().splitlines()


@pytest.fixture
def nothing_stays() -> Iterator[None]:
    """No process of ours is left behind."""
    yield
    assert not [one for one in psutil.Process().children(recursive=True) if "wandb_copy" in " ".join(one.cmdline())]


@pytest.mark.usefixtures("nothing_stays")
class TestTrouble:
    """One kind after the other."""

    def test_nothing_wrong(self, tmp_path: Path) -> None:
        tried = Tried(tmp_path)
        tried.one_run()
        assert tried.process.outcome("a1")["rows"] == 3
        tried.one_run(name="b2")
        tried.process.close()
        assert tried.said == []
        assert tried.written() == tried.written("b2") == [*(f'{{"train/step": {step}}}' for step in range(3)), "end 0"]

    def test_runs_that_nobody_ends_are_ended_as_failed(self, tmp_path: Path) -> None:
        tried = Tried(tmp_path)
        tried.process.start_run(RUN)
        tried.process.row("a1", {"train/step": 1})
        tried.process.close()
        assert tried.written() == ['{"train/step": 1}', "end 1"] and tried.said == []

    @pytest.mark.parametrize(
        ("what", "told"),
        [
            ({"init": "time.sleep(600)"}, "no answer for"),
            ({"finish": "time.sleep(600)"}, "no answer for"),
            ({"log": "time.sleep(600)"}, "no answer for"),
            ({"teardown": "time.sleep(600)"}, "no answer for"),
            ({"teardown": "sys.exit(2)"}, "SystemExit: 2"),
            ({"init": "raise ValueError('no such entity\\nmore')"}, "ValueError: no such entity"),
            ({"init": "raise SystemExit(3)"}, "SystemExit: 3"),
            ({"log": "raise OSError(28, 'No space left on device')"}, "No space left on device"),
            ({"finish": "raise TimeoutError('finish')"}, "TimeoutError: finish"),
            ({"body": "raise ImportError('broken wandb')"}, "ImportError: broken wandb"),
            ({"log": "os._exit(1)"}, "the W&B process has ended"),
        ],
    )
    def test_is_told_once_and_holds_nobody_up(self, tmp_path: Path, what: dict[str, str], told: str) -> None:
        tried = Tried(tmp_path, **what)
        begun = time.monotonic()
        for name in ("a1", "b2", "c3"):
            tried.one_run(rows=200, name=name)
        tried.process.close()
        assert time.monotonic() - begun < GENEROUS_SECONDS
        assert len(tried.said) == 1 and told in tried.said[0]
        tried.one_run(name="d4")  # too late, and no error

    def test_one_run_that_fails_leaves_the_others_alone(self, tmp_path: Path) -> None:
        tried = Tried(tmp_path, log="if self.id == 'b2': raise ValueError('bad row')")
        for name in ("a1", "b2", "c3"):
            tried.process.start_run({**RUN, "id": name})
        for step in range(2):
            for name in ("a1", "b2", "c3"):
                tried.process.row(name, {"train/step": step})
        for name in ("a1", "b2", "c3"):
            tried.process.finish_run(name, summary={}, exit_code=0)
        assert tried.process.outcome("b2") == {"error": "ValueError: bad row", "id": "b2"}
        tried.process.close()
        assert tried.written("a1") == tried.written("c3") == ['{"train/step": 0}', '{"train/step": 1}', "end 0"]
        assert tried.said == ["ValueError: bad row"]

    def test_a_killed_process_is_noticed(self, tmp_path: Path) -> None:
        tried = Tried(tmp_path)
        tried.one_run()
        tried.process.outcome("a1")
        (child,) = psutil.Process().children()
        child.kill()
        tried.one_run(name="b2")
        assert tried.process.outcome("b2") == {"error": "the W&B process has ended"}
        tried.process.close()
        assert tried.said == ["the W&B process has ended"]


def test_of_wandbs_variables_only_account_and_server_are_passed_on(tmp_path: Path) -> None:
    environ = {
        "WANDB_RUN_ID": "x",
        "WANDB_NAME": "x",
        "WANDB_TAGS": "x",
        "WANDB_MODE": "online",
        "WANDB_SERVICE": "x",
        "WANDB_API_KEY": "k",
        "WANDB_BASE_URL": "u",
        "WANDB_ENTITY": "e",
        "PATH": "p",
    }
    online = copy_environment(environ, cache=tmp_path, mode="online")
    assert {name for name in online if name in environ} == {"WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_ENTITY", "PATH"}
    assert "WANDB_API_KEY" not in copy_environment(environ, cache=tmp_path, mode="offline")
    assert all(Path(online[name]).is_relative_to(tmp_path) for name in online if name.endswith("_DIR"))


@pytest.mark.parametrize(
    ("variable", "offline", "online"),
    [
        (None, "offline", "online"),
        ("online", "offline", "online"),
        ("offline", "offline", "offline"),
        ("dryrun", "offline", "offline"),
        ("DISABLED", None, None),
    ],
)
def test_wandb_mode_can_only_lower(variable: str | None, offline: str | None, online: str | None) -> None:
    environ = {} if variable is None else {"WANDB_MODE": variable}
    assert allowed_mode("offline", environ) == offline
    assert allowed_mode("online", environ) == online
    assert destination_of(TrackingOff(kind="off"), environ) is None


def test_no_process_where_nothing_is_run_or_nothing_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("no process was to be started")

    monkeypatch.setattr("lora_lab.record.wandb_tracker.CopyProcess", refuse)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with WandbTracker(OFFLINE, tmp_path, cache=tmp_path, study="s") as idle:
        idle.begin(0)
        idle.study_finished("s", {})
    with WandbTracker(TrackingOff(kind="off"), tmp_path, cache=tmp_path, study=None) as off:
        off.begin(3)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with WandbTracker(OFFLINE, tmp_path, cache=tmp_path, study=None) as disabled:
        disabled.begin(3)


def test_a_process_that_cannot_start_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr("lora_lab.record.wandb_tracker.CopyProcess", refuse)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with WandbTracker(OFFLINE, tmp_path, cache=tmp_path, study=None) as tracker:
        tracker.begin(3)
        tracker.begin(3)
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1
    assert "Resource temporarily unavailable" in said.err and "lora-lab wandb push" in said.err


@pytest.mark.parametrize("name", ["", "a/b", "a b", "a?b", "x" * 129])
def test_names_that_wandb_refuses(name: str) -> None:
    with pytest.raises(ValueError, match="expected 1 to 128 characters"):
        check_wandb_name(name)
    assert check_wandb_name("lora-lab_1.x") == "lora-lab_1.x"


def test_a_tracker_names_the_cohort_once_per_run_and_again_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, dict[str, Any]]] = []

    class Process:
        def __init__(self, *arguments: Any, **options: Any) -> None:
            """Keeps what it is told of configurations."""

        def configure(self, run_id: str, values: dict[str, Any]) -> None:
            told.append((run_id, values["cohort"]))

        def close(self) -> None:
            """Nothing."""

    monkeypatch.setattr("lora_lab.record.wandb_tracker.CopyProcess", Process)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with WandbTracker(OFFLINE, tmp_path, cache=tmp_path, study=None) as tracker:
        tracker.begin(2)
        for members in (("a",), ("a", "b"), ("b",)):
            view = CohortView(tuple(CohortMember(one, one, 1, 9, None) for one in members), 4, 0, 1.0, None, None)
            tracker.cohort("c1", view)
        tracker.cohort("c2", view)
    assert told == [("a", {"id": "c1", "seats": 4}), ("b", {"id": "c1", "seats": 4}), ("b", {"id": "c2", "seats": 4})]
