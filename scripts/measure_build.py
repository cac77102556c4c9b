"""What building engines takes: time, memory and disk, for a bundle on any target.

    python scripts/make_synthetic_checkpoint.py artifacts/synthetic
    pixtral export artifacts/synthetic -o artifacts/synthetic-int4 --precision int4 --method rtn
    python scripts/measure_build.py artifacts/synthetic-int4 --target rtx:sm89 --context 4864

Runs `pixtral build` as a child process and watches it from outside; arguments after the bundle are passed on.
`peak_rss_bytes` is the kernel's own figure and counts the pages of the mapped weight file, which the system takes back
when it needs them; `peak_anonymous_bytes`, the largest of five looks a second, must be there. `memory_per_engine_byte`
is the larger of both over the largest engine. The last line is JSON; the exit code is that of the build.
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

from measure_export import POLL_S, counters


def measure(bundle: Path, arguments: list[str]) -> dict[str, Any]:
    """Build in a child process and say what that took."""
    command = [sys.executable, "-m", "pixtral_cli", "build", str(bundle), *arguments, "--json"]
    started = time.monotonic()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    anonymous = 0
    while os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        seen = counters(Path("/proc") / str(child.pid) / "status")
        anonymous = max(anonymous, 1024 * seen.get("RssAnon", 0))
        time.sleep(POLL_S)
    assert child.stdout is not None
    printed = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    built = json.loads(printed) if child.returncode == 0 else {}
    sizes = [size for target in built.get("targets", []) for size in target["engine_bytes"].values()]
    peak = usage.ru_maxrss * 1024
    return {
        "arguments": arguments,
        "exit_code": child.returncode,
        "wall_s": round(time.monotonic() - started, 1),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_rss_bytes": peak,
        "peak_anonymous_bytes": anonymous,
        "memory_per_engine_byte": round(peak / max(sizes), 2) if sizes else None,
        "engines": {target["target"]: target["engine_bytes"] for target in built.get("targets", [])},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    args, arguments = parser.parse_known_args()
    result = measure(args.bundle, arguments)
    print(json.dumps(result))
    sys.exit(result["exit_code"] if result["exit_code"] >= 0 else 128 - result["exit_code"])


if __name__ == "__main__":
    main()
