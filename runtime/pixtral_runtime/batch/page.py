"""One page for a job's records: pictures, questions, answers and times, in a single file that loads nothing else.

The records are JSON inside the page; a short script shows them a page at a time, filters and sorts. Text from outside
reaches the page as text only. Pictures are written one after the other, so memory does not grow with their number.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from PIL import Image

from pixtral_runtime.batch.records import Record
from pixtral_runtime.errors import InputError, unwritable
from pixtral_runtime.files import replacing
from pixtral_runtime.html_page import CLOSING, facts, opening
from pixtral_runtime.inputs.image import decode_image
from pixtral_runtime.inputs.image_files import read_image_file

THUMBNAIL_PX = 160
CONTENT_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


@dataclass(frozen=True)
class RecordNotes:
    """What a page says of a record that the record does not hold: words to filter by, and lines with their labels."""

    marks: tuple[str, ...] = ()
    lines: tuple[tuple[str, str], ...] = ()


def write_report(
    records: Sequence[Record],
    path: Path,
    *,
    title: str,
    summary: Mapping[str, object],
    notes: Mapping[str, RecordNotes] | None = None,
) -> None:
    """Write the page, replacing the file whole. `summary` is shown at the top, its scalars only; `notes` are by id.

    Raises InputError where the page cannot be written, MachineError on a full disk.
    """
    own = files("pixtral_runtime.batch")
    style = own.joinpath("page.css").read_text(encoding="utf-8")
    body, _, script = own.joinpath("page.html").read_text(encoding="utf-8").partition("/*RECORDS*/")
    shown = {_words(name): _value(value) for name, value in summary.items() if not isinstance(value, list | dict)}
    try:
        with replacing(path) as file:
            page = io.TextIOWrapper(file, "utf-8", errors="backslashreplace")
            page.write(opening(title, style=style, policy=CONTENT_POLICY) + facts(shown) + "\n" + body)
            for index, record in enumerate(records):
                entry = _entry(record, (notes or {}).get(record.id, RecordNotes()))
                page.write(("," if index else "") + "\n" + _json(entry))
            page.write(script + CLOSING)
            page.detach()  # flushes, and leaves the file open
    except OSError as error:
        raise unwritable(path, error, "name another place for the page") from error


def _entry(record: Record, notes: RecordNotes) -> dict[str, Any]:
    """What the page shows of a record."""
    settings = record.settings
    return {
        "id": record.id,
        "images": [
            [image.path, thumbnail(Path(image.path), apply_exif=settings.get("exif", True))] for image in record.images
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
    }


def thumbnail(path: Path, *, apply_exif: bool = True) -> str | None:
    """The picture as a JPEG data URI, its longer side at most THUMBNAIL_PX; None where it cannot be read."""
    try:
        picture = decode_image(read_image_file(path), str(path), apply_exif=apply_exif).pixels
    except InputError:
        return None
    picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.BICUBIC)
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()


def _json(value: object) -> str:
    """JSON that may stand inside a script element: `<` would end it, and unpaired surrogates are no UTF-8."""
    return json.dumps(value).replace("<", "\\u003c")


def _words(name: str) -> str:
    return name.replace("_per_s", "/s").replace("_", " ")


def _value(value: object) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int | float) else str(value)
