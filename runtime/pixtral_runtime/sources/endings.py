"""Whether a file has its end yet, for those who see files while others write them."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import BinaryIO, Literal

from pixtral_runtime.sources.pdf import MAGIC as PDF
from pixtral_runtime.sources.pdf import MAGIC_WITHIN
from pixtral_runtime.sources.tiff import MOST_FRAMES
from pixtral_runtime.sources.video import VIDEO_SUFFIXES

LEAST_BYTES = 16
TAIL_BYTES = 4096  # of which all but a few may be padding
PNG, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"
JPEG, JPEG_END = b"\xff\xd8", b"\xff\xd9"
PDF_END = re.compile(rb"startxref\s+([0-9]+)\s+%%EOF")
TIFF: dict[bytes, Literal["little", "big"]] = {b"II*\0": "little", b"MM\0*": "big"}
TIFF_ENTRY_BYTES = 12
MP4_STARTS, MP4_INDEX = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"), b"moov"
MOST_BOXES = 100_000
MATROSKA, SEGMENT = b"\x1aE\xdf\xa3", b"\x18S\x80g"


def has_end(path: Path) -> bool:
    """Whether a look at its parts finds a file whole; a picture whose format has no end to look for is taken to be.

    A video is not. False where it cannot be read.
    """
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_size < LEAST_BYTES:
                return False
            return _is_whole(file, status.st_size, is_video=path.suffix.lower() in VIDEO_SUFFIXES)
    except OSError:
        return False


def _is_whole(file: BinaryIO, size: int, *, is_video: bool) -> bool:
    head = file.read(MAGIC_WITHIN)
    file.seek(max(0, size - TAIL_BYTES))
    tail = file.read(TAIL_BYTES)
    padded = tail.rstrip(b"\0")
    if head.startswith(JPEG):
        return padded.endswith(JPEG_END)
    if head.startswith(PNG):
        return PNG_END in tail
    if head.startswith(b"GIF8"):
        return padded.endswith(b";")
    if head.startswith(b"RIFF"):
        return 0 < int.from_bytes(head[4:8], "little") <= size - 8
    if head.startswith(b"BM"):
        return int.from_bytes(head[2:6], "little") <= size
    if (order := TIFF.get(head[:4])) is not None:
        return _has_directories(file, size, order)
    if is_video and head[4:8] in MP4_STARTS:
        return _has_index(file, size)
    if head.startswith(MATROSKA):
        return _has_segment(head, size)
    if PDF in head:
        return _has_table(tail, size)
    return not is_video and len(padded) > 0


def _has_directories(file: BinaryIO, size: int, order: Literal["little", "big"]) -> bool:
    """Whether a TIFF file has all lists of what its pages hold, of which each says where the next one lies."""

    def number(place: int, count: int) -> int:
        file.seek(place)
        return int.from_bytes(file.read(count), order)

    directory = number(4, 4)
    for page in range(MOST_FRAMES):
        if directory == 0:
            return page > 0
        if not 8 <= directory < size:
            return False
        end = directory + 2 + TIFF_ENTRY_BYTES * number(directory, 2)
        if end + 4 > size:
            return False
        directory = number(end, 4)
    return True


def _has_index(file: BinaryIO, size: int) -> bool:
    """Whether an MP4 file has all of its boxes, and among them the index, which many write last."""
    place, has_index = 0, False
    for _ in range(MOST_BOXES):
        if place >= size:
            break
        file.seek(place)
        head = file.read(16)
        length = int.from_bytes(head[:4])
        has_index |= head[4:8] == MP4_INDEX
        length = int.from_bytes(head[8:]) if length == 1 else length
        if length < 8:  # none: up to the end, wherever that is
            return False
        place += length
    return has_index and place == size


def _has_segment(head: bytes, size: int) -> bool:
    """Whether a Matroska or WebM file is as long as it says; one that is being written does not say."""
    place = head.find(SEGMENT) + len(SEGMENT)
    if place < len(SEGMENT) or not head[place : place + 1]:
        return False
    digits = 9 - head[place].bit_length()  # bytes of the number: a one behind so many zeros less one
    number = int.from_bytes(head[place : place + digits]) & ((1 << 7 * digits) - 1)
    is_known = digits <= 8 and number != (1 << 7 * digits) - 1
    return is_known and place + digits + number <= size


def _has_table(tail: bytes, size: int) -> bool:
    """Whether a PDF file ends with the place of its table, which is 0 at the first of two ends."""
    places = PDF_END.findall(tail)
    return bool(places) and 0 < int(places[-1][:20]) < size
