"""The pictures that a job has asked about, read again to be written beside their answers."""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from pixtral_runtime.batch.item_requests import Requests
from pixtral_runtime.batch.records import ImageInfo, Record, Request
from pixtral_runtime.errors import ImageError, Option
from pixtral_runtime.inputs.conversation import StoredPicture
from pixtral_runtime.inputs.image import IMAGE_FORMATS, decode_image
from pixtral_runtime.inputs.image_files import picture_file

EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif", "JPEG2000": "jp2"}  # others are what Pillow calls them
MOST_HELD = 32  # requests; more than threads take pictures of at a time
GO_ON = Option("resume", note="goes on then: all answers are in the results file")
AGAIN = Option("resume", note="asks again what has changed, and goes on: all answers are in the results file")


@dataclass(frozen=True)
class AnsweredRequests:
    """Requests that have a record, with it, in the order asked; as often as somebody iterates."""

    requests: Requests
    records: Mapping[str, Record]

    def __iter__(self) -> Iterator[tuple[Request, Record]]:
        for request in self.requests:
            if (record := self.records.get(request.id)) is not None:
                yield request, record


class PicturesAgain:
    """The bytes of records' pictures, for whoever goes through the records in the order asked, in several threads."""

    def __init__(self, requests: Requests) -> None:
        self._requests, self._lock = iter(requests), threading.Lock()
        self._images: dict[str, Sequence[Path | StoredPicture]] = {}  # of the last requests, by id

    def __call__(self, record: Record, index: int) -> bytes | None:
        """Of one picture of a record, by its index; None where it is not asked about any more. Raises ImageError."""
        with self._lock:
            while record.id not in self._images and (request := next(self._requests, None)) is not None:
                self._images[request.id] = request.images
                if len(self._images) > MOST_HELD:
                    del self._images[next(iter(self._images))]
            images = self._images.get(record.id, ())
        return picture_file(images[index]) if index < len(images) else None


@dataclass(frozen=True)
class PictureCopy:
    """A picture's file, and the extension that its content deserves, without a dot."""

    data: bytes
    extension: str


def asked_pictures(request: Request, record: Record) -> list[PictureCopy | None]:
    """Copies of a request's pictures; None for one that was no picture when it was asked about.

    Raises ImageError where one is gone, or is another one by now.
    """
    pairs = zip(request.images, record.images, strict=True)
    return [None if info.width is None else _copy(picture, info) for picture, info in pairs]


def _copy(picture: Path | StoredPicture, info: ImageInfo) -> PictureCopy:
    """The bytes as they are. PPM becomes PNG: pages and frames come in it, and few readers know it."""
    try:
        data = picture_file(picture)
    except ImageError as error:
        raise ImageError(f"{error}; it was there when it was asked about", "put it back", GO_ON) from error
    if hashlib.sha256(data).hexdigest() != info.sha256:
        raise ImageError(f"{info.path}: it has changed since it was asked about", AGAIN)
    format = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS).format or ""  # which it had: it was decoded
    if format != "PPM":
        return PictureCopy(data, EXTENSIONS.get(format, format.lower()))
    file = io.BytesIO()
    decode_image(data, info.path, apply_exif=False).pixels.save(file, "PNG")
    return PictureCopy(file.getvalue(), "png")
