"""Paths that terminals paste for dropped files are pictures, and nothing else in a line is."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest

from helpers.places import IMAGES
from pixtral_cli.dropped_paths import Line, escaped, split_paths, take_pictures

PICTURE = next(IMAGES.glob("*.png"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pictures with names of all kinds, a text, and a folder that is called as a picture is."""
    home = tmp_path / "my photos"
    home.mkdir()
    for name in ("a.png", "b c.JPG", "it's.png", "back\\slash.png", "käse 100%.png", "tab\there.png"):
        shutil.copy(PICTURE, home / name)
    (home / "notes.txt").touch()
    (home / "folder.png").mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)
    return home


def single_quoted(path: Path) -> str:
    return "'" + str(path).replace("'", "'\\''") + "'"


def double_quoted(path: Path) -> str:
    return '"' + str(path).replace("\\", "\\\\") + '"'


def backslashed(path: Path) -> str:
    return escaped(str(path))


FORMS = (single_quoted, double_quoted, backslashed, Path.as_uri)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("behind", ["", " ", "  \t"])
def test_a_dropped_picture_is_a_picture_in_every_form(form: object, behind: str, folder: Path) -> None:
    paths = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix != ".txt")
    assert len(paths) == 6
    for path in paths:
        assert take_pictures(form(path) + behind) == Line((path,), ""), path  # type: ignore[operator]
    line = " ".join(form(path) for path in paths) + behind  # type: ignore[operator]
    assert take_pictures(line) == Line(tuple(paths), "")


def test_a_path_may_come_as_it_is(folder: Path) -> None:
    path = folder / "käse 100%.png"
    assert take_pictures(f"{path} ") == Line((path,), "")
    assert take_pictures(f"file://localhost{path.as_uri().removeprefix('file://')}") == Line((path,), "")
    assert take_pictures("~/a.png") == Line((folder / "a.png",), "")
    assert take_pictures("a.png") == Line((Path("a.png"),), "")


@pytest.mark.parametrize("form", FORMS)
def test_the_rest_of_a_line_is_the_question(form: object, folder: Path) -> None:
    first, second = folder / "a.png", folder / "it's.png"
    a, b = form(first), form(second)  # type: ignore[operator]
    for line, text in (
        (f"{a} what's this?", "what's this?"),
        (f"{a} {b}  what's this?", "what's this?"),
        (f"what's on {a}", "what's on"),
        (f"what's on {a}?", "what's on?"),
        (f"{a} what's this? {b} ", "what's this?"),
        (f"is {a}, the one, like {b}?", "is a.png, the one, like it's.png?"),
        (f"{a} is it as {b} is", "is it as it's.png is"),
    ):
        found = take_pictures(line)
        assert (found.text, found.pictures[0], found.absent) == (text, first, ()), line
        assert len(found.pictures) == line.count(b) + 1
    assert take_pictures("what's on a.png?") == Line((Path("a.png"),), "what's on?")
    assert take_pictures("is ./a.png there?") == Line((Path("a.png"),), "is a.png there?")


@pytest.mark.parametrize(
    "line",
    [
        "/etc is a folder",
        "is gone.png a good name?",
        "don't say 'it's nice', say so",
        "/",
        "",
        "''",
        '"',
        "\\",
        "file://",
        "file://[",
        "~\0",
        "2/3 of it",
        "{home}/notes.txt",
        "{home}/folder.png is a folder",
        "file://elsewhere{home}/a.png",
    ],
)
def test_what_is_no_picture_stays_as_it_is(line: str, folder: Path) -> None:
    text = line.replace("{home}", escaped(str(folder)))
    found = take_pictures(text)
    assert (found.pictures, found.text) == ((), text)


def test_a_path_that_leads_nowhere_is_not_asked_about(folder: Path) -> None:
    gone = folder / "gone.png"
    for line in (single_quoted(gone), backslashed(gone) + " ", gone.as_uri()):
        assert take_pictures(line) == Line((gone,), "")
    assert take_pictures(f"{backslashed(gone)} what's this?").absent == (gone,)


@pytest.mark.parametrize("name", ["a b.png", "it's.png", "back\\slash.png", 'say "x".png', "plain.png"])
def test_words_are_read_as_a_shell_reads_them(name: str, folder: Path) -> None:
    assert split_paths(f"{escaped(name)}  {single_quoted(Path(name))} x") == [name, name, "x"]
    assert shlex.split(escaped(name)) == [name]
