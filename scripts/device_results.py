"""What the stages of `device_check.py` tell it: one line of JSON a figure, on standard output."""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WORK = Path(os.environ.get("DEVICE_CHECK_WORK", "/tmp/device-check"))
"""Where `device_check.sh` unpacked everything."""
NEW_TOKENS, TEXT_TOKENS = 128, 20  # of whole requests, the project's and others'


def emit(figure: str, value: object, unit: str = "", *, expected: str = "", **more: object) -> None:
    """Report a figure. `expected` was written before anything was measured."""
    print(
        json.dumps({"figure": figure, "value": value, "unit": unit, "expected": expected} | more, default=str),
        flush=True,
    )


@contextmanager
def reported(figure: str) -> Iterator[None]:
    """What fails in here is a figure of its own; the stage goes on."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        emit(figure, f"failed: {type(error).__name__}: {str(error)[:300]}")


def time_left() -> float:
    """Seconds until this stage is ended."""
    return float(os.environ.get("DEVICE_CHECK_DEADLINE", time.time() + 600)) - time.time()


def median_ms(work: Callable[[], Any], count: int = 50, warm: int = 5, most_s: float = 2.0) -> float:
    """The median of some calls, each from its start to its end, in milliseconds."""
    for _ in range(warm):
        work()
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < count and (len(times) < 3 or time.perf_counter() - began < most_s):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return round(1e3 * statistics.median(times), 4)


@contextmanager
def native_log(lines: list[str]) -> Iterator[None]:
    """Adds to `lines` what libraries write to standard error in here."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            lines += file.read().decode(errors="replace").splitlines()
