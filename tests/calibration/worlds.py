"""Simulated studies with a known truth: seeds crossed with examples, of several kinds of outcome and of noise.

Nothing here uses the product: a world draws scores, and says what the true difference is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import special

Floats = npt.NDArray[np.float64]
Draw = Callable[[np.random.Generator, tuple[int, ...]], Floats]


@dataclass(frozen=True, slots=True)
class Noise:
    """Standard deviations of the difference: over seeds, over examples, and of what is left in a cell."""

    name: str
    seed: float
    example: float
    rest: float


# Of the variance with 5 seeds and 500 examples, seeds are 90, 1, 32, 0 and 43 %, and the rest in the last is 54 %.
NOISES = (
    Noise("seeds dominate", 0.10, 0.30, 0.30),
    Noise("examples dominate", 0.01, 1.00, 0.50),
    Noise("both", 0.07, 1.00, 0.50),
    Noise("no seed noise", 0.00, 1.00, 0.50),
    Noise("rest dominates", 0.04, 0.10, 1.00),
)


def normal(rng: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    """Mean 0, standard deviation 1, as all of these."""
    return rng.standard_normal(shape)


def heavy(rng: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    """Student's t with 3 degrees of freedom."""
    return rng.standard_t(3, shape) / np.sqrt(3)


def skewed(rng: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    """Exponential: skewness 2."""
    return rng.standard_exponential(shape) - 1


# Kind of outcome: how seed effects are drawn, and how those of examples and cells are.
CONTINUOUS: dict[str, tuple[Draw, Draw]] = {
    "normal": (normal, normal),
    "heavy tails": (heavy, heavy),
    "skewed examples": (normal, skewed),
    "ratio of sums": (normal, normal),
}


def differences(
    rng: np.random.Generator, kind: str, noise: Noise, seeds: int, examples: int
) -> tuple[Floats, Floats | None]:
    """Differences (seeds, examples) whose true mean is 0, and weights where the kind has them.

    "ratio of sums": row e has w_e tokens, 1 + Poisson with mean 20 times a gamma variate of mean 1 and variance 1/2;
    its difference in nats is w_e times (seed + example + rest).
    """
    of_seeds, of_cells = CONTINUOUS[kind]
    values = noise.rest * of_cells(rng, (seeds, examples))
    values += noise.example * of_cells(rng, (examples,))
    values += noise.seed * of_seeds(rng, (seeds, 1))
    if kind != "ratio of sums":
        return values, None
    tokens = 1.0 + rng.poisson(20 * rng.standard_gamma(2, examples) / 2)
    return values * tokens, tokens


@dataclass(frozen=True, slots=True)
class Binary:
    """Answers that are right or wrong. An arm answers example e with seed s rightly if a normal variate is positive:

        threshold + seed of the arm + example + example of the arm + rest of the arm > 0

    with standard deviations seed, shared, example and rest. The more is shared, the fewer examples the arms differ on.
    """

    name: str
    base_rate: float
    shared: float
    seed: float
    example: float
    rest: float

    def arms(self, rng: np.random.Generator, truth: float, seeds: int, examples: int) -> tuple[Floats, Floats]:
        """Two arms' scores (seeds, examples); the first is right at the base rate, the second by `truth` less often."""
        shared = self.shared * rng.standard_normal(examples)
        return self._arm(rng, self.base_rate, shared, seeds), self._arm(rng, self.base_rate - truth, shared, seeds)

    def _arm(self, rng: np.random.Generator, rate: float, shared: Floats, seeds: int) -> Floats:
        spread = np.sqrt(self.shared**2 + self.seed**2 + self.example**2 + self.rest**2)
        latent = special.ndtri(rate) * spread + shared + self.example * rng.standard_normal(shared.shape)
        latent = latent + self.rest * rng.standard_normal((seeds, shared.shape[0]))
        latent += self.seed * rng.standard_normal((seeds, 1))
        return (latent > 0).astype(np.float64)


BINARIES = (
    Binary("seeds dominate", 0.65, 1.0, 0.25, 0.10, 0.30),
    Binary("examples dominate", 0.65, 1.0, 0.01, 0.70, 0.30),
    Binary("both", 0.65, 1.0, 0.10, 0.50, 0.50),
    Binary("few examples differ", 0.95, 1.0, 0.02, 0.05, 0.05),
    Binary("near the ceiling", 0.97, 1.0, 0.05, 0.30, 0.30),
)


def several_arms(
    rng: np.random.Generator, noise: Noise, truths: tuple[float, ...], seeds: int, examples: int
) -> list[Floats]:
    """Scores (seeds, examples) of arms with these true means; the noise is that of a difference of two of them.

    What all arms share (how hard an example is, how good a seed) is ten times as large and cancels.
    """
    shared = 10 * noise.example * rng.standard_normal(examples) + 10 * noise.seed * rng.standard_normal((seeds, 1))
    half = Noise(noise.name, noise.seed / 2**0.5, noise.example / 2**0.5, noise.rest / 2**0.5)
    return [shared + truth + differences(rng, "normal", half, seeds, examples)[0] for truth in truths]
