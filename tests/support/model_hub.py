"""The part of a model hub's interface that downloading needs, served from folders on loopback."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Hub(BaseHTTPRequestHandler):
    repositories: Mapping[str, Path] = {}
    protocol_version = "HTTP/1.1"

    def log_message(self, *_arguments: object) -> None:
        """Nothing: requests are no output of a test."""

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._send(404, b"{}", body=True)

    def _answer(self, *, body: bool) -> None:
        parts = unquote(urlparse(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self._about("/".join(parts[2:4]), tree="tree" in parts[4:], body=body)
        elif len(parts) > 3 and parts[2] == "resolve":
            self._file("/".join(parts[:2]), "/".join(parts[4:]), body=body)
        else:
            self._send(404, b"{}", body=body)

    def _about(self, name: str, *, tree: bool, body: bool) -> None:
        folder = self.repositories.get(name)
        if folder is None:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body=body)
            return
        files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        content: object = {
            "_id": "1",
            "id": name,
            "sha": COMMIT,
            "siblings": [{"rfilename": file} for file in files],
        }
        if tree:
            content = [
                {
                    "type": "file",
                    "oid": "0" * 40,
                    "size": (folder / file).stat().st_size,
                    "path": file,
                }
                for file in files
            ]
        kind = {"Content-Type": "application/json"}
        self._send(200, json.dumps(content).encode(), kind, body=body)

    def _file(self, name: str, file: str, *, body: bool) -> None:
        path = self.repositories.get(name, Path("/nonexistent")) / file
        if not path.is_file():
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}
            self._send(404, b"", headers, body=body)
            return
        data = path.read_bytes()
        tag = hashlib.sha256(data).hexdigest()
        self._send(200, data, {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT}, body=body)

    def _send(
        self, code: int, data: bytes, headers: Mapping[str, str] | None = None, *, body: bool
    ) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


@contextmanager
def serving(repositories: Mapping[str, Path]) -> Iterator[str]:
    """Serve folders as repositories; gives the address for HF_ENDPOINT."""
    handler = type("_Served", (_Hub,), {"repositories": dict(repositories)})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
