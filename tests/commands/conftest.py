"""A server on the loopback interface that can misbehave in every way that downloads must stand."""

from __future__ import annotations

import hashlib
import json
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest


@dataclass
class Faults:
    """How the next answers go wrong. Lists are used up from the front, one item a connection."""

    cut_after: list[int] = field(default_factory=list)
    """Bytes of the body after which the connection is closed."""
    status: list[int] = field(default_factory=list)
    announce_more: int = 0
    """Added to the true length in Content-Length."""
    ignore_range: bool = False
    etag: str | None = '"v1"'
    content_type: str = "application/zip"
    wait_s: float = 0.0


class Server:
    """`files` maps paths to bytes; `requests` holds (path, Range header) of what was asked by GET."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.faults = Faults()
        self.requests: list[tuple[str, str | None]] = []
        self.headers: list[dict[str, str]] = []
        self.heads: list[tuple[str, dict[str, str]]] = []
        self.redirects: dict[str, str] = {}
        self.hub_headers: dict[str, dict[str, str]] = {}
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.answer(self)

            def do_HEAD(self) -> None:
                server.answer_head(self)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.root = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def url(self, path: str) -> str:
        return f"{self.root}/{path}"

    def put(self, path: str, body: bytes) -> str:
        self.files[f"/{path}"] = body
        return self.url(path)

    def put_hub(
        self, repo: str, kind: str, files: dict[str, bytes], *, commit: str, large: bool = True
    ) -> None:
        """The hub's answers about one repository at one commit."""
        siblings, tree = [], []
        for name, body in files.items():
            blob = hashlib.sha1(f"blob {len(body)}\0".encode() + body).hexdigest()
            entry: dict[str, Any] = {"rfilename": name, "size": len(body), "blobId": blob}
            node: dict[str, Any] = {"type": "file", "path": name, "size": len(body), "oid": blob}
            etag = blob
            if large:
                sha = hashlib.sha256(body).hexdigest()
                entry["lfs"] = {"size": len(body), "sha256": sha, "pointerSize": 134}
                node["lfs"] = {"size": len(body), "oid": sha, "pointerSize": 134}
                etag = sha
            siblings.append(entry)
            tree.append(node)
            prefix = "datasets/" if kind == "dataset" else ""
            path = f"/{prefix}{repo}/resolve/{commit}/{name}"
            self.files[path] = body
            self.hub_headers[path] = {
                "X-Repo-Commit": commit,
                "X-Linked-Etag": f'"{etag}"',
                "X-Linked-Size": str(len(body)),
            }
        info = json.dumps(
            {"id": repo, "sha": commit, "siblings": siblings, "tags": [], "downloads": 0}
        ).encode()
        for revision in ("main", commit):
            self.files[f"/api/{kind}s/{repo}/revision/{revision}"] = info
        self.files[f"/api/{kind}s/{repo}"] = info
        self.files[f"/api/{kind}s/{repo}/tree/{commit}"] = json.dumps(tree).encode()

    def answer_head(self, request: BaseHTTPRequestHandler) -> None:
        """The hub's answer about one of its files, which never goes wrong; `heads` holds (path, headers) of these."""
        path = request.path.partition("?")[0]
        self.heads.append((path, dict(request.headers)))
        if path in self.redirects:
            request.send_response(302)
            request.send_header("Location", self.redirects[path])
        else:
            request.send_response(200 if path in self.files else 404)
            request.send_header("Content-Length", str(len(self.files.get(path, b""))))
        for name, value in self.hub_headers.get(path, {}).items():
            request.send_header(name, value)
        request.end_headers()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path, wanted = request.path.partition("?")[0], request.headers.get("Range")
        faults = self.faults
        self.requests.append((path, wanted))
        self.headers.append(dict(request.headers))
        if path in self.redirects:
            request.send_response(302)
            request.send_header("Location", self.redirects[path])
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        body = self.files.get(path)
        status = faults.status.pop(0) if faults.status else 200 if body is not None else 404
        if status != 200 or body is None:
            request.send_response(status)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        start = 0
        guard = request.headers.get("If-Range")
        if wanted and not faults.ignore_range and guard in (None, faults.etag):
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            if start >= len(body):
                request.send_response(416)
                request.send_header("Content-Range", f"bytes */{len(body)}")
                request.send_header("Content-Length", "0")
                request.end_headers()
                return
            request.send_response(206)
            request.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            request.send_response(200)
        if faults.etag is not None:
            request.send_header("ETag", faults.etag)
        kind = "application/json" if path.startswith("/api/") else faults.content_type
        request.send_header("Content-Type", kind)
        request.send_header("Content-Length", str(len(body) - start + faults.announce_more))
        request.end_headers()
        rest = body[start:]
        if faults.wait_s:
            threading.Event().wait(faults.wait_s)
        if faults.cut_after:
            rest = rest[: faults.cut_after.pop(0)]
        request.wfile.write(rest)
        request.close_connection = True


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.http.shutdown()
    running.http.server_close()


def noise(size: int, seed: int = 0) -> bytes:
    """Bytes that cannot be compressed."""
    blocks = (hashlib.sha256(f"{seed}.{index}".encode()).digest() for index in range(size // 32 + 1))
    return b"".join(blocks)[:size]


CANVAS = {f"{style}/{kind}/{number}.jpg": noise(900, number) for style in ("Cubism", "Seed_Images")
          for kind in ("Cats", "Dogs") for number in (1, 2, 3)}  # fmt: skip
"""A data set in the layout of quick_canvas."""


def zip_bytes(folder: Path, files: dict[str, bytes], prefix: str = "sample/") -> bytes:
    """A zip archive with `files` below `prefix`."""
    path = folder / f"made-{len(list(folder.iterdir()))}.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, body in files.items():
            archive.writestr(prefix + name, body)
    content = path.read_bytes()
    path.unlink()
    return content


@pytest.fixture
def canvas_zip(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return zip_bytes(tmp_path_factory.mktemp("made"), CANVAS)
