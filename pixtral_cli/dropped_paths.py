"""Pictures in a line of text: a terminal pastes a file that is dropped on it as its path.

Each terminal writes paths its own way: in quotes, with backslashes before blanks, as they are, or as file:// URLs, with
a blank behind; several stand side by side. Only what is a picture's path counts, so that text stays text.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

END = r"(?=[\s?!.,;:)]|$)"
WORD = re.compile(rf"""'(?P<single>(?:[^']|'\\'')*)'{END}|"(?P<double>(?:[^"\\]|\\.)*)"{END}|(?P<bare>(?:\\.|\S)+)""")
ESCAPED = re.compile(r"\\(.)")
PUNCTUATION = "?!.,;:)"


@dataclass(frozen=True)
class Line:
    """A line taken apart. `absent` are absolute paths of pictures that are no files here, and stay in the text."""

    pictures: tuple[Path, ...]
    text: str
    absent: tuple[Path, ...] = ()


@dataclass(frozen=True)
class _Word:
    start: int
    end: int  # without punctuation behind a path
    readings: tuple[str, ...]  # what it may mean, the likeliest first


def take_pictures(line: str) -> Line:
    """The pictures that a line names, and the text beside them.

    A line of nothing but pictures' paths gives all of them, so that whoever opens one says what is wrong with it. Among
    other words a path counts where the file is there. It is taken out of the text before and behind it; within the text
    its name stays.
    """
    whole = _path(line.strip())
    if _is_picture(whole) and os.path.isfile(whole):
        return Line((whole,), "")
    words = [word for word in _words(line) if line[word.start : word.end].strip(PUNCTUATION)]
    meant = [_meant(word) for word in words]
    is_there = [path is not None and os.path.isfile(path) for path in meant]
    paths = [path for path in meant if path is not None]
    absent = tuple(path for path in paths if path.is_absolute() and not os.path.isfile(path))
    if words and sum(is_there) + len(absent) == len(words):
        return Line(tuple(paths), "")
    first = next((index for index, is_picture in enumerate(is_there) if not is_picture), 0)
    behind = next((index for index, is_picture in enumerate(is_there[::-1]) if not is_picture), 0)
    is_within = any(is_there[first : len(words) - behind])
    text, place = "", 0
    for index, (word, path) in enumerate(zip(words, meant, strict=True)):
        if path is not None and is_there[index]:
            text = _joined(text, line[place : word.start])
            text = _joined(text, path.name if is_within and index > first else "")
            place = word.end
    return Line(tuple(path for path in paths if os.path.isfile(path)), _joined(text, line[place:]), absent)


def split_paths(text: str) -> list[str]:
    """The words of a text as paths, quotes, backslashes and URLs resolved."""
    return [str(_first_there([_path(reading) for reading in word.readings])) for word in _words(text)]


def escaped(path: str) -> str:
    """A path as `split_paths` reads it."""
    return re.sub(r"([\s\\'\"])", r"\\\1", path)


def _words(line: str) -> Iterator[_Word]:
    for match in WORD.finditer(line):
        start, end = match.span()
        if (single := match["single"]) is not None:
            yield _Word(start, end, (single.replace("'\\''", "'"),))
        elif (double := match["double"]) is not None:
            yield _Word(start, end, (ESCAPED.sub(r"\1", double),))
        else:
            word = match["bare"]
            if _is_picture(Path(word.rstrip(PUNCTUATION))):
                word = word.rstrip(PUNCTUATION)
            yield _Word(start, start + len(word), (ESCAPED.sub(r"\1", word), word))


def _meant(word: _Word) -> Path | None:
    """The picture's path that a word is, or None."""
    paths = [path for path in map(_path, word.readings) if _is_picture(path)]
    return _first_there(paths) if paths else None


def _first_there(paths: Sequence[Path]) -> Path:
    return next((path for path in paths if os.path.lexists(path)), paths[0])


def _path(text: str) -> Path:
    """A path as it was typed, or behind a file:// URL of this machine."""
    if text.startswith("file://"):
        try:
            url = urlsplit(text)
        except ValueError:
            return Path(text)
        if url.netloc in ("", "localhost", socket.gethostname()):
            return Path(unquote(url.path, errors="surrogateescape"))
    return Path(text if "\0" in text else os.path.expanduser(text))


def _is_picture(path: Path) -> bool:
    from pixtral_runtime.inputs.image_files import IMAGE_SUFFIXES

    return path.suffix.lower() in IMAGE_SUFFIXES


def _joined(before: str, behind: str) -> str:
    """Two texts between which a path stood."""
    before, behind = before.strip(), behind.strip()
    return before + behind if behind[:1] in tuple(PUNCTUATION) else f"{before} {behind}".strip()
