"""What a model folder's config.json says before any library reads it: is it safe to hand on, and which shape is it.

Absent keys in a config.json have a meaning that transformers defines; the tables below hold it. A config that departs
from the plain architecture of its family (biases where it has none, cross-attention) has no known shape here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lora_lab.errors import InputError, Problem
from lora_lab.plan.paths import existing
from lora_lab.schema.combinations import combination_problems
from lora_lab.schema.model import FolderModel, Shape
from lora_lab.schema.trial import Trial

# Keys by which a config.json has made from_pretrained import or run code (CVE-2026-4372, CVE-2026-5241).
_HOSTILE_KEYS = ("auto_map", "_attn_implementation_internal", "trust_remote_code")
_CONFIG_LIMIT_BYTES = 10_000_000
_DEPTH_LIMIT = 50

_LLAMA_KEYS = {
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "mlp_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "max_positions": "max_position_embeddings",
}
_GPT2_KEYS = {
    "hidden_size": "n_embd",
    "num_layers": "n_layer",
    "num_heads": "n_head",
    "vocab_size": "vocab_size",
    "max_positions": "n_positions",
}
# Switches that add parameters the families of `plan.shapes` do not have.
_DEPARTURES = ("attention_bias", "mlp_bias", "add_cross_attention")


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Refuse a config.json with keys that lead a loader to code outside transformers; `where` names the file.

    Raises:
        InputError: with one problem per hostile key, at any depth.
    """
    found = sorted(set(_hostile_keys(config, depth=0, where=where)))
    if found:
        raise InputError(
            [Problem(where, f'key "{key}" can make a loader run code and is refused; remove it') for key in found]
        )


def _hostile_keys(node: object, *, depth: int, where: str) -> list[str]:
    if depth > _DEPTH_LIMIT:
        raise InputError(Problem(where, f"nested more than {_DEPTH_LIMIT} levels deep"))
    if isinstance(node, Mapping):
        own = [key for key in node if key in _HOSTILE_KEYS]
        return own + [key for value in node.values() for key in _hostile_keys(value, depth=depth + 1, where=where)]
    if isinstance(node, list):
        return [key for value in node for key in _hostile_keys(value, depth=depth + 1, where=where)]
    return []


def shape_from_config(config: Mapping[str, Any]) -> Shape | None:
    """The shape that a Hugging Face config.json describes, or None where the family or a needed number is not known."""
    family = config.get("model_type")
    if family not in ("llama", "mistral", "qwen2", "gpt2") or any(config.get(switch) for switch in _DEPARTURES):
        return None
    values = _gpt2_values(config) if family == "gpt2" else _llama_values(config)
    try:
        return Shape.model_validate({"family": family, **values})
    except ValidationError:
        return None


def _llama_values(config: Mapping[str, Any]) -> dict[str, Any]:
    values = {name: config.get(key) for name, key in _LLAMA_KEYS.items()}
    values["num_kv_heads"] = config.get("num_key_value_heads")
    if values["num_kv_heads"] is None and ("num_key_value_heads" in config or config["model_type"] == "llama"):
        values["num_kv_heads"] = values["num_heads"]  # null, and absence for Llama: no grouping
    values["head_dim"] = config.get("head_dim")
    if values["head_dim"] is None:
        values["head_dim"] = _quotient(values["hidden_size"], values["num_heads"])
    values["tied_embeddings"] = config.get("tie_word_embeddings", False)  # the three families' own meaning of absence
    return values


def _gpt2_values(config: Mapping[str, Any]) -> dict[str, Any]:
    values = {name: config.get(key) for name, key in _GPT2_KEYS.items()}
    hidden, inner = values["hidden_size"], config.get("n_inner")
    values["num_kv_heads"] = values["num_heads"]
    values["head_dim"] = _quotient(hidden, values["num_heads"])
    values["mlp_size"] = 4 * hidden if inner is None and isinstance(hidden, int) else inner
    values["tied_embeddings"] = config.get("tie_word_embeddings", True)  # GPT-2's own meaning of absence
    return values


def _quotient(whole: object, part: object) -> int | None:
    if isinstance(whole, int) and isinstance(part, int) and part > 0:
        return whole // part
    return None


def read_config(folder: str | Path, *, where: str) -> dict[str, Any]:
    """The checked content of FOLDER/config.json; `where` is the key that named the folder, for messages.

    Raises:
        InputError: no such folder or file, not JSON, not a mapping, or refused by `check_config`.
    """
    path = existing(Path(folder), where=where, kind="folder") / "config.json"
    stat = existing(path, where=where, kind="file").stat()
    if stat.st_size > _CONFIG_LIMIT_BYTES:
        raise InputError(Problem(str(path), f"{stat.st_size} bytes; a config.json has at most {_CONFIG_LIMIT_BYTES}"))
    return dict(_parse_config(path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))


@lru_cache(maxsize=64)
def _parse_config(path: Path, size: int, mtime_ns: int, ctime_ns: int) -> dict[str, Any]:
    """The stat values are part of the key, so that an edited file is read again."""
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(Problem(str(path), f"not valid JSON: {error}")) from None
    if not isinstance(config, dict):
        raise InputError(Problem(str(path), f"expected a JSON object, got {type(config).__name__}"))
    check_config(config, str(path))
    return config


def with_known_shape(trial: Trial) -> Trial:
    """The trial with its model's shape filled in from a local folder; the same trial where there is nothing to add.

    A folder's config.json is checked here even where the shape was given, since this runs before any model loads.

    Raises:
        InputError: from `read_config`, for a given shape that contradicts config.json, or from the rules about
            combinations that need the shape (tied embeddings).
    """
    if not isinstance(trial.model, FolderModel):
        return trial
    found, given = shape_from_config(read_config(trial.model.path, where="model.path")), trial.model.shape
    if found is not None and given is not None and found != given:
        raise InputError(_contradictions(given, found))
    if given is not None or found is None:
        return trial
    known = trial.model_copy(update={"model": trial.model.model_copy(update={"shape": found})})
    problems = combination_problems(known)
    if problems:
        raise InputError(problems)
    return known


def _contradictions(given: Shape, found: Shape) -> list[Problem]:
    ours, theirs = given.model_dump(), found.model_dump()
    return [
        Problem(f"model.shape.{key}", f"given as {ours[key]}, but config.json of the folder says {theirs[key]}")
        for key in ours
        if ours[key] != theirs[key]
    ]
