"""What sources of pictures give, in short."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from pixtral_runtime.errors import ImageError
from pixtral_runtime.inputs.image_files import picture_file
from pixtral_runtime.sources.item import Item


def picture(number: int, format: str = "PNG") -> bytes:
    """The file of a small picture, another one for each number."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (number % 256, number // 256 % 256, 7)).save(file, format)
    return file.getvalue()


def noise(size: int, number: int = 0) -> bytes:
    """Bytes that do not pack, in the place of a picture's."""
    return struct.pack("<I", number) + Path("/dev/urandom").open("rb").read(size - 4)


def contents(items: Iterable[Item]) -> dict[str, list[bytes | str]]:
    """By id: the bytes of each picture, or what its error says."""
    found: dict[str, list[bytes | str]] = {}
    for item in items:
        assert item.id not in found
        found[item.id] = []
        for part in item.parts:
            assert not isinstance(part, str)
            try:
                found[item.id].append(picture_file(part))
            except ImageError as error:
                found[item.id].append(f"{error} | {error.hint}")
    return found


def errors(items: Iterable[Item]) -> dict[str, str]:
    """By id: what is said of pictures that cannot be read."""
    read = contents(items)
    return {id: part for id, parts in read.items() for part in parts if isinstance(part, str)}
