"""Records as lines of JSON: written, and read back from a file that a crash may have torn at its end."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pixtral_runtime.batch.records import Record
from pixtral_runtime.errors import InputError, Option, unwritable
from pixtral_runtime.files import replacing
from pixtral_runtime.json_data import sealed, unsealed

LINE_START = b'{"id": "'  # of every line, and so of one that was cut short
ANOTHER_OUTPUT = Option("output", "another/place.jsonl")
OURS = "name a file that 'pixtral run' wrote"


def line_of(record: Record) -> bytes:
    """One line of JSON. What UTF-8 cannot hold, in paths, is escaped, which is JSON's own way of writing it."""
    return json.dumps(sealed(record.to_dict()), ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def record_in(line: bytes) -> Record:
    """The record of a line that `line_of` wrote. Raises ValueError, TypeError or RecursionError for another one."""
    return Record.from_dict(unsealed(json.loads(line.decode())))


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Replace a results file whole. Raises InputError where it cannot be written, MachineError on a full disk."""
    try:
        with replacing(path) as file:
            file.writelines(map(line_of, records))
    except OSError as error:
        raise unwritable(path, error, ANOTHER_OUTPUT) from error


class RecordLines:
    """The records of a results file, which may still be written, from its first line to its last.

    Afterwards `torn` counts the lines at the end that a crash left unfinished, and `is_finished` says whether the last
    line ends. Iterating raises InputError for a file that cannot be read, that holds something else, or is damaged
    before its end.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.torn = 0
        self.is_finished = True

    def __iter__(self) -> Iterator[Record]:
        damaged: list[int] = []
        is_first, line = True, b"\n"
        try:
            with self._path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    if not line.strip():
                        continue
                    record = self._parsed(line, number, is_first=is_first)
                    is_first = False
                    if record is None:
                        damaged.append(number)
                        continue
                    if damaged:
                        name = shlex.quote(str(self._path))
                        raise InputError(
                            f"{self._path}, line {damaged[0]}: damaged, and records follow",
                            f"sed -i {damaged[0]}d {name} drops the line; its request is then run again",
                        )
                    yield record
        except OSError as error:
            raise InputError(f"{self._path} cannot be read: {error.strerror}", OURS) from error
        except ValueError as error:  # a zero byte in its name
            raise InputError(f"{str(self._path)!r} cannot be read: {error}", OURS) from error
        self.torn, self.is_finished = len(damaged), line.endswith(b"\n")

    def _parsed(self, line: bytes, number: int, *, is_first: bool) -> Record | None:
        """The line's record, or None where it is damaged. Raises InputError where the file is not one of results."""
        try:
            return record_in(line)
        except (ValueError, RecursionError) as error:
            if not is_first or LINE_START.startswith(line[: len(LINE_START)]) or not line.strip(b"\0\n"):
                return None
            raise self._no_results(number) from error
        except TypeError as error:
            raise self._no_results(number) from error

    def _no_results(self, number: int) -> InputError:
        return InputError(
            f"{self._path} is no results file: line {number} is not a record",
            "name a file that 'pixtral run -o' wrote, or a new one",
        )


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


def read_results(path: Path) -> ResultsContents:
    """The records of a results file, in memory. Raises as `RecordLines`."""
    lines = RecordLines(path)
    records: dict[str, Record] = {}
    superseded = 0
    for record in lines:
        superseded += records.pop(record.id, None) is not None
        records[record.id] = record
    return ResultsContents(records, lines.torn, superseded, lines.is_finished)
