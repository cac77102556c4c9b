"""Jobs over watched folders: what changes, goes or comes back meanwhile has the right record and sidecar."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from queue import Queue

import pytest

from helpers.bundles import exported
from helpers.job_records import by_id
from helpers.places import DEMO, IMAGES
from helpers.watch_runs import DOCUMENTS, Run, put
from helpers.watching import GIVE_UP_S, SHORT, write_picture
from pixtral_export.plan import ExportSettings
from pixtral_runtime.batch.records import Request, Settings
from pixtral_runtime.batch.sidecars import SidecarSettings
from pixtral_runtime.batch.watched_requests import WatchedRequests
from pixtral_runtime.batch.watched_sidecars import WatchedSidecars
from pixtral_runtime.batch.worker import Worker, WorkerOptions
from pixtral_runtime.errors import InputError
from pixtral_runtime.sources.item import Item
from pixtral_runtime.sources.watch import Watch

RED, BLUE = IMAGES / "red_triangle_64x64.png", IMAGES / "blue_circle_64x64.png"


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Worker:
    bundle = exported(DEMO, tmp_path_factory.mktemp("bundles") / "bundle", ExportSettings(dtype="float32"))
    return Worker(bundle.path, Settings(bundle.fingerprint), WorkerOptions())


def test_replaced_renamed_and_deleted_pictures(worker: Worker, cam: Path) -> None:
    put(RED, cam / "a.png")
    with Run(worker) as run:
        assert "red" in str(run.next().answer)
        put(BLUE, cam / "a.png")
        assert "blue" in str(run.next().answer)
        (cam / "a.png").rename(cam / "b.png")
        again = run.next()
        assert again.id == "cam/b.png"
        assert "blue" in str(again.answer)
        assert again.times_ms == {}  # nobody asked
    records = by_id(Path("r.jsonl"))
    assert {id: "blue" in record["answer"] for id, record in records.items()} == {"cam/a.png": True, "cam/b.png": True}
    with Run(worker) as run:
        run.wait_for(lambda: run.kept == 1)
    assert by_id(Path("r.jsonl")) == records


def test_one_that_changes_while_it_is_worked_on_is_asked_about_after_that(cam: Path) -> None:
    write_picture(cam / "a.png")
    requests = WatchedRequests(Watch([cam], **SHORT), ["What?"], DOCUMENTS)
    found: Queue[Request] = Queue()
    threading.Thread(target=lambda: deque(map(found.put, requests), 0), daemon=True).start()
    assert found.get(timeout=GIVE_UP_S).id == "cam/a.png"
    for number in range(3):
        write_picture(cam / "a.png", ("blue", "green", "black")[number])
        write_picture(cam / f"{number}.png")
        assert found.get(timeout=GIVE_UP_S).id == f"cam/{number}.png"
    del requests.under_way["cam/a.png"]
    assert found.get(timeout=GIVE_UP_S).id == "cam/a.png"
    requests.watch.close()


def test_one_that_has_gone_before_it_is_read_has_no_record_until_it_is_back(worker: Worker, cam: Path) -> None:
    put(RED, cam / "a.png")
    with Run(worker) as run:
        run.next()
        make = run.requests._requests_of

        def requests_of(item: Item) -> Iterator[Request]:
            if not Path("away").exists():
                (cam / "b.png").rename("away")
            return make(item)

        run.requests._requests_of = requests_of  # type: ignore[method-assign]
        put(BLUE, cam / "b.png")
        while "had gone" not in (note := run.notes.get(timeout=GIVE_UP_S)):
            assert "waiting" in note
        put(Path("away"), cam / "b.png")
        assert "blue" in str(run.next().answer)
    assert set(by_id(Path("r.jsonl"))) == {"cam/a.png", "cam/b.png"}


def test_sidecars_that_are_there_stay_and_no_picture_writes_that_of_another(worker: Worker, cam: Path) -> None:
    put(RED, cam / "a.png")
    put(RED, cam / "mine.png")
    (cam / "mine.txt").write_text("mine")
    with Run(worker, captions=SidecarSettings()) as run:
        first = str(run.next().answer)
        run.wait_for((cam / "a.txt").exists)
        put(BLUE, cam / "a.jpg")  # whatever its name says
        clash = run.next()
        assert clash.error == "cam/a.jpg: cam/a.png has the sidecar cam/a.txt already"
        assert clash.hint == "rename one of the pictures"
        assert (cam / "a.txt").read_text() == first
        put(BLUE, cam / "a.png")
        second = str(run.next().answer)
        assert "blue" in second
    assert run.sidecars is not None
    assert run.sidecars.outcomes == {"cam/a.png": "written", "cam/mine.png": "skipped", "cam/a.jpg": "withheld"}
    assert (cam / "a.txt").read_text() == second != first
    assert (cam / "mine.txt").read_text() == "mine"
    assert by_id(Path("r.jsonl"))["cam/a.jpg"].get("sidecar") is None
    (cam / "a.txt").unlink()
    with Run(worker, captions=SidecarSettings()) as run:
        run.wait_for((cam / "a.txt").exists)
        run.wait_for(lambda: run.kept == 2)
        (cam / "a.png").unlink()
        (cam / "a.txt").unlink()
        (cam / "a.jpg").rename(cam / "a.JPG")
        assert "blue" in str(run.next().answer)
        assert (cam / "a.txt").exists()


def test_a_picture_that_comes_back_gets_its_sidecar_again_without_being_asked_about(worker: Worker, cam: Path) -> None:
    put(RED, cam / "a.png")
    with Run(worker, captions=SidecarSettings()) as run:
        answer = run.next().answer
        for name in ("a.png", "a.txt"):
            run.wait_for((cam / name).exists)
            (cam / name).unlink()
        put(BLUE, cam / "b.png")
        run.next()
        put(RED, cam / "a.png")
        run.wait_for((cam / "a.txt").exists)
        assert (cam / "a.txt").read_text() == answer
        assert run.kept == 0


def test_a_changed_picture_is_asked_about_with_the_tags_of_before_its_own_caption(worker: Worker, cam: Path) -> None:
    put(RED, cam / "a.png")
    (cam / "a.txt").write_text("sharp")
    captions = SidecarSettings(existing="append")
    with Run(worker, ("{tags}?",), captions) as run:
        first = run.next()
        assert first.question == "sharp?"
        put(BLUE, cam / "a.png")
        second = run.next()
        assert second.question == "sharp?"
        (cam / "b.txt").write_bytes(b"\xff")
        put(RED, cam / "b.png")
        assert "not UTF-8" in str(run.next().error)
    assert (cam / "a.txt").read_text() == f"sharp, {second.answer}" != f"sharp, {first.answer}"
    (cam / "b.txt").write_text("blunt")
    with Run(worker, ("{tags}?",), captions) as run:
        assert run.next().question == "blunt?"
    assert (cam / "b.txt").read_text().startswith("blunt, ")


def test_answers_to_something_else_are_refused_though_their_pictures_have_gone(worker: Worker, cam: Path) -> None:
    put(RED, cam / "a.png")
    with Run(worker, captions=SidecarSettings()) as run:
        run.next()
    (cam / "a.png").unlink()
    for texts in (("Where is it?",), ("Where is it?", "Who?")):
        with Run(worker, texts) as run, pytest.raises(InputError, match="the question was 'Describe this"):
            run.next()
    with Run(worker, captions=SidecarSettings(prefix="TOK ")) as run, pytest.raises(InputError, match="otherwise"):
        run.next()
    with Run(worker) as run:
        put(RED, cam / "b.png")
        assert run.next().id == "cam/b.png"


def test_the_first_of_them_and_no_parts(cam: Path) -> None:
    for name in "abc":
        write_picture(cam / f"{name}.png")
    watch = Watch([cam], **SHORT)
    assert [request.id for request in WatchedRequests(watch, ["A?", "B?"], DOCUMENTS, limit=3)] == [
        *("cam/a.png#1", "cam/a.png#2", "cam/b.png#1")
    ]
    with pytest.raises(TypeError):
        WatchedRequests(watch, ["A?"], DOCUMENTS)[1:]
    with pytest.raises(InputError, match="asked 2 questions"):
        WatchedRequests(watch, ["A?", "B?"], DOCUMENTS, sidecars=WatchedSidecars(SidecarSettings(), watch))
