"""`lora-lab eval` and `simple_evaluate(model="lora_lab")`: lm-eval's own numbers, and bad calls refused early."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lm_eval.utils
import pytest
import yaml
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from lora_lab.models.load import model_folder
from tests.conftest import MakeTrial
from tests.journey.program import Lab, call, process_environment, python

TOLERANCE = 1e-4  # nats per request, fp32, up to 100 scored tokens
SUMS = [
    {"sum": f"{a} plus {b} is", "choices": [f" {a + b}", f" {a + b + 1}"], "label": 0} for a in (1, 2) for b in (3, 4)
]
TASKS: dict[str, dict[str, Any]] = {
    "sums": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{sum}}",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
    },
    "sums_text": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{sum}}{{choices[0]}}"},
    "sums_said": {
        "output_type": "generate_until",
        "doc_to_text": "{{sum}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three task files of a user's own on four rows."""
    folder = tmp_path_factory.mktemp("own_tasks")
    rows = folder / "sums.jsonl"
    rows.write_text("".join(f"{json.dumps(row)}\n" for row in SUMS))
    for name, content in TASKS.items():
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(rows)}}, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **data, **content}))
    return folder


@pytest.fixture(scope="module")
def tiny_folder(make_trial: MakeTrial, tiny_cache: Path) -> Path:
    """The tiny random model as a folder."""
    return model_folder(make_trial().model, tiny_cache)


def stock(folder: Path, task_folder: Path, **more: Any) -> Any:
    """lm-eval's own `hf` on the same tasks."""
    return simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), **more},
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(task_folder), include_defaults=False),
        device="cpu",
    )


def scored(folder: Path, *arguments: str) -> dict[str, Any]:
    """What the command wrote below `folder`: results, and samples by task."""
    answer = call("eval", *arguments, "--output_path", str(folder), "--log_samples")
    assert answer.code == 0, answer.err
    (results,) = folder.rglob("results_*.json")
    content: dict[str, Any] = json.loads(results.read_text())
    content["samples"] = {
        name: [json.loads(line) for path in folder.rglob(f"samples_{name}_2*.jsonl") for line in path.open()]
        for name in content["results"]
    }
    return content


def answers(samples: list[dict[str, Any]]) -> list[Any]:
    """First answer of every request, in the order of documents."""
    ordered = sorted(samples, key=lambda sample: int(sample["doc_id"]))
    return [answer[0] for sample in ordered for answer in sample["resps"]]


def numbers(values: list[Any]) -> list[float]:
    """Log-likelihoods of multiple choice [value, is_greedy] and of whole texts."""
    return [float(value[0] if isinstance(value, (list, tuple)) else value) for value in values]


def test_lm_evals_numbers_on_a_task_file_of_ones_own(
    lab: Lab, tiny_folder: Path, task_folder: Path, tmp_path: Path
) -> None:
    arguments = ["--model_args", f"pretrained={tiny_folder}", "--tasks", *TASKS, "--include_path", str(task_folder)]
    ours = scored(tmp_path / "out", *arguments, "--device", "cpu", "--cache", str(lab.cache))
    theirs = stock(tiny_folder, task_folder)
    assert ours["config"]["model"] == "lora_lab"
    for name in ("sums", "sums_text"):
        ours_of, theirs_of = (numbers(answers(one["samples"][name])) for one in (ours, theirs))
        assert ours_of == pytest.approx(theirs_of, abs=TOLERANCE)
        assert len(set(theirs_of)) > 3, "different requests have different answers, so this test can fail"
    assert answers(ours["samples"]["sums_said"]) == answers(theirs["samples"]["sums_said"])
    assert ours["results"]["sums"]["acc,none"] == theirs["results"]["sums"]["acc,none"]
    assert ours["versions"] == theirs["versions"] and ours["n-shot"] == theirs["n-shot"]


def test_simple_evaluate_knows_the_name(tiny_folder: Path, task_folder: Path) -> None:
    arguments = f"pretrained={tiny_folder},engine=stock,chunk_tokens=64"
    manager = TaskManager(include_path=str(task_folder), include_defaults=False)
    ours = simple_evaluate(model="lora_lab", model_args=arguments, tasks=["sums"], task_manager=manager, device="cpu")
    theirs = stock(tiny_folder, task_folder)
    assert numbers(answers(ours["samples"]["sums"])) == numbers(answers(theirs["samples"]["sums"]))


