"""Draw the pages of other people's PDF files, and compare them with what poppler draws and reads.

    apt-get install poppler-utils
    python scripts/check_documents.py FOLDER                 # every *.pdf in it and below
    python scripts/check_documents.py FOLDER --pages 2 --json

For each file: who made it, its pages, how far the drawn pages are from `pdftoppm`'s of the same size (mean absolute
difference of greys from 0 to 1, each the mean of 8 × 8 pixels), and how much of the text that either `pdftotext` or
pixtral reads both read. Renderers differ in the edges of letters and in fonts that a file does not bring along, so the
tolerances are wide; a page that is blank, turned, cut, or of another colour is far beyond them. Files that need a
password or are damaged are listed with what is said of them. Ends with 1 if any page or text is beyond its tolerance.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pixtral_runtime.errors import ImageError
from pixtral_runtime.inputs.conversation import StoredPicture
from pixtral_runtime.inputs.preprocess import Preprocess
from pixtral_runtime.sources.pages import PageRange, PageSettings
from pixtral_runtime.sources.pdf import pdf_items

BLOCK = 8  # pixels
FINER = 3  # times the size
MOST_DIFFERENCE = 0.02  # of 1; most pages are below 0.005
RUN = 4  # letters
LEAST_SHARED = 0.8  # of all runs


@dataclass
class Row:
    """What was seen of one file."""

    file: str
    producer: str
    pages: int
    compared: int = 0
    difference: float = 0.0  # of the worst page
    worst_page: int = 0
    shared: float | None = None  # of the worst page; None where there is no text
    problem: str = ""

    @property
    def is_right(self) -> bool:
        return self.difference <= MOST_DIFFERENCE and (self.shared is None or self.shared >= LEAST_SHARED)


def poppler(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, timeout=120, check=False)
    return done.stdout.decode("utf-8", "replace")


def facts(path: Path) -> tuple[str, int]:
    """Producer and pages, as pdfinfo says."""
    found = dict(re.findall(r"^(Producer|Pages):[ \t]*(.*?)[ \t\r]*$", poppler("pdfinfo", str(path)), re.MULTILINE))
    return found.get("Producer", ""), int(found.get("Pages") or 0)


def greys(image: Image.Image) -> NDArray[np.float64]:
    small = image.convert("L").resize((image.width // BLOCK, image.height // BLOCK), Image.Resampling.BOX)
    return np.asarray(small, np.float64) / 255


def difference(path: Path, number: int, drawn: Image.Image) -> float:
    """Of a page from poppler's."""
    with tempfile.TemporaryDirectory() as folder:
        size = ["-scale-to", str(FINER * max(drawn.size))]  # poppler's own scaling of line art is coarse
        page = ["-f", str(number), "-l", str(number), "-cropbox", "-singlefile", "-png"]
        poppler("pdftoppm", *page, *size, str(path), f"{folder}/page")
        with Image.open(f"{folder}/page.png") as image:
            return float(
                np.abs(greys(image.convert("L").resize(drawn.size, Image.Resampling.BOX)) - greys(drawn)).mean()
            )


def words(text: str) -> Counter[str]:
    return Counter(re.findall(r"\w+", text.casefold()))


def runs(text: str) -> Counter[str]:
    """Four letters each, blanks left out."""
    letters = "".join(re.findall(r"\w", text.casefold()))
    return Counter(letters[start : start + RUN] for start in range(max(len(letters) - RUN + 1, 1)))


def agreement(path: Path, number: int, text: str) -> float | None:
    """The share of words or runs of letters that both read, of all that either reads; None for pages without text."""
    page = ["-f", str(number), "-l", str(number), "-nopgbrk", "-cropbox"]
    theirs = poppler("pdftotext", *page, str(path), "-")
    if not words(theirs) | words(text):
        return None
    pairs = [(split(theirs), split(text)) for split in (words, runs)]  # the first bears columns, the second lost blanks
    return max((one & other).total() / (one | other).total() for one, other in pairs)


def check(path: Path, most_pages: int, side: int) -> Row:
    row = Row(path.name, *facts(path))
    settings = PageSettings(fit=Preprocess(16, side).drawn_size, pages=PageRange(((1, None),)), wants_text=True)
    for number, item in enumerate(pdf_items(path, settings), 1):
        if number > most_pages:
            break
        picture = item.parts[0]
        assert isinstance(picture, StoredPicture)
        try:
            drawn = Image.open(io.BytesIO(picture.read()))
        except ImageError as error:
            row.problem = str(error).removeprefix(f"{path}: ")
            return row
        try:
            found = difference(path, number, drawn)
        except OSError:
            row.problem = f"poppler does not draw page {number}"
            continue
        row.compared += 1
        if found >= row.difference:
            row.difference, row.worst_page = round(found, 5), number
        shared = agreement(path, number, item.text)
        if shared is not None:
            row.shared = round(min(shared, 1.0 if row.shared is None else row.shared), 3)
    return row


def table(rows: list[Row]) -> str:
    lines = [
        "| producer | file | pages | compared | difference | text | |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        said = row.problem or ("" if row.is_right else f"WRONG, page {row.worst_page}")
        text = "" if row.shared is None else f"{row.shared:.2f}"
        cells = [row.producer, row.file, row.pages, row.compared, f"{row.difference:.4f}", text, said]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pages", type=int, default=3, help="of each file, the first ones")
    parser.add_argument("--side", type=int, default=1024, help="longest side in pixels")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    rows = [check(path, given.pages, given.side) for path in sorted(given.folder.rglob("*.pdf"))]
    print(json.dumps([asdict(row) for row in rows], indent=1) if given.json else table(rows))
    wrong = [row for row in rows if not row.is_right]
    producers = {row.producer for row in rows if row.compared and row.producer}
    print(f"{len(rows)} files, {len(producers)} producers, {len(wrong)} beyond a tolerance", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
