"""Text that users bring: prompts, lists, schemas, requests, samples, rows of a dataset.

It is UTF-8, with a byte order mark in front or without. Lines end at `\\n` or `\\r\\n` and nowhere else: what else
`str.splitlines` breaks at, such as U+2028, is part of a line, as JSON Lines has it. Nothing is replaced: text in
another encoding is refused, since a question that was changed on the way gets an answer to something else.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from pixtral_runtime.errors import InputError, Remedy

SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # as JSON writes half of a pair, or a whole one
UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_text(path: Path, *remedies: Remedy) -> str:
    """The whole text of a file, its lines joined by `\n`. Raises InputError as `read_lines` does."""
    return "\n".join(read_lines(path, *remedies))


def read_lines(path: Path, *remedies: Remedy, note: Callable[[bytes], None] = lambda _: None) -> Iterator[str]:
    """The lines of a file without their ends; `note` hears the bytes of each before.

    Raises InputError, with the remedies where the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            yield from text_lines(_noted(file, note), str(path))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}", *remedies) from error
    except ValueError as error:  # a zero byte in its name
        raise InputError(f"{str(path)!r} cannot be read: {error}", *remedies) from error


def _noted(lines: Iterable[bytes], note: Callable[[bytes], None]) -> Iterator[bytes]:
    for line in lines:
        note(line)
        yield line


def parsed_json(source: str | bytes) -> Any:
    """JSON whose objects have each key once, of two values one would be lost, and whose text is characters: half a
    surrogate pair is none. Raises ValueError and RecursionError.
    """
    value = json.loads(source, object_pairs_hook=unique_keys)
    check_characters(value, source if isinstance(source, str) else source.decode("utf-8", "replace"))
    return value


def check_characters(value: object, source: str) -> None:
    """Raises UnicodeEncodeError, a ValueError, where a value read from the source holds half a surrogate pair."""
    if SURROGATE.search(source):
        json.dumps(value, ensure_ascii=False, default=repr).encode()


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Raises ValueError where a key is there twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r:.80} is there twice")
    return found


def text_lines(lines: Iterable[bytes], name: str) -> Iterator[str]:
    """The lines of a binary file called `name` without their ends. Raises InputError where one is no UTF-8."""
    for number, line in enumerate(lines, start=1):
        if number == 1 and line.startswith(UTF16_MARKS):
            raise InputError(f"{name} is UTF-16 text, expected UTF-8", f"iconv -f utf-16 -t utf-8 {name}")
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{name}, line {number} is not UTF-8 text: {error.reason} at byte {error.start}",
                f"iconv -f latin1 -t utf-8 {name}, if it is Latin-1",
            ) from error
        yield text.removesuffix("\n").removesuffix("\r")
