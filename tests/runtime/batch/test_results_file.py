"""A results file through crashes, power losses and repeated runs."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.results import REQUESTS, SETTINGS, TEXTS, answered, failed
from pixtral_runtime.batch.item_requests import requests_of_images
from pixtral_runtime.batch.record_lines import read_results
from pixtral_runtime.batch.records import Request, Settings
from pixtral_runtime.batch.results_file import ResultsFile
from pixtral_runtime.errors import InputError, MachineError


def resume(path: Path, requests: Iterable[Request] = REQUESTS, settings: Settings = SETTINGS) -> ResultsFile:
    return ResultsFile.resume(path, requests, settings)


def ids(path: Path) -> list[str]:
    """Of every line."""
    return [json.loads(line)["id"] for line in path.read_bytes().decode().split("\n")[:-1]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of two results, for a.png and b.png."""
    with ResultsFile.create(tmp_path / "new" / "r.jsonl") as file:
        for request in REQUESTS[:2]:
            file.append(answered(request))
    return tmp_path / "new" / "r.jsonl"


def test_a_record_is_on_its_line_as_soon_as_it_is_appended(tmp_path: Path) -> None:
    with ResultsFile.create(tmp_path / "r.jsonl") as file:
        for count, request in enumerate(REQUESTS, start=1):
            file.append(answered(request, "line\nbreak"))
            assert ids(tmp_path / "r.jsonl") == [r.id for r in REQUESTS[:count]]
        assert list(file.done) == [r.id for r in REQUESTS]
    assert list(tmp_path.iterdir()) == [tmp_path / "r.jsonl"]


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    odd = replace(REQUESTS[0], id=os.fsdecode(b"not \xff UTF-8.png"))
    written = [answered(replace(odd, id=odd.id + str(n)), text) for n, text in enumerate(TEXTS)]
    with ResultsFile.create(tmp_path / "r.jsonl") as file:
        for record in written:
            file.append(record)
    assert list(read_results(tmp_path / "r.jsonl").records.values()) == written


def test_a_new_file_never_replaces_one_unless_forced(path: Path) -> None:
    with pytest.raises(InputError, match="exists") as caught:
        ResultsFile.create(path)
    assert "force" in [option.name for option in caught.value.options]
    assert ids(path) == ["a.png", "b.png"]
    with ResultsFile.create(path, force=True) as file:
        file.append(answered(REQUESTS[2]))
    assert ids(path) == ["c.png"]


def test_a_run_that_fails_before_its_first_record_leaves_no_file(tmp_path: Path, path: Path) -> None:
    for opened in (ResultsFile.create(tmp_path / "r.jsonl"), resume(path)):
        with pytest.raises(MachineError), opened:
            raise MachineError("no memory")
    assert not (tmp_path / "r.jsonl").exists()
    assert ids(path) == ["a.png", "b.png"]


def test_resuming_finds_what_is_done_and_goes_on(path: Path) -> None:
    with resume(path) as file:
        assert dict(file.done) == {r.id: answered(r) for r in REQUESTS[:2]}
        file.append(answered(REQUESTS[2]))
    assert ids(path) == ["a.png", "b.png", "c.png"]


def test_resuming_begins_a_file_that_is_not_there(tmp_path: Path) -> None:
    with resume(tmp_path / "deep" / "r.jsonl") as file:
        assert not file.done
        file.append(answered(REQUESTS[0]))
    assert ids(tmp_path / "deep" / "r.jsonl") == ["a.png"]


@pytest.mark.parametrize(
    "tail",
    [
        b'{"id": "c.png", "question": "Wh',
        b'{"id": "c.p\n',
        b"{",
        b"\0" * 4096,
        b'{"id": "c.png", "ques' + b"\0" * 100 + b"\n",
        b'\0\0\0\0ing", "error": null}\n{"id": "d.png", "quest\n\0\0\0',
        '{"id": "ü'.encode()[:-1],
        b"[" * 100_000,
        b"\n\n",
    ],
)
def test_what_a_crash_left_at_the_end_is_cut_off(path: Path, tail: bytes) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    with resume(path) as file:
        assert list(file.done) == ["a.png", "b.png"]
        file.append(answered(REQUESTS[2]))
    assert path.read_bytes().rstrip(b"\n").startswith(whole)
    assert list(read_results(path).records) == ["a.png", "b.png", "c.png"]
    assert read_results(path).torn == 0


