"""The lab's adapters against plain PEFT, the papers' formulas and the plan's arithmetic."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer

from lora_lab.adapters.attach import attach, count_parameters
from lora_lab.plan.counts import counts_of
from tests.conftest import MakeTrial
from tests.unit.test_adapters_attach import load
from tests.unit.test_adapters_save import IDS, shaken

METHODS = ["lora", "rslora", "dora"]


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("method", METHODS)
def test_logits_and_gradients_equal_plain_peft_with_the_same_weights(
    make_trial: MakeTrial, cache: Path, method: str, quantization: str
) -> None:
    trial = make_trial(f"method={method}", "target=all_linear", "rank=4", "alpha=6", f"quantization={quantization}")
    ours = shaken(attach(load(trial, cache), trial).model)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        use_rslora=method == "rslora",
        use_dora=method == "dora",
    )
    plain = get_peft_model(load(trial, cache), config).eval()
    set_peft_model_state_dict(plain, get_peft_model_state_dict(ours))
    results = []
    for model in (ours, plain):
        logits = model(input_ids=IDS).logits
        logits.square().mean().backward()
        results.append([logits, *(parameter.grad for parameter in model.parameters() if parameter.requires_grad)])
    assert len(results[0]) == len(results[1]) > 1
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_initial_weights_equal_plain_peft_after_the_same_seed(make_trial: MakeTrial, cache: Path) -> None:
    trial = make_trial("target=qv", "rank=4", "seeds.init=11")
    ours = get_peft_model_state_dict(attach(load(trial, cache), trial).model)
    base = load(trial, cache)
    torch.manual_seed(11)
    plain = get_peft_model_state_dict(
        get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"]))
    )
    assert ours.keys() == plain.keys()
    assert all(torch.equal(ours[key], plain[key]) for key in ours)


@pytest.mark.parametrize(("method", "scaling"), [("lora", 12 / 9), ("rslora", 12 / 3), ("dora", 12 / 9)])
def test_scaling_is_that_of_the_papers(make_trial: MakeTrial, cache: Path, method: str, scaling: float) -> None:
    trial = make_trial(f"method={method}", "rank=9", "alpha=12")
    model = attach(load(trial, cache), trial).model
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    assert layers
    assert all(math.isclose(layer.scaling["default"], scaling) for layer in layers)


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_computes_the_papers_formula(make_trial: MakeTrial, cache: Path, method: str) -> None:
    """LoRA: W + s B A (Hu et al. 2021). DoRA: m (W + s B A) / |W + s B A| per output (Liu et al. 2024, eq. 5)."""
    trial = make_trial(f"method={method}", "target=[query]", "rank=4", "alpha=6", "training.precision=fp64")
    layer: Any = shaken(attach(load(trial, cache), trial).model).get_submodule(
        "base_model.model.model.layers.0.self_attn.q_proj"
    )
    s = 6 / math.sqrt(4) if method == "rslora" else 6 / 4
    weight = layer.base_layer.weight + s * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    if method == "dora":
        magnitude = layer.lora_magnitude_vector["default"].weight
        weight = magnitude[:, None] * weight / weight.norm(dim=1, keepdim=True)
    x = torch.randn(5, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(x), x @ weight.T, atol=1e-12, rtol=0)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("target", ["qv", "all_linear", "all_linear_head", "[all_linear_head,embedding]", "[key,mlp]"])
@pytest.mark.parametrize("method", ["base", "full", *METHODS])
def test_measured_counts_equal_planned_counts(
    make_trial: MakeTrial, cache: Path, method: str, target: str, quantization: str
) -> None:
    if method == "full" and quantization != "none":
        pytest.skip("full training of 4-bit weights is refused")
    trial = make_trial(f"method={method}", f"target={target}", "rank=3", f"quantization={quantization}")
    planned = counts_of(trial)
    measured = count_parameters(attach(load(trial, cache), trial).model)
    assert planned is not None
    assert tuple(measured) == (planned.trainable_parameters, planned.total_parameters)


@pytest.mark.parametrize("target", ["all_linear", "[all_linear_head,embedding]"])
@pytest.mark.parametrize("tied", [True, False])
def test_measured_counts_equal_planned_counts_on_gpt2(
    make_trial: MakeTrial, cache: Path, tied: bool, target: str
) -> None:
    untie = ["model.tie_embeddings=false"] if tied else []
    trial = make_trial(
        "method=dora",
        f"target={target}",
        "model.shape.family=gpt2",
        "model.shape.num_kv_heads=4",
        f"model.shape.tied_embeddings={str(tied).lower()}",
        *untie,
    )
    planned = counts_of(trial)
    assert planned is not None
    measured = count_parameters(attach(load(trial, cache), trial).model)
    assert tuple(measured) == (planned.trainable_parameters, planned.total_parameters)
