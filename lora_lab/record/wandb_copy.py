"""The process that talks to W&B; the one file that imports wandb. `wandb_process.py` starts it and feeds it.

It reads one JSON object per line from standard input: first the settings, then items (`start`, `configure`, `row`,
`finish`); it answers on standard output with what it has done or what went wrong. What wandb prints goes nowhere. It
sees neither the command line nor the memory of the training process, and when that process dies it ends the runs that
are open.

Rows are never sent twice. A run's rows come in a fixed order, W&B counts the rows it has, and a run that is already
there is resumed: as many rows as it has are passed over. Offline, an earlier folder of the same run is replaced.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from lora_lab.record.wandb_mapping import AXES, COHORT_KEY

# In a run's folder: the lab has written it, and may replace it.
MARKER_FILE = "lora_lab.json"
_FOLDER = "wandb"
_ANSWER_EVERY_SECONDS = 0.5
_LEAST_FREE_BYTES = 1_000_000
_REMOVAL_TRIES, _REMOVAL_PAUSE_SECONDS = 10, 0.2
# Yields to the training process on a busy machine, since times are measured there.
_NICENESS = 5


@dataclass(slots=True)
class _Open:
    """A run that is open: wandb's handle, how many rows W&B had when it was opened, how many have come since."""

    handle: Any
    known_rows: int
    rows: int = 0


class Copy:
    """Carries out items. `settings`: root, mode, init_seconds, finish_seconds."""

    def __init__(self, wandb: Any, settings: Mapping[str, Any]) -> None:
        self._wandb = wandb
        self._settings = settings
        self._root = Path(settings["root"])
        self._open: dict[str, _Open] = {}

    def carry_out(self, item: Mapping[str, Any]) -> dict[str, Any] | None:
        """Does what the item says; returns what there is to answer.

        Raises:
            Exception: whatever wandb raises; the run is given up then.
        """
        if item["do"] == "start":
            self._start(item)
            return {"started": item["run"]["id"]}
        run = self._open.get(item["id"])
        if run is None:  # given up before
            return None
        if item["do"] == "row":
            self._log(run, item["values"])
            return None
        if item["do"] == "configure":
            run.handle.config.update(item["values"], allow_val_change=True)
            return None
        return self._finish(run, item)

    def give_up(self, run_id: str) -> None:
        """Forgets a run after an error; further items of it are passed over."""
        self._open.pop(run_id, None)

    def end_open_runs(self) -> None:
        """Marks the runs that nobody finished as failed; what they have is kept."""
        for run_id, run in list(self._open.items()):
            self.give_up(run_id)
            run.handle.finish(exit_code=1)

    @property
    def _is_online(self) -> bool:
        return bool(self._settings["mode"] == "online")

    def _start(self, item: Mapping[str, Any]) -> None:
        run = item["run"]
        if (earlier := self._open.pop(run["id"], None)) is not None:
            earlier.handle.finish(exit_code=1)
        if not self._is_online:
            remove_folders(self._root, run["id"])
        handle = self._wandb.init(
            **run,
            project=item["project"],
            entity=item["entity"],
            dir=str(self._root),
            mode=self._settings["mode"],
            resume="allow" if self._is_online else None,
            reinit="create_new",
            save_code=False,
            settings=self._wandb.Settings(**_quiet_settings(self._settings)),
        )
        Path(handle.dir).parent.joinpath(MARKER_FILE).write_text(json.dumps({"run_id": run["id"]}) + "\n")
        handle.config.update(run["config"], allow_val_change=True)  # a resumed run has its old ones
        if COHORT_KEY in handle.config and COHORT_KEY not in run["config"]:  # this time it may be alone
            handle.config.update({COHORT_KEY: None}, allow_val_change=True)
        for name, axis, is_summed in AXES:
            kept = None if is_summed else "none"
            handle.define_metric(name, step_metric=axis, step_sync=False, summary=kept, hidden=axis is None)
        self._open[run["id"]] = _Open(handle, handle.starting_step)

    def _log(self, run: _Open, values: Mapping[str, Any]) -> None:
        run.rows += 1
        if run.rows > run.known_rows:
            run.handle.log(dict(values))

    def _finish(self, run: _Open, item: Mapping[str, Any]) -> dict[str, Any]:
        if item["row"] is not None:
            self._log(run, item["row"])
        run.handle.summary.update(item["summary"])
        if item["table"] is not None:
            table = item["table"]
            run.handle.summary[table["key"]] = self._wandb.Table(columns=table["columns"], data=table["data"])
        folder = Path(run.handle.dir).parent
        self.give_up(item["id"])
        try:
            for artifact in item["artifacts"] if self._is_online else ():
                self._send_artifact(run, artifact)
        finally:  # rows and summary are worth having without their artifacts
            run.handle.finish(exit_code=item["exit_code"])
        if shutil.disk_usage(self._root).free < _LEAST_FREE_BYTES:
            raise OSError(f"{folder}: the disk is full; the copy may lack rows")
        if self._is_online:
            remove_folders(self._root, item["id"])
        return {"finished": item["id"], "rows": run.rows, "known": run.known_rows, "folder": str(folder)}

    def _send_artifact(self, run: _Open, item: Mapping[str, Any]) -> None:
        artifact = self._wandb.Artifact(item["name"], type=item["type"], metadata=item["metadata"])
        for path in map(Path, item["paths"]):
            if path.is_dir():
                artifact.add_dir(str(path))
            elif path.is_file():
                artifact.add_file(str(path))
        run.handle.log_artifact(artifact)


