"""Pictures in zip archives, in the order of the archive's list. Nothing is unpacked to the disk."""

from __future__ import annotations

import lzma
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from pixtral_runtime.errors import InputError, Remedy
from pixtral_runtime.inputs.conversation import StoredPicture
from pixtral_runtime.inputs.image import SMALLER, refuse_beyond_memory
from pixtral_runtime.inputs.image_files import LARGEST_FILE_BYTES
from pixtral_runtime.sources.data_file import DataFile, files_on_disk, reason_of, rest_of
from pixtral_runtime.sources.item import BrokenPicture, Item, PictureData
from pixtral_runtime.sources.naming import (
    MOST_TEXT_BYTES,
    UniqueIds,
    caption,
    is_picture,
    name_and_directory,
    without_suffix,
)

ZIP_SUFFIXES = (".zip",)
ENCRYPTED = 0x1  # a flag of a member
AGAIN = "copy or download it again"
DAMAGE = (
    zipfile.BadZipFile,
    OSError,
    EOFError,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    ValueError,
    NotImplementedError,  # a compression that Python does not have
    RuntimeError,
    OverflowError,
    MemoryError,
)


class ZipSource:
    """The pictures of one zip archive; a text of the same name is what tags one has. Raises InputError."""

    def __init__(self, file: DataFile) -> None:
        self._file = file
        with self._opened() as archive:
            self.total = len(_pictures(archive))
            if not self.total:
                raise InputError(f"{file.name} holds no pictures, but {len(archive.infolist())} other files")

    @property
    def files(self) -> tuple[Path, ...]:
        return files_on_disk(self._file)

    def __iter__(self) -> Iterator[Item]:
        ids = UniqueIds()
        try:
            archive = self._opened()
        except InputError as error:  # it was whole before
            yield rest_of(self._file, str(error), error.remedies)
            return
        with archive:
            for member in _pictures(archive):
                id = ids(f"{self._file.name}/{member.filename}")
                name, directory = name_and_directory(member.filename, self._file.name)
                yield Item(id, (self._picture(archive, member, id),), name, directory, _tags(archive, member))

    def _picture(self, archive: zipfile.ZipFile, member: zipfile.ZipInfo, id: str) -> StoredPicture:
        def broken(problem: str, *remedies: Remedy) -> StoredPicture:
            return BrokenPicture(name=id, file=self._file.path, problem=problem, remedies=remedies)

        if member.flag_bits & ENCRYPTED:
            return broken("it is encrypted", "unpack the archive with its password, and name the folder")
        if member.file_size > LARGEST_FILE_BYTES:
            return broken(f"{member.file_size:,} bytes, expected {LARGEST_FILE_BYTES:,} at most", SMALLER)
        try:
            refuse_beyond_memory(member.file_size, id)
            return PictureData(name=id, file=self._file.path, data=_content(archive, member, member.file_size))
        except InputError as error:
            return broken(str(error), *error.remedies)
        except DAMAGE as error:
            return broken(f"damaged in its archive: {reason_of(error)}", AGAIN)

    def _opened(self) -> zipfile.ZipFile:
        """Raises InputError."""
        try:
            return _Zip(self._file.open(parts=True))
        except DAMAGE as error:
            raise InputError(f"{self._file.name} is no whole zip archive: {reason_of(error)}", AGAIN) from error


class _Zip(zipfile.ZipFile):
    """An archive that closes its file."""

    def close(self) -> None:
        file = self.fp
        super().close()
        if file is not None:
            file.close()


def _pictures(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    return [member for member in archive.infolist() if is_picture(member.filename)]


def _tags(archive: zipfile.ZipFile, picture: zipfile.ZipInfo) -> str:
    try:
        text = archive.getinfo(without_suffix(picture.filename) + ".txt")
        return "" if text.flag_bits & ENCRYPTED else caption(_content(archive, text, MOST_TEXT_BYTES))
    except (KeyError, InputError, *DAMAGE):
        return ""


def _content(archive: zipfile.ZipFile, member: zipfile.ZipInfo, most_bytes: int) -> bytes:
    """What a member holds, so many bytes at most; of a whole one the check sum was compared."""
    with archive.open(member) as file:
        data = file.read(most_bytes)
        file.read(1)  # the check sum is compared at the end
    return data
