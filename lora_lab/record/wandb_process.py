"""Feeds the process that talks to W&B (`wandb_copy.py`), so that nothing W&B does can hold up or stop a training.

The training thread only puts items into a queue; one thread writes them to the process, another reads its answers.
Importing wandb, a slow `init`, a hanging server or a full disk all happen over there. Only `close` waits, and only
while there is progress: `INIT_SECONDS` for a run to begin, `FINISH_SECONDS` (online; and a second per megabyte of
artifacts) for one to end. What is not through by then is given up, and the process is killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

import lora_lab

INIT_SECONDS = 5.0
FINISH_SECONDS = 15.0
_SECONDS_PER_BYTE = 1e-6
# Before wandb is imported the process waits for nobody but this machine.
_IMPORT_SECONDS = 60.0
# wandb reports its own time limit; ours must not come first.
_SLACK_SECONDS = 1.0
_LONGEST_FINISH_SECONDS = 600.0
_LONGEST_QUEUE = 200_000
# Of W&B's own variables only those that say who one is and where the server is. All others (names, tags, ids, modes)
# are for one run of one program, and would be given to every run of a sweep.
_KEPT_VARIABLES = frozenset(
    f"WANDB_{name}"
    for name in (
        *("API_KEY", "BASE_URL", "APP_URL", "ENTITY", "ORGANIZATION", "IDENTITY_TOKEN_FILE", "CREDENTIALS_FILE"),
        *("CONFIG_DIR", "INSECURE_DISABLE_SSL", "HTTP_PROXY", "HTTPS_PROXY", "X_PROXIES", "X_EXTRA_HTTP_HEADERS"),
    )
)


@dataclass(frozen=True, slots=True)
class Destination:
    """Where copies go. entity: None is WANDB_ENTITY where that is set, else the account's default."""

    mode: str
    project: str
    entity: str | None


