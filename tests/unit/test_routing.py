"""The routing log, statistics of routing against hand-counted ones, and the permutation test of specialization."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from lora_lab.adapters.routing import (
    Routed,
    RoutingLog,
    RoutingTotals,
    routing_specialization,
    set_routing_log,
)
from tests.parity.test_lora_experts import IDS, adapted, layers_of, linear_names, moved, network, settings


def routed(probabilities: list[Any], weights: list[Any] | None = None) -> Routed:
    p = torch.tensor(probabilities)
    return Routed(p, p if weights is None else torch.tensor(weights))


def random_entry(sequences: int, tokens: int, experts: int, seed: int) -> Routed:
    generator = torch.Generator().manual_seed(seed)
    p = torch.randn(sequences, tokens, experts, generator=generator).softmax(-1)
    values, kept = p.topk(2, dim=-1)
    return Routed(p, torch.zeros_like(p).scatter(-1, kept, values / values.sum(-1, keepdim=True)))


def test_the_log_collects_between_open_and_close() -> None:
    log, mask = RoutingLog(), torch.ones(2, 3)
    p = torch.full((2, 3, 4), 0.25, requires_grad=True) * 1
    log.note("a", p, p)
    assert log.entries == {}
    log.open(mask)
    log.note("a", p, p)
    with pytest.raises(ValueError, match="a: noted twice"):
        log.note("a", p, p)
    log.close()
    log.note("a", p, p)
    log.note("b", p, p)
    assert list(log.entries) == ["a"]
    assert log.entries["a"].probabilities is p and p.requires_grad
    log.open(mask)
    assert log.entries == {}
    log.clear()
    assert (log.is_open, log.mask) == (False, None)


def test_another_batch_than_the_opened_one_is_refused() -> None:
    log = RoutingLog()
    with pytest.raises(ValueError, match=r"attention_mask: expected \[sequences, tokens\], got shape \(6,\)"):
        log.open(torch.ones(6))
    log.open(torch.ones(2, 3))
    p = torch.full((2, 4, 2), 0.5)
    with pytest.raises(ValueError, match=r"layer: routed \(2, 4\) tokens, the log is open for \(2, 3\)"):
        log.note("layer", p, p)


def test_the_log_of_one_adapter_sees_no_other() -> None:
    base = network()
    model = adapted(base)
    model.add_adapter("second", settings(base, num_experts=2, top_k=None, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    log = RoutingLog()
    set_routing_log(model, log, "second")
    log.open(torch.ones_like(IDS))
    model(input_ids=IDS)
    log.close()
    assert list(log.entries) == [name for name in linear_names(network()) if name.endswith("q_proj")]
    assert all(entry.weights.shape == (2, 12, 2) for entry in log.entries.values())
    set_routing_log(model, None, "second")
    assert all(layer.routing_log is None for layer in layers_of(model))
    with pytest.raises(ValueError, match='no layer of adapter "third" has a router'):
        set_routing_log(model, log, "third")
    with pytest.raises(ValueError, match='no layer of adapter "default" has a router'):
        set_routing_log(network(), log, "default")


def test_a_copied_model_has_one_empty_log_of_its_own() -> None:
    model = moved(adapted(network()))
    log = RoutingLog()
    set_routing_log(model, log, "default")
    log.open(torch.ones_like(IDS))
    model(input_ids=IDS)
    twin = copy.deepcopy(model)
    (copied,) = {id(layer.routing_log): layer.routing_log for layer in layers_of(twin)}.values()
    assert copied is not None and copied is not log
    assert copied.entries == {} and not copied.is_open
    assert len(log.entries) == len(layers_of(model))


def test_a_disabled_adapter_notes_nothing() -> None:
    model = adapted(network())
    log = RoutingLog()
    set_routing_log(model, log, "default")
    log.open(torch.ones_like(IDS))
    with model.disable_adapter():
        model(input_ids=IDS)
    assert log.entries == {}


def test_statistics_of_counted_tokens() -> None:
    nan = math.nan
    entry = routed(
        [[[1.0, 0.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]], [[0.5, 0.0, 0.5, 0.0], [nan, nan, nan, nan]]],
        [[[1.0, 0.0, 0.0, 0.0], [0.0, 0.5, 0.5, 0.0]], [[0.5, 0.0, 0.5, 0.0], [nan, nan, nan, nan]]],
    )
    totals = RoutingTotals(keep_sequences=True)
    totals.add({"a": entry}, torch.tensor([[1, 1], [1, 0]]))
    found = totals.statistics()["a"]
    assert found.tokens == 3
    assert math.isclose(found.entropy, (0 + math.log(4) + math.log(2)) / 3, rel_tol=1e-12)
    assert found.relative_entropy is not None
    assert math.isclose(found.relative_entropy, (0 + 1 + 0.5) / 3, rel_tol=1e-12)
    assert found.load == (1.5 / 3, 0.5 / 3, 1.0 / 3, 0.0)
    assert found.chosen == (2 / 3, 1 / 3, 2 / 3, 0.0)
    assert found.first == (1.0, 0.0, 0.0, 0.0)  # among equals the first
    assert math.isclose(found.top2_mass, (1 + 0.5 + 1) / 3, rel_tol=1e-12)
    np.testing.assert_allclose(
        totals.sequence_probabilities()["a"], [[0.625, 0.125, 0.125, 0.125], [0.5, 0, 0.5, 0]], rtol=1e-12
    )


def test_one_expert_has_no_relative_entropy() -> None:
    totals = RoutingTotals(keep_sequences=False)
    totals.add({"a": routed([[[1.0], [1.0]]])}, torch.ones(1, 2))
    found = totals.statistics()["a"]
    assert (found.entropy, found.relative_entropy, found.top2_mass) == (0.0, None, 1.0)
    assert totals.sequence_probabilities() == {}


def test_many_batches_equal_one_large_batch() -> None:
    entry = random_entry(6, 5, 4, seed=0)
    mask = torch.rand(6, 5, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[:, 0] = True
    whole, parts = RoutingTotals(keep_sequences=True), RoutingTotals(keep_sequences=True)
    whole.add({"a": entry}, mask)
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        parts.add({"a": Routed(entry.probabilities[rows], entry.weights[rows])}, mask[rows])
    one, other = whole.statistics()["a"], parts.statistics()["a"]
    assert one.tokens == other.tokens == int(mask.sum())
    for key in ("entropy", "relative_entropy", "load", "chosen", "first", "top2_mass"):
        np.testing.assert_allclose(getattr(one, key), getattr(other, key), rtol=1e-12)
    assert math.isclose(sum(one.load), 1, rel_tol=1e-6)
    assert math.isclose(sum(one.chosen), 2, rel_tol=1e-12)
    assert math.isclose(sum(one.first), 1, rel_tol=1e-12)
    np.testing.assert_array_equal(whole.sequence_probabilities()["a"], parts.sequence_probabilities()["a"])


def test_a_sequence_of_padding_has_no_mean() -> None:
    mask = torch.tensor([[1, 1], [0, 0]])
    totals = RoutingTotals(keep_sequences=True)
    with pytest.raises(ValueError, match="without a real token"):
        totals.add({"a": random_entry(2, 2, 3, seed=0)}, mask)
    light = RoutingTotals(keep_sequences=False)
    light.add({"a": random_entry(2, 2, 3, seed=0)}, mask)
    assert light.statistics()["a"].tokens == 2
    light = RoutingTotals(keep_sequences=False)
    light.add({"a": random_entry(2, 2, 3, seed=0)}, torch.zeros(2, 2))
    assert light.statistics() == {}


def test_padding_on_either_side_changes_no_statistic() -> None:
    model = moved(adapted(network()))
    rows = []
    for left, right in ((0, 0), (3, 0), (0, 3)):
        ids = torch.cat([IDS.new_zeros(2, left), IDS, IDS.new_zeros(2, right)], dim=1)
        mask = torch.cat([IDS.new_zeros(2, left), torch.ones_like(IDS), IDS.new_zeros(2, right)], dim=1)
        log = RoutingLog()
        set_routing_log(model, log, "default")
        log.open(mask)
        model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
        log.close()
        totals = RoutingTotals(keep_sequences=True)
        assert log.mask is not None
        totals.add(log.entries, log.mask)
        rows.append((totals.statistics(), totals.sequence_probabilities()))
    for statistics, sequences in rows[1:]:
        for name, found in statistics.items():
            expected = rows[0][0][name]
            assert found.tokens == 24
            np.testing.assert_allclose(found.load, expected.load, rtol=1e-9)
            np.testing.assert_allclose(found.entropy, expected.entropy, rtol=1e-9)
            np.testing.assert_allclose(sequences[name], rows[0][1][name], rtol=1e-9)


def between_by_hand(table: np.ndarray[Any, Any], labels: tuple[str, ...]) -> float:
    total = 0.0
    for label in set(labels):
        group = table[[index for index, other in enumerate(labels) if other == label]]
        total += len(group) / len(table) * ((group.mean(axis=0) - table.mean(axis=0)) ** 2).mean()
    return float(total)


def test_specialization_equals_the_exact_permutation_test() -> None:
    table = np.random.default_rng(0).random((7, 4))
    labels = ("x", "y", "x", "x", "z", "y", "x")
    statistic = between_by_hand(table, labels)
    every = [between_by_hand(table, shuffled) for shuffled in itertools.permutations(labels)]
    found = routing_specialization(table, labels, permutations=4000, seed=0)
    assert math.isclose(found.statistic, statistic, rel_tol=1e-12)
    exact = np.mean([value >= statistic * (1 - 1e-9) for value in every])
    # Standard error of a share over 4000 draws is below 0.008; of the mean and the quantile, a few percent.
    assert abs(found.p_value - exact) < 0.03
    assert math.isclose(found.shuffled_mean, float(np.mean(every)), rel_tol=0.05)
    assert math.isclose(found.shuffled_quantile_95, float(np.quantile(every, 0.95)), rel_tol=0.1)


def test_specialization_of_planted_and_of_absent_groups() -> None:
    random = np.random.default_rng(1)
    labels = [index % 3 for index in range(60)]
    planted = np.eye(4)[labels] + 0.01 * random.random((60, 4))
    found = routing_specialization(planted, labels, permutations=200, seed=0)
    assert found.p_value == 1 / 201  # never 0: the data themselves are one arrangement
    assert found.statistic > 5 * found.shuffled_quantile_95
    constant = routing_specialization(np.full((60, 4), 0.25), labels, permutations=50, seed=0)
    assert (constant.statistic, constant.p_value) == (0.0, 1.0)
    p_values = [
        routing_specialization(random.random((12, 3)), labels[:12], permutations=99, seed=seed).p_value
        for seed in range(200)
    ]
    # Uniform where labels mean nothing: 5 % of 200 are 10, standard deviation 3.1.
    assert 1 <= sum(p <= 0.05 for p in p_values) <= 22


def test_labels_that_only_change_names_count_as_the_same_groups() -> None:
    """Three pairs: 6 of the 90 arrangements are the groups themselves, summed up in another order."""
    table = np.repeat(np.random.default_rng(15).random((3, 4)), 2, axis=0)  # rounding differs for this seed
    labels = ["a", "a", "b", "b", "c", "c"]
    found = routing_specialization(table, labels, permutations=3000, seed=0)
    assert abs(found.p_value - 6 / 90) < 0.014  # 3 standard errors


def test_specialization_takes_routers_of_different_sizes_and_follows_its_seed() -> None:
    random = np.random.default_rng(2)
    tables = [random.random((10, 2)), random.random((10, 5))]
    labels = ["a"] * 4 + ["b"] * 6
    found = routing_specialization(tables, labels, permutations=20, seed=3)
    assert found == routing_specialization(np.concatenate(tables, axis=1), labels, permutations=20, seed=3)
    assert found.shuffled_mean != routing_specialization(tables, labels, permutations=20, seed=4).shuffled_mean


@pytest.mark.parametrize(
    ("table", "labels", "permutations", "message"),
    [
        (np.ones((3, 2)), ["a", "b"], 9, r"labels: expected one per sequence \(3\), got 2"),
        (np.ones((2, 2)), ["a", "a"], 9, "labels: expected at least 2 kinds, got 1"),
        (np.ones((2, 2)), ["a", "b"], 0, "permutations: expected >= 1, got 0"),
        (np.full((2, 2), np.nan), ["a", "b"], 9, "loads: not all are finite"),
    ],
)
def test_specialization_refuses(table: Any, labels: list[str], permutations: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        routing_specialization(table, labels, permutations=permutations, seed=0)
