"""A W&B server in memory that suffices for the real client, with faults that tests can inject."""

import base64
import gzip
import json
import os
import re
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import RLock, Thread
from typing import Any, ClassVar

import pytest

ENTITY = "somebody"
HISTORY, EVENTS, LOGS, SUMMARY = "wandb-history.jsonl", "wandb-events.jsonl", "output.log", "wandb-summary.json"


@dataclass
class Received:
    """What the server has received of one run."""

    project: str = ""
    name: str = ""
    group: str = ""
    job_type: str = ""
    notes: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, dict[int, str]] = field(default_factory=lambda: defaultdict(dict))  # file -> offset -> line
    files: dict[str, bytes] = field(default_factory=dict)
    exit_code: int | None = None
    preempting: bool = False

    @property
    def steps(self) -> list[int]:
        """The step of every line of the history, including duplicates."""
        return [json.loads(line)["_step"] for _, line in sorted(self.lines[HISTORY].items())]

    @property
    def history(self) -> list[dict[str, Any]]:
        """The rows ordered by step; of rows with the same step the last counts, as on W&B."""
        rows = {row["_step"]: row for row in (json.loads(line) for _, line in sorted(self.lines[HISTORY].items()))}
        return [rows[step] for step in sorted(rows)]

    @property
    def summary(self) -> dict[str, Any]:
        lines = self.lines[SUMMARY]
        return json.loads(lines[max(lines)]) if lines else {}

    @property
    def state(self) -> str:
        """The run's state as W&B shows it."""
        if self.exit_code is None:
            return "preempting" if self.preempting else "running"
        if self.exit_code == 0:
            return "finished"
        return "preempted" if self.preempting else "failed"


