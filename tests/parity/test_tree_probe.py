"""The numeric probe under adapters and low precision, how often it runs, and that nothing of it stays behind."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lora_lab.adapters.routing import RoutingLog, set_routing_log
from lora_lab.evaluate.tree import probe, support
from lora_lab.evaluate.tree.passes import Budget, Costs
from lora_lab.evaluate.tree.probe import LONGEST, SHORTEST, why_probe_fails
from lora_lab.evaluate.tree.scores import plan_rows, score_plan
from lora_lab.evaluate.tree.support import why_not_tree
from tests import tuner_bases
from tests.conftest import MakeTrial
from tests.contract.test_every_method import ROWS, attached_to, load, trial_of
from tests.parity.test_evaluate_routing import mixture
from tests.parity.test_prompts import KINDS, N, adapted, network
from tests.parity.test_tree_support import DEPTH, PLANS, family, single_rows
from tests.tiers import mostly_slow
from tests.tree_families import INVALID, VALID, WINDOWED, random_rows, tiny_model

pytestmark = pytest.mark.usefixtures("one_core")


@pytest.mark.parametrize("shape", mostly_slow(["llama", "gpt2"], keep=["gpt2"]))
@pytest.mark.parametrize("method", ROWS)
def test_every_method(make_trial: MakeTrial, tmp_path: Path, method: str, shape: str) -> None:
    """Mixtures too: each token is routed by itself."""
    trial = trial_of(make_trial, method, shape)
    model = tuner_bases.shaken(attached_to(trial, load(trial, tmp_path)).model).eval()
    assert why_not_tree(model, depth=30) is None
    rows = random_rows(3, 20, longest=30, letters=256)
    for budget, costs in PLANS:
        values = [value for value, _ in score_plan(model, plan_rows(rows, budget, costs)).answers]
        assert values == pytest.approx(single_rows(model, rows), abs=1e-4, rel=0)


@pytest.mark.parametrize("kind", KINDS)
def test_virtual_tokens_take_room_in_a_window(kind: str) -> None:
    model = adapted(kind, network("windowed", dtype=torch.float32))
    assert "sliding_window of 6" in str(why_not_tree(model, depth=7 + N))
    assert "too few to probe" in str(why_not_tree(model, depth=6))
    assert why_not_tree(adapted(kind, network("llama", dtype=torch.float32)), depth=60) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_quantized(shape: str, kind: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = tuner_bases.network

    def large(name: str) -> Any:
        """With weights of 0.02 positions would hardly matter."""
        model = small(name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(5)
        return model

    monkeypatch.setattr(tuner_bases, "network", large)
    model = tuner_bases.quantized(shape, kind, dtype, tmp_path)
    assert why_not_tree(model, depth=DEPTH) is None
    break_positions(model)
    assert "differ by up to" in str(why_probe_fails(model, length=LONGEST))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", [*VALID])
def test_other_precisions(name: str, dtype: torch.dtype) -> None:
    if dtype == torch.float64 and name in ("mixtral", "gpt_oss"):
        pytest.skip("torch multiplies groups of experts in float32 and below")
    assert why_not_tree(family(name).to(dtype), depth=DEPTH) is None


@pytest.mark.parametrize("name", [*WINDOWED, "mpt", "rwkv"])
def test_what_is_silently_wrong_shows_in_bf16_too(name: str) -> None:
    made = family(name, **{WINDOWED[name]: 8}) if name in WINDOWED else tiny_model(*INVALID[name])
    assert "differ by up to" in str(why_probe_fails(made.to(torch.bfloat16), length=LONGEST))


def break_positions(model: Any) -> None:
    """Makes the model count places in the row, whatever position_ids say."""
    inner = model.base_model
    forward = inner.forward

    def counting(*args: Any, position_ids: Any = None, **settings: Any) -> Any:
        before = settings["past_key_values"].get_seq_length() if settings.get("past_key_values") is not None else 0
        ids = args[0] if args else settings["input_ids"]
        places = torch.arange(before, before + ids.shape[1])[None].expand(len(ids), -1)
        return forward(*args, position_ids=places, **settings)

    inner.forward = counting


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox"])
def test_ignored_positions_are_found(name: str) -> None:
    model = family(name)
    break_positions(model)
    assert "differ by up to" in str(why_not_tree(model, depth=DEPTH))


def test_the_shortest_probe_and_a_small_vocabulary() -> None:
    """Ids come again where the vocabulary is smaller than the probe; special ones are never taken."""
    small = family("llama", vocab_size=12, eos_token_id=[2, 3])
    assert set(probe._tokens(small)) == {0, *range(4, 12)}
    assert why_not_tree(small, depth=DEPTH) is None
    for length in range(SHORTEST, LONGEST + 1):
        assert why_probe_fails(small, length=length) is None
        assert why_probe_fails(family("mistral", sliding_window=length // 2), length=length) is not None
        longest = max(len(row.tokens) for row in probe._rows(probe._tokens(small), length))
        assert longest == length
    assert why_not_tree(family("llama", max_position_embeddings=10), depth=10) is None


def test_cost() -> None:
    """Ten forward passes, none of more than 70 tokens."""
    model = family("llama")
    read: list[int] = []
    model.model.register_forward_pre_hook(
        lambda _module, _args, settings: read.append(settings["input_ids"].numel()), with_kwargs=True
    )
    assert why_not_tree(model, depth=DEPTH) is None
    assert len(read) == 10
    assert max(read) <= 70
    read.clear()
    assert why_not_tree(model, depth=DEPTH - 1) is None
    assert not read, "once per model"


def count_probes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    runs: list[int] = []

    def probed(_model: Any, *, length: int) -> str | None:
        runs.append(length)
        return None

    monkeypatch.setattr(support, "why_probe_fails", probed)
    return runs


def test_probed_again_for_another_adapter_state(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = count_probes(monkeypatch)
    model: Any = get_peft_model(family("llama"), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))

    def is_probed() -> bool:
        before = len(runs)
        assert why_not_tree(model, depth=DEPTH) is None
        return len(runs) > before

    assert is_probed() and not is_probed()
    with model.disable_adapter():
        assert is_probed() and not is_probed()
    assert not is_probed()
    model.add_adapter("second", LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["v_proj"]))
    assert not is_probed()
    model.set_adapter("second")
    assert is_probed() and not is_probed()
    model.merge_adapter()
    assert is_probed()
    model.to(torch.bfloat16)
    assert is_probed()


def test_an_adapter_put_into_the_same_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT changes the network in place: it is the same object, but not the same model."""
    runs = count_probes(monkeypatch)
    model = family("llama")
    why_not_tree(model, depth=DEPTH)
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    why_not_tree(model, depth=DEPTH)
    assert len(runs) == 2


