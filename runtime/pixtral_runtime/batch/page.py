"""One page for a job's records: pictures, questions, answers and times, in a single file that loads nothing else.

What the page says of the records comes first, as JSON, and the script that shows the rows in view. Thumbnails come
last, as text that nobody reads before its row is in view: a page of ten thousand is there before they have arrived. The
records are gone through twice, a few at a time, so memory does not grow with their number. Text from outside reaches
the page as text only, and the page's policy lets no other script run.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from PIL import Image

from pixtral_runtime.batch.records import Record
from pixtral_runtime.batch.sidecars import SidecarSettings
from pixtral_runtime.errors import InputError, unwritable
from pixtral_runtime.files import replacing
from pixtral_runtime.html_page import CLOSING, facts, opening
from pixtral_runtime.inputs.image import decode_image
from pixtral_runtime.inputs.image_files import read_image_file

THUMBNAIL_PX = 160
MOST_THREADS = 4  # that make thumbnails: each may hold a large picture
SCRIPTS = ("page_zip.js", "page_list.js", "page_edits.js", "page.js")
CONTENT_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{script}'"

PictureOf = Callable[[Record, int], bytes | None]


@dataclass(frozen=True)
class RecordNotes:
    """What a page says of a record that the record does not hold: words to filter by, and lines with their labels."""

    marks: tuple[str, ...] = ()
    lines: tuple[tuple[str, str], ...] = ()


def read_picture(record: Record, index: int) -> bytes:
    """The bytes of the file that a record's image was. Raises InputError."""
    return read_image_file(Path(record.images[index].path))


