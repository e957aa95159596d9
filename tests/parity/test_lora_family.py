"""PiSSA, OLoRA, rsLoRA, LoRA+ and ranks by layer against plain PEFT, plain torch and the papers' formulas."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lora_lab.adapters.attach import attach, count_parameters
from lora_lab.adapters.decomposed import initial_pair, start_name
from lora_lab.adapters.lora import lora_config
from lora_lab.adapters.save import load_adapter, save_adapter
from lora_lab.errors import InputError
from lora_lab.optim.groups import rate_groups
from lora_lab.plan.counts import counts_of
from lora_lab.schema.trial import Trial
from lora_lab.train.member import member_of
from tests.conftest import MakeTrial
from tests.parity.test_train_loop import CPU, ragged_rows, train
from tests.unit.test_adapters_attach import load

pytestmark = pytest.mark.usefixtures("one_core")

DECOMPOSED = ("pissa", "olora")
FAMILIES = {
    "llama": ("target=[query,value,mlp]",),
    "gpt2": ("target=attention", "model.shape.family=gpt2", "model.shape.num_kv_heads=4"),
}
IDS = torch.randint(0, 256, (3, 17), generator=torch.Generator().manual_seed(1))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=IDS).logits
    return found


def loss_of(model: Any) -> Tensor:
    found = model.eval()(input_ids=IDS).logits
    return cross_entropy(found[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


def plain_peft(trial: Trial, cache: Path) -> Any:
    """PEFT's own method: the base's weights are overwritten by what the start leaves of them."""
    base = load(trial, cache)
    config = lora_config(base, trial)
    if trial.method.kind == "olora" and base.config.model_type == "gpt2":
        return olora_on_conv1d(get_peft_model(base, config))
    config.init_lora_weights = trial.method.kind  # type: ignore[assignment]
    return get_peft_model(base, config)


def olora_on_conv1d(model: Any) -> Any:
    """PEFT decomposes Conv1D's weight without transposing it, and then fails: here its formula, by hand."""
    for layer in lora_layers(model):
        with torch.no_grad():
            q, r = torch.linalg.qr(layer.base_layer.weight.T)
            rank = layer.r["default"]
            layer.lora_A["default"].weight.copy_(r[:rank])
            layer.lora_B["default"].weight.copy_(q[:, :rank])
            layer.base_layer.weight -= layer.scaling["default"] * (q[:, :rank] @ r[:rank]).T
    return model


def pairs(model: Any) -> dict[str, Tensor]:
    found = {key: one for key, one in model.named_parameters() if one.requires_grad}
    assert all(".lora_A.default." in key or ".lora_B.default." in key for key in found)
    return found


@pytest.mark.parametrize("factors", ["[]", "[0.5,2]"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", DECOMPOSED)
def test_start_gradients_and_training_equal_pefts_own(
    make_trial: MakeTrial, cache: Path, method: str, family: str, factors: str
) -> None:
    """fp32. PEFT rounds W - s B A once, here W x - s B0 (A0 x) is summed in each layer, so both differ by rounding:
    1e-5 in logits of size 1 and in gradients; AdamW makes a step of full size out of a gradient's sign, so after ten
    steps at 1e-3 weights may differ by more than their gradients do, by 1 % of the way at most."""
    trial = make_trial(f"method={method}", *FAMILIES[family], "rank=4", "alpha=6", f"method.rank_factors={factors}")
    base = load(trial, cache)
    before = {key: one.detach().clone() for key, one in base.named_parameters()}
    ours, theirs = attach(base, trial).model, plain_peft(trial, cache)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)
    first = {key: one.detach().clone() for key, one in pairs(ours).items()}
    assert list(first) == list(pairs(theirs))
    for key, one in pairs(theirs).items():
        torch.testing.assert_close(first[key], one.detach(), rtol=0, atol=1e-6)
    for model in (ours, theirs):
        loss_of(model).backward()  # type: ignore[no-untyped-call]
    for one, other in zip(pairs(ours).values(), pairs(theirs).values(), strict=True):
        assert one.grad is not None and one.grad.abs().max() > 1e-4
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-5)
    for model in (ours, theirs):
        optimizer = torch.optim.AdamW(pairs(model).values(), lr=1e-3, eps=1e-4)
        for _ in range(10):
            optimizer.zero_grad()
            loss_of(model).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    for key, one in pairs(ours).items():
        torch.testing.assert_close(one, pairs(theirs)[key], rtol=0, atol=1e-4)
        assert (one - first[key]).abs().max() > 2e-3, "it moved"
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-4)
    for key, one in base.named_parameters():
        plain = key.replace(".base_layer", "")
        if plain in before:
            assert torch.equal(one, before.pop(plain)), key
    assert not before