class Loopback:
    """The server. Its faults can be changed while it runs."""

    def __init__(self) -> None:
        self.delay = 0.0  # seconds before every answer
        self.status: int | None = None  # sent with every answer, instead of the data
        self.failing = ""  # faults apply only to paths that contain this
        self.gone = False  # connections are dropped
        self.runs: dict[str, Received] = {}
        self.views: list[dict[str, Any]] = []
        self.unknown: list[str] = []  # operations that it was sent and does not know
        self.lock = RLock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"server_side": self}))
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables that point a client to this server."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": "0" * 40, "WANDB_ERROR_REPORTING": "false"}

    def recover(self) -> None:
        """Clear all faults."""
        self.delay, self.status, self.failing, self.gone = 0.0, None, "", False

    def received(self, run_id: str) -> Received:
        return self.runs.setdefault(run_id, Received())

    def stream(self, run_id: str, sent: dict[str, Any]) -> dict[str, Any]:
        """Receive lines of a run's files, and its exit code."""
        run = self.received(run_id)
        for name, chunk in (sent.get("files") or {}).items():
            run.lines[name] |= {chunk.get("offset", 0) + i: line for i, line in enumerate(chunk["content"])}
        run.exit_code = sent.get("exitcode", run.exit_code) if sent.get("complete") else None
        run.preempting |= bool(sent.get("preempting"))
        return {"exitcode": None, "limits": {}}

    def store(self, path: str, content: bytes) -> None:
        if match := re.fullmatch(r"/store/run/([^/]+)/(.+)", path):
            self.received(match[1]).files[match[2]] = content

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """Answer GraphQL by the operation's name."""
        operation = re.search(r"(?:query|mutation)\s+(\w+)", query)
        name = operation[1] if operation else query
        known = getattr(self, f"do_{name}", None)
        if known is None:
            self.unknown.append(name)
            return {"errors": [{"message": f"unknown operation {name}"}]}
        return {"data": known(variables)}

    def do_Viewer(self, _: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        viewer = {"id": "1", "entity": ENTITY, "username": ENTITY, "flags": "{}", "admin": False}
        return {"viewer": {**viewer, "teams": {"edges": [{"node": {"name": ENTITY}}]}}}

    do_GetDefaultEntity = do_Viewer  # noqa: N815

    def do_ServerFeaturesQuery(self, _: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {"serverInfo": {"features": []}}

    def do_OrganizationCoreWeaveOrganizationID(self, _: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {"entity": {"organization": None}}

    def do_RunResumeStatus(self, asked: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        model = {"id": "p", "name": asked.get("project"), "entity": {"id": "e", "name": ENTITY}, "bucket": None}
        if (run := self.runs.get(asked["name"])) is not None:
            counts = {"history": HISTORY, "events": EVENTS, "log": LOGS}
            tail = [run.lines[HISTORY][max(run.lines[HISTORY])]] if run.lines[HISTORY] else []
            model["bucket"] = {
                **dict.fromkeys(("id", "name"), asked["name"]),
                **{f"{key}LineCount": len(run.lines[name]) for key, name in counts.items()},
                "displayName": run.name,
                "tags": run.tags,
                "historyTail": json.dumps(tail),
                "eventsTail": "[]",
                "summaryMetrics": json.dumps(run.summary),
                "config": json.dumps(run.config),
                "wandbConfig": '{"t": 1}',
            }
        return {"model": model}

    NAMES: ClassVar = {"project": "project", "displayName": "name", "groupName": "group"}
    NAMES |= {"jobType": "job_type", "notes": "notes", "tags": "tags"}

    def do_UpsertBucket(self, sent: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        run = self.received(sent["name"])
        for key, name in self.NAMES.items():
            if sent.get(key) is not None:
                setattr(run, name, sent[key])
        run.config = json.loads(sent["config"]) if sent.get("config") else run.config
        project = {"id": "p", "name": run.project, "entity": {"id": "e", "name": ENTITY}}
        bucket = {"id": base64.b64encode(sent["name"].encode()).decode(), "name": sent["name"], "displayName": run.name}
        return {"upsertBucket": {"bucket": {**bucket, "project": project}, "inserted": True}}

    def do_CreateRunFiles(self, sent: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        run = sent.get("run") or sent.get("runName")
        files = [{"name": name, "uploadUrl": f"{self.url}/store/run/{run}/{name}"} for name in sent["files"]]
        return {"createRunFiles": {"runID": run, "uploadHeaders": [], "files": files}}

    def do_ArtifactType(self, _: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {"project": {"artifact": None}}

    def do_CreateArtifact(self, sent: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        digest = (sent.get("input") or sent).get("digest")
        artifact = {"id": digest, "state": "PENDING", "digest": digest}
        return {"createArtifact": {"artifact": {**artifact, "artifactSequence": {"id": "s", "latestArtifact": None}}}}

    def do_CreateArtifactManifest(self, sent: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {"createArtifactManifest": {"artifactManifest": {"id": "m", "file": self._file(sent.get("name"))}}}

    def do_UpdateArtifactManifest(self, sent: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {"updateArtifactManifest": {"artifactManifest": {"id": "m", "file": self._file("manifest")}}}

    def do_CreateArtifactFiles(self, sent: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        asked = (sent.get("input") or sent)["artifactFiles"]
        files = [{**self._file(file["name"]), "artifact": {"id": file["artifactID"]}} for file in asked]
        return {"createArtifactFiles": {"files": {"edges": [{"node": file} for file in files]}}}

    def do_CommitArtifact(self, sent: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {"commitArtifact": {"artifact": {"id": sent["artifactID"], "digest": sent["artifactID"]}}}

    def do_UpsertView2(self, sent: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        self.views.append(sent)
        return {"upsertView": {"view": {"id": "view1", "name": sent.get("name")}, "inserted": True}}

    def _file(self, name: Any) -> dict[str, Any]:
        url = f"{self.url}/store/artifact/{name}"
        file = {"id": str(name), "name": name, "displayName": name, "storagePath": name}
        return {**file, "uploadUrl": url, "uploadHeaders": [], "uploadMultipartUrls": None}


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server_side: Loopback

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except OSError:  # the client hung up
            self.close_connection = True

    def do_GET(self) -> None:
        self._handle()

    def do_POST(self) -> None:
        self._handle()

    def do_PUT(self) -> None:
        self._handle()

    def _handle(self) -> None:
        server, body = self.server_side, self._body()
        time.sleep(server.delay)
        if server.gone:
            self.close_connection = True
        elif server.status is not None and server.failing in self.path:
            self._send({"error": "as asked for"}, server.status)
        else:
            with server.lock:
                answer = self._answer(server, body)
            self._send({} if answer is None else answer, 404 if answer is None else 200)

    def _answer(self, server: Loopback, body: bytes) -> dict[str, Any] | None:
        if self.path == "/graphql":
            asked = json.loads(body)
            return server.answer(asked["query"], asked.get("variables") or {})
        if match := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path):
            return server.stream(match[1], json.loads(body))
        if self.command == "PUT":
            server.store(self.path, body)
            return {}
        return None

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b"".join(self._chunks())
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _send(self, answer: dict[str, Any], status: int) -> None:
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def loopback() -> Iterator[Loopback]:
    server = Loopback()
    thread = Thread(target=server.http.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()
        thread.join()


@contextmanager
def reached(**settings: str) -> Iterator[Loopback]:
    """A server for the clients of this process and its children; `settings`: further environment variables."""
    import wandb

    with loopback() as server, pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            patch.delenv(name)
        for name, value in (server.environment | settings).items():
            patch.setenv(name, value)
        wandb.teardown()  # it reads the environment once a process
        yield server
        wandb.teardown()
