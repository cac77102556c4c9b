"""What building engines takes: time, memory and disk, for a bundle on any target.

    python scripts/make_synthetic_checkpoint.py artifacts/synthetic
    pixtral export artifacts/synthetic -o artifacts/synthetic-int4 --precision int4 --method rtn
    python scripts/measure_build.py artifacts/synthetic-int4 --target rtx:sm89 --context 4864

Runs `pixtral build` as a child process and watches it from outside; arguments after the bundle are passed on.
`peak_rss_bytes` is the kernel's own figure and counts the pages of the mapped weight file, which the system takes back
when it needs them; `peak_anonymous_bytes`, the largest of five looks a second, must be there. `memory_per_engine_byte`
is the first over the largest engine. The last line is JSON; the exit code is that of the build.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from child_process import watch


def measure(bundle: Path, arguments: list[str]) -> tuple[dict[str, Any], int]:
    """Build in a child process and say what that took, with its exit code."""
    used = watch(["build", str(bundle), *arguments, "--json"])
    targets = json.loads(used.printed)["targets"] if used.exit_code == 0 else []
    sizes = [size for target in targets for size in target["engine_bytes"].values()]
    return {
        "arguments": arguments,
        "exit_code": used.exit_code,
        "wall_s": used.wall_s,
        "cpu_s": used.cpu_s,
        "peak_rss_bytes": used.peak_rss_bytes,
        "peak_anonymous_bytes": used.peak_bytes["RssAnon"],
        "memory_per_engine_byte": round(used.peak_rss_bytes / max(sizes), 2) if sizes else None,
        "engines": {target["target"]: target["engine_bytes"] for target in targets},
    }, used.shell_code


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    args, arguments = parser.parse_known_args()
    result, code = measure(args.bundle, arguments)
    print(json.dumps(result))
    sys.exit(code)


if __name__ == "__main__":
    main()
