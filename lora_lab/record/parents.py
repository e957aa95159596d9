"""Runs that a trial is built on: the one it starts from (`init_from`), and those whose layer norms LISA draws by.

They are named by people and known by their fingerprints, which are part of the child's own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_lab.errors import InputError, Problem
from lora_lab.plan.shapes import is_tied
from lora_lab.record.layer_log import observed_updates, read_observations
from lora_lab.record.ledger import Ledger
from lora_lab.record.result import Status
from lora_lab.record.run_record import RunRecord
from lora_lab.schema.method import METHODS, PROMPT_KINDS, ROUTED_KINDS
from lora_lab.schema.model import Model, RandomModel
from lora_lab.schema.trial import Trial, read_trial
from lora_lab.schema.weight_methods import Lisa

START = "init_from"
# The run whose trained weights lie under what a child trains, however many runs go on with an adapter in between.
WEIGHTS = "init_weights"
NORMS = ("norms_full", "norms_lora")
PARENT_ROLES = (START, WEIGHTS, *NORMS)

# What cannot be melted into a weight, since it is no change of one.
_UNMERGEABLE = (*PROMPT_KINDS, *ROUTED_KINDS, "bottleneck")
# What is saved is not all that was trained: PiSSA and OLoRA as a LoRA of twice the rank, AdaLoRA pruned, prompts made.
_NOT_CONTINUED = ("pissa", "olora", "adalora", "p_tuning")
_WHOLE_MODELS = tuple(kind for kind, method in METHODS.items() if method.saves == "model")
# Their change of a weight is B A, which is what the layer log measures.
_LOW_RANK_CHANGES = ("lora", "rslora", "lora_plus", "pissa", "olora")


class LedgerAsRead(Ledger):
    """A ledger as it was at the first look: all points of a sweep are judged on one state of it, which is read once."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._records: list[RunRecord] | None = None

    def runs(self) -> list[RunRecord]:
        """As of `Ledger`, read at the first call."""
        if self._records is None:
            self._records = super().runs()
        return self._records


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
        found = _role_problems(trial, role, record, base=base)
        problems += [Problem(where, f"{record.name} ({record.run_id}) {rule}") for rule in found]
        if record.header is not None:
            identities[role] = record.header.fingerprint
            if role == START:
                identities |= _weights_below(trial, record)
    if problems:
        raise InputError(problems)
    return identities


def parent_record(ledger: Ledger, identities: Mapping[str, str], role: str) -> RunRecord:
    """The run in a role of a child whose identities these are; raises InputError where it is gone."""
    fingerprint = identities[role]
    for record in ledger.runs():
        if record.header is not None and record.header.fingerprint == fingerprint and not _unusable(record):
            return record
    rule = f"the run it is built on ({fingerprint[:16]}) is no longer a completed run of {ledger.root}"
    raise InputError(Problem("method.norm_log" if role in NORMS else START, rule))


def weights_chain(ledger: Ledger, identities: Mapping[str, str]) -> list[RunRecord]:
    """The runs whose weights a child of these identities lies on, the one on the lowest weights first.

    The first has saved a whole model, or lies on the plain one. Raises InputError where one of them is gone.
    """
    chain: list[RunRecord] = []
    while WEIGHTS in identities:
        record = parent_record(ledger, identities, WEIGHTS)
        assert record.header is not None
        chain.insert(0, record)
        if record.trial["method"]["kind"] in _WHOLE_MODELS:
            break
        identities = record.header.identities
    return chain


def weights_identity(identities: Mapping[str, str]) -> str:
    """The base that a run's adapter or changed weights belong on: the model, or what another run made of it."""
    below = identities.get(WEIGHTS)
    return identities["base"] + ("" if below is None else f" with the weights of run {below}")


def _weights_below(trial: Trial, record: RunRecord) -> dict[str, str]:
    assert record.header is not None
    if trial.init_as == "weights":
        return {WEIGHTS: record.header.fingerprint}
    return {role: one for role, one in record.header.identities.items() if role == WEIGHTS}


def _named(trial: Trial) -> dict[str, tuple[str, str]]:
    """Role -> (key of the trial, name given there)."""
    named = {} if trial.init_from is None else {START: (START, trial.init_from)}
    if isinstance(trial.method, Lisa):
        named |= {role: ("method.norm_log", name) for role, name in zip(NORMS, trial.method.norm_log, strict=False)}
    return named


def _unusable(record: RunRecord) -> list[str]:
    if record.header is None or record.state != Status.COMPLETED:
        damage = f" ({record.problem})" if record.problem else ""
        return [f"is {record.state}{damage}; expected a completed run"]
    return []


def _role_problems(trial: Trial, role: str, record: RunRecord, *, base: str) -> list[str]:
    if found := _unusable(record):
        return found
    assert record.header is not None
    try:
        parent = read_trial(record.trial)
    except InputError as error:
        return [f"cannot be read by this version: {problem}" for problem in error.problems]
    found = _base_problems(trial.model, parent.model, mine=base, theirs=record.header.identities.get("base", "unknown"))
    return found or (
        _start_problems(trial, parent, record) if role == START else _norm_problems(trial, role, parent, record)
    )


