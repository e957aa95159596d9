"""Melting adapters into the base: every method that can, on every base, against weights put together here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from lora_lab.adapters.attach import attach
from lora_lab.adapters.decomposed import start_name
from lora_lab.adapters.merge import combine, merge_into_base
from lora_lab.adapters.mergeable import merge_problem, type_problem
from lora_lab.adapters.save import load_adapter, save_adapter, save_model
from lora_lab.errors import InputError
from lora_lab.models.packed import packed_layers
from lora_lab.models.random import byte_tokenizer
from lora_lab.schema.method import METHODS
from tests.conftest import MakeTrial
from tests.parity.test_quantization import dequantized_by_hand
from tests.unit.test_adapters_attach import load
from tests.unit.test_adapters_save import IDS

WIDE = ("model.shape.num_kv_heads=4",)
UNMERGEABLE = (
    "bottleneck",
    "mov",
    "molora",
    "loramoe",
    "mola",
    "prompt_tuning",
    "p_tuning",
    "prefix_tuning",
)


def trained(model: Any) -> Any:
    """Every trained weight has moved."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model.eval()


def adapted(make_trial: MakeTrial, cache: Path, *overrides: str) -> Any:
    trial = make_trial(*overrides)
    return trained(attach(load(trial, cache), trial, steps=100).model)


def dequantized(model: Any, plain: Any) -> Any:
    """`plain` with the numbers that the quantized layers of `model` stand for."""
    for name, layer in packed_layers(model):
        if layer.weight.dtype == torch.int8:
            weight = layer.weight.float() * layer.row_scales[:, None] / 127
        else:
            weight = dequantized_by_hand(layer)
        target = plain.get_submodule(name.replace(".base_layer", ""))
        with torch.no_grad():
            target.weight.copy_(weight.T if isinstance(target, Conv1D) else weight)
    return plain


def updates(model: Any, names: tuple[str, ...] = ("default",)) -> dict[str, Tensor]:
    """Layer -> sum of s B A as the plain layer keeps its weight."""
    found: dict[str, Tensor] = {}
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            total: Any = 0.0
            for adapter in names:
                if adapter in layer.lora_embedding_A:
                    a, b = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
                else:
                    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
                total = total + layer.scaling[adapter] * (b @ a).detach()
            base = layer.get_base_layer()
            turned = isinstance(base, (Conv1D, nn.Embedding)) or getattr(base, "source_cls", None) is Conv1D
            found[name] = total.T if turned else total
    return found


