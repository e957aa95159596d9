"""Mixtures of LoRA experts against PEFT's LoRA, slow loops, MoLA's published loop and published counts."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.pytorch_utils import Conv1D

from lora_lab.adapters.dropout import DropoutClock, SeededDropout
from lora_lab.adapters.expert_layer import LoraExpertsLayer, route
from lora_lab.adapters.lora_experts import LoraExpertsConfig, count_experts
from lora_lab.adapters.routing import RoutingLog, set_routing_log
from lora_lab.models.load import load_base
from lora_lab.models.random import random_network
from tests.conftest import MakeTrial
from tests.unit.test_models_random import tiny_shape

IDS = torch.arange(24).reshape(2, 12)
FAMILIES = ["llama", "qwen2", "mistral", "gpt2"]


def network(family: str = "llama", *, dtype: torch.dtype = torch.float64, tied: bool = False) -> Any:
    """Two blocks; the Llama kinds have 4 heads over 2 key-value heads."""
    return random_network(tiny_shape(family, tied=tied), 0).to(dtype).eval()


def linear_names(base: nn.Module) -> list[str]:
    return [name for name, m in base.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and "lm_head" not in name]


def settings(base: nn.Module, **changes: Any) -> LoraExpertsConfig:
    values = {
        "task_type": "CAUSAL_LM",
        "r": 3,
        "lora_alpha": 5,
        "num_experts": 4,
        "top_k": 2,
        "router_init": "kaiming",
        "target_modules": linear_names(base),
    }
    return LoraExpertsConfig(**(values | changes))


def adapted(base: Any, **changes: Any) -> Any:
    torch.manual_seed(0)
    return get_peft_model(base, settings(base, **changes))


def moved(model: Any, *, scale: float = 0.1) -> Any:
    """Trained, for the purposes of a test: routers prefer somebody, B is not zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter += (scale * noise).to(parameter.dtype)
    return model


def layers_of(model: nn.Module) -> list[LoraExpertsLayer]:
    return [module for module in model.modules() if isinstance(module, LoraExpertsLayer)]


def single_layer(base: nn.Module | None = None, **changes: Any) -> LoraExpertsLayer:
    """Trained experts beside one linear layer, 10 -> 7."""
    torch.manual_seed(3)
    model = nn.Sequential()
    model.add_module("only", base or nn.Linear(10, 7, dtype=torch.float64))
    values = {"target_modules": ["only"], "task_type": None} | changes
    return layers_of(moved(get_peft_model(model, settings(model, **values)), scale=0.5))[0]


def weights_by_hand(x: torch.Tensor, router: torch.Tensor, top_k: int | None) -> torch.Tensor:
    """One token after the other."""
    rows = []
    for token in x.reshape(-1, x.shape[-1]):
        scores = [math.exp((token @ expert).item()) for expert in router]
        kept = sorted(range(len(scores)), key=lambda i: -scores[i])[: top_k or len(scores)]
        total = sum(scores[i] for i in kept)
        rows.append([scores[i] / total if i in kept else 0.0 for i in range(len(scores))])
    return torch.tensor(rows, dtype=torch.float64).reshape(*x.shape[:-1], -1)