def _base_problems(model: Model, other: Model, *, mine: str, theirs: str) -> list[str]:
    """How the base of another run differs; of random models the identity says nothing, seed and shape everything."""
    if mine != theirs:
        return [f"was trained on another base: {theirs}, this trial's is {mine}"]
    differing: dict[str, tuple[Any, Any]] = {}
    if isinstance(model, RandomModel) and isinstance(other, RandomModel):
        ours = {"seed": model.seed, **{f"shape.{key}": value for key, value in model.shape.model_dump().items()}}
        own = {"seed": other.seed, **{f"shape.{key}": value for key, value in other.shape.model_dump().items()}}
        differing = {key: (own[key], value) for key, value in ours.items() if own[key] != value}
    if not _tied_alike(model, other):
        differing["tie_embeddings"] = (other.tie_embeddings, model.tie_embeddings)
    return [
        f"was trained on another base: model.{key} is {_shown(own)} there and {_shown(ours)} here"
        for key, (own, ours) in differing.items()
    ][:1]


def _tied_alike(model: Model, other: Model) -> bool:
    shape = model.shape or other.shape
    if shape is None or model.tie_embeddings == other.tie_embeddings:
        return model.tie_embeddings == other.tie_embeddings
    ties = [is_tied(shape, tie_embeddings=one.tie_embeddings) for one in (model, other)]
    return ties[0] == ties[1]


def _shown(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _start_problems(trial: Trial, parent: Trial, record: RunRecord) -> list[str]:
    if parent.method.trains == "nothing":
        return ["has trained nothing (method=base); leave init_from out"]
    if not record.saved_folder(parent.method.saves).is_dir():
        return [f"has no folder {parent.method.saves}, which held what it trained"]
    return _weights_problems(trial, parent) if trial.init_as == "weights" else _adapter_problems(trial, parent)


def _weights_problems(trial: Trial, parent: Trial) -> list[str]:
    kind = parent.method.kind
    if kind in _UNMERGEABLE:
        other = "" if _is_less_than_trained(parent) else "; train it on with init_as=adapter"
        return [f"is of method={kind}, which cannot be merged into weights{other}"]
    for whose, one in (("its base", parent), ("this trial's", trial)):
        if one.quantization.kind != "none":
            rule = "init_as=weights needs plain weights on both sides (quantization=none)"
            return [f"cannot be merged here: {whose} is quantized as {one.quantization.kind}, {rule}"]
    return []


def _adapter_problems(trial: Trial, parent: Trial) -> list[str]:
    kind = parent.method.kind
    if parent.method.trains == "weights":
        return [f"is of method={kind} and has no adapter to go on with; use init_as=weights"]
    other = "" if kind in _UNMERGEABLE else "; use init_as=weights"
    if _is_less_than_trained(parent):
        return [f"cannot be trained on: what a {kind} saves is less than what it trains{other}"]
    differing = [
        f"{key} is {_shown(own)} there and {_shown(ours)} here"
        for key, own, ours in _adapter_settings(trial, parent)
        if own != ours
    ]
    if differing:
        return [f"has another adapter than this trial ({'; '.join(differing)}); give the same{other}"]
    return []


def _is_less_than_trained(parent: Trial) -> bool:
    return parent.method.kind in _NOT_CONTINUED or getattr(parent.method, "projection", False)


def _adapter_settings(trial: Trial, parent: Trial) -> list[tuple[str, Any, Any]]:
    """What makes two adapters alike: key, the parent's value, the trial's."""
    if parent.method.kind != trial.method.kind:
        return [("method", parent.method.kind, trial.method.kind)]
    theirs, ours = _flat(parent), _flat(trial)
    return [(key, theirs.get(key), value) for key, value in ours.items()]


def _flat(trial: Trial) -> dict[str, Any]:
    axes = [axis for axis in ("rank", "alpha") if axis in trial.method.uses]
    target = [*trial.target.parts, *trial.target.modules] if "target" in trial.method.uses else []
    double = trial.quantization.double_quantization
    return {
        **{f"method.{key}": value for key, value in trial.method.model_dump().items()},
        **{axis: getattr(trial, axis) for axis in axes},
        "target": ", ".join(target),
        "quantization": trial.quantization.kind + (" with double quantization" if double else ""),
    }


def _norm_problems(trial: Trial, role: str, parent: Trial, record: RunRecord) -> list[str]:
    """What keeps a run from saying how far training moves each layer."""
    kind = parent.method.kind
    if role == NORMS[0] and kind != "full":
        return [f"is of method={kind}; the first of norm_log must be a run of method=full"]
    if role == NORMS[1] and kind not in _LOW_RANK_CHANGES:
        return [f"is of method={kind}; the second of norm_log must be a LoRA ({', '.join(_LOW_RANK_CHANGES)})"]
    updates = observed_updates(read_observations(record.layers_path, "norms"))
    if not updates:
        return ["has no log of how far its layers moved (a run that starts from another's weights keeps none)"]
    layers = range(0 if trial.model.shape is None else trial.model.shape.num_layers)
    expected = {str(layer) for layer in layers} | {key for line in updates for key in line if key.isdigit()}
    lacking = sorted(key for key in expected if not all(_is_norm(line.get(key)) for line in updates))
    if lacking:
        return [f"has not logged how far layer {lacking[0]} moved (a quantized weight has no such norm)"]
    still = sorted(key for key in expected if not any(line[key] for line in updates))
    if still and role == NORMS[0]:
        return [f"has not moved layer {still[0]} at all, so nothing can be compared with it"]
    return []


def _is_norm(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
