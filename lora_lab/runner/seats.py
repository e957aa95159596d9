"""How many runs share a pass: as many as fill the machine's matrix units, and as memory allows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch

from lora_lab.data.encode import EncodedSet
from lora_lab.plan.job import Job
from lora_lab.runner.workbench import Workbench

# Tokens of a pass beyond which another row no longer makes the products faster (tests/benchmarks/train_speed.py).
_ENOUGH_TOKENS = {"cpu": 1024, "cuda": 16384}
# More seats than this are of no use for any size of rows seen so far, and each costs optimizer calls of its own.
_MOST_SEATS = 16


@dataclass(frozen=True, slots=True)
class Seating:
    """together: jobs that take `seats` seats, in their order; apart: those that cannot share a pass, or need not."""

    together: tuple[Job, ...]
    apart: tuple[Job, ...]
    seats: int


def seating_of(jobs: Sequence[Job], bench: Workbench, *, asked: int | None) -> Seating:
    """Who of a planned cohort sits together. asked: the number of seats; None leaves it to the size of the rows."""
    alone = Seating((), tuple(jobs), 1)
    if len(jobs) < 2 or asked == 1:
        return alone
    try:
        base = bench.base_of(jobs[0])
        sets = {id(job): bench.tokens_of(job, base).train for job in jobs}
        together = tuple(job for job in jobs if not bench.why_not_together(job, max(sets[id(job)].lengths)))
    except Exception:  # noqa: BLE001 - the runs themselves meet it again, and record it
        return alone
    if len(together) < 2:
        return alone
    if asked is None:
        smallest = min(_tokens_per_pass(job, sets[id(job)]) for job in together)
        enough = _ENOUGH_TOKENS.get(bench.device.type, _ENOUGH_TOKENS["cuda"])
        asked = min(math.ceil(enough / smallest), _MOST_SEATS)
    if asked == 1:
        return alone
    apart = tuple(job for job in jobs if job not in together)
    return Seating(together, apart, min(asked, len(together)))


def _tokens_per_pass(job: Job, examples: EncodedSet) -> float:
    rows = min(job.trial.training.micro_batch_size, len(examples.examples))
    return rows * examples.total_tokens / len(examples.examples)


class MemoryBudget:
    """Bytes that the members of a cohort may take beside the base: a fraction of what is free when it begins."""

    def __init__(self, device: torch.device, fraction: float) -> None:
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
        self.limit_bytes = int(free * fraction)
        self._needs: dict[str, int] = {}

    def note(self, run_id: str, needed_bytes: int) -> None:
        """What a member needs in a pass: activations, adapter, gradients, optimizer state."""
        self._needs[run_id] = needed_bytes

    def free(self, run_id: str) -> None:
        """The member has left."""
        self._needs.pop(run_id, None)

    def has_room(self, run_id: str) -> bool:
        """Whether all who are noted, this one among them, fit together."""
        return run_id in self._needs and sum(self._needs.values()) <= self.limit_bytes
