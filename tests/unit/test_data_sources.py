"""The dispatch over kinds, what planning may import, and every leaf of conf/data."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import TypeAdapter

from lora_lab.data import hub, skills
from lora_lab.data.rows import Row, Rows
from lora_lab.data.sources import count_train_rows, load_rows
from lora_lab.errors import DataError
from lora_lab.schema.data import Data

CONF = Path(__file__).resolve().parents[2] / "conf" / "data"
READ: TypeAdapter[Data] = TypeAdapter(Data)


def jsonl(path: Path, heldout_size: int) -> Data:
    values = {**yaml.safe_load((CONF / "jsonl.yaml").read_text()), "path": str(path), "heldout_size": heldout_size}
    return READ.validate_python(values)


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_leaf_is_valid_and_says_what_it_is(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("# ") and len(text.splitlines()[0]) > 40
    values = yaml.safe_load(text)
    if path.stem == "jsonl":
        assert values["path"] == "???"  # Hydra's mark for a value that the user must give
    data = READ.validate_python(values)
    if data.kind == "hub":
        assert data.name == path.stem


def test_jsonl_rows_and_their_count(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"prompt": "p{index}", "completion": "c"}}\n' for index in range(12)))
    data = jsonl(path, heldout_size=5)
    rows = load_rows(data, cache=tmp_path)
    assert (len(rows.train), len(rows.heldout)) == (7, 5) and count_train_rows(data) == 7
    with pytest.raises(DataError, match="no such file"):
        count_train_rows(jsonl(tmp_path / "other.jsonl", heldout_size=5))


def test_kinds_reach_their_loaders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = Rows([Row.from_text("a", source="x")], [Row.from_text("b", source="x")])
    seen: list[object] = []

    def load_hub(data: Data, *, cache: Path) -> Rows:
        seen.append((data, cache))
        return rows

    def load_skills(data: Data) -> Rows:
        seen.append(data)
        return rows

    monkeypatch.setattr(hub, "load_hub", load_hub)
    monkeypatch.setattr(skills, "load_skills", load_skills)
    gsm8k = READ.validate_python(yaml.safe_load((CONF / "gsm8k.yaml").read_text()))
    generated = READ.validate_python(
        {
            "kind": "skills",
            "package_version": "0",
            "mixture": {"chain_sum": 1.0},
            "train_size": 9,
            "train_seed": 0,
            "heldout_size": 2,
            "heldout_seed": 1,
            "template": "auto",
            "loss_on": "answer",
            "max_length": 64,
            "types": {},
        }
    )
    assert load_rows(gsm8k, cache=tmp_path) is rows and load_rows(generated, cache=tmp_path) is rows
    assert seen == [(gsm8k, tmp_path), generated]
    assert count_train_rows(gsm8k) is None and count_train_rows(generated) == 9


def test_counting_rows_imports_nothing_heavy(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    program = (
        "import sys\n"
        "from lora_lab.data.sources import count_train_rows\n"
        "from lora_lab.schema.data import JsonlData\n"
        f"data = JsonlData(kind='jsonl', path={str(path)!r}, format='auto', heldout_path=None, heldout_size=1,\n"
        "                 heldout_seed=0, template='auto', loss_on='answer', max_length=8,\n"
        "                 type_column=None)\n"
        "assert count_train_rows(data) == 1\n"
        "heavy = {'torch', 'transformers', 'datasets', 'reasoning_gym', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=CONF.parents[1])
