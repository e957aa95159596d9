"""Both sides of `sweep_speed` as processes: wall and processor seconds, and what they found.

Ours is one `lora-lab run -m` with an empty ledger; theirs is one process per trial. Both get the converted model and
the official rows as files, and begin with empty data caches; those of theirs are kept from run to run.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_lab.evaluate.tasks import prepare_tasks
from lora_lab.record.ledger import Ledger
from lora_lab.record.run_record import RunRecord
from tests.benchmarks.sweep_plan import Run, Sweep, rows_as_tokens

_CHECKOUT = Path(__file__).resolve().parents[2]
_TAIL = 2000  # characters of a failed process's log that are kept


@dataclass(frozen=True, slots=True)
class Places:
    """work: everything that is made. cache: of the lab, whose converted model both sides are given. mirror: official
    rows. threads: of each process."""

    work: Path
    cache: Path
    mirror: Path
    threads: int


@dataclass(frozen=True, slots=True)
class Spent:
    """Of a process and its children: wall and processor seconds. failed: the end of its log, where it did not end
    well."""

    seconds: float
    cpu_seconds: float
    failed: str | None


def run_process(command: Sequence[str], log: Path, *, threads: int, also: Mapping[str, str] | None = None) -> Spent:
    """Runs it in the checkout, offline, with what it prints in `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, **_switches(threads), **(also or {})}
    with log.open("w") as stream:
        begin = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=_CHECKOUT, env=environment, stdout=stream, stderr=stream, stdin=subprocess.DEVNULL
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begin
    process.returncode = os.waitstatus_to_exitcode(status)
    failed = f"exit code {process.returncode}: {log.read_text()[-_TAIL:]}" if process.returncode else None
    return Spent(seconds, usage.ru_utime + usage.ru_stime, failed)


def _switches(threads: int) -> dict[str, str]:
    return {
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
    }


def run_ours(sweep: Sweep, name: str, places: Places, *, told: Sequence[str] = ()) -> dict[str, Any]:
    """The whole sweep as a user starts it, with an empty ledger and nothing in its cache but the model."""
    folder = _empty(places.work / name)
    cache = folder / "cache"
    cache.mkdir()
    (cache / "models").symlink_to(places.cache.resolve() / "models")
    lines = [*sweep.fixed(places.mirror.resolve()), "tracking=off", f"root={folder / 'root'}", f"cache={cache}", *told]
    command = [sys.executable, "-m", "lora_lab.app.cli", "run", "-m", *lines, *sweep.swept()]
    load = os.getloadavg()[0]
    spent = run_process(command, folder / "log", threads=places.threads)
    records = Ledger(folder / "root").runs()
    ended = sum(record.state == "COMPLETED" for record in records)
    short = f"{ended} of {len(sweep.runs())} trials are completed" if ended < len(sweep.runs()) else None
    found = {record.run_id: _run_facts(record) for record in records}
    return {
        **asdict(spent),
        "failed": spent.failed or short,
        "load_average": [load, os.getloadavg()[0]],
        "runs": found,
    }


def _run_facts(record: RunRecord) -> dict[str, Any]:
    result = record.result
    if result is None:
        return {"name": record.name, "state": record.state}
    return {
        "name": record.name,
        "state": record.state,
        "reason": result.reason,
        "cohort": result.facts.get("cohort", {}).get("id"),
        "measurements": dict(result.measurements),
        "metrics": {name: metric.value for name, metric in result.metrics.items()},
    }


def run_theirs(sweep: Sweep, run: Run, places: Places) -> dict[str, Any]:
    """One trial in a fresh process."""
    given = _given(sweep, places)
    output = _empty(places.work / "theirs" / run.name.replace(" ", "_"))
    settings = {
        "learning_rate": f"{run.learning_rate:g}",
        "seed": run.seed,
        "steps": sweep.steps,
        "batch": sweep.batch,
        "micro_batch": sweep.micro_batch,
        "questions": sweep.questions,
        "output": output,
        **given,
        "hydra.run.dir": output / "hydra",
    }
    lines = [f"{key}='{value}'" for key, value in settings.items()]
    command = [sys.executable, "-m", "tests.benchmarks.sweep_app", *lines]
    load = os.getloadavg()[0]
    own = {"HF_DATASETS_CACHE": str(places.work / "theirs" / "datasets")}
    spent = run_process(command, output / "log", threads=places.threads, also=own)
    found = {} if spent.failed else json.loads((output / "run.json").read_text())
    return {**asdict(spent), "load_average": [load, os.getloadavg()[0]], **found}


def _given(sweep: Sweep, places: Places) -> dict[str, Any]:
    """What theirs is given ready: the base's folder, rows as tokens, task files. Made once, in nobody's time."""
    note = places.work / "given.json"
    if not note.is_file():
        trial = sweep.trial(sweep.runs()[0], places.mirror.resolve())
        folder, examples = rows_as_tokens(trial, places.cache)
        rows = places.work / "rows.json"
        rows.write_text(json.dumps(examples))
        (tasks,) = prepare_tasks(trial.evaluation, cache=places.work).folders
        given = {"folder": folder.resolve(), "rows": rows.resolve(), "tasks": tasks.resolve()}
        note.write_text(json.dumps({key: str(value) for key, value in given.items()}))
    found: dict[str, Any] = json.loads(note.read_text())
    return found


def _empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder.resolve()
