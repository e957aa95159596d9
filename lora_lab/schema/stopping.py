"""Early stopping of a search: whether runs that fall behind are ended before their last step.

Housekeeping: a rule changes which runs are finished, never how one is trained, so it is in no fingerprint.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from lora_lab.schema.section import Count, Natural, Section


def _off_as_text(rule: object) -> object:
    """YAML 1.1 reads an unquoted `off` as false."""
    return "off" if rule is False else rule


class MedianRule(Section):
    """A run is ended where its best loss is worse than the median of the others' running averages.

    points: evaluations on the way, in equal parts of a run. warmup_points: how many of them end nothing.
    minimum_runs: of other settings that have come as far; with fewer nothing is ended.
    """

    points: Count
    warmup_points: Natural
    minimum_runs: Count

    @model_validator(mode="after")
    def _a_point_is_left(self) -> MedianRule:
        if self.warmup_points >= self.points:
            raise ValueError(
                f"warmup_points={self.warmup_points} leaves none of the {self.points} points at which a run could be "
                f"stopped; at most {self.points - 1}"
            )
        return self


class HalvingRule(Section):
    """At each point the best 1 / reduction of the runs that have come as far go on.

    points: evaluations on the way, after total / reduction^points, ..., total / reduction steps.
    """

    points: Count
    reduction: Annotated[int, Field(ge=2)]


class Stopping(Section):
    """rule: which of the rules ends runs; each has its own section, which says nothing under another rule."""

    rule: Annotated[Literal["off", "median", "halving"], BeforeValidator(_off_as_text)]
    median: MedianRule
    halving: HalvingRule

    @model_validator(mode="before")
    @classmethod
    def _is_section(cls, value: Any) -> Any:
        if isinstance(value, str | bool):
            shown = "off" if value is False else str(value).lower()[:100]
            rule = "a rule is chosen by launch.stopping.rule=off, median or halving"
            raise ValueError(f"expected a mapping, got {shown}; {rule}")
        return value

    def settings(self) -> dict[str, Any]:
        """The rule with its own settings: all that decides which runs are ended."""
        own = {"off": None, "median": self.median, "halving": self.halving}[self.rule]
        return {"rule": self.rule, **({} if own is None else own.model_dump())}
