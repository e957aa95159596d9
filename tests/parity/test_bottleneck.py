"""Bottleneck adapters against their formula, put on a plain network by hooks, and against PEFT's ways of use."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, OPTConfig

from lora_lab.adapters.bottleneck import BottleneckConfig, BottleneckLayer, bottleneck_targets
from lora_lab.adapters.dropout import DropoutClock, SeededDropout
from lora_lab.errors import InputError
from lora_lab.train.checkpointing import enable_checkpointing
from tests.tiers import mostly_slow
from tests.tuner_bases import (
    FAMILIES,
    IDS,
    close,
    fresh_logits,
    loss_and_gradients,
    network,
    quantized,
    run_python,
    same,
    shaken,
    trained_names,
)

STYLES = ["houlsby", "pfeiffer", "parallel"]
FP64 = torch.float64


def config(base: Any, style: str, **settings: Any) -> BottleneckConfig:
    placement = "parallel" if style == "parallel" else "output"
    return BottleneckConfig(
        task_type="CAUSAL_LM",
        target_modules=bottleneck_targets(base, style),
        placement=placement,
        **{"bottleneck_size": 6, "activation": "gelu", "scaling": 1.0, **settings},
    )


def adapted(base: Any, style: str, **settings: Any) -> Any:
    torch.manual_seed(3)
    return get_peft_model(base, config(base, style, **settings)).eval()


def layers_of(model: Any) -> dict[str, BottleneckLayer]:
    prefix = "base_model.model."
    found = {name: module for name, module in model.named_modules() if isinstance(module, BottleneckLayer)}
    return {name.removeprefix(prefix): module for name, module in found.items()}


def by_hand(u: Tensor, weights: list[Tensor], activation: str, scaling: float) -> Tensor:
    """scaling * (W_up f(W_down u + b_down) + b_up), with the activations' own definitions."""
    w_down, b_down, w_up, b_up = weights
    z = u.to(w_down.dtype) @ w_down.T + b_down
    f = {
        "relu": torch.where(z > 0, z, torch.zeros_like(z)),
        "gelu": z * (1 + torch.erf(z / math.sqrt(2))) / 2,
        "silu": z / (1 + torch.exp(-z)),
        "tanh": (torch.exp(z) - torch.exp(-z)) / (torch.exp(z) + torch.exp(-z)),
    }[activation]
    return scaling * (f @ w_up.T + b_up)


def weights_of(layer: Any, name: str = "default") -> list[Tensor]:
    down, up = layer.bottleneck_down[name], layer.bottleneck_up[name]
    return [down.weight, down.bias, up.weight, up.bias]


def hooked(base: Any, model: Any, *, parallel: bool, activation: str, scaling: float) -> None:
    """Puts the adapters of `model` on the plain network `base`."""
    for name, layer in layers_of(model).items():

        def add(_module: nn.Module, args: Any, h: Tensor, layer: Any = layer) -> Tensor:
            u = args[0] if parallel else h
            return (h + by_hand(u, weights_of(layer), activation, scaling)).to(h.dtype)

        base.get_submodule(name).register_forward_hook(add)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_equal_the_formula(family: str, style: str) -> None:
    model = shaken(adapted(network(family, FP64), style, scaling=1.5, activation="silu"))
    base = network(family, FP64)
    plain = base(input_ids=IDS).logits.detach()
    hooked(base, model, parallel=style == "parallel", activation="silu", scaling=1.5)
    logits, gradients = loss_and_gradients(model)
    assert (logits - plain).abs().max() > 1e-3
    expected = base(input_ids=IDS).logits
    wanted = torch.autograd.grad(expected.square().mean(), list(trained_names(model).values()))
    close([logits, *gradients], [expected.detach(), *wanted], atol=1e-11)


@pytest.mark.parametrize("placement", ["output", "parallel"])
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "tanh"])
def test_a_layer_computes_the_formula(activation: str, placement: str) -> None:
    style = "parallel" if placement == "parallel" else "pfeiffer"
    model = shaken(adapted(network("llama", FP64), style, activation=activation, scaling=4.0), amount=0.5)
    layer = next(iter(layers_of(model).values()))
    x = torch.randn(
        3, 5, 64 if placement == "parallel" else 128, dtype=FP64, generator=torch.Generator().manual_seed(0)
    )
    h = layer.base_layer(x)
    u = x if placement == "parallel" else h
    expected = h + by_hand(u, weights_of(layer), activation, 4.0)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP64])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_effect_at_the_start(family: str, style: str, dtype: torch.dtype) -> None:
    base = network(family, dtype)
    before = base(input_ids=IDS).logits
    model = adapted(base, style)
    assert torch.equal(model(input_ids=IDS).logits, before)
    assert {p.dtype for p in trained_names(model).values()} == {FP64 if dtype == FP64 else torch.float32}
    _, gradients = loss_and_gradients(model)
    moving = [name for name, g in zip(trained_names(model), gradients, strict=True) if g.abs().max() > 0]
    assert moving and all("bottleneck_up" in name for name in moving)


