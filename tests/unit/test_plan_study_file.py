"""Study files on disk: the traps of YAML, and problems shown with line and column."""

from __future__ import annotations

import contextlib
import math
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_lab.errors import InputError
from lora_lab.plan.strict_yaml import SIZE_LIMIT_BYTES, read_yaml
from lora_lab.plan.study_file import find_study, read_study

GOOD = """\
question: Does the rank matter more than where the adapter sits?
source: {title: A paper, url: https://example.org, notes: smaller model}
base: {model: smollm2_135m, learning_rate: 1e-4}
baseline: true
seeds: [0, 1, 2]
grids:
  - {rank: [2, 8, 32], target: [qv, all_linear]}
  - {quantization: [none, nf4], rank: [8], target: [qv]}
  - zip: {rank: [8, 64], alpha: [16, 128]}
metrics: [heldout/loss, skills_unseen/acc]
claims: []
"""


def write(folder: Path, text: str | bytes, name: str = "look.yaml") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def value_of(folder: Path, text: str) -> Any:
    return read_yaml(write(folder, f"x: {text}\n")).content["x"]


def test_the_example_of_the_design(tmp_path: Path) -> None:
    study = read_study(write(tmp_path, GOOD))
    assert study.name == "look"
    assert study.base == {"model": "smollm2_135m", "learning_rate": 1e-4}
    assert study.seeds == (0, 1, 2)
    assert study.metrics == ("heldout/loss", "skills_unseen/acc")
    assert study.grids[1].dimensions == ({"quantization": ("none", "nf4")}, {"rank": (8,)}, {"target": ("qv",)})
    assert study.grids[2].dimensions == ({"rank": (8, 64), "alpha": (16, 128)},)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1E5", 1e5), ("-2.5e+3", -2500.0), ("1.", 1.0), (".5", 0.5), ("2.0e-3", 2e-3), ("3", 3),
        ("-7", -7), ("1_000", 1000), ("0", 0), ("true", True), ("False", False), ("null", None), ("~", None),
        ("", None), (".inf", math.inf), ("off", "off"), ("on", "on"), ("yes", "yes"), ("no", "no"), ("n", "n"),
        ("none", "none"), ("010", "010"), ("0x1f", "0x1f"), ("1:30", "1:30"), ("2026-01-01", "2026-01-01"),
        ("1e", "1e"), ("e5", "e5"), ("r/2", "r/2"), ("2r", "2r"), ("'1e-4'", "1e-4"), ('"true"', "true"),
        ("<<", "<<"), ("[1e-3, off, [a]]", [1e-3, "off", ["a"]]), ("{a: 1}", {"a": 1}), ("=", "="),
    ],
)  # fmt: skip
def test_scalars(text: str, value: object, tmp_path: Path) -> None:
    read = value_of(tmp_path, text)
    assert (read, type(read)) == (value, type(value))


