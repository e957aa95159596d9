"""Official rows through a mirror folder: our metrics are the numbers of a plain lm-eval call on the same rows."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from lora_lab.errors import IdentityError, InputError
from lora_lab.evaluate.catalogue import official_tasks
from lora_lab.evaluate.check import check_evaluation
from lora_lab.evaluate.harness import SEEDS, evaluate_model
from lora_lab.evaluate.mirror import mirror_identity, read_mirror
from lora_lab.models.random import byte_tokenizer, random_network
from lora_lab.schema.evaluation import Evaluation
from tests.conftest import SHARED_DATA
from tests.evaluation_samples import TINY_SHAPE
from tests.evaluation_samples import evaluation as small_evaluation

pytestmark = pytest.mark.skipif(not SHARED_DATA.is_dir(), reason=f"no mirror of official rows at {SHARED_DATA}")

LIMIT = 4
TASKS = {  # the splits that lm-eval reads: evaluated, and few-shot where the task draws from another one
    "truthfulqa_mc1": {"validation": "truthfulqa/multiple_choice.jsonl"},
    "truthfulqa_mc2": {"validation": "truthfulqa/multiple_choice.jsonl"},
    "blimp_causative": {"train": "blimp/causative.jsonl"},
    "arithmetic_2ds": {"validation": "arithmetic/two_digit_subtraction.jsonl"},
    "mmlu_global_facts": {"test": "mmlu/global_facts_test.jsonl", "dev": "mmlu/global_facts_dev.jsonl"},
    "piqa": {"validation": "piqa/validation.jsonl"},
    "winogrande": {"validation": "winogrande/validation.jsonl"},
    "copa": {"validation": "copa/validation.jsonl"},
    "arc_easy": {"test": "arc/ARC-Easy_test.jsonl", "train": "arc/ARC-Easy_train.jsonl"},
    "openbookqa": {"test": "openbookqa/test.jsonl"},
    "boolq": {"validation": "boolq/validation.jsonl"},
    "rte": {"validation": "glue_rte/validation.jsonl"},
}


def evaluation(tasks: list[str], **changes: object) -> Evaluation:
    values = {"limit": LIMIT, "bootstrap_iters": 10, "mirror": str(SHARED_DATA)}
    return small_evaluation(*tasks, **{**values, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mirror")


@pytest.fixture(scope="module")
def ours(folder: Path) -> Any:
    model, tokenizer = random_network(TINY_SHAPE, seed=0), byte_tokenizer(TINY_SHAPE.max_positions)
    return evaluate_model(model, tokenizer, evaluation(list(TASKS)), cache=folder / "cache", output=folder / "out")


@pytest.fixture(scope="module")
def theirs(folder: Path) -> dict[str, Any]:
    """A plain HFLM call on task files written by hand after design.md's recipe, not by our code."""
    catalogue = official_tasks(folder / "cache")
    include = folder / "by_hand"
    include.mkdir()
    for task, splits in TASKS.items():
        config: dict[str, Any] = {
            "include": catalogue[task].path,
            "task": task,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {split: [str(SHARED_DATA / name)] for split, name in splits.items()}},
        }
        for key in ("training_split", "validation_split", "test_split"):
            official = catalogue[task].splits[key]
            if official is not None and official not in splits:
                config[key] = None
        (include / f"{task}.yaml").write_text(yaml.safe_dump(config))
    model, tokenizer = random_network(TINY_SHAPE, seed=0), byte_tokenizer(TINY_SHAPE.max_positions)
    results = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8),
        tasks=list(TASKS),
        limit=LIMIT,
        bootstrap_iters=10,
        task_manager=TaskManager(include_path=str(include), include_defaults=False),
        **SEEDS,
    )
    return dict(results)


@pytest.mark.parametrize("task", list(TASKS))
def test_metrics_equal_lm_evals_own(task: str, ours: Any, theirs: dict[str, Any], folder: Path) -> None:
    values = theirs["results"][task]
    compared = 0
    for key, value in values.items():
        measure, comma, _ = key.partition(",")
        if not comma or measure.endswith("_stderr"):
            continue
        metric = ours.metrics[f"{task}/{measure}"]
        assert metric.value == value
        assert metric.standard_error == pytest.approx(values[f"{measure}_stderr,none"])
        assert metric.num_examples == LIMIT
        compared += 1
    assert compared
    assert ours.facts["task_versions"][task] == theirs["versions"][task]
    lines = (folder / "out" / f"samples_{task}.jsonl").read_text().splitlines()
    own = [json.loads(line)["resps"] for line in lines]
    expected = json.loads(json.dumps([sample["resps"] for sample in theirs["samples"][task]]))
    # Log-likelihoods and whether the answer is the greedy one; the last bit of the former differs with the processor.
    assert [_flat(one) for one in own] == [pytest.approx(_flat(one), rel=1e-6) for one in expected]


def _flat(nested: Any) -> list[Any]:
    return [leaf for one in nested for leaf in _flat(one)] if isinstance(nested, list) else [nested]


def test_chance_of_official_multiple_choice(ours: Any) -> None:
    assert ours.metrics["piqa/acc"].chance == 0.5
    assert ours.metrics["mmlu_global_facts/acc"].chance == 0.25
    assert ours.metrics["truthfulqa_mc2/acc"].chance is None, "a share of probability, not a choice"
    assert ours.metrics["arithmetic_2ds/acc"].chance is None


def test_a_group_is_made_of_its_members(folder: Path) -> None:
    model, tokenizer = random_network(TINY_SHAPE, seed=0), byte_tokenizer(TINY_SHAPE.max_positions)
    asked = evaluation(["mmlu_other"], limit=1, bootstrap_iters=0)
    scores = evaluate_model(model, tokenizer, asked, cache=folder / "cache", output=folder / "group")
    members = [name for name in scores.metrics if name.startswith("mmlu_") and name != "mmlu_other/acc"]
    assert "mmlu_global_facts/acc" in members
    mean = sum(scores.metrics[name].value for name in members) / len(members)
    assert scores.metrics["mmlu_other/acc"].value == pytest.approx(mean)


def test_a_changed_file_is_refused(tmp_path: Path, folder: Path) -> None:
    row = next(row for row in csv.DictReader((SHARED_DATA / "MANIFEST.csv").open()) if row["lm_eval_task"] == "copa")
    (tmp_path / "copa").mkdir()
    (tmp_path / row["file"]).write_text((SHARED_DATA / row["file"]).read_text().replace("The", "the", 1))
    with (tmp_path / "MANIFEST.csv").open("w") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(row))
        writer.writeheader()
        writer.writerow(row)
    model, tokenizer = random_network(TINY_SHAPE, seed=0), byte_tokenizer(TINY_SHAPE.max_positions)
    asked = evaluation(["copa"], mirror=str(tmp_path))
    with pytest.raises(IdentityError, match=r"validation\.jsonl: SHA-256"):
        evaluate_model(model, tokenizer, asked, cache=folder / "cache", output=tmp_path / "out")


def test_a_task_without_rows_is_named(folder: Path) -> None:
    with pytest.raises(InputError, match="no rows to score for hellaswag"):
        check_evaluation(evaluation(["hellaswag", "piqa"]), cache=folder / "cache")


def test_identity_follows_the_files_that_are_read(folder: Path) -> None:
    mirror, catalogue = read_mirror(str(SHARED_DATA)), official_tasks(folder / "cache")
    piqa = mirror_identity(mirror, catalogue, ["piqa"])
    assert piqa == mirror_identity(mirror, catalogue, ["piqa"])
    assert piqa != mirror_identity(mirror, catalogue, ["piqa", "copa"])
