"""Several adapters into one: each kind against its definition written out here, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_lab.adapters.attach import attach
from lora_lab.adapters.combination import COMBINE_KINDS, CombineKind
from lora_lab.adapters.merge import combine
from lora_lab.adapters.save import load_adapter, save_adapter
from lora_lab.errors import InputError
from lora_lab.models.random import random_network
from tests.conftest import MakeTrial
from tests.unit.test_adapters_attach import load
from tests.unit.test_adapters_save import IDS
from tests.unit.test_models_random import tiny_shape

Array = np.ndarray[Any, np.dtype[np.float64]]
WEIGHTS = [0.7, -0.2, 1.3]
EVERYWHERE = "target=[all_linear_head,embedding]"


def adapters(make_trial: MakeTrial, cache: Path, *overrides: tuple[str, ...]) -> PeftModel:
    """A float64 model with trained adapters a, b, c, one per tuple of overrides; a is active."""
    model: Any = None
    for seed, (name, lines) in enumerate(zip("abc", overrides, strict=False)):
        trial = make_trial("training.precision=fp64", "alpha=6", f"seed={seed}", *lines)
        model = attach(load(trial, cache) if model is None else model, trial, name=name).model
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model.eval()


def layers_of(model: PeftModel) -> dict[str, Any]:
    modules = model.get_base_model().named_modules()
    return {name: module for name, module in modules if isinstance(module, LoraLayer)}


def factors(layer: Any, name: str) -> tuple[Array, Array]:
    if name in layer.lora_embedding_A:
        return layer.lora_embedding_A[name].detach().numpy(), layer.lora_embedding_B[name].detach().numpy()
    return layer.lora_A[name].weight.detach().numpy(), layer.lora_B[name].weight.detach().numpy()


def update_of(layer: Any, name: str) -> Array | float:
    """s B A, 0 where the adapter does not stand."""
    if name not in layer.scaling:
        return 0.0
    a, b = factors(layer, name)
    product: Array = layer.scaling[name] * (b @ a)
    return product


def total_of(layer: Any, names: str, weights: list[float]) -> Array:
    total: Any = sum(weight * update_of(layer, name) for name, weight in zip(names, weights, strict=False))
    array: Array = total
    return array


def with_updates(plain: Any, model: PeftModel, weights: list[float]) -> Any:
    """`plain` with W += sum w_i s_i B_i A_i on every layer, by hand."""
    for name, layer in layers_of(model).items():
        total = torch.from_numpy(total_of(layer, "abc", weights))
        target = plain.get_submodule(name)
        with torch.no_grad():
            target.weight += total.T if isinstance(target, (Conv1D, nn.Embedding)) else total
    return plain


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_cat_is_the_weighted_sum_of_the_updates(make_trial: MakeTrial, cache: Path, family: str) -> None:
    """Ranks, scalings, ranks per layer and targets differ; head, embedding and Conv1D are among the targets."""
    shape = (f"model.shape.family={family}", "model.shape.num_kv_heads=4")
    model = adapters(
        make_trial,
        cache,
        ("method=rslora", "rank=2", EVERYWHERE, *shape),
        ("method=lora", "rank=4", "method.rank_factors=[0.5,1]", "target=all_linear", *shape),
        ("method=lora", "rank=3", "target=mlp", *shape),
    )
    combine(model, ["a", "b", "c"], WEIGHTS, kind="cat", density=None, result="sum")
    model.set_adapter("sum")
    plain = load(make_trial("training.precision=fp64", EVERYWHERE, *shape), cache).eval()
    alone = plain(input_ids=IDS).logits
    expected = with_updates(plain, model, WEIGHTS)(input_ids=IDS).logits
    found = model(input_ids=IDS).logits
    assert (found - expected).abs().max() < 1e-10
    assert (found - alone).abs().max() > 1e-3
    for layer in layers_of(model).values():
        assert layer.r["sum"] == sum(layer.r.get(name, 0) for name in "abc")


def test_linear_has_cross_terms(make_trial: MakeTrial, cache: Path) -> None:
    """B A = sum c_i B_i A_i + sum over i != j of q_i q_j sign(c_j) B_i A_j."""
    model = adapters(make_trial, cache, ("rank=4", EVERYWHERE), ("rank=4", "method=rslora", EVERYWHERE))
    combine(model, ["a", "b"], WEIGHTS[:2], kind="linear", density=None, result="both")
    for layer in layers_of(model).values():
        (a_a, b_a), (a_b, b_b) = factors(layer, "a"), factors(layer, "b")
        q = np.sqrt(0.7 * layer.scaling["a"] * 0.2 * layer.scaling["b"])
        cross = -q * (b_a @ a_b) + q * (b_b @ a_a)
        np.testing.assert_allclose(update_of(layer, "both"), total_of(layer, "ab", WEIGHTS) + cross, atol=1e-14)
        assert np.abs(cross).max() > 1e-4


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_svd_is_the_singular_value_decomposition_of_the_sum(make_trial: MakeTrial, cache: Path, family: str) -> None:
    shape = (f"model.shape.family={family}", "model.shape.num_kv_heads=4")
    model = adapters(
        make_trial,
        cache,
        ("rank=2", EVERYWHERE, *shape),
        ("rank=5", "method.rank_factors=[1,0.4]", "target=all_linear", *shape),
    )
    combine(model, ["a", "b"], WEIGHTS[:2], kind="svd", density=None, result="both")
    for layer in layers_of(model).values():
        rank = max(layer.r[name] for name in "ab" if name in layer.r)
        u, s, vh = torch.linalg.svd(torch.from_numpy(total_of(layer, "ab", WEIGHTS)), full_matrices=False)
        best = (u[:, :rank] * s[:rank]) @ vh[:rank]
        np.testing.assert_allclose(update_of(layer, "both"), best.numpy(), atol=1e-12)
        assert layer.r["both"] == rank


def test_ties_with_weights_of_one_is_the_papers_mean(make_trial: MakeTrial, cache: Path) -> None:
    """Algorithm 1 with lambda = 1, entry by entry, on A and on B; scaling 1 leaves the tensors as they are."""
    model = adapters(make_trial, cache, ("rank=6", EVERYWHERE), ("rank=6", EVERYWHERE), ("rank=6", EVERYWHERE))
    combine(model, ["a", "b", "c"], [1.0, 1.0, 1.0], kind="ties", density=0.3, result="all")
    for layer in layers_of(model).values():
        assert layer.scaling["a"] == 1.0
        for side in (0, 1):
            tensors = [factors(layer, name)[side] for name in "abc"]
            np.testing.assert_allclose(factors(layer, "all")[side], _papers_ties(tensors, 0.3), atol=1e-15)


def _papers_ties(tensors: list[Array], density: float) -> Array:
    kept = []
    for tensor in tensors:
        order = np.argsort(-np.abs(tensor).ravel())[: int(density * tensor.size)]
        trimmed = np.zeros(tensor.size)
        trimmed[order] = tensor.ravel()[order]
        kept.append(trimmed)
    merged = np.zeros(tensors[0].size)
    for entry in range(merged.size):
        values = [trimmed[entry] for trimmed in kept]
        sign = 1 if sum(values) >= 0 else -1
        agreeing = [value for value in values if np.sign(value) == sign]
        merged[entry] = np.mean(agreeing) if agreeing else 0
    return merged.reshape(tensors[0].shape)


def test_dare_drops_entries_and_rescales_the_others(make_trial: MakeTrial, cache: Path) -> None:
    """Yu et al. 2023, equation 3: each entry is 0 with probability 1 - density, else divided by density."""
    model = adapters(make_trial, cache, ("rank=8", EVERYWHERE))
    combine(model, ["a"], [0.5], kind="dare_linear", density=0.4, result="thin", seed=3)
    kept = total = 0
    for layer in layers_of(model).values():
        root = np.sqrt(0.5 * layer.scaling["a"])
        for whole, thin in zip(factors(layer, "a"), factors(layer, "thin"), strict=True):
            here = thin != 0
            np.testing.assert_allclose(thin[here], root * whole[here] / 0.4, rtol=1e-12)
            kept, total = kept + here.sum(), total + here.size
    assert abs(kept / total - 0.4) < 5 * np.sqrt(0.4 * 0.6 / total)


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties"])
def test_dare_follows_its_seed_alone(make_trial: MakeTrial, cache: Path, kind: CombineKind) -> None:
    model = adapters(make_trial, cache, ("rank=4",), ("rank=4",))
    state = torch.get_rng_state()
    for result, seed in (("one", 0), ("same", 0), ("other", 1)):
        combine(model, ["a", "b"], [0.5, 0.5], kind=kind, density=0.5, result=result, seed=seed)
    assert torch.equal(torch.get_rng_state(), state)
    for layer in layers_of(model).values():
        assert np.array_equal(factors(layer, "one")[0], factors(layer, "same")[0])
        assert not np.array_equal(factors(layer, "one")[0], factors(layer, "other")[0])


@pytest.mark.parametrize("kind", COMBINE_KINDS)
def test_ranks_per_layer_are_kept_on_disk(
    make_trial: MakeTrial, cache: Path, tmp_path: Path, kind: CombineKind
) -> None:
    lines = ("rank=4", "method.rank_factors=[0.5,1]", EVERYWHERE)
    model = adapters(make_trial, cache, lines, lines)
    sparse = kind in ("ties", "dare_linear", "dare_ties")
    seed = 5 if kind.startswith("dare") else None
    combine(model, ["a", "b"], [0.5, 0.8], kind=kind, density=0.5 if sparse else None, result="both", seed=seed)
    ranks = {layer.r["both"] for layer in layers_of(model).values()}
    assert ranks == ({4, 8} if kind == "cat" else {2, 4})
    save_adapter(model, tmp_path / "both", name="both")
    model.set_adapter("both")
    wanted = model(input_ids=IDS).logits
    trial = make_trial("training.precision=fp64", EVERYWHERE)
    ours = load_adapter(load(trial, cache), tmp_path / "both")
    plain = PeftModel.from_pretrained(load(trial, cache), tmp_path / "both").eval()
    assert torch.equal(ours(input_ids=IDS).logits, wanted)
    assert torch.equal(plain(input_ids=IDS).logits, wanted)


def test_the_adapters_are_left_as_they_were(make_trial: MakeTrial, cache: Path) -> None:
    model = adapters(make_trial, cache, ("rank=4",), ("rank=4",))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    wanted = model(input_ids=IDS).logits
    combine(model, ["a", "b"], [0.5, 0.5], kind="cat", density=None, result="both")
    assert torch.equal(model(input_ids=IDS).logits, wanted)  # "a" is still the active one
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "dare_linear", "density": 0.5}, "seed: goes with kind=dare_linear, dare_ties"),
        ({"kind": "dare", "density": 0.5, "seed": -1}, "0 <= seed"),
        ({"kind": "cat", "seed": 1}, "seed: goes with"),
        ({"kind": "dare_ties", "seed": 1}, "density: goes with"),
        ({"kind": "dare_tie", "density": 0.5}, 'did you mean "dare_ties"'),
        ({"kind": "linear"}, r"layers\.0\..*needs equal ranks \(a has 2, b has 4\)"),
    ],
)
def test_settings_that_do_not_fit(make_trial: MakeTrial, cache: Path, arguments: dict[str, Any], message: str) -> None:
    model = adapters(make_trial, cache, ("rank=4", "method.rank_factors=[0.5,1]"), ("rank=4",))
    asked = {"kind": "linear", "density": None, "seed": None} | arguments
    with pytest.raises(InputError, match=message):
        combine(model, ["a", "b"], [0.5, 0.5], result="new", **asked)
    assert "new" not in model.peft_config


def test_other_names_of_kinds(make_trial: MakeTrial, cache: Path) -> None:
    model = adapters(make_trial, cache, ("rank=2",), ("rank=2",))
    asked: Any = {"density": None, "seed": None}
    combine(model, ["a", "b"], [0.5, 0.5], kind="concatenation", result="joined", **asked)  # type: ignore[arg-type]
    asked = {"density": 0.5, "seed": 0}
    combine(model, ["a", "b"], [0.5, 0.5], kind="dare", result="thin", **asked)  # type: ignore[arg-type]
    combine(model, ["a", "b"], [0.5, 0.5], kind="dare_linear", result="same", **asked)
    for layer in layers_of(model).values():
        assert layer.r["joined"] == 4
        assert np.array_equal(factors(layer, "thin")[0], factors(layer, "same")[0])


def _ia3(network: Any) -> Any:
    return get_peft_model(network, IA3Config(target_modules=["q_proj"], feedforward_modules=[]), adapter_name="a")


def _with_bias(network: Any) -> Any:
    return get_peft_model(network, LoraConfig(target_modules=["q_proj"], lora_bias=True), adapter_name="a")


@pytest.mark.parametrize(("make", "message"), [(_ia3, "of type IA3"), (_with_bias, "lora_bias")])
def test_what_is_more_than_a_product_goes_into_the_base_alone(make: Any, message: str) -> None:
    model = make(random_network(tiny_shape("llama", tied=False), 0))
    with pytest.raises(InputError, match=f"{message}.*merge it alone into the base"):
        combine(model, ["a"], [1.0], kind="cat", density=None, result="new")
