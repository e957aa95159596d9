"""Rules that join several sections: combinations that cannot be meant, refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from lora_lab.errors import Problem

if TYPE_CHECKING:
    from lora_lab.schema.trial import Trial

_BITSANDBYTES = ("adamw8bit", "paged_adamw", "paged_adamw8bit", "lion")


def combination_problems(trial: Trial) -> list[Problem]:
    """Every rule that a trial still breaks; of one with some sections only, the rules about those."""
    return [problem for rule, needs in _RULES if needs <= trial.model_fields_set for problem in rule(trial)]


def _full_needs_plain_weights(trial: Trial) -> list[Problem]:
    if trial.method.kind == "full" and trial.quantization.kind != "none":
        return [
            Problem(
                "quantization",
                f"{trial.quantization.kind} weights cannot be trained themselves (method=full); "
                "use quantization=none, or an adapter such as method=lora",
            )
        ]
    return []


def _double_precision_is_plain(trial: Trial) -> list[Problem]:
    problems = []
    if trial.training.precision == "fp64":
        if trial.quantization.kind != "none":
            problems.append(
                Problem("training.precision", f"fp64 does not combine with quantization={trial.quantization.kind}")
            )
        if trial.optimizer.kind in _BITSANDBYTES:
            problems.append(
                Problem(
                    "training.precision",
                    f"fp64 does not combine with optimizer={trial.optimizer.kind} (bitsandbytes works in 32 bits); "
                    "use optimizer=adamw or optimizer=sgd",
                )
            )
    return problems


def _adapter_needs_target(trial: Trial) -> list[Problem]:
    if trial.method.has_adapter and not trial.target.parts and not trial.target.modules:
        return [Problem("target", f"method={trial.method.kind} needs at least one module to adapt, got none")]
    return []


def _tied_weights_stay_tied(trial: Trial) -> list[Problem]:
    shape = trial.model.shape
    if shape is None or not shape.tied_embeddings or trial.model.tie_embeddings is False:
        return []
    if not trial.method.has_adapter:
        return []
    problems = []
    for part in ("head", "embedding"):
        if part in trial.target.parts:
            problems.append(
                Problem(
                    "target",
                    f"{part} shares its weight with the other end of {trial.model.name} (tied embeddings), so an "
                    "adapter there would change both; model.tie_embeddings=false makes a copy",
                )
            )
    return problems


def _fused_projections_stay_whole(trial: Trial) -> list[Problem]:
    shape = trial.model.shape
    fused = ("query", "key", "value")
    named = [part for part in fused if part in trial.target.parts]
    if shape is None or shape.family != "gpt2" or not trial.method.has_adapter or len(named) in (0, 3):
        return []
    return [
        Problem(
            "target",
            f"GPT-2 keeps query, key and value in one matrix (c_attn): name all three or none, got {', '.join(named)}",
        )
    ]


def _rank_fits_the_width(trial: Trial) -> list[Problem]:
    shape = trial.model.shape
    if shape is None or not trial.method.has_adapter or trial.rank <= shape.hidden_size:
        return []
    return [Problem("rank", f"must be <= {shape.hidden_size}, the hidden size of {trial.model.name}, got {trial.rank}")]


def _texts_say_something(trial: Trial) -> list[Problem]:
    """A path of nothing would be read as the current folder."""
    return [
        Problem(f"{section}.{key}", "empty value; expected text")
        for section, keys in _TEXTS.items()
        if section in trial.model_fields_set
        for key in keys
        if getattr(getattr(trial, section), key, None) == ""
    ]


_TEXTS = {
    "model": ("name", "path", "repo", "revision"),
    "data": ("path", "heldout_path", "repo", "revision", "split"),
    "evaluation": ("mirror", "include_path"),
}
# A rule, and the sections it looks at.
_RULES: tuple[tuple[Callable[[Trial], list[Problem]], frozenset[str]], ...] = (
    (_texts_say_something, frozenset()),
    (_rank_fits_the_width, frozenset({"model", "method", "rank"})),
    (_full_needs_plain_weights, frozenset({"method", "quantization"})),
    (_double_precision_is_plain, frozenset({"training", "quantization", "optimizer"})),
    (_adapter_needs_target, frozenset({"method", "target"})),
    (_tied_weights_stay_tied, frozenset({"model", "method", "target"})),
    (_fused_projections_stay_whole, frozenset({"model", "method", "target"})),
)
