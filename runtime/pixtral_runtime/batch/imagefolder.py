"""Captions as Hugging Face's ImageFolder reads them: `metadata.jsonl` in the folder that holds the pictures.

`load_dataset("imagefolder", data_dir=FOLDER)` then gives each picture with its `text`. A line is
`{"file_name": "a/b.png", "text": "…"}`, the name relative to the file. Whoever trains on captions wants whole ones:
answers that failed or were cut off have no line.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from pixtral_runtime.batch.records import Record, Request
from pixtral_runtime.errors import InputError, Option, RequestError, SettingError, unwritable
from pixtral_runtime.files import replacing

METADATA = "metadata.jsonl"


def write_imagefolder(records: Iterable[Record], path: Path) -> None:
    """Replace `metadata.jsonl` by a line for each whole answer. Raises as `check_imagefolder`, and MachineError."""
    names = FileNames(path)
    try:
        with replacing(path) as file:
            for record in records:
                if record.is_whole:
                    line = {"file_name": names([image.path for image in record.images]), "text": caption_of(record)}
                    file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
    except OSError as error:
        raise unwritable(path, error, Option("output", "another/place.jsonl")) from error


def caption_of(record: Record) -> str:
    """What a trainer is to read: what the sidecar got, or else the answer."""
    return record.sidecar.text if record.sidecar else (record.answer or "").strip()


def check_imagefolder(requests: Iterable[Request], path: Path) -> None:
    """Raises InputError where requests could not become lines of this file.

    Each must be about one picture below the file's folder, and no two about the same one.
    """
    names = FileNames(path)
    for request in requests:
        if not all(isinstance(image, Path) for image in request.images):
            raise no_file(request.id)
        names([str(image) for image in request.images])


def no_file(id: str) -> RequestError:
    """The error for what a line cannot name: something within a file."""
    return RequestError(f"{id}: its picture is no file that a dataset can name", "save it to a file")


class FileNames:
    """What pictures are called in a file of this path, each once. Raises SettingError for one that nobody looks for."""

    def __init__(self, path: Path) -> None:
        if path.name != METADATA:
            raise SettingError(f"datasets look for {METADATA}, not for {path.name}", Option("output", METADATA))
        self._folder = os.path.abspath(path.parent)
        self._seen: set[str] = set()

    def __call__(self, images: Sequence[str]) -> str:
        """The name of a request's only picture. Raises InputError."""
        if len(images) != 1:
            raise RequestError(f"{len(images)} pictures in one request; a line of {METADATA} is about one")
        name = os.path.relpath(os.path.abspath(images[0]), self._folder)
        if name.startswith(os.pardir + os.sep):
            raise InputError(
                f"{images[0]} is not below {self._folder}", "put the output in a folder above all pictures"
            )
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{images[0]}: its name is not UTF-8, and {METADATA} is", "rename the file") from error
        if name in self._seen:
            raise InputError(f"{images[0]} is asked about twice; a line of {METADATA} is about one picture")
        self._seen.add(name)
        return name
