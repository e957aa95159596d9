"""Attaching a method: what is trained, where, how it is initialised, and what is refused."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from lora_lab.adapters.attach import attach, count_parameters
from lora_lab.adapters.select import find_targets
from lora_lab.errors import InputError
from lora_lab.models.load import load_base
from lora_lab.models.random import random_network
from lora_lab.plan.targets import select_modules
from lora_lab.schema.adaptation import PARTS, Target
from lora_lab.schema.trial import Trial
from tests.conftest import MakeTrial
from tests.unit.test_models_random import tiny_shape


def load(trial: Trial, cache: Path) -> Any:
    return load_base(
        trial.model,
        precision=trial.training.precision,
        quantization=trial.quantization,
        device="cpu",
        cache=cache,
    ).model


def adapter_weights(model: Any, name: str = "default") -> dict[str, torch.Tensor]:
    return {
        key.replace(f".{name}", ""): value.detach().clone()
        for key, value in model.named_parameters()
        if "lora_" in key and f".{name}" in key
    }


def target(*parts: str, modules: tuple[str, ...] = ()) -> Target:
    return Target.model_validate({**{part: part in parts for part in PARTS}, "modules": modules})


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_combination_of_parts_names_the_planned_modules(family: str) -> None:
    shape = tiny_shape(family, tied=False)
    model = random_network(shape, 0)
    for size in range(1, len(PARTS) + 1):
        for parts in combinations(PARTS, size):
            planned = [module.name for module in select_modules(shape, target(*parts))]
            assert find_targets(model, target(*parts)) == planned


def test_names_that_match_nothing_are_all_reported() -> None:
    model = random_network(tiny_shape("llama", tied=False), 0)
    with pytest.raises(InputError) as caught:
        find_targets(model, target("query", modules=("q_prj", "k_proj", "input_layernorm", "(")))
    assert len(caught.value.problems) == 3
    assert 'did you mean "q_proj"' in str(caught.value.problems[0])


@pytest.mark.parametrize("part", ["head", "embedding"])
def test_a_tied_weight_gets_no_adapter(part: str) -> None:
    model = random_network(tiny_shape("llama", tied=True), 0)
    with pytest.raises(InputError, match="tie_embeddings=false"):
        find_targets(model, target(part))


@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
def test_initialisation_follows_from_its_seed_alone(make_trial: MakeTrial, cache: Path, method: str) -> None:
    trial = make_trial(f"method={method}", "target=all_linear_head")
    torch.manual_seed(0)
    first = adapter_weights(attach(load(trial, cache), trial).model)
    base = load(trial, cache)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    second = adapter_weights(attach(base, trial).model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[key], second[key]) for key in first)
    other = make_trial(f"method={method}", "target=all_linear_head", "seeds.init=1")
    third = adapter_weights(attach(load(other, cache), other).model)
    assert not torch.equal(*(next(v for k, v in w.items() if "lora_A" in k) for w in (first, third)))


def test_a_second_adapter_is_initialised_as_if_it_were_alone(make_trial: MakeTrial, cache: Path) -> None:
    one, two = make_trial("seed=1", "rank=4"), make_trial("seed=2", "rank=2", "target=all_linear")
    model = attach(load(one, cache), one, name="one").model
    model = attach(model, two, name="two").model
    alone = adapter_weights(attach(load(two, cache), two).model)
    together = adapter_weights(model, "two")
    assert together.keys() == alone.keys()
    assert all(torch.equal(together[key], alone[key]) for key in alone)
    assert model.active_adapter == "one"


def test_a_new_adapter_changes_nothing(make_trial: MakeTrial, cache: Path) -> None:
    trial = make_trial("target=[all_linear_head,embedding]")
    ids = torch.arange(12)[None]
    before = load(trial, cache).eval()(input_ids=ids).logits
    after = attach(load(trial, cache), trial).model.eval()(input_ids=ids).logits
    assert torch.equal(before, after)


@pytest.mark.parametrize(
    ("overrides", "dtype"),
    [
        (["training.precision=bf16"], torch.float32),
        (["quantization=nf4", "training.precision=bf16"], torch.float32),
        (["training.precision=fp64"], torch.float64),
    ],
)
def test_precision_of_adapter_weights(
    make_trial: MakeTrial, cache: Path, overrides: list[str], dtype: torch.dtype
) -> None:
    trial = make_trial("method=dora", "target=[all_linear_head,embedding]", *overrides)
    weights = adapter_weights(attach(load(trial, cache), trial).model)
    assert {weight.dtype for weight in weights.values()} == {dtype}


def test_base_trains_nothing_and_full_everything(make_trial: MakeTrial, cache: Path) -> None:
    for kind in ("base", "full"):
        trial = make_trial(f"method={kind}")
        attached = attach(load(trial, cache), trial)
        counts = count_parameters(attached.model)
        assert counts.trainable == (counts.total if kind == "full" else 0)
        assert attached.dropout_clock is None
        assert not isinstance(attached.model, PeftModel)


def test_full_on_quantized_weights_is_refused(make_trial: MakeTrial, cache: Path) -> None:
    quantized, full = make_trial("quantization=nf4"), make_trial("method=full")
    with pytest.raises(InputError, match="full"):
        attach(load(quantized, cache), full)


def test_dora_on_an_all_zero_row_is_refused(make_trial: MakeTrial, cache: Path) -> None:
    """Its magnitude and its norm are both 0: every logit of that row would be NaN."""
    trial = make_trial("method=dora", "target=head")
    model = load(trial, cache)
    with torch.no_grad():
        model.lm_head.weight[7].zero_()
    with pytest.raises(InputError, match="lm_head: 1 outputs"):
        attach(model, trial)
