"""The study files: they parse, their findings exist, and their numbers are those of the findings, none unverified."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_lab.plan.study_file import read_study
from lora_lab.schema.claims import Claim, Exact, Published
from lora_lab.schema.study import Study

SWEEPS = Path(__file__).parents[2] / "sweeps"
FINDINGS = Path(__file__).parents[3] / "shared" / "findings"
NAMES = sorted(path.stem for path in SWEEPS.glob("*.yaml"))
_DOUBTED = re.compile(r"unverified|secondary", re.IGNORECASE)
_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:[eE][-+]?\d+)?")
_URL = re.compile(r"https?://[^\s()]+")

needs_findings = pytest.mark.skipif(not FINDINGS.is_dir(), reason="the findings (../shared/findings) are not here")


@pytest.mark.parametrize("name", NAMES)
def test_it_parses_and_says_where_it_is_from(name: str) -> None:
    study = _study(name)
    if study.claims:
        assert study.source is not None
        assert study.source.title
        assert (study.source.url or "").startswith("https://")
        assert study.source.notes, "known differences from the source"


@pytest.mark.parametrize("name", NAMES)
def test_every_arm_picks_one_setting_of_each_form(name: str) -> None:
    study = _study(name)
    for design in [study] + ([study.published] if study.published is not None else []):
        settings = [{**design.base, **point} for grid in design.grids for point in _points(grid.dimensions)]
        for arm, values in design.arms.items():
            picked = [one for one in settings if all(key in one and one[key] == values[key] for key in values)]
            tuned = [one for one in picked if one.get("learning_rate") == "tuned"]
            assert picked and len(tuned) <= 1 and len(picked) - len(tuned) <= 1, f"{arm} picks {picked}"


@needs_findings
@pytest.mark.parametrize("name", NAMES)
def test_every_finding_exists(name: str) -> None:
    known = {entry["id"] for entry, _ in _entries()}
    asked = [(claim.id, claim.finding) for claim in _study(name).claims if claim.finding is not None]
    assert not [one for one in asked if one[1] not in known]


@needs_findings
@pytest.mark.parametrize("name", NAMES)
def test_every_number_is_that_of_its_finding(name: str) -> None:
    wrong = [
        f"{claim.id}: {number.id} {number.value} is in no finding that {number.provenance} provides"
        for claim in _study(name).claims
        for number in claim.published
        if not _is_published(number, claim)
    ]
    assert not wrong, "\n".join(wrong)


@needs_findings
@pytest.mark.parametrize("name", NAMES)
def test_no_number_is_of_an_unverified_cell(name: str) -> None:
    doubted = [
        f"{claim.id}: {number.id} {number.value}"
        for claim in _study(name).claims
        for number in claim.published
        if _DOUBTED.search(number.provenance) or _is_doubted(number, claim)
    ]
    assert not doubted


def test_the_39_percent_are_those_of_fp4() -> None:
    values = {claim.id: _by_published_numbers(claim) for claim in _study("lora_vs_qlora").claims}
    assert values["headline_time"] == pytest.approx(50.5, abs=0.05)
    assert values["headline_time_is_fp4"] == pytest.approx(39.6, abs=0.05)
    assert values["headline_time_by_litgpt"] == pytest.approx(55.9, abs=0.05)
    assert values["headline_memory"] == pytest.approx(33.5, abs=0.05)
    assert values["double_quantization_bits"] == 0.126953125
    decided = {claim.id: claim for claim in _study("lora_vs_qlora").claims if isinstance(claim, Exact)}
    within = {
        one: decided[one].low <= values[one] <= decided[one].high  # type: ignore[operator]
        for one in ("headline_memory", "headline_time", "headline_time_is_fp4", "headline_time_by_litgpt")
    }
    assert within == {
        "headline_memory": True,
        "headline_time": False,
        "headline_time_is_fp4": True,
        "headline_time_by_litgpt": False,
    }


def _by_published_numbers(claim: Claim) -> float | None:
    if not isinstance(claim, Exact) or any(term.function != "published" for term in claim.formula.terms):
        return None
    numbers = {number.id: number.value for number in claim.published}
    return claim.formula.value(lambda term: numbers[term.name])


@functools.cache
def _study(name: str) -> Study:
    return read_study(SWEEPS / f"{name}.yaml")


def _points(dimensions: tuple[dict[str, Any], ...]) -> Iterator[dict[str, Any]]:
    if not dimensions:
        yield {}
        return
    first, *rest = dimensions
    for row in zip(*first.values(), strict=True):
        for point in _points(tuple(rest)):
            yield dict(zip(first, row, strict=True)) | point


@functools.cache
def _entries() -> tuple[tuple[dict[str, Any], str], ...]:
    """Every finding, with the text of its whole file."""
    found = []
    for path in sorted(FINDINGS.glob("*.yaml")):
        text = path.read_text()
        for document in yaml.safe_load_all(text):
            found += [(entry, text) for entry in document["entries"]]
    return tuple(found)


def _is_published(number: Published, claim: Claim) -> bool:
    """By its name in the claim's finding, or as a number of that finding or of one with the same source."""
    own = next((entry for entry, _ in _entries() if entry["id"] == claim.finding), None)
    if own is not None:
        named = [value for key, value in _leaves(own["published"]) if key == number.id]
        if any(isinstance(value, (int, float)) for value in named):
            return number.value in named
        if number.value in _numbers([own["published"], own["setup"], own.get("notes")]):
            return True
    url = _URL.search(number.provenance)
    return url is not None and any(
        number.value in _numbers(entry["published"]) for entry, text in _entries() if url.group() in text
    )


def _is_doubted(number: Published, claim: Claim) -> bool:
    """Whether the finding has it only where it says itself that nobody has seen it."""
    own = next((entry for entry, _ in _entries() if entry["id"] == claim.finding), None)
    if own is None or not isinstance(own["published"], dict):
        return False
    labels = [key for key, value in own["provenance"].items() if _DOUBTED.search(str(value))]
    doubted = {key: value for key, value in own["published"].items() if _DOUBTED.search(str(key))}
    sound = {key: value for key, value in own["published"].items() if key not in doubted}
    return number.value in _numbers([doubted, labels]) - _numbers(sound)


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, one in value.items():
            yield from _leaves(one, str(name))
    elif isinstance(value, list):
        for one in value:
            yield from _leaves(one, key)
    else:
        yield key, value


def _numbers(value: Any) -> set[float]:
    """All numbers of a part of a finding, those in its words too."""
    found: set[float] = set()
    for _, leaf in _leaves(value):
        if isinstance(leaf, (int, float)) and not isinstance(leaf, bool):
            found.add(float(leaf))
        elif isinstance(leaf, str):
            found |= {float(text.replace(",", "")) for text in _NUMBER.findall(leaf)}
    return found
