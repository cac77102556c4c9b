"""Every question about the pictures and documents of watched folders, as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from pixtral_runtime.batch.item_requests import Questions, StreamedRequests
from pixtral_runtime.batch.prompt_template import read_tags
from pixtral_runtime.batch.record_store import RecordStore
from pixtral_runtime.batch.records import Record, Request, Settings
from pixtral_runtime.batch.results_file import check_same_question
from pixtral_runtime.batch.sidecars import no_file as no_file_beside
from pixtral_runtime.batch.sidecars import sidecar_places
from pixtral_runtime.batch.watched_sidecars import WatchedSidecars
from pixtral_runtime.errors import InputError, MissingPackageError, PixtralError, RequestError
from pixtral_runtime.inputs.conversation import Message, StoredPicture
from pixtral_runtime.sources.documents import DOCUMENT_SUFFIXES, DocumentSettings, expand, file_of
from pixtral_runtime.sources.file_item import file_item
from pixtral_runtime.sources.item import BrokenPicture, Item
from pixtral_runtime.sources.pages import PageRange
from pixtral_runtime.sources.pictures import picture_item
from pixtral_runtime.sources.tiff import TIFF_SUFFIXES, frames_of_pages
from pixtral_runtime.sources.video import DEFAULT_FRAMES, VIDEO_SUFFIXES, time_stamp
from pixtral_runtime.sources.watch import Watch

SHOWN_TEXT = "{text}"  # of a document that nobody has read
MARK = "\0"  # that no name has
SOME_PAGES = 8


class WatchedRequests(StreamedRequests):
    """Requests about pictures, pages and frames that are still to come. The first `limit` of them, or without an end.

    Once the watch is closed, an iteration gives the pictures of those that have a record instead, in the order of their
    ids in `order`. `texts` are the questions, `documents` says what is made of a document; where there are `sidecars`,
    or `no_file` makes an error, it is not read, and its record has the error. A question that cannot be made, because
    tags cannot be read or its sidecar is another picture's, is asked about a picture that is broken. Raises
    SettingError as `Questions`, and InputError for several questions a picture with `sidecars`.
    """

    def __init__(
        self,
        watch: Watch,
        texts: Sequence[str],
        documents: DocumentSettings,
        system: str | None = None,
        max_new_tokens: int = 128,
        sidecars: WatchedSidecars | None = None,
        no_file: Callable[[str], RequestError] | None = None,
        limit: int | None = None,
    ) -> None:
        questions = Questions(texts, system, max_new_tokens, self._tags_of)
        super().__init__(watch, questions, () if limit is None else (slice(limit),))
        self.watch, self.sidecars = watch, sidecars
        self._documents = documents
        self._no_file = no_file if sidecars is None else no_file_beside
        self.under_way: dict[str, Path] = {}  # the files of requests whose records are to come, by id
        self.order: Sequence[str] = ()
        self._records: Mapping[str, Record] = {}
        self._editions: dict[Path, tuple[str, ...]] = {}  # ids of the records about a document
        if sidecars is not None:
            sidecar_places(self.outline(), sidecars.settings, {})

    def __getitem__(self, part: slice) -> StreamedRequests:
        raise TypeError("what is still to come has no parts")

    def __iter__(self) -> Iterator[Request]:
        return self._again() if self.watch.is_closed else super().__iter__()

    def _again(self) -> Iterator[Request]:
        """The pictures of each record; all pages of a document are found in one go."""
        found = (self._records.get(id) for id in dict.fromkeys(self.order))
        records = (record for record in found if record is not None)
        for file, of_file in groupby(records, lambda record: file_of(record.images[0].path)):
            pictures = {str(file): file} | self._pictures_in(file)
            for record in of_file:
                images = tuple(pictures.get(image.path) or _gone(image.path) for image in record.images)
                yield Request(record.id, (Message("user", images),))

    def _pictures_in(self, file: Path) -> dict[str, Path | StoredPicture]:
        """All that a file has to ask about, by what records call it."""
        whole = replace(self._documents, pages=PageRange(), per_document=False, wants_text=False)
        parts = (part for item in _items_of(file, whole, None) for part in item.parts)
        return {str(part): part for part in parts if not isinstance(part, str)}

    def outline(self) -> Sequence[Request]:
        """The questions about a picture in each folder that need not be there, and about a document of some pages."""
        stand_ins = [
            replace(picture_item(folder / f"picture-{n}"), tags="") for n, folder in enumerate(self.watch.folders)
        ]
        if (pictures := self._pictures_of_a_document()) > 1:
            stand_ins.append(replace(stand_ins[0], parts=stand_ins[0].parts * pictures))
        return [request for item in stand_ins for request in super(WatchedRequests, self)._requests_of(item)]

    def _pictures_of_a_document(self) -> int:
        """How many a request has; a guess, where only the documents know."""
        if self._no_file is not None:
            return 1
        has_clips = self.watch.suffixes & VIDEO_SUFFIXES and not self._documents.video.per_frame
        frames = (self._documents.video.frames or DEFAULT_FRAMES) if has_clips else 1
        return max(frames, SOME_PAGES if self._documents.per_document else 1)

    def go_on(self, records: Mapping[str, Record], settings: Settings) -> list[str]:
        """Know the records of the job, of earlier runs, and of this one once they are there.

        The ids of those about files in these folders, whether these are still there or not. Raises InputError where
        one is the answer to something else than what would be asked.
        """
        self._records = records
        ours = []
        for record in records.values():
            if self._is_ours(record, settings):
                ours.append(record.id)
                file = file_of(record.images[0].path)
                if file.suffix.lower() in DOCUMENT_SUFFIXES and (record.key is None or not _has_frames(file)):
                    self._editions[file] = (*self._editions.get(file, ()), record.id)
        if self.sidecars is not None:
            self.sidecars.go_on(records)
        return ours

    def check_same(self, settings: Settings, before: Record, request: Request, asked: str) -> None:
        """Raises InputError where a record is the answer to another question than this one.

        A document that has changed may have another text and more pages, so that what was asked differs.
        """
        if before.asked != asked and not self._is_ours(before, settings):
            check_same_question(before, request, asked)

    def _is_ours(self, record: Record, settings: Settings) -> bool:
        """Whether a record is about a file in these folders. Raises InputError where it answers another question."""
        item = self._item_of(record)
        if item is None:
            return False
        requests = [self._request_like(record, item, index) for index in range(len(self._questions.texts))]
        fitting = [request for request in requests if request.id == record.id]
        fitting += [request for request in requests if request.asked(settings) == record.asked]  # under another number
        request = (fitting or requests)[0]
        check_same_question(record, request, request.asked(settings))
        return True

    def _item_of(self, record: Record) -> Item | None:
        """What a record is about, but for the text of a document; None where that is not in these folders."""
        names = [image.path for image in record.images]
        file = file_of(names[0]) if names else None
        if file is None or self.watch.root_of(file) is None:
            return None
        ids = [id for id in (record.id, record.id.rpartition("#")[0]) if id in (names[0], str(file))]
        if not ids:
            return None
        stamps = [() if image.time_s is None else (time_stamp(image.time_s),) for image in record.images]
        parts = [part for stamp, name in zip(stamps, names, strict=True) for part in (*stamp, Path(name))]
        return replace(picture_item(file), id=ids[0], parts=tuple(parts), tags=record.tags or "")

    def _request_like(self, record: Record, item: Item, index: int) -> Request:
        """Question `index` with the text that it has in a record, if it is the question there."""
        if not self._questions.templates[index].has_text:
            return self._questions.request(item, index)
        pieces = self._questions.request(replace(item, text=MARK), index).question.split(MARK)
        characters = (len(record.question) - sum(map(len, pieces))) // (len(pieces) - 1)
        text = record.question[len(pieces[0]) :][: max(characters, 0)]
        request = self._questions.request(replace(item, text=text), index)
        if request.question == record.question:
            return request
        return self._questions.request(replace(item, text=SHOWN_TEXT), index)

    def _requests_of(self, item: Item) -> Iterator[Request]:
        """About all that a file has, unless some of that is still under way: then after it."""
        file, ids = Path(item.id), list[str]()
        if file in list(self.under_way.values()):
            self.watch.forget(file)
            return
        found = item
        for found in _items_of(file, self._documents, self._no_file):
            for index in range(len(self._questions.texts)):
                if (request := self._request(found, index)) is not None:
                    ids.append(request.id)
                    self.under_way[request.id] = file
                    yield request
        if file.suffix.lower() in DOCUMENT_SUFFIXES:
            now = set(ids)
            before = [id for id in self._editions.get(file, ()) if id not in now]
            if before and not _is_broken(found, file):
                before = self._still_true(before, file)
            self._editions[file] = (*ids, *before)

    def _request(self, item: Item, index: int) -> Request | None:
        """None for one that is not asked."""
        try:
            request = self._questions.request(item, index)
            has_sidecar = self.sidecars is not None and isinstance(item.parts[0], Path)
            return request if self.sidecars is None or not has_sidecar or self.sidecars.admit(request) else None
        except InputError as error:
            refused = replace(item, parts=(_refused(item.id, error),), tags="")
            return replace(self._questions.request(refused, index), tags=None)

    def _still_true(self, ids: Sequence[str], file: Path) -> list[str]:
        """Those of a document's records that are about what it still has; the others are dropped."""
        pictures, kept = self._pictures_in(file), list[str]()
        for id in ids:
            record = self._records.get(id)
            if record is None or all(image.path in pictures for image in record.images):
                kept.append(id)
            elif isinstance(self._records, RecordStore):
                self._records.drop(id)
        return kept

    def _tags_of(self, id: str, picture: Path) -> str:
        """As they were when it was asked first: what is read may be the answer."""
        place = None if self.sidecars is None else self.sidecars.place_of(str(picture))
        tags = read_tags(picture, place)
        before = self._records.get(id)
        return tags if before is None or before.tags is None else before.tags


