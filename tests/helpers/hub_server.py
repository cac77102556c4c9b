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
    """A repository of models or data sets, what was asked of it, and how it refuses.

    `branches` are revisions that have a folder of their own.
    """

    folder: Path
    name: str = "owner/name"
    kind: str = "model"  # or "dataset"
    branches: dict[str, Path] = field(default_factory=dict)
    revisions: tuple[str, ...] = ("main", COMMIT)
    gated: bool = False
    broken: bool = False  # every answer is a 503
    sent: dict[str, int] = field(default_factory=dict)  # bytes of each file

    @property
    def weights_sent(self) -> int:
        return sum(count for name, count in self.sent.items() if name.endswith(".safetensors"))

    def files(self, revision: str = "main") -> dict[str, Path]:
        folder = self.branches.get(revision, self.folder)
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path for path in paths}


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
            api = f"api/{repository.kind}s/{repository.name}"
            own = f"{'datasets/' if repository.kind == 'dataset' else ''}{repository.name}/resolve/"
            if path != api and not path.startswith((f"{api}/", own)):
                return self._fail(404, "RepoNotFound")
            if path.startswith(own):
                kind, rest = "file", path.removeprefix(own)
            else:
                kind, _, rest = path.removeprefix(api).strip("/").partition("/")
            revision = next((b for b in repository.branches if f"{rest}/".startswith(f"{b}/")), rest.partition("/")[0])
            name = rest.removeprefix(revision).strip("/")
            if revision and revision not in (*repository.revisions, *repository.branches):
                return self._fail(404, "RevisionNotFound")
            if kind == "file":
                return self._file(revision, name, with_body=with_body)
            is_deep = "recursive=True" in self.path or "recursive=true" in self.path
            return self._json(self._tree(revision, name, is_deep) if kind == "tree" else self._description())

        def _description(self) -> dict[str, Any]:
            siblings = [{"rfilename": name, "size": path.stat().st_size} for name, path in repository.files().items()]
            gated: Any = "manual" if repository.gated else False
            return {"id": repository.name, "sha": COMMIT, "private": False, "gated": gated, "siblings": siblings}

        def _tree(self, revision: str, below: str, is_deep: bool) -> list[dict[str, Any]]:
            files = {
                name: path
                for name, path in repository.files(revision).items()
                if not below or name.startswith(f"{below}/")
            }
            folders = {parent.as_posix() for name in files for parent in Path(name).parents} - {".", below}
            entries: list[dict[str, Any]] = [
                {"type": "file", "path": name, "size": path.stat().st_size, "oid": _etag(path)[:40]}
                for name, path in files.items()
            ]
            entries += [
                {"type": "directory", "path": folder, "size": 0, "oid": COMMIT}
                for folder in sorted(folders)
                if repository.kind == "dataset" and folder.startswith(below)
            ]
            is_here = [Path(entry["path"]).parent == Path(below) for entry in entries]
            flat = repository.kind == "model" or is_deep
            return [entry for entry, here in zip(entries, is_here, strict=True) if flat or here]

        def _file(self, revision: str, name: str, *, with_body: bool) -> None:
            if repository.gated:
                return self._fail(403, "GatedRepo")
            path = repository.files(revision).get(name)
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
