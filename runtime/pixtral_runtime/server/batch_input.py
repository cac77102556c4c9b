"""The input file of a batch: checked as a whole before it is begun, then read as requests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pixtral_runtime.batch.openai_input import LineError, batch_request, open_envelope
from pixtral_runtime.batch.records import OwnSettings, Record, Request, Settings, record_of
from pixtral_runtime.batch.request_file import Lines
from pixtral_runtime.errors import InputError
from pixtral_runtime.inputs.conversation import user_message
from pixtral_runtime.inputs.openai_chat import FieldError
from pixtral_runtime.inputs.openai_messages import shown
from pixtral_runtime.inputs.text_file import parsed_json
from pixtral_runtime.server.batch_store import LineProblem
from pixtral_runtime.server.media import Media
from pixtral_runtime.server.problems import client_hint

MOST_PROBLEMS = 100  # that are told


def _envelopes(lines: Lines) -> Iterator[tuple[int, str, dict[str, Any]] | tuple[int, LineError, None]]:
    """Each line's number with its id and body, or with what is wrong. Raises InputError where the file is no text."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield number, *open_envelope(_parsed(line))
        except LineError as error:
            yield number, error, None


def _parsed(line: str) -> object:
    try:
        return parsed_json(line)
    except (ValueError, RecursionError) as error:
        raise LineError("invalid_json_line", None, f"not JSON: {error}") from error


def check_input(path: Path, model: str, most_requests: int) -> tuple[int, tuple[LineProblem, ...]]:
    """How many requests a file has, and why it cannot be worked on."""
    problems: list[LineProblem] = []
    ids: set[str] = set()
    try:
        for number, id, body in _envelopes(Lines(path)):
            if len(problems) >= MOST_PROBLEMS:
                break
            if isinstance(id, LineError):
                problems.append(LineProblem(id.code, str(id), number, id.field))
                continue
            if id in ids:
                message = f"the custom_id {shown(id)} was there before"
                problems.append(LineProblem("duplicate_custom_id", message, number, "custom_id"))
            asked = (body or {}).get("model")
            if asked is not None and asked != model:
                message = f"the model is {shown(asked)}, and the one here is {shown(model)}"
                problems.append(LineProblem("model_mismatch", message, number, "body.model"))
            ids.add(id)
            if len(ids) > most_requests:
                problems.append(LineProblem("too_many_tasks", f"more than {most_requests:,} requests", number))
                break
    except InputError as error:
        problems.append(LineProblem("invalid_file", f"{error}".replace(str(path), "the file")))
    if not ids and not problems:
        problems.append(LineProblem("empty_file", "there is no request in the file"))
    return len(ids), tuple(problems)


def ids_in(path: Path) -> Iterator[str]:
    """The ids of a file's requests, in its order."""
    for _, id, _ in _envelopes(Lines(path)):
        if isinstance(id, str):
            yield id


def read_input(path: Path, settings: Settings, media: Media, max_new_tokens: int) -> tuple[list[Request], list[Record]]:
    """The requests of a file that was checked, and records of those that cannot be honoured."""
    lines = Lines(path)
    requests, refused = list[Request](), list[Record]()
    for _, id, body in _envelopes(lines):
        if not isinstance(id, str) or body is None:
            continue
        try:
            opened = lambda url, detail: media.later(url, detail, lines.store)  # noqa: E731
            requests.append(batch_request(id, body, opened, max_new_tokens))
        except InputError as error:
            record = record_of(Request(id, user_message(""), max_new_tokens, OwnSettings()), settings)
            record.error, record.hint, record.status = str(error), client_hint(error), 400
            record.param = error.field if isinstance(error, FieldError) else None
            refused.append(record)
    return requests, refused
