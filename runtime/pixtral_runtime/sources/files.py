"""Files of this machine, of which some hold more than one picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from pixtral_runtime.sources.documents import DocumentSettings, expand
from pixtral_runtime.sources.item import Item
from pixtral_runtime.sources.pictures import Pictures, picture_item


class Files:
    """The pictures, pages and frames of files, opened one after the other as they are wanted."""

    total = None

    def __init__(self, files: Sequence[Path], settings: DocumentSettings) -> None:
        self.files, self._settings = files, settings

    def __iter__(self) -> Iterator[Item]:
        for path in self.files:
            items = expand(path, self._settings)
            yield from (picture_item(path),) if items is None else items


def open_files(files: Sequence[Path], settings: DocumentSettings) -> Pictures | Files:
    """A list where each file is one picture."""
    is_plain = all(expand(path, settings) is None for path in files)
    return Pictures(files) if is_plain else Files(files, settings)
