"""Conversations as OpenAI's chat API writes them: one dialect for request files, the judge and the server.

Who reads them says what an image's path or URL stands for, by an `OpenPicture`. For request files that is a local file
(`local_picture`): a path relative to a folder, or a file:// URL; or it is a data: URL. Nothing is downloaded.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, get_args
from urllib.parse import unquote

from PIL import Image

from pixtral_runtime.errors import RequestError
from pixtral_runtime.inputs.conversation import TOOL_NAME, Message, Role, StoredPicture, ToolCall
from pixtral_runtime.inputs.data_url import StorePicture, held, is_data_url
from pixtral_runtime.inputs.image_files import SmallFile, read_image_file
from pixtral_runtime.inputs.text_file import parsed_json

T = TypeVar("T")
ROLES: tuple[Role, ...] = get_args(Role)
MESSAGE_KEYS: dict[Role, tuple[str, ...]] = {
    "system": ("role", "content"),
    "user": ("role", "content"),
    "assistant": ("role", "content", "tool_calls", "reasoning_content"),  # what was thought is not read again
    "tool": ("role", "content", "tool_call_id", "name"),  # the name is Mistral's: the call has it already
}
TOOL_EXAMPLE = '{"role": "tool", "tool_call_id": "…", "content": "…"}'
CALL_EXAMPLE = '{"id": "…", "type": "function", "function": {"name": "…", "arguments": "{…}"}}'
PART_KEYS = {"text": ("type", "text"), "image": ("type", "path"), "image_url": ("type", "image_url")}
DETAILS = ("auto", "low", "high")
REQUEST_EXAMPLE = '{"id": "1", "prompt": "What is shown?", "images": ["photo.jpg"]}'
TYPE_NAMES = {str: "a string", int: "a whole number", list: "a list", dict: "an object"}


def with_images(messages: tuple[Message, ...], images: tuple[Path | StoredPicture, ...]) -> tuple[Message, ...]:
    """The conversation with `images` before the text of the user's first message."""
    if not images:
        return messages
    if any(isinstance(part, Path | StoredPicture) for message in messages for part in message.content):
        raise RequestError("'images' beside images in the messages", "keep one of the two")
    first = next((index for index, message in enumerate(messages) if message.role == "user"), 0)
    return tuple(
        replace(message, content=(*images, *message.content)) if index == first else message
        for index, message in enumerate(messages)
    )


OpenPicture = Callable[[object, str], Path | StoredPicture | Image.Image]
"""What an image stands for, from its path or URL and its detail. Raises RequestError, ImageError."""

LocalPicture = Callable[[object, str], Path | StoredPicture]
"""An `OpenPicture` that reads nothing yet."""


def local_picture(folder: Path, store: StorePicture = held, *, reads_detail: bool = False) -> LocalPicture:
    """Images are local files, or data: URLs that `store` keeps.

    Unless `reads_detail`, how large a picture is seen is a setting of the whole job.
    """

    def open_picture(value: object, detail: str) -> Path | StoredPicture:
        is_small = reads_detail and detail == "low"
        if isinstance(value, str) and is_data_url(value):
            return store(value, is_small)
        path = image_path(value, folder)
        return SmallFile(name=str(path), file=path) if is_small else path

    return open_picture


def parse_message(value: object, open_picture: OpenPicture) -> Message:
    """One message of OpenAI's chat API. What is null there is taken as missing, and so are the thoughts and the empty
    list of annotations of an answer: clients send answers back as they got them. Raises RequestError, and what
    `open_picture` raises.
    """
    if not isinstance(value, dict):
        raise RequestError(f"messages: expected objects, found {shown(value)}", '{"role": "user", "content": "…"}')
    value = {key: part for key, part in value.items() if part is not None and (key, part) != ("annotations", [])}
    role, content = value.get("role"), value.get("content")
    role = "system" if role == "developer" else role  # OpenAI's newer word
    if role not in ROLES:
        raise RequestError(f"role: expected one of {', '.join(ROLES)}, found {shown(role)}", 'such as "role": "user"')
    check_keys(value, MESSAGE_KEYS[role])
    calls = tuple(_tool_call(call) for call in typed_value(value, "tool_calls", list, [], CALL_EXAMPLE))
    result_of = typed_value(value, "tool_call_id", str, example=TOOL_EXAMPLE) if role == "tool" else None
    if content is None and calls:
        content = ""
    if isinstance(content, str):
        return Message(role, (content,) if content else (), calls, result_of)
    if not isinstance(content, list):
        raise RequestError(f"content: expected a string or a list, found {shown(content)}", '"content": "…"')
    parts = tuple(_part(part, open_picture) for part in content)
    if role != "user" and not all(isinstance(part, str) for part in parts):
        raise RequestError(f"an image in a message of the {role}", "put it into a message of the user")
    return Message(role, tuple(part for part in parts if part != ""), calls, result_of)


