"""Training with auxiliary losses against a loop by hand; what routers do after training, and which tokens are counted.

The losses are stated anew here, from the inputs of the layers and the routers' weights.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from lora_lab.adapters.attach import Attached, attach
from lora_lab.adapters.expert_layer import LoraExpertsLayer
from lora_lab.adapters.routing import Routed, RoutingLog, RoutingTotals, set_routing_log
from lora_lab.app.compose import Composer
from lora_lab.app.planning import cache_folder, make_plan
from lora_lab.app.request import Request
from lora_lab.data.batches import Batch, collate
from lora_lab.data.encode import Encoded
from lora_lab.errors import InputError
from lora_lab.launch.local import run_jobs
from lora_lab.plan.counts import counts_of
from lora_lab.record.layer_log import read_observations
from lora_lab.record.ledger import Ledger
from lora_lab.record.step_log import read_steps
from lora_lab.report.progress import Progress
from lora_lab.schema.trial import Trial
from lora_lab.train.loop import train
from lora_lab.train.member import Member, StepRecord, member_of
from tests.conftest import MakeTrial
from tests.journey.program import Lab
from tests.parity.test_train_loop import CPU
from tests.stepping import take_step
from tests.unit.test_adapters_attach import load

pytestmark = pytest.mark.usefixtures("one_core")

# Method and settings; the name of its loss and the loss's weight.
LOSSES = {
    "mola": (("target=[query,mlp]", "method.experts=[3,4]", "method.balance_weight=0.3"), "load_balancing_loss", 0.3),
    "loramoe mean": (
        ("method.experts=4", "method.beta=0.2", "method.delta=0.4"),
        "localized_balancing_loss",
        0.2,
    ),
    "loramoe squared": (
        ("method.experts=4", "method.beta=0.2", "method.delta=0.4", "method.balance=variance_over_squared_mean"),
        "localized_balancing_loss",
        0.2,
    ),
    "adalora": (("target=[query,mlp]", "method.orthogonality_weight=0.7"), "orthogonality_loss", 0.7),
}


def typed_rows(count: int = 16) -> list[Encoded]:
    """Two clearly different kinds: bytes below 64 that count up by one, and bytes from 128 that count up by three."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for index in range(count):
        length = int(torch.randint(8, 20, (), generator=generator))
        start = int(torch.randint(0, 40, (), generator=generator))
        if index % 2:
            ids, kind = [128 + (start + 3 * place) % 64 for place in range(length)], "knowledge"
        else:
            ids, kind = [start + place for place in range(length)], "task"
        made.append(Encoded(tuple(ids), (False,) * 2 + (True,) * (length - 2), False, kind))
    return made


def trial_of(make_trial: MakeTrial, case: str, *more: str) -> Trial:
    own = ("training.precision=fp64", "optimizer=sgd", "scheduler=constant", "training.max_gradient_norm=null")
    sizes = ("rank=2", "training.batch_size=8", "training.max_steps=4", "learning_rate=0.5")
    return make_trial(f"method={case.split()[0]}", *LOSSES[case][0], *own, *sizes, *more)


def moved(trial: Trial, cache: Path) -> Attached:
    """Attached, and every weight somewhere: with B = 0 a router would hear nothing of the language model."""
    attached = attach(load(trial, cache), trial, steps=4)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for _, parameter in attached.trained:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return attached


def first_step(trial: Trial, attached: Attached, rows: list[Encoded]) -> tuple[Member, StepRecord]:
    member = member_of(trial, attached, rows, name="test")
    return member, take_step(attached.model, member)


@dataclass
class Heard:
    """Inputs of the layers with experts in one forward pass, by name."""

    inputs: dict[str, tuple[Any, Tensor]]

    def probabilities(self) -> list[tuple[str, Any, Tensor]]:
        return [
            (name, layer, (x @ layer.lora_experts_router["default"].T).softmax(-1))
            for name, (layer, x) in self.inputs.items()
        ]


