"""Whether a picture's file has its end yet, for those who see files while others write them."""

from __future__ import annotations

import os
import stat
from pathlib import Path

HEAD_BYTES = 16
TAIL_BYTES = 4096  # of which all but a few may be padding
PNG, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"
JPEG, JPEG_END = b"\xff\xd8", b"\xff\xd9"
TIFF = {b"II*\0": "little", b"MM\0*": "big"}


def has_end(path: Path) -> bool:
    """Whether a look at both ends of a file finds it whole; a format whose end says nothing is taken to be.

    False where it cannot be read.
    """
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                return False
            head = file.read(HEAD_BYTES)
            file.seek(max(0, status.st_size - TAIL_BYTES))
            tail = file.read(TAIL_BYTES)
    except OSError:
        return False
    return _is_whole(head, tail, status.st_size)


def _is_whole(head: bytes, tail: bytes, size: int) -> bool:
    if size < HEAD_BYTES:
        return False
    padded = tail.rstrip(b"\0")
    if head.startswith(JPEG):
        return padded.endswith(JPEG_END)
    if head.startswith(PNG):
        return PNG_END in tail
    if head.startswith(b"GIF8"):
        return padded.endswith(b";")
    if head.startswith(b"RIFF"):
        return int.from_bytes(head[4:8], "little") + 8 <= size
    if head.startswith(b"BM"):
        return int.from_bytes(head[2:6], "little") <= size
    if (order := TIFF.get(head[:4])) is not None:
        directory = int.from_bytes(head[4:8], "little" if order == "little" else "big")
        return 8 <= directory < size  # where the list of what the file holds lies: at its end as a rule
    return len(padded) > 0
