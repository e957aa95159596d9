"""A difference between arms with its uncertainty, as every rule of decision takes it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from scipy import special


@dataclass(frozen=True, slots=True)
class Estimate:
    """A difference (or contrast) in the metric's unit.

    standard_error: of the difference, over seeds and examples. seed_part, example_part: the variances that it is made
    of, in squared units; None where that source has no part. degrees_of_freedom: of Student's t. seeds, examples: how
    many went in; 0 where that source has no part.
    """

    difference: float
    standard_error: float
    degrees_of_freedom: float
    seed_part: float | None
    example_part: float | None
    seeds: int
    examples: int

    def half_width(self, confidence: float) -> float:
        """Of the two-sided interval at this confidence."""
        return float(special.stdtrit(self.degrees_of_freedom, 0.5 + confidence / 2)) * self.standard_error

    def interval(self, confidence: float) -> tuple[float, float]:
        """Both ends of the two-sided interval."""
        half = self.half_width(confidence)
        return self.difference - half, self.difference + half

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)
