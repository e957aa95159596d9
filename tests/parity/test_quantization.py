"""4-bit storage as published: the NF4 levels, the bytes, and the arithmetic in training and in evaluation mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lora_lab.adapters.attach import attach
from lora_lab.models.load import load_base
from lora_lab.models.packed import measure_packed, packed_layers
from lora_lab.plan.quantized import quantized_bytes, stored_bytes
from tests.conftest import MakeTrial

# QLoRA, Dettmers et al. 2023, arXiv 2305.14314, appendix E.
PUBLISHED_NF4 = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
]
# bitsandbytes' FP4: a sign, two bits of exponent e, one of mantissa m, over the largest value. It has 0.0625 where the
# usual E2M1 has its subnormal 1 (0.5 in its own scale); QLoRA lists no values.
FP4 = [
    sign * (0.0625 * m if e == 0 else (1 + m / 2) * 2 ** (4 - e)) / 12
    for sign in (1, -1)
    for e in (0, 1, 2, 3)
    for m in (0, 1)
]
LEVELS = {"nf4": PUBLISHED_NF4, "fp4": FP4}
IDS = torch.arange(24).reshape(2, 12)


def load(make_trial: MakeTrial, cache: Path, *overrides: str) -> tuple[Any, Any]:
    trial = make_trial(*overrides)
    base = load_base(
        trial.model,
        precision=trial.training.precision,
        quantization=trial.quantization,
        device="cpu",
        cache=cache,
    )
    return trial, base


def dequantized_by_hand(layer: Any) -> torch.Tensor:
    """Nibbles, levels and block scales put together here, without bitsandbytes."""
    state = layer.weight.quant_state
    packed = layer.weight.data.reshape(-1)
    nibbles = torch.stack([packed >> 4, packed & 15], dim=1).reshape(-1).long()
    scales = state.absmax
    if state.nested:
        blocks = state.state2.absmax.repeat_interleave(256)[: scales.numel()]
        scales = state.state2.code[scales.long()] * blocks + state.offset
    levels = state.code[nibbles].reshape(-1, 64)
    return (levels * scales[:, None]).reshape(state.shape)


def test_code_book_is_the_published_one(make_trial: MakeTrial, cache: Path) -> None:
    _, base = load(make_trial, cache, "quantization=nf4")
    layers = list(packed_layers(base.model))
    assert len(layers) == 14
    for _, layer in layers:
        assert layer.weight.quant_state.code.tolist() == PUBLISHED_NF4


def test_fp4_code_book_is_a_float_of_four_bits(make_trial: MakeTrial, cache: Path) -> None:
    _, base = load(make_trial, cache, "quantization=fp4")
    for _, layer in packed_layers(base.model):
        assert torch.equal(layer.weight.quant_state.code, torch.tensor(FP4))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
def test_each_weight_becomes_its_nearest_level(make_trial: MakeTrial, cache: Path, double: bool, kind: str) -> None:
    """A block's scale is its largest magnitude; each weight over that scale goes to the nearest of the 16 levels."""
    _, plain = load(make_trial, cache)
    _, base = load(make_trial, cache, f"quantization={kind}", f"quantization.double_quantization={str(double).lower()}")
    levels = torch.tensor(LEVELS[kind])
    for name, layer in packed_layers(base.model):
        blocks = plain.model.get_submodule(name).weight.reshape(-1, 64)
        scales = blocks.abs().max(dim=1, keepdim=True).values
        nearest = (blocks / scales)[:, :, None].sub(levels).abs().argmin(dim=2)
        packed = layer.weight.data.reshape(-1)
        nibbles = torch.stack([packed >> 4, packed & 15], dim=1).reshape(-1, 64).long()
        assert torch.equal(levels[nibbles], levels[nearest])  # FP4 has two zeros
        if not double:
            assert torch.equal(dequantized_by_hand(layer).reshape(-1, 64), levels[nearest] * scales)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
def test_a_layer_multiplies_by_the_dequantized_weight_in_both_modes(
    make_trial: MakeTrial, cache: Path, double: bool, kind: str, mode: str
) -> None:
    _, base = load(make_trial, cache, f"quantization={kind}", f"quantization.double_quantization={str(double).lower()}")
    base.model.train(mode == "train")
    generator = torch.Generator().manual_seed(0)
    for _, layer in packed_layers(base.model):
        x = torch.randn(5, layer.in_features, generator=generator)
        with torch.no_grad():
            found = layer(x)
        torch.testing.assert_close(found, x @ dequantized_by_hand(layer).T, atol=1e-6, rtol=1e-5)