def _quiet_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Nothing printed, nothing gathered about machine, code or command line, and no wait without an end."""
    return {
        "console": "off",
        "silent": True,
        "symlink": False,
        "disable_git": True,
        "disable_code": True,
        "disable_job_creation": True,
        "label_disable": True,
        "x_disable_meta": True,
        "x_disable_stats": True,
        "x_disable_machine_info": True,
        "x_save_requirements": False,
        "init_timeout": settings["init_seconds"],
        "finish_timeout": settings["finish_seconds"],
        "finish_timeout_raises": True,
    }


def remove_folders(root: Path, run_id: str) -> None:
    """Removes offline folders of a run that the lab has written; others are left alone."""
    for folder in (root / _FOLDER).glob(f"offline-run-*-{run_id}*"):
        if not folder.is_symlink() and _marked_run(folder) == run_id:
            _remove(folder)


def _remove(folder: Path) -> None:
    """Patiently: where the training was killed, its copy process may still be ending the run in there."""
    for _ in range(_REMOVAL_TRIES):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(_REMOVAL_PAUSE_SECONDS)
    shutil.rmtree(folder)


def _marked_run(folder: Path) -> str | None:
    try:
        content = json.loads((folder / MARKER_FILE).read_text())
    except (OSError, ValueError):
        return None
    return content.get("run_id") if isinstance(content, dict) else None


def main() -> None:
    """Reads settings and items from standard input until it ends."""
    answers = _private_answers()
    os.nice(_NICENESS)
    settings = json.loads(sys.stdin.readline())
    _answer(answers, {"beginning": True})
    try:
        import wandb
    except Exception as error:  # noqa: BLE001 - the training process tells the user
        _answer(answers, {"error": _text(error), "id": None})
        return
    _answer(answers, {"ready": True})
    copy = Copy(wandb, settings)
    _serve(copy, _items(), lambda value: _answer(answers, value))
    try:
        copy.end_open_runs()
        wandb.teardown()  # what `finish` left in wandb's buffers is on disk only after this
    except BaseException as error:  # noqa: BLE001 - as in `_serve`
        _answer(answers, {"error": _text(error), "id": None})
    _answer(answers, {"over": True})


def _serve(copy: Copy, items: Iterator[dict[str, Any]], answer: Callable[[dict[str, Any]], None]) -> None:
    answered = 0.0
    for item in items:
        run_id = item["run"]["id"] if item["do"] == "start" else item["id"]
        try:
            done = copy.carry_out(item)
        except BaseException as error:  # noqa: BLE001 - wandb ends some failures with SystemExit
            copy.give_up(run_id)
            answer({"error": _text(error), "id": run_id})
            continue
        if done is not None or time.monotonic() - answered > _ANSWER_EVERY_SECONDS:
            answer({"alive": True} if done is None else done)
            answered = time.monotonic()


def _text(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _private_answers() -> TextIO:
    """Standard output for our answers only; what others in this process print is dropped."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    os.close(nothing)
    return answers


def _items() -> Iterator[dict[str, Any]]:
    for line in sys.stdin:
        if not line.endswith("\n"):  # cut off: the training process was killed while it wrote
            return
        yield json.loads(line)


def _answer(answers: TextIO, value: Mapping[str, Any]) -> None:
    try:
        answers.write(json.dumps(value) + "\n")
        answers.flush()
    except BrokenPipeError:  # nobody listens any more; the runs are still ended
        return


if __name__ == "__main__":
    main()
