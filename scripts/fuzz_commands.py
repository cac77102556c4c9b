"""Looks for exit 1, which is for bugs alone: every command with odd values for its options and damaged input files.

    python scripts/fuzz_commands.py --count 5000 --seed 0          # an hour on one core
    python scripts/fuzz_commands.py --first 1234 --count 1         # one of them again

An invocation is a line that works (`LINES`), some more of the command's options with values of their type, and perhaps
a file that it reads damaged; its number and the seed decide it. Options are read from the application, words to choose
from out of their help. They run in a child process, so that a crash is found as well. The last line is JSON: exit codes
by command, and all that ended in exit 1, crashed, or printed a trace; then the script itself ends with exit 6.
"""

from __future__ import annotations

import argparse
import faulthandler
import io
import json
import os
import random as random_module
import resource
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from fuzz_files import damage, lay_out, make_world
from fuzz_lines import LINES, WEIGHTS, arguments, built, call_api

LIMIT_S = 20.0  # then it is interrupted, as by Ctrl-C; after three times as long the process ends
STDIN = (
    *(b"", b"photos/a.png\nabsent.png\n", b"\xff\0photos/a.png\0", b"~\0/a.png what?\n/image -\n", b'"""\n/x\n'),
    b"Which?\n/image 'photos/a.png' photos\nAnd?\n/undo\n/undo\n/forget\n/system Be.\n/system\nWhy?\n/reset\n/help\n",
)
DATA_BYTES = 6 << 30  # of memory; more is refused, as on a small machine


@dataclass(frozen=True)
class Outcome:
    """What became of an invocation. `noises` are traces of threads, and warnings; `trace` is where exit 1 began."""

    number: int
    command: str
    line: str
    exit_code: int
    said: str = ""
    trace: str = ""
    noises: tuple[str, ...] = ()


def run_command(line: list[str], stdin: bytes) -> tuple[int, str, BaseException | None]:
    """Exit code, what was said on stderr, and what ended the command: `main` with other streams."""
    from pixtral_cli import output
    from pixtral_cli.main import app

    stdout, stderr = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    before = sys.stdin, sys.stdout, sys.stderr
    sys.stdin, sys.stdout, sys.stderr = io.TextIOWrapper(io.BytesIO(stdin), "utf-8"), stdout, stderr
    error: BaseException | None = None
    try:
        for stream in (stdout, stderr):
            stream.reconfigure(errors="backslashreplace")  # as `output.prepare_streams` does
        output.set_flags(output.Flags())
        built(app).main(args=line, prog_name="pixtral")
    except SystemExit as ended:
        error = ended
    finally:
        sys.stdin, sys.stdout, sys.stderr = before
    said = stderr.buffer.getvalue().decode()
    return int(error.code or 0) if isinstance(error, SystemExit) else 0, said, error


def invoke(number: int, seed: int, world: Path) -> Outcome:
    """One invocation in a copy of the world, which is the working folder meanwhile."""
    from pixtral_runtime.errors import PixtralError

    random = random_module.Random(f"{seed} {number}")
    command = random.choices(list(LINES), [WEIGHTS.get(name, 1) for name in LINES])[0]
    noises: list[str] = []
    before = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        os.chdir(lay_out(world, Path(folder)))
        threading.excepthook = lambda found: noises.append(f"thread: {found.exc_value!r}")
        sys.unraisablehook = lambda found: noises.append(f"unraisable: {found.exc_value!r}")
        warnings.showwarning = lambda message, *_, **__: noises.append(f"warning: {message}")
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
        faulthandler.dump_traceback_later(3 * LIMIT_S, exit=True)
        line = ["api"] if command == "api" else [command, *arguments(command, random)]
        named = line if command != "api" else ["bundle", "photos", "bench.json", "eval.json", "results.jsonl"]
        done = damage([Path(name.removeprefix("@")) for name in named], random) if random.random() < 0.6 else ""
        error: BaseException | None = None
        said, code = "", 0
        try:
            if command == "api":
                call_api(random)()
            else:
                stdin = random.choice(STDIN)
                code, said, error = run_command(line, stdin)
        except PixtralError as refusal:
            said, code = str(refusal), refusal.exit_code
        except KeyboardInterrupt:
            code = 130
        except Exception as leak:
            said, code, error = repr(leak), 1, leak
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            faulthandler.cancel_dump_traceback_later()
            os.chdir(before)
    if "Traceback" in said and "--debug" not in line:
        noises.append(said[-300:])
    return Outcome(
        number, command, f"{line} {done}", code, said[-400:], _origin(error) if code == 1 else "", tuple(noises)
    )


