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
import time
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


def measure(checkpoint: Path, bundle: Path, arguments: list[str]) -> dict[str, Any]:
    """Export in a child process and say what that took; a child that fails is measured too."""
    command = [sys.executable, "-m", "pixtral_cli", "export", str(checkpoint), "-o", str(bundle), *arguments]
    started = time.monotonic()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    process = Path("/proc") / str(child.pid)
    partial = bundle.with_name(f".{bundle.name}.partial")
    memory = {"RssAnon": 0, "RssFile": 0}
    disk_bytes = 0
    while os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        seen = counters(process / "status")
        memory = {name: max(peak, 1024 * seen.get(name, 0)) for name, peak in memory.items()}
        # The bundle first: were it to appear in between, it would count twice the other way round.
        disk_bytes = max(disk_bytes, folder_bytes(bundle) + folder_bytes(partial))
        time.sleep(POLL_S)
    io = counters(process / "io")  # whole, because the child has ended but is not yet reaped
    _, status, usage = os.wait4(child.pid, 0)
    wall_s = time.monotonic() - started
    child.returncode = os.waitstatus_to_exitcode(status)
    return {
        "arguments": arguments,
        "exit_code": child.returncode,
        "wall_s": round(wall_s, 1),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_rss_bytes": usage.ru_maxrss * 1024,
        "peak_anonymous_bytes": memory["RssAnon"],
        "peak_rss_file_bytes": memory["RssFile"],
        "read_call_bytes": io.get("rchar"),
        "read_bytes": io.get("read_bytes"),
        "written_bytes": io.get("write_bytes"),
        "peak_disk_bytes": max(disk_bytes, folder_bytes(bundle)),
        "checkpoint_bytes": folder_bytes(checkpoint),
        "bundle_bytes": folder_bytes(bundle),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("bundle", type=Path)
    args, arguments = parser.parse_known_args()
    result = measure(args.checkpoint, args.bundle, arguments)
    print(json.dumps(result))
    sys.exit(result["exit_code"] if result["exit_code"] >= 0 else 128 - result["exit_code"])  # ended by a signal


if __name__ == "__main__":
    main()