def listen(model: Any) -> tuple[Heard, list[Any]]:
    heard = Heard({})
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, LoraExpertsLayer):

            def hook(layer: Any, inputs: tuple[Tensor, ...], name: str = name) -> None:
                heard.inputs[name] = (layer, inputs[0])

            handles.append(module.register_forward_pre_hook(hook))
    return heard, handles


def loss_by_hand(case: str, model: Any, heard: Heard, batch: Batch) -> Tensor:
    if case == "adalora":
        terms = []
        for key, one in model.named_parameters():
            if "lora_A" in key or "lora_B" in key:
                wide = one if "lora_A" in key else one.T
                terms.append(((wide @ wide.T - torch.eye(len(wide), dtype=one.dtype)) ** 2).sum().sqrt())
        return torch.stack(terms).mean()
    real = batch.attention_mask.bool()
    if case == "mola":
        layers: dict[str, list[Tensor]] = {}
        for name, _, p in heard.probabilities():
            n = p.shape[-1]
            kept = one_hot(p[real].topk(2, -1).indices, n).sum(1).double()
            layers.setdefault(name.split(".layers.")[1][0], []).append(n * (kept.mean(0) / 2 * p[real].mean(0)).sum())
        assert {len(one) for one in layers.values()} == {4}
        return torch.stack([torch.stack(one).mean() for one in layers.values()]).sum()
    total = torch.zeros((), dtype=torch.float64)
    for _, _, p in heard.probabilities():
        z = []
        for row, kind in enumerate(batch.types):
            q = p[row, : batch.lengths[row]].sum(0)
            own = (0, 1) if kind == "task" else (2, 3)  # the first half of the experts is for the first group
            z.append(torch.stack([q[expert] * (1.4 if expert in own else 0.6) for expert in range(4)]))
        table = torch.stack(z)
        over = table.mean() if case == "loramoe mean" else table.mean() ** 2 + 1e-10
        total = total + table.var() / over
    return total


@pytest.mark.parametrize("micro", [8, 4])
@pytest.mark.parametrize("case", LOSSES)
def test_a_step_is_that_of_the_sum_and_reports_the_language_model(
    make_trial: MakeTrial, cache: Path, case: str, micro: int
) -> None:
    """fp64, SGD: w - rate x gradient of (lm + weight x auxiliary), each micro-batch by its share of the loss tokens."""
    trial = trial_of(make_trial, case, f"training.micro_batch_size={micro}")
    attached, (_, name, weight) = moved(trial, cache), LOSSES[case]
    rows = typed_rows()
    member, record = first_step(trial, attached, rows)
    other = moved(trial, cache)
    heard, handles = listen(other.model.train())
    batches = [collate([rows[index] for index in indices], 256, CPU) for indices in member.batches.step(0)]
    assert len(batches) == 8 // micro
    tokens = sum(batch.loss_tokens for batch in batches)
    language, extra = 0.0, 0.0
    for batch in batches:
        found = other.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
        wanted = batch.loss_mask[:, 1:]
        lm = cross_entropy(found[wanted], batch.input_ids[:, 1:][wanted], reduction="sum") / tokens
        auxiliary = loss_by_hand(case, other.model, heard, batch)
        share = batch.loss_tokens / tokens
        (lm + weight * share * auxiliary).backward()
        language, extra = language + lm.item(), extra + share * auxiliary.item()
    for handle in handles:
        handle.remove()
    assert record.loss == pytest.approx(language, rel=1e-12)
    assert dict(record.auxiliary) == {name: pytest.approx(extra, rel=1e-10)}
    assert record.values()[name] == record.auxiliary[name]
    assert record.values()["loss"] == record.loss and "auxiliary" not in record.values()
    norm = torch.stack([one.grad.norm() for _, one in other.trained if one.grad is not None]).norm()
    assert record.gradient_norm == pytest.approx(float(norm), rel=1e-9)
    for (key, one), (_, hand) in zip(attached.trained, other.trained, strict=True):
        assert hand.grad is not None
        torch.testing.assert_close(one, hand - 0.5 * hand.grad, rtol=0, atol=1e-10, msg=key)


