"""The digest of a model in memory: equal for a fresh load of the same, another for whatever computes something else."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn

from lora_lab.adapters.attach import attach
from lora_lab.adapters.save import load_adapter, save_adapter
from lora_lab.evaluate.weights_digest import weights_digest
from lora_lab.models.int8 import use_one_product
from tests.conftest import MakeTrial
from tests.tuner_bases import FAMILIES, IDS, network, quantized, run_python, shaken

METHODS = {
    "lora": (),
    "dora": (),
    "ia3": (),
    "prefix_tuning": ("method.virtual_tokens=3",),
    "bottleneck": (),
    "mov": ("method.experts=2",),
    "molora": ("method.experts=2",),
}


def lora(model: Any, **settings: Any) -> Any:
    config = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return shaken(get_peft_model(model, LoraConfig(**{**config, **settings})))


def used(model: Any) -> Any:
    """After forward passes and a generation, which leave their marks on some modules."""
    with torch.no_grad():
        model(input_ids=IDS, output_hidden_states=True)
        mask = torch.ones_like(IDS)
        model.generate(input_ids=IDS, attention_mask=mask, max_new_tokens=2, do_sample=False, pad_token_id=256)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_load_has_the_same_digest_used_or_not(family: str) -> None:
    model = network(family)
    digest = weights_digest(model)
    assert re.fullmatch("[0-9a-f]{64}", digest)
    assert digest == weights_digest(network(family)) == weights_digest(used(model))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantized_load_has_the_same_digest_used_or_not(kind: str, tmp_path: Path) -> None:
    model = quantized("llama", kind, torch.float32, tmp_path / "one")
    digest = weights_digest(model)
    assert digest == weights_digest(quantized("llama", kind, torch.float32, tmp_path / "other"))
    assert digest == weights_digest(used(model))


def test_another_process_has_the_same_digest(tmp_path: Path) -> None:
    """Nothing of it depends on hash seeds, memory addresses or the order of sets."""
    code = (
        "from tests.unit.test_weights_digest import *\n"
        "print(weights_digest(lora(network('llama'), target_modules=['q_proj', 'v_proj', 'o_proj', 'down_proj'])))"
    )
    here = weights_digest(lora(network("llama"), target_modules=["q_proj", "v_proj", "o_proj", "down_proj"]))
    assert run_python(code).strip() == here


def test_training_flags_names_and_saved_copies_do_not_matter(tmp_path: Path) -> None:
    model = network("llama")
    digest = weights_digest(model)
    model.train()
    model.requires_grad_(False)
    model.name_or_path = model.config._name_or_path = "another/name"
    assert weights_digest(model) == digest
    assert weights_digest(copy.deepcopy(model)) == digest


def _one_weight(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-7


def _negative_zero(model: Any) -> None:
    with torch.no_grad():
        model.model.norm.weight[0] = -0.0


CHANGES: dict[str, Callable[[Any], Any]] = {
    "one weight": _one_weight,
    "the sign of a zero": _negative_zero,
    "dtype": lambda model: model.to(torch.bfloat16),
    "a norm's epsilon": lambda model: setattr(model.model.layers[0].input_layernorm, "variance_epsilon", 1e-3),
    "an attention's scaling": lambda model: setattr(model.model.layers[0].self_attn, "scaling", 0.3),
    "rotary frequencies, in no file": lambda model: model.model.rotary_emb.inv_freq.mul_(1.01),
    "attention implementation": lambda model: model.set_attn_implementation("eager"),
    "rope in the configuration": lambda model: model.config.rope_parameters.update(rope_theta=5e5),
    "generation's configuration": lambda model: setattr(model.generation_config, "repetition_penalty", 1.5),
    "another activation": lambda model: setattr(model.model.layers[0].mlp, "act_fn", nn.GELU()),
    "a hook": lambda model: model.lm_head.register_forward_hook(lambda _module, _inputs, output: 2 * output),
    "two weights swapped": lambda model: _swap(model.model.layers[0].mlp),
    "a shared module": lambda model: setattr(model.model.layers[1], "mlp", model.model.layers[0].mlp),
}


def _swap(mlp: Any) -> None:
    mlp.gate_proj.weight, mlp.up_proj.weight = mlp.up_proj.weight, mlp.gate_proj.weight


@pytest.mark.parametrize("change", CHANGES)
def test_what_computes_something_else_differs(change: str) -> None:
    model = network("llama")
    if change == "the sign of a zero":
        with torch.no_grad():
            model.model.norm.weight[0] = 0.0
    before = weights_digest(model)
    CHANGES[change](model)
    assert weights_digest(model) != before


def test_a_tied_head_is_read_once_and_one_of_its_own_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, hashed = network("llama"), []
    model.lm_head.weight = model.model.embed_tokens.weight
    numpy = torch.Tensor.numpy
    monkeypatch.setattr(torch.Tensor, "numpy", lambda self: hashed.append(self.data_ptr()) or numpy(self))
    before = weights_digest(model)
    assert hashed.count(model.lm_head.weight.data_ptr()) == 1
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    assert weights_digest(model) != before


ADAPTERS: dict[str, Callable[[], Any]] = {
    "base": lambda: network("llama"),
    "lora": lambda: lora(network("llama")),
    "other weights": lambda: shaken(lora(network("llama")), 0.01),
    "other alpha": lambda: lora(network("llama"), lora_alpha=8),
    "rslora": lambda: lora(network("llama"), use_rslora=True),
    "dora": lambda: lora(network("llama"), use_dora=True),
    "other rank": lambda: lora(network("llama"), r=3),
    "other targets": lambda: lora(network("llama"), target_modules=["v_proj"]),
    "a module to save": lambda: lora(network("llama"), modules_to_save=["lm_head"]),
    "ia3": lambda: get_peft_model(
        network("llama"), IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    ),
    "prompt": lambda: get_peft_model(network("llama"), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")),
    "disabled": lambda: _disabled(lora(network("llama"))),
    "merged": lambda: _merged(lora(network("llama"))),
    "melted": lambda: lora(network("llama")).merge_and_unload(),
    "scaled": lambda: _scaled(lora(network("llama"))),
    "second, idle": lambda: _second(lora(network("llama"))),
    "second, active": lambda: _chosen(_second(lora(network("llama")))),
}


def _disabled(model: Any) -> Any:
    model.base_model.disable_adapter_layers()
    return model


def _merged(model: Any) -> Any:
    model.merge_adapter()
    return model


def _scaled(model: Any) -> Any:
    model.base_model.model.model.layers[1].self_attn.q_proj.scaling["default"] *= 1.5
    return model


def _second(model: Any) -> Any:
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], init_lora_weights=True))
    return model


def _chosen(model: Any) -> Any:
    model.set_adapter("second")
    return model


def test_no_two_adapters_share_a_digest() -> None:
    torch.manual_seed(0)  # initial weights of PEFT's
    digests = {name: weights_digest(make()) for name, make in ADAPTERS.items()}
    assert len(set(digests.values())) == len(digests), digests


def test_an_adapter_switched_off_for_a_while(tmp_path: Path) -> None:
    for model in (lora(network("llama")), ADAPTERS["prompt"]()):
        before = weights_digest(model)
        with model.disable_adapter():
            assert weights_digest(model) != before
        assert weights_digest(model) == before


@pytest.mark.parametrize("method", METHODS)
def test_every_kind_of_adapter_is_in_it(make_trial: MakeTrial, tmp_path: Path, method: str) -> None:
    """Loaded twice the same; another file, another digest. The lab's own kinds among them."""
    trial = make_trial(f"method={method}", *METHODS[method])
    digests = []
    for amount in (0.1, 0.2):
        attached = attach(network("llama"), trial, steps=10)
        save_adapter(shaken(attached.model, amount), tmp_path / str(amount))
        digests.append(weights_digest(load_adapter(network("llama"), tmp_path / str(amount))))
    base = weights_digest(network("llama"))
    assert len({base, *digests}) == 3
    again = load_adapter(network("llama"), tmp_path / "0.2")
    assert weights_digest(again) == digests[1] == weights_digest(used(again))


