"""The first section of a model card: base, method with all its settings, the runs it is built on, parameters."""

from __future__ import annotations

from collections.abc import Iterable

from lora_lab.record.ledger import ID_DIGITS
from lora_lab.record.markdown import code, prose
from lora_lab.record.parents import NORMS, START, WEIGHTS
from lora_lab.record.result import Result
from lora_lab.record.run_record import RunHeader
from lora_lab.schema.model import EmbeddedModel, HubModel
from lora_lab.schema.trial import Trial

_METHODS = {
    "full": "all weights trained",
    "freeze": "partial fine-tuning: the last layers and named modules trained, the rest frozen",
    "lisa": "LISA (embedding, head and final norm always trained, a few layers drawn anew in every period)",
    "galore": "GaLore (all weights trained, gradients of the chosen modules projected to a low rank)",
    "lora": "LoRA (scaling alpha / rank)",
    "rslora": "rank-stabilised LoRA (scaling alpha / sqrt(rank))",
    "dora": "DoRA (LoRA on the direction, and a trained magnitude per output)",
    "pissa": "PiSSA (LoRA that starts from principal singular vectors), saved as a LoRA of twice the rank",
    "olora": "OLoRA (LoRA that starts from a QR decomposition), saved as a LoRA of twice the rank",
    "lora_plus": "LoRA+ (LoRA whose B has a higher learning rate than A)",
    "adalora": "AdaLoRA (singular values pruned along a schedule; rank is the mean rank at the end)",
    "ia3": "IA3 (trained vectors that scale keys, values or activations)",
    "prompt_tuning": "prompt tuning (trained embeddings in front of the input)",
    "p_tuning": "p-tuning (virtual tokens made by a trained encoder, saved without it)",
    "prefix_tuning": "prefix tuning (trained keys and values in front of every layer's own)",
    "bottleneck": "bottleneck adapters (a small non-linear layer in each block)",
    "mov": "mixture of vectors (IA3 vectors mixed per token by a router)",
    "molora": "mixture of LoRA (LoRA pairs mixed per token by a router)",
    "loramoe": "LoRAMoE (LoRA experts on the MLP in two groups, mixed per token by a router)",
    "mola": "MoLA (LoRA experts, the best few per token; their number depends on the layer)",
}


def identity_rows(header: RunHeader, result: Result, trial: Trial) -> Iterable[tuple[str, str]]:
    """Title and Markdown of each row."""
    model = trial.model
    yield "base", code(model_name(trial))
    if isinstance(model, HubModel):
        yield "revision of the base", code(model.revision)
    if isinstance(model, EmbeddedModel):
        yield "file of the base", f"{code(model.file)} of the Python package {code(model.package)}, converted"
    if "base" in header.identities:
        yield "identity of the base", code(header.identities["base"])
    yield "method", _METHODS.get(trial.method.kind, code(trial.method.kind))
    yield from _method_settings(trial)
    yield from _stage(header, trial)
    double = " with double quantization" if trial.quantization.double_quantization else ""
    yield "quantization of the base", trial.quantization.kind + double
    yield "trained parameters", _parameters(result)
    yield "licence", "not stated; those of the base model and of the data apply"


def _method_settings(trial: Trial) -> Iterable[tuple[str, str]]:
    """The settings of the method itself, and the axes that mean something to it."""
    given = {
        key: value for key, value in trial.method.model_dump().items() if key != "kind" and value not in (None, ())
    }
    if given:
        named = [f"{key.replace('_', ' ')} {prose(setting_text(value))}" for key, value in given.items()]
        yield "settings of the method", ", ".join(named)
    axes = [axis for axis in ("rank", "alpha", "dropout") if axis in trial.method.uses]
    if axes:
        yield ", ".join(axes), ", ".join(f"{getattr(trial, axis):g}" for axis in axes)
    if "target" in trial.method.uses:
        title = "adapted modules" if trial.method.has_adapter else "modules with projected gradients"
        yield title, ", ".join([*trial.target.parts, *map(code, trial.target.modules)])


def _stage(header: RunHeader, trial: Trial) -> Iterable[tuple[str, str]]:
    """The runs that this one is built on."""
    identities = header.identities
    if START in identities:
        how = "the adapter of" if trial.init_as == "adapter" else "the weights of"
        yield "starts from", f"{how} run {code(identities[START][:ID_DIGITS])}"
    if identities.get(WEIGHTS, identities.get(START)) != identities.get(START):
        yield "lies on", f"the weights of run {code(identities[WEIGHTS][:ID_DIGITS])}"
    norms = [code(identities[role][:ID_DIGITS]) for role in NORMS if role in identities]
    if norms:
        yield "probabilities of layers", f"from the layer norms of runs {' and '.join(norms)}"


def _parameters(result: Result) -> str:
    trainable, total = result.trainable_parameters, result.total_parameters
    if trainable is None or total is None:
        return "not counted"
    return f"{trainable:,} of {total:,} ({100 * trainable / total:.3g} %)"


def model_name(trial: Trial) -> str:
    """What the base is called."""
    model = trial.model
    if isinstance(model, HubModel):
        return model.repo
    return model.name if model.name is not None else "a local model"


def setting_text(value: object) -> str:
    """A value of a configuration; of a list its entries."""
    if isinstance(value, tuple):
        return " and ".join(setting_text(one) for one in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
