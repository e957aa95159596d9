"""The fast calibration: false verdicts in at most 5 % of simulated studies. The full one is `make calibrate`."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest

from lora_lab.study.crossed import crossed
from tests.calibration.counting import Count, best, binary, continuous, ordered, ratios
from tests.calibration.full import out_of_bounds, report
from tests.calibration.worlds import BINARIES, CONTINUOUS, NOISES, Binary, Noise, differences

STUDIES = 600


def _check(counts: Iterable[Count]) -> list[Count]:
    checked = list(counts)
    assert checked
    for count in checked:
        assert not out_of_bounds(count), count
    return checked


@pytest.mark.parametrize("noise", NOISES, ids=lambda noise: noise.name)
@pytest.mark.parametrize("kind", CONTINUOUS)
@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_two_arms(seeds: int, kind: str, noise: Noise) -> None:
    _check(continuous(np.random.default_rng(11), kind, noise, seeds, 100, STUDIES))


@pytest.mark.parametrize("world", BINARIES, ids=lambda world: world.name)
@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_two_arms_of_right_and_wrong_answers(seeds: int, world: Binary) -> None:
    _check(binary(np.random.default_rng(12), world, seeds, 100, STUDIES // 2))


@pytest.mark.parametrize("noise", NOISES[:3], ids=lambda noise: noise.name)
def test_several_arms(noise: Noise) -> None:
    rng = np.random.default_rng(13)
    _check([*best(rng, noise, 5, 100, STUDIES // 4), *ordered(rng, noise, 5, 100, STUDIES // 4)])


@pytest.mark.parametrize("repeats", [3, 5, 10])
def test_ratios_of_times(repeats: int) -> None:
    _check(ratios(np.random.default_rng(14), repeats, STUDIES))


def test_power_is_there_at_five_seeds_and_more_at_ten() -> None:
    powers = []
    for seeds in (5, 10):
        counts = continuous(np.random.default_rng(15), "normal", NOISES[2], seeds, 2000, 200)
        powers.append({(one.rule, one.truth): one.power for one in counts})
    five, ten = powers
    for decided in (("superiority by d", "2 d"), ("superiority by d", "0 d")):
        assert five[decided] is not None and five[decided] > 0.75
        assert ten[decided] is not None and ten[decided] > 0.95


def _zero_excluded(studies: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """How often 95 % intervals exclude the true 0: by the nested bootstrap (percentiles of 500 draws, examples drawn
    anew within each drawn seed, their mean by the central limit), and by ours."""
    nested = ours = 0
    for study in studies:
        seeds, examples = study.shape
        drawn = rng.integers(0, seeds, (500, seeds))
        errors = study.std(axis=1) / np.sqrt(examples)
        means = study.mean(axis=1)[drawn] + errors[drawn] * rng.standard_normal(drawn.shape)
        low, high = np.quantile(means.mean(axis=1), [0.025, 0.975])
        nested += bool(low > 0 or high < 0)
        low, high = crossed(study).interval(0.95)
        ours += bool(low > 0 or high < 0)
    return nested / len(studies), ours / len(studies)


@pytest.mark.parametrize(("noise", "least"), [(NOISES[0], 0.10), (NOISES[1], 0.20)], ids=lambda value: str(value))
def test_a_nested_bootstrap_would_not_pass(noise: Noise, least: float) -> None:
    rng = np.random.default_rng(16)
    studies = np.stack([differences(rng, "normal", noise, 5, 100)[0] for _ in range(STUDIES)])
    nested, ours = _zero_excluded(studies, rng)
    assert nested > least
    assert ours <= 0.05


def test_a_rate_above_its_bound_is_told_from_chance() -> None:
    def count(fails: float, studies: int, right: str | None = "holds", rule: str = "superiority by d") -> Count:
        return Count("normal", "both", rule, "2 d", 5, 100, studies, right, 0.0, fails)

    assert out_of_bounds(count(0.08, 1000))
    assert not out_of_bounds(count(0.06, 1000))
    assert out_of_bounds(count(0.06, 10000))
    assert not out_of_bounds(count(0.9, 1000, right="fails"))
    assert out_of_bounds(count(0.08, 1000, right=None))
    assert not out_of_bounds(count(0.08, 1000, right=None, rule="equality"))
    table = report([count(0.08, 1000), count(0.03, 1000)])
    assert "8.0" in table and "3.0" not in table
