"""Which requests `GreedyDecoder` may answer; all others are lm-eval's own to generate, and here is why.

The decoder does what `generate` of transformers does for plain greedy decoding. Whatever makes `generate` do something
else is looked for: settings of the request, of the model's generation_config, and the model's own ways.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from peft import PeftModel, PeftType
from transformers import DynamicCache, GenerationMixin
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lora_lab.adapters.prompts import virtual_tokens

_VIRTUAL = (PeftType.PROMPT_TUNING, PeftType.P_TUNING, PeftType.PREFIX_TUNING)
# Adapters whose effect on a token depends on the whole row, or that attend to more than the cache.
_WHOLE_ROW = (PeftType.XLORA, PeftType.ADAPTION_PROMPT)

# Without effect on greedy decoding (sampling, beams, drafts), overruled by lm-eval (lengths, cache), or names.
_FREE = frozenset(
    {
        *("do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p"),
        *("epsilon_cutoff", "eta_cutoff", "length_penalty", "early_stopping", "max_length", "use_cache"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"),
        *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
        *("assistant_lookbehind", "target_lookbehind", "encoder_no_repeat_ngram_size", "encoder_repetition_penalty"),
        *("max_cache_len", "diversity_penalty", "num_beam_groups", "disable_compile"),
        *("output_attentions", "output_hidden_states", "output_scores", "output_logits"),
        *("transformers_version", "_from_model_config", "_commit_hash"),
    }
)
# Values that leave greedy decoding as it is, where None is not the only one.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "guidance_scale": (1.0,),
    "cache_implementation": ("dynamic", "hybrid"),
    "return_dict_in_generate": (False,),
    "remove_invalid_values": (False,),
    "renormalize_logits": (False,),
    "is_assistant": (False,),
    "token_healing": (False,),
    "use_mtp": (False,),
    "low_memory": (False,),
}
# Rotary embeddings whose frequencies depend on the length of what is computed together.
_LENGTH_BOUND = ("dynamic", "longrope")


def why_not_greedy(model: Any, tokenizer: Any, settings: Mapping[str, Any], length: int) -> str | None:
    """The reason to leave a batch to lm-eval's own generation, or None.

    Args:
        model: a causal LM of transformers, or a PeftModel around one.
        tokenizer: lm-eval's.
        settings: what the task sets beside stop strings and lengths.
        length: the longest row when all is generated, in tokens, with virtual tokens.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return (
        _of_request(settings)
        or _of_generation_config(model)
        or _of_tokenizer(tokenizer)
        or _of_adapter(model)
        or _of_model(base, length)
    )


def _of_request(settings: Mapping[str, Any]) -> str | None:
    if settings.get("do_sample") or settings.get("temperature"):
        return "it samples"
    others = sorted(set(settings) - {"do_sample", "temperature", "top_p", "top_k", "attention_mask"})
    return f"the task sets {', '.join(others)}" if others else None


def _of_generation_config(model: Any) -> str | None:
    config = getattr(model, "generation_config", None)
    if config is None:
        return "the model has no generation_config"
    for name, value in config.to_dict().items():
        if name not in _FREE and value is not None and value not in _NEUTRAL.get(name, ()):
            return f"the model's generation_config sets {name}={value!r}"
    return None


def _of_tokenizer(tokenizer: Any) -> str | None:
    # Rows that have ended are filled with it.
    if tokenizer.pad_token_id is None or tokenizer.decode([tokenizer.pad_token_id], skip_special_tokens=True) != "":
        return "the padding token is not a special one, so lm-eval would read it as text"
    return None


def _of_adapter(model: Any) -> str | None:
    if not isinstance(model, PeftModel):
        return None
    if virtual_tokens(model) and model.peft_type not in _VIRTUAL:
        return f"virtual tokens of {model.peft_type.value}"
    for config in model.peft_config.values():
        if config.peft_type in _WHOLE_ROW or getattr(config, "alora_invocation_tokens", None):
            return f"a {config.peft_type.value} adapter that looks at the whole row"
    return None


def _of_model(base: Any, length: int) -> str | None:
    config = base.config.get_text_config(decoder=True)
    kinds = {type(layer) for layer in DynamicCache(config=config).layers}
    chunk = getattr(config, "attention_chunk_size", None)
    if base.config.is_encoder_decoder:
        return "an encoder-decoder"
    if getattr(base, "_is_stateful", False) or not kinds <= {DynamicLayer, DynamicSlidingWindowLayer}:
        return "its cache is not keys and values of every layer"
    if any(
        getattr(type(base), name, None) is not getattr(GenerationMixin, name)
        for name in ("generate", "prepare_inputs_for_generation")
    ):
        return f"{type(base).__name__} generates in its own way"
    if not {"position_ids", "past_key_values"} <= set(inspect.signature(base.forward).parameters):
        return f"{type(base).__name__} takes no positions"
    if chunk is not None and chunk < length:
        return f"attention in chunks of {chunk} tokens, rows of {length}"
    if any(kind in _LENGTH_BOUND for kind in _rope_types(getattr(config, "rope_parameters", None))):
        return "positions whose embedding depends on the length"
    return None


def _rope_types(parameters: Any) -> list[str]:
    """Of one set of parameters, or of one set for each kind of layer."""
    if not isinstance(parameters, Mapping):
        return []
    here = [str(parameters["rope_type"])] if "rope_type" in parameters else []
    return here + [kind for inner in parameters.values() for kind in _rope_types(inner)]
