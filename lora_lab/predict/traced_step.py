"""One training step of a trial on fake tensors: the code that trains, with a model that has no values.

`attach` puts the method on the base, `member_of` makes optimizer and batches, the runner's own choice of a forward pass
computes, `probe_step` counts. Token ids, positions and masks are real tensors, as what is looked up with them depends
on values; all that has the size of weights or activations is fake. Left out are bitsandbytes' update kernels: they work
in place.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lora_lab.adapters.attach import Attached, ParameterCounts, attach, count_parameters
from lora_lab.adapters.cohort.trunk import Trunk
from lora_lab.adapters.lisa import Lisa
from lora_lab.data.encode import Encoded
from lora_lab.memory.live_bytes import CUDA_BLOCK_BYTES, model_tensors, storage_bytes
from lora_lab.models.loss_token_logits import loss_token_logits
from lora_lab.models.ragged import why_rows_differ
from lora_lab.models.shared_copy import shared_copy
from lora_lab.optim.optimizers import PAGED_ELEMENTS, state_tensors
from lora_lab.plan.cohorts import why_not_fused
from lora_lab.plan.prediction import DeviceKind, LongestRows
from lora_lab.plan.timeline import Timeline
from lora_lab.predict.fake_model import fake_base, fake_mode, fakes_move_as_modules
from lora_lab.predict.styles.hf import LabelledForward
from lora_lab.schema.expert_methods import Loramoe
from lora_lab.schema.optimization import Constant
from lora_lab.schema.trial import Trial
from lora_lab.train.checkpointing import decoder_layers, enable_checkpointing
from lora_lab.train.forward import Alone, Forward, Together
from lora_lab.train.member import Member, member_of
from lora_lab.train.probe import probe_step

_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class TracedStep:
    """counts: of the model with its method. base_bytes: weights and constants of the bare base. paged_bytes: optimizer
    states that live in managed memory. rows: how rows of unequal length are handed to the model."""

    timeline: Timeline
    counts: ParameterCounts
    base_bytes: int
    paged_bytes: int
    rows: str


def traced_step(
    trial: Trial,
    rows: LongestRows,
    config: Any,
    *,
    device_kind: DeviceKind,
    labelled: bool = False,
    drawn_below: int | None = None,
) -> TracedStep:
    """A step of `trial` on its longest micro-batch. config: of its model, with any number of layers.

    labelled: the model is called with labels, as transformers' Trainer calls it. drawn_below: of LISA, the layers that
    are trained (`Lisa.draw_below`); None leaves it to the first period's draw.

    Raises:
        Unpredictable: the model cannot be built.
        InputError: the method does not fit the model.
    """
    mode = fake_mode()
    base = fake_base(trial, config, mode)
    block = CUDA_BLOCK_BYTES if device_kind == "cuda" else 1
    base_bytes = storage_bytes(model_tensors(base), block_bytes=block)
    with _on_fakes(mode):
        attached = attach(shared_copy(base), trial, tokenizer=_WordsOfNoMeaning(), steps=_STEPS, has_values=False)
    if drawn_below is not None and isinstance(attached.course, Lisa):
        attached.course.draw_below(drawn_below)
    member = _member(trial, attached, rows, mode, device_kind)
    attached.model.train()
    forwards = (_labelled if labelled else _forward)(trial, base, attached, member, longest=max(rows.lengths))
    with forwards as (forward, network, how), _LargeOnesFake(mode):
        step = probe_step(forward, attached.model, member, layers=decoder_layers(network), block_bytes=block)
    paged = [state for state in state_tensors(member.optimizer) if getattr(state, "is_paged", False)]
    return TracedStep(
        step.timeline, count_parameters(attached.model), base_bytes, storage_bytes(paged, block_bytes=block), how
    )


# Of the schedules that depend on it (AdaLoRA's budget) nothing is in a step's memory but that training has not ended.
_STEPS = 1000


class _WordsOfNoMeaning:
    """A tokenizer for prompts that start from a text: any ids do."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [0] * max(1, len(text.split()))}


@contextlib.contextmanager
def _on_fakes(mode: FakeTensorMode) -> Iterator[None]:
    """Within the block new tensors are fake, and modules may move."""
    with fakes_move_as_modules(), warnings.catch_warnings(), mode:
        warnings.simplefilter("ignore")
        yield


