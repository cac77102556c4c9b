"""Frames of videos, by OpenCV: some of a clip in one request, or a request each, with the time at which they are seen.

The frame of a time is the one that is shown then: the last that begins no later, by the times that the file gives its
frames, whatever its rate, be it constant or not. To find them a file is read through once without being decoded; each
is decoded when its turn comes, from the key frame before it, and only if the decoder then gives the very time that is
expected is it taken at once. Rotation that a phone notes down is applied. A frame is handed on no larger than the model
sees it, shrunk by the mean of the pixels, and stays in memory.
"""

from __future__ import annotations

import os
import re
import shlex
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixtral_runtime.errors import ImageError, Option, SettingError
from pixtral_runtime.inputs.conversation import StoredPicture
from pixtral_runtime.inputs.image_files import open_file
from pixtral_runtime.sources.file_item import Fit, broken, file_item, ppm
from pixtral_runtime.sources.item import Item
from pixtral_runtime.sources.open_files import OpenFiles

VIDEO_SUFFIXES = frozenset({
    ".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".vob", ".webm",
    ".wmv",
})  # fmt: skip
"""Not `.ts`, which most folders have for TypeScript."""
DEFAULT_FRAMES = 8
SAME_MS = 0.5  # times closer than this are one; frames are at least 2 ms apart
BACK_MS = (0.0, 2e3, 2e4)  # how far before a key frame to look for it, where the container seeks by guess
MUST_REACH = 0.9  # of the length that a file claims; a damaged one may not be read as far as it can be decoded
NOWHERE = float("inf")
MOST_DAMAGED = 100  # frames in a row
LIST_OF_FILES = b"ffconcat"
DURATION = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(ms|s|m|h)?")
UNITS_S = {"ms": 1e-3, None: 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class VideoSettings:
    """Which frames of a clip: one every so many seconds, or so many of equal parts of it, from the middle of each.

    Raises SettingError.
    """

    every_s: float | None = None
    frames: int | None = None
    per_frame: bool = False

    def __post_init__(self) -> None:
        if self.every_s is not None and self.frames is not None:
            raise SettingError("frames are either so far apart or so many", Option("every", "2s"), Option("frames", 8))
        if self.every_s is not None and not 0 < self.every_s < float("inf"):
            raise SettingError(f"a frame every {self.every_s:g} s", Option("every", "2s"))
        if self.frames is not None and self.frames < 1:
            raise SettingError(f"{self.frames} frames, expected at least 1", Option("frames", DEFAULT_FRAMES))

    def times_s(self, duration_s: float) -> Iterator[float]:
        """When to look at a clip of this length."""
        if self.every_s is None:
            count = self.frames or DEFAULT_FRAMES
            yield from (duration_s * (2 * part + 1) / (2 * count) for part in range(count))
            return
        number = 0
        while number * self.every_s < duration_s or number == 0:
            yield number * self.every_s
            number += 1


def parse_every(text: str) -> float:
    """`2s`, `500ms`, `1m` or `0.5` in seconds. Raises SettingError."""
    found = DURATION.fullmatch(text.strip())
    seconds = float(found[1]) * UNITS_S[found[2]] if found else 0.0
    if seconds <= 0:
        raise SettingError(f"{text!r} is no length of time", Option("every", "2s"), "500ms, 1m and 0.5 are others")
    return seconds


def time_stamp(time_s: float) -> str:
    """`0:02.0`, from the hour on `1:00:02.0`."""
    tenths = round(time_s * 10)
    minutes, seconds = divmod(tenths, 600)
    hours, minutes = divmod(minutes, 60)
    begin = f"{hours}:{minutes:02}" if hours else str(minutes)
    return f"{begin}:{seconds // 10:02}.{seconds % 10}"


def video_items(path: Path, settings: VideoSettings, fit: Fit) -> Iterator[Item]:
    """A clip, or each of its frames that is wanted, a time stamp before each. What cannot be read is one that says why.

    A frame that would be seen at two of the times is there once, at the first of them.
    """
    try:
        timeline = _timeline(path)
    except ImageError as error:
        yield file_item(path, str(path), [broken(path, str(path), error)])
        return
    frames = list(_chosen(path, timeline, settings, fit))
    if settings.per_frame:
        yield from (file_item(path, frame.name, [_stamp(frame), frame]) for frame in frames)
        return
    yield file_item(path, str(path), [part for frame in frames for part in (_stamp(frame), frame)])


@dataclass(frozen=True, kw_only=True)
class VideoFrame(StoredPicture):
    """A frame of a video, which begins at `begins_ms`, behind a key frame that begins at `key_ms`."""

    file: Path
    time_s: float
    begins_ms: float
    key_ms: float
    fit: Fit

    def read(self) -> bytes:
        with _CAPTURES.opened(self.file) as capture:
            pixels = capture.frame(self.begins_ms, self.key_ms)
        if pixels is None:
            raise ImageError(f"{self.name}: {_undecodable(capture.codec)}", _converted(self.file))
        rows, columns, _ = pixels.shape
        return ppm(_shrunk(pixels, _seen_size(columns, rows, self.fit)))

    def size(self) -> tuple[int, int]:
        with _CAPTURES.opened(self.file) as capture:
            return _seen_size(*capture.size, self.fit)


@dataclass(frozen=True)
class _Packet:
    """A frame as the file stores it."""

    begins_ms: float
    is_key: bool


def _timeline(path: Path) -> list[_Packet]:
    """A video's frames in the order they are shown. Raises ImageError where there are none."""
    packets, length_ms = _packets(path, raw=True)
    times_ms = [packet.begins_ms for packet in packets]
    has_gaps = any(after - before < SAME_MS for before, after in pairwise(times_ms))  # not all have times, as in MPEG-1
    if has_gaps or (times_ms and times_ms[-1] < MUST_REACH * length_ms):
        packets = max(packets if not has_gaps else [], _packets(path, raw=False)[0], key=len)
    if not packets:
        raise ImageError(f"{path}: a video without frames", "copy or download it again")
    return packets


def _packets(path: Path, *, raw: bool) -> tuple[list[_Packet], float]:
    """By time, what the file says of its frames where it is read `raw`, else what the decoder says; and its length."""
    import cv2

    capture = _opened(path, raw=raw)
    packets = []
    try:
        rate = capture.get(cv2.CAP_PROP_FPS)
        length_ms = 1e3 * capture.get(cv2.CAP_PROP_FRAME_COUNT) / rate if rate > 0 else 0.0
        while _goes_on(capture):
            is_key = raw and capture.get(cv2.CAP_PROP_LRF_HAS_KEY_FRAME) != 0
            packets.append(_Packet(capture.get(cv2.CAP_PROP_POS_MSEC), is_key))
    finally:
        capture.release()
    return sorted(packets, key=lambda packet: packet.begins_ms), length_ms


def _chosen(path: Path, timeline: list[_Packet], settings: VideoSettings, fit: Fit) -> Iterator[VideoFrame]:
    """The frames to look at, each once."""
    begins = [packet.begins_ms for packet in timeline]
    keys = [packet.begins_ms for packet in timeline if packet.is_key] or begins[:1]
    last_ms = (begins[-1] - begins[0]) / (len(begins) - 1) if len(begins) > 1 else 0.0
    before = -1
    for time_s in settings.times_s((begins[-1] + last_ms) / 1e3):
        index = max(bisect_right(begins, time_s * 1e3 + SAME_MS) - 1, 0)
        if index == before:
            continue
        before = index
        key_ms = keys[max(bisect_right(keys, begins[index]) - 1, 0)]
        yield VideoFrame(
            name=f"{path}#t={round(time_s, 3)}", file=path, time_s=round(time_s, 3), begins_ms=begins[index],
            key_ms=key_ms, fit=fit,
        )  # fmt: skip


class _Capture:
    """A video that is being decoded. `position_ms` is when the frame at hand begins, `NOWHERE` without one."""

    def __init__(self, path: Path) -> None:
        import cv2

        self._path = path
        self._capture = _opened(path)
        code = int(self._capture.get(cv2.CAP_PROP_FOURCC))
        self.codec = (code & 0xFFFFFFFF).to_bytes(4, "little").decode("ascii", "replace").strip("\0 ")
        sides = (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT)
        self.size = int(self._capture.get(sides[0])), int(self._capture.get(sides[1]))  # columns, rows; upright
        self.position_ms = NOWHERE

    def close(self) -> None:
        self._capture.release()

    def frame(self, begins_ms: float, key_ms: float) -> NDArray[np.uint8] | None:
        """The frame that begins then, RGB (rows, columns, 3); where it is damaged the last sound one before it.

        None where there is none.
        """
        is_on_the_way = key_ms - SAME_MS <= self.position_ms <= begins_ms + SAME_MS
        if is_on_the_way and self._goes_on_to(begins_ms):
            return self._pixels()
        for back_ms in BACK_MS:
            if self._sought(key_ms - back_ms) and self.position_ms <= key_ms + SAME_MS and self._goes_on_to(begins_ms):
                return self._pixels()
        return self._last_until(begins_ms)

    def _grab(self) -> bool:
        import cv2

        is_there = _goes_on(self._capture)
        self.position_ms = self._capture.get(cv2.CAP_PROP_POS_MSEC) if is_there else NOWHERE
        return is_there

    def _sought(self, time_ms: float) -> bool:
        import cv2

        return self._capture.set(cv2.CAP_PROP_POS_MSEC, max(time_ms, 0.0)) and self._grab()

    def _goes_on_to(self, begins_ms: float) -> bool:
        """Whether that frame comes when those before it are passed over."""
        while self.position_ms < begins_ms - SAME_MS:
            self._grab()
        return self.position_ms <= begins_ms + SAME_MS

    def _last_until(self, begins_ms: float) -> NDArray[np.uint8] | None:
        """From the video's beginning, the last frame that begins no later."""
        self._capture.release()
        self._capture = _opened(self._path)
        found = None
        while self._grab() and self.position_ms <= begins_ms + SAME_MS:
            found = self._pixels()
        return found

    def _pixels(self) -> NDArray[np.uint8] | None:
        import cv2

        is_there, pixels = self._capture.retrieve()
        return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB), np.uint8) if is_there else None


