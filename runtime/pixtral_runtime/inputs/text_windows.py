"""A user's own texts, and the windows in which a model reads them to be told how well it predicts them.

A `.txt` or `.md` file is one text, a line of a `.jsonl` file another, in its field `text`. Windows do not overlap and
none goes over the end of a text: each is <s> and the next tokens of the text, as many as there are, at most `size`
together. The model sees nothing of the windows before, so every token of a text is predicted once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pixtral_runtime.bundle.manifest import SENTENCEPIECE
from pixtral_runtime.errors import InputError, Option, Remedy, SettingError
from pixtral_runtime.inputs.prompt import PromptBuilder
from pixtral_runtime.inputs.text_file import parsed_json, read_lines, read_text

PLAIN, LINES = (".txt", ".md"), ".jsonl"
DEFAULT_WINDOW = 2048  # tokens, <s> among them
SMALLEST_WINDOW = 2  # <s> and what comes next
BYTE_PIECE = re.compile(rb"<0x[0-9A-F]{2}>")  # how SentencePiece calls a byte


@dataclass(frozen=True)
class Text:
    """One text. `name` is its file's, with the line where the file has several."""

    name: str
    file: str
    text: str


@dataclass(frozen=True)
class BadText:
    """What is no text, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class TextWindow:
    """Tokens of a text that are predicted in one pass. `size_bytes` is what they stand for; a character of several
    bytes may lie on both sides of a window's edge."""

    name: str
    file: str
    token_ids: tuple[int, ...]
    size_bytes: int


def text_files(place: Path, remedy: Remedy) -> list[Path]:
    """A file, or a folder's files of texts in the order of their names. Raises InputError where there is none."""
    if os.path.isfile(place):
        if place.suffix not in (*PLAIN, LINES):
            raise InputError(f"{place} is no {', '.join(PLAIN)} or {LINES} file", remedy)
        return [place]
    found = sorted(path for path in place.rglob("*") if path.suffix in (*PLAIN, LINES) and path.is_file())
    if not found:
        what = f"has no {', '.join(PLAIN)} or {LINES} file" if os.path.isdir(place) else "is not there"
        raise InputError(f"{place} {what}", remedy)
    return found


def read_texts(files: Iterable[Path], folder: Path | None = None) -> Iterator[Text | BadText]:
    """The texts of files, named as they lie below `folder`. Raises InputError where a file cannot be read."""
    for path in files:
        file = str(path.relative_to(folder)) if folder is not None and path.is_relative_to(folder) else path.name
        if path.suffix == LINES:
            for number, line in enumerate(read_lines(path), start=1):
                if line.strip():
                    yield _of_line(line, f"{file}:{number}", file)
        else:
            yield _checked(read_text(path), file, file)


def text_windows(prompts: PromptBuilder, text: Text, size: int) -> Iterator[TextWindow]:
    """The windows of a text, of `size` tokens at most. Their names end with the number of the first token."""
    tokens = prompts.encode(text.text)
    for first in range(0, len(tokens), size - 1):
        here = tuple(tokens[first : first + size - 1])
        size_bytes = sum(_size(prompts, token) for token in here)
        if first == 0 and prompts.bundle.tokenizer_name == SENTENCEPIECE:
            size_bytes -= 1  # the blank that it puts before a text
        yield TextWindow(f"{text.name}@{first}", text.file, here, size_bytes)


def window_size(context: int, wanted: int | None) -> int:
    """How many tokens a window has: as wanted, or the usual number as far as the context holds it.

    Raises SettingError for a size that cannot be.
    """
    if wanted is None:
        return min(DEFAULT_WINDOW, context)
    if not SMALLEST_WINDOW <= wanted <= context:
        raise SettingError(
            f"a window of {wanted} tokens, where the context holds {context}",
            Option("window", "N", f"from {SMALLEST_WINDOW} to {context}"),
        )
    return wanted


def _size(prompts: PromptBuilder, token: int) -> int:
    piece = prompts.token_bytes(token)
    is_byte = prompts.bundle.tokenizer_name == SENTENCEPIECE and BYTE_PIECE.fullmatch(piece)
    return 1 if is_byte else len(piece)


def _of_line(line: str, name: str, file: str) -> Text | BadText:
    try:
        row: Any = parsed_json(line)
    except (ValueError, RecursionError) as error:
        return BadText(name, f"not JSON: {error}")
    text = row.get("text") if isinstance(row, dict) else None
    return _checked(text, name, file) if isinstance(text, str) else BadText(name, "there is no field 'text' with text")


def _checked(text: str, name: str, file: str) -> Text | BadText:
    return Text(name, file, text) if text else BadText(name, "the text is empty")
