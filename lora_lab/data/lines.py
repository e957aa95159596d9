"""The lines of a JSON-lines file, plain or gzip, and a refusal of what is not such a file. Torch-free."""

from __future__ import annotations

import difflib
import gzip
import hashlib
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from lora_lab.errors import DataError, Problem

# Text compresses by 3 to 10; a file that grows beyond 200 times is made to fill memory (a gzip bomb of zeros: 1,028).
MAX_RATIO = 200
MAX_FILE_BYTES = 8 * 10**9
# Below this a high ratio does no harm: a small file of many like rows is legitimate.
HARMLESS_BYTES = 16 * 2**20

_GZIP_MAGIC = b"\x1f\x8b"
_UTF8_MARK = b"\xef\xbb\xbf"
_LFS_START = b"version https://git-lfs.github.com/spec/"
_HTML_STARTS = (b"<!doctype html", b"<html", b"<head", b"<?xml", b"<!--")
_OTHER_FORMATS = {
    b"PAR1": "a parquet file",
    b"ARROW1": "an Arrow file",
    b"PK\x03\x04": "a zip file",
    b"\xff\xfe": "UTF-16 text (save it as UTF-8)",
    b"\xfe\xff": "UTF-16 text (save it as UTF-8)",
    b"\x28\xb5\x2f\xfd": "a zstandard file (only gzip is read)",
    b"BZh": "a bzip2 file (only gzip is read)",
    b"\xfd7zXZ": "an xz file (only gzip is read)",
}


class Line(NamedTuple):
    """A line without its end; `ended` is False for a last line that has no newline."""

    number: int
    content: bytes
    ended: bool


def read_lines(path: Path) -> Iterator[Line]:
    """The lines of `path`, numbered from 1, the UTF-8 mark taken off; lines end with LF or CRLF.

    Raises:
        DataError: no such file (with the nearest names), not readable, not JSON lines at all (HTML page, git-LFS
            pointer, parquet, ...), compressed file cut off or damaged, or larger than MAX_RATIO times its size.
    """
    size_bytes = _size_of(path)
    try:
        with path.open("rb") as raw:
            compressed = raw.read(2) == _GZIP_MAGIC
            raw.seek(0)
            if not compressed:
                yield from _numbered(raw, path)
                return
            _refuse_bomb(raw, path, size_bytes)
            raw.seek(0)
            yield from _numbered(cast(BinaryIO, gzip.GzipFile(fileobj=raw)), path)
    except EOFError:
        raise DataError(Problem(str(path), "compressed file is cut off")) from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(Problem(str(path), f"compressed file is damaged ({error})")) from None
    except OSError as error:
        raise DataError(Problem(str(path), f"cannot be read ({error.strerror or error})")) from None


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of the bytes on disk. The same errors for a file that is not there as `read_lines`."""
    _size_of(path)
    try:
        with path.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise DataError(Problem(str(path), f"cannot be read ({error.strerror or error})")) from None


def _size_of(path: Path) -> int:
    try:
        if path.is_file():
            return path.stat().st_size
        if path.is_dir():
            names = sorted(entry.name for entry in path.iterdir())
            raise DataError(Problem(str(path), f"is a folder, expected a file{_listing('it holds', names)}"))
        if path.exists():
            raise DataError(Problem(str(path), "is not a regular file"))
        raise DataError(Problem(str(path), _missing_file(path)))
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        raise DataError(Problem(str(path), f"cannot be read ({error})")) from None


def _missing_file(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"no such file; the folder {folder} does not exist either"
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    matches = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    hint = f'; did you mean "{matches[0]}"?' if matches else ""
    return f"no such file{hint}{_listing('the folder holds', names)}"


def _listing(title: str, names: list[str]) -> str:
    if not names:
        return f" ({title}: nothing)"
    more = f", and {len(names) - 10} more" if len(names) > 10 else ""
    return f" ({title}: {', '.join(names[:10])}{more})"


def _refuse_bomb(raw: BinaryIO, path: Path, size_bytes: int) -> None:
    """Decompresses once into nothing: a bomb made of many small rows would take minutes to parse before it showed."""
    limit_bytes = max(HARMLESS_BYTES, MAX_RATIO * size_bytes)
    text_bytes = 0
    stream = gzip.GzipFile(fileobj=raw)
    try:
        while chunk := stream.read(2**20):
            text_bytes += len(chunk)
            if text_bytes > limit_bytes:
                message = f"decompresses to more than {MAX_RATIO} times its size: refused as a decompression bomb"
                raise DataError(Problem(str(path), message))
    except (EOFError, gzip.BadGzipFile, zlib.error):
        return  # the reading that follows says so, after the problems of the lines before


def _numbered(stream: BinaryIO, path: Path) -> Iterator[Line]:
    left_bytes = MAX_FILE_BYTES
    number = 0
    while content := stream.readline(left_bytes + 1):
        number += 1
        left_bytes -= len(content)
        if left_bytes < 0:
            raise DataError(Problem(f"{path}:{number}", f"file holds more than {MAX_FILE_BYTES / 1e9:g} GB of text"))
        ended = content.endswith(b"\n")
        content = content.removesuffix(b"\n").removesuffix(b"\r")
        if number == 1:
            content = content.removeprefix(_UTF8_MARK)
            _refuse_other_formats(content, path)
        yield Line(number, content, ended)


def _refuse_other_formats(first_line: bytes, path: Path) -> None:
    start = first_line.lstrip()[:64].lower()
    if start.startswith(_HTML_STARTS):
        raise DataError(Problem(f"{path}:1", "looks like an HTML page (failed download?)"))
    if first_line.startswith(_LFS_START):
        raise DataError(Problem(f"{path}:1", "is a git-LFS pointer, not the data; run `git lfs pull`"))
    for magic, name in _OTHER_FORMATS.items():
        if first_line.startswith(magic):
            raise DataError(Problem(f"{path}:1", f"is {name}, expected JSON lines"))