def difference(one: Any, other: Any) -> float:
    with torch.no_grad():
        logits = [model.eval()(input_ids=IDS).logits.double() for model in (one, other)]
    return float((logits[0] - logits[1]).abs().max())


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("method", ["lora", "rslora"])
def test_a_quantized_base_is_dequantized_then_merged(
    make_trial: MakeTrial, cache: Path, tmp_path: Path, method: str, quantization: str, family: str
) -> None:
    lines = (f"model.shape.family={family}", *WIDE, "target=[all_linear_head,embedding]")
    model = adapted(make_trial, cache, *lines, f"method={method}", f"quantization={quantization}")
    plain = dequantized(model.get_base_model(), load(make_trial(*lines), cache))
    with torch.no_grad():
        for name, update in updates(model).items():
            plain.get_submodule(name).weight += update
    merged = merge_into_base(model, IDS)
    for (name, one), other in zip(plain.named_parameters(), merged.model.parameters(), strict=True):
        torch.testing.assert_close(other, one, atol=1e-6, rtol=1e-5, msg=name)
    assert merged.largest_logit_difference == difference(merged.model, model)
    low, high = (1e-4, 0.05) if quantization == "int8" else (0.0, 1e-5)  # int8 layers rounded their inputs as well
    assert low <= merged.largest_logit_difference <= high
    save_model(merged.model, byte_tokenizer(64), tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert difference(again, merged.model) == 0.0


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
@pytest.mark.parametrize("method", ["dora", "ia3", "adalora"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_methods_that_are_merged_alone(
    make_trial: MakeTrial, cache: Path, method: str, quantization: str, family: str
) -> None:
    shape = (f"model.shape.family={family}", *WIDE, "target=all_linear")
    lines = ("target=ia3", f"target.query={str(family == 'gpt2').lower()}") if method == "ia3" else ()
    model = adapted(make_trial, cache, *shape, *lines, f"method={method}", f"quantization={quantization}")
    merged = merge_into_base(model, IDS)
    assert merged.largest_logit_difference == difference(merged.model, model)
    assert merged.largest_logit_difference <= (0.01 if quantization == "int8" else 1e-5)
    assert difference(merged.model, load(make_trial(*shape), cache)) > 0.015
    assert not list(packed_layers(merged.model))


def test_ia3_is_a_product(make_trial: MakeTrial, cache: Path) -> None:
    """Keys and values: rows of W (and the bias) times l; the MLP's last layer: columns of W times l."""
    lines = ("model.shape.family=qwen2", *WIDE, "target=ia3", "training.precision=fp64")
    model = adapted(make_trial, cache, *lines, "method=ia3")
    merged = merge_into_base(model, IDS).model
    plain = load(make_trial(*lines), cache)
    seen = 0
    for name, layer in model.get_base_model().named_modules():
        if hasattr(layer, "ia3_l") and layer.ia3_l:
            vector = layer.ia3_l["default"].detach().flatten()
            old, new = plain.get_submodule(name), merged.get_submodule(name)
            expected = old.weight * (vector if name.endswith("down_proj") else vector[:, None])
            torch.testing.assert_close(new.weight, expected, atol=1e-12, rtol=0)
            if old.bias is not None:
                torch.testing.assert_close(new.bias, old.bias * vector, atol=1e-12, rtol=0)
                seen += 1
    assert seen == 4  # two layers with biases of keys and values


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_pruned_adalora_is_merged_as_it_was_scored(
    make_trial: MakeTrial, cache: Path, tmp_path: Path, quantization: str
) -> None:
    lines = ("method=adalora", "rank=4", "target=all_linear", f"quantization={quantization}")
    model = adapted(make_trial, cache, *lines)
    masks = {}
    with torch.no_grad():
        for name, values in model.get_base_model().named_parameters():
            if "lora_E" in name:
                values[:: 1 if "layers.0.self_attn.q_proj" in name else 2] = 0.0
                values *= 20
                masks[name] = (values[:, 0] != 0).tolist()
    model.peft_config["default"].rank_pattern = masks
    save_adapter(model, tmp_path / "pruned")
    trial = make_trial(*lines)
    merged = merge_into_base(load_adapter(load(trial, cache), tmp_path / "pruned"), IDS)
    assert difference(merged.model, model) < 1e-5
    assert difference(merged.model, load(trial, cache)) > 0.05


@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_an_adapter_in_two_parts_is_merged_whole(make_trial: MakeTrial, cache: Path, method: str) -> None:
    model = adapted(make_trial, cache, f"method={method}", "target=all_linear", "training.precision=fp64")
    merged = merge_into_base(model, IDS)
    plain = load(make_trial("target=all_linear", "training.precision=fp64"), cache)
    with torch.no_grad():
        for name, update in updates(model, ("default", start_name("default"))).items():
            plain.get_submodule(name).weight += update
    assert difference(merged.model, plain) < 1e-10
    assert merged.largest_logit_difference < 1e-10


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_several_adapters_go_into_the_base_as_their_weighted_sum(
    make_trial: MakeTrial, cache: Path, quantization: str
) -> None:
    """W += sum w_i s_i B_i A_i, and two active adapters are their plain sum."""
    precision = "fp32" if quantization == "nf4" else "fp64"
    lines = (f"training.precision={precision}", f"quantization={quantization}")
    trials = [
        make_trial(*lines, "target=all_linear", "rank=2", "method.rank_factors=[1,2]"),
        make_trial(*lines, "target=qv", "rank=3", "method=rslora", "seed=1"),
    ]
    model = attach(load(trials[0], cache), trials[0], name="a").model
    model = attach(model, trials[1], name="b").model
    model.base_model.set_adapter(["a", "b"])
    trained(model)
    plain = dequantized(model.get_base_model(), load(make_trial(f"training.precision={precision}"), cache))
    for weights in ([1.0, 1.0], [0.3, -2.0]):
        if weights == [1.0, 1.0]:
            merged = merge_into_base(model, IDS)
        else:
            combine(model, ["a", "b"], weights, kind="cat", density=None, result="sum")
            model.set_adapter("sum")
            merged = merge_into_base(model, IDS)
        for name, layer in model.get_base_model().named_modules():
            if isinstance(layer, LoraLayer):
                total = plain.get_submodule(name).weight.clone()
                for adapter, weight in zip("ab", weights, strict=True):
                    if adapter in layer.scaling:
                        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
                        total += weight * layer.scaling[adapter] * (b @ a)
                tolerance = 1e-6 if quantization == "nf4" else 1e-12
                torch.testing.assert_close(merged.model.get_submodule(name).weight, total, atol=tolerance, rtol=0)
        assert merged.largest_logit_difference < (1e-5 if quantization == "nf4" else 1e-10)


def test_bf16_weights_are_rounded_once(make_trial: MakeTrial, cache: Path) -> None:
    """(W + s B A) in float32, then bfloat16; rounding s B A to bfloat16 first gives other weights."""
    lines = ("target=all_linear", "training.precision=bf16")
    model = adapted(make_trial, cache, *lines, "method=lora")
    merged = merge_into_base(model, IDS)
    plain = load(make_trial(*lines), cache)
    twice = 0
    for name, update in updates(model).items():
        old, new = plain.get_submodule(name).weight, merged.model.get_submodule(name).weight
        assert update.dtype == torch.float32 and new.dtype == torch.bfloat16
        assert torch.equal(new, (old.float() + update).bfloat16())
        twice += int((new != old + update.bfloat16()).sum())
    assert twice > 0
    assert merged.model.dtype == torch.bfloat16
    assert 0 < merged.largest_logit_difference < 0.05


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("tie", ["null", "false"])
@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_a_tied_head_stays_tied_and_a_copied_one_a_copy(
    make_trial: MakeTrial, cache: Path, tmp_path: Path, quantization: str, tie: str, family: str
) -> None:
    lines = (f"model.shape.family={family}", *WIDE, "model.shape.tied_embeddings=true", f"model.tie_embeddings={tie}")
    target = "target=[all_linear_head,embedding]" if tie == "false" else "target=all_linear"
    model = adapted(make_trial, cache, *lines, target, "method=lora", f"quantization={quantization}")
    merged = merge_into_base(model, IDS)
    assert merged.largest_logit_difference < (0.05 if quantization == "int8" else 1e-5)
    head, embedding = merged.model.get_output_embeddings().weight, merged.model.get_input_embeddings().weight
    assert (head is embedding) == (tie == "null")
    save_model(merged.model, byte_tokenizer(64), tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert difference(again, merged.model) == 0.0


@pytest.mark.parametrize("method", UNMERGEABLE)
def test_what_no_weight_equals_is_refused(make_trial: MakeTrial, cache: Path, method: str) -> None:
    target = {"loramoe": "mlp", "mov": "ia3"}.get(method, "all_linear")
    more = {"loramoe": "method.beta=0.0", "mola": "method.experts=[2,3]"}.get(method, "rank=4")
    model = adapted(make_trial, cache, f"method={method}", f"target={target}", more)
    before = model(input_ids=IDS).logits
    with pytest.raises(InputError, match="cannot be merged"):
        merge_into_base(model, IDS)
    assert torch.equal(model(input_ids=IDS).logits, before)


def test_every_method_is_merged_or_says_why_not() -> None:
    alone = {kind for kind in METHODS if merge_problem(kind, run="1f", is_alone=True) is None}
    assert alone == {"lora", "rslora", "dora", "pissa", "olora", "lora_plus", "adalora", "ia3"}
    together = {kind for kind in METHODS if merge_problem(kind, run="1f", is_alone=False) is None}
    assert together == alone - {"dora", "adalora", "ia3"}
    for kind in ("full", "freeze", "lisa", "galore"):
        problem = merge_problem(kind, run="1f", is_alone=True)
        assert problem is not None and "no adapter to merge" in problem and "init_from=1f init_as=weights" in problem
    assert all("cannot be merged" in str(merge_problem(kind, run="1f", is_alone=True)) for kind in UNMERGEABLE)


def test_types_of_adapters_by_name() -> None:
    assert [type_problem(name) for name in ("LORA", "ADALORA", "IA3")] == [None] * 3
    for name in ("BOTTLENECK", "LORA_EXPERTS", "MOV", "PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"):
        assert "cannot be merged: " in str(type_problem(name))
    assert "only LORA" in str(type_problem("VERA"))
