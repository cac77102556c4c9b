"""Files that hold more than one picture, by their suffix: PDF and TIFF files have pages, videos have frames."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pixtral_runtime.inputs.image_files import IMAGE_SUFFIXES
from pixtral_runtime.sources.item import Item
from pixtral_runtime.sources.pages import PageSettings
from pixtral_runtime.sources.pdf import PDF_SUFFIX, has_pdf_reader, pdf_items
from pixtral_runtime.sources.tiff import TIFF_SUFFIXES, tiff_items
from pixtral_runtime.sources.video import VIDEO_SUFFIXES, VideoSettings, video_items

DOCUMENT_SUFFIXES = frozenset({PDF_SUFFIX}) | TIFF_SUFFIXES | VIDEO_SUFFIXES
PART = re.compile(r"#(page=[0-9]+|t=[0-9.]+)")


@dataclass(frozen=True, kw_only=True)
class DocumentSettings(PageSettings):
    """What is made of documents and of videos; `fit` holds for both."""

    video: VideoSettings = field(default_factory=VideoSettings)


def suffixes(*, with_videos: bool = False) -> frozenset[str]:
    """What to look for in a folder: pictures, PDF files where they can be read, and videos where they are wanted."""
    documents = {PDF_SUFFIX} if has_pdf_reader() else set()
    return IMAGE_SUFFIXES | documents | (VIDEO_SUFFIXES if with_videos else set())


def watched_suffixes(*, with_videos: bool = False) -> frozenset[str]:
    """What to look for in a folder that fills: PDF files anyway, whose records say that they cannot be read."""
    return suffixes(with_videos=with_videos) | {PDF_SUFFIX}


def file_of(name: str) -> Path:
    """The file that a picture is in, by what it is called: `scan.pdf` of `scan.pdf#page=3`, or the picture itself."""
    file, mark, part = name.rpartition("#")
    is_part = PART.fullmatch(mark + part) and Path(file).suffix.lower() in DOCUMENT_SUFFIXES
    return Path(file if is_part else name)


def expand(path: Path, settings: DocumentSettings) -> Iterator[Item] | None:
    """The items of a file with more than one picture; None for any other, which is a picture or nothing.

    What is broken is an item that says why. Raises MissingPackageError for a PDF file that nothing here can read.
    """
    suffix = path.suffix.lower()
    if suffix == PDF_SUFFIX:
        return pdf_items(path, settings)
    if suffix in TIFF_SUFFIXES:
        return tiff_items(path, settings)
    if suffix in VIDEO_SUFFIXES:
        return video_items(path, settings.video, settings.fit)
    return None