def test_scores_of_a_run_of_the_ledger(lab: Lab, tmp_path: Path) -> None:
    """An adapter of the lab's own kind, on the lab's own task: what the run's own scoring said."""
    assert lab.run("method=bottleneck", "evaluation.tasks=[skills_unseen]", "learning_rate=0.1").code == 0
    record = lab.only()
    assert record.result is not None
    arguments = ["--tasks", "skills_unseen", "--batch_size", "16", "--root", str(lab.root), "--cache", str(lab.cache)]
    adapted = scored(tmp_path / "a", "--model_args", f"pretrained=tiny_random,peft={record.adapter_folder}", *arguments)
    plain = scored(tmp_path / "b", "--model_args", "pretrained=tiny_random", *arguments)
    theirs = [json.loads(line) for line in (record.folder / "eval" / "samples_skills_unseen.jsonl").open()]
    said = numbers(answers(theirs))
    assert numbers(answers(adapted["samples"]["skills_unseen"])) == pytest.approx(said, abs=TOLERANCE)
    assert numbers(answers(plain["samples"]["skills_unseen"])) != pytest.approx(said, abs=0.01)
    assert adapted["results"]["skills_unseen"]["acc,none"] == record.result.metrics["skills_unseen/acc"].value


def test_official_tasks_on_a_mirror(lab: Lab, tmp_path: Path) -> None:
    rows = [
        {
            "premise": f"Number {n} fell",
            "choice1": "It broke",
            "choice2": "It flew",
            "question": "effect",
            "label": n % 2,
        }
        for n in range(3)
    ]
    content = "".join(f"{json.dumps(row)}\n" for row in rows).encode()
    (tmp_path / "copa.jsonl").write_bytes(content)
    line = f"validation,copa.jsonl,{hashlib.sha256(content).hexdigest()},copa"
    (tmp_path / "MANIFEST.csv").write_text(f"split,file,sha256,lm_eval_task\n{line}\n")
    arguments = ["--model_args", "pretrained=tiny_random", "--mirror", str(tmp_path), "--cache", str(lab.cache)]
    for asked in ("copa", "cop[a-b]"):
        ours = scored(tmp_path / asked[:4], *arguments, "--tasks", asked)
        assert ours["n-samples"]["copa"]["original"] == 3
        assert [sample["doc"]["premise"] for sample in ours["samples"]["copa"]] == [row["premise"] for row in rows]
    cached = call("eval", *arguments, "--tasks", "copa", "--cache_requests")
    assert cached.code == 2 and "--cache_requests: lm-eval keeps prompts by the task's name alone" in cached.err
    absent = call("eval", *arguments, "--tasks", "piqa")
    assert absent.code == 2 and "--mirror: the mirror has no rows to score for piqa" in absent.err


