"""A client of OpenAI's chat API that keeps time: when each piece of a streamed answer came, and what was counted.

It is the standard library's HTTP, whose share of a measurement is the smallest: a thread for each request under way,
connections that stay open, no proxy, no redirect, no second try. Whatever goes wrong with a request is part of its
answer, since a server under load is expected to refuse some.
"""

from __future__ import annotations

import http.client
import json
import re
import select
import socket
import ssl
import time
from collections import deque
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from pixtral_runtime.errors import InputError, Option, Remedy, SettingError
from pixtral_runtime.server_address import address_of, key_for, quoted, sendable_key
from pixtral_runtime.version import __version__

API_KEY = "PIXTRAL_API_KEY"
SERVER_URL = Option("url", "http://127.0.0.1:8000/v1")
SILENCE_S = 600.0  # a long prompt on a slow server
SOON_S = 30.0  # for a list of models
END_S = 0.2  # for the end of a body whose last line came
LARGEST_LINE_BYTES = 1 << 20
LARGEST_ANSWER_BYTES = 1 << 26
REFUSED = 429
PAUSE_S, LONGEST_PAUSE_S = 0.5, 10.0  # after a refusal
TEXTS = ("content", "reasoning_content", "reasoning")  # the last two are vLLM's, SGLang's and llama.cpp's for thoughts


class NoAnswer(Exception):
    """Why a request has no answer; with the HTTP status where there was one, and when to come again."""

    def __init__(self, reason: str, status: int | None = None, again_s: float = 0.0) -> None:
        super().__init__(reason)
        self.status = status
        self.again_s = again_s


FAILURES = (NoAnswer, OSError, UnicodeError, http.client.HTTPException)
"""Of a request. UnicodeError is for names of hosts that cannot be."""


@dataclass(frozen=True)
class Answer:
    """What came of a request, in seconds of the client's clock. `error` says why there is no answer.

    `pieces_s` is when each piece of text came, `last_s` when the last piece or the reason of the end did. Tokens are
    the server's counts, None where it says none.
    """

    asked_s: float
    ended_s: float
    pieces_s: tuple[float, ...] = ()
    last_s: float = 0.0
    finish: str = ""
    completion_tokens: int | None = None
    prompt_tokens: int | None = None
    image_tokens: int | None = None
    cached_tokens: int | None = None
    error: str = ""
    status: int | None = None
    again_s: float = 0.0  # after a refusal, how long the server wants to be left alone

    @property
    def new_tokens(self) -> int:
        """As the server counts them, or pieces where it does not."""
        return self.completion_tokens or len(self.pieces_s)

    @property
    def ttft_ms(self) -> float:
        return 1e3 * (self.pieces_s[0] - self.asked_s)

    @property
    def e2e_ms(self) -> float:
        return 1e3 * (self.ended_s - self.asked_s)

    @property
    def tpot_ms(self) -> float | None:
        """Of the tokens after the first; None where the answer came at once."""
        seconds = self.last_s - self.pieces_s[0]
        return 1e3 * seconds / (self.new_tokens - 1) if self.new_tokens > 1 and seconds > 0 else None

    @property
    def steps_ms(self) -> list[float]:
        """Between one piece of text and the next."""
        return [1e3 * (after - before) for before, after in zip(self.pieces_s, self.pieces_s[1:], strict=False)]


