"""AdaLoRA against PEFT's own penalty and allocator, the paper's equation 12, and the budget it promises."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.adalora.layer import AdaLoraLayer, RankAllocator
from torch import Tensor

from lora_lab.adapters.adalora import BudgetSchedule, orthogonality_loss
from lora_lab.adapters.attach import Attached, attach
from lora_lab.adapters.save import load_adapter, save_adapter
from lora_lab.app.compose import Composer
from lora_lab.app.planning import make_plan
from lora_lab.app.request import Request
from lora_lab.errors import InputError
from lora_lab.plan.counts import counts_of
from lora_lab.plan.steps import budget_phases, steps_of
from lora_lab.schema.trial import Trial
from lora_lab.train.loop import train
from lora_lab.train.member import Member, member_of
from tests.conftest import MakeTrial
from tests.journey.program import TINY
from tests.parity.test_lora_family import IDS, logits
from tests.parity.test_train_loop import CPU, ragged_rows
from tests.stepping import take_step
from tests.unit.test_adapters_attach import load

pytestmark = pytest.mark.usefixtures("one_core")


def adalora(make_trial: MakeTrial, *more: str, steps: int = 12) -> Trial:
    own = {
        "target": "[query,value,mlp]",
        "rank": "3",
        "alpha": "8",
        "learning_rate": "0.01",
        "method.initial_rank": "5",
        "training.batch_size": "4",
        "training.micro_batch_size": "4",
        "training.max_steps": str(steps),
    }
    given = {one.partition("=")[0] for one in more}
    return make_trial("method=adalora", *more, *(f"{key}={value}" for key, value in own.items() if key not in given))


def started(trial: Trial, cache: Path) -> tuple[Attached, Member]:
    plan = steps_of(trial, 24)
    assert plan is not None
    attached = attach(load(trial, cache), trial, steps=plan.steps)
    return attached, member_of(trial, attached, ragged_rows(), name="test")


def trained(trial: Trial, cache: Path) -> tuple[Any, Member]:
    attached, member = started(trial, cache)
    train(attached.model, [member], pad_id=256, device=CPU, on_step=lambda *_: None)
    assert member.diverged is None and member.step == trial.training.max_steps
    return attached.model, member


def values(model: Any) -> dict[str, Tensor]:
    """Name of E -> its entries."""
    return {key: one.detach().clone() for key, one in model.named_parameters() if "lora_E.default" in key}


def kept(model: Any) -> int:
    return sum(int((one != 0).sum()) for one in values(model).values())


def masks(model: Any) -> dict[str, list[bool]]:
    found: dict[str, list[bool]] = model.peft_config["default"].rank_pattern
    return found


# The penalty


@pytest.mark.parametrize("weight", [0.0, 0.5, 3.0])
def test_the_penalty_is_pefts(make_trial: MakeTrial, cache: Path, weight: float) -> None:
    """PEFT adds it to the loss when it is given labels: the difference to the language model's own, and gradients."""
    trial = adalora(make_trial, f"method.orthogonality_weight={weight}")
    attached, _ = started(trial, cache)
    model = attached.model
    labelled = model(input_ids=IDS, labels=IDS).loss
    plain = model.base_model.model(input_ids=IDS, labels=IDS).loss
    ours = orthogonality_loss(model, "default")
    assert float(ours) > 1
    torch.testing.assert_close(labelled - plain, weight * ours, rtol=1e-5, atol=1e-6)
    trained_ones = [one for _, one in attached.trained]
    theirs = torch.autograd.grad(labelled - plain, trained_ones, allow_unused=True)
    own = torch.autograd.grad(weight * ours, trained_ones, allow_unused=True)
    for parameter, *pair in zip(trained_ones, theirs, own, strict=True):
        one, other = (torch.zeros_like(parameter) if gradient is None else gradient for gradient in pair)
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_penalty_is_zero_for_orthogonal_vectors(make_trial: MakeTrial, cache: Path) -> None:
    """Mean over P and Q of ||P^T P - I||_F, by hand on the starting weights; 0 after a QR, with a finite gradient."""
    attached, _ = started(adalora(make_trial), cache)
    norms = []
    with torch.no_grad():
        for key, one in attached.model.named_parameters():
            if "lora_A" in key or "lora_B" in key:
                wide = one if "lora_A" in key else one.T
                norms.append(float(((wide @ wide.T - torch.eye(5)) ** 2).sum().sqrt()))
    assert float(orthogonality_loss(attached.model, "default")) == pytest.approx(sum(norms) / len(norms), rel=1e-5)
    with torch.no_grad():
        for key, one in attached.model.named_parameters():
            if "lora_A" in key or "lora_B" in key:
                tall = one.T if "lora_A" in key else one
                q = torch.linalg.qr(tall)[0]
                one.copy_(q.T if "lora_A" in key else q)
    loss = orthogonality_loss(attached.model, "default")
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss) == pytest.approx(0, abs=1e-5)
    assert all(one.grad is None or one.grad.isfinite().all() for _, one in attached.trained)