def test_initial_weights() -> None:
    """down: uniform within 1 / sqrt(d), of variance 1 / (3 d); the rest zero; drawn from the global generator."""
    first, second = (adapted(network("llama"), "houlsby", bottleneck_size=64) for _ in range(2))
    for layer, other in zip(layers_of(first).values(), layers_of(second).values(), strict=True):
        w_down, b_down, w_up, b_up = weights_of(layer)
        assert torch.equal(w_down, weights_of(other)[0])
        assert w_down.abs().max() <= 1 / 8
        assert w_down.var().item() == pytest.approx(1 / (3 * 64), rel=0.1)
        assert not (b_down.any() or w_up.any() or b_up.any())


NAMES = {
    ("llama", "houlsby"): ["model.layers.{}.self_attn.o_proj", "model.layers.{}.mlp.down_proj"],
    ("llama", "pfeiffer"): ["model.layers.{}.mlp.down_proj"],
    ("llama", "parallel"): ["model.layers.{}.mlp"],
    ("gpt2", "houlsby"): ["transformer.h.{}.attn.c_proj", "transformer.h.{}.mlp.c_proj"],
    ("gpt2", "pfeiffer"): ["transformer.h.{}.mlp.c_proj"],
    ("gpt2", "parallel"): ["transformer.h.{}.mlp"],
}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("family", FAMILIES)
def test_where_the_adapters_go(family: str, style: str) -> None:
    base = network(family, layers=3)
    names = NAMES["gpt2" if family == "gpt2" else "llama", style]
    expected = [name.format(layer) for layer in range(3) for name in names]
    assert bottleneck_targets(base, style) == expected
    assert list(layers_of(adapted(base, style))) == expected


def test_unknown_styles_and_families_are_refused_with_the_choices() -> None:
    config = OPTConfig(hidden_size=8, ffn_dim=8, num_hidden_layers=1, num_attention_heads=1, word_embed_proj_dim=8)
    base = AutoModelForCausalLM.from_config(config)
    with pytest.raises(InputError) as caught:
        bottleneck_targets(base, "pfeifer")
    text = str(caught.value)
    assert 'did you mean "pfeiffer"' in text and '"opt"' in text
    assert all(known in text for known in [*STYLES, *FAMILIES])


