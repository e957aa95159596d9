"""Atomic files: whole or not there, strict JSON, and one clear line when the disk refuses."""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_lab.errors import DataError, MachineError
from lora_lab.record.atomic import make_folder, read_json, sync_tree, write_bytes, write_json, write_text


def _names(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir()]


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a tiny file system needs root")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"mount refused: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_json_is_sorted_indented_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"b": [1, 2.5, None, "é"], "a": {"x": True}})
    lines = [
        "{",
        '  "a": {',
        '    "x": true',
        "  },",
        '  "b": [',
        "    1,",
        "    2.5,",
        "    null,",
        '    "é"',
        "  ]",
        "}",
    ]
    assert path.read_text(encoding="utf-8").splitlines() == lines
    assert read_json(path) == {"a": {"x": True}, "b": [1, 2.5, None, "é"]}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, {"deep": [math.nan]}, object()])
def test_what_json_has_no_form_for_is_refused_and_the_old_file_stays(tmp_path: Path, value: object) -> None:
    path = tmp_path / "a.json"
    write_json(path, 1)
    with pytest.raises(ValueError, match=r"a\.json cannot be written"):
        write_json(path, value)
    assert read_json(path) == 1
    assert _names(tmp_path) == ["a.json"]


def test_undecodable_text_does_not_stop_a_record(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "x\udcff")
    assert (tmp_path / "a").read_bytes() == b"x\\udcff"


@pytest.mark.parametrize(
    ("content", "where", "what"),
    [
        (b"", ":1", "Expecting value"),
        (b'{"a": 1,\n "b": \n', ":3", "Expecting value"),
        (b'{"a": 1}\n{"b": 2}\n', ":2", "Extra data"),
        (b'{"a":\n "\xff"}', ":2", "not UTF-8"),
        (b'{"a": NaN}', "", "NaN is not a JSON number"),
        (b"[" * 200_000, "", "damaged"),
    ],
)
def test_damage_is_named_with_path_and_line(tmp_path: Path, content: bytes, where: str, what: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_json(path)
    problem = caught.value.problems[0]
    assert problem.where == f"{path}{where}"
    assert what in problem.message
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nope\.json: no such file"):
        read_json(tmp_path / "nope.json")


def test_full_disk_leaves_no_torso_and_says_need_and_free(tiny_disk: Path) -> None:
    path = tiny_disk / "result.json"
    write_bytes(path, b"old")
    with pytest.raises(MachineError) as caught:
        write_bytes(path, b"x" * 200_000)
    text = str(caught.value)
    assert str(path) in text and "No space left" in text and "needs 200000 bytes" in text
    free = int(text.split(", ")[1].split()[0])
    assert 0 < free < 65_536, "free bytes are told after the torso is counted in, but within the disk"
    assert caught.value.exit_code == 4 and "\n" not in text
    assert _names(tiny_disk) == ["result.json"]
    assert path.read_bytes() == b"old"
    write_bytes(path, b"y" * 20_000)  # the torso's space is free again
    assert path.stat().st_size == 20_000


def test_file_size_limit_leaves_no_torso(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(MachineError, match=r"File too large; needs 5000 bytes, \d+ bytes are free"):
            write_bytes(path, b"x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert _names(tmp_path) == []


def test_a_failure_between_write_and_rename_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_json(path, "old")

    def interrupted(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_json(path, "new")
    assert read_json(path) == "old"
    assert _names(tmp_path) == ["a.json"]


def test_content_is_synced_before_the_rename_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    real_sync, real_replace = os.fsync, Path.replace

    def sync(descriptor: int) -> None:
        calls.append("fsync folder" if Path(f"/proc/self/fd/{descriptor}").is_dir() else "fsync file")
        real_sync(descriptor)

    def replace(self: Path, target: Path) -> Path:
        calls.append("rename")
        return real_replace(self, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "replace", replace)
    write_text(tmp_path / "a", "x")
    assert calls == ["fsync file", "rename", "fsync folder"]


def test_a_file_in_the_way_of_a_folder_is_a_machine_error(tmp_path: Path) -> None:
    (tmp_path / "root").write_text("")
    with pytest.raises(MachineError) as caught:
        make_folder(tmp_path / "root" / "runs")
    assert "Not a directory" in str(caught.value) and "\n" not in str(caught.value)


def test_sync_tree_reaches_nested_files_and_leaves_links_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "weights").write_text("x")
    (tmp_path / "link").symlink_to("/dev/zero")
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(str(Path(f"/proc/self/fd/{number}").readlink())))
    sync_tree(tmp_path)
    assert sorted(synced) == sorted(map(str, [tmp_path, tmp_path / "adapter", tmp_path / "adapter" / "weights"]))
    assert json.dumps(synced).count("zero") == 0
