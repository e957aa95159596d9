"""Trial: one fully resolved configuration, seed included; and Lab: where and how it is run, which changes no result.

`read_trial` and `read_lab` turn the plain mapping that Hydra composed into these frozen values, or raise one InputError
that lists everything wrong with it.
"""

from __future__ import annotations

import functools
import json
import re
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError, field_validator, model_validator

from lora_lab.errors import InputError, Problem
from lora_lab.schema.adaptation import Quantization, Target
from lora_lab.schema.combinations import combination_problems
from lora_lab.schema.data import Data
from lora_lab.schema.evaluation import Evaluation
from lora_lab.schema.labels import check_label
from lora_lab.schema.memory import Memory
from lora_lab.schema.method import Method
from lora_lab.schema.model import Model
from lora_lab.schema.optimization import Optimizer, Scheduler, Training
from lora_lab.schema.problems import problems_of
from lora_lab.schema.section import (
    SEED_LIMIT,
    Count,
    Fraction,
    Natural,
    NonNegative,
    Positive,
    Section,
    Seed,
    Text,
)
from lora_lab.schema.stopping import Stopping
from lora_lab.schema.tracking import Tracking

_ALPHA_WORDS = {"2r": 2.0, "r": 1.0, "r/2": 0.5}
# Far beyond any use; a larger one is a slip of the keyboard that would only show as a diverged run.
_ALPHA_LIMIT = 1_000_000
_DEVICE = re.compile(r"cpu|cuda(:[0-9]{1,3})?")


class Seeds(Section):
    """One seed per source of randomness; each follows `seed` unless it is given."""

    data: Seed
    init: Seed
    dropout: Seed
    layers: Seed


class Trial(Section):
    """Everything that decides a result. Two equal trials have the same fingerprint and are trained once.

    init_from: a finished run of the same ledger that this one starts from; init_as: its adapter is trained on, or its
    weights (adapter merged into the base) are the base of a new method.
    """

    model: Model
    method: Method
    quantization: Quantization
    target: Target
    rank: Count
    alpha: Annotated[Positive, Field(le=_ALPHA_LIMIT)]
    dropout: Fraction
    learning_rate: Positive
    optimizer: Optimizer
    scheduler: Scheduler
    data: Data
    training: Training
    evaluation: Evaluation
    seed: Seed
    seeds: Seeds
    init_from: Text | None
    init_as: Literal["adapter", "weights"]

    @model_validator(mode="before")
    @classmethod
    def _resolve(cls, values: Any) -> Any:
        return _resolved(values) if isinstance(values, Mapping) else values

    @field_validator("alpha", mode="before")
    @classmethod
    def _alpha_form(cls, alpha: object) -> object:
        expected = 'a number > 0 or one of "2r", "r", "r/2"'
        if alpha is None or alpha == "":
            raise ValueError(f"empty value; expected {expected}")
        if isinstance(alpha, str):
            raise ValueError(f'expected {expected}, got "{alpha[:100]}"')
        return alpha


