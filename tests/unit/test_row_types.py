"""Types of rows: from skills, a column of a file or of a data set, to the batches that LoRAMoE's constraint sees."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import PreTrainedTokenizerFast

from lora_lab.data.batches import collate
from lora_lab.data.encode import encode_rows
from lora_lab.data.hub import load_hub
from lora_lab.data.jsonl import check_jsonl, load_jsonl
from lora_lab.data.rows import Row
from lora_lab.data.skills import load_skills
from lora_lab.errors import DataError, InputError
from lora_lab.models.random import random_folder
from lora_lab.schema.data import HubData, JsonlData, SkillsData
from lora_lab.schema.model import RandomModel
from lora_lab.schema.trial import Trial
from tests.conftest import MakeTrial
from tests.journey.program import Lab, call

CONF = Path(__file__).resolve().parents[2] / "conf" / "data"


def leaf(name: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    return values


def typed_file(path: Path, kinds: list[object], *, column: str = "kind") -> Path:
    """Rows of which each names its type in `column`; a type of `...` leaves the column out."""
    rows = [
        {"prompt": f"{n}?", "completion": str(n), **({} if kind is ... else {column: kind})}
        for n, kind in enumerate(kinds)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def jsonl(path: Path, **changes: object) -> JsonlData:
    values = {**leaf("jsonl"), "path": str(path), "type_column": "kind", "heldout_size": 1, **changes}
    return JsonlData.model_validate(values)


def hub(folder: Path, **changes: object) -> HubData:
    """A local folder in the place of a data set. (The names of pytest's folders would be taken for a split.)"""
    columns = {"prompt": "prompt", "completion": "completion"}
    values = {"repo": str(folder), "config": None, "columns": columns, "type_column": "kind", "heldout_size": 1}
    return HubData.model_validate({**leaf("gsm8k"), **values, **changes})


def test_skills_name_the_type_of_every_row_of_both_sides() -> None:
    data = SkillsData.model_validate({**leaf("skills_typed"), "train_size": 30, "heldout_size": 12})
    rows = load_skills(data)
    assert all(row.type == data.types[str(row.skill)] for row in [*rows.train, *rows.heldout])
    assert {row.type for row in rows.train} == {row.type for row in rows.heldout} == {"task", "knowledge"}
    plain = load_skills(SkillsData.model_validate({**leaf("skills"), "train_size": 30, "heldout_size": 12}))
    assert {row.type for row in plain.train} == {None}
    assert [row.content for row in plain.train] == [row.content for row in rows.train], "types change no row"


def test_types_cover_the_mixture(make_trial: MakeTrial) -> None:
    with pytest.raises(InputError, match=r"data: types says nothing of gcd, .*; name a type for every skill, or for"):
        make_trial("++data.types.chain_sum=task")
    with pytest.raises(InputError, match=r"data\.types\.gcd: empty value"):
        make_trial("data=skills_typed", "data.types.gcd=''")


def test_a_file_names_types_in_a_column(tmp_path: Path) -> None:
    path = typed_file(tmp_path / "rows.jsonl", ["task", "knowledge", "task", "other", "task"])
    rows = load_jsonl(jsonl(path))
    found = {row.answer: row.type for row in [*rows.train, *rows.heldout]}
    assert found == {"0": "task", "1": "knowledge", "2": "task", "3": "other", "4": "task"}
    summary = check_jsonl(jsonl(path))
    first = {row.type: row.source for row in reversed(rows.train)}
    assert summary.types == first
    assert {row.type for row in load_jsonl(jsonl(path, type_column=None)).train} == {None}


def test_held_out_rows_of_a_file_of_their_own_have_types_too(tmp_path: Path) -> None:
    path = typed_file(tmp_path / "rows.jsonl", ["task", "knowledge"])
    held = tmp_path / "held.jsonl"
    held.write_text('{"prompt": "x", "completion": "y"}\n')
    with pytest.raises(DataError, match=r'held\.jsonl:1: "kind" \(data\.type_column\) missing'):
        load_jsonl(jsonl(path, heldout_path=str(held)))


@pytest.mark.parametrize(
    ("value", "rule"),
    [
        (..., r'"kind" \(data\.type_column\) missing; found "prompt", "completion"'),
        ("", r'"kind" \(data\.type_column\) is empty'),
        ("  ", r'"kind" \(data\.type_column\) is empty'),
        (1, r'"kind" \(data\.type_column\) must be text, got the number 1'),
        (None, r'"kind" \(data\.type_column\) must be text, got null'),
        (float("nan"), r'"kind" \(data\.type_column\) must be text, got the number nan'),
        (True, r'"kind" \(data\.type_column\) must be text, got true'),
        (["task"], r'"kind" \(data\.type_column\) must be text, got a list'),
        ("a\x00", r'"kind" \(data\.type_column\) holds a control character U\+0000'),
    ],
)
def test_a_line_without_a_usable_type(tmp_path: Path, value: object, rule: str) -> None:
    path = typed_file(tmp_path / "rows.jsonl", ["task", value, "task"])
    with pytest.raises(DataError, match=rf"rows\.jsonl:2: {rule}") as caught:
        load_jsonl(jsonl(path))
    assert len(caught.value.problems) == 1, "of the good lines nothing is said"
    load_jsonl(jsonl(path, type_column=None))  # then the column may hold anything


@pytest.fixture
def rows_folder(tmp_path: Path) -> Path:
    (tmp_path / "set").mkdir()
    return tmp_path / "set"


def test_a_data_set_names_types_in_a_column(rows_folder: Path) -> None:
    typed_file(rows_folder / "train.jsonl", ["task", "knowledge", "task"])
    rows = load_hub(hub(rows_folder), cache=rows_folder.parent / "cache")
    assert {row.answer: row.type for row in [*rows.train, *rows.heldout]} == {
        "0": "task",
        "1": "knowledge",
        "2": "task",
    }
    with pytest.raises(DataError, match=r'data\.type_column: .* has no column "kinds".*did you mean "kind"'):
        load_hub(hub(rows_folder, type_column="kinds"), cache=rows_folder.parent / "cache")


def test_a_nested_column_and_one_that_is_called_as_ours(rows_folder: Path) -> None:
    lines = [{"q": f"{n}?", "a": str(n), "completion": "task", "about": {"kind": "knowledge"}} for n in range(3)]
    (rows_folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    columns = {"prompt": "q", "completion": "a"}
    own = load_hub(hub(rows_folder, columns=columns, type_column="completion"), cache=rows_folder.parent / "cache")
    assert {row.type for row in own.train} == {"task"} and {row.answer for row in own.train} < {"0", "1", "2"}
    nested = load_hub(hub(rows_folder, columns=columns, type_column="about.kind"), cache=rows_folder.parent / "cache")
    assert {row.type for row in nested.train} == {"knowledge"}
    with pytest.raises(DataError, match=r'train:0: "about\.nope" \(data\.type_column\) must be text, got null'):
        load_hub(hub(rows_folder, columns=columns, type_column="about.nope"), cache=rows_folder.parent / "cache")


def test_types_reach_the_batch_in_the_order_of_its_rows(tmp_path: Path, make_trial: MakeTrial) -> None:
    model = make_trial().model
    assert isinstance(model, RandomModel)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(random_folder(model, tmp_path))
    rows = load_jsonl(jsonl(typed_file(tmp_path / "rows.jsonl", ["a", "b", "c", "d", "e", "f"]))).train
    rows = [*rows, Row.from_pair("x", "y", source="plain")]
    encoded = encode_rows(rows, tokenizer, make_trial().data, vocab_size=260).examples
    assert [one.type for one in encoded] == [row.type for row in rows]
    assert encoded[-1].type is None
    assert len(encoded) == 6
    picked = [encoded[3], encoded[0], encoded[5]]
    assert collate(picked, 0, torch.device("cpu")).types == (rows[3].type, rows[0].type, None)


LORAMOE = ("method=loramoe", "method.experts=2", "data=jsonl", "data.type_column=kind", "data.heldout_size=1")


@pytest.fixture
def lab(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path / "lab", tmp_path_factory.getbasetemp() / "row types")


def test_types_in_no_group_are_refused_with_their_line(tmp_path: Path, lab: Lab) -> None:
    path = typed_file(tmp_path / "rows.jsonl", ["task", "knowlege", "task", "knowledge", "knowlege", "task", "task"])
    held = tmp_path / "held.jsonl"
    held.write_text('{"prompt": "x", "completion": "y", "kind": "of no group, but never trained on"}\n')
    overrides = (*LORAMOE, f"data.path='{path}'", f"data.heldout_path='{held}'")
    answer = lab.run(*overrides)
    assert answer.code == 2 and not lab.root.exists()
    assert f'{path}:2: type "knowlege" is in none of method.groups; did you mean "knowledge"?' in answer.err
    assert "(choices: task, knowledge)" in answer.err and answer.err.count("error:") == 1, "each type once"
    assert lab.plan(*overrides, "method.beta=0").code == 0, "without the constraint types mean nothing"
    assert lab.plan(*overrides, "method.groups=[task,knowlege]").code == 2
    assert lab.plan(*overrides[2:], "method=lora").code == 0
    assert lab.plan(*overrides, "data.type_column=null").code == 2


def test_types_of_a_data_set_are_refused_before_a_model_loads(
    rows_folder: Path, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_lab import restore

    monkeypatch.setattr(restore, "load_base", lambda *_, **__: pytest.fail("a model was loaded"))
    typed_file(rows_folder / "train.jsonl", ["task", "odd", "odd", "odd"])
    columns = "data.columns={prompt: prompt, completion: completion}"
    where = (f"data.repo='{rows_folder}'", "data.config=null", columns, "data.type_column=kind")
    kept = lab.tiny("data=gsm8k", *LORAMOE[:2], *where, "data.heldout_size=1")
    answer = call("run", *[one for one in kept if not one.startswith("data.train_size")])
    assert answer.code == 3
    result = lab.only().result
    assert result is not None and result.reason is not None
    assert 'type "odd" is in none of method.groups' in result.reason and "train:" in result.reason


@pytest.mark.parametrize(
    ("overrides", "rule"),
    [
        (
            ("data=skills",),
            r"data: .*beta > 0\) needs rows with types: data=skills_typed, data.types or data.type_column",
        ),
        (("data.types.gcd=odd",), r"data\.types: .*task and knowledge \(method\.groups\), got odd"),
        (("method.groups=[a,b]",), r"data\.types: expected only a and b \(method\.groups\), got knowledge, task"),
        (("method.groups=[a,a]",), r'method: groups names "a" twice'),
        (("method.groups=[a]",), r"method\.groups\.1: missing"),
        (("method.groups=[a,b,c]",), r"method\.groups: must have at most 2 entries"),
    ],
)
def test_loramoe_without_fitting_types(make_trial: MakeTrial, overrides: tuple[str, ...], rule: str) -> None:
    with pytest.raises(InputError, match=rule):
        make_trial("method=loramoe", *overrides)


def test_loramoe_without_its_constraint_needs_no_types(make_trial: MakeTrial) -> None:
    trial: Trial = make_trial("method=loramoe", "data=skills", "method.beta=0")
    assert trial.data.row_types == frozenset()
