"""Scores of arms, example by example: one array (seeds, examples) per arm, all over the same examples in one order.

Held-out rows are matched by their index, samples of lm-eval by doc_hash (equal ones by their order). Of `heldout/loss`
the scores are nats of a row and the weights its loss tokens, of bits per byte the bits and bytes of a document, so that
sum over sum is the metric. A metric that has no number per example gives one value per run, shape (seeds, 1). What a
run's file says of the whole must follow from its examples, else nothing is judged by it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lora_lab.errors import DataError
from lora_lab.record.result import Metric
from lora_lab.study.arms import ArmRun, ArmRuns
from lora_lab.study.crossed import contrast
from lora_lab.study.estimate import Estimate
from lora_lab.study.paired import other_rows
from lora_lab.study.samples import Sample, read_heldout, read_samples, samples_files

Floats = npt.NDArray[np.float64]

_LOSS, _MATCH = "heldout/loss", "heldout/exact_match"
_HELDOUT = (_LOSS, _MATCH)
_BITS = "bits_per_byte"
# Sums over many examples in another order than the run took them.
_TOLERANCE = 1e-6
# Standard errors that an arm must be away from chance, and from the best score there is.
_AWAY = 3.0


@dataclass(frozen=True, slots=True)
class RunScores:
    """One run's scores by example. weights: loss tokens; None where a metric is a plain mean. The only key of a metric
    without numbers per example is None."""

    scores: Mapping[Hashable, float]
    weights: Mapping[Hashable, float] | None
    metric: Metric


@dataclass(frozen=True, slots=True)
class ArmScores:
    """What a claim about a metric is estimated from. arms: by name, shape (seeds, examples); one row where nothing was
    trained. weights: shape (examples,), or None. examples: 0 for a metric with one value per run."""

    metric: Metric
    arms: Mapping[str, Floats]
    weights: Floats | None
    examples: int
    untrained: frozenset[str]

    def difference(self, names: Sequence[str], coefficients: Sequence[float]) -> Estimate:
        """The sum of coefficient times arm.

        Raises:
            ValueError: see `crossed.contrast`.
        """
        chosen = [self.arms[name] for name in names]
        return contrast(chosen, coefficients, self.weights, deterministic=all(name in self.untrained for name in names))

    def mean(self, name: str) -> float:
        """The arm's score over all seeds and examples."""
        scores = self.arms[name]
        total = scores.shape[0] * (scores.shape[1] if self.weights is None else float(self.weights.sum()))
        return float(scores.sum() / total)

    def error(self, name: str) -> float | None:
        """The standard error of that mean, over seeds and examples; None where it cannot be told."""
        try:
            return self.difference([name], [1.0]).standard_error
        except ValueError:
            return None


def run_scores(run: ArmRun, metric: str) -> RunScores | str:
    """A completed run's scores, or why it has none."""
    known = run.result.metrics.get(metric)
    if known is None:
        return f"{run} has no {metric}: {run.result.missing.get(metric, 'not scored')}"
    try:
        found = _heldout_scores(run, metric, known) if metric in _HELDOUT else _sample_scores(run, metric, known)
    except DataError as error:
        return f"{run}: {error}"
    if isinstance(found, str):
        return found
    weights = None if found.weights is None else list(found.weights.values())
    whole = math.fsum(found.scores.values()) / (len(found.scores) if weights is None else math.fsum(weights))
    if not math.isclose(whole, known.value, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE):
        return f"{run}: its examples give {metric} {whole:.6g}, its result says {known.value:.6g}"
    return found


def _heldout_scores(run: ArmRun, metric: str, known: Metric) -> RunScores | str:
    assert run.record is not None
    rows = read_heldout(run.record.eval_folder)
    if not rows:
        return f"{run} has no held-out rows"
    if metric == _LOSS:
        weights: dict[Hashable, float] = {row.index: float(row.loss_tokens) for row in rows}
        return RunScores({row.index: row.loss_nats for row in rows}, weights, known)
    return RunScores({row.index: row.exact_match for row in rows if row.exact_match is not None}, None, known)


