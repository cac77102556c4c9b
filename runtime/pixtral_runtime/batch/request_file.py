"""What is asked, before it is asked: every question of every image, or the requests that a JSONL file lists.

A line of such a file is one JSON object: `prompt`, or `messages` in the form of OpenAI's chat API, and beside it
`images`, `system`, `max_new_tokens` and `id`. Images are paths, relative to the file's folder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, get_args
from urllib.parse import unquote

from pixtral_runtime.batch.records import Request
from pixtral_runtime.errors import InputError
from pixtral_runtime.inputs.prompt import Message, Role, user_message

T = TypeVar("T")
KEYS = ("id", "prompt", "messages", "images", "system", "max_new_tokens")
ROLES: tuple[Role, ...] = get_args(Role)
PART_KEYS = {"text": ("type", "text"), "image": ("type", "path"), "image_url": ("type", "image_url")}
EXAMPLE = '{"id": "1", "prompt": "What is shown?", "images": ["photo.jpg"]}'
KINDS = {str: "a string", int: "a whole number", list: "a list", dict: "an object"}


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


def read_requests(
    lines: Iterable[str], name: str, *, max_new_tokens: int, system: str | None = None, folder: Path
) -> list[Request]:
    """The requests of a JSONL file called `name`, in its order; empty lines are skipped.

    `max_new_tokens` and `system` hold for requests that bring none of their own, `folder` for relative paths. A request
    without an id gets its line's number. Raises InputError with the file, the line and what was expected there.
    """
    requests: dict[str, Request] = {}
    number = 0
    try:
        for number, line in enumerate(lines, start=1):
            text = line.removeprefix("\ufeff") if number == 1 else line
            if not text.strip():
                continue
            request = _request(_object(text), str(number), max_new_tokens, system, folder)
            if request.id in requests:
                raise InputError(f"the id {request.id!r} was there before", "give each request an id of its own")
            requests[request.id] = request
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8 text: {error.reason}", f"iconv -t UTF-8 {name}") from error
    except InputError as error:
        raise InputError(f"{name}, line {number}: {error}", error.hint) from error
    if not requests:
        raise InputError(f"no requests in {name}", f"one JSON object a line, such as {EXAMPLE}")
    return list(requests.values())


def shard(requests: Sequence[Request], index: int, count: int) -> list[Request]:
    """Part `index` of `count`, from 1: every `count`-th request, so that the parts of one list never overlap."""
    return list(requests[index - 1 :: count])


def parse_shard(text: str) -> tuple[int, int]:
    """`2/4` is the second of four parts: (2, 4). Raises InputError."""
    match = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
    index, count = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= index <= count:
        raise InputError(f"{text!r} is no part of a whole", "--shard 2/4 for the second of four parts, counted from 1")
    return index, count


def _object(line: str) -> dict[str, Any]:
    hint = f"one JSON object a line, such as {EXAMPLE}"
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON: {error}", hint) from error
    if not isinstance(entry, dict):
        raise InputError(f"expected an object, found {_shown(entry)}", hint)
    return entry


def _request(entry: dict[str, Any], default_id: str, max_new_tokens: int, system: str | None, folder: Path) -> Request:
    _check_keys(entry, KEYS)
    entry = {key: value for key, value in entry.items() if value is not None}  # as tables write what is missing
    if ("prompt" in entry) == ("messages" in entry):
        found = "both" if "prompt" in entry else "neither"
        raise InputError(f"expected 'prompt' or 'messages', found {found}", f"such as {EXAMPLE}")
    images = tuple(_path(image, folder) for image in _value(entry, "images", list, []))
    if "prompt" in entry:
        messages = user_message(_value(entry, "prompt", str), images)
    else:
        messages = _with_images(tuple(_message(m, folder) for m in _value(entry, "messages", list)), images)
    if not messages or messages[-1].role != "user":
        raise InputError("the last message is not the user's", "end the conversation with what is asked")
    if not all(message.content for message in messages):
        raise InputError("a message is empty", f"ask something, as in {EXAMPLE}")
    is_own = any(message.role == "system" for message in messages)
    if is_own and "system" in entry:
        raise InputError("'system' beside a system message", "keep one of the two")
    own_system = _value(entry, "system", str, "" if is_own else system or "")
    if own_system:
        messages = (Message("system", (own_system,)), *messages)
    limit = _value(entry, "max_new_tokens", int, max_new_tokens)
    if limit < 1:
        raise InputError(f"max_new_tokens is {limit}", "a whole number from 1 on")
    return Request(_id(entry.get("id", default_id)), messages, limit)


def _id(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise InputError(f"id: expected a string or a whole number, found {_shown(value)}", f"such as {EXAMPLE}")
    return str(value)


def _with_images(messages: tuple[Message, ...], images: tuple[Path, ...]) -> tuple[Message, ...]:
    """The conversation with `images` before the text of the user's first message."""
    if not images:
        return messages
    if any(isinstance(part, Path) for message in messages for part in message.content):
        raise InputError("'images' beside images in the messages", "keep one of the two")
    first = next((index for index, message in enumerate(messages) if message.role == "user"), 0)
    return tuple(
        replace(message, content=(*images, *message.content)) if index == first else message
        for index, message in enumerate(messages)
    )


