"""GaLore against the released package's update, restated here, and against the inner optimizer run by hand."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn

from lora_lab.adapters.attach import attach
from lora_lab.errors import InputError
from lora_lab.memory.live_bytes import storage_bytes
from lora_lab.models.random import random_network
from lora_lab.optim.galore import GaLore, Projection, Side
from lora_lab.optim.optimizers import build_schedule, state_tensors
from lora_lab.plan.counts import counts_of
from lora_lab.schema.trial import Trial
from lora_lab.train.member import optimizer_of
from tests.conftest import MakeTrial
from tests.parity.test_train_loop import largest_difference, trained
from tests.unit.test_models_random import tiny_shape

pytestmark = [pytest.mark.filterwarnings("ignore:Paged optimizers"), pytest.mark.usefixtures("one_core")]

SIDES: tuple[Side, ...] = ("std", "reverse_std", "left", "right", "full")
SHAPES = ((12, 5), (5, 12), (7, 7))
RANK, RATE, BETAS, SCALE = 3, 0.05, (0.9, 0.95), 0.25


@dataclass
class ReleasedAdamW:
    """The released optimizer for one matrix: bases by its rules, eps beside the raw root of v, decay at the end.

    corrected_eps: beside the bias-corrected root instead, as torch does."""

    weight: Tensor
    side: str
    gap: int
    decay: float
    eps: float
    corrected_eps: bool = False
    rank: int = RANK
    m: Tensor | float = 0.0
    v: Tensor | float = 0.0
    steps: int = 0
    left: Tensor | None = None
    right: Tensor | None = None

    def sides(self) -> set[str]:
        tall = self.weight.shape[0] >= self.weight.shape[1]
        if self.side in ("std", "reverse_std"):
            return {"right"} if tall == (self.side == "std") else {"left"}
        return {"left", "right"} if self.side == "full" else {self.side}

    def step(self, gradient: Tensor, rate: float = RATE) -> None:
        if self.steps % self.gap == 0:
            u, _, vh = torch.linalg.svd(gradient, full_matrices=False)
            self.left = u[:, : self.rank] if "left" in self.sides() else torch.eye(len(gradient), dtype=gradient.dtype)
            width = gradient.shape[1]
            self.right = vh[: self.rank] if "right" in self.sides() else torch.eye(width, dtype=gradient.dtype)
        assert self.left is not None and self.right is not None
        small = self.left.T @ gradient @ self.right.T
        self.steps += 1
        self.m = BETAS[0] * self.m + (1 - BETAS[0]) * small
        self.v = BETAS[1] * self.v + (1 - BETAS[1]) * small**2
        root = (1 - BETAS[1] ** self.steps) ** 0.5
        size = rate * root / (1 - BETAS[0] ** self.steps)
        eps = self.eps * root if self.corrected_eps else self.eps
        change = self.left @ (self.m / (self.v**0.5 + eps)) @ self.right
        self.weight = self.weight - size * SCALE * change
        self.weight = self.weight - rate * self.decay * self.weight


def gradients(shape: Sequence[int], count: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(*shape, generator=generator, dtype=dtype) for _ in range(count)]


Inner = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def adamw(eps: float = 0.0, decay: float = 0.0) -> Inner:
    return lambda parameters: torch.optim.AdamW(parameters, lr=RATE, betas=BETAS, eps=eps, weight_decay=decay)


def galore(
    weight: nn.Parameter, side: Side, inner: Inner, *, gap: int = 1000, rank: int = RANK, decay_gradient: bool = False
) -> GaLore:
    projection = Projection(rank, gap, SCALE, side)
    stand_in = nn.Parameter(torch.zeros(projection.projected_shape(weight.shape), dtype=weight.dtype))
    group = {"params": [weight], "lr": RATE}
    return GaLore([group], inner([stand_in]), {weight: stand_in}, projection, decay_gradient=decay_gradient)


def feed(optimizer: torch.optim.Optimizer, weight: nn.Parameter, given: Sequence[Tensor]) -> None:
    for gradient in given:
        weight.grad = gradient.clone()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("decay", [0.0, 0.2])
@pytest.mark.parametrize("gap", [1, 3, 100])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", SIDES)
def test_equals_the_released_update(side: Side, shape: tuple[int, int], gap: int, decay: float) -> None:
    """With both sides projected a new basis makes the gradient diagonal. Beside the diagonal is rounding noise, which
    Adam without an eps would scale up to whole steps."""
    start, given = gradients(shape, 9)[-1], gradients(shape, 8)
    eps = 1e-3 if side == "full" else 0.0
    reference = ReleasedAdamW(start, side, gap, decay, eps, corrected_eps=True)
    weight = nn.Parameter(start.clone())
    optimizer = galore(weight, side, adamw(eps, decay), gap=gap)
    for gradient in given:
        reference.step(gradient)
        feed(optimizer, weight, [gradient])
        torch.testing.assert_close(weight.detach(), reference.weight, rtol=0, atol=1e-12)
    assert optimizer.state[weight]["exp_avg"].shape == optimizer._projection.projected_shape(weight.shape)


def test_eps_stands_elsewhere_and_that_is_all() -> None:
    """Ours beside the corrected root: the released eps times 1 / sqrt(1 - b2^t); the change differs by that much."""
    (gradient,), eps = gradients((12, 5), 1), 1e-3
    reference = ReleasedAdamW(torch.zeros(12, 5, dtype=torch.float64), "std", 1, 0.0, eps=eps)
    reference.step(gradient)
    weight = nn.Parameter(torch.zeros(12, 5, dtype=torch.float64))
    feed(galore(weight, "std", adamw(eps)), weight, [gradient])
    difference = torch.linalg.vector_norm(weight.detach() - reference.weight)
    assert reference.right is not None
    small = gradient @ reference.right.T
    bound = RATE * SCALE * eps * (1 / (1 - BETAS[1]) ** 0.5 - 1) * torch.linalg.vector_norm(1 / small)
    assert 0 < difference <= bound


INNER: dict[str, Inner] = {
    "adamw": adamw(1e-8),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=RATE, momentum=0.9),
    "nesterov": lambda parameters: torch.optim.SGD(parameters, lr=RATE, momentum=0.9, nesterov=True),
    "lion": lambda parameters: bitsandbytes.optim.Lion(parameters, lr=RATE, betas=(0.9, 0.99)),
    "adamw8bit": lambda parameters: bitsandbytes.optim.AdamW8bit(parameters, lr=RATE, weight_decay=0),
    "paged": lambda parameters: bitsandbytes.optim.PagedAdamW32bit(parameters, lr=RATE, weight_decay=0),
}


@pytest.mark.parametrize("side", ["std", "reverse_std", "full"])
@pytest.mark.parametrize("name", INNER)
def test_any_inner_optimizer_works_in_the_projected_space(name: str, side: Side) -> None:
    """With a basis that stays, the weight moves by what the optimizer does to a matrix of the projected size."""
    shape, rank = (160, 96), 80  # projected, and large enough for 8-bit states
    given = gradients(shape, 5, torch.float32)
    weight = nn.Parameter(torch.zeros(shape))
    optimizer = galore(weight, side, INNER[name], rank=rank)
    feed(optimizer, weight, given)
    u, _, vh = torch.linalg.svd(given[0], full_matrices=False)
    left, right = {
        "std": (torch.eye(160), vh[:rank]),
        "reverse_std": (u[:, :rank], torch.eye(96)),
        "full": (u[:, :rank], vh[:rank]),
    }[str(side)]
    alone = nn.Parameter(torch.zeros(left.shape[1], right.shape[0]))
    feed(INNER[name]([alone]), alone, [left.T @ gradient @ right.T for gradient in given])
    expected = SCALE * left @ alone.detach() @ right
    # A sign or an 8-bit step may turn over on a rounding error; almost none does.
    close = torch.isclose(weight.detach(), expected, rtol=1e-4, atol=1e-5)
    assert close.float().mean() > (0.99 if name in ("adamw8bit", "lion") else 0.9999)
    torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=SCALE * RATE)
    dtypes = {one.dtype for one in state_tensors(optimizer)}
    assert (torch.uint8 in dtypes) == (name == "adamw8bit")


def test_weight_decay_of_sgd_is_part_of_the_gradient() -> None:
    start, given, decay = gradients((12, 5), 9)[-1], gradients((12, 5), 6), 0.1
    weight = nn.Parameter(start.clone())

    def inner(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=RATE, momentum=0.9, weight_decay=decay)

    feed(galore(weight, "std", inner, decay_gradient=True, gap=2), weight, given)
    expected, momentum = start.clone(), torch.zeros(12, RANK, dtype=torch.float64)
    for step, gradient in enumerate(given):
        whole = gradient + decay * expected
        if step % 2 == 0:
            right = torch.linalg.svd(whole, full_matrices=False).Vh[:RANK]
        momentum = 0.9 * momentum + whole @ right.T
        expected = expected - RATE * SCALE * momentum @ right
    torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=1e-12)


@dataclass
class Model:
    """A network ready for galore, its optimizer, and its projected weights by name."""

    network: Any
    optimizer: torch.optim.Optimizer
    trial: Trial
    names: dict[str, nn.Parameter] = field(default_factory=dict)


def galore_model(
    make_trial: MakeTrial, family: str, *more: str, method: str = "galore", dtype: torch.dtype = torch.float64
) -> Model:
    shape = [f"model.shape.{key}={value}" for key, value in tiny_shape(family, tied=False).model_dump().items()]
    trial = make_trial(f"method={method}", "rank=4", f"learning_rate={RATE}", *shape, *more)
    network = random_network(tiny_shape(family, tied=False), 0).to(dtype)
    attached = attach(network, trial)
    optimizer = optimizer_of(trial, attached, attached.trained)
    ends = ("_proj.weight",) if family != "gpt2" else ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    names = {name: one for name, one in network.named_parameters() if name.endswith(ends)}
    return Model(network, optimizer, trial, names)


def random_steps(model: Model, steps: int, seed: int = 1) -> list[dict[str, Tensor]]:
    """Gives every parameter random gradients; returns them by name."""
    generator = torch.Generator().manual_seed(seed)
    given = []
    for _ in range(steps):
        given.append({})
        for name, parameter in model.network.named_parameters():
            gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
            given[-1][name], parameter.grad = gradient, gradient.clone()
        model.optimizer.step()
    return given


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("side", SIDES)
def test_a_models_matrices_move_as_released(make_trial: MakeTrial, family: str, side: Side) -> None:
    """Through a trial; of GPT-2's Conv1D the matrix as it is kept."""
    settings = ("method.update_gap=2", f"method.side={side}", f"method.scale={SCALE}", "optimizer.betas=[0.9,0.95]")
    model = galore_model(make_trial, family, *settings, "optimizer.eps=1e-3", "optimizer.weight_decay=0.1")
    start = {name: one.detach().clone() for name, one in model.names.items()}
    given = random_steps(model, 5)
    assert len(start) == {"llama": 14, "qwen2": 14, "gpt2": 8}[family]
    for name, weight in model.names.items():
        reference = ReleasedAdamW(start[name], side, 2, 0.1, eps=1e-3, corrected_eps=True, rank=4)
        for gradient in given:
            reference.step(gradient[name])
        torch.testing.assert_close(weight.detach(), reference.weight, rtol=0, atol=1e-11)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lion", "adamw8bit"])
