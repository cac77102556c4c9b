"""Items of a file that holds more than one picture, what their parts are drawn at, and how pixels are handed on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pixtral_runtime.errors import PixtralError
from pixtral_runtime.inputs.conversation import StoredPicture
from pixtral_runtime.sources.item import BrokenPicture, Item
from pixtral_runtime.sources.pictures import picture_item

Fit = Callable[[float, float], tuple[int, int]]
"""From the width and height of something, in any unit, to pixels: `Preprocess.drawn_size`."""


def file_item(path: Path, id: str, parts: Sequence[str | StoredPicture], text: str = "") -> Item:
    """An item of which the file's name says what it is called."""
    return replace(picture_item(path), id=id, parts=tuple(parts), text=text)


def broken(path: Path, name: str, error: PixtralError) -> BrokenPicture:
    """What stands for a picture of a file that could not be had."""
    problem = str(error).removeprefix(f"{name}: ").removeprefix(f"{path}: ")
    return BrokenPicture(name=name, file=path, problem=problem, remedies=error.remedies)


def ppm(pixels: NDArray[np.uint8]) -> bytes:
    """A picture's file of RGB pixels (rows, columns, 3): lossless, and written and read in a tenth of PNG's time."""
    rows, columns, _ = pixels.shape
    return b"P6\n%d %d\n255\n" % (columns, rows) + pixels.tobytes()
