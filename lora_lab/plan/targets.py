"""From a target to the modules that get an adapter: parts by name, and exact names or globs for the rest."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType

from lora_lab.errors import InputError, Problem, nearest
from lora_lab.plan.shapes import Module, is_tied, modules_of
from lora_lab.schema.adaptation import Target
from lora_lab.schema.method import VECTOR_KINDS
from lora_lab.schema.model import Shape
from lora_lab.schema.trial import Trial

_LLAMA_SUFFIXES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "query": ("q_proj",),
        "key": ("k_proj",),
        "value": ("v_proj",),
        "projection": ("o_proj",),
        "mlp": ("gate_proj", "up_proj", "down_proj"),
        "head": ("lm_head",),
        "embedding": ("embed_tokens",),
    }
)
_GPT2_SUFFIXES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "query": ("c_attn",),
        "key": ("c_attn",),
        "value": ("c_attn",),
        "projection": ("attn.c_proj",),
        "mlp": ("mlp.c_fc", "mlp.c_proj"),
        "head": ("lm_head",),
        "embedding": ("wte",),
    }
)
_PHI_SUFFIXES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {**_LLAMA_SUFFIXES, "projection": ("self_attn.dense",), "mlp": ("mlp.fc1", "mlp.fc2")}
)
_OPT_SUFFIXES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {**_LLAMA_SUFFIXES, "projection": ("self_attn.out_proj",), "mlp": ("fc1", "fc2")}
)
# Families that name their layers as Llama does; shapes are declared for the first three alone (`plan.shapes`).
_LIKE_LLAMA = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"),
    *("granite", "olmo", "olmo2", "smollm3", "stablelm"),
)
_SUFFIXES: Mapping[str, Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        **dict.fromkeys(_LIKE_LLAMA, _LLAMA_SUFFIXES),
        "phi": _PHI_SUFFIXES,
        "opt": _OPT_SUFFIXES,
        "gpt2": _GPT2_SUFFIXES,
    }
)
# family -> the end of the dotted name of the layer that leaves the MLP, whose input is the MLP's activation.
LAST_OF_MLP: Mapping[str, str] = MappingProxyType(
    {**dict.fromkeys(_LIKE_LLAMA, "mlp.down_proj"), "phi": "mlp.fc2", "opt": "fc2", "gpt2": "mlp.c_proj"}
)
_NAME = re.compile(r"[A-Za-z0-9_.*]+")


def part_suffixes(family: str, *, kind: str = "lora") -> Mapping[str, tuple[str, ...]]:
    """For each part a target may name, the ends of the dotted names of its modules.

    kind: of the method; to one of VECTOR_KINDS `mlp` is the MLP's last layer alone, whose input it scales.

    Raises:
        InputError: for a family whose module names are not known.
    """
    if family not in _SUFFIXES:
        raise InputError(Problem("model", f'unknown family "{family}"' + nearest(family, list(_SUFFIXES))))
    suffixes = _SUFFIXES[family]
    if kind in VECTOR_KINDS:
        return MappingProxyType({**suffixes, "mlp": (LAST_OF_MLP[family],)})
    return suffixes


def name_matches(module_name: str, name: str) -> bool:
    """Whether `name` (exact, or with `*` for any run of characters) is the dotted module name or an end of it.

    An end starts behind a dot: `q_proj` matches `model.layers.0.self_attn.q_proj`, `proj` does not.
    """
    if "*" in name:
        return fnmatch.fnmatchcase(module_name, name) or fnmatch.fnmatchcase(module_name, f"*.{name}")
    return module_name == name or module_name.endswith(f".{name}")


@lru_cache(maxsize=1024)
def select_modules(shape: Shape, target: Target, *, kind: str = "lora") -> tuple[Module, ...]:
    """The modules a target names for a method of this kind, each once, in the model's order.

    Raises:
        InputError: with one problem per name that is a regular expression, matches nothing, or matches only modules
            that cannot carry an adapter. A glob may run over such modules (`model.layers.0.*`): it means the others.
    """
    modules = modules_of(shape)
    suffixes = part_suffixes(shape.family, kind=kind)
    named = [end for part in target.parts for end in suffixes[part]]
    chosen = {module.name for module in modules if any(name_matches(module.name, end) for end in named)}
    problems: list[Problem] = []
    for name in target.modules:
        matched = [module for module in modules if _NAME.fullmatch(name) and name_matches(module.name, name)]
        adaptable = [module.name for module in matched if module.kind != "norm"]
        chosen.update(adaptable)
        if not adaptable:
            problems.append(_refused(name, matched=bool(matched), modules=modules))
    if problems:
        raise InputError(problems)
    return tuple(module for module in modules if module.name in chosen)


def _refused(name: str, *, matched: bool, modules: tuple[Module, ...]) -> Problem:
    choices = list(dict.fromkeys(module.name.rpartition(".")[2] for module in modules if module.kind != "norm"))
    shown = name if len(name) <= 100 else f"{name[:97]}..."
    if matched:
        message = f'"{shown}" is a normalisation layer; an adapter needs a linear layer or an embedding'
        return Problem("target.modules", f"{message} (choices: {', '.join(choices)})")
    if not _NAME.fullmatch(name):
        message = f'"{shown}" is not a module name; use exact names, or * for any run of characters (no regexps)'
        return Problem("target.modules", f"{message} (choices: {', '.join(choices)})")
    return Problem("target.modules", f'"{shown}" matches no module' + nearest(name, choices))


def selected_modules(trial: Trial) -> tuple[Module, ...] | None:
    """The modules that the method works on: none where it uses no target, None where the shape is not known.

    Raises:
        InputError: from `select_modules`, or for a head or embedding named on a model that keeps the two tied.
    """
    if "target" not in trial.method.uses:
        return ()
    shape = trial.model.shape
    if shape is None:
        return None
    chosen = select_modules(shape, trial.target, kind=trial.method.kind)
    if trial.method.has_adapter and is_tied(shape, tie_embeddings=trial.model.tie_embeddings):
        shared = [module.name for module in chosen if module.parts in (("head",), ("embedding",))]
        if shared:
            raise InputError(
                Problem(
                    "target",
                    f"{' and '.join(shared)}: head and embedding of this model share one weight, so an adapter there "
                    "would change both; model.tie_embeddings=false makes a copy",
                )
            )
    return chosen
