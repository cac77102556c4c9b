"""The page at `/`: a conversation with the model in a browser, in three files that load nothing else.

It asks the same API as everybody. What it may do is said in a header: scripts and styles of this server, no inline
ones, pictures that it holds already, requests to this server, and no place in a page of another site.
"""

from __future__ import annotations

from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

POLICY = {
    "default-src": "'none'",
    "base-uri": "'none'",
    "connect-src": "'self'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "img-src": "data:",
    "script-src": "'self'",
    "style-src": "'self'",
}
HEADERS = {
    "cache-control": "no-cache",
    "content-security-policy": "; ".join(f"{name} {value}" for name, value in POLICY.items()),
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def page_routes() -> list[Route]:
    own, shared = files("pixtral_runtime.server"), files("pixtral_runtime")
    style = shared.joinpath("page.css").read_bytes() + own.joinpath("page.css").read_bytes()
    return [
        _file("/", own.joinpath("page.html").read_bytes(), "text/html"),
        _file("/page.css", style, "text/css"),
        _file("/page.js", own.joinpath("page.js").read_bytes(), "text/javascript"),
    ]


def _file(path: str, data: bytes, kind: str) -> Route:
    async def send(request: Request) -> Response:
        return Response(data, headers=HEADERS, media_type=kind)

    return Route(path, send)