@pytest.mark.parametrize("start", [b'{"id', b'{"id": "a.png", "que', b"\0\0\0", b"\0\0\n\0"])
def test_a_file_torn_in_its_first_record_begins_again(path: Path, start: bytes) -> None:
    path.write_bytes(start)
    with resume(path) as file:
        file.append(answered(REQUESTS[0]))
    assert ids(path) == ["a.png"]


def test_every_place_where_a_crash_may_cut_the_file_can_be_resumed(path: Path) -> None:
    whole = path.read_bytes()
    first = whole.index(b"\n")
    for length in {*range(0, len(whole), 11), first - 1, first, first + 1, len(whole) - 1}:
        path.write_bytes(whole[:length])
        with resume(path) as file:
            assert len(file.done) == (length >= first) + (length == len(whole) - 1)


def test_a_last_record_without_its_line_break_is_kept(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])
    with resume(path) as file:
        file.append(answered(REQUESTS[2]))
    assert ids(path) == ["a.png", "b.png", "c.png"]


def test_damage_before_the_end_is_refused_with_its_line(path: Path) -> None:
    first, second = path.read_bytes().splitlines(keepends=True)
    damaged = first + second[:40] + b"\n" + second
    path.write_bytes(damaged)
    with pytest.raises(InputError, match="line 2: damaged") as caught:
        resume(path)
    assert caught.value.hint.startswith(f"sed -i 2d {path}")
    assert path.read_bytes() == damaged
    path.write_bytes(first + second)
    resume(path).close()


@pytest.mark.parametrize(
    "content",
    [
        b"precious notes\n",
        b"\nprecious notes",
        b'{"id": "1", "prompt": "a file of requests"}\n',
        b'{"id": "1", "images": 3}\n',
        b'{"id": ["1"], "question": "", "asked": ""}\n',
        b"[1, 2]\n",
        b"3\n",
        b'"id, images"',
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
        b"\0\0\1\0\1\0 an icon",
    ],
)
def test_another_kind_of_file_is_refused_and_kept(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "r.jsonl").write_bytes(content)
    with pytest.raises(InputError, match="is no results file: line"):
        resume(tmp_path / "r.jsonl")
    assert (tmp_path / "r.jsonl").read_bytes() == content


@pytest.mark.parametrize(
    ("requests", "settings", "words"),
    [
        (REQUESTS, replace(SETTINGS, temperature=0.5, exif=False),
         "exif was true and is false, temperature was 0.0 and is 0.5"),
        (REQUESTS, Settings("other"), 'bundle was "fingerprint" and is "other"'),
        ([], replace(SETTINGS, preprocess="hf"), 'preprocess was "mistral" and is "hf"'),
        (requests_of_images([Path("b.png")], ["Where?"], None, 8), SETTINGS,
         "something else for b.png: the question was 'What?' and is 'Where?'"),
        (requests_of_images([Path("a.png")], ["What?"], None, 9), SETTINGS, "the number of new tokens"),
        (requests_of_images([Path("a.png")], ["What?"], "Be brief.", 8), SETTINGS, "the system prompt"),
        (requests_of_images([Path("a.png")], ["Where?", "Why?"], None, 8), SETTINGS,
         "the answer to 'What?' for a.png, which is not asked"),
    ],
)  # fmt: skip
def test_answers_to_something_else_are_refused_with_what_changed(
    path: Path, requests: list[Request], settings: Settings, words: str
) -> None:
    before = path.read_bytes()
    with pytest.raises(InputError) as caught:
        resume(path, requests, settings)
    assert words in str(caught.value)
    assert "output" in [option.name for option in caught.value.options]
    assert "force" in [option.name for option in caught.value.options]
    assert path.read_bytes() == before
    resume(path).close()