def test_training_goes_on_unchanged_after_an_evaluation(make_trial: MakeTrial, cache: Path) -> None:
    """bitsandbytes may repack weights in eval mode for a kernel without a backward pass: gradients would go missing."""
    trial, base = load(make_trial, cache, "quantization=nf4", "quantization.double_quantization=true")
    model = attach(base.model, trial).model

    def gradients() -> list[torch.Tensor]:
        model.train()
        model.zero_grad()
        model(input_ids=IDS).logits.square().mean().backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]

    before = gradients()
    model.eval()
    with torch.no_grad():
        model(input_ids=IDS)
        model.generate(input_ids=IDS[:1], max_new_tokens=2, pad_token_id=256)
    after = gradients()
    assert any(gradient.abs().max() > 0 for gradient in before)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bytes_equal_the_plan(make_trial: MakeTrial, cache: Path, kind: str, double: bool, family: str) -> None:
    trial, base = load(
        make_trial,
        cache,
        "target=all_linear",
        f"quantization={kind}",
        f"quantization.double_quantization={str(double).lower()}",
        f"model.shape.family={family}",
        "model.shape.num_kv_heads=4",
        "model.shape.mlp_size=120",
    )
    planned = stored_bytes(trial.model.shape, trial.quantization)
    assert planned == quantized_bytes(trial.model.shape, double_quantization=double)
    measured = base.facts["quantization"]
    assert (measured["kind"], measured["double_quantization"]) == (kind, double)
    assert measured["parameters"] == planned.parameters
    assert measured["packed_bytes"] == planned.packed_bytes
    assert measured["constant_bytes"] == planned.constant_bytes
    assert measured["code_book_bytes"] == planned.code_book_bytes
    assert measured["bits_per_parameter"] == planned.bits_per_parameter


def test_head_and_embedding_keep_their_precision(make_trial: MakeTrial, cache: Path) -> None:
    _, base = load(make_trial, cache, "quantization=nf4", "training.precision=bf16")
    assert base.model.get_output_embeddings().weight.dtype == torch.bfloat16
    assert base.model.get_input_embeddings().weight.dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("tie", ["null", "false"])
def test_head_is_plain_whether_tied_or_not(make_trial: MakeTrial, cache: Path, tie: str, family: str) -> None:
    _, base = load(
        make_trial,
        cache,
        "quantization=fp4",
        "target=all_linear",
        f"model.shape.family={family}",
        "model.shape.num_kv_heads=4",
        "model.shape.tied_embeddings=true",
        f"model.tie_embeddings={tie}",
    )
    assert type(base.model.get_output_embeddings()) is torch.nn.Linear


@pytest.mark.parametrize(("double", "bits"), [(False, 0.5), (True, 0.127)])
def test_published_bits_of_constants(make_trial: MakeTrial, double: bool, bits: float) -> None:
    """QLoRA, section 3: 32/64 = 0.5 bits per parameter, 8/64 + 32/(64 x 256) = 0.127 with double quantization."""
    shape = make_trial("model=smollm2_135m").model.shape
    planned = quantized_bytes(shape, double_quantization=double)
    assert round(8 * planned.constant_bytes / planned.parameters, 3) == bits


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.parametrize(("double", "bits"), [(True, 4.127), (False, 4.5)])
def test_published_bits_per_parameter_on_a_real_model(
    make_trial: MakeTrial, cache: Path, double: bool, bits: float
) -> None:
    """QLoRA, section 3: 0.5 bits per parameter for constants, 0.127 with double quantization."""
    trial, base = load(
        make_trial,
        cache,
        "model=smollm2_135m",
        "quantization=nf4",
        f"quantization.double_quantization={str(double).lower()}",
    )
    measured = measure_packed(base.model)
    planned = quantized_bytes(trial.model.shape, double_quantization=double)
    assert measured is not None
    assert round(measured.bits_per_parameter, 3) == bits
    assert (measured.packed_bytes, measured.constant_bytes, measured.code_book_bytes) == (
        planned.packed_bytes,
        planned.constant_bytes,
        planned.code_book_bytes,
    )