def test_no_model_is_kept_alive() -> None:
    gc.collect()
    before = len(support._probed)
    model = family("llama")
    assert why_not_tree(model, depth=DEPTH) is None
    assert len(support._probed) == before + 1
    del model
    gc.collect()
    assert len(support._probed) == before


def test_activated_lora() -> None:
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], alora_invocation_tokens=[5, 6])
    assert "activated LoRA" in str(why_not_tree(get_peft_model(family("llama"), config), depth=DEPTH))


def state_of(model: Any) -> dict[str, Any]:
    return {
        "training": [module.training for module in model.modules()],
        "hooks": [
            (len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks))
            for module in model.modules()
        ],
        "config": model.config.to_dict(),
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "weights": [parameter.detach().clone() for parameter in model.parameters()],
        "buffers": [buffer.clone() for buffer in model.buffers()],
        "gradients": [parameter.grad for parameter in model.parameters()],
        "random": torch.get_rng_state(),
        "grad_enabled": torch.is_grad_enabled(),
    }


@pytest.mark.parametrize("make", [lambda: family("gemma3_text"), mixture], ids=["gemma3_text", "mixture"])
@pytest.mark.parametrize("is_broken", [False, True])
def test_nothing_is_disturbed(make: Any, is_broken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model in training mode with dropout, gradients waiting, the cache switched on, which draws at random in every
    forward pass; and one that raises."""
    model = make().train()
    drawn: list[float] = []
    model.get_output_embeddings().register_forward_pre_hook(lambda *_: drawn.append(float(torch.rand(()))))
    model.config.use_cache = True
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = state_of(model)
    if is_broken:
        monkeypatch.setattr(probe, "tree_forward", lambda *_: 1 / 0)
    why = why_not_tree(model, depth=DEPTH)
    assert why == ("the probe's forward pass raises ZeroDivisionError: division by zero" if is_broken else None)
    assert drawn
    after = state_of(model)
    for tensors in ("weights", "buffers", "gradients"):
        torch.testing.assert_close(after.pop(tensors), before.pop(tensors), rtol=0, atol=0)
    assert torch.equal(after.pop("random"), before.pop("random"))
    assert after == before


def test_an_open_routing_log_hears_nothing() -> None:
    model = mixture().eval()
    log = RoutingLog()
    set_routing_log(model, log, "default")
    log.open(torch.ones(1, 4))
    assert why_not_tree(model, depth=DEPTH) is None
    assert log.is_open and not log.entries
    model(torch.tensor([[5, 6, 7, 8]]))
    assert log.entries, "and hears again afterwards"


def test_logits_of_a_head_that_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that multiplies with the head's weight itself gives logits that nobody has chosen."""
    model = family("llama")
    head = model.lm_head
    monkeypatch.setattr(head, "_call_impl", lambda hidden: torch.nn.functional.linear(hidden, head.weight))
    monkeypatch.setattr(type(head), "__call__", lambda self, hidden: torch.nn.functional.linear(hidden, self.weight))
    assert why_probe_fails(model, length=LONGEST) is not None


def test_tolerance_in_float32() -> None:
    """1e-4 up to the log-probability of chance, then in proportion."""
    model = family("llama")
    chance = torch.log(torch.tensor(300.0))
    exceeds = probe._beyond_rounding(model)
    for expected, allowed in ((-0.01, 1e-4), (-chance, 1e-4), (-3 * chance, 3e-4)):
        values = torch.tensor([-1.0, float(expected)])
        assert not exceeds(torch.tensor([0.0, 0.98 * allowed]), values)
        assert exceeds(torch.tensor([0.0, 1.02 * allowed]), values)


def test_a_budget_of_one_on_a_real_model() -> None:
    model = family("llama")
    rows = random_rows(5, 12, longest=20)
    for costs in (Costs(0.0, 0.0), Costs(1.0, 100.0)):
        values = [value for value, _ in score_plan(model, plan_rows(rows, Budget(1, 1), costs)).answers]
        assert values == pytest.approx(single_rows(model, rows), abs=1e-4, rel=0)
