"""What of a run goes into W&B, and under which names. Plain values in, plain values out; nothing here knows wandb.

Every series has an axis of its own: `train/*` and `memory/*` are drawn over `train/step`, `eval/*` over `eval/step`,
both counted in optimizer steps. What the runs of a cohort share stands under `cohort/*` and nowhere else. A score's
standard error stands beside it as `eval/TASK/METRIC_stderr`. What was not measured, or is not finite, has no key. Text
passes `redacted` before it leaves the process.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from lora_lab.plan.readable import without_seed
from lora_lab.record.cohort_facts import SHARED, CohortFacts
from lora_lab.record.environment import without_user_info
from lora_lab.record.parents import START
from lora_lab.record.predicted_peak import ERROR, peaks_of, predicted_parts
from lora_lab.record.result import Result, Status
from lora_lab.record.run_record import ADAPTER_FOLDER, EVAL_FOLDER, RESULT_FILE, RunHeader

# (name, its step axis or None, whether W&B keeps the last value in the summary). The summary's `train/loss` is the
# result's, not the last row's: a run that diverged has none.
AXES = (
    ("train/step", None, False),
    ("eval/step", None, False),
    ("train/*", "train/step", False),
    ("memory/*", "train/step", False),
    ("cohort/*", "train/step", False),
    ("eval/*", "eval/step", True),
)
# Key of the step log -> key in W&B. Losses beside the language model's (`load_balancing_loss`) keep their names.
_SERIES = {
    "loss": "train/loss",
    "learning_rate": "train/lr",
    "gradient_norm": "train/grad_norm",
    "allocated_bytes": "memory/allocated_bytes",
    "reserved_bytes": "memory/reserved_bytes",
    "rss_bytes": "memory/rss_bytes",
}
_AUXILIARY = "_loss"
_OF_TRAINING, _OF_COHORT = "train/", "cohort/"
_LONGEST_TAG = 64
_SETTING_DIGITS = 8
_SECRET_NAME = re.compile(r"(^|_)(API)?(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(_|$)", re.IGNORECASE)
# A shorter value would take innocent words with it.
_SHORTEST_SECRET = 8
TABLE_KEY = "settings"
# In the configuration of a run: the cohort it is trained in.
COHORT_KEY = "cohort"


def run_start(header: RunHeader, studies: Sequence[str], cohort: CohortFacts | None = None) -> dict[str, Any]:
    """Identity and configuration of a run: the arguments of `wandb.init`, by its names.

    The id is the ledger's, so that a run tried again is the same run. The group is the setting: its readable name and
    the first digits of its fingerprint, without the seed. `cohort`: that in which it was trained, as far as is known.
    """
    trial = header.trial
    bare = without_seed(header.name)
    method, model = trial["method"]["kind"], trial["model"]["name"]
    return {
        "id": header.run_id,
        "name": header.name + (f"-repeat{header.repeat}" if header.repeat else ""),
        "group": f"{bare}-{header.setting[:_SETTING_DIGITS]}",
        "job_type": "baseline" if method == "base" else "train",
        "tags": _tags([method, model, *(["stage"] if START in header.identities else []), *studies, header.tag]),
        "config": {
            **trial,
            "lab": _identity(header, studies),
            **({} if cohort is None else cohort_config(cohort.id, cohort.seats)),
        },
    }


def cohort_config(cohort_id: str, seats: int) -> dict[str, Any]:
    """What the configuration of a run says of the cohort it is trained in: `cohort.id`, `cohort.seats`."""
    return {COHORT_KEY: {"id": cohort_id, "seats": seats}}


def _tags(texts: Sequence[str | None]) -> list[str]:
    """W&B refuses longer tags; those stay in the configuration only."""
    return list(dict.fromkeys(text for text in texts if text and len(text) <= _LONGEST_TAG))


def _identity(header: RunHeader, studies: Sequence[str]) -> dict[str, Any]:
    kept = ("run_id", "fingerprint", "setting", "repeat", "numerics_version", "tag", "machine_id")
    return {
        **{key: getattr(header, key) for key in kept},
        "identities": header.identities,
        "studies": list(studies),
    }


def step_row(values: Mapping[str, Any]) -> dict[str, float | int]:
    """The row of an optimizer step, from the runner's values or a line of the step log; both give the same row."""
    row: dict[str, float | int] = {"train/step": values["step"]}
    for name, key in _SERIES.items():
        if is_number(value := values.get(name)):
            row[key] = value
    auxiliary = {name: value for name, value in values.items() if name.endswith(_AUXILIARY) and is_number(value)}
    row |= {f"{_OF_TRAINING}{name}": value for name, value in auxiliary.items()}
    row |= {_shared_key(name): value for name, value in values.items() if name.startswith(SHARED) and is_number(value)}
    tokens, seconds = values.get("tokens"), values.get("seconds")
    if is_number(tokens) and is_number(seconds) and seconds > 0:
        row["train/tokens_per_second"] = tokens / seconds
    return row


