"""Merging into the base and combining adapters, against closed forms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

from lora_lab.adapters.attach import attach
from lora_lab.adapters.merge import combine, merge_into_base
from lora_lab.adapters.save import load_adapter, save_adapter, save_model
from lora_lab.errors import InputError
from lora_lab.models.random import byte_tokenizer
from tests.conftest import MakeTrial
from tests.unit.test_adapters_attach import load
from tests.unit.test_adapters_save import IDS, shaken

Array = np.ndarray[Any, np.dtype[np.float64]]


# Differences are rounding: a few units in the last place of logits of size 1 (fp32: 6e-8, bf16: 4e-3).
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
@pytest.mark.parametrize(
    ("quantization", "precision", "tolerance"),
    [
        ("none", "fp64", 1e-14),
        ("none", "fp32", 5e-6),
        ("none", "bf16", 0.03),
        ("nf4", "fp32", 5e-6),
        ("fp4", "bf16", 0.03),
    ],
)
def test_merged_logits_equal_the_adapters(
    make_trial: MakeTrial,
    cache: Path,
    tmp_path: Path,
    quantization: str,
    precision: str,
    tolerance: float,
    method: str,
    family: str,
) -> None:
    trial = make_trial(
        f"method={method}",
        "target=[all_linear_head,embedding]",
        f"quantization={quantization}",
        f"training.precision={precision}",
        f"model.shape.family={family}",
        "model.shape.num_kv_heads=4",
    )
    model = shaken(attach(load(trial, cache), trial).model)
    before = model(input_ids=IDS).logits
    merged = merge_into_base(model, IDS)
    logits = merged.model(input_ids=IDS).logits
    difference = (logits.double() - before.double()).abs().max().item()
    assert merged.largest_logit_difference == difference <= tolerance
    assert (load(trial, cache).eval()(input_ids=IDS).logits - before).abs().max() > 10 * tolerance
    assert torch.equal(model(input_ids=IDS).logits, before)  # the adapter itself is as it was
    save_model(merged.model, byte_tokenizer(64), tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=merged.model.dtype).eval()
    assert torch.equal(again(input_ids=IDS).logits, logits)


def two_adapters(
    make_trial: MakeTrial, cache: Path, *, method: str = "lora", ranks: tuple[int, int] = (4, 4)
) -> PeftModel:
    trials = [
        make_trial(
            f"method={method}", "training.precision=fp64", "target=qv", "alpha=6", f"rank={rank}", f"seed={seed}"
        )
        for seed, rank in enumerate(ranks)
    ]
    model = attach(load(trials[0], cache), trials[0], name="a").model
    model = attach(model, trials[1], name="b").model
    for parameter in model.parameters():
        if parameter.requires_grad is False and parameter.shape and min(parameter.shape) in ranks:
            parameter.requires_grad_(True)
    shaken(model)
    return model


def layers_of(model: PeftModel) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def factors(layer: Any, name: str) -> tuple[Array, Array]:
    return layer.lora_A[name].weight.detach().numpy(), layer.lora_B[name].weight.detach().numpy()


def update_of(layer: Any, name: str) -> Array:
    """scaling x B A: what the adapter adds to the layer's weight."""
    a, b = factors(layer, name)
    product: Array = layer.scaling[name] * (b @ a)
    return product


@pytest.mark.parametrize("method", ["lora", "rslora"])
def test_linear_is_the_product_of_weighted_factors(make_trial: MakeTrial, cache: Path, method: str) -> None:
    model = two_adapters(make_trial, cache, method=method)
    combine(model, ["a", "b"], [0.7, -0.2], kind="linear", density=None, result="both")
    for layer in layers_of(model):
        s = layer.scaling["a"]
        (a_a, b_a), (a_b, b_b) = factors(layer, "a"), factors(layer, "b")
        expected_a = np.sqrt(0.7 * s) * a_a - np.sqrt(0.2 * s) * a_b
        expected_b = np.sqrt(0.7 * s) * b_a + np.sqrt(0.2 * s) * b_b
        np.testing.assert_allclose(update_of(layer, "both"), expected_b @ expected_a, atol=1e-8)


@pytest.mark.parametrize("method", ["lora", "rslora"])
def test_linear_of_one_adapter_scales_its_update(make_trial: MakeTrial, cache: Path, method: str) -> None:
    model = two_adapters(make_trial, cache, method=method)
    combine(model, ["a"], [0.5], kind="linear", density=None, result="scaled")
    for layer in layers_of(model):
        np.testing.assert_allclose(update_of(layer, "scaled"), 0.5 * update_of(layer, "a"), atol=1e-12)


