"""AdaLoRA (Zhang et al. 2023, arXiv 2303.10512) by PEFT: y = W x + s P diag(E) Q x, entries of E pruned by importance.

The budget (the sum of ranks) falls from the initial rank to `rank` per matrix along a cubic curve (equation 12); which
entries go is decided by smoothed sensitivity x uncertainty (equations 8 to 10). s is alpha / initial_rank, as in PEFT.

Where PEFT prunes every entry whose score is at or below a threshold, so that ties take the budget below its target (at
the first steps all scores are 0), here exactly as many entries as the budget stay; ties are decided by order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft import AdaLoraConfig
from peft.tuners.adalora.layer import RankAllocator
from torch import Tensor

from lora_lab.adapters.course import CourseState
from lora_lab.adapters.lora import is_transposed, named_base
from lora_lab.adapters.select import find_targets
from lora_lab.plan.steps import budget_phases
from lora_lab.schema.adapter_methods import AdaLora
from lora_lab.schema.trial import Trial


def adalora_config(base_model: Any, trial: Trial, *, steps: int) -> AdaLoraConfig:
    """PEFT's configuration; `steps` is the length of the training, from which the phases follow.

    Raises:
        InputError: the target does not fit the model, or the phases leave no step in which the budget could shrink.
    """
    method = trial.method
    assert isinstance(method, AdaLora)
    initial, final = budget_phases(method, steps)
    targets = find_targets(base_model, trial.target, kind="adalora")
    return AdaLoraConfig(
        **named_base(base_model, trial),
        target_r=trial.rank,
        init_r=method.start(trial.rank),
        tinit=initial,
        tfinal=final,
        deltaT=method.interval,
        beta1=method.importance_betas[0],
        beta2=method.importance_betas[1],
        orth_reg_weight=method.orthogonality_weight,
        total_step=steps,
        lora_alpha=trial.alpha,
        lora_dropout=trial.dropout,
        target_modules=targets,
        bias="none",
        fan_in_fan_out=is_transposed(base_model, targets[0]),
    )


def freeze_rank_numbers(model: Any, name: str) -> None:
    """PEFT keeps the rank of each matrix as a parameter, and sets it trainable where it casts a bf16 base's adapter."""
    for key, parameter in model.named_parameters():
        if key.endswith(f"ranknum.{name}"):
            parameter.requires_grad_(False)


class BudgetSchedule:
    """Prunes after each step; see `Course`. Finished steps are counted from 1, as PEFT's schedule expects."""

    def __init__(self, model: Any, name: str) -> None:
        self._tuner = model.base_model
        self._tuner.rankallocator = _ExactAllocator(self._tuner.model, model.peft_config[name], name)

    def before_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Nothing."""

    def after_step(self, step: int) -> None:
        """Importance from the gradients of the step, and the budget of this moment."""
        self._tuner.update_and_allocate(step + 1)

    def state(self, step: int) -> CourseState:
        """Both moving averages of every entry's importance, and which entries of E stay; of old steps nothing else."""
        allocator = self._tuner.rankallocator
        averages = {"sensitivity": allocator.exp_avg_ipt, "uncertainty": allocator.exp_avg_unc}
        tensors = {f"{kind}/{name}": one for kind, found in averages.items() for name, one in found.items()}
        return CourseState(tensors, {"rank_pattern": allocator.peft_config.rank_pattern})

    def misfits(self, step: int, state: CourseState) -> list[str]:
        """Averages and patterns of other matrices than those of this adapter."""
        sizes = {name: parameter.shape for name, parameter in self._tuner.model.named_parameters()}
        found = [(key.partition("/")[2], tuple(tensor.shape)) for key, tensor in state.tensors.items()]
        pattern = state.values.get("rank_pattern") or {}
        found += [(name, (len(kept), 1)) for name, kept in pattern.items()]
        return [
            f"AdaLoRA's state of {name} is {size}, here it is {tuple(sizes.get(name, ()))}"
            for name, size in found
            if sizes.get(name) != size
        ]

    def take_up(self, step: int, state: CourseState, optimizer: torch.optim.Optimizer) -> None:
        """The averages as copies on their parameters' devices."""
        allocator = self._tuner.rankallocator
        parameters = dict(self._tuner.model.named_parameters())
        allocator.reset_ipt()
        averages = {"sensitivity": allocator.exp_avg_ipt, "uncertainty": allocator.exp_avg_unc}
        for key, tensor in state.tensors.items():
            kind, _, name = key.partition("/")
            averages[kind][name] = tensor.to(parameters[name].device, copy=True)
            # The sensitivity of one step: PEFT begins all three anew where it is missing.
            allocator.ipt[name] = torch.zeros_like(parameters[name])
        allocator.peft_config.rank_pattern = state.values["rank_pattern"]


class _ExactAllocator(RankAllocator):  # type: ignore[misc]  # PEFT is untyped
    def mask_to_budget(self, model: Any, budget: int) -> dict[str, list[bool]]:
        """Keeps the `budget` entries of E with the largest scores; name of E -> which of its entries stay."""
        parameters = dict(model.named_parameters())
        names = [name for name in parameters if f"lora_E.{self.adapter_name}" in name]
        scores = [self._triplet_scores(name) for name in names]
        flat = torch.cat(scores)
        kept = torch.zeros_like(flat, dtype=torch.bool)
        kept[torch.sort(flat, descending=True, stable=True).indices[:budget]] = True
        pattern = {}
        for name, mask in zip(names, torch.split(kept, [len(one) for one in scores]), strict=True):
            with torch.no_grad():
                parameters[name].masked_fill_(~mask[:, None], 0.0)
            pattern[name] = mask.tolist()
        return pattern

    def _triplet_scores(self, name: str) -> Tensor:
        """Equation 7: the score of a singular value, and the mean scores of its two vectors. [initial rank]"""
        vectors = self._element_score(name.replace("lora_E", "lora_A")).mean(dim=1)
        others = self._element_score(name.replace("lora_E", "lora_B")).mean(dim=0)
        total: Tensor = self._element_score(name).view(-1) + vectors + others
        return total


def orthogonality_loss(model: Any, name: str) -> Tensor:
    """Mean over all P and Q of ||P^T P - I||_F and ||Q Q^T - I||_F, as PEFT has it (equation 4 squares them)."""
    terms = [torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device)) for gram in _grams(model, name)]
    return torch.stack(terms).mean()


def _grams(model: Any, name: str) -> Iterator[Tensor]:
    for key, parameter in model.named_parameters():
        if key.endswith(f"lora_A.{name}"):
            yield parameter @ parameter.T
        elif key.endswith(f"lora_B.{name}"):
            yield parameter.T @ parameter
