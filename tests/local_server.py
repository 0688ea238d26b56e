"""An HTTP server on 127.0.0.1 for the tests of downloads: files with Range, and the faults that real servers have."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class LocalServer:
    """`files`: path -> bytes. `faults`: a list that is used up, one entry for each GET of a file:

    "cut:N" close after N bytes; "status:N" answer N; "norange" ignore Range; "html" send a web page; "garbage" right size,
    wrong bytes; "endless" a much longer file; "ok".
    """

    files: dict[str, bytes] = field(default_factory=dict)
    redirects: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    url: str = ""
    sent: int = 0  # bytes of bodies that a client took

    def ranges(self, path: str) -> list[str]:
        """The Range headers of all GETs of a path, "" where there was none."""
        return [headers.get("range", "") for method, asked, headers in self.requests if method == "GET" and asked == path]

    def add_index(self, package: str, wheel: str, content: bytes) -> None:
        """A project page as PEP 503 describes it."""
        digest = hashlib.sha256(content).hexdigest()
        page = f'<!DOCTYPE html><html><body><a href="../../files/{wheel}#sha256={digest}">{wheel}</a><br></body></html>'
        self.files[f"/simple/{package}/"] = page.encode()
        self.files[f"/files/{wheel}"] = content

    def add_repo(self, repo: str, files: dict[str, bytes], *, commit: str = "c" * 40) -> None:
        """A model repository as the hub describes and serves it: weights as large files, the rest in git."""
        siblings = []
        for path, content in files.items():
            row: dict[str, object] = {"rfilename": path, "size": len(content)}
            row["blobId"] = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
            if path.endswith((".gguf", ".safetensors")):
                row["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
            siblings.append(row)
            self.files[f"/{repo}/resolve/{commit}/{path}"] = content
        info = {"id": repo, "modelId": repo, "sha": commit, "tags": ["license:mit"], "siblings": siblings, "private": False}
        self.files[f"/api/models/{repo}"] = json.dumps(info).encode()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        state, path = self.server.state, self.path.partition("?")[0]
        state.requests.append((self.command, path, {key.lower(): value for key, value in self.headers.items()}))
        if path in state.redirects:
            self._send(302, b"", {"Location": state.redirects[path]}, body)
            return
        content = state.files.get(path)
        if content is None:
            # What the hub says of a repository that does not exist or may not be seen.
            self._send(404, b"not found", {"X-Error-Code": "RepoNotFound"}, body)
            return
        is_file = "/simple/" not in path and "/api/" not in path
        fault = state.faults.pop(0) if body and is_file and state.faults else "ok"
        start = 0
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if match and fault != "norange":
            start = int(match[1])
            if start >= len(content):
                self._send(416, b"", {"Content-Range": f"bytes */{len(content)}"}, body)
                return
        headers = {"Accept-Ranges": "bytes", "ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": "c" * 40}
        if path.startswith("/simple/"):
            headers["Content-Type"] = "text/html"
        if path.startswith("/api/"):
            headers["Content-Type"] = "application/json"
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._faulty(fault, content[start:], 206 if start else 200, headers, body)

    def _faulty(self, fault: str, content: bytes, status: int, headers: dict[str, str], body: bool) -> None:
        kind, _, value = fault.partition(":")
        if kind == "status":
            self._send(int(value), b"busy", {"Retry-After": "0"}, body)
        elif kind == "cut":
            self._send(status, content[: int(value)], headers, body, announced=len(content))
            self.close_connection = True
        elif kind == "html":
            self._send(200, b"<html>Please log in</html>", {"Content-Type": "text/html"}, body)
        elif kind == "garbage":
            self._send(status, bytes(len(content)), headers, body)
        elif kind == "endless":
            self._send(status, content + bytes(1 << 20), headers, body)
        else:
            self._send(status, content, headers, body)

    def _send(self, status: int, content: bytes, headers: dict[str, str], body: bool, announced: int | None = None) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content) if announced is None else announced))
        self.end_headers()
        if body:
            with contextlib.suppress(ConnectionError):
                for at in range(0, len(content), 1 << 18):
                    self.wfile.write(content[at : at + (1 << 18)])
                    self.server.state.sent += 1 << 18

    def log_message(self, format: str, *args: object) -> None:
        """Quiet: `requests` holds what came."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    state: LocalServer


@contextlib.contextmanager
def local_server() -> Iterator[LocalServer]:
    """A running server; it stops with the block."""
    server = _Server(("127.0.0.1", 0), _Handler)
    server.state = LocalServer(url=f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server.state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
