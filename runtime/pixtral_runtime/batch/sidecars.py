"""Captions where trainers look for them: a text file beside each picture, of the same name but for its suffix.

What a file gets is noted in the picture's record, with what stood there before, and the record is on the disk before
the file is touched. Whenever a run is killed, the next one knows from the record what is still to be written: a caption
is never appended twice, and what somebody has changed by hand since stays as it is.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pixtral_runtime.batch.records import Record, Request, SidecarNote
from pixtral_runtime.errors import InputError, Option, RequestError, SettingError, unwritable
from pixtral_runtime.files import write_atomically
from pixtral_runtime.inputs.image_files import IMAGE_SUFFIXES

if TYPE_CHECKING:
    from pixtral_runtime.batch.results_file import ResultsFile

EXISTING = ("skip", "overwrite", "append", "prepend")
OUTCOMES = {
    "written": "written",
    "kept": "written before",
    "skipped": "there already and left alone",
    "withheld": "not written, for want of a whole answer",
    "changed": "changed by somebody since and left alone",
    "gone": "not written, as their pictures had gone",
}
SHOWN_CLASHES = 3
ANOTHER_FOLDER = Option("sidecar_dir", "FOLDER")


@dataclass(frozen=True)
class SidecarSettings:
    """Which files, and what is written to them. `ending` is their suffix, `folder` where they lie if not beside.

    `prefix` and `suffix` go around each caption, which becomes one line unless it is to stay `as_written`. Raises
    SettingError.
    """

    ending: str = ".txt"
    folder: Path | None = None
    existing: str = "skip"
    prefix: str = ""
    suffix: str = ""
    as_written: bool = False

    def __post_init__(self) -> None:
        if len(self.ending) < 2 or not self.ending.startswith(".") or {"/", "\0"} & set(self.ending):
            raise SettingError(f"{self.ending!r} is no suffix of a file", Option("sidecar", ".txt"))
        if self.ending.lower() in IMAGE_SUFFIXES:
            raise SettingError(f"{self.ending} is the suffix of pictures", Option("sidecar", ".txt"))
        if self.existing not in EXISTING:
            raise SettingError(f"{self.existing!r} is nothing to do with a file", Option("existing", EXISTING))

    def place(self, picture: Path, root: Path) -> Path:
        """The sidecar of a picture that was found in the folder `root`, whose sub-folders another folder repeats."""
        beside = Path(os.path.splitext(picture)[0] + self.ending)
        if self.folder is None:
            return beside
        return self.folder / (beside.relative_to(root) if beside.is_relative_to(root) else beside.name)

    def text(self, answer: str, before: str | None) -> str:
        """What the file holds in the end: the caption, with what stood there `before` where that is to be kept.

        Tags are separated by commas on one line, and trainers read a file's first line, so the two become one line.
        """
        if self.as_written:
            caption, separator, shorn = f"{self.prefix}{answer}{self.suffix}", "\n", "\r\n"
        else:
            caption, separator, shorn = _one_line(f"{self.prefix}{answer.strip()}{self.suffix}"), ", ", " ,"
        before = (before or "").removeprefix("\ufeff")
        before = before if self.as_written else _one_line(before)
        if not before.strip() or self.existing not in ("append", "prepend"):
            return caption
        if self.existing == "append":
            return before.rstrip(shorn) + separator + caption
        return caption.rstrip(shorn) + separator + before.lstrip(shorn)


def _one_line(text: str) -> str:
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


def no_file(id: str) -> RequestError:
    """The error for what a sidecar cannot lie beside: something within a file."""
    return RequestError(f"{id}: its picture is no file that a sidecar could go with", "save it to a file")


def sidecar_places(
    requests: Iterable[Request], settings: SidecarSettings, roots: Mapping[Path, Path]
) -> dict[str, Path]:
    """The sidecar of each request, by id; `roots` has the folder in which a picture was found.

    Raises InputError for a request that is not about one picture in a file, and where two would have one sidecar.
    """
    places: dict[str, Path] = {}
    pictures: dict[str, list[Path]] = {}
    for request in requests:
        if len(request.images) != 1:
            raise RequestError(
                f"{request.id}: {len(request.images)} pictures; a sidecar belongs to one", "leave the sidecars away"
            )
        picture = request.images[0]
        if not isinstance(picture, Path):
            raise no_file(request.id)
        places[request.id] = settings.place(picture, roots.get(picture, picture.parent))
        pictures.setdefault(os.path.realpath(places[request.id]), []).append(picture)
    for same in pictures.values():
        if len(same) > 1 and len(set(same)) == 1:
            raise InputError(f"{same[0]} is asked {len(same)} questions; a sidecar holds one answer", "ask one of them")
    if clashes := [same for same in pictures.values() if len(same) > 1]:
        shown = "; ".join(" and ".join(map(str, same[:SHOWN_CLASHES])) for same in clashes[:SHOWN_CLASHES])
        more = f"; and {len(clashes) - SHOWN_CLASHES} more" if len(clashes) > SHOWN_CLASHES else ""
        raise InputError(f"pictures would share a sidecar: {shown}{more}", "rename some, or ask about them apart")
    return places


@dataclass
class Sidecars:
    """The sidecars of a job, `places` and what became of them, one of OUTCOMES, by the ids of its requests."""

    settings: SidecarSettings
    places: Mapping[str, Path]
    outcomes: dict[str, str] = field(default_factory=dict)
    _notes: dict[str, SidecarNote] = field(default_factory=dict)  # of this job and its earlier runs, by place

    def place_of(self, id: str) -> Path:
        """The sidecar of a request. Raises KeyError where it is none of this job's."""
        return self.places[id]

    def left_to_ask(self, requests: Sequence[Request], done: Mapping[str, Record]) -> list[Request]:
        """The requests without those whose sidecar is there already and is to stay, but for those of records.

        Raises InputError where a sidecar that is there cannot be read, and where records have notes of captions that
        these settings would have written otherwise.
        """
        for earlier in done.values():
            self._remember(earlier)
        left = []
        for request in requests:
            place, record = self.place_of(request.id), done.get(request.id)
            is_there = os.path.lexists(place)
            if is_there and record is None and self.settings.existing == "skip":
                self.outcomes[request.id] = "skipped"
                continue
            if is_there:
                self.check_text(place)
            if record is not None:
                self.check_same(record, place)
            left.append(request)
        return left

    def catch_up(self, file: ResultsFile) -> None:
        """Write what is missing of the sidecars of records that a file has. Raises as `note` and `write`."""
        for record in [record for id, record in file.done.items() if id in self.places]:
            self.restore(record, file)

    def restore(self, record: Record, file: ResultsFile) -> None:
        """Write the sidecar of a record that a file has, if it is missing. Raises as `note` and `write`."""
        if record.sidecar is None or not _is_same(record.sidecar.path, self.place_of(record.id)):
            record = replace(record, sidecar=None)
            self.note(record)
            if record.sidecar is not None:
                file.append(record)
                file.sync()
        self.write(record)

    def note(self, record: Record) -> None:
        """Let a record say what its sidecar gets, if it gets something. Raises InputError where it cannot be read."""
        place = self.place_of(record.id)
        ours = self._noted_at(place)
        if not record.is_whole:
            record.sidecar = ours  # of the picture before it was changed; what stood before that is not to be forgotten
            return
        found = before = _read(place)
        if ours is not None and found in (ours.text, ours.found):
            before = ours.before
        elif found is not None and self.settings.existing == "skip":
            return
        record.sidecar = SidecarNote(str(place), self.settings.text(record.answer or "", before), before, found)
        self._remember(record)

    def write(self, record: Record) -> None:
        """Write what a record notes, unless it is there, or something that is not known.

        Raises InputError, and MachineError on a full disk.
        """
        note = record.sidecar
        if not record.is_whole:
            self.outcomes[record.id] = "withheld"
            return
        if note is None:
            self.outcomes[record.id] = "skipped"
            return
        place = Path(note.path)
        found = _read(place)
        if found == note.text:
            self.outcomes[record.id] = "kept"
            return
        if found not in (None, note.found):
            self.outcomes[record.id] = "changed"
            return
        try:
            write_atomically(place, note.text.encode("utf-8", "surrogateescape"))
        except OSError as error:
            raise unwritable(
                place, error, Option("resume", note="goes on with it afterwards"), ANOTHER_FOLDER
            ) from error
        self.outcomes[record.id] = "written"

    def __str__(self) -> str:
        """What became of them, for people."""
        return ", ".join(f"{n} {OUTCOMES[name]}" for name, n in self.summary().items() if n) or "none"

    def summary(self) -> dict[str, int]:
        """How many sidecars each of OUTCOMES was."""
        counts = Counter(self.outcomes.values())
        return {name: counts[name] for name in OUTCOMES}

    def _noted_at(self, place: Path) -> SidecarNote | None:
        """What this job or an earlier run of it has noted last of a sidecar."""
        return self._notes.get(os.path.realpath(place))

    def _remember(self, record: Record) -> None:
        if record.sidecar is not None:
            self._notes[os.path.realpath(record.sidecar.path)] = record.sidecar

    def check_same(self, record: Record, place: Path) -> None:
        """Raises InputError where a record notes a caption that these settings would have written otherwise."""
        note = record.sidecar
        if note is None or not record.is_whole or not _is_same(note.path, place):
            return
        if note.text != self.settings.text(record.answer or "", note.before):
            raise InputError(
                f"{place} was to hold {note.text!r}, which these settings of captions would have written otherwise",
                "the same options as before",
                Option("output", "another/place.jsonl"),
            )

    def check_text(self, place: Path) -> None:
        """Raises InputError where something is to be added to a sidecar that is no text."""
        if self.settings.existing not in ("append", "prepend"):
            return
        try:
            (_read(place) or "").encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"{place} is not UTF-8, so nothing can be added to it", Option("existing", "skip")
            ) from error


def _is_same(path: str, place: Path) -> bool:
    return os.path.realpath(path) == os.path.realpath(place)


def _read(place: Path) -> str | None:
    """What a sidecar holds, in any bytes; None where there is none. Raises InputError."""
    try:
        return place.read_bytes().decode("utf-8", "surrogateescape")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"{place} cannot be read: {error.strerror}", "check the file", ANOTHER_FOLDER) from error
