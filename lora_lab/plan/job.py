"""A job: a trial with everything that is known about it before any weight is touched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lora_lab.schema.trial import Trial


@dataclass(frozen=True, slots=True)
class Job:
    """What the runner is handed. `repeat` measures an equal trial once more; it is outside the fingerprint."""

    name: str
    trial: Trial
    identities: Mapping[str, str]
    fingerprint: str
    setting: str
    repeat: int
    overrides: tuple[str, ...]
    tag: str | None
