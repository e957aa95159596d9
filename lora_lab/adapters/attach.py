"""Puts a trial's method on a base model: an adapter through PEFT, or weights of its own to train, or nothing.

PEFT decides where an adapter's weights are computed and in which precision: float32 on a bf16 or quantized base,
float64 on a float64 base. What each adapter is stands in `adapters.configs`, what each does to the model's own weights
in `adapters.base_weights` and `adapters.lisa`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lora_lab.adapters.adalora import BudgetSchedule, freeze_rank_numbers
from lora_lab.adapters.auxiliary import auxiliary_of
from lora_lab.adapters.base_weights import train_only
from lora_lab.adapters.configs import Surroundings, adapter_config
from lora_lab.adapters.course import Auxiliary, Course
from lora_lab.adapters.decomposed import start_from_weights
from lora_lab.adapters.dropout import DropoutClock, SeededDropout
from lora_lab.adapters.lisa import Lisa
from lora_lab.adapters.lora import check_magnitudes
from lora_lab.adapters.prompts import start_prompt
from lora_lab.adapters.routing import RoutingTotals
from lora_lab.errors import InputError, Problem
from lora_lab.schema.method import PROMPT_KINDS
from lora_lab.schema.trial import Trial
from lora_lab.schema.weight_methods import Freeze
from lora_lab.schema.weight_methods import Lisa as LisaMethod

_DECOMPOSED = ("pissa", "olora")


@dataclass(frozen=True, slots=True)
class Attached:
    """model: a PeftModel, or the base itself where its own weights are trained or nothing is.

    trained: name and parameter of all that the method may change (of LISA all layers, not only those of the moment).
    dropout_clock: None where there is no dropout. auxiliary: losses beside the language model's. course: acts between
    steps. routing: totals of the routers, filled in training; None where there are none.
    """

    model: Any
    trained: tuple[tuple[str, nn.Parameter], ...] = ()
    dropout_clock: DropoutClock | None = None
    auxiliary: Auxiliary | None = None
    course: Course | None = None
    routing: RoutingTotals | None = None

    def changed_after(self, steps: int) -> list[str]:
        """Names of the parameters that training of this many steps may have changed."""
        course: Any = self.course
        return course.ever_trained(steps) if isinstance(course, Lisa) else [name for name, _ in self.trained]


class ParameterCounts(NamedTuple):
    """trainable: receives gradients; total: base and adapters, a shared tensor once."""

    trainable: int
    total: int


def count_parameters(model: nn.Module) -> ParameterCounts:
    """Counts logical elements: a 4-bit weight counts as the matrix it stands for, not as its packed bytes."""
    parameters = list(model.parameters())
    return ParameterCounts(
        trainable=sum(_elements(parameter) for parameter in parameters if parameter.requires_grad),
        total=sum(_elements(parameter) for parameter in parameters),
    )


def _elements(parameter: nn.Parameter) -> int:
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(state.shape.numel())


def attach(
    base_model: Any,
    trial: Trial,
    *,
    name: str = "default",
    tokenizer: Any | None = None,
    steps: int | None = None,
    probabilities: Sequence[float] | None = None,
    has_values: bool = True,
) -> Attached:
    """Makes `base_model` ready to train by `trial.method`.

    Initial weights follow from `trial.seeds.init` alone, global random state is left as it was. A model that carries
    adapters already (a PeftModel) gets one more under `name`, not yet active.
    `trial.dropout` acts on the inputs of linear layers; an adapter on an embedding has none, as in PEFT.
    tokenizer, steps: see `Surroundings`. probabilities: of LISA's layers, where they come from logs of other runs.
    has_values: False for a model of shapes alone, whose weights cannot be looked at.

    Raises:
        InputError: the method does not fit the model, the base is quantized and its own weights are to be trained, or
            DoRA meets an output whose weights are all zero (it divides by their norm).
    """
    if not trial.method.has_adapter:
        return _attach_to_weights(base_model, trial, probabilities)
    inner = base_model.get_base_model() if isinstance(base_model, PeftModel) else base_model
    config = adapter_config(inner, trial, Surroundings(tokenizer, steps))
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.default_generator.manual_seed(trial.seeds.init)
        if isinstance(base_model, PeftModel):
            base_model.add_adapter(name, config)
            model = base_model
        else:
            model = get_peft_model(base_model, config, adapter_name=name)
        if trial.method.kind in _DECOMPOSED:
            start_from_weights(model, name, config, kind=trial.method.kind)
        if trial.method.kind in PROMPT_KINDS:
            start_prompt(model, name, text=getattr(trial.method, "init_text", None), tokenizer=tokenizer)
    if trial.method.kind == "dora" and has_values:
        check_magnitudes(model, name)
    if trial.method.kind == "adalora":
        freeze_rank_numbers(model, name)
    clock = DropoutClock(seed=trial.seeds.dropout, step=0, micro_batch=0) if _has_dropout(trial) else None
    if clock is not None:
        _seed_dropouts(model, name=name, p=trial.dropout, clock=clock)
    auxiliary, routing = auxiliary_of(model, trial, name)
    return Attached(
        model,
        trained=_trainable(model),
        dropout_clock=clock,
        auxiliary=auxiliary,
        course=BudgetSchedule(model, name) if trial.method.kind == "adalora" else None,
        routing=routing,
    )


def _has_dropout(trial: Trial) -> bool:
    return trial.dropout > 0 and "dropout" in trial.method.uses


def _trainable(model: nn.Module) -> tuple[tuple[str, nn.Parameter], ...]:
    return tuple((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def _attach_to_weights(base_model: Any, trial: Trial, probabilities: Sequence[float] | None) -> Attached:
    method = trial.method
    if method.trains == "weights" and getattr(base_model, "is_quantized", False):
        rule = f"{method.kind} cannot train quantized weights; use an adapter such as method=lora"
        raise InputError(Problem("method", rule))
    base_model.requires_grad_(method.trains == "weights")
    if isinstance(method, Freeze):
        train_only(base_model, method.last_layers, method.modules)
    trained = _trainable(base_model)
    return Attached(base_model, trained=trained, course=_lisa(base_model, trial, probabilities))


def _lisa(model: Any, trial: Trial, probabilities: Sequence[float] | None) -> Course | None:
    method = trial.method
    if not isinstance(method, LisaMethod):
        return None
    if method.probabilities == "from_norm_log" and probabilities is None:
        raise ValueError("lisa with probabilities=from_norm_log needs the probabilities")
    given = method.weights if method.probabilities == "list" else probabilities
    return Lisa(model, layers=method.layers, interval=method.interval, seed=trial.seeds.layers, probabilities=given)


def _seed_dropouts(model: Any, *, name: str, p: float, clock: DropoutClock) -> None:
    for index, entry in enumerate(_dropouts(model, name)):
        entry[name] = SeededDropout(p, clock=clock, index=index)
        entry[name].train(model.training)


def _dropouts(model: Any, name: str) -> Iterator[nn.ModuleDict]:
    """Of PEFT's LoRA layers and of the lab's own the dropout of the adapter's input is called alike."""
    for module in model.modules():
        entry = getattr(module, "lora_dropout", None) if isinstance(module, BaseTunerLayer) else None
        if entry is not None and name in entry:
            yield entry