def _sample_scores(run: ArmRun, metric: str, known: Metric) -> RunScores | str:
    assert run.record is not None
    task, _, rest = metric.partition("/")
    measure, _, kind = rest.partition(",")
    path = samples_files(run.record.eval_folder).get(task)
    if path is None:
        if known.num_examples is None:  # such as train/loss
            return RunScores({None: known.value}, None, known)
        return f"{run} has no samples file of {task}"
    samples = [sample for sample in read_samples(path) if sample.filter == (kind or "none")]
    keyed = _by_example(samples)
    if measure == _BITS and all(measure in sample.sums for sample in samples):
        sums = {key: sample.sums[measure] for key, sample in keyed.items()}
        bits = {key: -nats / math.log(2) for key, (nats, _) in sums.items()}
        return RunScores(bits, {key: size for key, (_, size) in sums.items()}, known)
    scores = {key: sample.scores[measure] for key, sample in keyed.items() if measure in sample.scores}
    if not scores:
        return RunScores({None: known.value}, None, known)
    if len(scores) < len(samples):
        return f"{run}: {len(samples) - len(scores)} of {len(samples)} samples of {task} have no {measure}"
    return RunScores(scores, None, known)


def _by_example(samples: Sequence[Sample]) -> dict[Hashable, Sample]:
    by_hash = all(sample.doc_hash is not None for sample in samples)
    seen: Counter[Hashable] = Counter()
    keyed: dict[Hashable, Sample] = {}
    for sample in samples:
        identity = sample.doc_hash if by_hash else sample.doc_id
        keyed[identity, seen[identity]] = sample
        seen[identity] += 1
    return keyed


def arm_scores(arms: Sequence[ArmRuns], metric: str) -> ArmScores | list[str]:
    """The scores of arms whose runs have all completed, or every reason why they cannot be compared."""
    reasons: list[str] = []
    found: list[tuple[ArmRun, RunScores]] = []
    for run in {run.run_id: run for arm in arms for run in arm.runs}.values():
        scores = run_scores(run, metric)
        if isinstance(scores, str):
            reasons.append(scores)
        else:
            found.append((run, scores))
    if reasons or not found:
        return reasons or ["no runs"]
    (first, reference), *others = found
    reasons = [why for run, one in others if (why := _differs(first, reference, run, one, metric)) is not None]
    if reasons:
        return reasons
    keys = list(reference.scores)
    by_run = {run.run_id: [one.scores[key] for key in keys] for run, one in found}
    weights = None if reference.weights is None else np.array([reference.weights[key] for key in keys])
    arrays = {arm.name: np.array([by_run[run.run_id] for run in arm.runs]) for arm in arms}
    examples = 0 if keys == [None] else len(keys)
    untrained = frozenset(arm.name for arm in arms if arm.is_base)
    if len(untrained) == len(arms) and examples < 2:
        return [f"{metric} is one number per run and nothing was trained, so its uncertainty is not known"]
    return ArmScores(reference.metric, arrays, weights, examples, untrained)


def _differs(first: ArmRun, reference: RunScores, run: ArmRun, scores: RunScores, metric: str) -> str | None:
    """Why two runs were not scored on the same examples by the same measure."""
    a, b = reference.metric, scores.metric
    if (a.unit, a.higher_is_better) != (b.unit, b.higher_is_better):
        return f"{metric} means different things: {a.unit} in {first}, {b.unit} in {run}"
    both = len(reference.scores.keys() & scores.scores.keys())
    if both < len(reference.scores) or both < len(scores.scores):
        counts = f"{len(reference.scores)} and {len(scores.scores)}, {both} in common"
        return f"{first} and {run} were scored on different examples of {metric} ({counts})"
    if metric in _HELDOUT and first.record is not None and run.record is not None:
        why = other_rows(first.record, run.record)
        if why is not None:
            return f"a is {first}, b is {run}: {why}"
    if reference.weights is not None and scores.weights is not None and reference.weights != scores.weights:
        sizes = "loss tokens" if metric == _LOSS else "sizes"
        return f"{first} and {run} have different {sizes} in equal examples (another tokenizer or template)"
    return None


def floor_or_ceiling(scores: ArmScores, metric: str) -> str | None:
    """Why an accuracy shows nothing: no arm is 3 standard errors above chance and as far below 1. None where one is,
    and for other metrics. Where chance is not known it is 0."""
    if scores.metric.unit != "fraction":
        return None
    chance = scores.metric.chance or 0.0
    places = {name: (scores.mean(name), scores.error(name)) for name in scores.arms}
    known = {name: (mean, error) for name, (mean, error) in places.items() if error is not None}
    above = {name for name, (mean, error) in known.items() if mean >= chance + _AWAY * error}
    below = {name for name, (mean, error) in known.items() if mean <= 1 - _AWAY * error}
    if above & below:
        return None
    told = ", ".join(f"{name} {mean:.3g}" for name, (mean, _) in places.items())
    if not above:
        return f"floor: no arm's {metric} is 3 standard errors above chance, {chance:.3g} ({told})"
    return f"ceiling: no arm's {metric} is 3 standard errors below 1 and above chance, {chance:.3g} ({told})"
