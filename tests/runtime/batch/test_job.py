"""Jobs: a record for each request, broken files that stop nothing, and what was done before left alone."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from helpers.bundles import export_tiny
from helpers.small_memory import Small
from helpers.tiny import tiny_config, write_checkpoint
from pixtral_cli.output import hint_of
from pixtral_runtime import Message, Model, load
from pixtral_runtime.batch.fit import (
    MOST_DEVICE_SLOTS,
    MOST_SLOTS,
    SHARE_FOR_CACHES,
    check_fit,
    choose_slots,
    most_rows,
)
from pixtral_runtime.batch.job import Job, JobOptions
from pixtral_runtime.batch.record_store import RecordStore
from pixtral_runtime.batch.records import Record, Request, Settings
from pixtral_runtime.batch.under_way import UnderWay
from pixtral_runtime.errors import InputError, MachineError, Option
from pixtral_runtime.inputs.conversation import user_message
from pixtral_runtime.inputs.image import decode_image

DEFAULT = JobOptions()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("checkpoint"), tiny_config())
    return load(export_tiny(checkpoint, tmp_path_factory.mktemp("bundles") / "bundle", dtype="float32"))


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    for name, size in (("a.png", (40, 20)), ("c.jpg", (500, 300))):
        Image.linear_gradient("L").resize(size).convert("RGB").save(tmp_path / name)
    (tmp_path / "b.png").write_bytes(b"not a picture")
    return [tmp_path / name for name in ("a.png", "b.png", "c.jpg", "gone.png")]


def asked(paths: Sequence[Path], question: str = "What is this?", limit: int = 5) -> list[Request]:
    return [Request(str(path), user_message(question, [path]), limit) for path in paths]


def settings(model: Model) -> Settings:
    return Settings(model.bundle.fingerprint)


def run(model: Model, requests: Sequence[Request], options: JobOptions = DEFAULT) -> dict[str, Record]:
    records = list(Job(model, requests, settings(model), options).records())
    assert len({record.id for record in records}) == len(records)
    return {record.id: record for record in records}


def content(record: Record) -> tuple[object, ...]:
    """What two runs of one job must agree in: all but times, and what happened to lie in a slot."""
    return tuple(value for name, value in record.to_dict().items() if name not in ("times_ms", "reused_tokens"))


@pytest.mark.parametrize("slots", [1, 3])
def test_each_request_gets_a_record(model: Model, pictures: list[Path], slots: int) -> None:
    records = run(model, asked(pictures), JobOptions(slots=slots))
    assert set(records) == {str(path) for path in pictures}
    assert [records[str(path)].error is None for path in pictures] == [True, False, True, False]
    first = records[str(pictures[0])]
    image = first.images[0]
    assert (image.width, image.height, first.image_tokens) == (40, 20, (3 + 1) * 2)
    assert image.sha256 == hashlib.sha256(pictures[0].read_bytes()).hexdigest()
    assert first.settings["bundle"] == model.bundle.fingerprint
    assert set(first.times_ms) == {"image", "preprocess", "vision", "prefill", "decode"}
    expected = model.generate("What is this?", [pictures[0]], max_new_tokens=5)
    assert (first.answer, first.finish_reason) == (expected.text, expected.finish_reason)
    broken, gone = records[str(pictures[1])], records[str(pictures[3])]
    assert str(pictures[1]) in str(broken.error)
    assert broken.hint
    assert broken.answer is None
    assert (broken.key is None, gone.key is None) == (False, True)


def test_several_images_and_turns_reach_the_model(model: Model, pictures: list[Path]) -> None:
    good = [pictures[0], pictures[2]]
    turns = (Message("user", (*good, "Which?")), Message("assistant", ("Both.",)), Message("user", ("Why?",)))
    record = run(model, [Request("7", turns, 6)])["7"]
    assert record.answer == model.generate(turns, max_new_tokens=6).text
    assert [image.path for image in record.images] == [str(path) for path in good]
    assert record.question == "Why?"


def test_keys_follow_content_question_and_settings_not_names(model: Model, pictures: list[Path]) -> None:
    copy = pictures[0].with_name("copy.png")
    copy.write_bytes(pictures[0].read_bytes())
    records = run(model, asked([pictures[0], copy, pictures[2]]))
    keys = [records[str(path)].key for path in (pictures[0], copy, pictures[2])]
    assert keys[0] == keys[1] != keys[2]
    assert run(model, asked([copy], "Why?"))[str(copy)].key != keys[1]
    assert run(model, asked([copy], limit=6))[str(copy)].key != keys[1]
    other = Job(model, asked([copy]), replace(settings(model), exif=False))
    assert next(other.records()).key != keys[1]


def test_equal_pictures_of_a_folder_are_drawn_for_apart_and_the_same_way_again(
    model: Model, pictures: list[Path]
) -> None:
    copies = [pictures[0].with_name(f"copy{n}.png") for n in range(4)]
    for copy in copies:
        copy.write_bytes(pictures[0].read_bytes())
    drawn = replace(settings(model), temperature=5.0, top_p=1.0, seed=3)

    def answers(paths: list[Path]) -> dict[str, str | None]:
        return {record.id: record.answer for record in Job(model, asked(paths), drawn).records()}

    first = answers(copies)
    assert len(set(first.values())) == 4
    assert answers(copies[:1:-1]) == {str(copy): first[str(copy)] for copy in copies[2:]}


def test_what_was_done_before_is_left_alone_unless_its_file_changed(model: Model, pictures: list[Path]) -> None:
    done = run(model, asked(pictures))
    job = Job(model, asked(pictures), settings(model), JobOptions(done=done))
    assert list(job.records()) == []
    assert job.kept == 4
    Image.new("RGB", (30, 30), "red").save(pictures[0])
    pictures[3].write_bytes(pictures[2].read_bytes())
    again = run(model, asked(pictures), JobOptions(done=done))
    assert set(again) == {str(pictures[0]), str(pictures[3])}
    assert again[str(pictures[3])].answer == done[str(pictures[2])].answer


def with_copies(picture: Path) -> list[Path]:
    copies = [picture, *(picture.with_name(f"copy{n}.png") for n in range(9))]
    for copy in copies[1:]:
        copy.write_bytes(picture.read_bytes())
    return copies


@pytest.mark.parametrize("slots", [1, 3])
def test_the_same_picture_is_asked_about_once_whatever_it_is_called(
    model: Model, pictures: list[Path], slots: int
) -> None:
    copies = with_copies(pictures[0])
    done = RecordStore()
    job, records = Job(model, asked([*copies, pictures[2]]), settings(model), JobOptions(slots, done=done)), []
    for record in job.records():
        done.add(record)
        records.append(record)
    assert job.order == [str(path) for path in (*copies, pictures[2])]
    assert sorted(record.id for record in records) == sorted(job.order)
    assert sum(not record.is_shared for record in records) == 2
    (alone,) = Job(model, asked(copies[:1]), settings(model)).records()
    for record in records:
        if record.id != str(pictures[2]):
            assert content(replace(record, id="", images=[])) == content(replace(alone, id="", images=[]))
            assert record.images == [replace(alone.images[0], path=record.id)]

    copies[0].rename(renamed := copies[0].with_name("renamed.png"))
    Image.new("RGB", (30, 30), "red").save(copies[1])
    again = run(model, asked([renamed, *copies[1:]]), JobOptions(done=done))
    assert {id: record.is_shared for id, record in again.items()} == {str(renamed): True, str(copies[1]): False}
    assert again[str(renamed)].answer == alone.answer


def test_a_slow_source_holds_up_no_answer(model: Model, pictures: list[Path]) -> None:
    first, second = asked([pictures[0], pictures[2]])
    answered = threading.Event()

    def requests() -> Iterator[Request]:
        yield first
        assert answered.wait(60)
        yield second

    job, records = Job(model, requests(), settings(model), JobOptions(slots=4)), []
    for record in job.records():
        records.append(record.id)
        answered.set()
    assert records == job.order == [first.id, second.id]


def test_a_source_that_fails_ends_the_job_behind_its_last_answer(model: Model, pictures: list[Path]) -> None:
    def requests() -> Iterator[Request]:
        yield from asked(pictures[:1])
        raise InputError("the network is gone")

    records: list[Record] = []
    with pytest.raises(InputError, match="the network is gone"):
        records.extend(Job(model, requests(), settings(model)).records())
    assert [record.id for record in records] == [str(pictures[0])]


def test_a_job_that_waits_for_requests_can_be_stopped(model: Model, pictures: list[Path]) -> None:
    forever = threading.Event()

    def requests() -> Iterator[Request]:
        yield from asked(pictures[:1])
        forever.wait()

    job = Job(model, requests(), settings(model))
    records = []
    for record in job.records():
        records.append(record)
        threading.Timer(0.2, job.stop).start()
    assert len(records) == 1
    forever.set()


def test_a_record_that_answers_something_else_ends_the_job(model: Model, pictures: list[Path]) -> None:
    done = run(model, asked(pictures[:1], "What?"))
    with pytest.raises(InputError, match=r"the question was 'What\?' and is 'Why\?'"):
        list(Job(model, iter(asked(pictures[:1], "Why?")), settings(model), JobOptions(done=done)).records())


def test_a_job_goes_on_after_many_that_were_done_before(model: Model, pictures: list[Path]) -> None:
    requests = [replace(asked([pictures[0]], limit=1)[0], id=str(n)) for n in range(30)]
    done = run(model, requests[:29])
    assert set(run(model, requests, JobOptions(done=done))) == {"29"}


def test_a_stopped_job_finishes_what_runs_and_starts_no_more(model: Model, pictures: list[Path]) -> None:
    requests = [replace(asked([pictures[0]], f"What is {n}?", 4)[0], id=str(n)) for n in range(20)]
    job = Job(model, requests, settings(model), JobOptions(slots=2))
    records = []
    for record in job.records():
        records.append(record)
        job.stop()
    assert 1 <= len(records) <= 4
    assert all(record.error is None and record.answer is not None for record in records)
    assert [t.name for t in threading.enumerate() if t.name.startswith("images")] == []


def test_exif_can_be_left_alone(model: Model, tmp_path: Path) -> None:
    image, exif = Image.new("RGB", (64, 32), "red"), Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    requests = asked([tmp_path / "turned.jpg"], limit=1)
    turned, stored = (
        next(Job(model, requests, replace(settings(model), exif=apply)).records()).images[0] for apply in (True, False)
    )
    assert (turned.width, turned.height) == (32, 64)
    assert (stored.width, stored.height) == (64, 32)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # pytest undoes the filters that image.py sets
def test_every_shared_picture_gives_an_answer_or_one_error(model: Model, shared_images: Path) -> None:
    paths = sorted(path for path in shared_images.iterdir() if path.suffix != ".tsv")
    records = run(model, asked(paths, limit=1), JobOptions(slots=4))
    failed = {Path(name).name for name, record in records.items() if record.error}
    assert len(records) == 36
    broken = {path.name for path in paths if not _decodes(path)}
    assert failed == broken
    assert {"nasty_photo.heic", "bad_truncated.jpg", "bomb_64kx64k.gif"} <= failed
    assert len(failed) <= 6


def test_a_job_that_cannot_fit_is_refused_before_any_work(model: Model, pictures: list[Path]) -> None:
    check_fit(model.prompts, asked(pictures))
    with pytest.raises(InputError, match="context"):
        check_fit(model.prompts, asked(pictures, "go " * 2000))
    many = Request("many", user_message("?", [pictures[2]] * 40))
    with pytest.raises(InputError, match=r"c\.jpg, \S+c\.jpg, \S+c\.jpg and 37 more: \d+ tokens") as raised:
        check_fit(model.prompts, [many])
    assert [option.name for option in raised.value.options] == ["image_tokens"]


def test_no_request_takes_more_rows_than_is_said_before(model: Model, pictures: list[Path]) -> None:
    requests = [*asked(pictures), Request("long", user_message("go " * 50, pictures[2:3]), 9)]
    bound = most_rows(model.prompts, requests)
    readable = [request for request in requests if request.images[0].name in ("a.png", "c.jpg")]
    for record in run(model, readable).values():
        assert record.prompt_tokens and record.new_tokens and record.prompt_tokens + record.new_tokens <= bound
    assert bound == max(most_rows(model.prompts, [request]) for request in requests)
    text = Request("text", user_message("go " * 50), 9)
    assert most_rows(model.prompts, [text]) == len(model.prompts.build(text.messages).token_ids) + 9


def test_slots_follow_the_wish_the_memory_and_the_engines(model: Model, pictures: list[Path]) -> None:
    requests = asked(pictures)
    assert choose_slots(model, requests, None, None) == MOST_SLOTS
    assert choose_slots(model, requests, 3, None) == 3
    assert choose_slots(model, requests, None, 1 << 40) == MOST_SLOTS
    with pytest.raises(InputError, match="0 answers at a time"):
        choose_slots(model, requests, 0, 1 << 40)
    needed = next(size for size in range(0, 1 << 40, 1 << 20) if _holds(model, requests, size))
    assert 500_000_000 < needed < 600_000_000
    assert choose_slots(model, requests, None, needed) == 1
    with pytest.raises(MachineError, match="hold 1 answers") as raised:
        choose_slots(model, requests, 2, needed)
    assert raised.value.remedies == (Option("batch", 1),)


def test_on_a_device_slots_follow_what_is_free_there(model: Model, pictures: list[Path]) -> None:
    requests, bundle = asked(pictures), model.bundle
    slot = bundle.limits.max_context * bundle.kv_cache_bytes_per_token  # the context is the shorter of the two

    def chosen(free: int, wanted: int | None = None, memory: int | None = None) -> int:
        sessions = replace(model.runner.sessions, free_bytes=free)
        there = Model(bundle, sessions, model.prompts)
        return choose_slots(there, requests, wanted, memory)

    assert chosen(1 << 40) == MOST_DEVICE_SLOTS
    assert chosen(int(5.5 * slot / SHARE_FOR_CACHES)) == 5
    assert chosen(1 << 40, memory=int(3.5 * slot / SHARE_FOR_CACHES)) == 3
    assert chosen(0) == 1 and chosen(0, wanted=7) == 7


def test_a_job_goes_on_with_fewer_slots_than_it_read_ahead_for(model: Model, pictures: list[Path]) -> None:
    requests = [Request(str(index), user_message(f"What is {index}?", [pictures[0]]), 3) for index in range(24)]
    decoder = Small(model.runner.sessions.decoder, 1, "write_index")
    small = Model(model.bundle, replace(model.runner.sessions, decoder=decoder), model.prompts)
    records = run(small, requests, JobOptions(slots=8))
    assert decoder.refused and len(records) == 24 and not any(record.error for record in records.values())


def _holds(model: Model, requests: Sequence[Request], size: int) -> bool:
    try:
        choose_slots(model, requests, 1, size)
    except MachineError:
        return False
    return True


def _decodes(path: Path) -> bool:
    from pixtral_runtime.errors import ImageError

    try:
        decode_image(path.read_bytes(), path.name)
    except ImageError:
        return False
    return True


def test_a_record_has_the_hint_as_its_face_writes_options(model: Model) -> None:
    requests = [Request("long", user_message("word " * model.bundle.limits.max_context))]
    plain, typed = (
        run(model, requests, options)["long"].hint or "" for options in (DEFAULT, JobOptions(write_hint=hint_of))
    )
    assert "image_tokens=N" in plain and "--" not in plain.partition(";")[0]
    assert "--image-tokens N" in typed


def test_suspects_are_done_alone_and_the_accused_are_not_tried(model: Model, tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.png" for name in "abcdef"]
    for shade, path in enumerate(paths):
        Image.new("L", (40, 20), shade).save(path)
    under_way = UnderWay(tmp_path / "results.jsonl")
    under_way._deaths = {str(paths[2]): 2, str(paths[4]): 1, str(paths[5]): 1}
    begun: list[str] = []
    under_way.begin = begun.append  # type: ignore[assignment, method-assign]
    job, ended = Job(model, asked(paths), settings(model), JobOptions(slots=4, under_way=under_way)), list[str]()
    for record in job.records():
        ended.append(record.id)
        if record.id in under_way.suspects:
            assert sorted(begun) == sorted(ended)  # nothing else was under way
        is_accused = record.id == str(paths[2])
        assert (record.answer is None) == is_accused
        assert ("died 2 times" in (record.error or "")) == is_accused
        assert record.key
    assert ended[4:] == [str(paths[4]), str(paths[5])]
    assert sorted(ended) == sorted(map(str, paths))


@pytest.mark.parametrize("is_tight", [True, False])
def test_pictures_are_decoded_one_by_one_where_memory_does_not_hold_two(
    model: Model, pictures: list[Path], monkeypatch: pytest.MonkeyPatch, is_tight: bool
) -> None:
    job = Job(model, asked([pictures[0], pictures[2]]), settings(model))
    seen = []

    def decode(data: bytes, name: str, *, apply_exif: bool) -> object:
        seen.append(job._loader.memory.alone.locked())
        return decode_image(data, name, apply_exif=apply_exif)

    monkeypatch.setattr("pixtral_runtime.batch.loading.decode_image", decode)
    monkeypatch.setattr("pixtral_runtime.inputs.decode_memory.too_little_memory", lambda _: 1 if is_tight else None)
    assert all(record.answer for record in job.records())
    assert seen == [is_tight] * 2


def test_a_picture_that_memory_did_not_hold_is_tried_again(
    model: Model, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = asked(pictures[:1])
    with monkeypatch.context() as tight:
        tight.setattr("pixtral_runtime.inputs.image.too_little_memory", lambda _: 1)
        refused = run(model, requests)
        assert "of memory are left" in str(refused[requests[0].id].error)
        assert run(model, requests, JobOptions(done=refused))[requests[0].id].error
    assert run(model, requests, JobOptions(done=refused))[requests[0].id].answer is not None
