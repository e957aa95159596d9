"""The layer log of a run that goes on from a checkpoint begins as the attempt before it did."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from lora_lab.errors import DataError
from lora_lab.record.layer_log import copy_observations, read_observations, write_observation


def test_a_new_attempt_begins_with_what_was_observed_before_the_checkpoint(tmp_path: Path) -> None:
    old, new = tmp_path / "old.jsonl", tmp_path / "layers.jsonl"
    for step in (2, 4, 6):
        write_observation(old, step, "norms", {"update": {"0": step / 3, "1": math.nan}})
        write_observation(old, step, "routing", {"routers": {}})
    whole = old.read_bytes()
    with old.open("ab") as stream:
        stream.write(b'{"step": 7, "ki')
    assert copy_observations(old, new, up_to=5) == 4
    assert new.read_bytes() == b"".join(whole.splitlines(keepends=True)[:4])
    write_observation(new, 6, "norms", {"update": {"0": 2.0}})
    assert [line["step"] for line in read_observations(new, "norms")] == [2, 4, 6]
    assert read_observations(new, "norms")[0]["update"] == {"0": 2 / 3, "1": None}


def test_nothing_observed_makes_no_file(tmp_path: Path) -> None:
    old, new = tmp_path / "old.jsonl", tmp_path / "layers.jsonl"
    assert copy_observations(old, new, up_to=5) == 0
    write_observation(old, 6, "norms", {})
    assert copy_observations(old, new, up_to=5) == 0 and not new.exists()


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    old, new = tmp_path / "old.jsonl", tmp_path / "layers.jsonl"
    old.write_text('{"step": 1, "kind": "norms"}\n{"ste\n{"step": 3, "kind": "norms"}\n')
    with pytest.raises(DataError, match=r"old\.jsonl:2: damaged line"):
        copy_observations(old, new, up_to=3)
    assert not new.exists()
