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
import sys
from pathlib import Path
from typing import Any

from child_process import watch


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder, some of which may vanish meanwhile."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total


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
