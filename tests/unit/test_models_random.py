"""The random model and its byte tokenizer: reproducible, side-effect free, and of the size the plan says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_lab.adapters.attach import count_parameters
from lora_lab.errors import InputError
from lora_lab.models.random import byte_tokenizer, random_folder, random_network
from lora_lab.plan.shapes import total_parameters
from lora_lab.schema.model import RandomModel, Shape

TOKENIZER = byte_tokenizer(64)


def tiny_shape(family: str, *, tied: bool) -> Shape:
    kv_heads = 4 if family == "gpt2" else 2
    return Shape.model_validate(
        {
            "family": family,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": kv_heads,
            "head_dim": 8,
            "mlp_size": 48,
            "vocab_size": 260,
            "max_positions": 64,
            "tied_embeddings": tied,
        }
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gpt2"])
def test_sizes_equal_the_plan(family: str, tied: bool) -> None:
    shape = tiny_shape(family, tied=tied)
    assert count_parameters(random_network(shape, 0)).total == total_parameters(shape, tie_embeddings=None)


def test_same_seed_same_weights_and_global_state_untouched() -> None:
    shape = tiny_shape("llama", tied=False)
    before = torch.get_rng_state()
    first = random_network(shape, 3).state_dict()
    torch.rand(5)
    second, third = random_network(shape, 3).state_dict(), random_network(shape, 4).state_dict()
    torch.set_rng_state(before)
    random_network(shape, 5)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["lm_head.weight"], third["lm_head.weight"])


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_any_text_comes_back_and_ids_are_its_bytes(text: str) -> None:
    ids = TOKENIZER(text)["input_ids"]
    assert TOKENIZER.decode(ids) == text
    if "<" not in text:
        assert ids == list(text.encode())


def test_chat_template_ends_turns_with_the_end_token() -> None:
    messages = [{"role": "user", "content": "hi"}]
    text = TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<bos><turn>user\nhi<eos><turn>assistant\n"
    assert TOKENIZER(text)["input_ids"][:2] == [257, 259]


def test_a_vocabulary_below_the_bytes_is_refused(tmp_path: Path) -> None:
    shape = tiny_shape("llama", tied=False).model_copy(update={"vocab_size": 100})
    model = RandomModel(kind="random", name="../x", seed=0, shape=shape, tie_embeddings=None)
    with pytest.raises(InputError) as caught:
        random_folder(model, tmp_path)
    assert [problem.where for problem in caught.value.problems] == ["model.name", "model.shape.vocab_size"]
