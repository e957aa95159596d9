"""Sophia-G against closed forms, the released update restated here, and the exact Gauss-Newton matrix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from lora_lab.adapters.attach import attach
from lora_lab.data.batches import collate
from lora_lab.models.load import load_base
from lora_lab.optim.sophia import Sophia, gauss_newton_bartlett
from lora_lab.schema.trial import Trial
from lora_lab.train import curvature, forward, loop
from lora_lab.train.loop import train
from lora_lab.train.member import Member, member_of
from tests.conftest import MakeTrial
from tests.parity.test_train_loop import CPU, build_member, largest_difference, ragged_rows, trained

pytestmark = pytest.mark.usefixtures("one_core")


def sophia(parameters: Any, **settings: Any) -> Sophia:
    return Sophia(parameters, **{"lr": 0.01, "betas": (0.9, 0.95), "rho": 0.04, "weight_decay": 0.0, **settings})


def test_closed_form_on_a_quadratic() -> None:
    """f = sum a x^2 / 2 with its curvature a known: where |x| < rho all coordinates shrink by 1 - lr / rho, whatever a
    is, as Newton's method does; beyond, it moves by lr."""
    a = torch.tensor([1e-3, 1.0, 1e3, 5.0, 0.0], dtype=torch.float64)
    start = torch.tensor([0.3, -0.3, 0.3, 2.0, 0.3], dtype=torch.float64)
    x = nn.Parameter(start.clone())
    optimizer = sophia([x], lr=0.02, betas=(0.0, 0.0), rho=0.5)
    for _ in range(10):
        optimizer.update_hessian({x: a})
        x.grad = a * x.detach()
        optimizer.step()
    shrink = (1 - 0.02 / 0.5) ** 10
    expected = start * torch.tensor([shrink, shrink, shrink, 1, 1], dtype=torch.float64)
    expected[3] = 2.0 - 10 * 0.02
    torch.testing.assert_close(x.detach(), expected, rtol=0, atol=1e-9)


def test_without_curvature_a_step_is_the_sign_of_the_momentum() -> None:
    x = nn.Parameter(torch.tensor([1.0, 1.0, 1.0]))
    optimizer = sophia([x], lr=0.1)
    x.grad = torch.tensor([5.0, -1e-6, 0.0])
    optimizer.step()
    torch.testing.assert_close(x.detach(), torch.tensor([0.9, 1.1, 1.0]))


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("interval", [1, 3])
def test_equals_the_released_update(interval: int, decay: float) -> None:
    """The released code averages g^ * g^ and puts the batch size beside rho; here it is in the estimate."""
    generator, tokens, lr, rho, b1, b2 = torch.Generator().manual_seed(0), 48, 0.02, 0.04, 0.9, 0.95
    theta = torch.randn(40, generator=generator, dtype=torch.float64)
    x = nn.Parameter(theta.clone())
    optimizer = sophia([x], lr=lr, betas=(b1, b2), rho=rho, weight_decay=decay)
    momentum, squares = torch.zeros_like(theta), torch.zeros_like(theta)
    cut = 0
    for step in range(25):
        if step % interval == 0:
            sampled = torch.randn(40, generator=generator, dtype=torch.float64)
            squares = b2 * squares + (1 - b2) * sampled**2
            optimizer.update_hessian({x: tokens * sampled * sampled})
        gradient = torch.randn(40, generator=generator, dtype=torch.float64)
        momentum = b1 * momentum + (1 - b1) * gradient
        ratio = momentum.abs() / (rho * tokens * squares + 1e-15)
        cut += int((ratio > 1).sum())
        theta = theta * (1 - lr * decay) - lr * momentum.sign() * ratio.clamp(max=1)
        x.grad = gradient.clone()
        optimizer.step()
    assert 50 < cut < 950  # both branches are seen
    torch.testing.assert_close(x.detach(), theta, rtol=0, atol=1e-12)


