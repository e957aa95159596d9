"""`fetch`, then no network at all: the doctor finds what was fetched, and a run goes through."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_lab.app.part_checks import look
from lora_lab.errors import IdentityError
from lora_lab.models.random import byte_tokenizer, random_network
from tests.evaluation_samples import TINY_SHAPE
from tests.fake_hub import COMMIT, FakeHub, fake_hub
from tests.journey.program import CHECKOUT, TINY, Answer, Lab, call, process_environment

_ROWS = [{"question": f"What is {n}?", "answer": f"It is {n}."} for n in range(40)]
_DOCUMENTS = [{"start": f"after {n}", "choices": ["more", "less"], "label": n % 2} for n in range(6)]
_CARD = "---\nconfigs:\n- config_name: main\n  data_files:\n  - split: train\n    path: train.jsonl\n---\n"


def program(*arguments: str, home: Path, network: bool = True, **variables: str) -> Answer:
    """The program as a process with a hub cache of its own; without a network also in a namespace that has none,
    where the system lets us make one."""
    command = [sys.executable, "-m", "lora_lab.app.cli", *arguments]
    if not network:
        variables |= {"HF_HUB_OFFLINE": "1"}
        command = [*_without_network(), *command]
    environment = process_environment(HF_HOME=str(home), **variables)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        if name not in variables:
            environment.pop(name, None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    return Answer(done.returncode, done.stdout, done.stderr)


def _without_network() -> list[str]:
    for prefix in (["unshare", "-n"], ["unshare", "-r", "-n"]):
        if (
            shutil.which("unshare")
            and not subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode
        ):
            return prefix
    return []


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    """A hub with a model, a data set and the rows of a task."""
    model, data, task = (tmp_path / "hub" / name for name in ("model", "data", "task"))
    random_network(TINY_SHAPE, seed=0).save_pretrained(model)
    byte_tokenizer(TINY_SHAPE.max_positions).save_pretrained(model)
    for folder, rows in ((data, _ROWS), (task, _DOCUMENTS)):
        folder.mkdir()
        (folder / "README.md").write_text(_CARD)
        (folder / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with fake_hub({"models/org/tiny": model, "datasets/openai/gsm8k": data, "datasets/org/rows": task}) as hub:
        yield hub


@pytest.fixture
def asked(tmp_path: Path) -> list[str]:
    """A trial on that model, data and task."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    task = {
        "task": "mine",
        "dataset_path": "org/rows",
        "dataset_name": "main",
        "test_split": "train",
        "output_type": "multiple_choice",
        "doc_to_text": "start",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
    }
    (folder / "mine.yaml").write_text(json.dumps(task))  # JSON is YAML
    return [
        "model=org/tiny",
        "data=gsm8k",
        "data.heldout_size=4",
        f"data.revision={COMMIT}",
        "data.template=alpaca",
        "evaluation.tasks=[mine,prose_completion]",
        f"evaluation.include_path='{folder}'",
    ]