_CAPTURES: OpenFiles[_Capture] = OpenFiles(_Capture, _Capture.close)


def _goes_on(capture: Any) -> bool:
    """Go to the next frame, past damaged ones; False at the end."""
    return any(capture.grab() for _ in range(MOST_DAMAGED))


def _opened(path: Path, *, raw: bool = False) -> Any:
    """A video, decoded or in `raw` packets. Raises ImageError."""
    with open_file(path) as file:
        start = file.read(len(LIST_OF_FILES))
    if not start:
        raise ImageError(f"{path}: the file is empty", "copy or download it again")
    if start == LIST_OF_FILES:  # the one kind of list that FFmpeg follows whatever a file is called
        raise ImageError(f"{path}: a list of files, no video", "name its files instead")
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # quiet: what matters is said here
    import cv2

    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)
    options = [cv2.CAP_PROP_FORMAT, -1] if raw else []
    capture = cv2.VideoCapture(os.path.abspath(path), cv2.CAP_FFMPEG, options)  # no relative name is an address
    if not capture.isOpened():
        raise ImageError(f"{path}: no video that FFmpeg can read", _converted(path))
    return capture


def _seen_size(columns: int, rows: int, fit: Fit) -> tuple[int, int]:
    """(width, height) of what the model sees of a frame, or the frame's own where that is smaller."""
    width, height = fit(columns, rows)
    return (columns, rows) if width >= columns or height >= rows else (width, height)


def _shrunk(pixels: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    import cv2

    return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), np.uint8)


def _stamp(frame: VideoFrame) -> str:
    return time_stamp(frame.time_s)


def _undecodable(codec: str) -> str:
    return f"there is no frame that can be decoded{f'; the codec is {codec}' if codec else ''}"


def _converted(path: Path) -> str:
    return f"convert it: ffmpeg -i {shlex.quote(str(path))} -c:v libx264 converted.mp4"
