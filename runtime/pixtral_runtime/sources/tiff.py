"""TIFF files of several pages, as scanners and fax machines write them: a picture a page.

A TIFF of one page is a plain picture, and so is what is no TIFF. Smaller copies and masks that stand between the pages
are none. Animations in other formats have frames, not pages, and stay what they were: their first frame.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from pixtral_runtime.errors import ImageError
from pixtral_runtime.inputs.conversation import StoredPicture
from pixtral_runtime.inputs.image import DECODER_ERRORS, decode_frame
from pixtral_runtime.inputs.image_files import open_file
from pixtral_runtime.sources.file_item import ppm
from pixtral_runtime.sources.item import Item
from pixtral_runtime.sources.pages import PageSettings, page_items, page_name

TIFF_SUFFIXES = frozenset({".tif", ".tiff"})
NEW_SUBFILE_TYPE, SMALLER_COPY, MASK = 254, 1, 4
MOST_FRAMES = 100_000
UNREADABLE = (*DECODER_ERRORS, Image.DecompressionBombError)


def tiff_items(path: Path, settings: PageSettings) -> Iterator[Item] | None:
    """The pages of a TIFF file, or the whole of it; None unless it has several that can be found."""
    frames = frames_of_pages(path)
    if len(frames) < 2:
        return None
    return page_items(
        path,
        len(frames),
        settings,
        lambda number: TiffPage(name=page_name(path, number), file=path, frame=frames[number - 1]),
    )


def frames_of_pages(path: Path) -> list[int]:
    """Which of the pictures in a TIFF file are pages, from 0; none where it cannot be read as one."""
    try:
        with open_file(path) as file:
            return _pages(file)
    except (ImageError, *UNREADABLE):  # what is wrong is said when it is read as a picture
        return []


@dataclass(frozen=True, kw_only=True)
class TiffPage(StoredPicture):
    """A page of a TIFF file; `frame` counts all of its pictures from 0."""

    file: Path
    frame: int

    def read(self) -> bytes:
        with open_file(self.file) as file:
            return ppm(np.asarray(decode_frame(file, self.frame, self.name)))


def _pages(file: BinaryIO) -> list[int]:
    """Which of a TIFF's pictures are pages. One that cannot be read counts; behind two of them nothing is found."""
    image = Image.open(file, formats=("TIFF",))
    pages: list[int] = []
    failed = -2
    for frame in range(MOST_FRAMES):
        try:
            image.seek(frame)
        except EOFError:
            break
        except UNREADABLE:
            if failed == frame - 1:
                break
            failed = frame
            pages.append(frame)
            continue
        kind = getattr(image, "tag_v2", {}).get(NEW_SUBFILE_TYPE, 0)
        if not isinstance(kind, int) or not kind & (SMALLER_COPY | MASK):
            pages.append(frame)
    return pages
