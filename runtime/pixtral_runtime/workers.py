"""Threads that wait for servers: each takes what is next, and none holds up the end of the program."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def start_workers(count: int, waiting: deque[T], work: Callable[[T], R], done: SimpleQueue[R | Exception]) -> None:
    """So many threads that do what waits, until nothing does. An error is for the one who reads `done`.

    Not a ThreadPoolExecutor: Python waits for its threads before it ends, and a silent server for minutes.
    """

    def run() -> None:
        while True:
            try:
                item = waiting.popleft()
            except IndexError:
                return
            try:
                done.put(work(item))
            except Exception as error:
                done.put(error)

    for _ in range(count):
        threading.Thread(target=run, name="waits for a server", daemon=True).start()