def test_records_of_other_requests_stay(path: Path) -> None:
    with resume(path, REQUESTS[2:]) as file:
        file.append(answered(REQUESTS[2]))
    assert ids(path) == ["a.png", "b.png", "c.png"]


def test_an_answer_to_one_of_several_questions_is_refused_where_one_is_asked(tmp_path: Path) -> None:
    both = requests_of_images([Path("a.png"), Path("z.png")], ["What?", "Where?"], None, 8)
    with ResultsFile.create(tmp_path / "r.jsonl") as file:
        for request in both:
            file.append(answered(request))
    with pytest.raises(InputError, match=r"the answer to 'Where\?' for a.png, which is not asked"):
        resume(tmp_path / "r.jsonl", both[:1])
    resume(tmp_path / "r.jsonl", both[:2]).close()  # fewer pictures are another matter


def test_a_later_record_takes_the_place_of_an_earlier_one(path: Path) -> None:
    with resume(path) as file:
        file.append(failed(REQUESTS[0]))
        file.append(answered(REQUESTS[2]))
        file.append(answered(REQUESTS[0], "A dog."))
        assert ids(path) == ["a.png", "b.png", "a.png", "c.png", "a.png"]
    assert ids(path) == ["b.png", "c.png", "a.png"]
    assert read_results(path).records["a.png"].answer == "A dog."
    assert list(path.parent.iterdir()) == [path]


def test_superseded_lines_that_a_crash_left_go_when_resuming(path: Path) -> None:
    path.write_bytes(path.read_bytes() * 2)
    assert read_results(path).superseded == 2
    resume(path).close()
    assert ids(path) == ["a.png", "b.png"]


def test_a_link_stays_a_link_when_its_file_is_rewritten(path: Path) -> None:
    path.write_bytes(path.read_bytes() * 2)
    link = path.with_name("link.jsonl")
    link.symlink_to(path.name)
    resume(link).close()
    assert link.is_symlink()
    assert ids(path) == ["a.png", "b.png"]


def test_two_runs_never_write_one_file(path: Path) -> None:
    with resume(path):
        for open_again in (resume, lambda p: ResultsFile.create(p, force=True)):
            with pytest.raises(InputError, match="is being written by another run"):
                open_again(path)
    assert ids(path) == ["a.png", "b.png"]
    with resume(path) as file:
        file.append(answered(REQUESTS[2]))


def test_the_lock_holds_after_a_repair(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"{")
    with resume(path), pytest.raises(InputError, match="another run"):
        resume(path)


@pytest.mark.parametrize("is_replaced", [True, False])
def test_a_file_that_vanishes_while_it_is_locked_is_opened_again(
    path: Path, monkeypatch: pytest.MonkeyPatch, is_replaced: bool
) -> None:
    flock, calls = fcntl.flock, list[int]()

    def late(file: Any, how: int) -> None:
        calls.append(how)
        if len(calls) == 1:  # as another run's repair, or the user, between opening and locking
            path.rename(path.with_name("old"))
            if is_replaced:
                path.write_bytes(path.with_name("old").read_bytes())
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with resume(path) as file:
        file.append(answered(REQUESTS[2]))
        with pytest.raises(InputError, match="another run"):
            resume(path)
    assert ids(path) == (["a.png", "b.png", "c.png"] if is_replaced else ["c.png"])
    assert ids(path.with_name("old")) == ["a.png", "b.png"]


def append_and_die(path: Path) -> None:
    """A run that is killed between two records."""
    file = resume(path)
    file.append(answered(REQUESTS[2]))
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_run_loses_nothing_and_leaves_no_lock(path: Path) -> None:
    run = multiprocessing.get_context("spawn").Process(target=append_and_die, args=(path,))
    run.start()
    run.join(60)
    assert run.exitcode == -signal.SIGKILL
    with resume(path) as file:
        assert list(file.done) == ["a.png", "b.png", "c.png"]


