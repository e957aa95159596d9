"""A randomly initialised model with a byte tokenizer: for tests and dry runs, never for findings."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from lora_lab.errors import InputError, Problem
from lora_lab.models.quiet import quiet_transformers
from lora_lab.models.shape_config import shape_config
from lora_lab.models.stored import stored_folder
from lora_lab.schema.labels import check_label
from lora_lab.schema.model import RandomModel, Shape

# The 256 bytes keep their own values as ids; these follow.
PAD, BOS, EOS, TURN = "<pad>", "<bos>", "<eos>", "<turn>"
SPECIAL_IDS = {PAD: 256, BOS: 257, EOS: 258, TURN: 259}
BYTE_VOCABULARY = 260

# Raised by one when the same shape and seed are to give other files, so that folders made earlier are not taken.
_RECIPE = 1

_CHAT_TEMPLATE = (
    "{{ '<bos>' }}{% for message in messages %}{{ '<turn>' + message['role'] + '\n' + message['content'] + '<eos>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<turn>assistant\n' }}{% endif %}"
)


def random_folder(model: RandomModel, cache: Path) -> Path:
    """The folder with the model of this shape and seed, written once like any other model.

    Raises:
        InputError: the vocabulary is smaller than the byte tokenizer's, or the name cannot be part of a folder name.
        MachineError: the disk refuses.
    """
    problems = []
    try:
        check_label(model.name)
    except ValueError as error:
        problems.append(Problem("model.name", str(error)))
    if model.shape.vocab_size < BYTE_VOCABULARY:
        problems.append(
            Problem("model.shape.vocab_size", f"must be >= {BYTE_VOCABULARY}, got {model.shape.vocab_size}")
        )
    if problems:
        raise InputError(problems)
    content = f"recipe {_RECIPE} {model.shape.model_dump_json()} seed {model.seed}"
    digest = hashlib.sha256(content.encode()).hexdigest()[:12]
    return stored_folder(cache, f"{model.name}-{digest}", lambda folder: _write(model, folder))


def random_network(shape: Shape, seed: int) -> Any:
    """A float32 causal LM of this shape; the same seed gives the same weights, and global random state is untouched."""
    # No pad id here: it would zero that row, and DoRA divides by the norm of every row.
    marks = {"bos_token_id": SPECIAL_IDS[BOS], "eos_token_id": SPECIAL_IDS[EOS]}
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.default_generator.manual_seed(seed)
        return AutoModelForCausalLM.from_config(shape_config(shape, **marks), dtype=torch.float32)


def byte_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """One token per byte of UTF-8 (id = the byte) and four marks; any text comes back unchanged from decode(encode)."""
    letters = _byte_letters()
    tokenizer = Tokenizer(models.BPE(vocab={letter: byte for byte, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL_IDS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        extra_special_tokens=[TURN],
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
    )
    fast.chat_template = _CHAT_TEMPLATE
    return fast


def _write(model: RandomModel, folder: Path) -> None:
    network = random_network(model.shape, model.seed)
    with quiet_transformers():
        network.save_pretrained(folder)
        byte_tokenizer(model.shape.max_positions).save_pretrained(folder)


def _byte_letters() -> list[str]:
    """The letter that GPT-2's byte-level convention gives each byte: itself if it prints, else one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