# The budget


@pytest.mark.parametrize("interval", [1, 2, 5, 100])
@pytest.mark.parametrize("steps", [3, 7, 12, 30])
def test_the_final_budget_is_the_target(make_trial: MakeTrial, cache: Path, steps: int, interval: int) -> None:
    """10 matrices of mean rank 3, whatever the length, and also where no allocation falls between the phases."""
    model, _ = trained(adalora(make_trial, f"method.interval={interval}", steps=steps), cache)
    assert sum(sum(mask) for mask in masks(model).values()) == 10 * 3
    assert kept(model) == 10 * 3


@pytest.mark.parametrize("shares", [(0.0, 0.0), (0.0, 0.5), (0.6, 0.0), (0.45, 0.4)])
def test_the_final_budget_with_phases_at_their_ends(
    make_trial: MakeTrial, cache: Path, shares: tuple[float, float]
) -> None:
    initial, final = shares
    trial = adalora(make_trial, f"method.initial_share={initial}", f"method.final_share={final}")
    assert kept(trained(trial, cache)[0]) == 10 * 3


def test_the_budget_while_it_shrinks_is_equation_12(make_trial: MakeTrial, cache: Path) -> None:
    """b(t) = b0 until t_i; bT + (b0 - bT) (1 - (t - t_i) / (T - t_i - t_f))^3, every 3 steps; bT from T - t_f on."""
    trial = adalora(make_trial, "method.interval=3", "method.initial_share=0.2", "method.final_share=0.25", steps=20)
    attached, member = started(trial, cache)
    seen = []

    def on_step(member: Member, record: Any) -> None:
        seen.append(kept(attached.model))

    train(attached.model, [member], pad_id=256, device=CPU, on_step=on_step)
    for step in range(1, 21):
        curve = 30 + 20 * (1 - (step - 4) / 11) ** 3
        if step <= 4:
            assert seen[step - 1] == 50
        elif step >= 15:
            assert seen[step - 1] == 30
        elif step % 3 == 0:
            assert seen[step - 1] == int(curve), step


def test_ties_are_counted_out(make_trial: MakeTrial, cache: Path) -> None:
    """Where all scores are equal PEFT prunes everything at or below the threshold: all. Here the budget stays."""
    attached, _ = started(adalora(make_trial), cache)
    model = attached.model
    inner, config = model.base_model.model, model.peft_config["default"]
    with torch.no_grad():
        for key, one in model.named_parameters():
            if "lora_E" in key:
                one.fill_(1.0)
    theirs = RankAllocator(inner, config, "default")
    ours = model.base_model.rankallocator
    assert type(ours) is not RankAllocator
    for allocator in (theirs, ours):
        for key, one in inner.named_parameters():
            if "lora_" in key:
                allocator.exp_avg_ipt[key] = torch.zeros_like(one)
                allocator.exp_avg_unc[key] = torch.zeros_like(one)
    other = copy.deepcopy(inner)
    assert sum(map(sum, theirs.mask_to_budget(other, 30).values())) == 0, "PEFT's own goes below its target"
    pattern = ours.mask_to_budget(inner, 30)
    assert sum(map(sum, pattern.values())) == 30 == kept(model)
    assert list(pattern.values()) == [[True] * 5] * 6 + [[False] * 5] * 4, "by order"


def test_a_rate_of_zero_prunes_to_the_target_all_the_same(make_trial: MakeTrial, cache: Path) -> None:
    """In a warm-up nothing moves, every score is 0: a tie of all entries."""
    trial = adalora(make_trial, "method.initial_share=0", "scheduler.warmup_steps=8", "training.max_steps=12")
    attached, member = started(trial, cache)
    take: list[int] = []

    def on_step(member: Member, record: Any) -> None:
        take.append(sum(map(sum, masks(attached.model).values())))

    train(attached.model, [member], pad_id=256, device=CPU, on_step=on_step)
    assert take[0] == int(30 + 20 * (1 - 1 / 8) ** 3)
    assert take[-1] == kept(attached.model) == 30


