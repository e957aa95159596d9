"""Runs of equal trials: what was asked for, and where the same trial was measured once more."""

from __future__ import annotations

from collections.abc import Sequence

from lora_lab.record.ledger import Ledger
from lora_lab.record.run_record import RunRecord
from lora_lab.schema.fingerprint import NUMERICS_VERSION


def trial_part(run_id: str) -> str:
    """What the names of all repeats of a trial begin with."""
    return run_id.partition(".")[0]


def with_repeats(ledger: Ledger, run_ids: Sequence[str]) -> list[RunRecord]:
    """The runs of these names that have begun, in their order, each trial's together with its other repeats.

    A trial that was measured once more (`repeat=1`) has the same scores, and a time that counts if it was alone. So
    repeats that have ended belong to the answer whichever of them was asked for, if the same arithmetic made them.
    """
    begun: dict[str, list[RunRecord]] = {}
    for record in ledger.runs():
        begun.setdefault(trial_part(record.run_id), []).append(record)
    asked = set(run_ids)
    ours = [record for records in begun.values() for record in records if record.run_id in asked]
    versions = {record.numerics_version for record in ours} or {NUMERICS_VERSION}
    return [
        record
        for trial in dict.fromkeys(map(trial_part, run_ids))
        for record in sorted(begun.get(trial, []), key=_repeat)
        if record.run_id in asked or (_has_ended(record) and record.numerics_version in versions)
    ]


def _has_ended(record: RunRecord) -> bool:
    return record.result is not None and record.state == record.result.status and record.result.status.is_final


def _repeat(record: RunRecord) -> int:
    return 0 if record.header is None else record.header.repeat
