"""The training loop against a plain PEFT + torch loop written here, and against itself where theory says equal."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import get_scheduler

from lora_lab.adapters.attach import attach
from lora_lab.data.batches import Batches
from lora_lab.data.encode import Encoded
from lora_lab.models.load import load_base
from lora_lab.schema.trial import Trial
from lora_lab.train.checkpointing import enable_checkpointing
from lora_lab.train.loop import train
from lora_lab.train.member import Member, StepRecord, member_of
from tests.conftest import MakeTrial

CPU = torch.device("cpu")


def ragged_rows(count: int = 24) -> list[Encoded]:
    """Rows of 5 to 40 random bytes whose last 1 to 9 tokens carry the loss."""
    generator = torch.Generator().manual_seed(7)
    rows = []
    for _ in range(count):
        length = int(torch.randint(5, 41, (), generator=generator))
        answer = int(torch.randint(1, min(10, length), (), generator=generator))
        ids = torch.randint(0, 256, (length,), generator=generator).tolist()
        rows.append(Encoded(tuple(ids), (False,) * (length - answer) + (True,) * answer, False))
    return rows


def build_member(trial: Trial, cache: Path, *, rows: list[Encoded] | None = None) -> tuple[nn.Module, Member]:
    """A model ready to train, and its one member, as the runner builds them."""
    base = load_base(
        trial.model, precision=trial.training.precision, quantization=trial.quantization, device=CPU, cache=cache
    )
    attached = attach(base.model, trial)
    enable_checkpointing(attached.model, trial.training.gradient_checkpointing)
    return attached.model, member_of(trial, attached, ragged_rows() if rows is None else rows, name="test")


def trained(trial: Trial, cache: Path) -> tuple[nn.Module, list[StepRecord]]:
    """The lab's own way: the model after training, and the step records."""
    model, member = build_member(trial, cache)
    train(model, [member], pad_id=256, device=CPU, on_step=lambda *_: None)
    assert member.diverged is None
    return model, member.records


def batches_of(trial: Trial, rows: list[Encoded]) -> Batches:
    return Batches(
        [len(row.input_ids) for row in rows],
        batch_size=trial.training.batch_size,
        micro_batch_size=trial.training.micro_batch_size,
        seed=trial.seeds.data,
        bucket_batches=trial.training.bucket_batches,
    )


def plain_peft_loop(trial: Trial, cache: Path, rows: list[Encoded]) -> tuple[nn.Module, list[float]]:
    """What a user would write: PEFT, AdamW, transformers' scheduler, its own loss, one padded batch a step."""
    base = load_base(
        trial.model, precision=trial.training.precision, quantization=trial.quantization, device=CPU, cache=cache
    ).model
    torch.manual_seed(trial.seeds.init)
    model = get_peft_model(
        base,
        LoraConfig(
            r=trial.rank,
            lora_alpha=trial.alpha,  # type: ignore[arg-type]
            target_modules=["q_proj", "v_proj"],
            use_rslora=trial.method.kind == "rslora",
            use_dora=trial.method.kind == "dora",
            task_type="CAUSAL_LM",
        ),
    )
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=trial.learning_rate, weight_decay=0.0)
    assert trial.training.max_steps is not None
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=3, num_training_steps=trial.training.max_steps)
    order = batches_of(trial, rows)
    losses = []
    model.train()
    for step in range(trial.training.max_steps):
        chosen = [rows[index] for index in itertools.chain(*order.step(step))]
        width = max(len(row.input_ids) for row in chosen)
        ids = torch.tensor([[*row.input_ids, *[256] * (width - len(row.input_ids))] for row in chosen])
        mask = torch.tensor([[1] * len(row.input_ids) + [0] * (width - len(row.input_ids)) for row in chosen])
        labels = torch.tensor([[*row.loss_mask, *[False] * (width - len(row.loss_mask))] for row in chosen])
        wanted = torch.where(labels, ids, -100)
        output = model(input_ids=ids, attention_mask=mask, labels=wanted)
        # transformers computes its loss in fp32 whatever the model's precision: in fp64 it is written out here.
        loss = output.loss if trial.training.precision == "fp32" else shifted_loss(output.logits, wanted)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model, losses


