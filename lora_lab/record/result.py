"""What a run leaves behind: outcome, metrics with units, predicted and measured cost, provenance."""

from __future__ import annotations

import enum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

RESULT_SCHEMA_VERSION = 1


class Status(enum.StrEnum):
    """How a run ended. All but FAILED and INTERRUPTED are answers; those two and OUT_OF_MEMORY are tried again.

    STOPPED: the rule of a search has ended it before its last step (`launch.stopping`). That is an answer under this
    rule only (`RunRecord.is_done_under`); under another one, or none, the run goes on from its checkpoint.
    """

    COMPLETED = "COMPLETED"
    DIVERGED = "DIVERGED"
    STOPPED = "STOPPED"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    INTERRUPTED = "INTERRUPTED"
    FAILED = "FAILED"

    @property
    def is_final(self) -> bool:
        """Whether the same trial need not be run again, whatever the rule of the search."""
        return self in (Status.COMPLETED, Status.DIVERGED)

    @property
    def is_retried(self) -> bool:
        """Whether the same command tries the trial again: it has no answer, and might have one next time."""
        return self in (Status.OUT_OF_MEMORY, Status.INTERRUPTED, Status.FAILED)


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Metric(_Record):
    """A finite score. `standard_error` covers the examples, never the seeds; None where it was not computed."""

    value: float
    unit: str
    higher_is_better: bool
    standard_error: float | None
    num_examples: int | None
    chance: float | None = None  # score of guessing, where that is defined


class Result(_Record):
    """The content of `result.json`. `missing` says why a measurement is absent; a missing number is never invented."""

    schema_version: Literal[1]
    numerics_version: int
    run_id: str
    fingerprint: str
    setting: str
    repeat: int
    attempt: int
    status: Status
    reason: str | None
    started_at: str
    finished_at: str
    trainable_parameters: int | None
    total_parameters: int | None
    predicted_peak_allocated_bytes: int | None
    metrics: dict[str, Metric]
    measurements: dict[str, float | int]  # seconds, bytes, tokens, counts; the unit ends each name
    facts: dict[str, Any]  # what ran: optimizer class, quantization, device, cohort
    missing: dict[str, str]
