"""Norms by layer against what PEFT's own merging changes, and against numpy on the files of the base."""

from __future__ import annotations

import copy
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import PeftModel
from safetensors.torch import load_file, save_file

from lora_lab.adapters.attach import attach
from lora_lab.adapters.norms import OriginalWeights, layer_norms
from lora_lab.models.load import load_base
from lora_lab.models.random import random_network
from lora_lab.record.layer_log import observed_updates
from lora_lab.schema.trial import Trial
from tests.conftest import MakeTrial
from tests.unit.test_models_random import tiny_shape


def base_of(trial: Trial, cache: Path) -> Any:
    return load_base(
        trial.model, precision=trial.training.precision, quantization=trial.quantization, device="cpu", cache=cache
    ).model


def shaken(model: Any, *, scale: float = 0.1) -> Any:
    """All trainable parameters moved, as if trained."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


def weights_of(model: Any) -> dict[str, NDArray[np.float64]]:
    return {name: parameter.detach().double().numpy().copy() for name, parameter in model.named_parameters()}


def place_of(name: str) -> str:
    """Spelled out for the two families that are tested."""
    parts = name.split(".")
    for key in ("layers", "h"):
        if key in parts:
            return parts[parts.index(key) + 1]
    ends = {"embed_tokens": "embedding", "wte": "embedding", "wpe": "embedding", "lm_head": "head"}
    return ends.get(parts[-2], "final_norm")


def norms_of(weights: dict[str, NDArray[np.float64]]) -> dict[str, float]:
    rows: dict[str, list[NDArray[np.float64]]] = defaultdict(list)
    for name, weight in weights.items():
        rows[place_of(name)].append(weight.ravel())
    return {place: float(np.linalg.norm(np.concatenate(all_of))) for place, all_of in rows.items()}


def differences(
    after: dict[str, NDArray[np.float64]], before: dict[str, NDArray[np.float64]]
) -> dict[str, NDArray[np.float64]]:
    return {name: weight - before[name] for name, weight in after.items()}


def assert_norms(found: dict[str, float], wanted: dict[str, float], rel: float = 1e-5) -> None:
    assert found.keys() == wanted.keys()
    assert found == {place: pytest.approx(norm, rel=rel, abs=1e-6) for place, norm in wanted.items()}


def expected_after_merging(model: Any, before: dict[str, NDArray[np.float64]]) -> tuple[dict[str, float], ...]:
    """PEFT's word: merge the active adapters of a copy, and look at the weights."""
    merged = copy.deepcopy(model).merge_and_unload(adapter_names=model.active_adapters)
    after = weights_of(merged)
    return norms_of(after), norms_of(differences(after, before))


LLAMA_ALL = "target=[all_linear_head,embedding]"


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "lora_plus", "adalora"])
@pytest.mark.parametrize("target", ["target=qv", "target=all_linear", LLAMA_ALL])
def test_llama_equals_peft_merged(make_trial: MakeTrial, cache: Path, method: str, target: str, precision: str) -> None:
    more = ["method.initial_rank=6", "rank=4"] if method == "adalora" else []
    if method == "adalora" and target == LLAMA_ALL:
        target = "target=all_linear_head"
    trial = make_trial(f"method={method}", target, f"training.precision={precision}", *more)
    model = base_of(trial, cache)
    before = weights_of(model)
    model = shaken(attach(model, trial, steps=50).model)
    weight, update = expected_after_merging(model, before)
    found = layer_norms(model, None)
    assert_norms(found["weight"], weight)
    assert_norms(found["update"], update)
    assert found["update"]["final_norm"] == 0 and found["update"]["1"] > 0.1
    assert (found["update"]["head"] > 0) == ("head" in target)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_conv1d_equals_peft_merged(make_trial: MakeTrial, cache: Path, method: str) -> None:
    shape = ("model.shape.family=gpt2", "model.shape.num_kv_heads=4")
    trial = make_trial(f"method={method}", *shape, "target=all_linear")
    model = base_of(trial, cache)
    before = weights_of(model)
    model = shaken(attach(model, trial).model)
    weight, update = expected_after_merging(model, before)
    found = layer_norms(model, None)
    assert_norms(found["weight"], weight)
    assert_norms(found["update"], update)
    assert set(found["update"]) == {"0", "1", "embedding", "final_norm", "head"}


