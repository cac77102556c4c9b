"""A service behind a socket, until the process is asked to end."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.applications import Starlette

from pixtral_runtime.errors import MachineError, Option
from pixtral_runtime.server.service import Service

BACKLOG = 2048  # connections that may wait to be accepted
SHOWN_CHARACTERS = 80  # of a host's name


def open_socket(host: str, port: int) -> socket.socket:
    """A socket of this address, port 0 for any that is free. Raises MachineError."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
            0
        ]
        bound = socket.socket(family, kind)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except UnicodeError as error:  # of the codec for names: one is too long, or has an empty part
        raise MachineError(f"{host[:SHOWN_CHARACTERS]!r} is no host's name", Option("host", "127.0.0.1")) from error
    except OSError as error:
        remedy = Option("port", port + 1) if port else Option("host", "127.0.0.1")
        raise MachineError(f"{host}, port {port}: {error.strerror}", remedy) from error
    return bound


class Server(uvicorn.Server):
    """Answers for a service until `end`, or until the process gets SIGTERM or SIGINT.

    What runs is then finished, and nothing new begun; a second time it ends at once. uvicorn's own server would pass
    the signal on when all is done, and the process would seem to have been killed.
    """

    def __init__(self, app: Starlette, service: Service) -> None:
        super().__init__(
            uvicorn.Config(app, log_config=None, access_log=False, server_header=False, backlog=BACKLOG, ws="none")
        )
        self._service = service

    def run_until_ended(self, bound: socket.socket) -> None:
        asyncio.run(self.serve(sockets=[bound]))

    def end(self) -> None:
        self.force_exit = self.should_exit
        logging.getLogger("uvicorn.error").disabled = self.force_exit  # what is given up on purpose is no failure
        self.should_exit = True
        self._service.is_stopping = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = signal.SIGINT, signal.SIGTERM
        before = {number: signal.signal(number, lambda *_: self.end()) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