def mixture_by_hand(layer: Any, x: torch.Tensor, top_k: int | None, name: str = "default") -> torch.Tensor:
    """The equation: expert after expert, token after token."""
    a, b, router = layer.lora_experts_A[name], layer.lora_experts_B[name], layer.lora_experts_router[name]
    weights = weights_by_hand(x, router, top_k).reshape(-1, len(a))
    rows = []
    for token, shares in zip(x.reshape(-1, x.shape[-1]), weights, strict=True):
        rows.append(sum(shares[i] * (b[i] @ (a[i] @ token)) for i in range(len(a))) * (5 / 3))
    return torch.stack(rows).reshape(*x.shape[:-1], -1)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_expert_is_pefts_lora(family: str) -> None:
    ours = moved(adapted(network(family), num_experts=1, top_k=None))
    base = network(family)
    config = LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=5, target_modules=linear_names(base))
    plain = get_peft_model(base, config)
    pairs = []
    for layer in layers_of(ours):
        other: Any = plain.get_submodule(f"base_model.model.{layer.routing_name}")
        for mine, theirs in [("lora_experts_A", "lora_A"), ("lora_experts_B", "lora_B")]:
            weight = getattr(other, theirs)["default"].weight
            weight.data.copy_(getattr(layer, mine)["default"][0])
            pairs.append((getattr(layer, mine)["default"], weight))
    logits = [model(input_ids=IDS).logits for model in (ours, plain)]
    torch.testing.assert_close(logits[0], logits[1], atol=1e-12, rtol=1e-12)
    for found in logits:
        found.square().mean().backward()
    assert len(pairs) == 2 * len(linear_names(network(family))) > 0
    for mine, theirs in pairs:
        torch.testing.assert_close(mine.grad[0], theirs.grad, atol=1e-12, rtol=1e-12)
    routers = [layer.lora_experts_router["default"] for layer in layers_of(ours)]
    assert all(router.grad is not None and not router.grad.any() for router in routers)


@pytest.mark.parametrize("top_k", [None, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_effect_before_training(family: str, dtype: torch.dtype, top_k: int | None) -> None:
    base = network(family, dtype=dtype)
    logits = base(input_ids=IDS).logits
    assert torch.equal(adapted(base, top_k=top_k)(input_ids=IDS).logits, logits)


@pytest.mark.parametrize("router_init", ["normal", "kaiming"])
def test_initial_weights_are_those_of_the_sources(router_init: str) -> None:
    model = nn.Sequential()
    model.add_module("only", nn.Linear(400, 300))
    changes = {"num_experts": 50, "r": 8, "top_k": None, "router_init": router_init}
    torch.manual_seed(0)
    layer = layers_of(get_peft_model(model, settings(model, target_modules=["only"], task_type=None, **changes)))[0]
    a, b, router = (getattr(layer, f"lora_experts_{part}")["default"] for part in ("A", "B", "router"))
    bound = 1 / math.sqrt(400)  # Kaiming uniform, a = sqrt(5): gain sqrt(1/3), times sqrt(3 / inputs)
    assert not b.any()
    uniform = [a] if router_init == "normal" else [a, router]
    for drawn in uniform:
        assert 0.99 * bound < drawn.abs().max() <= bound
        # Standard errors of mean and deviation are below 0.5 % of the bound for 20,000 numbers; bounds are 4 of them.
        assert abs(drawn.mean()) < 0.02 * bound
        assert abs(drawn.std() - bound / math.sqrt(3)) < 0.02 * bound
    if router_init == "normal":
        assert abs(router.std() - 0.02) < 0.0005


@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_exactly_top_k_weights_are_kept_and_sum_to_one(top_k: int) -> None:
    x = torch.randn(5, 6, 10)
    x[0] = 0  # four equal probabilities
    router = torch.randn(4, 10)
    router[2] = router[1]  # two equal ones for every token
    probabilities, weights = route(x, router, top_k)
    assert ((weights > 0).sum(-1) == top_k).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(5, 6))
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(5, 6))
    kept = torch.where(weights > 0, probabilities, 0)
    torch.testing.assert_close(weights, kept / kept.sum(-1, keepdim=True))
    smallest_kept = torch.where(weights > 0, probabilities, torch.inf).amin(-1)
    assert (torch.where(weights > 0, 0, probabilities).amax(-1) <= smallest_kept).all()


def test_without_top_k_the_weights_are_the_softmax() -> None:
    x, router = torch.randn(5, 6, 10), torch.randn(4, 10)
    probabilities, weights = route(x, router, None)
    assert probabilities is weights
    torch.testing.assert_close(weights, torch.softmax(x @ router.T, -1))


@pytest.mark.parametrize("tokens", [(4, 9), (1, 1), (3,)])
@pytest.mark.parametrize(("experts", "top_k"), [(1, None), (4, None), (4, 1), (4, 2), (4, 4), (9, 2)])
def test_a_layer_computes_the_equation(experts: int, top_k: int | None, tokens: tuple[int, ...]) -> None:
    """More experts than tokens, and experts without a token, included."""
    layer = single_layer(num_experts=experts, top_k=top_k)
    x = torch.randn(*tokens, 10, dtype=torch.float64)
    expected = layer.base_layer(x) + mixture_by_hand(layer, x, top_k)
    torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("top_k", [None, 2])
