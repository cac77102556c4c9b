"""What the commands say, and where: data on stdout, talk on stderr.

`print_*` writes data; with `--json` a command calls `print_json` once and none of the others. `talk`, `verbose`,
`warn`, `error_line` and the progress bars go to stderr, as loud as `-q` and `-v` say. The flags are kept here, set by
`main` before a command starts, so that a command need not pass them on.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from types import FrameType

    from rich.progress import Progress, TaskID

    from pixtral_runtime.errors import PixtralError, Remedy

DIM, RED, YELLOW = 2, 31, 33  # as ANSI numbers them
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
SHORT_FLAGS = {"output": "-o", "prompt": "-p"}  # options that everybody types by their letter


@dataclass(frozen=True)
class Flags:
    """What the user wants to hear: -v, -q and --debug."""

    verbose: bool = False
    quiet: bool = False
    debug: bool = False


flags = Flags()


def set_flags(new: Flags) -> None:
    global flags  # one terminal, one setting
    flags = new


def print_line(text: str) -> None:
    print(_for_stdout(text))


def print_json(value: object) -> None:
    """A document; numbers that JSON does not have, infinity for one, are null."""
    print(json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False))


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list | tuple) else value


def print_pairs(pairs: Mapping[str, object]) -> None:
    """Names and values, one a line. A name that ends in `_bytes` also gets a readable size."""
    width = max(map(len, pairs))
    for name, value in pairs.items():
        print(_for_stdout(f"{name:{width}}  {_readable(name, value)}"))


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as their widest cell, under a header, after an empty line."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    print()
    for row in (header, *rows):
        print(_for_stdout("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()))


def print_json_line(value: object) -> None:
    """One line of JSON Lines, at once."""
    print(json.dumps(value, ensure_ascii=False), flush=True)


def print_answer(path: str, answer: str) -> None:
    """One image's answer, at once: somebody may be reading along."""
    print(_for_stdout(f"{_one_line(path)}: {answer}"), flush=True)


def print_piece(text: str) -> None:
    """A piece of an answer, at once."""
    sys.stdout.write(_for_stdout(text))
    sys.stdout.flush()


def discard(stream: TextIO) -> None:
    """Send what is still printed there nowhere: its reader has left."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def prepare_streams() -> None:
    """Open the standard streams that were closed, lest a file takes the number of one; names print in any bytes."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
            setattr(sys, name, open(number, mode, encoding="utf-8"))  # noqa: SIM115 - as long as the program
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


