"""Runs for tests of the ledger and of what reads it: claimed and ended without any model."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_lab.record.ledger import Ledger, run_id_of
from lora_lab.record.result import Metric, Result, Status
from lora_lab.record.run_folder import RunFolder
from lora_lab.record.run_record import RunRecord
from lora_lab.schema.fingerprint import NUMERICS_VERSION


def trial_of(**changes: Any) -> dict[str, Any]:
    """A trial as the ledger keeps it; `changes` are top-level keys."""
    trial: dict[str, Any] = {
        "model": {"kind": "random", "name": "tiny_random", "shape": {"num_layers": 2}},
        "method": {"kind": "lora"},
        "quantization": {"kind": "none", "double_quantization": False},
        "target": {"query": True, "value": True, "mlp": False, "modules": []},
        "rank": 8,
        "alpha": 16.0,
        "learning_rate": 0.002,
        "seed": 0,
        "seeds": {"data": 0, "init": 0, "dropout": 0, "layers": 0},
    }
    trial |= changes
    if "seed" in changes and "seeds" not in changes:
        trial["seeds"] = dict.fromkeys(trial["seeds"], changes["seed"])
    return trial


def digest(content: object) -> str:
    """A stand-in for the fingerprint: the ledger only needs 64 hexadecimal digits."""
    return hashlib.sha256(repr(content).encode()).hexdigest()


def setting_of(trial: dict[str, Any]) -> str:
    """A stand-in for the setting fingerprint."""
    return digest({key: value for key, value in trial.items() if key not in ("seed", "seeds")})


def claim(ledger: Ledger, trial: dict[str, Any], *, repeat: int = 0, name: str | None = None) -> RunFolder | None:
    """Claim a trial's run."""
    return ledger.claim(
        digest(trial),
        repeat,
        name=name or f"{trial['method']['kind']}-r{trial['rank']}-s{trial['seed']}",
        setting=setting_of(trial),
        trial=trial,
        identities={"model": "0" * 64},
        overrides=[f"rank={trial['rank']}"],
        environment={"machine_id": "m1"},
    )


def loss(value: float, **changes: Any) -> Metric:
    """A held-out loss."""
    fields: dict[str, Any] = {
        "value": value,
        "unit": "nats/token",
        "higher_is_better": False,
        "standard_error": 0.01,
        "num_examples": 64,
    }
    return Metric(**{**fields, **changes})


def result_of(folder: RunFolder, **changes: Any) -> Result:
    """A result that fits a claimed run."""
    fields: dict[str, Any] = {
        "schema_version": 1,
        "numerics_version": NUMERICS_VERSION,
        "run_id": folder.run_id,
        "fingerprint": folder.header.fingerprint,
        "setting": folder.header.setting,
        "repeat": folder.header.repeat,
        "attempt": folder.attempt,
        "status": Status.COMPLETED,
        "reason": None,
        "started_at": "2026-01-01T00:00:00.000+00:00",
        "finished_at": "2026-01-01T00:01:00.000+00:00",
        "trainable_parameters": 1000,
        "total_parameters": 20000,
        "predicted_peak_allocated_bytes": None,
        "metrics": {},
        "measurements": {},
        "facts": {},
        "missing": {},
    }
    return Result(**{**fields, **changes})


def ended(root: Path, trial: dict[str, Any], *, repeat: int = 0, name: str | None = None, **changes: Any) -> RunRecord:
    """A run that was claimed and ended with a result; returns what a reader sees."""
    ledger = Ledger(root)
    folder = claim(ledger, trial, repeat=repeat, name=name)
    assert folder is not None, f"{run_id_of(digest(trial), repeat)} could not be claimed"
    with folder:
        folder.write_result(result_of(folder, **changes))
    record = ledger.find(digest(trial), repeat)
    assert record is not None
    return record


def as_member(cohort: str, members: Sequence[str], *, seats: int, wall: float, on_cpu: bool = True) -> dict[str, Any]:
    """Fields of the result of a run that was trained in a cohort: its own counts, and what the cohort shared up to
    `wall` seconds. on_cpu: its peak was counted on a probe step of its own."""
    own = {"steps": 12, "tokens": 4800, "loss_tokens": 1200, "optimizer_state_bytes": 800, "evaluate_seconds": 2.0}
    shared = {
        "cohort_train_seconds": wall - 1.0,
        "cohort_wall_seconds": wall,
        "cohort_tokens_per_second": 345.0 + wall,
        "cohort_peak_allocated_bytes": int(1e9 * wall),
    }
    probe = {"peak_allocated_bytes": 700_000_000} if on_cpu else {}
    reason = f"trained in cohort {cohort} with {len(members) - 1} others; launch.cohort=off repeat=1 measures it alone"
    absent = ["train_seconds", "step_seconds", "tokens_per_second", "wall_seconds"]
    absent += [] if on_cpu else ["peak_allocated_bytes"]
    told = {"id": cohort, "seats": seats, "members": list(members)}
    return {
        "measurements": {**own, **shared, **probe},
        "facts": {"executed": "cohort", "cohort": told, "warnings": [], **({"probe": "alone"} if on_cpu else {})},
        "missing": dict.fromkeys(absent, reason),
    }
