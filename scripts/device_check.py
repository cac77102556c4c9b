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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

TABLE_LINES = 40
LEAST_S = 3  # that a stage is begun with


@dataclass(frozen=True)
class Stage:
    """`module.function` of this folder; `needs` names stages that must have ended well."""

    function: str
    limit_s: int
    needs: tuple[str, ...] = ("smoke",)


STAGES = {
    "facts": Stage("device_plumbing.facts", 15, ()),
    "plumbing": Stage("device_plumbing.plumbing", 30, ()),
    "smoke": Stage("device_compare.smoke", 45, ()),
    "answers": Stage("device_compare.answers", 30),
    "widths": Stage("device_compare.widths", 170),
    "int4": Stage("device_speed.int4", 130),
    "float16": Stage("device_speed.float16", 110),
    "transformers": Stage("device_peer.transformers", 75, ()),
    "int4-many": Stage("device_speed.int4_for_many_slots", 100),
    "int4-32-many": Stage("device_speed.int4_in_groups_of_32_for_many_slots", 100),
    "int4-32": Stage("device_speed.int4_in_groups_of_32", 80),
}
"""In the order of their worth, should the time not suffice for all."""


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


def own_command(name: str) -> list[str]:
    return [sys.executable, str(Path(__file__).resolve()), "--one", name]


def run_stages(
    names: Sequence[str], results: Results, log: IO[str], end: float, command: Callable[[str], list[str]] = own_command
) -> None:
    """Run stages one after the other until `end` (`time.time`), but for those whose needs failed."""
    states = results.data["stages"]
    for name in names:
        stage, began = STAGES[name], time.time()
        print(f"== {name}", file=log, flush=True)
        if lacking := [need for need in stage.needs if need in states and states[need]["outcome"] != "ok"]:
            outcome = f"skipped: {lacking[0]} failed"
        elif (limit := min(stage.limit_s, end - began)) < LEAST_S:
            outcome = "skipped: no time left"
        else:
            outcome = run_stage(name, limit, results, log, command(name))
        results.end(name, outcome, time.time() - began)
        print(f"== {name}: {outcome}, {time.time() - began:.1f} s", flush=True)


def run_stage(name: str, limit_s: float, results: Results, log: IO[str], command: list[str]) -> str:
    """Run a stage until its end or its limit, which ends it and all its children. Returns how it ended."""
    environment = os.environ | {"DEVICE_CHECK_DEADLINE": str(time.time() + limit_s)}
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
    """How each stage ended and how much of it was as it must be; what was not; then speeds beside what was expected."""
    figures = data["figures"]
    rows = []
    for name, state in data["stages"].items():
        checks = [met for figure in figures if figure["stage"] == name and (met := as_expected(figure)) is not None]
        right = f"{sum(checks)} of {len(checks)} as they must be" if checks else ""
        rows.append(f"{name:14} {state['outcome']:28} {state['seconds']:6.1f} s  {right}".rstrip())
    wrong = [figure for figure in figures if as_expected(figure) is False]
    speeds = [figure for figure in figures if figure.get("expected") and as_expected(figure) is None]
    shown = [
        f"{figure['figure'][:50]:50} {_short(figure['value']):>16} {figure.get('unit', ''):8} {figure['expected']}"[
            :120
        ]
        for figure in (*wrong, *speeds)
    ]
    room = lines - len(rows) - 2
    more = [f"and {len(shown) - room} more of these"] if len(shown) > room else []
    return [*rows, "", *shown[:room], *more, f"{len(figures)} figures in results.json"][:lines]


def as_expected(figure: dict[str, Any]) -> bool | None:
    """Whether a figure is what it must be: `True`, `0`, or less than a limit. None where there is no must."""
    expected, value = str(figure.get("expected", "")), figure["value"]
    if str(value).startswith("failed"):
        return False
    if expected.startswith("< "):
        return isinstance(value, int | float) and value < float(expected[2:])
    return str(value) == expected if expected in ("True", "0") else None


def _row(figure: dict[str, Any]) -> str:
    value, unit, expected = (_short(figure.get(name, "")) for name in ("value", "unit", "expected"))
    return f"{figure['figure'][:50]:50} {value:>16} {unit:8} {expected}".rstrip()[:120]


def _short(value: object) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)[:60]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", default=",".join(STAGES), help="of " + ", ".join(STAGES))
    parser.add_argument("--total", type=float, default=485, help="seconds for all, from the start of unpacking")
    parser.add_argument("--out", type=Path, default=Path("/tmp/device-check-out"))
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
        run_stages(arguments.stages.split(","), results, log, end)
    print("\n".join(table(results.data)), flush=True)


if __name__ == "__main__":
    main()
