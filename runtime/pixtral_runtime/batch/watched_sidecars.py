"""Sidecars of pictures that come while a job runs: their places are made as pictures come, and none belongs to two."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from pixtral_runtime.batch.records import Record, Request, SidecarNote
from pixtral_runtime.batch.results_file import ResultsFile
from pixtral_runtime.batch.sidecars import Sidecars, SidecarSettings
from pixtral_runtime.errors import InputError, PixtralError
from pixtral_runtime.sources.watch import Watch


class WatchedSidecars(Sidecars):
    """The sidecars of pictures in watched folders. The id of a request is its picture's path.

    A picture that has gone gets none, since its disk may have gone with it; one that comes back gets it then.
    """

    def __init__(self, settings: SidecarSettings, watch: Watch) -> None:
        super().__init__(settings, {})
        self._watch = watch
        self._records: Mapping[str, Record] = {}
        self._owners: dict[str, str] = {}  # ids by the place of their sidecar
        self._file: ResultsFile | None = None

    def place_of(self, id: str) -> Path:
        picture = Path(id)
        root = self._watch.root_of(picture)
        if root is None:
            raise KeyError(id)
        return self.settings.place(picture, root)

    def go_on(self, records: Mapping[str, Record]) -> None:
        """Take up what earlier runs noted; `records` are those of the job, of this run too once they are there.

        Raises InputError where they have notes of captions that these settings would have written otherwise.
        """
        self._records = records
        for record in records.values():
            self._remember(record)
            if self._watch.root_of(Path(record.id)) is not None:
                self.check_same(record, self.place_of(record.id))

    def admit(self, request: Request) -> bool:
        """Whether to ask; not where the sidecar is there already and is to stay, but for those of records.

        Raises InputError where it is another picture's, and where something is to be added to what is no text.
        """
        place = self.place_of(request.id)
        real = os.path.realpath(place)
        owner = self._owners.get(real, request.id)
        if owner != request.id and os.path.lexists(owner):
            raise InputError(f"{owner} has the sidecar {place} already", "rename one of the pictures")
        if os.path.lexists(place):
            if request.id not in self._records and self.settings.existing == "skip":
                self.outcomes[request.id] = "skipped"
                return False
            self.check_text(place)
        self._owners[real] = request.id
        return True

    def catch_up(self, file: ResultsFile) -> None:
        """Know the job's file; what it has is looked at when its picture comes."""
        self._file = file

    def restore_of(self, id: str) -> None:
        """Write the sidecar of a record that still holds, if it is missing. Raises as `note` and `write`."""
        if self._file is not None:
            self.restore(self._records[id], self._file)

    def note(self, record: Record) -> None:
        self._unless_gone(record, super().note)
        if not record.is_whole and record.sidecar is not None and self._owner_of(record) != record.id:
            record.sidecar = None

    def write(self, record: Record) -> None:
        self._unless_gone(record, super().write)

    def _unless_gone(self, record: Record, do: Callable[[Record], None]) -> None:
        try:
            if os.path.lexists(record.id):
                do(record)
                return
        except PixtralError:
            if os.path.lexists(record.id):
                raise
        self.outcomes[record.id] = "gone"
        self._watch.forget(Path(record.id))

    def _owner_of(self, record: Record) -> str | None:
        return self._owners.get(os.path.realpath(self.place_of(record.id)))

    def _noted_at(self, place: Path) -> SidecarNote | None:
        owner = self._owners.get(os.path.realpath(place))
        record = None if owner is None else self._records.get(owner)
        return None if record is None else record.sidecar

    def _remember(self, record: Record) -> None:
        if record.sidecar is not None:
            self._owners[os.path.realpath(record.sidecar.path)] = record.id
