"""Members trained together equal the same trained alone, whatever their company does: fp64 weights to 1e-10, fp32
losses to 1e-5. Every test run takes 12 steps on three bases; 50 steps, and the other bases, are slow.

Alone is the plain way, one model on padded rows (which other tests compare with transformers' Trainer); and a cohort of
one seat. Together is four seats and a queue: members come and go between passes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_lab.adapters.attach import Attached, attach
from lora_lab.adapters.cohort.trunk import Trunk
from lora_lab.data.encode import Encoded
from lora_lab.models.load import LoadedBase, load_base
from lora_lab.models.shared_copy import shared_copy
from lora_lab.plan.steps import steps_of
from lora_lab.schema.method import FUSED_KINDS
from lora_lab.schema.trial import Trial
from lora_lab.train.checkpointing import enable_checkpointing
from lora_lab.train.forward import Together
from lora_lab.train.loop import tick, train
from lora_lab.train.member import Member, member_of
from tests.conftest import MakeTrial
from tests.stepping import poison
from tests.tiers import SLOW

pytestmark = pytest.mark.usefixtures("one_core")

CPU = torch.device("cpu")
_STEPS = 50
_FEW_STEPS = 12
# How far losses and weights may be apart; in fp32 twenty steps of AdamW make 1e-5 of one rounding of a weight.
_BOUNDS: dict[str, Any] = {"fp64": {"losses": 1e-10, "weights": 1e-10}, "fp32": {"losses": 1e-5, "weights": None}}
_SEATS = 4


@dataclass(frozen=True)
class Row:
    """A member: its settings, how many rows it has, and whether NaN is put into its weights before it starts."""

    settings: tuple[str, ...] = ()
    rows: int = 24
    broken: bool = False


@dataclass
class Trained:
    """What became of members, by name: losses of their steps, weights, and why they diverged."""

    losses: dict[str, list[float]] = field(default_factory=dict)
    weights: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    diverged: dict[str, str | None] = field(default_factory=dict)

    def note(self, member: Member, attached: Attached) -> None:
        """A member that has ended."""
        self.losses[member.name] = [record.loss for record in member.records]
        self.weights[member.name] = {name: one.detach().clone() for name, one in attached.trained}
        self.diverged[member.name] = member.diverged


_EPOCHS = ("training.epochs=13", "training.max_steps=null")
MIXED = {
    "rank 1": Row(("rank=1",)),
    "rank 128": Row(("rank=128", "target=all_linear", "dropout=0.1", "learning_rate=0.001")),
    "sgd": Row(("rank=5", "optimizer=sgd", "optimizer.momentum=0.9", "learning_rate=0.05", "target=mlp")),
    "accumulates": Row(("training.batch_size=8", "training.micro_batch_size=2", "dropout=0.1", "alpha=r/2")),
    "row by row": Row(("training.micro_batch_size=1", "target=attention", "seed=3")),
    "short": Row(("training.max_steps=17", "scheduler=cosine", "scheduler.warmup_steps=3", "seed=1")),
    "one step": Row(("training.max_steps=1", "training.max_gradient_norm=null")),
    "three rows": Row((*_EPOCHS, "training.batch_size=2", "training.micro_batch_size=2"), rows=3),
    "NaN weights": Row(("rank=16", "target=all_linear"), broken=True),
    "absurd": Row(("optimizer=sgd", "learning_rate=1e300", "target=mlp")),
}
# What only an untied Llama has places for.
PARTS = {
    "head": Row(("target=head", "rank=2", "dropout=0.1")),
    "embedding": Row(("target=embedding", "rank=3")),
    "all": Row(("target=all_linear_head", "optimizer=sgd", "learning_rate=0.05")),
}
METHODS = {
    "lora": Row(("method.rank_factors=[0.5,2]", "dropout=0.1")),
    "rslora": Row(("method=rslora", "target=mlp")),
    "lora_plus": Row(("method=lora_plus", "target=all_linear", "learning_rate=0.0002")),
    "pissa": Row(("method=pissa", "rank=4")),
    "olora": Row(("method=olora", "rank=3", "target=mlp")),
    "dora": Row(("method=dora", "dropout=0.1", "target=all_linear")),
    "ia3": Row(("method=ia3", "learning_rate=0.02")),
    "molora": Row(("method=molora", "method.experts=3", "dropout=0.1", "target=all_linear")),
    "loramoe": Row(("method=loramoe", "method.experts=4", "data=skills_typed", "training.micro_batch_size=2")),
    "mola": Row(("method=mola", "method.experts=[2,3]", "target=mlp", "training.micro_batch_size=1")),
}
_WIDE = ("model.shape.hidden_size=128", "model.shape.head_dim=32")
_PRECISIONS = {"llama": ["fp64", "fp32"], "checkpointed": ["fp64"], "tied": ["fp64"], "gpt2": ["fp64"], "nf4": ["fp32"]}
_FUSED_TARGET = "target=attention"  # GPT-2 keeps query, key and value in one matrix
BASES = {
    "llama": _WIDE,
    "checkpointed": (*_WIDE, "training.gradient_checkpointing=every_layer"),
    "tied": (*_WIDE, "model.shape.tied_embeddings=true"),
    "gpt2": (*_WIDE, "model.shape.family=gpt2", "model.shape.num_kv_heads=4", _FUSED_TARGET),
    "nf4": (*_WIDE, "quantization=nf4"),
}


def rows_of(count: int, *, seed: int) -> list[Encoded]:
    """Rows of 3 to 26 random bytes, the last few of which carry the loss; of two types in turn."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(count):
        length = int(torch.randint(3, 27, (), generator=generator))
        ids = torch.randint(0, 256, (length,), generator=generator).tolist()
        mask = tuple(place >= max(1, length - 6) for place in range(length))
        made.append(Encoded(tuple(ids), mask, False, ("task", "knowledge")[index % 2]))
    return made


