"""A judge on this machine: OpenAI's chat API over HTTP, with the failures that a test asks for."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Reply:
    """What the server says to a request: a status and a text, or a body of its own. `seconds` it waits first."""

    text: str = "It is right.\n\nRating: [[7]]"
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None
    seconds: float = 0.0


BUSY = Reply("slow down", 429, {"Retry-After": "0.01"})
BROKEN = Reply("oh no", 500, {"Retry-After": "0.01"})


@dataclass
class Judge:
    """Requests as they came, and replies in turn; the last one is for all that follow."""

    url: str
    replies: list[Reply] = field(default_factory=lambda: [Reply()])
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    ended: threading.Event = field(default_factory=threading.Event)

    def reply(self, request: dict[str, Any], key: str) -> Reply:
        with self.lock:
            self.requests.append(request)
            self.keys.append(key)
            return self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]


@contextmanager
def judge_server(*replies: Reply) -> Iterator[Judge]:
    """A running judge that gives these replies."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            assert self.path == "/v1/chat/completions", self.path
            sent = self.rfile.read(length := int(self.headers["Content-Length"]))
            if len(sent) < length:
                return  # the one who asks has left
            request = json.loads(sent)
            reply = judge.reply(request, self.headers["Authorization"].removeprefix("Bearer "))
            judge.ended.wait(reply.seconds)
            body = reply.body if reply.body is not None else json.dumps(answer_to(request, reply)).encode()
            headers = {"Content-Type": "application/json", "Content-Length": str(len(body))} | reply.headers
            with suppress(ConnectionError):
                self.send_response(reply.status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # of those who leave in the middle
    judge = Judge(f"http://127.0.0.1:{server.server_port}/v1", list(replies) or [Reply()])
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield judge
    finally:
        judge.ended.set()
        server.shutdown()
        server.server_close()


def answer_to(request: dict[str, Any], reply: Reply) -> dict[str, Any]:
    """The body of a completion, or of an error."""
    if reply.status != 200:
        return {"error": {"message": reply.text, "type": "error", "code": None}}
    message = {"role": "assistant", "content": reply.text}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 0,
        "model": request["model"],
        "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
    }
