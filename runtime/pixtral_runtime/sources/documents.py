"""Files that hold more than one picture, by their suffix: PDF and TIFF files have pages, videos have frames."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pixtral_runtime.inputs.image_files import IMAGE_SUFFIXES
from pixtral_runtime.sources.item import Item
from pixtral_runtime.sources.pages import PageSettings
from pixtral_runtime.sources.pdf import PDF_SUFFIX, has_pdf_reader, pdf_items
from pixtral_runtime.sources.tiff import TIFF_SUFFIXES, tiff_items
from pixtral_runtime.sources.video import VIDEO_SUFFIXES, VideoSettings, video_items


@dataclass(frozen=True, kw_only=True)
class DocumentSettings(PageSettings):
    """What is made of documents and of videos; `fit` holds for both."""

    video: VideoSettings = field(default_factory=VideoSettings)


def suffixes(*, with_videos: bool = False) -> frozenset[str]:
    """What to look for in a folder: pictures, PDF files where they can be read, and videos where they are wanted."""
    documents = {PDF_SUFFIX} if has_pdf_reader() else set()
    return IMAGE_SUFFIXES | documents | (VIDEO_SUFFIXES if with_videos else set())


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
