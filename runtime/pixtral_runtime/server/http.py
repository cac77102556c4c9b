"""HTTP below the routes: bodies with an end, clients that leave, streams of events, keys, a line of log a request."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from hashlib import sha256
from typing import Any, TypeVar
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pixtral_runtime.server.problems import Problem

logger = logging.getLogger("pixtral.requests")

T = TypeVar("T")
BODY_PATIENCE_S = 30.0  # between two pieces of a body
OPEN_PATHS = ("/", "/health", "/metrics", "/page.css", "/page.js", "/ready", "/version")
"""What is told without a key: nothing of what was asked or answered."""
REQUEST_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)


async def read_body(request: Request, most_bytes: int) -> bytes:
    """The body of a JSON request. Raises Problem where it is too long, too slow, or something else."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # what a page of another site may send without being asked is something else
        raise Problem(415, f"expected a body of application/json, found {kind or 'no content-type'}")
    data = bytearray()
    async for piece in body_pieces(request, most_bytes):
        data += piece
    return bytes(data)


async def body_pieces(request: Request, most_bytes: int) -> AsyncIterator[bytes]:
    """A body as it comes. Raises Problem where it is too long or too slow."""
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > most_bytes:
        raise _too_long(most_bytes)
    read = 0
    pieces = request.stream()
    try:
        while True:
            piece = await asyncio.wait_for(anext(pieces, None), BODY_PATIENCE_S)
            if piece is None:
                return
            read += len(piece)
            if read > most_bytes:
                raise _too_long(most_bytes)
            yield piece
    except TimeoutError:
        raise Problem(408, f"no more of the body came within {BODY_PATIENCE_S:g} s") from None


def _too_long(most_bytes: int) -> Problem:
    """Made where it is raised: kept in a variable, it and the body would hold each other until a collection."""
    return Problem(413, f"the body is longer than the {most_bytes:,} bytes that this server reads")


async def unless_left(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What the work returns. Raises ClientDisconnect, and cancels it, when the client goes away before."""

    async def left() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working = asyncio.create_task(work)
    tasks = working, asyncio.create_task(left())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        del task, tasks, working  # whose exception would hold them, and this frame what it works on


class EventStream(Response):
    """A response of server-sent events. `finish` is called when it is over, however it ends."""

    def __init__(self, events: AsyncIterator[bytes], finish: Callable[[], None]) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # the second is for nginx
        super().__init__(media_type="text/event-stream", headers=headers)
        del self.headers["content-length"]
        self._events, self._finish = events, finish

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def work() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for event in self._events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

        try:
            await unless_left(receive, work())
        except (ClientDisconnect, OSError):
            pass
        finally:
            self._finish()


def problem_response(problem: Problem) -> JSONResponse:
    headers = {} if problem.retry_s is None else {"retry-after": str(problem.retry_s)}
    if problem.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(problem.body(), problem.status, headers)


class Guard:
    """Lets through who may ask: by key where there are keys, else by the name under which a local server was called.

    Without keys, a server on the loopback is called by that name alone: a page that a browser loaded from elsewhere
    could otherwise point a name of its own at this machine, and read the answers.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str], is_loopback: bool) -> None:
        self._app, self._is_loopback = app, is_loopback
        self._digests = [sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        problem = self._problem(Headers(scope=scope), scope["path"])
        await (self._app if problem is None else problem_response(problem))(scope, receive, send)

    def _problem(self, headers: Headers, path: str) -> Problem | None:
        if self._digests:
            kind, _, key = headers.get("authorization", "").partition(" ")
            digest = sha256(key.strip().encode()).digest()
            matches = [hmac.compare_digest(digest, known) for known in self._digests]  # all, in the same time
            if path not in OPEN_PATHS and (kind.lower() != "bearer" or not any(matches)):
                return Problem(401, "a key is missing or wrong: Authorization: Bearer KEY", code="invalid_api_key")
        elif self._is_loopback and not is_local_name(headers.get("host", "")):
            return Problem(403, "this server answers to localhost alone; with keys it would answer to any name")
        return None


def is_local_name(host: str) -> bool:
    """Whether a Host header names the loopback."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


class RequestLog:
    """Gives every request an id, answers whatever goes wrong in it, and logs it as a dictionary when it is over.

    A route adds what it knows to `scope["state"]["log"]`. No prompt and no answer stands there unless it does.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        log: dict[str, Any] = {"request_id": request_id, "method": scope["method"], "path": scope["path"]}
        scope.setdefault("state", {})["log"] = log
        started_s, status = time.monotonic(), 0

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await answered(self._app, scope, receive, send_on)
        finally:
            log |= {"status": status, "seconds": round(time.monotonic() - started_s, 4)}
            quiet = scope["path"] in OPEN_PATHS and status < 400
            logger.log(logging.DEBUG if quiet else logging.INFO, log)


async def answered(app: Callable[[Scope, Receive, Send], Awaitable[None]], *call: Any) -> None:
    """Call the application; what it raises becomes a response, and a bug a 500 that says no more."""
    try:
        await app(*call)
    except Problem as problem:
        await problem_response(problem)(*call)
    except ClientDisconnect:
        pass
    except Exception:
        logging.getLogger(__name__).exception("a request failed")
        await problem_response(Problem(500, "the server failed; its log says more"))(*call)
