"""Trial: one fully resolved configuration, seed included; and Lab: where and how it is run, which changes no result.

`read_trial` and `read_lab` turn the plain mapping that Hydra composed into these frozen values, or raise one InputError
that lists everything wrong with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ValidationError, field_validator, model_validator

from lora_lab.errors import InputError
from lora_lab.schema.combinations import combination_problems
from lora_lab.schema.data import Data
from lora_lab.schema.evaluation import Evaluation
from lora_lab.schema.labels import check_label
from lora_lab.schema.method import Method, Quantization, Target
from lora_lab.schema.model import Model
from lora_lab.schema.optimization import Optimizer, Scheduler, Training
from lora_lab.schema.problems import problems_of
from lora_lab.schema.section import Count, Fraction, Natural, Positive, Section, Seed

_ALPHA_WORDS = {"2r": 2.0, "r": 1.0, "r/2": 0.5}


class Seeds(Section):
    """One seed per source of randomness; each follows `seed` unless it is given."""

    data: Seed
    init: Seed
    dropout: Seed
    layers: Seed


class Trial(Section):
    """Everything that decides a result. Two equal trials have the same fingerprint and are trained once."""

    model: Model
    method: Method
    quantization: Quantization
    target: Target
    rank: Count
    alpha: Positive
    dropout: Fraction
    learning_rate: Positive
    optimizer: Optimizer
    scheduler: Scheduler
    data: Data
    training: Training
    evaluation: Evaluation
    seed: Seed
    seeds: Seeds

    @model_validator(mode="before")
    @classmethod
    def _resolve(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        resolved = dict(values)
        alpha, rank = resolved.get("alpha"), resolved.get("rank")
        if isinstance(alpha, str) and alpha in _ALPHA_WORDS and isinstance(rank, int) and not isinstance(rank, bool):
            resolved["alpha"] = _ALPHA_WORDS[alpha] * rank
        seeds = resolved.get("seeds")
        if isinstance(seeds, Mapping):
            resolved["seeds"] = {key: resolved.get("seed") if seed is None else seed for key, seed in seeds.items()}
        return resolved

    @field_validator("alpha", mode="before")
    @classmethod
    def _alpha_form(cls, alpha: object) -> object:
        if isinstance(alpha, str):
            raise ValueError(f'expected a number > 0 or one of "2r", "r", "r/2", got "{alpha}"')
        return alpha


class TrackingOff(Section):
    """The ledger only."""

    kind: Literal["off"]


class LocalLaunch(Section):
    """Runs one after another in this process. device: `auto` takes CUDA where there is one."""

    kind: Literal["local"]
    device: str
    retries: Natural


class Lab(Section):
    """Housekeeping: none of it is in a fingerprint."""

    root: str
    cache: str | None
    study: str | None
    tag: Annotated[str | None, AfterValidator(check_label)]
    repeat: Natural
    max_runs: Count
    fail_fast: bool
    tracking: TrackingOff
    launch: LocalLaunch


LAB_KEYS = frozenset(Lab.model_fields)


def read_trial(mapping: Mapping[str, Any]) -> Trial:
    """A validated trial from a plain mapping (housekeeping keys already taken out).

    Raises:
        InputError: with every problem found, each naming key, value, rule and nearest valid choice.
    """
    try:
        trial = Trial.model_validate(dict(mapping))
    except ValidationError as error:
        raise InputError(problems_of(error, Trial, mapping)) from None
    problems = combination_problems(trial)
    if problems:
        raise InputError(problems)
    return trial


def read_lab(mapping: Mapping[str, Any]) -> Lab:
    """The housekeeping part of a composed mapping; raises InputError like `read_trial`."""
    try:
        return Lab.model_validate(dict(mapping))
    except ValidationError as error:
        raise InputError(problems_of(error, Lab, mapping)) from None
