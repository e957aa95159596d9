"""A training that goes on from its checkpoint equals the undisturbed one bit for bit.

Every method, every optimizer, every place to stop where something happens there: all is built anew, as by another
process, and the rest of the steps is taken. Dropout is on, a step is four micro-batches (the last of an epoch fewer),
the rate warms up and falls along a cosine. The undisturbed training is the reference; nothing may differ but times.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_lab.adapters.attach import Attached
from lora_lab.memory.live_bytes import storage_bytes
from lora_lab.optim.optimizers import build_schedule, state_tensors
from lora_lab.schema.trial import Trial
from lora_lab.train.loop import train
from lora_lab.train.member import Member, StepRecord, member_of
from lora_lab.train.saved_state import load_state, save_state
from tests.conftest import CHECKOUT, MakeTrial
from tests.contract.test_every_method import CPU, ROWS, attached_to, load, rows, trial_of
from tests.tiers import mostly_slow

pytestmark = pytest.mark.usefixtures("one_core")

STEPS = 6
# 24 rows in batches of 10: an epoch's third step has 4 rows, in two micro-batches.
SETTING = (
    "training.batch_size=10",
    "training.micro_batch_size=2",
    "training.bucket_batches=2",
    "scheduler=cosine",
    "scheduler.warmup_steps=2",
)
OPTIMIZERS: dict[str, tuple[str, ...]] = {
    "adamw": ("optimizer=adamw", "optimizer.weight_decay=0.1"),
    "sgd": ("optimizer=sgd", "optimizer.momentum=0"),
    "momentum": ("optimizer=sgd", "optimizer.momentum=0.9", "optimizer.nesterov=true"),
    "adamw8bit": ("optimizer=adamw8bit",),
    "paged_adamw": ("optimizer=paged_adamw",),
    "paged_adamw8bit": ("optimizer=paged_adamw8bit",),
    "lion": ("optimizer=lion",),
    "sophia": ("optimizer=sophia", "optimizer.estimate_interval=2"),
}
Begun = tuple[Attached, Member]


def begun(trial: Trial, cache: Path, change: Callable[[Member], None]) -> Begun:
    """A base, a method on it and a member that has not taken a step, as the runner builds them."""
    attached = attached_to(trial, load(trial, cache))
    member = member_of(trial, attached, rows(), name="test")
    change(member)
    return attached, member


def go_on(pair: Begun, *, until: int = STEPS) -> None:
    """Trains to the end of a step, as a process does that is killed after it."""
    attached, member = pair
    total, member.total_steps = member.total_steps, until
    train(attached.model, [member], pad_id=256, device=CPU, on_step=lambda *_: None)
    member.total_steps = total
    assert member.diverged is None and member.step == until


def compare(
    trial: Trial,
    cache: Path,
    folder: Path,
    *,
    stops: tuple[int, ...],
    change: Callable[[Member], None] = lambda member: None,
) -> Member:
    """The undisturbed training against one that is stopped after each of `stops`, saved, and built anew.

    The stopped one is kept and goes on beside the one built anew: they agree after each step, not only at the end.
    """
    undisturbed = begun(trial, cache, change)
    go_on(undisturbed)
    resumed = begun(trial, cache, change)
    go_on(resumed, until=stops[0])
    for stop, end in itertools.pairwise((*stops, STEPS)):
        save_state(resumed[1], resumed[0], folder)
        torch.manual_seed(stop)  # global random state is none of the training's
        stopped, resumed = resumed, begun(trial, cache, change)
        load_state(resumed[1], resumed[0], folder)
        assert_same(stopped, resumed)
        for step in range(stop + 1, end + 1):
            go_on(stopped, until=step)
            go_on(resumed, until=step)
            assert_same(stopped, resumed)
    assert_same(undisturbed, resumed)
    return undisturbed[1]


def assert_same(one: Begun, other: Begun) -> None:
    """All that a training leaves behind, or goes on with."""
    (attached, member), (resumed, again) = one, other
    assert without_times(member.records) == without_times(again.records)
    pairs = zip(attached.model.named_parameters(), resumed.model.named_parameters(), strict=True)
    assert [name for (name, one), (_, two) in pairs if not torch.equal(one, two)] == []
    assert_same_states(member.optimizer, again.optimizer)
    assert member.schedule.state_dict() == again.schedule.state_dict()
    assert [p.requires_grad for p in member.parameters] == [p.requires_grad for p in again.parameters]
    if attached.routing is not None:
        assert resumed.routing is not None
        assert attached.routing.statistics() == resumed.routing.statistics()
    if member.course is not None:
        assert again.course is not None
        state, same = member.course.state(member.step), again.course.state(again.step)
        assert state.values == same.values
        assert {name: described(one) for name, one in state.tensors.items()} == {
            name: described(one) for name, one in same.tensors.items()
        }


def without_times(records: list[StepRecord]) -> list[StepRecord]:
    return [dataclasses.replace(record, seconds=0.0) for record in records]


def assert_same_states(one: torch.optim.Optimizer, other: torch.optim.Optimizer) -> None:
    for group, twin in zip(one.param_groups, other.param_groups, strict=True):
        assert settings(group) == settings(twin)
        for parameter, copy in zip(group["params"], twin["params"], strict=True):
            state, same = one.state.get(parameter, {}), other.state.get(copy, {})
            assert {key: described(value) for key, value in state.items()} == {
                key: described(value) for key, value in same.items()
            }
    assert storage_bytes(state_tensors(one)) == storage_bytes(state_tensors(other)), "code books are still shared"


def settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def described(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.dtype, value.device, tuple(value.shape), value.tolist()
    return type(value), value


@pytest.mark.parametrize("method", ROWS)
def test_every_method(make_trial: MakeTrial, shared: Path, tmp_path: Path, method: str) -> None:
    dropout = ["dropout=0.1"] if "dropout" in make_trial(f"method={method}").method.uses else []
    trial = trial_of(make_trial, method, "llama", *SETTING, *dropout)
    compare(trial, shared, tmp_path / "checkpoint", stops=(2, 3))


# GaLore refuses Sophia, whose estimate is of the whole weight.
PAIRS = [(method, optimizer) for method in ("lora_plus", "lisa", "galore") for optimizer in OPTIMIZERS]
PAIRS.remove(("galore", "sophia"))


KEPT = [pair for pair in PAIRS if pair[0] == "lora_plus"] + [("lisa", "adamw8bit"), ("galore", "momentum")]


@pytest.mark.parametrize("pair", mostly_slow(PAIRS, keep=KEPT), ids="-".join)
def test_every_optimizer(make_trial: MakeTrial, shared: Path, tmp_path: Path, pair: tuple[str, str]) -> None:
    """Two groups of rates; groups that change; an optimizer in another. LISA's embeddings have states of 8 bits."""
    method, optimizer = pair
    trial = trial_of(make_trial, method, "llama", *SETTING, *OPTIMIZERS[optimizer])
    member = compare(trial, shared, tmp_path / "checkpoint", stops=(3,))
    if method == "lisa" and "8bit" in optimizer:
        assert any(tensor.dtype == torch.uint8 for tensor in state_tensors(member.optimizer))