def test_the_disk_is_asked_at_most_once_a_second_and_at_the_end(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, syncs, fsync = [100.0], list[float](), os.fsync

    def counted(number: int) -> None:
        syncs.append(now[0])
        fsync(number)

    monkeypatch.setattr("pixtral_runtime.batch.results_file.time.monotonic", lambda: now[0])
    monkeypatch.setattr(os, "fsync", counted)
    with resume(path, []) as file:
        for step in range(12):
            now[0] = 100 + step / 4
            file.append(answered(replace(REQUESTS[0], id=str(step))))
        assert syncs == [101.0, 102.0]
    assert syncs == [101.0, 102.0, 102.75]


def test_a_full_disk_leaves_no_half_record(path: Path) -> None:
    whole, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    with resume(path) as file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 100, limits[1]))
        try:
            with pytest.raises(InputError, match="too large"):
                file.append(answered(REQUESTS[2]))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert path.read_bytes() == whole
        assert list(file.done) == ["a.png", "b.png"]
        file.append(answered(REQUESTS[2]))
    assert ids(path) == ["a.png", "b.png", "c.png"]


@pytest.mark.parametrize("place", ["file/r.jsonl", "folder", "pipe"])
def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for open_place in (lambda p: ResultsFile.create(p, force=True), resume):
        with pytest.raises(InputError, match="cannot be written") as caught:
            open_place(tmp_path / place)
        assert caught.value.options[0].name == "output"
    with pytest.raises(InputError, match="cannot be read"):
        read_results(tmp_path / "nowhere.jsonl")


def test_forcing_keeps_the_old_results_until_there_is_a_new_record(path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(ZeroDivisionError), ResultsFile.create(path, force=True):
        raise ZeroDivisionError  # as where the model cannot be loaded
    assert path.read_bytes() == before
    ResultsFile.create(path, force=True).close()
    assert path.read_bytes() == before
    with ResultsFile.create(path, force=True) as file:
        assert not file.done
        file.append(answered(REQUESTS[2]))
        assert ids(path) == ["c.png"]
        with pytest.raises(InputError, match="another run"):
            resume(path)
        file.append(answered(REQUESTS[0]))
    assert ids(path) == ["c.png", "a.png"]


def cut(path: Path) -> None:
    os.truncate(path, 5)


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"a note\n")


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: shutil.rmtree(path.parent), cut, lengthen])
def test_an_output_that_vanishes_or_is_changed_is_written_again(path: Path, harm: Callable[[Path], None]) -> None:
    folder = path.parent / "folder"
    folder.mkdir()
    path = path.rename(folder / path.name)
    with resume(path) as file:
        harm(path)
        file.append(answered(REQUESTS[2]))
        assert ids(path) == ["a.png", "b.png", "c.png"]
        with pytest.raises(InputError, match="another run"):
            resume(path)
        harm(path)
    assert ids(path) == ["a.png", "b.png", "c.png"]


def test_records_are_saved_beside_a_file_that_took_the_place_of_theirs(path: Path) -> None:
    with resume(path) as file:
        path.unlink()
        path.write_text("mine")
        with pytest.raises(InputError, match="replaced by another file") as caught:
            file.append(answered(REQUESTS[2]))
    assert path.read_text() == "mine"
    (saved,) = set(path.parent.iterdir()) - {path}
    assert ids(saved) == ["a.png", "b.png", "c.png"]
    assert str(saved) in str(caught.value)


def test_a_flip_anywhere_in_a_record_is_damage_or_harmless(path: Path) -> None:
    """A letter of an answer that a disk has changed would be an answer like any other."""
    before, data = read_results(path).records, path.read_bytes()
    end = data.index(b"\n") + 1
    chosen, found = random.Random(0), 0
    for place in chosen.sample(range(end), 200):
        flipped = bytearray(data)
        flipped[place] ^= 1 << chosen.randrange(8)
        path.write_bytes(flipped)
        try:
            contents = read_results(path)
            kept = {id: before[id] for id in contents.records}
            assert contents.records == kept and (contents.torn or kept == before)
        except InputError as error:
            assert "damaged" in str(error) or "is not a record" in str(error)
            found += 1
    assert found > 150


def test_a_record_without_a_seal_is_read(path: Path) -> None:
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    path.write_text("".join(json.dumps({k: v for k, v in line.items() if k != "seal"}) + "\n" for line in lines))
    assert ids(path) == list(read_results(path).records)