def trials_of(make_trial: MakeTrial, rows: Mapping[str, Row], *base: str, steps: int) -> dict[str, Trial]:
    """What a member says itself stands in for what the base says."""
    plain = [f"training.max_steps={steps}", "training.batch_size=4", "training.micro_batch_size=4", *base]
    trials = {}
    for name, row in rows.items():
        given = {override.partition("=")[0] for override in row.settings}
        trials[name] = make_trial(*(one for one in plain if one.partition("=")[0] not in given), *row.settings)
    return trials


class Bench:
    """One base, and members on copies of it, each as new."""

    def __init__(self, trials: Mapping[str, Trial], rows: Mapping[str, Row], cache: Path) -> None:
        self.trials, self.rows = trials, rows
        trial = next(iter(trials.values()))
        self.mode = trial.training.gradient_checkpointing
        self.base: LoadedBase = load_base(
            trial.model, precision=trial.training.precision, quantization=trial.quantization, device=CPU, cache=cache
        )

    def member(self, name: str) -> tuple[Member, Attached]:
        """The member of that name; its rows are its own."""
        trial, row = self.trials[name], self.rows[name]
        examples = rows_of(row.rows, seed=list(self.rows).index(name))
        steps = steps_of(trial, len(examples))
        assert steps is not None
        attached = attach(shared_copy(self.base.model), trial, tokenizer=self.base.tokenizer, steps=steps.steps)
        attached.model.train()
        if row.broken:
            attached.trained[-1][1].data.flatten()[-1] = float("nan")
        return member_of(trial, attached, examples, name=name), attached

    def alone(self, names: Sequence[str]) -> Trained:
        """Each on the plain path."""
        found = Trained()
        for name in names:
            member, attached = self.member(name)
            enable_checkpointing(attached.model, self.mode)
            train(attached.model, [member], pad_id=256, device=CPU, on_step=lambda *_: None)
            found.note(member, attached)
        return found

    def together(self, names: Sequence[str], *, seats: int) -> Trained:
        """So many at a time on one trunk; who ends leaves and the next of `names` takes the seat."""
        trunk, found, queue = Trunk(self.base.model), Trained(), deque(names)
        enable_checkpointing(trunk.model, self.mode)
        forward, seated = Together(trunk), dict[str, tuple[Member, Attached]]()
        while queue or seated:
            while queue and len(seated) < seats:
                name = queue.popleft()
                seated[name] = self.member(name)
                trunk.join(name, seated[name][1].model)
            tick(forward, [member for member, _ in seated.values()], on_step=lambda *_: None, timed=False)
            for name, (member, attached) in list(seated.items()):
                if not member.is_active:
                    trunk.leave(name)
                    found.note(member, attached)
                    del seated[name]
        return found


