"""Learning rates by layer and by matrix, against PEFT's LoRA+ groups and against torch with groups made by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.optimizers import create_loraplus_optimizer
from torch import nn

from lora_lab.adapters.attach import Attached, attach
from lora_lab.errors import InputError
from lora_lab.models.random import random_network
from lora_lab.optim.groups import rate_groups
from lora_lab.optim.optimizers import build_optimizer
from lora_lab.schema.trial import Trial
from lora_lab.train.member import optimizer_of
from tests.conftest import MakeTrial
from tests.unit.test_models_random import tiny_shape


def attached_to(trial: Trial, *, depth: int = 4, family: str = "llama") -> Attached:
    return attach(random_network(tiny_shape(family, tied=False).model_copy(update={"num_layers": depth}), 0), trial)


def rates_by_name(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, float]:
    """Every trained parameter in exactly one group, with that group's rate."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [(names[id(one)], group["lr"]) for group in optimizer.param_groups for one in group["params"]]
    assert len(dict(found)) == len(found)
    assert set(dict(found)) == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return dict(found)


@given(
    depth=st.integers(1, 40),
    values=st.lists(st.sampled_from([0.25, 0.5, 1.0, 2.0, 3.0]), min_size=1, max_size=40),
)
@settings(max_examples=60, deadline=None)
def test_rates_are_spread_over_any_depth(make_trial: MakeTrial, depth: int, values: list[float]) -> None:
    """Layer l of L has entry floor(l n / L); what lies in no layer has 1; one group per factor, in order."""
    trial = make_trial("model.shape.num_layers=64", f"training.layer_rates={values}")
    names = ["model.embed_tokens.weight", *(f"model.layers.{n}.mlp.up_proj.lora_A.x.weight" for n in range(depth))]
    named = [(name, nn.Parameter(torch.zeros(1))) for name in [*names, "lm_head.weight"]]
    if len(values) > depth:
        with pytest.raises(InputError, match=rf"training\.layer_rates: {len(values)} entries for a model of {depth}"):
            rate_groups(trial, named, num_layers=depth)
        return
    groups = rate_groups(trial, named, num_layers=depth)
    found = {id(one): group.factor for group in groups for one in group.parameters}
    wanted = [1.0, *(values[(layer * len(values)) // depth] for layer in range(depth)), 1.0]
    assert [found[id(parameter)] for _, parameter in named] == wanted
    assert [group.factor for group in groups] == list(dict.fromkeys(wanted))


def test_without_rates_there_is_one_group(make_trial: MakeTrial) -> None:
    attached = attached_to(make_trial())
    groups = rate_groups(make_trial(), attached.trained, num_layers=4)
    assert [group.factor for group in groups] == [1.0]
    assert [id(one) for one in groups[0].parameters] == [id(one) for _, one in attached.trained]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_equal_parts_of_a_real_models_layers(make_trial: MakeTrial, family: str) -> None:
    target = "target=attention" if family == "gpt2" else "target=all_linear_head"
    trial = make_trial("training.layer_rates=[0.5,2.0]", target, "learning_rate=0.01")
    attached = attached_to(trial, family=family)
    rates = rates_by_name(optimizer_of(trial, attached, attached.trained), attached.model)
    for name, rate in rates.items():
        steps = name.split(".")
        layer = next((int(step) for step in steps if step.isdigit()), None)
        assert rate == pytest.approx(0.01 * (1.0 if layer is None else 0.5 if layer < 2 else 2.0))
    assert len(set(rates.values())) == (2 if family == "gpt2" else 3)


@pytest.mark.parametrize("ratio", [1, 4, 16])
@pytest.mark.parametrize("target", ["target=qv", "target=all_linear", "target=all_linear_head"])
def test_lora_plus_groups_equal_pefts(make_trial: MakeTrial, ratio: int, target: str) -> None:
    trial = make_trial("method=lora_plus", f"method.ratio={ratio}", target, "learning_rate=0.003")
    attached = attached_to(trial)
    ours = rates_by_name(optimizer_of(trial, attached, attached.trained), attached.model)
    reference = create_loraplus_optimizer(
        attached.model, torch.optim.AdamW, lr=trial.learning_rate, loraplus_lr_ratio=ratio
    )
    theirs = rates_by_name(reference, attached.model)
    assert ours == pytest.approx(theirs)
    assert len(set(ours.values())) == (1 if ratio == 1 else 2)


def test_of_an_embedding_b_is_a_b_as_any_other(make_trial: MakeTrial) -> None:
    """Where we differ from the authors, who give an adapter on an embedding a rate of its own."""
    trial = make_trial("method=lora_plus", "method.ratio=8", "target=[qv,embedding]", "learning_rate=0.01")
    attached = attached_to(trial)
    rates = rates_by_name(optimizer_of(trial, attached, attached.trained), attached.model)
    embedding = {name.split("lora_embedding_")[1][0]: rate for name, rate in rates.items() if "lora_embedding" in name}
    assert embedding == pytest.approx({"A": 0.01, "B": 0.08})


def test_only_lora_plus_tells_b_from_a(make_trial: MakeTrial) -> None:
    attached = attached_to(make_trial("method=rslora"))
    assert len(rate_groups(make_trial("method=rslora"), attached.trained, num_layers=4)) == 1


def test_factors_of_layer_and_matrix_multiply(make_trial: MakeTrial) -> None:
    layers = "training.layer_rates=[0.5,1,2,8]"
    trial = make_trial("model.shape.num_layers=4", "method=lora_plus", "method.ratio=4", layers, "learning_rate=0.01")
    attached = attached_to(trial)
    rates = rates_by_name(optimizer_of(trial, attached, attached.trained), attached.model)
    for name, rate in rates.items():
        layer = int(name.split("layers.")[1].split(".")[0])
        assert rate == pytest.approx(0.01 * (0.5, 1, 2, 8)[layer] * (4 if "lora_B" in name else 1))
    # 0.5 x 4 = 2, 2 x 4 = 8: equal factors share a group.
    assert len(optimizer_of(trial, attached, attached.trained).param_groups) == 6


OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=9.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=9.0, momentum=0.9, weight_decay=0.1),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_updates_equal_torch_with_groups_made_by_hand(make_trial: MakeTrial, kind: str) -> None:
    trial = make_trial(
        "method=lora_plus", "method.ratio=4", "training.layer_rates=[0.5,2]", "learning_rate=0.01",
        f"optimizer={kind}", "optimizer.weight_decay=0.1",
    )  # fmt: skip
    attached = attached_to(trial)
    twin = copy.deepcopy(attached.model)
    groups = rate_groups(trial, attached.trained, num_layers=4)
    optimizer = build_optimizer(trial.optimizer, groups, learning_rate=trial.learning_rate)

    def by_hand(name: str) -> float:
        layer = int(name.split("layers.")[1].split(".")[0])
        return 0.01 * (0.5 if layer < 2 else 2) * (4 if "lora_B" in name else 1)

    named = [(name, one) for name, one in twin.named_parameters() if one.requires_grad]
    reference = OPTIMIZERS[kind]([{"params": [one], "lr": by_hand(name)} for name, one in named])
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        for (_, ours), (_, theirs) in zip(attached.trained, named, strict=True):
            ours.grad = torch.randn(ours.shape, generator=generator)
            theirs.grad = ours.grad.clone()
        optimizer.step()
        reference.step()
    for (name, ours), (_, theirs) in zip(attached.trained, named, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7, msg=name)