def test_groups_have_their_own_settings_and_no_gradient_is_no_move() -> None:
    one, other, still = (nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer = sophia([{"params": [one], "lr": 0.1}, {"params": [other, still], "lr": 0.2}], weight_decay=0.5)
    one.grad, other.grad = torch.ones(2), torch.ones(2)
    optimizer.step()
    torch.testing.assert_close(one.detach(), torch.full((2,), 1 * (1 - 0.05) - 0.1))
    torch.testing.assert_close(other.detach(), torch.full((2,), 1 * (1 - 0.1) - 0.2))
    assert torch.equal(still, torch.ones(2)) and still not in optimizer.state


def mean_of_estimates(logits: Any, parameters: list[nn.Parameter], draws: int) -> tuple[list[Tensor], list[Tensor]]:
    """Mean over draws, and its standard error."""
    generator = torch.Generator().manual_seed(5)
    drawn = [gauss_newton_bartlett(logits(), parameters, generator) for _ in range(draws)]
    stacks = [torch.stack(one) for one in zip(*drawn, strict=True)]
    return [one.mean(0) for one in stacks], [one.std(0) / draws**0.5 for one in stacks]


def test_mean_estimate_is_the_gauss_newton_diagonal_of_softmax_regression() -> None:
    """Of the mean loss over N rows: (1 / N) sum_n x_nd^2 p_nk (1 - p_nk)."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    weight = nn.Parameter(torch.randn(4, 5, generator=generator, dtype=torch.float64))
    p = (x @ weight).softmax(-1).detach()
    exact = (x**2).T @ (p * (1 - p)) / len(x)
    (mean,), (error,) = mean_of_estimates(lambda: x @ weight, [weight], 4000)
    assert ((mean - exact).abs() < 4.5 * error).all()
    assert float(((mean - exact) / exact).abs().mean()) < 0.05


def test_mean_estimate_is_the_gauss_newton_diagonal_of_a_network() -> None:
    """(1 / N) sum_n diag(J_n^T (diag p - p p^T) J_n), J by automatic differentiation."""
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x = torch.randn(6, 3, dtype=torch.float64)
    names, parameters = zip(*net.named_parameters(), strict=True)
    jacobians = jacrev(lambda *values: functional_call(net, dict(zip(names, values, strict=True)), x), tuple(range(4)))(
        *parameters
    )
    p = net(x).softmax(-1).detach()
    middle = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    means, errors = mean_of_estimates(lambda: net(x), list(parameters), 4000)
    for jacobian, mean, error in zip(jacobians, means, errors, strict=True):
        exact = torch.einsum("nk...,nkl,nl...->...", jacobian, middle, jacobian).detach() / len(x)
        assert ((mean - exact).abs() < 4.5 * error + 1e-12).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_labels_come_from_the_given_generator_alone(dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).to(dtype))
    x = torch.ones(7, 4, dtype=dtype)
    found = []
    for noise, seed in ((1, 3), (2, 3), (1, 4)):
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        (estimate,) = gauss_newton_bartlett(x @ weight, [weight], torch.Generator().manual_seed(seed))
        assert torch.equal(torch.get_rng_state(), before) and estimate.dtype == dtype
        found.append(estimate)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_a_parameter_the_logits_do_not_depend_on_gets_zeros() -> None:
    used, unused = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(2))
    estimates = gauss_newton_bartlett(torch.ones(2, 3) @ used, [used, unused], torch.Generator().manual_seed(0))
    assert estimates[0].any() and torch.equal(estimates[1], torch.zeros(2))
    assert used.grad is None and unused.grad is None


SHORT = ("optimizer=sophia", "optimizer.estimate_interval=3", "training.batch_size=8", "training.micro_batch_size=2")


def sophia_trial(make_trial: MakeTrial, *more: str) -> Trial:
    given = {override.partition("=")[0] for override in more}
    common = ("training.max_steps=7", "training.precision=fp64", "rank=4", "dropout=0.2", "learning_rate=0.001", *SHORT)
    return make_trial(*(line for line in common if line.partition("=")[0] not in given), *more)


def run(model: nn.Module, member: Member) -> None:
    train(model, [member], pad_id=256, device=CPU, on_step=lambda *_: None)
    assert member.diverged is None


class Spy:
    """Notes the logits and seeds of the estimates, and the logits of every loss."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.estimated: list[Tensor] = []
        self.seeds: list[int] = []
        self.trained: list[Tensor] = []
        estimate, loss = curvature.gauss_newton_bartlett, forward.cross_entropy

        def spied_estimate(logits: Tensor, parameters: Any, generator: torch.Generator) -> list[Tensor]:
            self.estimated.append(logits.detach())
            self.seeds.append(generator.initial_seed())
            return estimate(logits, parameters, generator)

        def spied_loss(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            self.trained.append(logits.detach())
            return loss(logits, *args, **kwargs)

        monkeypatch.setattr(curvature, "gauss_newton_bartlett", spied_estimate)
        monkeypatch.setattr(forward, "cross_entropy", spied_loss)


def test_estimates_are_made_every_k_steps_on_the_first_micro_batch(
    make_trial: MakeTrial, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the very logits that the step is trained on: the same loss tokens, weights and dropout masks."""
    model, member = build_member(sophia_trial(make_trial), cache)
    spy = Spy(monkeypatch)
    run(model, member)
    assert len(spy.trained) == 7 * 4 and len(spy.estimated) == 3
    for estimated, first in zip(spy.estimated, (0, 12, 24), strict=True):
        assert torch.equal(estimated, spy.trained[first])


def test_labels_follow_from_seed_and_step(make_trial: MakeTrial, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for key, start, more in (("whole", 0, ()), ("resumed", 2, ()), ("other", 0, ("seeds.dropout=9",))):
        torch.manual_seed(start)
        model, member = build_member(sophia_trial(make_trial, *more), cache)
        member.step = start
        with monkeypatch.context() as context:
            spy = Spy(context)
            run(model, member)
        found[key] = spy.seeds
    assert len(set(found["whole"])) == 3
    assert found["resumed"] == found["whole"][1:]
    assert not set(found["other"]) & set(found["whole"])


@pytest.mark.parametrize("method", ["lora", "full"])
def test_gradients_of_the_step_do_not_know_of_the_estimate(
    make_trial: MakeTrial, cache: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    found: list[list[Tensor]] = []
    clip = loop.clip

    def spied_clip(member: Member) -> float:
        if member.step == 0:
            found.append([one.grad.clone() for one in member.active_parameters if one.grad is not None])
        return clip(member)

    monkeypatch.setattr(loop, "clip", spied_clip)
    trial = sophia_trial(make_trial, f"method={method}", "training.max_steps=1")
    for one in (trial, trial.model_copy(update={"optimizer": make_trial("optimizer=adamw").optimizer})):
        model, member = build_member(one, cache)
        run(model, member)
    assert len(found[0]) == len(found[1]) > 3
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_curvature_of_a_fresh_lora(make_trial: MakeTrial, cache: Path) -> None:
    """B is zero, so nothing depends on A yet: zero for A, positive for B. And it is N times the squared gradient of the
    first micro-batch against labels drawn as said, mixed in with 1 - b2."""
    model, member = build_member(sophia_trial(make_trial, "dropout=0", "training.max_steps=1"), cache)
    batch = collate([member.examples[index] for index in member.batches.step(0)[0]], 256, CPU)
    assert member.curvature is not None
    seed = curvature._label_seed(member.curvature.seed, 0)
    parameters = dict(model.named_parameters())
    trainable = {name: one for name, one in parameters.items() if one.requires_grad}
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    shifted = batch.loss_mask[:, 1:]
    wanted = logits[:, :-1][shifted]
    labels = torch.multinomial(wanted.softmax(-1), 1, generator=torch.Generator().manual_seed(seed))[:, 0]
    loss = -wanted.log_softmax(-1)[torch.arange(len(labels)), labels].mean()
    gradients = torch.autograd.grad(loss, list(trainable.values()))
    run(model, member)
    for (name, parameter), gradient in zip(trainable.items(), gradients, strict=True):
        hessian = member.optimizer.state[parameter]["hessian"]
        torch.testing.assert_close(hessian, 0.01 * len(labels) * gradient**2, rtol=1e-9, atol=1e-18)
        assert hessian.any() == ("lora_B" in name)
    a = next(one for name, one in trainable.items() if "lora_A" in name)
    assert not torch.equal(a, torch.zeros_like(a)) and len(labels) > 1


def test_gradients_accumulate_over_micro_batches(make_trial: MakeTrial, cache: Path) -> None:
    """The momentum of one batch and of its micro-batches is the same; the curvature is the first micro-batch's."""
    moments, hessians = [], []
    for size in (8, 2):
        trial = sophia_trial(make_trial, "dropout=0", "training.max_steps=1", f"training.micro_batch_size={size}")
        model, member = build_member(trial, cache)
        run(model, member)
        states = [member.optimizer.state[one] for one in member.parameters]
        moments.append(torch.cat([state["momentum"].flatten() for state in states]))
        hessians.append(torch.cat([state["hessian"].flatten() for state in states]))
    torch.testing.assert_close(moments[0], moments[1], rtol=0, atol=1e-14)
    assert moments[0].any() and not torch.allclose(hessians[0], hessians[1])


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_checkpointing_changes_nothing(make_trial: MakeTrial, cache: Path, method: str) -> None:
    settings = (f"method={method}", "dropout=0.2")
    off, _ = trained(sophia_trial(make_trial, *settings), cache)
    on, _ = trained(sophia_trial(make_trial, *settings, "training.gradient_checkpointing=every_layer"), cache)
    with torch.no_grad():
        assert largest_difference(off, on) < 1e-10


def test_routers_are_counted_once(make_trial: MakeTrial, cache: Path) -> None:
    """The estimate's forward pass is none of the training: totals count the tokens of the steps."""
    settings = ("method=mola", "method.experts=[2,3]", "target=attention", "dropout=0", "training.precision=fp32")
    trial = sophia_trial(make_trial, *settings)
    base = load_base(trial.model, precision="fp32", quantization=trial.quantization, device=CPU, cache=cache)
    attached = attach(base.model, trial)
    member = member_of(trial, attached, ragged_rows(), name="test")
    run(attached.model, member)
    assert attached.routing is not None
    tokens = {one.tokens for one in attached.routing.statistics().values()}
    assert tokens == {sum(record.tokens for record in member.records)}
