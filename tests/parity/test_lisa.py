"""LISA against counts from other sources, full fine-tuning, and its memory claim: states that do not pile up."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from lora_lab.adapters.attach import attach, count_parameters
from lora_lab.adapters.lisa import Lisa, importance_probabilities
from lora_lab.errors import InputError
from lora_lab.memory.live_bytes import storage_bytes
from lora_lab.models.random import random_network
from lora_lab.optim.optimizers import state_tensors
from lora_lab.plan.counts import counts_of
from lora_lab.schema.trial import Trial
from lora_lab.train.loop import train
from lora_lab.train.member import Member, StepRecord
from tests.conftest import MakeTrial
from tests.parity.test_train_loop import CPU, build_member
from tests.unit.test_models_random import tiny_shape

pytestmark = pytest.mark.usefixtures("one_core")

DEPTH = 6
SHORT = (
    f"model.shape.num_layers={DEPTH}",
    "training.batch_size=4",
    "training.micro_batch_size=2",
    "learning_rate=0.01",
)

# Written down from the models' config.json; the counts are those that others have published or computed.
LLAMA3 = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32} | {
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
LLAMA2 = {**LLAMA3, "intermediate_size": 11008, "num_key_value_heads": 32, "vocab_size": 32000}
SMOLLM2 = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9} | {
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
COUNTS = [
    ("llama3_8b", LLAMA3, 2, 1_486_901_248),
    ("llama2_7b", LLAMA2, 2, 666_914_816),
    ("smollm2_135m", SMOLLM2, 0, 28_312_128),
    ("smollm2_135m", SMOLLM2, 2, 35_392_320),
    ("smollm2_135m", SMOLLM2, 4, 42_472_512),
    ("smollm2_135m", SMOLLM2, 8, 56_632_896),
]


def network(depth: int = DEPTH, *, tied: bool = False, family: str = "llama") -> Any:
    return random_network(tiny_shape(family, tied=tied).model_copy(update={"num_layers": depth}), 0)


def lisa(model: Any, **settings: Any) -> Lisa:
    return Lisa(model, **{"layers": 2, "interval": 3, "seed": 0, **settings})


def trained_layers(model: Any) -> tuple[int, ...]:
    """Layers all of whose parameters receive gradients; no layer may be trained in part."""
    blocks = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    flags = [{parameter.requires_grad for parameter in block.parameters()} for block in blocks]
    assert all(len(flag) == 1 for flag in flags)
    return tuple(layer for layer, flag in enumerate(flags) if True in flag)


@pytest.mark.parametrize(("name", "config", "gamma", "expected"), COUNTS)
def test_trainable_set_is_exact(
    make_trial: MakeTrial, name: str, config: dict[str, Any], gamma: int, expected: int
) -> None:
    planned = counts_of(make_trial(f"model={name}", "method=lisa", f"method.layers={gamma}"))
    assert planned is not None and planned.trainable_parameters == expected
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**config))
    model.tie_weights()
    lisa(model, layers=gamma)
    assert count_parameters(model).trainable == expected


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("tied", [True, False])
def test_embedding_head_and_norm_are_always_trained(family: str, tied: bool) -> None:
    model = network(family=family, tied=tied)
    lisa(model, layers=0)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    head = set() if tied else {"lm_head.weight"}
    llama = {"model.embed_tokens.weight", "model.norm.weight"}
    gpt2 = {f"transformer.{name}" for name in ("wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias")}
    assert names == head | (gpt2 if family == "gpt2" else llama)


def test_uniform_draws_are_uniform() -> None:
    """Chi-square over 2,000 periods. Of gamma of N without replacement the statistic's mean is N - gamma, not N - 1, so
    it is scaled; 5 degrees of freedom, 0.999 quantile 20.5 (and 0.0005 quantile 0.16: not too even either)."""
    course, gamma, periods = lisa(network()), 2, 2000
    draws = [course.drawn(period) for period in range(periods)]
    assert all(len(set(draw)) == gamma and list(draw) == sorted(draw) for draw in draws)
    found = np.bincount(np.concatenate(draws), minlength=DEPTH)
    expected = periods * gamma / DEPTH
    statistic = ((found - expected) ** 2 / expected).sum() * (DEPTH - 1) / (DEPTH - gamma)
    assert 0.16 < statistic < 20.5
    pairs = {pair: draws.count(pair) for pair in itertools.combinations(range(DEPTH), gamma)}
    even = periods / len(pairs)
    assert sum((count - even) ** 2 / even for count in pairs.values()) < 36.1  # 14 degrees of freedom


def test_listed_probabilities_are_each_layers_own() -> None:
    wanted, periods = (0.0, 0.1, 0.25, 0.5, 0.9, 1.0), 2000
    course = lisa(network(), probabilities=wanted)
    table = np.array([[layer in course.drawn(period) for layer in range(DEPTH)] for period in range(periods)])
    share = table.mean(0)
    assert share[0] == 0 and share[-1] == 1
    inner = np.array(wanted[1:-1])
    assert np.all(np.abs(share[1:-1] - inner) < 4 * np.sqrt(inner * (1 - inner) / periods))
    together = np.corrcoef(table[:, 1:-1].T) - np.eye(len(inner))
    assert np.abs(together).max() < 4 / np.sqrt(periods)  # independent of each other


def test_draws_follow_from_seed_and_period_alone() -> None:
    course, twin, other = lisa(network()), lisa(network()), lisa(network(), seed=1)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[index]  # numpy's legacy state
    first = [course.drawn(period) for period in range(50)]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # type: ignore[index]
    torch.manual_seed(99)
    assert [twin.drawn(period) for period in reversed(range(50))] == first[::-1]
    assert [other.drawn(period) for period in range(50)] != first
    assert len(set(first)) > 5


def member_of_lisa(make_trial: MakeTrial, cache: Path, *more: str) -> tuple[Any, Member, Lisa]:
    settings = {"method.layers": "2", "method.interval": "2", "training.max_steps": "12"}
    settings |= dict(one.split("=", 1) for one in more)
    trial = make_trial("method=lisa", *SHORT, *(f"{key}={value}" for key, value in settings.items()))
    model, member = build_member(trial, cache)
    return model, member, cast(Lisa, member.course)


def run(model: Any, member: Member, look: Any = None) -> None:
    def on_step(_: Member, record: StepRecord) -> None:
        if look is not None:
            look(record.step)

    train(model, [member], pad_id=256, device=CPU, on_step=on_step)
    assert member.diverged is None


@pytest.mark.parametrize("more", [(), ("optimizer.weight_decay=0.3",), ("training.layer_rates=[1.0,0.5,0.25]",)])
def test_only_drawn_layers_move_and_only_at_multiples_of_k(
    make_trial: MakeTrial, cache: Path, more: tuple[str, ...]
) -> None:
    model, member, course = member_of_lisa(make_trial, cache, "method.interval=3", *more)
    last = [{name: one.detach().clone() for name, one in model.named_parameters()}]

    def look(step: int) -> None:
        drawn = course.drawn((step - 1) // 3)
        assert trained_layers(model) == drawn
        moved = {name for name, one in model.named_parameters() if not torch.equal(one, last[0][name])}
        inside = {f"model.layers.{layer}." for layer in drawn}
        expected = {name for name, _ in model.named_parameters() if "layers" not in name}
        expected |= {name for name, _ in model.named_parameters() if any(part in name for part in inside)}
        assert moved == expected
        last[0] = {name: one.detach().clone() for name, one in model.named_parameters()}

    run(model, member, look)
    assert len({course.drawn(period) for period in range(4)}) > 1
    assert set(course.ever_trained(12)) == {name for period in range(4) for name in _names(model, course.drawn(period))}


def _names(model: Any, layers: tuple[int, ...]) -> list[str]:
    inside = tuple(f"model.layers.{layer}." for layer in layers)
    return [name for name, _ in model.named_parameters() if "layers" not in name or name.startswith(inside)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("more", [(), ("training.layer_rates=[1.0,0.5]", "optimizer.weight_decay=0.1")])
def test_all_layers_equal_full_fine_tuning_bit_for_bit(
    make_trial: MakeTrial, cache: Path, precision: str, more: tuple[str, ...]
) -> None:
    common = (*SHORT, "training.max_steps=7", f"training.precision={precision}", "scheduler.warmup_steps=2", *more)
    models, losses = [], []
    for method in (("method=full",), ("method=lisa", f"method.layers={DEPTH}", "method.interval=2")):
        model, member = build_member(make_trial(*method, *common), cache)
        run(model, member)
        models.append(dict(model.named_parameters()))
        losses.append([(record.loss, record.gradient_norm, record.learning_rate) for record in member.records])
    assert losses[0] == losses[1] and len({loss for loss, *_ in losses[0]}) == 7
    assert all(torch.equal(one, models[1][name]) for name, one in models[0].items())


# Bytes of state per trained weight and per tensor (step counters); of 8-bit states only that they stay the same.
OPTIMIZERS = {
    "adamw": ("optimizer=adamw", 8.0),
    "adamw8bit": ("optimizer=adamw8bit", None),
    "paged_adamw": ("optimizer=paged_adamw", 8.0),
    "lion": ("optimizer=lion", 4.0),
    "sgd": ("optimizer=sgd", 4.0),
    "sophia": ("optimizer=sophia", 8.0),
}


@pytest.mark.parametrize("layer_rates", ["null", "[1.0,0.5,0.25]"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_is_constant_and_of_the_trained_weights_alone(
    make_trial: MakeTrial, cache: Path, name: str, layer_rates: str
) -> None:
    overrides, per_weight = OPTIMIZERS[name]
    more = ["optimizer.momentum=0.9"] if name == "sgd" else []
    rates = [] if layer_rates == "null" else [f"training.layer_rates={layer_rates}"]
    model, member, course = member_of_lisa(make_trial, cache, overrides, "method.interval=1", *more, *rates)
    sizes = []

    def look(_: int) -> None:
        active = {one for one in model.parameters() if one.requires_grad}
        assert set(member.optimizer.state) == active
        counters = sum(
            state["step"].nbytes
            for state in member.optimizer.state.values()
            if isinstance(state.get("step"), torch.Tensor)
        )
        sizes.append(storage_bytes(state_tensors(member.optimizer)) - counters)

    run(model, member, look)
    assert len({course.drawn(step) for step in range(12)}) > 4 and len(sizes) == 12
    assert len(set(sizes)) == 1
    if per_weight is not None:
        assert sizes[0] == per_weight * count_parameters(model).trainable
    assert len(member.optimizer.param_groups) == (1 if layer_rates == "null" else 3)


def test_what_leaves_is_released_and_what_stays_is_kept() -> None:
    """Layer by layer over many draws: a new layer starts without state, one drawn again goes on with its own."""
    model = network()
    course = lisa(model, interval=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    blocks = model.model.layers
    ages: dict[int, int] = {}
    kept = 0
    for step in range(30):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
        held = {layer: blocks[layer].mlp.up_proj.weight.grad for layer in range(DEPTH)}
        course.before_step(step, optimizer)
        drawn = course.drawn(step)
        for layer, block in enumerate(blocks):
            weight = block.mlp.up_proj.weight
            if layer not in drawn:
                assert weight.grad is None and weight not in optimizer.state
            elif held[layer] is not None:
                assert weight.grad is held[layer]
            weight.grad = torch.ones_like(weight) if layer in drawn else None
        optimizer.step()
        kept += len(ages.keys() & set(drawn))
        ages = {layer: ages.get(layer, 0) + 1 for layer in drawn}
        found = {layer: int(optimizer.state[blocks[layer].mlp.up_proj.weight]["step"]) for layer in drawn}
        assert found == ages
    assert kept > 5
    assert int(optimizer.state[model.lm_head.weight]["step"]) == 30


def test_paged_states_are_let_go_of_by_bitsandbytes_too() -> None:
    """On CUDA bitsandbytes lists paged states; nothing here is on CUDA, so the list is filled by hand."""
    model = network()
    course = lisa(model, interval=1)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()

    class Pages:
        paged_tensors = state_tensors(optimizer)

    optimizer.page_mng = Pages()
    course.before_step(0, optimizer)
    active = {id(optimizer.state[one]["momentum_buffer"]) for one in model.parameters() if one.requires_grad}
    assert {id(one) for one in optimizer.page_mng.paged_tensors} == active


def test_a_training_that_is_taken_up_in_mid_period_trains_that_periods_layers() -> None:
    for step in (4, 10, 29):
        model = network()
        course = lisa(model, interval=5)
        course.before_step(step, torch.optim.AdamW(model.parameters(), lr=1e-3))
        assert trained_layers(model) == course.drawn(step // 5)
    assert course.drawn(5) != course.drawn(0)


def test_schedule_reaches_every_group(make_trial: MakeTrial, cache: Path) -> None:
    more = ("training.layer_rates=[1.0,0.5,0.25]", "scheduler.warmup_steps=3", "method.interval=1", "method.layers=1")
    model, member, _ = member_of_lisa(make_trial, cache, *more)
    rates = []
    run(model, member, lambda _: rates.append([group["lr"] for group in member.optimizer.param_groups]))
    assert len(set(map(tuple, rates))) > 3
    for step, now in enumerate(rates, start=1):  # the schedule has already moved on
        expected = member.learning_rate(step)
        assert now == pytest.approx([expected, expected / 2, expected / 4])


def test_more_layers_than_there_are_is_refused_at_plan_and_attach(make_trial: MakeTrial) -> None:
    trial = make_trial("method=lisa", *SHORT, f"method.layers={DEPTH + 1}")
    for refuse in (lambda: counts_of(trial), lambda: attach(network(), trial)):
        with pytest.raises(InputError, match=f"method.layers.*<= {DEPTH}.*got {DEPTH + 1}"):
            refuse()
    listed: Trial = make_trial("method=lisa", *SHORT, "method.probabilities=list", "method.weights=[0.5,0.5]")
    for refuse in (lambda: counts_of(listed), lambda: attach(network(), listed)):
        with pytest.raises(InputError, match=f"method.weights.*{DEPTH} layers, got 2"):
            refuse()


def observed(*norms: float) -> dict[str, float]:
    return {
        **{str(layer): norm for layer, norm in enumerate(norms)},
        "embedding": 50.0,
        "head": 70.0,
        "final_norm": 1.0,
    }


def test_probabilities_by_hand() -> None:
    """Means over observations 2, 4, 8 and 1, 1, 4: ratios 1/2, 1/4, 1/2. Their sum 5/4 is to be 1: times 4/5."""
    full, lora = [observed(1, 3, 8), observed(3, 5, 8)], [observed(0, 1, 6), observed(2, 1, 2)]
    assert importance_probabilities(full, lora, expected=1) == pytest.approx([0.4, 0.2, 0.4])
    assert importance_probabilities(full, lora, expected=2) == pytest.approx([0.8, 0.4, 0.8])
    assert importance_probabilities(full, lora, expected=0) == [0, 0, 0]
    assert importance_probabilities(full, lora, expected=3) == [1, 1, 1]


def test_probabilities_are_cut_at_one() -> None:
    """Ratios 8, 2, 1, 1 of 2 expected: 16/12 > 1 is cut; the other 1 is shared 2:1:1. Cut again where that demands."""
    ones = [observed(1, 1, 1, 1)]
    assert importance_probabilities(ones, [observed(8, 2, 1, 1)], expected=2) == pytest.approx([1, 0.5, 0.25, 0.25])
    assert importance_probabilities(ones, [observed(90, 8, 1, 1)], expected=3) == pytest.approx([1, 1, 0.5, 0.5])
    assert importance_probabilities(ones, [observed(1, 0, 0, 0)], expected=2) == [1, 0, 0, 0]


def test_layers_are_told_apart_by_number() -> None:
    """Ten and more: layer 10 does not sort before layer 2."""
    norms = [float(layer + 1) for layer in range(12)]
    found = importance_probabilities([observed(*[1.0] * 12)], [observed(*norms)], expected=1)
    assert found == pytest.approx([norm / 78 for norm in norms])


@pytest.mark.parametrize(
    ("full", "lora"),
    [
        ([], [observed(1, 1)]),
        ([observed(1, 1)], []),
        ([], []),
        ([observed(1, 0)], [observed(1, 1)]),
        ([observed(1, 1)], [observed(1)]),
        ([observed(1)], [observed(1, 1)]),
        ([observed(1, 1), observed(1)], [observed(1, 1)]),
        ([observed(1, float("nan"))], [observed(1, 1)]),
    ],
)
def test_incomplete_observations_are_refused(full: list[dict[str, float]], lora: list[dict[str, float]]) -> None:
    with pytest.raises(InputError, match=r"method\.norm_log"):
        importance_probabilities(full, lora, expected=1)


def test_probabilities_from_logs_reach_the_draws(make_trial: MakeTrial) -> None:
    trial = make_trial("method=lisa", *SHORT, "method.probabilities=from_norm_log", "method.norm_log=[a,b]")
    model = network()
    attached = attach(model, trial, probabilities=[0, 1, 0, 1, 0, 1])
    assert trained_layers(model) == (1, 3, 5)
    assert cast(Lisa, attached.course).drawn(17) == (1, 3, 5)
    with pytest.raises(ValueError, match="needs the probabilities"):
        attach(network(), trial)