def _tool_call(value: object) -> ToolCall:
    if not isinstance(value, dict):
        raise RequestError(f"tool_calls: expected objects, found {shown(value)}", CALL_EXAMPLE)
    check_keys(value, ("id", "type", "function"))
    if value.get("type", "function") != "function":
        raise RequestError(f'type: expected "function", found {shown(value["type"])}', CALL_EXAMPLE)
    function = typed_value(value, "function", dict, example=CALL_EXAMPLE)
    check_keys(function, ("name", "arguments"))
    id, name = typed_value(value, "id", str, example=CALL_EXAMPLE), tool_name(function.get("name"))
    arguments = typed_value(function, "arguments", str, example=CALL_EXAMPLE)
    try:
        is_object = isinstance(parsed_json(arguments or "{}"), dict)
    except (ValueError, RecursionError):
        is_object = False
    if not is_object:
        raise RequestError(f"arguments: expected the text of a JSON object, found {shown(arguments)}", CALL_EXAMPLE)
    return ToolCall(id, name, arguments or "{}")


def tool_name(value: object) -> str:
    """The name of a function."""
    if not isinstance(value, str) or TOOL_NAME.fullmatch(value) is None:
        raise RequestError(
            f"name: expected 1 to 64 letters, digits, _ and - for a function, found {shown(value)}", '"get_weather"'
        )
    return value


def _part(value: object, open_picture: OpenPicture) -> str | Path | StoredPicture | Image.Image:
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(kind, str) or kind not in PART_KEYS:
        raise RequestError(
            f"content: expected parts of the type {', '.join(PART_KEYS)}, found {shown(value)}",
            'such as {"type": "image", "path": "photo.jpg"}',
        )
    check_keys(value, PART_KEYS[kind])
    if kind == "text":
        return typed_value(value, "text", str)
    if kind == "image":
        return open_picture(value.get("path"), "auto")
    url, detail = value.get("image_url"), "auto"
    if isinstance(url, dict):
        check_keys(url, ("url", "detail"))
        detail = "auto" if url.get("detail") is None else url["detail"]
        if detail not in DETAILS:
            raise RequestError(f"detail: expected one of {', '.join(DETAILS)}, found {shown(detail)}", "leave it away")
        url = url.get("url")
    return open_picture(url, detail)


def image_path(value: object, folder: Path) -> Path:
    """An image's path, given as such or as a file:// URL."""
    if not isinstance(value, str) or not value or "\0" in value:
        raise RequestError(f"expected an image's path, found {shown(value)}", 'such as "photos/a.jpg"')
    if re.match(r"data:|[A-Za-z][A-Za-z0-9+.-]*://", value) is None:
        return folder / value
    local = re.fullmatch(r"file://(?:localhost)?(/.+)", value)
    if local is None:
        raise RequestError(
            f"{shown(value)} is no local file; nothing is downloaded", "save the image and name its path"
        )
    return Path(unquote(local[1]))


def typed_value(
    entry: dict[str, Any], key: str, kind: type[T], default: T | None = None, example: str = REQUEST_EXAMPLE
) -> T:
    """A value of the expected type. Without a default it must be there."""
    value = entry.get(key, default)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise RequestError(f"{key}: expected {TYPE_NAMES[kind]}, found {shown(value)}", f"such as {example}")
    return value


def check_keys(entry: dict[str, Any], known: Sequence[str]) -> None:
    """Raise RequestError for a key that is not known: a typo would be ignored."""
    if unknown := sorted(set(entry) - set(known)):
        raise RequestError(f"unknown key {', '.join(map(repr, unknown))}", f"the keys are {', '.join(known)}")


def shown(value: object) -> str:
    """A value as an error quotes it: JSON, cut off where it is long."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:59] + "…"


def data_uri(path: Path) -> str:
    """The bytes of an image file as they are, as a data: URI. Raises ImageError."""
    return data_uri_of(read_image_file(path))


def data_uri_of(data: bytes) -> str:
    """An image's file as a data: URI."""
    try:
        with Image.open(io.BytesIO(data)) as picture:
            kind = Image.MIME.get(picture.format or "", "image/png")
    except (OSError, Image.DecompressionBombError):
        kind = "image/png"
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
