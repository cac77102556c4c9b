"""Data sets of the Hugging Face Hub by name: `hf://datasets/USER/NAME`, with `@REVISION` if another one is meant.

Parquet files or tar shards of its repository are taken as they are, else the Parquet files into which the Hub converts
what its own scripts can read.
"""

from __future__ import annotations

import re

from pixtral_runtime.errors import InputError, PixtralError
from pixtral_runtime.sources.parquet import PARQUET_SUFFIXES
from pixtral_runtime.sources.remote import expand_address
from pixtral_runtime.sources.tar import TAR_SUFFIXES

NAME = re.compile(r"(hf://datasets/[^/@]+/[^/@]+)(@(?:refs/\w+/\w+|[^/]+))?/?", re.IGNORECASE)
CONVERTED = "@refs%2Fconvert%2Fparquet"  # the revision that has them, its slashes escaped
USUAL = ("", "data", "default")  # folders, of which the first that is there is meant
PARTIAL = "/partial-"  # begins the folder of a conversion that was not ended, since the data set is large


def is_hub_dataset(address: str) -> bool:
    return NAME.fullmatch(address) is not None


def hub_dataset_files(address: str) -> list[str]:
    """The addresses of its files, in order. Raises InputError."""
    match = NAME.fullmatch(address)
    assert match is not None
    files = expand_address(address.rstrip("/") + "/", recursive=True)
    root = match[1] + (match[2] or "")
    for suffixes in (PARQUET_SUFFIXES, TAR_SUFFIXES):
        if found := [file for file in files if file.lower().endswith(suffixes)]:
            return _of_one_folder(found, root)
    if match[2]:
        raise InputError(f"{address} has neither Parquet files nor tar archives", "name its files")
    return _converted(address, root)


def _converted(address: str, root: str) -> list[str]:
    try:
        files = expand_address(f"{root}{CONVERTED}/", recursive=True)
    except PixtralError as error:
        raise InputError(
            f"{address} has neither Parquet files nor tar archives, nor a conversion by the Hub: {error}",
            "name its files",
        ) from error
    found = _of_one_folder([file for file in files if file.lower().endswith(PARQUET_SUFFIXES)], f"{root}{CONVERTED}")
    if partial := [file for file in found if PARTIAL in file]:
        folder = partial[0].rpartition("/")[0]
        raise InputError(f"the Hub converted only a part of {address}", f"{folder}/*.parquet, if the part is enough")
    return found


def _of_one_folder(files: list[str], root: str) -> list[str]:
    """Those of the usual folder of a repository, or of its only one. Raises InputError where one must be named."""
    folders: dict[str, list[str]] = {}
    for file in files:
        below = file.removeprefix(root).lstrip("/")
        folders.setdefault(below.rpartition("/")[0].partition("/")[0], []).append(file)
    for folder in (*USUAL, *(folders if len(folders) == 1 else ())):
        if folder in folders:
            return folders[folder]
    shown = ", ".join(f"{root}/{folder}/" for folder in sorted(folders))
    raise InputError(f"{root} has several sets: {shown}", "name one of them")
