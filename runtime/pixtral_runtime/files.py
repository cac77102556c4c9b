"""Files that are written: checked before the work, whole when a reader sees them, one writer at a time."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import os
import secrets
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pixtral_runtime.errors import InputError, Option, unwritable

HASH_BLOCK_BYTES = 1 << 22
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@dataclass(frozen=True)
class Output:
    """A file that somebody wants written: where, the option to name another place with, and what may be there already.

    `replaces` says that a file there may go, or is gone on with; `resumable` that the user could have asked for that.
    """

    path: Path
    option: Option
    replaces: bool = False
    resumable: bool = False


def check_outputs(outputs: Iterable[Output], inputs: Iterable[Path] = ()) -> None:
    """Refuse what cannot be written, all of it, before the work that it may take to have something to write.

    That is one place for two outputs, an output in the place of an input, a file that exists and may not be replaced,
    what is no regular file, and a place that the system does not let us write to. Inputs that are not there are for
    their readers to complain of. Raises InputError, and MachineError on a full disk.
    """
    taken: dict[object, Output] = {}
    folders: set[Path] = set()
    for output in outputs:
        try:
            place = _place(output.path)
            if place in taken:
                raise InputError(f"{output.path} would be written twice", output.option)
            taken[place] = output
            folder = _check_output(output)
            if folder not in folders:
                check_folder(folder)
                folders.add(folder)
        except OSError as error:
            raise unwritable(output.path, error, output.option) from error
        except ValueError as error:  # a zero byte in its name
            raise InputError(f"{str(output.path)!r} cannot be written: {error}", output.option) from error
    for path in inputs:
        with suppress(OSError, ValueError):
            if (over := taken.get(_place(path))) is not None:
                raise InputError(f"{over.path} is read, and cannot be written as well", over.option)


def _place(path: Path) -> object:
    """What two names of one file have in common. Raises OSError for a name that no file can have."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return os.path.realpath(path)
    return status.st_dev, status.st_ino


def _check_output(output: Output) -> Path:
    """The folder that is there for it. Raises InputError, or the system's own error where it would not let us write."""
    path = output.path
    if path.is_dir():
        raise InputError(f"{path} is a folder", output.option)
    if path.exists():
        if not path.is_file():
            raise InputError(f"{path} is not a regular file", output.option)
        if not output.replaces:
            go_on = (Option("resume", note="to go on with it"),) if output.resumable else ()
            raise InputError(f"{path} exists", *go_on, Option("force", note="to replace it"), output.option)
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    folder = Path(os.path.realpath(path)).parent
    missing = [path.name]
    while not folder.exists():
        missing.append(folder.name)
        folder = folder.parent
    if any(len(os.fsencode(name)) > os.pathconf(folder, "PC_NAME_MAX") for name in missing):
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    return folder


def check_folder(folder: Path) -> None:
    """Try to write to a folder: permissions do not tell of a read-only file system or a quota. Raises OSError."""
    with tempfile.TemporaryFile(dir=folder):
        pass


def write_atomically(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Put `data` in the place of `path`, as `replacing` does. Raises OSError."""
    with replacing(path, durable=durable) as file:
        file.write(data)


def write_text_atomically(path: Path, text: str) -> None:
    """Put text in the place of `path`, in UTF-8; bytes of a path that are none become escapes. Raises OSError."""
    write_atomically(path, text.encode("utf-8", "backslashreplace"))


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[io.BufferedWriter]:
    """A file that takes the place of `path`, with its folder, once it is whole; `durable`: and on the disk.

    Raises OSError.
    """
    target = Path(os.path.realpath(path))  # a link stays a link
    temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
    target.parent.mkdir(parents=True, exist_ok=True)
    file = temporary.open("xb")
    try:
        with file:
            with suppress(FileNotFoundError):
                os.fchmod(file.fileno(), stat.S_IMODE(target.stat().st_mode))  # who may read it, still may
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, target)
        if durable:
            sync(target.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(file: io.FileIO | io.BufferedWriter) -> None:
    """Lock an open file against other processes; where the file system has no locks it stays unlocked.

    Raises BlockingIOError where another one has it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise


def open_locked(path: Path, flags: int = 0) -> io.FileIO:
    """Open or create a file, with its folder, and lock it. Raises OSError, BlockingIOError where another one has it."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = io.FileIO(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | flags, 0o666), "r+")
        try:
            lock(file)
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except FileNotFoundError:
            pass  # renamed or deleted between opening and locking, as is a file that another run has just replaced
        except BaseException:
            file.close()
            raise
        file.close()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a file of this name, which vanishes at the end. Raises OSError, BlockingIOError where another one has it."""
    with open_locked(path):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def sha256_of_file(path: Path) -> str:
    """Hex digest of a file's bytes, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def cache_folder() -> Path | None:
    """Where this user's programs keep what can be made again; None where the user has no home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pixtral"
    except RuntimeError:
        return None
