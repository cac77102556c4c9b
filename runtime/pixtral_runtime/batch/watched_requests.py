"""Every question about the pictures of watched folders, as they come."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pixtral_runtime.batch.item_requests import Questions, StreamedRequests
from pixtral_runtime.batch.prompt_template import read_tags
from pixtral_runtime.batch.records import Record, Request, Settings
from pixtral_runtime.batch.results_file import check_same_question
from pixtral_runtime.batch.sidecars import sidecar_places
from pixtral_runtime.batch.watched_sidecars import WatchedSidecars
from pixtral_runtime.errors import InputError
from pixtral_runtime.sources.item import BrokenPicture, Item
from pixtral_runtime.sources.pictures import picture_item
from pixtral_runtime.sources.watch import Watch


class WatchedRequests(StreamedRequests):
    """Requests about pictures that are still to come. The first `limit` of them, or without an end.

    Once the watch is closed, an iteration gives those that have a record instead, in the order of their ids in `order`.
    `texts` are the questions. One that cannot be made, because tags cannot be read or its sidecar is another picture's,
    is asked about a picture that is broken. Raises SettingError as `Questions`, and InputError for several questions a
    picture with `sidecars`.
    """

    def __init__(
        self,
        watch: Watch,
        texts: Sequence[str],
        system: str | None = None,
        max_new_tokens: int = 128,
        sidecars: WatchedSidecars | None = None,
        limit: int | None = None,
    ) -> None:
        questions = Questions(texts, system, max_new_tokens, self._tags_of)
        super().__init__(watch, questions, () if limit is None else (slice(limit),))
        self.watch, self.sidecars = watch, sidecars
        self.under_way = set[str]()  # the ids of requests whose records are to come
        self.order: Sequence[str] = ()
        self._records: Mapping[str, Record] = {}
        if sidecars is not None:
            sidecar_places(self.outline(), sidecars.settings, {})

    def __getitem__(self, part: slice) -> StreamedRequests:
        raise TypeError("what is still to come has no parts")

    def __iter__(self) -> Iterator[Request]:
        return self._again() if self.watch.is_closed else super().__iter__()

    def _again(self) -> Iterator[Request]:
        for id in dict.fromkeys(self.order):
            if (record := self._records.get(id)) is not None:
                yield from (request for request in self._about_picture_of(record) if request.id == id)

    def outline(self) -> Sequence[Request]:
        """The questions about a picture in each folder that need not be there."""
        stand_ins = (folder / f"picture-{number}" for number, folder in enumerate(self.watch.folders))
        return [request for path in stand_ins for request in self._about(replace(picture_item(path), tags=""))]

    def go_on(self, records: Mapping[str, Record], settings: Settings) -> list[str]:
        """Know the records of the job, of earlier runs, and of this one once they are there.

        The ids of those about pictures in these folders, whether these are still there or not. Raises InputError where
        one is the answer to something else than what would be asked.
        """
        self._records = records
        ours = [record.id for record in records.values() if self._is_ours(record, settings)]
        if self.sidecars is not None:
            self.sidecars.go_on(records)
        return ours

    def _is_ours(self, record: Record, settings: Settings) -> bool:
        path = Path(record.images[0].path) if record.images else Path()
        if self.watch.root_of(path) is None or str(path) not in (record.id, record.id.rpartition("#")[0]):
            return False
        requests = self._about_picture_of(record)
        fitting = [request for request in requests if request.id == record.id]
        fitting += [request for request in requests if request.asked(settings) == record.asked]  # under another number
        request = (fitting or requests)[0]
        check_same_question(record, request, request.asked(settings))
        return True

    def _about_picture_of(self, record: Record) -> list[Request]:
        return self._about(replace(picture_item(Path(record.images[0].path)), tags=record.tags or ""))

    def _about(self, item: Item) -> list[Request]:
        return list(super()._requests_of(item))

    def _requests_of(self, item: Item) -> Iterator[Request]:
        requests = [self._request(item, index) for index in range(len(self._questions.texts))]
        if any(request is not None and request.id in self.under_way for request in requests):
            self.watch.forget(Path(item.id))  # changed while it is worked on: its next record comes after this one
            return
        for request in requests:
            if request is not None:
                self.under_way.add(request.id)
                yield request

    def _request(self, item: Item, index: int) -> Request | None:
        """None for one that is not asked."""
        try:
            request = self._questions.request(item, index)
            return request if self.sidecars is None or self.sidecars.admit(request) else None
        except InputError as error:
            broken = BrokenPicture(name=item.id, problem=str(error), remedies=error.remedies)
            return replace(self._questions.request(replace(item, parts=(broken,), tags=""), index), tags=None)

    def _tags_of(self, id: str, picture: Path) -> str:
        """As they were when it was asked first: what is read may be the answer."""
        place = None if self.sidecars is None else self.sidecars.place_of(str(picture))
        tags = read_tags(picture, place)
        before = self._records.get(id)
        return tags if before is None or before.tags is None else before.tags
