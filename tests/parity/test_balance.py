"""Balancing losses against MoLA's and LoRAMoE's published formulas, numeric gradients and their known minima."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lora_lab.adapters.balance import (
    KNOWLEDGE,
    OTHER_TASKS,
    BalanceForm,
    expert_distances,
    expert_types,
    load_balancing_loss,
    localized_balancing,
    localized_balancing_loss,
    routing_importance,
)
from lora_lab.adapters.expert_layer import route
from lora_lab.adapters.routing import Routed, RoutingLog, set_routing_log
from tests.parity.test_lora_experts import IDS, adapted, moved, network, single_layer

FORMS: list[BalanceForm] = ["variance_over_mean", "variance_over_squared_mean"]


def entry_of(logits: torch.Tensor, top_k: int | None) -> Routed:
    experts = torch.eye(logits.shape[-1], dtype=logits.dtype)
    return Routed(*route(logits, experts, top_k))


def logits(*shape: int, seed: int = 0, requires_grad: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_(requires_grad)


def released_mola_loss(gate_logits: list[torch.Tensor], experts: list[int], top_k: int) -> torch.Tensor:
    """MoLA's load_balancing_loss_func, per layer: logits [tokens, experts], padding included."""
    total = torch.zeros((), dtype=torch.float64)
    for layer, n in zip(gate_logits, experts, strict=True):
        p = F.softmax(layer, dim=-1)
        counts = F.one_hot(p.topk(top_k, dim=-1).indices.reshape(-1), n).sum(dim=-2)
        total = total + ((counts.double() / counts.sum()) * p.mean(dim=0)).sum() * n
    return total


@pytest.mark.parametrize("top_k", [1, 2])
def test_load_balancing_equals_molas_code_with_one_router_per_layer(top_k: int) -> None:
    scores = [logits(3, 7, n, seed=n, requires_grad=True) for n in (2, 4, 6)]
    entries = {f"model.layers.{i}.mlp.up_proj": entry_of(x, top_k) for i, x in enumerate(scores)}
    found = load_balancing_loss(entries, torch.ones(3, 7))
    expected = released_mola_loss([x.flatten(0, 1) for x in scores], [2, 4, 6], top_k)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    pairs = zip(torch.autograd.grad(found, scores), torch.autograd.grad(expected, scores), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


def test_routers_of_one_layer_are_balanced_one_by_one_and_averaged() -> None:
    """Two routers with opposite preferences: MoLA's pooled tokens look balanced, each router is not."""
    one_sided = torch.tensor([4.0, 0.0, 0.0, 0.0], dtype=torch.float64).expand(2, 5, 4)
    entries = {
        "model.layers.0.self_attn.q_proj": entry_of(one_sided, 1),
        "model.layers.0.self_attn.k_proj": entry_of(one_sided.flip(-1), 1),
        "model.layers.11.mlp.up_proj": entry_of(one_sided, 1),
        "lm_head": entry_of(one_sided, 1),
    }
    each = 4 * float(one_sided[0, 0].softmax(-1)[0])
    found = load_balancing_loss(entries, torch.ones(2, 5))
    torch.testing.assert_close(found, torch.tensor(3 * each, dtype=torch.float64))
    pooled = released_mola_loss([torch.cat([one_sided, one_sided.flip(-1)]).flatten(0, 1)], [4], 1)
    assert pooled < 0.6 * each


def test_load_balancing_of_uniform_routing_is_the_number_of_layers() -> None:
    uniform = Routed(torch.full((2, 4, 4), 0.25), torch.eye(4).roll(1, 1).expand(2, 4, 4) / 2 + torch.eye(4) / 2)
    entries = {f"model.layers.{layer}.{part}": uniform for layer in range(3) for part in ("q", "k", "v")}
    torch.testing.assert_close(load_balancing_loss(entries, torch.ones(2, 4)), torch.tensor(3.0))


def test_balance_counts_real_tokens_only() -> None:
    scores = logits(3, 7, 4)
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [0] * 5 + [1] * 2])
    whole = entry_of(scores, 2)
    spoiled = Routed(*(x.masked_fill(mask[..., None] == 0, torch.nan) for x in (whole.probabilities, whole.weights)))
    kept = scores[mask.bool()]
    expected = released_mola_loss([kept], [4], 2)
    torch.testing.assert_close(load_balancing_loss({"a": spoiled}, mask), expected)
    torch.testing.assert_close(load_balancing_loss({"a": whole}, mask), expected)
    importance = routing_importance(spoiled, mask)
    assert importance.shape == (4, 3)
    for sample in range(3):
        by_hand = whole.weights[sample][mask[sample].bool()].sum(0)
        torch.testing.assert_close(importance[:, sample], by_hand)
    assert not load_balancing_loss({"a": whole}, torch.zeros(3, 7)).any()


