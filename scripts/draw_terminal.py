"""Draw what `make demo` shows in a terminal: runs its commands in a pseudo-terminal and writes their screen as an SVG.

The README's picture is made by `python scripts/draw_terminal.py docs/demo.svg`. It holds text and no fonts: each run of
characters is stretched to its columns, so that any monospaced font keeps them aligned.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
import termios
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parents[1]
BUNDLE, RESULTS = "artifacts/demo/bundle", "artifacts/demo/results.jsonl"
COMMANDS = (
    ("export", "tests/data/tiny-pixtral", "-o", BUNDLE),
    ("run", BUNDLE, "tests/data/images", "-o", RESULTS),
)
COLUMNS = 100
CELL_WIDTH_PX, LINE_HEIGHT_PX, MARGIN_PX, TITLE_PX = 8.4, 19, 18, 34
PLAIN, PROMPT = "#d8dee9", "#88c0d0"
ANSI_COLOURS = ("#4c566a", "#e06c75", "#98c379", "#e5c07b", "#61afef", "#c678dd", "#56b6c2", PLAIN)
CONTROL = re.compile(r"\x1b\[(?P<numbers>[0-9;?]*)(?P<letter>[A-Za-z])|(?P<text>.)", re.DOTALL)


@dataclass(frozen=True)
class Cell:
    """One character of the screen and its colour."""

    character: str
    colour: str = PLAIN


BLANK = Cell(" ")


def screen(output: str) -> list[list[Cell]]:
    """The lines that a terminal would show after this output.

    Knows what rich's progress bars use: carriage return, line feed, cursor up, erase line, colours. Raises ValueError
    on any other movement of the cursor, which would put characters where they do not belong.
    """
    lines: list[list[Cell]] = [[]]
    row = column = 0
    colour = PLAIN
    for found in CONTROL.finditer(output):
        numbers, letter, text = found["numbers"], found["letter"], found["text"]
        if letter == "m":
            colour = _colour(numbers, colour)
        elif letter == "A":
            row = max(row - int(numbers or 1), 0)
        elif letter == "K":
            lines[row] = [] if numbers == "2" else lines[row][:column]
        elif letter is not None:
            if letter not in "hl":  # cursor hidden or shown
                raise ValueError(f"a control sequence that is not drawn: {found[0]!r}")
        elif text == "\r":
            column = 0
        elif text == "\n":
            row += 1
            if row == len(lines):
                lines.append([])
        else:
            line = lines[row]
            line += [BLANK] * (column + 1 - len(line))
            line[column] = Cell(text, colour)
            column += 1
    while lines and not any(cell.character.strip() for cell in lines[-1]):
        lines.pop()
    return lines


def _colour(numbers: str, before: str) -> str:
    """The colour after a "select graphic rendition" sequence; weight and background are not drawn."""
    codes = iter([int(number or 0) for number in numbers.split(";")])
    for code in codes:
        if code in (38, 48):  # followed by 2 and red, green, blue: the form that COLORTERM=truecolor asks for
            _, red, green, blue = (next(codes) for _ in range(4))
            before = f"#{red:02x}{green:02x}{blue:02x}" if code == 38 else before
        elif code in (0, 39):
            before = PLAIN
        elif code in range(30, 38):
            before = ANSI_COLOURS[code - 30]
    return before


def svg(lines: list[list[Cell]], title: str) -> str:
    """A window with these lines."""
    width = 2 * MARGIN_PX + COLUMNS * CELL_WIDTH_PX
    height = TITLE_PX + MARGIN_PX + len(lines) * LINE_HEIGHT_PX
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" role="img" aria-label="{escape(title)}" '
        'font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, DejaVu Sans Mono, monospace" font-size="14">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{width:g}" height="{height:g}" rx="8" fill="#1e222a"/>',
        *(
            f'<circle cx="{MARGIN_PX + 18 * n}" cy="17" r="5.5" fill="{fill}"/>'
            for n, fill in enumerate(("#ff5f57", "#febc2e", "#28c840"))
        ),
    ]
    for number, line in enumerate(lines, start=1):
        y = TITLE_PX + number * LINE_HEIGHT_PX - 5
        column = 0
        for colour, group in groupby(line, key=lambda cell: cell.colour):
            text = "".join(cell.character for cell in group)
            lead = len(text) - len(text.lstrip())
            shown = text.strip()
            if shown:
                parts.append(
                    f'<text x="{MARGIN_PX + (column + lead) * CELL_WIDTH_PX:.1f}" y="{y}" fill="{colour}" '
                    f'textLength="{len(shown) * CELL_WIDTH_PX:.1f}" lengthAdjust="spacingAndGlyphs" '
                    f'xml:space="preserve">{escape(shown)}</text>'
                )
            column += len(text)
    return "\n".join([*parts, "</svg>"]) + "\n"


def typed(arguments: tuple[str, ...]) -> list[Cell]:
    """The line in which a user types the command."""
    return [Cell("$", PROMPT), *map(Cell, f" pixtral {' '.join(arguments)}")]


def run_in_terminal(arguments: tuple[str, ...], folder: Path) -> str:
    """All that the command writes to a terminal of COLUMNS. Raises CalledProcessError where it fails."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, COLUMNS, 0, 0))
    paths = os.pathsep.join(str(ROOT / part) for part in ("", "export", "engines", "runtime"))
    environment = os.environ | {"TERM": "xterm-256color", "COLORTERM": "truecolor", "PYTHONPATH": paths}
    for name in ("NO_COLOR", "COLUMNS", "LINES"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "pixtral_cli", *arguments]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=folder, env=environment) as process:
        os.close(theirs)
        written = b""
        try:
            while block := os.read(ours, 65536):
                written += block
        except OSError:  # Linux answers so once the other side has closed
            pass
    os.close(ours)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, written)
    return written.decode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path, help="the SVG to write")
    target: Path = parser.parse_args().picture
    lines: list[list[Cell]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "artifacts" / "demo").mkdir(parents=True)
        (folder / "tests").mkdir()
        (folder / "tests" / "data").symlink_to(ROOT / "tests" / "data")
        for arguments in COMMANDS:
            lines += [typed(arguments), *screen(run_in_terminal(arguments, folder)), []]
    target.write_text(
        svg(lines[:-1], "pixtral exports the demo checkpoint and describes eight pictures"), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