def _items_of(file: Path, settings: DocumentSettings, no_file: Callable[[str], RequestError] | None) -> Iterator[Item]:
    """A picture, or what is in a document; one item that says why where that is not to be read, or cannot be."""
    try:
        items = expand(file, settings)
    except MissingPackageError as error:
        return iter((file_item(file, str(file), [_refused(str(file), error)]),))
    if items is None:
        return iter((picture_item(file),))
    if no_file is not None:
        return iter((file_item(file, str(file), [_refused(str(file), no_file(str(file)))]),))
    return items


def _is_broken(item: Item, file: Path) -> bool:
    """Whether it stands for a document none of which could be read; what was answered outlives that."""
    if file.suffix.lower() in TIFF_SUFFIXES and item.id == str(file):
        return not frames_of_pages(file)
    return item.id == str(file) and isinstance(item.parts[0], BrokenPicture)


def _has_frames(file: Path) -> bool:
    """Whether it is a video, of which nobody knows which frames an earlier run chose."""
    return file.suffix.lower() in VIDEO_SUFFIXES


def _refused(name: str, error: PixtralError) -> BrokenPicture:
    """What stands for a file that nothing is wrong with."""
    return BrokenPicture(name=name, problem=str(error).removeprefix(f"{name}: "), remedies=error.remedies)


def _gone(name: str) -> BrokenPicture:
    return BrokenPicture(name=name, problem="it is not there any more", remedies=("put it back",))
