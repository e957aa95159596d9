"""Model folders that must not reach transformers: each is refused with its own reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_lab.errors import IdentityError, InputError, MachineError
from lora_lab.models.folders import check_model_folder
from lora_lab.models.load import load_base, model_folder
from lora_lab.schema.adaptation import Quantization
from lora_lab.schema.model import FolderModel, HubModel, RandomModel
from tests.conftest import MakeTrial

PLAIN = Quantization(kind="none", double_quantization=False)


@pytest.fixture
def folder(make_trial: MakeTrial, cache: Path, tmp_path: Path) -> Path:
    copied = tmp_path / "model"
    shutil.copytree(model_folder(make_trial().model, cache), copied)
    return copied


def set_config(folder: Path, **values: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def lfs_pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")


def renamed_pickle(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"PK\x03\x04" + bytes(100))


def cut_off(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    shard = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shard}))
    (folder / "model-00001-of-00002.safetensors").write_bytes(bytes(8))


def outside_shard(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "config is not JSON": (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
    "attention code": (lambda folder: set_config(folder, _attn_implementation_internal="x"), "_attn_implementation"),
    "remote code": (lambda folder: set_config(folder, auto_map={"AutoModel": "evil.Model"}), "auto_map"),
    "quantized": (lambda folder: set_config(folder, quantization_config={"load_in_4bit": True}), "already"),
    "only pickles": (only_pickles, "pytorch_model.bin"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors not found"),
    "LFS pointer": (lfs_pointer, "Git LFS pointer"),
    "renamed pickle": (renamed_pickle, "pickle under another name"),
    "cut off": (cut_off, "not a safetensors file"),
    "missing shard": (missing_shard, "00002-of-00002.safetensors: not found"),
    "shard elsewhere": (outside_shard, "same folder"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer"),
    "tokenizer code": (
        lambda folder: (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": "evil"}}'),
        "auto_map",
    ),
    "long template": (lambda folder: (folder / "chat_template.jinja").write_text("x" * 300_000), "chat_template"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_its_reason(folder: Path, case: str) -> None:
    damage, message = REFUSED[case]
    damage(folder)
    with pytest.raises(InputError, match=message):
        check_model_folder(folder)


def test_several_problems_come_together(folder: Path) -> None:
    only_pickles(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError) as caught:
        check_model_folder(folder)
    assert len(caught.value.problems) == 2


def test_a_plain_folder_loads(folder: Path, tmp_path: Path) -> None:
    model = FolderModel(kind="folder", name=None, path=str(folder), shape=None, tie_embeddings=None)
    base = load_base(model, precision="fp32", quantization=PLAIN, device="cpu", cache=tmp_path)
    assert base.model.name_or_path == str(folder)


def test_no_such_folder(tmp_path: Path) -> None:
    model = FolderModel(kind="folder", name=None, path=str(tmp_path / "nope"), shape=None, tie_embeddings=None)
    with pytest.raises(InputError, match="no such folder"):
        load_base(model, precision="fp32", quantization=PLAIN, device="cpu", cache=tmp_path)


def test_a_declared_shape_that_is_not_the_models(make_trial: MakeTrial, cache: Path, folder: Path) -> None:
    """Counts are planned from the declared shape, so another one in the files is an identity error."""
    model = make_trial().model
    assert isinstance(model, RandomModel)
    wrong = HubModel(
        kind="hub",
        name=None,
        repo="a/b",
        revision="main",
        shape=model.shape.model_copy(update={"mlp_size": 256}),
        tie_embeddings=None,
    )
    with pytest.MonkeyPatch.context() as patch, pytest.raises(IdentityError, match="mlp_size"):
        patch.setattr("lora_lab.models.load.hub_folder", lambda model: folder)
        load_base(wrong, precision="fp32", quantization=PLAIN, device="cpu", cache=cache)


def test_an_unreachable_hub_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = HubModel(kind="hub", name=None, repo="nobody/nothing", revision="main", shape=None, tie_embeddings=None)
    with pytest.raises(MachineError, match=r"nobody/nothing.*model=folder model.path=DIR") as caught:
        load_base(model, precision="fp32", quantization=PLAIN, device="cpu", cache=tmp_path)
    assert len(str(caught.value).splitlines()) == 1