def write_report(
    records: Iterable[Record],
    path: Path,
    *,
    title: str,
    summary: Mapping[str, object],
    notes: Mapping[str, RecordNotes] | None = None,
    sidecars: SidecarSettings | None = None,
    picture_of: PictureOf = read_picture,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Write the page, replacing the file whole. `summary` is shown at the top, its scalars only; `notes` are by id.

    `records` are gone through twice, so they are no iterator. `sidecars` says how edited answers are written into
    files. `picture_of` gives the bytes of a record's image by its index, in any format that can be decoded; None, an
    InputError or an OSError is no picture. It is called in several threads at once. `progress` hears how many records
    have their thumbnails. Raises InputError where the page cannot be written, MachineError on a full disk.
    """
    if isinstance(records, Iterator):
        raise TypeError("the records of a page are gone through twice: give a list, or what can be iterated again")
    script = "".join(_own(name) for name in SCRIPTS)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    shown = {_words(name): _value(value) for name, value in summary.items() if not isinstance(value, list | dict)}
    try:
        with replacing(path) as file:
            page = io.TextIOWrapper(file, "utf-8", errors="backslashreplace", newline="\n")
            page.write(opening(title, style=_own("page.css"), policy=CONTENT_POLICY.format(script=digest)))
            page.write(facts(shown) + "\n" + _own("page.html"))
            _write_records(page, records, notes or {}, sidecars or SidecarSettings())
            page.write(f"<script>{script}</script>\n")
            _write_thumbnails(page, records, picture_of, progress)
            page.write(CLOSING)
            page.detach()  # flushes, and leaves the file open
    except OSError as error:
        raise unwritable(path, error, "name another place for the page") from error


def _write_records(
    page: io.TextIOWrapper, records: Iterable[Record], notes: Mapping[str, RecordNotes], sidecars: SidecarSettings
) -> None:
    """A JSON object: the records, how sidecars are written, and a key that pages of other records do not have."""
    digest = hashlib.sha256()
    page.write('<script id="records" type="application/json">{"records": [')
    for index, (record, numbers) in enumerate(_numbered(records)):
        entry = _json(_entry(record, numbers, notes.get(record.id, RecordNotes())))
        digest.update(entry.encode())
        page.write(("," if index else "") + "\n" + entry)
    rest = {"ending": sidecars.ending, "as_written": sidecars.as_written, "key": digest.hexdigest()[:16]}
    page.write("\n], " + _json(rest).removeprefix("{") + "</script>\n")


def _write_thumbnails(
    page: io.TextIOWrapper, records: Iterable[Record], picture_of: PictureOf, progress: Callable[[int], None]
) -> None:
    """An element of text for each thumbnail, in base64, in order; empty where there is none."""
    waiting: deque[tuple[int, Future[bytes | None]]] = deque()

    def write_next() -> None:
        number, made = waiting.popleft()
        data = base64.b64encode(made.result() or b"").decode()
        page.write(f'<script id="p{number}" type="text/plain">{data}</script>\n')

    def make(record: Record, index: int) -> bytes | None:
        try:
            data = picture_of(record, index)
        except (InputError, OSError):
            return None
        return None if data is None else thumbnail(data, apply_exif=record.settings.get("exif", True))

    threads = min(MOST_THREADS, os.cpu_count() or 1)
    page.write("<div hidden>\n")
    with ThreadPoolExecutor(threads, "thumbnail") as pool:
        last = -1
        for done, (record, numbers) in enumerate(_numbered(records)):
            for index, number in enumerate(numbers):
                if number > last:
                    waiting.append((number, pool.submit(make, record, index)))
                    last = number
            while len(waiting) > 2 * threads:
                write_next()
            progress(done + 1)
        while waiting:
            write_next()
    page.write("</div>\n")


def _numbered(records: Iterable[Record]) -> Iterator[tuple[Record, list[int]]]:
    """Each record with the numbers of its pictures; one that several records in a row show has one number."""
    last: object = None
    number = -1
    for record in records:
        numbers = []
        for image in record.images:
            picture = image.path, image.sha256, record.settings.get("exif", True)
            number += picture != last
            last = picture
            numbers.append(number)
        yield record, numbers


def _entry(record: Record, numbers: list[int], notes: RecordNotes) -> dict[str, Any]:
    """What the page shows of a record."""
    return {
        "id": record.id,
        "images": [
            [image.path, number, *_shown_size(image.width, image.height)]
            for image, number in zip(record.images, numbers, strict=True)
        ],
        "question": record.question,
        "answer": record.answer,
        "thinking": record.thinking,
        "end": record.finish_reason,
        "error": record.error,
        "hint": record.hint,
        "tokens": [record.prompt_tokens, record.image_tokens, record.new_tokens],
        "times": record.times_ms,
        "marks": notes.marks,
        "notes": notes.lines,
        "sidecar": None if record.sidecar is None else [record.sidecar.path, record.sidecar.text],
    }


def _shown_size(width: int | None, height: int | None) -> tuple[int, int]:
    """Of a thumbnail, in pixels; 4 to 3 where the picture's is not known."""
    if not width or not height:
        return THUMBNAIL_PX, THUMBNAIL_PX * 3 // 4
    scale = min(1.0, THUMBNAIL_PX / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def thumbnail(data: bytes, *, apply_exif: bool = True) -> bytes | None:
    """A picture's file as a JPEG whose longer side is at most THUMBNAIL_PX; None where it cannot be decoded."""
    try:
        picture = decode_image(data, "picture", apply_exif=apply_exif, enough_px=2 * THUMBNAIL_PX).pixels
    except InputError:
        return None
    picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.BICUBIC)
    small = io.BytesIO()
    picture.save(small, "JPEG", quality=80)
    return small.getvalue()


def _own(name: str) -> str:
    return files("pixtral_runtime.batch").joinpath(name).read_text(encoding="utf-8")


def _json(value: object) -> str:
    """JSON that may stand inside a script element: `<` would end it, and unpaired surrogates are no UTF-8."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def _words(name: str) -> str:
    return name.replace("_per_s", "/s").replace("_", " ")


def _value(value: object) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int | float) else str(value)