@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_decomposed_starts_count_from_the_base(make_trial: MakeTrial, cache: Path, method: str) -> None:
    """Untrained they have changed nothing; trained, what the two adapters add up to."""
    trial = make_trial(f"method={method}", "target=all_linear", "rank=4")
    model = base_of(trial, cache)
    before = weights_of(model)
    model = attach(model, trial).model
    assert max(layer_norms(model, None)["update"].values()) < 1e-5
    _, update = expected_after_merging(shaken(model), before)
    assert_norms(layer_norms(model, None)["update"], update, rel=1e-4)


@pytest.mark.parametrize("active", [["one"], ["two"], ["one", "two"]])
def test_the_active_adapters_are_what_counts(make_trial: MakeTrial, cache: Path, active: list[str]) -> None:
    one, two = make_trial("rank=4", "target=all_linear"), make_trial("rank=2", "target=attention", "seed=1")
    model = base_of(one, cache)
    before = weights_of(model)
    model = attach(attach(model, one, name="one").model, two, name="two").model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.base_model.set_adapter(["one", "two"])
        shaken(model)
        model.base_model.set_adapter(active)
    _, update = expected_after_merging(model, before)
    assert_norms(layer_norms(model, None)["update"], update)


def test_a_fresh_adapter_has_changed_nothing(make_trial: MakeTrial, cache: Path) -> None:
    trial = make_trial(LLAMA_ALL)
    model = attach(base_of(trial, cache), trial).model
    found = layer_norms(model, None)
    assert set(found["update"].values()) == {0.0}
    assert_norms(found["weight"], norms_of(weights_of(base_of(trial, cache))))