def shifted_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the labels that are not -100, each predicted one position earlier."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def largest_difference(one: nn.Module, other: nn.Module) -> float:
    """Over trainable parameters, which both models have in the same order."""
    pairs = zip(
        (p for p in one.parameters() if p.requires_grad),
        (p for p in other.parameters() if p.requires_grad),
        strict=True,
    )
    return max(float((a - b).abs().max()) for a, b in pairs)


SETUP = ("training.max_steps=20", "training.batch_size=8", "scheduler.warmup_steps=3", "rank=4", "dropout=0.0")


@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
def test_equals_a_plain_peft_loop_in_fp64(make_trial: MakeTrial, cache: Path, method: str) -> None:
    trial = make_trial(*SETUP, f"method={method}", "training.precision=fp64", "training.micro_batch_size=2")
    ours, records = trained(trial, cache)
    reference, losses = plain_peft_loop(trial, cache, ragged_rows())
    assert largest_difference(ours, reference) < 1e-10
    assert max(abs(record.loss - loss) for record, loss in zip(records, losses, strict=True)) < 1e-10
    assert losses[-1] < losses[0]


def test_equals_a_plain_peft_loop_in_fp32(make_trial: MakeTrial, cache: Path) -> None:
    trial = make_trial(*SETUP, "training.micro_batch_size=8")
    _, records = trained(trial, cache)
    _, losses = plain_peft_loop(trial, cache, ragged_rows())
    assert max(abs(record.loss - loss) for record, loss in zip(records, losses, strict=True)) < 1e-5


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_micro_batches_equal_one_big_batch(make_trial: MakeTrial, cache: Path, micro_batch_size: int) -> None:
    common = (*SETUP, "training.precision=fp64", "training.max_steps=6")
    common = tuple(line for line in common if line != "training.max_steps=20")
    whole, _ = trained(make_trial(*common, "training.micro_batch_size=8"), cache)
    split, _ = trained(make_trial(*common, f"training.micro_batch_size={micro_batch_size}"), cache)
    assert largest_difference(whole, split) < 1e-12


@pytest.mark.parametrize("mode", ["every_layer", "2", "sqrt"])
@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_checkpointing_changes_nothing(make_trial: MakeTrial, cache: Path, mode: str, method: str) -> None:
    common = (
        "training.max_steps=4",
        "training.precision=fp64",
        "dropout=0.2",
        f"method={method}",
        "model.shape.num_layers=5",
    )
    off, _ = trained(make_trial(*common), cache)
    on, _ = trained(make_trial(*common, f"training.gradient_checkpointing={mode}"), cache)
    assert largest_difference(off, on) < 1e-13


def test_dropout_is_on_and_seeded(make_trial: MakeTrial, cache: Path) -> None:
    common = ("training.max_steps=3", "training.precision=fp64")
    without, _ = trained(make_trial(*common), cache)
    first, _ = trained(make_trial(*common, "dropout=0.2"), cache)
    again, _ = trained(make_trial(*common, "dropout=0.2"), cache)
    other, _ = trained(make_trial(*common, "dropout=0.2", "seeds.dropout=1"), cache)
    assert largest_difference(first, again) == 0
    assert largest_difference(first, without) > 1e-6
    assert largest_difference(first, other) > 1e-6


def test_each_seed_moves_its_own_part_only(make_trial: MakeTrial, cache: Path) -> None:
    plain = make_trial("seed=3")
    parts = make_trial("seed=0", "seeds.data=3", "seeds.init=3", "seeds.dropout=3", "seeds.layers=3")
    assert plain.seeds == parts.seeds
    _, by_data = trained(
        make_trial("training.max_steps=1", "training.batch_size=4", "training.micro_batch_size=4"), cache
    )
    _, other = trained(
        make_trial("training.max_steps=1", "training.batch_size=4", "training.micro_batch_size=4", "seeds.init=9"),
        cache,
    )
    assert by_data[0].tokens == other[0].tokens
