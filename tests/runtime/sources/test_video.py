from __future__ import annotations

import itertools
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from helpers.places import ROOT
from helpers.videos import COLUMNS, RATE, ROWS, number_of, write_video
from pixtral_runtime.errors import ImageError, SettingError
from pixtral_runtime.inputs.conversation import StoredPicture
from pixtral_runtime.inputs.image import decode_image
from pixtral_runtime.inputs.preprocess import Preprocess
from pixtral_runtime.sources.item import Item
from pixtral_runtime.sources.video import VideoFrame, VideoSettings, parse_every, time_stamp, video_items

DATA = ROOT / "tests" / "data" / "documents"
FIT = Preprocess(patch_size=16, max_side=256).drawn_size
FRAMES = 75  # three seconds
CODECS = [("mp4v", "mp4"), ("MJPG", "avi"), ("XVID", "avi"), ("VP90", "webm"), ("FFV1", "mkv"), ("mp4v", "mov")]


@pytest.fixture(scope="module", params=CODECS, ids=["-".join(one) for one in CODECS])
def clip(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    codec, suffix = request.param
    return write_video(tmp_path_factory.mktemp("clip") / f"clip.{suffix}", codec, FRAMES)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", "mp4v", FRAMES)


def pictures(items: list[Item]) -> list[VideoFrame]:
    return [part for item in items for part in item.parts if isinstance(part, VideoFrame)]


def frames(path: Path, settings: VideoSettings) -> list[VideoFrame]:
    return pictures(list(video_items(path, settings, FIT)))


def pixels(picture: StoredPicture) -> NDArray[np.uint8]:
    return np.asarray(decode_image(picture.read(), picture.name).pixels)


def shown_at(time_s: float) -> int:
    return int(time_s * RATE + 1e-6)


def problem(path: Path) -> str:
    (item,) = video_items(path, VideoSettings(), FIT)
    assert item.id == str(path)
    (part,) = item.parts
    assert isinstance(part, StoredPicture)
    with pytest.raises(ImageError) as caught:
        part.read()
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value)


@pytest.mark.parametrize("every_s", [0.5, 0.31, 1 / RATE])
def test_the_frame_of_a_time_is_the_one_that_is_shown_then(every_s: float, clip: Path) -> None:
    found = frames(clip, VideoSettings(every_s=every_s))
    assert len(found) == len([n for n in range(1000) if n * every_s < FRAMES / RATE])
    assert [number_of(pixels(frame)) for frame in found] == [shown_at(frame.time_s or 0) for frame in found]


def test_frames_are_right_in_whatever_order_they_are_read(clip: Path) -> None:
    found = frames(clip, VideoSettings(every_s=0.2))
    random.Random(7).shuffle(found)
    assert [number_of(pixels(frame)) for frame in found] == [shown_at(frame.time_s or 0) for frame in found]


@pytest.mark.parametrize("count", [1, 3, 8])
def test_so_many_frames_are_the_middles_of_equal_parts(count: int, clip: Path) -> None:
    found = frames(clip, VideoSettings(frames=count))
    middles = [FRAMES / RATE * (2 * part + 1) / (2 * count) for part in range(count)]
    assert [frame.time_s for frame in found] == pytest.approx(middles, abs=1e-3)
    assert [number_of(pixels(frame)) for frame in found] == [shown_at(time_s) for time_s in middles]


@pytest.mark.parametrize("every_s", [0.04, 0.1, 0.25])
def test_a_rate_that_changes_is_followed(every_s: float) -> None:
    kept = [number for number in range(FRAMES) if not 2 <= number % 7 <= 5]
    found = frames(DATA / "uneven.mp4", VideoSettings(every_s=every_s))
    expected = [max(number for number in kept if number <= shown_at(frame.time_s or 0)) for frame in found]
    numbers = [number_of(pixels(frame)) for frame in found]
    assert numbers == expected and len(set(numbers)) == len(numbers)
    if every_s == 0.04:
        assert numbers == kept


def test_frames_without_times_of_their_own_are_right() -> None:
    found = frames(DATA / "plain.mpg", VideoSettings(every_s=0.04))
    assert [number_of(pixels(frame)) for frame in found] == list(range(49))  # of the last one nobody knows the time


def test_a_phone_that_was_held_upright_gives_upright_frames() -> None:
    (frame,) = frames(DATA / "turned.mp4", VideoSettings(frames=1))
    found = pixels(frame)
    assert found.shape == (COLUMNS, ROWS, 3) and frame.size() == (ROWS, COLUMNS)
    lower_right, upper_right = found[-20, -20].astype(int), found[20, -20].astype(int)
    assert lower_right[0] > 180 and lower_right[1:].max() < 60 and upper_right.max() < 100


def test_a_clip_is_one_item_with_a_time_stamp_before_each_frame(plain: Path) -> None:
    (item,) = video_items(plain, VideoSettings(every_s=1.0), FIT)
    assert item.id == str(plain) and item.name == "clip" and item.directory == plain.parent.name
    assert [part if isinstance(part, str) else part.name for part in item.parts] == [
        "0:00.0", f"{plain}#t=0.0", "0:01.0", f"{plain}#t=1.0", "0:02.0", f"{plain}#t=2.0",
    ]  # fmt: skip


def test_a_frame_an_item_has_its_time(plain: Path) -> None:
    found = list(video_items(plain, VideoSettings(every_s=1.5, per_frame=True), FIT))
    assert [item.id for item in found] == [f"{plain}#t=0.0", f"{plain}#t=1.5"]
    assert [item.parts[0] for item in found] == ["0:00.0", "0:01.5"]
    assert [frame.time_s for frame in pictures(found)] == [0.0, 1.5]