def _resolved(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with alpha as a number and every seed set. A wrong rank or seed is named once, not by its followers."""
    resolved = dict(values)
    alpha, rank, seed = resolved.get("alpha"), resolved.get("rank"), resolved.get("seed")
    if isinstance(alpha, str) and alpha in _ALPHA_WORDS:
        resolved["alpha"] = _ALPHA_WORDS[alpha] * (rank if _is_whole(rank) and rank >= 1 else 1)
    seeds = resolved.get("seeds")
    if isinstance(seeds, Mapping):
        followed = seed if _is_whole(seed) and 0 <= seed <= SEED_LIMIT else 0
        resolved["seeds"] = {key: followed if own is None else own for key, own in seeds.items()}
    return resolved


def _is_whole(value: object) -> typing.TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


class LocalLaunch(Section):
    """Runs in processes of this machine.

    device: `auto` is every CUDA device there is, else the CPU. Of several, each gets a process of its own.
    cohort: how many runs are trained together on one loaded base: `auto`, as many as memory holds; `off`, each alone;
    or a number of seats. memory_fraction: of a device's free memory, what a cohort may fill. checkpoint_seconds:
    between two checkpoints of a run in training; 0 is after every step. retries: further tries of a run that failed.
    """

    kind: Literal["local"]
    device: str | tuple[str, ...]
    cohort: Literal["auto", "off"] | Count
    memory_fraction: Annotated[Positive, Field(le=1)]
    checkpoint_seconds: NonNegative
    retries: Natural
    stopping: Stopping

    @field_validator("device", mode="before")
    @classmethod
    def _is_device(cls, device: object) -> object:
        if isinstance(device, (list, tuple)):
            return _device_list(device)
        expected = "expected auto, cpu, cuda or cuda:N"
        if device is None:
            raise ValueError(f"empty value (null); {expected}")
        if not isinstance(device, str) or (device != "auto" and not _DEVICE.fullmatch(device)):
            raise ValueError(f"{expected}, got {_shown(device)}, or a list of devices such as [cuda:0,cuda:1]")
        return device

    @field_validator("cohort", mode="before")
    @classmethod
    def _is_cohort(cls, cohort: object) -> object:
        if cohort is False:  # how YAML reads a bare `off`
            return "off"
        if cohort in ("auto", "off") or (_is_whole(cohort) and cohort >= 1):
            return cohort
        expected = "expected auto, off or a number of seats >= 1"
        if cohort is None or cohort == "":
            raise ValueError(f"empty value ({_shown(cohort)}); {expected}")
        raise ValueError(f"{expected}, got {_shown(cohort)}")


def _device_list(devices: Sequence[object]) -> tuple[object, ...]:
    """Devices that get a process each. The CPU may stand there twice: its cores are shared out."""
    expected = "expected a list of cpu, cuda or cuda:N"
    if not devices:
        raise ValueError(f"{expected}, got an empty list")
    for one in devices:
        if one == "auto":
            raise ValueError("auto stands for all devices by itself, not in a list; launch.device=auto")
        if not isinstance(one, str) or not _DEVICE.fullmatch(one):
            raise ValueError(f"{expected}, got {_shown(one)} in it")
    numbered = ["cuda:0" if one == "cuda" else one for one in devices]
    twice = [one for one in numbered if one != "cpu" and numbered.count(one) > 1]
    if twice:
        raise ValueError(f"names {twice[0]} twice; two processes would count on the same memory")
    return tuple(devices)


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 100 else f"{text[:97]}..."


class Lab(Section):
    """Housekeeping: none of it is in a fingerprint."""

    root: Text
    cache: Text | None
    study: str | None
    tag: Annotated[str | None, AfterValidator(check_label)]
    repeat: Natural
    max_runs: Count
    fail_fast: bool
    tracking: Tracking
    launch: LocalLaunch
    memory: Memory


LAB_KEYS = frozenset(Lab.model_fields)


@dataclass(frozen=True, slots=True)
class Examined:
    """What a mapping says, right or wrong. With problems, `trial` holds only the sections that are valid by themselves
    (`trial.model_fields_set`), so that the rules about those can be checked in the same go."""

    trial: Trial
    problems: tuple[Problem, ...]


def examine_trial(mapping: Mapping[str, Any], *, left_out: Collection[str]) -> Examined:
    """Everything wrong with a mapping (housekeeping keys already taken out).

    left_out: top-level keys that are known to be wrong already and are not looked at.
    """
    problems: list[Problem] = []
    try:
        trial = Trial.model_validate(dict(mapping))
    except ValidationError as error:
        problems = problems_of(error, Trial, mapping)
        trial = _valid_sections(mapping, without={problem.where.split(".")[0] for problem in problems})
    if left_out:
        problems = [problem for problem in problems if problem.where.split(".")[0] not in left_out]
        kept = trial.model_fields_set.difference(left_out)
        trial = Trial.model_construct(_fields_set=set(kept), **{name: getattr(trial, name) for name in kept})
    return Examined(trial, (*problems, *combination_problems(trial)))


def _valid_sections(mapping: Mapping[str, Any], *, without: Collection[str]) -> Trial:
    sections = {}
    for name, value in _resolved(mapping).items():
        if name in Trial.model_fields and name not in without:
            sections[name] = _section_reader(name).validate_python(value)
    return Trial.model_construct(_fields_set=set(sections), **sections)


@functools.cache
def _section_reader(name: str) -> TypeAdapter[Any]:
    return TypeAdapter(typing.get_type_hints(Trial, include_extras=True)[name])


def read_trial(mapping: Mapping[str, Any]) -> Trial:
    """A validated trial from a plain mapping (housekeeping keys already taken out).

    Raises:
        InputError: with every problem found, each naming key, value, rule and nearest valid choice.
    """
    examined = examine_trial(mapping, left_out=())
    if examined.problems:
        raise InputError(examined.problems)
    return examined.trial


def read_lab(mapping: Mapping[str, Any]) -> Lab:
    """The housekeeping part of a composed mapping; raises InputError like `read_trial`."""
    try:
        return Lab.model_validate(dict(mapping))
    except ValidationError as error:
        raise InputError(problems_of(error, Lab, mapping)) from None
