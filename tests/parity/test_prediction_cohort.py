"""What equal runs take side by side on one base: its bytes once, and of each what it takes alone.

Runs that adapt different layers take more than that in one pass (10 to 17 % more was seen here), as a layer that one of
them adapts is computed part by part for all.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_lab.adapters.attach import attach
from lora_lab.adapters.cohort.trunk import Trunk
from lora_lab.memory.live_bytes import LiveBytes, model_tensors
from lora_lab.models.load import load_base
from lora_lab.models.shared_copy import shared_copy
from lora_lab.optim.optimizers import state_tensors
from lora_lab.plan.prediction import LongestRows
from lora_lab.predict.predictor import predict
from lora_lab.predict.traced_step import stand_ins
from lora_lab.train.checkpointing import enable_checkpointing
from lora_lab.train.forward import Together
from lora_lab.train.loop import clip, gather
from lora_lab.train.member import Member, member_of
from tests.conftest import MakeTrial
from tests.stepping import CPU
from tests.tiers import mostly_slow

pytestmark = pytest.mark.usefixtures("one_core")

ROWS = LongestRows((40, 33, 26, 19), (20, 16, 13, 9), "made up")
SIZE = (
    *("model=tiny_random", "model.shape.num_layers=6", "model.shape.hidden_size=128", "model.shape.mlp_size=256"),
    *("training.batch_size=4", "training.micro_batch_size=4"),
)


OWN = (
    ("rank=8",),
    ("rank=32", "target=all_linear"),
    ("method=dora",),
    ("method=ia3", "target=ia3"),
    ("method=molora",),
)
OF_ALL: tuple[tuple[str, ...], ...] = ((), ("training.gradient_checkpointing=every_layer",), ("quantization=nf4",))


@pytest.mark.parametrize(
    "lines",
    mostly_slow(
        [(*own, *of_all) for own in OWN for of_all in OF_ALL],
        keep=[OWN[0], (*OWN[3], *OF_ALL[1]), (*OWN[2], *OF_ALL[2])],
    ),
    ids=" ".join,
)
def test_a_cohort_takes_its_base_once_and_its_members_each(
    make_trial: MakeTrial, tmp_path_factory: pytest.TempPathFactory, lines: tuple[str, ...]
) -> None:
    trials = [make_trial(*SIZE, *lines, f"seed={seed}") for seed in range(3)]
    predicted = [predict(trial, ROWS, device_kind="cpu") for trial in trials]
    first = trials[0]
    cache: Path = tmp_path_factory.getbasetemp() / "prediction"
    base = load_base(first.model, precision="fp32", quantization=first.quantization, device=CPU, cache=cache).model
    trunk = Trunk(base)
    enable_checkpointing(trunk.model, first.training.gradient_checkpointing)
    members: list[Member] = []
    tensors = model_tensors(base)
    for index, trial in enumerate(trials):
        attached = attach(shared_copy(base), trial)
        member = member_of(trial, attached, stand_ins(trial, ROWS), name=str(index))
        trunk.join(member.name, attached.model)
        members.append(member)
    forward = Together(trunk)
    for _ in range(2):  # the first step makes the states
        states = [state for member in members for state in state_tensors(member.optimizer)]
        there = [*tensors, *states, *(one for member in members for one in member.parameters)]
        with LiveBytes([("weights", there)]) as counter:
            gather(forward, members)
            for member in members:
                clip(member)
                member.optimizer.step()
        for member in members:
            member.open_step = None
            member.optimizer.zero_grad(set_to_none=True)
    together = predicted[0].base_bytes + sum(one.own_bytes for one in predicted)
    assert counter.peak_bytes == pytest.approx(together, rel=0.02)
    assert counter.peak_bytes < sum(one.peak_allocated_bytes for one in predicted)