def _shared_key(name: str) -> str:
    return _OF_COHORT + name.removeprefix(SHARED)


def is_number(value: object) -> TypeGuard[float | int]:
    """Whether there is a finite number; NaN and the infinities are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def score_row(result: Result | None) -> dict[str, float | int] | None:
    """The row of scores of a completed run, at its last step; None where there is none."""
    if result is None or result.status != Status.COMPLETED:
        return None
    row: dict[str, float | int] = {}
    for name, metric in result.metrics.items():
        if not name.startswith(_OF_TRAINING):
            row[f"eval/{name}"] = metric.value
            if metric.standard_error is not None:
                row[f"eval/{name}_stderr"] = metric.standard_error
    return {"eval/step": result.measurements.get("steps", 0), **row} if row else None


def summary_of(header: RunHeader, result: Result | None, *, state: str) -> dict[str, Any]:
    """The final numbers. Bytes, seconds, counts and reasons have the names they have in `result.json`, but for what the
    runs of a cohort share: that is under `cohort/`. The predicted peak stands beside the measured one with its error,
    and with its parts where they were kept.

    `state` stands where there is no result: the process was killed.
    """
    if result is None:
        return {"status": state, "attempt": header.attempt}
    counts = {
        "trainable_parameters": result.trainable_parameters,
        "total_parameters": result.total_parameters,
        "predicted_peak_allocated_bytes": result.predicted_peak_allocated_bytes,
        ERROR: None if (peaks := peaks_of(result)) is None else peaks.error,
        "predicted_parts_bytes": predicted_parts(result) or None,
    }
    trained = {name: one.value for name, one in result.metrics.items() if name.startswith(_OF_TRAINING)}
    scores = score_row(result) or {}
    texts = {"reason": result.reason, "device": result.facts.get("device"), "executed": result.facts.get("executed")}
    return {
        "status": result.status.value,
        "attempt": result.attempt,
        "started_at": result.started_at,
        "finished_at": result.finished_at,
        **{name: value for name, value in {**counts, **texts}.items() if value is not None},
        **{_shared_key(name) if name.startswith(SHARED) else name: one for name, one in result.measurements.items()},
        **trained,
        **{name: value for name, value in scores.items() if name != "eval/step"},
        "missing": result.missing,
        "warnings": result.facts.get("warnings", []),
    }


def exit_code(result: Result | None) -> int:
    """0 for a run that completed or that its search stopped early; W&B shows every other as failed."""
    return 0 if result is not None and result.status in (Status.COMPLETED, Status.STOPPED) else 1


def artifacts_of(header: RunHeader, folder: Path) -> list[dict[str, Any]]:
    """The adapter (type `model`), and the files of the scores (type `eval`), as far as they are there.

    Weights of the model itself (`model/`, `changed/`) stay in the ledger: they may be as large as the model.
    """
    about = {"run_id": header.run_id, "fingerprint": header.fingerprint, "name": header.name}
    found = []
    if (folder / ADAPTER_FOLDER).is_dir():
        found.append(_artifact("adapter", "model", header, [folder / ADAPTER_FOLDER], about))
    if (folder / EVAL_FOLDER).is_dir():
        found.append(_artifact("eval", "eval", header, [folder / EVAL_FOLDER, folder / RESULT_FILE], about))
    return found


def _artifact(
    what: str, kind: str, header: RunHeader, paths: Sequence[Path], about: Mapping[str, Any]
) -> dict[str, Any]:
    name = f"{what}-{header.run_id}"
    return {"name": name, "type": kind, "paths": [str(path) for path in paths], "metadata": dict(about)}


def study_start(study: str) -> dict[str, Any]:
    """Identity of the one W&B run of a study."""
    return {
        "id": f"study-{study}",
        "name": study,
        "group": None,
        "job_type": "study",
        "tags": _tags([study]),
        "config": {"lab": {"study": study}},
    }


def study_table(table: Mapping[str, Any]) -> dict[str, Any]:
    """Columns and rows of a study's table (`SettingsTable.to_json`), flat: axes, scores with intervals, costs."""
    rows = table["rows"]
    axes = list(dict.fromkeys(axis for row in rows for axis in row["axes"]))
    costs = list(dict.fromkeys(name for row in rows for name in row["measurements"]))
    counts = ["trainable_parameters", "total_parameters", "predicted_peak_allocated_bytes"]
    metrics = [metric["name"] for metric in table["metrics"]]
    columns = ["setting", "fingerprint", "runs", "completed", *axes]
    columns += [f"{name} {part}" for name in metrics for part in ("mean", "low", "high", "n")]
    data = [
        [
            *(row["name"], row["setting"], row["runs"], row["completed"]),
            *(_axis_text(row["axes"].get(axis)) for axis in axes),
            *(value for name in metrics for value in _cell(row["metrics"].get(name))),
            *(row[name] for name in counts),
            *(row["measurements"].get(name) for name in costs),
        ]
        for row in rows
    ]
    return {"key": TABLE_KEY, "columns": [*columns, *counts, *costs], "data": data}


