"""The door to lm-eval: local tasks, what it writes, what it leaves alone, what it refuses to score."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as functional

from lora_lab.data.prose import prose_passages, prose_sentences, prose_text
from lora_lab.data.skills import TRAINED, UNSEEN, side_of
from lora_lab.errors import DataError, EvaluationError
from lora_lab.evaluate.harness import Scores, evaluate_model
from lora_lab.evaluate.local_documents import completion_documents, skills_documents
from lora_lab.evaluate.tasks import prepare_tasks
from lora_lab.models.random import byte_tokenizer, random_network
from lora_lab.schema.evaluation import Evaluation, ProseTasks, SkillsTasks
from tests.evaluation_samples import TINY_SHAPE
from tests.evaluation_samples import evaluation as small_evaluation

SHAPE = TINY_SHAPE.model_copy(update={"max_positions": 1024})
LOCAL = ["skills_trained", "skills_unseen", "prose_perplexity", "prose_completion"]


SIZES: dict[str, object] = {
    "bootstrap_iters": 10,
    "skills": {"documents": 12, "seed": 0},
    "prose": {"perplexity_words": 200, "completion_documents": 6, "seed": 0},
}


def evaluation(*tasks: str, **changes: object) -> Evaluation:
    return small_evaluation(*tasks, **{**SIZES, **changes})


def network() -> Any:
    return random_network(SHAPE, seed=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("harness")


@pytest.fixture(scope="module")
def scores(folder: Path) -> Scores:
    tokenizer = byte_tokenizer(SHAPE.max_positions)
    return evaluate_model(network(), tokenizer, evaluation(*LOCAL), cache=folder / "cache", output=folder / "out")


def _samples(folder: Path, task: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out" / f"samples_{task}.jsonl").read_text().splitlines()]


def _log_likelihood(model: Any, context: str, target: str) -> float:
    """Nats of `target` after `context`, by hand: one unpadded row, log-softmax, a sum."""
    ids = torch.tensor([list((context + target).encode())])
    with torch.no_grad():
        logs = functional.log_softmax(model(input_ids=ids).logits[0, :-1].float(), dim=-1)
    picked = logs.gather(1, ids[0, 1:, None])[:, 0]
    return float(picked[-len(target.encode()) :].sum())


def test_choices_are_scored_as_by_hand(folder: Path, scores: Scores) -> None:
    model = network().eval()
    for task in ("skills_unseen", "prose_completion"):
        right = 0
        samples = _samples(folder, task)
        for sample in samples:
            document = sample["doc"]
            text = document.get("start") or f"Question: {document['question']}\nAnswer:"
            by_hand = [_log_likelihood(model, text, f" {choice}") for choice in document["choices"]]
            theirs = [float(response[0][0]) for response in sample["resps"]]
            assert theirs == pytest.approx(by_hand, abs=1e-3)
            right += int(np.argmax(by_hand)) == document["label"]
        metric = scores.metrics[f"{task}/acc"]
        assert metric.value == right / len(samples)
        assert (metric.chance, metric.unit, metric.num_examples) == (0.25, "fraction", len(samples))
        assert metric.standard_error is not None


def test_perplexity_as_by_hand(scores: Scores) -> None:
    model, passages = network().eval(), prose_passages(200, passage_words=128)
    nats = 0.0
    for passage in passages:
        ids = torch.tensor([[257, *passage.encode()]])  # lm-eval puts BOS in front
        with torch.no_grad():
            nats += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
    words = sum(len(passage.split()) for passage in passages)
    size = sum(len(passage.encode()) for passage in passages)
    assert words == 200
    assert scores.metrics["prose_perplexity/bits_per_byte"].value == pytest.approx(nats / size / math.log(2), rel=1e-4)
    assert scores.metrics["prose_perplexity/word_perplexity"].value == pytest.approx(math.exp(nats / words), rel=1e-3)
    assert not scores.metrics["prose_perplexity/bits_per_byte"].higher_is_better


def test_lm_evals_files_are_kept(folder: Path, scores: Scores) -> None:
    results = json.loads((folder / "out" / "results.json").read_text())
    for name, metric in scores.metrics.items():
        task, measure = name.split("/")
        assert results["results"][task][f"{measure},none"] == metric.value
    assert scores.facts["documents"] == {task: len(_samples(folder, task)) for task in LOCAL}
    assert set(scores.facts["task_hashes"]) == set(LOCAL)
    assert (folder / "out" / "lm_eval.log").is_file()
    assert (folder / "cache" / "datasets").is_dir(), "datasets wrote below our cache"


def test_documents_are_balanced_held_out_and_seeded() -> None:
    trained = skills_documents(TRAINED, SkillsTasks(documents=60, seed=3))
    assert [document["skill"] for document in trained].count("gcd") == 60 // len(TRAINED)
    for document in [*trained, *skills_documents(UNSEEN, SkillsTasks(documents=40, seed=3))]:
        assert len(set(document["choices"])) == 4
        assert side_of(document["question"]) == "heldout"
    golds = [document["choices"][document["label"]] for document in trained if document["skill"] == "gcd"]
    assert len(set(golds)) == len(golds), "each answer once before one comes again"
    assert trained == skills_documents(TRAINED, SkillsTasks(documents=60, seed=3))
    assert trained != skills_documents(TRAINED, SkillsTasks(documents=60, seed=4))


def test_a_model_that_does_not_read_scores_chance() -> None:
    """Prefer the answer that is most often right, whatever the question: no better than a quarter."""
    documents = [row for seed in range(6) for row in skills_documents(["gcd"], SkillsTasks(documents=20, seed=seed))]
    # The smaller a number, the more often it is a gcd; drawn without balance this guess would be right in most cases.
    picked = [min(row["choices"], key=int) for row in documents]
    right = [choice == row["choices"][row["label"]] for choice, row in zip(picked, documents, strict=True)]
    assert abs(sum(right) / 120 - 0.25) < 3 * math.sqrt(0.25 * 0.75 / 120)


def test_completions_are_cut_sentences() -> None:
    sentences = set(prose_sentences())
    for document in completion_documents(ProseTasks(perplexity_words=1, completion_documents=20, seed=0)):
        assert f"{document['start']} {document['choices'][document['label']]}" in sentences
        wrong = [choice for index, choice in enumerate(document["choices"]) if index != document["label"]]
        assert all(f"{document['start']} {choice}" not in sentences for choice in wrong)


def test_passages_are_the_start_of_the_text() -> None:
    passages = prose_passages(300, passage_words=128)
    assert [len(passage.split()) for passage in passages] == [128, 128, 44]
    assert prose_text().startswith(passages[0])
    assert prose_text().split()[:300] == " ".join(passages).split()


def test_task_folders_are_named_by_content(folder: Path) -> None:
    first = prepare_tasks(evaluation(*LOCAL), cache=folder / "cache")
    again = prepare_tasks(evaluation(*LOCAL), cache=folder / "cache")
    other = prepare_tasks(evaluation(*LOCAL, skills={"documents": 12, "seed": 9}), cache=folder / "cache")
    assert first == again
    assert first.folders != other.folders
    assert not first.needs_defaults


def test_too_many_documents_name_the_skill() -> None:
    with pytest.raises(DataError, match=r"documents: fraction_simplification has \d+ held-out questions"):
        skills_documents(UNSEEN, SkillsTasks(documents=4000, seed=0))


def test_global_state_is_left_alone(tmp_path: Path, folder: Path) -> None:
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    expected = (random.random(), float(np.random.rand()), float(torch.rand(1)))
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    model, tokenizer = network().train(), byte_tokenizer(SHAPE.max_positions)
    tokenizer.pad_token = None
    evaluate_model(model, tokenizer, evaluation("prose_completion"), cache=folder / "cache", output=tmp_path / "out")
    assert (random.random(), float(np.random.rand()), float(torch.rand(1))) == expected
    assert model.training
    assert tokenizer.pad_token is None, "lm-eval gives a tokenizer a pad token; ours was a copy"


def test_nothing_is_printed(tmp_path: Path, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tokenizer = byte_tokenizer(SHAPE.max_positions)
    evaluate_model(
        network(), tokenizer, evaluation("prose_completion"), cache=folder / "cache", output=tmp_path / "out"
    )
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""


@pytest.mark.parametrize(("task", "value"), [("skills_trained", math.nan), ("prose_perplexity", math.inf)])
def test_a_score_that_is_none_is_an_error(task: str, value: float, tmp_path: Path, folder: Path) -> None:
    """lm-eval would take the NaN for a real answer."""
    model = network()
    with torch.no_grad():
        model.lm_head.weight[10] = value
    with pytest.raises(EvaluationError, match=rf"task {task}, document \d+: a log-likelihood is (nan|-inf|inf)"):
        evaluate_model(
            model,
            byte_tokenizer(SHAPE.max_positions),
            evaluation(task),
            cache=folder / "cache",
            output=tmp_path / "out",
        )


def test_nothing_asked_nothing_scored(tmp_path: Path) -> None:
    scores = evaluate_model(
        network(), byte_tokenizer(64), evaluation(), cache=tmp_path / "cache", output=tmp_path / "out"
    )
    assert scores.metrics == {}
    assert not (tmp_path / "out").exists()


def test_cut_contexts_are_counted(tmp_path: Path, folder: Path) -> None:
    short = random_network(SHAPE.model_copy(update={"max_positions": 96}), seed=0)
    scores = evaluate_model(
        short, byte_tokenizer(96), evaluation("prose_completion"), cache=folder / "cache", output=tmp_path / "out"
    )
    assert scores.facts["truncated_requests"] > 0
