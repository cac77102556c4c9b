"""A child process watched from outside: time, peak memory by kind, bytes read and written."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

POLL_S = 0.2


def counters(path: Path) -> dict[str, int]:
    """`name: value` lines of a file in /proc; nothing once the process has ended."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    pairs = (line.split(":") for line in lines)
    return {name: int(value.split()[0]) for name, value in pairs if value.split()[:1] and value.split()[0].isdigit()}


@dataclass(frozen=True)
class Usage:
    """What a child process took."""

    exit_code: int
    printed: str
    wall_s: float
    cpu_s: float
    peak_rss_bytes: int  # the kernel's own figure
    peak_bytes: dict[str, int]  # largest RssAnon and RssFile seen
    io: dict[str, int]

    @property
    def shell_code(self) -> int:
        """The exit code as a shell gives it: 128 and the signal, where one ended the child."""
        return self.exit_code if self.exit_code >= 0 else 128 - self.exit_code


def watch(arguments: list[str], look: Callable[[], None] = lambda: None) -> Usage:
    """Run a pixtral command as a child process, and look at it five times a second."""
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as stdout:
        child = subprocess.Popen([sys.executable, "-m", "pixtral_cli", *arguments], stdout=stdout)
        process = Path("/proc") / str(child.pid)
        peaks = {"RssAnon": 0, "RssFile": 0}
        while os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            seen = counters(process / "status")
            peaks = {name: max(peak, 1024 * seen.get(name, 0)) for name, peak in peaks.items()}
            look()
            time.sleep(POLL_S)
        io = counters(process / "io")  # whole, because the child has ended but is not yet reaped
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        stdout.seek(0)
        return Usage(
            exit_code=child.returncode,
            printed=stdout.read(),
            wall_s=round(time.monotonic() - started, 1),
            cpu_s=round(usage.ru_utime + usage.ru_stime, 1),
            peak_rss_bytes=usage.ru_maxrss * 1024,
            peak_bytes=peaks,
            io=io,
        )