def test_config_file_and_a_table_on_standard_output_only(lab: Lab, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("model_args: {pretrained: tiny_random}\ntasks: skills_unseen,prose_completion\nlimit: 2\n")
    before = lm_eval.utils._LOGGING_CONFIGURED
    answer = call("eval", "run", "--config", str(file), "--cache", str(lab.cache))
    assert answer.code == 0, answer.err
    assert "|prose_completion|" in answer.out and "INFO" not in answer.out
    assert "Selected Tasks: ['skills_unseen', 'prose_completion']" in answer.err
    assert before == lm_eval.utils._LOGGING_CONFIGURED
    file.write_text("model: hf\nuse_cache: x\nmodel_args: {pretrained: tiny_random}\ntasks: skills_unseen\n")
    refused = call("eval", "-C", str(file), "--cache", str(lab.cache))
    assert refused.code == 2
    assert f'{file}: the model is "hf"' in refused.err and "engine=stock" in refused.err
    assert "--use_cache: refused" in refused.err
    file.write_text("tusks: skills_unseen\n")
    assert 'no such key "tusks"; did you mean "tasks"?' in call("eval", "-C", str(file)).err


TINY = ("--model_args", "pretrained=tiny_random")
LOCAL = ("--tasks", "skills_unseen")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (LOCAL, "--model_args: pretrained=MODEL is needed"),
        (TINY, "--tasks: at least one is needed"),
        ((*TINY, "--tasks", ","), "--tasks: at least one is needed"),
        ((*TINY, "--tasks", "piqqa"), '--tasks: no such task "piqqa"; did you mean "piqa"?'),
        ((*TINY, "--tasks", "skills_unsen"), 'did you mean "skills_unseen"?'),
        ((*TINY, "--tasks", "zz*", "none.yaml"), '--tasks: no such file: "none.yaml"'),
        ((*TINY, "--tasks", "zz*", "none.yaml"), '--tasks: no task matches "zz*"'),
        ((*LOCAL, "--model_args", "pretrained=./absent"), '--model_args pretrained: no such folder: "absent"'),
        ((*LOCAL, "--model_args", "pretrained=a/b/c"), '--model_args pretrained: no such folder: "a/b/c"'),
        ((*LOCAL, "--model_args", "pretrained=tiny_randon"), 'no model "tiny_randon"; did you mean "tiny_random"?'),
        ((*LOCAL, "--model_args", "pretrained=7"), "--model_args pretrained: expected a folder or a name, got 7"),
        ((*LOCAL, "--model_args", "pretrained"), "expected `key=value`, got 'pretrained'"),
        ((*LOCAL, "--model_args", '{"pretrained": '), 'Invalid JSON: {"pretrained": '),
        ((*LOCAL, *TINY, "peft=./absent"), '--model_args peft: no such folder: "absent"'),
        ((*LOCAL, *TINY, "revision=x"), "--model_args revision: tiny_random is a model of the lab"),
        ((*LOCAL, *TINY, "engine=stok"), '--model_args engine: no such engine "stok"; did you mean "stock"?'),
        ((*LOCAL, *TINY, "chunk_tokens=0"), "--model_args chunk_tokens: expected a whole number >= 1, got 0"),
        ((*LOCAL, *TINY, "chunk_tokens=-8"), "--model_args chunk_tokens: expected a whole number >= 1, got -8.0"),
        ((*LOCAL, *TINY, "chunk_tokens=many"), "--model_args chunk_tokens: expected a whole number >= 1, got 'many'"),
        ((*LOCAL, *TINY, "chunk_token=8"), '--model_args chunk_token: unknown; did you mean "chunk_tokens"?'),
        ((*LOCAL, *TINY, "dtype=float31"), '--model_args dtype: no such dtype "float31"; did you mean "float32"?'),
        ((*LOCAL, *TINY, "batch_size=4"), "--model_args batch_size: is a flag of its own: --batch_size"),
        ((*LOCAL, *TINY, "--model", "hf"), '--model: the model is "hf", but this command scores with lora_lab'),
        ((*LOCAL, *TINY, "--use_cache", "x"), "--use_cache: refused"),
        ((*LOCAL, *TINY, "--batch_size", "big"), "--batch_size: expected a whole number >= 1, auto or auto:N"),
        ((*LOCAL, *TINY, "--limit", "0"), "--limit: must be > 0, got 0.0"),
        ((*LOCAL, *TINY, "--num_fewshot", "-1"), "--num_fewshot: must be a whole number >= 0, got -1"),
        ((*LOCAL, *TINY, "--device", "quantum"), '--device: expected auto, cpu, cuda or cuda:N, got "quantum"'),
        ((*LOCAL, *TINY, "--log_samples"), "Specify --output_path"),
        ((*LOCAL, *TINY, "--mirror", "./absent"), '--mirror: no such folder: "./absent"'),
        ((*LOCAL, *TINY, "--config", "absent.yaml"), "--config: Config file not found"),
        ((*LOCAL, *TINY, "--taskz", "x"), '--taskz: unknown flag; did you mean "--tasks"?'),
    ],
)
def test_bad_calls(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lora_lab.evaluate.command.run.score", lambda *_, **__: pytest.fail("a model would load"))
    answer = call("eval", *arguments, "--cache", str(lab.cache))
    assert (answer.code, answer.out) == (2, "")
    assert said in answer.err


def test_folders_that_are_no_models(lab: Lab, tiny_folder: Path, tmp_path: Path) -> None:
    arguments = [*LOCAL, "--cache", str(lab.cache), "--model_args"]
    (tmp_path / "adapter").mkdir()
    assert f'no config.json in "{tmp_path}"' in call("eval", *arguments, f"pretrained={tmp_path}").err
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    adapter = call("eval", *arguments, f"pretrained={tmp_path / 'adapter'}")
    assert adapter.code == 2 and "it holds an adapter: pretrained=BASE,peft=" in adapter.err
    run = call("eval", *arguments, f"pretrained=tiny_random,peft={tmp_path}")
    assert run.code == 2 and f"did you mean {tmp_path / 'adapter'}?" in run.err
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in tiny_folder.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes()[: 500 if path.suffix == ".safetensors" else None])
    answer = call("eval", *arguments, f"pretrained={damaged}")
    assert answer.code == 2 and "SafetensorError" in answer.err and "Traceback" not in answer.err


