"""The arithmetic of combining adapters, on plain tensors: worked examples, expectations and edges."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lora_lab.adapters.combination import CombineKind, Factors, combine_factors


def test_svd_of_a_rank_above_a_side_of_the_layer() -> None:
    generator = torch.Generator().manual_seed(0)
    wide = [
        Factors(torch.randn(6, 3, generator=generator), torch.randn(9, 6, generator=generator), c) for c in (0.5, -2.0)
    ]
    a, b = combine_factors("svd", wide, density=None, generator=None)
    assert a.shape == (3, 3) and b.shape == (9, 3)
    torch.testing.assert_close(b @ a, sum(one.c * one.b @ one.a for one in wide), atol=1e-4, rtol=1e-4)


def test_ties_on_a_worked_example() -> None:
    """Half of each row is kept: 4, -3 | -6, 5 | 2, -1.5. Sums of what is kept, by column: 0, -4.5, 5, 0."""
    rows = [[4.0, -3.0, 1.0, 0.5], [-6.0, 1.0, 5.0, 0.1], [2.0, -1.5, 0.3, -0.2]]
    ones = [Factors(torch.tensor([row]), torch.ones(1, 1), 1.0) for row in rows]
    a, _ = combine_factors("ties", ones, density=0.5, generator=None)
    # 0 elects +: mean of 4 and 2; -: mean of -3 and -1.5; +: 5 alone; nothing is kept in the last column
    torch.testing.assert_close(a, torch.tensor([[3.0, -2.25, 5.0, 0.0]]))


def test_the_expectation_of_dare_is_linear() -> None:
    generator = torch.Generator().manual_seed(0)
    pairs = [
        Factors(
            torch.randn(2, 3, generator=generator, dtype=torch.float64),
            torch.randn(4, 2, generator=generator, dtype=torch.float64),
            c,
        )
        for c in (0.8, -0.5)
    ]
    draws = []
    for seed in range(4000):
        a, b = combine_factors("dare_linear", pairs, density=0.5, generator=torch.Generator().manual_seed(seed))
        draws.append(b @ a)
    stacked = torch.stack(draws)
    a, b = combine_factors("linear", pairs, density=None, generator=None)
    error = (stacked.mean(dim=0) - b @ a).abs()
    assert (error < 5 * stacked.std(dim=0) / len(draws) ** 0.5).all()
    assert (stacked.std(dim=0) > 0.1).all()


def test_dare_ties_elects_among_what_was_not_dropped() -> None:
    """With masks read off the result's own draws: the same generator, entry by entry."""
    generator = torch.Generator().manual_seed(1)
    ones = [Factors(torch.randn(5, 40, generator=generator), torch.ones(2, 5), 1.0) for _ in range(3)]
    a, _ = combine_factors("dare_ties", ones, density=0.6, generator=torch.Generator().manual_seed(7))
    summed, _ = combine_factors("dare_linear", ones, density=0.6, generator=torch.Generator().manual_seed(7))
    whole = torch.stack([one.a for one in ones]).double() / 0.6
    checked = 0
    for place in np.ndindex(5, 40):
        # which of the eight sets of survivors gives the sum that dare_linear found
        sets = [[i for i in range(3) if bits >> i & 1] for bits in range(8)]
        survivors = [s for s in sets if abs(sum(whole[i][place] for i in s) - summed[place]) < 1e-5]
        if len(survivors) != 1:
            continue
        values = [float(whole[i][place]) for i in survivors[0]]
        sign = 1 if sum(values) >= 0 else -1
        agreeing = [value for value in values if np.sign(value) == sign]
        assert float(a[place]) == pytest.approx(np.mean(agreeing) if agreeing else 0.0, abs=1e-5)
        checked += 1
    assert checked > 190


def test_density_of_one_drops_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    pairs = [
        Factors(torch.randn(2, 6, generator=generator), torch.randn(5, 2, generator=generator), c) for c in (1.0, 0.3)
    ]
    whole: list[tuple[CombineKind, CombineKind]] = [("dare_linear", "linear"), ("dare_ties", "ties")]
    for dare, other in whole:
        found = combine_factors(dare, pairs, density=1.0, generator=torch.Generator().manual_seed(0))
        expected = combine_factors(other, pairs, density=1.0, generator=None)
        assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


def test_bf16_factors_are_combined_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)

    def tensor(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).bfloat16()

    pairs = [Factors(tensor(2, 6), tensor(5, 2), 0.3) for _ in range(3)]
    a, b = combine_factors("linear", pairs, density=None, generator=None)
    root = 0.3**0.5
    assert torch.equal(a, sum(root * one.a.float() for one in pairs).bfloat16())  # type: ignore[union-attr]
    assert b.dtype == torch.bfloat16
