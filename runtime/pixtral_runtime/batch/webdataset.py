"""Answers with their pictures as WebDataset reads them: tar shards of samples, whose members are called by one key.

A sample is the picture under the extension that its content deserves, `.txt` with the caption and `.json` with what was
asked and how. The same job gives the same bytes: nothing in them tells of when or where they were written.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from pixtral_runtime.batch.asked_pictures import asked_pictures
from pixtral_runtime.batch.imagefolder import caption_of
from pixtral_runtime.batch.records import Record, Request
from pixtral_runtime.errors import Option, unwritable
from pixtral_runtime.files import replacing
from pixtral_runtime.inputs.conversation import StoredPicture

MOST_SAMPLES = 10_000  # of a shard
MOST_BYTES = 3_000_000_000  # the sample that reaches them is the shard's last
IN_ARCHIVE = re.compile(r".*?\.(?:tar|tar\.gz|tgz|tar\.bz2|tbz2|tar\.xz|txz|zip)/(.+)", re.DOTALL | re.IGNORECASE)
FRAGMENTS = re.compile(r"(.*?)((?:#(?:[a-z]+=[^#/]*|[0-9]+))*)", re.DOTALL)  # page, time, and number of a question
HIDDEN_NAME = re.compile(r"^__+")  # `datasets` pass over it, as over a dot
HIDDEN_FOLDER = re.compile(r"^__(?=[^/]*__/)")  # webdataset passes over what is in it
CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f]")

Sample = tuple[str, list[tuple[str, bytes]]]
"""A key, and what goes under it, by extension."""


def shard_path(results: Path, number: int = 0) -> Path:
    """Where a shard of these results lies: `results.jsonl` has `results-000000.tar` beside it."""
    return results.with_name(f"{results.stem}-{number:06d}.tar")


def shards_beside(results: Path) -> list[Path]:
    """The shards of these results that are there already, in their order."""
    pattern = re.compile(re.escape(results.stem) + r"-[0-9]{6}\.tar")
    folder = results.parent
    return sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name)) if folder.is_dir() else []


def write_webdataset(answered: Iterable[tuple[Request, Record]], results: Path) -> None:
    """Write the shards of these results, one sample in memory at a time; shards of before beyond the last are removed.

    Only whole answers have a sample. Each shard takes its place once it is whole. Raises ImageError as
    `asked_pictures`, and InputError or MachineError where the system does not let us write.
    """
    samples = _samples(answered)
    sample = next(samples, None)
    number = 0
    while number == 0 or sample is not None:
        path = shard_path(results, number)
        try:
            with replacing(path) as file:
                sample = _write_shard(file, sample, samples)
        except OSError as error:
            raise unwritable(path, error, Option("output", "another/place.jsonl")) from error
        number += 1
    for path in shards_beside(results):
        if path > shard_path(results, number - 1):
            path.unlink(missing_ok=True)


def _write_shard(file: IO[bytes], sample: Sample | None, samples: Iterator[Sample]) -> Sample | None:
    """Write one shard, from this sample on. Returns the sample that the next one begins with."""
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        count = 0
        while sample is not None and count < MOST_SAMPLES and file.tell() < MOST_BYTES:
            key, members = sample
            for extension, data in members:
                header = tarfile.TarInfo(f"{key}.{extension}")  # of nobody, from 1970, with mode 0644
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))
            tar.getmembers().clear()  # which would be in memory
            count += 1
            sample = next(samples, None)
    return sample


def _samples(answered: Iterable[tuple[Request, Record]]) -> Iterator[Sample]:
    taken = Counter[str]()
    for request, record in answered:
        key = _unique(sample_key(request), taken)
        if record.is_whole:
            yield key, _members(request, record)


def _members(request: Request, record: Record) -> list[tuple[str, bytes]]:
    copies = [copy for copy in asked_pictures(request, record) if copy is not None]
    names = [copy.extension if len(copies) == 1 else f"{n}.{copy.extension}" for n, copy in enumerate(copies)]
    pictures = [(name, copy.data) for name, copy in zip(names, copies, strict=True)]
    told = json.dumps(_told(record), ensure_ascii=False)
    texts = {"txt": caption_of(record), "json": told}
    return pictures + [(name, text.encode("utf-8", "backslashreplace")) for name, text in texts.items()]


def _told(record: Record) -> dict[str, Any]:
    """What is the same in every run of one job."""
    names = "id", "question", "answer", "finish_reason", "prompt_tokens", "image_tokens", "new_tokens"
    told = {name: getattr(record, name) for name in names}
    return told | {"sha256": [image.sha256 for image in record.images], "settings": record.settings}


def sample_key(request: Request) -> str:
    """What a request's sample is called: as in the archive that its picture is from, or else after its id.

    WebDataset takes what is before the first dot of a name. Of an id that goes without its suffix, and other dots of
    the name become `_`, as does `#` before a page, a time or the number of a question.
    """
    id = CONTROL_CHARACTERS.sub("_", request.id.encode("utf-8", "replace").decode())
    archived = IN_ARCHIVE.fullmatch(id) if _is_stored(request.images) else None
    whole = FRAGMENTS.fullmatch(archived[1] if archived else id)
    assert whole is not None  # it matches everything
    path, fragments = whole.groups()
    folders, _, name = path.rpartition("/")
    stem = name.partition(".")[0] if archived else (name.rpartition(".")[0] or name).replace(".", "_")
    name = (stem or "_") + fragments.replace("#", "_").replace(".", "_")
    name = name if archived else HIDDEN_NAME.sub("_", name)
    key = "/".join([*(one for one in folders.split("/") if one not in ("", ".", "..")), name])
    return HIDDEN_FOLDER.sub("_", key)


def _is_stored(images: Sequence[Path | StoredPicture]) -> bool:
    return bool(images) and isinstance(images[0], StoredPicture)


def _unique(key: str, taken: Counter[str]) -> str:
    """The key, with `_2`, `_3`, … behind it where it is taken."""
    found = key
    while found in taken:
        taken[key] += 1
        found = f"{key}_{taken[key]}"
    taken[found] = 1
    return found