@pytest.mark.parametrize("method", DECOMPOSED)
def test_what_is_taken_out_is_the_best_of_its_rank_or_the_first_rows(method: str) -> None:
    """Eckart and Young: no matrix of rank r is closer than the r largest singular values. QR: W minus its first r
    columns of Q has nothing along them. In fp64, s = 0.7, a wide matrix and a tall one."""
    for shape in ((6, 9), (9, 6)):
        weight = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        a, b = initial_pair(weight, kind=method, rank=3, scaling=0.7)
        if method == "pissa":
            rest = weight - 0.7 * b @ a
            singular = torch.linalg.svdvals(weight)
            torch.testing.assert_close(torch.linalg.matrix_norm(rest) ** 2, (singular[3:] ** 2).sum())
            torch.testing.assert_close(a @ a.T, b.T @ b)  # the root of S on either side
        else:
            torch.testing.assert_close(b.T @ b, torch.eye(3, dtype=torch.float64))
            torch.testing.assert_close(a, b.T @ weight)


@pytest.mark.parametrize("factors", ["[]", "[0.5,2]"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", DECOMPOSED)
def test_saved_as_a_plain_lora_of_twice_the_rank(
    make_trial: MakeTrial, cache: Path, tmp_path: Path, method: str, family: str, factors: str
) -> None:
    trial = make_trial(f"method={method}", *FAMILIES[family], "rank=4", "alpha=6", f"method.rank_factors={factors}")
    model = attach(load(trial, cache), trial).model
    moved(model)
    expected = logits(model)
    save_adapter(model, tmp_path / "saved")
    config = LoraConfig.from_pretrained(str(tmp_path / "saved"))
    assert (config.r, config.lora_alpha, config.init_lora_weights) == (8, 12, True)
    fresh = load(trial, cache)
    assert (logits(fresh) - expected).abs().max() > 0.01
    plain = PeftModel.from_pretrained(fresh, str(tmp_path / "saved"))
    torch.testing.assert_close(logits(plain), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        logits(load_adapter(load(trial, cache), tmp_path / "saved")), expected, rtol=0, atol=1e-5
    )
    ranks = {layer.r["default"] for layer in lora_layers(plain)}
    assert ranks == ({8} if factors == "[]" else {4, 16})


def moved(model: Any) -> None:
    """As after training: all that is trained has moved."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for one in pairs(model).values():
            one += 0.05 * torch.randn(one.shape, generator=generator)


def lora_layers(model: Any) -> list[Any]:
    found = [module for module in model.modules() if isinstance(module, LoraLayer)]
    assert found
    return found


@pytest.mark.parametrize("method", DECOMPOSED)
def test_on_a_bf16_base_the_start_is_the_base_bit_for_bit(make_trial: MakeTrial, cache: Path, method: str) -> None:
    """PEFT's own start is not: the residual is rounded to bf16."""
    trial = make_trial(f"method={method}", "target=all_linear", "rank=16", "training.precision=bf16")
    expected = logits(load(trial, cache))
    model = attach(load(trial, cache), trial).model
    assert {one.dtype for one in pairs(model).values()} == {torch.float32}
    assert torch.equal(logits(model), expected)
    assert not torch.equal(logits(plain_peft(trial, cache)), expected)


@pytest.mark.parametrize("method", DECOMPOSED)
def test_dropout_acts_on_the_trained_part_only(make_trial: MakeTrial, cache: Path, method: str) -> None:
    """y = W x + s B A d(x) - s B0 A0 x: PEFT's residual sees x without dropout as well."""
    trial = make_trial(f"method={method}", "target=[query]", "rank=4", "alpha=6", "dropout=0.5")
    model = attach(load(trial, cache), trial).model.train()
    layer = lora_layers(model)[0]
    name, start = "default", start_name("default")
    dropped: list[Tensor] = []
    layer.lora_dropout[name].register_forward_hook(lambda module, inputs, output: dropped.append(output))
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    y = layer(x)
    assert (dropped[0] == 0).float().mean() == pytest.approx(0.5, abs=0.15)
    s, weight = 1.5, layer.base_layer.weight
    trained = dropped[0] @ layer.lora_A[name].weight.T @ layer.lora_B[name].weight.T
    taken = x @ layer.lora_A[name].weight.T @ layer.lora_B[name].weight.T
    torch.testing.assert_close(y, x @ weight.T + s * trained - s * taken, rtol=0, atol=1e-5)
    assert isinstance(layer.lora_dropout[start], nn.Identity)


@pytest.mark.parametrize("method", DECOMPOSED)
def test_a_second_adapter_has_a_start_of_its_own(
    make_trial: MakeTrial, cache: Path, tmp_path: Path, method: str
) -> None:
    trial = make_trial(f"method={method}", "target=qv", "rank=4")
    model = attach(load(trial, cache), trial).model
    moved(model)
    expected = logits(model)
    attach(model, trial.model_copy(update={"rank": 2, "alpha": 3.0}), name="other")
    assert torch.equal(logits(model), expected), "not yet active"
    model.base_model.set_adapter(["other", start_name("other")])
    torch.testing.assert_close(logits(model), logits(load(trial, cache)), rtol=0, atol=1e-5)
    for name, rank in (("default", 8), ("other", 4)):
        save_adapter(model, tmp_path / name, name=name)
        assert LoraConfig.from_pretrained(str(tmp_path / name)).r == rank
    torch.testing.assert_close(
        logits(load_adapter(load(trial, cache), tmp_path / "default")), expected, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("method", DECOMPOSED)
@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("target=embedding",), "embedding"),
        (("target=[query,embedding]",), "embedding"),
        (("target=[value]", "rank=33"), "must be <= 32, the smaller side of .*v_proj, got 33"),
        (("target=[value]", "rank=17", "method.rank_factors=[1,2]"), "must be <= 32, .*layers.1.*v_proj, got 34"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_decomposed_is_refused_in_the_plan_and_at_the_model(
    make_trial: MakeTrial, cache: Path, method: str, overrides: tuple[str, ...], said: str
) -> None:
    trial = make_trial(f"method={method}", *overrides)
    with pytest.raises(InputError, match=said):
        counts_of(trial)
    with pytest.raises(InputError, match=said.replace("embedding", "linear layers only")):
        attach(load(trial, cache), trial)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("method", DECOMPOSED)
def test_a_quantized_base_is_refused(make_trial: MakeTrial, method: str, kind: str) -> None:
    with pytest.raises(InputError, match="takes its start out of the base's own weights"):
        make_trial(f"method={method}", f"quantization={kind}")


def test_the_full_rank_takes_all_of_a_matrix_out(make_trial: MakeTrial, cache: Path) -> None:
    """rank = the smaller side: W - s B0 A0 = 0, and the start still is the base."""
    trial = make_trial("method=pissa", "target=[value]", "rank=32")
    base = load(trial, cache)
    expected = logits(base)
    model = attach(base, trial).model
    for layer in lora_layers(model):
        torch.testing.assert_close(layer.get_delta_weight("default"), layer.base_layer.weight, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)


# Ranks by layer


@pytest.mark.parametrize(
    ("factors", "ranks"),
    [("[]", [4, 4, 4]), ("[1]", [4, 4, 4]), ("[0.5,2]", [2, 2, 8]), ("[0.25,1,1.5]", [1, 4, 6]), ("[2]", [8, 8, 8])],
)
@pytest.mark.parametrize("method", ["lora", "dora", "rslora", "lora_plus"])
def test_ranks_and_scalings_of_layers(
    make_trial: MakeTrial, cache: Path, method: str, factors: str, ranks: list[int]
) -> None:
    """Layer l of 3 is in group floor(l n / 3). alpha follows the rank, so alpha / r is 1.5 everywhere; by rsLoRA's
    definition alpha / sqrt(r) then is 1.5 sqrt(r)."""
    own = ["model.shape.num_layers=3", "target=[query,mlp,head]", "rank=4", "alpha=6"]
    trial = make_trial(f"method={method}", *own, f"method.rank_factors={factors}")
    base = load(trial, cache)
    model = attach(base, trial).model
    seen = []
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        rank = 4 if "lm_head" in name else ranks[int(name.split(".layers.")[1][0])]
        seen.append(rank)
        assert layer.r["default"] == rank == len(layer.lora_A["default"].weight)  # type: ignore[arg-type]
        wanted = 1.5 * math.sqrt(rank) if method == "rslora" else 1.5
        assert layer.scaling["default"] == pytest.approx(wanted)
    assert len(seen) == 3 * 4 + 1
    counts = counts_of(trial)
    assert counts is not None
    assert tuple(count_parameters(model)) == (counts.trainable_parameters, counts.total_parameters)
    pattern = model.peft_config["default"].rank_pattern
    assert set(pattern.values()) == {rank for rank in ranks if rank != 4}
    assert all(base.get_submodule(name) is not None for name in pattern), "full names"


def test_factors_of_one_are_the_plain_lora(make_trial: MakeTrial, cache: Path) -> None:
    found = []
    for factors in ("[]", "[1]", "[1,1]", "[1.0,1.0]"):
        trial = make_trial("target=all_linear", "rank=3", f"method.rank_factors={factors}")
        found.append(get_peft_model_state_dict(attach(load(trial, cache), trial).model))
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        assert all(torch.equal(one, other[key]) for key, one in found[0].items())


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 64), st.integers(1, 64))
def test_any_whole_rank_is_whole(make_trial: MakeTrial, rank: int, wanted: int) -> None:
    """50 x 0.14 is 7.000000000000001 to a computer."""
    trial = make_trial("target=qv", f"rank={rank}", f"method.rank_factors=[{wanted / rank!r}]")
    plain = make_trial("target=qv", f"rank={wanted}")
    one, other = counts_of(trial), counts_of(plain)
    assert one is not None and one == other


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("rank=8", "method.rank_factors=[0.3]"), "rank 8 x 0.3 = 2.4 is no whole rank"),
        (("rank=8", "method.rank_factors=[1,0.01]"), "0.08 is no whole rank"),
        (("rank=8", "method.rank_factors=[1,1,2]"), "3 entries for a model of 2 layers"),
        (
            ("rank=8", "method.rank_factors=[1,16]"),
            "(rank 128 is beyond the hidden size 64|must be <= 64, the smaller side of .*, got 128)",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
@pytest.mark.parametrize("method", ["lora", "pissa", "lora_plus"])
def test_factors_that_fit_nothing_are_refused(
    make_trial: MakeTrial, method: str, overrides: tuple[str, ...], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        counts_of(make_trial(f"method={method}", "target=[query]", *overrides))


@pytest.mark.parametrize("value", ["[0]", "[-1]", "[true]", "[a]"])
def test_factors_that_are_no_numbers_above_zero_are_refused(make_trial: MakeTrial, value: str) -> None:
    with pytest.raises(InputError, match="rank_factors"):
        make_trial(f"method.rank_factors={value}")


# LoRA+


def plus_trial(make_trial: MakeTrial, *more: str) -> Trial:
    return make_trial(
        "method=lora_plus", "target=[query,mlp,embedding]", "rank=4", "method.ratio=16", "learning_rate=0.001", *more
    )


def test_b_is_trained_at_the_ratio(make_trial: MakeTrial, cache: Path) -> None:
    trial = plus_trial(make_trial)
    attached = attach(load(trial, cache), trial)
    groups = {group.factor: group.parameters for group in rate_groups(trial, attached.trained, num_layers=2)}
    assert set(groups) == {1.0, 16.0}
    named = {id(one): name for name, one in attached.trained}
    kinds = {
        factor: {"lora_B" in n or "lora_embedding_B" in n for n in (named[id(o)] for o in own)}
        for factor, own in groups.items()
    }
    assert kinds == {1.0: {False}, 16.0: {True}}


@pytest.mark.parametrize("layer_rates", ["[]", "[0.5,2]"])
def test_three_steps_equal_torch_with_groups_by_hand(make_trial: MakeTrial, cache: Path, layer_rates: str) -> None:
    """The linear schedule with one step of warm-up scales every group; bit for bit."""
    more = ("optimizer.weight_decay=0.1", "scheduler=linear", "scheduler.warmup_steps=1", "training.max_steps=4")
    trial = plus_trial(make_trial, *more, f"training.layer_rates={layer_rates}", "training.max_gradient_norm=null")
    attached = attach(load(trial, cache), trial)
    member = member_of(trial, attached, ragged_rows(), name="test")
    train(attached.model, [member], pad_id=256, device=CPU, on_step=lambda *_: None)
    other = attach(load(trial, cache), trial)
    rates = {}
    for name, one in other.trained:
        layer = 0.5 if "layers.0" in name else 2.0 if "layers.1" in name else 1.0
        rates[one] = 0.001 * (16 if "_B." in name else 1) * (1.0 if layer_rates == "[]" else layer)
    optimizer = torch.optim.AdamW(
        [{"params": [one], "lr": rate} for one, rate in rates.items()],
        betas=trial.optimizer.betas,  # type: ignore[union-attr]
        eps=trial.optimizer.eps,  # type: ignore[union-attr]
        weight_decay=0.1,
    )
    by_hand = member_of(trial, other, ragged_rows(), name="by hand")
    for step in range(4):
        shown = member.records[step].learning_rate
        assert shown == pytest.approx(0.001 * [0, 1, 2 / 3, 1 / 3][step])
        for group, rate in zip(optimizer.param_groups, rates.values(), strict=True):
            group["lr"] = rate * [0, 1, 2 / 3, 1 / 3][step]
        gradients_of(by_hand, other.model, step)
        optimizer.step()
        optimizer.zero_grad()
    for (name, one), (_, hand) in zip(attached.trained, other.trained, strict=True):
        torch.testing.assert_close(one, hand, rtol=0, atol=1e-6, msg=name)


def gradients_of(member: Any, model: Any, step: int) -> None:
    """Of the mean loss of a step's tokens, all rows at once."""
    rows = [member.examples[index] for indices in member.batches.step(step) for index in indices]
    width = max(len(row.input_ids) for row in rows)
    ids = torch.tensor([[*row.input_ids, *[256] * (width - len(row.input_ids))] for row in rows])
    mask = torch.tensor([[1] * len(row.input_ids) + [0] * (width - len(row.input_ids)) for row in rows])
    targets = torch.tensor([[*row.loss_mask, *[False] * (width - len(row.loss_mask))] for row in rows])
    found = model.train()(input_ids=ids, attention_mask=mask).logits
    wanted = torch.where(targets, ids, -100)[:, 1:]
    cross_entropy(found[:, :-1].flatten(0, 1), wanted.flatten()).backward()  # type: ignore[no-untyped-call]