def _message(value: object, folder: Path) -> Message:
    if not isinstance(value, dict):
        raise InputError(f"messages: expected objects, found {_shown(value)}", '{"role": "user", "content": "…"}')
    _check_keys(value, ("role", "content"))
    role, content = value.get("role"), value.get("content")
    if role not in ROLES:
        raise InputError(f"role: expected one of {', '.join(ROLES)}, found {_shown(role)}", 'such as "role": "user"')
    if isinstance(content, str):
        return Message(role, (content,) if content else ())
    if not isinstance(content, list):
        raise InputError(f"content: expected a string or a list, found {_shown(content)}", '"content": "…"')
    parts = tuple(_part(part, folder) for part in content)
    if role != "user" and any(isinstance(part, Path) for part in parts):
        raise InputError(f"an image in a message of the {role}", "put it into a message of the user")
    return Message(role, tuple(part for part in parts if part != ""))


def _part(value: object, folder: Path) -> str | Path:
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(kind, str) or kind not in PART_KEYS:
        raise InputError(
            f"content: expected parts of the type {', '.join(PART_KEYS)}, found {_shown(value)}",
            'such as {"type": "image", "path": "photo.jpg"}',
        )
    _check_keys(value, PART_KEYS[kind])
    if kind == "text":
        return _value(value, "text", str)
    if kind == "image":
        return _path(value.get("path"), folder)
    url = value.get("image_url")
    if isinstance(url, dict):
        _check_keys(url, ("url",))
        url = url.get("url")
    return _path(url, folder)


def _path(value: object, folder: Path) -> Path:
    """An image's path, given as such or as a file:// URL."""
    if not isinstance(value, str) or not value or "\0" in value:
        raise InputError(f"expected an image's path, found {_shown(value)}", 'such as "photos/a.jpg"')
    if re.match(r"data:|[A-Za-z][A-Za-z0-9+.-]*://", value) is None:
        return folder / value
    local = re.fullmatch(r"file://(?:localhost)?(/.+)", value)
    if local is None:
        raise InputError(f"{_shown(value)} is no local file; nothing is downloaded", "save the image and name its path")
    return Path(unquote(local[1]))


def _value(entry: dict[str, Any], key: str, kind: type[T], default: T | None = None) -> T:
    """A value of the expected type. Without a default it must be there."""
    value = entry.get(key, default)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise InputError(f"{key}: expected {KINDS[kind]}, found {_shown(value)}", f"such as {EXAMPLE}")
    return value


def _check_keys(entry: dict[str, Any], known: Sequence[str]) -> None:
    if unknown := sorted(set(entry) - set(known)):
        raise InputError(f"unknown key {', '.join(map(repr, unknown))}", f"the keys are {', '.join(known)}")


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:59] + "…"
