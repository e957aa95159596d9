"""The wheel works outside the checkout: conf/ and sweeps/ travel in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.journey.program import CHECKOUT, TINY


def test_the_wheel_is_told_to_take_conf_and_sweeps() -> None:
    build = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert set(build["packages"]) == {"lora_lab", "hydra_plugins"}
    assert build["force-include"] == {"conf": "lora_lab/conf", "sweeps": "lora_lab/sweeps"}
    assert (CHECKOUT / "conf" / "config.yaml").is_file()
    assert (CHECKOUT / "sweeps" / "first_look.yaml").is_file()


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but the built wheel's content."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    _run([*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), str(CHECKOUT)])
    (wheel,) = folder.glob("*.whl")
    _run([*pip, "install", "--no-deps", "--target", str(folder / "site"), str(wheel)])
    return folder / "site"


@pytest.mark.slow
def test_the_wheel_holds_what_it_needs_and_no_more(installed: Path) -> None:
    (wheel,) = installed.parent.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("conf", "sweeps"):
        files = [file for file in (CHECKOUT / folder).rglob("*") if file.is_file() and file.suffix in (".yaml", ".md")]
        assert files
        assert {f"lora_lab/{file.relative_to(CHECKOUT)}" for file in files} <= names
    assert "hydra_plugins/lora_lab_launcher.py" in names
    assert not [name for name in names if name.startswith(("tests/", "conf/", "sweeps/", "lab/", "notebooks/"))]
    assert "hydra_plugins/__init__.py" not in names


@pytest.mark.slow
def test_the_installed_program_plans_and_runs_elsewhere(installed: Path, tmp_path: Path) -> None:
    study = _lab(installed, tmp_path, "plan", "-m", "study=first_look", "--json")
    assert json.loads(study)[0]["name"] == "base"
    assert not (tmp_path / "lab").exists()
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "mine.yaml").write_text("question: a\ngrids: [{rank: [2, 4]}]\n")
    tiny = [f"{key}={value}" for key, value in TINY.items()]
    table = json.loads(_lab(installed, tmp_path, "run", "-m", "study=mine", *tiny, "--json"))
    assert [row["completed"] for row in table["rows"]] == [1, 1]
    assert len(json.loads(_lab(installed, tmp_path, "runs", "--json"))) == 2
    (environment, _) = sorted((tmp_path / "lab" / "runs").glob("*/environment.json"))
    assert str(CHECKOUT) not in environment.read_text()


def _lab(installed: Path, cwd: Path, *arguments: str) -> str:
    script = "import lora_lab, sys; assert lora_lab.__file__.startswith(sys.argv[1]), lora_lab.__file__"
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    _run([sys.executable, "-c", script, str(installed)], cwd=cwd, environment=environment)
    return _run([sys.executable, "-m", "lora_lab.app.cli", *arguments], cwd=cwd, environment=environment)


def _run(command: list[str], *, cwd: Path | None = None, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