def assert_equal(one: Trained, other: Trained, *, losses: float, weights: float | None) -> None:
    """Losses and weights of every member within these bounds; NaN only where the other has it."""
    assert one.losses.keys() == other.losses.keys()
    for name in one.losses:
        assert len(one.losses[name]) == len(other.losses[name]), name
        for step, pair in enumerate(zip(one.losses[name], other.losses[name], strict=True), start=1):
            assert abs(pair[0] - pair[1]) <= losses * max(1.0, abs(pair[1]) / 10), (name, step, *pair)
        reasons = [None if why is None else why.partition(":")[0] for why in (one.diverged[name], other.diverged[name])]
        assert reasons[0] == reasons[1], name
        if weights is not None:
            for key, weight in one.weights[name].items():
                bound = weights * max(1.0, float(weight.nan_to_num().abs().max()))
                torch.testing.assert_close(weight, other.weights[name][key], rtol=0, atol=bound, equal_nan=True)


def _all_of(kind: str) -> dict[str, Row]:
    return MIXED | PARTS if kind in ("llama", "checkpointed") else MIXED


@pytest.mark.parametrize(
    ("kind", "steps"),
    [
        *(pytest.param(kind, _STEPS, id=kind, marks=SLOW) for kind in BASES),
        *(pytest.param(kind, _FEW_STEPS, id=f"{kind} in few steps") for kind in ("llama", "gpt2", "nf4")),
    ],
)
def test_mixed_settings(make_trial: MakeTrial, shared: Path, kind: str, steps: int) -> None:
    rows = _all_of(kind)
    for precision in _PRECISIONS[kind]:
        trials = trials_of(make_trial, rows, *BASES[kind], f"training.precision={precision}", steps=steps)
        bench = Bench(trials, rows, shared)
        together = bench.together(list(rows), seats=_SEATS)
        assert_equal(together, bench.alone(list(rows)), **_BOUNDS[precision])
        assert [name for name, why in together.diverged.items() if why] == ["NaN weights", "absurd"]
        assert len(together.losses["three rows"]) == 26 and len(together.losses["rank 128"]) == steps


@pytest.mark.parametrize(
    ("precision", "steps"),
    [
        ("fp64", _FEW_STEPS),
        pytest.param("fp64", _STEPS, marks=SLOW),
        pytest.param("fp32", _STEPS, marks=SLOW),
    ],
)
def test_every_method_that_is_fused(make_trial: MakeTrial, shared: Path, precision: str, steps: int) -> None:
    assert set(METHODS) == set(FUSED_KINDS)
    bench = Bench(trials_of(make_trial, METHODS, f"training.precision={precision}", steps=steps), METHODS, shared)
    together = bench.together(list(METHODS), seats=_SEATS)
    assert_equal(together, bench.alone(list(METHODS)), **_BOUNDS[precision])
    assert set(together.diverged.values()) == {None}


@pytest.mark.parametrize("steps", [_FEW_STEPS, pytest.param(_STEPS, marks=SLOW)])
def test_any_company_and_order(make_trial: MakeTrial, shared: Path, steps: int) -> None:
    """One seat, two seats and all at once, forwards and backwards."""
    rows = {name: row for name, row in (MIXED | PARTS).items() if name not in ("absurd", "row by row", "all")}
    bench = Bench(trials_of(make_trial, rows, *_WIDE, "training.precision=fp64", steps=steps), rows, shared)
    expected = bench.together(list(rows), seats=1)
    for names, seats in ((list(rows)[::-1], 2), (list(rows), len(rows))):
        assert_equal(bench.together(names, seats=seats), expected, **_BOUNDS["fp64"])


def test_who_diverges_on_the_way_leaves_the_others_to_the_last_bit(
    make_trial: MakeTrial, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until then the company is the same; from then on the others' passes are shorter, and equal by the rule."""
    names = ["rank 128", "accumulates", "sgd"]
    trials = trials_of(make_trial, MIXED, *_WIDE, "training.precision=fp64", steps=_FEW_STEPS)
    bench = Bench(trials, MIXED, shared)
    sound = bench.together(names, seats=3)
    poison(monkeypatch, lambda member: member.name == "sgd" and member.step == 6)
    broken = bench.together(names, seats=3)
    assert str(broken.diverged["sgd"]).startswith("step 7: loss nan")
    assert broken.losses["sgd"] == sound.losses["sgd"][:6]
    assert all(bool(weight.isfinite().all()) for weight in broken.weights["sgd"].values())
    for name in ("rank 128", "accumulates"):
        assert broken.losses[name][:6] == sound.losses[name][:6], name
    assert_equal(_of(broken, names[:2]), _of(sound, names[:2]), **_BOUNDS["fp64"])


def _of(trained: Trained, names: Sequence[str]) -> Trained:
    return Trained(*({name: part[name] for name in names} for part in vars(trained).values()))
