"""The README's commands do what it says, in its order, on the tiny model; and what it names is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.journey.program import CHECKOUT, Lab, call

README = (CHECKOUT / "README.md").read_text(encoding="utf-8")
PROGRAM = ".venv/bin/lora-lab"


def commands() -> list[list[str]]:
    """Every call of the program in the README's blocks, without the program's name."""
    blocks = re.findall(r"^```\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith(PROGRAM)]
    return [shlex.split(line, comments=True)[1:] for line in lines]


def small(lab: Lab, arguments: list[str]) -> list[str]:
    """The same command on the tiny model, in a folder of the test's own."""
    command, *rest = arguments
    if any(argument.startswith("setup=") for argument in rest):  # planned as it is: a published model, by its shape
        return [*arguments, f"root='{lab.root}'"]
    if command in ("run", "plan"):
        return [command, *lab.tiny(*rest)]
    if command == "reproduce":
        return arguments if "--recorded" in rest else [*arguments, f"root='{lab.root}'"]
    if command == "eval":
        arguments = [argument.replace("smollm2_135m", "tiny_random") for argument in arguments]
    cache = [] if command in ("runs", "report", "compare", "wandb") else ["--cache", str(lab.cache)]
    return [*arguments, "--root", str(lab.root), *cache]


def test_every_command_works_in_the_readmes_order(lab: Lab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    listed = commands()
    assert len(listed) >= 12
    for arguments in listed:
        if arguments[0] == "reproduce" and not any(argument.startswith("--") for argument in arguments):
            continue  # minutes; on the tiny model in tests/journey/test_reproduce.py
        if arguments == ["fetch"] or any(argument.startswith("study=") for argument in arguments):
            continue  # by `make sweep`, the set-up, and tests/journey/test_methods_study.py
        answer = call(*small(lab, arguments))
        assert answer.code == 0, f"{' '.join(arguments)}: {answer.err or answer.out}"
    assert (lab.root / "report.html").is_file()


def test_make_targets_exist() -> None:
    makefile = (CHECKOUT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`?make ([a-z-]+)", README):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_files_it_names_exist() -> None:
    named = set(
        re.findall(r"`((?:conf|sweeps|notebooks|tests|lora_lab|schema|plan|adapters|models|optim)/[\w./-]*)`", README)
    )
    named |= set(re.findall(r"\]\(([\w./-]+)\)", README))
    assert named
    missing = [
        name for name in sorted(named) if not any((base / name).exists() for base in (CHECKOUT, CHECKOUT / "lora_lab"))
    ]
    assert not missing
