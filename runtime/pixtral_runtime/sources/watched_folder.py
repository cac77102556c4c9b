"""One folder that is looked at again and again: which of its files are new or changed, and have stopped growing."""

from __future__ import annotations

import errno
import math
import os
import stat
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path

from pixtral_runtime.sources.endings import has_end

RECHECKED = 2000  # files that were complete before, at each look
TEMPORARY = (".part", ".partial", ".tmp", ".temp", ".crdownload", ".download")


@dataclass(frozen=True, slots=True)
class Settled:
    """A file that has not changed since `since`, seconds of `time.monotonic`."""

    folder: WatchedFolder
    name: str
    stamp: int
    since: float
    mtime_ns: int

    @property
    def path(self) -> Path:
        return Path(self.folder.path, self.name)

    def is_complete(self, now: float, patience_s: float) -> bool:
        """Whether its end is there, or has been waited for long enough."""
        return now - self.since >= patience_s or has_end(self.path)

    def take(self) -> None:
        """It is worked off from now on: show it again only if it changes."""
        self.folder.complete[self.name] = self.stamp
        self.folder.growing.pop(self.name, None)


class WatchedFolder:
    """What is known of a folder's files by name: a stamp of those that were taken, and since when others have one.

    Those count that have one of the `suffixes`. A stamp is a number for a file's size, time and permissions.
    """

    def __init__(self, path: str, suffixes: Set[str]) -> None:
        self.path, self._suffixes = path, suffixes
        self.complete: dict[str, int] = {}
        self.growing: dict[str, tuple[int, float]] = {}
        self._device: int | None = None
        self._looks = 0

    def look(self, now: float, settle_s: float, folders: list[os.DirEntry[str]] | None = None) -> list[Settled]:
        """Files that have been the same for so long, in no order; its sub-folders are added to `folders`.

        Of those that were taken only some are compared each time, all of them in turn. Raises OSError.
        """
        device = os.stat(self.path).st_dev
        turns = max(1, math.ceil(len(self.complete) / RECHECKED))
        turn = self._looks % turns
        self._looks += 1
        growing: dict[str, tuple[int, float]] = {}
        settled = []
        entries = known = 0
        for entry in self._entries():
            entries += 1
            name = entry.name
            if name in self.complete:
                known += 1
                if name not in self.growing and hash(name) % turns != turn:
                    continue
            elif not is_wanted(name, self._suffixes):
                if folders is not None and not name.startswith(".") and entry.is_dir():
                    folders.append(entry)
                continue
            status = _status(entry)
            if status is None or not stat.S_ISREG(status.st_mode):
                if status is not None and folders is not None and stat.S_ISDIR(status.st_mode):
                    folders.append(entry)
                continue
            stamp = hash((status.st_size, status.st_mtime_ns, status.st_mode))
            if self.complete.get(name) == stamp:
                continue
            before = self.growing.get(name)
            growing[name] = before if before is not None and before[0] == stamp else (stamp, now)
            if status.st_size and now - growing[name][1] >= settle_s:
                settled.append(Settled(self, name, *growing[name], status.st_mtime_ns))
        if not entries and self._device not in (None, device):
            raise OSError(errno.ENODEV, "it is an empty folder on another disk")  # where something was mounted
        self.growing, self._device = growing, device
        if known < len(self.complete):
            for gone in self.complete.keys() - set(os.listdir(self.path)):
                del self.complete[gone]
        return settled

    def _entries(self) -> Iterator[os.DirEntry[str]]:
        with os.scandir(self.path) as entries:
            yield from entries


def is_wanted(name: str, suffixes: Set[str]) -> bool:
    """Whether a file has one of the suffixes, and is not one in the making."""
    stem, suffix = os.path.splitext(name)
    return (
        suffix.lower() in suffixes
        and not name.startswith((".", "~"))
        and not stem.endswith("~")
        and os.path.splitext(stem)[1].lower() not in TEMPORARY
    )


def _status(entry: os.DirEntry[str]) -> os.stat_result | None:
    """None for a broken link, and for what is gone by now."""
    try:
        return entry.stat()
    except OSError:
        return None