def test_the_machines_own_limits(lab: Lab) -> None:
    """Tests run with the hub switched off (tests/conftest.py)."""
    away = call("eval", *LOCAL, "--model_args", "pretrained=org/name", "--cache", str(lab.cache))
    assert away.code == 4 and "the hub was not reached" in away.err
    device = call("eval", *LOCAL, *TINY, "--device", "cuda:99", "--cache", str(lab.cache))
    assert device.code == 4 and "--device: cuda:99" in device.err


def test_help_is_lm_evals_under_our_name_and_needs_no_torch() -> None:
    code = (
        "import sys; from lora_lab.app.cli import main; main(['eval', *sys.argv[1:]]); sys.exit('torch' in sys.modules)"
    )
    for arguments in ((), ("--help",)):
        answer = python(code, *arguments)
        assert answer.code == 0, answer.err
        assert answer.out.startswith("usage: lora-lab eval --model_args")
        assert all(flag in answer.out for flag in ("--num_fewshot", "--system_instruction", "--mirror DIR"))
        assert "lm-eval run" not in answer.out
    assert "lora-lab eval ls tasks" in call("eval", "ls", "--help").out


def test_tasks_are_validated_by_lm_eval(task_folder: Path) -> None:
    answer = call("eval", "validate", "--tasks", "sums,piqa,piqqa", "--include_path", str(task_folder))
    assert answer.code == 2 and "Tasks not found: piqqa\n" in answer.out


def test_a_reader_that_leaves_early_is_no_error(lab: Lab) -> None:
    arguments = f"{' '.join([*LOCAL, *TINY])} --limit 1 --cache '{lab.cache}'"
    command = f"{sys.executable} -m lora_lab.app.cli eval {arguments} | true; exit ${{PIPESTATUS[0]}}"
    environment = {**process_environment(), **{key: os.environ[key] for key in ("HF_HUB_OFFLINE",)}}
    done = subprocess.run(
        ["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


KNOWN = """
from lm_eval.api.registry import get_model, model_registry
get_model("dummy")
assert "hf" in model_registry and len(model_registry) > 30, len(model_registry)
assert "lora_lab" in model_registry
import inspect, sys, lm_eval.api.registry
assert "class Registry" in inspect.getsource(lm_eval.api.registry)
assert not [one for one in sys.meta_path if type(one).__module__ == "lora_lab.after_import" and "lm_eval" in one.name]
"""


@pytest.mark.parametrize(
    "code",
    [
        "import lora_lab.evaluate, sys\nassert 'lm_eval' not in sys.modules and 'torch' not in sys.modules",
        "import lora_lab.evaluate, lm_eval.models",
        "import lm_eval, lora_lab.evaluate",
        "import lm_eval.api.registry, lora_lab.evaluate",
        "import lm_eval.models, lora_lab.evaluate",
        "import lora_lab.evaluate, importlib\nimportlib.reload(lora_lab.evaluate)",
        "import lora_lab.evaluate, importlib, lm_eval.models\nimportlib.reload(lora_lab.evaluate)",
        "import lora_lab.evaluate, importlib.util\nimportlib.util.find_spec('lm_eval.api.registry')",
        "import lora_lab.evaluate.check",
    ],
)
def test_the_name_is_registered_in_every_order_of_import(code: str) -> None:
    answer = python(f"{code}\n{KNOWN}")
    assert answer.code == 0, answer.err


def test_registered_after_the_class_is_loaded_as_well() -> None:
    code = "import lora_lab.evaluate, importlib\nfrom lm_eval.api.registry import get_model\n"
    code += (
        "first = get_model('lora_lab')\nimportlib.reload(lora_lab.evaluate)\nassert get_model('lora_lab') is first\n"
    )
    answer = python(f"{code}from lora_lab.evaluate.lab_model import LabModel\nassert first is LabModel")
    assert answer.code == 0, answer.err
