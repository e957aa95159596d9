"""What a model's configuration says about how far its tokens may look and stand: windows, positions, rotary limits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig

# Where configurations keep the number of tokens that a windowed layer looks back on, its own included.
_WINDOWS = (
    "sliding_window",
    "sliding_window_size",
    "attention_chunk_size",
    "attention_window_size",
    "attention_window",
    "keep_window_size",
    "local_attention",
    "window_size",
)
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")
# Rotary frequencies that are chosen by the longest position of the whole call, and beyond which length.
_ROPE_LIMITS = {"dynamic": "max_position_embeddings", "longrope": "original_max_position_embeddings"}
_OTHER_SENSES = ("vision", "audio", "image", "video", "speech")


def text_sections(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A configuration and those inside it that are about text."""
    yield config
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig) and not any(sense in name for sense in _OTHER_SENSES):
            yield from text_sections(value)


def layer_types(section: Any) -> list[str]:
    """The kind of each layer, where a configuration tells them apart."""
    return list(getattr(section, "layer_types", None) or ())


def windows(sections: list[Any]) -> dict[str, int]:
    """The windows that some layer uses, by the key that sets them."""
    found: dict[str, int] = {}
    for section in sections:
        for name in _WINDOWS:
            value = getattr(section, name, None)
            if isinstance(value, int) and value > 0 and _is_used(section, name):
                found[name] = min(value, found.get(name, value))
    return found


def _is_used(section: Any, name: str) -> bool:
    if name == "window_size":  # GPT-Neo's; elsewhere the name is used for other things
        return "local" in (getattr(section, "attention_layers", None) or ())
    if name == "sliding_window" and getattr(section, "use_sliding_window", None) is False:
        return False
    types = layer_types(section)
    return not types or any(kind != "full_attention" for kind in types)


def position_limits(sections: list[Any]) -> list[int]:
    """The most tokens a row may have, by every key that says so."""
    values = [getattr(section, name, None) for section in sections for name in _POSITIONS]
    return [value for value in values if isinstance(value, int) and value > 0]


def rope_limits(section: Any) -> Iterator[tuple[str, int]]:
    """(rope_type, longest row with the usual frequencies); parameters may be given per layer type."""
    parameters = getattr(section, "rope_parameters", None) or {}
    for one in (parameters, *parameters.values()):
        kind = one.get("rope_type") if isinstance(one, dict) else None
        if kind in _ROPE_LIMITS:
            limit = one.get(_ROPE_LIMITS[kind]) or getattr(section, _ROPE_LIMITS[kind], None)
            if limit is not None:
                yield kind, int(limit)
