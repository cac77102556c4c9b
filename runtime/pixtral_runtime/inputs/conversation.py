"""What is said to a model, before anything is read or tokenized: text and images, tools called and their results."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from pixtral_runtime.errors import RequestError

Role = Literal["system", "user", "assistant", "tool"]
TOOL_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True)
class ToolCall:
    """That the assistant wants a tool to do something. Arguments are the text of a JSON object."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, kw_only=True)
class StoredPicture(ABC):
    """A picture that is more than a file: data within one, a page, a frame. It is read when it is wanted.

    `name` is for people, `file` what it is read from if that is on the disk, `time_s` where in a video it stands. One
    that `is_small` is to be seen small, whatever the budget of others.
    """

    name: str
    file: Path | None = None
    is_small: bool = False
    time_s: float | None = None

    @abstractmethod
    def read(self) -> bytes:
        """The bytes of a picture's file, in any format that `decode_image` takes. Raises ImageError."""

    def size(self) -> tuple[int, int] | None:
        """(width, height) in pixels, before any EXIF rotation; None where nobody can tell. Raises ImageError."""
        from pixtral_runtime.inputs.image import stored_size

        return stored_size(self.read())

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Message:
    """One turn. Content is text and images in the order they are meant: RGB pictures, or what they are read from.

    An assistant's may have `tool_calls`. Each is answered by a message of the role "tool" with its id as
    `tool_call_id`, before anybody else says something.
    """

    role: Role
    content: tuple[str | Path | StoredPicture | Image.Image, ...]
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None


def user_message(
    text: str, images: Sequence[Path | StoredPicture | Image.Image] = (), system: str | None = None
) -> tuple[Message, ...]:
    """The usual request: images, then text, and perhaps a system prompt."""
    user = Message("user", (*images, text) if text else tuple(images))
    return (user,) if system is None else (Message("system", (system,)), user)


def check_tool_results(messages: Sequence[Message]) -> None:
    """Raises RequestError unless each call has one result, and each result a call that waits for it."""
    waiting: list[str] = []
    for message in messages:
        if message.tool_calls and message.role != "assistant":
            raise RequestError(f"tool calls in a message of the role {message.role}", "the assistant's may have them")
        if message.role == "tool":
            if message.tool_call_id not in waiting:
                raise RequestError(
                    f"a tool's result for {message.tool_call_id!r}, which no call before it waits for",
                    "put it behind the assistant's message with the call of this id",
                )
            waiting.remove(message.tool_call_id)
            continue
        if waiting:
            break
        waiting = [call.id for call in message.tool_calls]
        if len(set(waiting)) < len(waiting):
            raise RequestError("two tool calls of one message have the same id", "give each one of its own")
    if waiting:
        raise RequestError(
            f"the tool call {waiting[0]!r} has no result", 'follow it by a message of the role "tool" with its id'
        )
