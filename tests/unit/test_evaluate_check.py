"""Evaluations that cannot be: found before a model loads, without torch and without lm-eval."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_lab.errors import InputError
from lora_lab.evaluate.catalogue import leaves, official_tasks
from lora_lab.evaluate.check import LOCAL_TASKS, check_evaluation, locate_tasks
from lora_lab.schema.evaluation import Evaluation
from tests.evaluation_samples import evaluation

PLAIN_TASK = """
task: my_task
dataset_path: json
dataset_kwargs: {data_files: {test: [rows.jsonl]}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: label
metric_list: [{metric: acc}]
"""


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def refusal(asked: Evaluation, kept: Path) -> str:
    with pytest.raises(InputError) as caught:
        check_evaluation(asked, cache=kept)
    return str(caught.value)


def test_local_tasks_are_fine_and_need_no_catalogue(tmp_path: Path) -> None:
    check_evaluation(evaluation(*LOCAL_TASKS), cache=tmp_path)
    assert not list(tmp_path.iterdir())


def test_nothing_to_score_is_allowed(kept: Path) -> None:
    check_evaluation(evaluation(), cache=kept)


def test_unknown_names_are_answered_with_the_nearest(kept: Path) -> None:
    text = refusal(evaluation("skill_trained", "blimp_causativ", "mmlu_global_facts"), kept)
    assert 'no such task "skill_trained"; did you mean "skills_trained"?' in text
    assert 'no such task "blimp_causativ"; did you mean "blimp_causative"?' in text
    assert "mmlu_global_facts" not in text
    assert len(text) < 1000, "15,000 names are not listed"


def test_a_task_given_twice(kept: Path) -> None:
    assert '"piqa" is given twice' in refusal(evaluation("piqa", "piqa"), kept)


@pytest.mark.parametrize("task", ["humaneval", "mbpp", "humaneval_plus", "cruxeval_input"])
def test_tasks_that_run_code_are_refused(task: str, kept: Path) -> None:
    assert f"{task} runs code that the model wrote" in refusal(evaluation(task), kept)


def test_few_shot_that_a_task_would_ignore(kept: Path) -> None:
    text = refusal(evaluation("truthfulqa_mc1", "mmlu_global_facts", "skills_trained", num_fewshot=3), kept)
    assert "got 3, but these tasks are defined without examples: skills_trained, truthfulqa_mc1" in text
    check_evaluation(evaluation("mmlu_global_facts", num_fewshot=3), cache=kept)


def test_more_prose_than_there_is(kept: Path) -> None:
    prose = {"perplexity_words": 10**7, "completion_documents": 10**5, "seed": 0}
    text = refusal(evaluation("prose_perplexity", "prose_completion", prose=prose), kept)
    assert "the text has" in text
    assert "usable sentences" in text


def test_groups_and_tags_stand_for_their_members(kept: Path) -> None:
    catalogue = official_tasks(kept)
    tasks, groups = leaves(catalogue, "mmlu")
    assert len(tasks) == 57
    assert groups == ["mmlu", "mmlu_stem", "mmlu_other", "mmlu_social_sciences", "mmlu_humanities"]
    assert leaves(catalogue, "ai2_arc") == (["arc_challenge", "arc_easy"], [])


def test_the_catalogue_is_kept_and_a_damaged_one_is_read_again(tmp_path: Path) -> None:
    first = official_tasks(tmp_path)
    (store,) = (tmp_path / "lm_eval_tasks").iterdir()
    assert official_tasks(tmp_path) == first
    store.write_text(store.read_text()[:1000])
    assert official_tasks(tmp_path) == first


def test_checking_imports_neither_torch_nor_lm_eval(kept: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from tests.unit.test_evaluate_check import evaluation\n"
        "from lora_lab.evaluate.check import check_evaluation\n"
        f"check_evaluation(evaluation('piqa', 'skills_unseen'), cache=Path({str(kept)!r}))\n"
        "print([name for name in ('torch', 'lm_eval', 'transformers', 'reasoning_gym') if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "[]"


def test_mirror_folders_that_are_none(tmp_path: Path, kept: Path) -> None:
    assert "no such folder" in refusal(evaluation("piqa", mirror=str(tmp_path / "absent")), kept)
    assert "the folder has no MANIFEST.csv" in refusal(evaluation("piqa", mirror=str(tmp_path)), kept)
    (tmp_path / "MANIFEST.csv").write_text("split,file\n")
    assert "columns missing: sha256, lm_eval_task" in refusal(evaluation("piqa", mirror=str(tmp_path)), kept)
    (tmp_path / "MANIFEST.csv").write_text("split,file,sha256,lm_eval_task\nvalidation,../piqa.jsonl,0,piqa\n")
    assert "outside the mirror folder" in refusal(evaluation("piqa", mirror=str(tmp_path)), kept)


def test_own_task_files_of_plain_values_are_found(tmp_path: Path, kept: Path) -> None:
    (tmp_path / "one.yaml").write_text(PLAIN_TASK)
    (tmp_path / "two.yaml").write_text("include: one.yaml\ntask: my_second\n")
    asked = evaluation("my_task", "my_second", include_path=str(tmp_path))
    check_evaluation(asked, cache=kept)
    assert locate_tasks(asked, cache=kept).user == ("my_task", "my_second")


@pytest.mark.parametrize(
    ("addition", "reason"),
    [
        ("process_docs: !function evil.run\n", "the tag !function is refused"),
        ("class: evil.Task\n", 'the key "class" is refused'),
        ("unsafe_code: true\n", 'the key "unsafe_code" is refused'),
        ("x: !!python/object/apply:os.system ['true']\n", "could not determine a constructor"),
        ("include: ../outside.yaml\n", "is not a file inside"),
        ("metric_list: [{metric: code_eval, hf_evaluate: true}]\n", "scripts from a hub are refused"),
        ("dataset_kwargs: {trust_remote_code: true}\n", "code that comes with a data set is never run"),
        ("doc_to_text: \"{{ ''.__class__.__mro__ }}\"\n", "a template may not use names like __class__"),
        ("task: piqa\n", '"piqa" is already the name of a task'),
    ],
)
def test_own_task_files_that_hold_code_are_refused(addition: str, reason: str, tmp_path: Path, kept: Path) -> None:
    folder = tmp_path / "tasks"
    folder.mkdir()
    (tmp_path / "outside.yaml").write_text("x: 1\n")
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')\n")
    (folder / "evil.py").write_text("raise SystemExit('ran')\n")
    key = addition.split(":")[0]
    kept_lines = [line for line in PLAIN_TASK.splitlines() if not line.startswith(f"{key}:")]
    (folder / "task.yaml").write_text("\n".join(kept_lines) + "\n" + addition)
    text = refusal(evaluation("my_task", include_path=str(folder)), kept)
    assert reason in text
    assert "task.yaml" in text


def test_every_bad_file_is_named(tmp_path: Path, kept: Path) -> None:
    (tmp_path / "a.yaml").write_text(PLAIN_TASK + "x: !function a.b\n")
    (tmp_path / "b.yaml").write_text("- 1\n")
    text = refusal(evaluation("my_task", include_path=str(tmp_path)), kept)
    assert "a.yaml:11" in text
    assert "b.yaml: expected a mapping" in text
