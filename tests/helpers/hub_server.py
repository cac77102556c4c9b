"""A Hugging Face hub of one repository on this machine: what its library asks for, answered from a folder.

The routes and headers are the hub's own: the repository's description and tree as JSON, files by `resolve` with ETag,
commit and ranges, and `X-Error-Code` where something is not there or not allowed.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
RANGE = re.compile(r"bytes=(\d+)-(\d*)")


@dataclass
class HubRepository:
    """A repository, what was asked of it, and how it refuses."""

    folder: Path
    name: str = "owner/name"
    revisions: tuple[str, ...] = ("main", COMMIT)
    gated: bool = False
    broken: bool = False  # every answer is a 503
    sent: dict[str, int] = field(default_factory=dict)  # bytes of each file

    @property
    def weights_sent(self) -> int:
        return sum(count for name, count in self.sent.items() if name.endswith(".safetensors"))

    def files(self) -> dict[str, Path]:
        paths = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path for path in paths}


def hub_handler(repository: HubRepository) -> type[BaseHTTPRequestHandler]:
    """A request handler for `http.server`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, *, with_body: bool) -> None:
            path = unquote(urlsplit(self.path).path).removeprefix("/")
            if repository.broken:
                return self._fail(503, "")
            api, own = f"api/models/{repository.name}", f"{repository.name}/resolve/"
            if path != api and not path.startswith((f"{api}/", own)):
                return self._fail(404, "RepoNotFound")
            if path.startswith(own):
                revision, _, name = path.removeprefix(own).partition("/")
            else:
                kind, _, revision = path.removeprefix(api).strip("/").partition("/")
                name = ""
            if revision and revision not in repository.revisions:
                return self._fail(404, "RevisionNotFound")
            if name:
                return self._file(name, with_body=with_body)
            return self._json(self._tree() if kind == "tree" else self._description())

        def _description(self) -> dict[str, Any]:
            siblings = [{"rfilename": name, "size": path.stat().st_size} for name, path in repository.files().items()]
            gated: Any = "manual" if repository.gated else False
            return {"id": repository.name, "sha": COMMIT, "private": False, "gated": gated, "siblings": siblings}

        def _tree(self) -> list[dict[str, Any]]:
            return [
                {"type": "file", "path": name, "size": path.stat().st_size, "oid": _etag(path)[:40]}
                for name, path in repository.files().items()
            ]

        def _file(self, name: str, *, with_body: bool) -> None:
            if repository.gated:
                return self._fail(403, "GatedRepo")
            path = repository.files().get(name)
            if path is None:
                return self._fail(404, "EntryNotFound")
            data, status = path.read_bytes(), 200
            headers = {"ETag": f'"{_etag(path)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            if with_body and (asked := RANGE.fullmatch(self.headers.get("Range", ""))):
                start, end = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
                headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
                data, status = data[start : end + 1], 206
            if with_body:
                repository.sent[name] = repository.sent.get(name, 0) + len(data)
            self._send(status, data, headers, with_body=with_body)

        def _json(self, content: object) -> None:
            self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

        def _fail(self, status: int, code: str) -> None:
            self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": code})

        def _send(self, status: int, data: bytes, headers: dict[str, str], *, with_body: bool = True) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if with_body:
                self.wfile.write(data)

    return Handler


def _etag(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
