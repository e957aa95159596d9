"""LLM.int8 (Dettmers et al. 2022, arXiv 2208.07339): storage and arithmetic against the paper's equations in numpy."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import bitsandbytes
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_lab.adapters.attach import attach, count_parameters
from lora_lab.errors import InputError
from lora_lab.memory.live_bytes import model_tensors, storage_bytes
from lora_lab.models.int8 import Int8Linear, use_one_product
from lora_lab.models.packed import packed_layers
from lora_lab.plan.quantized import int8_bytes, stored_bytes
from tests.conftest import MakeTrial
from tests.parity.test_quantization import IDS, load

Array = np.ndarray[Any, np.dtype[np.float64]]
FAMILIES = ["llama", "qwen2", "gpt2"]


def quantized(weight: Array) -> tuple[Array, Array]:
    """Codes and scales of each row: s = max |w|, c = round(127 w / s), of float16 values."""
    half = weight.astype(np.float16).astype(np.float64)
    scales = np.abs(half).max(axis=1)
    return np.round(127 * half / scales[:, None]), scales


def product(x: Array, codes: Array, scales: Array, bias: Array | float) -> Array:
    """Section 3: features in which any row reaches 6 are multiplied as they are, the others as codes."""
    outliers = (np.abs(x.astype(np.float16)) >= 6).any(axis=0)
    x_codes, x_scales = quantized(np.where(outliers, 0, x))
    regular = (x_codes @ codes.T) * x_scales[:, None] * scales / 127**2
    exact: Array = x[:, outliers] @ (codes * scales[:, None] / 127)[:, outliers].T
    return regular + exact + bias


def layer_of(weight: Tensor, bias: Tensor | None) -> Int8Linear:
    plain = bitsandbytes.nn.Linear8bitLt(
        weight.shape[1], weight.shape[0], bias is not None, has_fp16_weights=False, threshold=6.0
    )
    plain.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
    plain.source_cls = nn.Linear
    holder = nn.ModuleDict({"layer": plain.to("cpu").requires_grad_(False)})
    use_one_product(holder)
    layer: Any = holder["layer"]
    return layer


def rows_with_outliers(generator: torch.Generator, *, rows: int, inputs: int) -> Tensor:
    x = torch.randn(rows, inputs, generator=generator)
    x[0, 3], x[-1, 7], x[-1, 3] = 9.0, -20.0, 0.5
    return x


@pytest.mark.parametrize("family", FAMILIES)
def test_codes_and_scales_are_those_of_the_rows(make_trial: MakeTrial, cache: Path, family: str) -> None:
    overrides = ("target=all_linear", f"model.shape.family={family}", "model.shape.num_kv_heads=4")
    _, plain = load(make_trial, cache, *overrides)
    _, base = load(make_trial, cache, *overrides, "quantization=int8")
    layers = list(packed_layers(base.model))
    assert len(layers) == {"llama": 14, "qwen2": 14, "gpt2": 8}[family]
    for name, layer in layers:
        weight = plain.model.get_submodule(name).weight.double().numpy()
        half = (weight.T if family == "gpt2" else weight).astype(np.float16).astype(np.float64)
        scales = np.abs(half).max(axis=1)
        assert np.abs(layer.weight.numpy() - 127 * half / scales[:, None]).max() <= 0.5 + 1e-5
        np.testing.assert_array_equal(layer.row_scales.numpy(), scales)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_layer_computes_the_published_product(
    mode: str, rows: int, dtype: torch.dtype, tolerance: float, bias: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 40, generator=generator) / 6
    offset = torch.randn(24, generator=generator) if bias else None
    layer = layer_of(weight, offset).train(mode == "train")
    x = rows_with_outliers(generator, rows=rows, inputs=40).to(dtype)
    found = layer(x)
    codes, scales = quantized(weight.double().numpy())
    exact = product(x.double().numpy(), codes, scales, 0.0 if offset is None else offset.double().numpy())
    assert found.dtype == dtype
    np.testing.assert_allclose(found.double().numpy(), exact, atol=tolerance)
    dequantized = x.double() @ torch.from_numpy(codes * scales[:, None] / 127).T
    assert np.abs(exact - (dequantized if offset is None else dequantized + offset).numpy()).max() > 1e-3


def test_it_is_the_evaluation_of_bitsandbytes_up_to_its_constant() -> None:
    """bitsandbytes 0.50.2 on a CPU has 6.200124e-05 for 1 / 127^2 (1.8e-5 too much); training is another function."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(24, 40, generator=generator) / 6
    theirs = bitsandbytes.nn.Linear8bitLt(40, 24, False, has_fp16_weights=False, threshold=6.0)
    theirs.load_state_dict({"weight": weight})
    theirs = theirs.to("cpu")
    ours = layer_of(weight, None)
    x = torch.randn(6, 40, generator=generator)
    torch.testing.assert_close(theirs.eval()(x), ours(x), atol=1e-7, rtol=2e-5)
    assert (theirs.train()(x) - ours(x)).abs().max() > 1e-3


def test_the_gradient_of_the_input_is_straight_through() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = layer_of(torch.randn(24, 40, generator=generator), None)
    x = rows_with_outliers(generator, rows=6, inputs=40).reshape(2, 3, 40).requires_grad_()
    upstream = torch.randn(2, 3, 24, generator=generator)
    (gradient,) = torch.autograd.grad(layer(x), x, upstream)
    expected = upstream @ (layer.weight.float() * layer.row_scales[:, None] / 127)
    torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-5)


