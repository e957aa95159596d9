"""Names, sizes and counts from a shape, against real models of transformers, PEFT adapters, bitsandbytes tensors."""

from __future__ import annotations

import copy
import json
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config

from lora_lab.plan.folder import shape_from_config
from lora_lab.plan.quantized import QuantizedBytes, quantized_bytes, tensor_bytes
from lora_lab.plan.shapes import modules_of, total_parameters
from lora_lab.plan.targets import name_matches, part_suffixes, select_modules
from lora_lab.schema.adaptation import PARTS, Target
from lora_lab.schema.model import Shape

# Every size differs from every other, so that no two can be confused; head_dim is not hidden / heads where it may.
_SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "vocab_size": 70,
    "max_position_embeddings": 32,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_GPT2 = {
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": 70,
    "n_positions": 32,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
CONFIGS = {
    "llama": LlamaConfig(**_SIZES, head_dim=10),
    "llama_tied": LlamaConfig(**_SIZES, tie_word_embeddings=True),
    "llama_ungrouped": LlamaConfig(**{**_SIZES, "num_key_value_heads": 4}),
    "mistral": MistralConfig(**_SIZES, head_dim=10),
    "qwen2": Qwen2Config(**_SIZES),
    "qwen2_tied": Qwen2Config(**_SIZES, tie_word_embeddings=True),
    "gpt2": GPT2Config(**_GPT2),
    "gpt2_inner": GPT2Config(**_GPT2, n_inner=50),
    "gpt2_untied": GPT2Config(**_GPT2, tie_word_embeddings=False),
}


def build(name: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name])


def shape_of(config: PretrainedConfig) -> Shape:
    """By the text that save_pretrained writes, which leaves out what equals the default."""
    shape = shape_from_config(json.loads(config.to_json_string()))
    assert shape is not None
    return shape


@pytest.mark.parametrize("name", CONFIGS)
def test_modules_and_total_equal_the_real_model(name: str) -> None:
    model, shape = build(name), shape_of(CONFIGS[name])
    real = {
        module_name: {key: tuple(parameter.shape) for key, parameter in module.named_parameters(recurse=False)}
        for module_name, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    }
    planned = {}
    for module in modules_of(shape):
        weight = {
            "linear": (module.out_features, module.in_features),
            "conv1d": (module.in_features, module.out_features),
            "embedding": (module.in_features, module.out_features),
            "norm": (module.in_features,),
        }[module.kind]
        planned[module.name] = {"weight": weight} | ({"bias": (module.out_features,)} if module.bias else {})
    assert planned == real
    assert list(planned) == list(real)
    assert total_parameters(shape, tie_embeddings=None) == sum(parameter.numel() for parameter in model.parameters())


def test_untying_adds_one_copy_of_the_embedding() -> None:
    untied = AutoModelForCausalLM.from_config(LlamaConfig(**_SIZES, tie_word_embeddings=False))
    real = sum(parameter.numel() for parameter in untied.parameters())
    assert total_parameters(shape_of(CONFIGS["llama_tied"]), tie_embeddings=False) == real


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "gpt2_untied"])
@pytest.mark.parametrize(
    "parts", [PARTS, ("query", "key", "value"), ("projection",), ("mlp",), ("head",), ("embedding",)]
)
def test_adapter_widths_equal_peft(name: str, dora: bool, parts: tuple[str, ...]) -> None:
    model, shape, rank = build(name), shape_of(CONFIGS[name]), 3
    target = Target(**{part: part in parts for part in PARTS}, modules=())
    modules = select_modules(shape, target)
    suffixes = sorted({suffix for part in parts for suffix in part_suffixes(shape.family)[part]})
    names = [module.name for module in modules]
    assert names == [module.name for module in modules_of(shape) if any(name_matches(module.name, s) for s in suffixes)]

    config = LoraConfig(r=rank, target_modules=suffixes, use_dora=dora, fan_in_fan_out=name.startswith("gpt2"))
    adapted = get_peft_model(copy.deepcopy(model), config)
    real = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    planned = sum(rank * (module.in_features + module.out_features) for module in modules)
    if dora:
        planned += sum(module.out_features for module in modules)
    assert planned == real
    wrapped = {n.removeprefix("base_model.model.") for n, m in adapted.named_modules() if hasattr(m, "lora_A")}
    assert wrapped == set(names)


def test_a_plain_name_selects_what_peft_selects() -> None:
    """c_proj stands for two layers of a GPT-2 block, in PEFT and here."""
    shape = shape_of(CONFIGS["gpt2"])
    target = Target(**dict.fromkeys(PARTS, False), modules=("c_proj",))
    adapted = get_peft_model(build("gpt2"), LoraConfig(r=2, target_modules=["c_proj"], fan_in_fan_out=True))
    wrapped = {n.removeprefix("base_model.model.") for n, m in adapted.named_modules() if hasattr(m, "lora_A")}
    assert {module.name for module in select_modules(shape, target)} == wrapped


def test_configs_outside_the_families_have_no_shape() -> None:
    llama = json.loads(CONFIGS["llama"].to_json_string())
    assert shape_from_config({**llama, "model_type": "opt"}) is None
    assert shape_from_config({**llama, "attention_bias": True}) is None
    assert shape_from_config({**llama, "mlp_bias": True}) is None
    assert shape_from_config({**llama, "hidden_size": "24"}) is None
    assert shape_from_config({key: value for key, value in llama.items() if key != "vocab_size"}) is None
    assert shape_from_config({**json.loads(CONFIGS["gpt2"].to_json_string()), "add_cross_attention": True}) is None


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (3, 21), (64, 64), (100, 197), (576, 1536), (257, 4096)])
def test_quantized_bytes_equal_bitsandbytes(size: tuple[int, int], double: bool, kind: str) -> None:
    weight = torch.randn(size, generator=torch.Generator().manual_seed(0))
    stored = bnb.nn.Params4bit(weight, requires_grad=False, quant_type=kind, compress_statistics=double).to("cpu")
    assert tensor_bytes(weight.numel(), double_quantization=double) == _measured(stored, weight.numel())


@pytest.mark.parametrize("double", [False, True])
def test_quantized_bytes_of_a_model(double: bool) -> None:
    model, shape = build("qwen2"), shape_of(CONFIGS["qwen2"])
    total = QuantizedBytes(parameters=0, packed_bytes=0, constant_bytes=0, code_book_bytes=0)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            stored = bnb.nn.Params4bit(module.weight.data, quant_type="nf4", compress_statistics=double).to("cpu")
            total += _measured(stored, module.weight.numel())
    assert quantized_bytes(shape, double_quantization=double) == total


def _measured(stored: Any, weights: int) -> QuantizedBytes:
    state = stored.quant_state
    constants, code_books = [state.absmax], [state.code]
    if state.nested:
        constants += [state.state2.absmax, state.offset]
        code_books += [state.state2.code]
    return QuantizedBytes(
        parameters=weights,
        packed_bytes=stored.data.nbytes,
        constant_bytes=sum(tensor.nbytes for tensor in constants),
        code_book_bytes=sum(tensor.nbytes for tensor in code_books),
    )
