"""What every part of a trial has in common: frozen, strict, no unknown keys, no defaults, no infinities."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

SEED_LIMIT = 2**32 - 1


class Section(BaseModel):
    """Base of all configuration classes. Defaults live in `conf/`, never here."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def _no_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError(f"expected a number, got {str(value).lower()}")
    return value


def _whole(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError(f"expected an integer, got {str(value).lower()}")
    return value


def _in_seed_range(seed: int) -> int:
    if not 0 <= seed <= SEED_LIMIT:
        raise ValueError(f"must be 0 to {SEED_LIMIT}, got {seed}")
    return seed


def _not_empty(text: str) -> str:
    if not text.strip():
        raise ValueError("empty value; expected text")
    return text


def _relative_names(values: tuple[str, ...]) -> tuple[str, ...]:
    for value in values:
        if not value or len(value) > 200:
            raise ValueError(f"expected non-empty names of at most 200 characters, got {value!r}")
    return values


def as_tuple(value: object) -> object:
    """A YAML list as the tuple that a strict field wants."""
    return tuple(value) if isinstance(value, list) else value


Number = Annotated[float, BeforeValidator(_no_bool)]
Positive = Annotated[float, BeforeValidator(_no_bool), Field(gt=0)]
NonNegative = Annotated[float, BeforeValidator(_no_bool), Field(ge=0)]
Fraction = Annotated[float, BeforeValidator(_no_bool), Field(ge=0, lt=1)]
Share = Annotated[float, BeforeValidator(_no_bool), Field(ge=0, le=1)]
Count = Annotated[int, BeforeValidator(_whole), Field(ge=1)]
Natural = Annotated[int, BeforeValidator(_whole), Field(ge=0)]
Seed = Annotated[int, BeforeValidator(_whole), AfterValidator(_in_seed_range)]
Text = Annotated[str, AfterValidator(_not_empty)]
Names = Annotated[tuple[str, ...], BeforeValidator(as_tuple), AfterValidator(_relative_names)]
Pair = Annotated[tuple[Fraction, Fraction], BeforeValidator(as_tuple)]
