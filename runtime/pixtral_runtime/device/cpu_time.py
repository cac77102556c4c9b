"""CPU time of everything and of this program, so that what others took during a run is known without sampling."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from pixtral_runtime.device.sysfs import read_text

SHORTEST_S = 0.2  # the kernel counts in hundredths
SHOWN_PROCESSES = 3
SHOWN_SHARE = 0.02  # of one CPU


@dataclass(frozen=True)
class CpuTime:
    """Seconds since boot, summed over `cpus`. `own_s` is this process with its children, `others` all else by pid."""

    cpus: int
    total_s: float
    busy_s: float
    stolen_s: float
    own_s: float
    others: dict[int, tuple[str, float]]


@dataclass(frozen=True)
class OtherLoad:
    """Shares of all CPUs, 0 to 1: other programs' and, in a virtual machine, what its host gave to others."""

    share: float
    stolen: float
    busiest: tuple[str, ...]


@dataclass(frozen=True)
class _Process:
    name: str
    parent: int
    seconds: float
    waited_s: float  # of children that have ended


def read_cpu_time(root: Path) -> CpuTime | None:
    """Counters from /proc/stat and /proc/<pid>/stat (proc(5)); None where they are not readable."""
    lines = [line.split() for line in (read_text(root / "proc/stat") or "").splitlines() if line.startswith("cpu")]
    own = _stat(root / "proc/self/stat")
    if not lines or len(lines[0]) < 9 or own is None:
        return None
    user, nice, system, idle, iowait, irq, softirq, stolen = (int(ticks) / _hertz() for ticks in lines[0][1:9])
    busy = user + nice + system + irq + softirq
    processes = dict(found for path in (root / "proc").glob("[0-9]*/stat") if (found := _stat(path)) is not None)
    processes[own[0]] = own[1]
    family = {own[0]}
    while more := {pid for pid, process in processes.items() if process.parent in family} - family:
        family |= more
    return CpuTime(
        cpus=len(lines) - 1,
        total_s=busy + stolen + idle + iowait,
        busy_s=busy,
        stolen_s=stolen,
        own_s=sum(processes[pid].seconds + processes[pid].waited_s for pid in family),
        others={pid: (process.name, process.seconds) for pid, process in processes.items() if pid not in family},
    )


def other_load(before: CpuTime, after: CpuTime) -> OtherLoad | None:
    """What others took between two readings; None where too little time went by to tell."""
    passed = after.total_s - before.total_s
    elapsed = passed / max(after.cpus, 1)
    if elapsed < SHORTEST_S:
        return None
    theirs = (after.busy_s - before.busy_s) - (after.own_s - before.own_s)
    used = {pid: seconds - before.others.get(pid, ("", 0.0))[1] for pid, (_, seconds) in after.others.items()}
    busiest = sorted(used, key=lambda pid: -used[pid])[:SHOWN_PROCESSES]
    return OtherLoad(
        max(0.0, theirs / passed),
        (after.stolen_s - before.stolen_s) / passed,
        tuple(
            f"{after.others[pid][0]} ({used[pid] / elapsed:.0%} of one)"
            for pid in busiest
            if used[pid] / elapsed > SHOWN_SHARE
        ),
    )


def _stat(path: Path) -> tuple[int, _Process] | None:
    """A process that may end while it is read. Its name is in brackets and may hold brackets itself."""
    head, bracket, tail = (read_text(path) or "").rpartition(")")
    if not bracket:
        return None
    pid, _, name = head.partition(" (")
    fields = tail.split()  # from the third on: state, parent, ...
    user, system, waited_user, waited_system = (int(ticks) / _hertz() for ticks in fields[11:15])
    return int(pid), _Process(name, int(fields[1]), user + system, waited_user + waited_system)


def _hertz() -> int:
    return os.sysconf("SC_CLK_TCK")
