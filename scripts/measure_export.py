"""What an export takes: time, memory, and bytes read and written.

    python scripts/make_synthetic_checkpoint.py artifacts/synthetic
    python scripts/measure_export.py artifacts/synthetic artifacts/synthetic-int4 --precision int4

Runs `pixtral export` as a child process and watches it from outside; arguments after the two folders are passed on.

`peak_rss_bytes` is the kernel's own figure. It counts the pages of mapped files as well, which the system takes back
when it needs them: `peak_anonymous_bytes` is what must be there, `peak_rss_file_bytes` the rest. A mapped file is not
read by calls, so `read_call_bytes` says little about a checkpoint; `read_bytes` is what came from the disk, without
what the page cache held already, and `checkpoint_bytes` what there was to read. `peak_disk_bytes` counts the bundle and
the hidden folder it grows in. Peaks other than the kernel's are the largest values of five looks a second and may miss
a short one. The last line is JSON; the exit code is that of the export.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POLL_S = 0.2


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder, some of which may vanish meanwhile."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total


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


def measure(checkpoint: Path, bundle: Path, arguments: list[str]) -> tuple[dict[str, Any], int]:
    """Export in a child process and say what that took, with its exit code; one that fails is measured too."""
    partial = bundle.with_name(f".{bundle.name}.partial")
    disk_bytes = 0

    def look() -> None:
        nonlocal disk_bytes
        # The bundle first: were it to appear in between, it would count twice the other way round.
        disk_bytes = max(disk_bytes, folder_bytes(bundle) + folder_bytes(partial))

    used = watch(["export", str(checkpoint), "-o", str(bundle), *arguments], look)
    return {
        "arguments": arguments,
        "exit_code": used.exit_code,
        "wall_s": used.wall_s,
        "cpu_s": used.cpu_s,
        "peak_rss_bytes": used.peak_rss_bytes,
        "peak_anonymous_bytes": used.peak_bytes["RssAnon"],
        "peak_rss_file_bytes": used.peak_bytes["RssFile"],
        "read_call_bytes": used.io.get("rchar"),
        "read_bytes": used.io.get("read_bytes"),
        "written_bytes": used.io.get("write_bytes"),
        "peak_disk_bytes": max(disk_bytes, folder_bytes(bundle)),
        "checkpoint_bytes": folder_bytes(checkpoint),
        "bundle_bytes": folder_bytes(bundle),
    }, used.shell_code


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("bundle", type=Path)
    args, arguments = parser.parse_known_args()
    result, code = measure(args.checkpoint, args.bundle, arguments)
    print(json.dumps(result))
    sys.exit(code)


if __name__ == "__main__":
    main()