def test_without_ties_the_masks_are_pefts(make_trial: MakeTrial, cache: Path) -> None:
    """Both allocators hear of the same weights and gradients, step by step, and prune copies of the same model."""
    trial = adalora(make_trial, "method.initial_share=0.2", steps=12)
    attached, member = started(trial, cache)
    model = attached.model
    inner = model.base_model.model
    theirs = RankAllocator(inner, model.peft_config["default"], "default")
    compared = []
    ours = model.base_model.rankallocator
    original = ours.mask_to_budget

    def both(found: Any, budget: int) -> dict[str, list[bool]]:
        flat = torch.cat([ours._triplet_scores(key) for key, _ in found.named_parameters() if "lora_E" in key])
        before = {key: one.detach().clone() for key, one in found.named_parameters() if "lora_E" in key}
        expected = theirs.mask_to_budget(found, budget)
        pruned = {key: one.detach().clone() for key, one in found.named_parameters() if "lora_E" in key}
        with torch.no_grad():
            for key, one in found.named_parameters():
                if key in before:
                    one.copy_(before[key])
        own: dict[str, list[bool]] = original(found, budget)
        if len(flat.unique()) == len(flat):
            assert own == expected
            assert all(torch.equal(one, pruned[key]) for key, one in found.named_parameters() if key in pruned)
            compared.append(budget)
        return own

    update = ours.update_ipt

    def hear(found: Any) -> None:
        update(found)
        theirs.update_ipt(found)

    ours.mask_to_budget, ours.update_ipt = both, hear
    train(model, [member], pad_id=256, device=CPU, on_step=lambda *_: None)
    assert len(compared) >= 4 and compared[-1] == 30


def test_what_is_pruned_at_last_stays_zero(make_trial: MakeTrial, cache: Path) -> None:
    """Momentum and weight decay go on with it; after every step of the last phase it is 0 again."""
    trial = adalora(make_trial, "method.final_share=0.5", "optimizer.weight_decay=0.1", steps=12)
    attached, member = started(trial, cache)
    seen: list[dict[str, Tensor]] = []
    train(attached.model, [member], pad_id=256, device=CPU, on_step=lambda *_: seen.append(values(attached.model)))
    last = masks(attached.model)
    for state in seen[5:]:
        for key, one in state.items():
            mask = torch.tensor(last[key.removeprefix("base_model.model.")])
            assert torch.equal(one[:, 0] != 0, mask)
    assert any(not torch.equal(seen[6][key], one) for key, one in seen[-1].items()), "the others are trained on"


# Refusals


def test_equal_ranks_prune_nothing(make_trial: MakeTrial, cache: Path) -> None:
    """PEFT's own allocator fails there: it asks for the 0th smallest score."""
    model, _ = trained(adalora(make_trial, "method.initial_rank=3"), cache)
    assert kept(model) == 30
    assert all(all(mask) for mask in masks(model).values())


def test_a_start_below_the_target_is_refused(make_trial: MakeTrial) -> None:
    with pytest.raises(InputError) as caught:
        adalora(make_trial, "rank=6")
    assert [str(one) for one in caught.value.problems] == [
        "method.initial_rank: must be >= 6, the rank at the end (rank), got 5"
    ]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("method.initial_rank=65",), "method.initial_rank: must be <= 64"),
        (("target=embedding",), "embed_tokens is an embedding"),
    ],
)
def test_what_fits_no_model_is_refused_in_the_plan(make_trial: MakeTrial, more: tuple[str, ...], said: str) -> None:
    with pytest.raises(InputError, match=said):
        counts_of(adalora(make_trial, *more))


@pytest.mark.parametrize(
    ("steps", "more"),
    [
        (1, ()),
        (2, ()),
        (5, ("method.initial_share=0.5", "method.final_share=0.45")),
        (2, ("method.initial_share=0", "method.final_share=0.5")),  # importance is not known before the first step
    ],
)
def test_too_few_steps_are_refused_in_the_plan(
    composer: Composer, make_trial: MakeTrial, cache: Path, tmp_path: Path, steps: int, more: tuple[str, ...]
) -> None:
    values = {**TINY, "training.max_steps": str(steps), "root": f"'{tmp_path / 'lab'}'", "cache": f"'{tmp_path}'"}
    lines = ["method=adalora", *more, *(f"{key}={value}" for key, value in values.items())]
    with pytest.raises(InputError, match=f"adalora with {steps} steps: .* train for more steps"):
        make_plan(Request((composer.compose(lines),), None))
    trial = adalora(make_trial, *more, steps=steps)
    with pytest.raises(InputError, match=f"adalora with {steps} steps"):
        attach(load(trial, cache), trial, steps=steps)


