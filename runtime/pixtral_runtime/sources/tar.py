"""Pictures in tar archives, above all the shards of WebDataset, read as a stream: nothing is unpacked to the disk.

Members that belong together follow one another and are called alike up to the first dot, as WebDataset has it:
`000123.jpg`, `000123.txt`, `000123.json`. Each picture among them is an item; the text is what tags it has.

`tarfile` takes a damaged header within an archive for its end, and so does it where the file was cut off between two
members. Here both are damage. What was whole before it is given out, then one item says what is missing.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from pixtral_runtime.errors import ImageError, InputError, Remedy
from pixtral_runtime.inputs.conversation import StoredPicture
from pixtral_runtime.inputs.image import SMALLER, refuse_beyond_memory
from pixtral_runtime.inputs.image_files import LARGEST_FILE_BYTES
from pixtral_runtime.sources.data_file import AGAIN, DataFile, files_on_disk, reason_of, rest_of
from pixtral_runtime.sources.item import BrokenPicture, Item, PictureData
from pixtral_runtime.sources.naming import (
    MOST_TEXT_BYTES,
    UniqueIds,
    caption,
    is_picture,
    is_text,
    name_and_directory,
    without_suffix,
)

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
PACKERS = {b"\x1f\x8b": gzip.GzipFile, b"BZh": bz2.BZ2File, b"\xfd7zXZ\x00": lzma.LZMAFile}  # by how a file begins
MOST_SAMPLE_BYTES = 1 << 26  # of pictures that wait for a text; beyond, those that came are given out
MOST_PADDING_BYTES = 1 << 20  # of zeros at the end; more is a place that was kept free for a download
SKIPPED_BYTES = 1 << 20  # read at a time to get past something

DAMAGE = (
    tarfile.TarError,
    OSError,
    EOFError,
    zlib.error,
    lzma.LZMAError,
    ValueError,
    OverflowError,
    LookupError,
    RecursionError,
    MemoryError,
)


@dataclass(frozen=True)
class _Entry:
    """A picture, a text, or what hinders reading on: then `member` is empty."""

    member: str
    data: bytes = b""
    problem: str = ""
    remedies: tuple[Remedy, ...] = ()

    @property
    def key(self) -> str:
        """What members that belong together have in common: the path up to the first dot of the name."""
        folder, slash, name = self.member.rpartition("/")
        return folder + slash + name.partition(".")[0]


class TarSource:
    """The pictures of one tar archive, plain or packed by gzip, bzip2 or xz, in its order.

    Raises InputError for a file on the disk that is no tar archive, or an empty one.
    """

    total = None

    def __init__(self, file: DataFile) -> None:
        self._file = file
        if file.path is not None:
            self.check()

    @property
    def files(self) -> tuple[Path, ...]:
        return files_on_disk(self._file)

    def __iter__(self) -> Iterator[Item]:
        ids = UniqueIds()
        for sample in _samples(self._entries()):
            texts = {without_suffix(entry.member): caption(entry.data) for entry in sample if is_text(entry.member)}
            for entry in sample:
                if not is_text(entry.member):
                    tags = texts.get(without_suffix(entry.member), texts.get(entry.key, ""))
                    yield self._item(entry, tags, ids)

    def _item(self, entry: _Entry, tags: str, ids: UniqueIds) -> Item:
        if not entry.member:
            return rest_of(self._file, entry.problem, entry.remedies)
        id = ids(f"{self._file.name}/{entry.member}")
        name, directory = name_and_directory(entry.member, self._file.name)
        picture: StoredPicture = PictureData(name=id, file=self._file.path, data=entry.data)
        if entry.problem:
            picture = BrokenPicture(name=id, file=self._file.path, problem=entry.problem, remedies=entry.remedies)
        return Item(id, (picture,), name, directory, tags)

    def check(self) -> None:
        """Read the first header. Raises InputError where there is none."""
        try:
            with self._opened() as tar:
                if tar.next() is not None:
                    return
        except ConnectionError as error:
            raise InputError(f"{self._file.name} cannot be read: {reason_of(error)}", "try it again later") from error
        except DAMAGE as error:
            reason = "is empty" if str(error) == "empty file" else f"is no tar archive: {reason_of(error)}"
            raise InputError(f"{self._file.name} {reason}", "copy or download it again") from error
        raise InputError(f"{self._file.name} is a tar archive of no files", "pack it again")

    def _entries(self) -> Iterator[_Entry]:
        """Pictures and texts in their order, and at the end what hindered more from being read."""
        last = ""
        try:
            with self._opened() as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # of which it would keep all
                    name = member.name.removeprefix("./")
                    if member.isfile() and (is_picture(name) or is_text(name)):
                        yield _entry(tar, member, name)
                    last = member.name
        except InputError as error:  # from where it is opened
            yield _Entry("", problem=str(error), remedies=error.remedies)
        except DAMAGE as error:
            place = f"broken off after {last}" if last else "cannot be read"
            yield _Entry("", problem=f"{place}: {reason_of(error)}", remedies=AGAIN)

    @contextmanager
    def _opened(self) -> Iterator[_Tar]:
        with self._file.open() as packed, _unpacked(packed) as plain:
            stream = cast(BinaryIO, _Stream(plain))
            with _Tar(fileobj=stream, mode="r", tarinfo=_Member, ignore_zeros=True, errors="surrogateescape") as tar:
                yield tar


def _entry(tar: tarfile.TarFile, member: tarfile.TarInfo, name: str) -> _Entry:
    content = tar.extractfile(member)
    assert content is not None  # since it is a file
    if is_text(name):
        return _Entry(name, content.read(MOST_TEXT_BYTES))
    if member.size > LARGEST_FILE_BYTES:
        return _Entry(
            name, problem=f"{member.size:,} bytes, expected {LARGEST_FILE_BYTES:,} at most", remedies=(SMALLER,)
        )
    try:
        refuse_beyond_memory(member.size, name)
    except ImageError as error:
        return _Entry(name, problem=str(error), remedies=error.remedies)
    return _Entry(name, content.read())


def _samples(entries: Iterator[_Entry]) -> Iterator[list[_Entry]]:
    """Entries that belong together."""
    sample: list[_Entry] = []
    size = 0
    for entry in entries:
        if sample and (entry.key != sample[0].key or size > MOST_SAMPLE_BYTES):
            yield sample
            sample, size = [], 0
        sample.append(entry)
        size += len(entry.data)
    if sample:
        yield sample


def _unpacked(packed: BinaryIO) -> BinaryIO:
    start = packed.peek(6) if hasattr(packed, "peek") else b""
    packer: Any = next((packer for magic, packer in PACKERS.items() if start.startswith(magic)), None)
    if packer is None:
        return packed
    return cast(BinaryIO, gzip.GzipFile(fileobj=packed) if packer is gzip.GzipFile else packer(packed))


class _Tar(tarfile.TarFile):
    """An archive that counts the blocks of zeros just read: at its end there are two or more."""

    zeros = 0
    members: list[tarfile.TarInfo]


class _Member(tarfile.TarInfo):
    """A header that cannot be read is damage. Only zeros are an end, behind which another archive may follow."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> _Member:
        assert isinstance(tarfile_, _Tar)
        try:
            member = super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            tarfile_.zeros += 1
            raise
        except tarfile.EmptyHeaderError as error:  # type: ignore[attr-defined]
            if not tarfile_.zeros:
                raise tarfile.ReadError("empty file" if not tarfile_.offset else "there is no end") from error
            if (size := tarfile_.zeros * tarfile.BLOCKSIZE) > MOST_PADDING_BYTES:
                raise tarfile.ReadError(f"the last {size:,} bytes are zeros") from error
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error
        tarfile_.zeros = 0
        return member


class _Stream:
    """What `tarfile` reads: always as much as it asks for, unless the end comes first.

    It seeks ahead, by reading where the file below cannot seek, and no header makes it take more than a picture's
    memory.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._at = file, 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, to: int) -> int:
        if to != self._at and self._file.seekable():
            self._at = self._file.seek(to)
        while self._at < to and self.read(min(SKIPPED_BYTES, to - self._at)):
            pass
        if self._at > to:
            raise tarfile.ReadError("a stream does not go back")
        return self._at

    def read(self, size: int) -> bytes:
        if not 0 <= size <= LARGEST_FILE_BYTES:
            raise tarfile.ReadError(f"{size:,} bytes at a time")
        data = self._file.read(size)
        self._at += len(data)
        return data