@pytest.mark.parametrize("more", [(), ("optimizer.weight_decay=0.1",), ("training.layer_rates=[1.0,0.5]",)])
def test_all_other_parameters_move_as_by_the_inner_optimizer_alone(
    make_trial: MakeTrial, optimizer: str, more: tuple[str, ...]
) -> None:
    settings, dtype = (f"optimizer={optimizer}", *more), torch.float32
    one = galore_model(make_trial, "llama", *settings, dtype=dtype)
    other = galore_model(make_trial, "llama", *settings, dtype=dtype, method="full")
    random_steps(one, 4)
    random_steps(other, 4)
    plain = dict(other.network.named_parameters())
    for name, parameter in one.network.named_parameters():
        assert torch.equal(parameter, plain[name]) == (name not in one.names), name
    assert [group["lr"] for group in one.optimizer.param_groups] == [
        group["lr"] for group in other.optimizer.param_groups
    ]


def test_schedules_reach_the_inner_optimizer() -> None:
    start, given = gradients((12, 5), 9)[-1], gradients((12, 5), 6)
    weight, reference = nn.Parameter(start.clone()), ReleasedAdamW(start, "std", 2, 0.3, eps=0.0)
    optimizer = galore(weight, "std", adamw(decay=0.3), gap=2)
    schedule = build_schedule(optimizer, lambda step: 1 / (1 + step))
    for step, gradient in enumerate(given):
        feed(optimizer, weight, [gradient])
        schedule.step()
        reference.step(gradient, rate=RATE / (1 + step))
    torch.testing.assert_close(weight.detach(), reference.weight, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", INNER)
def test_a_saved_state_goes_on_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    shape = (160, 96)
    given = gradients(shape, 8, dtype)
    weight = nn.Parameter(torch.zeros(shape, dtype=dtype))
    optimizer = galore(weight, "std", INNER[name], gap=3, rank=80)
    feed(optimizer, weight, given[:4])
    taken = nn.Parameter(weight.detach().clone())
    saved = copy.deepcopy(optimizer.state_dict())
    again = galore(taken, "std", INNER[name], gap=3, rank=80)
    again.load_state_dict(saved)
    assert [one.dtype for one in state_tensors(again)] == [one.dtype for one in state_tensors(optimizer)]
    feed(optimizer, weight, given[4:])
    feed(again, taken, given[4:])
    assert torch.equal(weight, taken)
    untouched = saved["state"][0]  # what was saved is not what is trained on with
    assert untouched["projections"] == 4 and again.state[taken]["projections"] == 8


@pytest.mark.parametrize(("side", "small", "basis"), [("std", 12 * 3, 3 * 5), ("left", 3 * 5, 12 * 3), ("full", 9, 51)])
def test_state_is_of_the_projected_size(side: Side, small: int, basis: int) -> None:
    weight = nn.Parameter(torch.zeros(12, 5))
    optimizer = galore(weight, side, adamw(), gap=2)
    for gradient in gradients((12, 5), 5, torch.float32):
        feed(optimizer, weight, [gradient])
        counter = optimizer.state[weight]["step"].nbytes
        assert storage_bytes(state_tensors(optimizer)) == 4 * (2 * small + basis) + counter


def test_no_gradient_no_move() -> None:
    weight = nn.Parameter(torch.ones(12, 5))
    optimizer = galore(weight, "std", adamw(decay=0.5))
    optimizer.step()
    assert torch.equal(weight, torch.ones(12, 5)) and not state_tensors(optimizer)


STATEFUL = ("method.update_gap=100", "optimizer=adamw")
STATELESS = ("method.update_gap=1", "optimizer=sgd", "optimizer.momentum=0", "optimizer.weight_decay=0.1")


@pytest.mark.parametrize("more", [STATEFUL, STATELESS])
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_micro_batches_equal_one_batch(
    make_trial: MakeTrial, cache: Path, micro_batch_size: int, more: tuple[str, ...]
) -> None:
    """The basis is that of the whole batch's gradient, and the gap counts optimizer steps.

    Not both with states and beyond a renewal: which sign a new singular vector has is up to rounding, and the states
    are not turned along (in the released code neither)."""
    common = ("method=galore", "rank=4", "training.max_steps=5", "training.precision=fp64", "training.batch_size=8")
    common = (*common, "learning_rate=0.01", *more)
    whole, _ = trained(make_trial(*common, "training.micro_batch_size=8"), cache)
    split, _ = trained(make_trial(*common, f"training.micro_batch_size={micro_batch_size}"), cache)
    with torch.no_grad():
        assert largest_difference(whole, split) < 1e-11


def test_a_rank_above_a_width_is_refused_at_plan_and_build(make_trial: MakeTrial) -> None:
    trial = make_trial("method=galore", "rank=48")  # hidden size 64, keys and values 32
    with pytest.raises(InputError, match=r"rank.*<= 32.*k_proj, got 48"):
        counts_of(trial)
    shape = trial.model.shape
    assert shape is not None
    attached = attach(random_network(shape, 0), trial)
    with pytest.raises(InputError, match=r"rank.*<= 32.*k_proj, got 48"):
        optimizer_of(trial, attached, attached.trained)
    with pytest.raises(InputError, match=r"rank.*<= 64"):
        make_trial("method=galore", "rank=65")


def test_full_rank_and_scale_one_is_a_rotation_of_the_optimizer(make_trial: MakeTrial) -> None:
    """SGD does not care for a rotation: of full rank GaLore is SGD."""
    weight, plain = nn.Parameter(torch.zeros(7, 5).double()), nn.Parameter(torch.zeros(7, 5).double())

    def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=RATE / SCALE)

    stand_in = galore(weight, "right", sgd, rank=5, gap=1)
    stand_in.param_groups[0]["lr"] = RATE / SCALE
    feed(stand_in, weight, gradients((7, 5), 5))
    feed(torch.optim.SGD([plain], lr=RATE), plain, gradients((7, 5), 5))
    torch.testing.assert_close(weight, plain, rtol=0, atol=1e-12)


def test_a_basis_is_renewed_every_gap_steps() -> None:
    weight = nn.Parameter(torch.zeros(12, 5).double())
    optimizer = galore(weight, "std", adamw(), gap=3)
    bases: list[Mapping[str, Tensor]] = []
    for gradient in gradients((12, 5), 7):
        feed(optimizer, weight, [gradient])
        bases.append(optimizer.state[weight]["right"].clone())
    changed = [not torch.equal(one, other) for one, other in itertools.pairwise(bases)]
    assert changed == [False, False, True, False, False, True]
