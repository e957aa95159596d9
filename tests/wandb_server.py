"""A stand-in for W&B's server on 127.0.0.1: it keeps runs as wandb's own client sends them, hangs, or answers 500.

It knows the few requests that a run makes: GraphQL for the run itself and for its artifacts (said to be there already,
so that no file is asked for), and the file stream for rows and summary, whose
lines are written at the offset that the client names, as W&B's protocol has it.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

API_KEY = "canarykey0" * 4
_OPERATION = re.compile(r"(?:query|mutation)\s+(\w+)")


@dataclass
class StoredRun:
    """A run as the server has it. `exit_codes`: one for each time it was ended."""

    project: str
    attributes: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    history: list[str] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    exit_codes: list[int] = field(default_factory=list)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The history without wandb's own keys."""
        lines = [json.loads(line) for line in self.history]
        return [{key: value for key, value in line.items() if not key.startswith("_")} for line in lines]


@dataclass
class StandIn:
    """What the server has been sent. mode: `works`, `hangs` or `fails`. bodies: every request's bytes, unpacked."""

    address: str = ""
    mode: str = "works"
    runs: dict[str, StoredRun] = field(default_factory=dict)
    bodies: list[bytes] = field(default_factory=list)
    operations: list[str] = field(default_factory=list)
    artifacts: list[dict[str, Any]] = field(default_factory=list)
    uploads: list[str] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)

    def variables(self) -> dict[str, str]:
        """The environment that leads wandb here."""
        return {"WANDB_BASE_URL": self.address, "WANDB_API_KEY": API_KEY}

    def graphql(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer's `data`."""
        found = _OPERATION.search(request["query"])
        operation = found.group(1) if found else request["query"][:80]
        self.operations.append(operation)
        values = request.get("variables") or {}
        if operation == "UpsertBucket":
            return self._upsert(values)
        if operation == "RunResumeStatus":
            return {"model": {"id": "p", "name": "p", "entity": {"name": "e"}, "bucket": self._status(values["name"])}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.address}/upload/{name}"} for name in values["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        if operation == "ArtifactType":
            return {"project": {"artifact": None}}
        if operation == "CreateArtifact":
            self.artifacts.append(values["input"])
            sequence = {"latestArtifact": None}
            return {"createArtifact": {"artifact": {"id": "a", "state": "COMMITTED", "artifactSequence": sequence}}}
        viewer = {"id": "u", "entity": "e", "username": "e", "email": "e@e", "flags": "{}", "teams": {"edges": []}}
        return {"viewer": viewer, "serverInfo": None}

    def _upsert(self, values: dict[str, Any]) -> dict[str, Any]:
        name = values["name"]
        run = self.runs.setdefault(name, StoredRun(values["project"]))
        kept = {key: values.get(key) for key in ("groupName", "displayName", "jobType", "tags") if values.get(key)}
        run.attributes.update(kept)
        if values.get("config"):
            run.config = json.loads(values["config"])
        project = {"id": "p", "name": values["project"], "entity": {"id": "e", "name": "e"}}
        bucket = {"id": base64.b64encode(name.encode()).decode(), "name": name, "displayName": name, "project": project}
        return {"upsertBucket": {"bucket": {**bucket, "historyLineCount": len(run.history)}, "inserted": True}}

    def _status(self, name: str) -> dict[str, Any] | None:
        run = self.runs.get(name)
        if run is None:
            return None
        return {
            "id": base64.b64encode(name.encode()).decode(),
            "name": name,
            "summaryMetrics": json.dumps(run.summary),
            "displayName": name,
            "historyLineCount": len(run.history),
            "eventsLineCount": 0,
            "logLineCount": 0,
            "historyTail": json.dumps(run.history[-1:]),
            "eventsTail": "[]",
            "config": json.dumps(run.config),
            "tags": [],
            "wandbConfig": json.dumps({"t": 1}),
        }

    def stream(self, name: str, request: dict[str, Any]) -> None:
        """A request of the file stream: lines at an offset, the summary, the end."""
        run = self.runs[name]
        for file, part in (request.get("files") or {}).items():
            if file == "wandb-history.jsonl":
                run.history[part["offset"] : part["offset"] + len(part["content"])] = part["content"]
            if file == "wandb-summary.json":
                run.summary = json.loads(part["content"][-1])
        if request.get("complete"):
            run.exit_codes.append(request["exitcode"])


def _handler(stand_in: StandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            stand_in.bodies.append(body)
            if stand_in.mode == "hangs":
                stand_in.released.wait(60)
            if stand_in.mode != "works":
                self._answer(500, {"errors": [{"message": "broken"}]})
            elif self.path.endswith("/graphql"):
                self._answer(200, {"data": stand_in.graphql(json.loads(body))})
            elif self.path.startswith("/upload/"):
                stand_in.uploads.append(self.path.removeprefix("/upload/"))
                self._answer(200, {})
            else:
                stand_in.stream(self.path.split("/")[-2], json.loads(body))
                self._answer(200, {})

        do_PUT = do_GET = do_POST  # noqa: N815

        def _answer(self, status: int, value: object) -> None:
            content = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            with suppress(OSError):  # who asked has left
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    return Handler


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that are killed reset their connections; that is what some tests are about."""


@contextmanager
def stand_in_server() -> Iterator[StandIn]:
    """A stand-in that listens within the block."""
    stand_in = StandIn()
    server = _QuietServer(("127.0.0.1", 0), _handler(stand_in))
    stand_in.address = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield stand_in
    finally:
        stand_in.released.set()
        server.shutdown()
        server.server_close()
