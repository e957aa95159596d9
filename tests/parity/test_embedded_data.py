"""The embedded data as the embedded model's tokenizer sees it."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lora_lab.data.batches import Batches
from lora_lab.data.encode import encode_rows
from lora_lab.data.sources import load_rows
from lora_lab.models.load import model_folder
from tests.conftest import MakeTrial


@pytest.mark.model
@pytest.mark.parametrize("micro_batch_size", [4, 8])
def test_padding_of_skills_is_below_five_percent(make_trial: MakeTrial, cache: Path, micro_batch_size: int) -> None:
    trial = make_trial("model=smollm2_135m", f"training.micro_batch_size={micro_batch_size}")
    tokenizer = AutoTokenizer.from_pretrained(model_folder(trial.model, cache))
    rows = load_rows(trial.data, cache=cache)
    encoded = encode_rows(rows.train, tokenizer, trial.data, vocab_size=trial.model.shape.vocab_size)
    batches = Batches(
        encoded.lengths,
        batch_size=trial.training.batch_size,
        micro_batch_size=micro_batch_size,
        seed=trial.seeds.data,
        bucket_batches=trial.training.bucket_batches,
    )
    assert max(batches.padding_share(epoch) for epoch in range(5)) < 0.05
    assert encoded.cut_rows == 0
    # The model must learn to stop: the last loss token of every row ends the turn.
    assert {row.input_ids[-1] for row in encoded.examples} == {tokenizer.eos_token_id}
    assert all(row.loss_mask[-1] for row in encoded.examples)


@pytest.mark.model
def test_held_out_prompts_are_never_trained_on(make_trial: MakeTrial, cache: Path) -> None:
    rows = load_rows(make_trial("model=smollm2_135m").data, cache=cache)
    assert not {row.content[0] for row in rows.train} & {row.content[0] for row in rows.heldout}
    assert len(rows.train) == 512
    assert len(rows.heldout) == 32
