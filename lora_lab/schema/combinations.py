"""Rules that join several sections: combinations that cannot be meant, refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from lora_lab.errors import Problem
from lora_lab.schema.adapter_methods import AdaLora
from lora_lab.schema.expert_methods import Loramoe
from lora_lab.schema.method import VECTOR_KINDS

if TYPE_CHECKING:
    from lora_lab.schema.trial import Trial

_BITSANDBYTES = ("adamw8bit", "paged_adamw", "paged_adamw8bit", "lion")
# Parts that hold linear layers of the MLP.
_MLP = ("mlp",)


def combination_problems(trial: Trial) -> list[Problem]:
    """Every rule that a trial still breaks; of one with some sections only, the rules about those."""
    return [problem for rule, needs in _RULES if needs <= trial.model_fields_set for problem in rule(trial)]


def _trained_weights_are_plain(trial: Trial) -> list[Problem]:
    if trial.method.trains == "weights" and trial.quantization.kind != "none":
        return [
            Problem(
                "quantization",
                f"{trial.quantization.kind} weights cannot be trained themselves (method={trial.method.kind}); "
                "use quantization=none, or an adapter such as method=lora",
            )
        ]
    return []


def _decomposed_weights_are_plain(trial: Trial) -> list[Problem]:
    """PiSSA and OLoRA take their start out of the weight; what is left would have to be quantized anew."""
    kind = trial.method.kind
    if kind in ("pissa", "olora") and trial.quantization.kind != "none":
        message = (
            f"method={kind} takes its start out of the base's own weights, which a {trial.quantization.kind} base no "
            "longer has; use quantization=none, or method=lora"
        )
        return [Problem("quantization", message)]
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
    if "target" in trial.method.uses and not trial.target.parts and not trial.target.modules:
        return [Problem("target", f"method={trial.method.kind} needs at least one module to adapt, got none")]
    return []


def _experts_stay_in_the_mlp(trial: Trial) -> list[Problem]:
    if trial.method.kind == "loramoe" and (trial.target.parts != _MLP or trial.target.modules):
        named = ", ".join([*trial.target.parts, *trial.target.modules])
        return [
            Problem("target", f"method=loramoe puts experts on the MLP's linear layers only (target=mlp), got {named}")
        ]
    return []


def _experts_are_on_linear_layers(trial: Trial) -> list[Problem]:
    kind, parts = trial.method.kind, trial.target.parts
    wrong = [part for part in ("head", "embedding") if part in parts]
    if wrong and kind in ("molora", "mola", "ia3", "mov"):
        return [Problem("target", f"method={kind} works inside the decoder layers; take {' and '.join(wrong)} out")]
    return []


def _types_are_known(trial: Trial) -> list[Problem]:
    """Types of a column are judged once rows are read (`data.row_types`)."""
    method, known = trial.method, trial.data.row_types
    if not isinstance(method, Loramoe) or method.beta == 0 or known is None:
        return []
    if not known:
        message = (
            "the balancing constraint of loramoe (method.beta > 0) needs rows with types: data=skills_typed, "
            "data.types or data.type_column; or method.beta=0"
        )
        return [Problem("data", message)]
    strange = sorted(known - set(method.groups))
    if strange:
        rule = f"expected only {' and '.join(method.groups)} (method.groups), got {', '.join(strange)}"
        return [Problem("data.types", rule)]
    return []


def _galore_projects_gradients_only(trial: Trial) -> list[Problem]:
    if trial.method.kind == "galore" and trial.optimizer.kind == "sophia":
        rule = "sophia's curvature estimate belongs to whole weights, not to projected ones; use adamw, sgd or lion"
        return [Problem("optimizer", rule)]
    return []


def _quantized_adalora_keeps_its_precision(trial: Trial) -> list[Problem]:
    """PEFT 0.21's AdaLoRA on an int8 base answers in fp32 whatever comes in, and a bf16 model stops there."""
    if trial.method.kind == "adalora" and trial.quantization.kind == "int8" and trial.training.precision == "bf16":
        rule = "adalora on an int8 base works in fp32 only; use training.precision=fp32, or quantization=nf4"
        return [Problem("training.precision", rule)]
    return []


def _start_needs_an_adapter(trial: Trial) -> list[Problem]:
    if trial.init_from is not None and trial.method.trains == "nothing":
        return [Problem("init_from", "method=base trains nothing, so it starts from nothing; leave init_from out")]
    if trial.init_from is not None and trial.init_as == "adapter" and not trial.method.has_adapter:
        rule = f"method={trial.method.kind} trains the model's own weights; use init_as=weights"
        return [Problem("init_as", rule)]
    return []


def _tied_weights_stay_tied(trial: Trial) -> list[Problem]:
    shape = trial.model.shape
    if shape is None or not shape.tied_embeddings or trial.model.tie_embeddings is False:
        return []
    if not (trial.method.has_adapter and "target" in trial.method.uses):
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
    whole = "target" not in trial.method.uses or trial.method.kind in VECTOR_KINDS  # vectors scale all of c_attn
    if shape is None or shape.family != "gpt2" or whole or len(named) in (0, 3):
        return []
    return [
        Problem(
            "target",
            f"GPT-2 keeps query, key and value in one matrix (c_attn): name all three or none, got {', '.join(named)}",
        )
    ]


def _rank_fits_the_width(trial: Trial) -> list[Problem]:
    shape = trial.model.shape
    if shape is None or "rank" not in trial.method.uses or trial.rank <= shape.hidden_size:
        return []
    return [Problem("rank", f"must be <= {shape.hidden_size}, the hidden size of {trial.model.name}, got {trial.rank}")]


def _budget_shrinks(trial: Trial) -> list[Problem]:
    method = trial.method
    if not isinstance(method, AdaLora) or method.start(trial.rank) >= trial.rank:
        return []
    rule = f"must be >= {trial.rank}, the rank at the end (rank), got {method.start(trial.rank)}"
    return [Problem("method.initial_rank", rule)]


def _rates_fit_the_depth(trial: Trial) -> list[Problem]:
    shape, rates = trial.model.shape, trial.training.layer_rates
    if shape is None or len(rates) <= shape.num_layers:
        return []
    rule = f"{len(rates)} entries for a model of {shape.num_layers} layers; use at most as many"
    return [Problem("training.layer_rates", rule)]


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
    (_rates_fit_the_depth, frozenset({"model", "training"})),
    (_budget_shrinks, frozenset({"method", "rank"})),
    (_trained_weights_are_plain, frozenset({"method", "quantization"})),
    (_decomposed_weights_are_plain, frozenset({"method", "quantization"})),
    (_experts_stay_in_the_mlp, frozenset({"method", "target"})),
    (_experts_are_on_linear_layers, frozenset({"method", "target"})),
    (_types_are_known, frozenset({"method", "data"})),
    (_galore_projects_gradients_only, frozenset({"method", "optimizer"})),
    (_quantized_adalora_keeps_its_precision, frozenset({"method", "quantization", "training"})),
    (_start_needs_an_adapter, frozenset({"method", "init_from", "init_as"})),
    (_double_precision_is_plain, frozenset({"training", "quantization", "optimizer"})),
    (_adapter_needs_target, frozenset({"method", "target"})),
    (_tied_weights_stay_tied, frozenset({"model", "method", "target"})),
    (_fused_projections_stay_whole, frozenset({"model", "method", "target"})),
)
