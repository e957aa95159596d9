"""A hub on this machine, for tests: what its clients ask to list and download files, answered from folders."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
import urllib.parse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

COMMIT = "a1" * 20


class FakeHub(http.server.ThreadingHTTPServer):
    """Serves `repositories` (`models/org/name` or `datasets/org/name` -> folder) at COMMIT, which is also `main`."""

    daemon_threads = True

    def __init__(self, repositories: Mapping[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories = dict(repositories)
        self.requests: list[str] = []

    @property
    def address(self) -> str:
        """What HF_ENDPOINT is to be."""
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def fake_hub(repositories: Mapping[str, Path]) -> Iterator[FakeHub]:
    """A hub within the block; afterwards nobody answers at its address."""
    hub = FakeHub(repositories)
    thread = threading.Thread(target=hub.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeHub

    def log_message(self, format: str, *args: Any) -> None:
        self.server.requests.append(f"{self.command} {self.path}")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).strip("/").split("/")
        if parts[0] == "api":
            self._api("/".join(parts[1:4]), parts[4:])
        elif "resolve" in parts:
            place = parts.index("resolve")
            name = "/".join(parts[:place])
            self._file(name if name.startswith("datasets/") else f"models/{name}", "/".join(parts[place + 2 :]))
        else:
            self._send(200, b"")

    def _api(self, name: str, rest: list[str]) -> None:
        folder = self.server.repositories.get(name)
        if folder is None:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif rest[:1] == ["tree"]:
            inner = folder / "/".join(rest[2:])
            entries = inner.rglob("*") if "recursive=true" in self.path else inner.iterdir()
            self._json([_entry(folder, path) for path in sorted(entries)])
        else:
            files = [{"rfilename": one.relative_to(folder).as_posix()} for one in folder.rglob("*") if one.is_file()]
            self._json({"id": name.partition("/")[2], "sha": COMMIT, "siblings": files, "tags": []})

    def _file(self, name: str, path: str) -> None:
        file = self.server.repositories.get(name, Path("/nowhere")) / path
        if not file.is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return
        content = file.read_bytes()
        self._send(200, content, {"ETag": f'"{_digest(content)}"', "X-Repo-Commit": COMMIT})

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, code: int, content: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(code)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _entry(folder: Path, path: Path) -> dict[str, Any]:
    name = path.relative_to(folder).as_posix()
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": "0" * 40}
    return {"type": "file", "path": name, "size": path.stat().st_size, "oid": _digest(path.read_bytes())}


def _digest(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()
