"""Bad and good files, after the catalogue of bad inputs: each is answered with file, line and rule."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_lab.data.heldout import split_rows
from lora_lab.data.jsonl import check_jsonl, load_jsonl, read_rows
from lora_lab.data.lines import file_sha256
from lora_lab.data.rows import Message, Row
from lora_lab.errors import DataError
from lora_lab.schema.data import JsonlData

GOOD = b'{"text": "a"}\n{"text": "b"}\n'


def data(path: Path, **changes: object) -> JsonlData:
    values = {
        "kind": "jsonl",
        "path": str(path),
        "format": "auto",
        "heldout_path": None,
        "heldout_size": 1,
        "heldout_seed": 0,
        "template": "auto",
        "loss_on": "answer",
        "max_length": 64,
        "type_column": None,
    }
    return JsonlData.model_validate({**values, **changes})


def write(folder: Path, content: bytes, name: str = "data.jsonl") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def lines_of(*records: object) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


BAD = {
    "empty": (b"", ": 0 records"),
    "only blank lines": (b"\n\n  \n", ": 0 records"),
    "cut last line": (GOOD + b'{"text": "c', ":3: incomplete line (file cut off?)"),
    "missing column": (b'{"text": "a"}\n{"txt": "b"}\n', ':2: "text" missing; found "txt"'),
    "unknown columns": (b'{"txt": "b"}\n', ':1: columns of no known format; did you mean "text" by "txt"?'),
    "number": (b'{"text": "a"}\n{"text": 1}\n', ':2: "text" must be text, got the number 1'),
    "null": (b'{"text": "a"}\n{"text": null}\n', ':2: "text" must be text, got null'),
    "list": (b'{"text": "a"}\n{"text": ["x"]}\n', ':2: "text" must be text, got a list'),
    "empty text": (b'{"text": "a"}\n{"text": " "}\n', ':2: "text" is empty'),
    "escaped NUL": (b'{"text": "a\\u0000b"}\n', ':1: "text" holds a control character U+0000'),
    "raw NUL": (b'{"text": "a\x00b"}\n', ":1: control character U+0000 at column 12"),
    "NUL in an optional column": (
        lines_of({"instruction": "a", "input": "b\0", "output": "c"}),
        ':1: "input" holds a control character U+0000',
    ),
    "lone surrogate": (b'{"text": "a\\ud83d"}\n', ':1: "text" holds a lone surrogate U+D83D'),
    "NaN": (b'{"text": "a"}\n{"text": NaN}\n', ':2: "text" must be text, got the number nan'),
    "Infinity": (b'{"text": -Infinity}\n', ':1: "text" must be text, got the number -inf'),
    "2^70": (b'{"text": 1180591620717411303424}\n', '"text" must be text, got the number 1180591620717411303424'),
    "endless integer": (b'{"text": "a"}\n{"n": ' + b"1" * 5000 + b"}\n", ":2: not usable JSON: Exceeds the limit"),
    "duplicate key": (b'{"text": "a", "text": "b"}\n', ':1: key "text" given twice'),
    "HTML": (b"<!DOCTYPE html>\n<html></html>\n", ":1: looks like an HTML page (failed download?)"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", ":1: is a git-LFS pointer"),
    "parquet": (b"PAR1\x15\x04\x15 PAR1", ":1: is a parquet file"),
    "UTF-16": ('{"text": "a"}\n'.encode("utf-16"), ":1: is UTF-16 text (save it as UTF-8)"),
    "Latin-1": (b'{"text": "a"}\n{"text": "caf\xe9"}\n', ":2: not UTF-8 at byte 14 of the line (0xE9)"),
    "array": (b'[\n{"text": "a"}\n]\n', ":1: looks like one JSON array over many lines"),
    "array on a line": (b'[{"text": "a"}]\n', ":1: expected one JSON object per line, got a list"),
    "not JSON": (b"{'text': 'a'}\n", ":1: not valid JSON at column 2"),
    "two on a line": (b'{"text": "a"} {"text": "b"}\n', ":1: not valid JSON at column 15: Extra data"),
    "deep": (b'{"text": "a"}\n' + b"[" * 200_000 + b"\n", ":2: nested too deeply"),
    "no role": (lines_of({"messages": [{"content": "a"}]}), ':1: "messages"[0] must have role and content'),
    "bad role": (
        lines_of({"messages": [{"role": "human", "content": "a"}, {"role": "assistant", "content": "b"}]}),
        ':1: "messages"[0].role must be one of system, user, assistant, tool, got "human"',
    ),
    "no answer": (
        lines_of({"messages": [{"role": "user", "content": "a"}]}),
        ':1: "messages" must end with an assistant',
    ),
    "messages as text": (b'{"messages": "hi"}\n', ':1: "messages" must be a list'),
    "not gzip": (b"\x1f\x8b\x09garbage of another method", ": compressed file is damaged"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_file_is_named_with_line_and_rule(tmp_path: Path, name: str) -> None:
    content, expected = BAD[name]
    path = write(tmp_path, content)
    with pytest.raises(DataError) as raised:
        read_rows(path, "auto")
    assert raised.value.exit_code == 2
    assert str(raised.value).startswith(str(path))
    assert expected in str(raised.value)
    assert len(str(raised.value)) < 400


def test_all_problems_of_a_file_are_collected_and_twenty_shown(tmp_path: Path) -> None:
    path = write(tmp_path, b'{"text": "a"}\n' + b'{"txt": 1}\n' * 30)
    with pytest.raises(DataError) as raised:
        read_rows(path, "auto")
    assert [problem.where for problem in raised.value.problems[:-1]] == [f"{path}:{line}" for line in range(2, 22)]
    assert raised.value.problems[-1].message == "30 problems in all; the first 20 are shown"


def test_problems_of_both_files_are_reported_at_once(tmp_path: Path) -> None:
    train, heldout = write(tmp_path, b'{"text": 1}\n'), write(tmp_path, b"", "heldout.jsonl")
    with pytest.raises(DataError) as raised:
        load_jsonl(data(train, heldout_path=str(heldout)))
    assert [problem.where for problem in raised.value.problems] == [f"{train}:1", str(heldout)]


def test_cut_gzip_keeps_what_was_wrong_before_the_cut(tmp_path: Path) -> None:
    noise = os.urandom(40_000).hex()
    whole = gzip.compress(b'{"text": 1}\n' + lines_of({"text": noise}))
    path = write(tmp_path, whole[: len(whole) // 2], "train.jsonl.gz")
    with pytest.raises(DataError) as raised:
        read_rows(path, "text")
    assert [str(problem) for problem in raised.value.problems] == [
        f'{path}:1: "text" must be text, got the number 1',
        f"{path}: compressed file is cut off",
    ]


@pytest.mark.parametrize("unit", [b"a", b'{"text": "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"}\n'])
def test_gzip_bomb_is_stopped(tmp_path: Path, unit: bytes) -> None:
    path = write(tmp_path, gzip.compress(unit * (100_000_000 // len(unit))), "bomb.jsonl.gz")
    with pytest.raises(DataError, match="more than 200 times its size"):
        read_rows(path, "auto")


def test_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path, GOOD, "train.jsonl")
    with pytest.raises(
        DataError, match=r'no such file; did you mean "train\.jsonl"\? \(the folder holds: train\.jsonl\)'
    ):
        read_rows(tmp_path / "trian.jsonl", "auto")
    with pytest.raises(DataError, match="does not exist either"):
        read_rows(tmp_path / "nowhere" / "x.jsonl", "auto")
    with pytest.raises(DataError, match=r"is a folder, expected a file \(it holds: train\.jsonl\)"):
        read_rows(tmp_path, "auto")
    with pytest.raises(DataError, match="no such file"):
        read_rows(Path("a\0b"), "auto")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="not a regular file"):
        read_rows(tmp_path / "pipe", "auto")


def test_unreadable_file_is_an_error_of_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, GOOD)

    def refuse(*_args: object, **_kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    for read in (lambda: read_rows(path, "auto"), lambda: file_sha256(path)):
        with pytest.raises(DataError, match=r"cannot be read \(Permission denied\)"):
            read()


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + GOOD,
        GOOD.replace(b"\n", b"\r\n"),
        GOOD.rstrip(),
        b"\n" + GOOD.replace(b"\n", b"\n \n"),
        gzip.compress(GOOD),
        b'{"text": "a", "score": NaN, "id": 1180591620717411303424}\n{"text": "b", "nested": {"x": [1]}}\n',
    ],
    ids=["byte-order mark", "CRLF", "no last newline", "blank lines", "gzip", "odd values in unused columns"],
)
def test_harmless_oddities_are_read(tmp_path: Path, content: bytes) -> None:
    assert [row.text for row in read_rows(write(tmp_path, content), "auto")] == ["a", "b"]


def test_line_numbers_count_blank_lines(tmp_path: Path) -> None:
    path = write(tmp_path, b'\n\n{"text": "a"}\n')
    assert read_rows(path, "text")[0].source == f"{path}:3"


def test_ten_megabyte_line_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, lines_of({"text": "x" * 10_000_000}, {"text": "y"}))
    assert [len(row.text or "") for row in read_rows(path, "auto")] == [10_000_000, 1]


def test_formats_become_messages(tmp_path: Path) -> None:
    instruction = write(
        tmp_path,
        lines_of(
            {"instruction": "Add", "input": "1 2", "output": "3", "text": "all of it"},
            {"instruction": "Hi", "output": "Ho"},
        ),
    )
    with_input, without = read_rows(instruction, "auto")
    assert with_input.messages == (Message("user", "Add\n\n1 2"), Message("assistant", "3"))
    assert with_input.context == "1 2"
    assert without.messages == (Message("user", "Hi"), Message("assistant", "Ho")) and without.context is None
    completion = write(tmp_path, lines_of({"prompt": "p", "completion": "c"}))
    assert read_rows(completion, "auto") == [Row.from_pair("p", "c", source=f"{completion}:1")]
    turns = [("system", "s"), ("user", "u"), ("assistant", "a"), ("user", "v"), ("assistant", "b")]
    chat = write(tmp_path, lines_of({"messages": [{"role": role, "content": text} for role, text in turns]}))
    assert read_rows(chat, "auto")[0].content == tuple(turns)
    assert read_rows(instruction.parent / "data.jsonl", "chat")[0].answer == "b"


def test_asked_format_wins_over_detection(tmp_path: Path) -> None:
    path = write(tmp_path, lines_of({"prompt": "p", "completion": "c", "text": "t"}))
    assert read_rows(path, "text")[0].text == "t"


def test_separate_heldout_file(tmp_path: Path) -> None:
    train = write(tmp_path, lines_of(*({"text": f"t{index}"} for index in range(5)), {"text": "t0"}))
    heldout = write(tmp_path, lines_of(*({"text": f"h{index}"} for index in range(3))), "heldout.jsonl")
    rows = load_jsonl(data(train, heldout_path=str(heldout), heldout_size=2))
    assert [row.text for row in rows.heldout] == ["h0", "h1"] and len(rows.train) == 6
    summary = check_jsonl(data(train, heldout_path=str(heldout), heldout_size=10))
    assert (summary.rows, summary.heldout_rows, summary.heldout_asked, summary.duplicates) == (6, 3, 10, 1)
    assert summary.sha256 == file_sha256(train) and summary.heldout_sha256 == file_sha256(heldout)
    assert [note.split(": ")[1] for note in summary.notes] == [
        "1 of 6 training rows repeat an earlier row",
        "3 rows, fewer than heldout_size (10)",
    ]


def test_overlap_of_the_two_files_is_an_error(tmp_path: Path) -> None:
    train = write(tmp_path, lines_of({"text": "a"}, {"text": "b"}))
    heldout = write(tmp_path, lines_of({"text": "c"}, {"text": "b"}), "heldout.jsonl")
    with pytest.raises(DataError) as raised:
        load_jsonl(data(train, heldout_path=str(heldout), heldout_size=2))
    assert [str(problem) for problem in raised.value.problems] == [f"{train}:2: also a held-out row ({heldout}:2)"]
    assert len(load_jsonl(data(train, heldout_path=str(heldout), heldout_size=1)).train) == 2  # "b" is not used there


def test_changed_file_has_another_hash(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    before = check_jsonl(data(path)).sha256
    path.write_bytes(GOOD + b'{"text": "c"}\n')
    assert check_jsonl(data(path)).sha256 != before


def rows_of(texts: list[str]) -> list[Row]:
    return [Row.from_text(text, source=f"x:{index}") for index, text in enumerate(texts)]


def test_split_is_seeded_exact_and_complete() -> None:
    rows = rows_of([str(index) for index in range(50)])
    split = split_rows(rows, heldout_size=10, seed=3, where="x")
    assert len(split.heldout) == 10
    assert sorted([*split.train, *split.heldout], key=lambda row: int(row.text or "")) == rows
    assert split_rows(rows, heldout_size=10, seed=3, where="x") == split
    assert split_rows(rows, heldout_size=10, seed=4, where="x").heldout != split.heldout


def test_split_keeps_copies_on_one_side() -> None:
    rows = rows_of([str(index // 3) for index in range(60)] + ["single"])
    for seed in range(20):
        split = split_rows(rows, heldout_size=10, seed=seed, where="x")
        assert len(split.heldout) == 10
        assert not {row.content for row in split.train} & {row.content for row in split.heldout}


def test_split_that_cannot_be_made_is_refused() -> None:
    with pytest.raises(DataError, match=r"heldout_size \(3\) must be smaller than the number of rows \(3\)"):
        split_rows(rows_of(["a", "b", "c"]), heldout_size=3, seed=0, where="x")
    with pytest.raises(DataError, match=r"only 0 of heldout_size \(2\) rows can be held out .* 9 rows, 1 of them"):
        split_rows(rows_of(["same"] * 9), heldout_size=2, seed=0, where="x")


def test_row_holds_messages_or_text() -> None:
    with pytest.raises(ValueError, match="either messages or text"):
        Row(None, None, "x")
    with pytest.raises(ValueError, match="must end with an assistant"):
        Row((Message("user", "a"), Message("user", "b")), None, "x")


NAMES = st.sampled_from(
    ["text", "prompt", "completion", "instruction", "input", "output", "messages", "role", "content"]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | st.text(max_size=3), inner, max_size=4),
    max_leaves=8,
)


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode()), max_size=4))
def test_whatever_the_bytes_the_answer_is_rows_or_a_data_error(tmp_path: Path, lines: list[bytes]) -> None:
    path = write(tmp_path, b"\n".join(lines), "fuzz.jsonl")
    try:
        rows = read_rows(path, "auto")
    except DataError as error:
        assert error.problems and all(problem.where.startswith(str(path)) for problem in error.problems)
    else:
        assert rows and all(text.encode("utf-8") is not None for row in rows for _, text in row.content)
