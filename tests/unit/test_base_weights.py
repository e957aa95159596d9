"""Which of a model's own weights `freeze` leaves trainable: by place, by name, as the plan counted them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lora_lab.adapters.attach import attach, count_parameters
from lora_lab.adapters.base_weights import placed_weights, train_only
from lora_lab.errors import InputError
from lora_lab.models.random import random_network
from lora_lab.plan.counts import counts_of
from tests.conftest import MakeTrial
from tests.unit.test_models_random import tiny_shape


def network(family: str = "llama", *, tied: bool = False) -> Any:
    return random_network(tiny_shape(family, tied=tied).model_copy(update={"num_layers": 3}), 0)


def chosen(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def names(model: Any, *starts: str) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.startswith(starts)}


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "mistral"])
@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_has_one_place(family: str, tied: bool) -> None:
    model = network(family, tied=tied)
    placed = placed_weights(model)
    listed = [one for layer in (*placed.layers, placed.outside) for one in layer]
    assert sorted(name for name, _ in listed) == sorted(name for name, _ in model.named_parameters())
    blocks = model.transformer.h if family == "gpt2" else model.model.layers
    for layer, block in zip(placed.layers, blocks, strict=True):
        assert {id(parameter) for _, parameter in layer} == {id(parameter) for parameter in block.parameters()}
    assert sum("lm_head" in name for name, _ in placed.outside) == (not tied)


def test_layers_that_are_not_found_are_refused() -> None:
    model = network()
    model.config.num_hidden_layers = 4
    with pytest.raises(InputError, match="4 decoder layers of llama were not found"):
        placed_weights(model)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("last", [1, 2, 3])
def test_last_layers(family: str, last: int) -> None:
    model = network(family)
    train_only(model, last, [])
    stem = "transformer.h" if family == "gpt2" else "model.layers"
    assert chosen(model) == names(model, *(f"{stem}.{layer}." for layer in range(3 - last, 3)))


# What is named, and the starts of the names of what is then trained.
NAMED = {
    "exact": (["model.layers.0.mlp"], ["model.layers.0.mlp."]),
    "end": (["lm_head"], ["lm_head."]),
    "end in all layers": (["self_attn.q_proj"], [f"model.layers.{layer}.self_attn.q_proj" for layer in range(3)]),
    "glob": (["model.layers.*.mlp.down_proj"], [f"model.layers.{layer}.mlp.down_proj" for layer in range(3)]),
    "glob of ends": (
        ["*_layernorm"],
        [f"model.layers.{n}.{k}_layernorm" for n in range(3) for k in ("input", "post_")],
    ),
    "norm alone": (["norm"], ["model.norm."]),
    "several": (["model.norm", "embed_tokens"], ["model.norm.", "model.embed_tokens."]),
    "everything": (["model", "lm_head"], ["model.", "lm_head."]),
}


@pytest.mark.parametrize("case", NAMED)
def test_modules_by_name(case: str) -> None:
    modules, starts = NAMED[case]
    model = network()
    train_only(model, 0, modules)
    expected = names(model, *starts)
    if case == "glob of ends":
        expected = {name for name, _ in model.named_parameters() if "_layernorm" in name}
    assert expected and chosen(model) == expected


def test_layers_and_names_add_up() -> None:
    model = network()
    train_only(model, 1, ["lm_head", "model.layers.2.mlp"])
    assert chosen(model) == names(model, "model.layers.2.", "lm_head.")


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens", "model.embed_tokens"])
def test_of_tied_weights_either_name_means_the_one(name: str) -> None:
    model = network(tied=True)
    train_only(model, 0, [name])
    assert chosen(model) == {"model.embed_tokens.weight"}


def test_gpt2_names() -> None:
    model = network("gpt2")
    train_only(model, 0, ["wpe", "ln_f", "h.1.attn.c_attn"])
    expected = {"transformer.wpe.weight", "transformer.ln_f.weight", "transformer.ln_f.bias"}
    assert chosen(model) == expected | {"transformer.h.1.attn.c_attn.weight", "transformer.h.1.attn.c_attn.bias"}


@pytest.mark.parametrize(
    ("last", "modules", "messages"),
    [
        (4, [], [r"method\.last_layers: must be <= 3, the model's layers, got 4"]),
        (0, ["lm_haed"], ['"lm_haed" matches no module.*did you mean "lm_head"']),
        (0, ["proj"], ['"proj" matches no module']),
        (0, ["rotary_emb"], ['"rotary_emb" matches no module']),
        (1, ["lm_head", "one", "two*"], ['"one" matches no module', r'"two\*" matches no module']),
    ],
)
def test_refusals_name_every_problem_and_change_nothing(last: int, modules: list[str], messages: list[str]) -> None:
    model = network()
    before = chosen(model)
    with pytest.raises(InputError) as caught:
        train_only(model, last, modules)
    assert len(caught.value.problems) == len(messages)
    for message in messages:
        assert caught.match(message)
    assert chosen(model) == before


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("last", "modules"), [(1, ""), (2, "lm_head"), (0, "lm_head,mlp"), (1, "ln_f"), (1, "norm"), (0, "*.1.*"), (3, "*")]
)
def test_counts_equal_the_plan(make_trial: MakeTrial, family: str, tied: bool, last: int, modules: str) -> None:
    shape = tiny_shape(family, tied=tied).model_copy(update={"num_layers": 3})
    overrides = [f"model.shape.{key}={value}" for key, value in shape.model_dump().items()]
    trial = make_trial("method=freeze", *overrides, f"method.last_layers={last}", f"method.modules=[{modules}]")
    if modules in ("ln_f", "norm") and (modules == "ln_f") != (family == "gpt2"):
        for refuse in (lambda: counts_of(trial), lambda: attach(network(family, tied=tied), trial)):
            with pytest.raises(InputError, match=f'"{modules}" matches no module'):
                refuse()
        return
    counts = counts_of(trial)
    attached = attach(network(family, tied=tied), trial)
    assert counts is not None
    assert count_parameters(attached.model).trainable == counts.trainable_parameters
    assert {name for name, _ in attached.trained} == chosen(attached.model)


def test_frozen_weights_get_no_gradient() -> None:
    model = network()
    train_only(model, 1, ["lm_head"])
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == names(model, "model.layers.2.", "lm_head.")
