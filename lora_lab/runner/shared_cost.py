"""Time and memory of a cohort, which belong to all of its members together and to none of them."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

import torch

from lora_lab.memory.meter import MemoryMeter
from lora_lab.record.gathered import Gathered

# The speed that is shown is that of the last passes: one by itself jumps with the length of its rows.
_PACE_TICKS = 10


@dataclass(slots=True)
class _Share:
    """What the cohort did while one member was seated."""

    joined: float = field(default_factory=time.perf_counter)
    seconds: float = 0.0
    tokens: int = 0
    fellows: dict[str, None] = field(default_factory=dict)


class SharedCost:
    """cohort_id, seats: of the cohort. Told of each tick; asked by each member at its end."""

    def __init__(self, cohort_id: str, seats: int, device: torch.device) -> None:
        self.cohort_id, self.seats = cohort_id, seats
        self.why_missing = (
            f"shared with others in cohort {cohort_id}; `launch.cohort=off repeat=1` measures this trial alone"
        )
        self.meter = MemoryMeter(device)
        self._shares: dict[str, _Share] = {}
        self._pace: deque[tuple[float, int]] = deque(maxlen=_PACE_TICKS)

    def join(self, run_id: str) -> None:
        """A member takes its seat."""
        self._shares[run_id] = _Share()

    def note_tick(self, run_ids: list[str], *, seconds: float, tokens: int) -> None:
        """A pass over these members' micro-batches, and the updates after it."""
        self._pace.append((seconds, tokens))
        for run_id in run_ids:
            share = self._shares[run_id]
            share.seconds += seconds
            share.tokens += tokens
            share.fellows |= dict.fromkeys(run_ids)

    @property
    def tokens_per_second(self) -> float | None:
        """Of all members together, over the last passes; None before the first."""
        seconds = sum(one for one, _ in self._pace)
        return sum(tokens for _, tokens in self._pace) / seconds if seconds else None

    def gather(self, run_id: str, gathered: Gathered) -> None:
        """Writes what is shared under the cohort's keys, and why it is missing under the member's."""
        share = self._shares.get(run_id)
        members = [run_id] if share is None else list(share.fellows) or [run_id]
        gathered.facts["cohort"] = {"id": self.cohort_id, "seats": self.seats, "members": members}
        gathered.missing |= dict.fromkeys(
            ("wall_seconds", "train_seconds", "step_seconds", "tokens_per_second"), self.why_missing
        )
        if share is not None and share.seconds:
            gathered.measurements |= {
                "cohort_train_seconds": share.seconds,
                "cohort_tokens_per_second": share.tokens / share.seconds,
                "cohort_wall_seconds": time.perf_counter() - share.joined,
            }
        peaks = {name.replace("train_", "cohort_"): value for name, value in self.meter.measurements.items()}
        gathered.measurements |= peaks
        gathered.missing |= {name.replace("train_", "cohort_"): why for name, why in self.meter.missing.items()}