def _origin(error: BaseException | None) -> str:
    """The error that the exit code stands for, and the innermost of our lines that it came through."""
    while error is not None and isinstance(error, SystemExit | RuntimeError) and (error.__cause__ or error.__context__):
        error = error.__cause__ or error.__context__
    if error is None:
        return ""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "site-packages" not in f.filename]
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno} {frames[-1].line}" if frames else ""
    return f"{type(error).__module__}.{type(error).__name__}: {str(error)[:200]} | {place}"


def in_child(work: Callable[[], None]) -> int:
    """Run in a forked process. Returns its exit status, negative for a signal."""
    if (child := os.fork()) == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def outcomes(numbers: range, seed: int, world: Path) -> Iterator[Outcome]:
    """Every invocation's outcome; one that takes the process with it has the exit code -1, and others follow it."""
    log = world.with_suffix(".jsonl")

    def work(first: int) -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (DATA_BYTES, DATA_BYTES))
        with log.open("a", encoding="utf-8", buffering=1) as file:
            for number in range(first, numbers.stop):
                file.write(f"{number}\n")
                file.write(json.dumps(asdict(invoke(number, seed, world))) + "\n")

    first = numbers.start
    while first < numbers.stop:
        log.write_text("")
        status = in_child(lambda first=first: work(first))  # type: ignore[misc]
        lines = log.read_text(encoding="utf-8").splitlines()
        yield from (Outcome(**json.loads(line)) for line in lines if line.startswith("{"))
        first = int(next(line for line in reversed(lines) if not line.startswith("{"))) + 1
        if status:
            yield Outcome(first - 1, "?", "", -1, f"the process ended with {status}")


def summary(found: Iterable[Outcome]) -> dict[str, Any]:
    codes: dict[str, Counter[int]] = {}
    bad = []
    for outcome in found:
        codes.setdefault(outcome.command, Counter())[outcome.exit_code] += 1
        if outcome.exit_code in (1, -1) or outcome.noises:
            bad.append(asdict(outcome))
            print(
                f"{outcome.number}: {outcome.line[:200]}: {outcome.trace or outcome.noises or outcome.said}", flush=True
            )
    counts = {name: dict(sorted(each.items())) for name, each in sorted(codes.items())}
    return {"invocations": sum(sum(each.values()) for each in codes.values()), "exit_codes": counts, "bad": bad}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--first", type=int, default=0, help="number of the first invocation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--world", type=Path, help="where the files to begin with are kept for the next time")
    chosen = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "none"}
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-world-") as folder:
        os.environ |= {"HF_HOME": f"{folder}/hf", "XDG_CACHE_HOME": f"{folder}/cache"}
        world = chosen.world or Path(folder, "world")
        if not world.exists() and in_child(lambda: make_world(world)):
            sys.exit("the files to begin with cannot be made")
        numbers = range(chosen.first, chosen.first + chosen.count)
        result = summary(outcomes(numbers, chosen.seed, world))
    print(json.dumps({"seed": chosen.seed, **result, "seconds": round(time.monotonic() - started)}))
    sys.exit(6 if result["bad"] else 0)


if __name__ == "__main__":
    main()
