"""The section `memory`: its defaults, what may be written, and that it is no part of any trial."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lora_lab.app.compose import Composer
from lora_lab.plan.devices import DEVICES
from lora_lab.schema.memory import Memory
from lora_lab.schema.trial import LAB_KEYS, read_lab
from tests.journey.program import Answer, Lab


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    """An empty lab."""
    return Lab(tmp_path / "lab", tmp_path / "cache")


def memory_of(mapping: Any) -> Memory:
    return read_lab({key: mapping[key] for key in LAB_KEYS}).memory


def test_defaults(composer: Composer) -> None:
    memory = memory_of(composer.compose([]).mapping)
    assert (memory.style, memory.on_overflow, memory.device) == ("own", "refuse", None)


@pytest.mark.parametrize(
    ("written", "key", "value"),
    [
        ("memory.style=hf", "style", "hf"),
        ("memory.style=litgpt", "style", "litgpt"),
        ("memory.style=litgpt_first", "style", "litgpt_first"),
        ("memory.on_overflow=try", "on_overflow", "try"),
        ("memory.device=h100", "device", "h100"),
        ("memory.device=4090", "device", "4090"),
        ("memory.device=24GiB", "device", "24GiB"),
        ("memory.device=null", "device", None),
    ],
)
def test_read_back(composer: Composer, written: str, key: str, value: object) -> None:
    assert getattr(memory_of(composer.compose([written]).mapping), key) == value


def fingerprints(answer: Answer) -> list[str]:
    assert answer.code == 0, answer.err
    return [row["fingerprint"] for row in answer.json()]


def test_no_fingerprint_depends_on_it(lab: Lab) -> None:
    plain = fingerprints(lab.plan("--json"))
    for written in ("memory.style=hf", "memory.on_overflow=try", "memory.device=h100"):
        assert fingerprints(lab.plan("--json", written)) == plain
    assert fingerprints(lab.plan("--json", "rank=3")) != plain


@pytest.mark.parametrize("points", ["memory.device=h100,a100", "memory.style=own,hf", "memory.on_overflow=refuse,try"])
def test_the_same_for_all_points_of_a_sweep(lab: Lab, points: str) -> None:
    answer = lab.plan("-m", points)
    assert answer.code == 2
    key = points.partition("=")[0]
    assert f"error: {key}: must be the same for all points of a sweep" in answer.err


@pytest.mark.parametrize("command", ["plan", "run"])
def test_a_device_that_is_none_is_known_before_anything_runs(lab: Lab, command: str) -> None:
    answer = (lab.run if command == "run" else lab.plan)("memory.device=h10", "rank=0")
    assert answer.code == 2
    first, second = answer.err.splitlines()
    assert first.startswith('error: memory.device: no such device "h10"') and "h100" in first
    assert second.startswith("error: rank: ")
    assert not lab.root.exists()


def test_every_device_of_the_table_may_be_written(lab: Lab) -> None:
    for name in (next(iter(DEVICES)), "24GiB"):
        assert lab.plan(f"memory.device={name}").code == 0


def test_a_flag_that_is_wrong_is_told_with_the_rest(lab: Lab) -> None:
    answer = lab.plan("--memory", "--device", "h10", "rank=0")
    assert answer.code == 2
    first, second = answer.err.splitlines()
    assert first.startswith('error: --device: no such device "h10"') and second.startswith("error: rank: ")
