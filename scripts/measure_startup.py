"""How long `pixtral -h` takes, as a whole process. Prints JSON: median, smallest and largest of the runs, in seconds.

python scripts/measure_startup.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    runs = parser.parse_args().runs
    command = [str(Path(sys.executable).with_name("pixtral")), "-h"]
    times = []
    for _ in range(runs + 1):
        started = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - started)
    times = times[1:]  # the first reads the files from disk
    seconds = {"median": statistics.median(times), "min": min(times), "max": max(times)}
    print(json.dumps({"command": "pixtral -h", "runs": runs, "seconds": {k: round(v, 3) for k, v in seconds.items()}}))


if __name__ == "__main__":
    main()
