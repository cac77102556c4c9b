"""What is asked, before it is asked: every question of every image, or the requests that a JSONL file lists.

A line of such a file is one JSON object: `prompt`, or `messages` in the form of OpenAI's chat API, and beside it
`images`, `system`, `max_new_tokens` and `id`. Images are paths, relative to the file's folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pixtral_runtime.batch.records import Request
from pixtral_runtime.errors import InputError, Option, RequestError
from pixtral_runtime.inputs.conversation import Message, check_tool_results, user_message
from pixtral_runtime.inputs.openai_messages import (
    REQUEST_EXAMPLE,
    check_keys,
    image_path,
    local_picture,
    parse_message,
    shown,
    typed_value,
    with_images,
)
from pixtral_runtime.inputs.text_file import parsed_json, read_lines

REQUEST_KEYS = ("id", "prompt", "messages", "images", "system", "max_new_tokens")


def requests_of_images(
    paths: Iterable[Path], questions: Sequence[str], system: str | None, max_new_tokens: int
) -> list[Request]:
    """Every question of every image. The id is the path as given, with `#1`, `#2`, … behind it for several questions.

    The questions of one image follow each other: the image is then read once.
    """
    return [
        Request(
            f"{path}#{number}" if len(questions) > 1 else str(path),
            user_message(question, [path], system),
            max_new_tokens,
        )
        for path in paths
        for number, question in enumerate(questions, start=1)
    ]


def read_request_file(path: Path, *, max_new_tokens: int, system: str | None = None) -> list[Request]:
    """The requests of a JSONL file. Raises InputError.

    Relative paths of images start from the file's folder, or from the working folder where it is a pipe.
    """
    lines = read_lines(path, Option("requests", "FILE.jsonl"))
    folder = Path() if path.is_relative_to("/dev") or _is_pipe(path) else path.parent
    return read_requests(lines, str(path), max_new_tokens=max_new_tokens, system=system, folder=folder)


def _is_pipe(path: Path) -> bool:
    try:
        return path.is_fifo()
    except OSError:  # no file can have the name, as its reader says
        return False


def read_requests(
    lines: Iterable[str], name: str, *, max_new_tokens: int, system: str | None = None, folder: Path
) -> list[Request]:
    """The requests of a JSONL file called `name`, in its order; empty lines are skipped.

    `max_new_tokens` and `system` hold for requests that bring none of their own, `folder` for relative paths. A request
    without an id gets its line's number. Raises RequestError with the file, the line and what was expected there.
    """
    requests: dict[str, Request] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            request = _request(_object(line), str(number), max_new_tokens, system, folder)
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


def _request(entry: dict[str, Any], default_id: str, max_new_tokens: int, system: str | None, folder: Path) -> Request:
    check_keys(entry, REQUEST_KEYS)
    entry = {key: value for key, value in entry.items() if value is not None}  # as tables write what is missing
    if ("prompt" in entry) == ("messages" in entry):
        found = "both" if "prompt" in entry else "neither"
        raise RequestError(f"expected 'prompt' or 'messages', found {found}", f"such as {REQUEST_EXAMPLE}")
    images = tuple(image_path(image, folder) for image in typed_value(entry, "images", list, []))
    opened = local_picture(folder)
    if "prompt" in entry:
        messages = user_message(typed_value(entry, "prompt", str), images)
    else:
        messages = with_images(tuple(parse_message(m, opened) for m in typed_value(entry, "messages", list)), images)
    if not messages or messages[-1].role not in ("user", "tool"):
        raise RequestError("the last message is not the user's", "end the conversation with what is asked")
    if not all(message.content or message.tool_calls or message.role == "tool" for message in messages):
        raise RequestError("a message is empty", f"ask something, as in {REQUEST_EXAMPLE}")
    check_tool_results(messages)
    is_own = any(message.role == "system" for message in messages)
    if is_own and "system" in entry:
        raise RequestError("'system' beside a system message", "keep one of the two")
    own_system = typed_value(entry, "system", str, "" if is_own else system or "")
    if own_system:
        messages = (Message("system", (own_system,)), *messages)
    limit = typed_value(entry, "max_new_tokens", int, max_new_tokens)
    if limit < 1:
        raise RequestError(f"max_new_tokens is {limit}", "a whole number from 1 on")
    return Request(_id(entry.get("id", default_id)), messages, limit)


def _id(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise RequestError(
            f"id: expected a string or a whole number, found {shown(value)}", f"such as {REQUEST_EXAMPLE}"
        )
    return str(value)
