"""Declared identities, hashes of files and folders, and what is refused about a model folder."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from lora_lab.errors import InputError
from lora_lab.plan import file_hashes
from lora_lab.plan.file_hashes import hash_file, hash_folder
from lora_lab.plan.folder import check_config, read_config, with_known_shape
from lora_lab.plan.identity import identities_of
from lora_lab.schema.fingerprint import fingerprint
from tests.unit.test_plan_trials import SHAPE, trial_of

CONFIG = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 260, "max_position_embeddings": 1024,
}  # fmt: skip


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def folder_model(path: Path, **values: Any) -> dict[str, Any]:
    return {"kind": "folder", "name": None, "path": str(path), "shape": None, "tie_embeddings": None, **values}


def jsonl(path: Path, heldout: Path | None = None) -> dict[str, Any]:
    return {
        "kind": "jsonl", "path": str(path), "format": "auto", "heldout_path": None if heldout is None else str(heldout),
        "heldout_size": 1, "heldout_seed": 0, "template": "auto", "loss_on": "answer", "max_length": 64,
        "type_column": None,
    }  # fmt: skip


def test_declared_identities_need_no_file(tmp_path: Path) -> None:
    hub = {"kind": "hub", "name": None, "repo": "a/b", "revision": "abc", "shape": None, "tie_embeddings": None}
    embedded = {
        "kind": "embedded", "name": "m", "package": "pkg", "package_version": "1.2", "file": "pkg/m.gguf",
        "sha256": "ff", "shape": SHAPE, "tie_embeddings": None,
    }  # fmt: skip
    assert identities_of(trial_of(), cache=tmp_path, extra={"prose": "x"}) == {
        "base": "random", "data": "reasoning-gym 0.1.25", "prose": "x",
    }  # fmt: skip
    assert identities_of(trial_of(model=hub), cache=tmp_path, extra={})["base"] == "a/b@abc"
    base = identities_of(trial_of(model=embedded), cache=tmp_path, extra={})["base"]
    assert base == "pkg 1.2 pkg/m.gguf sha256:ff"
    with pytest.raises(ValueError, match="base"):
        identities_of(trial_of(), cache=tmp_path, extra={"base": "x"})
    assert list(tmp_path.iterdir()) == []


def test_jsonl_is_known_by_content_not_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("one")
    (tmp_path / "b.jsonl").write_text("one")
    prints = []
    for name in ("a.jsonl", "b.jsonl"):
        trial = trial_of(data=jsonl(tmp_path / name))
        identities = identities_of(trial, cache=tmp_path / "cache", extra={})
        assert identities["data"] == "sha256:" + hashlib.sha256(b"one").hexdigest()
        prints.append(fingerprint(trial, identities))
    assert prints[0] == prints[1]
    trial = trial_of(data=jsonl(tmp_path / "a.jsonl", heldout=tmp_path / "b.jsonl"))
    assert identities_of(trial, cache=tmp_path / "cache", extra={}).keys() == {"base", "data", "heldout"}


def test_missing_paths_name_their_neighbours(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}")
    with pytest.raises(InputError, match=r"data\.path: no such file.*did you mean .*rows\.jsonl"):
        identities_of(trial_of(data=jsonl(tmp_path / "row.jsonl")), cache=tmp_path, extra={})
    with pytest.raises(InputError, match=r"expected a file"):
        identities_of(trial_of(data=jsonl(tmp_path)), cache=tmp_path, extra={})
    with pytest.raises(InputError, match=r"model\.path: no such folder"):
        identities_of(trial_of(model=folder_model(tmp_path / "nope" / "deep")), cache=tmp_path, extra={})
    with pytest.raises(InputError, match=r"data\.path"):
        identities_of(trial_of(data=jsonl(Path("x" * 5000))), cache=tmp_path, extra={})


def test_a_folder_is_its_weights_config_and_tokenizer(model_folder: Path, tmp_path: Path) -> None:
    trial = trial_of(model=folder_model(model_folder))

    def base() -> str:
        return identities_of(trial, cache=tmp_path / "cache", extra={})["base"]

    first = base()
    (model_folder / "README.md").write_text("does not matter")
    assert base() == first
    (model_folder / "tokenizer_config.json").write_text("{}")
    second = base()
    assert second != first
    (model_folder / "model.safetensors").write_bytes(b"weightz")
    assert base() not in (first, second)
    model_folder.rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "model.safetensors").write_bytes(b"weights")
    moved = trial_of(model=folder_model(tmp_path / "elsewhere"))
    assert identities_of(moved, cache=tmp_path / "cache", extra={})["base"] == second
    (tmp_path / "elsewhere" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="no other format is loaded"):
        identities_of(moved, cache=tmp_path / "cache", extra={})


def test_a_hash_is_read_once_and_again_after_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, reads = tmp_path / "big", []
    real = file_hashes._read_hash
    monkeypatch.setattr(file_hashes, "_read_hash", lambda path, where: reads.append(path) or real(path, where))
    monkeypatch.setattr(file_hashes, "_SETTLED_NS", -(10**18))

    def digest() -> str:
        return hash_file(file, where="x", cache=tmp_path / "cache")

    file.write_bytes(b"one")
    assert digest() == digest() == hashlib.sha256(b"one").hexdigest()
    assert len(reads) == 1
    before = file.stat()
    file.write_bytes(b"two")  # the same size, and the same time stamp put back
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert digest() == hashlib.sha256(b"two").hexdigest()
    for damaged in ("", "[]", "{", json.dumps({str(file.resolve()): {"stamp": None}}), '{"a": NaN'):
        (tmp_path / "cache" / "identities.json").write_text(damaged)
        assert digest() == hashlib.sha256(b"two").hexdigest()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["identities.json"]


def test_a_file_that_just_changed_is_not_remembered(tmp_path: Path) -> None:
    (tmp_path / "fresh").write_bytes(b"one")
    hash_file(tmp_path / "fresh", where="x", cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_hash(path: Path, where: str) -> str:
        path.write_bytes(b"longer now")
        return "0"

    monkeypatch.setattr(file_hashes, "_read_hash", read_hash)
    (tmp_path / "growing").write_bytes(b"one")
    with pytest.raises(InputError, match="changed while it was read"):
        hash_file(tmp_path / "growing", where="x", cache=None)


def test_a_folder_hash_covers_names_and_content(tmp_path: Path) -> None:
    def digest(**files: str) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        (folder / "sub").mkdir(parents=True)
        for name, text in files.items():
            (folder / name.replace("_", "/")).write_text(text)
        return hash_folder(folder, ["**/*"], where="x", cache=None)

    first = digest(a="1", b="2")
    assert digest(b="2", a="1") == first
    assert len({first, digest(a="2", b="1"), digest(a="12"), digest(a="1", sub_b="2")}) == 4
    with pytest.raises(InputError, match="no file that matches"):
        digest()


@pytest.mark.parametrize("key", ["auto_map", "_attn_implementation_internal", "trust_remote_code"])
def test_hostile_keys_are_refused_at_any_depth(key: str, model_folder: Path) -> None:
    check_config(CONFIG, "config.json")
    for hostile in ({key: "x"}, {"text_config": {key: "x"}}, {"parts": [{"a": {key: None}}]}):
        (model_folder / "config.json").write_text(json.dumps({**CONFIG, **hostile}))
        with pytest.raises(InputError, match=f'config.json: key "{key}" can make a loader run code'):
            with_known_shape(trial_of(model=folder_model(model_folder)))


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "not valid JSON"), ("{", "not valid JSON"), ("[]", "expected a JSON object, got list"),
     ('{"a":' * 60 + "1" + "}" * 60, "nested"), ("[" * 100_000, "not valid JSON")],
)  # fmt: skip
def test_broken_configs(text: str, message: str, model_folder: Path) -> None:
    (model_folder / "config.json").write_text(text)
    with pytest.raises(InputError, match=message):
        read_config(model_folder, where="model.path")


def test_the_shape_comes_from_the_folder(model_folder: Path) -> None:
    known = with_known_shape(trial_of(model=folder_model(model_folder)))
    assert known.model.shape is not None
    assert known.model.shape.model_dump() == SHAPE
    assert with_known_shape(known) == known
    wrong = folder_model(model_folder, shape={**SHAPE, "num_layers": 3})
    with pytest.raises(
        InputError, match=r"model\.shape\.num_layers: given as 3, but config\.json of the folder says 2"
    ):
        with_known_shape(trial_of(model=wrong))
    (model_folder / "config.json").write_text(json.dumps({**CONFIG, "model_type": "opt"}))
    assert with_known_shape(trial_of(model=folder_model(model_folder))).model.shape is None


def test_rules_that_need_the_shape_are_applied_then(model_folder: Path) -> None:
    (model_folder / "config.json").write_text(json.dumps({**CONFIG, "tie_word_embeddings": True}))
    with pytest.raises(InputError, match="tied embeddings"):
        with_known_shape(trial_of(model=folder_model(model_folder), parts=("head",)))
    untied = folder_model(model_folder, tie_embeddings=False)
    assert with_known_shape(trial_of(model=untied, parts=("head",))).model.shape is not None
