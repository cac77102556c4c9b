"""A file that holds pictures, or names them: on this machine's disk, or elsewhere."""

from __future__ import annotations

import stat
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from pixtral_runtime.errors import InputError, Option, Remedy
from pixtral_runtime.inputs.conversation import StoredPicture
from pixtral_runtime.sources.item import BrokenPicture, Item

AGAIN: tuple[Remedy, ...] = ("copy or download it again", Option("resume", note="goes on with what is new then"))


class DataFile(Protocol):
    """A file by the name that its user gave it; `path` where it is on the disk."""

    @property
    def name(self) -> str: ...

    @property
    def path(self) -> Path | None: ...

    def open(self, *, parts: bool = False) -> BinaryIO:
        """The file from its beginning, buffered. With `parts` it can seek, else that depends.

        Raises InputError; reading from it raises OSError, or InputError where it will never do.
        """

    def beside(self, path: str) -> Path | StoredPicture:
        """The picture that the file names by a path."""


@dataclass(frozen=True)
class LocalFile:
    """A file on the disk, in any bytes that a name may have. Raises InputError unless it is a regular one."""

    name: str

    def __post_init__(self) -> None:
        try:
            is_file = stat.S_ISREG(self.path.stat().st_mode)
        except (OSError, ValueError) as error:
            raise _unreadable(self.name, error) from error
        if not is_file:
            raise InputError(f"{self.name} is not a regular file", "save it to one")

    @property
    def path(self) -> Path:
        return Path(self.name)

    def open(self, *, parts: bool = False) -> BinaryIO:
        try:
            return self.path.open("rb")
        except OSError as error:
            raise _unreadable(self.name, error) from error

    def beside(self, path: str) -> Path | StoredPicture:
        if "\0" in path:
            return BrokenPicture(name=repr(path), problem="a path with a zero byte", remedies=("check the path",))
        return self.path.parent / path


def files_on_disk(file: DataFile) -> tuple[Path, ...]:
    return () if file.path is None else (file.path,)


def rest_of(file: DataFile, problem: str, remedies: tuple[Remedy, ...] = AGAIN) -> Item:
    """What stands for all that cannot be read of a file any more. Its id is always the same."""
    problem = problem.removeprefix(file.name).removeprefix(":").lstrip()
    broken = BrokenPicture(name=file.name, file=file.path, problem=problem, remedies=remedies)
    return Item(f"{file.name}#rest", (broken,), "", "", "")


def reason_of(error: BaseException) -> str:
    """The first line of what an error of a library says, or else what it is called."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _unreadable(name: str, error: Exception) -> InputError:
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return InputError(f"{name} cannot be read: {reason}", "check the path and its permissions")