def stand_ins(trial: Trial, rows: LongestRows) -> list[Encoded]:
    """Examples of the lengths of `rows`; their ids mean nothing."""
    kind = trial.method.groups[0] if isinstance(trial.method, Loramoe) else None
    return [
        Encoded((0,) * length, tuple(place >= length - counted for place in range(length)), cut=False, type=kind)
        for length, counted in zip(rows.lengths, rows.loss_tokens, strict=True)
    ]


def _member(
    trial: Trial, attached: Attached, rows: LongestRows, mode: FakeTensorMode, device_kind: DeviceKind
) -> Member:
    examples = stand_ins(trial, rows)
    # Neither schedule nor number of steps is in a step's memory, and both may ask for more rows than are given here.
    plain = trial.model_copy(
        update={
            "scheduler": Constant(kind="constant", warmup_steps=0, warmup_ratio=None),
            "training": trial.training.model_copy(update={"epochs": None, "max_steps": _STEPS}),
        }
    )
    member = member_of(plain, attached, examples, name="traced")
    build = member.build_optimizer

    def build_on_fakes() -> torch.optim.Optimizer:
        member.optimizer = build()
        _without_values(member.optimizer, mode, device_kind)
        return member.optimizer

    member.build_optimizer = build_on_fakes
    return member


class _LargeOnesFake(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's class is untyped
    """Within the block tensors that are made from nothing (identities, random numbers) are fake if they are large."""

    _FACTORIES = (
        torch.ops.aten.eye.default,
        torch.ops.aten.eye.m,
        torch.ops.aten.rand.default,
        torch.ops.aten.rand.generator,
        torch.ops.aten.empty.memory_format,
        torch.ops.aten.zeros.default,
        torch.ops.aten.ones.default,
        torch.ops.aten.full.default,
    )
    _LARGE_ELEMENTS = 100_000

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._mode = mode

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in self._FACTORIES and self._elements(func, args) >= self._LARGE_ELEMENTS:
            with self._mode:
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _elements(func: Callable[..., Any], args: tuple[Any, ...]) -> int:
        if isinstance(args[0], int):  # eye: rows, and columns where they are not as many
            return args[0] * (args[1] if len(args) > 1 else args[0])
        return math.prod(args[0])


def _without_values(optimizer: Any, mode: FakeTensorMode, device_kind: DeviceKind) -> None:
    """bitsandbytes makes its states on fake tensors, and updates nothing. On CUDA it pages large ones, where asked."""
    inner = getattr(optimizer, "inner", optimizer)
    if not hasattr(inner, "init_state"):
        return
    make, pages = inner.init_state, inner.is_paged and device_kind == "cuda"

    def init_state(group: Any, parameter: Tensor, *place: Any) -> None:
        with mode:
            make(group, parameter, *place)
        states = [state for state in inner.state[parameter].values() if isinstance(state, Tensor)]
        for state in states:
            state.is_paged = pages and state.numel() >= PAGED_ELEMENTS  # type: ignore[attr-defined]

    inner.init_state = init_state
    inner.update_step = lambda *_: None
    inner.is_paged = False  # there is nothing to fetch


@contextlib.contextmanager
def _forward(
    trial: Trial, base: Any, attached: Attached, member: Member, *, longest: int
) -> Iterator[tuple[Forward, Any, str]]:
    """How a run alone calls its model (see `runner.alone.forward_alone`), the network called, and how rows are laid."""
    why_padded = why_not_fused(trial) or why_rows_differ(base, longest=longest)
    checkpointing = trial.training.gradient_checkpointing
    if why_padded is None:
        trunk = Trunk(base)
        enable_checkpointing(trunk.model, checkpointing)
        trunk.join(member.name, attached.model)
        yield Together(trunk), trunk.model, "end to end"
        return
    model = attached.model
    enable_checkpointing(model, checkpointing)
    with loss_token_logits(model) as head:
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        yield Alone(head, pad_id=0, device=_CPU), inner, f"padded: {why_padded}"


@contextlib.contextmanager
def _labelled(
    trial: Trial, base: Any, attached: Attached, member: Member, *, longest: int
) -> Iterator[tuple[Forward, Any, str]]:
    model = attached.model
    enable_checkpointing(model, trial.training.gradient_checkpointing)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    yield LabelledForward(model, pad_id=0, device=_CPU), inner, "padded, as transformers is given them"
