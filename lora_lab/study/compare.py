"""Two runs side by side: what was set differently, how the scores differ, and how sure that is.

Differences are b - a. Where both runs scored the same examples the difference is paired: each example is its own
control, so the spread between easy and hard examples drops out. The interval covers examples, not seeds. What a run had
reached when a search stopped it early is no score.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lora_lab.record.flat import dotted
from lora_lab.record.result import Metric, Status
from lora_lab.record.run_record import RunRecord
from lora_lab.study.paired import Paired, paired_scores
from lora_lab.study.settings import ABSENT


@dataclass(frozen=True, slots=True)
class MetricDifference:
    """One metric of both runs."""

    name: str
    unit: str
    higher_is_better: bool
    a: float
    b: float

    @property
    def difference(self) -> float:
        """b - a."""
        return self.b - self.a

    @property
    def better(self) -> str | None:
        """`a` or `b` by the metric's direction, None when equal; it says nothing about chance."""
        if self.a == self.b:
            return None
        return "b" if (self.b > self.a) == self.higher_is_better else "a"

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return {**asdict(self), "difference": self.difference, "better": self.better}


@dataclass(frozen=True, slots=True)
class Comparison:
    """`configuration`: dotted keys with the value in a and in b. `missing` says why a metric or a pairing is absent."""

    a: RunRecord
    b: RunRecord
    configuration: dict[str, tuple[Any, Any]]
    metrics: tuple[MetricDifference, ...]
    paired: tuple[Paired, ...]
    missing: dict[str, str]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The comparison as JSON values."""
        return {
            "a": _identity(self.a),
            "b": _identity(self.b),
            "configuration": {key: {"a": a, "b": b} for key, (a, b) in self.configuration.items()},
            "metrics": [metric.to_json() for metric in self.metrics],
            "paired": [paired.to_json() for paired in self.paired],
            "missing": self.missing,
            "notes": list(self.notes),
        }


def compare_runs(a: RunRecord, b: RunRecord) -> Comparison:
    """Compares two runs of the ledger; what cannot be compared is named with its reason, nothing is raised."""
    first, second = _metrics(a), _metrics(b)
    missing = {name: f"only in {'a' if name in first else 'b'}" for name in first.keys() ^ second.keys()}
    differences: list[MetricDifference] = []
    for name in first.keys() & second.keys():
        x, y = first[name], second[name]
        if (x.unit, x.higher_is_better) != (y.unit, y.higher_is_better):
            missing[name] = f"means different things: {x.unit} in a, {y.unit} in b"
        else:
            differences.append(MetricDifference(name, x.unit, x.higher_is_better, x.value, y.value))
    paired, unpaired = ([], {}) if _was_stopped(a) or _was_stopped(b) else paired_scores(a, b)
    return Comparison(
        a=a,
        b=b,
        configuration=configuration_difference(a.trial, b.trial),
        metrics=tuple(sorted(differences, key=lambda metric: metric.name)),
        paired=tuple(paired),
        missing=dict(sorted((missing | unpaired).items())),
        notes=tuple(_notes(a, b)),
    )


def configuration_difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, with both values; `(absent)` where one has no such key."""
    first, second = dotted(a), dotted(b)
    keys = dict.fromkeys([*first, *second])
    pairs = {key: (first.get(key, ABSENT), second.get(key, ABSENT)) for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _metrics(record: RunRecord) -> dict[str, Metric]:
    return {} if record.result is None or _was_stopped(record) else record.result.metrics


def _was_stopped(record: RunRecord) -> bool:
    return record.state == Status.STOPPED


def _identity(record: RunRecord) -> dict[str, Any]:
    fingerprint = None if record.header is None else record.header.fingerprint
    return {"run_id": record.run_id, "name": record.name, "fingerprint": fingerprint, "status": str(record.state)}


def _notes(a: RunRecord, b: RunRecord) -> list[str]:
    """What a reader must know before believing the numbers."""
    notes = [f"{side} is {record.state}" for side, record in (("a", a), ("b", b)) if record.state != "COMPLETED"]
    versions = {record.numerics_version for record in (a, b) if record.numerics_version is not None}
    if len(versions) > 1:
        notes.append(f"made by numerics versions {' and '.join(map(str, sorted(versions)))}; scores are not comparable")
    if a.run_id == b.run_id:
        notes.append("a and b are the same run")
    return notes
