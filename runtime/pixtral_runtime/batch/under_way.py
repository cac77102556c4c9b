"""Which requests a run works on, so that one which takes the process with it is not tried for ever.

Beside the results lies a hidden file with the ids of requests that were begun, as long as the run lasts; one that died
leaves it. Were they the cause, because the system ended a process for memory meanwhile or ours crashed, those without a
record are suspects: the next run does each of them alone. One that the process dies of again is answered with an
error. Whoever kills a run, and a machine that loses power, makes no request suspect.
"""

from __future__ import annotations

import faulthandler
import json
import os
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from pixtral_runtime.device.sysfs import SYSTEM, read_text
from pixtral_runtime.files import write_atomically

MOST_DEATHS = 2
CRASH = b"Fatal Python error"  # as faulthandler begins


class UnderWay:
    """The requests of a run that writes its results to `path`: which to do alone, and which no more."""

    def __init__(self, path: Path, *, root: Path = SYSTEM) -> None:
        self._path = path.with_name(f".{path.name}.underway")
        self._root = root
        self._file: int | None = None
        self._watches_crashes = False
        self._deaths: dict[str, int] = {}

    @property
    def accused(self) -> set[str]:
        return {id for id, count in self._deaths.items() if count >= MOST_DEATHS}

    @property
    def suspects(self) -> set[str]:
        return set(self._deaths) - self.accused

    def remember(self, done: Collection[str]) -> None:
        """Take up what runs noted that died; `done` are the ids that have a record."""
        deaths = _deaths(self._path, _state(self._root))
        self._deaths = {id: count for id, count in deaths.items() if id not in done}

    def begin(self, id: str) -> None:
        """Note that a request is begun. May be called from many threads."""
        if self._file is not None:
            os.write(self._file, json.dumps(id).encode() + b"\n")

    def open(self) -> None:
        """Begin to note. A folder that takes no file is no reason to stop."""
        header = json.dumps(_state(self._root) | {"deaths": self._deaths}).encode()
        with suppress(OSError):
            write_atomically(self._path, header + b"\n", durable=False)
            self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)
            if not faulthandler.is_enabled():
                faulthandler.enable(self._file, all_threads=False)
                self._watches_crashes = True

    def close(self) -> None:
        """All that was begun has ended, one way or another."""
        if self._watches_crashes:
            faulthandler.disable()
        if self._file is not None:
            os.close(self._file)
        self._file, self._watches_crashes = None, False
        with suppress(OSError):
            self._path.unlink()


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