@pytest.mark.parametrize(("initial", "final"), [(0.0, 0.0), (0.1, 0.3), (0.5, 0.45), (0.0, 0.9), (0.34, 0.33)])
def test_every_length_is_refused_or_ends_at_the_target(
    make_trial: MakeTrial, cache: Path, initial: float, final: float
) -> None:
    """No length between falls into PEFT's own errors; the pruning itself, on weights that do not move."""
    refused = []
    for steps in range(1, 26):
        trial = adalora(
            make_trial, f"method.initial_share={initial}", f"method.final_share={final}", "target=[query]", steps=steps
        )
        method: Any = trial.method
        try:
            first, last = budget_phases(method, steps)
        except InputError:
            refused.append(steps)
            continue
        assert (first, last) == (math.ceil(initial * steps), math.ceil(final * steps))
        attached, _ = started(trial, cache)
        assert isinstance(attached.course, BudgetSchedule)
        for _, one in attached.trained:
            one.grad = torch.ones_like(one)
        for step in range(steps):
            attached.course.after_step(step)
        assert sum(map(sum, masks(attached.model).values())) == 2 * 3
    assert 1 in refused and len(refused) < 25


# Files, accumulation, precision


@pytest.mark.parametrize("more", [(), ("training.precision=bf16",), ("quantization=nf4",)], ids=" ".join)
def test_saved_after_pruning_it_is_the_same_model(
    make_trial: MakeTrial, cache: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    """By the lab and by plain PEFT, whose name for the adapter must be no part of a layer's."""
    trial = adalora(make_trial, *more)
    model, _ = trained(trial, cache)
    expected = logits(model)
    assert (logits(load(trial, cache)) - expected).abs().max() > 0.01
    save_adapter(model, tmp_path / "saved")
    assert kept(model) == 30, "saving prunes nothing"
    torch.testing.assert_close(
        logits(load_adapter(load(trial, cache), tmp_path / "saved")), expected, rtol=0, atol=1e-5
    )
    plain = PeftModel.from_pretrained(load(trial, cache), str(tmp_path / "saved"))
    torch.testing.assert_close(logits(plain), expected, rtol=0, atol=1e-5)


def test_micro_batches_make_no_difference(make_trial: MakeTrial, cache: Path) -> None:
    """fp64: losses, penalties, masks and weights of 4 micro-batches are those of one batch."""
    runs = []
    for size in (4, 2, 1):
        model, member = trained(
            adalora(make_trial, f"training.micro_batch_size={size}", "training.precision=fp64"), cache
        )
        runs.append((member, dict(model.named_parameters()), masks(model)))
    for one, other in itertools.pairwise(runs):
        assert one[2] == other[2]
        for mine, theirs in zip(one[0].records, other[0].records, strict=True):
            assert mine.loss == pytest.approx(theirs.loss, rel=1e-10)
            assert mine.auxiliary == pytest.approx(theirs.auxiliary, rel=1e-10)
        for key, parameter in one[1].items():
            torch.testing.assert_close(parameter, other[1][key], rtol=0, atol=1e-9)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_rank_numbers_stay_frozen(make_trial: MakeTrial, cache: Path, precision: str) -> None:
    """PEFT makes them trainable where it casts the adapter on a bf16 base: weight decay would change the scaling."""
    trial = adalora(make_trial, f"training.precision={precision}", "optimizer.weight_decay=0.1")
    attached, member = started(trial, cache)
    assert not any("ranknum" in name for name, _ in attached.trained)
    for _ in range(3):
        take_step_of(attached, member)
    numbers = [one for key, one in attached.model.named_parameters() if "ranknum" in key]
    assert len(numbers) == 10 and all(float(one) == 5 and not one.requires_grad for one in numbers)
    layers = [one for one in attached.model.modules() if isinstance(one, AdaLoraLayer)]
    assert {one.scaling["default"] for one in layers} == {8}


def take_step_of(attached: Attached, member: Member) -> None:
    take_step(attached.model, member)
