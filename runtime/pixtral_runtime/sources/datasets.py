"""Opens what a name means, if it is a data set: archives, tables, lists, folders of them, here or elsewhere."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pixtral_runtime.errors import InputError
from pixtral_runtime.inputs.text_file import parsed_json, read_text
from pixtral_runtime.sources.addresses import is_address, without_query
from pixtral_runtime.sources.arrow import ARROW_SUFFIXES, ArrowSource
from pixtral_runtime.sources.data_file import DataFile, LocalFile
from pixtral_runtime.sources.hub_dataset import hub_dataset_files, is_hub_dataset
from pixtral_runtime.sources.item import Item, Source
from pixtral_runtime.sources.listed import LIST_SUFFIXES, ListSource
from pixtral_runtime.sources.naming import is_picture, name_and_directory
from pixtral_runtime.sources.parquet import PARQUET_SUFFIXES, ParquetSource
from pixtral_runtime.sources.remote import RemoteFile, RemotePicture, expand_address
from pixtral_runtime.sources.tar import TAR_SUFFIXES, TarSource
from pixtral_runtime.sources.zip_archive import ZIP_SUFFIXES, ZipSource

DATASET_SUFFIXES = (*TAR_SUFFIXES, *ZIP_SUFFIXES, *PARQUET_SUFFIXES, *ARROW_SUFFIXES, *LIST_SUFFIXES)
IMAGE_FOLDER_FILE = "metadata.parquet"  # that Hugging Face keeps beside pictures
SAVE_AGAIN = "save the data set again"
MOST_BRACES = 100_000
BRACES = re.compile(r"\{([^{}]*(?:,|\.\.)[^{}]*)\}")
RANGE = re.compile(r"(-?\d{1,18})\.\.(-?\d{1,18})")


def is_dataset(name: str) -> bool:
    """Whether a name, or an address, ends as that of an archive, a table or a list does."""
    return without_query(name).lower().endswith(DATASET_SUFFIXES)


def open_dataset(
    name: str, *, column: str | None = None, fetch: bool = False, recursive: bool = False
) -> Source | None:
    """What a name means: an archive, table, list, a folder, glob or `{000..012}` of those, or an address.

    None where it is a picture or a folder of pictures on this machine. `column` has the pictures of tables and lists;
    `fetch` allows to fetch those that are named by addresses there; `recursive` looks into folders that are elsewhere.
    Raises InputError, MissingPackageError.
    """
    names = [one for spread in expand_braces(name) for one in _spread(spread, recursive)]
    are_datasets = [is_dataset(one) for one in names]
    if not any(are_datasets):
        return AddressSource(names) if is_address(name) else None
    if not all(are_datasets):
        other = names[are_datasets.index(False)]
        raise InputError(f"{name} means data sets, but {other} is none", "name them apart")
    sources = [_open(one, column, fetch) for one in names]
    if is_address(name) and isinstance(sources[0], TarSource | ParquetSource | ArrowSource):
        sources[0].check()  # the others when their turn comes: there may be thousands
    if (source := sources[0] if len(sources) == 1 else JoinedSources(sources)).total == 0:
        raise InputError(f"{name} has no rows", "name another one")
    return source


def _open(name: str, column: str | None, fetch: bool) -> Source:
    file: DataFile = RemoteFile(name) if is_address(name) else LocalFile(name)
    lower = without_query(name).lower()
    if lower.endswith(TAR_SUFFIXES):
        return TarSource(file)
    if lower.endswith(ZIP_SUFFIXES):
        return ZipSource(file)
    if lower.endswith(PARQUET_SUFFIXES):
        return ParquetSource(file, column, fetch=fetch)
    if lower.endswith(ARROW_SUFFIXES):
        return ArrowSource(file, column, fetch=fetch)
    return ListSource(file, column, fetch=fetch)


# What names mean


def expand_braces(name: str) -> list[str]:
    """`a-{000..002}.tar` as the three names that it means, `{a,b}.tar` as the two; any other is itself.

    Raises InputError where there are too many.
    """
    names = [name]
    if not is_address(name) and os.path.lexists(name):
        return names
    while match := BRACES.search(names[0]):
        texts = _texts(match[1])
        if len(names) * len(texts) > MOST_BRACES:
            raise InputError(f"{name} means more than {MOST_BRACES:,} files", "smaller ranges")
        names = [BRACES.sub(lambda _, text=text: text, one, count=1) for one in names for text in texts]  # type: ignore[misc]
    return names


def _texts(braces: str) -> Sequence[str]:
    if (match := RANGE.fullmatch(braces)) is None:
        return braces.split(",")
    first, last = int(match[1]), int(match[2])
    width = len(match[1]) if match[1].startswith("0") else 0
    numbers = range(first, last + 1) if first <= last else range(first, last - 1, -1)
    return [f"{number:0{width}d}" for number in numbers[: MOST_BRACES + 1]]


def _spread(name: str, recursive: bool) -> list[str]:
    """The files that a name means, of folders of data sets as well. Raises InputError."""
    if is_address(name):
        return _spread_address(name, recursive)
    if os.path.isdir(name):
        return _files_of_folder(Path(name)) or [name]
    if not os.path.lexists(name) and glob.has_magic(name):
        return [one for match in sorted(glob.glob(name, recursive=True)) for one in _spread(match, recursive)]
    return [name]


def _spread_address(name: str, recursive: bool) -> list[str]:
    if is_hub_dataset(name):
        return hub_dataset_files(name)
    found = expand_address(name, recursive=recursive)
    if found == [name] or glob.has_magic(without_query(name)):
        return found
    pictures = [one for one in found if is_picture(one)]
    if not (chosen := pictures or [one for one in found if _makes_dataset(one)]):
        raise InputError(f"{name} holds neither pictures nor data sets", "name what is to be read")
    return chosen


def _files_of_folder(folder: Path) -> list[str]:
    """The files of a folder that is a data set; none where it is a folder of pictures, or of something else."""
    if os.path.isfile(folder / "dataset_dict.json"):
        splits = _json(folder / "dataset_dict.json").get("splits", [])
        return [file for split in splits for file in _saved_files(folder / str(split))]
    if os.path.isfile(folder / "state.json"):
        return _saved_files(folder)
    for place in (folder, folder / "data"):
        names = _listed(place)
        if any(is_picture(name) for name in names):
            return []
        if files := [str(place / name) for name in names if _makes_dataset(name)]:
            return files
    return []


def _listed(folder: Path) -> list[str]:
    """The names in a folder, in order; none where it cannot be listed."""
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def _makes_dataset(name: str) -> bool:
    """Whether a file makes the folder that holds it a data set."""
    return name.lower().endswith((*TAR_SUFFIXES, *PARQUET_SUFFIXES)) and os.path.basename(name) != IMAGE_FOLDER_FILE


def _saved_files(folder: Path) -> list[str]:
    """The files of what `datasets` saved to the disk. Raises InputError."""
    noted = _json(folder / "state.json").get("_data_files")
    try:
        return [str(folder / Path(file["filename"]).name) for file in noted or ()]
    except (TypeError, KeyError) as error:
        raise InputError(f"{folder}/state.json is not what `datasets` writes", SAVE_AGAIN) from error


def _json(path: Path) -> dict[str, Any]:
    """What `datasets` notes beside its files. Raises InputError."""
    try:
        content = parsed_json(read_text(path, SAVE_AGAIN))
        if isinstance(content, dict):
            return content
        raise ValueError("no object")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not what `datasets` writes: {error}", SAVE_AGAIN) from error


# Several in one


class JoinedSources:
    """One source after the other. What is in several, as where a list names a picture of a folder, is there once."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources

    @property
    def files(self) -> list[Path]:
        return [file for source in self._sources for file in source.files]

    @property
    def total(self) -> int | None:
        counts = [source.total for source in self._sources]
        return None if None in counts else sum(count or 0 for count in counts)

    def __iter__(self) -> Iterator[Item]:
        seen = set[str]()
        for source in self._sources:
            for item in source:
                if item.id not in seen:
                    seen.add(item.id)
                    yield item


class AddressSource:
    """Pictures that are elsewhere, by their addresses."""

    files: Sequence[Path] = ()

    def __init__(self, addresses: Sequence[str]) -> None:
        self._addresses = addresses
        self.total = len(addresses)

    def __iter__(self) -> Iterator[Item]:
        for address in self._addresses:
            name, directory = name_and_directory(without_query(address), "")
            yield Item(address, (RemotePicture(name=address),), name, directory, "")
