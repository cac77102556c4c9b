"""What the arguments of a command mean: pictures, and what else has pictures in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pixtral_runtime.inputs.image_files import Note, images_and_folders
from pixtral_runtime.sources.item import Source
from pixtral_runtime.sources.pictures import Pictures


@dataclass(frozen=True)
class OpenedSource:
    """A source, and of each file that was found in a folder, which of those named it was."""

    source: Source
    folders: Mapping[Path, Path]


def open_source(
    names: Sequence[str], stdin: Iterable[bytes], *, recursive: bool = False, note: Note = lambda _: None
) -> OpenedSource:
    """The source of what is named, in its order. `note` hears what was passed over. Raises InputError."""
    folders = images_and_folders(names, stdin, recursive=recursive, note=note)
    return OpenedSource(Pictures(folders), folders)