@pytest.mark.parametrize("case", LOSSES)
def test_a_weight_of_zero_is_a_training_without(make_trial: MakeTrial, cache: Path, case: str) -> None:
    """The same first loss; then other weights, so another second one."""
    losses = []
    key = {"mola": "balance_weight", "adalora": "orthogonality_weight"}.get(case, "beta")
    for value in (LOSSES[case][2], 0.0):
        trial = trial_of(make_trial, case, f"method.{key}={value}", "training.micro_batch_size=8")
        attached = moved(trial, cache)
        member = member_of(trial, attached, typed_rows(), name="test")
        train(attached.model, [member], pad_id=256, device=CPU, on_step=lambda *_: None)
        losses.append([record.loss for record in member.records])
    assert losses[0][0] == losses[1][0]
    assert losses[0][1] != losses[1][1]


@pytest.mark.parametrize("method", ["mov", "molora", "lora"])
def test_methods_without_a_loss_of_their_own_report_none(make_trial: MakeTrial, cache: Path, method: str) -> None:
    trial = make_trial(f"method={method}", "training.max_steps=4", "training.batch_size=8")
    attached = attach(load(trial, cache), trial, steps=4)
    _, record = first_step(trial, attached, typed_rows())
    assert record.auxiliary == {}
    assert (attached.routing is None) == (method == "lora")


# Routing