class CopyProcess:
    """The process and what is known of it. `on_trouble` is told once, with the reason; it may come from any thread."""

    def __init__(
        self,
        root: Path,
        destination: Destination,
        *,
        cache: Path,
        environ: Mapping[str, str],
        on_trouble: Callable[[str], None],
        init_seconds: float = INIT_SECONDS,
        finish_seconds: float = FINISH_SECONDS,
    ) -> None:
        self._destination = destination
        self._on_trouble = on_trouble
        self._init_seconds, self._finish_seconds = init_seconds, finish_seconds
        self._changed = threading.Condition()
        self._is_troubled = self._is_over = self._is_ready = self._is_closing = False
        self._progress_at = time.monotonic()
        self._pending: dict[str, str] = {}  # run -> "start" or "finish", while the process is at it
        self._pending_bytes: dict[str, int] = {}
        self._outcomes: dict[str, dict[str, Any]] = {}
        self._items: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "lora_lab.record.wandb_copy"],
            env=copy_environment(environ, cache=cache, mode=destination.mode),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the training; the copy of what it did is still ended
        )
        settings = {
            "root": str(root.absolute()),
            "mode": destination.mode,
            "init_seconds": init_seconds,
            "finish_seconds": _LONGEST_FINISH_SECONDS,
        }
        self._items.put(settings)
        self._threads = [threading.Thread(target=one, daemon=True) for one in (self._write, self._read)]
        for thread in self._threads:
            thread.start()

    def start_run(self, run: Mapping[str, Any]) -> None:
        """A run begins; `run` as from `wandb_mapping.run_start`."""
        with self._changed:
            self._pending[run["id"]] = "start"
            self._outcomes.pop(run["id"], None)
        self._put(
            {"do": "start", "project": self._destination.project, "entity": self._destination.entity, "run": dict(run)}
        )

    def row(self, run_id: str, values: Mapping[str, Any]) -> None:
        """A row of the run's history."""
        self._put({"do": "row", "id": run_id, "values": dict(values)})

    def configure(self, run_id: str, values: Mapping[str, Any]) -> None:
        """Keys of the run's configuration that were not known when it began."""
        self._put({"do": "configure", "id": run_id, "values": dict(values)})

    def finish_run(
        self,
        run_id: str,
        *,
        summary: Mapping[str, Any],
        exit_code: int,
        row: Mapping[str, Any] | None = None,
        table: Mapping[str, Any] | None = None,
        artifacts: list[dict[str, Any]] | None = None,
    ) -> None:
        """The run ends: its last row, summary, table and artifacts (which are sent online only)."""
        sent = artifacts or [] if self._destination.mode == "online" else []
        with self._changed:
            if self._pending.get(run_id) != "start":
                self._pending[run_id] = "finish"
            self._pending_bytes[run_id] = sum(_bytes_of(Path(path)) for one in sent for path in one["paths"])
        item = {"do": "finish", "id": run_id, "row": row, "summary": dict(summary), "exit_code": exit_code}
        self._put({**item, "table": table, "artifacts": sent})

    def outcome(self, run_id: str) -> dict[str, Any]:
        """Waits until a run that was finished is through; returns the process's answer, or `{"error": ...}`.

        Progress of any run extends the wait.
        """
        with self._changed:
            started = time.monotonic()
            while run_id not in self._outcomes and not self._is_over:
                if not self._wait(since=started):
                    return {"error": self._silence_text()}
            return self._outcomes.get(run_id, {"error": "the W&B process has ended"})

    def close(self) -> None:
        """Waits while there is progress, then ends the process in any case."""
        self._items.put(None)
        with self._changed:
            self._is_closing = True
            started = time.monotonic()
            while not self._is_over:
                if not self._wait(since=started):
                    break
            reason = None if self._is_over else self._silence_text()
        if reason is not None:
            self._trouble(reason)
        self._end_process()
        for thread in self._threads:
            thread.join(timeout=_SLACK_SECONDS)

    def _put(self, item: dict[str, Any]) -> None:
        if self._is_over:
            return
        if self._items.qsize() > _LONGEST_QUEUE:
            self._trouble(f"{_LONGEST_QUEUE} steps are waiting to be written")
            self._end_process()
        else:
            self._items.put(item)

    def _wait(self, *, since: float) -> bool:
        """Waits for news (the lock is held); False once there was no progress for as long as is allowed."""
        left = max(since, self._progress_at) + self._allowed_seconds() - time.monotonic()
        if left <= 0:
            return False
        self._changed.wait(left)
        return True

    def _allowed_seconds(self) -> float:
        if not self._is_ready:
            return _IMPORT_SECONDS
        if "start" in self._pending.values():
            return self._init_seconds + _SLACK_SECONDS
        return self._finish_seconds + _SECONDS_PER_BYTE * sum(self._pending_bytes.values())

    def _silence_text(self) -> str:
        return f"no answer for {self._allowed_seconds():.0f} s"

    def _write(self) -> None:
        """A thread: the queue into the process's standard input."""
        stream = self._process.stdin
        assert stream is not None
        try:
            while (item := self._items.get()) is not None:
                stream.write(json.dumps(item).encode() + b"\n")
                if self._items.empty():
                    stream.flush()
            stream.close()
        except (OSError, ValueError):  # it is gone; the reader says so
            with contextlib.suppress(OSError):
                stream.close()

    def _read(self) -> None:
        """A thread: the process's answers, until it ends."""
        stream = self._process.stdout
        assert stream is not None
        with stream, contextlib.suppress(ValueError):  # killed in the middle of a line
            for line in stream:
                answer = json.loads(line)
                if "over" in answer:
                    break
                self._take(answer)
        with self._changed:
            self._is_over = True
            is_early = not self._is_closing or bool(self._pending)
            self._changed.notify_all()
        if is_early:
            self._trouble("the W&B process has ended")

    def _take(self, answer: dict[str, Any]) -> None:
        with self._changed:
            run_id = answer.get("started") or answer.get("finished") or answer.get("id")
            if "started" in answer:
                self._begun(answer["started"])
            elif run_id is not None:
                self._pending.pop(run_id, None)
                self._pending_bytes.pop(run_id, None)
                self._outcomes[run_id] = answer
            if "error" not in answer:
                self._is_ready = self._is_ready or "ready" in answer
                self._progress_at = time.monotonic()
            self._changed.notify_all()
        if "error" in answer:
            self._trouble(answer["error"])

    def _begun(self, run_id: str) -> None:
        if run_id in self._pending_bytes:
            self._pending[run_id] = "finish"
        else:
            self._pending.pop(run_id, None)

    def _trouble(self, reason: str) -> None:
        with self._changed:
            is_first, self._is_troubled = not self._is_troubled, True
        if is_first:
            self._on_trouble(reason)

    def _end_process(self) -> None:
        """Kills what is left: the process, and wandb's own below it."""
        with contextlib.suppress(psutil.Error):
            for one in psutil.Process(self._process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    one.kill()
        self._process.kill()
        self._process.wait()


def copy_environment(environ: Mapping[str, str], *, cache: Path, mode: str) -> dict[str, str]:
    """The environment of the process: wandb's folders below `cache`, no reports to its makers, no key when offline."""
    kept = {name: value for name, value in environ.items() if not name.startswith("WANDB_") or name in _KEPT_VARIABLES}
    if mode != "online":
        kept.pop("WANDB_API_KEY", None)
    folder = cache.absolute() / "wandb"
    path = os.pathsep.join([str(Path(lora_lab.__file__).parents[1]), *filter(None, [environ.get("PYTHONPATH")])])
    own = {"WANDB_CACHE_DIR": folder, "WANDB_DATA_DIR": folder / "data", "WANDB_ARTIFACT_DIR": folder / "artifacts"}
    return {
        **kept,
        **{name: str(value) for name, value in own.items()},
        "WANDB_ERROR_REPORTING": "false",
        "PYTHONPATH": path,
    }


def _bytes_of(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
