"""Designs: what a study runs at one scale: fixed values, grids, seeds, the arms that claims name, tuning and timing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from lora_lab.schema.section import Count, Names, Positive, Section, Seed, Text, as_tuple

_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z0-9_-]+)*")
_ZIP = "zip"

Scalar = bool | int | float | str | None
Value = Scalar | tuple[Scalar, ...]


def _value(value: object) -> object:
    if isinstance(value, Mapping):
        raise ValueError("expected a value or a list of values, got a mapping; write nested keys with dots: a.b: 1")
    if isinstance(value, (list, tuple)) and any(isinstance(item, (list, tuple, Mapping)) for item in value):
        raise ValueError("a list that is one value may hold only text, numbers, true, false and null")
    return as_tuple(value)


def _check_keys(mapping: object) -> object:
    if isinstance(mapping, Mapping):
        wrong = [str(key)[:100] for key in mapping if not _KEY.fullmatch(str(key))]
        if wrong:
            raise ValueError(f"expected configuration keys such as rank or training.epochs, got {', '.join(wrong)}")
    return mapping


def _axis(value: object) -> object:
    if not isinstance(value, (list, tuple)):
        shown = "a mapping" if isinstance(value, Mapping) else f"[{value}]"
        raise ValueError(f"expected a list of values for this axis, such as [8, 16]; got {shown} without brackets")
    if not value:
        raise ValueError("the axis has no values, so the sweep would have no points")
    return as_tuple(value)


Values = Annotated[dict[str, Annotated[Value, BeforeValidator(_value)]], BeforeValidator(_check_keys)]
Axis = Annotated[tuple[Annotated[Value, BeforeValidator(_value)], ...], BeforeValidator(_axis)]
Axes = Annotated[dict[str, Axis], BeforeValidator(_check_keys)]


class Grid(Section):
    """A product of dimensions. A dimension is one axis, or several axes zipped: of equal length, walked together.

    Written in a study file as `{rank: [2, 8], zip: {alpha: [1, 2], dropout: [0.0, 0.1]}}`; their order is kept.
    """

    dimensions: Annotated[tuple[Axes, ...], BeforeValidator(as_tuple)]

    @model_validator(mode="before")
    @classmethod
    def _from_axes(cls, axes: Any) -> Any:
        if not isinstance(axes, Mapping) or set(axes) == {"dimensions"}:
            return axes
        return {"dimensions": tuple(value if key == _ZIP else {key: value} for key, value in axes.items())}

    @model_validator(mode="after")
    def _axes_fit(self) -> Grid:
        for zipped in self.dimensions:
            lengths = {key: len(axis) for key, axis in zipped.items()}
            if not lengths:
                raise ValueError("zip has no axes")
            if len(set(lengths.values())) > 1:
                shown = ", ".join(f"{key} has {length}" for key, length in lengths.items())
                raise ValueError(f"zipped axes need equally many values; {shown}")
        keys = [key for dimension in self.dimensions for key in dimension]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise ValueError(f"axis {', '.join(twice)} stands both inside and outside of zip")
        return self


# Written in a grid in place of a learning rate: the one that tuning picks for this setting.
TUNED = "tuned"
RATE = "learning_rate"

_Seeds = Annotated[tuple[Seed, ...], BeforeValidator(as_tuple)]
_Rates = Annotated[tuple[Positive, ...], BeforeValidator(as_tuple), Field(min_length=3)]


def _check_arm(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError(f'an arm is named with letters, digits and _, not starting with a digit; got "{name[:80]}"')
    return name


Arm = Annotated[str, AfterValidator(_check_arm)]


class Rates(Section):
    """The learning rates that tuning tries, ascending, for settings that have all values of `when`."""

    when: Values = Field(default_factory=dict)
    values: _Rates

    @model_validator(mode="after")
    def _ascend(self) -> Rates:
        if list(self.values) != sorted(set(self.values)):
            raise ValueError(f"rates must ascend, each once; got {', '.join(map(str, self.values))}")
        return self


class Tuning(Section):
    """How the rate of every setting with `learning_rate: tuned` is picked: by the mean of `metric` over `seeds`, which
    are other seeds than those that are judged, on runs with the values of `base` besides (another held-out split).

    rates: the first entry whose `when` fits a setting; all entries are equally long, so that no arm has more tries.
    """

    metric: Text
    seeds: Annotated[_Seeds, Field(min_length=1)]
    base: Values = Field(default_factory=dict)
    rates: Annotated[tuple[Rates, ...], BeforeValidator(as_tuple), Field(min_length=1)]

    @model_validator(mode="after")
    def _equally_long(self) -> Tuning:
        lengths = sorted({len(one.values) for one in self.rates})
        if len(lengths) > 1:
            raise ValueError(f"grids of rates must be of equal size, got {' and '.join(map(str, lengths))} rates")
        return self


class Timing(Section):
    """Runs for the clock: `arms` one by one in random order, `repeats` times over, each alone on the machine.

    base: values of these runs besides (fewer steps, no scoring). The first seed is used; the order comes from `seed`.
    """

    arms: Annotated[Names, Field(min_length=2)]
    repeats: Annotated[Count, Field(ge=3)]
    base: Values = Field(default_factory=dict)
    seed: Seed = 0


class Design(Section):
    """What runs at one scale.

    base: group choices and values for every trial, keys as on the command line. baseline: score the untouched base
    model as row zero. seeds: every point of the grids is run with each; without them `seed` is as composed.
    arms: by name, the values that pick one setting of the grids (compared as they are written there). metrics: the
    first is the primary one.
    """

    base: Values = Field(default_factory=dict)
    baseline: bool = False
    seeds: _Seeds = ()
    grids: Annotated[tuple[Grid, ...], BeforeValidator(as_tuple)]
    metrics: Names = ()
    arms: dict[Arm, Values] = Field(default_factory=dict)
    tuning: Tuning | None = None
    timing: Timing | None = None

    @model_validator(mode="after")
    def _one_source_of_seeds(self) -> Design:
        swept = any("seed" in dimension for grid in self.grids for dimension in grid.dimensions)
        if self.seeds and (swept or "seed" in self.base):
            raise ValueError("seeds is given, so seed may not stand in base or in a grid as well")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: each once, got {', '.join(map(str, self.seeds))}")
        return self

    @field_validator("grids")
    @classmethod
    def _has_points(cls, grids: tuple[Grid, ...]) -> tuple[Grid, ...]:
        if not grids:
            raise ValueError("no grids, so no points to run")
        return grids

    @model_validator(mode="after")
    def _tuning_fits(self) -> Design:
        tuned = any(TUNED in dimension.get(RATE, ()) for grid in self.grids for dimension in grid.dimensions)
        if tuned and self.tuning is None:
            raise ValueError(
                f"{RATE}: {TUNED} stands in a grid, so the study needs tuning: which rates, by which metric"
            )
        if self.tuning is not None and (shared := sorted({*self.tuning.seeds} & {*self.seeds})):
            raise ValueError(f"tuning.seeds: {', '.join(map(str, shared))} would be judged too; use other seeds")
        return self