@contextmanager
def on_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle what asks a program to stop: Ctrl-C, a service manager, a terminal that closes. `nohup` still holds."""
    heard = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in heard}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def building(bars: Bars) -> Iterator[Callable[[str, int, int], None]]:
    """`bars.stage` for work in foreign code, which would swallow an interrupt: raised where that calls back instead.

    A second signal stops the program at once.
    """
    asked: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        if asked:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        asked.append(number)

    def stage(name: str, done: int, total: int) -> None:
        if asked:
            raise KeyboardInterrupt
        bars.stage(name, done, total)

    with on_signals(interrupt):
        yield stage
    if asked:
        raise KeyboardInterrupt


def _say(text: str) -> None:
    """On stderr, whose reader may have left: that is no reason to stop."""
    try:
        print(text, file=sys.stderr)
    except BrokenPipeError:
        discard(sys.stderr)


def talk(text: str) -> None:
    """For the person at the terminal. Silenced by -q."""
    if not flags.quiet:
        _say(text)


def think(text: str) -> None:
    """A piece of what a reasoning model writes before its answer, as it comes. Silenced by -q."""
    if flags.quiet:
        return
    try:
        shown = _harmless(text) if sys.stderr.isatty() else text
        print(_paint(shown, DIM), end="", flush=True, file=sys.stderr)
    except BrokenPipeError:
        discard(sys.stderr)


def verbose(text: str) -> None:
    """Details, shown with -v."""
    if flags.verbose:
        talk(text)


def warn(text: str) -> None:
    _say(f"{_paint('warning:', YELLOW)} {text}")


def show_library_warnings() -> None:
    """As warnings of ours, whatever the library's logger `pixtral` is given: what TensorRT warns of."""
    import logging

    class Shown(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            warn(record.getMessage())

    logging.getLogger("pixtral").handlers = [Shown(logging.WARNING)]


def log_json_lines() -> None:
    """What a server logs, on stderr: a JSON object a line. Requests are silenced by -q."""
    import logging

    class Lines(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            line = {"time": self.formatTime(record), "level": record.levelname.lower(), "logger": record.name}
            about = record.msg if isinstance(record.msg, dict) else {"message": record.getMessage()}
            trace = {"trace": self.formatException(record.exc_info)} if record.exc_info else {}
            return json.dumps(line | about | trace, ensure_ascii=False, default=str)

    handler = logging.StreamHandler()
    handler.setFormatter(Lines())
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    level = logging.WARNING if flags.quiet else logging.DEBUG if flags.verbose else logging.INFO
    logging.getLogger("pixtral.requests").setLevel(level)


def error_line(message: str, hint: str = "") -> None:
    """What went wrong, and on a second line what to type next."""
    _say(f"{_paint('error:', RED)} {message}")
    if hint:
        _say(f"hint: {hint}")


def remedy_text(remedy: Remedy) -> str:
    """A remedy as it is typed here, an option of the library as a flag: `--top-p 0.8`, `--backend auto|ort-cpu`."""
    from pixtral_runtime.errors import choices_text

    if isinstance(remedy, str):
        return remedy
    flag = SHORT_FLAGS.get(remedy.name) or "--" + remedy.name.replace("_", "-")
    text = "" if remedy.value is True else choices_text(remedy.value)
    quoted = f"'{text}'" if set(text) & set(" *") else text
    return " ".join(filter(None, (flag, quoted, remedy.note)))


def hint_of(error: PixtralError) -> str:
    """What to type next."""
    return "; ".join(map(remedy_text, error.remedies))


def size(count: int) -> str:
    """Bytes for people, in powers of ten: `12.3 GB`."""
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"


def parse_size(text: str, option: str) -> int:
    """`8GB`, `512MB` or a number of bytes, in powers of ten. Raises InputError."""
    from pixtral_runtime.errors import InputError

    number = text.strip().upper().removesuffix("B")
    factor = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}.get(number[-1:], 1)
    try:
        count = float(number.rstrip("KMGT")) * factor
    except ValueError:
        count = 0
    if not 1 <= count < float("inf"):
        raise InputError(f"{option} {text} is no size", f"{option} 8GB")
    return int(count)


def require(package: str, extra: str, purpose: str) -> None:
    """Raise MachineError where the package that an extra brings is not installed."""
    from importlib.util import find_spec

    from pixtral_runtime.errors import extra_missing

    if find_spec(package) is None:
        raise extra_missing(package, extra, purpose)


class Bars:
    """One progress bar a stage, a note at its end; where nobody watches, one line a stage."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def stage(self, name: str, done: int, total: int | None, note: str = "") -> None:
        if name not in self._tasks:
            if self._progress.disable:
                talk(name)
            self._tasks[name] = self._progress.add_task(name, note="")
        self._progress.update(self._tasks[name], completed=done, total=total, note=note)


@contextmanager
def progress() -> Iterator[Bars]:
    """Bars on stderr while the block runs."""
    from rich.console import Console
    from rich.progress import Progress, TextColumn

    watched = sys.stderr.isatty() and not flags.quiet
    # rich would move what is printed meanwhile from stdout to its own stream: right only where both are this terminal
    columns = (*Progress.get_default_columns(), TextColumn("{task.fields[note]}"))
    terminal = Console(stderr=True)
    with Progress(*columns, console=terminal, disable=not watched, redirect_stdout=sys.stdout.isatty()) as bars:
        yield Bars(bars)


def _readable(name: str, value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,} ({size(value)})" if name.endswith("_bytes") else f"{value:,}"
    return "-" if value is None else str(value)


def _one_line(name: str) -> str:
    """A name whose line ends and control characters are escaped: it may hold any."""
    return "".join(c if c.isprintable() or "\udc80" <= c <= "\udcff" else ascii(c)[1:-1] for c in name)


def _for_stdout(text: str) -> str:
    """A terminal is not told what control characters in texts and answers would have it do; a file gets them."""
    return _harmless(text) if sys.stdout.isatty() else text


def _harmless(text: str) -> str:
    """Text whose control characters are escaped, but for line ends and tabs."""
    return CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)


def _paint(text: str, colour: int) -> str:
    if os.environ.get("NO_COLOR") or not sys.stderr.isatty():
        return text
    return f"\x1b[{colour}m{text}\x1b[0m"
