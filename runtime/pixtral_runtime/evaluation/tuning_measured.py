"""What was measured while tuning and is in no record: kept beside the records, so that a stopped tuning goes on."""

from __future__ import annotations

import json
import time
from pathlib import Path

from pixtral_runtime.errors import InputError, Option
from pixtral_runtime.files import write_atomically

SAVE_EVERY_S = 1.0

Numbers = dict[str, float]


class Measured:
    """Numbers by what was measured and of what, in a JSON file; only in memory without a path.

    With `resume` those of the file are there from the start. Raises InputError for a file of another kind.
    """

    def __init__(self, path: Path | None = None, *, resume: bool = False) -> None:
        self._path, self._saved = path, 0.0
        self._kept: dict[str, Numbers] = {}
        if path is not None and resume and path.exists():
            self._kept = _read(path)

    def of(self, measure: str) -> Numbers:
        """What is known by now. Change it through `keep` only."""
        return self._kept.get(measure, {})

    def measures_of(self, name: str, start: str) -> list[str]:
        """The measures that begin so and have a number of this name."""
        return [measure for measure, numbers in self._kept.items() if measure.startswith(start) and name in numbers]

    def keep(self, measure: str, numbers: Numbers) -> None:
        """Add numbers. They are in the file a second later at most, if more are added, or `save` is called."""
        self._kept.setdefault(measure, {}).update(numbers)
        if time.monotonic() - self._saved > SAVE_EVERY_S:
            self.save()

    def save(self) -> None:
        """Write the file."""
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path, json.dumps(self._kept, indent=1).encode() + b"\n")
        self._saved = time.monotonic()


def _read(path: Path) -> dict[str, Numbers]:
    try:
        data = json.loads(path.read_bytes(), parse_constant=_refuse)
        return {measure: {of: float(number) for of, number in numbers.items()} for measure, numbers in data.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is no file of a tuning: {error}", Option("output", "ANOTHER_FOLDER")) from error


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no measured number")