def test_rows_that_are_zero_not_finite_or_absent() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = layer_of(torch.randn(24, 40, generator=generator), torch.ones(24))
    x = torch.zeros(3, 40)
    x[1, 0], x[2, 0] = float("nan"), 70000.0  # beyond float16, so an outlier
    out = layer(x)
    assert torch.equal(out[0], torch.ones(24))
    assert out[1].isnan().all()
    torch.testing.assert_close(out[2], 70000 * layer.weight[:, 0].float() * layer.row_scales / 127 + 1)
    assert layer(torch.zeros(2, 0, 40)).shape == (2, 0, 24)


def test_weights_beyond_float16_are_refused() -> None:
    with pytest.raises(InputError, match="65504"):
        layer_of(torch.full((4, 8), 1e5), None)


def test_checkpointing_keeps_no_input() -> None:
    layer = layer_of(torch.randn(8, 8), None).train()
    inputs = []

    def block(x: Tensor) -> Tensor:
        hidden = x * 2.0
        inputs.append(weakref.ref(hidden))
        out: Tensor = layer(hidden)
        return out

    out = checkpoint(block, torch.randn(3, 8, requires_grad=True), use_reentrant=False)
    gc.collect()
    assert inputs[0]() is None
    out.sum().backward()


@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_equal_the_plan(make_trial: MakeTrial, cache: Path, family: str) -> None:
    trial, base = load(
        make_trial,
        cache,
        "target=all_linear",
        "quantization=int8",
        f"model.shape.family={family}",
        "model.shape.num_kv_heads=4",
        "model.shape.mlp_size=120",
    )
    planned = stored_bytes(trial.model.shape, trial.quantization)
    assert planned == int8_bytes(trial.model.shape)
    measured = base.facts["quantization"]
    assert (measured["kind"], measured["double_quantization"], measured["outlier_threshold"]) == ("int8", False, 6.0)
    assert measured["parameters"] == measured["packed_bytes"] == planned.packed_bytes
    assert measured["constant_bytes"] == planned.constant_bytes
    assert measured["code_book_bytes"] == planned.code_book_bytes == 0
    assert measured["bits_per_parameter"] == planned.bits_per_parameter
    _, plain = load(make_trial, cache, "target=all_linear", *trial_of(family))
    assert base.facts["base_parameters"] == plain.facts["base_parameters"] == count_parameters(base.model).total
    saved = storage_bytes(model_tensors(plain.model)) - storage_bytes(model_tensors(base.model))
    assert saved == 4 * planned.parameters - planned.total_bytes


def trial_of(family: str) -> tuple[str, ...]:
    return (f"model.shape.family={family}", "model.shape.num_kv_heads=4", "model.shape.mlp_size=120")


def test_bits_of_a_weight_by_hand(make_trial: MakeTrial, cache: Path) -> None:
    """8 bits and 32/inputs: every layer of this model reads 64 features, but the last of each MLP, which reads 192."""
    trial, base = load(make_trial, cache, "quantization=int8")
    shape = trial.model.shape
    by_hand = [(layer.in_features, layer.out_features) for _, layer in packed_layers(base.model)]
    parameters = sum(inputs * outputs for inputs, outputs in by_hand)
    planned = int8_bytes(shape)
    assert planned.parameters == parameters
    assert planned.total_bytes == parameters + 4 * sum(outputs for _, outputs in by_hand)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_adapters_train_on_it_and_evaluate_as_they_train(
    make_trial: MakeTrial, cache: Path, precision: str, method: str
) -> None:
    trial, base = load(
        make_trial, cache, "quantization=int8", f"training.precision={precision}", f"method={method}", "target=qv"
    )
    before = [layer.weight.clone() for _, layer in packed_layers(base.model)]
    model = attach(base.model, trial).model
    logits = [model.train(mode)(input_ids=IDS).logits for mode in (True, False)]
    assert torch.equal(*logits)
    model(input_ids=IDS).logits.float().square().mean().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in trained)
    assert any(parameter.grad.abs().max() > 0 for parameter in trained)
    again = copy.deepcopy(model)
    assert torch.equal(again(input_ids=IDS).logits, logits[1])
    after = [layer.weight for name, layer in packed_layers(model)]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_dora_sees_the_dequantized_weight(make_trial: MakeTrial, cache: Path) -> None:
    """Magnitudes start as the norms of the rows of s C / 127, so that a fresh DoRA changes nothing."""
    trial, base = load(make_trial, cache, "quantization=int8", "method=dora", "target=qv")
    plain = base.model.eval()(input_ids=IDS).logits
    rows = {
        name: torch.linalg.norm(layer.weight.float() * layer.row_scales[:, None] / 127, dim=1)
        for name, layer in packed_layers(base.model)
    }
    model = attach(base.model, trial).model.eval()
    torch.testing.assert_close(model(input_ids=IDS).logits, plain, atol=1e-6, rtol=1e-5)
    found = {name: p for name, p in model.named_parameters() if "magnitude" in name}
    assert len(found) == 4
    for name, magnitude in found.items():
        layer = name.removeprefix("base_model.model.").partition(".lora_magnitude")[0]
        torch.testing.assert_close(magnitude.detach(), rows[layer])


def test_double_quantization_is_refused(make_trial: MakeTrial) -> None:
    with pytest.raises(InputError, match="one scale per output"):
        make_trial("quantization=int8", "quantization.double_quantization=true")


def test_nothing_is_said_while_it_computes(
    make_trial: MakeTrial, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """bitsandbytes' own layer logs a warning about float16 for the first product."""
    _, base = load(make_trial, cache, "quantization=int8")
    base.model.eval()(input_ids=IDS)
    assert not caplog.records
