"""Provenance: facts, no secrets, and a machine key that changes with the machine."""

from __future__ import annotations

import json
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import pytest

import lora_lab
from lora_lab.record import environment as module
from lora_lab.record.environment import code_version, environment, load_average, machine_id, without_user_info


@pytest.fixture(autouse=True)
def _forget_code_version() -> None:
    code_version.cache_clear()


def test_facts_are_json_and_true() -> None:
    facts = json.loads(json.dumps(environment(None), allow_nan=False))
    assert facts["packages"]["numpy"] == metadata.version("numpy")
    assert facts["memory_bytes"] > 10**8 and facts["cores"] >= 1 and facts["cpu"]
    assert facts["gpu"] is None


def test_a_package_that_is_not_installed_is_null(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PACKAGES", ("no-such-package-here",))
    assert environment(None)["packages"] == {"no-such-package-here": None}


def test_variables_only_by_allow_list_and_without_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary-1")
    monkeypatch.setenv("WANDB_API_KEY", "canary-2")
    monkeypatch.setenv("https_proxy", "http://user:canary-3@proxy")
    monkeypatch.setenv("OMP_NUM_THREADS", "http://user:canary-4@host/1")
    facts = environment(None)
    assert "canary" not in json.dumps(facts)
    assert facts["variables"]["OMP_NUM_THREADS"] == "http://host/1"


def test_user_info_is_cut_out_of_every_url() -> None:
    text = "a=https://u:p@h/x@y b=ssh://git@h c=mail@host d=http://h/p?q=a@b"
    assert without_user_info(text) == "a=https://h/x@y b=ssh://h c=mail@host d=http://h/p?q=a@b"


def test_machine_id_follows_every_part() -> None:
    base = {"cpu": "c", "cores": 2, "memory_bytes": 1, "gpu_names": ["g"]}
    changes = ({"cpu": "d"}, {"cores": 4}, {"memory_bytes": 2}, {"gpu_names": ["g", "g"]}, {"gpu_names": []})
    ids = {machine_id(**{**base, **change}) for change in ({}, *changes)}  # type: ignore[arg-type]
    assert len(ids) == 6
    assert machine_id(**base) == machine_id(**base)  # type: ignore[arg-type]


def test_gpu_facts_are_kept_and_change_the_machine() -> None:
    with_gpu = environment({"names": ["GPU X"], "driver": "1"})
    assert with_gpu["gpu"] == {"names": ["GPU X"], "driver": "1"}
    assert with_gpu["machine_id"] != environment(None)["machine_id"]


def _checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    package = tmp_path / "lora_lab"
    package.mkdir()
    (package / "__init__.py").write_text("")
    for arguments in (
        ["init", "-q"],
        ["add", "."],
        ["-c", "user.name=n", "-c", "user.email=e@e", "-c", "commit.gpgsign=false", "commit", "-q", "-m", "m"],
    ):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True, capture_output=True)
    monkeypatch.setattr(lora_lab, "__file__", str(package / "__init__.py"))
    return package


def test_commit_and_dirty_flag_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = _checkout(tmp_path, monkeypatch)
    clean = code_version()
    assert clean["dirty"] is False and len(clean["commit"]) == 40 and clean["reason"] is None
    (package / "__init__.py").write_text("changed = 1\n")
    assert code_version() is clean, "the code that runs is the code that was loaded"
    code_version.cache_clear()
    assert code_version() == {"commit": clean["commit"], "dirty": True, "reason": None}


def test_no_checkout_and_a_broken_one_are_null_with_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_lab, "__file__", str(tmp_path / "lora_lab" / "__init__.py"))
    assert code_version() == {"commit": None, "dirty": None, "reason": "lora_lab does not run from a git checkout"}
    code_version.cache_clear()
    (tmp_path / ".git").mkdir()
    broken = code_version()
    assert broken["commit"] is None and broken["dirty"] is None and "git did not answer" in broken["reason"]


def test_load_average_is_a_number_here() -> None:
    value = load_average()
    assert value is not None and value >= 0
