"""What a run has measured so far: filled phase by phase, kept when the run fails."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from lora_lab.record.environment import load_average
from lora_lab.record.result import Metric


@dataclass(slots=True)
class Gathered:
    """The parts of a `Result` that grow while a run goes on. `warnings`: what a user should know about the numbers."""

    metrics: dict[str, Metric] = field(default_factory=dict)
    measurements: dict[str, float | int] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds the block's wall-clock seconds under `<name>_seconds`, also when it raises."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.measurements[f"{name}_seconds"] = time.perf_counter() - start

    def note_load(self, when: str) -> None:
        """The machine's 1-minute load average beside the times, so that a busy machine shows."""
        load = load_average()
        if load is None:
            self.missing[f"load_average_{when}"] = "this system keeps none"
        else:
            self.measurements[f"load_average_{when}"] = load
