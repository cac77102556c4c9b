"""The file of a job's results: one record a line, written so that a crash, a full disk or a power loss costs no answer.

`ResultsFile` appends, and takes a file up again where a run was stopped: what a power loss left at its end is cut off,
answers to other questions or under other settings are refused. A record for an id that the file has already takes its
place; until the file is closed both lines are there, and the later one counts.

A file that is to be replaced stays until there is a record to replace it with. One that somebody deletes or changes
meanwhile is written again: all records are in a file without a name as well.
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
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from pixtral_runtime.batch.record_lines import ANOTHER_OUTPUT, RecordLines, line_of
from pixtral_runtime.batch.record_store import RecordStore
from pixtral_runtime.batch.records import Record, Request, Settings
from pixtral_runtime.batch.under_way import UnderWay
from pixtral_runtime.errors import InputError, Option, unwritable
from pixtral_runtime.files import lock, open_locked, replacing

SHOWN_CHARACTERS = 80  # of a question in a message
SYNC_EVERY_S = 1.0  # a power loss costs what was answered since; a sync takes milliseconds
GO_ON = Option("resume", note="goes on with it afterwards")
OTHER_JOB = ANOTHER_OUTPUT, Option("force", note="without 'resume' to begin again")


class ResultsFile:
    """A results file that one run writes. Open it with `create` or `resume`; then it is locked until `close`."""

    def __init__(self, path: Path, file: io.FileIO, records: RecordStore, replaces: bool = False) -> None:
        self.path = path
        self._file, self._records, self._replaces = file, records, replaces
        self._bytes = os.fstat(file.fileno()).st_size
        self._synced_s = time.monotonic()
        self._lines = len(records)  # in the file
        self.under_way = UnderWay(path, records)

    @classmethod
    def create(cls, path: Path, force: bool = False) -> ResultsFile:
        """A new file, with its folder. Raises InputError where it exists; with `force` the first record replaces it."""
        file = _open_locked(path, 0 if force else os.O_EXCL)
        return cls(path, file, _empty_store(path), replaces=os.fstat(file.fileno()).st_size > 0)

    @classmethod
    def resume(cls, path: Path, requests: Iterable[Request], settings: Settings) -> ResultsFile:
        """Go on with a file, or begin it. Raises InputError where its records are not those of this job.

        What cannot be asked for all its `requests` beforehand compares them itself as they come.
        """
        while True:
            file = _open_locked(path)
            try:
                records, is_clean = _read(path, asdict(settings))
                _check_same_questions(path, records, requests, settings)
                if is_clean:
                    opened = cls(path, file, records)
                    opened.under_way.remember()
                    return opened
                _write_lines(path, records.lines())
            except BaseException:
                file.close()
                raise
            file.close()  # the lock was on the file that the repaired one replaced

    @property
    def done(self) -> RecordStore:
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
        line = line_of(record)
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
        self._lines += 1
        self._keep(record)
        if time.monotonic() - self._synced_s >= SYNC_EVERY_S:
            self.sync()

    def close(self) -> None:
        """Bring everything to the disk, drop lines that do not count and unlock. Closing again does nothing."""
        self.under_way.close()
        if self._file.closed:
            return
        try:
            self.sync()
            if self._replaces:
                return  # there was nothing to replace it with
            if self._lines > len(self._records) or not self._is_whole():
                self._rewrite()
        finally:
            self._file.close()  # which may be the one that was written anew

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
            _write_lines(saved, (*self._records.lines(), *map(line_of, more)))
            self._file.close()
            raise InputError(
                f"{self.path} was replaced by another file meanwhile; all records are in {saved}",
                f"mv {shlex.quote(str(saved))} {shlex.quote(str(self.path))}",
                Option("resume", note="to go on"),
            )
        for record in more:
            self._keep(record)
        try:
            with replacing(self.path) as file:
                file.writelines(self._records.lines())
                file.flush()
                lock(file)
                held = io.FileIO(os.dup(file.fileno()), "r+")
        except OSError as error:
            raise unwritable(self.path, error, GO_ON, ANOTHER_OUTPUT) from error
        self._file.close()
        self._file, self._bytes = held, held.tell()
        self._replaces, self._lines, self._synced_s = False, len(self._records), time.monotonic()

    def _keep(self, record: Record) -> None:
        try:
            self._records.add(record)
        except OSError as error:
            raise unwritable(self.path, error, GO_ON, ANOTHER_OUTPUT) from error

    def sync(self) -> None:
        """Bring what was appended to the disk now. Raises as `append`."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise unwritable(self.path, error, GO_ON, ANOTHER_OUTPUT) from error
        self._synced_s = time.monotonic()


