"""Virtual tokens: prompt tuning, p-tuning and prefix tuning by PEFT, and the room they take in a model's context.

n: virtual tokens; d: hidden size; L: layers; k: key-value heads x head size (with group-query heads below d).
Trained are, and on disk are (PEFT writes what an encoder has computed and drops the encoder):

prompt tuning   n d embeddings in front of the row's own                          saved n d
p-tuning        n d, and an encoder that turns them into the embeddings           saved n d
prefix tuning   2 L k n: a key and a value per layer and virtual token            saved 2 L k n
                with a projection: n k, and an MLP that makes those               saved 2 L k n

They are float32 on a bf16 or 4-bit base (PEFT casts them where they enter the model) and float64 on a float64 base,
where PEFT would keep float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from peft import (
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    PromptTuningInit,
    initialize_kv_prefix_from_past_key_values,
)
from transformers import DynamicCache

from lora_lab.errors import InputError, Problem

_INITS = {"random": PromptTuningInit.RANDOM, "vocabulary": PromptTuningInit.SAMPLE_VOCAB}
# PEFT demands the name of a tokenizer beside a text; nothing loads it once the tokens are set.
_UNNAMED = "(of the base model)"


def prompt_tuning_config(
    base_model: Any,
    *,
    virtual_tokens: int,
    init: Literal["random", "vocabulary", "text"],
    init_text: str | None,
    tokenizer: Any | None,
    task_type: str,
    base_model_name_or_path: str | None,
    revision: str | None,
) -> PromptTuningConfig:
    """PEFT's configuration of prompt tuning (Lester et al. 2021, arXiv 2104.08691): n d trained parameters.

    random: standard normal, far outside a model's own embeddings (PEFT's way); vocabulary: rows of the embedding, drawn
    with replacement; text: the rows of its tokens, repeated or cut to `virtual_tokens` (`text_tokens`). PEFT loads a
    tokenizer by name for the last, so here it is set by `start_prompt` after attaching; only checked in this place.

    Raises:
        InputError: no room for the virtual tokens, or a text without tokens.
        ValueError: init=text without a text or a tokenizer.
    """
    check_room(base_model, virtual_tokens, 1)
    if init == "text":
        text_tokens(tokenizer, init_text, virtual_tokens)
    return PromptTuningConfig(
        task_type=task_type,
        base_model_name_or_path=base_model_name_or_path,
        revision=revision,
        num_virtual_tokens=virtual_tokens,
        prompt_tuning_init=_INITS.get(init, PromptTuningInit.RANDOM),
    )


def p_tuning_config(
    base_model: Any,
    *,
    virtual_tokens: int,
    encoder: Literal["mlp", "lstm"],
    encoder_hidden_size: int,
    encoder_layers: int,
    task_type: str,
    base_model_name_or_path: str | None,
    revision: str | None,
) -> PromptEncoderConfig:
    """PEFT's configuration of p-tuning (Liu et al. 2021, arXiv 2103.10385), the virtual tokens in front of the row.

    With h = encoder_hidden_size, and an affine map a -> b holding a b + b numbers, trained are n d and
    mlp: d -> h -> h -> d with ReLU, whatever `encoder_layers` says;
    lstm: both directions, per layer 2 (4 h (i + h) + 8 h) with i = d in the first layer and 2 h above, then the affine
    maps 2 h -> 2 h -> d with ReLU. PEFT's dropout inside the LSTM is left at 0: its masks would be global randomness.

    Raises:
        InputError: no room for the virtual tokens.
    """
    check_room(base_model, virtual_tokens, 1)
    return PromptEncoderConfig(
        task_type=task_type,
        base_model_name_or_path=base_model_name_or_path,
        revision=revision,
        num_virtual_tokens=virtual_tokens,
        encoder_reparameterization_type=encoder.upper(),
        encoder_hidden_size=encoder_hidden_size,
        **({"encoder_num_layers": encoder_layers} if encoder == "lstm" else {}),
    )


def prefix_tuning_config(
    base_model: Any,
    *,
    virtual_tokens: int,
    projection: bool,
    encoder_hidden_size: int,
    task_type: str,
    base_model_name_or_path: str | None,
    revision: str | None,
    init: Literal["random", "zero"] = "random",
) -> PrefixTuningConfig:
    """PEFT's configuration of prefix tuning (Li & Liang 2021, arXiv 2101.00190).

    Trained are 2 L k n; with `projection` n k and the affine maps k -> h -> 2 L k with tanh, h = encoder_hidden_size
    (the paper reparametrises always; its prefix has d columns where PEFT's has k).
    random: standard normal keys and values; zero: all 0, which is no identity: a key of 0 still draws attention
    (weight exp(0)) to a value of 0. `start_prompt` can start a prefix without projection from a text.

    Raises:
        InputError: no room for the virtual tokens.
    """
    check_room(base_model, virtual_tokens, 1)
    return PrefixTuningConfig(
        task_type=task_type,
        base_model_name_or_path=base_model_name_or_path,
        revision=revision,
        num_virtual_tokens=virtual_tokens,
        prefix_projection=projection,
        encoder_hidden_size=encoder_hidden_size if projection else None,
        init_weights="zero" if init == "zero" else None,
    )


def start_prompt(model: PeftModel, name: str, *, text: str | None, tokenizer: Any | None) -> None:
    """To be called right after PEFT has attached prompt adapter `name`: its precision and, with `text`, its start.

    A prompt then begins with the embeddings of the text's tokens, a prefix with the keys and values that the base
    computes for them: either way the model begins as the base does with this text in front. The tokens are
    `text_tokens`.

    Raises:
        InputError: a text without tokens, or for p-tuning or a projected prefix, whose encoder cannot be set to it.
    """
    match_precision(model, name)
    if text is None:
        return
    config = model.peft_config[name]
    tokens = torch.tensor([text_tokens(tokenizer, text, config.num_virtual_tokens)], device=model.device)
    if isinstance(config, PromptTuningConfig):
        with torch.no_grad():
            model.prompt_encoder[name].embedding.weight.copy_(model.get_input_embeddings()(tokens[0]))
        config.prompt_tuning_init = PromptTuningInit.TEXT
        config.prompt_tuning_init_text = text
        config.tokenizer_name_or_path = config.base_model_name_or_path or _UNNAMED
    elif isinstance(config, PrefixTuningConfig) and not config.prefix_projection:
        cache = DynamicCache()
        with torch.no_grad():
            model.get_base_model()(input_ids=tokens, past_key_values=cache, use_cache=True)
        initialize_kv_prefix_from_past_key_values(
            model, adapter_name=name, past_key_values=cache, num_virtual_tokens=config.num_virtual_tokens
        )
    else:
        raise InputError(Problem("method.init_text", "an encoder makes these virtual tokens, a text cannot set them"))


def match_precision(model: PeftModel, name: str) -> None:
    """Float64 for the virtual tokens `name` of a float64 base; everywhere else they stay float32."""
    if model.get_base_model().dtype == torch.float64:
        model.prompt_encoder[name].to(torch.float64)


def text_tokens(tokenizer: Any | None, text: str | None, count: int) -> list[int]:
    """`count` token ids of a text: a shorter one is repeated, a longer one cut.

    The tokenizer's own marks are among them (a BOS, where it puts one), as in PEFT.

    Raises:
        InputError: the text has no tokens.
        ValueError: text or tokenizer is missing.
    """
    if text is None or tokenizer is None:
        raise ValueError("virtual tokens that start from a text need the text and the tokenizer")
    ids: list[int] = list(tokenizer(text)["input_ids"])
    if not ids:
        raise InputError(Problem("method.init_text", f"{text!r} has no tokens"))
    return (ids * (count // len(ids) + 1))[:count]


def check_room(model: Any, virtual_tokens: int, longest_row: int) -> None:
    """Refuses rows that do not fit behind the virtual tokens: each of these takes a position, of a prefix too.

    longest_row: tokens of the longest row. `model` is a transformers model or a PeftModel.

    Raises:
        InputError: virtual_tokens + longest_row exceeds the model's positions.
    """
    limit = context_limit(model)
    if limit is None or virtual_tokens + longest_row <= limit:
        return
    positions = f"the {limit} positions of {model.config.model_type}"
    if virtual_tokens >= limit:
        raise InputError(Problem("method.virtual_tokens", f"must be < {limit}, {positions}, got {virtual_tokens}"))
    rows = f"{virtual_tokens} virtual tokens and a row of {longest_row} tokens"
    raise InputError(
        Problem("method.virtual_tokens", f"{rows} exceed {positions}; use data.max_length <= {limit - virtual_tokens}")
    )


def context_limit(model: Any) -> int | None:
    """Positions of a model as its configuration states them, or None where it states none."""
    limit = getattr(model.config, "max_position_embeddings", None)
    return None if limit is None else int(limit)


def virtual_tokens(model: Any) -> int:
    """How many virtual tokens stand in front of every row of `model` as it is: 0 while its adapter is disabled."""
    if not isinstance(model, PeftModel) or not _all_prompts(list(model.peft_config.values())):
        return 0
    return int(model.active_peft_config.num_virtual_tokens) if model.has_active_enabled_adapter else 0


def _all_prompts(configs: Sequence[Any]) -> bool:
    """PEFT mixes no kinds in one model, so one speaks for all."""
    return bool(configs) and all(config.is_prompt_learning for config in configs)
