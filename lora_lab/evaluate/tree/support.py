"""Whether a model can be scored by a tree: what its configuration rules out, then a numeric probe.

A tree's row holds tokens that are not each other's past, so a token must see what the mask lets it see and nothing
else, and stand where `position_ids` says. A configuration can say that this fails only beyond some length (windows,
rotary frequencies that change with the row), which a short probe cannot see; a probe finds what no configuration says.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from lora_lab.adapters.prompts import virtual_tokens
from lora_lab.evaluate.tree.probe import LONGEST, SHORTEST, why_probe_fails
from lora_lab.models.config_limits import layer_types, position_limits, rope_limits, text_sections, windows

# Implementations that add a mask of floats to the scores.
_ADDITIVE = ("sdpa", "eager")
# Layers whose attention is causal within a window, if there is one.
_ATTENTION = ("full_attention", "sliding_attention", "chunked_attention")
_State = tuple[object, ...]
_probed: WeakKeyDictionary[nn.Module, dict[_State, str | None]] = WeakKeyDictionary()


def why_not_tree(model: nn.Module, *, depth: int, probes: bool = True) -> str | None:
    """Why `model` cannot be scored by a tree of inputs up to `depth` tokens, virtual ones included; None if it can.

    The probe runs once per model object and adapter state (which adapters are active, enabled, merged, of what kind),
    dtype, device and attention implementation: ten forward passes of at most 70 tokens. It leaves training modes, the
    configuration, hooks, routing logs, gradients and global random state as they were. With probes=False only the
    configuration is asked: for a base and kind of adapter on which the tree has been compared with lm-eval before.
    """
    network: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    why = _why_no_causal_lm(network) or _why_no_adapter(model)
    if why is not None:
        return why
    sections = list(text_sections(network.config.get_text_config(decoder=True)))
    for check in _CHECKS:
        why = check(network, sections, depth)
        if why is not None:
            return why
    if not probes:
        return None
    limits = [*windows(sections).values(), *position_limits(sections)]
    room = min([LONGEST, *(limit - virtual_tokens(model) for limit in limits)])
    if room < SHORTEST:
        return f"its window or context leaves {room} tokens, too few to probe it"
    states, state = _probed.setdefault(model, {}), _state(model, network)
    if state not in states:
        states[state] = why_probe_fails(model, length=room)
    return states[state]


def _why_no_causal_lm(network: Any) -> str | None:
    if not isinstance(network, PreTrainedModel):
        return f"{type(network).__name__} is no model of transformers"
    if network.config.is_encoder_decoder:
        return "it is an encoder-decoder: its encoder sees whole inputs"
    if not network.can_generate():
        return f"{type(network).__name__} is no causal language model"
    if network.get_output_embeddings() is None:
        return "it has no output embedding whose input could be chosen"
    return None


def _why_no_adapter(model: Any) -> str | None:
    """PEFT's activated LoRA looks for its invocation tokens in the row, which in a tree is none."""
    if not isinstance(model, PeftModel):
        return None
    active = [model.peft_config[name] for name in model.active_adapters if name in model.peft_config]
    if any(getattr(config, "alora_invocation_tokens", None) for config in active):
        return "its activated LoRA starts at invocation tokens, which it looks for in the whole row"
    return None


def _why_layers(network: Any, sections: list[Any], _depth: int) -> str | None:
    for section in sections:
        other = sorted({str(kind) for kind in layer_types(section)} - set(_ATTENTION))
        if other:
            return f"its recurrent or hybrid layers ({', '.join(other)}) run along the row, not along ancestors"
    if getattr(network, "_is_stateful", False):
        return "its recurrent state runs along the row, not along ancestors"
    return None


def _why_positions(network: Any, sections: list[Any], depth: int) -> str | None:
    if any(getattr(section, "alibi", False) for section in sections):
        return "its ALiBi biases follow places in the row and ignore position_ids"
    if "position_ids" not in inspect.signature(type(network).forward).parameters:
        return f"{type(network).__name__} takes no position_ids, so places in the row count"
    if any(getattr(section, "attn_temperature_tuning", False) for section in sections):
        return "its attention temperature follows places in the row and ignores position_ids"
    for section in sections:
        for kind, limit in rope_limits(section):
            if depth > limit:
                return f"its {kind} rotary frequencies change in rows beyond {limit} tokens, and inputs have {depth}"
    return None


def _why_attention(network: Any, sections: list[Any], _depth: int) -> str | None:
    for section in sections:
        if getattr(section, "use_bidirectional_attention", None) in (True, "all") or not _is_causal(section):
            return "its attention is bidirectional: a token sees what follows it"
    implementation = sections[0]._attn_implementation or network.config._attn_implementation
    if implementation not in (None, *_ADDITIVE):
        return f"its attention implementation {implementation} takes no additive mask; {' and '.join(_ADDITIVE)} do"
    for name, buffer in network.named_buffers():
        if buffer.ndim == 4 and buffer.shape[-1] == buffer.shape[-2] > 1:
            # GPT-Neo's windows and the first GPT's triangle cut what lies further apart in a row, which a tree's may.
            return f"{name} is a mask of its own over {buffer.shape[-1]} places in the row"
    return None


def _why_window(_network: Any, sections: list[Any], depth: int) -> str | None:
    for name, window in windows(sections).items():
        if window < depth:
            return f"its {name} of {window} is shorter than the longest input ({depth} tokens)"
    return None


_CHECKS: tuple[Callable[[Any, list[Any], int], str | None], ...] = (
    _why_layers,
    _why_window,
    _why_positions,
    _why_attention,
)


def _is_causal(section: Any) -> bool:
    return getattr(section, "is_causal", None) is not False


def _state(model: Any, network: Any) -> _State:
    """What may change in a model object so that it has to be probed again."""
    layers = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
    tuned = frozenset(
        (type(layer).__name__, tuple(layer.active_adapters), layer.disable_adapters, tuple(layer.merged_adapters))
        for layer in layers
    )
    virtual = virtual_tokens(model)
    prompt = (str(model.active_peft_config.peft_type), virtual) if virtual else None
    return (tuned, prompt, network.dtype, str(network.device), network.config._attn_implementation)
