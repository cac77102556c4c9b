"""Files that are read in pieces, page by page, frame by frame: a few of them stay open between two readings."""

from __future__ import annotations

import atexit
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Generic, TypeVar

from pixtral_runtime.errors import ImageError

Opened = TypeVar("Opened")
Key = tuple[str, int, int, int]
MOST_OPEN = 3  # a loader thread each, and the one that lists what comes next


class OpenFiles(Generic[Opened]):
    """What `open_file` makes of a path, used by one thread at a time, since such readers are not safe with several.

    A file that was replaced since is opened anew.
    """

    def __init__(self, open_file: Callable[[Path], Opened], close: Callable[[Opened], None]) -> None:
        self._open_file, self._close = open_file, close
        self._lock = threading.Lock()
        self._closes_at_exit = False
        self._files: OrderedDict[Key, Opened] = OrderedDict()

    @contextmanager
    def opened(self, path: Path) -> Iterator[Opened]:
        """The open file, with nobody else at any of them. Raises what `open_file` raises, or ImageError."""
        with self._lock:
            key = _key(path)
            if key not in self._files:
                while len(self._files) >= MOST_OPEN:
                    self._close(self._files.popitem(last=False)[1])
                self._files[key] = self._open_file(path)
                self._close_at_exit()
            self._files.move_to_end(key)
            yield self._files[key]

    def _close_at_exit(self) -> None:
        """Once a file is open, and so before its library ends, which has registered itself by then."""
        if not self._closes_at_exit:
            atexit.register(self.close)
            self._closes_at_exit = True

    def close(self) -> None:
        """Close them all."""
        with self._lock:
            while self._files:
                self._close(self._files.popitem()[1])


def _key(path: Path) -> Key:
    try:
        status = os.stat(path)
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror}", "check the path and its permissions") from error
    except ValueError as error:  # a zero byte
        raise ImageError(f"{str(path)!r}: {error}", "check the path") from error
    return str(path), status.st_ino, status.st_size, status.st_mtime_ns