WHEREVER = {
    "adalora": ("dropout=0.1",),
    "galore": ("method.update_gap=3", "optimizer=adamw8bit"),
    "lisa": ("method.interval=2", "optimizer=sophia", "optimizer.estimate_interval=2"),
    "loramoe": (
        "dropout=0.1",
        "method.balance=variance_over_mean",
        "optimizer=sophia",
        "optimizer.estimate_interval=3",
    ),
}


PLACES = [(method, stop) for method in WHEREVER for stop in range(STEPS + 1)]


@pytest.mark.parametrize(
    "place",
    mostly_slow(PLACES, keep=[("adalora", 2), ("galore", 3), ("lisa", 2), ("lisa", 0), ("loramoe", STEPS)]),
    ids=lambda place: f"{place[0]}-{place[1]}",
)
def test_wherever_it_stops(make_trial: MakeTrial, shared: Path, tmp_path: Path, place: tuple[str, int]) -> None:
    """In and between phases (budgets, bases, sets of layers, estimates), before the first step and after the last."""
    method, stop = place
    trial = trial_of(make_trial, method, "llama", *SETTING, *WHEREVER[method])
    compare(trial, shared, tmp_path / "checkpoint", stops=(stop,))


KINDS_OF_BASE = {
    "nf4": ("lora", "llama", ("quantization=nf4",)),
    "int8": ("ia3", "llama", ("quantization=int8",)),
    "bf16 adapter": ("dora", "llama", ("training.precision=bf16",)),
    "bf16 weights, 8 bits": ("full", "llama", ("training.precision=bf16", "optimizer=adamw8bit")),
    "bf16 weights, sophia": ("full", "llama", ("training.precision=bf16", "optimizer=sophia")),
    "fp64": ("lora", "llama", ("training.precision=fp64", "dropout=0.1")),
    "gpt2": ("lora", "gpt2", ("dropout=0.1",)),
    "tied": ("lisa", "llama tied", ()),
    "rates by layer": ("lora_plus", "llama", ("training.layer_rates=[0.5,2]",)),
    "wsd": ("lora", "llama", ("scheduler=wsd",)),
}


