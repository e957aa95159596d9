"""Steps of other libraries against what those libraries published, and against themselves.

Published: lit-gpt's resource tables (tutorials/resource-tables.md, commit 8641822, one A100, GB as 1e9 bytes) and the
table of its config hub (config_hub/finetune/README.md, commit 967cfda1, one A10G).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lora_lab.data.encode import Encoded
from lora_lab.memory.allocator import allocator_peaks
from lora_lab.models.load import load_base
from lora_lab.models.loss_token_logits import loss_token_logits
from lora_lab.plan.prediction import LongestRows
from lora_lab.plan.timeline import Timeline
from lora_lab.predict.depths import with_workspaces
from lora_lab.predict.predictor import Unpredictable, predict
from lora_lab.predict.styles.hf import LabelledForward
from lora_lab.predict.styles.lit_linear import Packing, Tuning, TuningKind
from lora_lab.predict.styles.lit_shapes import PUBLISHED
from lora_lab.predict.styles.lit_step import LitOptimizer, LitRun, fake_model, generation_timeline, training_timeline
from lora_lab.train.forward import Alone, MicroBatch
from tests.conftest import MakeTrial

pytestmark = pytest.mark.usefixtures("one_core")

QUERY_VALUE = Tuning("lora", 8, frozenset("qv"), 0.05)
NF4 = Packing(nested=False)


def gigabytes(timeline: Timeline) -> float:
    return allocator_peaks(with_workspaces(timeline.events)).allocated / 1e9


@pytest.mark.parametrize(
    ("model", "tuning", "published"),
    [
        ("phi-1.5", "lora", 1_572_864),
        ("stablelm-base-alpha-3b", "lora", 2_097_152),
        ("llama-2-13b", "lora", 6_553_600),
        ("falcon-40b", "lora", 12_042_240),
        ("stablelm-base-alpha-3b", "prompt", 573_888),
        ("llama-2-7b", "prompt", 1_229_760),
        ("stablelm-base-alpha-3b", "prompt_and_scale", 2_125_248),
        ("llama-2-7b", "prompt_and_scale", 4_279_744),
    ],
)
def test_as_many_parameters_are_trained_as_lit_gpt_printed(model: str, tuning: TuningKind, published: int) -> None:
    made = fake_model(PUBLISHED[model], None, QUERY_VALUE if tuning == "lora" else Tuning(tuning), 8)
    assert sum(parameter.numel() for parameter in made.parameters() if parameter.requires_grad) == published


@pytest.mark.parametrize(
    ("model", "packing", "tuning", "micro_batch", "length", "published"),
    [
        ("phi-1.5", None, QUERY_VALUE, 1, 1044, 4.82),
        ("phi-1.5", None, QUERY_VALUE, 4, 1044, 10.68),
        ("stablelm-base-alpha-3b", NF4, QUERY_VALUE, 1, 1034, 6.35),
        ("stablelm-base-alpha-3b", Packing(nested=True), Tuning("prompt_and_scale"), 1, 1034, 7.25),
        ("llama-2-7b", None, QUERY_VALUE, 1, 1304, 21.30),
        ("llama-2-7b", NF4, QUERY_VALUE, 1, 1304, 14.14),
    ],
)
def test_lit_gpts_step_takes_what_it_published(
    model: str, packing: Packing | None, tuning: Tuning, micro_batch: int, length: int, published: float
) -> None:
    adam: LitOptimizer = "adamw" if packing is None else "paged_adamw"
    run = LitRun(PUBLISHED[model], packing, tuning, adam, micro_batch, length, first=True, accumulates=True, before=0)
    assert gigabytes(training_timeline(run)) == pytest.approx(published, rel=0.005)


@pytest.mark.parametrize(("packing", "published"), [(None, 8.58), (NF4, 5.24)])
def test_what_four_bit_layers_kept_outlives_the_micro_step(packing: Packing | None, published: float) -> None:
    tuning = Tuning("lora", 32, frozenset("qv"), 0.05)
    adam: LitOptimizer = "adamw" if packing is None else "paged_adamw"
    shape = PUBLISHED["stablelm-base-alpha-3b"]
    run = LitRun(shape, packing, tuning, adam, 1, 512, first=False, accumulates=True, before=512)
    assert gigabytes(training_timeline(run)) == pytest.approx(published, rel=0.005)


@pytest.mark.parametrize(("packing", "published"), [(None, 2.86), (NF4, 1.39)])
def test_generation_takes_what_lit_gpt_published(packing: Packing | None, published: float) -> None:
    timeline = generation_timeline(PUBLISHED["phi-1.5"], packing, prompt=6, new=50)
    assert gigabytes(timeline) == pytest.approx(published, rel=0.006)


BF16 = ("training.precision=bf16", "method=lora")
ROWS = LongestRows((60, 40), (50, 30), "made up")


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        ((*BF16, "training.gradient_checkpointing=every_layer"), "checkpointing"),
        ((*BF16, "optimizer=lion"), "lion"),
        (("training.precision=fp32", "method=lora"), "fp32"),
        (("training.precision=bf16", "method=dora"), "dora"),
        ((*BF16, "quantization=int8"), "int8"),
    ],
)
def test_what_lit_gpt_does_not_do_is_said(make_trial: MakeTrial, overrides: tuple[str, ...], why: str) -> None:
    with pytest.raises(Unpredictable) as raised:
        predict(make_trial(*overrides), ROWS, device_kind="cuda", style="litgpt")
    assert why in raised.value.reason


@pytest.mark.parametrize(("overrides", "published"), [(("quantization=nf4", "optimizer=paged_adamw"), 14.18)])
def test_the_longest_row_first_gives_the_published_peak(
    make_trial: MakeTrial, overrides: tuple[str, ...], published: float
) -> None:
    """Raschka 2023, QLoRA at rank 8; with such a row at any other place it would be 16.2 GB."""
    trial = make_trial("model=llama2_7b", "setup=raschka_lora", "data.max_length=1304", *overrides)
    rows = LongestRows((1304,) * 128, (1303,) * 128, "made up")
    found = predict(trial, rows, device_kind="cuda", style="litgpt_first")
    assert found.peak_allocated_bytes / 1e9 == pytest.approx(published, rel=0.01)


def test_labels_give_the_loss_of_our_own_forward(make_trial: MakeTrial, shared: Path) -> None:
    trial = make_trial()
    base = load_base(trial.model, precision="fp32", quantization=trial.quantization, device="cpu", cache=shared).model
    examples = [
        Encoded(tuple(range(5, 5 + n)), tuple(place >= n // 2 for place in range(n)), cut=False, type=None)
        for n in (9, 4)
    ]
    work = [MicroBatch("a", examples)]
    cpu = torch.device("cpu")
    (theirs,) = LabelledForward(base, pad_id=0, device=cpu)(work)
    with loss_token_logits(base) as head:
        (ours,) = Alone(head, pad_id=0, device=cpu)(work)
    torch.testing.assert_close(theirs, ours)


def test_labelled_step_keeps_logits_of_every_token_in_float32(make_trial: MakeTrial) -> None:
    """Beside our own step on the same rows: at least the log-probabilities of the tokens that have no loss."""
    trial = make_trial(*BF16, "model=llama2_7b", "target=[query,value]", "training.micro_batch_size=1")
    rows = LongestRows((1024,), (24,), "made up")
    peaks = {
        style: predict(trial, rows, device_kind="cuda", style=style).peak_allocated_bytes for style in ("own", "hf")
    }
    assert peaks["hf"] - peaks["own"] >= 1000 * 32000 * 4
