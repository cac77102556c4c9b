"""Pictures from elsewhere: fetched where that is allowed, within bounds, and never from this machine's own networks."""

from __future__ import annotations

import ipaddress
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from helpers.places import ROOT
from helpers.serving import Served, served
from pixtral_runtime import Model
from pixtral_runtime.errors import ImageError
from pixtral_runtime.server.media import Media
from pixtral_runtime.server.remote_media import Address, Fetcher, is_public

PICTURE = min((ROOT / "tests" / "data" / "images").glob("*.png"))
HOME = ipaddress.ip_address("127.0.0.1")
BIG = 50_000


class Elsewhere(BaseHTTPRequestHandler):
    """A server of pictures, and of what else a URL may lead to."""

    def do_GET(self) -> None:
        seen.append((self.path, dict(self.headers)))
        name, _, target = self.path.removeprefix("/").partition("?to=")
        if name == "redirect":
            self.send_response(302)
            self.send_header("Location", target)
            self.end_headers()
            return
        if name == "loop":
            self.send_response(301)
            self.send_header("Location", "/loop")
            self.end_headers()
            return
        if name == "missing":
            self.send_error(404)
            return
        self.send_response(200)
        data = PICTURE.read_bytes()
        if name == "long":
            self.send_header("Content-Length", str(2 * BIG))
            data = b"x" * 2 * BIG
        elif name in ("cut", "slow"):
            self.send_header("Content-Length", str(len(data)))
            data = data[:50] if name == "cut" else data
        self.end_headers()
        if name == "slow":
            over.wait(20)
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


seen: list[tuple[str, dict[str, str]]] = []
over = threading.Event()


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        over.set()
        server.shutdown()


def only_home(address: Address) -> bool:
    return address == HOME


FETCHER = Fetcher(most_bytes=BIG, timeout_s=5, may_reach=only_home)


@pytest.fixture(scope="module")
def server(model: Model) -> Iterator[Served]:
    with served(model, media=Media(is_remote_allowed=True), fetcher=FETCHER) as running:
        yield running


def body(*urls: str) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content = [*parts, {"type": "text", "text": "what is it?"}]
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 3}


def test_a_picture_from_elsewhere_is_seen(server: Served, model: Model, elsewhere: str) -> None:
    expected = model.generate("what is it?", [PICTURE, PICTURE], max_new_tokens=3)
    found = server.post(
        "/v1/chat/completions", body(f"{elsewhere}/a.png?x=1", f"{elsewhere}/redirect?to=/b.png")
    ).json()
    assert found["choices"][0]["message"]["content"] == expected.text
    assert found["usage"]["prompt_tokens"] == expected.prompt_tokens


def test_nothing_of_the_client_goes_along(elsewhere: str) -> None:
    seen.clear()
    assert FETCHER.fetch(f"{elsewhere}/a.png?x=1#y") == PICTURE.read_bytes()
    ((path, headers),) = seen
    assert path == "/a.png?x=1"
    assert set(headers) == {"Host", "User-Agent", "Accept", "Connection", "Accept-Encoding"}


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/x.png", "http://localhost/x.png", "http://[::1]/x.png"])
def test_a_server_as_users_start_it_reaches_nothing_at_home(model: Model, elsewhere: str, url: str) -> None:
    with served(model, media=Media(is_remote_allowed=True)) as running:
        for one in (url, f"{elsewhere}/a.png"):
            response = running.post("/v1/chat/completions", body(one))
            assert response.status_code == 400
            assert "not an address of the open internet" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("http://127.0.0.2/x.png", "open internet"),
        ("http://10.0.0.1/x.png", "open internet"),
        ("http://169.254.169.254/latest/meta-data", "open internet"),
        ("//127.0.0.2/x.png", "open internet"),
        ("file:///etc/passwd", "no plain http"),
        ("ftp://127.0.0.1/x.png", "no plain http"),
        ("http://user:secret@127.0.0.1/x.png", "no plain http"),
        ("http://", "more than 3 redirects"),  # as good as an empty one
        ("http://[::", "could not be fetched"),
    ],
)
def test_a_redirect_leads_no_further_than_the_url_itself(elsewhere: str, target: str, said: str) -> None:
    with pytest.raises(ImageError, match=said):
        FETCHER.fetch(f"{elsewhere}/redirect?to={target}")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("loop", "more than 3 redirects"),
        ("missing", "404"),
        ("long", "more than 50,000 bytes"),
        ("cut", "could not be fetched"),
        ("x\r\nX-Injected: 1", "could not be fetched"),
    ],
)
def test_what_is_no_whole_picture_is_refused(elsewhere: str, name: str, said: str) -> None:
    with pytest.raises(ImageError, match=said):
        FETCHER.fetch(f"{elsewhere}/{name}")


def test_nobody_is_waited_for_beyond_the_time(elsewhere: str) -> None:
    with pytest.raises(ImageError, match="could not be fetched"):
        Fetcher(timeout_s=0.2, may_reach=only_home).fetch(f"{elsewhere}/slow")


def test_every_address_of_a_name_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(*_: object, **__: object) -> list[tuple[Any, ...]]:
        kinds = socket.AF_INET, socket.SOCK_STREAM, 6, ""
        return [(*kinds, ("93.184.215.14", 80)), (*kinds, ("192.168.1.1", 80))]

    monkeypatch.setattr(socket, "getaddrinfo", found)
    with pytest.raises(ImageError, match="open internet"):
        Fetcher().fetch("http://example.com/x.png")


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0", "10.1.2.3", "100.64.0.1", "127.0.0.1", "127.9.9.9", "169.254.169.254", "172.16.0.1", "192.0.2.1",
        "192.168.0.1", "198.18.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255", "::", "::1", "::ffff:127.0.0.1",
        "::ffff:10.0.0.1", "2002:7f00:1::", "64:ff9b::7f00:1", "64:ff9b::a00:1", "fc00::1", "fe80::1", "ff02::1",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["8.8.8.8", "93.184.215.14", "2606:4700::1111"])
def test_addresses_that_are_public(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))
