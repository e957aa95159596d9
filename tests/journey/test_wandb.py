"""W&B as a copy of the ledger: what wandb has written is read back, byte by byte or by a stand-in for its server."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lora_lab.record.cohort_facts import cohort_of, shared_values
from lora_lab.record.ledger import Ledger
from lora_lab.record.result import Status
from lora_lab.record.run_record import RunRecord
from lora_lab.record.step_log import StepLog, read_steps
from lora_lab.record.wandb_process import CopyProcess, Destination
from lora_lab.record.wandb_tracker import WandbTracker
from lora_lab.record.watcher import CohortMember, CohortView
from lora_lab.schema.tracking import WandbTracking
from tests.journey.program import Answer, Lab, call, lines_of, process_environment, python, wait_until
from tests.stepping import poison
from tests.tiers import mostly_slow
from tests.unit.ledger_samples import as_member, claim, ended, loss, result_of, trial_of
from tests.wandb_log import LoggedRun, offline_runs
from tests.wandb_server import API_KEY, StandIn, StoredRun, stand_in_server

STUDY = """\
question: Does the rank matter?
baseline: true
seeds: [0, 1, 2]
grids: [{rank: [2, 4]}]
metrics: [heldout/loss]
"""
SERIES = {
    "train/loss": "loss",
    "train/lr": "learning_rate",
    "train/grad_norm": "gradient_norm",
    "memory/rss_bytes": "rss_bytes",
}
# wandb's own limits without ours are 90 s for each run, and none at the end; the stand-in hangs for 60 s.
LESS_THAN_HANGING_SECONDS = 45.0


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither a login nor settings of the person who runs the tests."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def check_rows(rows: list[dict[str, Any]], record: RunRecord) -> None:
    """Every row of the step log, in order and complete; then the scores."""
    steps = read_steps(record.steps_path) if record.steps_path.exists() else []
    for row, line in zip(rows, steps, strict=False):
        expected = {key: line[name] for key, name in SERIES.items() if name in line}
        expected |= {f"cohort/{key[7:]}": value for key, value in line.items() if key.startswith("cohort_")}
        expected["train/step"] = line["step"]
        if "seconds" in line:  # a member of a cohort has no time of its own
            expected["train/tokens_per_second"] = line["tokens"] / line["seconds"]
        assert row == expected
    rest = rows[len(steps) :]
    if record.state != Status.COMPLETED:
        assert len(rows) == len(steps)
        return
    assert record.result is not None and len(rest) == 1
    scores = {name: one for name, one in record.result.metrics.items() if not name.startswith("train/")}
    assert {f"eval/{name}": one.value for name, one in scores.items()}.items() <= rest[0].items()
    errors = {f"eval/{name}_stderr": one.standard_error for name, one in scores.items()}
    assert {key: value for key, value in errors.items() if value is not None}.items() <= rest[0].items()
    assert rest[0]["eval/step"] == len(steps)


def check_run(logged: LoggedRun, record: RunRecord) -> None:
    """An offline run against its folder in the ledger."""
    check_rows(logged.rows, record)
    lab = logged.config.pop("lab")
    logged.config.pop("_wandb")
    cohort = cohort_of(record.result)
    named = logged.config.pop("cohort", None)
    assert named == (None if cohort is None else {"id": cohort.id, "seats": cohort.seats})
    assert logged.config == record.trial
    assert lab["run_id"] == logged.run.run_id == record.run_id
    assert logged.summary["status"] == str(record.state)
    assert logged.exit_code == (0 if record.state == Status.COMPLETED else 1)
    if record.result is not None:
        measured = record.result.measurements
        own = {name: value for name, value in measured.items() if not name.startswith("cohort_")}
        shared = {f"cohort/{name[7:]}": value for name, value in measured.items() if name not in own}
        assert {**own, **shared}.items() <= logged.summary.items()
        assert logged.summary["missing"] == record.result.missing


def push(lab: Lab, *arguments: str, **variables: str) -> Answer:
    """`wandb push` as a process."""
    command = [sys.executable, "-m", "lora_lab.app.cli", "wandb", "push", "--root", str(lab.root), *arguments]
    done = subprocess.run(command, env=process_environment(**variables), capture_output=True, text=True, check=False)
    return Answer(done.returncode, done.stdout, done.stderr)


def test_a_sweep_is_copied_row_by_row(lab: Lab, capfd: pytest.CaptureFixture[str]) -> None:
    answer = lab.run("-m", "seed=0,1", "method=lora,base", "tracking=offline", "training.max_steps=4", "tag=mine")
    assert answer.code == 0
    copies = offline_runs(lab.root)
    assert sorted(copies) == sorted(record.run_id for record in lab.runs())
    for record in lab.runs():
        check_run(copies[record.run_id], record)
    trained = [copies[record.run_id].run for record in lab.runs() if record.name != "base"]
    assert {one.display_name for one in trained} == {"lora-r8-qv-s0", "lora-r8-qv-s1"}
    assert len({one.run_group for one in trained}) == 1 and {one.job_type for one in trained} == {"train"}
    assert set(trained[0].tags) == {"lora", "tiny_random", "mine"} and trained[0].project == "lora-lab"
    assert "wandb" not in (answer.out + answer.err + "".join(capfd.readouterr())).lower()
    again = lab.run("-m", "seed=0,1", "tracking=offline", "training.max_steps=4")
    assert again.code == 0 and offline_runs(lab.root).keys() == copies.keys()


def test_nan_is_a_gap_and_the_end_of_a_diverged_run(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, lambda member: member.step == 2)
    assert lab.run("training.max_steps=5", "tracking=offline").code == 3
    record = lab.only()
    assert record.state == Status.DIVERGED
    (logged,) = offline_runs(lab.root).values()
    check_run(logged, record)
    assert "train/loss" not in logged.rows[-1] or logged.rows[-1]["train/step"] < 3


def test_a_run_tried_again_is_the_same_run(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_lab.runner import run

    with monkeypatch.context() as patch:
        patch.setattr(run, "score_model", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("injected")))
        assert lab.run("tracking=offline").code == 3
    (failed,) = offline_runs(lab.root).values()
    check_run(failed, lab.only())
    assert "injected" in failed.summary["reason"]
    assert lab.run("tracking=offline").code == 0
    (logged,) = offline_runs(lab.root).values()
    check_run(logged, lab.only())
    assert logged.run.run_id == failed.run.run_id and logged.summary["attempt"] == 2


@pytest.mark.slow
def test_a_killed_training_leaves_its_rows_and_push_gives_every_row_of_the_ledger(lab: Lab) -> None:
    process = lab.start("training.max_steps=100000", "tracking=offline")
    wait_until(lambda: any(lab.root.glob("wandb/offline-run-*/lora_lab.json")), process)
    wait_until(lambda: lines_of(lab.only().steps_path) >= 40, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    record = lab.only()
    steps = read_steps(record.steps_path)
    assert record.state == Status.INTERRUPTED and record.result is None and len(steps) >= 40

    end = time.monotonic() + 60
    while (left := next(iter(offline_runs(lab.root).values()))).exit_code is None and time.monotonic() < end:
        time.sleep(0.1)
    assert left.exit_code == 1 and left.rows, "the copy process ends the run of a dead training"
    assert [row["train/loss"] for row in left.rows] == [line["loss"] for line in steps[: len(left.rows)]]

    for _ in range(2):  # once more doubles nothing
        answer = call("wandb", "push", "--root", str(lab.root))
        assert answer.code == 0, answer.err
        (logged,) = offline_runs(lab.root).values()
        check_run(logged, record)


def test_runs_that_are_open_at_once_keep_apart(tmp_path: Path) -> None:
    said: list[str] = []
    process = CopyProcess(
        tmp_path, Destination("offline", "p", None), cache=tmp_path, environ=os.environ, on_trouble=said.append
    )
    names = ["a" * 16, f"{'a' * 16}.r1", "b" * 16]
    for name in names:
        start = {"name": name, "group": name, "job_type": "train", "tags": [name], "config": {"own": name}}
        process.start_run({"id": name, **start})
    for step in range(50):
        for number, name in enumerate(names):
            process.row(name, {"train/step": step, "train/loss": number + step / 100})
    for number, name in enumerate(reversed(names)):
        process.finish_run(name, summary={"status": name}, exit_code=number)
    process.close()
    copies = offline_runs(tmp_path)
    assert said == [] and sorted(copies) == sorted(names)
    for number, name in enumerate(names):
        copy = copies[name]
        assert copy.rows == [{"train/step": step, "train/loss": number + step / 100} for step in range(50)]
        assert (copy.summary["status"], copy.config["own"], copy.exit_code) == (name, name, 2 - number)


def test_members_of_a_cohort_have_runs_of_their_own_live_and_pushed(tmp_path: Path) -> None:
    """Two runs open at once; the cohort is told of at every step, and joins their configuration once."""
    with WandbTracker(
        WandbTracking(kind="wandb", mode="offline", project="p", entity=None), tmp_path, cache=tmp_path, study=None
    ) as tracker:
        tracker.begin(2)
        folders = [claim(Ledger(tmp_path), trial_of(seed=seed)) for seed in (0, 1)]
        logs = [StepLog(folder.steps_path) for folder in folders if folder is not None]
        ids = [folder.run_id for folder in folders if folder is not None]
        for folder in folders:
            assert folder is not None
            tracker.run_started(folder.header, folder.path, steps=12)
        for step in range(1, 13):
            for number, (run_id, log) in enumerate(zip(ids, logs, strict=True)):
                own = {"loss": 3.0 + number - step, "tokens": 100, "loss_tokens": 10}
                values = {**own, **shared_values({"tokens_per_second": 300.0 + step, "rss_bytes": 7})}
                log.write(step, values)
                tracker.step(run_id, step, values)
            members = tuple(CohortMember(run_id, "n", step, 12, None) for run_id in ids)
            tracker.cohort("5f0c", CohortView(members, 4, 0, 300.0 + step, "rss_bytes", 7))
        for folder, log in zip(folders, logs, strict=True):
            assert folder is not None
            log.close()
            with folder:
                folder.write_result(
                    result := result_of(folder, **as_member("5f0c", ids, seats=4, wall=9.0), metrics={"x": loss(1.0)})
                )
            tracker.run_finished(folder.header, folder.path, result)
    live = offline_runs(tmp_path)
    assert sorted(live) == sorted(ids)
    assert call("wandb", "push", "--root", str(tmp_path)).code == 0
    pushed = offline_runs(tmp_path)
    for record in Ledger(tmp_path).runs():
        assert live[record.run_id].config["cohort"] == {"id": "5f0c", "seats": 4}
        assert live[record.run_id].rows == pushed[record.run_id].rows
        assert live[record.run_id].rows[0]["cohort/tokens_per_second"] == 301.0
        for copies in (live, pushed):
            check_run(copies[record.run_id], record)


def test_wandb_is_in_another_process_or_nowhere_and_no_secret_reaches_its_files(lab: Lab) -> None:
    canaries = ["canary-wandb-key-0123456789", "canary-hf-token", "canary-argument", "canary-password"]
    code = f"""
