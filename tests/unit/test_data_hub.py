"""Hub data sets: columns of the published sets' true shapes, a local folder in place of the hub, and failures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import LocalEntryNotFoundError

from lora_lab.data.hub import load_hub
from lora_lab.data.rows import Row
from lora_lab.errors import DataError, InputError, MachineError
from lora_lab.schema.data import HubData

CONF = Path(__file__).resolve().parents[2] / "conf" / "data"

# Hand-made rows in the columns and nesting of the data sets on the hub.
SHAPES: dict[str, dict[str, Any]] = {
    "alpaca_cleaned": {"output": "3", "input": "1 2", "instruction": "Add."},
    "alpaca_gpt4": {"instruction": "Add.", "input": "", "output": "3", "text": "Below is ... 3"},
    "lima": {"conversations": ["Why?", "Because.", "Really?", "Yes.", "Hm."], "source": "multi_turn"},
    "gsm8k": {"question": "1 + 2?", "answer": "1 + 2 = <<1+2=3>>3\n#### 3"},
    "pubmedqa": {
        "pubid": 1,
        "question": "Does it?",
        "context": {"contexts": ["AIM one.", "RESULT two."], "labels": ["A", "B"], "meshes": ["M"]},
        "long_answer": "It does.",
        "final_decision": "yes",
    },
    "dolly": {"instruction": "Add.", "context": "1 2", "response": "3", "category": "open_qa"},
    "openwebmath": {"url": "u", "text": "Let $x$ be.", "date": "d", "metadata": "{}"},
}
EXPECTED = {
    "alpaca_cleaned": (("user", "Add.\n\n1 2"), ("assistant", "3")),
    "alpaca_gpt4": (("user", "Add."), ("assistant", "3")),
    "lima": (("user", "Why?"), ("assistant", "Because."), ("user", "Really?"), ("assistant", "Yes.")),
    "gsm8k": (("user", "1 + 2?"), ("assistant", "1 + 2 = <<1+2=3>>3\n#### 3")),
    "pubmedqa": (("user", "Does it?\n\nAIM one.\nRESULT two."), ("assistant", "yes")),
    "dolly": (("user", "Add.\n\n1 2"), ("assistant", "3")),
    "openwebmath": (("text", "Let $x$ be."),),
}


def leaf(name: str, **changes: object) -> HubData:
    values = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    return HubData.model_validate({**values, "heldout_size": 1, **changes})


def stub(monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []

    def load_dataset(path: str, **kwargs: Any) -> datasets.Dataset:
        calls.append({"path": path, **kwargs})
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def differing(example: dict[str, Any]) -> dict[str, Any]:
    """The example with another text in every place, nesting kept."""

    def change(value: Any) -> Any:
        if isinstance(value, str):
            return value + " other"
        if isinstance(value, list):
            return [change(entry) for entry in value]
        return {key: change(entry) for key, entry in value.items()} if isinstance(value, dict) else value

    return {key: change(value) for key, value in example.items()}


def test_every_hub_leaf_is_covered() -> None:
    leaves = {path.stem for path in CONF.glob("*.yaml") if yaml.safe_load(path.read_text()).get("kind") == "hub"}
    assert leaves == set(SHAPES) == set(EXPECTED)


@pytest.mark.parametrize("name", SHAPES)
def test_published_shapes_become_rows(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data = leaf(name)
    calls = stub(monkeypatch, [SHAPES[name], differing(SHAPES[name])])
    rows = load_hub(data, cache=tmp_path)
    by_source = {row.source: row for row in [*rows.train, *rows.heldout]}
    assert by_source[f"{data.repo}:{data.split}:0"].content == EXPECTED[name]
    assert calls == [
        {
            "path": data.repo,
            "name": data.config,
            "split": data.split,
            "revision": data.revision,
            "cache_dir": str(tmp_path / "datasets"),
        }
    ]


def test_local_folder_stands_in_for_the_hub(tmp_path: Path) -> None:
    folder = tmp_path / "gsm8k"
    folder.mkdir()
    lines = [json.dumps({"question": f"q{index}", "answer": f"a{index}"}) for index in range(6)]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    rows = load_hub(leaf("gsm8k", repo=str(folder), config=None, heldout_size=2), cache=tmp_path / "cache")
    assert len(rows.train) == 4 and len(rows.heldout) == 2
    parquet = tmp_path / "parquet"
    parquet.mkdir()
    datasets.Dataset.from_list([SHAPES["pubmedqa"], differing(SHAPES["pubmedqa"])]).to_parquet(
        str(parquet / "train-00000-of-00001.parquet")
    )
    again = load_hub(leaf("pubmedqa", repo=str(parquet), config=None), cache=tmp_path / "cache")
    assert EXPECTED["pubmedqa"] in [row.content for row in [*again.train, *again.heldout]]


def test_missing_local_folder_and_damaged_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be loaded"):
        load_hub(leaf("gsm8k", repo=str(tmp_path / "nowhere"), config=None), cache=tmp_path)
    folder = tmp_path / "fake"
    folder.mkdir()
    (folder / "train.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(DataError, match=r"fake: cannot be loaded \("):
        load_hub(leaf("gsm8k", repo=str(folder), config=None), cache=tmp_path / "cache")


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub (OfflineModeIsEnabled)"),
        TimeoutError("timed out"),
        LocalEntryNotFoundError("not in the cache"),
        OSError(28, "No space left on device"),
    ],
)
def test_network_and_disk_failures_are_the_machines(
    error: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(datasets, "load_dataset", raising(error))
    with pytest.raises(MachineError, match=r"give data\.repo=FOLDER, or use data=jsonl data\.path=FILE") as raised:
        load_hub(leaf("gsm8k"), cache=tmp_path)
    assert raised.value.exit_code == 4 and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "error",
    [
        DatasetNotFoundError("Dataset 'openai/gsm9k' doesn't exist on the Hub or cannot be accessed."),
        ValueError("Unknown split \"trian\". Should be one of ['train', 'test']."),
        RuntimeError("Dataset scripts are no longer supported, but found lima.py"),
    ],
)
def test_wrong_names_are_the_users(error: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets, "load_dataset", raising(error))
    with pytest.raises(DataError, match="openai/gsm8k: cannot be loaded") as raised:
        load_hub(leaf("gsm8k"), cache=tmp_path)
    assert raised.value.exit_code == 2 and str(error)[:20] in str(raised.value)


def raising(error: Exception) -> Callable[..., None]:
    def load_dataset(*_args: object, **_kwargs: object) -> None:
        raise error

    return load_dataset


def test_columns_are_checked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stub(monkeypatch, [{"question": "q", "answer": "a"}])
    with pytest.raises(DataError, match=r'data\.columns\.completion: .* no column "anwser"; did you mean "answer"\?'):
        load_hub(leaf("gsm8k", columns={"prompt": "question", "completion": "anwser"}), cache=tmp_path)
    with pytest.raises(InputError, match=r'data\.columns\.promt: no such column; did you mean "prompt"\?'):
        load_hub(leaf("gsm8k", columns={"promt": "question", "completion": "answer"}), cache=tmp_path)
    with pytest.raises(InputError, match=r"data\.columns: must name the columns of a format"):
        load_hub(leaf("gsm8k", columns={"prompt": "question"}), cache=tmp_path)


def test_rows_of_the_wrong_type_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stub(monkeypatch, [{"question": "q", "answer": "a"}] + [{"question": "q", "answer": None}] * 25)
    with pytest.raises(DataError) as raised:
        load_hub(leaf("gsm8k"), cache=tmp_path)
    assert str(raised.value.problems[0]) == 'openai/gsm8k:train:1: "completion" must be text, got null'
    assert len(raised.value.problems) == 21
    stub(monkeypatch, [{"context": {"labels": ["A"]}, "question": "q", "final_decision": "no"}])
    empty = leaf("pubmedqa", columns={"instruction": "question", "output": "context.contexts"})
    with pytest.raises(DataError, match='"output" must be text, got null'):
        load_hub(empty, cache=tmp_path)


def test_conversation_of_role_and_content_is_read_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def turns(text: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": text}, {"role": "assistant", "content": "b"}]

    stub(monkeypatch, [{"conversations": turns("a")}, {"conversations": turns("c")}])
    rows = load_hub(leaf("lima"), cache=tmp_path)
    assert Row.from_pair("a", "b", source="").content in [row.content for row in [*rows.train, *rows.heldout]]