def _empty_store(path: Path) -> RecordStore:
    try:
        return RecordStore(path.parent)
    except OSError as error:
        raise unwritable(path, error, ANOTHER_OUTPUT) from error


def _read(path: Path, settings: dict[str, Any]) -> tuple[RecordStore, bool]:
    """The records of a file, and whether it has nothing else. Raises InputError where one has other settings."""
    records, lines, count = _empty_store(path), RecordLines(path), 0
    for record in lines:
        count += 1
        if record.settings != settings:
            changed = setting_differences(record.settings, settings)
            raise InputError(f"{path} was written under other settings: {changed}", *OTHER_JOB)
        try:
            records.add(record)
        except OSError as error:
            raise unwritable(path, error, ANOTHER_OUTPUT) from error
    return records, count == len(records) and not lines.torn and lines.is_finished


def _write_lines(path: Path, lines: Iterable[bytes]) -> None:
    try:
        with replacing(path) as file:
            file.writelines(lines)
    except OSError as error:
        raise unwritable(path, error, ANOTHER_OUTPUT) from error


def _check_same_questions(path: Path, records: RecordStore, requests: Iterable[Request], settings: Settings) -> None:
    others = set(records)
    for request in requests if others else ():
        if request.id in others:
            others.remove(request.id)
            check_same_question(records[request.id], request, request.asked(settings), path)
    asked_of: dict[str, set[str]] = {}
    for request in requests if others else ():
        for image in request.images:
            asked_of.setdefault(str(image), set()).add(request.asked(settings))
    for record in map(records.__getitem__, others):
        name = record.images[0].path if len(record.images) == 1 else ""
        is_of_image = record.id == name or record.id.startswith(f"{name}#")  # its id was made here, by image
        if name in asked_of and is_of_image and record.asked not in asked_of[name]:
            raise InputError(
                f"{path} holds the answer to {_shown_apart(record.question, '')[0]} for {name}, which is not asked",
                *OTHER_JOB,
            )


def check_same_question(before: Record, request: Request, asked: str, path: Path | None = None) -> None:
    """Raises InputError where a record is the answer to something else than what is asked now under its id.

    One without a key is no answer: its pictures could not be read, so that nothing was asked.
    """
    if before.asked == asked or before.key is None:
        return
    was, now = _shown_apart(before.question, request.question)
    what = (
        f"the question was {was} and is {now}"
        if before.question != request.question
        else "the number of new tokens, the system prompt, earlier turns or own settings are not those of before"
    )
    file = "the results" if path is None else path
    raise InputError(f"{file} holds the answer to something else for {request.id}: {what}", *OTHER_JOB)


def _shown_apart(one: str, other: str) -> tuple[str, str]:
    """Two texts in quotes, of long ones the part where they begin to differ."""
    start = 0
    if max(len(one), len(other)) > SHOWN_CHARACTERS:
        parting = (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
        start = max(0, next(parting, min(len(one), len(other))) - SHOWN_CHARACTERS // 4)

    def shown(text: str) -> str:
        end = start + SHOWN_CHARACTERS
        return f"{'…' * (start > 0)}{text[start:end]!r}{'…' * (len(text) > end)}"

    return shown(one), shown(other)


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
