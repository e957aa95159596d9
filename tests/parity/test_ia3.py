"""PEFT's IA3, as the lab configures it, against the paper's definition; on every kind of base; published counts."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.ia3 import IA3Layer, IA3Model
from torch import Tensor, nn

from lora_lab.adapters.ia3 import ia3_config, ia3_sites
from lora_lab.adapters.mov import MovConfig
from lora_lab.errors import InputError
from lora_lab.models.random import random_network
from lora_lab.train.checkpointing import enable_checkpointing
from tests.tuner_bases import (
    FAMILIES,
    IDS,
    close,
    fresh_logits,
    loss_and_gradients,
    network,
    quantized,
    same,
    shaken,
    shape,
    trained_names,
)

FP64 = torch.float64


def targets(base: Any) -> list[str]:
    ends = (".c_attn", ".mlp.c_proj") if base.config.model_type == "gpt2" else (".k_proj", ".v_proj", ".down_proj")
    return [name for name, _ in base.named_modules() if name.endswith(ends)]


def adapted(base: Any) -> Any:
    names = targets(base)
    config = ia3_config(
        names,
        feedforward=ia3_sites(base, names),
        fan_in_fan_out=base.config.model_type == "gpt2",
        base_model_name_or_path=None,
        revision=None,
    )
    return get_peft_model(base, config).eval()


def rotated(x: Tensor, theta: float) -> Tensor:
    """Rotary positions of (heads, tokens, d): pairs (i, i + d/2) turned by position * theta^(-2 i / d)."""
    tokens, d = x.shape[-2:]
    frequencies = theta ** (-torch.arange(0, d, 2, dtype=x.dtype) / d)
    angles = torch.arange(tokens, dtype=x.dtype)[:, None] * frequencies
    one, other = x[..., : d // 2], x[..., d // 2 :]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([one * cos - other * sin, other * cos + one * sin], dim=-1)


def test_one_layer_computes_the_papers_definition() -> None:
    """softmax(Q (l_k * K)^T / sqrt(d)) (l_v * V), (l_ff * act(W_1 x)) W_2, with rotary positions and grouped heads.

    transformers has norms and angles in float32 whatever the model's precision is.
    """
    plain = network("llama", FP64, layers=1)(input_ids=IDS).logits
    base = network("llama", FP64, layers=1)
    model = shaken(adapted(base), amount=0.5)
    block = base.model.layers[0]
    attention, mlp = block.self_attn, block.mlp
    l_k, l_v = (layer.ia3_l["default"].flatten() for layer in (attention.k_proj, attention.v_proj))
    l_ff = mlp.down_proj.ia3_l["default"].flatten()
    theta = base.config.rope_parameters["rope_theta"]

    def normal(x: Tensor, norm: Any) -> Tensor:
        return norm.weight * x / (x.square().mean(dim=-1, keepdim=True) + base.config.rms_norm_eps).sqrt()

    def heads(x: Tensor, count: int) -> Tensor:
        return x.reshape(len(x), count, 16).transpose(0, 1)

    for ids, without in zip(IDS, plain, strict=True):
        x = base.model.embed_tokens.weight[ids]
        u = normal(x, block.input_layernorm)
        q = heads(u @ attention.q_proj.weight.T, 4)
        k = heads(l_k * (u @ attention.k_proj.base_layer.weight.T), 2).repeat_interleave(2, dim=0)
        v = heads(l_v * (u @ attention.v_proj.base_layer.weight.T), 2).repeat_interleave(2, dim=0)
        scores = rotated(q, theta) @ rotated(k, theta).transpose(1, 2) / math.sqrt(16)
        scores = scores.masked_fill(torch.ones(12, 12, dtype=torch.bool).triu(1), -math.inf)
        context = (scores.softmax(dim=-1) @ v).transpose(0, 1).reshape(12, 64)
        x = x + context @ attention.o_proj.weight.T
        u = normal(x, block.post_attention_layernorm)
        gate = u @ mlp.gate_proj.weight.T
        x = x + (l_ff * (gate * gate.sigmoid() * (u @ mlp.up_proj.weight.T))) @ mlp.down_proj.base_layer.weight.T
        expected = normal(x, base.model.norm) @ base.lm_head.weight.T
        torch.testing.assert_close(model(input_ids=ids[None]).logits[0], expected, rtol=0, atol=1e-6)
        assert (expected - without).abs().max() > 0.02


def hooked(base: Any, model: Any) -> None:
    """Puts the vectors of `model` on the plain network `base`."""
    for name, layer in model.named_modules():
        if not isinstance(layer, IA3Layer):
            continue
        module = base.get_submodule(name.removeprefix("base_model.model."))
        vector = layer.ia3_l["default"]
        if layer.is_feedforward:

            def scale_input(_module: nn.Module, args: Any, vector: Tensor = vector) -> Any:
                return ((args[0] * vector.flatten()).to(args[0].dtype),)

            module.register_forward_pre_hook(scale_input)
        else:

            def scale_output(_module: nn.Module, _args: Any, v: Tensor, vector: Tensor = vector) -> Tensor:
                return (v * vector.flatten()).to(v.dtype)

            module.register_forward_hook(scale_output)


@pytest.mark.parametrize("dtype", [FP64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["none", "nf4", "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_base(family: str, kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """PEFT's own layers on quantized bases give float32 back, and a bfloat16 model then fails in attention."""
    if kind != "none" and dtype == FP64:
        pytest.skip("bitsandbytes has no float64")
    base = network(family, dtype) if kind == "none" else quantized(family, kind, dtype, tmp_path)
    plain = base(input_ids=IDS).logits.detach()
    model = adapted(copy.deepcopy(base))
    assert isinstance(model.base_model, IA3Model)
    assert torch.equal(model(input_ids=IDS).logits, plain)
    assert {p.dtype for p in trained_names(model).values()} == {FP64 if dtype == FP64 else torch.float32}
    outputs = []
    for layer in model.modules():
        if isinstance(layer, IA3Layer):
            layer.register_forward_hook(lambda _layer, _args, output: outputs.append(output.dtype))
    logits, gradients = loss_and_gradients(shaken(model, amount=0.5))
    assert set(outputs) == {dtype} == {logits.dtype}
    hooked(base, model)
    expected = base(input_ids=IDS).logits
    wanted = torch.autograd.grad(expected.double().square().mean(), list(trained_names(model).values()))
    assert (logits - plain).abs().max() > 0.02
    tolerance = {FP64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
    close([logits, *gradients], [expected.detach(), *wanted], atol=tolerance)


@pytest.mark.parametrize("kind", ["none", "nf4"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_checkpointing_and_copies_change_nothing(family: str, kind: str, tmp_path: Path) -> None:
    dtype = torch.bfloat16
    base = network(family, dtype) if kind == "none" else quantized(family, kind, dtype, tmp_path)
    base.config.use_cache = False
    model = copy.deepcopy(shaken(adapted(base), amount=0.3)).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    plain, short = loss_and_gradients(model), loss_and_gradients(model, IDS[:1, :1])
    enable_checkpointing(model, "every_layer")
    assert same(loss_and_gradients(model), plain)
    assert same(loss_and_gradients(model, IDS[:1, :1]), short)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_saved_and_loaded(family: str, tmp_path: Path) -> None:
    model = shaken(adapted(network(family, layers=8)))
    logits = model(input_ids=IDS).logits.detach()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(network(family, layers=8), tmp_path).eval()
    assert torch.equal(loaded(input_ids=IDS).logits, logits)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["peft_type"] == "IA3"
    assert set(written["feedforward_modules"]) == set(ia3_sites(network(family, layers=8), written["target_modules"]))


@pytest.mark.slow
def test_a_fresh_process_that_imports_the_lab_gives_the_same_logits(tmp_path: Path) -> None:
    model = shaken(adapted(network("llama")))
    logits = model(input_ids=IDS).logits.detach()
    assert torch.equal(fresh_logits(network("llama"), model, tmp_path), logits)


def test_parameters_of_llama_3_2_3b() -> None:
    """L (d_k + d_v + d_ff) = 28 (1024 + 1024 + 8192), as in PEFT's comparison of methods; MoV has ten of that.

    Its routers read the hidden state at three sites per layer.
    """
    sizes = {"hidden_size": 3072, "num_heads": 24, "num_kv_heads": 8, "head_dim": 128, "mlp_size": 8192}
    with torch.device("meta"):
        base = random_network(shape("llama", layers=28, **sizes), 0)
    model = adapted(copy.deepcopy(base))
    assert sum(parameter.numel() for parameter in trained_names(model).values()) == 286_720
    names = targets(base)
    mov = MovConfig(num_experts=10, target_modules=names, feedforward_modules=ia3_sites(base, names))
    found = trained_names(get_peft_model(base, mov))
    assert sum(p.numel() for name, p in found.items() if "mov_vectors" in name) == 2_867_200
    assert sum(p.numel() for name, p in found.items() if "mov_router" in name) == 28 * 3 * 3072 * 10


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_are_the_last_layers_of_mlps(family: str) -> None:
    base = network(family)
    linear = [name for name, module in base.named_modules() if hasattr(module, "weight") and "norm" not in name]
    path = "transformer.h.{}.mlp.c_proj" if family == "gpt2" else "model.layers.{}.mlp.down_proj"
    assert ia3_sites(base, linear) == [path.format(0), path.format(1)]
    assert ia3_sites(base, [path.format(1)]) == [path.format(1)]
    assert ia3_sites(base, ["transformer.h.0.attn.c_proj", "model.layers.0.mlp.up_proj", "xmlp.down_proj"]) == []


def test_unknown_families_are_refused_with_the_choices() -> None:
    with pytest.raises(InputError, match=r'"qwen"; did you mean "qwen3"\? \(choices: llama, mistral, qwen2, '):
        ia3_sites(SimpleNamespace(config=SimpleNamespace(model_type="qwen")), [])


def test_the_configuration_says_what_it_was_given() -> None:
    names = {"feedforward": ["a.down_proj"], "base_model_name_or_path": "org/model", "revision": "abc"}
    config = ia3_config(["a.k_proj", "a.down_proj"], fan_in_fan_out=True, **names)
    assert (config.target_modules, config.feedforward_modules) == ({"a.k_proj", "a.down_proj"}, {"a.down_proj"})
    assert (config.task_type, config.fan_in_fan_out) == ("CAUSAL_LM", True)
    assert (config.base_model_name_or_path, config.revision) == ("org/model", "abc")
    with pytest.raises(ValueError, match="subset"):
        ia3_config(["a.k_proj"], fan_in_fan_out=False, **names)
