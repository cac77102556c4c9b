"""The file of a job's results: one record a line, written so that a crash, a full disk or a power loss costs no answer.

`ResultsFile` appends, and takes a file up again where a run was stopped: what a power loss left at its end is cut off,
answers to other questions or under other settings are refused. A record for an id that the file has already takes its
place; until the file is closed both lines are there, and the later one counts.

A file that is to be replaced stays until there is a record to replace it with. One that somebody deletes or changes
meanwhile is written again from memory.
"""

from __future__ import annotations

import io
import json
import os
import secrets
import shlex
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from pixtral_runtime.batch.records import Record, Request, Settings
from pixtral_runtime.batch.under_way import UnderWay
from pixtral_runtime.errors import InputError, Option, unwritable
from pixtral_runtime.files import lock, open_locked, replacing
from pixtral_runtime.json_data import sealed, unsealed

SYNC_EVERY_S = 1.0  # a power loss costs what was answered since; a sync takes milliseconds
LINE_START = b'{"id": "'  # of every line, and so of one that was cut short
ANOTHER_OUTPUT = Option("output", "another/place.jsonl")
GO_ON = Option("resume", note="goes on with it afterwards")


@dataclass(frozen=True)
class ResultsContents:
    """What a results file holds: records by id, of several for one id the last; and lines that do not count."""

    records: dict[str, Record]
    torn: int = 0  # lines at the end that a crash left unfinished
    superseded: int = 0
    is_finished: bool = True  # its last line ends

    @property
    def is_clean(self) -> bool:
        return not self.torn and not self.superseded and self.is_finished


