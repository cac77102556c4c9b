"""Videos whose frames carry their number, as those in `tests/data/documents` do."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

RATE = 25.0  # frames a second
BITS, BIT_PIXELS = 8, 15
COLUMNS, ROWS = 128, 96


def numbered(number: int) -> NDArray[np.uint8]:
    """A frame, BGR: white bars for the bits of its number, the lowest first, over a red rectangle at the lower left."""
    frame = np.full((ROWS, COLUMNS, 3), 60, np.uint8)
    for bit in range(BITS):
        frame[8:24, 4 + bit * BIT_PIXELS : 17 + bit * BIT_PIXELS] = 255 * (number >> bit & 1)
    frame[60:90, : COLUMNS // 2] = (0, 0, 220)
    return frame


def number_of(frame: NDArray[np.uint8]) -> int:
    """What is written in a frame."""
    return sum(int(frame[16, 10 + bit * BIT_PIXELS].mean() > 128) << bit for bit in range(BITS))


def write_video(path: Path, codec: str, frames: int) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*codec), RATE, (COLUMNS, ROWS))
    assert writer.isOpened()
    for number in range(frames):
        writer.write(numbered(number))
    writer.release()
    return path
