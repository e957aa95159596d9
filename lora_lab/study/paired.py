"""Paired differences: both runs' scores of the same examples, subtracted one by one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora_lab.errors import DataError
from lora_lab.record.flat import dotted
from lora_lab.record.run_record import RunRecord
from lora_lab.study.interval import Interval, mcnemar_p, ratio_interval, t_interval
from lora_lab.study.samples import HeldoutRow, Sample, matched, read_heldout, read_samples, samples_files

# Settings of the data that do not change which rows are held out, nor how they are written.
_TRAINING_ONLY = ("train_size", "train_seed", "name", "path")


@dataclass(frozen=True, slots=True)
class Paired:
    """The difference b - a over the examples that both runs scored.

    `interval` is Student's t over examples; where every score is 0 or 1, `p` is the exact two-sided McNemar test on the
    examples that only a, and only b, got right. `left_out` counts examples that only one run has.
    """

    name: str
    a: float
    b: float
    interval: Interval
    only_a: int | None
    only_b: int | None
    p: float | None
    left_out: int

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return {
            "name": self.name,
            "n": self.interval.n,
            "left_out": self.left_out,
            "a": self.a,
            "b": self.b,
            "difference": self.interval.mean,
            "standard_error": self.interval.standard_error,
            "interval": self.interval.to_json(),
            "mcnemar": None if self.p is None else {"only_a": self.only_a, "only_b": self.only_b, "p": self.p},
        }


def paired_scores(a: RunRecord, b: RunRecord) -> tuple[list[Paired], dict[str, str]]:
    """All paired differences, and for each score that could not be paired the reason."""
    paired, missing = _paired_heldout(a, b)
    first, second = samples_files(a.eval_folder), samples_files(b.eval_folder)
    for task in sorted(first.keys() | second.keys()):
        if task not in first or task not in second:
            missing[f"{task} (paired)"] = f"no samples file of this task in {'b' if task in first else 'a'}"
            continue
        try:
            found, why = pair_samples(task, read_samples(first[task]), read_samples(second[task]))
        except DataError as error:
            missing[f"{task} (paired)"] = str(error)
            continue
        paired += found
        missing |= why
    return paired, missing


def pair_samples(task: str, a: Sequence[Sample], b: Sequence[Sample]) -> tuple[list[Paired], dict[str, str]]:
    """The paired differences of every metric of a task, over the examples both have."""
    pairs = matched(a, b)
    if not pairs:
        return [], {f"{task} (paired)": "the runs have no example in common"}
    paired: list[Paired] = []
    missing: dict[str, str] = {}
    columns = {(x.filter, metric): None for x, _ in pairs for metric in (*x.scores, *x.unpairable)}
    for kind, metric in columns:
        name = f"{task}/{metric}" + ("" if kind == "none" else f",{kind}")
        of_kind = [(x, y) for x, y in pairs if x.filter == kind]
        why = _why_unpairable(metric, of_kind)
        if why is not None:
            missing[f"{name} (paired)"] = why
            continue
        scores = [(x.scores[metric], y.scores[metric]) for x, y in of_kind]
        sizes = [sum(sample.filter == kind for sample in side) for side in (a, b)]
        paired.append(_paired(name, scores, left_out=sum(sizes) - 2 * len(of_kind)))
    return paired, missing


def _why_unpairable(metric: str, pairs: Sequence[tuple[Sample, Sample]]) -> str | None:
    if len(pairs) < 2:
        return f"only {len(pairs)} example in common"
    for pair in pairs:
        for sample in pair:
            if metric in sample.unpairable:
                return sample.unpairable[metric]
            if metric not in sample.scores:
                return "only one of the runs has it"
    return None


def _paired(name: str, scores: Sequence[tuple[float, float]], *, left_out: int) -> Paired:
    count = len(scores)
    means = [math.fsum(pair[side] for pair in scores) / count for side in (0, 1)]
    interval = t_interval([y - x for x, y in scores])
    if any(value not in (0.0, 1.0) for pair in scores for value in pair):
        return Paired(name, means[0], means[1], interval, None, None, None, left_out)
    only_a, only_b = (sum(x > y for x, y in scores), sum(y > x for x, y in scores))
    return Paired(name, means[0], means[1], interval, only_a, only_b, mcnemar_p(only_a, only_b), left_out)


def _paired_heldout(a: RunRecord, b: RunRecord) -> tuple[list[Paired], dict[str, str]]:
    try:
        first, second = read_heldout(a.eval_folder), read_heldout(b.eval_folder)
    except DataError as error:
        return [], {"heldout (paired)": str(error)}
    if first is None and second is None:
        return [], {}
    if first is None or second is None:
        return [], {"heldout (paired)": f"no held-out rows in {'a' if first is None else 'b'}"}
    why = other_rows(a, b)
    if why is not None:
        return [], {"heldout (paired)": why}
    return pair_heldout(first, second)


def other_rows(a: RunRecord, b: RunRecord) -> str | None:
    """Why the rows of one index are not the same row in both runs, as far as the configuration tells."""
    if a.header is None or b.header is None:
        return "a trial file cannot be read"
    sides = [
        {key: value for key, value in dotted(record.trial["data"]).items() if key not in _TRAINING_ONLY}
        for record in (a, b)
    ]
    for key in dict.fromkeys([*sides[0], *sides[1]]):
        if sides[0].get(key) != sides[1].get(key):
            return f"the held-out rows differ: data.{key} is {sides[0].get(key)} in a, {sides[1].get(key)} in b"
    role = "heldout" if "heldout" in a.header.identities else "data"
    if a.header.identities.get(role) != b.header.identities.get(role):
        return f"the held-out rows differ: the {role} identity is not the same"
    return None


def pair_heldout(a: Sequence[HeldoutRow], b: Sequence[HeldoutRow]) -> tuple[list[Paired], dict[str, str]]:
    """Token-weighted loss (by the ratio estimator, as the metric itself) and exact match, over the common rows."""
    other = {row.index: row for row in b}
    pairs = [(row, other[row.index]) for row in a if row.index in other]
    if len(pairs) < 2:
        return [], {"heldout (paired)": f"only {len(pairs)} held-out row in common"}
    if any(x.loss_tokens != y.loss_tokens for x, y in pairs):
        return [], {"heldout (paired)": "rows have different loss tokens in a and b (another tokenizer or template)"}
    left_out = len(a) + len(b) - 2 * len(pairs)
    tokens = [x.loss_tokens for x, _ in pairs]
    interval = ratio_interval([y.loss_nats - x.loss_nats for x, y in pairs], tokens)
    means = [math.fsum(pair[side].loss_nats for pair in pairs) / sum(tokens) for side in (0, 1)]
    paired = [Paired("heldout/loss", means[0], means[1], interval, None, None, None, left_out)]
    matches = [(x.exact_match, y.exact_match) for x, y in pairs]
    whole = [(x, y) for x, y in matches if x is not None and y is not None]
    if len(whole) < 2:
        return paired, {"heldout/exact_match (paired)": f"only {len(whole)} whole row in common"}
    unscored = 2 * (len(pairs) - len(whole))
    return [*paired, _paired("heldout/exact_match", whole, left_out=left_out + unscored)], {}
