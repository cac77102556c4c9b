"""The requests that a JSONL file lists, before they are asked.

A line of such a file is one JSON object: `prompt`, or `messages` in the form of OpenAI's chat API, and beside it
`images`, `system`, `max_new_tokens` and `id`; or it is a line of OpenAI's Batch API (`openai_input`). Images are paths,
relative to the file's folder, or data: URLs, which stay in the file until they are wanted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from pixtral_runtime.batch.openai_input import batch_request, is_batch_line, open_envelope
from pixtral_runtime.batch.records import Request
from pixtral_runtime.errors import InputError, Option, Remedy, RequestError
from pixtral_runtime.inputs.conversation import Message, StoredPicture, check_tool_results, user_message
from pixtral_runtime.inputs.data_url import StorePicture, held, stored_in
from pixtral_runtime.inputs.openai_messages import (
    REQUEST_EXAMPLE,
    LocalPicture,
    check_keys,
    local_picture,
    parse_message,
    shown,
    typed_value,
    with_images,
)
from pixtral_runtime.inputs.text_file import parsed_json, read_lines

REQUEST_KEYS = ("id", "prompt", "messages", "images", "system", "max_new_tokens")


def read_request_file(path: Path, *, max_new_tokens: int, system: str | None = None) -> list[Request]:
    """The requests of a JSONL file. Raises InputError.

    Relative paths of images start from the file's folder, or from the working folder where it is a pipe.
    """
    lines = Lines(path, Option("requests", "FILE.jsonl"))
    is_pipe = path.is_relative_to("/dev") or _is_pipe(path)
    store = held if is_pipe else lines.store
    folder = Path() if is_pipe else path.parent
    return read_requests(lines, str(path), max_new_tokens=max_new_tokens, system=system, folder=folder, store=store)


def _is_pipe(path: Path) -> bool:
    try:
        return path.is_fifo()
    except OSError:  # no file can have the name, as its reader says
        return False


class Lines:
    """The lines of a file, which knows where the one lies that was read last. Raises as `read_lines`."""

    def __init__(self, path: Path, *remedies: Remedy) -> None:
        self._path, self._remedies = path, remedies
        self._line, self._end = b"", 0

    def __iter__(self) -> Iterator[str]:
        return read_lines(self._path, *self._remedies, note=self._note)

    def _note(self, line: bytes) -> None:
        self._line = line
        self._end += len(line)

    def store(self, url: str, is_small: bool) -> StoredPicture:
        """A picture of the last line."""
        return stored_in(self._path.absolute(), self._line, self._end - len(self._line))(url, is_small)


def read_requests(
    lines: Iterable[str],
    name: str,
    *,
    max_new_tokens: int,
    system: str | None = None,
    folder: Path,
    store: StorePicture = held,
) -> list[Request]:
    """The requests of a JSONL file called `name`, in its order; empty lines are skipped.

    `max_new_tokens` and `system` hold for requests that bring none of their own, `folder` for relative paths; `store`
    keeps pictures that are data. A request without an id gets its line's number. Raises RequestError with the file, the
    line and what was expected there.
    """
    requests: dict[str, Request] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = _object(line)
            if is_batch_line(entry):
                id, body = open_envelope(entry)
                opened = local_picture(folder, store, reads_detail=True)
                asked = batch_request(id, body, opened, max_new_tokens)
                request = replace(asked, messages=_checked(asked.messages, None, system))
            else:
                opened = local_picture(folder, store)
                request = _request(entry, str(number), max_new_tokens, system, opened)
            if request.id in requests:
                raise RequestError(f"the id {request.id!r} was there before", "give each request an id of its own")
        except InputError as error:
            raise RequestError(f"{name}, line {number}: {error}", *error.remedies) from error
        requests[request.id] = request
    if not requests:
        raise RequestError(f"no requests in {name}", f"one JSON object a line, such as {REQUEST_EXAMPLE}")
    return list(requests.values())


def _object(line: str) -> dict[str, Any]:
    hint = f"one JSON object a line, such as {REQUEST_EXAMPLE}"
    try:
        entry = parsed_json(line)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"not JSON: {error}", hint) from error
    if not isinstance(entry, dict):
        raise RequestError(f"expected an object, found {shown(entry)}", hint)
    return entry


def _request(
    entry: dict[str, Any], default_id: str, max_new_tokens: int, system: str | None, opened: LocalPicture
) -> Request:
    check_keys(entry, REQUEST_KEYS)
    entry = {key: value for key, value in entry.items() if value is not None}  # as tables write what is missing
    if ("prompt" in entry) == ("messages" in entry):
        found = "both" if "prompt" in entry else "neither"
        raise RequestError(f"expected 'prompt' or 'messages', found {found}", f"such as {REQUEST_EXAMPLE}")
    images = tuple(opened(image, "auto") for image in typed_value(entry, "images", list, []))
    if "prompt" in entry:
        messages = user_message(typed_value(entry, "prompt", str), images)
    else:
        messages = with_images(tuple(parse_message(m, opened) for m in typed_value(entry, "messages", list)), images)
    own_system = typed_value(entry, "system", str) if "system" in entry else None
    limit = typed_value(entry, "max_new_tokens", int, max_new_tokens)
    if limit < 1:
        raise RequestError(f"max_new_tokens is {limit}", "a whole number from 1 on")
    return Request(_id(entry.get("id", default_id)), _checked(messages, own_system, system), limit)


def _checked(messages: tuple[Message, ...], own_system: str | None, system: str | None) -> tuple[Message, ...]:
    """The conversation, with the system prompt that is its own, or else everybody's. Raises RequestError."""
    if not messages or messages[-1].role not in ("user", "tool"):
        raise RequestError("the last message is not the user's", "end the conversation with what is asked")
    if not all(message.content or message.tool_calls or message.role == "tool" for message in messages):
        raise RequestError("a message is empty", f"ask something, as in {REQUEST_EXAMPLE}")
    check_tool_results(messages)
    is_own = any(message.role == "system" for message in messages)
    if is_own and own_system is not None:
        raise RequestError("'system' beside a system message", "keep one of the two")
    text = own_system if own_system is not None else "" if is_own else system
    return (Message("system", (text,)), *messages) if text else messages


def _id(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise RequestError(
            f"id: expected a string or a whole number, found {shown(value)}", f"such as {REQUEST_EXAMPLE}"
        )
    return str(value)