def test_gradients_equal_those_of_a_loop_and_numeric_ones(top_k: int | None) -> None:
    layer: Any = single_layer(top_k=top_k)
    a, b, router = (getattr(layer, f"lora_experts_{part}")["default"] for part in ("A", "B", "router"))
    x = torch.randn(2, 5, 10, dtype=torch.float64, requires_grad=True)
    inputs = (x, a, b, router)

    def loop() -> torch.Tensor:
        scores = (x @ router.T).exp()
        if top_k is not None:
            scores = scores * (scores >= scores.sort(dim=-1, descending=True).values[..., top_k - 1 : top_k])
        weights = scores / scores.sum(-1, keepdim=True)
        parts = [weights[..., i : i + 1] * ((x @ a[i].T) @ b[i].T) for i in range(4)]
        return layer.base_layer(x) + 5 / 3 * sum(parts)

    found = torch.autograd.grad(layer(x).pow(3).sum(), inputs)
    expected = torch.autograd.grad(loop().pow(3).sum(), inputs)
    for one, other in zip(found, expected, strict=True):
        assert other.any()
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)
    assert torch.autograd.gradcheck(layer, (x,))


def test_top_two_equals_molas_published_loop() -> None:
    """MoLA's code: softmax, top 2, division by the sum; then expert by expert on the tokens that chose it."""
    layer: Any = single_layer(top_k=2, num_experts=6)
    a, b, router = (getattr(layer, f"lora_experts_{part}")["default"] for part in ("A", "B", "router"))
    x = torch.randn(3, 8, 10, dtype=torch.float64)
    tokens = x.reshape(-1, 10)
    shares, chosen = torch.topk(F.softmax(tokens @ router.T, dim=1), 2, dim=-1)
    shares = shares / shares.sum(dim=-1, keepdim=True)
    total = torch.zeros(len(tokens), 7, dtype=torch.float64)
    for expert in range(6):
        rows, places = torch.where(chosen == expert)
        if len(rows):
            output = (tokens[rows] @ a[expert].T) @ b[expert].T * (5 / 3)
            total.index_add_(0, rows, output * shares[rows, places, None])
    expected = layer.base_layer(x) + total.reshape(3, 8, 7)
    torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=1e-12)


def test_an_expert_without_a_token_gets_a_zero_gradient() -> None:
    layer: Any = single_layer(top_k=2)
    with torch.no_grad():
        layer.lora_experts_router["default"].zero_()
        layer.lora_experts_router["default"][:2] = 1
    layer(torch.ones(2, 3, 10, dtype=torch.float64)).sum().backward()
    for part in (layer.lora_experts_A["default"], layer.lora_experts_B["default"]):
        assert part.grad[:2].any()
        assert not part.grad[2:].any()


def test_dropout_is_before_the_experts_and_not_before_the_router() -> None:
    layer: Any = single_layer(top_k=2, lora_dropout=0.4)
    assert isinstance(layer.lora_dropout["default"], nn.Dropout)
    assert isinstance(single_layer().lora_dropout["default"], nn.Identity)
    dropout = SeededDropout(0.4, clock=DropoutClock(0, 0, 0), index=0)
    layer.lora_dropout["default"] = dropout
    x = torch.randn(2, 5, 10, dtype=torch.float64)
    log = RoutingLog()
    set_routing_log(layer, log, "default")
    log.open(torch.ones(2, 5))
    found = layer.train()(x) - layer.base_layer(x)
    log.close()
    weights = log.entries["only"].weights
    torch.testing.assert_close(weights, weights_by_hand(x, layer.lora_experts_router["default"], 2))
    a, b = layer.lora_experts_A["default"], layer.lora_experts_B["default"]
    expected = sum(weights[..., i : i + 1] * ((dropout(x) @ a[i].T) @ b[i].T) for i in range(4)) * (5 / 3)
    torch.testing.assert_close(found, expected)
    assert not torch.equal(layer.eval()(x) - layer.base_layer(x), found)


