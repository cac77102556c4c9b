"""Run the stages of the device check on a GPU machine, each in a process and a time limit of its own.

    bash scripts/device_check.sh --stages facts,plumbing,smoke

`results.json` in the folder of `--out` is rewritten after each figure, `log.txt` holds all that was printed; a table of
at most 40 lines comes last.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

TABLE_LINES = 40


@dataclass(frozen=True)
class Stage:
    """`module.function` of this folder; `needs` names stages that must have ended well."""

    function: str
    limit_s: int
    needs: tuple[str, ...] = ()


STAGES = {
    "facts": Stage("device_plumbing.facts", 15),
    "plumbing": Stage("device_plumbing.plumbing", 30),
    "smoke": Stage("device_smoke.smoke", 40),
    "graphs": Stage("device_smoke.graphs_on_its_stream", 15, ("smoke",)),
    "graphs-own": Stage("device_smoke.graphs_on_our_stream", 15, ("smoke",)),
    "answers": Stage("device_smoke.answers", 25, ("smoke",)),
    "int4": Stage("device_large.int4", 90, ("smoke",)),
    "peer-smoke": Stage("device_peer.smoke", 30),
}


class Results:
    """All figures so far, in a file that is whole at any time."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "results.json"
        self.data: dict[str, Any] = {"began": time.strftime("%FT%TZ", time.gmtime()), "stages": {}, "figures": []}

    def add(self, figure: dict[str, Any]) -> None:
        self.data["figures"].append(figure)
        self.write()

    def end(self, stage: str, outcome: str, seconds: float) -> None:
        self.data["stages"][stage] = {"outcome": outcome, "seconds": round(seconds, 1)}
        self.write()

    def write(self) -> None:
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(self.data, indent=1), encoding="utf-8")
        partial.replace(self._path)


def run_stage(name: str, limit_s: float, results: Results, log: IO[str], command: list[str]) -> str:
    """Run a stage until its end or its limit, which ends it and all its children. Returns how it ended."""
    passed = [stage for stage, state in results.data["stages"].items() if state["outcome"] == "ok"]
    environment = os.environ | {
        "DEVICE_CHECK_DEADLINE": str(time.time() + limit_s),
        "DEVICE_CHECK_PASSED": ",".join(passed),
    }
    deadline = time.monotonic() + limit_s
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=log, env=environment, start_new_session=True, text=False
    )
    assert child.stdout is not None
    os.set_blocking(child.stdout.fileno(), False)
    rest, ended = b"", False
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        while not ended and (left := deadline - time.monotonic()) > 0:
            if not selector.select(left):
                break
            piece = child.stdout.read() or b""
            ended = not piece
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                take_line(name, line.decode(errors="replace"), results, log)
    outcome = f"ended at its limit of {limit_s:.0f} s"
    if ended:
        try:
            code = child.wait(max(0.0, deadline - time.monotonic()) + 1)
            outcome = "ok" if code == 0 else f"failed with {code}"
        except subprocess.TimeoutExpired:
            pass
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    return outcome


def take_line(stage: str, line: str, results: Results, log: IO[str]) -> None:
    print(line, file=log, flush=True)
    try:
        figure = json.loads(line)
    except ValueError:
        figure = None
    if isinstance(figure, dict) and "figure" in figure:
        results.add({"stage": stage} | figure)
        if str(figure["value"]).startswith("failed"):
            print(f"[{stage}] {line[:300]}", flush=True)


def table(data: dict[str, Any], lines: int = TABLE_LINES) -> list[str]:
    """Stages first, then the figures with an expectation, then as many of the others as fit."""
    shown = [f"{name:12} {state['outcome']:28} {state['seconds']:6.1f} s" for name, state in data["stages"].items()]
    figures = sorted(data["figures"], key=lambda figure: not figure.get("expected"))
    rows = [
        f"{figure['stage'][:10]:10} {figure['figure'][:46]:46} {_short(figure['value']):>22} {figure.get('unit', ''):8}"
        f" {figure.get('expected', '')}".rstrip()[:130]
        for figure in figures
    ]
    room = lines - len(shown) - 1
    more = [] if len(rows) <= room else [f"and {len(rows) - room + 1} more in results.json"]
    return [*shown, "-" * 60, *rows[: room - len(more)], *more]


def _short(value: object) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)[:60]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", default=",".join(STAGES), help="of " + ", ".join(STAGES))
    parser.add_argument("--total", type=float, default=485, help="seconds for all, from the start of unpacking")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "/tmp/device-check-out")))
    parser.add_argument("--one", choices=STAGES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        module, _, function = STAGES[arguments.one].function.partition(".")
        getattr(importlib.import_module(module), function)()
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = Results(arguments.out)
    end = float(os.environ.get("DEVICE_CHECK_BEGAN", time.time())) + arguments.total
    with open(arguments.out / "log.txt", "w", encoding="utf-8") as log:
        for name in arguments.stages.split(","):
            stage, began = STAGES[name], time.time()
            print(f"== {name}", file=log, flush=True)
            states = results.data["stages"]
            if lacking := [need for need in stage.needs if need in states and states[need]["outcome"] != "ok"]:
                outcome = f"skipped: {lacking[0]} failed"
            elif (limit := min(stage.limit_s, end - began)) < 3:
                outcome = "skipped: no time left"
            else:
                command = [sys.executable, str(Path(__file__).resolve()), "--one", name]
                outcome = run_stage(name, limit, results, log, command)
            results.end(name, outcome, time.time() - began)
            print(f"== {name}: {outcome}, {time.time() - began:.1f} s", flush=True)
    print("\n".join(table(results.data)), flush=True)


if __name__ == "__main__":
    main()
