"""What the arguments of a command mean: pictures, and what else has pictures in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from pixtral_runtime.inputs.image_files import Note, images_and_folders
from pixtral_runtime.sources.datasets import JoinedSources, open_dataset
from pixtral_runtime.sources.documents import DocumentSettings, suffixes
from pixtral_runtime.sources.files import Files, open_files
from pixtral_runtime.sources.item import Source

STDIN = "-"


@dataclass(frozen=True)
class SourceSettings:
    """How sources are read: `documents` whose pages and frames are wanted, `column` where tables have their pictures.

    `recursive` looks into sub-folders, `fetch` allows to fetch pictures that tables name by addresses, `with_videos`
    takes videos that lie in folders.
    """

    documents: DocumentSettings
    recursive: bool = False
    column: str | None = None
    fetch: bool = False
    with_videos: bool = False


@dataclass(frozen=True)
class OpenedSource:
    """A source, and of each file that was found in a folder, which of those named it was."""

    source: Source
    folders: Mapping[Path, Path]
    has_datasets: bool
    has_documents: bool


def open_source(
    names: Sequence[str], stdin: Iterable[bytes], settings: SourceSettings, note: Note = lambda _: None
) -> OpenedSource:
    """The source of what is named, in its order. `note` hears what was passed over.

    Raises InputError, and MissingPackageError for what an extra reads.
    """
    opened = [(name, _dataset(name, settings)) for name in dict.fromkeys(names)]
    sources: list[Source] = []
    folders: dict[Path, Path] = {}
    for is_dataset, group in groupby(opened, key=lambda pair: pair[1] is not None):
        if is_dataset:
            sources += [source for _, source in group if source is not None]
            continue
        wanted = suffixes(with_videos=settings.with_videos)
        found = images_and_folders(
            [name for name, _ in group], stdin, recursive=settings.recursive, note=note, suffixes=wanted
        )
        new = [path for path in found if path not in folders]
        folders = found | folders
        sources.append(open_files(new, settings.documents))
    return OpenedSource(
        sources[0] if len(sources) == 1 else JoinedSources(sources),
        folders,
        has_datasets=any(source is not None for _, source in opened),
        has_documents=any(isinstance(source, Files) for source in sources),
    )


def _dataset(name: str, settings: SourceSettings) -> Source | None:
    if name == STDIN:
        return None
    return open_dataset(name, column=settings.column, fetch=settings.fetch, recursive=settings.recursive)