@pytest.mark.parametrize("method", ["full", "freeze", "lisa", "galore"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
def test_trained_weights_equal_numpy(
    make_trial: MakeTrial, tmp_path: Path, method: str, family: str, tied: bool
) -> None:
    network = random_network(tiny_shape(family, tied=tied), 0)
    network.save_pretrained(tmp_path)
    before = weights_of(network)
    more = {"freeze": ["method.last_layers=1"], "lisa": ["method.layers=1"], "galore": ["rank=4"]}.get(method, [])
    model = shaken(attach(network, make_trial(f"method={method}", *more)).model)
    after = weights_of(model)
    found = layer_norms(model, OriginalWeights(tmp_path))
    assert_norms(found["weight"], norms_of(after))
    assert_norms(found["update"], norms_of(differences(after, before)))
    assert ("head" in found["update"]) == (not tied)
    frozen = {"freeze": "0", "lisa": next((n for n in "01" if found["update"][n] == 0), "none")}.get(method)
    assert frozen is None or found["update"][frozen] == 0


def test_names_without_the_models_prefix_are_found(tmp_path: Path) -> None:
    """As in the folders of the first GPT-2s: `h.0...` instead of `transformer.h.0...`."""
    network = random_network(tiny_shape("gpt2", tied=True), 0)
    network.save_pretrained(tmp_path / "new")
    tensors = load_file(tmp_path / "new" / "model.safetensors")
    (tmp_path / "old").mkdir()
    save_file(
        {key.removeprefix("transformer."): one for key, one in tensors.items()}, tmp_path / "old" / "x.safetensors"
    )
    shaken(network)
    new, old = (layer_norms(network, OriginalWeights(tmp_path / name)) for name in ("new", "old"))
    assert new == old and set(new["update"]) == {"0", "1", "embedding", "final_norm"}
    assert OriginalWeights(tmp_path / "old").get("transformer.h.9.strange") is None


def test_a_layer_without_its_original_is_left_out(tmp_path: Path) -> None:
    network = random_network(tiny_shape("llama", tied=False), 0)
    network.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    found = layer_norms(network, OriginalWeights(tmp_path))
    assert set(found["weight"]) == set(found["update"]) == {"0", "embedding", "final_norm"}


def test_shards_are_read_together(tmp_path: Path) -> None:
    network = random_network(tiny_shape("llama", tied=False), 0)
    network.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    found = layer_norms(shaken(network), OriginalWeights(tmp_path))
    assert set(found["update"]) == {"0", "1", "embedding", "final_norm", "head"}


def test_half_precision(make_trial: MakeTrial, cache: Path, tmp_path: Path) -> None:
    """bf16 weights with an fp32 adapter: sums in fp32. And of trained bf16 weights the change that bf16 can hold."""
    trial = make_trial("training.precision=bf16", "target=all_linear")
    model = base_of(trial, cache)
    before = weights_of(model)
    model = shaken(attach(model, trial).model)
    exact = {key: one for key, one in model.get_base_model().named_modules() if not key.endswith(".base_layer")}
    update = {name: np.zeros_like(weight) for name, weight in before.items()}
    for name in update:
        layer = exact[name.rpartition(".")[0]]
        if hasattr(layer, "lora_A"):
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            update[name] = layer.scaling["default"] * (b.double() @ a.double()).detach().numpy()
    found = layer_norms(model, None)
    assert_norms(found["update"], norms_of(update))
    assert_norms(found["weight"], norms_of({name: before[name] + update[name] for name in before}))

    network = random_network(tiny_shape("llama", tied=False), 0).bfloat16()
    network.save_pretrained(tmp_path)
    first = weights_of(network)
    after = weights_of(shaken(network))
    assert_norms(
        layer_norms(network, OriginalWeights(tmp_path))["update"], norms_of(differences(after, first)), rel=5e-3
    )


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_on_a_quantized_base_the_update_is_known_and_weights_of_layers_are_not(
    make_trial: MakeTrial, cache: Path, kind: str
) -> None:
    trial = make_trial("target=all_linear", f"quantization={kind}")
    plain = make_trial("target=all_linear")
    quantized = layer_norms(shaken(attach(base_of(trial, cache), trial).model), None)
    full = layer_norms(shaken(attach(base_of(plain, cache), plain).model), None)
    assert set(quantized["weight"]) == {"embedding", "final_norm", "head"}
    assert_norms(quantized["update"], full["update"])
    dora = make_trial("method=dora", "target=all_linear", f"quantization={kind}")
    found = layer_norms(attach(base_of(dora, cache), dora).model, None)
    assert set(found["update"]) == {"embedding", "final_norm", "head"}


METHODS: dict[str, tuple[str, ...]] = {
    "ia3": (),
    "prompt_tuning": ("method.virtual_tokens=3",),
    "prefix_tuning": ("method.virtual_tokens=3",),
    "bottleneck": (),
    "mov": (),
    "mola": ("method.experts=[2,3]",),
}


@pytest.mark.parametrize("method", METHODS)
def test_adapters_that_change_no_weight_have_no_update(make_trial: MakeTrial, cache: Path, method: str) -> None:
    trial = make_trial(f"method={method}", *METHODS[method])
    model = base_of(trial, cache)
    before = norms_of(weights_of(model))
    attached = attach(model, trial)
    assert isinstance(attached.model, PeftModel)
    found = layer_norms(shaken(attached.model), None)
    assert set(found) == {"weight"}
    assert_norms(found["weight"], before)


def test_looking_changes_nothing(make_trial: MakeTrial, cache: Path) -> None:
    trial = make_trial("method=dora", LLAMA_ALL)
    model = shaken(attach(base_of(trial, cache), trial).model)
    before, state = weights_of(model), torch.get_rng_state()
    layer_norms(model, None)
    assert all(np.array_equal(one, before[name]) for name, one in weights_of(model).items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_it_takes_less_than_a_step(make_trial: MakeTrial, cache: Path) -> None:
    """Beside one forward and backward pass over 16 rows of 256 tokens on the same machine."""
    trial = make_trial("target=all_linear")
    model = attach(base_of(trial, cache), trial).model
    ids = torch.arange(256).repeat(16, 1)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()

    assert _fastest(lambda: layer_norms(model, None)) < _fastest(step)


def _fastest(act: Callable[[], object]) -> float:
    spans = []
    for _ in range(4):
        start = time.perf_counter()
        act()
        spans.append(time.perf_counter() - start)
    return min(spans)


def test_observed_updates_are_those_there_are() -> None:
    lines: list[Any] = [{"weight": {"0": 1.0}}, {"weight": {"0": 1.0}, "update": {"0": 2.0}}, {"update": {}}]
    assert observed_updates(lines) == [{"0": 2.0}]
