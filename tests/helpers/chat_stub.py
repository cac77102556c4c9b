"""A chat server on this machine: OpenAI's stream of chunks over HTTP, with the failures that a test asks for."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

USAGE = {
    "prompt_tokens": 30,
    "completion_tokens": 4,
    "total_tokens": 34,
    "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
}
CHUNK = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1764300000, "model": "a-model"}


def chunk(delta: dict[str, Any], finish: str | None = None, **more: object) -> bytes:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    return event(json.dumps(CHUNK | {"choices": [choice]} | more))


def usage_chunk(usage: dict[str, Any] | None = None) -> bytes:
    return event(json.dumps(CHUNK | {"choices": [], "usage": usage or USAGE}))


def event(data: str) -> bytes:
    return f"data: {data}\n\n".encode()


DONE = event("[DONE]")
WORDS = [chunk({"content": word}, usage=None) for word in ("Snow", " on", " a", " roof")]
STREAM = (chunk({"role": "assistant", "content": ""}), *WORDS, chunk({}, "length"), usage_chunk(), DONE)


@dataclass(frozen=True)
class Reply:
    """What the server says to a request: pieces of a chunked body, or a whole one. `cut` leaves before its end."""

    pieces: tuple[bytes, ...] = STREAM
    status: int = 200
    kind: str = "text/event-stream"
    body: bytes | None = None
    headers: tuple[tuple[str, str], ...] = ()
    cut: bool = False
    waits: bool = False  # until the test is over


def failure(status: int, message: str, headers: tuple[tuple[str, str], ...] = ()) -> Reply:
    error = {"message": message, "type": "an_error", "param": None, "code": None}
    return Reply(status=status, kind="application/json", body=json.dumps({"error": error}).encode(), headers=headers)


BUSY = failure(429, "Too many requests are waiting.", (("Retry-After", "0.001"),))


@dataclass
class Chat:
    """Requests as they came, and replies in turn; the last one is for all that follow."""

    url: str
    replies: list[Reply]
    models: Reply
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    connections: set[Any] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)
    ended: threading.Event = field(default_factory=threading.Event)

    def reply(self, request: dict[str, Any]) -> Reply:
        with self.lock:
            self.requests.append(request)
            return self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]


def model_list(*names: str) -> Reply:
    entries = [{"id": name, "object": "model", "created": 1764300000, "owned_by": "a-company"} for name in names]
    body = json.dumps({"object": "list", "data": entries}).encode()
    return Reply(kind="application/json", body=body)


@contextmanager
def chat_server(*replies: Reply, models: Reply | None = None) -> Iterator[Chat]:
    """A running server that gives these replies."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.hear()
            self.say(chat.models if self.path == "/v1/models" else failure(404, "Not Found"))

        def do_POST(self) -> None:
            self.hear()
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.say(chat.reply(request) if self.path == "/v1/chat/completions" else failure(404, "Not Found"))

        def hear(self) -> None:
            with chat.lock:
                chat.keys.append(self.headers["Authorization"])
                chat.connections.add(self.client_address)

        def say(self, reply: Reply) -> None:
            with suppress(ConnectionError):
                if reply.waits:
                    chat.ended.wait(60)
                self.send_response(reply.status)
                self.send_header("Content-Type", reply.kind)
                for name, value in reply.headers:
                    self.send_header(name, value)
                if reply.body is not None:
                    self.send_header("Content-Length", str(len(reply.body)))
                    self.end_headers()
                    self.wfile.write(reply.body)
                    return
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                for piece in reply.pieces:
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                if reply.cut:
                    self.close_connection = True
                else:
                    self.wfile.write(b"0\r\n\r\n")

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128  # who comes when 5 are waiting would be turned away now and then

    server = Server(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # of those who leave in the middle
    url = f"http://127.0.0.1:{server.server_port}/v1"
    chat = Chat(url, list(replies) or [Reply()], models or model_list("a-model"))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield chat
    finally:
        chat.ended.set()
        server.shutdown()
        server.server_close()
