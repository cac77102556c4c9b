"""Small PDF files, written by hand: what a test is about stands in it, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LETTER = "0 0 612 792"


@dataclass(frozen=True)
class Page:
    """A page; `content` are drawing operators, `extra` more entries of its dictionary."""

    content: str = ""
    media_box: str = LETTER
    extra: str = ""


def text_page(*lines: str) -> Page:
    """A page with lines of text at its top."""
    shown = " ".join(f"({line}) Tj T*" for line in lines)
    return Page(f"BT /F1 24 Tf 30 TL 50 700 Td {shown} ET")


def pdf_file(pages: Sequence[Page | None], *, catalog: str = "", count: int | None = None) -> bytes:
    """A file of these pages; None is one that is missing. `count` is how many it says it has."""
    objects = [
        f"<< /Type /Catalog /Pages 2 0 R {catalog} >>",
        f"<< /Type /Pages /Count {len(pages) if count is None else count} "
        f"/Kids [{' '.join(f'{4 + 2 * number} 0 R' for number in range(len(pages)))}] >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for number, page in enumerate(pages):
        if page is None:
            objects += ["null", "null"]
            continue
        resources = "/Resources << /Font << /F1 3 0 R >> >>"
        objects += [
            f"<< /Type /Page /Parent 2 0 R /MediaBox [{page.media_box}] {resources} /Contents {5 + 2 * number} 0 R "
            f"{page.extra} >>",
            f"<< /Length {len(page.content)} >>\nstream\n{page.content}\nendstream",
        ]
    data, places = b"%PDF-1.7\n", []
    for number, content in enumerate(objects, 1):
        places.append(len(data))
        data += f"{number} 0 obj\n{content}\nendobj\n".encode("latin-1")
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    size = len(objects) + 1
    end = (
        f"xref\n0 {size}\n0000000000 65535 f \n{table}trailer\n<< /Size {size} /Root 1 0 R >>\nstartxref\n{len(data)}\n"
    )
    return data + end.encode() + b"%%EOF\n"
