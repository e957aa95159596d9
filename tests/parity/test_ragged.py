"""Rows laid end to end against each row alone, on many architectures, and copies of a model over the same tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lora_lab.adapters.attach import attach
from lora_lab.models.ragged import RaggedModel, ragged_rows, why_not_ragged
from lora_lab.models.shared_copy import shared_copy
from tests.conftest import MakeTrial
from tests.contract.test_every_method import load
from tests.tree_families import INVALID, VALID, WINDOWED, tiny_model

pytestmark = pytest.mark.usefixtures("one_core")

# Of the families that a tree can score, those whose attention is not reached through transformers' interface, or is
# more than `sdpa` computes (a soft cap, sinks).
APART = ("gptj", "falcon_rotary", "gemma2", "gpt_oss")


@pytest.mark.parametrize("family", [name for name in VALID if name not in APART])
@torch.no_grad()
def test_each_row_is_what_it_is_alone(family: str) -> None:
    model = tiny_model(*VALID[family])
    assert why_not_ragged(model, longest=30) is None
    generator = torch.Generator().manual_seed(1)
    lengths = [23, 4, 11, 30, 1]
    rows = [torch.randint(300, (1, length), generator=generator) for length in lengths]
    ragged = RaggedModel(shared_copy(model))
    together = ragged(torch.cat(rows, dim=1), ragged_rows(lengths, "cpu")).logits.squeeze(0)
    for row, own in zip(rows, together.split(lengths), strict=True):
        expected = model(input_ids=row, use_cache=False).logits.squeeze(0)
        assert float((own - expected).abs().max()) < 1e-4 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("family", [*APART, *INVALID])
def test_what_would_be_another_model_is_found(family: str) -> None:
    kind, settings = VALID[family] if family in VALID else INVALID[family]
    why = why_not_ragged(tiny_model(kind, settings), longest=30)
    assert why is not None and ("end to end" in why), why


@pytest.mark.parametrize("family", WINDOWED)
def test_rows_longer_than_a_window_are_refused(family: str) -> None:
    model = tiny_model(*VALID[family])
    why = why_not_ragged(model, longest=65)
    assert why == f"its {WINDOWED[family]} of 64 is shorter than the longest row (65 tokens)"


def test_the_probe_leaves_the_model_as_it_was() -> None:
    model = tiny_model(*VALID["llama"]).train()
    state = torch.get_rng_state()
    implementation = model.config._attn_implementation
    assert why_not_ragged(model, longest=30) is None
    assert model.training and model.config._attn_implementation == implementation
    assert torch.equal(torch.get_rng_state(), state)


def test_padding_and_back() -> None:
    rows = ragged_rows([3, 1, 2], "cpu")
    flat = torch.arange(12.0).view(6, 2)
    padded = rows.padded(flat)
    assert padded.tolist() == [
        [[0, 1], [2, 3], [4, 5]],
        [[6, 7], [0, 0], [0, 0]],
        [[8, 9], [10, 11], [0, 0]],
    ]
    assert torch.equal(rows.flat(padded), flat)
    assert rows.position_ids.tolist() == [[0, 1, 2, 0, 0, 1]]


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
@pytest.mark.parametrize("tied", [False, True])
def test_copies_share_tensors_and_nothing_else(
    make_trial: MakeTrial, cache: Path, quantization: str, tied: bool
) -> None:
    trial = make_trial(f"quantization={quantization}", f"model.shape.tied_embeddings={str(tied).lower()}")
    base = load(trial, cache).model
    names = {name: id(one) for name, one in base.named_parameters(remove_duplicate=False)}
    modules = dict(base.named_modules())
    ids = torch.arange(20).reshape(2, 10)
    before = base(input_ids=ids).logits
    copied = shared_copy(base)
    assert {name: id(one) for name, one in copied.named_parameters(remove_duplicate=False)} == names
    assert (copied.get_output_embeddings().weight is copied.get_input_embeddings().weight) == tied
    assert torch.equal(copied(input_ids=ids).logits, before)
    attach(copied, trial)
    copied.config.use_cache = True
    assert dict(base.named_modules()) == modules and base.config.use_cache is False
    assert torch.equal(base(input_ids=ids).logits, before)