class ChatServer:
    """A server of OpenAI's chat API. May be used by many threads.

    Raises SettingError for what is no address, InputError for a key that cannot be sent there.
    """

    def __init__(
        self, url: str, *, silence_s: float = SILENCE_S, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.address = address_of(url, SERVER_URL)
        if not re.fullmatch("[!-~]*", self.address.path):
            raise SettingError(f"{url} is no address of a server", SERVER_URL)
        if "@" in urlsplit(url).netloc:
            raise InputError("the address of the server holds a name or a password", f"export {API_KEY}=…")
        self.clock = clock
        self._key = sendable_key(self.address, API_KEY, SERVER_URL)
        self._silence_s = silence_s
        self._idle = deque[http.client.HTTPConnection]()

    @property
    def name(self) -> str:
        host = f"[{self.address.host}]" if ":" in self.address.host else self.address.host
        return f"{host}:{self.address.port}"

    def only_model(self) -> str:
        """The name of the model that the server has. Raises InputError where there are several, or it says none."""
        try:
            connection = self._connection(min(SOON_S, self._silence_s))
            with closing(connection), self._sent(connection, "GET", "/models", None) as response:
                names = [str(entry["id"]) for entry in json.loads(response.read(LARGEST_LINE_BYTES))["data"]]
        except FAILURES as error:
            raise self.refusal(self._reason(error, 0), getattr(error, "status", None)) from None
        except (ValueError, LookupError, TypeError):
            raise self.refusal("what it says about its models is no list of an OpenAI API", 404) from None
        if len(names) != 1:
            listed = ", ".join(quoted(name, self._key) for name in names) or "none"
            raise InputError(f"{self.name} has several models, or none: {listed}", Option("model", "NAME"))
        return names[0]

    def ask(self, body: bytes, asked_s: float | None = None) -> Answer:
        """Send a request and read its stream. `asked_s`: since when it waits, now where that is not given."""
        pieces: list[float] = []
        begun = asked_s
        try:
            connection = self._connection(self._silence_s)
            begun = self.clock() if asked_s is None else asked_s
            try:
                with self._sent(connection, "POST", "/chat/completions", body) as response:
                    answer = self._read(response, begun, pieces)
                    if _is_over(connection, response):
                        self._idle.append(connection)
                        return answer
            except BaseException:
                connection.close()
                raise
            connection.close()
            return answer
        except FAILURES as error:
            now = self.clock()
            failed = Answer(now if begun is None else begun, now, error=self._reason(error, len(pieces)))
            return replace(failed, **vars(error)) if isinstance(error, NoAnswer) else failed

    def refusal(self, reason: str, status: int | None) -> InputError:
        """The error for a server that does not do what it is here for."""
        version, scheme = SERVER_URL, "https" if self.address.is_https else "http"
        if not self.address.path:
            version = Option("url", f"{scheme}://{self.name}/v1")
        remedies: tuple[Remedy, ...] = (version,)
        if status in (401, 403):
            remedies = (f"export {key_for(self.address.host, API_KEY)[0]}=…",)
        elif status == 404 and self.address.path:
            remedies = (Option("model", "NAME"), version)
        elif status in (400, 413, 422):
            remedies = (Option("image_side", "SMALLER"), Option("decode_tokens", "SMALLER"))
        elif status is not None and (status == REFUSED or status >= 500):
            remedies = ("read the server's log", "try again once it is idle")
        return InputError(f"{self.name}: {reason}", *remedies)

    def _connection(self, silence_s: float) -> http.client.HTTPConnection:
        """An open one: connecting is no part of what is measured."""
        while self._idle:
            connection = self._idle.pop()
            if connection.sock is not None and not _has_ended(connection.sock):
                connection.sock.settimeout(silence_s)
                return connection
            connection.close()
        kind = http.client.HTTPSConnection if self.address.is_https else http.client.HTTPConnection
        connection = kind(self.address.host, self.address.port, timeout=silence_s)
        connection.connect()
        return connection

    def _sent(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: bytes | None
    ) -> http.client.HTTPResponse:
        """The response to a request once its headers came. Raises NoAnswer unless it is a success."""
        headers = {"Accept-Encoding": "identity", "User-Agent": f"pixtral-bench/{__version__}"}
        if body is not None:
            headers |= {"Content-Type": "application/json", "Accept": "text/event-stream"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        connection.request(method, self.address.path + path, body, headers)
        response = connection.getresponse()
        if response.status == 200:
            return response
        if 300 <= response.status < 400:
            place = response.getheader("Location", "nowhere")
            raise NoAnswer(f"{response.status}: it sends everybody elsewhere, to {place}", response.status)
        said = _complaint(response.read(LARGEST_LINE_BYTES), response.getheader("Content-Type", ""))
        again_s = _again_s(response.getheader("Retry-After", "")) if response.status == REFUSED else 0.0
        raise NoAnswer(f"{response.status} {response.reason}: {said}", response.status, again_s)

    def _read(self, response: http.client.HTTPResponse, begun: float, pieces: list[float]) -> Answer:
        """The answer in a stream of server-sent events; `pieces` grows as they come. Raises NoAnswer."""
        kind = response.getheader("Content-Type", "").partition(";")[0].strip().lower()
        if kind == "application/json":
            raise NoAnswer(f"it answers in one piece, and streams nothing: {_complaint(response.read(1 << 12), kind)}")
        if kind == "text/html":
            raise NoAnswer("what answers is a web page, and no OpenAI API", 404)
        last, size, finish, is_done = begun, 0, "", False
        usage: object = None
        while not is_done and (line := response.readline(LARGEST_LINE_BYTES)):
            now = self.clock()
            if (size := size + len(line)) > LARGEST_ANSWER_BYTES:
                raise NoAnswer(f"the answer has more than {LARGEST_ANSWER_BYTES:,} bytes")
            if not line.startswith(b"data:"):
                continue  # comments that keep a connection alive, names of events, empty lines
            data = line[5:].strip()
            if data == b"[DONE]":
                is_done = True
                continue
            try:
                chunk = json.loads(data)
                if said := chunk.get("error"):
                    raise NoAnswer(f"an error in the stream: {_complaint(data, 'application/json') or said}")
                for choice in chunk.get("choices") or ():
                    last, delta = now, choice.get("delta") or {}
                    finish = choice.get("finish_reason") or finish
                    if any(delta.get(name) for name in TEXTS):
                        pieces.append(now)
                usage = chunk.get("usage") or usage
            except (ValueError, AttributeError, TypeError):
                raise NoAnswer("what it streams is no chat completion") from None
        ended = self.clock()
        if not is_done and not finish:
            raise NoAnswer(f"the stream broke off after {_some(len(pieces))}")
        if not pieces:
            raise NoAnswer("the answer has no text")
        return Answer(begun, ended, tuple(pieces), last, str(finish), **_counts(usage))

    def _reason(self, error: Exception, pieces: int) -> str:
        """Why there is no answer, in one line, without the key."""
        return quoted(_reason(error, pieces, self._silence_s), self._key)


def _is_over(connection: http.client.HTTPConnection, response: http.client.HTTPResponse) -> bool:
    """Whether all was said that belongs to a response, and the connection may serve another request."""
    if connection.sock is None:
        return False
    connection.sock.settimeout(END_S)
    try:
        response.read(1 << 12)
    except (OSError, http.client.HTTPException):
        return False
    return response.isclosed()


def _reason(error: Exception, pieces: int, silence_s: float) -> str:
    if isinstance(error, ConnectionRefusedError):
        return "nobody listens there"
    if isinstance(error, socket.gaierror | UnicodeError):
        return f"no such host: {error}"
    if isinstance(error, TimeoutError):
        return f"nothing came for {silence_s:g} s, after {_some(pieces)}"
    if isinstance(error, ssl.SSLError):
        return f"https fails: {error.reason or error}"
    if isinstance(error, ConnectionError | http.client.IncompleteRead):
        return f"the connection broke off after {_some(pieces)}"
    if isinstance(error, http.client.HTTPException):
        return f"what answers does not speak HTTP: {type(error).__name__}"
    return str(error) or type(error).__name__


def _again_s(said: str) -> float:
    """Seconds until a server wants to be asked again; those that it names, unless it names a date."""
    try:
        return min(max(0.0, float(said)), LONGEST_PAUSE_S)  # in this order nan is 0
    except ValueError:
        return PAUSE_S


def _some(pieces: int) -> str:
    return f"{pieces} pieces of an answer" if pieces else "no piece of an answer"


def _complaint(body: bytes, kind: str) -> str:
    """What an error says, in the forms that servers give it."""
    if "html" in kind:
        return "a web page"
    text = body.decode(errors="replace")
    try:
        said = json.loads(text)
        said = said.get("error", said)
        said = said.get("message") or said.get("detail") or said
    except (ValueError, AttributeError):
        return text
    return said if isinstance(said, str) else json.dumps(said)


def _counts(usage: Any) -> dict[str, Any]:
    """The tokens that a server says: OpenAI's fields, image tokens as xAI's servers and vLLM's name them."""
    usage = _object(usage)
    details = _object(usage.get("prompt_tokens_details"))
    by_kind = _object(details.get("multimodal_tokens"))
    said = {
        "completion_tokens": usage.get("completion_tokens"),
        "prompt_tokens": usage.get("prompt_tokens"),
        "image_tokens": details.get("image_tokens", by_kind.get("image")),
        "cached_tokens": details.get("cached_tokens"),
    }
    return {name: count for name, count in said.items() if type(count) is int and count >= 0}


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _has_ended(sock: socket.socket) -> bool:
    """Whether the other side closed a connection that nobody used meanwhile, or says what nobody asked for."""
    waiting = select.poll()
    waiting.register(sock, select.POLLIN)
    return bool(waiting.poll(0))
