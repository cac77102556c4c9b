"""Pictures from http and https: so many bytes, so many seconds, so many redirects, and from public addresses alone.

A server that fetches what a stranger names is a door into its own network. So the name is looked up here, every address
it has must be public, and the connection goes to the address that was judged, at every redirect again. No proxy, no
cookie, no credentials.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urljoin, urlsplit

from pixtral_runtime.errors import ImageError
from pixtral_runtime.inputs.openai_messages import shown
from pixtral_runtime.version import __version__

MOST_REDIRECTS = 3
REDIRECTS = (301, 302, 303, 307, 308)
CHUNK_BYTES = 1 << 16
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def is_public(address: Address) -> bool:
    """Whether an address is of the open internet, also by the one that it wraps."""
    inner = None
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo or (None, None))[1]
        if address in NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    if inner is not None and not is_public(inner):
        return False
    return address.is_global and not address.is_multicast and not address.is_reserved


@dataclass(frozen=True)
class Fetcher:
    """Fetches pictures. Thread-safe."""

    most_bytes: int = 20_000_000
    timeout_s: float = 10.0
    may_reach: Callable[[Address], bool] = is_public

    def fetch(self, url: str) -> bytes:
        """What a URL leads to. Raises ImageError, which says nothing of what answers where it may not look."""
        name, deadline_s = shown(url).strip('"'), time.monotonic() + self.timeout_s
        try:
            for _ in range(MOST_REDIRECTS + 1):
                status, location, data = self._get(url, name, deadline_s)
                if status not in REDIRECTS:
                    break
                url = urljoin(url, location)
            else:
                raise ImageError(f"{name}: more than {MOST_REDIRECTS} redirects", "the picture's own URL")
        except (OSError, http.client.HTTPException, ValueError) as error:  # not there, broken off, no URL
            reason = f"{name} could not be fetched: {type(error).__name__}"
            raise ImageError(reason, "send the picture itself") from error
        if status != http.client.OK:
            raise ImageError(f"{name}: its server says {status}", "check the URL")
        return data

    def _get(self, url: str, name: str, deadline_s: float) -> tuple[int, str, bytes]:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
            raise ImageError(f"{name}: no plain http or https URL", "send the picture itself")
        with self._connect(parts, name, deadline_s) as sock, _closed_at(deadline_s, sock):
            connection = http.client.HTTPConnection(parts.hostname, parts.port)
            connection.sock = sock
            try:
                target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
                agent = {"User-Agent": f"pixtral/{__version__}", "Accept": "image/*", "Connection": "close"}
                connection.request("GET", target, headers=agent)
                response = connection.getresponse()
                location = response.headers.get("Location", "")
                data = bytearray()
                while response.status == http.client.OK and (chunk := response.read1(CHUNK_BYTES)):
                    data += chunk
                    if len(data) > self.most_bytes:
                        raise ImageError(f"{name}: more than {self.most_bytes:,} bytes", "a smaller picture")
                if response.status == http.client.OK and response.length:
                    raise ConnectionError("broken off")
                return response.status, location, bytes(data)
            finally:
                connection.close()

    def _connect(self, parts: SplitResult, name: str, deadline_s: float) -> socket.socket:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        found = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
        for *_, place in found:
            if not self.may_reach(ipaddress.ip_address(str(place[0]).partition("%")[0])):
                raise ImageError(f"{name}: not an address of the open internet", "send the picture itself")
        sock = _first_that_answers([place for *_, place in found], deadline_s)
        if parts.scheme == "http":
            return sock
        return ssl.create_default_context().wrap_socket(sock, server_hostname=parts.hostname)


def _first_that_answers(places: Sequence[tuple[Any, ...]], deadline_s: float) -> socket.socket:
    for place in places[:-1]:
        try:
            return socket.create_connection(place[:2], timeout=_left_s(deadline_s) / len(places))
        except OSError:
            continue
    return socket.create_connection(places[-1][:2], timeout=_left_s(deadline_s))


@contextmanager
def _closed_at(deadline_s: float, sock: socket.socket) -> Iterator[None]:
    """Whatever is read within, at this moment it ends: a timeout of the socket begins anew with every byte."""

    def close() -> None:
        with suppress(OSError):  # closed since
            sock.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(_left_s(deadline_s), close)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _left_s(deadline_s: float) -> float:
    """Seconds until a moment of `time.monotonic`. Raises TimeoutError when it is over."""
    left = deadline_s - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