def routed(model: Any, rows: list[Encoded]) -> tuple[dict[str, Routed], Batch]:
    log = RoutingLog()
    set_routing_log(model, log, "default")
    batch = collate(rows, 256, CPU)
    log.open(batch.attention_mask)
    with torch.no_grad():
        model.eval()(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    return log.entries, batch


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_exactly_top_k_weights_of_a_token_are_not_zero(
    make_trial: MakeTrial, cache: Path, top_k: int, is_tied: bool
) -> None:
    """All seven routers of both layers, 3 and 5 experts; also where a router gives all experts the same."""
    trial = make_trial("method=mola", "target=all_linear", "method.experts=[3,5]", f"method.top_k={top_k}", "rank=2")
    attached = attach(load(trial, cache), trial, steps=4)
    with torch.no_grad():
        for name, one in attached.trained:
            if is_tied and "router" in name:
                one.zero_()
    entries, _ = routed(attached.model, typed_rows())
    assert len(entries) == 14
    for entry in entries.values():
        assert ((entry.weights > 0).sum(-1) == top_k).all()
        torch.testing.assert_close(entry.weights.sum(-1), torch.ones(entry.weights.shape[:-1]))
    assert sorted({entry.weights.shape[-1] for entry in entries.values()}) == [3, 5]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("method.experts=[2,3]", "method.top_k=3"), "top_k=3 is more than the 2 experts"),
        (("method.experts=[2,2,2]",), "3 entries for a model of 2 layers"),
        (("method.experts=[]",), "at least one entry"),
        (("target=head",), "take head out"),
        (("target=[lm_head]",), "lm_head is in none"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_experts_that_fit_nothing_are_refused(make_trial: MakeTrial, settings: tuple[str, ...], said: str) -> None:
    base = () if any(one.startswith("method.experts") for one in settings) else ("method.experts=[2,2]",)
    with pytest.raises(InputError, match=said):
        counts_of(make_trial("method=mola", *base, *settings))


def own_shares(trial: Trial, cache: Path) -> dict[str, list[float]]:
    """Type -> of each of the six routers the weight, over the type's tokens, of the experts that are for the type."""
    rows = typed_rows(64)
    attached = attach(load(trial, cache), trial)
    member = member_of(trial, attached, rows, name="test")
    train(attached.model, [member], pad_id=256, device=CPU, on_step=lambda *_: None)
    assert member.records[-1].loss < member.records[0].loss - 0.3, "both kinds are learnt"
    entries, batch = routed(attached.model, rows)
    real, found = batch.attention_mask.bool(), {}
    for kind, own in (("task", [0, 1]), ("knowledge", [2, 3])):
        chosen = real & torch.tensor([one == kind for one in batch.types])[:, None]
        found[kind] = [float(entry.weights[chosen].mean(0)[own].sum()) for entry in entries.values()]
    return found


@pytest.mark.parametrize(
    ("delta", "beta", "form"),
    [
        (0.1, 0.1, "variance_over_mean"),  # the paper's values
        (0.5, 1.0, "variance_over_mean"),
        (0.5, 10.0, "variance_over_squared_mean"),
        (0.0, 1.0, "variance_over_mean"),
    ],
)
def test_loramoe_turns_rows_away_from_the_group_of_their_type(
    make_trial: MakeTrial, cache: Path, delta: float, beta: float, form: str
) -> None:
    """Importance x (1 + delta) for the own group is balanced against importance x (1 - delta): after training the own
    group has (1 - delta) / 2 of the weight, of both types and in every router; so routing follows the types, the other
    way round than the paper says."""
    for seed in (0, 1):
        shares = own_shares(loramoe(make_trial, beta, delta, form, seed), cache)
        for kind in ("task", "knowledge"):
            assert shares[kind] == pytest.approx([(1 - delta) / 2] * 6, abs=0.05)
            assert sum(shares[kind]) / 6 == pytest.approx((1 - delta) / 2, abs=0.02)


def test_the_language_model_alone_separates_no_groups(make_trial: MakeTrial, cache: Path) -> None:
    """beta=0: single routers lean to either side, up to 0.1 of the weight; no type prefers a group over routers."""
    for seed in (0, 1):
        shares = own_shares(loramoe(make_trial, 0.0, 0.5, "variance_over_mean", seed), cache)
        for kind in ("task", "knowledge"):
            assert sum(shares[kind]) / 6 == pytest.approx(0.5, abs=0.05)
            assert max(abs(one - 0.5) for one in shares[kind]) == pytest.approx(0.05, abs=0.05)


def loramoe(make_trial: MakeTrial, beta: float, delta: float, form: str, seed: int) -> Trial:
    own = (f"method.beta={beta}", f"method.delta={delta}", f"method.balance={form}", f"seed={seed}")
    steps = ("training.max_steps=60", "training.batch_size=8", "training.micro_batch_size=8", "learning_rate=0.01")
    return make_trial("method=loramoe", "method.experts=4", "rank=4", *own, *steps)


# What is counted


@pytest.mark.parametrize("method", ["mola", "molora", "loramoe", "mov"])
def test_totals_of_a_run_are_its_training_tokens(composer: Composer, tmp_path: Path, method: str) -> None:
    """Not its padding, and not the step that memory is measured on."""
    lab = Lab(tmp_path / "lab", tmp_path / "cache")
    own = ("method.experts=[2,3]",) if method == "mola" else ()
    more = (f"method={method}", *own, "training.max_steps=3", "training.micro_batch_size=2")
    plan = make_plan(Request((composer.compose(lab.tiny(*more)),), None))
    run_jobs(plan.jobs, Ledger(lab.root), plan.lab, cache=cache_folder(plan.lab), watcher=Progress(io.StringIO()))
    record = lab.only()
    steps = read_steps(record.steps_path)
    tokens, padded = (sum(step[key] for step in steps) for key in ("tokens", "padded_tokens"))
    assert (padded > tokens) == (method == "mov"), "rows are padded where they cannot be laid end to end"
    observed = [line["routers"] for line in read_observations(record.layers_path, "routing")]
    assert len(observed) > 1, "each counts an interval of its own"
    assert {sum(routers[name]["tokens"] for routers in observed) for name in observed[0]} == {tokens}
    if method in ("mola", "loramoe"):
        name = "load_balancing_loss" if method == "mola" else "localized_balancing_loss"
        assert all(step[name] > 0 for step in steps)


def test_cleared_totals_are_empty() -> None:
    totals, p = RoutingTotals(keep_sequences=True), torch.full((1, 2, 4), 0.25)
    for _ in range(2):
        totals.add({"router": Routed(p, p)}, torch.ones(1, 2))
        assert totals.statistics()["router"].tokens == 2
        totals.clear()
        assert totals.statistics() == {} and totals.sequence_probabilities() == {}