@given(st.floats(allow_nan=False) | st.integers(-(10**30), 10**30))
def test_every_number_python_prints_is_read_back(tmp_path_factory: Any, value: float) -> None:
    text = repr(value).replace("inf", ".inf")
    read = value_of(tmp_path_factory.getbasetemp(), text)
    assert (read, type(read)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ("a: 1\n\tb: 2\n", ":2:1", "cannot start any token"),
        ("a: 1\nb: 2\na: 3\n", ":3:1", 'key "a" is given twice (first on line 1)'),
        ("x:\n  a: 1\n  a: 2\n", ":3:3", 'key "a" is given twice'),
        ("x: {a: 1, a: 2}\n", ":1:11", 'key "a" is given twice'),
        ("x: !!python/object/apply:os.system [echo]\n", ":1:4", "the tag !!python/object/apply:os.system is not taken"),
        ("x: !!python/name:os.system\n", ":1:4", "not taken"),
        ("x: !function f\n", ":1:4", "the tag !function is not taken"),
        ("x: !!int '3'\n", ":1:4", "not taken"),
        ("x: !!set {a}\n", ":1:4", "not taken"),
        ("a: &a [1]\nb: *a\n", ":2:4", "aliases"),
        ("a: &a [*a]\n", ":1:8", "aliases"),
        ("b: &x {c: 1}\na:\n  <<: *x\n", ":3:7", "aliases"),
        ("x: [1, 2\n", ":2:1", "expected ',' or ']'"),
        ("a: 1\n---\nb: 2\n", ":2:1", "another document"),
        ("? [a]\n: 1\n", ":1:3", "expected a plain name as key"),
        ("a: 1\nb: \x00\n", ":2:4", "U+0000 is not allowed"),
        ("a: 1\nb: \x07\n", ":2:4", "U+0007 is not allowed"),
        ("x: 1__0\n", ":1:4", "is not a number that fits"),
        ("x: " + "9" * 5000, ":1:4", "is not a number that fits"),
        ("x: " + "[" * 300_000, ":1:23", "nested more than 20 levels deep"),
        ("x: " + "{a: " * 100_000, ":1:", "nested more than"),
        ("x: [" + "1," * 490_000 + "1]", ":1:", "more than 50,000 keys and values"),
        ("- 1\n", ".yaml", "expected a mapping of keys to values, got a list"),
        ("word\n", ".yaml", "got one value"),
        ("", ".yaml", "got an empty file"),
        ("# only a comment\n", ".yaml", "got an empty file"),
        ("<!DOCTYPE html><html>\n", ".yaml", "got one value"),
    ],
)
def test_what_is_refused(text: str, place: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    with pytest.raises(InputError) as caught:
        read_yaml(path)
    (problem,) = caught.value.problems
    assert message in problem.message
    assert problem.where.startswith(str(path)) and place in problem.where


def test_refusing_a_hostile_file_costs_no_more_than_reading_a_long_one(tmp_path: Path) -> None:
    """Ten times as many nodes as are read, but not ten times the seconds: reading ends where the limit is passed."""

    def seconds(text: str) -> float:
        path = write(tmp_path, text)
        start = time.process_time()
        with contextlib.suppress(InputError):
            read_yaml(path)
        return time.process_time() - start

    most = 4 * seconds("x: [" + "1," * 24_000 + "1]")
    for text in ("x: " + "[" * 300_000, "x: " + "{a: " * 100_000, "x: [" + "1," * 490_000 + "1]"):
        assert seconds(text) < 2 * most


def test_encodings(tmp_path: Path) -> None:
    assert read_yaml(write(tmp_path, b"\xef\xbb\xbfa: \xc3\xa9\r\nb: 2\r\n")).content == {"a": "é", "b": 2}
    for encoding in ("utf-16", "utf-16-le", "utf-32"):
        with pytest.raises(InputError, match="save it as UTF-8"):
            read_yaml(write(tmp_path, "a: 1\n".encode(encoding)))
    with pytest.raises(InputError, match=r"look\.yaml:2: byte 0xe9 is not UTF-8"):
        read_yaml(write(tmp_path, b"a: 1\nb: \xe9\n"))


def test_size_limit(tmp_path: Path) -> None:
    line = "# " + "x" * 97 + "\n"
    fits = "a: 1\n" + line * 9_999
    assert len(fits) <= SIZE_LIMIT_BYTES
    assert read_yaml(write(tmp_path, fits)).content == {"a": 1}
    with pytest.raises(InputError, match="larger than 1000000 bytes"):
        read_yaml(write(tmp_path, fits + line * 2))


def test_problems_are_shown_with_their_line(tmp_path: Path) -> None:
    lines = [
        "question: q",
        "baseline: 3",
        "grids:",
        "  - {rank: [1]}",
        "  - rank: [2]",
        "    alpha: 5",
        "  - zip: {rank: [1, 2], alpha: [1]}",
        "sedes: [1]",
    ]
    path = write(tmp_path, "\n".join(lines))
    with pytest.raises(InputError) as caught:
        read_study(path)
    shown = {problem.where.removeprefix(f"{path}:"): problem.message for problem in caught.value.problems}
    assert shown.keys() == {"2:11", "6:12", "7:5", "8:8"}
    assert shown["6:12"].startswith("grids.1.alpha: expected a list of values")
    assert 'did you mean "seeds"' in shown["8:8"]


def test_a_study_is_found_by_name(tmp_path: Path) -> None:
    own, shipped = tmp_path / "own", tmp_path / "shipped"
    own.mkdir()
    shipped.mkdir()
    write(shipped, GOOD, "first_look.yaml")
    assert find_study("first_look", [own, shipped]) == shipped / "first_look.yaml"
    write(own, GOOD, "first_look.yaml")
    assert find_study("first_look", [own, shipped, tmp_path / "absent"]) == own / "first_look.yaml"
    with pytest.raises(InputError, match='no study "first_lok"; did you mean "first_look"'):
        find_study("first_lok", [own, shipped])
    for name in ("../shipped/first_look", "/etc/passwd", ".", "", "a\nb"):
        with pytest.raises(InputError, match="study: expected 1 to 80"):
            find_study(name, [own])


def test_a_missing_file(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    with pytest.raises(InputError, match=r"no such file.*did you mean"):
        read_study(tmp_path / "lok.yaml")
    with pytest.raises(InputError, match="expected a file"):
        read_study(tmp_path)
