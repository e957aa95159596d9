"""Which methods can become plain weights, and why the others cannot."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from lora_lab.schema.method import METHODS

_ROUTED = "its router weighs the experts anew for each token, which no one weight can do"
_PROMPT = "it puts virtual tokens in front of the input and changes no weight"

# kind -> what stands in the way, whatever the weights are.
_NO_WEIGHT_EQUALS_IT: Mapping[str, str] = MappingProxyType(
    {
        "bottleneck": "an activation stands between its two matrices, so no weight equals it",
        "mov": _ROUTED,
        "molora": _ROUTED,
        "loramoe": _ROUTED,
        "mola": _ROUTED,
        "prompt_tuning": _PROMPT,
        "p_tuning": _PROMPT,
        "prefix_tuning": "its trained keys and values stand in front of each layer's own and change no weight",
    }
)
# kind -> why it goes into the base only alone.
_ONLY_ALONE: Mapping[str, str] = MappingProxyType(
    {
        "dora": "a DoRA, whose magnitudes cannot be combined",
        "adalora": "an AdaLoRA, whose singular values cannot be combined with those of others",
        "ia3": "an IA3, which multiplies weights where the others add to them",
    }
)
# PEFT types that are not the upper-case name of a kind: the three mixtures of LoRA experts are one type.
_KINDS_OF_TYPES: Mapping[str, str] = MappingProxyType({"LORA_EXPERTS": "molora"})


def merge_problem(kind: str, *, run: str, is_alone: bool) -> str | None:
    """Why a run of method `kind` cannot be merged, or None. is_alone: no other adapter is merged with it."""
    method = METHODS.get(kind)
    if method is not None and method.trains == "nothing":
        return f"method={kind} has no adapter to merge: nothing was trained"
    if method is not None and method.trains == "weights":
        return (
            f"method={kind} has no adapter to merge: it trained the model's own weights, which its folder holds as "
            f"they are; init_from={run} init_as=weights starts from them"
        )
    if kind in _NO_WEIGHT_EQUALS_IT:
        return f"method={kind} cannot be merged: {_NO_WEIGHT_EQUALS_IT[kind]}"
    if kind in _ONLY_ALONE and not is_alone:
        return f"{_ONLY_ALONE[kind]}; merge it alone into the base"
    return None


def type_problem(peft_type: str) -> str | None:
    """Why adapters of a PEFT type (`LORA`, `MOV`, ...) cannot become weights, or None."""
    kind = _KINDS_OF_TYPES.get(peft_type, peft_type.lower())
    if kind in _NO_WEIGHT_EQUALS_IT:
        return f"{peft_type} cannot be merged: {_NO_WEIGHT_EQUALS_IT[kind]}"
    if kind not in ("lora", "adalora", "ia3"):
        return f"{peft_type} cannot be merged here, only LORA, ADALORA and IA3"
    return None
