"""A trial as lit-gpt would have run it on one GPU: what it can, and the step that is traced.

Longest rows meet when optimizer states and gradients are there: the largest moment that a run may come to. Or, as in
lit-gpt of 2023, the longest row comes first, where they are not (`LitRun.first`): the moment that a run came to whose
longest row is much longer than its others.
"""

from __future__ import annotations

from torch import nn

from lora_lab.adapters.attach import ParameterCounts
from lora_lab.memory.live_bytes import CUDA_BLOCK_BYTES
from lora_lab.optim.optimizers import PAGED_ELEMENTS
from lora_lab.plan.prediction import DeviceKind, LongestRows
from lora_lab.predict.fake_model import Unpredictable
from lora_lab.predict.styles.lit_linear import PackedLinear, Packing, Tuning
from lora_lab.predict.styles.lit_shapes import LitShape
from lora_lab.predict.styles.lit_step import LitOptimizer, LitRun, fake_model, training_timeline
from lora_lab.predict.traced_step import TracedStep
from lora_lab.schema.model import Shape
from lora_lab.schema.optimization import Sgd
from lora_lab.schema.trial import Trial

_TARGETS = {"query": "q", "key": "k", "value": "v", "projection": "o", "mlp": "mlp", "head": "head"}
# What it pads vocabularies of the Llama family to.
_PADDING = 64


def litgpt_step(trial: Trial, rows: LongestRows, *, device_kind: DeviceKind, first: bool = False) -> TracedStep:
    """The step of `trial` as lit-gpt takes it; first: with the longest row before all others.

    Raises:
        Unpredictable: lit-gpt does not do what the trial asks for, or the model's shape is not known.
    """
    run = run_of(trial, rows, first=first)
    block = CUDA_BLOCK_BYTES if device_kind == "cuda" else 1
    timeline = training_timeline(run, block_bytes=block)
    model = fake_model(run.shape, run.packing, run.tuning, run.length)
    sizes = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    paged = sum(2 * 4 * size for size in sizes if size >= PAGED_ELEMENTS) if run.optimizer == "paged_adamw" else 0
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    base = [*frozen, *model.buffers()] if run.tuning.kind != "full" else [*model.parameters(), *model.buffers()]
    return TracedStep(
        timeline=timeline,
        counts=ParameterCounts(trainable=sum(sizes), total=sum(sizes) + _weights(model, frozen)),
        base_bytes=sum(-(-tensor.nbytes // block) * block for tensor in base),
        paged_bytes=paged,
        rows="padded, as lit-gpt lays them",
    )


def run_of(trial: Trial, rows: LongestRows, *, first: bool = False) -> LitRun:
    """What lit-gpt is asked for; raises as `litgpt_step` does."""
    training = trial.training
    if training.precision != "bf16":
        raise Unpredictable(f"precision {training.precision}: the step of lit-gpt is traced in bf16 only")
    if training.gradient_checkpointing != "off":
        raise Unpredictable("gradient checkpointing: lit-gpt has none on one GPU")
    micro_batch = min(training.micro_batch_size, len(rows.lengths))
    others = rows.lengths[micro_batch:]
    return LitRun(
        shape=_shape(trial),
        packing=_packing(trial),
        tuning=_tuning(trial),
        optimizer=_optimizer(trial),
        micro_batch=micro_batch,
        length=max(rows.lengths),
        first=first,
        accumulates=training.batch_size > training.micro_batch_size,
        before=0 if first else max(others, default=max(rows.lengths)),
    )


def lit_shape(shape: Shape) -> LitShape:
    """A shape as lit-gpt wires it; raises Unpredictable for a family that it does not have."""
    if shape.family == "gpt2":
        raise Unpredictable("gpt2: lit-gpt has no such model")
    return LitShape(
        layers=shape.num_layers,
        hidden=shape.hidden_size,
        heads=shape.num_heads,
        key_value_heads=shape.num_kv_heads,
        head_size=shape.head_dim,
        intermediate=shape.mlp_size,
        rows=-(-shape.vocab_size // _PADDING) * _PADDING,
        norm="rms",
        mlp="gated_silu",
        joint_bias=shape.family == "qwen2",
    )


def _shape(trial: Trial) -> LitShape:
    if trial.model.shape is None:
        raise Unpredictable("the shape of the model is not known without its files")
    return lit_shape(trial.model.shape)


def _packing(trial: Trial) -> Packing | None:
    kind = trial.quantization.kind
    if kind == "int8":
        raise Unpredictable("int8: the step of lit-gpt is traced for nf4 and fp4 only")
    return None if kind == "none" else Packing(nested=trial.quantization.double_quantization)


def _tuning(trial: Trial) -> Tuning:
    kind = trial.method.kind
    if kind == "full":
        return Tuning("full")
    if kind not in ("lora", "rslora"):
        raise Unpredictable(f"{kind}: the step of lit-gpt is traced for lora and full only")
    outside = [part for part in (*trial.target.parts, *trial.target.modules) if part not in _TARGETS]
    if outside:
        raise Unpredictable(f"an adapter on {outside[0]}: lit-gpt has them on {', '.join(_TARGETS)}")
    return Tuning("lora", trial.rank, frozenset(_TARGETS[part] for part in trial.target.parts), trial.dropout)


def _optimizer(trial: Trial) -> LitOptimizer:
    optimizer = trial.optimizer
    if isinstance(optimizer, Sgd):
        return "sgd_momentum" if optimizer.momentum else "sgd"
    if optimizer.kind == "adamw":
        return "adamw"
    if optimizer.kind == "paged_adamw":
        return "paged_adamw"
    raise Unpredictable(f"{optimizer.kind}: the step of lit-gpt is traced for adamw, paged_adamw and sgd only")


def _weights(model: nn.Module, frozen: list[nn.Parameter]) -> int:
    """Frozen numbers; a packed matrix counts as the matrix it stands for."""
    packed = [layer for layer in model.modules() if isinstance(layer, PackedLinear)]
    return sum(parameter.numel() for parameter in frozen) + sum(layer.weight.numel() for layer in packed)
