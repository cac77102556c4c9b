"""Folders into which a camera, a scanner or a program puts files: each is worked off once it is complete, for ever.

The folders are looked at twice a second: on a network's or a memory card's file system nothing tells of changes, and
looking works everywhere. The more files there are, the longer it rests in between.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence, Set
from pathlib import Path

from pixtral_runtime.errors import InputError
from pixtral_runtime.inputs.image_files import IMAGE_SUFFIXES, Note
from pixtral_runtime.sources.item import Item
from pixtral_runtime.sources.pictures import picture_item
from pixtral_runtime.sources.watched_folder import Settled, WatchedFolder

POLL_S = 0.5
SETTLE_S = 1.0  # unchanged for so long, and with its end: complete
PATIENCE_S = 10.0  # unchanged for so long: as complete as it will be
REST = 10  # times as long as a look, at least, until the next one
MOST_REST_S = 5.0


class Watch:
    """The files in some folders, sorted by name, then others as they come, and those that change: an item for each.

    Those with one of the `suffixes`, in lower case; what is in a document is for others to tell. One counts when its
    size and time have been the same for `settle_s` seconds and its end is there, or for `patience_s` seconds without.
    Hidden files and names for temporary ones do not count, nor do empty files. `note` hears, in the thread that
    iterates, when nothing is left, and when a folder cannot be read, which is then waited for. Raises InputError for
    what is no folder to begin with.
    """

    files: Sequence[Path] = ()
    total = None

    def __init__(
        self,
        folders: Sequence[Path],
        suffixes: Set[str] = IMAGE_SUFFIXES,
        *,
        recursive: bool = False,
        note: Note = lambda _: None,
        poll_s: float = POLL_S,
        settle_s: float = SETTLE_S,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self.folders = tuple(dict.fromkeys(folders))
        self.suffixes, self._recursive, self._note = suffixes, recursive, note
        self._poll_s, self._settle_s, self._patience_s = poll_s, settle_s, patience_s
        self._known: dict[str, WatchedFolder] = {}
        self._missing: set[str] = set()
        self._forgotten: deque[Path] = deque()
        self._passed: Path | None = None
        self._closed = threading.Event()
        for folder in self.folders:
            _check_folder(folder)

    def root_of(self, file: Path) -> Path | None:
        """Which of the folders a file is in."""
        is_in = Path.is_relative_to if self._recursive else lambda path, folder: path.parent == folder
        return next((folder for folder in self.folders if is_in(file, folder)), None)

    def forget(self, file: Path) -> None:
        """Take a file for a new one, because it could not be worked off yet. May be called from any thread."""
        self._forgotten.append(file)

    def pass_over(self, file: Path) -> None:
        """Say that a file had gone before it was read, once for all of its pages. It is a new one if it comes back."""
        if file == self._passed:
            return
        self._passed = file
        self._note(f"passed over: {file} had gone before it was read")
        self.forget(file)

    @property
    def is_closed(self) -> bool:
        return self._closed.is_set()

    def close(self) -> None:
        """End the iteration. May be called from any thread."""
        self._closed.set()

    def __iter__(self) -> Iterator[Item]:
        gave_some = is_told = False
        while not self._closed.is_set():
            started = time.monotonic()
            settled = self._look(started)
            looked = time.monotonic()
            rest_s = max(self._poll_s, min(REST * (looked - started), MOST_REST_S))
            if gave_some:
                settled.sort(key=lambda found: (found.mtime_ns, found.path))
            for found in settled:
                if found.is_complete(started, self._patience_s):
                    found.take()
                    gave_some = True
                    if found.path == self._passed:
                        self._passed = None
                    yield picture_item(found.path)
                    if self._closed.is_set():
                        return
            is_idle = not self._missing and not any(folder.growing for folder in self._known.values())
            if is_idle and not is_told:
                self._note(f"waiting for pictures in {', '.join(map(str, self.folders))}")
                is_told = True
            self._closed.wait(max(0.0, looked + rest_s - time.monotonic()))

    def _look(self, now: float) -> list[Settled]:
        """What is settled in all folders, folder by folder as they were named, sorted by name."""
        while self._forgotten:
            file = self._forgotten.popleft()
            if (folder := self._known.get(str(file.parent))) is not None:
                folder.complete.pop(file.name, None)
        visited: dict[str, WatchedFolder] = {}
        seen: set[tuple[int, int]] = set()
        settled: list[Settled] = []
        for root in self.folders:
            settled += sorted(self._look_below(str(root), now, visited, seen), key=lambda found: found.path)
        self._known = visited
        self._missing &= visited.keys()
        return settled

    def _look_below(
        self, root: str, now: float, visited: dict[str, WatchedFolder], seen: set[tuple[int, int]]
    ) -> Iterator[Settled]:
        """Each folder is looked into once, whatever links lead to it; `seen` has them."""
        todo, links = [root], list[str]()
        while todo or links:
            path = todo.pop() if todo else links.pop()
            folders: list[os.DirEntry[str]] = []
            try:
                status = os.stat(path)
                if (status.st_dev, status.st_ino) in seen:
                    continue
                seen.add((status.st_dev, status.st_ino))
                folder = visited[path] = self._known.get(path) or WatchedFolder(path, self.suffixes)
                yield from folder.look(now, self._settle_s, folders if self._recursive else None)
            except OSError as error:
                self._miss(path, error, visited, is_root=path == root)
                continue
            if path in self._missing:
                self._missing.remove(path)
                self._note(f"{path} is back")
            for entry in sorted(folders, key=lambda entry: entry.name, reverse=True):
                (links if entry.is_symlink() else todo).append(entry.path)

    def _miss(self, path: str, error: OSError, visited: dict[str, WatchedFolder], *, is_root: bool) -> None:
        """Keep what is known of a folder that cannot be read, and say so once."""
        if error.errno in (errno.ENOENT, errno.ENOTDIR) and not is_root:
            visited.pop(path, None)  # deleted since its parent was looked into
            return
        below = path + os.sep
        visited.update((known, self._known[known]) for known in self._known if (known + os.sep).startswith(below))
        visited.setdefault(path, WatchedFolder(path, self.suffixes)).growing.clear()
        if path not in self._missing:
            self._missing.add(path)
            self._note(f"{path} cannot be read: {error.strerror}; it is waited for")


def _check_folder(folder: Path) -> None:
    """Raises InputError."""
    try:
        os.scandir(folder).close()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{str(folder)!r} cannot be watched: {reason}", "name folders that are there") from error
