"""Errors a user can act on.

Each carries what went wrong and a `hint`: the next command to type. The class decides the exit code of the command line
(the table in CONTRIBUTING.md); library users catch `PixtralError` or one of its kinds.
"""

from __future__ import annotations

import errno
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)


class PixtralError(Exception):
    """A failure with a remedy. `str(error)` is the message; `error.hint` says what to do next."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class InputError(PixtralError):
    """The input cannot be used: wrong checkpoint, broken bundle, unreadable image, existing output."""

    exit_code = 3


class ImageError(InputError):
    """One image cannot be used. A run over many images records it and goes on."""


class MachineError(PixtralError):
    """This machine cannot do it: a package, a device, memory or disk is missing."""

    exit_code = 4


class CheckFailed(PixtralError):
    """A check ran and did not pass."""

    exit_code = 6


def extra_missing(package: str, extra: str, purpose: str) -> MachineError:
    """The error for a package that an optional extra installs."""
    return MachineError(
        f"{purpose} needs the package '{package}', which is not installed", f"pip install 'pixtral[{extra}]'"
    )


def unwritable(path: Path, error: OSError, hint: str) -> PixtralError:
    """The error for a file that the system does not let us write; `hint` names another place."""
    if error.errno in FULL:
        return MachineError(f"the disk is full: {path}", "df -h .")
    return InputError(f"{path} cannot be written: {error.strerror}", hint)