class ResultsFile:
    """A results file that one run writes. Open it with `create` or `resume`; then it is locked until `close`."""

    def __init__(self, path: Path, file: io.FileIO, records: dict[str, Record], replaces: bool = False) -> None:
        self.path = path
        self._file, self._records, self._replaces = file, records, replaces
        self._bytes = os.fstat(file.fileno()).st_size
        self._synced_s = time.monotonic()
        self._superseded = 0
        self.under_way = UnderWay(path)

    @classmethod
    def create(cls, path: Path, force: bool = False) -> ResultsFile:
        """A new file, with its folder. Raises InputError where it exists; with `force` the first record replaces it."""
        file = _open_locked(path, 0 if force else os.O_EXCL)
        return cls(path, file, {}, replaces=os.fstat(file.fileno()).st_size > 0)

    @classmethod
    def resume(cls, path: Path, requests: Iterable[Request], settings: Settings) -> ResultsFile:
        """Go on with a file, or begin it. Raises InputError where its records are not those of this job."""
        while True:
            file = _open_locked(path)
            try:
                contents = read_results(path)
                _check_same_job(path, contents.records, requests, settings)
                if contents.is_clean:
                    opened = cls(path, file, contents.records)
                    opened.under_way.remember(contents.records)
                    return opened
                write_records(path, contents.records.values())
            except BaseException:
                file.close()
                raise
            file.close()  # the lock was on the file that the repaired one replaced

    @property
    def done(self) -> Mapping[str, Record]:
        """All records by id."""
        return self._records

    def append(self, record: Record) -> None:
        """Write a record, at once; it survives a crash of this program, and one of the machine a second later.

        Raises InputError where somebody put another file in the place of this one, with the name of a new file that has
        all records, and InputError or MachineError where the system does not let us write.
        """
        if self._replaces or not self._is_whole():
            self._rewrite(record)
            return
        line = _line(record)
        try:
            self._file.seek(self._bytes)
            rest = memoryview(line)
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(self._bytes)  # a full disk leaves no half record
            raise unwritable(self.path, error, GO_ON, ANOTHER_OUTPUT) from error
        self._bytes += len(line)
        self._superseded += self._records.pop(record.id, None) is not None
        self._records[record.id] = record
        if time.monotonic() - self._synced_s >= SYNC_EVERY_S:
            self.sync()

    def close(self) -> None:
        """Bring everything to the disk, drop superseded lines and unlock. Closing again does nothing."""
        self.under_way.close()
        if self._file.closed:
            return
        with self._file:
            self.sync()
            if self._replaces:
                return  # there was nothing to replace it with
            if self._superseded or not self._is_whole():
                self._rewrite()

    def __enter__(self) -> ResultsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and not self._records and not self._replaces:
            self.path.unlink(missing_ok=True)  # nothing was done: the next attempt finds the place as this one did
            self._file.close()
        self.close()

    def _place(self) -> os.stat_result | None:
        """What is where the file was opened; None where nothing is."""
        try:
            return self.path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def _is_here(self, there: os.stat_result | None) -> bool:
        return there is not None and os.path.samestat(os.fstat(self._file.fileno()), there)

    def _is_whole(self) -> bool:
        """Whether the file is still there, with all that was written to it and nothing else."""
        there = self._place()
        return self._is_here(there) and there is not None and there.st_size == self._bytes

    def _rewrite(self, *more: Record) -> None:
        """Put a file of all records, and more, in the place of what is there. The lock is then on that one."""
        there = self._place()
        if there is not None and not self._is_here(there):
            saved = self.path.with_name(f"{self.path.stem}.{secrets.token_hex(4)}{self.path.suffix}")
            write_records(saved, (*self._records.values(), *more))
            self._file.close()
            raise InputError(
                f"{self.path} was replaced by another file meanwhile; all records are in {saved}",
                f"mv {shlex.quote(str(saved))} {shlex.quote(str(self.path))}",
                Option("resume", note="to go on"),
            )
        records = self._records | {record.id: record for record in more}
        try:
            with replacing(self.path) as file:
                file.writelines(map(_line, records.values()))
                file.flush()
                lock(file)
                held = io.FileIO(os.dup(file.fileno()), "r+")
        except OSError as error:
            raise unwritable(self.path, error, GO_ON, ANOTHER_OUTPUT) from error
        self._file.close()
        self._file, self._bytes, self._records = held, held.tell(), records
        self._replaces, self._superseded, self._synced_s = False, 0, time.monotonic()

    def sync(self) -> None:
        """Bring what was appended to the disk now. Raises as `append`."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise unwritable(self.path, error, GO_ON, ANOTHER_OUTPUT) from error
        self._synced_s = time.monotonic()


def read_results(path: Path) -> ResultsContents:
    """The records of a results file, which may still be written.

    Raises InputError for a file that cannot be read, that holds something else, or is damaged before its end.
    """
    records: dict[str, Record] = {}
    damaged: list[int] = []
    superseded, line = 0, b"\n"
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                record = _parsed(line, path, number, is_first=not records and not damaged)
                if record is None:
                    damaged.append(number)
                    continue
                if damaged:
                    raise InputError(
                        f"{path}, line {damaged[0]}: damaged, and records follow",
                        f"sed -i {damaged[0]}d {shlex.quote(str(path))} drops the line; its request is then run again",
                    )
                superseded += records.pop(record.id, None) is not None
                records[record.id] = record
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}", "name a file that 'pixtral run' wrote") from error
    except ValueError as error:  # a zero byte in its name
        raise InputError(f"{str(path)!r} cannot be read: {error}", "name a file that 'pixtral run' wrote") from error
    return ResultsContents(records, len(damaged), superseded, line.endswith(b"\n"))


def _line(record: Record) -> bytes:
    """One line of JSON. What UTF-8 cannot hold, in paths, is escaped, which is JSON's own way of writing it."""
    return json.dumps(sealed(record.to_dict()), ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def _parsed(line: bytes, path: Path, number: int, *, is_first: bool) -> Record | None:
    """The line's record, or None where it is damaged. Raises InputError where the file is not one of results."""
    try:
        value = unsealed(json.loads(line.decode()))
    except (ValueError, RecursionError) as error:
        if not is_first or LINE_START.startswith(line[: len(LINE_START)]) or not line.strip(b"\0\n"):
            return None
        raise _no_results(path, number) from error
    try:
        return Record.from_dict(value)
    except (TypeError, RecursionError) as error:
        raise _no_results(path, number) from error


def _no_results(path: Path, number: int) -> InputError:
    return InputError(
        f"{path} is no results file: line {number} is not a record",
        "name a file that 'pixtral run -o' wrote, or a new one",
    )


def _check_same_job(path: Path, records: Mapping[str, Record], requests: Iterable[Request], settings: Settings) -> None:
    remedies = ANOTHER_OUTPUT, Option("force", note="without 'resume' to begin again")
    now = asdict(settings)
    for record in records.values():
        if record.settings != now:
            raise InputError(
                f"{path} was written under other settings: {setting_differences(record.settings, now)}", *remedies
            )
    asked_of: dict[str, set[str]] = {}
    for request in requests:
        for image in request.images:
            asked_of.setdefault(str(image), set()).add(request.asked(settings))
        before = records.get(request.id)
        if before is None or before.asked == request.asked(settings):
            continue
        what = (
            f"the question was {before.question!r} and is {request.question!r}"
            if before.question != request.question
            else "the number of new tokens, the system prompt, earlier turns or own settings are not those of before"
        )
        raise InputError(f"{path} holds the answer to something else for {request.id}: {what}", *remedies)
    for record in records.values():
        name = record.images[0].path if len(record.images) == 1 else ""
        is_of_image = record.id == name or record.id.startswith(f"{name}#")  # its id was made here, by image
        if name in asked_of and is_of_image and record.asked not in asked_of[name]:
            raise InputError(
                f"{path} holds the answer to {record.question!r} for {name}, which is not asked", *remedies
            )


def setting_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between two settings, for people."""
    return ", ".join(
        f"{name} was {json.dumps(before.get(name))} and is {json.dumps(now.get(name))}"
        for name in dict.fromkeys((*now, *before))
        if before.get(name) != now.get(name)
    )


def _open_locked(path: Path, flags: int = 0) -> io.FileIO:
    """Open or create the file, with its folder, and lock it against other runs. Raises InputError."""
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{path} cannot be written: it is not a regular file", ANOTHER_OUTPUT)
        return open_locked(path, flags)
    except BlockingIOError as error:
        raise InputError(f"{path} is being written by another run", "wait for it", ANOTHER_OUTPUT) from error
    except FileExistsError as error:
        if not path.exists():  # its folder is a file
            raise unwritable(path, error, ANOTHER_OUTPUT) from error
        go_on = Option("resume", note="to go on with it")
        raise InputError(f"{path} exists", go_on, Option("force", note="to replace it"), ANOTHER_OUTPUT) from error
    except OSError as error:
        raise unwritable(path, error, ANOTHER_OUTPUT) from error
    except ValueError as error:  # a zero byte in its name
        raise InputError(f"{str(path)!r} cannot be written: {error}", ANOTHER_OUTPUT) from error


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Replace a results file whole. Raises InputError where it cannot be written, MachineError on a full disk."""
    try:
        with replacing(path) as file:
            file.writelines(map(_line, records))
    except OSError as error:
        raise unwritable(path, error, ANOTHER_OUTPUT) from error
