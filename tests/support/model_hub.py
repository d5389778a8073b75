"""The part of a model hub's interface that is needed here, served from folders on loopback.

Reading: information, lists, files and ranges of files. Writing, with a token: a repository, files
by git-lfs or in the commit, the commit. For huggingface_hub's own client, over real HTTP.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_LARGE = 10_000  # files from here on go by git-lfs


@dataclass
class Hub:
    """What is served, what was asked, and what was written. token: who may write.

    repositories: folders by name; a data set's name begins with `datasets/`.
    """

    address: str
    repositories: dict[str, Path]
    place: Path | None = None
    token: str = ""
    private: dict[str, bool] = field(default_factory=dict)
    log: list[tuple[str, str, int]] = field(default_factory=list)
    blobs: dict[str, bytes] = field(default_factory=dict)

    def sent(self, end: str) -> int:
        """Bytes of bodies that were answered for paths with this end."""
        return sum(size for _, path, size in self.log if path.endswith(end))


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_arguments: object) -> None:
        """Nothing: requests are no output of a test."""

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    @property
    def _parts(self) -> list[str]:
        return unquote(urlparse(self.path).path).strip("/").split("/")

    @property
    def _allowed(self) -> bool:
        return bool(self.hub.token) and self.headers.get("Authorization") == (
            f"Bearer {self.hub.token}"
        )

    def _answer(self, *, body: bool) -> None:
        parts = self._parts
        if parts[:1] == ["api"] and parts[1] in ("models", "datasets"):
            kind = "" if parts[1] == "models" else "datasets/"
            self._about(kind + "/".join(parts[2:4]), tree="tree" in parts[4:], body=body)
            return
        kind = "datasets/" if parts[0] == "datasets" else ""
        parts = parts[1:] if kind else parts
        if len(parts) > 3 and parts[2] == "resolve":
            self._file(kind + "/".join(parts[:2]), "/".join(parts[4:]), body=body)
        else:
            self._send(404, b"{}", body=body)

    def _hidden(self, name: str) -> bool:
        private = self.hub.private.get(name, False) and not self._allowed
        return private or name not in self.hub.repositories

    def _about(self, name: str, *, tree: bool, body: bool) -> None:
        if self._hidden(name):
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body=body)
            return
        folder = self.hub.repositories[name]
        files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        content: object = {
            "_id": "1",
            "id": name.removeprefix("datasets/"),
            "sha": COMMIT,
            "private": self.hub.private.get(name, False),
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
        path = Path("/nonexistent") if self._hidden(name) else self.hub.repositories[name] / file
        if not path.is_file():
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}
            self._send(404, b"", headers, body=body)
            return
        data = path.read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        if wanted is None:
            self._send(200, data, headers, body=body)
            return
        first, last = int(wanted[1]), min(int(wanted[2]), len(data) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        self._send(206, data[first : last + 1], headers, body=body)

    def _send(
        self, code: int, data: bytes, headers: Mapping[str, str] | None = None, *, body: bool
    ) -> None:
        self.hub.log.append((self.command, urlparse(self.path).path, len(data) if body else 0))
        self.send_response(code)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def do_POST(self) -> None:
        data = self._body()
        parts = self._parts
        if not self._allowed:
            code = 401 if self.hub.token else 404
            self._send(code, b'{"error":"Invalid credentials"}', body=True)
        elif parts == ["api", "repos", "create"]:
            self._create(json.loads(data))
        elif parts[4:5] == ["preupload"]:
            self._preupload(json.loads(data))
        elif parts[2:] == ["info", "lfs", "objects", "batch"]:
            self._batch(json.loads(data))
        elif parts[4:5] == ["commit"]:
            self._commit("/".join(parts[2:4]), data)
        else:
            self._json({})

    def do_PUT(self) -> None:
        data = self._body()
        self.hub.blobs[hashlib.sha256(data).hexdigest()] = data
        self._json({})

    def _body(self) -> bytes:
        """Whole, or in chunks as a file is sent."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _json(self, content: Any) -> None:
        kind = {"Content-Type": "application/json"}
        self._send(200, json.dumps(content).encode(), kind, body=True)

    def _create(self, asked: Mapping[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}" if "organization" in asked else ""
        assert self.hub.place is not None
        folder = self.hub.place / name
        folder.mkdir(parents=True, exist_ok=True)
        self.hub.repositories.setdefault(name, folder)
        hidden = bool(asked.get("private")) or asked.get("visibility") == "private"
        self.hub.private.setdefault(name, hidden)
        self._json({"url": f"{self.hub.address}/{name}"})

    def _preupload(self, asked: Mapping[str, Any]) -> None:
        files = [
            {
                "path": one["path"],
                "uploadMode": "lfs" if one["size"] >= _LARGE else "regular",
                "shouldIgnore": False,
            }
            for one in asked["files"]
        ]
        self._json({"files": files})

    def _batch(self, asked: Mapping[str, Any]) -> None:
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.hub.address}/lfs/{one['oid']}"}}}
            for one in asked["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def _commit(self, name: str, data: bytes) -> None:
        folder = self.hub.repositories[name]
        for line in data.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                assert value["encoding"] == "base64"
                content = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                content = self.hub.blobs[value["oid"]]
            else:
                continue
            goal = folder / value["path"]
            goal.parent.mkdir(parents=True, exist_ok=True)
            goal.write_bytes(content)
        url = f"{self.hub.address}/{name}/commit/{COMMIT}"
        self._json({"success": True, "commitOid": COMMIT, "commitUrl": url})


@contextmanager
def hub(
    repositories: Mapping[str, Path], place: Path | None = None, token: str = ""
) -> Iterator[Hub]:
    """Serve folders as repositories; new ones are made in `place` by whoever has the token."""
    handler = type("_Served", (_Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    address = f"http://127.0.0.1:{server.server_port}"
    handler.hub = Hub(address, dict(repositories), place, token)  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield handler.hub  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def serving(repositories: Mapping[str, Path]) -> Iterator[str]:
    """Serve folders as repositories; gives the address for HF_ENDPOINT."""
    with hub(repositories) as found:
        yield found.address


def use(found: Hub, monkeypatch: Any, cache: Path) -> None:
    """Let huggingface_hub's client in this process ask this hub, with a cache of its own."""
    from huggingface_hub import constants, hf_api  # noqa: PLC0415 - for tests that need it

    template = f"{found.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "ENDPOINT", found.address)
    monkeypatch.setattr(hf_api.api, "endpoint", found.address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
