"""What goes into W&B of a run, a step, a score, a study; and what must not: numbers that are not there, secrets."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from lora_lab.record.cohort_facts import cohort_of, shared_values
from lora_lab.record.result import Status
from lora_lab.record.run_record import RunRecord
from lora_lab.record.step_log import StepLog, read_steps
from lora_lab.record.wandb_mapping import (
    AXES,
    artifacts_of,
    exit_code,
    redacted,
    run_start,
    score_row,
    secrets_in,
    step_row,
    study_start,
    study_summary,
    study_table,
    summary_of,
)
from lora_lab.study.table import settings_table
from tests.unit.ledger_samples import as_member, ended, loss, trial_of

STEP = {
    "step": 3,
    "loss": 1.5,
    "learning_rate": 2e-3,
    "gradient_norm": 0.25,
    "tokens": 100,
    "loss_tokens": 60,
    "padded_tokens": 128,
    "seconds": 0.5,
}
NO_NUMBERS = ("loss", "gradient_norm", "learning_rate", "tokens", "seconds", "rss_bytes")


def _start(record: RunRecord, *studies: str) -> dict[str, Any]:
    assert record.header is not None
    return run_start(record.header, studies)


def test_a_run_is_known_by_its_id_name_and_setting(tmp_path: Path) -> None:
    first = ended(tmp_path, trial_of(seed=0))
    second = ended(tmp_path, trial_of(seed=1))
    again = ended(tmp_path, trial_of(seed=1), repeat=2)
    other = ended(tmp_path, trial_of(seed=0, learning_rate=0.1))
    start = _start(first, "first_look")
    assert start["id"] == first.run_id and start["name"] == "lora-r8-s0"
    assert start["group"] == f"lora-r8-{str(first.setting)[:8]}" == _start(second)["group"]
    assert _start(other)["group"] != start["group"], "equal names, other setting"
    assert (_start(again)["id"], _start(again)["name"]) == (f"{second.run_id}.r2", "lora-r8-s1-repeat2")
    assert start["tags"] == ["lora", "tiny_random", "first_look"]
    assert not set("/\\#?%:") & set(_start(again)["id"]), "what W&B forbids in ids"


def test_the_configuration_is_the_resolved_trial_and_who_it_is(tmp_path: Path) -> None:
    record = ended(tmp_path, trial_of())
    config = _start(record, "a", "b")["config"]
    lab = config.pop("lab")
    assert config == record.trial
    assert lab["fingerprint"] == record.header.fingerprint  # type: ignore[union-attr]
    assert lab["identities"] == {"model": "0" * 64} and lab["studies"] == ["a", "b"]
    json.dumps(config, allow_nan=False)


def test_an_untouched_base_is_a_baseline(tmp_path: Path) -> None:
    start = _start(ended(tmp_path, trial_of(method={"kind": "base"}), name="base"))
    assert start["job_type"] == "baseline" and start["group"].startswith("base-")
    assert _start(ended(tmp_path, trial_of()))["job_type"] == "train"


def test_tags_that_are_too_long_for_wandb_are_left_to_the_configuration(tmp_path: Path) -> None:
    start = _start(ended(tmp_path, trial_of()), "s" * 64, "t" * 65)
    assert start["tags"] == ["lora", "tiny_random", "s" * 64]
    assert start["config"]["lab"]["studies"] == ["s" * 64, "t" * 65]


def test_a_step_on_a_cpu_and_on_cuda() -> None:
    common = {
        "train/step": 3,
        "train/loss": 1.5,
        "train/lr": 2e-3,
        "train/grad_norm": 0.25,
        "train/tokens_per_second": 200.0,
    }
    assert step_row({**STEP, "rss_bytes": 7}) == {**common, "memory/rss_bytes": 7}
    cuda = {"allocated_bytes": 5, "reserved_bytes": 9}
    assert step_row({**STEP, **cuda}) == {**common, "memory/allocated_bytes": 5, "memory/reserved_bytes": 9}


def test_losses_beside_the_language_models_have_series_of_their_own() -> None:
    plain = step_row(STEP)
    assert step_row({**STEP, "load_balancing_loss": 1.25, "orthogonality_loss": math.nan}) == {
        **plain,
        "train/load_balancing_loss": 1.25,
    }


def test_a_stage_is_tagged(tmp_path: Path) -> None:
    record = ended(tmp_path, trial_of())
    assert record.header is not None
    child = record.header.model_copy(update={"identities": {"init_from": "ab" * 32}})
    assert "stage" in run_start(child, [])["tags"] and "stage" not in run_start(record.header, [])["tags"]


@pytest.mark.parametrize("key", NO_NUMBERS)
@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
def test_what_is_no_number_has_no_key_live_and_from_the_log(key: str, value: float | None, tmp_path: Path) -> None:
    values = {**STEP, "rss_bytes": 7, key: value}
    with StepLog(tmp_path / "steps.jsonl") as log:
        log.write(3, {name: one for name, one in values.items() if name != "step"})
    (line,) = read_steps(tmp_path / "steps.jsonl")
    live = step_row(values)
    assert live == step_row(line)
    assert len(step_row({**STEP, "rss_bytes": 7})) - len(live) == 1, "one series lacks a point, no other does"
    assert all(math.isfinite(number) for number in live.values())


def test_every_key_has_an_axis_of_its_own() -> None:
    assert {name: axis for name, axis, _ in AXES} == {
        "train/step": None,
        "eval/step": None,
        "train/*": "train/step",
        "memory/*": "train/step",
        "cohort/*": "train/step",
        "eval/*": "eval/step",
    }


def test_scores_stand_beside_their_standard_errors_at_the_last_step(tmp_path: Path) -> None:
    metrics = {"heldout/loss": loss(2.0), "a/acc": loss(0.5, standard_error=None), "train/loss": loss(1.0)}
    record = ended(tmp_path, trial_of(), metrics=metrics, measurements={"steps": 40})
    expected = {"eval/step": 40, "eval/heldout/loss": 2.0, "eval/heldout/loss_stderr": 0.01, "eval/a/acc": 0.5}
    assert score_row(record.result) == expected
    diverged = ended(tmp_path, trial_of(rank=2), status=Status.DIVERGED, metrics={"train/loss": loss(1.0)})
    assert score_row(diverged.result) is None and score_row(None) is None


def test_the_summary_is_the_result_and_nothing_else(tmp_path: Path) -> None:
    record = ended(
        tmp_path,
        trial_of(),
        metrics={"heldout/loss": loss(2.0), "train/loss": loss(1.0, standard_error=None)},
        measurements={"peak_allocated_bytes": 10, "train_seconds": 1.5, "steps": 4},
        missing={"predicted_peak_allocated_bytes": "not yet"},
        facts={"device": "cpu", "warnings": ["cut"]},
    )
    assert record.header is not None and record.result is not None
    summary = summary_of(record.header, record.result, state="COMPLETED")
    assert summary["status"] == "COMPLETED" and summary["trainable_parameters"] == 1000
    assert (summary["peak_allocated_bytes"], summary["train_seconds"]) == (10, 1.5)
    assert (summary["train/loss"], summary["eval/heldout/loss"]) == (1.0, 2.0)
    assert summary["missing"] == {"predicted_peak_allocated_bytes": "not yet"}
    assert "predicted_peak_allocated_bytes" not in summary and "reason" not in summary, "missing is missing"
    assert exit_code(record.result) == 0


def test_what_a_cohort_shares_stands_under_its_own_keys_only(tmp_path: Path) -> None:
    record = ended(tmp_path, trial_of(), **as_member("5f0c", ["a", "b"], seats=4, wall=10.0))
    assert record.header is not None and record.result is not None
    config = run_start(record.header, [], cohort_of(record.result))["config"]
    assert config["cohort"] == {"id": "5f0c", "seats": 4} and "cohort" not in _start(record)["config"]
    summary = summary_of(record.header, record.result, state="COMPLETED")
    shared = {"train_seconds": 9.0, "wall_seconds": 10.0, "tokens_per_second": 355.0, "peak_allocated_bytes": 10**10}
    assert {f"cohort/{name}": value for name, value in shared.items()}.items() <= summary.items()
    assert not {"train_seconds", "wall_seconds", "tokens_per_second", "cohort_train_seconds"} & summary.keys()
    assert (summary["executed"], summary["steps"], summary["peak_allocated_bytes"]) == ("cohort", 12, 700_000_000)


def test_a_step_in_a_cohort_has_no_speed_of_its_own() -> None:
    values = {name: value for name, value in STEP.items() if name != "seconds"}
    shared = shared_values({"tokens_per_second": 345.0, "rss_bytes": 7, "allocated_bytes": None})
    row = step_row({**values, **shared})
    assert row == {**step_row(values), "cohort/tokens_per_second": 345.0, "cohort/rss_bytes": 7}
    assert "train/tokens_per_second" not in row and not any(key.startswith("memory/") for key in row)


def test_a_killed_run_has_a_status_and_no_numbers(tmp_path: Path) -> None:
    record = ended(tmp_path, trial_of(), status=Status.FAILED, reason="boom")
    assert record.header is not None
    assert summary_of(record.header, None, state="INTERRUPTED") == {"status": "INTERRUPTED", "attempt": 1}
    assert exit_code(None) == exit_code(record.result) == 1


def test_artifacts_are_what_is_there(tmp_path: Path) -> None:
    record = ended(tmp_path, trial_of())
    assert record.header is not None
    assert artifacts_of(record.header, record.folder) == []
    (record.folder / "adapter").mkdir()
    (record.folder / "eval").mkdir()
    found = artifacts_of(record.header, record.folder)
    assert [(one["name"], one["type"]) for one in found] == [
        (f"adapter-{record.run_id}", "model"),
        (f"eval-{record.run_id}", "eval"),
    ]


def test_the_table_of_a_study_keeps_means_intervals_and_counts(tmp_path: Path) -> None:
    records = [ended(tmp_path, trial_of(seed=seed), metrics={"x/acc": loss(1.0 + seed)}) for seed in range(3)]
    records.append(ended(tmp_path, trial_of(rank=2), metrics={"x/acc": loss(5.0)}))
    records.append(ended(tmp_path, trial_of(rank=4), status=Status.FAILED))
    table = settings_table(records, metrics=None)
    flat = study_table(table.to_json())
    rows = [dict(zip(flat["columns"], row, strict=True)) for row in flat["data"]]
    cell = table.rows[0].cells["x/acc"]
    assert cell.interval is not None
    assert [rows[0][f"x/acc {part}"] for part in ("mean", "low", "high", "n")] == [
        2.0,
        cell.interval.low,
        cell.interval.high,
        3,
    ]
    assert [rows[1][f"x/acc {part}"] for part in ("mean", "low", "high", "n")] == [5.0, None, None, 1]
    assert [rows[2][f"x/acc {part}"] for part in ("mean", "low", "high", "n")] == [None, None, None, 0]
    assert [row["rank"] for row in rows] == ["8", "2", "4"], "an axis is text, since it may hold more than numbers"
    counts = {"setting_count": 3, "run_count": 5, "completed_count": 4}
    lacking = table.to_json()["not_alone"]
    assert study_summary(table.to_json()) == {**counts, "not_alone": lacking, "problems": []}
    assert [(one["cost"], one["runs"]) for one in lacking] == [("train_seconds", 4), ("peak_allocated_bytes", 4)]
    assert flat["key"] not in counts, "or one would hide the other"
    assert study_start("first_look")["id"] == "study-first_look" and study_start("a")["job_type"] == "study"


def test_secrets_are_cut_out_at_any_depth_and_innocent_text_is_not() -> None:
    environ = {
        "HF_TOKEN": "hf_canary12",
        "WANDB_API_KEY": "k" * 40,
        "DB_PASSWORD": "canary-pass",
        "MY_SECRET": "short",
        "TOKENIZERS_PARALLELISM": "tokenizers-value",
        "NUM_TOKENS": "tokens-value",
        "KEYBOARD": "keyboard-value",
    }
    secrets = secrets_in(environ)
    assert sorted(secrets) == ["canary-pass", "hf_canary12", "k" * 40]
    value = {"a": ["x hf_canary12 y", {"b": "https://user:canary-pass@host/p"}], "n": 1, "hf_canary12": None}
    assert redacted(value, secrets) == {"a": ["x (secret) y", {"b": "https://host/p"}], "n": 1, "(secret)": None}
    innocent = ["tokenizers-value", "tokens-value", "keyboard-value", "num_tokens", "short", "mail@host"]
    assert redacted(innocent, secrets) == innocent