@pytest.mark.parametrize("nested", [False, True])
def test_every_part_of_a_four_bit_weight(tmp_path: Path, nested: bool) -> None:
    model = _four_bit(tmp_path, nested=nested)
    weight = model.model.layers[0].self_attn.q_proj.weight
    state = weight.quant_state
    parts = {"codes": weight.data, "absmax": state.absmax, "code book": state.code}
    if nested:
        parts |= {"offset": state.offset, "nested absmax": state.state2.absmax, "nested code": state.state2.code}
    for name, part in parts.items():
        before, kept = weights_digest(model), part.clone()
        part += 1
        assert weights_digest(model) != before, name
        part.copy_(kept)
        assert weights_digest(model) == before
    state.blocksize *= 2
    assert weights_digest(model) != before


def _four_bit(folder: Path, *, nested: bool) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    network("llama").save_pretrained(folder)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=nested)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings)


@pytest.mark.parametrize("own_layer", [False, True])
def test_every_part_of_an_eight_bit_layer(tmp_path: Path, own_layer: bool) -> None:
    """bitsandbytes' layer keeps its scales on the weight, after a forward pass in its state; the lab's in a buffer."""
    model = quantized("llama", "int8", torch.float32, tmp_path)
    if own_layer:
        use_one_product(model)
    for _ in ("unused", "used"):
        layer = model.model.layers[0].self_attn.q_proj
        before = weights_digest(model)
        scales = layer.state.SCB if layer.state.SCB is not None else layer.weight.SCB
        scales *= 2
        assert weights_digest(model) != before
        scales /= 2
        threshold, layer.state.threshold = layer.state.threshold, 1.0
        assert weights_digest(model) != before
        layer.state.threshold = threshold
        assert weights_digest(used(model)) == before


def test_bf16_and_other_widths_are_read_as_bytes() -> None:
    class Plain(nn.Module):
        def __init__(self, value: torch.Tensor) -> None:
            super().__init__()
            self.register_buffer("kept", value, persistent=False)

    values = [torch.tensor(1, dtype=dtype) for dtype in (torch.bfloat16, torch.float16, torch.int8, torch.bool)]
    values += [torch.empty(0), torch.ones(2, 3), torch.ones(3, 2), torch.ones(6), torch.arange(6.0).reshape(2, 3).T]
    digests = {weights_digest(Plain(value)) for value in values}
    assert len(digests) == len(values)
    strided = torch.arange(6.0).reshape(2, 3).T
    assert weights_digest(Plain(strided)) == weights_digest(Plain(strided.contiguous()))


def test_a_model_without_values_is_refused() -> None:
    with pytest.raises(ValueError, match=r"bias is on the meta device"):
        weights_digest(nn.Linear(2, 2, device="meta"))


def test_no_copy_of_a_tensor_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """A contiguous tensor on the CPU is hashed where it lies."""
    model, hashed = network("llama"), []
    own = {tensor.data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    numpy = torch.Tensor.numpy
    monkeypatch.setattr(torch.Tensor, "numpy", lambda self: hashed.append(self.data_ptr()) or numpy(self))
    weights_digest(model)
    assert set(hashed) == own
