"""Held-out loss against transformers' own, its error against textbook forms, exact match against generation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lora_lab.data.batches import collate
from lora_lab.data.encode import Encoded
from lora_lab.errors import EvaluationError
from lora_lab.evaluate.heldout import HeldoutScores, score_heldout
from lora_lab.models.random import random_network
from lora_lab.schema.model import Shape

PAD = 0
SHAPE = Shape(
    family="llama",
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    mlp_size=48,
    vocab_size=64,
    max_positions=64,
    tied_embeddings=False,
)


def _rows(count: int = 12) -> list[Encoded]:
    """Prompts of 3 to 8 tokens, answers of 1 to 4: lengths differ, so padding and token weights matter."""
    generator = torch.Generator().manual_seed(5)
    rows = []
    for index in range(count):
        prompt, answer = 3 + index % 6, 1 + index % 4
        ids = torch.randint(3, 64, (prompt + answer,), generator=generator).tolist()
        mask = (False,) * prompt + (True,) * answer
        rows.append(Encoded(tuple(ids), mask, cut=False))
    return rows


def _trained(rows: list[Encoded]) -> nn.Module:
    """A model that has learned the first half of the rows by heart, so that some rows match and some do not."""
    model = random_network(SHAPE, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch = collate(rows[: len(rows) // 2], PAD, "cpu")
    labels = batch.input_ids.masked_fill(~batch.loss_mask, -100)
    for _ in range(60):
        optimizer.zero_grad()
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss.backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def scored() -> tuple[nn.Module, list[Encoded], HeldoutScores]:
    rows = _rows()
    model = _trained(rows)
    return model, rows, score_heldout(model, rows, pad_id=PAD, batch_size=5, device="cpu")


def _own_losses(model: nn.Module, rows: list[Encoded]) -> list[tuple[float, int]]:
    """(sum of nats, loss tokens) per row, each row alone, by transformers' own loss."""
    pairs = []
    for row in rows:
        ids = torch.tensor([row.input_ids])
        labels = ids.masked_fill(~torch.tensor([row.loss_mask]), -100)
        with torch.no_grad():
            pairs.append((float(model(input_ids=ids, labels=labels).loss) * row.loss_tokens, row.loss_tokens))
    return pairs


def test_loss_is_transformers_loss_weighted_by_tokens(scored: tuple[nn.Module, list[Encoded], HeldoutScores]) -> None:
    model, rows, scores = scored
    pairs = _own_losses(model, rows)
    expected = sum(nats for nats, _ in pairs) / sum(tokens for _, tokens in pairs)
    metric = scores.metrics["heldout/loss"]
    assert metric.value == pytest.approx(expected, rel=1e-5)
    assert (metric.unit, metric.higher_is_better, metric.num_examples) == ("nats/token", False, len(rows))
    for example, (nats, tokens) in zip(scores.examples, pairs, strict=True):
        assert example.loss_tokens == tokens
        assert example.loss_nats == pytest.approx(nats, rel=1e-4, abs=1e-5)
    assert [example.index for example in scores.examples] == list(range(len(rows)))


def test_standard_error_agrees_with_the_jackknife(scored: tuple[nn.Module, list[Encoded], HeldoutScores]) -> None:
    """The jackknife of a ratio and its linearised form agree to first order in 1/m."""
    _, _, scores = scored
    nats = [example.loss_nats for example in scores.examples]
    tokens = [example.loss_tokens for example in scores.examples]
    count = len(nats)
    left_out = [(sum(nats) - nats[i]) / (sum(tokens) - tokens[i]) for i in range(count)]
    mean = sum(left_out) / count
    jackknife = math.sqrt((count - 1) / count * sum((value - mean) ** 2 for value in left_out))
    assert scores.metrics["heldout/loss"].standard_error == pytest.approx(jackknife, rel=0.15)


def test_standard_error_with_equal_lengths_is_that_of_a_mean() -> None:
    rows = [row for row in _rows(24) if row.loss_tokens == 2]
    scores = score_heldout(random_network(SHAPE, seed=1), rows, pad_id=PAD, batch_size=3, device="cpu")
    means = torch.tensor([example.loss_nats / 2 for example in scores.examples])
    expected = float(means.std() / math.sqrt(len(rows)))
    assert scores.metrics["heldout/loss"].standard_error == pytest.approx(expected, rel=1e-5)


def test_exact_match_is_what_greedy_generation_gives(scored: tuple[nn.Module, list[Encoded], HeldoutScores]) -> None:
    model, rows, scores = scored
    model.eval()
    for row, example in zip(rows, scores.examples, strict=True):
        prompt = [token for token, target in zip(row.input_ids, row.loss_mask, strict=True) if not target]
        answer = list(row.input_ids[len(prompt) :])
        generated = model.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=len(answer),
            min_new_tokens=len(answer),
            pad_token_id=PAD,
            eos_token_id=None,
        )[0, len(prompt) :].tolist()
        assert example.exact == (generated == answer)
    share = scores.metrics["heldout/exact_match"].value
    assert 0 < share < 1, "the test would prove nothing at either end"
    assert share == sum(example.exact for example in scores.examples) / len(rows)


def test_batch_size_does_not_change_a_score(scored: tuple[nn.Module, list[Encoded], HeldoutScores]) -> None:
    model, rows, scores = scored
    alone = score_heldout(model, rows, pad_id=PAD, batch_size=1, device="cpu")
    assert alone.metrics["heldout/loss"].value == pytest.approx(scores.metrics["heldout/loss"].value, rel=1e-5)
    assert [one.exact for one in alone.examples] == [one.exact for one in scores.examples]


def test_cut_rows_do_not_count_as_matches() -> None:
    rows = [Encoded(row.input_ids, row.loss_mask, cut=index < 2) for index, row in enumerate(_rows(4))]
    model = random_network(SHAPE, seed=0)
    assert (
        score_heldout(model, rows, pad_id=PAD, batch_size=4, device="cpu").metrics["heldout/exact_match"].num_examples
        == 2
    )
    all_cut = [Encoded(row.input_ids, row.loss_mask, cut=True) for row in rows]
    scores = score_heldout(model, all_cut, pad_id=PAD, batch_size=4, device="cpu")
    assert "heldout/exact_match" not in scores.metrics
    assert "cut" in scores.missing["heldout/exact_match"]


def test_nan_is_an_error_that_names_the_row() -> None:
    model = random_network(SHAPE, seed=0)
    poisoned = 3
    rows = [row for row in _rows(8) if poisoned not in row.input_ids]
    rows.insert(2, Encoded((poisoned, 5, 6), (False, False, True), cut=False))
    with torch.no_grad():
        model.get_input_embeddings().weight[poisoned] = math.nan
    with pytest.raises(EvaluationError, match="heldout row 2: the loss is nan"):
        score_heldout(model, rows, pad_id=PAD, batch_size=2, device="cpu")


def test_training_flags_are_left_as_they_were() -> None:
    model = random_network(SHAPE, seed=0).train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    score_heldout(model, _rows(2), pad_id=PAD, batch_size=2, device="cpu")
    assert [module.training for module in model.modules()] == before