@pytest.mark.parametrize("method", ["lora", "rslora"])
def test_svd_is_the_best_approximation_of_the_summed_updates(make_trial: MakeTrial, cache: Path, method: str) -> None:
    """Eckart-Young: the error in Frobenius norm is that of the singular values left out."""
    model = two_adapters(make_trial, cache, method=method, ranks=(2, 4))
    combine(model, ["a", "b"], [0.7, -0.2], kind="svd", density=None, result="both")
    for layer in layers_of(model):
        total = 0.7 * update_of(layer, "a") - 0.2 * update_of(layer, "b")
        left_out = np.linalg.svd(total, compute_uv=False)[4:]
        error = np.linalg.norm(update_of(layer, "both") - total)
        np.testing.assert_allclose(error, np.linalg.norm(left_out), atol=1e-6)
        assert np.linalg.matrix_rank(update_of(layer, "both"), tol=1e-6) == 4


def ties_by_hand(tensors: list[Array], weights: list[float], density: float) -> Array:
    """Trim, elect sign, disjoint mean (Yadav et al. 2023, arXiv 2306.01708, algorithm 1), weighted as in PEFT."""
    trimmed = []
    for tensor in tensors:
        keep = int(density * tensor.size)
        smallest = np.sort(np.abs(tensor).ravel())[-keep]
        trimmed.append(np.where(np.abs(tensor) >= smallest, tensor, 0.0))
    sign = np.where(sum(trimmed) >= 0, 1.0, -1.0)
    agreeing = [
        np.where(np.sign(tensor) == sign, weight * tensor, 0.0) for tensor, weight in zip(trimmed, weights, strict=True)
    ]
    counts = sum((np.sign(tensor) == sign).astype(float) for tensor in trimmed)
    merged: Array = sum(agreeing) / np.maximum(counts, 1.0)
    return merged


def test_ties_equals_the_algorithm_written_out(make_trial: MakeTrial, cache: Path) -> None:
    model = two_adapters(make_trial, cache)
    combine(model, ["a", "b"], [0.7, 0.4], kind="ties", density=0.5, result="both")
    for layer in layers_of(model):
        s = layer.scaling["a"]
        roots = [float(np.sqrt(0.7 * s)), float(np.sqrt(0.4 * s))]
        (a_a, b_a), (a_b, b_b) = factors(layer, "a"), factors(layer, "b")
        expected = ties_by_hand([b_a, b_b], roots, 0.5) @ ties_by_hand([a_a, a_b], roots, 0.5)
        np.testing.assert_allclose(update_of(layer, "both"), expected, atol=1e-6)


@pytest.mark.parametrize("method", ["lora", "rslora"])
def test_a_combination_is_saved_and_comes_back(make_trial: MakeTrial, cache: Path, tmp_path: Path, method: str) -> None:
    model = two_adapters(make_trial, cache, method=method)
    combine(model, ["a", "b"], [0.5, 0.5], kind="linear", density=None, result="both")
    save_adapter(model, tmp_path / "both", name="both")
    model.set_adapter("both")
    base = load(make_trial("training.precision=fp64"), cache)
    again = load_adapter(base, tmp_path / "both")
    assert torch.equal(again(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)


def test_combining_draws_nothing_from_global_state(make_trial: MakeTrial, cache: Path) -> None:
    model = two_adapters(make_trial, cache)
    state = torch.get_rng_state()
    combine(model, ["a", "b"], [0.5, 0.5], kind="linear", density=None, result="both")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"names": ["a", "c"]}, 'no adapter "c"'),
        ({"names": []}, "expected different adapters"),
        ({"names": ["a", "a"]}, "expected different adapters"),
        ({"weights": [1.0]}, r"one per adapter \(2\), got 1"),
        ({"weights": [1.0, float("nan")]}, "must be finite"),
        ({"kind": "lin"}, 'did you mean "linear"'),
        ({"kind": "ties"}, "density"),
        ({"density": 0.5}, "density"),
        ({"kind": "ties", "density": 1.5}, "density"),
        ({"result": "a"}, "already"),
        ({"result": "half"}, "cannot be the name"),
        ({}, r"needs equal ranks \(a has 2, b has 4\); kind=svd takes any"),
    ],
)
def test_what_cannot_be_combined(make_trial: MakeTrial, cache: Path, arguments: dict[str, Any], message: str) -> None:
    model = two_adapters(make_trial, cache, ranks=(2, 4))
    asked = {"names": ["a", "b"], "weights": [0.5, 0.5], "kind": "linear", "density": None, "result": "new"} | arguments
    with pytest.raises(InputError, match=message):
        combine(model, **asked)
    assert "new" not in model.peft_config


def test_dora_is_not_combined(make_trial: MakeTrial, cache: Path) -> None:
    model = two_adapters(make_trial, cache, method="dora")
    with pytest.raises(InputError, match="magnitudes cannot be combined"):
        combine(model, ["a", "b"], [0.5, 0.5], kind="linear", density=None, result="new")


def test_a_broken_adapter_is_not_merged(make_trial: MakeTrial, cache: Path) -> None:
    trial = make_trial()
    model = shaken(attach(load(trial, cache), trial).model)
    with torch.no_grad():
        layers_of(model)[0].lora_A["default"].weight[0, 0] = float("nan")
    with pytest.raises(InputError, match="NaN"):
        merge_into_base(model, IDS)
