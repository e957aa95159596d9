"""Scores and answers behind virtual tokens: lm-eval's requests and generation against the model called by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance

from lora_lab.data.encode import prompt_ids, stop_ids
from lora_lab.data.rows import Row
from lora_lab.errors import InputError
from lora_lab.evaluate.answers import write_answers
from lora_lab.evaluate.checked_model import CheckedModel
from lora_lab.models.generate import generate, generation_inputs
from lora_lab.models.random import byte_tokenizer
from lora_lab.schema.evaluation import SampleAnswers
from tests.parity.test_prompts import FAMILIES, KINDS, N, adapted, by_hand, network
from tests.tiers import mostly_slow

pytestmark = pytest.mark.usefixtures("one_core")

LIMIT = 64 - N
CONTEXTS = {"short": "ab", "middle": "the cat sat on", "cut": "x" * 70 + " tail"}


def prompted(kind: str, family: str) -> Any:
    return adapted(kind, network(family, dtype=torch.float32))


def checked(model: Any, *, batch_size: int = 3) -> CheckedModel:
    return CheckedModel(model, tokenizer=byte_tokenizer(64), batch_size=batch_size)


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, one, index, ("task", index, 1)) for index, one in enumerate(arguments)]


def nats(model: Any, ids: list[int], scored: int) -> float:
    """Log-likelihood of the last `scored` tokens, by hand."""
    with torch.no_grad():
        logs = by_hand(model, torch.tensor(ids[:-1])).double().log_softmax(-1)
    return float(sum(logs[position, ids[position + 1]] for position in range(len(ids) - 1 - scored, len(ids) - 1)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_log_likelihoods(kind: str, family: str) -> None:
    """Batches of unequal rows; one context is longer than what the virtual tokens leave, and is cut by that."""
    model = prompted(kind, family)
    lm = checked(model)
    assert lm.max_length == LIMIT
    pairs = [(context, target) for context in CONTEXTS.values() for target in (" q", " longer answer")]
    answers = lm.loglikelihood(requests("loglikelihood", pairs))
    assert lm.truncated_requests == 2
    for (context, target), (value, _) in zip(pairs, answers, strict=True):
        ids = list((context + target).encode())[-(LIMIT + 1) :]
        assert value == pytest.approx(nats(model, ids, len(target)), abs=1e-5, rel=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", KINDS)
def test_rolling_log_likelihoods(kind: str, family: str) -> None:
    """A text of more than one window, each as long as the virtual tokens leave."""
    model = prompted(kind, family)
    lm = checked(model)
    texts = ["a short one", "".join(chr(97 + index % 26) for index in range(100))]
    values = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,) for text in texts]))
    for text, value in zip(texts, values, strict=True):
        ids = list(text.encode())
        first = nats(model, [257, *ids[:LIMIT]], min(LIMIT, len(ids)))
        # The second window sees as much of the text before it as fits.
        rest = len(ids) - LIMIT
        second = nats(model, ids[-(LIMIT + 1) :], rest) if rest > 0 else 0.0
        assert value == pytest.approx(first + second, abs=1e-5, rel=1e-6)
    assert lm.truncated_requests == 0


def greedy(model: Any, ids: list[int], steps: int) -> list[int]:
    """New tokens, each from a whole forward pass without a cache of rows."""
    row = list(ids)
    for _ in range(steps):
        with torch.no_grad():
            row.append(int(by_hand(model, torch.tensor(row))[-1].argmax()))
    return row[len(ids) :]


@pytest.mark.parametrize("batch_size", mostly_slow([1, 3], keep=[3]))
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_generate_until(kind: str, family: str, batch_size: int) -> None:
    """Rows in a batch get what each would get alone, and a context makes room for the new tokens."""
    model = prompted(kind, family)
    lm = checked(model, batch_size=batch_size)
    settings = {"until": ["\n\n\n"], "max_gen_toks": 12}
    texts = lm.generate_until(requests("generate_until", [(one, settings) for one in CONTEXTS.values()]))
    assert lm.truncated_requests == 1
    for context, text in zip(CONTEXTS.values(), texts, strict=True):
        ids = list(context.encode())[-(LIMIT - 12) :]
        assert text == lm.tok_decode(greedy(model, ids, 12))
    assert len(set(texts)) == 3


def test_generation_that_does_not_fit_is_refused() -> None:
    lm = checked(prompted("prompt", "gpt2"))
    settings = {"until": ["\n"], "max_gen_toks": LIMIT}
    with pytest.raises(AssertionError, match=rf"model's maximum sequence length \({LIMIT}\)"):
        lm.generate_until(requests("generate_until", [("a", settings)]))


def test_a_stop_sequence_ends_the_text() -> None:
    model = prompted("prompt", "llama")
    ids = list(b"the cat sat on")
    text = byte_tokenizer(64).decode(greedy(model, ids, 12), skip_special_tokens=True)
    stop = text[2:4]
    settings = {"until": [stop], "max_gen_toks": 12}
    (answer,) = checked(model).generate_until(requests("generate_until", [("the cat sat on", settings)]))
    assert answer == text[: text.index(stop)]


@pytest.mark.parametrize("kind", KINDS)
def test_disabled_scores_are_the_bases(kind: str) -> None:
    pairs = [("the cat sat on", " q"), ("ab", " longer answer")]
    plain = checked(network("gpt2", dtype=torch.float32)).loglikelihood(requests("loglikelihood", pairs))
    model = prompted(kind, "gpt2")
    with model.disable_adapter():
        lm = checked(model)
        assert lm.max_length == 64
        assert lm.loglikelihood(requests("loglikelihood", pairs)) == plain
    assert lm.max_length == LIMIT
    assert lm.loglikelihood(requests("loglikelihood", pairs)) != plain


def test_virtual_tokens_get_no_logits() -> None:
    model = prompted("prompt", "llama")
    seen: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda _module, _inputs, out: seen.append(out.shape[1]))
    checked(model).loglikelihood(requests("loglikelihood", [("abcd", " q")]))
    assert seen == [5]


def test_no_room_to_score() -> None:
    model = prompted("prompt", "gpt2")
    model.active_peft_config.num_virtual_tokens = 64
    with pytest.raises(InputError, match=r"method.virtual_tokens: must be < 64"):
        checked(model)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_answers_with_a_cache(kind: str, family: str, recwarn: pytest.WarningsRecorder) -> None:
    model, tokenizer = prompted(kind, family).train(), byte_tokenizer(64)
    ids = list(b"the cat")
    never = 10**6
    answer = generate(model, tokenizer, ids, max_new_tokens=20, stop_ids=[never])
    assert model.training
    expected = greedy(model.eval(), ids, 20)
    assert answer.text == tokenizer.decode(expected, skip_special_tokens=True)
    assert not answer.is_complete
    assert not any("osition ids" in str(one.message) for one in recwarn)
    stopped = generate(model, tokenizer, ids, max_new_tokens=20, stop_ids=[expected[4]])
    assert stopped.is_complete
    assert stopped.text == tokenizer.decode(expected[: expected.index(expected[4]) + 1], skip_special_tokens=True)


@pytest.mark.parametrize("kind", KINDS)
def test_right_padding_is_refused_or_the_model_is_right(kind: str) -> None:
    """Only embedded virtual tokens have to be put between padding and row."""
    model = prompted(kind, "llama")
    ids = torch.tensor([[1, 2, 256]])
    mask = torch.tensor([[1, 1, 0]])
    if kind in ("prefix", "projected"):
        with generation_inputs(model, ids, mask) as inputs:
            assert set(inputs) == {"input_ids", "attention_mask"}
        return
    with pytest.raises(ValueError, match="padding must be on the left"), generation_inputs(model, ids, mask):
        pass
    assert model.has_active_enabled_adapter


@pytest.mark.parametrize(("kind", "virtual"), [("prompt", N), ("prefix", N), (None, 0)])
def test_answers_stay_within_the_models_positions(kind: str | None, virtual: int, tmp_path: Path) -> None:
    """GPT-2 has no embedding for a 65th position."""
    model = network("gpt2", dtype=torch.float32) if kind is None else prompted(kind, "gpt2")
    tokenizer, marks = byte_tokenizer(64), 19  # of the chat template around a prompt
    rows = [Row.from_pair("x" * (64 - virtual - marks - left), "y", source="here") for left in (7, 0, -5)]
    ids = prompt_ids(rows[0], tokenizer, "model")
    assert len(ids) + virtual + 7 == 64
    settings = SampleAnswers(rows=3, max_new_tokens=32)
    assert write_answers(model, tokenizer, rows, settings, template="model", output=tmp_path) is None
    (file,) = tmp_path.iterdir()
    first, *others = [json.loads(line) for line in file.read_text().splitlines()]
    stops = stop_ids(tokenizer, "model")
    assert first["answer"] == generate(model, tokenizer, ids, max_new_tokens=7, stop_ids=stops).text
    assert [(line["answer"], line["is_complete"]) for line in others] == [("", False)] * 2


def test_logits_of_a_row_do_not_depend_on_the_batch() -> None:
    model = prompted("prefix", "windowed")
    short, long = ("ab", " q"), ("the cat sat on a mat", " q")
    alone = checked(model).loglikelihood(requests("loglikelihood", [short]))[0][0]
    both = checked(model).loglikelihood(requests("loglikelihood", [long, short]))[1][0]
    assert both == pytest.approx(alone, abs=1e-5)
