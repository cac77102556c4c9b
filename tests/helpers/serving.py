"""A server of a model in this process, and what talks to it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2
from openai import OpenAI

from pixtral_runtime import Model
from pixtral_runtime.server.app import make_app
from pixtral_runtime.server.run import Server, open_socket
from pixtral_runtime.server.service import Service, ServiceOptions

NAME = "tiny"


@dataclass(frozen=True)
class Served:
    """A server that runs."""

    url: str
    service: Service
    server: Server

    @property
    def service_address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        return host, int(port)

    def client(self, key: str = "none") -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def post(self, path: str, body: Any, **headers: str) -> httpx2.Response:
        return httpx2.post(self.url + path, json=body, headers=headers, timeout=60)

    def get(self, path: str, **headers: str) -> httpx2.Response:
        return httpx2.get(self.url + path, headers=headers, timeout=60)

    def metric(self, name: str) -> float:
        """The value of a metric without labels."""
        lines = self.get("/metrics").text.splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(f"pixtral:{name} "))


@contextmanager
def served(model: Model, keys: tuple[str, ...] = (), *, is_loopback: bool = True, **options: Any) -> Iterator[Served]:
    """Serve a model at a free port, with `ServiceOptions`."""
    service = Service(model, ServiceOptions(NAME, **{"slots": 4, **options}))
    server = Server(make_app(service, keys, is_loopback=is_loopback), service)
    bound = open_socket("127.0.0.1", 0)
    thread = threading.Thread(target=server.run_until_ended, args=(bound,), daemon=True)
    thread.start()
    while thread.is_alive() and not server.started:
        thread.join(0.005)
    try:
        host, port = bound.getsockname()
        yield Served(f"http://{host}:{port}", service, server)
    finally:
        server.end()
        thread.join(60)
    assert not thread.is_alive()