def test_what_was_fetched_is_enough_without_a_network(hub: FakeHub, asked: list[str], tmp_path: Path) -> None:
    home, cache = tmp_path / "home", tmp_path / "lab" / "cache"
    places = {"home": home, "HF_ENDPOINT": hub.address}
    own = [*asked, f"root='{tmp_path / 'lab'}'"]

    fetched = program("fetch", *own, "--json", **places)
    assert fetched.code == 0, fetched.out + fetched.err
    items = {item["name"]: item for item in fetched.json()["items"]}
    assert {name: item["state"] for name, item in items.items()} == {
        "org/tiny": "fetched",
        "gsm8k": "fetched",
        "mine": "fetched",
        "prose_completion": "nothing to fetch",
    }
    for name, folder in (("org/tiny", home / "hub"), ("gsm8k", cache / "datasets"), ("mine", cache / "datasets")):
        path = Path(items[name]["path"])
        assert path.is_relative_to(folder)
        assert items[name]["bytes"] == sum(file.stat().st_size for file in path.iterdir() if _is_content(name, file))
    assert fetched.json()["total_bytes"] == sum(items[name]["bytes"] for name in ("org/tiny", "gsm8k", "mine"))

    count = len(hub.requests)
    again = program("fetch", *own, "--json", **places)
    assert [item["state"] for item in again.json()["items"]] == ["already there"] * 3 + ["nothing to fetch"]
    assert again.json()["fetched_bytes"] == 0
    assert len(hub.requests) == count, "what is there is not asked for again"

    after = program("doctor", *own, home=home, network=False)
    assert after.code == 0, after.out
    assert "missing" not in after.out
    data = yaml.safe_load((CHECKOUT / "conf" / "data" / "gsm8k.yaml").read_text()) | {"heldout_size": 4}
    with pytest.raises(IdentityError, match=f"revision {COMMIT} is in the cache, not {'b2' * 20}"):
        look("data", json.dumps(data | {"revision": "b2" * 20}), str(cache))

    given = {line.partition("=")[0] for line in own} | {"data.train_size"}  # of generated rows only
    rest = [f"{key}={value}" for key, value in TINY.items() if key not in given]
    run = program("run", *own, *rest, "--json", home=home, network=False)
    assert run.code == 0, run.err
    (row,) = run.json()["rows"]
    assert {"mine/acc", "prose_completion/acc", "heldout/loss"} <= set(row["metrics"])


def _is_content(name: str, file: Path) -> bool:
    """A task's size is that of its rows; a folder of a data set holds what `datasets` notes about it as well."""
    return file.is_file() and (name != "mine" or file.suffix == ".arrow")


def test_a_model_without_its_weights_is_not_had(hub: FakeHub, tmp_path: Path) -> None:
    (hub.repositories["models/org/tiny"] / "model.safetensors").unlink()
    answer = program(
        "fetch", "org/tiny", "data:skills", "--cache", str(tmp_path), home=tmp_path, HF_ENDPOINT=hub.address
    )
    assert answer.code == 2
    assert "model org/tiny: missing:" in answer.out and "model.safetensors not found" in answer.out
    assert "data skills: nothing to fetch" in answer.out
    assert answer.out.splitlines()[-1] == "still missing: model:org/tiny"


def test_a_hub_out_of_reach_keeps_nothing_else_from_being_fetched(tmp_path: Path) -> None:
    names = ["org/tiny", "data:gsm8k", "model:tiny_random", "task:prose_completion"]
    answer = call("fetch", *names, "--cache", str(tmp_path / "cache"), "--json")
    assert answer.code == 4
    found: dict[str, Any] = answer.json()
    assert [item["state"] for item in found["items"]] == ["missing", "missing", "nothing to fetch", "nothing to fetch"]
    assert found["missing"] == ["model:org/tiny", "data:gsm8k"]
    assert found["total_bytes"] == 0
    assert all(item["bytes"] is None for item in found["items"])


@pytest.mark.slow
@pytest.mark.model
def test_first_look_needs_no_network(lab: Lab, cache: Path, tmp_path: Path) -> None:
    if not list((cache / "models").glob("smollm2_135m-*/manifest.json")):
        pytest.skip(f"no converted model under {cache}; `lora-lab fetch` makes it")
    if not _without_network():
        pytest.skip("this system makes no namespace without a network")
    places = ["--root", str(lab.root), "--cache", str(cache)]
    fetched = program("fetch", *places, "--json", home=tmp_path, network=False)
    assert fetched.code == 0, fetched.out + fetched.err
    assert [item["state"] for item in fetched.json()["items"]] == ["already there"]
    doctor = program("doctor", "--study", "first_look", *places, home=tmp_path, network=False)
    assert doctor.code == 0, doctor.out
    tasks = "evaluation.tasks=[skills_unseen,prose_completion]"
    run = program("run", *lab.tiny(tasks), "--json", home=tmp_path, network=False)
    assert run.code == 0, run.err
    (row,) = run.json()["rows"]
    assert {"skills_unseen/acc", "prose_completion/acc"} <= set(row["metrics"])