def _axis_text(value: object) -> str | None:
    """As text, since a column of a W&B table has one type and an axis may have several."""
    return value if isinstance(value, str) or value is None else json.dumps(value)


def _cell(cell: Mapping[str, Any] | None) -> tuple[float | None, float | None, float | None, int]:
    """Mean, interval and number of points; an interval of fewer than three seeds there is not."""
    if cell is None:
        return None, None, None, 0
    interval = cell["interval"] or {"low": None, "high": None}
    return cell["mean"], interval["low"], interval["high"], len(cell["points"])


def study_summary(table: Mapping[str, Any]) -> dict[str, Any]:
    """The counts of a study. Verdicts on its claims belong here as well, under `verdicts`, once a study gives them."""
    rows = table["rows"]
    stopped = sum(row["statuses"].get(Status.STOPPED.value, 0) for row in rows)
    return {
        "setting_count": len(rows),  # the table itself stands under TABLE_KEY
        "run_count": sum(row["runs"] for row in rows),
        "completed_count": sum(row["completed"] for row in rows),
        "not_alone": table["not_alone"],
        **({"stopped_count": stopped} if stopped else {}),
        "problems": list(table["problems"]),
    }


def secrets_in(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Values of environment variables whose names say that they are secret, longest first."""
    found = {value for name, value in environ.items() if _SECRET_NAME.search(name) and len(value) >= _SHORTEST_SECRET}
    return tuple(sorted(found, key=lambda value: (-len(value), value)))


def redacted(value: Any, secrets: Sequence[str]) -> Any:
    """`value` with every secret, and the user part of every URL, cut out of its texts, at any depth."""
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, "(secret)")
        return without_user_info(value)
    if isinstance(value, Mapping):
        return {redacted(key, secrets): redacted(item, secrets) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redacted(item, secrets) for item in value]
    return value
