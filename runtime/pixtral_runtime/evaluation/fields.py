"""Values of a row, refused where they are not as the dataset publishes them; and the usual form of a question.

Tables lose types on their way through CSV: a list comes back as its text, a missing cell as NaN. What a cell plainly is
is read; what it might be is refused, with the row alone.
"""

from __future__ import annotations

import ast
import io
import math
import tokenize
from collections.abc import Collection, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from pixtral_runtime.errors import InputError, Option
from pixtral_runtime.evaluation.task import BrokenRow, Row, RowError
from pixtral_runtime.inputs.conversation import Message
from pixtral_runtime.inputs.text_file import check_characters, parsed_json

# What only pixtral writes: a line of results, a rating, a table of results.
OWN_COLUMNS = ({"id", "asked", "settings"}, {"id", "key", "rating", "attempts"}, {"finish_reason", "new_tokens"})


def text(row: Row, name: str) -> str:
    """A text that is not blank. Raises RowError."""
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"{name} is no text: {value!r:.80}")
    return value


def label(row: Row, name: str) -> str:
    """What may be missing, as text; numbers become text. Raises RowError."""
    value = row.get(name)
    if is_missing(value):
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise RowError(f"{name} is neither text nor number: {value!r:.80}")
    return str(value)


def number(row: Row, name: str) -> float | None:
    """A finite number, or its text; None where it is missing. Raises RowError."""
    value = row.get(name)
    if is_missing(value):
        return None
    try:
        found = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise RowError(f"{name} is no number: {value!r:.80}")
    return found


def texts(values: object, name: str) -> tuple[str, ...]:
    """Texts or numbers, at least one, as text. A single one counts as a list. Raises RowError."""
    listed = [values] if isinstance(values, str | int | float) else values
    if not isinstance(listed, list | tuple) or not listed:
        raise RowError(f"{name} is no list of texts: {values!r:.80}")
    if odd := [value for value in listed if not _is_text_or_number(value)]:
        raise RowError(f"{name} holds {odd[0]!r:.80}, which is no text")
    return tuple(str(value) for value in listed)


def items(value: object, name: str) -> list[Any]:
    """A list, or the text of one in JSON or Python; empty where it is missing. Raises RowError."""
    if isinstance(value, str) and value.strip():
        return written_list(value, name)
    if is_missing(value):
        return []
    if not isinstance(value, list | tuple):
        raise RowError(f"{name} is no list: {value!r:.80}")
    return list(value)


def items_or_one(value: object, name: str) -> object:
    """As `items`, but what neither is a list nor looks like one stays as it is. Raises RowError."""
    return items(value, name) if isinstance(value, str) and value.lstrip().startswith("[") else value


def written_list(source: str, name: str) -> list[Any]:
    """A list that is written out in JSON or Python. Raises RowError.

    NumPy writes no commas, and Python would make one of two texts that stand side by side: they are refused.
    """
    for read in (parsed_json, _python_literal):
        try:
            value = read(source)
        except (ValueError, SyntaxError, MemoryError, RecursionError, tokenize.TokenError):
            continue
        if isinstance(value, list):
            return value
    raise RowError(f"{name} is no list: {source!r:.80}")


def is_own(columns: Collection[str]) -> bool:
    """Whether a file is one that pixtral wrote, and so holds no questions. With references added, it is a dataset."""
    return "answers" not in columns and any(own.issubset(columns) for own in OWN_COLUMNS)


def is_missing(value: object) -> bool:
    """An empty cell: None, NaN or no text."""
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def check_enough(solved: Sequence[object], count: int, what: str = "") -> None:
    """Refuse to begin with fewer solved questions than were wanted. Raises RowError."""
    if len(solved) < count:
        raise RowError(f"there are {len(solved)} solved questions{what}, and {count} are wanted")


def asked(question: str, images: Sequence[Path], prompt: str = "") -> tuple[Message, ...]:
    """Images, then the question and below it the task's prompt, in one message of the user."""
    return (Message("user", (*images, f"{question}\n{prompt}" if prompt else question)),)


def place_of(folder: Path, names: Sequence[str], places: Sequence[str]) -> str:
    """The first of `places` below the folder that has one of the files, "" for the folder itself. Raises InputError."""
    for place in places:
        if any((folder / place / name).is_file() for name in names):
            return place
    published = Option("data", "DATASET_FOLDER", "as the hub or its authors publish it")
    raise InputError(f"{folder} has no {' or '.join(names)}", published)


def read_dataset_json(path: Path) -> Any:
    """A dataset's own JSON file. Raises InputError."""
    try:
        return parsed_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}", Option("data", "DATASET_FOLDER")) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged: {error}", "download it again") from error


def read_dataset_entries(path: Path, key: str | None = None) -> Iterator[Row | BrokenRow]:
    """The objects that a dataset's own JSON file lists, below `key` where they are not the whole. Raises InputError."""
    content = read_dataset_json(path)
    listed = content if key is None else content.get(key) if isinstance(content, dict) else None
    if not isinstance(listed, list):
        raise InputError(f"{path} has no list{f' {key!r}' if key else ''} as it is published", "download it again")
    for place, entry in enumerate(listed, start=1):
        yield entry if isinstance(entry, dict) else BrokenRow(f"{path.name}, entry {place}", "not an object")


def _is_text_or_number(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, str | int) and not isinstance(value, bool)


def _python_literal(source: str) -> Any:
    """Raises ValueError, SyntaxError and what else Python's parser does."""
    value = ast.literal_eval(source.strip())
    kinds = [token.type for token in tokenize.generate_tokens(io.StringIO(source.strip()).readline)]
    kinds = [kind for kind in kinds if kind not in (tokenize.NL, tokenize.COMMENT)]
    if any(pair == (tokenize.STRING, tokenize.STRING) for pair in pairwise(kinds)):
        raise ValueError("texts without a comma between them")
    check_characters(value, source)
    return value
