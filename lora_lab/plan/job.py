"""A job: a trial with everything that is known about it before any weight is touched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lora_lab.plan.readable import readable_name
from lora_lab.schema.fingerprint import fingerprint, setting_fingerprint
from lora_lab.schema.trial import Trial


@dataclass(frozen=True, slots=True)
class Job:
    """What the runner is handed.

    train_rows: None where the data set has not been counted on this machine. repeat: measures an equal trial once more;
    it is outside the fingerprint. overrides: how the trial was asked for.
    """

    name: str
    trial: Trial
    identities: Mapping[str, str]
    fingerprint: str
    setting: str
    train_rows: int | None
    repeat: int
    tag: str | None
    overrides: tuple[str, ...]


def job_of(
    trial: Trial,
    identities: Mapping[str, str],
    *,
    train_rows: int | None,
    repeat: int,
    tag: str | None,
    overrides: tuple[str, ...],
) -> Job:
    """The job of a trial whose identities are known."""
    return Job(
        name=readable_name(trial, parent=identities.get("init_from")),
        trial=trial,
        identities=identities,
        fingerprint=fingerprint(trial, identities),
        setting=setting_fingerprint(trial, identities),
        train_rows=train_rows,
        repeat=repeat,
        tag=tag,
        overrides=overrides,
    )