def test_eight_frames_are_the_default(plain: Path) -> None:
    assert len(frames(plain, VideoSettings())) == 8


def test_a_frame_that_is_shown_at_several_of_the_times_is_there_once(plain: Path) -> None:
    found = frames(plain, VideoSettings(every_s=0.001))
    assert [number_of(pixels(frame)) for frame in found] == list(range(FRAMES))
    assert len(frames(plain, VideoSettings(frames=1000))) == FRAMES


def test_a_frame_is_no_larger_than_it_is_seen_and_never_made_larger(plain: Path) -> None:
    small = Preprocess(patch_size=16, max_side=64)
    (item,) = video_items(plain, VideoSettings(frames=1), small.drawn_size)
    found = pixels(pictures([item])[0])
    assert found.shape == (48, 64, 3) and small.grid(64, 48) == small.grid(COLUMNS, ROWS)
    assert pixels(frames(plain, VideoSettings(frames=1))[0]).shape == (ROWS, COLUMNS, 3)


def test_threads_read_what_one_reads(plain: Path, tmp_path: Path) -> None:
    other = write_video(tmp_path / "other.avi", "MJPG", 30)
    found = [frame for path in (plain, other) for frame in frames(path, VideoSettings(every_s=0.2))]
    with ThreadPoolExecutor(3) as threads:
        numbers = [number_of(one) for one in threads.map(pixels, found)]
    assert numbers == [shown_at(frame.time_s or 0) for frame in found]


@pytest.mark.parametrize(("codec", "suffix"), [("MJPG", "avi"), ("FFV1", "mkv"), ("VP90", "webm")])
def test_a_clip_that_was_cut_off_has_the_frames_that_are_there(codec: str, suffix: str, tmp_path: Path) -> None:
    path = write_video(tmp_path / f"cut.{suffix}", codec, FRAMES)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    found = frames(path, VideoSettings(every_s=0.2))
    assert 2 <= len(found) < 14
    assert [number_of(pixels(frame)) for frame in found[:-1]] == [shown_at(frame.time_s or 0) for frame in found[:-1]]


def test_behind_damage_the_clip_goes_on(tmp_path: Path) -> None:
    data = bytearray((DATA / "uneven.mp4").read_bytes())
    whole = len(frames(DATA / "uneven.mp4", VideoSettings(every_s=0.25)))
    middle = data.index(b"mdat") + 1300
    data[middle : middle + 60] = bytes(60)
    (tmp_path / "hole.mp4").write_bytes(data)
    found = frames(tmp_path / "hole.mp4", VideoSettings(every_s=0.25))
    assert whole - 3 <= len(found) <= whole
    assert number_of(pixels(found[-1])) > 60 and number_of(pixels(found[0])) == 0


def test_a_video_without_frames_says_so(tmp_path: Path) -> None:
    assert "no video that FFmpeg can read" in problem(DATA / "sound.mp4")
    assert problem(write_video(tmp_path / "none.mp4", "mp4v", 0))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "the file is empty"),
        (b"hello", "no video that FFmpeg can read"),
        (b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n", "no video that FFmpeg can read"),
        (b"ffconcat version 1.0\nfile clip.mp4\n", "a list of files"),
    ],
)
def test_what_is_no_video_is_an_item_that_says_so(data: bytes, said: str, plain: Path, tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(plain.read_bytes())
    (tmp_path / "a.mp4").write_bytes(data)
    assert said in problem(tmp_path / "a.mp4")
    assert "No such file" in problem(tmp_path / "nowhere.mp4")


def test_a_name_with_a_pattern_or_an_address_is_a_name(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a%03d.mp4", "concat:b|c.mp4", "Ä ö.mp4", "file:x.mp4"):
        Path(name).write_bytes(plain.read_bytes())
        assert number_of(pixels(frames(Path(name), VideoSettings(every_s=2.0))[1])) == 50


@pytest.mark.parametrize(
    ("text", "seconds"), [("2s", 2), ("500ms", 0.5), ("1m", 60), ("0.5", 0.5), (" 1.5h ", 5400), (".1s", 0.1)]
)
def test_lengths_of_time(text: str, seconds: float) -> None:
    assert parse_every(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "0", "0s", "-1s", "2 fps", "1e3", "nan", "s", "2d", "1:00"])
def test_what_is_no_length_of_time_is_refused_with_one_that_is(text: str) -> None:
    with pytest.raises(SettingError) as caught:
        parse_every(text)
    (option,) = caught.value.options
    assert option.name == "every" and parse_every(str(option.value))


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"every_s": 1.0, "frames": 2}, "every"), ({"frames": 0}, "frames"), ({"every_s": 0.0}, "every")],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, float], named: str) -> None:
    with pytest.raises(SettingError) as caught:
        VideoSettings(**settings)  # type: ignore[arg-type]
    assert caught.value.options[0].name == named


@pytest.mark.parametrize(
    ("time_s", "stamp"),
    [(0, "0:00.0"), (2, "0:02.0"), (59.96, "1:00.0"), (83.25, "1:23.2"), (3600, "1:00:00.0"), (7384.5, "2:03:04.5")],
)
def test_time_stamps(time_s: float, stamp: str) -> None:
    assert time_stamp(time_s) == stamp


def test_time_stamps_of_frames_are_apart(plain: Path) -> None:
    texts = [part for item in video_items(plain, VideoSettings(frames=8), FIT) for part in item.parts[::2]]
    assert len(set(texts)) == 8 and all(one < other for one, other in itertools.pairwise(map(str, texts)))