import os, sys  # {canaries[2]}
from lora_lab.app.cli import main
for tracking in ("off", "offline"):
    code = main([*sys.argv[2:], f"tracking={{tracking}}", f"seed={{len(tracking)}}"])
    print(code, "wandb" in sys.modules, os.path.exists(sys.argv[1]), file=sys.stderr)
"""
    variables = {
        "WANDB_API_KEY": canaries[0],
        "HF_TOKEN": canaries[1],
        "HTTPS_PROXY": f"http://user:{canaries[3]}@127.0.0.1:9",
        "WANDB_NOTES": canaries[1],
    }
    arguments = [one for one in lab.tiny() if not one.startswith("tracking=")]
    with _environment(variables):
        done = python(code, str(lab.root / "wandb"), "run", *arguments)
        assert [line for line in done.err.splitlines() if line.startswith("0 ")] == ["0 False False", "0 False True"]
        _check_files(lab, canaries)
        assert call("wandb", "push", "--root", str(lab.root)).code == 0
        _check_files(lab, canaries)


def _check_files(lab: Lab, canaries: list[str]) -> None:
    files = [path for path in (lab.root / "wandb").rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    for path in files:
        content = path.read_bytes()
        assert not [one for one in canaries if one.encode() in content], path


def test_a_study_has_a_run_with_its_table(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "ranks.yaml").write_text(STUDY)
    monkeypatch.chdir(tmp_path)
    table = lab.run("-m", "study=ranks", "tracking=offline", "--json").json()
    _check_study(lab, table)
    before = offline_runs(lab.root)
    for path in (lab.root / "wandb").glob("offline-run-*/lora_lab.json"):
        if "study" not in path.parent.name:
            assert before[json.loads(path.read_text())["run_id"]].run.tags[-1] == "ranks"
    answer = push(lab, "--study", "ranks")
    assert answer.code == 0 and "8 copied, 0 skipped, 0 failed" in answer.out
    _check_study(lab, table)
    after = offline_runs(lab.root)
    assert {name: run.rows for name, run in after.items()} == {name: run.rows for name, run in before.items()}
    _check_workspace(lab, after)


def _check_study(lab: Lab, table: dict[str, Any]) -> None:
    logged = offline_runs(lab.root)["study-ranks"]
    assert logged.run.job_type == "study" and logged.exit_code == 0 and logged.rows == []
    assert (logged.summary["setting_count"], logged.summary["run_count"]) == (3, 7)
    (folder,) = (lab.root / "wandb").glob("offline-run-*-study-ranks")
    content = json.loads((folder / "files" / logged.summary["settings"]["path"]).read_text())
    for values, row in zip(content["data"], table["rows"], strict=True):
        found = dict(zip(content["columns"], values, strict=True))
        cell = row["metrics"]["heldout/loss"]
        assert (found["setting"], found["heldout/loss mean"]) == (row["name"], cell["mean"])
        assert found["heldout/loss n"] == len(cell["points"])
        assert found["heldout/loss low"] == (cell["interval"] or {"low": None})["low"]


def _check_workspace(lab: Lab, copies: dict[str, LoggedRun]) -> None:
    answer = lab.ask("wandb", "workspace", "ranks", "--dry-run")
    assert answer.code == 0, answer.err
    specs = json.loads((lab.root / "studies" / "ranks" / "wandb_workspace.json").read_text())
    carried = {key for run in copies.values() for row in run.rows for key in row}
    carried |= {f"summary:{key}" for run in copies.values() for key in run.summary}
    for spec in specs.values():
        drawn = set(_metrics_in(spec))
        measured = {"summary:train_seconds", "train/tokens_per_second"} & carried  # of runs made alone
        assert {"train/loss", "eval/heldout/loss", "summary:peak_allocated_bytes", *measured} <= drawn
        assert drawn <= {*carried, "_step"}, "a panel of something that no run has"
        assert "Does the rank matter?" in json.dumps(specs) and "ranks" in json.dumps(spec)


def _metrics_in(node: Any) -> list[str]:
    """Names of metrics at any depth of a saved view."""
    if isinstance(node, list):
        return [name for item in node for name in _metrics_in(item)]
    if not isinstance(node, dict):
        return []
    own = [name for name in node.get("metrics", []) if isinstance(name, str)]
    own += [node[key] for key in ("xAxis", "yAxis") if isinstance(node.get(key), str)]
    return own + [name for value in node.values() for name in _metrics_in(value)]


def test_a_workspace_without_a_login_says_so(lab: Lab) -> None:
    ended(lab.root, trial_of(), metrics={"heldout/loss": loss(1.0)})
    answer = lab.ask("wandb", "workspace", "nothing")
    assert answer.code == 2 and 'no study "nothing"' in answer.err


def test_push_leaves_out_what_is_running_or_damaged(tmp_path: Path) -> None:
    done = ended(tmp_path, trial_of(), metrics={"heldout/loss": loss(1.0)})
    damaged = ended(tmp_path, trial_of(rank=2))
    torn = ended(tmp_path, trial_of(rank=3))
    (damaged.folder / "trial.json").write_text("{")
    torn.steps_path.write_text("not json\n")
    held = claim(Ledger(tmp_path), trial_of(rank=4))
    assert held is not None
    with held:
        answer = call("wandb", "push", "--root", str(tmp_path))
    assert answer.code == 0, answer.err
    assert "1 copied, 3 skipped, 0 failed" in answer.out
    assert f"{held.run_id} lora-r4-s0: skipped: RUNNING" in answer.out
    assert str(damaged.folder / "trial.json") in answer.out and f"{torn.steps_path}:1" in answer.out
    assert list(offline_runs(tmp_path)) == [done.run_id]


def test_push_touches_only_what_the_lab_has_written(tmp_path: Path) -> None:
    record = ended(tmp_path, trial_of(), metrics={"heldout/loss": loss(1.0)})
    foreign = tmp_path / "wandb" / f"offline-run-20200101_000000-{record.run_id}"
    foreign.mkdir(parents=True)
    (foreign / "notes.txt").write_text("mine")
    for _ in range(2):
        assert call("wandb", "push", "--root", str(tmp_path)).code == 0
    assert (foreign / "notes.txt").read_text() == "mine"
    assert list(offline_runs(tmp_path)) == [record.run_id]
    refused = call("wandb", "push", "--root", str(tmp_path), "--project", "a/b", "--entity", "")
    assert refused.code == 2 and "--project:" in refused.err and "--entity:" in refused.err


def test_the_next_step_that_push_names_is_one_wandb_knows(tmp_path: Path) -> None:
    record = ended(tmp_path, trial_of(), metrics={"heldout/loss": loss(1.0)})
    answer = call("wandb", "push", "--root", str(tmp_path))
    *_, command = answer.out.strip().partition("To send them: ")
    program, *arguments = command.split()
    assert program == "wandb"
    done = subprocess.run(
        [sys.executable, "-m", "wandb", *arguments, "--dry-run"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "Would sync 1 run" in done.stdout + done.stderr
    assert record.run_id in done.stdout + done.stderr


def _stored(server: StandIn, record: RunRecord) -> StoredRun:
    return server.runs[record.run_id]


def test_online_every_row_arrives_once_however_often_it_is_sent(lab: Lab) -> None:
    with stand_in_server() as server:
        with _environment(server.variables()):
            answer = lab.run("tracking=wandb", "training.max_steps=4")
        assert answer.code == 0 and "W&B" not in answer.err, answer.err
        record = lab.only()
        stored = _stored(server, record)
        check_rows(stored.rows, record)
        assert stored.exit_codes == [0] and stored.summary["status"] == "COMPLETED"
        assert {(one["artifactTypeName"], one["artifactCollectionName"]) for one in server.artifacts} == {
            ("model", f"adapter-{record.run_id}"),
            ("eval", f"eval-{record.run_id}"),
        }
        for kept in (len(stored.history), 2, 0):
            del stored.history[kept:]
            if not kept:
                stored.summary.clear()
            assert push(lab, "--mode", "online", **server.variables()).code == 0
            check_rows(stored.rows, record)
        assert stored.exit_codes == [0] * 4
        sent = b"".join(server.bodies)
        assert API_KEY.encode() not in sent and str(lab.root).encode() not in sent


@pytest.mark.slow
def test_a_run_that_is_alone_when_it_is_tried_again_names_no_cohort(tmp_path: Path) -> None:
    record = ended(tmp_path, trial_of(), status=Status.FAILED, **as_member("5f0c", ["a"], seats=4, wall=9.0))
    lab = Lab(tmp_path, tmp_path / "cache")
    with stand_in_server() as server:
        assert push(lab, "--mode", "online", **server.variables()).code == 0
        assert _stored(server, record).config["cohort"]["value"] == {"id": "5f0c", "seats": 4}
        ended(tmp_path, trial_of(), facts={"executed": "alone"})
        assert push(lab, "--mode", "online", **server.variables()).code == 0
        assert _stored(server, record).config["cohort"]["value"] is None


@pytest.mark.parametrize("mode", mostly_slow(["hangs", "fails"], keep=["fails"]))
def test_a_server_that_does_not_answer_costs_seconds_and_one_line(lab: Lab, mode: str) -> None:
    with stand_in_server() as server, _environment(server.variables()):
        server.mode = mode
        begun = time.monotonic()
        answer = lab.run("-m", "seed=0,1" if mode == "hangs" else "seed=0", "tracking=wandb")
        assert time.monotonic() - begun < LESS_THAN_HANGING_SECONDS
        assert server.bodies, "it was asked"
    assert answer.code == 0 and {record.state for record in lab.runs()} == {Status.COMPLETED}
    told = [line for line in answer.err.splitlines() if "W&B" in line]
    assert len(told) == 1 and "lora-lab wandb push" in told[0]
    assert API_KEY not in answer.err


def test_offline_wins_over_online(lab: Lab) -> None:
    with stand_in_server() as server:
        with _environment({**server.variables(), "WANDB_MODE": "offline"}):
            assert lab.run("tracking=wandb").code == 0
        assert list(offline_runs(lab.root)) == [lab.only().run_id] and server.bodies == []
        refused = push(lab, "--mode", "online", **server.variables(), WANDB_MODE="offline")
        assert refused.code == 2 and "WANDB_MODE=offline forbids online" in refused.err


def test_without_a_login_a_push_online_says_so(lab: Lab) -> None:
    ended(lab.root, trial_of(), metrics={"heldout/loss": loss(1.0)})
    ended(lab.root, trial_of(rank=2), metrics={"heldout/loss": loss(1.0)})
    answer = push(lab, "--mode", "online")
    assert answer.code == 4 and "wandb login" in answer.err


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield
