"""LISA: layerwise importance sampled AdamW (Pan et al. 2024, arXiv 2403.17919).

Embedding, head and final norm are always trained; of the N_L middle layers a set is drawn every K steps and the rest is
frozen. `uniform` draws exactly gamma layers, each as likely, as the paper's experiments and its released code do; with
probabilities each layer is in the set by itself with its own p.

Differences from the released code (LMFlow): a draw is a function of the trial's seed and the number of the period, so a
resumed run draws the same; and a layer that leaves the set gives its gradients and its optimizer state back, which is
what the memory claim needs. A layer that is drawn again at once keeps them. (bitsandbytes never frees the managed
memory of a paged state: on CUDA, with a paged optimizer, what is released can be paged out but is not freed.)
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import nn

from lora_lab.adapters.base_weights import placed_weights
from lora_lab.adapters.course import CourseState
from lora_lab.errors import InputError, Problem


class Lisa:
    """Which layers are trained, step by step; see `Course`. The first period's layers are set at construction."""

    def __init__(
        self, model: Any, *, layers: int, interval: int, seed: int, probabilities: Sequence[float] | None = None
    ) -> None:
        """layers: gamma, for draws without probabilities (one per layer). interval: K, in optimizer steps.

        Raises:
            InputError: more layers, or another number of probabilities, than the model has.
        """
        self._placed = placed_weights(model)
        depth = len(self._placed.layers)
        if layers > depth:
            raise InputError(Problem("method.layers", f"must be <= {depth}, the model's layers, got {layers}"))
        if probabilities is not None and len(probabilities) != depth:
            rule = f"expected a probability for each of the {depth} layers, got {len(probabilities)}"
            raise InputError(Problem("method.weights", rule))
        self._gamma, self._interval, self._seed, self._probabilities = layers, interval, seed, probabilities
        self._homes: list[list[nn.Parameter]] | None = None
        self._period: int | None = None
        self._set_trained(frozenset(self.drawn(0)))

    def drawn(self, period: int) -> tuple[int, ...]:
        """The layers that are trained in a period (from 0), ascending: a pure function of the seed."""
        digest = hashlib.sha256(f"lisa {self._seed} {period}".encode()).digest()
        generator = random.Random(int.from_bytes(digest[:8], "big"))
        depth = len(self._placed.layers)
        if self._probabilities is None:
            return tuple(sorted(generator.sample(range(depth), self._gamma)))
        return tuple(layer for layer in range(depth) if generator.random() < self._probabilities[layer])

    def draw_below(self, top: int) -> None:
        """Takes gamma layers below layer `top` (those up to the head, if that is the number of layers) for drawn."""
        self._set_trained(frozenset(range(max(0, top - self._gamma), top)))

    def before_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """At the first step of a period, or where a training is taken up: its layers are trained, others released.

        The optimizer's groups stay, since schedules count them; only what is in them changes. It is the same optimizer
        at every call, and at the first one it holds all parameters.
        """
        period = step // self._interval
        if period == self._period:
            return
        self._period = period
        if self._homes is None:
            self._homes = [list(group["params"]) for group in optimizer.param_groups]
        self._set_trained(frozenset(self.drawn(period)))
        for group, home in zip(optimizer.param_groups, self._homes, strict=True):
            group["params"] = [parameter for parameter in home if parameter.requires_grad]
            for parameter in home:
                if not parameter.requires_grad:
                    _release(parameter, optimizer)

    def after_step(self, step: int) -> None:
        """Nothing."""

    def state(self, step: int) -> CourseState:
        """The layers of the period of the last step: to know this course by, since draws need no state."""
        return CourseState({}, {"layers": list(self.drawn(self._last_period(step)))})

    def misfits(self, step: int, state: CourseState) -> list[str]:
        """Other layers than this course has drawn."""
        own = list(self.drawn(self._last_period(step)))
        found = state.values.get("layers")
        return [] if found == own else [f"LISA trained the layers {found} at step {step}, this trial draws {own}"]

    def take_up(self, step: int, state: CourseState, optimizer: torch.optim.Optimizer) -> None:
        """The layers of the last step, in the optimizer's groups too; those of the next one are drawn as ever."""
        if step:
            self.before_step(step - 1, optimizer)

    def _last_period(self, step: int) -> int:
        return max(0, step - 1) // self._interval

    def ever_trained(self, steps: int) -> list[str]:
        """Names of the parameters that a training of this many steps may have changed."""
        periods = range(-(-steps // self._interval))
        layers = sorted({layer for period in periods for layer in self.drawn(period)})
        inside = [name for layer in layers for name, _ in self._placed.layers[layer]]
        return [*(name for name, _ in self._placed.outside), *inside]

    def _set_trained(self, layers: frozenset[int]) -> None:
        for parameter in self._outside():
            parameter.requires_grad_(True)
        for index, layer in enumerate(self._placed.layers):
            for _, parameter in layer:
                parameter.requires_grad_(index in layers)
                if index not in layers:
                    parameter.grad = None

    def _outside(self) -> Iterator[nn.Parameter]:
        return (parameter for _, parameter in self._placed.outside)


def _release(parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    """Lets go of a parameter's state; bitsandbytes keeps a list of the paged ones (on CUDA) beside it."""
    released = optimizer.state.pop(parameter, {})
    manager: Any = getattr(optimizer, "page_mng", None)
    if manager is not None:
        gone = {id(value) for value in released.values()}
        manager.paged_tensors = [tensor for tensor in manager.paged_tensors if id(tensor) not in gone]


def importance_probabilities(
    full: Sequence[Mapping[str, float]], lora: Sequence[Mapping[str, float]], *, expected: float
) -> list[float]:
    """The paper's p (section 3.2): LoRA's mean norm of a layer over full fine-tuning's, so that sampling imitates LoRA.

    full, lora: norms of the layers ("0", "1", ...) at each observation of a training of either kind; the lab gives
    those of the updates. expected: the number of trained layers to expect, gamma.

    The paper derives p_l = LoRA's w_l / full w_l from the means over steps of a layer's norm, so that a layer's
    expected rate is LoRA's, and uses it for none of its results: there all middle layers have p = gamma / N_L, or
    exactly gamma are drawn. What is here is the derivation carried out, with choices of our own. The paper calls w the
    norm of the layer's weights; of a model with its base those hardly differ between the two trainings, so the change
    is compared. And a ratio may exceed 1 and says nothing of how many layers fit the memory, so the ratios are scaled
    until their sum is `expected`; none exceeds 1, and what is cut off there goes to the others in proportion (to none
    whose ratio is 0).

    Raises:
        InputError: an observation lacks a layer, or full fine-tuning did not move one.
    """
    layers = sorted({key for line in [*full, *lora] for key in line if key.isdigit()}, key=int)
    nothing = [float("nan")] * len(layers)
    means = [
        [fmean(line.get(key, float("nan")) for line in log) for key in layers] if log else nothing
        for log in (full, lora)
    ]
    ratios = [one / other if other else float("nan") for other, one in zip(*means, strict=True)]
    if not layers or any(not ratio >= 0 for ratio in ratios):
        raise InputError(Problem("method.norm_log", "both runs must have observed the update of every layer, none 0"))
    if expected >= len(ratios):
        return [1.0] * len(ratios)
    return _scaled(ratios, expected)


def _scaled(ratios: Sequence[float], expected: float) -> list[float]:
    capped: set[int] = set()
    while True:
        rest = sum(ratio for index, ratio in enumerate(ratios) if index not in capped)
        scale = (expected - len(capped)) / rest if rest else 0.0
        over = {index for index, ratio in enumerate(ratios) if index not in capped and scale * ratio > 1}
        if not over:
            return [1.0 if index in capped else scale * ratio for index, ratio in enumerate(ratios)]
        capped |= over