def test_the_gradient_of_load_balancing_is_numeric_and_zero_where_all_experts_are_kept() -> None:
    scores = logits(2, 5, 4, requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
    assert torch.autograd.gradcheck(lambda x: load_balancing_loss({"a": entry_of(x, 2)}, mask), (scores,))
    (gradient,) = torch.autograd.grad(load_balancing_loss({"a": entry_of(scores, 2)}, mask), scores)
    assert gradient[mask.bool()].any() and not gradient[~mask.bool()].any()
    (gradient,) = torch.autograd.grad(load_balancing_loss({"a": entry_of(scores, 4)}, mask), scores)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-15, rtol=0)


def test_load_balancing_trains_a_collapsed_router_to_even_loads() -> None:
    x = logits(64, 1, 6, seed=1)
    router = torch.zeros(4, 6, dtype=torch.float64)
    router[0] = 0.2 * x.mean((0, 1))
    bias = torch.tensor([1.0, 0.5, 0.0, 0.0], dtype=torch.float64, requires_grad=True)
    loads = []
    optimizer = torch.optim.SGD([bias], lr=0.5)
    for _ in range(200):
        entry = entry_of(x @ router.T + bias, 1)
        loads.append(entry.weights.mean((0, 1)).detach())
        optimizer.zero_grad()
        load_balancing_loss({"a": entry}, torch.ones(64, 1)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert loads[0].max() > 0.9
    assert torch.stack(loads[-50:]).mean(0).max() < 0.4


def by_hand(q: np.ndarray[Any, Any], experts: list[int], samples: list[int], delta: float, form: str) -> float:
    z = [
        q[n, m] * (1 + delta if experts[n] == samples[m] else 1 - delta)
        for n, m in itertools.product(range(len(experts)), range(len(samples)))
    ]
    mean = sum(z) / len(z)
    variance = sum((value - mean) ** 2 for value in z) / (len(z) - 1)
    return variance / mean if form == "variance_over_mean" else variance / (mean**2 + 1e-10)


@pytest.mark.parametrize("delta", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("form", FORMS)
def test_localized_balancing_equals_the_published_forms(form: BalanceForm, delta: float) -> None:
    q = logits(6, 5).abs()
    experts, samples = [1, 1, 1, 0, 0, 0], [0, 1, 1, 0, 1]
    found = localized_balancing_loss(q, torch.tensor(experts), torch.tensor(samples), delta=delta, form=form)
    assert float(found) == pytest.approx(by_hand(q.numpy(), experts, samples, delta, form), rel=1e-12)


def test_localized_balancing_equals_the_released_code() -> None:
    """LoRAMoE's code on one layer: [samples, experts], the first half raised for type 1, the second for type 0."""
    scores, types, delta = logits(5, 7, 6), torch.tensor([0, 1, 1, 0, 1]), 0.1
    entry = entry_of(scores, None)
    column = types.view(-1, 1)
    raised = torch.cat([(column == 1).repeat(1, 3), (column == 0).repeat(1, 3)], dim=-1)
    z = (entry.weights.sum(dim=1) * (1 - delta + 2 * delta * raised.double())).flatten()
    expected = z.var() / (z.mean() ** 2 + 1e-10)
    entries = {"a": entry, "b": entry}
    found = localized_balancing(entries, torch.ones(5, 7), types, delta=delta, form="variance_over_squared_mean")
    torch.testing.assert_close(found, 2 * expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_the_gradient_of_localized_balancing_is_numeric(form: BalanceForm) -> None:
    scores = logits(3, 5, 4, requires_grad=True)
    mask = torch.tensor([[1] * 5, [1] * 3 + [0] * 2, [0] * 4 + [1]])
    types = torch.tensor([0, 1, 1])

    def loss(x: torch.Tensor) -> torch.Tensor:
        return localized_balancing({"a": entry_of(x, None)}, mask, types, delta=0.3, form=form)

    assert torch.autograd.gradcheck(loss, (scores,))
    (gradient,) = torch.autograd.grad(loss(scores), scores)
    step = 1e-6
    for place in [(0, 0, 0), (1, 2, 3), (2, 4, 1), (2, 0, 1)]:
        shift = torch.zeros_like(scores)
        shift[place] = step
        numeric = (loss(scores + shift) - loss(scores - shift)) / (2 * step)
        torch.testing.assert_close(gradient[place], numeric, atol=1e-8, rtol=1e-6)
    assert gradient[0, 0].any() and not gradient[2, 0].any()


@pytest.mark.parametrize("form", FORMS)
def test_localized_balancing_falls_with_the_variance_inside_groups(form: BalanceForm) -> None:
    """At fixed totals of the groups."""
    types = {"expert_types": expert_types(4), "sample_types": torch.tensor([1, 0])}
    losses = []
    for spread in (0.0, 0.1, 0.2):
        q = torch.tensor([[0.3 + spread, 0.2], [0.3 - spread, 0.2], [0.2, 0.3], [0.2, 0.3]], dtype=torch.float64)
        losses.append(float(localized_balancing_loss(q, **types, delta=0.1, form=form)))
    assert losses[0] < losses[1] < losses[2]


@pytest.mark.parametrize("form", FORMS)
def test_the_constraint_alone_sends_samples_to_the_other_group(form: BalanceForm) -> None:
    """Its minimum has all of Z equal: (1 - delta) / 2 of a sample's weight stays in the group of its own type."""
    delta = 0.2
    types = torch.tensor([OTHER_TASKS, KNOWLEDGE, KNOWLEDGE, OTHER_TASKS])
    scores = logits(4, 1, 4, requires_grad=True)
    optimizer = torch.optim.LBFGS([scores], max_iter=200, tolerance_grad=1e-14, tolerance_change=1e-16)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = localized_balancing({"a": entry_of(scores, None)}, torch.ones(4, 1), types, delta=delta, form=form)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    assert closure().item() < 1e-10
    own = [entry_of(scores, None).weights[sample, 0, expert_types(4) == types[sample]].sum() for sample in range(4)]
    torch.testing.assert_close(
        torch.stack(own), torch.full((4,), (1 - delta) / 2, dtype=torch.float64), atol=1e-4, rtol=0
    )


def test_the_first_half_of_the_experts_is_for_other_tasks() -> None:
    assert expert_types(6).tolist() == [OTHER_TASKS] * 3 + [KNOWLEDGE] * 3 == [1, 1, 1, 0, 0, 0]
    for odd in (0, 1, 5):
        with pytest.raises(ValueError, match=f"num_experts: expected an even number.*got {odd}"):
            expert_types(odd)


def test_localized_balancing_of_one_number_is_zero() -> None:
    q = torch.ones(1, 1, requires_grad=True)
    loss = localized_balancing_loss(q, torch.tensor([1]), torch.tensor([1]), delta=0.1, form="variance_over_mean")
    assert loss.item() == 0
    loss.backward()  # type: ignore[no-untyped-call]
    assert q.grad is not None and not q.grad.any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"delta": -0.1}, "delta: expected 0 <= delta <= 1, got -0.1"),
        ({"delta": 1.1}, "delta: expected 0 <= delta <= 1, got 1.1"),
        ({"form": "variance"}, "form: expected one of variance_over_mean, variance_over_squared_mean, got 'variance'"),
        ({"sample_types": torch.tensor([0])}, r"importance: expected 4 experts x 1 samples, got shape \(4, 2\)"),
    ],
)
def test_localized_balancing_refuses(changes: dict[str, Any], message: str) -> None:
    values = {"sample_types": torch.tensor([0, 1]), "delta": 0.1, "form": "variance_over_mean"} | changes
    with pytest.raises(ValueError, match=message):
        localized_balancing_loss(torch.ones(4, 2), expert_types(4), **values)


