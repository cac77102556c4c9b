"""A web server of a folder on this machine, with the habits that servers have: with ranges, without, breaking off."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

RANGE = re.compile(r"bytes=(\d+)-(\d*)")


@dataclass
class FileServer:
    """How it behaves, and what was asked of it."""

    folder: Path
    ranges: bool = True
    breaks_at: int | None = None  # byte of a file before which each connection is lost
    failures: dict[str, list[int]] = field(default_factory=dict)  # statuses that come first, by name
    asked: Counter[str] = field(default_factory=Counter)  # by name
    sent: int = 0  # bytes
    url: str = ""

    @contextmanager
    def running(self) -> Iterator[FileServer]:
        with _Server(("127.0.0.1", 0), _handler(self)) as server:
            Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
            self.url = f"http://127.0.0.1:{server.server_port}"
            yield self
            server.shutdown()


class _Server(ThreadingHTTPServer):
    """Clients may go whenever they like."""

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


def _handler(server: FileServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, *, with_body: bool) -> None:
            name = unquote(urlsplit(self.path).path).removeprefix("/")
            server.asked[name] += with_body
            if with_body and server.failures.get(name):
                return self._send(server.failures[name].pop(0))
            path = server.folder / name
            if path.is_dir():
                links = "".join(f'<a href="{file.name}">{file.name}</a>' for file in sorted(path.iterdir()))
                return self._send(200, links.encode(), with_body=with_body)
            if not path.is_file():
                return self._send(404)
            data = path.read_bytes()
            asked = RANGE.fullmatch(self.headers.get("Range", ""))
            if not asked or not server.ranges:
                return self._send(200, data, with_body=with_body)
            start, end = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
            if start >= len(data):
                return self._send(416)
            self._send(206, data[start : end + 1], f"bytes {start}-{end}/{len(data)}", start, with_body=with_body)

        def _send(
            self, status: int, data: bytes = b"", content_range: str = "", start: int = 0, *, with_body: bool = True
        ) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            if content_range:
                self.send_header("Content-Range", content_range)
            self.end_headers()
            if not with_body:
                return
            broken = server.breaks_at is not None and start + len(data) > server.breaks_at
            kept = data[: max(0, (server.breaks_at or 0) - start)] if broken else data
            with suppress(ConnectionError):  # who asked has read enough
                self.wfile.write(kept)
            server.sent += len(kept)
            self.close_connection = broken or self.close_connection

    return Handler
