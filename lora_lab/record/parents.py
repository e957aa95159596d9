"""Runs that a trial is built on: the one it starts from (`init_from`), and those whose layer norms LISA draws by.

They are named by people and known by their fingerprints, which are part of the child's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_lab.errors import InputError, Problem
from lora_lab.record.ledger import Ledger
from lora_lab.record.result import Status
from lora_lab.record.run_record import RunRecord
from lora_lab.schema.method import PROMPT_KINDS, ROUTED_KINDS
from lora_lab.schema.trial import Trial, read_trial
from lora_lab.schema.weight_methods import Lisa

START = "init_from"
NORMS = ("norms_full", "norms_lora")
PARENT_ROLES = (START, *NORMS)

# What cannot be melted into a weight, since it is no change of one.
_UNMERGEABLE = (*PROMPT_KINDS, *ROUTED_KINDS, "bottleneck")
# What is saved is not all that was trained: PiSSA and OLoRA as a LoRA of twice the rank, AdaLoRA pruned, prompts made.
_NOT_CONTINUED = ("pissa", "olora", "adalora", "p_tuning")


def parent_identities(trial: Trial, ledger: Ledger, *, base: str) -> dict[str, str]:
    """Fingerprints of the runs a trial is built on, by role; `base` is the identity of its own base.

    Raises:
        InputError: a run that is not there, not completed, on another base, or not fit for its role.
    """
    identities: dict[str, str] = {}
    problems: list[Problem] = []
    for role, (where, name) in _named(trial).items():
        try:
            record = ledger.resolve(name)
        except InputError as error:
            problems += [Problem(where, problem.message) for problem in error.problems]
            continue
        found = _unusable(record)
        if not found and role == START:
            found = _start_problems(trial, record, base=base)
        problems += [Problem(where, f"{record.name}: {rule}") for rule in found]
        if record.header is not None:
            identities[role] = record.header.fingerprint
    if problems:
        raise InputError(problems)
    return identities


def parent_record(ledger: Ledger, identities: Mapping[str, str], role: str) -> RunRecord:
    """The run in a role of a child whose identities these are; raises InputError where it is gone."""
    fingerprint = identities[role]
    for record in ledger.runs():
        if record.header is not None and record.header.fingerprint == fingerprint and not _unusable(record):
            return record
    raise InputError(Problem(role, f"the run it starts from ({fingerprint[:16]}) is no longer in {ledger.root}"))


def _named(trial: Trial) -> dict[str, tuple[str, str]]:
    """Role -> (key of the trial, name given there)."""
    named = {} if trial.init_from is None else {START: (START, trial.init_from)}
    if isinstance(trial.method, Lisa):
        named |= {role: ("method.norm_log", name) for role, name in zip(NORMS, trial.method.norm_log, strict=False)}
    return named


def _unusable(record: RunRecord) -> list[str]:
    if record.header is None or record.state != Status.COMPLETED:
        return [record.problem or f"is {record.state}; expected a completed run"]
    return []


def _start_problems(trial: Trial, record: RunRecord, *, base: str) -> list[str]:
    assert record.header is not None
    parent = read_trial(record.trial)
    if parent.method.trains == "nothing":
        return ["nothing was trained there; leave init_from out"]
    if record.header.identities.get("base") != base or parent.model.tie_embeddings != trial.model.tie_embeddings:
        return [f"was trained on another base ({record.header.identities.get('base')}), this trial is on {base}"]
    if not record.saved_folder(parent.method.saves).is_dir():
        return [f"has saved no {parent.method.saves}"]
    return _weights_problems(trial, parent) if trial.init_as == "weights" else _adapter_problems(trial, parent)


def _weights_problems(trial: Trial, parent: Trial) -> list[str]:
    if parent.method.kind in _UNMERGEABLE:
        return [f"a {parent.method.kind} cannot be merged into weights; train it on with init_as=adapter"]
    if trial.quantization.kind != "none" or parent.quantization.kind != "none":
        return ["init_as=weights needs plain weights on both sides (quantization=none)"]
    return []


def _adapter_problems(trial: Trial, parent: Trial) -> list[str]:
    if parent.method.trains == "weights":
        return [f"method={parent.method.kind} has no adapter to go on with; use init_as=weights"]
    if parent.quantization != trial.quantization:
        return [f"its base is quantized as {parent.quantization.kind}, this one as {trial.quantization.kind}"]
    kind = parent.method.kind
    if kind in _NOT_CONTINUED or getattr(parent.method, "projection", False):
        return [f"what a {kind} saves is less than what it trains, so it cannot be trained on; use init_as=weights"]
    differing = [key for key, one, other in _shapes(trial, parent) if one != other]
    if differing:
        return [f"its adapter has another {', '.join(differing)}; give the same, or use init_as=weights"]
    return []


def _shapes(trial: Trial, parent: Trial) -> list[tuple[str, Any, Any]]:
    """What makes two adapters alike, with the value of both."""
    axes = [axis for axis in ("rank", "alpha", "target") if axis in parent.method.uses]
    return [(key, getattr(trial, key), getattr(parent, key)) for key in ("method", *axes)]