def test_losses_train_the_routers_of_a_model_and_nothing_above_them() -> None:
    model = moved(adapted(network(), top_k=2))
    log = RoutingLog()
    set_routing_log(model, log, "default")
    log.open(torch.ones_like(IDS))
    model(input_ids=IDS)
    log.close()
    assert log.mask is not None
    types = torch.tensor([0, 1])
    loss = load_balancing_loss(log.entries, log.mask)
    loss = loss + localized_balancing(log.entries, log.mask, types, delta=0.1, form="variance_over_mean")
    loss.backward()  # type: ignore[no-untyped-call]
    routers = [p for name, p in model.named_parameters() if "router" in name]
    assert all(router.grad.any() for router in routers)
    last = model.get_submodule("base_model.model.model.layers.1.mlp.down_proj")
    assert last.lora_experts_A["default"].grad is None  # behind the last router
    assert last.lora_experts_router["default"].grad.any()


@pytest.mark.parametrize("experts", [2, 5])
def test_expert_distances_equal_those_of_whole_matrices(experts: int) -> None:
    layer: Any = single_layer(num_experts=experts)
    a, b = layer.lora_experts_A["default"], layer.lora_experts_B["default"]
    updates = [5 / 3 * b[i] @ a[i] for i in range(experts)]
    norms = [float((updates[i] - updates[j]).norm()) for i, j in itertools.combinations(range(experts), 2)]
    assert expert_distances(layer, "default") == pytest.approx(sum(norms) / len(norms), rel=1e-12)


def test_equal_experts_are_at_distance_zero_and_one_has_none() -> None:
    layer: Any = single_layer(num_experts=3)
    with torch.no_grad():
        for part in (layer.lora_experts_A["default"], layer.lora_experts_B["default"]):
            part[:] = part[0]
    assert expert_distances(layer, "default") == pytest.approx(0, abs=1e-6)
    assert expert_distances(single_layer(num_experts=1, top_k=1), "default") is None
