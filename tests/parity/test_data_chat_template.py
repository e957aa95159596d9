"""Our tokens against transformers' own chat encoding, and our loss mask against its assistant mask."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lora_lab.data.encode import encode_row, prompt_ids
from lora_lab.data.rows import Message, Row
from tests.fixtures.data.toy_tokenizers import chatml, llama_like

CONVERSATIONS = [
    [("user", "What is two plus two?"), ("assistant", "four")],
    [("user", "Say\n\nit again "), ("assistant", "four!\n\nfour!")],
    [("user", "one?"), ("assistant", "one"), ("user", "two? é ü 漢字"), ("assistant", "The answer: deux.")],
    [("user", "  spaces  "), ("assistant", "ends with a blank ")],
]


def row_of(turns: list[tuple[str, str]]) -> Row:
    return Row(tuple(Message(role, text) for role, text in turns), None, "x:1")


def check_against_transformers(tokenizer: PreTrainedTokenizerBase, turns: list[tuple[str, str]]) -> None:
    messages = [{"role": role, "content": text} for role, text in turns]
    encoded = encode_row(row_of(turns), tokenizer, template="model", loss_on="answer", max_length=4096)
    whole = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    ours = list(encoded.input_ids)
    assert whole[: len(ours)] == ours
    assert str(tokenizer.decode(whole[len(ours) :])).strip() == ""  # nothing but the line feed after the end of turn
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=True, add_generation_prompt=True, return_dict=True)[
        "input_ids"
    ]
    assert prompt == list(prompt_ids(row_of(turns), tokenizer, "model"))
    assert encoded.loss_mask == tuple(index >= len(prompt) for index in range(len(ours)))


@pytest.mark.parametrize("turns", CONVERSATIONS)
def test_tokens_are_those_of_apply_chat_template(turns: list[tuple[str, str]]) -> None:
    check_against_transformers(chatml(), turns)
    check_against_transformers(llama_like(), turns)


@pytest.mark.parametrize("turns", CONVERSATIONS)
def test_loss_mask_is_the_assistant_mask_of_the_last_turn(turns: list[tuple[str, str]]) -> None:
    """The toy template marks generations as TRL's training templates do; the end of turn belongs to them."""
    tokenizer = chatml()
    messages = [{"role": role, "content": text} for role, text in turns]
    theirs = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )["assistant_masks"]
    encoded = encode_row(row_of(turns), tokenizer, template="model", loss_on="answer", max_length=4096)
    last_turn = len(prompt_ids(row_of(turns), tokenizer, "model"))
    expected = [bool(mark) and index >= last_turn for index, mark in enumerate(theirs)]
    assert list(encoded.loss_mask) == expected[: len(encoded.loss_mask)]
    assert not any(expected[len(encoded.loss_mask) :])


@pytest.mark.model
@pytest.mark.parametrize("turns", CONVERSATIONS)
def test_embedded_model_agrees_too(turns: list[tuple[str, str]], cache: Path) -> None:
    folders = sorted(folder.parent for folder in cache.rglob("tokenizer.json")) if cache.is_dir() else []
    if not folders:
        pytest.skip(f"no converted model under {cache}; `lora-lab fetch` makes it")
    check_against_transformers(AutoTokenizer.from_pretrained(folders[0]), turns)