@pytest.mark.parametrize("kind", KINDS_OF_BASE)
def test_every_kind_of_base(make_trial: MakeTrial, shared: Path, tmp_path: Path, kind: str) -> None:
    method, family, more = KINDS_OF_BASE[kind]
    setting = [line for line in SETTING if not (kind == "wsd" and line.startswith("scheduler"))]
    trial = trial_of(make_trial, method, family, *setting, *more)
    compare(trial, shared, tmp_path / "checkpoint", stops=(1, 4))


@pytest.mark.parametrize("how", [{"fused": True}, {"foreach": True}, {"capturable": False, "amsgrad": True}])
def test_other_ways_to_take_the_step(make_trial: MakeTrial, shared: Path, tmp_path: Path, how: dict[str, bool]) -> None:
    """Fused and foreach steps have states of their own making."""

    def change(member: Member) -> None:
        function = member.schedule.lr_lambdas[0]
        member.optimizer = torch.optim.AdamW(member.parameters, lr=0.01, **how)  # type: ignore[arg-type]
        member.schedule = build_schedule(member.optimizer, function)

    trial = trial_of(make_trial, "lora", "llama", *SETTING, "dropout=0.1")
    compare(trial, shared, tmp_path / "checkpoint", stops=(3,), change=change)


# What another process is told: where the trials, the cache of models and the checkpoints are.
_OTHER_PROCESS = """
import json, sys
from pathlib import Path
import torch
from lora_lab.schema.trial import read_trial
from lora_lab.train.saved_state import load_state
from tests.parity.test_resume import begun, digest, go_on
torch.set_num_threads(1)
folder, cache = Path(sys.argv[1]), Path(sys.argv[2])
found = {}
for method, mapping in json.loads((folder / "trials.json").read_text()).items():
    pair = begun(read_trial(mapping), cache, lambda member: None)
    load_state(pair[1], pair[0], folder / method)
    go_on(pair)
    found[method] = digest(pair)
print(json.dumps(found))
"""


def digest(pair: Begun) -> str:
    """Of all weights and of the records without their times."""
    attached, member = pair
    found = hashlib.sha256(repr(without_times(member.records)).encode())
    for name, parameter in attached.model.named_parameters():
        found.update(name.encode() + parameter.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@pytest.mark.slow
def test_another_process_goes_on(make_trial: MakeTrial, shared: Path, tmp_path: Path) -> None:
    """With another order of sets and another address for everything."""
    trials = {method: trial_of(make_trial, method, "llama", *SETTING) for method in ROWS}
    mappings = {method: trial.model_dump(mode="json") for method, trial in trials.items()}
    (tmp_path / "trials.json").write_text(json.dumps(mappings))
    expected = {}
    for method, trial in trials.items():
        pair = begun(trial, shared, lambda member: None)
        go_on(pair, until=3)
        save_state(pair[1], pair[0], tmp_path / method)
        go_on(pair)
        expected[method] = digest(pair)
    other = subprocess.run(
        [sys.executable, "-c", _OTHER_PROCESS, str(tmp_path), str(shared)],
        cwd=CHECKOUT,
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert other.returncode == 0, other.stderr
    assert json.loads(other.stdout.splitlines()[-1]) == expected
