"""One contract for the whole table of methods: joining it means adding a row.

Every method trains on every family, leaves the base's weights alone where it should, counts what the plan counted, is
saved and loaded back to the same logits, and does the same under gradient checkpointing.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_lab.adapters.attach import Attached, attach, count_parameters
from lora_lab.adapters.changed import load_changed, save_changed
from lora_lab.adapters.save import load_adapter, save_adapter, save_model
from lora_lab.data.encode import Encoded
from lora_lab.errors import InputError
from lora_lab.models.load import LoadedBase, load_base
from lora_lab.plan.counts import counts_of
from lora_lab.plan.steps import steps_of
from lora_lab.schema.method import METHODS
from lora_lab.schema.model import FolderModel
from lora_lab.schema.trial import Trial
from lora_lab.train.checkpointing import enable_checkpointing
from lora_lab.train.loop import train
from lora_lab.train.member import Member, member_of
from tests.conftest import MakeTrial
from tests.tiers import mostly_slow

pytestmark = pytest.mark.usefixtures("one_core")


@dataclass(frozen=True)
class Row:
    """settings: what makes a method fit the tiny model. gpt2: what GPT-2's fused projections want instead of the
    default target. quantized: whether it works on a quantized base. is_exact_start: whether the untrained method is the
    base itself (to rounding)."""

    settings: tuple[str, ...] = ()
    gpt2: tuple[str, ...] = ()
    quantized: bool = True
    is_exact_start: bool = True


ATTENTION = ("target=attention",)
ROWS = {
    "full": Row(quantized=False),
    "freeze": Row(("method.last_layers=1", "method.modules=[lm_head]"), quantized=False),
    "lisa": Row(("method.layers=1", "method.interval=1"), quantized=False),
    "galore": Row(("rank=4", "method.update_gap=2"), quantized=False),
    "lora": Row(gpt2=ATTENTION),
    "rslora": Row(gpt2=ATTENTION),
    "dora": Row(gpt2=ATTENTION),
    "pissa": Row(gpt2=ATTENTION, quantized=False),
    "olora": Row(gpt2=ATTENTION, quantized=False),
    "lora_plus": Row(gpt2=ATTENTION),
    "adalora": Row(("rank=4", "method.initial_rank=6"), gpt2=ATTENTION),
    "ia3": Row(),
    "prompt_tuning": Row(("method.virtual_tokens=5",), is_exact_start=False),
    "p_tuning": Row(("method.virtual_tokens=5",), is_exact_start=False),
    "prefix_tuning": Row(("method.virtual_tokens=5",), is_exact_start=False),
    "bottleneck": Row(),
    "mov": Row(("method.experts=3",)),
    "molora": Row(("method.experts=3",), gpt2=ATTENTION),
    "loramoe": Row(("method.experts=4",)),
    "mola": Row(("method.experts=[2,3]",), gpt2=ATTENTION),
}
FAMILIES = {
    "llama": (),
    "llama tied": ("model.shape.tied_embeddings=true",),
    "gpt2": ("model.shape.family=gpt2", "model.shape.num_kv_heads=4"),
    "qwen2": ("model.shape.family=qwen2",),
}
SHORT = ("training.max_steps=6", "training.batch_size=4", "training.micro_batch_size=2", "learning_rate=0.01")
CPU = torch.device("cpu")
IDS = torch.arange(26).reshape(2, 13)


def test_the_table_is_whole() -> None:
    assert [kind for kind in METHODS if kind != "base"] == list(ROWS)


def trial_of(make_trial: MakeTrial, method: str, family: str, *more: str) -> Trial:
    row = ROWS[method]
    own = (*row.settings, *(row.gpt2 if family == "gpt2" else ()), *SHORT)
    given = {override.partition("=")[0] for override in more}
    kept = [override for override in own if override.partition("=")[0] not in given]
    return make_trial(f"method={method}", *FAMILIES[family], *kept, *more)


def rows(types: tuple[str, ...] = ("task", "knowledge")) -> list[Encoded]:
    """24 rows of 5 to 28 random bytes, the last few of which carry the loss; of two types in turn."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for index in range(24):
        length = int(torch.randint(5, 29, (), generator=generator))
        ids = torch.randint(0, 256, (length,), generator=generator).tolist()
        mask = tuple(position >= max(1, length - 6) for position in range(length))
        made.append(Encoded(tuple(ids), mask, False, types[index % 2]))
    return made


def load(trial: Trial, cache: Path) -> LoadedBase:
    return load_base(
        trial.model, precision=trial.training.precision, quantization=trial.quantization, device=CPU, cache=cache
    )


def attached_to(trial: Trial, base: LoadedBase) -> Attached:
    steps = steps_of(trial, 24)
    assert steps is not None
    return attach(base.model, trial, tokenizer=base.tokenizer, steps=steps.steps)


def trained(trial: Trial, cache: Path) -> tuple[LoadedBase, Attached, Member]:
    base = load(trial, cache)
    attached = attached_to(trial, base)
    enable_checkpointing(attached.model, trial.training.gradient_checkpointing)
    member = member_of(trial, attached, rows(), name="test")
    train(attached.model, [member], pad_id=256, device=CPU, on_step=lambda *_: None)
    assert member.diverged is None and member.step == 6
    return base, attached, member


def logits(model: Any) -> torch.Tensor:
    """Of the last 13 positions: virtual tokens in front are none of the row's."""
    model.eval()
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits[:, -13:]
    return found