def test_a_bf16_base_keeps_experts_in_float32_and_rounds_once() -> None:
    model = moved(adapted(network(dtype=torch.bfloat16)))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model(input_ids=IDS).logits.dtype == torch.bfloat16
    layer: Any = layers_of(model)[0]
    x = torch.randn(2, 5, layer.in_features, dtype=torch.bfloat16)
    wide = copy.deepcopy(layer).double()
    mixture = wide(x.double()) - wide.base_layer(x.double())
    expected = (layer.base_layer(x).double() + mixture).to(torch.bfloat16)
    found = layer(x)
    assert (found != expected).double().mean() < 0.01  # where float32 falls on the other side of a rounding edge
    torch.testing.assert_close(found, expected)


def test_the_router_works_in_float32_under_autocast() -> None:
    x, router = torch.randn(2, 5, 10), torch.randn(4, 10)
    plain, _ = route(x, router, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under, weights = route(x, router, 2)
        assert (x @ router.T).dtype == torch.bfloat16
    assert torch.equal(plain, under)
    assert weights.dtype == torch.float32
    assert route(x.bfloat16(), router.bfloat16(), 2)[1].dtype == torch.float32
    assert route(x.double(), router.double(), 2)[1].dtype == torch.float64


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_on_a_4_bit_base(make_trial: MakeTrial, cache: Path, kind: str) -> None:
    shape = ["model.shape.family=gpt2", "model.shape.num_kv_heads=4", "target=all_linear"] if kind == "gpt2" else []
    trial = make_trial("quantization=nf4", *shape)
    base = load_base(trial.model, precision="fp32", quantization=trial.quantization, device="cpu", cache=cache).model
    packed = [base.get_submodule(name).weight.data.clone() for name in linear_names(base)]
    names = linear_names(base)
    model = moved(adapted(base))
    layer: Any = layers_of(model)[0]
    x = torch.randn(2, 5, layer.in_features)
    expected = layer.base_layer(x).double() + mixture_by_hand(layer.double(), x.double(), 2)
    torch.testing.assert_close(layer.float()(x).double(), expected, atol=1e-5, rtol=1e-5)
    model(input_ids=IDS).logits.square().mean().backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    layers = [model.get_submodule(f"base_model.model.{name}.base_layer") for name in names]
    assert all(torch.equal(one.weight.data, other) for one, other in zip(layers, packed, strict=True))


def test_on_an_8_bit_base() -> None:
    import bitsandbytes

    eight = bitsandbytes.nn.Linear8bitLt(10, 7, bias=False, has_fp16_weights=False)
    eight.weight = bitsandbytes.nn.Int8Params(torch.randn(7, 10), requires_grad=False, has_fp16_weights=False)
    layer: Any = single_layer(eight.to("cpu"))
    x = torch.randn(2, 5, 10)
    expected = layer.base_layer(x).double() + mixture_by_hand(layer, x, 2)
    torch.testing.assert_close(layer(x).double(), expected, atol=1e-5, rtol=1e-5)
    layer(x).square().sum().backward()
    assert layer.lora_experts_A["default"].grad.any()


@pytest.mark.parametrize("top_k", [None, 2])
def test_checkpointing_changes_no_gradient_and_the_log_notes_once(top_k: int | None) -> None:
    gradients, logs = [], []
    for checkpointing in (False, True):
        model = moved(adapted(network(), top_k=top_k)).train()
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        log = RoutingLog()
        set_routing_log(model, log, "default")
        log.open(torch.ones_like(IDS))
        logits = model(input_ids=IDS, use_cache=False).logits
        log.close()
        penalty = sum(entry.probabilities.square().sum() + entry.weights.pow(3).sum() for entry in log.entries.values())
        noted = {name: entry.weights.clone() for name, entry in log.entries.items()}
        (logits.square().mean() + 0.1 * penalty).backward()
        assert all(torch.equal(log.entries[name].weights, noted[name]) for name in noted)
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
        logs.append(noted)
    assert list(logs[0]) == list(logs[1]) == linear_names(network())
    assert all(torch.equal(logs[0][name], logs[1][name]) for name in logs[0])
    assert all(gradient.any() for gradient in gradients[0])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def pattern_of(base: nn.Module, groups: list[int]) -> dict[str, int]:
    depth = base.config.num_hidden_layers  # type: ignore[union-attr]
    return {name: groups[int(name.split(".")[2]) * len(groups) // depth] for name in linear_names(base)}


LOADER = """
import sys
import lora_lab
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
import torch
from transformers import AutoModelForCausalLM
folder = sys.argv[1]
base = AutoModelForCausalLM.from_pretrained(folder + "/base", dtype=torch.float64)
model = PeftModel.from_pretrained(base, folder + "/adapter").eval()
other = AutoPeftModelForCausalLM.from_pretrained(folder + "/adapter", dtype=torch.float64).eval()
ids = load_file(folder + "/ids.safetensors")["ids"]
save_file({"plain": model(input_ids=ids).logits, "auto": other(input_ids=ids).logits}, folder + "/out.safetensors")
"""


@pytest.mark.slow
def test_a_fresh_process_gets_the_same_logits(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = network()
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    model = moved(adapted(base, expert_pattern=pattern_of(base, [3, 5]), lora_dropout=0.1)).eval()
    model.save_pretrained(tmp_path / "adapter")
    save_file({"ids": IDS}, tmp_path / "ids.safetensors")
    subprocess.run([sys.executable, "-W", "error::UserWarning:peft", "-c", LOADER, tmp_path], check=True)
    logits = model(input_ids=IDS).logits
    found = load_file(tmp_path / "out.safetensors")
    assert torch.equal(found["plain"], logits)
    assert torch.equal(found["auto"], logits)
    keys = load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    assert len(keys) == 3 * len(linear_names(network()))  # A, B and router of each, nothing of the base


def test_adapters_are_switched_disabled_copied_and_deleted() -> None:
    base = network()
    plain = base(input_ids=IDS).logits
    model = moved(adapted(base, target_modules=["q_proj", "up_proj"]))
    first = model(input_ids=IDS).logits
    model.add_adapter("second", settings(base, num_experts=2, top_k=None, target_modules=["q_proj", "down_proj"]))
    assert torch.equal(model(input_ids=IDS).logits, first)
    assert all(parameter.requires_grad == name.endswith(".default") for name, parameter in model.named_parameters())
    assert not any(isinstance(layer.base_layer, LoraExpertsLayer) for layer in layers_of(model))
    model.set_adapter("second")
    assert all(parameter.requires_grad == name.endswith(".second") for name, parameter in model.named_parameters())
    moved(model)
    second = model(input_ids=IDS).logits
    assert not torch.equal(second, first) and not torch.equal(second, plain)
    twin = copy.deepcopy(model)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=IDS).logits, plain)
    model.base_model.set_adapter(["default", "second"])
    both = model(input_ids=IDS).logits
    assert not torch.equal(both, first) and not torch.equal(both, second)
    model.delete_adapter("second")
    assert torch.equal(model(input_ids=IDS).logits, first)
    assert {tuple(layer.num_experts) for layer in layers_of(model)} == {("default",), ()}
    assert torch.equal(twin(input_ids=IDS).logits, second)
    assert torch.equal(twin.unload()(input_ids=IDS).logits, plain)


def test_merging_is_refused_and_changes_nothing() -> None:
    model = moved(adapted(network(), modules_to_save=["embed_tokens"]))
    logits, before = model(input_ids=IDS).logits, list(model.state_dict())
    for merge in (model.merge_and_unload, model.merge_adapter, lambda: layers_of(model)[0].merge()):
        with pytest.raises(ValueError, match="cannot be merged"):
            merge()
        assert list(model.state_dict()) == before
    assert torch.equal(model(input_ids=IDS).logits, logits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 0}, "num_experts: expected an integer >= 1, got 0"),
        ({"num_experts": 2.0}, "num_experts: expected an integer >= 1, got 2.0"),
        ({"num_experts": True}, "num_experts: expected an integer >= 1, got True"),
        ({"r": 0}, "r: expected an integer >= 1, got 0"),
        ({"top_k": 0}, "top_k: expected an integer >= 1, got 0"),
        ({"top_k": 5}, "top_k: 5 is more than the 4 experts of every target"),
        ({"top_k": 3, "expert_pattern": {"a.b": 2}}, "top_k: 3 is more than the 2 experts of a.b"),
        ({"expert_pattern": {"a.b": 0}}, r"expert_pattern\[a.b\]: expected an integer >= 1, got 0"),
        ({"router_init": "zeros"}, "router_init: expected one of normal, kaiming, got 'zeros'"),
        ({"bias": "lora_only"}, "bias: expected one of none, all, lora_experts_only, got 'lora_only'"),
        ({"lora_alpha": 0}, "lora_alpha: expected a number > 0, got 0"),
        ({"lora_dropout": 1.0}, "lora_dropout: expected 0 <= lora_dropout < 1, got 1.0"),
        ({"target_modules": ".*proj"}, "target_modules: expected a list of module names, got '.*proj'"),
        ({"target_modules": []}, "target_modules: expected a list of module names"),
        ({"layers_pattern": "layers"}, "layers_pattern: 'layers' needs layers_to_transform"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(network(), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"expert_pattern": {"model.layers.1.mlp.up_proj": 8}, "top_k": 6},
            "top_k: 6 is more than the 4 experts of model.layers.0.mlp.down_proj",
        ),
        ({"expert_pattern": {"model.layers.7.mlp.up_proj": 8}}, "expert_pattern: model.layers.7.mlp.up_proj"),
        ({"target_modules": ["embed_tokens"]}, "model.embed_tokens is Embedding"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_it_is_touched(changes: dict[str, Any], message: str) -> None:
    base = network()
    with pytest.raises(ValueError, match=message):
        adapted(base, **changes)
    assert not layers_of(base)
    model = adapted(network())
    with pytest.raises(ValueError, match=message):
        model.add_adapter("second", settings(network(), **changes))
    assert all(list(layer.num_experts) == ["default"] for layer in layers_of(model))


def test_a_pattern_that_covers_every_target_makes_num_experts_irrelevant() -> None:
    base = network()
    model = adapted(base, num_experts=1, top_k=3, expert_pattern=pattern_of(base, [3, 5]))
    assert {layer.num_experts["default"] for layer in layers_of(model)} == {3, 5}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_parameter_formula(family: str) -> None:
    base = network(family)
    names = linear_names(base)
    sizes = [sum(base.get_submodule(name).weight.shape) for name in names]
    model = adapted(base, r=3, num_experts=4)
    inputs = [layer.in_features for layer in layers_of(model)]
    found = count_experts(model, "default")
    assert found == (sum(4 * 3 * size for size in sizes), sum(4 * size for size in inputs))
    assert sum(found) == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize(
    ("groups", "counts"),
    [
        ([2, 4, 6, 8], (99_942_400, 5_693_440)),
        ([8, 6, 4, 2], (99_942_400, 5_693_440)),
        ([8, 2, 2, 8], (99_942_400, 5_693_440)),
        ([5, 5, 5, 5], (99_942_400, 5_693_440)),
        ([8, 8, 8, 8], (159_907_840, 9_109_504)),
    ],
)
def test_molas_shapes_have_the_published_counts_on_llama_2_7b(groups: list[int], counts: tuple[int, int]) -> None:
    config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config)
        changes = {"r": 8, "num_experts": 8, "top_k": 2, "expert_pattern": pattern_of(base, groups)}
        assert count_experts(get_peft_model(base, settings(base, **changes)), "default") == counts


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_embeddings_stay_untouched(tied: bool) -> None:
    base = network(tied=tied)
    before = {name: parameter.clone() for name, parameter in base.named_parameters()}
    model = moved(adapted(base))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    after = {name.replace(".base_layer", ""): parameter for name, parameter in base.named_parameters()}
    assert all(torch.equal(after[name], before[name]) for name in before)
