"""Requests read ahead by a thread: whoever works them off waits for no disk, network or camera while there is work."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable

from pixtral_runtime.batch.records import Request

AHEAD = 8  # requests, of which each may hold a picture's file
POLL_S = 0.1


class Feed:
    """The requests of an iterable, in its order, as they come. Close it when no more are wanted.

    `error` is what ended it before its time.
    """

    def __init__(self, requests: Iterable[Request]) -> None:
        self._requests = requests
        self._queue: queue.Queue[Request | BaseException | None] = queue.Queue(AHEAD)
        self._closed = threading.Event()
        self._next: Request | None = None
        self.ended = False
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._read, name="requests", daemon=True)
        self._thread.start()

    def peek(self, wait_s: float = 0.0) -> Request | None:
        """The next request, if it is there or comes in time."""
        if self._next is None and not self.ended:
            try:
                found = self._queue.get(timeout=wait_s) if wait_s else self._queue.get_nowait()
            except queue.Empty:
                return None
            if isinstance(found, Request):
                self._next = found
            else:
                self.error, self.ended = found, True
        return self._next

    def take(self) -> Request:
        """The request that `peek` showed."""
        if self._next is None:
            raise LookupError("there is no request yet")
        request, self._next = self._next, None
        return request

    def close(self) -> None:
        """Read no more. A thread that waits for a network is left to itself."""
        self._closed.set()
        self._thread.join(2 * POLL_S)

    def _read(self) -> None:
        try:
            for request in self._requests:
                if not self._put(request):
                    return
            self._put(None)
        except BaseException as error:  # for whoever works them off
            self._put(error)

    def _put(self, found: Request | BaseException | None) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put(found, timeout=POLL_S)
                return True
            except queue.Full:
                pass
        return False
