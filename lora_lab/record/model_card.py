"""The model card: README.md beside saved weights, written from the record of the run instead of PEFT's empty form.

It holds what was asked and measured, with intervals and units, what is missing and why, and how to load the weights.
Nothing in it is guessed, and no folder of the machine it was made on is named.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

from lora_lab.errors import InputError
from lora_lab.record.atomic import read_json, write_text
from lora_lab.record.card_identity import identity_rows, model_name, setting_text
from lora_lab.record.card_metadata import data_name, front_matter, is_score
from lora_lab.record.card_snippet import Saved, loading
from lora_lab.record.cohort_facts import SHARED, cohort_of
from lora_lab.record.ledger import ID_DIGITS, Ledger
from lora_lab.record.markdown import code, prose, table
from lora_lab.record.parents import PARENT_ROLES, WEIGHTS, weights_chain
from lora_lab.record.result import Metric, Result, Status
from lora_lab.record.run_record import (
    ADAPTER_FOLDER,
    CHANGED_FOLDER,
    ENVIRONMENT_FILE,
    MODEL_FOLDER,
    RunHeader,
    RunRecord,
)
from lora_lab.schema.data import HubData, SkillsData
from lora_lab.schema.trial import Trial, read_trial

CARD_FILE = "README.md"

_QUANTILE = NormalDist().inv_cdf(0.975)
# What a measurement's name says too briefly.
_MEANINGS = {
    "peak_allocated_bytes": "peak of allocated memory in training",
    "peak_reserved_bytes": "peak of memory reserved by CUDA's allocator in training",
    "train_peak_rss_bytes": "peak resident set of the process in training",
    "train_seconds": "training",
    "evaluate_seconds": "scoring",
    "wall_seconds": "the whole run",
    "tokens_per_second": "training speed, tokens without padding per second",
    "adapter_file_bytes": "size of the adapter on disk",
    "model_file_bytes": "size of the model on disk",
    "changed_file_bytes": "size of the trained weights on disk",
    f"{SHARED}train_seconds": "training of the whole cohort, shared by its runs",
    f"{SHARED}wall_seconds": "the whole cohort up to the end of this run",
    f"{SHARED}tokens_per_second": "training speed of the whole cohort, tokens without padding per second",
    f"{SHARED}peak_allocated_bytes": "peak of allocated memory in training, of the whole cohort",
    "load_average_before": "1-minute load average before the run",
    "load_average_after": "1-minute load average after the run",
}


def write_cards(folder: Path, header: RunHeader, result: Result) -> None:
    """Writes the card into the run's `adapter/`, `model/` or `changed/`; a run that saved nothing gets none.

    Raises:
        MachineError: the disk refuses.
    """
    for saved in (folder / ADAPTER_FOLDER, folder / MODEL_FOLDER, folder / CHANGED_FOLDER):
        if saved.is_dir():
            below = _below(folder, header)
            card = card_text(saved, header, result, read_json(folder / ENVIRONMENT_FILE), below=below)
            write_text(saved / CARD_FILE, card)


def _below(folder: Path, header: RunHeader) -> list[RunRecord] | None:
    """The runs whose weights lie under what was saved; None where one of them is gone."""
    try:
        return weights_chain(Ledger(folder.parent.parent), header.identities)
    except InputError:
        return None


def card_text(
    saved: Path,
    header: RunHeader,
    result: Result,
    environment: Mapping[str, Any],
    *,
    below: Sequence[RunRecord] | None = (),
) -> str:
    """The card of weights in the folder `saved`; `environment` is what the ledger knows of the machine.

    below: the runs whose weights these lie on (`parents.weights_chain`); None where they are not to be had.
    """
    trial = read_trial(header.trial)
    sections = {
        "What it is": _facts(identity_rows(header, result, trial)),
        "Data": _facts(_data(header, result, trial)),
        "Training": _facts(_training(result, trial)),
        "Scores": _scores(result, trial),
        "Memory and time": _facts(_cost(result, environment)),
        "Not measured": [f"- {code(name)}: {prose(reason)}" for name, reason in sorted(result.missing.items())],
        "Warnings": [f"- {prose(str(warning))}" for warning in result.facts.get("warnings", ())],
        "How to load it": _loading(saved, header, result, trial, below),
        "Where it comes from": _facts(_provenance(header, result, environment)),
    }
    lines = [f"# {prose(header.name)}", "", *_opening(result, trial)]
    for title, content in sections.items():
        if content:
            lines += ["", f"## {title}", "", *content]
    return f"{front_matter(header, result, trial)}\n" + "\n".join(lines) + "\n"


def _loading(
    saved: Path, header: RunHeader, result: Result, trial: Trial, below: Sequence[RunRecord] | None
) -> list[str]:
    if below is not None:
        return loading(Saved(saved, header, result, trial, below))
    return [
        f"It belongs on the weights of run {code(header.identities[WEIGHTS][:ID_DIGITS])}, which is no longer there."
    ]


def _opening(result: Result, trial: Trial) -> list[str]:
    what = {"adapter": "An adapter for", "changed": "Trained weights of", "model": "A trained copy of"}.get(
        trial.method.saves, "A run of"
    )
    lines = [f"{what} {code(model_name(trial))}, trained and scored by LoRA Lab as one run of an experiment."]
    if result.status != Status.COMPLETED:
        why = f": {prose(result.reason)}" if result.reason else ""
        lines += ["", f"**The run ended as {result.status}{why}.** What it had measured until then is below."]
    return lines


def _facts(rows: Iterable[tuple[str, str]]) -> list[str]:
    return table(("", ""), list(rows))


def _data(header: RunHeader, result: Result, trial: Trial) -> Iterable[tuple[str, str]]:
    data = trial.data
    yield "source", code(data_name(data))
    if isinstance(data, HubData):
        yield "split", code(data.split) + ("" if data.config is None else f" of {code(data.config)}")
    if isinstance(data, SkillsData):
        yield "skills and weights", ", ".join(f"{code(name)} {weight:g}" for name, weight in data.mixture.items())
        yield "seeds of the rows", f"training {data.train_seed}, held out {data.heldout_seed}"
    for role in ("data", "heldout"):
        if role in header.identities:
            yield f"identity ({role})", code(header.identities[role])
    rows, cut = result.measurements.get("train_rows"), result.measurements.get("cut_rows")
    if rows is not None:
        yield "training rows", f"{rows:,}" + ("" if cut is None else f", of which {cut:,} cut at the longest length")
    yield "longest length", f"{data.max_length:,} tokens"
    yield "template, loss on", f"{data.template}, {data.loss_on} tokens"


def _training(result: Result, trial: Trial) -> Iterable[tuple[str, str]]:
    training, measured = trial.training, result.measurements
    asked = f"epochs: {training.epochs}" if training.max_steps is None else f"steps: {training.max_steps:,}"
    yield "asked for", asked
    if "steps" in measured:
        yield "optimizer steps done", f"{measured['steps']:,}"
    yield "batch", f"{training.batch_size} examples per step, {training.micro_batch_size} at a time"
    if "tokens" in measured and "loss_tokens" in measured:
        yield "tokens", f"{measured['tokens']:,}, of which {measured['loss_tokens']:,} count in the loss"
    yield "learning rate", f"{trial.learning_rate:g}, {_settings(trial.scheduler.model_dump())}"
    if training.layer_rates:
        yield "factors of the rate by layer", setting_text(training.layer_rates)
    yield "optimizer", _settings(trial.optimizer.model_dump())
    norm = training.max_gradient_norm
    yield "gradient norm", "not clipped" if norm is None else f"clipped at {norm:g}"
    yield "precision", f"{training.precision}, gradient checkpointing {training.gradient_checkpointing}"
    seeds = trial.seeds.model_dump()
    others = "" if set(seeds.values()) == {trial.seed} else f" ({', '.join(f'{k} {v}' for k, v in seeds.items())})"
    yield "seed", f"{trial.seed}{others}"
    if (loss := result.metrics.get("train/loss")) is not None:
        yield "loss of the last step", f"{loss.value:.4g} {loss.unit}"


def _settings(values: Mapping[str, Any]) -> str:
    """`linear, warmup steps 0`."""
    known = {key.replace("_", " "): value for key, value in values.items() if key != "kind" and value is not None}
    return ", ".join([str(values["kind"]), *(f"{key} {setting_text(value)}" for key, value in known.items())])


def _scores(result: Result, trial: Trial) -> list[str]:
    scores = {name: metric for name, metric in result.metrics.items() if is_score(name)}
    if not scores:
        return ["None."]
    head = ("metric", "value and 95 % interval", "examples", "chance", "better", "unit")
    note = (
        "The interval is 1.96 standard errors to either side (normal approximation). It covers the examples that were "
        f"scored, not seeds: this is one run, of seed {trial.seed}."
    )
    facts = result.facts.get("evaluation", {})
    known = (("lm-eval", "lm_eval_version"), ("batch size", "batch_size"))
    how = [f"{title} {prose(str(facts[key]))}" for title, key in known if key in facts]
    told = [f"Tasks were scored with {', '.join(how)}."] if how else []
    rows = [(code(name), *_score(metric)) for name, metric in sorted(scores.items())]
    return [*table(head, rows), "", " ".join([note, *told])]


def _score(metric: Metric) -> Sequence[str]:
    error, count = metric.standard_error, metric.num_examples
    value = f"{metric.value:.4g}"
    if error is None:
        value += " (no standard error)"
    elif error == 0:
        value += " (no interval: all examples alike)"
    else:
        value = _with_interval(metric.value, _QUANTILE * error)
    examples = "-" if count is None else f"{count:,}"
    chance = "-" if metric.chance is None else f"{metric.chance:.3g}"
    return value, examples, chance, "higher" if metric.higher_is_better else "lower", prose(metric.unit)


def _with_interval(value: float, half_width: float) -> str:
    """The half width to two digits, the value to the same decimals."""
    decimals = max(1 - math.floor(math.log10(half_width)), 0)
    return f"{value:.{decimals}f} ± {half_width:.{decimals}f}"


def _cost(result: Result, environment: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    if (cohort := cohort_of(result)) is not None:
        others = len(set(cohort.members) - {result.run_id})
        yield "trained together with", f"{others} other runs, in cohort {code(cohort.id)} of {cohort.seats} seats"
    for name, meaning in _MEANINGS.items():
        if name in result.measurements:
            yield meaning, _measured(name, result.measurements[name])
    if result.predicted_peak_allocated_bytes is not None:
        yield "predicted peak of allocated memory", _measured("_bytes", result.predicted_peak_allocated_bytes)
    yield "device", code(result.facts["device"])
    if result.facts["device"] == "cpu":
        yield "allocated, on a CPU", "bytes of live tensors in a step on the longest rows, left out of time and speed"
    cores, usable = environment["cores"], environment["usable_cores"]
    counted = [] if cores is None else [f"{cores} cores" + ("" if usable is None else f" ({usable} usable)")]
    memory = f"{environment['memory_bytes'] / 1e9:.3g} GB of memory"
    yield "machine", ", ".join([prose(str(environment["cpu"])), *counted, memory])
    if environment["gpu"] is not None:
        yield "GPU", ", ".join(map(code, environment["gpu"]["names"]))


def _measured(name: str, value: float | int) -> str:
    if name.endswith("_bytes"):
        return f"{value / 1e9:.4g} GB" if value >= 1e9 else f"{value / 1e6:.4g} MB"
    return f"{value:.4g} s" if name.endswith("_seconds") else f"{value:.4g}"


def _provenance(header: RunHeader, result: Result, environment: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    yield "run", f"{code(header.run_id)}, attempt {header.attempt}"
    yield "fingerprint of the trial", code(header.fingerprint)
    yield "fingerprint of the setting", f"{code(header.setting)} (the trial without its seeds)"
    yield "status", f"{result.status}, ended {prose(result.finished_at)}"
    for role, identity in header.identities.items():
        if role not in ("base", "data", "heldout", *PARENT_ROLES):
            yield f"identity ({prose(role)})", code(identity)
    packages = {name: version for name, version in environment["packages"].items() if version is not None}
    told = [f"{prose(name)} {prose(str(version))}" for name, version in packages.items()]
    yield "versions", ", ".join([f"Python {prose(str(environment['python']))}", *told])
    commit = environment["code"]["commit"]
    if commit is not None:
        dirty = ", with uncommitted changes" if environment["code"]["dirty"] else ""
        yield "commit of LoRA Lab", f"{code(commit)}{dirty}"
