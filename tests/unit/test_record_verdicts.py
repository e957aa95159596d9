"""Looks at a study and their verdicts on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_lab.errors import DataError, InputError
from lora_lab.record.verdicts import begin_look, put_verdicts, read_verdicts


def test_a_look_is_written_before_its_verdicts(tmp_path: Path) -> None:
    assert read_verdicts(tmp_path) is None
    begin_look(tmp_path, "d" * 64, "pocket", [0, 1, 2])
    known = read_verdicts(tmp_path)
    assert known is not None and known.newest is None
    assert [(one.seeds, one.judged_at, one.verdicts) for one in known.looks] == [((0, 1, 2), None, ())]
    put_verdicts(tmp_path, [0, 1, 2], [{"claim": "x", "word": "inconclusive"}])
    put_verdicts(tmp_path, [2, 1, 0], [{"claim": "x", "word": "same direction"}])
    begin_look(tmp_path, "d" * 64, "pocket", [5, 6, 7])
    known = read_verdicts(tmp_path)
    assert known is not None and len(known.looks) == 2
    assert known.newest is not None and known.newest.verdicts == ({"claim": "x", "word": "same direction"},)
    assert known.looks[0].begun_at <= str(known.looks[0].judged_at) <= known.looks[1].begun_at
    assert (known.registration, known.scale) == ("d" * 64, "pocket")


def test_a_look_that_was_begun_goes_on(tmp_path: Path) -> None:
    first = begin_look(tmp_path, "d" * 64, "pocket", [0, 1, 2])
    assert begin_look(tmp_path, "d" * 64, "pocket", [2, 0, 1]) == first


def test_seeds_are_looked_at_once(tmp_path: Path) -> None:
    begin_look(tmp_path, "d" * 64, "pocket", [0, 1, 2])
    with pytest.raises(InputError, match="2: looked at before"):
        begin_look(tmp_path, "d" * 64, "pocket", [2, 3, 4])


def test_verdicts_by_other_criteria_are_left_alone(tmp_path: Path) -> None:
    begin_look(tmp_path, "d" * 64, "pocket", [0, 1, 2])
    before = (tmp_path / "verdicts.json").read_bytes()
    with pytest.raises(InputError, match="by other criteria"):
        begin_look(tmp_path, "e" * 64, "pocket", [3, 4, 5])
    with pytest.raises(InputError, match="no look at the seeds 7, 8, 9 was begun"):
        put_verdicts(tmp_path, [7, 8, 9], [])
    assert (tmp_path / "verdicts.json").read_bytes() == before


@pytest.mark.parametrize("content", ["{}", '{"looks": [{"seeds": 3}]}', '{"looks": 7}', "[]", "{"])
def test_a_damaged_file_says_where(tmp_path: Path, content: str) -> None:
    (tmp_path / "verdicts.json").write_text(content)
    with pytest.raises(DataError, match=r"verdicts\.json"):
        read_verdicts(tmp_path)
