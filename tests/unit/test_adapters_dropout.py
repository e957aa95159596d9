"""Dropout whose masks are a function of the run: the right distribution, reproducible, no global state."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch.utils.checkpoint import checkpoint

from lora_lab.adapters.attach import attach
from lora_lab.adapters.dropout import DropoutClock, SeededDropout
from lora_lab.models.load import load_base
from tests.conftest import MakeTrial


def dropout(p: float = 0.25, *, seed: int = 0, step: int = 0, micro_batch: int = 0, index: int = 0) -> SeededDropout:
    return SeededDropout(p, clock=DropoutClock(seed, step, micro_batch), index=index)


def test_mean_and_variance_are_those_of_dropout() -> None:
    n, p = 1_000_000, 0.25
    dropped = dropout(p)(torch.ones(n, dtype=torch.float64))
    assert set(dropped.unique().tolist()) == {0.0, 1 / (1 - p)}
    # Var = p / (1 - p), so the mean's standard error is sqrt(p / (1 - p) / n) = 0.00058; bounds are 5 of those.
    assert abs(dropped.mean().item() - 1) < 0.003
    assert abs(dropped.var().item() - p / (1 - p)) < 0.01


def test_identity_in_eval_mode_and_at_zero() -> None:
    x = torch.randn(4, 4)
    assert dropout().eval()(x) is x
    assert dropout(0.0)(x) is x


@pytest.mark.parametrize("p", [-0.1, 1.0])
def test_other_probabilities_are_refused(p: float) -> None:
    with pytest.raises(ValueError, match="p"):
        dropout(p)


@pytest.mark.parametrize("change", [{"seed": 1}, {"step": 1}, {"micro_batch": 1}, {"index": 1}])
def test_the_mask_follows_from_the_run_alone(change: dict[str, int]) -> None:
    x = torch.ones(1000)
    before = torch.get_rng_state()
    mask = dropout()(x)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    assert torch.equal(dropout()(x), mask)
    other = dropout(**change)(x)
    assert abs((other == mask).double().mean().item() - 0.625) < 0.1  # p^2 + (1 - p)^2: independent masks


def test_recomputation_draws_the_same_mask() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(16, 16), dropout(0.5), torch.nn.Linear(16, 16)).double()
    x = torch.randn(8, 16, dtype=torch.float64, requires_grad=True)
    (plain,) = torch.autograd.grad(layer(x).square().sum(), x)
    (recomputed,) = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).square().sum(), x)
    assert torch.equal(plain, recomputed)
    assert (plain != 0).any()


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_gradients_equal_with_and_without_checkpointing(make_trial: MakeTrial, cache: Path, method: str) -> None:
    trial = make_trial("training.precision=fp64", "target=all_linear", "dropout=0.3", f"method={method}")
    gradients = []
    for checkpointing in (False, True):
        base = load_base(trial.model, precision="fp64", quantization=trial.quantization, device="cpu", cache=cache)
        attached = attach(base.model, trial)
        if checkpointing:
            base.model.gradient_checkpointing_enable({"use_reentrant": False})
        model = attached.model.train()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.01)
        logits = model(input_ids=torch.arange(24).reshape(2, 12)).logits
        logits.square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        trained = sum(parameter.requires_grad for parameter in model.parameters())
        assert len(gradients[-1]) == trained > 0
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_every_adapted_layer_has_its_own_index_and_one_clock(make_trial: MakeTrial, cache: Path) -> None:
    trial = make_trial("dropout=0.1", "target=all_linear", "seeds.dropout=5")
    base = load_base(trial.model, precision="fp32", quantization=trial.quantization, device="cpu", cache=cache)
    attached = attach(base.model, trial)
    entries = [module.lora_dropout["default"] for module in attached.model.modules() if isinstance(module, LoraLayer)]
    assert [entry.index for entry in entries] == list(range(14))
    assert all(entry.clock is attached.dropout_clock for entry in entries)
    assert attached.dropout_clock == DropoutClock(seed=5, step=0, micro_batch=0)


def test_moving_the_clock_changes_the_models_output(make_trial: MakeTrial, cache: Path) -> None:
    trial = make_trial("dropout=0.5", "target=all_linear", "method=dora")
    base = load_base(trial.model, precision="fp32", quantization=trial.quantization, device="cpu", cache=cache)
    attached = attach(base.model, trial)
    model, clock = attached.model.train(), attached.dropout_clock
    assert clock is not None
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.05)
    ids = torch.arange(10)[None]
    first = model(input_ids=ids).logits
    clock.step = 1
    second = model(input_ids=ids).logits
    clock.step = 0
    assert torch.equal(model(input_ids=ids).logits, first)
    assert not torch.equal(first, second)
