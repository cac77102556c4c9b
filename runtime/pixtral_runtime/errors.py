"""Errors a user can act on.

Each carries what went wrong and remedies: an `Option` that the caller may set, by its name in Python, or text such as
a command to type. How an option is written is for the face to say that shows it: `top_p=0.8` here, `--top-p 0.8` on
the command line. The class says what kind of thing is wrong, and decides the exit code of the command line (the table
in CONTRIBUTING.md); library users catch `PixtralError` or one of its kinds.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)
FAILING = (errno.EIO, errno.ESTALE, errno.EREMOTEIO, errno.ENOTCONN, errno.ETIMEDOUT)  # disks, and servers of files
UNWRITABLE = (errno.EROFS, errno.EFBIG)  # whatever is written there

DISK_HINT = "check the disk or the connection to its server, as dmesg shows them"


@dataclass(frozen=True)
class Option:
    """A setting of the caller by its Python name, with a value that works.

    A tuple holds the values to choose from; a word in capitals stands for a value that only the caller knows, as in
    `Option("data", "FOLDER")`. `note` follows the value and says what it is good for.
    """

    name: str
    value: object = True
    note: str = ""

    def __str__(self) -> str:
        """As a Python caller writes it: `top_p=0.8`, `backend=auto|ort-cpu`."""
        return f"{self.name}={choices_text(self.value)} {self.note}".rstrip()


Remedy = Option | str


def choices_text(value: object) -> str:
    """A value, or the values to choose from with a bar between."""
    return "|".join(map(str, value)) if isinstance(value, tuple) else str(value)


class PixtralError(Exception):
    """A failure with remedies, the nearest first. `str(error)` is the message; `error.hint` says what to do next."""

    exit_code = 1

    def __init__(self, message: str, *remedies: Remedy) -> None:
        super().__init__(message)
        self.remedies = remedies

    @property
    def hint(self) -> str:
        """The remedies in one line, options as Python writes them."""
        return "; ".join(map(str, self.remedies))

    @property
    def options(self) -> tuple[Option, ...]:
        """The settings among the remedies."""
        return tuple(remedy for remedy in self.remedies if isinstance(remedy, Option))


HintWriter = Callable[[PixtralError], str]
"""How a face writes the remedies of an error that it records instead of raising it."""


def python_hint(error: PixtralError) -> str:
    """The remedies as a Python caller reads them."""
    return error.hint


class InputError(PixtralError):
    """The input cannot be used: an unreadable file, an existing output. Its kinds say which input it is."""

    exit_code = 3


class ImageError(InputError):
    """One image cannot be used. A run over many images records it and goes on."""


class ImageMemoryError(ImageError):
    """One image takes more memory than is left just now. It may do later, or elsewhere."""


class RequestError(InputError):
    """What was asked is malformed: a message, a line of a file of requests, a JSON schema."""


class ContextError(InputError):
    """A prompt and its answer are longer than the context of the bundle or of the engine."""


class SettingError(InputError):
    """A setting is out of range, or names nothing that there is."""


class CheckpointError(InputError):
    """A checkpoint is not there, damaged, incomplete, or of a model that is not supported."""


class BundleError(InputError):
    """A bundle is not there, damaged, or does not go with what it is used for."""


class EngineError(InputError):
    """An engine cannot be built, is not there or damaged, or does not take what it is given."""


class StaleEngineError(EngineError):
    """An engine was built from other graphs or weights than the bundle's, or by another TensorRT. Build it again."""


class MachineError(PixtralError):
    """This machine cannot do it: a package, a device, memory or disk is missing."""

    exit_code = 4


class MissingPackageError(MachineError):
    """A package that an optional extra brings is not installed."""


class MemoryShortageError(MachineError):
    """The memory of the machine or its GPU is too little for what was asked."""


class OtherGpuError(MachineError):
    """The bundle has engines, but none for this GPU."""


class CheckFailed(PixtralError):
    """A check ran and did not pass."""

    exit_code = 6


def extra_missing(package: str, extra: str, purpose: str) -> MissingPackageError:
    """The error for a package that an optional extra installs."""
    return MissingPackageError(
        f"{purpose} needs the package '{package}', which is not installed", f"pip install 'pixtral[{extra}]'"
    )


def unwritable(path: Path, error: OSError, *remedies: Remedy) -> PixtralError:
    """The error for a file that the system does not let us write; the remedies name another place."""
    if error.errno in FULL:
        return MachineError(f"the disk is full: {path}", "df -h .")
    if error.errno in FAILING:
        return MachineError(f"{path} cannot be written: {error.strerror}", DISK_HINT, *remedies)
    return InputError(f"{path} cannot be written: {error.strerror}", *remedies)
