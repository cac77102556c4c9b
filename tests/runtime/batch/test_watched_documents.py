"""Documents and videos in watched folders: their records are those of a run, and those of what they are now."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from queue import Queue
from threading import Thread

import pytest
from PIL import Image

from helpers.bundles import exported
from helpers.job_records import by_id
from helpers.pdf_files import pdf_file, text_page
from helpers.places import DEMO, IMAGES
from helpers.videos import write_video
from helpers.watch_runs import DOCUMENTS, Run, put
from helpers.watching import GIVE_UP_S, SHORT
from pixtral_export.plan import ExportSettings
from pixtral_runtime.batch.item_requests import Questions, requests_of_items
from pixtral_runtime.batch.records import Record, Request, Settings
from pixtral_runtime.batch.results_file import ResultsFile
from pixtral_runtime.batch.run import run_job
from pixtral_runtime.batch.sidecars import SidecarSettings
from pixtral_runtime.batch.watched_requests import WatchedRequests
from pixtral_runtime.batch.worker import Worker, WorkerOptions
from pixtral_runtime.errors import InputError
from pixtral_runtime.sources.documents import DocumentSettings, watched_suffixes
from pixtral_runtime.sources.files import open_files
from pixtral_runtime.sources.pages import parse_pages
from pixtral_runtime.sources.video import VideoSettings
from pixtral_runtime.sources.watch import Watch

RED, BLUE = IMAGES / "red_triangle_64x64.png", IMAGES / "blue_circle_64x64.png"
SCAN = "cam/scan.pdf"
WITH_TEXT = replace(DOCUMENTS, wants_text=True)
PER_DOCUMENT = replace(WITH_TEXT, per_document=True)


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Worker:
    bundle = exported(DEMO, tmp_path_factory.mktemp("bundles") / "bundle", ExportSettings(dtype="float32"))
    return Worker(bundle.path, Settings(bundle.fingerprint), WorkerOptions())


def put_pdf(*texts: str, name: str = "scan.pdf", cut: int | None = None) -> None:
    Path("made").write_bytes(pdf_file([text_page(text) for text in texts])[:cut])
    put(Path("made"), Path("cam", name))


def put_tiff(*pictures: Path, name: str = "fax.tif") -> None:
    first, *others = map(Image.open, pictures)
    first.save("made", "TIFF", save_all=True, append_images=others)
    put(Path("made"), Path("cam", name))


def answered(run: Run, count: int) -> dict[str, Record]:
    return {record.id: record for record in (run.next() for _ in range(count))}


def page(number: int, name: str = SCAN) -> str:
    return f"{name}#page={number}"


def ids() -> set[str]:
    return set(by_id(Path("r.jsonl")))


@pytest.mark.parametrize("texts", [("{text} {name}?",), ("{text} [image] What?", "{text}{text}")])
@pytest.mark.parametrize("settings", [WITH_TEXT, PER_DOCUMENT, replace(WITH_TEXT, pages=parse_pages("2,1"))])
def test_records_are_those_of_a_run_and_each_goes_on_with_those_of_the_other(
    worker: Worker, cam: Path, texts: tuple[str, ...], settings: DocumentSettings
) -> None:
    settings = replace(settings, video=VideoSettings(frames=2))
    put_pdf("one", "two")
    put_tiff(RED, BLUE)
    put(RED, cam / "a.png")
    write_video(cam / "clip.avi", "MJPG", 10)
    files = sorted(path for path in cam.iterdir())
    asked = requests_of_items(open_files(files, settings), Questions(texts, None, 24))
    ids = [request.id for request in asked]
    with Run(worker, texts, documents=settings, with_videos=True) as run:
        found = answered(run, len(ids))
    assert set(found) == set(ids) and all(record.error is None for record in found.values())
    assert {request.id: (request.question, [str(image) for image in request.images]) for request in asked} == {
        id: (record.question, [image.path for image in record.images]) for id, record in found.items()
    }
    with ResultsFile.resume(Path("r.jsonl"), (), worker.settings) as file:
        job = worker.job(asked, file.done)
        assert run_job(job, None, file).made == 0 and job.kept == len(ids)
    with Run(worker, texts, documents=settings, with_videos=True) as run:
        run.wait_for(lambda: run.kept == len(ids))
    again = {request.id: [str(image) for image in request.images] for request in run.requests}
    assert again == {id: [image.path for image in record.images] for id, record in found.items()}


def test_a_changed_document_is_asked_about_again_and_what_it_was_is_forgotten(worker: Worker, cam: Path) -> None:
    put_pdf("one", "two", "three")
    with Run(worker, ("{text}?",), documents=WITH_TEXT) as run:
        answered(run, 3)
        put_pdf("one", "2")
        assert run.next().question == "2?"  # the first page is the same
        run.wait_for(lambda: page(3) not in run.file_ids())
        put_tiff(RED)
        assert run.next().id == "cam/fax.tif"
        put_tiff(RED, BLUE)
        assert set(answered(run, 2)) == {page(1, "cam/fax.tif"), page(2, "cam/fax.tif")}
    records = by_id(Path("r.jsonl"))
    assert {id: record["question"] for id, record in records.items()} == {
        page(1): "one?", page(2): "2?", page(1, "cam/fax.tif"): "?", page(2, "cam/fax.tif"): "?"
    }  # fmt: skip


def test_pages_that_a_document_lost_between_two_runs_are_forgotten_and_those_that_are_not_asked_stay(
    worker: Worker, cam: Path
) -> None:
    put_pdf("one", "two", "three")
    put_tiff(RED)
    with Run(worker) as run:
        answered(run, 4)
    put_pdf("one", "two")
    put_tiff(RED, BLUE)
    fax = {page(1, "cam/fax.tif"), page(2, "cam/fax.tif")}
    with Run(worker, documents=replace(DOCUMENTS, pages=parse_pages("2-"))) as run:
        assert run.next().id == page(2, "cam/fax.tif")
        run.wait_for(lambda: run.kept == 1)
    assert ids() == {page(1), page(2), page(2, "cam/fax.tif")}
    with Run(worker, documents=PER_DOCUMENT) as run:
        assert set(answered(run, 2)) == {SCAN, "cam/fax.tif"}
    with Run(worker) as run:
        assert run.next().id == page(1, "cam/fax.tif")
        run.wait_for(lambda: run.kept == 3)
    assert ids() == {page(1), page(2), SCAN, "cam/fax.tif"} | fax


def test_one_that_changes_while_its_pages_are_under_way_is_asked_about_after_them(cam: Path) -> None:
    put_pdf("one", "two")
    requests = WatchedRequests(Watch([cam], watched_suffixes(), **SHORT), ["{text}?"], WITH_TEXT)
    found: Queue[Request] = Queue()
    Thread(target=lambda: deque(map(found.put, requests), 0), daemon=True).start()

    def next_ids(count: int) -> list[str]:
        return [found.get(timeout=GIVE_UP_S).id for _ in range(count)]

    assert next_ids(2) == [page(1), page(2)]
    put_pdf("1", "2")
    del requests.under_way[page(1)]
    for name in "ab":
        put(RED, cam / f"{name}.png")
        assert next_ids(1) == [f"cam/{name}.png"]
    del requests.under_way[page(2)]
    assert [found.get(timeout=GIVE_UP_S).question for _ in range(2)] == ["1?", "2?"]
    requests.watch.close()


def test_what_is_deleted_before_it_is_read_is_passed_over_once(worker: Worker, cam: Path) -> None:
    put(RED, cam / "a.png")
    with Run(worker) as run:
        run.next()
        made = run.requests._requests_of

        def requests_of(item: object) -> Iterator[Request]:
            for request in made(item):  # type: ignore[arg-type]
                (cam / "scan.pdf").unlink(missing_ok=True)
                yield request

        run.requests._requests_of = requests_of  # type: ignore[method-assign]
        put_pdf("one", "two", "three")
        run.wait_for(lambda: not run.requests.under_way and any("had gone" in note for note in run.notes.queue))
        run.requests._requests_of = made  # type: ignore[method-assign]
        put_pdf("one", "two")
        assert set(answered(run, 2)) == {page(1), page(2)}
        assert [note for note in run.notes.queue if "had gone" in note] == [
            f"passed over: {SCAN} had gone before it was read"
        ]
    assert ids() == {"cam/a.png", page(1), page(2)}


@pytest.mark.parametrize("settings", [WITH_TEXT, PER_DOCUMENT])
def test_a_broken_document_is_one_record_until_it_is_mended(
    worker: Worker, cam: Path, settings: DocumentSettings
) -> None:
    put_pdf("one", "two", cut=200)
    with Run(worker, documents=settings) as run:
        broken = run.next()
        assert (broken.id, broken.error) == (SCAN, f"{SCAN}: damaged or incomplete PDF")
        (cam / "scan.pdf").write_bytes(b"no such thing" * 5)
        assert run.next().error == f"{SCAN}: no PDF file, whatever its name says"
    with Run(worker, documents=settings) as run:
        run.wait_for(lambda: run.kept == 1)
        put_pdf("one", "two")
        whole = {SCAN} if settings.per_document else {page(1), page(2)}
        assert set(answered(run, len(whole))) == whole
        run.wait_for(lambda: set(run.file_ids()) == whole)
        put_pdf("one", cut=200)
        assert run.next().error == f"{SCAN}: damaged or incomplete PDF"  # whatever was answered before
    assert ids() == whole | {SCAN}


def test_other_questions_are_refused_though_the_document_has_gone(worker: Worker, cam: Path) -> None:
    put_pdf("one", "two")
    with Run(worker, ("{text}: {name}?",), documents=PER_DOCUMENT) as run:
        assert run.next().question == "one\n\ntwo: scan?"
    (cam / "scan.pdf").unlink()
    for texts in (("{name}: {text}?",), ("{text}: {name}!",), ("What?",), ("Who?", "{text}: {name}")):
        with (
            Run(worker, texts, documents=PER_DOCUMENT) as run,
            pytest.raises(InputError, match="the question was 'one"),
        ):
            run.next()
    with Run(worker, ("{text}: {name}?",), documents=WITH_TEXT) as run:
        put_pdf("one", "two")
        assert set(answered(run, 2)) == {page(1), page(2)}


def test_without_a_reader_a_record_says_what_to_install(
    worker: Worker, cam: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_pdf("one")
    put(RED, cam / "z.png")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pypdfium2", None)
        with Run(worker) as run:
            records = answered(run, 2)
    assert records[SCAN].error == f"{SCAN}: a PDF file needs the package 'pypdfium2', which is not installed"
    assert "pip install 'pixtral[documents]'" in str(records[SCAN].hint)
    assert records["cam/z.png"].error is None
    with Run(worker) as run:
        assert run.next().id == page(1)
    assert ids() == {page(1), "cam/z.png"}


def test_where_sidecars_are_written_a_document_is_one_record_that_says_so(worker: Worker, cam: Path) -> None:
    put_pdf("one", "two")
    put_tiff(RED, BLUE, name="scan.tif")
    put(RED, cam / "scan.png")
    with Run(worker, captions=SidecarSettings()) as run:
        records = answered(run, 3)
        run.wait_for((cam / "scan.txt").exists)
    for id in (SCAN, "cam/scan.tif"):
        assert records[id].error == f"{id}: its picture is no file that a sidecar could go with"
        assert records[id].hint == "save it to a file"
    assert run.sidecars is not None and run.sidecars.outcomes["cam/scan.png"] == "written"
    (cam / "scan.txt").unlink()
    with Run(worker, captions=SidecarSettings()) as run:
        run.wait_for((cam / "scan.txt").exists)
        run.wait_for(lambda: run.kept == 3)
    with Run(worker) as run:
        answered(run, 4)
    assert ids() == {page(n, f"cam/scan.{kind}") for n in (1, 2) for kind in ("pdf", "tif")} | {"cam/scan.png"}
