"""What is said to a model, before anything is read or tokenized: turns of text and images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Message:
    """One turn. Content is text and images in the order they are meant: RGB pictures, or paths until they are read."""

    role: Role
    content: tuple[str | Path | Image.Image, ...]


def user_message(
    text: str, images: Sequence[Path | Image.Image] = (), system: str | None = None
) -> tuple[Message, ...]:
    """The usual request: images, then text, and perhaps a system prompt."""
    user = Message("user", (*images, text) if text else tuple(images))
    return (user,) if system is None else (Message("system", (system,)), user)
