"""Captions beside pictures: what is written where, what is left alone, and that a killed run repeats nothing."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from helpers.captions import calls_of, caption, caption_and_die
from helpers.job_records import by_id
from helpers.results import answered, failed
from pixtral_runtime.batch.item_requests import requests_of_images
from pixtral_runtime.batch.record_lines import read_results
from pixtral_runtime.batch.records import Record
from pixtral_runtime.batch.sidecars import SidecarSettings, sidecar_places
from pixtral_runtime.errors import InputError

RESULTS = Path("results.jsonl")
APPEND = SidecarSettings(existing="append")


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder is the one above."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos" / "sub").mkdir(parents=True)
    for name in ("a.jpg", "b.png", "sub/c.jpg"):
        (tmp_path / "photos" / name).write_text(name)
    return Path("photos")


def sidecars_in(folder: Path, ending: str = ".txt") -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_bytes().decode() for path in folder.rglob(f"*{ending}")}


def cut_off(id: str) -> Record:
    return replace(answered(requests_of_images([Path(id)], ["What?"], None, 8)[0]), finish_reason="length")


def blank(id: str) -> Record:
    return replace(cut_off(id), answer=" \n", finish_reason="stop")


def unanswered(id: str) -> Record:
    return failed(requests_of_images([Path(id)], ["What?"], None, 8)[0])


def kohya_caption(picture: Path, caption_extension: str) -> str:
    """What kohya's sd-scripts train on: `read_caption` in library/train_util.py.

    The file is the picture's path with another extension, UTF-8, not empty; its first line counts, stripped.
    """
    lines = Path(os.path.splitext(picture)[0] + caption_extension).read_text(encoding="utf-8").splitlines(True)
    assert lines
    return lines[0].strip()


@pytest.mark.parametrize("ending", [".txt", ".caption", ".joy.txt"])
def test_a_caption_is_one_line_where_kohya_looks_for_it(photos: Path, ending: str) -> None:
    _, sidecars = caption(RESULTS, SidecarSettings(ending, prefix="TOK, ", suffix="!"))
    for picture in ("a.jpg", "b.png", "sub/c.jpg"):
        assert kohya_caption(photos / picture, ending) == f"TOK, a caption of {Path(picture).stem}!"
    assert sidecars.summary()["written"] == len(sidecars_in(photos, ending)) == 3


def test_a_caption_stays_as_it_was_written_if_asked_for(photos: Path) -> None:
    caption(RESULTS, SidecarSettings(as_written=True))
    assert (photos / "a.txt").read_bytes() == b"a caption\nof a"


def test_tags_and_captions_share_a_line_in_the_order_asked_for(photos: Path) -> None:
    (photos / "a.txt").write_bytes(b"\xef\xbb\xbfone, two,\r\n")
    caption(RESULTS, APPEND)
    assert kohya_caption(photos / "a.jpg", ".txt") == "one, two, a caption of a"
    assert (photos / "b.txt").read_text() == "a caption of b"
    RESULTS.unlink()
    caption(RESULTS, SidecarSettings(existing="prepend"), answers={"photos/a.jpg": "new"})
    assert (photos / "a.txt").read_text() == "new, one, two, a caption of a"


def test_what_is_left_as_written_is_joined_by_a_line_break(photos: Path) -> None:
    (photos / "a.txt").write_text("one\ntwo\n")
    caption(RESULTS, replace(APPEND, as_written=True))
    assert (photos / "a.txt").read_text() == "one\ntwo\na caption\nof a"


def test_a_picture_with_a_sidecar_is_not_asked_about(photos: Path) -> None:
    (photos / "a.txt").write_text("mine")
    asked, sidecars = caption(None)
    assert asked == ["photos/b.png", "photos/sub/c.jpg"]
    assert (photos / "a.txt").read_text() == "mine"
    assert (sidecars.summary()["skipped"], sidecars.summary()["written"]) == (1, 2)
    assert caption(None)[0] == []


def test_a_sidecar_that_appears_meanwhile_is_not_replaced(photos: Path) -> None:
    results = read_results_after(photos, "changed meanwhile")
    assert (photos / "a.txt").read_text() == "changed meanwhile"
    assert results["photos/a.jpg"].sidecar is None
    assert caption(RESULTS)[0] == []
    assert (photos / "a.txt").read_text() == "changed meanwhile"


def read_results_after(photos: Path, text: str) -> dict[str, Record]:
    """The records of a run during which somebody writes a sidecar."""

    class Late(dict[str, str]):
        def get(self, key: str, default: str | None = None) -> str | None:  # type: ignore[override]
            if key == "photos/a.jpg":
                (photos / "a.txt").write_text(text)
            return default

    caption(RESULTS, answers=Late())
    return read_results(RESULTS).records


def test_overwriting_replaces_what_was_there_in_any_bytes(photos: Path) -> None:
    (photos / "a.txt").write_bytes(b"\xff")
    caption(RESULTS, SidecarSettings(existing="overwrite"))
    assert (photos / "a.txt").read_text() == "a caption of a"


@pytest.mark.parametrize("existing", ["skip", "overwrite", "append", "prepend"])
@pytest.mark.parametrize("make", [cut_off, unanswered, blank])
def test_an_answer_that_is_not_whole_touches_no_file(
    photos: Path, existing: str, make: Callable[[str], Record]
) -> None:
    (photos / "b.txt").write_text("mine")
    answers = {id: make(id) for id in ("photos/a.jpg", "photos/b.png")}
    _, sidecars = caption(RESULTS, SidecarSettings(existing=existing), answers=answers)
    assert sidecars_in(photos) == {"b.txt": "mine", "sub/c.txt": "a caption of c"}
    assert sidecars.summary()["withheld"] == (1 if existing == "skip" else 2)


def test_sidecars_that_are_missing_are_written_from_the_records(photos: Path) -> None:
    (photos / "a.txt").write_text("tag")
    caption(RESULTS, APPEND)
    whole, records = sidecars_in(photos), by_id(RESULTS)
    for path in photos.rglob("*.txt"):
        path.unlink()
    asked, sidecars = caption(RESULTS, APPEND)
    assert (asked, sidecars_in(photos), by_id(RESULTS)) == ([], whole, records)
    assert sidecars.summary()["written"] == 3
    assert caption(RESULTS, APPEND)[1].summary()["kept"] == 3
    assert sidecars_in(photos) == whole


def test_records_of_a_run_without_sidecars_get_them(photos: Path) -> None:
    caption(RESULTS, SidecarSettings(".other"))
    (photos / "a.txt").write_text("tag")
    for _ in range(2):
        assert caption(RESULTS, APPEND)[0] == []
        assert (photos / "a.txt").read_text() == "tag, a caption of a"


def test_what_somebody_changed_since_stays(photos: Path) -> None:
    caption(RESULTS, SidecarSettings(existing="overwrite"))
    (photos / "a.txt").write_text("better")
    asked, sidecars = caption(RESULTS, SidecarSettings(existing="overwrite"))
    assert asked == []
    assert (photos / "a.txt").read_text() == "better"
    assert sidecars.summary()["changed"] == 1


@pytest.mark.parametrize("existing", ["skip", "append"])
def test_another_picture_under_the_name_replaces_its_own_caption_only(photos: Path, existing: str) -> None:
    settings = SidecarSettings(existing=existing)
    (photos / "a.txt").write_text("tag") if existing == "append" else None
    before = "tag, " if existing == "append" else ""
    caption(RESULTS, settings)
    (photos / "a.jpg").write_text("another picture")
    assert caption(RESULTS, settings, answers={"photos/a.jpg": cut_off("photos/a.jpg")})[0] == ["photos/a.jpg"]
    assert (photos / "a.txt").read_text() == f"{before}a caption of a"
    (photos / "a.jpg").write_text("a third one")
    caption(RESULTS, settings, answers={"photos/a.jpg": "new"})
    assert (photos / "a.txt").read_text() == f"{before}new"


def test_captions_that_would_be_written_otherwise_are_refused(photos: Path) -> None:
    caption(RESULTS, APPEND)
    with pytest.raises(InputError, match=r"photos/a\.txt was to hold 'a caption of a'"):
        caption(RESULTS, replace(APPEND, prefix="TOK "))


def test_nothing_is_added_to_what_is_no_text(photos: Path) -> None:
    (photos / "b.txt").write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"photos/b\.txt is not UTF-8"):
        caption(RESULTS, APPEND)


def test_a_folder_of_sidecars_repeats_the_sub_folders_of_each_folder_named(photos: Path) -> None:
    Path("loose").mkdir()
    for name in ("d.jpg", "e.jpg"):
        (Path("loose") / name).write_text(name)
    caption(RESULTS, SidecarSettings(folder=Path("new/captions")), ("photos", "loose/d.jpg", "loose/*.jpg"))
    assert sorted(sidecars_in(Path("new/captions"))) == ["a.txt", "b.txt", "d.txt", "e.txt", "sub/c.txt"]
    assert not list(photos.rglob("*.txt"))


def test_pictures_that_would_share_a_sidecar_are_named_before_the_work(photos: Path) -> None:
    (photos / "a.png").write_text("")
    with pytest.raises(InputError, match=r"share a sidecar: photos/a\.jpg and photos/a\.png"):
        caption(RESULTS)
    for index in range(5):
        for kind in ("jpg", "png"):
            (photos / f"{index}.{kind}").write_text("")
    with pytest.raises(InputError, match=r"0\.jpg .*1\.jpg .*2\.jpg .*; and 3 more$"):
        caption(RESULTS, shard=(1, 2))
    settings = SidecarSettings(folder=Path("captions"))
    shutil.copy("photos/sub/c.jpg", "c.jpg")
    with pytest.raises(InputError, match=r"photos/sub/c\.jpg and c\.jpg"):
        caption(RESULTS, settings, ("photos/sub", "c.jpg"))
    assert not RESULTS.exists()


def test_a_sidecar_is_of_one_question_about_one_picture_in_a_file() -> None:
    two = requests_of_images([Path("a.png")], ["What?", "Where?"], None, 8)
    with pytest.raises(InputError, match=r"a\.png is asked 2 questions"):
        sidecar_places(two, APPEND, {})
    first = two[0].messages[0]
    for content in (("What?",), (Path("a.png"), Path("b.png"), "What?")):
        request = replace(two[0], messages=(replace(first, content=content),))
        with pytest.raises(InputError, match=f"{len(content) - 1} pictures"):
            sidecar_places([request], APPEND, {})


@pytest.mark.parametrize("ending", ["txt", ".", "", ".a/b", ".png", ".JPG"])
def test_a_suffix_that_names_no_sidecar_is_refused(ending: str) -> None:
    with pytest.raises(InputError, match="suffix"):
        SidecarSettings(ending)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_shards_write_the_sidecars_of_the_whole(photos: Path, count: int) -> None:
    (photos / "b.txt").write_text("tag")
    for index in range(1, count + 1):
        caption(Path(f"{index}.jsonl"), APPEND, shard=(index, count))
    assert sidecars_in(photos) == {
        "a.txt": "a caption of a",
        "b.txt": "tag, a caption of b",
        "sub/c.txt": "a caption of c",
    }


@pytest.mark.parametrize(("existing", "kills"), [("append", 20), ("prepend", 5), ("overwrite", 5), ("skip", 5)])
def test_a_run_killed_again_and_again_writes_the_sidecars_of_an_undisturbed_one(
    tmp_path: Path, existing: str, kills: int
) -> None:
    settings = SidecarSettings(existing=existing, prefix="TOK, ")
    for name in ("whole", "killed"):
        (tmp_path / name / "photos").mkdir(parents=True)
        for index in range(30):
            (tmp_path / name / "photos" / f"{index:02}.jpg").write_text(str(index))
            if index % 3 == 0:
                (tmp_path / name / "photos" / f"{index:02}.txt").write_text(f"tag {index}")
    calls = calls_of(tmp_path / "whole", settings)
    context, rng, died = multiprocessing.get_context("forkserver"), random.Random(0), 0
    context.set_forkserver_preload(["helpers.captions"])
    for _ in range(kills):
        arguments = tmp_path / "killed", settings, rng.randrange(1, calls // 4)
        run = context.Process(target=caption_and_die, args=arguments)
        run.start()
        run.join(60)
        died += run.exitcode == -signal.SIGKILL
    assert died == kills, "the job was over before the last kill"
    calls_of(tmp_path / "killed", settings)
    assert sidecars_in(tmp_path / "killed") == sidecars_in(tmp_path / "whole")
    assert by_id(tmp_path / "killed" / RESULTS) == by_id(tmp_path / "whole" / RESULTS)
