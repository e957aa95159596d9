"""What a loaded base promises: frozen, plain attention, no dropout, its own head when untied, and true facts."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from lora_lab.errors import InputError
from lora_lab.models.generate import generate
from lora_lab.models.load import LoadedBase, load_base
from lora_lab.schema.adaptation import Quantization
from lora_lab.schema.model import RandomModel
from tests.conftest import MakeTrial
from tests.unit.test_models_random import tiny_shape


def load(
    cache: Path,
    family: str = "llama",
    *,
    tied: bool = True,
    tie: bool | None = None,
    precision: str = "fp32",
    quantization: str = "none",
) -> LoadedBase:
    shape = tiny_shape(family, tied=tied)
    model = RandomModel(kind="random", name="tiny", seed=0, shape=shape, tie_embeddings=tie)
    chosen = Quantization.model_validate({"kind": quantization, "double_quantization": False})
    return load_base(model, precision=precision, quantization=chosen, device="cpu", cache=cache)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_frozen_without_dropout_in_the_asked_precision(tmp_path: Path, family: str, precision: str) -> None:
    base = load(tmp_path, family, precision=precision)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}[precision]
    assert {parameter.dtype for parameter in base.model.parameters()} == {dtype}
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert not any(module.p for module in base.model.modules() if isinstance(module, nn.Dropout))
    assert base.facts["attention"] == "sdpa"
    assert bool(base.facts["dropouts_set_to_0"]) == (family == "gpt2")
    base.model.train()
    ids = torch.arange(10)[None]
    assert torch.equal(base.model(input_ids=ids).logits, base.model(input_ids=ids).logits)


def test_untying_copies_and_counts_the_head(tmp_path: Path) -> None:
    tied, untied = load(tmp_path), load(tmp_path, tie=False)
    head, embedding = untied.model.get_output_embeddings().weight, untied.model.get_input_embeddings().weight
    assert torch.equal(head, embedding)
    assert head.data_ptr() != embedding.data_ptr()
    assert untied.facts["base_parameters"] - tied.facts["base_parameters"] == head.numel()
    assert (tied.facts["tied_embeddings"], untied.facts["tied_embeddings"]) == (True, False)
    ids = torch.arange(10)[None]
    assert torch.equal(tied.model(input_ids=ids).logits, untied.model(input_ids=ids).logits)


def test_tying_two_different_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="tie_embeddings"):
        load(tmp_path, tied=False, tie=True)


def test_loading_is_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(tmp_path, quantization="nf4")
    assert capfd.readouterr() == ("", "")


def test_random_weights_do_not_read_or_change_global_state(tmp_path: Path) -> None:
    torch.manual_seed(1)
    first = load(tmp_path / "a")
    state = torch.get_rng_state()
    second = load(tmp_path / "b")
    assert torch.equal(torch.get_rng_state(), state)
    pairs = zip(first.model.parameters(), second.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_generation_is_greedy_and_leaves_the_mode(tmp_path: Path) -> None:
    base = load(tmp_path)
    base.model.train()
    prompt = base.tokenizer("hello")["input_ids"]
    eos = base.tokenizer.eos_token_id
    generated = generate(base.model, base.tokenizer, prompt, max_new_tokens=5, stop_ids=[eos])
    assert base.model.training
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(5):
            ids.append(int(base.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == eos:
                break
    assert generated.is_complete == (ids[-1] == eos)
    assert generated.text == base.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)


@pytest.mark.model
def test_the_embedded_model_speaks(make_trial: MakeTrial, cache: Path) -> None:
    trial = make_trial("model=smollm2_135m")
    base = load_base(trial.model, precision="fp32", quantization=trial.quantization, device="cpu", cache=cache)
    assert base.facts["base_parameters"] == 134_515_008  # published
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = base.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    stops = [base.tokenizer.eos_token_id]
    assert "Paris" in generate(base.model, base.tokenizer, prompt, max_new_tokens=12, stop_ids=stops).text
