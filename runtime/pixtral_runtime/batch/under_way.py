"""Which requests a run works on, so that one which takes the process with it is not tried for ever.

Beside the results lies a hidden file with the ids of requests that were begun, as long as the run lasts; one that died
leaves it. In a run without an end it is written anew now and then, without those that have a record. Were they the
cause, because the system ended a process for memory meanwhile or ours crashed, those without a record are suspects: the
next run does each of them alone. One that the process dies of again is answered with an error. Whoever kills a run, and
a machine that loses power, makes no request suspect.
"""

from __future__ import annotations

import faulthandler
import json
import os
import threading
from collections.abc import Container
from contextlib import suppress
from pathlib import Path
from typing import Any

from pixtral_runtime.device.sysfs import SYSTEM, read_text
from pixtral_runtime.files import write_atomically

MOST_DEATHS = 2
MOST_LINES = 10_000  # after which most of them have a record, as a rule
CRASH = b"Fatal Python error"  # as faulthandler begins


class UnderWay:
    """The requests of a run that writes its results to `path`: which to do alone, and which no more.

    `done` are the ids that have a record by now.
    """

    def __init__(
        self, path: Path, done: Container[str] = (), *, root: Path = SYSTEM, most_lines: int = MOST_LINES
    ) -> None:
        self._path = path.with_name(f".{path.name}.underway")
        self._done, self._root = done, root
        self._file: int | None = None
        self._begun: list[str] = []  # lines of the file
        self._least_lines = self._most_lines = most_lines
        self._lock = threading.Lock()
        self._watches_crashes = False
        self._deaths: dict[str, int] = {}

    @property
    def accused(self) -> set[str]:
        return {id for id, count in self._deaths.items() if count >= MOST_DEATHS}

    @property
    def suspects(self) -> set[str]:
        return set(self._deaths) - self.accused

    def remember(self) -> None:
        """Take up what runs noted that died."""
        deaths = _deaths(self._path, _state(self._root))
        self._deaths = {id: count for id, count in deaths.items() if id not in self._done}

    def begin(self, id: str) -> None:
        """Note that a request is begun. May be called from many threads."""
        with self._lock:
            if self._file is None:
                return
            os.write(self._file, _line(id))
            self._begun.append(id)
            if len(self._begun) >= self._most_lines:
                self._begun = [id for id in dict.fromkeys(self._begun) if id not in self._done]
                self._most_lines = max(self._least_lines, 2 * len(self._begun))
                self._write()

    def open(self) -> None:
        """Begin to note. A folder that takes no file is no reason to stop."""
        self._begun = []
        self._write()

    def _write(self) -> None:
        """A file of what is begun, in the place of the one before."""
        header = json.dumps(_state(self._root) | {"deaths": self._deaths}).encode() + b"\n"
        before = self._file
        with suppress(OSError):
            write_atomically(self._path, header + b"".join(map(_line, self._begun)), durable=False)
            self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)
            if self._watches_crashes or not faulthandler.is_enabled():
                faulthandler.enable(self._file, all_threads=False)
                self._watches_crashes = True
        if before is not None and before != self._file:
            os.close(before)

    def close(self) -> None:
        """All that was begun has ended, one way or another."""
        if self._watches_crashes:
            faulthandler.disable()
        with self._lock:
            if self._file is not None:
                os.close(self._file)
            self._file, self._watches_crashes = None, False
        with suppress(OSError):
            self._path.unlink()


def _line(id: str) -> bytes:
    return json.dumps(id).encode() + b"\n"


def _state(root: Path) -> dict[str, Any]:
    """What tells deaths apart: this start of the machine, and how many processes it has ended for memory since."""
    counters = dict(line.split(None, 1) for line in (read_text(root / "proc/vmstat") or "").splitlines())
    return {"boot": read_text(root / "proc/sys/kernel/random/boot_id"), "kills": counters.get("oom_kill")}


def _deaths(path: Path, now: dict[str, Any]) -> dict[str, int]:
    """How often the process died of each request, as far as a run that died has noted it."""
    try:
        header, *lines = path.read_bytes().splitlines()
        before = json.loads(header)
        deaths = {str(id): int(count) for id, count in before["deaths"].items()}
        is_theirs = any(line.startswith(CRASH) for line in lines) or (
            before["boot"] == now["boot"] and (now["kills"] is None or before["kills"] != now["kills"])
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):  # nothing, or nothing of ours
        return {}
    for line in lines if is_theirs else ():
        with suppress(ValueError, RecursionError):  # one that was cut short, and what faulthandler says
            if isinstance(id := json.loads(line), str):
                deaths[id] = deaths.get(id, 0) + 1
    return deaths
