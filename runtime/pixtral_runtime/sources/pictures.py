"""Files of pictures, as they were listed: all that is known of them beforehand is where they lie."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pixtral_runtime.sources.item import Item


class Pictures(Sequence[Item]):
    """An item for each file, called by its path as it was given: `photos/a.jpg`."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._paths = list(paths)

    @property
    def files(self) -> Sequence[Path]:
        return self._paths

    @property
    def total(self) -> int:
        return len(self._paths)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: Any) -> Any:
        return Pictures(self._paths[index]) if isinstance(index, slice) else picture_item(self._paths[index])


def picture_item(path: Path) -> Item:
    """A picture that is a file."""
    folder = os.path.basename(os.path.dirname(os.path.abspath(path)))
    return Item(str(path), (path,), name_text(os.path.splitext(path.name)[0]), name_text(folder))


def name_text(name: str) -> str:
    """A file's name as text: bytes of it that are none become U+FFFD."""
    return os.fsencode(name).decode("utf-8", "replace")