def own_weights(model: Any) -> dict[str, torch.Tensor]:
    """The base's parameters by their names in the base, wherever an adapter's layers may have put them."""
    plain = {name.replace(".base_layer", ""): parameter for name, parameter in model.named_parameters()}
    return {name: parameter.detach().clone() for name, parameter in plain.items() if not parameter.requires_grad}


@pytest.mark.parametrize("family", mostly_slow(FAMILIES, keep=("llama", "gpt2")))
@pytest.mark.parametrize("method", ROWS)
def test_training(make_trial: MakeTrial, shared: Path, tmp_path: Path, method: str, family: str) -> None:
    trial = trial_of(make_trial, method, family)
    before = {name: one.detach().clone() for name, one in load(trial, shared).model.named_parameters()}
    base, attached, member = trained(trial, shared)
    after = logits(attached.model)
    assert torch.isfinite(after).all()
    assert not torch.equal(after, logits(load(trial, shared).model)), "something was learnt"
    if trial.method.has_adapter:
        untouched = own_weights(base.model)
        found = [name for name in before if name in untouched]
        assert len(found) == len(before)
        assert all(torch.equal(before[name], untouched[name]) for name in found)
    restored = saved_and_loaded(trial, base, attached, member, shared, tmp_path / "saved")
    torch.testing.assert_close(logits(restored), after, rtol=0, atol=1e-5)


def saved_and_loaded(
    trial: Trial, base: LoadedBase, attached: Attached, member: Member, cache: Path, folder: Path
) -> Any:
    """What was trained, from its files on a fresh base."""
    if trial.method.saves == "adapter":
        save_adapter(attached.model, folder)
        return load_adapter(load(trial, cache).model, folder)
    if trial.method.saves == "changed":
        save_changed(attached.model, attached.changed_after(member.step), folder, identity="base")
        model = load(trial, cache).model
        load_changed(model, folder, identity="base")
        return model
    save_model(base.model, base.tokenizer, folder)
    saved = FolderModel(kind="folder", name=None, path=str(folder), shape=None, tie_embeddings=None)
    return load(trial.model_copy(update={"model": saved}), cache).model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ROWS)
def test_counts_and_start(make_trial: MakeTrial, shared: Path, method: str, family: str) -> None:
    trial = trial_of(make_trial, method, family)
    base = load(trial, shared)
    expected = logits(base.model)
    attached = attached_to(trial, base)
    counts = counts_of(trial)
    assert counts is not None
    found = count_parameters(attached.model)
    assert (found.trainable, found.total) == (counts.trainable_parameters, counts.total_parameters)
    if ROWS[method].is_exact_start:
        torch.testing.assert_close(logits(attached.model), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ROWS)
def test_checkpointing_changes_nothing(make_trial: MakeTrial, shared: Path, method: str) -> None:
    """In fp64 where the method allows it: losses, and all that was trained."""
    runs = []
    for mode in ("off", "every_layer", "2"):
        trial = trial_of(
            make_trial, method, "llama", "training.precision=fp64", f"training.gradient_checkpointing={mode}"
        )
        _, attached, member = trained(trial, shared)
        runs.append(([record.loss for record in member.records], dict(attached.trained)))
    for one, other in itertools.pairwise(runs):
        assert one[0] == pytest.approx(other[0], rel=1e-9)
        for name, parameter in one[1].items():
            torch.testing.assert_close(parameter, other[1][name], rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", ROWS)
@pytest.mark.parametrize("kind", mostly_slow(["nf4", "int8"], keep=("nf4",)))
def test_quantized_base(make_trial: MakeTrial, shared: Path, tmp_path: Path, method: str, kind: str) -> None:
    if not ROWS[method].quantized:
        with pytest.raises(InputError, match=f"quantization.*{kind}"):
            trial_of(make_trial, method, "llama", f"quantization={kind}")
        return
    trial = trial_of(make_trial, method, "llama", f"quantization={kind}")
    base, attached, member = trained(trial, shared)
    restored = saved_and_loaded(trial, base, attached, member, shared, tmp_path / "saved")
    torch.testing.assert_close(logits(restored), logits(attached.model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ROWS)
def test_half_precision(make_trial: MakeTrial, shared: Path, tmp_path: Path, method: str) -> None:
    """A bf16 base: adapters are trained in fp32, a model's own weights in bf16; saved and loaded to the same logits."""
    trial = trial_of(make_trial, method, "llama", "training.precision=bf16")
    base, attached, member = trained(trial, shared)
    expected = torch.float32 if trial.method.has_adapter else torch.bfloat16
    assert {parameter.dtype for _, parameter in attached.trained} == {expected}
    restored = saved_and_loaded(trial, base, attached, member, shared, tmp_path / "saved")
    torch.testing.assert_close(logits(restored), logits(attached.model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ROWS)
def test_the_seed_decides(make_trial: MakeTrial, shared: Path, method: str) -> None:
    """Twice the same to the bit, whatever the global generator does; another seed gives another model."""
    found = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(noise)
        _, attached, _ = trained(trial_of(make_trial, method, "llama", f"seed={seed}"), shared)
        found.append(logits(attached.model))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("method", ROWS)
def test_one_row_of_two_tokens(make_trial: MakeTrial, shared: Path, method: str) -> None:
    """The smallest batch there is: one loss token."""
    trial = trial_of(make_trial, method, "llama", "training.batch_size=1", "training.micro_batch_size=1")
    base = load(trial, shared)
    attached = attached_to(trial, base)
    member = member_of(trial, attached, [Encoded((1, 2), (False, True), False, "task")], name="test")
    train(attached.model, [member], pad_id=256, device=CPU, on_step=lambda *_: None)
    assert member.diverged is None and member.step == 6
