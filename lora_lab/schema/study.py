"""Study: one question, the sweep that answers it, and the claims it is judged by (design.md section 7).

The one schema class with defaults. A trial is composed from `conf/`, where every default stands once; a study file is
a user's own document, in which a key that is absent means that there is none: no source, no fixed values, no claims.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from lora_lab.errors import InputError, Problem
from lora_lab.schema.labels import check_label
from lora_lab.schema.problems import problems_of
from lora_lab.schema.section import Names, Section, Seed

_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z0-9_-]+)*")
_ZIP = "zip"

Scalar = bool | int | float | str | None
Value = Scalar | tuple[Scalar, ...]


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _value(value: object) -> object:
    if isinstance(value, Mapping):
        raise ValueError("expected a value or a list of values, got a mapping; write nested keys with dots: a.b: 1")
    if isinstance(value, (list, tuple)) and any(isinstance(item, (list, tuple, Mapping)) for item in value):
        raise ValueError("a list that is one value may hold only text, numbers, true, false and null")
    return _as_tuple(value)


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
    return _as_tuple(value)


Values = Annotated[dict[str, Annotated[Value, BeforeValidator(_value)]], BeforeValidator(_check_keys)]
Axis = Annotated[tuple[Annotated[Value, BeforeValidator(_value)], ...], BeforeValidator(_axis)]
Axes = Annotated[dict[str, Axis], BeforeValidator(_check_keys)]


class Source(Section):
    """Where a question or finding was published. notes: how the study departs from it."""

    title: str | None = None
    url: str | None = None
    notes: str | None = None


class Grid(Section):
    """A product of dimensions. A dimension is one axis, or several axes zipped: of equal length, walked together.

    Written in a study file as `{rank: [2, 8], zip: {alpha: [1, 2], dropout: [0.0, 0.1]}}`; their order is kept.
    """

    dimensions: Annotated[tuple[Axes, ...], BeforeValidator(_as_tuple)]

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


class Study(Section):
    """What a study file says; `name` is the file's name.

    base: group choices and values for every trial, keys as on the command line. baseline: score the untouched base
    model as row zero. seeds: every point of the grids is run with each; without them `seed` is as composed.
    metrics: the first is the primary one. claims: statements with criteria and published numbers.
    """

    name: str
    question: str
    source: Source | None = None
    base: Values = Field(default_factory=dict)
    baseline: bool = False
    seeds: Annotated[tuple[Seed, ...], BeforeValidator(_as_tuple)] = ()
    grids: Annotated[tuple[Grid, ...], BeforeValidator(_as_tuple)]
    metrics: Names = ()
    claims: Annotated[tuple[dict[str, Any], ...], BeforeValidator(_as_tuple)] = ()

    @field_validator("name")
    @classmethod
    def _label(cls, name: str) -> str:
        check_label(name)
        return name

    @field_validator("question")
    @classmethod
    def _has_text(cls, question: str) -> str:
        if not question.strip():
            raise ValueError("empty; say in a sentence what the study asks")
        return question

    @field_validator("grids")
    @classmethod
    def _has_points(cls, grids: tuple[Grid, ...]) -> tuple[Grid, ...]:
        if not grids:
            raise ValueError("no grids, so no points to run")
        return grids

    @model_validator(mode="after")
    def _one_source_of_seeds(self) -> Study:
        swept = any("seed" in dimension for grid in self.grids for dimension in grid.dimensions)
        if self.seeds and (swept or "seed" in self.base):
            raise ValueError("seeds is given, so seed may not stand in base or in a grid as well")
        return self


def study_from(mapping: Mapping[str, Any], *, name: str) -> Study:
    """A validated study from the content of its file.

    Raises:
        InputError: with every problem found; `where` is the dotted path inside the file.
    """
    if "name" in mapping:
        raise InputError(Problem("name", f"unknown key; a study is named by its file, here {name}"))
    content = {"name": name, **mapping}
    try:
        return Study.model_validate(content)
    except ValidationError as error:
        raise InputError(problems_of(error, Study, content)) from None