@pytest.mark.parametrize(("d", "m"), [(40, 7), (72, 1), (64, 100)])
@pytest.mark.parametrize(("style", "per_block"), [("houlsby", 2), ("pfeiffer", 1), ("parallel", 1)])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_parameters(family: str, style: str, per_block: int, d: int, m: int) -> None:
    """2 d m + m + d per adapter; attention is wider than d here where the family allows it."""
    sizes = {"hidden_size": d, "head_dim": d // 4 if family == "gpt2" else 24, "mlp_size": 56}
    model = adapted(network(family, layers=3, **sizes), style, bottleneck_size=m)
    found = sum(parameter.numel() for parameter in trained_names(model).values())
    assert found == 3 * per_block * (2 * d * m + m + d)
    assert all("bottleneck_" in name for name in trained_names(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("style", ["houlsby", "parallel"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_quantized_bases(family: str, kind: str, style: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base = quantized(family, kind, dtype, tmp_path)
    plain = base(input_ids=IDS).logits.detach()
    stored = {
        name: value.clone() for name, value in base.state_dict().items() if value.dtype in (torch.uint8, torch.int8)
    }
    model = adapted(copy.deepcopy(base), style, scaling=2.0)
    assert torch.equal(model(input_ids=IDS).logits, plain)
    logits, gradients = loss_and_gradients(shaken(model))
    assert {p.dtype for p in trained_names(model).values()} == {torch.float32}
    assert logits.dtype == dtype
    hooked(base, model, parallel=style == "parallel", activation="gelu", scaling=2.0)
    expected = base(input_ids=IDS).logits
    wanted = torch.autograd.grad(expected.double().square().mean(), list(trained_names(model).values()))
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    close([logits, *gradients], [expected.detach(), *wanted], atol=tolerance)
    assert (logits - plain).abs().max() > 1e-3
    kept = {name.replace("base_layer.", ""): value for name, value in model.get_base_model().state_dict().items()}
    assert stored and all(torch.equal(kept[name], value) for name, value in stored.items())


@pytest.mark.parametrize("mode", ["every_layer", 2])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_checkpointing_changes_nothing(family: str, style: str, mode: str | int) -> None:
    """With a dropout whose mask is a function of the run, as the lab has it."""
    model = shaken(adapted(network(family), style, bottleneck_dropout=0.3)).train()
    clock = DropoutClock(seed=1, step=0, micro_batch=0)
    for index, layer in enumerate(layers_of(model).values()):
        layer.lora_dropout["default"] = SeededDropout(0.3, clock=clock, index=index)
    one_token = IDS[:1, :1]
    plain, short = loss_and_gradients(model), loss_and_gradients(model, one_token)
    enable_checkpointing(model, mode)
    assert same(loss_and_gradients(model), plain)
    assert same(loss_and_gradients(model, one_token), short)
    model.eval()
    assert not torch.equal(model(input_ids=IDS).logits, plain[0])


def test_dropout_is_on_the_adapters_input() -> None:
    model = shaken(adapted(network("llama", FP64), "pfeiffer", bottleneck_dropout=0.4, activation="tanh"))
    layer = next(iter(layers_of(model).values()))
    dropout: Any = layer.lora_dropout["default"]
    assert dropout.p == 0.4
    x = torch.randn(2, 3, 128, dtype=FP64, generator=torch.Generator().manual_seed(0))
    h = layer.base_layer(x)
    torch.testing.assert_close(layer(x), h + by_hand(h, weights_of(layer), "tanh", 1.0), rtol=0, atol=1e-12)
    layer.train()
    clock = DropoutClock(seed=5, step=2, micro_batch=0)
    layer.lora_dropout["default"] = SeededDropout(0.4, clock=clock, index=0)
    dropped = SeededDropout(0.4, clock=clock, index=0)(h)
    assert 0.2 < (dropped == 0).double().mean() < 0.6
    torch.testing.assert_close(layer(x), h + by_hand(dropped, weights_of(layer), "tanh", 1.0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("style", ["houlsby", "parallel"])
def test_several_adapters_add_up_and_go_again(style: str) -> None:
    base = network("llama", FP64)
    plain = base(input_ids=IDS).logits.detach()
    model = shaken(adapted(base, style))
    alone = model(input_ids=IDS).logits.detach()
    others = config(base, style, bottleneck_size=3, activation="relu", scaling=0.5)
    model.add_adapter("other", others)
    assert torch.equal(model(input_ids=IDS).logits, alone)
    assert all(".default." in name for name in trained_names(model))
    model.set_adapter("other")
    assert all(".other." in name for name in trained_names(model))
    shaken(model)
    model.base_model.set_adapter(["default", "other"])
    layer = layers_of(model)["model.layers.1.mlp.down_proj" if style == "houlsby" else "model.layers.1.mlp"]
    x = torch.randn(2, 3, 128 if style == "houlsby" else 64, dtype=FP64, generator=torch.Generator().manual_seed(0))
    h = layer.base_layer(x)
    u = h if style == "houlsby" else x
    both = by_hand(u, weights_of(layer), "gelu", 1.0) + by_hand(u, weights_of(layer, "other"), "relu", 0.5)
    torch.testing.assert_close(layer(x), h + both, rtol=0, atol=1e-12)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=IDS).logits, plain)
    model.delete_adapter("other")
    assert not [name for name, _ in model.named_modules() if "other" in name]
    torch.testing.assert_close(model(input_ids=IDS).logits, alone, rtol=0, atol=1e-12)
    assert torch.equal(model.unload()(input_ids=IDS).logits, plain)
    assert not [module for module in base.modules() if isinstance(module, BottleneckLayer)]


def test_deep_copies_are_independent() -> None:
    model = shaken(adapted(network("gpt2"), "houlsby"))
    before = model(input_ids=IDS).logits.detach()
    twin = copy.deepcopy(model)
    assert torch.equal(twin(input_ids=IDS).logits, before)
    shaken(twin)
    assert torch.equal(model(input_ids=IDS).logits, before)
    assert not torch.equal(twin(input_ids=IDS).logits, before)


@pytest.mark.parametrize(("first", "second"), [("houlsby", "parallel"), ("parallel", "pfeiffer")])
def test_adapters_on_an_mlp_and_inside_it_are_refused(first: str, second: str) -> None:
    base = network("llama")
    other = config(base, second)
    model = shaken(adapted(base, first))
    before = model(input_ids=IDS).logits.detach()
    with pytest.raises(ValueError, match="same, got output and parallel"):
        model.add_adapter("other", other)
    assert list(model.peft_config) == ["default"]
    assert torch.equal(model(input_ids=IDS).logits, before)


@pytest.mark.parametrize("style", ["houlsby", "parallel"])
def test_merging_is_refused_and_changes_nothing(style: str) -> None:
    model = shaken(adapted(network("llama"), style))
    before = model(input_ids=IDS).logits.detach()
    for merge in (model.merge_and_unload, model.merge_adapter, next(iter(layers_of(model).values())).merge):
        with pytest.raises(ValueError, match="not linear"):
            merge()
    assert torch.equal(model(input_ids=IDS).logits, before)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(("family", "layers"), [("qwen2", 2), ("gpt2", 2), ("llama", 24)])
def test_saved_and_loaded(family: str, layers: int, style: str, tmp_path: Path) -> None:
    """24 layers: beyond 20 names PEFT saves ends of names in their place."""
    model = shaken(adapted(network(family, layers=layers), style, scaling=2.0, bottleneck_dropout=0.1))
    logits = model(input_ids=IDS).logits.detach()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(network(family, layers=layers), tmp_path).eval()
    assert torch.equal(loaded(input_ids=IDS).logits, logits)
    assert not trained_names(loaded)
    again = PeftModel.from_pretrained(network(family, layers=layers), tmp_path, is_trainable=True)
    assert trained_names(again).keys() == trained_names(model).keys()
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["peft_type"], written["scaling"], written["activation"]) == ("BOTTLENECK", 2.0, "gelu")


@pytest.mark.slow
def test_a_fresh_process_that_imports_the_lab_gives_the_same_logits(tmp_path: Path) -> None:
    model = shaken(adapted(network("llama"), "parallel"))
    logits = model(input_ids=IDS).logits.detach()
    assert torch.equal(fresh_logits(network("llama"), model, tmp_path), logits)


FIRST = ("import lora_lab.adapters.bottleneck", "import peft, lora_lab", "import lora_lab.adapters.peft_types")


@pytest.mark.parametrize("first", mostly_slow(FIRST, keep=FIRST[1:2]))
def test_any_order_of_imports_registers_it(first: str) -> None:
    found = run_python(
        f"{first}\nimport peft\nprint(*(kind.value for kind in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING))"
    )
    assert {"BOTTLENECK", "MOV"} < set(found.split())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bottleneck_size": 0}, "bottleneck_size: expected an integer >= 1, got 0"),
        ({"bottleneck_size": 0.5}, "bottleneck_size: expected an integer >= 1, got 0.5"),
        ({"activation": "rely"}, 'did you mean "relu"'),
        ({"placement": "paralel"}, 'did you mean "parallel"'),
        ({"scaling": math.inf}, "scaling: expected a finite number"),
        ({"bottleneck_dropout": 1.0}, "expected 0 <= p < 1, got 1.0"),
        ({"bias": "lora_only"}, '"bottleneck_only", got "lora_only"'),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        BottleneckConfig(**{"bottleneck_size": 4, **settings})


def test_modules_that_do_not_fit_the_placement_are_refused() -> None:
    settings = {"bottleneck_size": 4, "target_modules": ["model.layers.0.mlp"]}
    with pytest.raises(ValueError, match=r'layers.0.mlp: placement "output" needs a linear layer, got LlamaMLP'):
        get_peft_model(network("llama"), BottleneckConfig(placement="output", **settings))
    settings["target_modules"] = ["down_proj"]
    with pytest.raises(ValueError, match=r'mlp.down_proj: placement "parallel" needs a whole MLP, got Linear'):
        get_peft_model(network("llama"), BottleneckConfig(placement="parallel", **settings))


def test_layers_can_be_chosen_and_biases_trained(tmp_path: Path) -> None:
    settings = {"bottleneck_size": 4, "target_modules": ["c_proj"], "exclude_modules": ["attn.c_proj"]}
    model = get_peft_model(
        network("gpt2"), BottleneckConfig(layers_to_transform=[1], bias="bottleneck_only", **settings)
    )
    assert list(layers_of(model)) == ["transformer.h.1.mlp.c_proj"]
    trained = {name.removeprefix("base_model.model.transformer.h.1.mlp.c_proj.") for name in trained_names(model)}
    weights = {f"bottleneck_{part}.default.{kind}" for part in ("down", "up") for kind in ("weight", "bias")}
    assert trained == weights | {"base_layer.bias"}
    logits = shaken(model).eval()(input_ids=IDS).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(network("gpt2"), tmp_path).eval()
    assert torch.equal(loaded(input_ids=IDS).logits, logits)
