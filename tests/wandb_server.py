"""As much of a W&B server as a run and a report need: its GraphQL answers, and the file stream that history rows arrive by.

Written after what the 0.31 client sends. Rows land at the offset that the client names, as on the real server. What the client's own
process says of itself (telemetry, whenever it likes, also after a run has ended) is answered and not counted.
"""

from __future__ import annotations

import gzip
import json
import logging
import os
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

Answer = dict[str, Any]

TELEMETRY = "/sdk/"


class WandbServer:
    """A server on a free port; use it as a context.

    `history` holds what each run logged, `runs` what it said of itself, `views` the reports by id; `requests` counts what was asked
    about runs and reports.
    """

    def __init__(self, *, always_answer: int | None = None) -> None:
        """`always_answer` is an HTTP status to refuse everything with, such as 429; it may be set and taken away later."""
        self.always_answer = always_answer
        self.history: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self.runs: dict[str, dict[str, Any]] = {}
        self.requests = 0
        self.views: dict[str, dict[str, Any]] = {}
        self.projects: list[str] = []
        self.artifacts: list[str] = []  # the name of each, as often as it was made
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))

    def __enter__(self) -> WandbServer:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Go away: from now on connections are refused."""
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def rows(self, run: str) -> list[dict[str, Any]]:
        """Return a run's history without W&B's own columns."""
        return [{key: value for key, value in row.items() if not key.startswith("_")} for row in self.history[run]]

    def count(self, path: str) -> None:
        with self._lock:
            self.requests += not path.startswith(TELEMETRY)

    def graphql(self, query: str, variables: dict[str, Any]) -> Answer:
        if "RunResumeStatus" in query:
            return {
                "model": {"id": "p", "name": "editeval", "entity": {"id": "e", "name": "me"}, "bucket": self._bucket(variables["name"])}
            }
        if "UpsertBucket" in query:
            name = variables["name"]
            inserted = name not in self.runs
            known = {key: value for key, value in variables.items() if value is not None}
            self.runs[name] = {**self.runs.get(name, {}), **known}
            return {"upsertBucket": {"bucket": self._bucket(name), "inserted": inserted}}
        if "createRunFiles" in query:
            files = [{"name": file, "uploadUrl": f"{self.url}/upload/{file}"} for file in variables["files"]]
            return {"createRunFiles": {"runID": "id", "uploadHeaders": [], "files": files}}
        if "ArtifactType" in query:
            return {"project": {"artifact": None}}
        if "mutation CreateArtifact" in query:
            self.artifacts.append(variables["input"]["artifactCollectionName"])
            versions = {"id": "s", "latestArtifact": None}
            return {"createArtifact": {"artifact": {"id": "a", "state": "COMMITTED", "artifactSequence": versions}}}
        if "GetProjects" in query:
            edges = [{"cursor": name, "node": self._project(name, variables["entity"])} for name in self.projects]
            return {"models": {"edges": edges, "pageInfo": {"hasNextPage": False, "endCursor": None}}}
        if "upsertModel" in query:
            self.projects.append(variables["input"]["name"])
            return {"result": {"project": {"id": "p"}, "model": {"id": "p"}, "inserted": True}}
        if "upsertView" in query:
            return {"upsertView": {"view": self._view(variables), "inserted": True}}
        if "viewer" in query:
            return {"viewer": {"id": "v", "entity": "me", "username": "me", "email": "", "flags": "{}", "teams": {"edges": []}}}
        return {}

    def _project(self, name: str, entity: str) -> Answer:
        return {
            "id": f"project-{name}",
            "name": name,
            "entityName": entity,
            "createdAt": "2026-01-01T00:00:00Z",
            "isBenchmark": False,
            "user": None,
        }

    def _view(self, variables: dict[str, Any]) -> Answer:
        name = variables["id"] or f"view-{len(self.views)}"
        self.views[name] = variables
        project = self._project(variables["projectName"], variables["entityName"])
        return {
            "id": name,
            "type": variables["type"],
            "name": variables["name"],
            "displayName": variables["displayName"],
            "description": variables["description"],
            "project": {key: project[key] for key in ("id", "name", "entityName")},
            "spec": variables["spec"],
            "updatedAt": "2026-01-01T00:00:00Z",
        }

    def stream(self, run: str, files: dict[str, Any]) -> None:
        part = files.get("wandb-history.jsonl")
        if part:
            with self._lock:
                rows = self.history[run]
                rows[part["offset"] : part["offset"] + len(part["content"])] = [json.loads(line) for line in part["content"]]

    def _bucket(self, name: str) -> Answer | None:
        if name not in self.runs:
            return None
        rows = self.history[name]
        return {
            "id": name,
            "name": name,
            "displayName": name,
            "description": None,
            "sweepName": None,
            "project": {"id": "p", "name": "editeval", "entity": {"id": "e", "name": "me"}},
            "summaryMetrics": json.dumps(rows[-1] if rows else {}),
            "historyLineCount": len(rows),
            "eventsLineCount": 0,
            "logLineCount": 0,
            "historyTail": json.dumps([json.dumps(rows[-1])] if rows else []),
            "eventsTail": "[]",
            "config": self.runs[name].get("config", "{}"),
            "tags": self.runs[name].get("tags", []),
            "notes": None,
            "wandbConfig": json.dumps({"t": 1}),
        }


@contextmanager
def wandb_account(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have an account, whatever the environment says of W&B, and a client that remembers no server; its log handlers are put back."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        patch.delenv(name)
    patch.setenv("WANDB_API_KEY", "x" * 40)
    import wandb

    wandb.teardown()  # its process keeps the server of an earlier test
    logger = logging.getLogger("wandb")
    handlers = list(logger.handlers)
    yield
    logger.handlers[:] = handlers
    wandb.teardown()


def _handler(server: WandbServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *arguments: object) -> None:
            """Say nothing."""

        def answer(self) -> None:
            server.count(self.path)
            data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get("Content-Encoding") == "gzip":
                data = gzip.decompress(data)
            body: Answer = {}
            always_answer = server.always_answer
            if always_answer is None and self.path == "/graphql":
                asked = json.loads(data)
                body = {"data": server.graphql(asked["query"], asked.get("variables") or {})}
            elif always_answer is None and self.path.endswith("/file_stream"):
                server.stream(self.path.split("/")[-2], json.loads(data).get("files") or {})
            text = json.dumps(body).encode()
            self.send_response(always_answer or 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = do_PUT = answer  # noqa: N815 - the base class calls them so

    return Handler
