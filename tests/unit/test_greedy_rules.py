"""What is left to lm-eval's own generation, and when a row has ended."""

from __future__ import annotations

from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BloomConfig, Gemma3TextConfig, Llama4TextConfig, MambaConfig

from lora_lab.evaluate.greedy.rules import why_not_greedy
from lora_lab.evaluate.greedy.stops import Stops
from lora_lab.models.random import byte_tokenizer
from tests.tuner_bases import network

SMALL = {"vocab_size": 260, "hidden_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48}


def why(model: Any, length: int = 64, **settings: Any) -> str | None:
    return why_not_greedy(model, byte_tokenizer(64), settings, length)


def test_plain_greedy_decoding_is_ours() -> None:
    model = network("llama")
    assert why(model) is None
    assert why(model, do_sample=False, temperature=0.0, top_p=0.9) is None
    model.generation_config.update(temperature=0.6, top_p=0.9, do_sample=True, num_beams=1, repetition_penalty=1.0)
    assert why(model) is None


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"do_sample": True}, "it samples"),
        ({"temperature": 0.7}, "it samples"),
        ({"num_beams": 4}, "the task sets num_beams"),
        ({"repetition_penalty": 1.1, "min_new_tokens": 3}, "the task sets min_new_tokens, repetition_penalty"),
    ],
)
def test_settings_of_the_task(settings: dict[str, Any], reason: str) -> None:
    assert why(network("llama"), **settings) == reason


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.1},
        {"num_beams": 2},
        {"max_new_tokens": 5},
        {"min_length": 100},
        {"suppress_tokens": [1]},
        {"forced_eos_token_id": 258},
        {"no_repeat_ngram_size": 2},
        {"cache_implementation": "static"},
        {"stop_strings": "x"},
        {"never_heard_of": 1},
    ],
)
def test_settings_of_the_model(settings: dict[str, Any]) -> None:
    model = network("llama")
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
        assert why(model) == f"the model's generation_config sets {name}={value!r}"


def test_padding_that_is_text() -> None:
    tokenizer = byte_tokenizer(64)
    tokenizer.pad_token_id = 65
    assert why_not_greedy(network("llama"), tokenizer, {}, 64) == (
        "the padding token is not a special one, so lm-eval would read it as text"
    )


def test_models() -> None:
    windowed = AutoModelForCausalLM.from_config(Gemma3TextConfig(**SMALL, **HEADS, sliding_window=6))
    assert why(windowed) is None
    chunked = Llama4TextConfig(**SMALL, **HEADS, attention_chunk_size=8, num_local_experts=2, intermediate_size_mlp=48)
    model = AutoModelForCausalLM.from_config(chunked)
    assert why(model, 8) is None
    assert why(model, 9) == "attention in chunks of 8 tokens, rows of 9"
    mamba = AutoModelForCausalLM.from_config(MambaConfig(**SMALL, state_size=4))
    assert why(mamba) == "its cache is not keys and values of every layer"
    bloom = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=260, hidden_size=32, n_layer=2, n_head=4))
    assert why(bloom) == "BloomForCausalLM takes no positions"


def test_a_rotary_embedding_that_depends_on_the_length() -> None:
    model = network("llama")
    model.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert why(model) == "positions whose embedding depends on the length"
    model.config.rope_parameters = {"full_attention": {"rope_type": "longrope"}}
    assert why(model) == "positions whose embedding depends on the length"


def test_an_adapter_that_starts_at_some_token() -> None:
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[1])
    assert why(get_peft_model(network("llama"), config)) == "a LORA adapter that looks at the whole row"


def stops(*stop: str) -> Stops:
    return Stops(byte_tokenizer(64), stop)


def test_a_stop_string_is_looked_for_in_the_last_tokens_only() -> None:
    """Two more than it has: here one token is one byte."""
    assert stops("ab").are_met(list(b"xxabyz"))
    assert not stops("ab").are_met(list(b"xabxyz"))
    assert stops("xyz", "ab").are_met(list(b"abyz"))
    assert stops("<turn>").are_met([65, 259])
    assert not stops("ab").are_met(list(b"a"))


@pytest.mark.parametrize(
    ("stop", "new", "settled"),
    [
        (["ab"], [*b"xab"], True),
        (["ab"], [*b"xab", 258], True),
        (["<turn>"], [65, 259], False),
        # The longer one may still begin earlier, and lm-eval would cut there.
        (["xab!", "ab"], [*b"xab"], False),
        (["xab!", "ab"], [*b"xab?"], True),
        (["b!", "ab"], [*b"xab"], True),
        (["ab"], [*b"xa"], False),
    ],
)
def test_what_settles_a_text(stop: list[str], new: list[int], settled: bool) -> None:
    assert stops(*stop).settle(new) is settled
