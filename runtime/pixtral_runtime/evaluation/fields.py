"""Values of a row, refused where they are not as the dataset publishes them; and the usual form of a question."""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pixtral_runtime.errors import InputError, Option
from pixtral_runtime.evaluation.task import Row, RowError
from pixtral_runtime.inputs.conversation import Message


def text(row: Row, name: str) -> str:
    """A text that is not blank. Raises RowError."""
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"{name} is no text: {value!r:.80}")
    return value


def label(row: Row, name: str) -> str:
    """What may be missing, as text; numbers become text."""
    value = row.get(name)
    return value if isinstance(value, str) else "" if value is None else str(value)


def texts(values: object, name: str) -> tuple[str, ...]:
    """Texts or numbers, at least one, as text. A single one counts as a list. Raises RowError."""
    listed = [values] if isinstance(values, str | int | float) else values
    if not isinstance(listed, list | tuple) or not listed:
        raise RowError(f"{name} is no list of texts: {values!r:.80}")
    if odd := [value for value in listed if isinstance(value, bool) or not isinstance(value, str | int | float)]:
        raise RowError(f"{name} holds {odd[0]!r:.80}, which is no text")
    return tuple(str(value) for value in listed)


def literal(source: str) -> list[str]:
    """A Python list that is written out, or else the text alone (specification section 5.3, MMMU). Raises RowError."""
    if "[" not in source:
        return [source]
    try:
        value = ast.literal_eval(source)
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise RowError(f"{source!r:.80} is no Python list") from error
    if not isinstance(value, list):
        raise RowError(f"{source!r:.80} is no Python list")
    return [str(item) for item in value]


def asked(question: str, images: Sequence[Path], prompt: str = "") -> tuple[Message, ...]:
    """Images, then the question and below it the task's prompt, in one message of the user."""
    return (Message("user", (*images, f"{question}\n{prompt}" if prompt else question)),)


def read_dataset_json(path: Path) -> Any:
    """A dataset's own JSON file. Raises InputError."""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}", Option("data", "DATASET_FOLDER")) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged: {error}", "download it again") from error
